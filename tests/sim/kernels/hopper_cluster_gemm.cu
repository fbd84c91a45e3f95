// C = A @ B^T by clusters of two blocks that share B's tile by multicast.
//
// A [M, K], B [N, K], bf16; C [M, N], f32. The two blocks of a cluster compute 128 x 128 of C each,
// one below the other: each loads its own A, and half of B for both. The maps' boxes have 128 bytes
// a row, swizzled by 128 bytes: A {64, 128}, B {64, 64}, C {32, 64}.
// Grid (2 * ceil(M / 256), ceil(N / 128)), cluster (2, 1, 1), block 384, shared memory
// sizeof(Shared) = STAGES * 32768 + 66560 bytes.
#include "hopper.cuh"

#ifndef STAGES
#define STAGES 4
#endif

constexpr int CONSUMERS = 2;             // warpgroups
constexpr int TILE_BYTES = 128 * 64 * 2; // of A or B in a stage
constexpr int PANEL_BYTES = 64 * 128;    // 64 rows, 128 bytes of each

struct Shared {
    alignas(1024) char a[STAGES][TILE_BYTES], b[STAGES][TILE_BYTES];
    alignas(1024) char c[CONSUMERS][4][PANEL_BYTES];
    u64 full[STAGES], empty[STAGES];
};

extern __shared__ __align__(1024) char memory[];

INLINE void produce(const TensorMap& a, const TensorMap& b, int k_tiles, Shared& shared) {
    const u32 rank = cluster_rank();
#pragma unroll 1
    for (int k = 0; k < k_tiles; ++k) {
        const int stage = k % STAGES;
        const u32 full = shared_address(&shared.full[stage]);
        // The stage is free in both blocks: both are written.
        wait_cluster(shared_address(&shared.empty[stage]), (k / STAGES & 1) ^ 1);
#if defined(BUG_EXPECT_FEW)
        arrive_expect(full, TILE_BYTES + TILE_BYTES / 2); // as if only this block sent B
#elif defined(BUG_EXPECT_MANY)
        arrive_expect(full, 2 * TILE_BYTES + TILE_BYTES / 2);
#else
        arrive_expect(full, 2 * TILE_BYTES);
#endif
        load_2d(shared_address(shared.a[stage]), a, k * 64, blockIdx.x * 128, full); // LOAD A
        load_2d_multicast(shared_address(shared.b[stage]) + rank * PANEL_BYTES, b, k * 64, // LOAD B
                          blockIdx.y * 128 + rank * 64, full, 3);
    }
}

INLINE void multiply(float (&acc)[64], int k_tiles, int consumer, int lane, Shared& shared) {
#pragma unroll 1
    for (int k = 0; k < k_tiles; ++k) {
        const int stage = k % STAGES;
        wait_cluster(shared_address(&shared.full[stage]), k / STAGES & 1); // WAIT FULL
        const u64 a = descriptor(shared_address(shared.a[stage]) + consumer * PANEL_BYTES);
        const u64 b = descriptor(shared_address(shared.b[stage]));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) wgmma(acc, a + 2 * i, b + 2 * i, k | i); // MULTIPLY
        wgmma_commit();
#ifdef BUG_RELEASE
        if (lane < 2) arrive_remote(map_shared(shared_address(&shared.empty[stage]), lane));
        wgmma_wait<1>();
#else
        wgmma_wait<1>(); // all but the newest: the stage before is free, as both blocks must know
        if (k > 0 && lane < 2)
            arrive_remote(map_shared(shared_address(&shared.empty[(k - 1) % STAGES]), lane));
#endif
    }
    wgmma_wait<0>();
    settle(acc);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    cluster_gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                 const __grid_constant__ TensorMap c, int k_tiles) {
    Shared& shared = *(Shared*)memory;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0 && elect_one()) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared_address(&shared.full[i]), 1);
            barrier_init(shared_address(&shared.empty[i]), 2 * CONSUMERS * 4); // both blocks' warps
        }
        fence_barrier_init();
    }
    __syncwarp();
    cluster_sync();

    if (warp < 4) {
        fewer_registers<40>();
        if (warp == 0 && elect_one()) produce(a, b, k_tiles, shared);
    } else {
        more_registers<232>();
        const int consumer = warp / 4 - 1;
        float acc[64];
        multiply(acc, k_tiles, consumer, lane, shared);
        const int row = warp % 4 * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < 64; i += 4) {
            const int byte = (i * 2 + lane % 4 * 2) % 32 * 4;
            const u32 panel = shared_address(shared.c[consumer][i / 16]);
            store_shared(panel + swizzled(row, byte), acc[i], acc[i + 1]); // STAGE C
            store_shared(panel + swizzled(row + 8, byte), acc[i + 2], acc[i + 3]);
        }
#ifndef BUG_FENCE
        fence_async();
#endif
        named_barrier(1 + consumer, 128);
        if (warp % 4 == 0 && elect_one()) {
            for (int i = 0; i < 4; ++i)
                store_2d(c, blockIdx.y * 128 + i * 32, blockIdx.x * 128 + consumer * 64, // STORE C
                         shared_address(shared.c[consumer][i]));
            store_commit();
            store_wait_read();
        }
    }
    // Nobody leaves while the other block may still arrive here or write here.
    __syncwarp();
    cluster_sync();
}
