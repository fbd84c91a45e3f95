// Prefix sums: within a block four ways, and over a whole array in one pass.

// Hillis and Steele, two buffers. Inclusive.
extern "C" __global__ void hillis_steele(const int* in, int* out, int n) {
    extern __shared__ int buffer[];  // [2][blockDim.x]
    int t = threadIdx.x, i = blockIdx.x * blockDim.x + t, from = 0;
    buffer[t] = i < n ? in[i] : 0;
    __syncthreads();
    for (int d = 1; d < blockDim.x; d *= 2) {
        int to = from ^ 1;
        const int* a = buffer + from * blockDim.x;
        buffer[to * blockDim.x + t] = t >= d ? a[t] + a[t - d] : a[t];
        from = to;
        __syncthreads();
    }
    if (i < n) out[i] = buffer[from * blockDim.x + t];
}

// Blelloch, two elements a thread, padded against bank conflicts. Exclusive; leaves block sums.
#define PAD(i) ((i) + ((i) >> 5))
template <class T> __device__ void blelloch(const T* in, T* out, T* sums, int n) {
    extern __shared__ __align__(8) unsigned char raw[];
    T* s = (T*)raw;
    int t = threadIdx.x, size = 2 * blockDim.x, base = blockIdx.x * size;
    s[PAD(t)] = base + t < n ? in[base + t] : T(0);
    s[PAD(t + blockDim.x)] = base + t + blockDim.x < n ? in[base + t + blockDim.x] : T(0);
    int stride = 1;
    for (int d = size >> 1; d > 0; d >>= 1) {
        __syncthreads();
        if (t < d) {
            int a = stride * (2 * t + 1) - 1, b = stride * (2 * t + 2) - 1;
            s[PAD(b)] += s[PAD(a)];
        }
        stride *= 2;
    }
    if (t == 0) {
        sums[blockIdx.x] = s[PAD(size - 1)];
        s[PAD(size - 1)] = 0;
    }
    for (int d = 1; d < size; d *= 2) {
        stride >>= 1;
        __syncthreads();
        if (t < d) {
            int a = stride * (2 * t + 1) - 1, b = stride * (2 * t + 2) - 1;
            T x = s[PAD(a)];
            s[PAD(a)] = s[PAD(b)];
            s[PAD(b)] += x;
        }
    }
    __syncthreads();
    if (base + t < n) out[base + t] = s[PAD(t)];
    if (base + t + blockDim.x < n) out[base + t + blockDim.x] = s[PAD(t + blockDim.x)];
}
extern "C" __global__ void blelloch_int(const int* in, int* out, int* sums, int n) { blelloch(in, out, sums, n); }
extern "C" __global__ void blelloch_double(const double* in, double* out, double* sums, int n) { blelloch(in, out, sums, n); }
extern "C" __global__ void add_sums(int* out, const int* before, int n, int each) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        out[i] += before[i / each];
}

// Shuffles; one warp scans the warps' sums.
__device__ int warp_inclusive(int x) {
    int lane = threadIdx.x & 31;
    #pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        int y = __shfl_up_sync(~0u, x, d);
        if (lane >= d) x += y;
    }
    return x;
}
// The same with the shuffle's predicate, as libraries do.
__device__ int warp_inclusive_p(int x) {
    #pragma unroll
    for (int d = 1; d < 32; d <<= 1)
        asm volatile("{.reg .s32 r; .reg .pred p; shfl.sync.up.b32 r|p, %0, %1, 0, 0xffffffff;"
                     " @p add.s32 %0, %0, r;}" : "+r"(x) : "r"(d));
    return x;
}
__device__ int block_inclusive(int x, int* total) {
    __shared__ int sums[33];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    x = warp_inclusive(x);
    if (lane == 31) sums[warp + 1] = x;
    if (threadIdx.x == 0) sums[0] = 0;
    __syncthreads();
    if (warp == 0) {
        int s = warp_inclusive_p(lane < blockDim.x / 32 ? sums[lane + 1] : 0);
        __syncwarp();
        sums[lane + 1] = s;
    }
    __syncthreads();
    *total = sums[blockDim.x / 32];
    return x + sums[warp];
}
extern "C" __global__ void shuffled(const int* in, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, total;
    int x = block_inclusive(i < n ? in[i] : 0, &total);
    if (i < n) out[i] = x;
}

// Decoupled look-back: a block adds up what earlier blocks announced, without waiting for all.
// Status of a block: 0 nothing, 1 its own sum, 2 the sum of all up to it.
extern "C" __global__ void look_back_volatile(const int* in, int* out, volatile int* status,
                                              volatile int* own, volatile int* upto, int* ticket, int n) {
    __shared__ int s_block, s_before;
    if (threadIdx.x == 0) s_block = atomicAdd(ticket, 1);
    __syncthreads();
    int block = s_block, i = block * blockDim.x + threadIdx.x, total;
    int x = block_inclusive(i < n ? in[i] : 0, &total);
    if (threadIdx.x == 0) {
        int before = 0;
        if (block > 0) {
            own[block] = total;
            __threadfence();
            status[block] = 1;
            for (int b = block - 1; b >= 0; --b) {
                int s;
                while ((s = status[b]) == 0) {}
                __threadfence();
                if (s == 2) { before += upto[b]; break; }
                before += own[b];
            }
        }
        upto[block] = before + total;
        __threadfence();
        status[block] = 2;
        s_before = before;
    }
    __syncthreads();
    if (i < n) out[i] = x + s_before;
}

// The same with status and sum in one 64-bit word, a whole warp looking back, and acquire/release.
__device__ unsigned long long load_acquire(const unsigned long long* p) {
    unsigned long long v;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
__device__ void store_release(unsigned long long* p, unsigned long long v) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" :: "l"(p), "l"(v) : "memory");
}
extern "C" __global__ void look_back_packed(const int* in, int* out, unsigned long long* words, int n) {
    __shared__ int s_before;
    int block = blockIdx.x, i = block * blockDim.x + threadIdx.x, total;
    int x = block_inclusive(i < n ? in[i] : 0, &total);
    if (threadIdx.x < 32) {
        int lane = threadIdx.x, before = 0;
        if (lane == 0) store_release(words + block, (block ? 1ull : 2ull) << 32 | (unsigned)total);
        for (int b = block - 1; b >= 0; b -= 32) {
            unsigned long long word = 2ull << 32;
            if (b - lane >= 0)
                do word = load_acquire(words + b - lane); while (word >> 32 == 0);
            __syncwarp();
            unsigned whole = __ballot_sync(~0u, word >> 32 == 2);
            int last = __ffs(whole) - 1;  // the nearest that knows all before it
            int mine = whole == 0 || lane <= last ? (int)(unsigned)word : 0;
            before += __reduce_add_sync(~0u, mine);
            if (whole) break;
        }
        if (lane == 0) {
            s_before = before;
            if (block) store_release(words + block, 2ull << 32 | (unsigned)(before + total));
        }
    }
    __syncthreads();
    if (i < n) out[i] = x + s_before;
}

// Keep what passes a test, in order, by ballots within a warp.
extern "C" __global__ void compact(const int* in, int* out, int* count, int n) {
    __shared__ int warps[32], base;
    int t = threadIdx.x, lane = t & 31;
    if (t == 0) base = 0;
    for (int start = 0; start < n; start += blockDim.x) {
        __syncthreads();
        int i = start + t;
        bool keep = i < n && in[i] % 3 == 1;
        unsigned votes = __ballot_sync(~0u, keep);
        if (lane == 0) warps[t / 32] = __popc(votes);
        __syncthreads();
        int at = base + __popc(votes & ((1u << lane) - 1));
        for (int w = 0; w < t / 32; ++w) at += warps[w];
        if (keep) out[at] = in[i];
        __syncthreads();
        if (t == blockDim.x - 1) base = at + keep;
    }
    __syncthreads();
    if (t == 0) *count = base;
}
// And in any order: one atomic a warp (warp-aggregated), in whatever lanes are active.
extern "C" __global__ void compact_any(const int* in, int* out, int* count, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    if (in[i] % 3 == 1) {
        unsigned mask = __activemask(), lane = threadIdx.x & 31;
        int leader = __ffs(mask) - 1, at = 0;
        if (lane == leader) at = atomicAdd(count, __popc(mask));
        at = __shfl_sync(mask, at, leader);
        unsigned below;
        asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
        out[at + __popc(mask & below)] = in[i];
    }
}
