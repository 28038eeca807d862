/* For the laboratory: the depth transformer (model.py: Depth) as one persistent kernel. A single launch
   computes the K codes of a frame, for up to four conversations. Conversations do not use it, as no GPU has
   shown yet that it pays.

                        each block computes whole             its rows of a product      MB read
     h (B, D)
       |  phase 0                                             from_h -> given (B, K W)        59
       v
     for each code k
       |  for each layer
       |    phase 1     add; norm                             qkv -> past (L, K, B, 3 W)     6.3
       |    phase 2     attention over k + 1 positions        out -> sum (B, W)              2.1
       |    phase 3     add; norm                             gate, up -> hidden (B, 2 M)   11.2
       |    phase 4     SwiGLU                                down -> sum (B, W)             5.6
       |  phase 4 L + 1 add; norm                             head -> logits (K, B, V)       4.2
       v  draw          for each conversation one block, by sampling.cu's v2 -> token (K, B)

   "add": sum joins the residual stream x, of which every block has a copy in shared memory. At first x is the
   embedding of code k - 1, plus given and position. The arrays on the right are in global memory, written in
   one phase and read by all blocks in the next, after a grid sync: K (4 L + 2) in all, 208 for the release's
   six layers. What a block computes whole is so small that sharing it would take longer.

   Weights are no part of that chain: which come next is known. So a block that has arrived at a grid sync
   copies its rows of the next matrix into shared memory, as many as fit, while it waits for the others, and
   has its rows of the matrix after that brought into L2.

     arrive | next rows: L2 -> shared memory; those after: memory -> L2 | wait | multiply | arrive ...

   MB are the release's (W = 1024, M = 2736, D = 3584, V = 2048). MLPs and heads differ from code to code, and
   attention does not, so 950 MB of a frame are different, and the floor is 0.28 ms on an H100 (3.35 TB/s) and
   0.20 on an H200 (4.8). If L2 keeps nothing of attention's 50 MB, it is 1,302 MB, 0.39 or 0.27 ms. Not
   measured on a GPU yet; bench.py does that. By reckoning it takes 0.7 ms on either, most of it latency: 1.5
   us or more for a grid sync, 1 for what a block computes whole and the product from shared memory.

   Weights are bfloat16, sums float32, in an order that does not depend on the number of blocks. */
#include "sampling.cu"

const int K = 8; // codes of a frame
static_assert(sizeof(Shared) % sizeof(Vec) == 0, "what follows it in shared memory is aligned");

// Mirrored by class DepthArgs in depth.py. M: hidden units of an MLP. A: entries of an embedding; V of them
// may be drawn. D, W and M are multiples of 8; W / H is even and at most 64.
struct DepthArgs {
    const Vec *from_h, *qkv, *out, *gate_up; // (K W, D), (L, 3 W, W), (L, W, W), (L, K, 2 M, W), bfloat16
    const Vec *down, *heads;                 // (L, K, W, M), (K, A, W), bfloat16
    const uint16_t* embeddings;              // (K, A, W), bfloat16
    const float *positions, *gains, *h;      // (K, W), (2 L + 1, W), (B, D)
    float *given, *past, *sum, *hidden;      // scratch
    float* logits;                           // (K, B, V), output
    int64_t* token;                          // (K, B), output; -1 where logits are not numbers
    float eps;
    int B, D, W, H, M, L, A, V;
    int staged;         // Vecs of weights in shared memory: set by the launch
    SampleArgs draw[K]; // for each code
};

// How many floats of a phase's vectors are in shared memory at most. A draw has its V weights there.
__device__ __host__ inline int widest(const DepthArgs& a) {
    return max(a.B * max(a.D, max(a.W, a.M)), (a.V + 3) / 4 * 4);
}

// A block's shared memory, after the draw's.
struct Block {
    float* x;   // (B, W), the residual stream, the same in all blocks
    float* in;  // (B, columns), what is multiplied with a phase's matrix
    Vec* stage; // this block's rows of the matrix, as many as fit
};

// -----------------------------------------------------------------------------------------------------------
// Phases

enum Kind { FROM_H, QKV, OUT, GATE_UP, DOWN, HEAD, END };

struct Phase {
    Kind kind;
    int k, l;          // code, layer
    const Vec* matrix; // (rows, columns), row-major
    int rows, columns;
    float* to; // (B, rows): the products
};

// The i-th phase of a frame; after the last, one without rows.
__device__ inline Phase phase(const DepthArgs& a, int i) {
    int n = 4 * a.L + 1, k = (i - 1) / n, l = (i - 1) % n / 4, W = a.W, M = a.M;
    int64_t lk = l * K + k, WW = int64_t(W) * W / 8, WM = int64_t(W) * M / 8; // in Vecs
    if (i == 0) return {FROM_H, 0, 0, a.from_h, K * W, a.D, a.given};
    if (k >= K) return {END, K, 0, nullptr, 0, 0, nullptr};
    if (l == a.L) return {HEAD, k, l, a.heads + int64_t(k) * a.A * W / 8, a.V, W, a.logits + k * a.B * a.V};
    switch ((i - 1) % n % 4) {
    case 0: return {QKV, k, l, a.qkv + 3 * l * WW, 3 * W, W, a.past + lk * a.B * 3 * W};
    case 1: return {OUT, k, l, a.out + l * WW, W, W, a.sum};
    case 2: return {GATE_UP, k, l, a.gate_up + 2 * lk * WM, 2 * M, W, a.hidden};
    default: return {DOWN, k, l, a.down + lk * WM, W, M, a.sum};
    }
}

// The rows of one block.
struct Share {
    const Vec* at;
    int begin, rows, vecs;
};
__device__ inline Share share(const Phase& p) {
    int64_t begin = int64_t(p.rows) * blockIdx.x / gridDim.x, vecs = p.columns / 8;
    int rows = int64_t(p.rows) * (blockIdx.x + 1) / gridDim.x - begin;
    return {p.matrix + begin * vecs, int(begin), rows, int(rows * vecs)};
}

// The block's rows of two phases: of `later` into L2, of `next` into shared memory, eight loads at a time.
__device__ inline void fetch(const DepthArgs& a, const Block& block, const Phase& next, const Phase& later) {
    Share s = share(later);
    prefetch_to_L2(s.at, s.vecs * sizeof(Vec));
    s = share(next);
    int n = min(s.vecs, a.staged);
    for (int i = threadIdx.x; i < n; i += 8 * THREADS) {
        Vec w[8];
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (i + j * THREADS < n) w[j] = s.at[i + j * THREADS];
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (i + j * THREADS < n) block.stage[i + j * THREADS] = w[j];
    }
}

struct alignas(8) Quad { unsigned word[2]; }; // 4 bfloat16: neighbouring lanes read neighbouring banks

__device__ inline float dot(const Quad& w, const Vec& x) {
    float sum = lower(w.word[0]) * __uint_as_float(x.word[0]);
    sum += upper(w.word[0]) * __uint_as_float(x.word[1]);
    sum += lower(w.word[1]) * __uint_as_float(x.word[2]);
    return sum + upper(w.word[1]) * __uint_as_float(x.word[3]);
}

// The block's rows times each of the B vectors. A warp has N rows at a time, which share one read of `in`.
__device__ inline void multiply(const DepthArgs& a, const Block& block, const Phase& p) {
    const int N = 4, WARPS = THREADS / 32;
    Share s = share(p);
    const Quad *staged = (const Quad*)block.stage, *rest = (const Quad*)s.at;
    const Vec* in = (const Vec*)block.in;
    int lane = threadIdx.x % 32, quads = p.columns / 4;
    for (int row = threadIdx.x / 32; row < s.rows; row += N * WARPS) {
        float sums[N][ROWS] = {};
#pragma unroll 4
        for (int c = lane; c < quads; c += 32) {
            Quad w[N] = {};
#pragma unroll
            for (int n = 0; n < N; n++) {
                int i = (row + n * WARPS) * quads + c;
                if (row + n * WARPS < s.rows) w[n] = i < 2 * a.staged ? staged[i] : rest[i];
            }
            for_each_row(a.B, [&](int b) {
                Vec x = in[b * quads + c];
#pragma unroll
                for (int n = 0; n < N; n++) sums[n][b] += dot(w[n], x);
            });
        }
#pragma unroll
        for (int n = 0; n < N; n++)
            if (row + n * WARPS < s.rows)
                for_each_row(a.B, [&](int b) {
                    float sum = warp_sum(sums[n][b]);
                    if (lane == 0) p.to[b * p.rows + s.begin + row + n * WARPS] = sum;
                });
    }
}

// -----------------------------------------------------------------------------------------------------------
// Before the product: what each block computes whole

template <class F> __device__ inline void for_each(int n, F f) {
    for (int i = threadIdx.x; i < n; i += THREADS) f(i);
    __syncthreads();
}

// Channel i of (B, W) at position k: the code before it, h and the position.
__device__ inline float embedding(const DepthArgs& a, int k, int i) {
    int b = i / a.W, c = i % a.W, code = k ? max(int(a.token[(k - 1) * a.B + b]), 0) : a.A - 1;
    float e = lower(a.embeddings[(int64_t(k) * a.A + code) * a.W + c]);
    return e + a.given[(b * K + k) * a.W + c] + a.positions[k * a.W + c];
}

// RMSNorm; `in` has the gains. Each warp sums the squares for itself: that is faster than to wait for others.
__device__ inline void norm(const DepthArgs& a, const float* x, float* in) {
    for (int b = 0; b < a.B; b++, x += a.W, in += a.W) {
        float squares = 0;
        for (int i = threadIdx.x % 32; i < a.W; i += 32) squares += x[i] * x[i];
        float inverse = 1 / sqrtf(warp_sum(squares) / a.W + a.eps);
        for (int i = threadIdx.x; i < a.W; i += THREADS) in[i] *= x[i] * inverse;
    }
    __syncthreads();
}

struct alignas(8) Pair { float a, b; };

// past (K, B, 3 W). Each warp has a head at a time, each lane two of its E channels. All loads are in flight
// together.
__device__ inline void attend(const DepthArgs& a, float* in, const float* past, int k) {
    int W = a.W, E = W / a.H, lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < a.B * a.H; i += THREADS / 32) {
        int b = i / a.H, channel = i % a.H * E + 2 * lane;
        auto at = [&](int p, int part) { // of the query, key or value at position p
            const float* pair = past + ((p * a.B + b) * 3 + part) * W + channel;
            return p <= k && 2 * lane < E ? *(const Pair*)pair : Pair{0, 0};
        };
        Pair q = at(k, 0), key[K], value[K], sum = {0, 0};
#pragma unroll
        for (int p = 0; p < K; p++) key[p] = at(p, 1), value[p] = at(p, 2);
        float weight[K], top = -INFINITY, total = 0;
#pragma unroll
        for (int p = 0; p < K; p++) {
            weight[p] = p <= k ? warp_sum(q.a * key[p].a + q.b * key[p].b) / sqrtf(E) : -INFINITY;
            top = fmaxf(top, weight[p]);
        }
#pragma unroll
        for (int p = 0; p < K; p++) {
            float w = expf(weight[p] - top);
            total += w, sum.a += w * value[p].a, sum.b += w * value[p].b;
        }
        if (2 * lane < E) *(Pair*)(in + b * W + channel) = {sum.a / total, sum.b / total};
    }
    __syncthreads();
}

__device__ inline void swiglu(const DepthArgs& a, Vec* in) {
    int vecs = a.M / 4;
    for_each(a.B * vecs, [&](int i) {
        const Vec* at = (const Vec*)a.hidden + i / vecs * 2 * vecs + i % vecs;
        Vec gate = at[0], up = at[vecs];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x = __uint_as_float(gate.word[j]);
            up.word[j] = __float_as_uint(x / (1 + expf(-x)) * __uint_as_float(up.word[j]));
        }
        in[i] = up;
    });
}

__device__ inline void prepare(const DepthArgs& a, const Block& block, const Phase& p) {
    if (p.kind == FROM_H) return for_each(a.B * a.D, [&](int i) { block.in[i] = a.h[i]; });
    if (p.kind == OUT) return attend(a, block.in, a.past + int64_t(p.l) * K * a.B * 3 * a.W, p.k);
    if (p.kind == DOWN) return swiglu(a, (Vec*)block.in);
    const float* gain = a.gains + (2 * p.l + (p.kind == GATE_UP)) * a.W;
    for_each(a.B * a.W, [&](int i) {
        block.x[i] = p.kind == QKV && p.l == 0 ? embedding(a, p.k, i) : block.x[i] + a.sum[i];
        block.in[i] = gain[i % a.W];
    });
    norm(a, block.x, block.in);
}

// -----------------------------------------------------------------------------------------------------------
// The frame

__global__ void __launch_bounds__(THREADS, 1) depth(DepthArgs a) {
    Shared* draw = (Shared*)shared_memory();
    float* x = (float*)(draw + 1);
    Block block{x, x + a.B * a.W, (Vec*)(x + a.B * a.W + widest(a))};
    auto grid = cooperative_groups::this_grid();
    Phase now = phase(a, 0);
    fetch(a, block, now, now);
    for (int i = 1; now.kind != END; i++) {
        prepare(a, block, now);
        multiply(a, block, now);
        Phase next = phase(a, i);
        auto token = grid.barrier_arrive(); // the block's threads have met: its stage may be overwritten
        fetch(a, block, next, phase(a, i + 1));
        grid.barrier_wait(std::move(token));
        if (now.kind == HEAD) {
            int b = blockIdx.x;
            if (b < a.B) sample_slice(a.draw[now.k], {(unsigned*)block.in, b, 0, a.V}, *draw);
            if (next.kind != END) grid.sync();
        }
        now = next;
    }
}

// -----------------------------------------------------------------------------------------------------------
// Host

// Returns 0 or CUDA's error number.
extern "C" int generate(const DepthArgs* args, cudaStream_t stream) {
    DepthArgs a = *args;
    void* p[] = {&a};
    int device, most, bytes = sizeof(Shared) + sizeof(float) * (a.B * a.W + widest(a));
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (bytes > most || a.B > ROWS) return 1; // cudaErrorInvalidValue
    a.staged = (most - bytes) / sizeof(Vec);
    cudaFuncSetAttribute(depth, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    return cudaLaunchCooperativeKernel(depth, dim3(multiprocessors()), dim3(THREADS), p, most, stream);
}
