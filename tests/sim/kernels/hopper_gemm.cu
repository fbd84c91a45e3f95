// C = A @ B^T by tensor copies, wgmma and specialised warps.
//
// A [M, K], B [N, K], bf16; C [M, N], f32 or bf16. A block computes 128 x 128 of C: one warp loads
// stages of 64 columns of A and B, two warpgroups multiply 64 rows each. M and N may be anything
// (what lies outside is loaded as zeros and not stored). The maps' boxes have 128 bytes a row,
// swizzled by 128 bytes: A, B {64, 128}; C {32, 64} of f32 or {64, 64} of bf16.
// Grid (ceil(N / 128), ceil(M / 128)), block 384, shared memory sizeof(Shared<C>) =
// STAGES * 32768 + 128 * 128 * sizeof(C) + 1024 bytes.
#include "hopper.cuh"

#ifndef STAGES
#define STAGES 4
#endif

constexpr int CONSUMERS = 2;                // warpgroups
constexpr int TILE_BYTES = 128 * 64 * 2;    // of A or B in a stage
constexpr int PANEL_BYTES = 64 * 128;       // 64 rows of C, 128 bytes of each

template <class C> struct Shared {
    alignas(1024) char a[STAGES][TILE_BYTES], b[STAGES][TILE_BYTES];
    alignas(1024) char c[CONSUMERS][64 * 128 * sizeof(C)];
    u64 full[STAGES], empty[STAGES];
};

extern __shared__ __align__(1024) char memory[];

template <class C>
INLINE void produce(const TensorMap& a, const TensorMap& b, int k_tiles, Shared<C>& shared) {
#pragma unroll 1
    for (int k = 0; k < k_tiles; ++k) {
        const int stage = k % STAGES;
        const u32 full = shared_address(&shared.full[stage]);
        wait(shared_address(&shared.empty[stage]), (k / STAGES & 1) ^ 1);
#if defined(BUG_EXPECT_FEW)
        arrive_expect(full, TILE_BYTES);
#elif defined(BUG_EXPECT_MANY)
        arrive_expect(full, 2 * TILE_BYTES + 16);
#else
        arrive_expect(full, 2 * TILE_BYTES);
#endif
        load_2d(shared_address(shared.a[stage]), a, k * 64, blockIdx.y * 128, full); // LOAD A
        load_2d(shared_address(shared.b[stage]), b, k * 64, blockIdx.x * 128, full); // LOAD B
    }
}

// acc = 64 rows of A @ 128 rows of B^T.
template <class C>
INLINE void multiply(float (&acc)[64], int k_tiles, int consumer, int lane, Shared<C>& shared) {
#pragma unroll 1
    for (int k = 0; k < k_tiles; ++k) {
        const int stage = k % STAGES;
        wait(shared_address(&shared.full[stage]), k / STAGES & 1); // WAIT FULL
        const u64 a = descriptor(shared_address(shared.a[stage]) + consumer * PANEL_BYTES);
        const u64 b = descriptor(shared_address(shared.b[stage]));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) wgmma(acc, a + 2 * i, b + 2 * i, k | i); // MULTIPLY
        wgmma_commit();
#ifdef BUG_RELEASE
        if (lane == 0) arrive(shared_address(&shared.empty[stage]));
        wgmma_wait<1>();
#else
        wgmma_wait<1>(); // all but the newest: the stage before is free
        if (k > 0 && lane == 0) arrive(shared_address(&shared.empty[(k - 1) % STAGES]));
#endif
    }
    wgmma_wait<0>();
    settle(acc);
}

// Registers to panels of C in shared memory.
INLINE void stage(const float (&acc)[64], char* panels, int warp, int lane, float) {
    const int row = warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
        const int column = i * 2 + lane % 4 * 2;
        const u32 panel = shared_address(panels) + i / 16 * PANEL_BYTES;
        store_shared(panel + swizzled(row, column % 32 * 4), acc[i], acc[i + 1]); // STAGE C
        store_shared(panel + swizzled(row + 8, column % 32 * 4), acc[i + 2], acc[i + 3]);
    }
}

INLINE void stage(const float (&acc)[64], char* panels, int warp, int lane, bf16) {
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < 64; i += 8) {
        const int column = i * 2 + lane / 16 * 8;
        const u32 panel = shared_address(panels) + i / 32 * PANEL_BYTES;
        store_matrices(panel + swizzled(row, column % 64 * 2), pack(acc[i], acc[i + 1]), // STAGE BF16
                       pack(acc[i + 2], acc[i + 3]), pack(acc[i + 4], acc[i + 5]),
                       pack(acc[i + 6], acc[i + 7]));
    }
}

template <class C>
INLINE void gemm(const TensorMap& a, const TensorMap& b, const TensorMap& c, int k_tiles) {
    Shared<C>& shared = *(Shared<C>*)memory;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0 && elect_one()) {
        prefetch_map(a);
        prefetch_map(b);
        prefetch_map(c);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared_address(&shared.full[i]), 1);
            barrier_init(shared_address(&shared.empty[i]), CONSUMERS * 4); // warps
        }
        fence_barrier_init();
    }
    __syncthreads();

    if (warp < 4) {
        fewer_registers<40>();
        if (warp == 0 && elect_one()) produce(a, b, k_tiles, shared);
    } else {
        more_registers<232>();
        const int consumer = warp / 4 - 1;
        float acc[64];
        multiply(acc, k_tiles, consumer, lane, shared);
        stage(acc, shared.c[consumer], warp % 4, lane, C());
#ifndef BUG_FENCE
        fence_async();
#endif
        named_barrier(1 + consumer, 128);
        if (warp % 4 == 0 && elect_one()) {
            constexpr int WIDTH = 128 / sizeof(C); // columns of a panel
            for (int i = 0; i < 128 / WIDTH; ++i)
                store_2d(c, blockIdx.x * 128 + i * WIDTH, blockIdx.y * 128 + consumer * 64, // STORE C
                         shared_address(shared.c[consumer] + i * PANEL_BYTES));
            store_commit();
            store_wait_read();
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_f32(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
             const __grid_constant__ TensorMap c, int k_tiles) {
    gemm<float>(a, b, c, k_tiles);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_bf16(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
              const __grid_constant__ TensorMap c, int k_tiles) {
    gemm<bf16>(a, b, c, k_tiles);
}
