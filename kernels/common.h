/* What sampling.cu (for conversations), head.cu and depth.cu (the laboratory) share: sortable keys, random
   numbers, and reductions over a warp, a block and a grid. */
#pragma once
#include <cstdint>
#include <utility>
#ifdef __CUDACC__
#include <cooperative_groups.h>
__device__ inline char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}
#else
#include "cpu.h"
#endif

using u64 = unsigned long long;

// -----------------------------------------------------------------------------------------------------------
// Sortable keys: argmax as an integer maximum.

// Upper half: the float's bits, reordered so that unsigned integers sort like the floats, NaN above all.
// Lower half: ~index, so that of equal values the first wins.
__device__ inline u64 sort_key(float x, int index) {
    unsigned bits = __float_as_uint(x + 0.0f); // -0 becomes 0
    unsigned key = x != x ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000;
    return u64(key) << 32 | unsigned(~index);
}
__device__ inline int key_index(u64 key) { return ~unsigned(key); }
__device__ inline float key_value(u64 key) {
    unsigned bits = key >> 32;
    return __uint_as_float(bits >> 31 ? bits ^ 0x80000000 : ~bits);
}
__device__ inline bool is_finite(u64 key) {
    return key >= sort_key(-3.4028235e38f, -1) && key < sort_key(INFINITY, -1);
}

// -----------------------------------------------------------------------------------------------------------
// Random numbers

// 53 random bits from Philox4x32-10: a function of its four arguments, with no state.
__device__ inline u64 random_bits(int64_t seed, int64_t step, unsigned draw, unsigned entry) {
    unsigned a = step, b = step >> 32, c = draw, d = entry, k = seed, l = seed >> 32;
    for (int round = 0; round < 10; round++) {
        u64 ac = u64(a) * 0xD2511F53, bd = u64(c) * 0xCD9E8D57;
        a = unsigned(bd >> 32) ^ b ^ k, b = bd, c = unsigned(ac >> 32) ^ d ^ l, d = ac;
        k += 0x9E3779B9, l += 0xBB67AE85;
    }
    return u64(a) << 21 | b >> 11;
}

// -----------------------------------------------------------------------------------------------------------
// Reductions. Every thread gets the result.

struct Sum {
    __device__ u64 operator()(u64 a, u64 b) const { return a + b; }
};
struct Max {
    __device__ u64 operator()(u64 a, u64 b) const { return a > b ? a : b; }
};

// Butterfly: five exchanges between the 32 lanes.
template <class Op> __device__ inline u64 warp_reduce(u64 x, Op op) {
    for (int d = 16; d; d /= 2) x = op(x, __shfl_xor_sync(~0u, x, d));
    return x;
}

// The same for floats. The order is fixed, and every lane gets the same sum.
__device__ inline float warp_sum(float x) {
    for (int d = 16; d; d /= 2) x += __uint_as_float(__shfl_xor_sync(~0u, __float_as_uint(x), d));
    return x;
}

// The sum of x over this lane and all lanes before it.
__device__ inline u64 warp_inclusive_scan(u64 x) {
    for (int d = 1; d < 32; d *= 2) {
        u64 other = __shfl_up_sync(~0u, x, d);
        if (threadIdx.x % 32 >= d) x += other;
    }
    return x;
}

// Each warp, then all warps' results. partial: shared memory for one number per warp.
template <class Op> __device__ inline u64 block_reduce(u64* partial, u64 x, Op op) {
    x = warp_reduce(x, op);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = warp_reduce(threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0, op);
    __syncthreads(); // all threads have read `partial`: it may be overwritten
    return x;
}

const int THREADS = 256; // of a block in a cooperative grid, which has at most as many blocks per row

// The blocks that work on one row together.
struct Team {
    int rank, size;
    u64* partial; // (2, size) in global memory: a number from each block, double-buffered
    int buffer;   // which half was written last
};

// All blocks of the grid wait for each other, and see what the others wrote before.
__device__ inline void grid_sync() { cooperative_groups::this_grid().sync(); }

// Each block, then all blocks of the team. Double buffering saves a second grid sync: a block writes one half
// only after the sync of the other half, and by then all blocks have read this one.
template <class Op> __device__ inline u64 team_reduce(Team& team, u64* shared, u64 x, Op op) {
    x = block_reduce(shared, x, op);
    if (team.size == 1) return x;
    team.buffer ^= 1;
    u64* partial = team.partial + team.buffer * team.size;
    if (threadIdx.x == 0) partial[team.rank] = x;
    grid_sync();
    return block_reduce(shared, threadIdx.x < team.size ? partial[threadIdx.x] : 0, op);
}

// -----------------------------------------------------------------------------------------------------------
// Matrix products with a few vectors

struct alignas(16) Vec { unsigned word[4]; }; // one 16-byte load: 4 floats or 8 bfloat16

__device__ inline float lower(unsigned word) { return __uint_as_float(word << 16); } // of two bfloat16
__device__ inline float upper(unsigned word) { return __uint_as_float(word & 0xFFFF0000); }

const int ROWS = 4; // vectors that share one read of the weights

// Unrolled, so that per-row arrays stay in registers.
template <class F> __device__ inline void for_each_row(int n, F f) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (r < n) f(r);
}

// Asks for some of global memory to be brought into L2, without waiting for it. For all threads of a block.
__device__ inline void prefetch_to_L2(const void* at, int bytes) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0 && bytes)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes) : "memory");
#elif defined(__CUDA_ARCH__)
    for (int i = 128 * threadIdx.x; i < bytes; i += 128 * blockDim.x) // 128: a line
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)at + i));
#endif
}

// -----------------------------------------------------------------------------------------------------------
// Host

// 0 if there is a GPU, and a driver that knows this version of CUDA; else CUDA's error number.
extern "C" int usable() {
    int count;
    return cudaGetDeviceCount(&count);
}

static int multiprocessors() {
    int device, count;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// The most blocks a cooperative grid may have: all must be resident at once.
template <class Kernel> static int resident_blocks(Kernel kernel, size_t shared_bytes) {
    int per_multiprocessor;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, THREADS, shared_bytes);
    return multiprocessors() * per_multiprocessor;
}
