// C = A @ B^T by clusters of two blocks that load half of B each and send it by st.async.
//
// A [M, K], B [N, K], bf16, row-major; C [M, N], f32. M is a multiple of 128, N and K of 64. The
// two blocks of a cluster compute 64 x 64 of C each, one below the other, from the same 64 rows of
// B: each reads 32 of them, writes them to its own shared memory, and sends them to the other.
// Grid (M / 64, N / 64), cluster (2, 1, 1), block 128. PEER_BY_XOR: the other's addresses are the
// own ones with bit 24 flipped, and 8 bytes are sent at a time, not 16.
#include "hopper.cuh"

constexpr int STAGES = 2;
constexpr int TILE_BYTES = 64 * 128; // 64 rows of A or B in a stage

INLINE u32 peer_address(const void* p) {
#ifdef PEER_BY_XOR
    return shared_address((const void*)((u64)p ^ 1 << 24));
#else
    return map_shared(shared_address(p), cluster_rank() ^ 1);
#endif
}

INLINE void send(u32 to, const uint4& v, u32 barrier) {
#ifdef PEER_BY_XOR
    store_async_8(to, v.x | (u64)v.y << 32, barrier);
    store_async_8(to + 8, v.z | (u64)v.w << 32, barrier);
#else
    store_async(to, v, barrier); // SEND
#endif
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128)
    exchange_gemm(const bf16* a, const bf16* b, float* c, int n, int k_all) {
    __shared__ __align__(1024) char tile_a[STAGES][TILE_BYTES], tile_b[STAGES][TILE_BYTES];
    // received: the other's half of B has arrived; may_send: the other has used the stage.
    __shared__ u64 received[STAGES], may_send[STAGES];
    const int t = threadIdx.x, warp = t / 32, lane = t % 32, rank = cluster_rank();
    if (t == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared_address(&received[i]), 1);
            barrier_init(shared_address(&may_send[i]), 4); // the other's warps
        }
        fence_barrier_init();
    }
    __syncwarp();
    cluster_sync();

    // A row of a tile is 8 pieces of 16 bytes.
    const int row = t / 8, piece = t % 8;
    a += (u64)blockIdx.x * 64 * k_all + piece * 8;
    b += (u64)blockIdx.y * 64 * k_all + piece * 8;
    float acc[32];
#pragma unroll 1
    for (int k = 0; k < k_all / 64; ++k) {
        const int stage = k % STAGES, parity = k / STAGES & 1;
        const u32 to_a = shared_address(tile_a[stage]), to_b = shared_address(tile_b[stage]);
        if (t == 0) {
#if defined(BUG_EXPECT_FEW)
            arrive_expect(shared_address(&received[stage]), TILE_BYTES / 4);
#elif defined(BUG_EXPECT_MANY)
            arrive_expect(shared_address(&received[stage]), TILE_BYTES);
#else
            arrive_expect(shared_address(&received[stage]), TILE_BYTES / 2);
#endif
        }
#pragma unroll
        for (int i = 0; i < 64; i += 16) {
            const uint4 v = *(const uint4*)(a + (u64)(i + row) * k_all + k * 64);
            store_shared(to_a + swizzled(i + row, piece * 16), v); // WRITE A
        }
        wait_cluster(shared_address(&may_send[stage]), parity ^ 1);
        const u32 peer_b = peer_address(tile_b[stage]), peer_received = peer_address(&received[stage]);
#pragma unroll
        for (int i = rank * 32; i < rank * 32 + 32; i += 16) {
            const uint4 v = *(const uint4*)(b + (u64)(i + row) * k_all + k * 64);
            const u32 offset = swizzled(i + row, piece * 16);
            store_shared(to_b + offset, v); // WRITE B
            send(peer_b + offset, v, peer_received);
        }
#ifndef BUG_FENCE
        fence_async(); // for what this thread wrote
#endif
        __syncthreads();
        wait_cluster(shared_address(&received[stage]), parity); // WAIT RECEIVED
#ifndef BUG_FENCE
        fence_async(); // for what the other block sent
#endif
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i)
            wgmma(acc, descriptor(to_a) + 2 * i, descriptor(to_b) + 2 * i, k | i); // MULTIPLY
        wgmma_commit();
#ifndef BUG_RELEASE
        wgmma_wait<0>();
#endif
        if (lane == 0) arrive_remote(peer_address(&may_send[stage]));
#ifdef BUG_RELEASE
        wgmma_wait<0>();
#endif
    }
    settle(acc);
    c += (u64)(blockIdx.x * 64 + warp * 16 + lane / 4) * n + blockIdx.y * 64 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        *(float2*)(c + i * 2) = make_float2(acc[i], acc[i + 1]);
        *(float2*)(c + 8 * n + i * 2) = make_float2(acc[i + 2], acc[i + 3]);
    }
    cluster_sync(); // nobody leaves while the other may still arrive here
}
