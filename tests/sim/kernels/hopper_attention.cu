// O = softmax(Q @ K^T * scale) @ V: flash attention, forward, with specialised warps.
//
// Q, O [heads, s_q, D], K, V [heads, s_k, D], bf16, D = 64 or 128; lse [heads, s_q], f32, the
// logarithm to base 2 of a row's sum of exponentials. Any s_q and s_k >= 1; if causal, s_k >= s_q,
// and the last rows see all keys. A block takes 128 rows of Q, a warpgroup 64; one warp loads K and
// V, 64 keys at a time. All four maps are 3-D, boxes {64, 64, 1}, rows swizzled by 128 bytes.
// Grid (ceil(s_q / 128), heads), block 384, shared memory sizeof(Shared<D>) =
// D * 256 + STAGES * D * 256 + 1024 bytes.
#include "hopper.cuh"

#ifndef STAGES
#define STAGES 2
#endif

constexpr int CONSUMERS = 2;          // warpgroups
constexpr int KEYS = 64;              // of a stage
constexpr int PANEL_BYTES = 64 * 128; // 64 rows, 64 elements of each

template <int D> struct Shared {
    static constexpr int PANELS = D / 64;
    alignas(1024) char q[CONSUMERS][PANELS][PANEL_BYTES]; // later O
    alignas(1024) char k[STAGES][PANELS][PANEL_BYTES], v[STAGES][PANELS][PANEL_BYTES];
    u64 q_full, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

extern __shared__ __align__(1024) char memory[];

INLINE float minus_infinity() { return __int_as_float(0xff800000); }

template <int D>
INLINE void produce(const TensorMap& q, const TensorMap& k, const TensorMap& v, int blocks,
                    Shared<D>& shared) {
    constexpr int BYTES = D / 64 * PANEL_BYTES; // of 64 rows
    const u32 q_full = shared_address(&shared.q_full);
#ifdef BUG_EXPECT_FEW
    arrive_expect(q_full, BYTES);
#else
    arrive_expect(q_full, CONSUMERS * BYTES);
#endif
    for (int i = 0; i < CONSUMERS; ++i)
        for (int p = 0; p < D / 64; ++p)
            load_3d(shared_address(shared.q[i][p]), q, p * 64, blockIdx.x * 128 + i * 64, // LOAD Q
                    blockIdx.y, q_full);
#pragma unroll 1
    for (int n = 0; n < blocks; ++n) {
        const int stage = n % STAGES, parity = n / STAGES & 1;
        const u32 k_full = shared_address(&shared.k_full[stage]);
        wait(shared_address(&shared.k_empty[stage]), parity ^ 1);
        arrive_expect(k_full, BYTES);
        for (int p = 0; p < D / 64; ++p)
            load_3d(shared_address(shared.k[stage][p]), k, p * 64, n * KEYS, blockIdx.y, k_full);
        const u32 v_full = shared_address(&shared.v_full[stage]);
        wait(shared_address(&shared.v_empty[stage]), parity ^ 1);
#ifdef BUG_EXPECT_MANY
        arrive_expect(v_full, BYTES + 16);
#else
        arrive_expect(v_full, BYTES);
#endif
        for (int p = 0; p < D / 64; ++p)
            load_3d(shared_address(shared.v[stage][p]), v, p * 64, n * KEYS, blockIdx.y, v_full); // LOAD V
    }
}

INLINE float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

INLINE float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

template <int D>
INLINE void attend(const TensorMap& o, float* lse, int s_q, int s_k, int blocks, int causal,
                   float scale_log2, int consumer, Shared<D>& shared) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int row = blockIdx.x * 128 + consumer * 64 + warp * 16 + lane / 4; // and row + 8
    const int last = causal ? row + s_k - s_q : s_k - 1; // the last key that the first row sees
    const u64 q = descriptor(shared_address(shared.q[consumer]));
    // Of rows `row` and `row + 8`: the largest score, and this thread's part of the sum.
    float largest[2] = {minus_infinity(), minus_infinity()}, sum[2] = {0, 0};
    float out[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0;

    wait(shared_address(&shared.q_full), 0);
#pragma unroll 1
    for (int n = 0; n < blocks; ++n) {
        const int stage = n % STAGES, parity = n / STAGES & 1;
        float s[KEYS / 2];
        wait(shared_address(&shared.k_full[stage]), parity);
        const u64 k = descriptor(shared_address(shared.k[stage]));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            const int at = i / 4 * (PANEL_BYTES / 16) + i % 4 * 2;
            wgmma(s, q + at, k + at, i); // SCORES
        }
        wgmma_commit();
        wgmma_wait<0>();
        settle(s);
        if (lane == 0) arrive(shared_address(&shared.k_empty[stage]));

        float scale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int seen = min(causal ? last + half * 8 : last, s_k - 1) - n * KEYS;
            float most = largest[half];
#pragma unroll
            for (int i = half * 2; i < KEYS / 2; i += 4)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    if (i / 4 * 8 + lane % 4 * 2 + j > seen) s[i + j] = minus_infinity();
                    most = fmaxf(most, s[i + j]);
                }
            most = row_max(most);
            const float base = most == minus_infinity() ? 0 : most * scale_log2; // no inf - inf
            scale[half] = exp2_approx(largest[half] * scale_log2 - base);
            largest[half] = most;
            sum[half] *= scale[half];
#pragma unroll
            for (int i = half * 2; i < KEYS / 2; i += 4)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    s[i + j] = exp2_approx(s[i + j] * scale_log2 - base);
                    sum[half] += s[i + j];
                }
        }
#pragma unroll
        for (int i = 0; i < D / 2; ++i) out[i] *= scale[i / 2 % 2];
        u32 p[KEYS / 16][4];
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) p[i / 4][i % 4] = pack(s[2 * i], s[2 * i + 1]);

        wait(shared_address(&shared.v_full[stage]), parity); // WAIT V
        const u64 v = descriptor(shared_address(shared.v[stage]), 1024, PANEL_BYTES);
        settle(out);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i) wgmma_registers(out, p[i], v + i * 128, 1); // VALUES
        wgmma_commit();
#ifndef BUG_RELEASE
        wgmma_wait<0>();
#endif
        if (lane == 0) arrive(shared_address(&shared.v_empty[stage]));
#ifdef BUG_RELEASE
        wgmma_wait<0>();
#endif
        settle(out);
    }

    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sum[half] = row_sum(sum[half]);
        inverse[half] = 1 / sum[half];
        if (lane % 4 == 0 && row + half * 8 < s_q)
            lse[(u64)blockIdx.y * s_q + row + half * 8] =
                largest[half] * scale_log2 + log2f(sum[half]);
    }
    // This warpgroup's Q has been used; O takes its place.
#pragma unroll
    for (int i = 0; i < D / 2; i += 8) {
        const u32 to = shared_address(shared.q[consumer][i / 32]) +
                       swizzled(warp * 16 + lane % 16, i % 32 * 4 + lane / 16 * 16);
        store_matrices(to, pack(out[i] * inverse[0], out[i + 1] * inverse[0]), // STAGE O
                       pack(out[i + 2] * inverse[1], out[i + 3] * inverse[1]),
                       pack(out[i + 4] * inverse[0], out[i + 5] * inverse[0]),
                       pack(out[i + 6] * inverse[1], out[i + 7] * inverse[1]));
    }
#ifndef BUG_FENCE
    fence_async();
#endif
    named_barrier(1 + consumer, 128);
    if (warp == 0 && elect_one()) {
        for (int i = 0; i < D / 64; ++i)
            store_3d(o, i * 64, blockIdx.x * 128 + consumer * 64, blockIdx.y, // STORE O
                     shared_address(shared.q[consumer][i]));
        store_commit();
        store_wait_read();
    }
}

template <int D>
INLINE void attention(const TensorMap& q, const TensorMap& k, const TensorMap& v,
                      const TensorMap& o, float* lse, int s_q, int s_k, int causal,
                      float scale_log2) {
    Shared<D>& shared = *(Shared<D>*)memory;
    const int warp = threadIdx.x / 32;
    if (warp == 0 && elect_one()) {
        barrier_init(shared_address(&shared.q_full), 1);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared_address(&shared.k_full[i]), 1);
            barrier_init(shared_address(&shared.v_full[i]), 1);
            barrier_init(shared_address(&shared.k_empty[i]), CONSUMERS * 4); // warps
            barrier_init(shared_address(&shared.v_empty[i]), CONSUMERS * 4);
        }
        fence_barrier_init();
    }
    __syncthreads();
    int keys = s_k;
    if (causal) keys = min(keys, (int)blockIdx.x * 128 + 128 + s_k - s_q);
    const int blocks = (keys + KEYS - 1) / KEYS;
    if (warp < 4) {
        fewer_registers<40>();
        if (warp == 0 && elect_one()) produce(q, k, v, blocks, shared);
    } else {
        more_registers<232>();
        attend(o, lse, s_q, s_k, blocks, causal, scale_log2, warp / 4 - 1, shared);
    }
}

#define KERNEL(D)                                                                            \
    extern "C" __global__ void __launch_bounds__(384, 1) attention_##D(                      \
        const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,            \
        const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap o,            \
        float* lse, int s_q, int s_k, int causal, float scale_log2) {                        \
        attention<D>(q, k, v, o, lse, s_q, s_k, causal, scale_log2);                         \
    }

KERNEL(64)
KERNEL(128)
