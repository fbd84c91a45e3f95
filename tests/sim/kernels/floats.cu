// Floating point: fractals, particles, quadrature, transforms, linear algebra, halves.
typedef unsigned int u32;
typedef unsigned short u16;

extern "C" __global__ void mandelbrot(int* out, int width, int height, int most) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= height) return;
    float cr = -2.f + 3.f * x / width, ci = -1.25f + 2.5f * y / height, r = 0, i = 0;
    int n = 0;
    while (n < most && __fadd_rn(__fmul_rn(r, r), __fmul_rn(i, i)) <= 4.f) {
        float t = __fadd_rn(__fadd_rn(__fmul_rn(r, r), -__fmul_rn(i, i)), cr);
        i = __fadd_rn(__fmul_rn(__fmul_rn(2.f, r), i), ci);
        r = t;
        ++n;
    }
    out[y * width + x] = n;
}

// All pairs, tiles of bodies in shared memory.
extern "C" __global__ void bodies(const float4* at, float4* force, int n) {
    __shared__ float4 tile[64];
    int i = blockIdx.x * 64 + threadIdx.x;
    float4 me = i < n ? at[i] : make_float4(0, 0, 0, 0);
    float3 f = make_float3(0, 0, 0);
    for (int start = 0; start < n; start += 64) {
        tile[threadIdx.x] = start + threadIdx.x < n ? at[start + threadIdx.x] : make_float4(0, 0, 0, 0);
        __syncthreads();
        #pragma unroll 8
        for (int j = 0; j < 64; ++j) {
            float4 o = tile[j];
            float dx = o.x - me.x, dy = o.y - me.y, dz = o.z - me.z;
            float r = rsqrtf(dx * dx + dy * dy + dz * dz + 0.01f);
            float s = o.w * r * r * r;
            f.x += dx * s; f.y += dy * s; f.z += dz * s;
        }
        __syncthreads();
    }
    if (i < n) force[i] = make_float4(f.x, f.y, f.z, sqrtf(f.x * f.x + f.y * f.y + f.z * f.z));
}

// The libraries' functions, inlined by the compiler. Large arguments take the slow path of sin.
extern "C" __global__ void functions(const double* x, double* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    double v = x[i], p = fabs(v) + 1e-300;
    double r[] = {sin(v), cos(v), exp(v / 100), log(p), sqrt(p), rsqrt(p), cbrt(v), atan(v), tanh(v / 50),
                  erf(v / 100), 1 / v, pow(p, 0.3), fmod(v, 3.7), hypot(v, 2.5), floor(v), expm1(v / 1000),
                  log1p(p), asinh(v), tgamma(fmod(p, 20.0) + 0.5), lgamma(p + 0.1), sinpi(v), exp2(v / 100), log2(p)};
    for (int k = 0; k < 23; ++k) out[i * 23 + k] = r[k];
}
extern "C" __global__ void functionsf(const float* x, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = x[i], p = fabsf(v) + 1e-30f;
    float r[] = {sinf(v), cosf(v), expf(v / 100), logf(p), sqrtf(p), rsqrtf(p), cbrtf(v), atanf(v), tanhf(v / 50),
                 erff(v / 100), 1 / v, powf(p, 0.3f), fmodf(v, 3.7f), hypotf(v, 2.5f), tanf(v), expm1f(v / 1000),
                 log1pf(p), asinhf(v), atan2f(v, 3.f), exp2f(v / 100), log2f(p), acosf(v / (p + 1)), sinpif(v)};
    for (int k = 0; k < 23; ++k) out[i * 23 + k] = r[k];
}
extern "C" __global__ void fast_functions(const float* x, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = x[i], p = fabsf(v) + 0.01f;
    float r[] = {__sinf(v), __cosf(v), __expf(v), __logf(p), __fdividef(v, p + 1), __powf(p, 1.5f), __frsqrt_rn(p),
                 __frcp_rn(p), __fsqrt_rd(p), __saturatef(v), __log2f(p), exp10f(v)};
    for (int k = 0; k < 12; ++k) out[i * 12 + k] = r[k];
}
template <class F> __device__ double simpson(F f, double a, double b, int n) {
    double h = (b - a) / n, sum = 0;
    for (int i = threadIdx.x; i <= n; i += blockDim.x)
        sum += f(a + i * h) * (i == 0 || i == n ? 1 : i & 1 ? 4 : 2);
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    return sum * h / 3;
}
extern "C" __global__ void integrals(double* out, int n) {
    double r = blockIdx.x == 0 ? simpson([](double x) { return exp(-x * x) * cos(20 * x); }, -4, 4, n)
             : blockIdx.x == 1 ? simpson([](double x) { return sin(1e6 + x) * x; }, 0, 3, n)
                               : simpson([](double x) { return sqrt(1 + x * x * x); }, 0, 2, n);
    if (threadIdx.x == 0) out[blockIdx.x] = r;
}
// Compensated sums, in an order that NumPy repeats.
extern "C" __global__ void kahan(const float* x, float* out, int rows, int columns) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float sum = 0, c = 0;
    for (int j = 0; j < columns; ++j) {
        float y = __fsub_rn(x[row * columns + j], c), t = __fadd_rn(sum, y);
        c = __fsub_rn(__fsub_rn(t, sum), y);
        sum = t;
    }
    out[row] = sum;
}

// A transform of 256 points by each block: Stockham, radix 2, in shared memory.
extern "C" __global__ void fft(const float2* in, float2* out) {
    __shared__ float2 s[2][256];
    int t = threadIdx.x, from = 0;
    in += blockIdx.x * 256; out += blockIdx.x * 256;
    s[0][t] = in[t]; s[0][t + 128] = in[t + 128];
    for (int m = 1; m < 256; m *= 2) {
        __syncthreads();
        int k = t & (m - 1);
        float2 a = s[from][t], b = s[from][t + 128], w;
        sincosf(-3.14159265358979f * k / m, &w.y, &w.x);
        b = make_float2(b.x * w.x - b.y * w.y, b.x * w.y + b.y * w.x);
        int to = (t - k) * 2 + k;
        s[from ^ 1][to] = make_float2(a.x + b.x, a.y + b.y);
        s[from ^ 1][to + m] = make_float2(a.x - b.x, a.y - b.y);
        from ^= 1;
    }
    __syncthreads();
    out[t] = s[from][t]; out[t + 128] = s[from][t + 128];
}
// Cholesky in place in shared memory; a block a matrix.
extern "C" __global__ void cholesky(double* a, int n) {
    extern __shared__ double m[];
    a += (long long)blockIdx.x * n * n;
    for (int i = threadIdx.x; i < n * n; i += blockDim.x) m[i] = a[i];
    for (int k = 0; k < n; ++k) {
        __syncthreads();
        if (threadIdx.x == 0) m[k * n + k] = sqrt(m[k * n + k]);
        __syncthreads();
        for (int i = k + 1 + threadIdx.x; i < n; i += blockDim.x) m[i * n + k] /= m[k * n + k];
        __syncthreads();
        for (int i = k + 1 + threadIdx.x / 16; i < n; i += blockDim.x / 16)
            for (int j = k + 1 + threadIdx.x % 16; j <= i; j += 16) m[i * n + j] -= m[i * n + k] * m[j * n + k];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n * n; i += blockDim.x) a[i] = i % n <= i / n ? m[i] : 0;
}
// Sparse times dense: a warp a row, or a thread an entry with atomics.
extern "C" __global__ void spmv_rows(const int* starts, const int* columns, const float* values, const float* x, float* y, int rows) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x & 31;
    if (row >= rows) return;
    float sum = 0;
    for (int k = starts[row] + lane; k < starts[row + 1]; k += 32) sum += values[k] * x[columns[k]];
    for (int d = 16; d; d >>= 1) sum += __shfl_down_sync(~0u, sum, d);
    if (lane == 0) y[row] = sum;
}
extern "C" __global__ void spmv_entries(const int* rows, const int* columns, const float* values, const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicAdd(y + rows[i], values[i] * x[columns[i]]);
}
extern "C" __global__ void shortest_paths(float* d, int n, int k) {
    int i = blockIdx.y * 16 + threadIdx.y, j = blockIdx.x * 16 + threadIdx.x;
    if (i < n && j < n && i != k && j != k) d[i * n + j] = fminf(d[i * n + j], d[i * n + k] + d[k * n + j]);
}

// Halves and bfloat16 without headers: classes around inline PTX.
struct Half {
    u16 bits;
    __device__ Half() {}
    __device__ explicit Half(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ operator float() const { float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits)); return x; }
    __device__ Half operator+(Half o) const { Half r; asm("add.rn.f16 %0, %1, %2;" : "=h"(r.bits) : "h"(bits), "h"(o.bits)); return r; }
    __device__ Half operator*(Half o) const { Half r; asm("mul.rn.f16 %0, %1, %2;" : "=h"(r.bits) : "h"(bits), "h"(o.bits)); return r; }
    __device__ static Half fma(Half a, Half b, Half c) { Half r; asm("fma.rn.f16 %0, %1, %2, %3;" : "=h"(r.bits) : "h"(a.bits), "h"(b.bits), "h"(c.bits)); return r; }
    __device__ bool operator<(Half o) const {
        u32 r;
        asm("{.reg .pred p; setp.lt.f16 p, %1, %2; selp.u32 %0, 1, 0, p;}" : "=r"(r) : "h"(bits), "h"(o.bits));
        return r;
    }
};
struct Bf16 {
    u16 bits;
    __device__ Bf16() {}
    __device__ explicit Bf16(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ operator float() const { return __uint_as_float((u32)bits << 16); }
    __device__ static Bf16 fma(Bf16 a, Bf16 b, Bf16 c) { Bf16 r; asm("fma.rn.bf16 %0, %1, %2, %3;" : "=h"(r.bits) : "h"(a.bits), "h"(b.bits), "h"(c.bits)); return r; }
};
extern "C" __global__ void halves(const Half* a, const Half* b, Half* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = a[i] + b[i];
    out[n + i] = a[i] * b[i];
    out[2 * n + i] = Half::fma(a[i], b[i], a[i]);
    out[3 * n + i] = a[i] < b[i] ? a[i] : b[i];
    out[4 * n + i] = Half((float)a[i] * (float)b[i] + 1.f);
}
extern "C" __global__ void bfloats(const Bf16* a, const Bf16* b, const float* x, Bf16* out, u32* packed, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = Bf16::fma(a[i], b[i], a[i]);
    out[n + i] = Bf16(x[i]);
    out[2 * n + i] = Bf16((float)a[i] / (float)b[i]);
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(x[i]), "f"((float)b[i]));
    packed[i] = pair;
}
// y = a x + y with two halves in a word, and an odd element at the end.
extern "C" __global__ void axpy_half2(u16 a, const u32* x, u32* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    u32 aa = a | (u32)a << 16;
    if (i < n / 2) asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(y[i]) : "r"(aa), "r"(x[i]));
    if (i == 0 && n % 2) {
        u16* last = (u16*)y + n - 1;
        asm("fma.rn.f16 %0, %1, %2, %0;" : "+h"(*last) : "h"(a), "h"(((const u16*)x)[n - 1]));
    }
}
