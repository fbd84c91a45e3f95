// C = X @ B^T in two kernels, the second launched while the first runs.
//
// X [M, K], f32; A [M, K] and B [N, K], bf16; C [M, N], f32. The first kernel divides each row of X
// by its largest magnitude, `scales` [M], and rounds it to A. The second, whose blocks take tile
// after tile, multiplies and puts the scales back. M is a multiple of 4. Maps as for hopper_gemm:
// A, B {64, 128}, C {32, 64}, rows swizzled by 128 bytes.
// normalise: grid M / 4, block 128. persistent_gemm: any grid, block 384, shared memory
// sizeof(Shared) = STAGES * 32768 + 66560 bytes; `scales` has room for ceil(M / 128) * 128.
#include "hopper.cuh"

#ifndef STAGES
#define STAGES 4
#endif

constexpr int CONSUMERS = 2;             // warpgroups
constexpr int TILE_BYTES = 128 * 64 * 2; // of A or B in a stage
constexpr int PANEL_BYTES = 64 * 128;    // 64 rows of C, 128 bytes of each

// A warp takes a row.
extern "C" __global__ void normalise(const float* x, bf16* a, float* scales, int k_all) {
    launch_dependents();
    const int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    x += (u64)row * k_all;
    a += (u64)row * k_all;
    float most = 0;
    for (int k = lane; k < k_all; k += 32) most = fmaxf(most, fabsf(x[k]));
    for (int d = 16; d; d >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
    const float scale = most == 0 ? 1 : most;
    for (int k = 2 * lane; k < k_all; k += 64)
        *(u32*)(a + k) = pack(x[k] / scale, x[k + 1] / scale); // WRITE A
    if (lane == 0) scales[row] = scale; // WRITE SCALES
}

struct Shared {
    alignas(1024) char a[STAGES][TILE_BYTES], b[STAGES][TILE_BYTES];
    alignas(1024) char c[CONSUMERS][4][PANEL_BYTES];
    float scales[128];
    u64 full[STAGES], empty[STAGES], scales_full, scales_empty;
};

extern __shared__ __align__(1024) char memory[];

INLINE void produce(const TensorMap& a, const TensorMap& b, const float* scales, int tiles,
                    int tiles_n, int k_tiles, Shared& shared) {
    int done = 0; // stages, of all tiles
    int parity = 1;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
        const int row = tile / tiles_n * 128, column = tile % tiles_n * 128;
#pragma unroll 1
        for (int k = 0; k < k_tiles; ++k, ++done) {
            const int stage = done % STAGES;
            const u32 full = shared_address(&shared.full[stage]);
            wait(shared_address(&shared.empty[stage]), (done / STAGES & 1) ^ 1);
#if defined(BUG_EXPECT_MANY)
            arrive_expect(full, 2 * TILE_BYTES + 16);
#else
            arrive_expect(full, 2 * TILE_BYTES);
#endif
            load_2d(shared_address(shared.b[stage]), b, k * 64, column, full); // LOAD B
#ifndef BUG_DEPENDENCE
            if (done == 0) wait_for_prerequisites(); // B does not come from the kernel before
#endif
            load_2d(shared_address(shared.a[stage]), a, k * 64, row, full); // LOAD A
        }
        const u32 full = shared_address(&shared.scales_full);
        wait(shared_address(&shared.scales_empty), parity);
#if defined(BUG_EXPECT_FEW)
        arrive(full);
#else
        arrive_expect(full, sizeof(shared.scales));
#endif
        load_bulk(shared_address(shared.scales), scales + row, sizeof(shared.scales), full); // LOAD SCALES
    }
}

INLINE void consume(const TensorMap& c, int tiles, int tiles_n, int k_tiles, int consumer,
                    Shared& shared) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int row = warp * 16 + lane / 4;
    const bool leader = warp == 0 && elect_one();
    int done = 0, parity = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
        float acc[64];
#pragma unroll 1
        for (int k = 0; k < k_tiles; ++k, ++done) {
            const int stage = done % STAGES;
            wait(shared_address(&shared.full[stage]), done / STAGES & 1); // WAIT FULL
            const u64 a = descriptor(shared_address(shared.a[stage]) + consumer * PANEL_BYTES);
            const u64 b = descriptor(shared_address(shared.b[stage]));
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; ++i) wgmma(acc, a + 2 * i, b + 2 * i, k | i); // MULTIPLY
            wgmma_commit();
#ifdef BUG_RELEASE
            if (lane == 0) arrive(shared_address(&shared.empty[stage]));
            wgmma_wait<0>();
#else
            wgmma_wait<0>();
            if (lane == 0) arrive(shared_address(&shared.empty[stage]));
#endif
        }
        settle(acc);
        wait(shared_address(&shared.scales_full), parity);
        const u32 scales = shared_address(&shared.scales[consumer * 64 + row]);
        const float scale = load_shared(scales), scale_8 = load_shared(scales + 32); // READ SCALES
        __syncwarp();
        if (lane == 0) arrive(shared_address(&shared.scales_empty));

#ifndef BUG_REUSE
        if (leader) store_wait_read(); // the tile before has left the panels
#endif
        named_barrier(1 + consumer, 128);
#pragma unroll
        for (int i = 0; i < 64; i += 4) {
            const int byte = (i * 2 + lane % 4 * 2) % 32 * 4;
            const u32 panel = shared_address(shared.c[consumer][i / 16]);
            store_shared(panel + swizzled(row, byte), acc[i] * scale, acc[i + 1] * scale); // STAGE C
            store_shared(panel + swizzled(row + 8, byte), acc[i + 2] * scale_8, acc[i + 3] * scale_8);
        }
#ifndef BUG_FENCE
        fence_async();
#endif
        named_barrier(1 + consumer, 128);
        if (leader) {
            for (int i = 0; i < 4; ++i)
                store_2d(c, tile % tiles_n * 128 + i * 32, tile / tiles_n * 128 + consumer * 64, // STORE C
                         shared_address(shared.c[consumer][i]));
            store_commit();
        }
    }
    if (leader) store_wait();
}

extern "C" __global__ void __launch_bounds__(384, 1)
    persistent_gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                    const __grid_constant__ TensorMap c, const float* scales, int tiles,
                    int tiles_n, int k_tiles) {
    Shared& shared = *(Shared*)memory;
    const int warp = threadIdx.x / 32;
    if (warp == 0 && elect_one()) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared_address(&shared.full[i]), 1);
            barrier_init(shared_address(&shared.empty[i]), CONSUMERS * 4); // warps
        }
        barrier_init(shared_address(&shared.scales_full), 1);
        barrier_init(shared_address(&shared.scales_empty), CONSUMERS * 4);
        fence_barrier_init();
    }
    __syncthreads();
    if (warp < 4) {
        fewer_registers<40>();
        if (warp == 0 && elect_one()) produce(a, b, scales, tiles, tiles_n, k_tiles, shared);
    } else {
        more_registers<232>();
        consume(c, tiles, tiles_n, k_tiles, warp / 4 - 1, shared);
    }
}
