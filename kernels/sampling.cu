/* One token from each row of logits in one launch: the very token that reference() in sampling.py gives.

     logits (rows, V) -> weights, 32-bit integers -> the least weight that stays -> a mark within their sum -> token (rows,)

   v1  a thread has a row: the algorithm, and nothing else
   v2  a block has a row: its threads add through shuffles, and find a threshold eight bits at a time
   v3  a row is spread over the card: each block keeps a part in its shared memory, and they meet where they need the whole
   v4  the product that makes the logits as well, which then are never in memory: no top-k, no top-p, and other random numbers

   The order of the threads does not matter, for what is added or compared is an integer. Fractions occur only between a logit and
   its weight, one IEEE rounding at a time: __fmul_rn is a product that no compiler may merge with the sum that follows it.

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

// What there is to do; class Job in sampling.py is the same.
struct Job {
    const void* logits;                  // (rows, V), float or bfloat16
    const int64_t *seed, *step, *recent; // (rows,), (rows,), (rows, n)
    const unsigned* table;               // (V, width): what to fetch for each token, in words of 32 bits
    int64_t* token;                      // (rows,), to be filled
    unsigned* fetched;                   // (rows, width), to be filled
    u64* scratch;                        // v2: room for a weight of each entry; v3: (rows, SCRATCH)
    int64_t stride;                      // entries from one row of logits to the next
    double top_p;                        // from 1 on: all
    float scale;                         // log2(e) / temperature; 0: the likeliest token
    float penalty, inverse;              // inverse = 1 / penalty
    unsigned draw;
    int rows, V, n, width, top_k;        // top_k 0: all
    int bfloat16;                        // whether the logits are
    int blocks;                          // that share a row: v3's launch decides
};

// ---------------------------------------------------------------------------------------------------------------------
// one entry

__device__ inline float logit(const Job& j, int row, int64_t i) {
    int64_t at = row * j.stride + i;
    return j.bfloat16 ? __uint_as_float(unsigned(((const uint16_t*)j.logits)[at]) << 16) : ((const float*)j.logits)[at];
}

__device__ inline float penalised(const Job& j, float x) { return __fmul_rn(x, x > 0 ? j.inverse : j.penalty); }

// floor(2^31 * 2^y), y = (x - top) * scale <= 0: weights() of sampling.py.
__device__ inline unsigned weight(const Job& j, float x, float top) {
    float y = fmaxf(__fmul_rn(x - top, j.scale), -32.0f); // -32 gives 0; so does what is not a number
    float whole = floorf(y), f = y - whole, p = 0.0018671308644115925f;
    p = __fmul_rn(p, f) + 0.009017028845846653f;
    p = __fmul_rn(p, f) + 0.05579991266131401f;
    p = __fmul_rn(p, f) + 0.24016444385051727f;
    p = __fmul_rn(p, f) + 0.6931512951850891f;
    p = __fmul_rn(p, f) + 1.0f;
    return u64(unsigned(p * 0x1p31f)) >> int(-whole);
}

// An integer that grows with x, and of equal ones is larger for the earlier entry i; NaN is above all.
__device__ inline u64 place(float x, int i) {
    unsigned bits = __float_as_uint(x + 0.0f); // -0 equals 0
    unsigned key = x != x ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000;
    return u64(key) << 32 | unsigned(~i);
}
__device__ inline int entry(u64 place) { return ~unsigned(place); }
__device__ inline float value(u64 place) {
    unsigned key = place >> 32;
    return __uint_as_float(key >> 31 ? key ^ 0x80000000 : ~key);
}
__device__ inline bool finite(u64 place) { return place >= ::place(-3.4028235e38f, -1) && place < ::place(INFINITY, -1); }

// ---------------------------------------------------------------------------------------------------------------------
// one row

// The sum that top-p asks for; the likeliest token stays in any case.
__device__ inline u64 enough(const Job& j, u64 sum) {
    double least = ceil(double(sum) * j.top_p);
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
__device__ inline u64 mark_of(const Job& j, int row, u64 whole) {
    double share = bits_of(j.seed[row], j.step[row], j.draw, 0) * 0x1p-53; // [0, 1)
    u64 mark = share * double(whole);
    return mark < whole ? mark : whole - 1;
}

// The row's token is known. So many threads write it, and fetch its row of the table; token -1 gets row 0.
__device__ inline void finish(const Job& j, int row, int token, int thread, int threads) {
    if (thread == 0) j.token[row] = token;
    if (j.table)
        for (int i = thread; i < j.width; i += threads)
            j.fetched[int64_t(row) * j.width + i] = j.table[int64_t(token < 0 ? 0 : token) * j.width + i];
}

// ---------------------------------------------------------------------------------------------------------------------
// v1: a thread has a row. It keeps nothing, and computes each weight again whenever it needs it.

__global__ void v1(Job j) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= j.rows) return;
    auto x = [&](int i) {
        for (int k = 0; k < j.n; k++)
            if (j.recent[int64_t(row) * j.n + k] == i) return penalised(j, logit(j, row, i));
        return logit(j, row, i);
    };
    u64 best = 0;
    for (int i = 0; i < j.V; i++) best = max(best, place(x(i), i));
    if (!finite(best)) return finish(j, row, -1, 0, 1);
    if (j.scale == 0) return finish(j, row, entry(best), 0, 1);

    unsigned least = 0; // the least weight that stays
    auto kept = [&](int i) {
        unsigned w = weight(j, x(i), value(best));
        return w >= least ? w : 0;
    };
    // The largest t for which the weights >= t are `need` or more, or (sums) add up to it. Bit by bit from the top.
    auto threshold = [&](u64 need, bool sums) {
        unsigned t = 0;
        for (unsigned bit = 1u << 31; bit; bit >>= 1) {
            u64 found = 0;
            for (int i = 0; i < j.V; i++)
                if (kept(i) >= (t | bit)) found += sums ? kept(i) : 1;
            if (found >= need) t |= bit;
        }
        return t;
    };
    auto sum = [&] {
        u64 sum = 0;
        for (int i = 0; i < j.V; i++) sum += kept(i);
        return sum;
    };
    if (j.top_k > 0 && j.top_k < j.V) least = threshold(j.top_k, false);
    if (j.top_p < 1) least = threshold(enough(j, sum()), true);
    u64 mark = mark_of(j, row, sum()), reached = kept(0);
    int token = 0;
    while (reached <= mark) reached += kept(++token);
    finish(j, row, token, 0, 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// v2 and v3: a block has a row, or a part of it. In v1 one thread reads a whole row and computes each weight more than 64 times if
// it has to find both thresholds. Now many threads read, each weight is computed once, and a threshold takes four passes.

const int BINS = 256, DIGITS = 4; // a threshold has four digits of eight bits; for each value of a digit there is a bin

struct Shared {
    u64 bins[BINS];
    u64 parts[32], warps[32]; // a number for each warp
    u64 need;
    unsigned digit;
    int token;
};

// What a block has of a row, and where it meets the blocks that have the rest.
struct Part {
    Shared& s;
    unsigned* w;       // (n,): first the logits, as their bits; then the weights
    int row, begin, n; // entries begin .. begin + n - 1 of the row
    int rank, G;       // this is block `rank` of the G that have the row
    u64 *bins, *board; // in global memory, for all G: (2, DIGITS, BINS), of two thresholds; (2, G), a number from each block
    int turn;          // which board was written last
};

// A warp has a stretch of the part, a lane every 32nd entry of it. So each thread has its own entries, the 32 that a warp reads at
// a time lie side by side, and the warps are in the order of the entries.
__device__ inline int stretch(const Part& p, int warp) {
    int steps = (p.n + blockDim.x - 1) / blockDim.x;
    return min(p.n, warp * steps * 32);
}

template <class F> __device__ inline void each_own(const Part& p, F f) {
    int warp = threadIdx.x / 32, end = stretch(p, warp + 1);
    for (int i = stretch(p, warp) + threadIdx.x % 32; i < end; i += 32) f(i);
}

__device__ inline u64 join(u64 a, u64 b, bool most) { return most ? max(a, b) : a + b; }

// The sum of what the threads of a warp have, or the most: five exchanges, and each of them knows it.
__device__ inline u64 of_warp(u64 x, bool most) {
    for (int d = 16; d; d /= 2) x = join(x, __shfl_xor_sync(~0u, x, d), most);
    return x;
}

// The sum of x over this lane and those before it.
__device__ inline u64 up_to(u64 x) {
    for (int d = 1; d < 32; d *= 2) {
        u64 other = __shfl_up_sync(~0u, x, d);
        if (threadIdx.x % 32 >= d) x += other;
    }
    return x;
}

// Of a block: of each warp, then of the warps.
__device__ inline u64 of_block(Shared& s, u64 x, bool most) {
    x = of_warp(x, most);
    if (threadIdx.x % 32 == 0) s.parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warp(threadIdx.x % 32 < blockDim.x / 32 ? s.parts[threadIdx.x % 32] : 0, most);
    __syncthreads(); // all have read the parts: they may be written again
    return x;
}

// All blocks of the grid wait for each other. What any of them wrote before, all can read after.
__device__ inline void meet() { cooperative_groups::this_grid().sync(); }

// Of a row. Two boards take turns: whoever writes on one has met all who read it, at the meeting about the other.
__device__ inline u64 of_row(Part& p, u64 x, bool most) {
    x = of_block(p.s, x, most);
    if (p.G == 1) return x;
    p.turn ^= 1;
    u64* board = p.board + p.turn * p.G;
    if (threadIdx.x == 0) board[p.rank] = x;
    meet();
    return of_block(p.s, threadIdx.x < p.G ? board[threadIdx.x] : 0, most);
}

// Add to a bin in shared memory, where the hardware adds 32 bits at a time: the lower half, then what it carries to the upper.
__device__ inline void add(u64* bin, unsigned x) {
    unsigned* half = (unsigned*)bin;
    if (atomicAdd(half, x) + x < x) atomicAdd(half + 1, 1u);
}

// For one warp: the largest digit at which the bins from the last down to it come to `need`, else 0; and what is needed of that bin
// itself. Lane 0 has the last eight bins, lane 31 the first.
__device__ inline void pick(Shared& s, u64 need) {
    int lane = threadIdx.x, digit = BINS - 1 - 8 * lane;
    u64 sum = 0;
    for (int i = 0; i < 8; i++) sum += s.bins[digit - i];
    u64 sums = up_to(sum), before = sums - sum;
    if (before < need && (need <= sums || lane == 31)) {
        while (digit % 8 && before + s.bins[digit] < need) before += s.bins[digit--];
        s.digit = digit;
        s.need = need - before;
    }
}

// v1's threshold, digit by digit: of the weights that begin like t, how many (or how much) go on with each digit? The digit 0 is what
// is left when no other will do and needs no count. That is as well: most weights are small, and would queue at its bin.
__device__ inline unsigned threshold(Part& p, u64 need, bool sums, u64* bins) {
    Shared& s = p.s;
    unsigned t = 0;
    for (int shift = 24; shift >= 0; shift -= 8, bins += BINS) {
        for (int b = threadIdx.x; b < BINS; b += blockDim.x) s.bins[b] = 0;
        __syncthreads();
        each_own(p, [&](int i) {
            unsigned w = p.w[i], digit = w >> shift & 255;
            if (digit && (w ^ t) >> shift < 256) add(&s.bins[digit], sums ? w : 1);
        });
        __syncthreads();
        if (p.G > 1) { // add up all blocks' bins
            for (int b = threadIdx.x; b < BINS; b += blockDim.x)
                if (s.bins[b]) atomicAdd(&bins[b], s.bins[b]);
            meet();
            for (int b = threadIdx.x; b < BINS; b += blockDim.x) s.bins[b] = bins[b];
            __syncthreads();
        }
        if (threadIdx.x < 32) pick(s, need);
        __syncthreads();
        t |= s.digit << shift;
        need = s.need;
    }
    return t;
}

// Weights below `least` become 0. Returns the sum of the thread's own that stay.
__device__ inline u64 keep(Part& p, unsigned least) {
    u64 sum = 0;
    each_own(p, [&](int i) { sum += p.w[i] >= least ? p.w[i] : (p.w[i] = 0); });
    return sum;
}

// The logits of the part, with the penalty. Memory is far, so a thread asks for eight before the first has come.
__device__ inline void fill(const Job& j, Part& p) {
    int warp = threadIdx.x / 32, end = stretch(p, warp + 1);
    for (int i = stretch(p, warp) + threadIdx.x % 32; i < end; i += 8 * 32) {
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; k++) x[k] = i + 32 * k < end ? logit(j, p.row, p.begin + i + 32 * k) : 0;
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (i + 32 * k < end) p.w[i + 32 * k] = __float_as_uint(x[k]);
    }
    __syncthreads();
    for (int k = threadIdx.x; k < j.n; k += blockDim.x) { // a token that is there twice is written twice, the same
        int64_t i = j.recent[int64_t(p.row) * j.n + k] - p.begin;
        if (0 <= i && i < p.n) p.w[i] = __float_as_uint(penalised(j, logit(j, p.row, p.begin + i)));
    }
    __syncthreads();
}

// The block that has the mark finds the entry at which the running sum of the row's weights exceeds it. own: keep()'s
__device__ inline void draw(const Job& j, Part& p, u64 own) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, end = stretch(p, warp + 1);
    u64 sum = of_warp(own, false);
    if (lane == 0) p.s.warps[warp] = sum;
    u64 mark = mark_of(j, p.row, of_row(p, own, false));
    if (p.G > 1) mark -= of_block(p.s, threadIdx.x < p.rank ? p.board[p.turn * p.G + threadIdx.x] : 0, false);
    for (int i = 0; i < warp; i++) mark -= p.s.warps[i];
    if (mark >= sum) return; // not this warp's; what is below 0 is a very large number
    for (int i = stretch(p, warp) + lane;; i += 32) {
        u64 w = i < end ? p.w[i] : 0, sums = up_to(w), all = __shfl_sync(~0u, sums, 31);
        if (sums - w <= mark && mark < sums) p.s.token = p.begin + i;
        if (mark < all) return;
        mark -= all;
    }
}

__device__ inline void choose(const Job& j, Part& p) {
    Shared& s = p.s;
    if (p.G > 1) // before the first meeting, and after the last one of the row before
        for (int b = p.rank * blockDim.x + threadIdx.x; b < 2 * DIGITS * BINS; b += p.G * blockDim.x) p.bins[b] = 0;
    if (threadIdx.x == 0) s.token = -1;
    fill(j, p);
    u64 best = 0;
    each_own(p, [&](int i) { best = max(best, place(__uint_as_float(p.w[i]), p.begin + i)); });
    best = of_row(p, best, true);
    if (j.scale > 0) { // in a row without a token too, whose weights are all 0: its blocks must not miss a meeting
        u64 own = 0;
        each_own(p, [&](int i) { own += p.w[i] = weight(j, __uint_as_float(p.w[i]), value(best)); });
        if (j.top_k > 0 && j.top_k < j.V) own = keep(p, threshold(p, j.top_k, false, p.bins));
        if (j.top_p < 1) own = keep(p, threshold(p, enough(j, of_row(p, own, false)), true, p.bins + DIGITS * BINS));
        draw(j, p, own);
    } else if (p.rank == 0 && threadIdx.x == 0 && finite(best)) {
        s.token = entry(best);
    }
    __syncthreads();
    if (s.token >= 0 || (p.rank == 0 && !finite(best))) finish(j, p.row, s.token, threadIdx.x, blockDim.x);
    __syncthreads(); // all have read the token
}

// v2: a block has a row. It keeps the weights in global memory, where there is room for 152064.
__global__ void __launch_bounds__(1024) v2(Job j) {
    int row = blockIdx.x;
    Part p{*(Shared*)shared_memory(), (unsigned*)j.scratch + int64_t(row) * j.V, row, 0, j.V, 0, 1, nullptr, nullptr, 0};
    choose(j, p);
}

// v3: if there is one row, v2 leaves all of the card's processors idle but one, and that one goes to memory in each pass. Here G
// blocks have a row, each a part for which its shared memory has room. Up to PART entries need one block, and no meeting.
const int THREADS = 256, PART = 11 * 1024;           // 44 KiB of weights: every card has that for a block
const int SCRATCH = 2 * DIGITS * BINS + 2 * THREADS; // of a row: bins, boards

__global__ void __launch_bounds__(THREADS) v3(Job j) {
    Shared& s = *(Shared*)shared_memory();
    int G = j.blocks, group = blockIdx.x / G, groups = gridDim.x / G, rank = blockIdx.x % G;
    int each = (j.V + G - 1) / G, begin = min(j.V, rank * each), n = min(each, j.V - begin);
    u64* scratch = j.scratch + group * SCRATCH;
    Part p{s, (unsigned*)(&s + 1), 0, begin, n, rank, G, scratch, scratch + 2 * DIGITS * BINS, 0};
    // All blocks must come to each meeting. If the last round has too few rows, some are done twice, to the same end.
    for (int first = 0; first < j.rows; first += groups) {
        p.row = (first + group) % j.rows;
        choose(j, p);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// v4: the head's product as well (FlashSampling, arXiv 2603.15854). The entry with the largest logit / temperature + Gumbel noise is a
// draw from the softmax, and the largest of a row is the largest among what is largest in its parts. So a logit is forgotten as soon
// as it is known. Which weights are the k largest could not be said that way.

// What there is to do; class HeadJob in sampling.py is the same.
struct HeadJob {
    const void *x, *weight;     // (rows, D), (V, D), float or bfloat16, D a multiple of 8
    const int64_t *seed, *step; // (rows,)
    int64_t* token;             // (rows,), to be filled
    u64* scratch;               // (2 * THREADS,): boards
    float scale;                // log2(e) / temperature; 0: the likeliest token
    unsigned draw;
    int rows, V, D, bfloat16;
};

const int SIDE = 4; // rows that share one reading of the weights
const int TILE = 8; // entries that a warp computes one after another, to add the noise to all of them at a time

struct alignas(16) Chunk { unsigned word[4]; }; // what a thread reads at a time: 4 floats or 8 bfloat16

__device__ inline float product(const Chunk& a, const Chunk& b, bool bfloat16) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned u = a.word[i], v = b.word[i];
        if (bfloat16) sum += __uint_as_float(u << 16) * __uint_as_float(v << 16), u &= 0xFFFF0000, v &= 0xFFFF0000;
        sum += __uint_as_float(u) * __uint_as_float(v);
    }
    return sum;
}

__device__ inline float of_warp(float x) {
    for (int d = 16; d; d /= 2) x += __uint_as_float(__shfl_xor_sync(~0u, __float_as_uint(x), d));
    return x;
}

// Of an entry whose logit is x. The noise is -log2(-log2 u), u in (0, 1): Gumbel's in units of log 2, less a constant.
__device__ inline float score(const HeadJob& j, int row, int i, float x) {
    if (j.scale == 0) return x;
    double u = ((bits_of(j.seed[row], j.step[row], j.draw, i) >> 1) + 0.5) * 0x1p-52;
    return __fmul_rn(x, j.scale) + float(-log2(-log2(u)));
}

template <class F> __device__ inline void each_row(int side, F f) { // unrolled, so that what f has of each row is in registers
#pragma unroll
    for (int r = 0; r < SIDE; r++)
        if (r < side) f(r);
}

__global__ void __launch_bounds__(THREADS) v4(HeadJob j) {
    Part p{*(Shared*)shared_memory(), nullptr, 0, 0, 0, int(blockIdx.x), int(gridDim.x), nullptr, j.scratch, 0};
    const Chunk *weight = (const Chunk*)j.weight, *x = (const Chunk*)j.x;
    int lane = threadIdx.x % 32, warp = (blockIdx.x * THREADS + threadIdx.x) / 32, warps = gridDim.x * THREADS / 32;
    int chunks = j.D / (j.bfloat16 ? 8 : 4);
    for (int first = 0; first < j.rows; first += SIDE) {
        int side = min(SIDE, j.rows - first);
        u64 best[SIDE] = {};
        for (int tile = warp * TILE; tile < j.V; tile += warps * TILE) {
            float mine[SIDE] = {}; // the logits of entry tile + lane
            for (int i = 0; i < min(TILE, j.V - tile); i++) {
                float sums[SIDE] = {};
#pragma unroll 4
                for (int c = lane; c < chunks; c += 32) {
                    Chunk w = weight[int64_t(tile + i) * chunks + c];
                    each_row(side, [&](int r) { sums[r] += product(w, x[int64_t(first + r) * chunks + c], j.bfloat16); });
                }
                each_row(side, [&](int r) {
                    float logit = of_warp(sums[r]);
                    if (lane == i) mine[r] = logit;
                });
            }
            if (lane < TILE && tile + lane < j.V)
                each_row(side, [&](int r) { best[r] = max(best[r], place(score(j, first + r, tile + lane, mine[r]), tile + lane)); });
        }
        each_row(side, [&](int r) {
            u64 most = of_row(p, best[r], true);
            if (p.rank == 0 && threadIdx.x == 0) j.token[first + r] = finite(most) ? entry(most) : -1;
        });
    }
}

// ---------------------------------------------------------------------------------------------------------------------
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

// How many blocks a grid may have whose blocks meet: all must be there at a time.
template <class F> static int at_a_time(F f, size_t bytes) {
    int resident;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, f, THREADS, bytes);
    return processors() * resident;
}

extern "C" int sample(const Job* job, int version, cudaStream_t stream) {
    Job j = *job;
    void* args[] = {&j};
    if (version == 1) return cudaLaunchKernel(v1, dim3((j.rows + 31) / 32), dim3(32), args, 0, stream);
    if (version == 2) return cudaLaunchKernel(v2, dim3(j.rows), dim3(1024), args, sizeof(Shared), stream);

    j.blocks = j.V <= PART ? 1 : max((j.V + PART - 1) / PART, min(processors() / j.rows, THREADS));
    size_t bytes = sizeof(Shared) + sizeof(unsigned) * ((j.V + j.blocks - 1) / j.blocks);
    if (j.blocks == 1) return cudaLaunchKernel(v3, dim3(j.rows), dim3(THREADS), args, bytes, stream);
    int groups = min(j.rows, at_a_time(v3, bytes) / j.blocks);
    return cudaLaunchCooperativeKernel(v3, dim3(groups * j.blocks), dim3(THREADS), args, bytes, stream);
}

extern "C" int sample_head(const HeadJob* job, cudaStream_t stream) {
    HeadJob j = *job;
    void* args[] = {&j};
    const int each = TILE * THREADS / 32; // entries that a block computes in one go
    int blocks = min(min(at_a_time(v4, sizeof(Shared)), THREADS), (j.V + each - 1) / each);
    return cudaLaunchCooperativeKernel(v4, dim3(blocks), dim3(THREADS), args, sizeof(Shared), stream);
}
