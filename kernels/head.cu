/* v4, for the laboratory: the head's matrix product and the draw in one kernel (FlashSampling, arXiv
   2603.15854). The logits never reach memory. Conversations do not use it.

     x (B, D), weight (V, D) -> logit / temperature + Gumbel noise -> argmax over the grid -> token (B,)

   The argmax of logit / temperature + Gumbel noise is a draw from the softmax, and the argmax of a row is the
   argmax over the maxima of its parts. So a logit can be dropped as soon as it is computed. top-k and top-p
   would need all logits at once and are not offered.

   Reads the 2VD bytes of bfloat16 weights once for every four rows: 1.1 GB for V = 152064, D = 3584. The
   logits that it saves are 0.3 MB a row, written and read. For each row each block writes 8 bytes and reads 8
   from each block, with one grid sync. Microseconds: not measured on a GPU yet; bench.py measures them. */
#include "common.h"

// Mirrored by class HeadArgs in head.py.
struct HeadArgs {
    const void *x, *weight;     // (B, D), (V, D), float or bfloat16, D a multiple of 8
    const int64_t *seed, *step; // (B,)
    int64_t* token;             // (B,), output
    u64* scratch;               // (2, THREADS): Team.partial
    float scale;                // log2(e) / temperature; 0: greedy
    unsigned draw;              // which draw of the step this is
    int B, V, D, is_bfloat16;
};

const int TILE = 8; // entries per warp, computed one after another; then eight lanes add noise to one each

__device__ inline float dot(const Vec& a, const Vec& b, bool is_bfloat16) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned u = a.word[i], v = b.word[i];
        sum += is_bfloat16 ? lower(u) * lower(v) + upper(u) * upper(v)
                           : __uint_as_float(u) * __uint_as_float(v);
    }
    return sum;
}

// Gumbel noise is -ln(-ln u). Here it is in units of ln 2, less a constant that all entries share.
__device__ inline float perturb(const HeadArgs& a, int row, int i, float logit) {
    if (a.scale == 0) return logit;
    double u = ((random_bits(a.seed[row], a.step[row], a.draw, i) >> 1) + 0.5) * 0x1p-52; // (0, 1)
    return __fmul_rn(logit, a.scale) + float(-log2(-log2(u)));
}

// Entries tile .. tile + TILE - 1 of n rows: lane i gets the logits of entry tile + i.
__device__ inline void tile_logits(const HeadArgs& a, int first, int n, int tile, float (&logit)[ROWS]) {
    const Vec *weight = (const Vec*)a.weight, *x = (const Vec*)a.x;
    int lane = threadIdx.x % 32, vecs = a.D / (a.is_bfloat16 ? 8 : 4);
    for (int i = 0; i < min(TILE, a.V - tile); i++) {
        float sums[ROWS] = {};
#pragma unroll 4
        for (int c = lane; c < vecs; c += 32) {
            Vec w = weight[int64_t(tile + i) * vecs + c];
            for_each_row(n, [&](int r) {
                sums[r] += dot(w, x[int64_t(first + r) * vecs + c], a.is_bfloat16);
            });
        }
        for_each_row(n, [&](int r) {
            float sum = warp_sum(sums[r]);
            if (lane == i) logit[r] = sum;
        });
    }
}

__global__ void __launch_bounds__(THREADS) v4(HeadArgs a) {
    u64* shared = (u64*)shared_memory();
    Team team{int(blockIdx.x), int(gridDim.x), a.scratch, 0};
    int lane = threadIdx.x % 32;
    int warp = (blockIdx.x * THREADS + threadIdx.x) / 32, warps = gridDim.x * THREADS / 32;
    for (int first = 0; first < a.B; first += ROWS) {
        int n = min(ROWS, a.B - first);
        u64 best[ROWS] = {};
        for (int tile = warp * TILE; tile < a.V; tile += warps * TILE) {
            float logit[ROWS] = {};
            tile_logits(a, first, n, tile, logit);
            int entry = tile + lane;
            if (lane < TILE && entry < a.V)
                for_each_row(n, [&](int r) {
                    best[r] = max(best[r], sort_key(perturb(a, first + r, entry, logit[r]), entry));
                });
        }
        for_each_row(n, [&](int r) {
            u64 top = team_reduce(team, shared, best[r], Max{});
            if (team.rank == 0 && threadIdx.x == 0) a.token[first + r] = is_finite(top) ? key_index(top) : -1;
        });
    }
}

// -----------------------------------------------------------------------------------------------------------
// Host

extern "C" int scratch_bytes() { return 2 * THREADS * sizeof(u64); }

// Returns 0 or CUDA's error number.
extern "C" int sample_head(const HeadArgs* args, cudaStream_t stream) {
    HeadArgs a = *args;
    void* p[] = {&a};
    const int per_block = TILE * THREADS / 32; // entries in one go
    size_t bytes = 32 * sizeof(u64);           // block_reduce's
    int blocks = min(min(resident_blocks(v4, bytes), THREADS), (a.V + per_block - 1) / per_block);
    return cudaLaunchCooperativeKernel(v4, dim3(blocks), dim3(THREADS), p, bytes, stream);
}
