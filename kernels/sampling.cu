/* One token from each row of logits in one launch: the very token that reference() in sampling.py gives.

     logits (rows, V) -> integer weights -> the least weight kept -> a mark within their sum -> token (rows,)

   v1  one thread for each row: the algorithm and nothing else
   v2  one block for each row: reductions and scans by warp shuffles, thresholds by MSD radix select
   v3  several blocks for each row, in shared memory: a cooperative launch with grid syncs
   v4  the matrix product that makes the logits as well, so that they never reach memory; no top-k, no top-p

   Conversations use v3. The others are the laboratory: they show what each step gains (bench.py). None has
   been timed on a card yet. What each reads and writes, for a row of V logits of b bytes:

   v1  reads b V some 70 times (each threshold bit by bit), writes nothing else
   v2  reads b V once; writes and reads 4 V of weights in global memory some ten times, mostly from the cache
   v3  reads b V once; the weights stay in shared memory; 8 KB of histograms for each threshold
   v4  reads the head's weights once for every four rows, and no logits

   The order of the threads does not matter, since everything that is added or compared is an integer.
   Fractions occur only between a logit and its weight, one IEEE rounding at a time: __fmul_rn is a product
   that no compiler may fuse with the sum that follows.

   The same file runs on the CPU, where cpu.h takes CUDA's place. */
#include <cstdint>
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

// What there is to do; class SampleArgs in sampling.py is the same.
struct SampleArgs {
    const void* logits;                  // (rows, V), float or bfloat16
    const int64_t *seed, *step, *recent; // (rows,), (rows,), (rows, n)
    int64_t* token;                      // (rows,), to be filled
    u64* scratch;                        // v2: room for a weight of each entry; v3: (rows, SCRATCH)
    int64_t stride;                      // entries from one row of logits to the next
    double top_p;                        // from 1 on: all
    float scale;                         // log2(e) / temperature; 0: the likeliest token
    float penalty, inverse;              // inverse = 1 / penalty
    unsigned draw;
    int rows, V, n, top_k;               // top_k 0: all
    int bfloat16;                        // whether the logits are
    int blocks;                          // that share a row: v3's launch decides
};

// ---------------------------------------------------------------------------------------------------------
// one entry

__device__ inline float logit(const SampleArgs& a, int row, int64_t i) {
    int64_t at = row * a.stride + i;
    if (a.bfloat16) return __uint_as_float(unsigned(((const uint16_t*)a.logits)[at]) << 16);
    return ((const float*)a.logits)[at];
}

__device__ inline float penalised(const SampleArgs& a, float x) {
    return __fmul_rn(x, x > 0 ? a.inverse : a.penalty);
}

// floor(2^31 * 2^y), y = (x - top) * scale <= 0: weights() of sampling.py.
__device__ inline unsigned weight(const SampleArgs& a, float x, float top) {
    float y = fmaxf(__fmul_rn(x - top, a.scale), -32.0f); // -32 gives 0; so does what is not a number
    float whole = floorf(y), f = y - whole, p = 0.0018671308644115925f;
    p = __fmul_rn(p, f) + 0.009017028845846653f;
    p = __fmul_rn(p, f) + 0.05579991266131401f;
    p = __fmul_rn(p, f) + 0.24016444385051727f;
    p = __fmul_rn(p, f) + 0.6931512951850891f;
    p = __fmul_rn(p, f) + 1.0f;
    return u64(unsigned(p * 0x1p31f)) >> int(-whole);
}

// An integer that grows with x, and of equal ones is larger for the earlier entry i; NaN is above all.
__device__ inline u64 sort_key(float x, int i) {
    unsigned bits = __float_as_uint(x + 0.0f); // -0 equals 0
    unsigned key = x != x ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000;
    return u64(key) << 32 | unsigned(~i);
}
__device__ inline int entry(u64 key) { return ~unsigned(key); }
__device__ inline float value(u64 key) {
    unsigned bits = key >> 32;
    return __uint_as_float(bits >> 31 ? bits ^ 0x80000000 : ~bits);
}
__device__ inline bool finite(u64 key) {
    return key >= sort_key(-3.4028235e38f, -1) && key < sort_key(INFINITY, -1);
}

// ---------------------------------------------------------------------------------------------------------
// one row

// The sum that top-p asks for; the likeliest token stays in any case.
__device__ inline u64 enough(const SampleArgs& a, u64 sum) {
    double least = ceil(double(sum) * a.top_p);
    return least > 1 ? least : 1;
}

// 53 random bits: Philox4x32-10.
__device__ inline u64 bits_of(int64_t seed, int64_t step, unsigned draw, unsigned entry) {
    unsigned a = step, b = step >> 32, c = draw, d = entry, k = seed, l = seed >> 32;
    for (int round = 0; round < 10; round++) {
        u64 ac = u64(a) * 0xD2511F53, bd = u64(c) * 0xCD9E8D57;
        a = unsigned(bd >> 32) ^ b ^ k, b = bd, c = unsigned(ac >> 32) ^ d ^ l, d = ac;
        k += 0x9E3779B9, l += 0xBB67AE85;
    }
    return u64(a) << 21 | b >> 11;
}

// Where in the sum of all weights the draw falls: 0 .. whole - 1.
__device__ inline u64 mark_of(const SampleArgs& a, int row, u64 whole) {
    double share = bits_of(a.seed[row], a.step[row], a.draw, 0) * 0x1p-53; // [0, 1)
    u64 mark = share * double(whole);
    return mark < whole ? mark : whole - 1;
}

// ---------------------------------------------------------------------------------------------------------
// v1: a thread has a row. It keeps nothing, and computes each weight again whenever it needs it.

__global__ void v1(SampleArgs a) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.rows) return;
    auto x = [&](int i) {
        for (int k = 0; k < a.n; k++)
            if (a.recent[int64_t(row) * a.n + k] == i) return penalised(a, logit(a, row, i));
        return logit(a, row, i);
    };
    u64 best = 0;
    for (int i = 0; i < a.V; i++) best = max(best, sort_key(x(i), i));
    if (!finite(best) || a.scale == 0) {
        a.token[row] = finite(best) ? entry(best) : -1;
        return;
    }

    unsigned least = 0; // the least weight that stays
    auto kept = [&](int i) {
        unsigned w = weight(a, x(i), value(best));
        return w >= least ? w : 0;
    };
    // The largest t for which the weights >= t are `need` or more, or (sums) add up to it. Bit by bit from
    // the top.
    auto radix_select = [&](u64 need, bool sums) {
        unsigned t = 0;
        for (unsigned bit = 1u << 31; bit; bit >>= 1) {
            u64 found = 0;
            for (int i = 0; i < a.V; i++)
                if (kept(i) >= (t | bit)) found += sums ? kept(i) : 1;
            if (found >= need) t |= bit;
        }
        return t;
    };
    auto sum = [&] {
        u64 sum = 0;
        for (int i = 0; i < a.V; i++) sum += kept(i);
        return sum;
    };
    if (a.top_k > 0 && a.top_k < a.V) least = radix_select(a.top_k, false);
    if (a.top_p < 1) least = radix_select(enough(a, sum()), true);
    u64 mark = mark_of(a, row, sum()), reached = kept(0);
    int token = 0;
    while (reached <= mark) reached += kept(++token);
    a.token[row] = token;
}

// ---------------------------------------------------------------------------------------------------------
// v2 and v3: many threads share a row. In v1 one thread reads a whole row and computes each weight more
// than 64 times to find both thresholds. Here each weight is computed once, and a threshold takes four
// passes over them.

const int BINS = 256, DIGITS = 4; // radix select: four digits of eight bits, a bin for each value

struct Shared {
    u64 bins[BINS];
    u64 parts[32], warps[32]; // a number for each warp
    u64 need;
    unsigned digit;
    int token;
};

// A block's part of a row, and what it exchanges with the blocks that have the other parts.
struct Part {
    Shared& s;
    unsigned* w;       // (n,): first the logits, as their bits; then the weights
    int row, begin, n; // entries begin .. begin + n - 1 of the row
    int rank, G;       // this is block `rank` of the G that have the row
    u64* bins;         // in global memory, for all G blocks: (2, DIGITS, BINS), histograms of two thresholds
    u64* exchange;     // the same: (2, G), a number from each block; double buffered
    int turn;          // which of the two buffers was written last
};

// Each warp has a contiguous stretch of the part, from warp_begin on; a lane has every 32nd entry of it. So
// each thread has entries of its own, the reads of a warp are coalesced, and the warps are in the order of
// the entries.
__device__ inline int warp_begin(const Part& p, int warp) {
    int steps = (p.n + blockDim.x - 1) / blockDim.x;
    return min(p.n, warp * steps * 32);
}

template <class F> __device__ inline void for_each_own(const Part& p, F f) {
    int warp = threadIdx.x / 32, end = warp_begin(p, warp + 1);
    for (int i = warp_begin(p, warp) + threadIdx.x % 32; i < end; i += 32) f(i);
}

__device__ inline u64 combine(u64 a, u64 b, bool most) { return most ? max(a, b) : a + b; }

// Warp reduce: the sum or the maximum of x over a warp, by five butterfly shuffles; every lane gets it.
__device__ inline u64 warp_reduce(u64 x, bool most) {
    for (int d = 16; d; d /= 2) x = combine(x, __shfl_xor_sync(~0u, x, d), most);
    return x;
}

// Inclusive scan: the sum of x over this lane and those before it.
__device__ inline u64 inclusive_scan(u64 x) {
    for (int d = 1; d < 32; d *= 2) {
        u64 other = __shfl_up_sync(~0u, x, d);
        if (threadIdx.x % 32 >= d) x += other;
    }
    return x;
}

// Block reduce: over each warp, then over the warps.
__device__ inline u64 block_reduce(Shared& s, u64 x, bool most) {
    x = warp_reduce(x, most);
    if (threadIdx.x % 32 == 0) s.parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = warp_reduce(threadIdx.x % 32 < blockDim.x / 32 ? s.parts[threadIdx.x % 32] : 0, most);
    __syncthreads(); // all have read the parts: they may be written again
    return x;
}

// Grid sync: all blocks of the grid wait for each other. What any wrote before, all can read after.
__device__ inline void grid_sync() { cooperative_groups::this_grid().sync(); }

// Reduce over all blocks of a row. Double buffering saves a second sync: a block that writes to one buffer
// has passed the sync of the other, after all had read this one.
__device__ inline u64 row_reduce(Part& p, u64 x, bool most) {
    x = block_reduce(p.s, x, most);
    if (p.G == 1) return x;
    p.turn ^= 1;
    u64* exchange = p.exchange + p.turn * p.G;
    if (threadIdx.x == 0) exchange[p.rank] = x;
    grid_sync();
    return block_reduce(p.s, threadIdx.x < p.G ? exchange[threadIdx.x] : 0, most);
}

// A 64-bit add in shared memory, where atomics have 32 bits: the lower half, then the carry to the upper.
__device__ inline void add(u64* bin, unsigned x) {
    unsigned* half = (unsigned*)bin;
    if (atomicAdd(half, x) + x < x) atomicAdd(half + 1, 1u);
}

// By one warp: the largest digit at which the bins from the last down to it add up to `need`, else 0; and
// how much of that is needed from its own bin. Lane 0 has the last eight bins, lane 31 the first.
__device__ inline void select_digit(Shared& s, u64 need) {
    int lane = threadIdx.x, digit = BINS - 1 - 8 * lane;
    u64 sum = 0;
    for (int i = 0; i < 8; i++) sum += s.bins[digit - i];
    u64 sums = inclusive_scan(sum), before = sums - sum;
    if (before < need && (need <= sums || lane == 31)) {
        while (digit % 8 && before + s.bins[digit] < need) before += s.bins[digit--];
        s.digit = digit;
        s.need = need - before;
    }
}

// MSD radix select: v1's threshold, digit by digit. Of the weights that begin like t, a histogram counts
// (or sums) how many go on with each digit. Digit 0 remains when no other will do, so it needs no count;
// that is as well, since most weights are small, and their atomics would queue at its bin.
__device__ inline unsigned radix_select(Part& p, u64 need, bool sums, u64* bins) {
    Shared& s = p.s;
    unsigned t = 0;
    for (int shift = 24; shift >= 0; shift -= 8, bins += BINS) {
        for (int b = threadIdx.x; b < BINS; b += blockDim.x) s.bins[b] = 0;
        __syncthreads();
        for_each_own(p, [&](int i) {
            unsigned w = p.w[i], digit = w >> shift & 255;
            if (digit && (w ^ t) >> shift < 256) add(&s.bins[digit], sums ? w : 1);
        });
        __syncthreads();
        if (p.G > 1) { // add up all blocks' bins
            for (int b = threadIdx.x; b < BINS; b += blockDim.x)
                if (s.bins[b]) atomicAdd(&bins[b], s.bins[b]);
            grid_sync();
            for (int b = threadIdx.x; b < BINS; b += blockDim.x) s.bins[b] = bins[b];
            __syncthreads();
        }
        if (threadIdx.x < 32) select_digit(s, need);
        __syncthreads();
        t |= s.digit << shift;
        need = s.need;
    }
    return t;
}

// Weights below `least` become 0. Returns the sum of the thread's own that stay.
__device__ inline u64 keep(Part& p, unsigned least) {
    u64 sum = 0;
    for_each_own(p, [&](int i) { sum += p.w[i] >= least ? p.w[i] : (p.w[i] = 0); });
    return sum;
}

// Load the part's logits and apply the penalty. Memory is far, so a thread has eight loads in flight.
__device__ inline void fill(const SampleArgs& a, Part& p) {
    int warp = threadIdx.x / 32, end = warp_begin(p, warp + 1);
    for (int i = warp_begin(p, warp) + threadIdx.x % 32; i < end; i += 8 * 32) {
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; k++) x[k] = i + 32 * k < end ? logit(a, p.row, p.begin + i + 32 * k) : 0;
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (i + 32 * k < end) p.w[i + 32 * k] = __float_as_uint(x[k]);
    }
    __syncthreads();
    for (int k = threadIdx.x; k < a.n; k += blockDim.x) { // a token that occurs twice is written twice, alike
        int64_t i = a.recent[int64_t(p.row) * a.n + k] - p.begin;
        if (0 <= i && i < p.n) p.w[i] = __float_as_uint(penalised(a, logit(a, p.row, p.begin + i)));
    }
    __syncthreads();
}

// The block that has the mark finds the entry at which the running sum of the row's weights exceeds it.
// own: the sum that keep() returned.
__device__ inline void draw(const SampleArgs& a, Part& p, u64 own) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, end = warp_begin(p, warp + 1);
    u64 sum = warp_reduce(own, false);
    if (lane == 0) p.s.warps[warp] = sum;
    u64 mark = mark_of(a, p.row, row_reduce(p, own, false));
    u64* exchange = p.exchange + p.turn * p.G;
    if (p.G > 1) mark -= block_reduce(p.s, threadIdx.x < p.rank ? exchange[threadIdx.x] : 0, false);
    for (int i = 0; i < warp; i++) mark -= p.s.warps[i];
    if (mark >= sum) return; // not this warp's; what is below 0 is a very large number
    for (int i = warp_begin(p, warp) + lane;; i += 32) {
        u64 w = i < end ? p.w[i] : 0, sums = inclusive_scan(w), all = __shfl_sync(~0u, sums, 31);
        if (sums - w <= mark && mark < sums) p.s.token = p.begin + i;
        if (mark < all) return;
        mark -= all;
    }
}

__device__ inline void sample_row(const SampleArgs& a, Part& p) {
    Shared& s = p.s;
    if (p.G > 1) // before the first grid sync, and after the last one of the row before
        for (int b = p.rank * blockDim.x + threadIdx.x; b < 2 * DIGITS * BINS; b += p.G * blockDim.x)
            p.bins[b] = 0;
    if (threadIdx.x == 0) s.token = -1;
    fill(a, p);
    u64 best = 0;
    for_each_own(p, [&](int i) { best = max(best, sort_key(__uint_as_float(p.w[i]), p.begin + i)); });
    best = row_reduce(p, best, true);
    if (a.scale > 0) { // a row without a token too, all weights 0: its blocks must reach each grid sync
        u64 own = 0;
        for_each_own(p, [&](int i) { own += p.w[i] = weight(a, __uint_as_float(p.w[i]), value(best)); });
        if (a.top_k > 0 && a.top_k < a.V) own = keep(p, radix_select(p, a.top_k, false, p.bins));
        if (a.top_p < 1) {
            u64 need = enough(a, row_reduce(p, own, false));
            own = keep(p, radix_select(p, need, true, p.bins + DIGITS * BINS));
        }
        draw(a, p, own);
    } else if (p.rank == 0 && threadIdx.x == 0 && finite(best)) {
        s.token = entry(best);
    }
    __syncthreads();
    if (threadIdx.x == 0 && (s.token >= 0 || (p.rank == 0 && !finite(best)))) a.token[p.row] = s.token;
    __syncthreads(); // before the next row changes s.token
}

// v2: a block has a row. It keeps the weights in global memory, where there is room for 152064.
__global__ void __launch_bounds__(1024) v2(SampleArgs a) {
    int row = blockIdx.x;
    unsigned* w = (unsigned*)a.scratch + int64_t(row) * a.V;
    Part p{*(Shared*)shared_memory(), w, row, 0, a.V, 0, 1, nullptr, nullptr, 0};
    sample_row(a, p);
}

// v3: with one row, v2 leaves all of the card's processors idle but one, which goes to memory in each pass.
// Here G blocks share a row, each a part that fits into its shared memory. Up to PART entries need one
// block and no grid sync.
const int THREADS = 256, PART = 11 * 1024;           // 44 KiB of weights: every card has that for a block
const int SCRATCH = 2 * DIGITS * BINS + 2 * THREADS; // of a row: bins, exchange

__global__ void __launch_bounds__(THREADS) v3(SampleArgs a) {
    Shared& s = *(Shared*)shared_memory();
    int G = a.blocks, group = blockIdx.x / G, groups = gridDim.x / G, rank = blockIdx.x % G;
    int each = (a.V + G - 1) / G, begin = min(a.V, rank * each), n = min(each, a.V - begin);
    u64* scratch = a.scratch + group * SCRATCH;
    Part p{s, (unsigned*)(&s + 1), 0, begin, n, rank, G, scratch, scratch + 2 * DIGITS * BINS, 0};
    // All blocks must reach each grid sync. If the last round has too few rows, some are done twice, with
    // the same result.
    for (int first = 0; first < a.rows; first += groups) {
        p.row = (first + group) % a.rows;
        sample_row(a, p);
    }
}

// ---------------------------------------------------------------------------------------------------------
// v4: the head's product as well (FlashSampling, arXiv 2603.15854). The entry with the largest logit /
// temperature + Gumbel noise is a draw from the softmax, and the maximum of a row is the maximum of its
// parts' maxima. So a logit is forgotten as soon as it is known. Top-k and top-p cannot be had this way.

// What there is to do; class HeadArgs in sampling.py is the same.
struct HeadArgs {
    const void *x, *weight;     // (rows, D), (V, D), float or bfloat16, D a multiple of 8
    const int64_t *seed, *step; // (rows,)
    int64_t* token;             // (rows,), to be filled
    u64* scratch;               // (2 * THREADS,): exchange
    float scale;                // log2(e) / temperature; 0: the likeliest token
    unsigned draw;
    int rows, V, D, bfloat16;
};

const int SIDE = 4; // rows that share one reading of the weights
const int TILE = 8; // entries that a warp computes one after another, before it adds the noise to all of them

struct alignas(16) Chunk { unsigned word[4]; }; // what a thread reads at a time: 4 floats or 8 bfloat16

__device__ inline float product(const Chunk& a, const Chunk& b, bool bfloat16) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned u = a.word[i], v = b.word[i];
        if (bfloat16) {
            sum += __uint_as_float(u << 16) * __uint_as_float(v << 16);
            u &= 0xFFFF0000, v &= 0xFFFF0000;
        }
        sum += __uint_as_float(u) * __uint_as_float(v);
    }
    return sum;
}

__device__ inline float warp_reduce(float x) {
    for (int d = 16; d; d /= 2) x += __uint_as_float(__shfl_xor_sync(~0u, __float_as_uint(x), d));
    return x;
}

// The score of an entry with logit x. The noise is -log2(-log2 u), u in (0, 1): Gumbel's in units of log 2,
// less a constant.
__device__ inline float score(const HeadArgs& a, int row, int i, float x) {
    if (a.scale == 0) return x;
    double u = ((bits_of(a.seed[row], a.step[row], a.draw, i) >> 1) + 0.5) * 0x1p-52;
    return __fmul_rn(x, a.scale) + float(-log2(-log2(u)));
}

// Unrolled, so that what f has of each row stays in registers.
template <class F> __device__ inline void each_row(int side, F f) {
#pragma unroll
    for (int r = 0; r < SIDE; r++)
        if (r < side) f(r);
}

__global__ void __launch_bounds__(THREADS) v4(HeadArgs a) {
    Shared& s = *(Shared*)shared_memory();
    Part p{s, nullptr, 0, 0, 0, int(blockIdx.x), int(gridDim.x), nullptr, a.scratch, 0};
    const Chunk *weight = (const Chunk*)a.weight, *x = (const Chunk*)a.x;
    int lane = threadIdx.x % 32, warp = (blockIdx.x * THREADS + threadIdx.x) / 32;
    int warps = gridDim.x * THREADS / 32;
    int chunks = a.D / (a.bfloat16 ? 8 : 4);
    for (int first = 0; first < a.rows; first += SIDE) {
        int side = min(SIDE, a.rows - first);
        u64 best[SIDE] = {};
        for (int tile = warp * TILE; tile < a.V; tile += warps * TILE) {
            float mine[SIDE] = {}; // the logits of entry tile + lane
            for (int i = 0; i < min(TILE, a.V - tile); i++) {
                float sums[SIDE] = {};
#pragma unroll 4
                for (int c = lane; c < chunks; c += 32) {
                    Chunk w = weight[int64_t(tile + i) * chunks + c];
                    each_row(side, [&](int r) {
                        sums[r] += product(w, x[int64_t(first + r) * chunks + c], a.bfloat16);
                    });
                }
                each_row(side, [&](int r) {
                    float logit = warp_reduce(sums[r]);
                    if (lane == i) mine[r] = logit;
                });
            }
            if (lane < TILE && tile + lane < a.V)
                each_row(side, [&](int r) {
                    best[r] = max(best[r], sort_key(score(a, first + r, tile + lane, mine[r]), tile + lane));
                });
        }
        each_row(side, [&](int r) {
            u64 most = row_reduce(p, best[r], true);
            if (p.rank == 0 && threadIdx.x == 0) a.token[first + r] = finite(most) ? entry(most) : -1;
        });
    }
}

// ---------------------------------------------------------------------------------------------------------
// from the host: 0, or CUDA's number of the error

extern "C" int usable() { // is there a card, and a driver that knows this version of CUDA?
    int cards;
    return cudaGetDeviceCount(&cards);
}

extern "C" int scratch_size() { return SCRATCH; }

static int processors() {
    int device, count;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// How many blocks a cooperative grid may have: all must be resident at once.
template <class F> static int at_a_time(F f, size_t bytes) {
    int resident;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, f, THREADS, bytes);
    return processors() * resident;
}

extern "C" int sample(const SampleArgs* given, int version, cudaStream_t stream) {
    SampleArgs a = *given;
    void* pointers[] = {&a};
    if (version == 1) return cudaLaunchKernel(v1, dim3((a.rows + 31) / 32), dim3(32), pointers, 0, stream);
    if (version == 2) return cudaLaunchKernel(v2, dim3(a.rows), dim3(1024), pointers, sizeof(Shared), stream);

    a.blocks = a.V <= PART ? 1 : max((a.V + PART - 1) / PART, min(processors() / a.rows, THREADS));
    size_t bytes = sizeof(Shared) + sizeof(unsigned) * ((a.V + a.blocks - 1) / a.blocks);
    if (a.blocks == 1) return cudaLaunchKernel(v3, dim3(a.rows), dim3(THREADS), pointers, bytes, stream);
    int groups = min(a.rows, at_a_time(v3, bytes) / a.blocks);
    return cudaLaunchCooperativeKernel(v3, dim3(groups * a.blocks), dim3(THREADS), pointers, bytes, stream);
}

extern "C" int sample_head(const HeadArgs* given, cudaStream_t stream) {
    HeadArgs a = *given;
    void* pointers[] = {&a};
    const int each = TILE * THREADS / 32; // entries that a block computes in one go
    int blocks = min(min(at_a_time(v4, sizeof(Shared)), THREADS), (a.V + each - 1) / each);
    return cudaLaunchCooperativeKernel(v4, dim3(blocks), dim3(THREADS), pointers, sizeof(Shared), stream);
}
