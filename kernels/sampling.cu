/* One token from each row of logits, in one launch: the same token as reference() in sampling.py.

     logits (B, V) -> weights (B, V), integers -> threshold -> target in [0, sum of weights) -> token (B,)

   v1  one thread per row: the algorithm and nothing else
   v2  one block per row: warp reduce, inclusive scan, MSD radix select, histogram; weights in global memory
   v3  as many blocks per row as fit: weights in shared memory, grid sync, double buffering

   Conversations use v3. The laboratory has v1 and v2, the steps toward it, and v4 in head.cu, which computes
   the logits as well. Each version can be read without the later ones.

   Threads run in any order, so only integers are summed or compared: their sum does not depend on the order.
   Floating point is used only from a logit to its weight, one IEEE rounding at a time. __fmul_rn keeps the
   compiler from fusing a product with the sum that follows. The same file runs on the CPU, through cpu.h.

   Bytes are counted for a row of V bfloat16 logits with both top-k and top-p. Microseconds: not measured on a
   GPU yet; bench.py measures them. */
#include "common.h"

// Mirrored by class SampleArgs in sampling.py.
struct SampleArgs {
    const void* logits;                  // (B, V), float or bfloat16
    const int64_t *seed, *step, *recent; // (B,), (B,), (B, n_recent): tokens to penalise; -1 is none
    int64_t* token;                      // (B,), output
    void* scratch;                       // scratch_bytes() of it
    int64_t stride;                      // entries from one row of logits to the next
    double top_p;                        // 1: all
    float scale;                         // log2(e) / temperature; 0: greedy
    float penalty, inverse_penalty;      // inverse_penalty = 1 / penalty
    unsigned draw;                       // which draw of the step this is
    int B, V, n_recent, top_k;           // top_k 0: all
    int is_bfloat16;                     // whether the logits are
    int blocks_per_row;                  // v3: set by its launch
};

// -----------------------------------------------------------------------------------------------------------
// One entry

__device__ inline float load_logit(const SampleArgs& a, int row, int64_t i) {
    int64_t at = row * a.stride + i;
    if (a.is_bfloat16) return __uint_as_float(unsigned(((const uint16_t*)a.logits)[at]) << 16);
    return ((const float*)a.logits)[at];
}

__device__ inline float penalise(const SampleArgs& a, float x) {
    return __fmul_rn(x, x > 0 ? a.inverse_penalty : a.penalty);
}

// floor(2^31 e^((x - top) / temperature)), by a polynomial for 2^fraction: weights() of sampling.py.
__device__ inline unsigned to_weight(const SampleArgs& a, float x, float top) {
    float y = fmaxf(__fmul_rn(x - top, a.scale), -32.0f); // -32 gives 0, and so does NaN
    float whole = floorf(y), f = y - whole, p = 0.0018671308644115925f;
    p = __fmul_rn(p, f) + 0.009017028845846653f;
    p = __fmul_rn(p, f) + 0.05579991266131401f;
    p = __fmul_rn(p, f) + 0.24016444385051727f;
    p = __fmul_rn(p, f) + 0.6931512951850891f;
    p = __fmul_rn(p, f) + 1.0f;
    return u64(unsigned(p * 0x1p31f)) >> int(-whole);
}

// -----------------------------------------------------------------------------------------------------------
// One row

// The sum of weights that top-p keeps. At least 1: the likeliest token always stays.
__device__ inline u64 top_p_mass(const SampleArgs& a, u64 total) {
    double mass = ceil(double(total) * a.top_p);
    return mass > 1 ? mass : 1;
}

// A random number in [0, total). The token is the first entry whose running sum of weights exceeds it.
__device__ inline u64 random_target(const SampleArgs& a, int row, u64 total) {
    double uniform = random_bits(a.seed[row], a.step[row], a.draw, 0) * 0x1p-53; // [0, 1)
    u64 target = uniform * double(total);
    return target < total ? target : total - 1;
}

// -----------------------------------------------------------------------------------------------------------
// v1: one thread per row. It stores nothing and computes a weight again whenever it needs it.
//
// Reads the 2V bytes of logits 67 to 100 times: one pass for the maximum, 32 per threshold (one for each bit;
// in top-p's an entry above the candidate is read twice), two for sums, one for the walk. Neighbouring
// threads read different rows, so no read is coalesced. Writes only the token's 8 bytes.

// The largest t such that `need` weights are >= t (or, by mass, they sum to it). Bit by bit from the top.
template <class F> __device__ inline unsigned bitwise_select(int V, F weight, u64 need, bool by_mass) {
    unsigned t = 0;
    for (unsigned bit = 1u << 31; bit; bit >>= 1) {
        u64 found = 0;
        for (int i = 0; i < V; i++)
            if (weight(i) >= (t | bit)) found += by_mass ? weight(i) : 1;
        if (found >= need) t |= bit;
    }
    return t;
}

__global__ void v1(SampleArgs a) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.B) return;
    auto logit = [&](int i) {
        float x = load_logit(a, row, i);
        for (int k = 0; k < a.n_recent; k++)
            if (a.recent[int64_t(row) * a.n_recent + k] == i) return penalise(a, x);
        return x;
    };
    u64 best = 0;
    for (int i = 0; i < a.V; i++) best = max(best, sort_key(logit(i), i));
    if (!is_finite(best) || a.scale == 0) {
        a.token[row] = is_finite(best) ? key_index(best) : -1;
        return;
    }

    unsigned threshold = 0; // smaller weights count as 0
    auto weight = [&](int i) {
        unsigned w = to_weight(a, logit(i), key_value(best));
        return w >= threshold ? w : 0;
    };
    auto sum = [&] {
        u64 sum = 0;
        for (int i = 0; i < a.V; i++) sum += weight(i);
        return sum;
    };
    if (a.top_k > 0 && a.top_k < a.V) threshold = bitwise_select(a.V, weight, a.top_k, false);
    if (a.top_p < 1) threshold = bitwise_select(a.V, weight, top_p_mass(a, sum()), true);
    u64 target = random_target(a, row, sum()), running = weight(0);
    int token = 0;
    while (running <= target) running += weight(++token);
    a.token[row] = token;
}

// -----------------------------------------------------------------------------------------------------------
// v2: one block per row. Each weight is computed once and stored, reads are coalesced, sums are block-wide
// reductions, and MSD radix select finds a threshold in four passes, one for each 8-bit digit.
//
// Reads the 2V bytes of logits once, and the 4V bytes of weights 12 times: once for the maximum, once to turn
// logits into weights, and five times per threshold. Writes the 4V bytes 2 to 4 times. For V = 2050 they fit
// in L1; for V = 152064 (608 KB) in L2, and up to 10 MB go through the one multiprocessor that has the row.
// 33 block barriers.

const int BINS = 256; // of a histogram: the values of one digit

struct Shared {
    u64 bins[BINS];
    u64 partial[32], warp_sum[32]; // one number per warp
    u64 need;                      // of radix select: the count or mass still to be found
    unsigned digit;
};

// The part of a row that one block works on. For v2 that is the whole row.
struct Slice {
    unsigned* w;       // (n,): first the logits' bits, then the weights
    int row, begin, n; // entries begin .. begin + n - 1 of the row
};

// Each warp has a contiguous chunk of the slice, each lane every 32nd entry of the chunk. So a warp's reads
// are coalesced, warps are in the order of the entries, and an entry always belongs to the same thread.
__device__ inline int chunk_begin(const Slice& slice, int warp) {
    int rounds = (slice.n + blockDim.x - 1) / blockDim.x;
    return min(slice.n, warp * rounds * 32);
}

template <class F> __device__ inline void for_each_own(const Slice& slice, F f) {
    int warp = threadIdx.x / 32, end = chunk_begin(slice, warp + 1);
    for (int i = chunk_begin(slice, warp) + threadIdx.x % 32; i < end; i += 32) f(i);
}

// The logits with the penalty. Eight loads are in flight at a time, to hide the memory's latency.
__device__ inline void load_logits(const SampleArgs& a, const Slice& slice) {
    int warp = threadIdx.x / 32, end = chunk_begin(slice, warp + 1);
    for (int i = chunk_begin(slice, warp) + threadIdx.x % 32; i < end; i += 8 * 32) {
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; k++)
            x[k] = i + 32 * k < end ? load_logit(a, slice.row, slice.begin + i + 32 * k) : 0;
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (i + 32 * k < end) slice.w[i + 32 * k] = __float_as_uint(x[k]);
    }
    __syncthreads();
    for (int k = threadIdx.x; k < a.n_recent; k += blockDim.x) { // a repeated token is written twice alike
        int64_t i = a.recent[int64_t(slice.row) * a.n_recent + k] - slice.begin;
        if (0 <= i && i < slice.n)
            slice.w[i] = __float_as_uint(penalise(a, load_logit(a, slice.row, slice.begin + i)));
    }
    __syncthreads();
}

// The thread's own argmax, as a sort key.
__device__ inline u64 own_best(const Slice& slice) {
    u64 best = 0;
    for_each_own(slice, [&](int i) {
        u64 key = sort_key(__uint_as_float(slice.w[i]), slice.begin + i);
        if (key > best) best = key;
    });
    return best;
}

// Logits become weights. Returns the sum of the thread's own.
__device__ inline u64 compute_weights(const SampleArgs& a, const Slice& slice, float top) {
    u64 sum = 0;
    for_each_own(slice, [&](int i) {
        slice.w[i] = to_weight(a, __uint_as_float(slice.w[i]), top);
        sum += slice.w[i];
    });
    return sum;
}

// Weights below the threshold become 0. Returns the sum of the thread's own that stay.
__device__ inline u64 apply_threshold(const Slice& slice, unsigned threshold) {
    u64 sum = 0;
    for_each_own(slice, [&](int i) {
        if (slice.w[i] >= threshold) sum += slice.w[i];
        else slice.w[i] = 0;
    });
    return sum;
}

// Add to a 64-bit bin in shared memory, where the hardware adds 32 bits at a time: the lower half, then the
// carry to the upper.
__device__ inline void add_to_bin(u64* bin, unsigned x) {
    unsigned* half = (unsigned*)bin;
    if (atomicAdd(half, x) + x < x) atomicAdd(half + 1, 1u);
}

// Of the weights whose higher digits are those of t: how many, or how much, have each value of the digit at
// `shift`? Digit 0 is what remains if no other is chosen, so it needs no bin. Most weights are small, and
// would contend for it.
__device__ inline void histogram(const Slice& slice, Shared& s, unsigned t, int shift, bool by_mass) {
    for (int b = threadIdx.x; b < BINS; b += blockDim.x) s.bins[b] = 0;
    __syncthreads();
    for_each_own(slice, [&](int i) {
        unsigned w = slice.w[i], digit = w >> shift & 255;
        if (digit && (w ^ t) >> shift < 256) add_to_bin(&s.bins[digit], by_mass ? w : 1);
    });
    __syncthreads();
}

// For one warp: the largest digit such that the bins from the last down to it hold `need`, else 0; and what
// is still needed of that bin alone. Lane 0 has the last eight bins, lane 31 the first eight.
__device__ inline void select_digit(Shared& s, u64 need) {
    int lane = threadIdx.x, digit = BINS - 1 - 8 * lane;
    u64 sum = 0;
    for (int i = 0; i < 8; i++) sum += s.bins[digit - i];
    u64 through = warp_inclusive_scan(sum), before = through - sum;
    if (before < need && (need <= through || lane == 31)) {
        while (digit % 8 && before + s.bins[digit] < need) before += s.bins[digit--];
        s.digit = digit;
        s.need = need - before;
    }
}

// MSD radix select: v1's threshold, a digit instead of a bit at a time.
__device__ inline unsigned radix_select(const Slice& slice, Shared& s, u64 need, bool by_mass) {
    unsigned t = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        histogram(slice, s, t, shift, by_mass);
        if (threadIdx.x < 32) select_digit(s, need);
        __syncthreads();
        t |= s.digit << shift;
        need = s.need;
    }
    return t;
}

// Writes the token if it is in this slice: the first entry whose running sum of weights exceeds the target.
// own: the sum of the thread's own weights. A target before the slice has wrapped around below 0 and is huge.
__device__ inline void find_token(const SampleArgs& a, const Slice& slice, Shared& s, u64 own, u64 target) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, end = chunk_begin(slice, warp + 1);
    u64 sum = warp_reduce(own, Sum{});
    if (lane == 0) s.warp_sum[warp] = sum;
    __syncthreads();
    for (int i = 0; i < warp; i++) target -= s.warp_sum[i];
    if (target >= sum) return; // in another warp's chunk
    for (int i = chunk_begin(slice, warp) + lane;; i += 32) {
        u64 w = i < end ? slice.w[i] : 0, through = warp_inclusive_scan(w);
        if (through - w <= target && target < through) a.token[slice.row] = slice.begin + i;
        u64 total = __shfl_sync(~0u, through, 31);
        if (target < total) return;
        target -= total;
    }
}

// One row, by one block.
__device__ inline void sample_slice(const SampleArgs& a, const Slice& slice, Shared& s) {
    load_logits(a, slice);
    u64 best = block_reduce(s.partial, own_best(slice), Max{});
    if (!is_finite(best) || a.scale == 0) {
        if (threadIdx.x == 0) a.token[slice.row] = is_finite(best) ? key_index(best) : -1;
        return;
    }
    u64 own = compute_weights(a, slice, key_value(best));
    if (a.top_k > 0 && a.top_k < a.V) own = apply_threshold(slice, radix_select(slice, s, a.top_k, false));
    if (a.top_p < 1) {
        u64 mass = top_p_mass(a, block_reduce(s.partial, own, Sum{}));
        own = apply_threshold(slice, radix_select(slice, s, mass, true));
    }
    u64 total = block_reduce(s.partial, own, Sum{});
    find_token(a, slice, s, own, random_target(a, slice.row, total));
}

__global__ void __launch_bounds__(1024, 1) v2(SampleArgs a) {
    unsigned* w = (unsigned*)a.scratch + int64_t(blockIdx.x) * a.V;
    sample_slice(a, {w, int(blockIdx.x), 0, a.V}, *(Shared*)shared_memory());
}

// -----------------------------------------------------------------------------------------------------------
// v3: a team of blocks per row. With one row, v2 leaves all multiprocessors but one idle, and that one reads
// global memory in every pass. Here each block keeps a slice in shared memory, and the blocks meet where they
// need the whole row: at each reduction and each histogram. A short row needs one block and no meeting.
//
// Reads the 2V bytes of logits once and writes no weights to global memory. With several blocks per row there
// are 11 grid syncs. Before eight of them each block adds up to 2 KB of histogram to global memory, and then
// reads 2 KB back; before three, it writes 8 bytes, and then reads 8 from each block. The team clears 16 KB.

const int MAX_SLICE = 11 * 1024; // entries: 44 KiB of weights, which every GPU has for a block
const int DIGITS = 4;
const int SCRATCH = 2 * DIGITS * BINS + 2 * THREADS; // u64 per team: two thresholds' histograms, Team.partial

// Adds up the histograms of all blocks of the team, in global memory that was 0.
__device__ inline void team_histogram(const Team& team, Shared& s, u64* bins) {
    if (team.size == 1) return;
    for (int b = threadIdx.x; b < BINS; b += blockDim.x)
        if (s.bins[b]) atomicAdd(&bins[b], s.bins[b]);
    grid_sync();
    for (int b = threadIdx.x; b < BINS; b += blockDim.x) s.bins[b] = bins[b];
    __syncthreads();
}

// radix_select() for a team. bins (DIGITS, BINS): one histogram in global memory for each digit.
__device__ inline unsigned team_radix_select(const Slice& slice, const Team& team, Shared& s, u64 need,
                                             bool by_mass, u64* bins) {
    unsigned t = 0;
    for (int shift = 24; shift >= 0; shift -= 8, bins += BINS) {
        histogram(slice, s, t, shift, by_mass);
        team_histogram(team, s, bins);
        if (threadIdx.x < 32) select_digit(s, need);
        __syncthreads();
        t |= s.digit << shift;
        need = s.need;
    }
    return t;
}

// One row, like v2's body. All blocks must reach every grid sync, so none returns early: in a row without a
// token all weights are 0, and no entry exceeds the target.
__device__ inline void sample_row(const SampleArgs& a, const Slice& slice, Team& team, Shared& s, u64* bins) {
    if (team.size > 1) // after the last sync of the row before, and before the first of this one
        for (int b = team.rank * blockDim.x + threadIdx.x; b < 2 * DIGITS * BINS; b += team.size * blockDim.x)
            bins[b] = 0;
    load_logits(a, slice);
    u64 best = team_reduce(team, s.partial, own_best(slice), Max{});
    if (team.rank == 0 && threadIdx.x == 0 && (!is_finite(best) || a.scale == 0))
        a.token[slice.row] = is_finite(best) ? key_index(best) : -1;
    if (a.scale == 0) return;
    u64 own = compute_weights(a, slice, key_value(best));
    if (a.top_k > 0 && a.top_k < a.V)
        own = apply_threshold(slice, team_radix_select(slice, team, s, a.top_k, false, bins));
    if (a.top_p < 1) {
        u64 mass = top_p_mass(a, team_reduce(team, s.partial, own, Sum{}));
        own = apply_threshold(slice, team_radix_select(slice, team, s, mass, true, bins + DIGITS * BINS));
    }
    u64 target = random_target(a, slice.row, team_reduce(team, s.partial, own, Sum{}));
    if (team.size > 1) { // less the sums of the blocks before this one
        u64* sums = team.partial + team.buffer * team.size;
        target -= block_reduce(s.partial, threadIdx.x < team.rank ? sums[threadIdx.x] : 0, Sum{});
    }
    find_token(a, slice, s, own, target);
}

__global__ void __launch_bounds__(THREADS) v3(SampleArgs a) {
    Shared& s = *(Shared*)shared_memory();
    int size = a.blocks_per_row, index = blockIdx.x / size, rank = blockIdx.x % size;
    int teams = gridDim.x / size;
    int each = (a.V + size - 1) / size, begin = min(a.V, rank * each), n = min(each, a.V - begin);
    u64* bins = (u64*)a.scratch + index * SCRATCH;
    Team team{rank, size, bins + 2 * DIGITS * BINS, 0};
    // All teams make as many rounds, to meet as often. If the last has too few rows, some are sampled twice,
    // with the same result.
    for (int first = 0; first < a.B; first += teams) {
        Slice slice{(unsigned*)(&s + 1), (first + index) % a.B, begin, n};
        sample_row(a, slice, team, s, bins);
    }
}

// -----------------------------------------------------------------------------------------------------------
// Host

extern "C" int64_t scratch_bytes(int version, int B, int V) {
    if (version == 2) return int64_t(B) * V * sizeof(unsigned);
    return version == 3 && V > MAX_SLICE ? int64_t(B) * SCRATCH * sizeof(u64) : 0;
}

// Returns 0 or CUDA's error number.
extern "C" int sample(const SampleArgs* args, int version, cudaStream_t stream) {
    SampleArgs a = *args;
    void* p[] = {&a};
    if (version == 1) return cudaLaunchKernel(v1, dim3((a.B + 31) / 32), dim3(32), p, 0, stream);
    if (version == 2) return cudaLaunchKernel(v2, dim3(a.B), dim3(1024), p, sizeof(Shared), stream);

    int blocks = (a.V + MAX_SLICE - 1) / MAX_SLICE; // as few as the slices allow,
    if (blocks > 1) blocks = max(blocks, min(multiprocessors() / a.B, THREADS)); // or as many as the GPU has
    a.blocks_per_row = blocks;
    size_t bytes = sizeof(Shared) + sizeof(unsigned) * ((a.V + blocks - 1) / blocks);
    if (blocks == 1) return cudaLaunchKernel(v3, dim3(a.B), dim3(THREADS), p, bytes, stream);
    int teams = min(a.B, resident_blocks(v3, bytes) / blocks);
    return cudaLaunchCooperativeKernel(v3, dim3(teams * blocks), dim3(THREADS), p, bytes, stream);
}
