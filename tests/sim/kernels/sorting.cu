// Sorting: bitonic networks, radix passes, odd-even transposition, merging.
typedef unsigned int u32;
typedef unsigned long long u64;

template <class T> __device__ void exchange(T& a, T& b, bool up) {
    if ((a > b) == up) { T t = a; a = b; b = t; }
}

// One block, two elements a thread, padded with the largest value.
template <class T> __device__ void bitonic_block(T* data, int n, T most) {
    extern __shared__ __align__(8) char raw[];
    T* s = (T*)raw;
    int size = 2 * blockDim.x;
    for (int i = threadIdx.x; i < size; i += blockDim.x) s[i] = i < n ? data[i] : most;
    for (int k = 2; k <= size; k <<= 1)
        for (int j = k >> 1; j > 0; j >>= 1) {
            __syncthreads();
            int i = 2 * threadIdx.x - (threadIdx.x & (j - 1));
            exchange(s[i], s[i + j], (i & k) == 0);
        }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) data[i] = s[i];
}
extern "C" __global__ void bitonic_int(int* data, int n) { bitonic_block(data, n, 0x7fffffff); }
extern "C" __global__ void bitonic_float(float* data, int n) { bitonic_block(data, n, __int_as_float(0x7f800000)); }
extern "C" __global__ void bitonic_u64(u64* data, int n) { bitonic_block(data, n, ~0ull); }

// One step of the network over global memory; the host launches log^2 of them.
extern "C" __global__ void bitonic_step(int* data, int j, int k, int size) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
        int mate = i ^ j;
        if (mate > i) exchange(data[i], data[mate], (i & k) == 0);
    }
}

// 32 values in a warp's registers.
extern "C" __global__ void bitonic_warp(const float* in, float* out, int n) {
    int lane = threadIdx.x & 31, i = blockIdx.x * blockDim.x + threadIdx.x;
    float x = i < n ? in[i] : __int_as_float(0x7f800000);
    #pragma unroll
    for (int k = 2; k <= 32; k <<= 1)
        #pragma unroll
        for (int j = k >> 1; j > 0; j >>= 1) {
            float y = __shfl_xor_sync(~0u, x, j);
            bool keep_least = ((lane & k) == 0) == ((lane & j) == 0);
            x = keep_least ? fminf(x, y) : fmaxf(x, y);
        }
    if (i < n) out[i] = x;
}

// Radix sort, 4 bits a pass: counts, then (after a scan of counts[digit][block]) scatter.
extern "C" __global__ void radix_count(const u32* keys, u32* counts, int n, int shift) {
    __shared__ u32 mine[16];
    if (threadIdx.x < 16) mine[threadIdx.x] = 0;
    __syncthreads();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicAdd(&mine[keys[i] >> shift & 15], 1u);
    __syncthreads();
    if (threadIdx.x < 16) counts[threadIdx.x * gridDim.x + blockIdx.x] = mine[threadIdx.x];
}
extern "C" __global__ void scan_one_thread(u32* x, int n) {
    u32 sum = 0;
    for (int i = 0; i < n; ++i) { u32 v = x[i]; x[i] = sum; sum += v; }
}
// Lanes with the same digit: by four ballots, or by match.any.
__device__ u32 same_by_ballots(u32 digit) {
    u32 same = ~0u;
    for (int b = 0; b < 4; ++b) {
        bool bit = digit >> b & 1;
        u32 votes = __ballot_sync(~0u, bit);
        same &= bit ? votes : ~votes;
    }
    return same;
}
template <bool MATCH>
__device__ void scatter(const u32* keys, const u32* values, u32* keys_out, u32* values_out,
                        const u32* starts, int n, int shift) {
    __shared__ u32 count[8][17], before[8][16];  // by warp, by digit; 16: nobody's
    int t = threadIdx.x, lane = t & 31, warp = t >> 5, i = blockIdx.x * blockDim.x + t;
    for (int j = t; j < 8 * 17; j += blockDim.x) ((u32*)count)[j] = 0;
    __syncthreads();
    u32 key = i < n ? keys[i] : 0;
    u32 digit = i < n ? key >> shift & 15 : 16;
    u32 same;
    if (MATCH) {
        same = __match_any_sync(~0u, digit);
    } else {
        u32 good = __ballot_sync(~0u, i < n);
        same = same_by_ballots(digit & 15) & (i < n ? good : ~good);
    }
    u32 rank = __popc(same & ((1u << lane) - 1));
    if (rank == 0) count[warp][digit] = __popc(same);
    __syncthreads();
    if (t < 16) {
        u32 sum = 0;
        for (int w = 0; w < blockDim.x / 32; ++w) { before[w][t] = sum; sum += count[w][t]; }
    }
    __syncthreads();
    if (i < n) {
        u32 at = starts[digit * gridDim.x + blockIdx.x] + before[warp][digit] + rank;
        keys_out[at] = key;
        values_out[at] = values[i];
    }
}
extern "C" __global__ void radix_ballots(const u32* k, const u32* v, u32* ko, u32* vo, const u32* starts, int n, int shift) {
    scatter<false>(k, v, ko, vo, starts, n, shift);
}
extern "C" __global__ void radix_match(const u32* k, const u32* v, u32* ko, u32* vo, const u32* starts, int n, int shift) {
    scatter<true>(k, v, ko, vo, starts, n, shift);
}

// Odd-even transposition of bytes in shared memory; ends when nothing moved.
extern "C" __global__ void odd_even(unsigned char* data, int* rounds, int n) {
    __shared__ unsigned char s[256];
    int t = threadIdx.x;
    if (t < n) s[t] = data[t];
    int r = 0;
    bool moved;
    do {
        moved = false;
        for (int odd = 0; odd < 2; ++odd) {
            __syncthreads();
            if (t + 1 < n && (t & 1) == odd && s[t] > s[t + 1]) {
                unsigned char x = s[t]; s[t] = s[t + 1]; s[t + 1] = x;
                moved = true;
            }
        }
        ++r;
    } while (__syncthreads_or(moved));
    if (t < n) data[t] = s[t];
    if (t == 0) *rounds = r;
}

// Merge two sorted arrays: each thread finds its part along the merge path, then merges it.
extern "C" __global__ void merge_path(const int* a, int na, const int* b, int nb, int* out, int each) {
    int d = (blockIdx.x * blockDim.x + threadIdx.x) * each;
    if (d >= na + nb) return;
    int low = max(0, d - nb), high = min(d, na);
    while (low < high) {
        int mid = (low + high) / 2;
        if (a[mid] <= b[d - 1 - mid]) low = mid + 1; else high = mid;
    }
    int i = low, j = d - low;
    for (int k = d; k < min(d + each, na + nb); ++k)
        out[k] = j >= nb || (i < na && a[i] <= b[j]) ? a[i++] : b[j++];
}

// Merge sort of one block's rows with a comparator, two buffers.
struct Pair { int key, payload; };
struct ByKeyThenPayloadDown {
    __device__ bool operator()(const Pair& a, const Pair& b) const {
        return a.key != b.key ? a.key < b.key : a.payload > b.payload;
    }
};
template <class Less> __device__ void merge_sort(Pair* data, int n, Less less) {
    __shared__ Pair buffer[2][256];
    int t = threadIdx.x, from = 0;
    for (int i = t; i < n; i += blockDim.x) buffer[0][i] = data[i];
    for (int width = 1; width < n; width *= 2, from ^= 1) {
        __syncthreads();
        // Each element finds its rank by searching the other half.
        for (int i = t; i < n; i += blockDim.x) {
            Pair x = buffer[from][i];
            int start = i / (2 * width) * 2 * width, mid = min(start + width, n);
            bool left = i < mid;
            int lo = left ? mid : start, first = lo, hi = left ? min(start + 2 * width, n) : mid;
            while (lo < hi) {
                int m = (lo + hi) >> 1;
                Pair y = buffer[from][m];
                if (left ? less(y, x) : !less(x, y)) lo = m + 1; else hi = m;
            }
            int rank = (left ? i - start : i - mid) + lo - first;
            buffer[from ^ 1][start + rank] = x;
        }
    }
    __syncthreads();
    for (int i = t; i < n; i += blockDim.x) data[i] = buffer[from][i];
}
extern "C" __global__ void merge_pairs(Pair* data, int n) { merge_sort(data, n, ByKeyThenPayloadDown()); }

// The k largest of each row: a warp a row, k rounds of a maximum over keys with their places.
extern "C" __global__ void top_k(const float* x, float* values, int* places, int columns, int k) {
    int lane = threadIdx.x & 31, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    x += row * columns;
    float bound = __int_as_float(0x7f800000);
    int after = -1;
    for (int r = 0; r < k; ++r) {
        float best = __int_as_float(0xff800000);
        int at = columns;
        for (int i = lane; i < columns; i += 32) {
            float v = x[i];
            bool open = v < bound || (v == bound && i > after);
            if (open && v > best) { best = v; at = i; }
        }
        for (int d = 16; d; d >>= 1) {
            float b = __shfl_down_sync(~0u, best, d);
            int p = __shfl_down_sync(~0u, at, d);
            if (b > best || (b == best && p < at)) { best = b; at = p; }
        }
        bound = __shfl_sync(~0u, best, 0);
        after = __shfl_sync(~0u, at, 0);
        if (lane == 0) { values[row * k + r] = bound; places[row * k + r] = after; }
    }
}
