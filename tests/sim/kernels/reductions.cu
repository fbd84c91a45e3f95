// Sums and other reductions, in the ways that people write them.
template <class T> struct Sum {
    __device__ static T zero() { return T(0); }
    __device__ static T join(T a, T b) { return a + b; }
};
template <class T> struct Largest {
    __device__ static T zero();
    __device__ static T join(T a, T b) { return a > b ? a : b; }
};
template <> __device__ int Largest<int>::zero() { return -2147483647 - 1; }
template <> __device__ float Largest<float>::zero() { return __int_as_float(0xff800000); }

// A tree in shared memory; each block leaves one partial result.
template <class T, template <class> class Op>
__device__ void tree(const T* in, T* out, int n) {
    extern __shared__ __align__(16) unsigned char bytes[];
    T* s = reinterpret_cast<T*>(bytes);
    unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x * 2 + t;
    T mine = i < n ? in[i] : Op<T>::zero();
    if (i + blockDim.x < n) mine = Op<T>::join(mine, in[i + blockDim.x]);
    s[t] = mine;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half >>= 1) {
        if (t < half) s[t] = mine = Op<T>::join(mine, s[t + half]);
        __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = s[0];
}
extern "C" __global__ void tree_sum_int(const int* in, int* out, int n) { tree<int, Sum>(in, out, n); }
extern "C" __global__ void tree_sum_float(const float* in, float* out, int n) { tree<float, Sum>(in, out, n); }
extern "C" __global__ void tree_sum_double(const double* in, double* out, int n) { tree<double, Sum>(in, out, n); }
extern "C" __global__ void tree_max_int(const int* in, int* out, int n) { tree<int, Largest>(in, out, n); }
extern "C" __global__ void tree_max_float(const float* in, float* out, int n) { tree<float, Largest>(in, out, n); }

// The same with its last six steps unrolled in one warp (Harris' classic, with __syncwarp).
template <unsigned BLOCK> __device__ void unrolled(const int* in, int* out, int n) {
    __shared__ int s[BLOCK];
    unsigned t = threadIdx.x;
    int sum = 0;
    for (unsigned i = blockIdx.x * BLOCK * 2 + t; i < n; i += BLOCK * 2 * gridDim.x) {
        sum += in[i];
        if (i + BLOCK < n) sum += in[i + BLOCK];
    }
    s[t] = sum;
    __syncthreads();
    if (BLOCK >= 512) { if (t < 256) s[t] += s[t + 256]; __syncthreads(); }
    if (BLOCK >= 256) { if (t < 128) s[t] += s[t + 128]; __syncthreads(); }
    if (BLOCK >= 128) { if (t < 64) s[t] += s[t + 64]; __syncthreads(); }
    if (t < 32) {
        int v = s[t];
        v += s[t + 32]; __syncwarp(); s[t] = v; __syncwarp();
        v += s[t + 16]; __syncwarp(); s[t] = v; __syncwarp();
        v += s[t + 8]; __syncwarp(); s[t] = v; __syncwarp();
        v += s[t + 4]; __syncwarp(); s[t] = v; __syncwarp();
        v += s[t + 2]; __syncwarp(); s[t] = v; __syncwarp();
        v += s[t + 1];
        if (t == 0) out[blockIdx.x] = v;
    }
}
extern "C" __global__ void unrolled_64(const int* in, int* out, int n) { unrolled<64>(in, out, n); }
extern "C" __global__ void unrolled_256(const int* in, int* out, int n) { unrolled<256>(in, out, n); }

// Shuffles within warps, shared memory between them; then one atomic a block.
template <class T> __device__ T warp_sum(T x) {
    for (int d = 16; d; d >>= 1) x += __shfl_down_sync(0xffffffffu, x, d);
    return x;
}
template <class T> __device__ T block_sum(T x) {
    __shared__ T parts[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    x = warp_sum(x);
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    int warps = (blockDim.x + 31) >> 5;
    x = threadIdx.x < warps ? parts[lane] : T(0);
    if (warp == 0) x = warp_sum(x);
    return x;
}
extern "C" __global__ void shuffle_sum_float(const float* in, float* out, int n) {
    float x = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) x += in[i];
    x = block_sum(x);
    if (threadIdx.x == 0) atomicAdd(out, x);
}
extern "C" __global__ void shuffle_sum_double(const double* in, double* out, int n) {
    double x = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) x += in[i];
    x = block_sum(x);
    if (threadIdx.x == 0) atomicAdd(out, x);
}
// What people write to have atomicAdd(double*) everywhere, and atomicMax(float*).
__device__ void add(double* at, double x) {
    unsigned long long* word = reinterpret_cast<unsigned long long*>(at);
    unsigned long long old = *(volatile unsigned long long*)word, assumed;
    do {
        assumed = old;
        old = atomicCAS(word, assumed, __double_as_longlong(x + __longlong_as_double(assumed)));
    } while (assumed != old);
}
__device__ void largest(float* at, float x) {
    if (x >= 0) atomicMax(reinterpret_cast<int*>(at), __float_as_int(x));
    else atomicMin(reinterpret_cast<unsigned*>(at), __float_as_uint(x));
}
extern "C" __global__ void cas_sum_double(const double* in, double* sum, float* most, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { add(sum, in[i]); largest(most, (float)in[i]); }
}

// redux.sync, on all lanes and on the active ones.
extern "C" __global__ void redux(const int* in, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x & 31;
    if (i >= n) return;
    unsigned mask = __activemask();
    int x = in[i];
    int* row = out + (i - lane) / 32 * 7;
    int sum = __reduce_add_sync(mask, x), least = __reduce_min_sync(mask, x);
    int most = __reduce_max_sync(mask, x);
    unsigned umin = __reduce_min_sync(mask, (unsigned)x), both = __reduce_and_sync(mask, (unsigned)x);
    unsigned any = __reduce_or_sync(mask, (unsigned)x), odd = __reduce_xor_sync(mask, (unsigned)x);
    if (lane == __ffs(mask) - 1) {
        row[0] = sum; row[1] = least; row[2] = most; row[3] = umin;
        row[4] = both; row[5] = any; row[6] = odd;
    }
}

// Half precision pairs: eight halves a load, float at the end.
extern "C" __global__ void half2_sum(const uint4* in, float* out, int n8) {
    unsigned sum = 0;
    for (int i = threadIdx.x; i < n8; i += blockDim.x) {
        uint4 v = in[i];
        unsigned a, b;
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(a) : "r"(v.x), "r"(v.y));
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(b) : "r"(v.z), "r"(v.w));
        asm("add.rn.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
        asm("add.rn.f16x2 %0, %0, %1;" : "+r"(sum) : "r"(a));
    }
    for (int d = 1; d < 32; d <<= 1) {
        unsigned other = __shfl_xor_sync(~0u, sum, d);
        asm("add.rn.f16x2 %0, %0, %1;" : "+r"(sum) : "r"(other));
    }
    float low, high;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high) : "r"(sum));
    if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = low + high;
}

// The last block to finish adds up what all blocks left.
extern "C" __global__ void last_block(const float* in, float* parts, unsigned* done, float* out, int n) {
    __shared__ bool last;
    float x = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) x += in[i];
    x = block_sum(x);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = x;
        __threadfence();
        last = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (last) {
        x = 0;
        for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) x += parts[i];
        __syncthreads();
        x = block_sum(x);
        if (threadIdx.x == 0) *out = x;
    }
}

// Mean and variance in one pass (Welford), joined by shuffles of a struct.
struct Moments {
    float n, mean, m2;
    __device__ void operator+=(const Moments& o) {
        float all = n + o.n;
        if (all == 0) return;
        float d = o.mean - mean, share = o.n / all;
        mean += d * share;
        m2 += o.m2 + d * d * n * share;
        n = all;
    }
    __device__ Moments down(int d) const {
        return {__shfl_down_sync(~0u, n, d), __shfl_down_sync(~0u, mean, d), __shfl_down_sync(~0u, m2, d)};
    }
};
extern "C" __global__ void moments(const float* in, float* out, int n) {
    Moments m = {0, 0, 0};
    for (int i = threadIdx.x; i < n; i += blockDim.x) m += Moments{1, in[i], 0};
    for (int d = 16; d; d /= 2) m += m.down(d);
    __shared__ Moments parts[32];
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = m;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < blockDim.x / 32; ++w) m += parts[w];
        out[0] = m.mean;
        out[1] = m.m2 / m.n;
    }
}

// Index of the largest element; the first one of equals.
extern "C" __global__ void argmax(const float* in, int* out, int n) {
    float best = __int_as_float(0xff800000);
    int where = 0x7fffffff;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        if (in[i] > best) { best = in[i]; where = i; }
    #pragma unroll
    for (int d = 16; d; d >>= 1) {
        float b = __shfl_xor_sync(~0u, best, d);
        int w = __shfl_xor_sync(~0u, where, d);
        if (b > best || (b == best && w < where)) { best = b; where = w; }
    }
    __shared__ unsigned long long all;
    if (threadIdx.x == 0) all = 0;
    __syncthreads();
    unsigned bits = __float_as_uint(best);
    bits ^= (bits >> 31) ? 0xffffffffu : 0x80000000u;
    if (threadIdx.x % 32 == 0) atomicMax(&all, (unsigned long long)bits << 32 | (0xffffffffu - (unsigned)where));
    __syncthreads();
    if (threadIdx.x == 0) *out = 0xffffffffu - (unsigned)all;
}
