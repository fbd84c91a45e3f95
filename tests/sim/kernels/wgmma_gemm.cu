// C = A * B for bf16 A [m][k] and B [k][n], f32 C [m][n]: a tile of 128 by 64 for each block of two
// warpgroups, steps of 64 along k through two stages of shared memory with 128-byte swizzles.
typedef unsigned long long u64;

constexpr int TILE_M = 128, TILE_N = 64, STEP = 64, STAGES = 2;
constexpr int A_BYTES = TILE_M * STEP * 2, B_BYTES = STEP * TILE_N * 2;

__device__ __forceinline__ u64 descriptor(const void* matrix) {
    u64 start = (__cvta_generic_to_shared(matrix) & 0x3ffff) >> 4;
    return start | (u64)(1024 >> 4) << 32 | (u64)1 << 62;  // eights of rows 1024 bytes apart
}

// Copy rows of 128 bytes to where the swizzle wants their chunks of 16.
__device__ __forceinline__ void fill(unsigned char* to, const unsigned char* from, int rows,
                                     int pitch) {
    for (int i = threadIdx.x; i < rows * 8; i += blockDim.x) {
        int row = i / 8, chunk = i % 8;
        *(uint4*)(to + row * 128 + (chunk ^ row % 8) * 16) =
            *(const uint4*)(from + row * pitch + chunk * 16);
    }
}

__device__ __forceinline__ void multiply(float (&d)[32], u64 a, u64 b, int takes) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19,"
        " %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 1;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),
          "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(takes));
}

extern "C" __global__ void __launch_bounds__(256)
wgmma_gemm(const unsigned char* a, const unsigned char* b, float* c, int k, int n) {
    __shared__ __align__(1024) unsigned char a_tile[STAGES][A_BYTES];
    __shared__ __align__(1024) unsigned char b_tile[STAGES][B_BYTES];
    int row = blockIdx.y * TILE_M, column = blockIdx.x * TILE_N;
    int group = threadIdx.x / 128;
    float d[32];
    for (int i = 0; i < 32; i++) d[i] = 0;
    for (int step = 0; step < k / STEP; step++) {
        int stage = step % STAGES;
        fill(a_tile[stage], a + (size_t)row * k * 2 + step * STEP * 2, TILE_M, k * 2);
        fill(b_tile[stage], b + (size_t)step * STEP * n * 2 + column * 2, STEP, n * 2);
        asm volatile("fence.proxy.async;" ::: "memory");
        __syncthreads();
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < STEP / 16; i++)
            // 16 of k are 32 bytes of a row of A, and two times eight rows of B.
            multiply(d, descriptor(a_tile[stage] + group * (A_BYTES / 2)) + i * 2,
                     descriptor(b_tile[stage]) + i * (2048 >> 4), step + i > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#ifdef WAIT_TOO_LATE
        asm volatile("wgmma.wait_group.sync.aligned 2;" ::: "memory");
#else
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#endif
        __syncthreads();  // the stage before is free
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 32; i++) {
        int r = row + warp * 16 + lane / 4 + i / 2 % 2 * 8;
        c[(size_t)r * n + column + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
    }
}
