/* What sampling.cu needs of CUDA, on the CPU: to test it where there is no GPU.

   Each thread is a fiber, a function with a stack of its own, which runs until it has to wait for others.
   The fibers take turns forwards or backwards, and warps and blocks drift as far apart as the barriers let
   them: if a barrier is missing, one of the two orders gives another result. The blocks of a grid run one
   after another; those of a cooperative launch are all resident at once.

   This says nothing about speed, races within a warp, or memory ordering between processors: that takes a
   GPU. */
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
#define __launch_bounds__(threads)

using std::max;
using std::min;

struct dim3 {
    unsigned x;
    dim3(unsigned x = 1) : x(x) {}
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;
extern "C" int backwards;
int backwards = 0;

// ---------------------------------------------------------------------------------------------------------
// fibers

namespace cpu {

const int STACK = 1 << 15, PROCESSORS = 16; // of the card that this pretends to be; each holds one block

struct Barrier {
    int size, arrived = 0, round = 0;
};

struct Block {
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<uint64_t> memory;
    std::vector<unsigned long long> given[2]; // by each thread in a shuffle, and in the one before
};

struct Fiber {
    std::unique_ptr<char[]> stack{new char[STACK]};
    jmp_buf* here = nullptr; // where it goes on
    Barrier* waits;          // for the end of this round
    int round, block, thread;
    bool done;
};

static std::vector<Fiber> fibers; // kept for the next launch
static std::vector<Block> blocks; // that are there now
static int first;                 // the number of the first of them
static Barrier grid;
static Fiber* self;
static jmp_buf scheduler;
static std::function<void()> kernel;

inline void leave() { // until the scheduler comes back
    jmp_buf here;
    self->here = &here;
    if (!_setjmp(here)) _longjmp(scheduler, 1);
}

inline void wait(Barrier& b) {
    if (++b.arrived == b.size) {
        b.arrived = 0;
        b.round++;
    } else {
        self->waits = &b;
        self->round = b.round;
        leave();
    }
}

inline void live() {
    for (;; leave()) {
        kernel();
        self->done = true;
    }
}

inline void go_on(Fiber& f) { // until it waits or is done
    self = &f, threadIdx = f.thread, blockIdx = first + f.block;
    if (_setjmp(scheduler)) return;
    if (f.here) _longjmp(*f.here, 1);
    ucontext_t birth;
    getcontext(&birth);
    birth.uc_stack.ss_sp = f.stack.get();
    birth.uc_stack.ss_size = STACK;
    makecontext(&birth, live, 0);
    setcontext(&birth);
}

// Run fibers begin .. end - 1 until none can go on: each block as far as it gets, and in it each warp.
// True if any went on.
inline bool run(int begin, int end) {
    int n = end - begin, step = n > int(blockDim.x) ? blockDim.x : n > 32 ? 32 : 1;
    bool any = false, moved;
    do {
        moved = false;
        for (int i = 0; i < n; i += step) {
            int at = backwards ? end - step - i : begin + i;
            Fiber& f = fibers[at];
            if (step > 1) moved |= run(at, at + step);
            else if (!f.done && !(f.waits && f.waits->round == f.round)) go_on(f), moved = true;
        }
        any |= moved;
    } while (moved);
    return any;
}

// `count` blocks at a time. An error if some wait for what others never come to.
inline int together(int count, size_t bytes) {
    const int threads = blockDim.x, n = count * threads;
    std::vector<unsigned long long> given(threads);
    grid = {n};
    blocks.assign(count, {{threads}, std::vector<Barrier>(threads / 32, {32}),
                          std::vector<uint64_t>(bytes / 8 + 1, 0xAAAAAAAAAAAAAAAA),
                          {given, given}});
    if (int(fibers.size()) < n) fibers.resize(n);
    for (int i = 0; i < n; i++) {
        Fiber& f = fibers[i];
        f.waits = nullptr, f.done = false, f.block = i / threads, f.thread = i % threads;
    }
    run(0, n);
    for (int i = 0; i < n; i++)
        if (!fibers[i].done) return fibers.clear(), 719; // cudaErrorLaunchFailure
    return 0;
}

template <class Args>
int launch(void (*f)(Args), dim3 blocks, dim3 threads, void** args, size_t bytes, int at_a_time) {
    kernel = [=] { f(*(Args*)args[0]); };
    gridDim = blocks, blockDim = threads;
    int error = 0;
    for (first = 0; first < int(blocks.x) && !error; first += at_a_time) error = together(at_a_time, bytes);
    return error;
}

inline unsigned long long shuffle(unsigned long long x, int from) {
    Block& b = blocks[self->block];
    Barrier& warp = b.warps[self->thread / 32];
    auto& given = b.given[warp.round % 2]; // who comes here again has met those who read what it gave before
    given[self->thread] = x;
    wait(warp);
    return given[self->thread / 32 * 32 + from];
}

}

// ---------------------------------------------------------------------------------------------------------
// by CUDA's names

inline char* shared_memory() { return (char*)cpu::blocks[cpu::self->block].memory.data(); }
inline void __syncthreads() { cpu::wait(cpu::blocks[cpu::self->block].all); }

namespace cooperative_groups {
struct grid_group {
    void sync() { cpu::wait(cpu::grid); }
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

inline float __fmul_rn(float a, float b) { return a * b; } // and -ffp-contract=off
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }

using cudaStream_t = void*;
enum { cudaDevAttrMultiProcessorCount };
inline int cudaGetDeviceCount(int*) { return 0; }
inline void cudaGetDevice(int*) {}
inline void cudaDeviceGetAttribute(int* value, int, int) { *value = cpu::PROCESSORS; }
template <class F>
void cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* value, F, int, size_t) {
    *value = 1;
}
template <class F>
int cudaLaunchKernel(F f, dim3 blocks, dim3 threads, void** args, size_t bytes, cudaStream_t) {
    return cpu::launch(f, blocks, threads, args, bytes, 1);
}
template <class F>
int cudaLaunchCooperativeKernel(F f, dim3 blocks, dim3 threads, void** args, size_t bytes,
                                cudaStream_t) {
    return cpu::launch(f, blocks, threads, args, bytes, blocks.x);
}
