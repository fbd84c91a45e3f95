// Arithmetic: integers of all widths, bits, doubles, halves, number theory, hashes.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

template <class T> __device__ void divide(const T* a, const T* b, T* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = a[i] / b[i];
    out[n + i] = a[i] % b[i];
    out[2 * n + i] = a[i] * b[i];
    out[3 * n + i] = a[i] / T(7) + a[i] % T(10);
}
#define DIVIDE(name, T) extern "C" __global__ void divide_##name(const T* a, const T* b, T* o, int n) { divide(a, b, o, n); }
DIVIDE(i8, signed char) DIVIDE(u8, u8) DIVIDE(i16, short) DIVIDE(u16, u16)
DIVIDE(i32, int) DIVIDE(u32, u32) DIVIDE(i64, long long) DIVIDE(u64, u64)

extern "C" __global__ void wide(const u64* a, const u64* b, u64* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u64 x = a[i], y = b[i];
    out[i] = __umul64hi(x, y);
    out[n + i] = (u64)__mul64hi((long long)x, (long long)y);
    out[2 * n + i] = (u64)(u32)x * (u32)y;
    out[3 * n + i] = (u64)((long long)(int)x * (int)y);
    out[4 * n + i] = (u64)__umulhi((u32)x, (u32)y) << 32 | (u32)__mulhi((int)x, (int)y);
    out[5 * n + i] = x << (y & 63) | x >> (-y & 63);
    out[6 * n + i] = (u64)((long long)x >> (y & 63));
    unsigned __int128 p = (unsigned __int128)x * y + (x ^ y);
    out[7 * n + i] = (u64)(p >> 64) ^ (u64)p;
    out[8 * n + i] = __mul24((int)x, (int)y) + ((u64)__umul24((u32)x, (u32)y) << 32);
    out[9 * n + i] = (u64)__usad((u32)x, (u32)y, 7u) << 32 | (u32)__sad((int)x, (int)y, 9u);
}

extern "C" __global__ void bits(const u32* a, const u32* b, const u32* c, u32* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u32 x = a[i], y = b[i], z = c[i];
    u32* o = out + i * 22;
    o[0] = __popc(x); o[1] = __clz(x); o[2] = __ffs(x); o[3] = __brev(x);
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(o[4]) : "r"(x), "r"(y), "r"(z));
    o[5] = __funnelshift_l(x, y, z); o[6] = __funnelshift_r(x, y, z);
    o[7] = __funnelshift_lc(x, y, z); o[8] = __funnelshift_rc(x, y, z);
    o[9] = __dp4a(x, y, z); o[10] = __dp4a((int)x, (int)y, (int)z);
    o[11] = __dp2a_lo((int)x, (int)y, (int)z); o[12] = __dp2a_hi(x, y, z);
    o[13] = __hadd((int)x, (int)y); o[14] = __rhadd((int)x, (int)y); o[15] = __uhadd(x, y);
    o[16] = (x & y) | (~x & z); o[17] = x ^ y ^ z;  // lop3
    o[18] = __byte_perm(x, y, z);
    asm("bfe.u32 %0, %1, %2, %3;" : "=r"(o[19]) : "r"(x), "r"(y & 31), "r"(z & 31));
    asm("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(o[20]) : "r"(x), "r"(y), "r"(z & 31), "r"(y >> 27));
    u32 t = x;
    t |= t >> 1; t |= t >> 2; t |= t >> 4; t |= t >> 8; t |= t >> 16;
    o[21] = t + 1;
}
extern "C" __global__ void bits64(const u64* a, u64* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u64 x = a[i];
    out[4 * i] = __popcll(x); out[4 * i + 1] = __clzll(x); out[4 * i + 2] = __ffsll(x); out[4 * i + 3] = __brevll(x);
}
extern "C" __global__ void simd_in_word(const u32* a, const u32* b, u32* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u32 x = a[i], y = b[i];
    u32* o = out + i * 8;
    o[0] = __vadd4(x, y); o[1] = __vsubus4(x, y); o[2] = __vmaxs2(x, y); o[3] = __vabsdiffu4(x, y);
    o[4] = __vcmpgtu4(x, y); o[5] = __vavgu4(x, y); o[6] = __vsads2(x, y); o[7] = __vaddss2(x, y);
}

// 256-bit numbers by carry chains: a * b mod 2^256, a + b with its carry, Montgomery products.
extern "C" __global__ void big(const u32* a, const u32* b, u32* sum, u32* product, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u32 x[8], y[8], r[9], p[8] = {};
    for (int k = 0; k < 8; ++k) { x[k] = a[i * 8 + k]; y[k] = b[i * 8 + k]; }
    asm("add.cc.u32 %0, %1, %2;" : "=r"(r[0]) : "r"(x[0]), "r"(y[0]));
    #pragma unroll
    for (int k = 1; k < 8; ++k) asm volatile("addc.cc.u32 %0, %1, %2;" : "=r"(r[k]) : "r"(x[k]), "r"(y[k]));
    asm volatile("addc.u32 %0, 0, 0;" : "=r"(r[8]));
    for (int k = 0; k < 9; ++k) sum[i * 9 + k] = r[k];
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
        // Low halves of x[j] * y, then high halves, each with a chain of carries.
        asm volatile("mad.lo.cc.u32 %0, %1, %2, %0;" : "+r"(p[j]) : "r"(x[j]), "r"(y[0]));
        #pragma unroll
        for (int k = 1; j + k < 8; ++k)
            asm volatile("madc.lo.cc.u32 %0, %1, %2, %0;" : "+r"(p[j + k]) : "r"(x[j]), "r"(y[k]));
        if (j == 7) break;
        asm volatile("mad.hi.cc.u32 %0, %1, %2, %0;" : "+r"(p[j + 1]) : "r"(x[j]), "r"(y[0]));
        #pragma unroll
        for (int k = 1; j + k < 7; ++k)
            asm volatile("madc.hi.cc.u32 %0, %1, %2, %0;" : "+r"(p[j + k + 1]) : "r"(x[j]), "r"(y[k]));
    }
    for (int k = 0; k < 8; ++k) product[i * 8 + k] = p[k];
}
__device__ u64 montgomery(u64 a, u64 b, u64 m, u64 inverse) {
    u64 low = a * b, high = __umul64hi(a, b), q = low * inverse, h = __umul64hi(q, m);
    u64 r = high - h;
    return high < h ? r + m : r;
}
extern "C" __global__ void power_mod(const u64* bases, const u64* exponents, u64* out, u64 m, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u64 inverse = m;  // Newton: m * inverse = 1 mod 2^64
    for (int k = 0; k < 5; ++k) inverse *= 2 - m * inverse;
    u64 one = (0 - m) % m, square = one;
    for (int k = 0; k < 64; ++k) { u64 t = m - square; square = square >= t ? square - t : square + square; }
    u64 x = montgomery(bases[i] % m, square, m, inverse), r = one;
    for (u64 e = exponents[i]; e; e >>= 1) {
        if (e & 1) r = montgomery(r, x, m, inverse);
        x = montgomery(x, x, m, inverse);
    }
    out[i] = montgomery(r, 1, m, inverse);
}
extern "C" __global__ void gcd_and_primes(const u32* a, const u32* b, u32* gcd, u8* prime, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u32 x = a[i], y = b[i];
    while (y) { u32 t = x % y; x = y; y = t; }
    gcd[i] = x;
    u32 p = a[i] & 0xffff;
    bool is = p > 1;
    for (u32 d = 2; d * d <= p; ++d) if (p % d == 0) { is = false; break; }
    prime[i] = is;
}

// A SHA-256 of one block for each thread, a CRC by a table in shared memory, Philox.
__constant__ u32 K[64] = {
    0x428a2f98,0x71374491,0xb5c0fbcf,0xe9b5dba5,0x3956c25b,0x59f111f1,0x923f82a4,0xab1c5ed5,0xd807aa98,0x12835b01,
    0x243185be,0x550c7dc3,0x72be5d74,0x80deb1fe,0x9bdc06a7,0xc19bf174,0xe49b69c1,0xefbe4786,0x0fc19dc6,0x240ca1cc,
    0x2de92c6f,0x4a7484aa,0x5cb0a9dc,0x76f988da,0x983e5152,0xa831c66d,0xb00327c8,0xbf597fc7,0xc6e00bf3,0xd5a79147,
    0x06ca6351,0x14292967,0x27b70a85,0x2e1b2138,0x4d2c6dfc,0x53380d13,0x650a7354,0x766a0abb,0x81c2c92e,0x92722c85,
    0xa2bfe8a1,0xa81a664b,0xc24b8b70,0xc76c51a3,0xd192e819,0xd6990624,0xf40e3585,0x106aa070,0x19a4c116,0x1e376c08,
    0x2748774c,0x34b0bcb5,0x391c0cb3,0x4ed8aa4a,0x5b9cca4f,0x682e6ff3,0x748f82ee,0x78a5636f,0x84c87814,0x8cc70208,
    0x90befffa,0xa4506ceb,0xbef9a3f7,0xc67178f2};
#define ROT(x, n) __funnelshift_r(x, x, n)
extern "C" __global__ void sha256(const u8* messages, const int* lengths, u8* digests, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u8 block[64];
    int length = lengths[i];
    for (int k = 0; k < 64; ++k) block[k] = k < length ? messages[i * 56 + k] : k == length ? 0x80 : 0;
    block[62] = length * 8 >> 8;
    block[63] = length * 8;
    u32 w[64], h[8] = {0x6a09e667,0xbb67ae85,0x3c6ef372,0xa54ff53a,0x510e527f,0x9b05688c,0x1f83d9ab,0x5be0cd19};
    for (int k = 0; k < 16; ++k) w[k] = __byte_perm(*(u32*)(block + 4 * k), 0, 0x0123);
    for (int k = 16; k < 64; ++k) {
        u32 s0 = ROT(w[k-15], 7) ^ ROT(w[k-15], 18) ^ w[k-15] >> 3, s1 = ROT(w[k-2], 17) ^ ROT(w[k-2], 19) ^ w[k-2] >> 10;
        w[k] = w[k-16] + s0 + w[k-7] + s1;
    }
    u32 a = h[0], b = h[1], c = h[2], d = h[3], e = h[4], f = h[5], g = h[6], l = h[7];
    for (int k = 0; k < 64; ++k) {
        u32 t1 = l + (ROT(e, 6) ^ ROT(e, 11) ^ ROT(e, 25)) + ((e & f) ^ (~e & g)) + K[k] + w[k];
        u32 t2 = (ROT(a, 2) ^ ROT(a, 13) ^ ROT(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        l = g; g = f; f = e; e = d + t1; d = c; c = b; b = a; a = t1 + t2;
    }
    u32 out[8] = {h[0]+a, h[1]+b, h[2]+c, h[3]+d, h[4]+e, h[5]+f, h[6]+g, h[7]+l};
    for (int k = 0; k < 8; ++k) ((u32*)digests)[i * 8 + k] = __byte_perm(out[k], 0, 0x0123);
}
extern "C" __global__ void crc32(const u8* data, const int* ends, u32* out, int n) {
    __shared__ u32 table[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) {
        u32 c = i;
        for (int k = 0; k < 8; ++k) c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
        table[i] = c;
    }
    __syncthreads();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u32 c = ~0u;
    for (int at = i ? ends[i - 1] : 0; at < ends[i]; ++at) c = table[(c ^ data[at]) & 255] ^ c >> 8;
    out[i] = ~c;
}
extern "C" __global__ void philox(uint4* out, uint2 key, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    uint4 c = make_uint4(i, 0, i * 3u, 7);
    for (int r = 0; r < 10; ++r) {
        u32 h0 = __umulhi(0xD2511F53u, c.x), l0 = 0xD2511F53u * c.x;
        u32 h1 = __umulhi(0xCD9E8D57u, c.z), l1 = 0xCD9E8D57u * c.z;
        c = make_uint4(h1 ^ c.y ^ key.x, l1, h0 ^ c.w ^ key.y, l0);
        key.x += 0x9E3779B9u; key.y += 0xBB67AE85u;
    }
    out[i] = c;
}

// Conversions that saturate and round as C++ says or as the intrinsics' names say.
extern "C" __global__ void convert(const float* x, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int* o = out + i * 12;
    o[0] = (int)x[i]; o[1] = __float2int_rn(x[i]); o[2] = __float2int_ru(x[i]); o[3] = __float2int_rd(x[i]);
    o[4] = (int)(u32)__float2uint_rz(x[i]); o[5] = (int)(__float2ll_rn(x[i]) >> 16);
    o[6] = __float_as_int(rintf(x[i])); o[7] = __float_as_int(floorf(x[i])); o[8] = __float_as_int(ceilf(x[i]));
    o[9] = __float_as_int(truncf(x[i])); o[10] = __float_as_int(roundf(x[i]));
    o[11] = __float_as_int((float)(double)x[i] * 0.1f + (float)(int)(short)(int)x[i]);
}

// Templates, lambdas, classes, structs by value.
template <int N, class F> __device__ __forceinline__ void repeat(F f) {
    if constexpr (N > 0) { repeat<N - 1>(f); f(N - 1); }
}
template <class T, int N> class Vector {
    T data[N];
public:
    __device__ Vector(T x) { for (T& d : data) d = x; }
    __device__ T& operator[](int i) { return data[i]; }
    __device__ Vector operator+(const Vector& o) const {
        Vector r(0);
        for (int i = 0; i < N; ++i) r.data[i] = data[i] + o.data[i];
        return r;
    }
    template <class F> __device__ T fold(T start, F f) const {
        for (const T& d : data) start = f(start, d);
        return start;
    }
};
struct Affine { int scale, shift; double unused; short more[3]; };
struct Job { Affine first, second; const int* in; int* out; int n; char kind; };
template <class... Fs> __device__ int chain(int x, Fs... fs) { ((x = fs(x)), ...); return x; }
extern "C" __global__ void objects(const Job job) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= job.n) return;
    auto apply = [](const Affine& a) { return [&a](int x) { return a.scale * x + a.shift; }; };
    int x = chain(job.in[i], apply(job.first), [](int v) { return v ^ 5; }, apply(job.second));
    Vector<int, 5> v(x), w(job.first.more[i % 3]);
    repeat<5>([&](int k) { v[k] += k * k; });
    int y = (v + w).fold(1, [](int a, int b) { return a * 31 + b; });
    const Affine& chosen = job.kind == 'b' ? job.second : job.first;
    job.out[i] = y + chosen.shift;
}
// A bytecode interpreter: a switch in a loop, a stack in local memory.
extern "C" __global__ void interpreter(const u8* code, const int* inputs, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int stack[16], sp = 0, pc = 0;
    stack[sp++] = inputs[i];
    for (int fuel = 0; fuel < 200; ++fuel) {
        switch (code[pc++]) {
        case 0: stack[sp] = code[pc++]; ++sp; break;
        case 1: --sp; stack[sp - 1] += stack[sp]; break;
        case 2: --sp; stack[sp - 1] -= stack[sp]; break;
        case 3: --sp; stack[sp - 1] *= stack[sp]; break;
        case 4: stack[sp] = stack[sp - 1]; ++sp; break;
        case 5: { int t = stack[sp - 1]; stack[sp - 1] = stack[sp - 2]; stack[sp - 2] = t; break; }
        case 6: if (stack[--sp] > 0) pc = code[pc]; else ++pc; break;
        case 7: --sp; stack[sp - 1] = stack[sp - 1] % (stack[sp] | 1); break;
        case 8: --sp; break;
        case 9: out[i] = stack[sp - 1]; return;
        default: out[i] = -99; return;
        }
    }
    out[i] = -1000;
}
// Walks of a binary search tree, without recursion: in order with a stack; how deep keys are.
struct Branch { int key, left, right; };
extern "C" __global__ void tree(const Branch* nodes, const int2* ranges, int* sums, int* deepest, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int stack[24], sp = 0, sum = 0, most = 0;
    stack[sp++] = 0;
    while (sp) {
        Branch b = nodes[stack[--sp]];
        if (b.key >= ranges[i].x && b.key < ranges[i].y) sum += b.key;
        if (b.left >= 0 && b.key > ranges[i].x) stack[sp++] = b.left;
        if (b.right >= 0 && b.key < ranges[i].y) stack[sp++] = b.right;
        most = max(most, sp);
    }
    sums[i] = sum;
    deepest[i] = most;
}
// All ways to place queens, by backtracking; a thread for each pair of first columns.
extern "C" __global__ void queens(int n, int* count) {
    int a = threadIdx.x, b = threadIdx.y;
    if (abs(a - b) < 2) return;
    u32 columns[12], left[12], right[12], open[12], all = (1u << n) - 1;
    int row = 2, found = 0;
    columns[2] = 1u << a | 1u << b;
    left[2] = (1u << a << 1 | 1u << b) << 1;
    right[2] = (1u << a >> 1 | 1u << b) >> 1;
    open[2] = all & ~(columns[2] | left[2] | right[2]);
    while (row >= 2) {
        if (!open[row]) { --row; continue; }
        u32 bit = open[row] & -open[row];
        open[row] ^= bit;
        if (row == n - 1) { ++found; continue; }
        columns[row + 1] = columns[row] | bit;
        left[row + 1] = (left[row] | bit) << 1;
        right[row + 1] = (right[row] | bit) >> 1;
        ++row;
        open[row] = all & ~(columns[row] | left[row] | right[row]);
    }
    atomicAdd(count, found);
}
// Edit distance of two texts by anti-diagonals, three in shared memory.
extern "C" __global__ void edit_distance(const char* a, int na, const char* b, int nb, int* out) {
    __shared__ int d[3][130];
    int t = threadIdx.x;
    for (int s = 0; s <= na + nb; ++s) {
        int* now = d[s % 3];
        const int *last = d[(s + 2) % 3], *before = d[(s + 1) % 3];
        for (int i = max(0, s - nb) + t; i <= min(s, na); i += blockDim.x) {
            int j = s - i;
            now[i] = i == 0 ? j : j == 0 ? i
                : min(min(last[i - 1], last[i]) + 1, before[i - 1] + (a[i - 1] != b[j - 1]));
        }
        __syncthreads();
    }
    if (t == 0) *out = d[(na + nb) % 3][na];
}
