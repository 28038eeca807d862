/* The part of CUDA that the kernels use, on the CPU: to test them where there is no GPU. Conversations on a
   CPU do not need it: they use reference() in sampling.py.

   Each thread is a fiber, a function with its own stack, which runs until it waits for others. Fibers run in
   order, or in reverse order, and warps and blocks drift as far apart as the barriers let them. Where a
   barrier is missing, one of the two orders gives another result. The blocks of a grid run one after another;
   those of a cooperative launch are all resident at once.

   It shows nothing about speed, races within a warp, or when one multiprocessor sees what another wrote. That
   takes a GPU. */
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
    unsigned x;
    dim3(unsigned x = 1) : x(x) {}
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;
extern "C" int backwards;
int backwards = 0;

// -----------------------------------------------------------------------------------------------------------
// Fibers

namespace cpu {

const int STACK = 1 << 15;      // bytes of each fiber
const int MULTIPROCESSORS = 16; // of the GPU that this pretends to be; each holds one block
const int SHARED = 48 << 10;    // bytes of shared memory that a block may have

struct Barrier {
    int size, arrived = 0, generation = 0;
};

struct Block {
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<uint64_t> memory;
    std::vector<unsigned long long> exchange[2]; // what each thread gave to a shuffle; double-buffered
};

struct Fiber {
    std::unique_ptr<char[]> stack{new char[STACK]};
    jmp_buf* resume_at = nullptr;
    Barrier* barrier; // that it waits at, in this generation
    int generation, block, thread;
    bool done;
};

static std::vector<Fiber> fibers; // kept for the next launch
static std::vector<Block> blocks; // resident now
static int first;                 // the index of the first of them
static Barrier grid;
static Fiber* self;
static jmp_buf scheduler;
static std::function<void()> kernel;

inline void yield() { // back to the scheduler, until it resumes this fiber
    jmp_buf here;
    self->resume_at = &here;
    if (!_setjmp(here)) _longjmp(scheduler, 1);
}

inline int arrive(Barrier& b) {
    int generation = b.generation;
    if (++b.arrived == b.size) b.arrived = 0, b.generation++;
    return generation;
}

inline void wait(Barrier& b, int generation) { // until all have arrived
    if (b.generation != generation) return;
    self->barrier = &b, self->generation = generation;
    yield();
}

inline void wait(Barrier& b) { wait(b, arrive(b)); }

inline void fiber_main() {
    for (;; yield()) {
        kernel();
        self->done = true;
    }
}

inline void resume(Fiber& f) { // until it waits or is done
    self = &f, threadIdx = f.thread, blockIdx = first + f.block;
    if (_setjmp(scheduler)) return;
    if (f.resume_at) _longjmp(*f.resume_at, 1);
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = f.stack.get();
    start.uc_stack.ss_size = STACK;
    makecontext(&start, fiber_main, 0);
    setcontext(&start);
}

// Runs fibers begin .. end - 1 until none can continue: each block as far as it gets, and in it each warp.
// Returns whether any ran.
inline bool run(int begin, int end) {
    int n = end - begin, step = n > int(blockDim.x) ? blockDim.x : n > 32 ? 32 : 1;
    bool any = false, progress;
    do {
        progress = false;
        for (int i = 0; i < n; i += step) {
            int at = backwards ? end - step - i : begin + i;
            Fiber& f = fibers[at];
            if (step > 1) progress |= run(at, at + step);
            else if (!f.done && !(f.barrier && f.barrier->generation == f.generation))
                resume(f), progress = true;
        }
        any |= progress;
    } while (progress);
    return any;
}

// Runs `count` blocks at once. An error if some wait at a barrier that others never reach.
inline int run_blocks(int count, size_t bytes) {
    const int threads = blockDim.x, n = count * threads;
    std::vector<unsigned long long> exchange(threads);
    grid = {n};
    std::vector<uint64_t> garbage(bytes / 8 + 1, 0xAAAAAAAAAAAAAAAA); // shared memory is not initialised
    std::vector<Barrier> warps(threads / 32, {32});
    blocks.assign(count, {{threads}, warps, garbage, {exchange, exchange}});
    if (int(fibers.size()) < n) fibers.resize(n);
    for (int i = 0; i < n; i++) {
        Fiber& f = fibers[i];
        f.barrier = nullptr, f.done = false, f.block = i / threads, f.thread = i % threads;
    }
    run(0, n);
    for (int i = 0; i < n; i++)
        if (!fibers[i].done) return fibers.clear(), 719; // cudaErrorLaunchFailure
    return 0;
}

template <class Args>
int launch(void (*f)(Args), dim3 blocks, dim3 threads, void** args, size_t bytes, int resident) {
    kernel = [=] { f(*(Args*)args[0]); };
    gridDim = blocks, blockDim = threads;
    int error = 0;
    for (first = 0; first < int(blocks.x) && !error; first += resident) error = run_blocks(resident, bytes);
    return error;
}

inline unsigned long long shuffle(unsigned long long x, int from) {
    Block& b = blocks[self->block];
    Barrier& warp = b.warps[self->thread / 32];
    auto& exchange = b.exchange[warp.generation % 2]; // the other buffer may still be read
    exchange[self->thread] = x;
    wait(warp);
    return exchange[self->thread / 32 * 32 + from];
}

}

// -----------------------------------------------------------------------------------------------------------
// CUDA's names

inline char* shared_memory() { return (char*)cpu::blocks[cpu::self->block].memory.data(); }
inline void __syncthreads() { cpu::wait(cpu::blocks[cpu::self->block].all); }

namespace cooperative_groups {
struct grid_group {
    void sync() { cpu::wait(cpu::grid); }
    int barrier_arrive() { return __syncthreads(), cpu::arrive(cpu::grid); }
    void barrier_wait(int token) { cpu::wait(cpu::grid, token), __syncthreads(); }
};
inline grid_group this_grid() { return {}; }
}

inline unsigned long long __shfl_sync(unsigned, unsigned long long x, int from) {
    return cpu::shuffle(x, from);
}
inline unsigned long long __shfl_xor_sync(unsigned, unsigned long long x, int d) {
    return cpu::shuffle(x, threadIdx.x % 32 ^ d);
}
inline unsigned long long __shfl_up_sync(unsigned, unsigned long long x, int d) {
    int lane = threadIdx.x % 32;
    return cpu::shuffle(x, lane < d ? lane : lane - d);
}

template <class T> T atomicAdd(T* p, T x) {
    T before = *p;
    *p += x;
    return before;
}

inline float __fmul_rn(float a, float b) { return a * b; } // with -ffp-contract=off
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }

using cudaStream_t = void*;
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
       cudaFuncAttributeMaxDynamicSharedMemorySize };
inline int cudaGetDeviceCount(int*) { return 0; }
inline void cudaGetDevice(int*) {}
inline void cudaDeviceGetAttribute(int* value, int which, int) {
    *value = which == cudaDevAttrMultiProcessorCount ? cpu::MULTIPROCESSORS : cpu::SHARED;
}
template <class F> int cudaFuncSetAttribute(F, int, int) { return 0; }
template <class F> void cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* value, F, int, size_t) {
    *value = 1;
}
template <class F>
int cudaLaunchKernel(F f, dim3 blocks, dim3 threads, void** args, size_t bytes, cudaStream_t) {
    return cpu::launch(f, blocks, threads, args, bytes, 1);
}
template <class F>
int cudaLaunchCooperativeKernel(F f, dim3 blocks, dim3 threads, void** args, size_t bytes, cudaStream_t) {
    return cpu::launch(f, blocks, threads, args, bytes, blocks.x);
}
