// Moving data: transposes, vector copies, histograms, stencils with halos, convolution.
extern "C" __global__ void transpose(const float* in, float* out, int rows, int columns) {
    __shared__ float tile[32][33];
    int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
    for (int j = 0; j < 32; j += 8)
        if (y + j < rows && x < columns) tile[threadIdx.y + j][threadIdx.x] = in[(y + j) * columns + x];
    __syncthreads();
    x = blockIdx.y * 32 + threadIdx.x;
    y = blockIdx.x * 32 + threadIdx.y;
    for (int j = 0; j < 32; j += 8)
        if (y + j < columns && x < rows) out[(y + j) * rows + x] = tile[threadIdx.x][threadIdx.y + j];
}
// In place, square: a block swaps two tiles.
extern "C" __global__ void transpose_in_place(short* data, int n) {
    if (blockIdx.x > blockIdx.y) return;
    __shared__ short a[16][17], b[16][17];
    int tx = threadIdx.x, ty = threadIdx.y;
    int ax = blockIdx.x * 16 + tx, ay = blockIdx.y * 16 + ty;
    int bx = blockIdx.y * 16 + tx, by = blockIdx.x * 16 + ty;
    if (ax < n && ay < n) a[ty][tx] = data[ay * n + ax];
    if (bx < n && by < n) b[ty][tx] = data[by * n + bx];
    __syncthreads();
    if (ax < n && ay < n) data[ay * n + ax] = b[tx][ty];
    if (blockIdx.x != blockIdx.y && bx < n && by < n) data[by * n + bx] = a[tx][ty];
}
// 8x8 transposes of registers by shuffles, no shared memory.
extern "C" __global__ void transpose_shuffled(const int* in, int* out) {
    int lane = threadIdx.x & 7, base = threadIdx.x / 8 * 64;
    int r[8];
    #pragma unroll
    for (int i = 0; i < 8; ++i) r[i] = in[base + i * 8 + lane];
    #pragma unroll
    for (int d = 4; d; d >>= 1)
        #pragma unroll
        for (int i = 0; i < 8; ++i)
            if (!(i & d)) {
                int send = lane & d ? r[i] : r[i + d];
                int got = __shfl_xor_sync(~0u, send, d);
                if (lane & d) r[i] = got; else r[i + d] = got;
            }
    #pragma unroll
    for (int i = 0; i < 8; ++i) out[base + i * 8 + lane] = r[i];
}

// Copies, grid-stride, with every width; the odd end is copied by single elements.
template <class V, class T> __device__ void copy(const T* in, T* out, int n) {
    constexpr int W = sizeof(V) / sizeof(T);
    int t = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
    for (int i = t; i < n / W; i += all) ((V*)out)[i] = ((const V*)in)[i];
    for (int i = n / W * W + t; i < n; i += all) out[i] = in[i];
}
extern "C" __global__ void copy_int4(const int* in, int* out, int n) { copy<int4>(in, out, n); }
extern "C" __global__ void copy_float2(const float* in, float* out, int n) { copy<float2>(in, out, n); }
extern "C" __global__ void copy_double2(const double* in, double* out, int n) { copy<double2>(in, out, n); }
extern "C" __global__ void copy_uchar4(const unsigned char* in, unsigned char* out, int n) { copy<uchar4>(in, out, n); }
extern "C" __global__ void copy_short4(const short* in, short* out, int n) { copy<short4>(in, out, n); }
extern "C" __global__ void copy_hinted(const float4* __restrict__ in, float4* out, int n4) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n4) return;
    float4 a = __ldg(in + i), b = __ldcs(in + i), c = __ldcg(in + i), d;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(d.x), "=f"(d.y), "=f"(d.z), "=f"(d.w) : "l"(in + i));
    __stcs(out + i, make_float4(a.x + b.y, b.z - c.w, c.x * d.y, d.z));
}
// Structures of arrays from arrays of structures.
struct Particle { float x, y, z; int id; short kind; bool alive; double mass; };
extern "C" __global__ void unzip(const Particle* in, float* xyz, double* mass, int* tags, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    Particle p = in[i];
    xyz[i] = p.x; xyz[n + i] = p.y; xyz[2 * n + i] = p.z;
    mass[i] = p.mass;
    tags[i] = p.alive ? p.id * 8 + p.kind : -1;
}

// Bytes: a block counts in shared memory (a copy a warp), then adds to the global counts.
extern "C" __global__ void histogram(const unsigned* words, int n, int bytes, unsigned* counts) {
    __shared__ unsigned mine[4][256];
    for (int i = threadIdx.x; i < 4 * 256; i += blockDim.x) (&mine[0][0])[i] = 0;
    __syncthreads();
    unsigned* c = mine[threadIdx.x / 32 % 4];
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        unsigned w = words[i];
        for (int b = 0; b < 4 && 4 * i + b < bytes; ++b) atomicAdd(c + (w >> 8 * b & 255), 1u);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x) {
        unsigned sum = mine[0][i] + mine[1][i] + mine[2][i] + mine[3][i];
        if (sum) atomicAdd(counts + i, sum);
    }
}
// 8-bit counters packed in words of shared memory, emptied before they can overflow.
extern "C" __global__ void histogram_packed(const unsigned char* in, int n, unsigned* counts) {
    __shared__ unsigned char c[64][32];  // by bin, by lane: nobody shares a counter
    int t = threadIdx.x;
    for (int i = 0; i < 64; ++i) c[i][t] = 0;
    for (int i = t; i < n; i += 32) c[in[i] >> 2][t]++;
    __syncwarp();
    for (int bin = t; bin < 64; bin += 32) {
        unsigned sum = 0;
        for (int i = 0; i < 32; ++i) sum += c[bin][(i + t) & 31];
        counts[bin] = sum;
    }
}

// Conway's game on a torus, tiles with halos; several generations through two buffers.
extern "C" __global__ void life(const unsigned char* in, unsigned char* out, int rows, int columns) {
    __shared__ unsigned char s[18][34];
    int x0 = blockIdx.x * 32 - 1, y0 = blockIdx.y * 16 - 1;
    for (int i = threadIdx.y * 32 + threadIdx.x; i < 18 * 34; i += 32 * 8) {
        int y = (y0 + i / 34 + rows) % rows, x = (x0 + i % 34 + columns) % columns;
        s[i / 34][i % 34] = in[y * columns + x];
    }
    __syncthreads();
    for (int dy = threadIdx.y; dy < 16; dy += 8) {
        int y = y0 + 1 + dy, x = x0 + 1 + threadIdx.x, sum = 0;
        if (y >= rows || x >= columns) continue;
        #pragma unroll
        for (int j = 0; j < 3; ++j)
            #pragma unroll
            for (int i = 0; i < 3; ++i) sum += s[dy + j][threadIdx.x + i];
        bool now = s[dy + 1][threadIdx.x + 1];
        out[y * columns + x] = sum == 3 || (sum == 4 && now);
    }
}

// A seven-point stencil in 3-D: planes in shared memory, the column in registers.
extern "C" __global__ void stencil(const float* in, float* out, int nx, int ny, int nz) {
    __shared__ float s[10][18];
    int tx = threadIdx.x + 1, ty = threadIdx.y + 1;
    int x = blockIdx.x * 16 + threadIdx.x, y = blockIdx.y * 8 + threadIdx.y;
    bool inside = x < nx && y < ny;
    auto at = [=](int xx, int yy, int zz) -> float {
        return xx < 0 || yy < 0 || zz < 0 || xx >= nx || yy >= ny || zz >= nz ? 0.f
            : in[((long long)zz * ny + yy) * nx + xx];
    };
    float below = 0, here = at(x, y, 0), above;
    for (int z = 0; z < nz; ++z) {
        above = at(x, y, z + 1);
        s[ty][tx] = here;
        if (threadIdx.x == 0) s[ty][0] = at(x - 1, y, z);
        if (threadIdx.x == 15) s[ty][17] = at(x + 1, y, z);
        if (threadIdx.y == 0) s[0][tx] = at(x, y - 1, z);
        if (threadIdx.y == 7) s[9][tx] = at(x, y + 1, z);
        __syncthreads();
        if (inside)
            out[(z * ny + y) * nx + x] = s[ty][tx - 1] + s[ty][tx + 1] + s[ty - 1][tx] + s[ty + 1][tx]
                + below + above - 6.f * here;
        __syncthreads();
        below = here;
        here = above;
    }
}

// Convolution with weights in constant memory; float by fused multiply-adds, in order.
__constant__ float taps[9] = {0.5f, -1.f, 0.25f, 2.f, 3.f, -0.125f, 1.5f, 0.75f, -2.f};
template <int RADIUS> __device__ void convolve(const float* in, float* out, int n) {
    __shared__ float s[64 + 2 * RADIUS];
    int start = blockIdx.x * 64 - RADIUS;
    for (int i = threadIdx.x; i < 64 + 2 * RADIUS; i += 64)
        s[i] = start + i >= 0 && start + i < n ? in[start + i] : 0.f;
    __syncthreads();
    float sum = 0;
    #pragma unroll
    for (int i = 0; i <= 2 * RADIUS; ++i) sum = fmaf(s[threadIdx.x + i], taps[i], sum);
    if (blockIdx.x * 64 + threadIdx.x < n) out[blockIdx.x * 64 + threadIdx.x] = sum;
}
extern "C" __global__ void convolve4(const float* in, float* out, int n) { convolve<4>(in, out, n); }

// A ring of prefetched rows: cp.async runs three rows ahead; each row needs its neighbours.
extern "C" __global__ void prefetch_ring(const int* in, int* out, int rows, int width) {
    __shared__ int ring[4][96];
    int t = threadIdx.x;
    auto fetch = [&](int row) {
        unsigned to = (unsigned)__cvta_generic_to_shared(&ring[row & 3][t]);
        // Lanes outside write zeros: no bytes are read then.
        int size = t < width && row < rows ? 4 : 0;
        const int* from = in + (size ? row * width + t : 0);
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(to), "l"(from), "r"(size) : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    fetch(0); fetch(1); fetch(2);
    for (int r = 0; r < rows; ++r) {
        asm volatile("cp.async.wait_group 2;" ::: "memory");
        __syncthreads();
        const int* row = ring[r & 3];
        int value = row[t] * 10 + (t ? row[t - 1] : 0) - (t < 95 ? row[t + 1] : 0);
        fetch(r + 3);  // overwrites row r - 1, which all have read before this barrier
        if (t < width) out[r * width + t] = value;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}
