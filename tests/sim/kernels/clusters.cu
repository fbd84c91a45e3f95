// Clusters of blocks: ranks, distributed shared memory, the cluster's barrier.
// Addresses of shared memory are 32-bit numbers of the space shared::cluster.
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u32 rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ u32 ranks() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ u32 map(u32 at, u32 to) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(at), "r"(to));
    return r;
}
__device__ __forceinline__ void arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ u32 load(u32 at) {
    u32 v;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");  // LOAD
    return v;
}
__device__ __forceinline__ void store(u32 at, u32 v) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(at), "r"(v) : "memory");
}

// out[block][...]: what the special registers and the address instructions say.
extern "C" __global__ void names(u32* out) {
    __shared__ u32 x[4];
    extern __shared__ u32 dynamic[];
    u32* to = out + 32 * (blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    if (threadIdx.x) return;
    u32 v[20];
#define REGISTER(i, name) asm volatile("mov.u32 %0, " name ";" : "=r"(v[i]))
    REGISTER(0, "%%cluster_ctarank");
    REGISTER(1, "%%cluster_nctarank");
    REGISTER(2, "%%cluster_ctaid.x");
    REGISTER(3, "%%cluster_ctaid.y");
    REGISTER(4, "%%cluster_ctaid.z");
    REGISTER(5, "%%cluster_nctaid.x");
    REGISTER(6, "%%cluster_nctaid.y");
    REGISTER(7, "%%cluster_nctaid.z");
    REGISTER(8, "%%clusterid.x");
    REGISTER(9, "%%clusterid.y");
    REGISTER(10, "%%clusterid.z");
    REGISTER(11, "%%nclusterid.x");
    REGISTER(12, "%%nclusterid.y");
    REGISTER(13, "%%nclusterid.z");
    asm volatile("{ .reg .pred p; mov.pred p, %%is_explicit_cluster; selp.u32 %0, 1, 0, p; }"
                 : "=r"(v[14]));
    v[15] = address(x);
    v[16] = address(dynamic);
    v[17] = map(address(x), ranks() - 1);
    u64 generic;
    asm("mapa.u64 %0, %1, %2;" : "=l"(generic) : "l"((u64)x), "r"(ranks() - 1));
    v[18] = (u32)(generic - (u64)x);
    asm("getctarank.shared::cluster.u32 %0, %1;" : "=r"(v[19]) : "r"(v[17]));
    for (int i = 0; i < 20; ++i) to[i] = v[i];
    // Whose a generic address is.
    u32 own, cluster, far;
    asm("{ .reg .pred p; isspacep.shared::cta p, %1; selp.u32 %0, 1, 0, p; }" : "=r"(own) : "l"((u64)x));
    asm("{ .reg .pred p; isspacep.shared::cta p, %1; selp.u32 %0, 1, 0, p; }"
        : "=r"(far) : "l"(generic));
    asm("{ .reg .pred p; isspacep.shared::cluster p, %1; selp.u32 %0, 1, 0, p; }"
        : "=r"(cluster) : "l"(generic));
    u32 named;
    asm("getctarank.u64 %0, %1;" : "=r"(named) : "l"(generic));
    to[20] = own; to[21] = far; to[22] = cluster; to[23] = named;
}

// Each block writes its numbers, and sums those of all blocks of its cluster.
// HOW: 0 mapa and ld.shared::cluster, 1 a generic pointer, 2 arithmetic on the address.
extern "C" __global__ void sums(const u32* in, u32* out) {
    __shared__ u32 x[64];
    u32 t = threadIdx.x;
    u32 block = blockIdx.x;
    x[t] = in[block * 64 + t];
#ifndef NO_BARRIER
    arrive();                                              // BARRIER
    wait();
#endif
    u32 sum = 0;
    for (u32 r = 0; r < ranks(); ++r) {
        u32 at = address(x + (t + r) % 64);
#if HOW == 0
        sum += load(map(at, r));
#elif HOW == 1
        u64 p;
        asm("mapa.u64 %0, %1, %2;" : "=l"(p) : "l"((u64)(x + (t + r) % 64)), "r"(r));
        sum += *(volatile u32*)p;
#else
        sum += load((at & 0xFFFFFF) | r << 24);
#endif
    }
#ifndef NO_LAST_BARRIER
    arrive();
    wait();
#endif
    out[block * 64 + t] = sum;
}

// All blocks of a cluster count in the memory of the first; a ring of blocks hands on a value.
extern "C" __global__ void atomics(u32* out) {
    __shared__ u32 count;
    __shared__ u32 slot;
    if (threadIdx.x == 0) { count = 0; slot = 0; }
    arrive();
    wait();
    u32 at = map(address(&count), 0), old;
    asm volatile("atom.shared::cluster.add.u32 %0, [%1], %2;"
                 : "=r"(old) : "r"(at), "r"(1u) : "memory");
    if (threadIdx.x == 0) store(map(address(&slot), (rank() + 1) % ranks()), 100 + rank());
    arrive();
    wait();
    if (threadIdx.x == 0) {
        out[2 * blockIdx.x] = count;
        out[2 * blockIdx.x + 1] = slot;
    }
}

// Blocks of odd rank return after they arrived; the others wait. With LATE those read their memory.
extern "C" __global__ void returns(u32* out) {
    __shared__ u32 x[32];
    x[threadIdx.x] = rank() * 100 + threadIdx.x;
    arrive();
    if (rank() & 1) asm volatile("exit;");
    wait();
#ifdef LATE
    out[blockIdx.x * 32 + threadIdx.x] = load(map(address(x + threadIdx.x), rank() + 1));
#else
    out[blockIdx.x * 32 + threadIdx.x] = x[threadIdx.x];
#endif
}

// What must not be: BUG says which.
extern "C" __global__ void wrong(u32* out) {
    __shared__ u32 x[32];
    x[threadIdx.x] = 7;
    arrive();
    wait();
    u32 at = address(x + threadIdx.x);
#if BUG == 1
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(at) : "r"(map(at, rank() ^ 1)) : "memory");
#elif BUG == 2
    at = load((at & 0xFFFFFF) | ranks() << 24);
#elif BUG == 3
    at = load(map(at, rank() ^ 1) + 128);
#elif BUG == 4
    at = load(map(at, ranks()));
#elif BUG == 5
    arrive();
    arrive();
#elif BUG == 6
    wait();
#elif BUG == 7
    if (rank() == 0) { arrive(); wait(); }
    asm volatile("bar.sync 1, 64;");
#elif BUG == 9
    at = load(map(at, 256));
#elif BUG == 10
    u64 there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"((u64)x), "r"(rank() ^ 1));
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                 : "=r"(at) : "l"(there & ~7ull) : "memory");
#elif BUG == 11
    arrive();
    if (threadIdx.x & 1) asm volatile("barrier.cluster.wait.acquire.aligned; // odd" ::: "memory");
    else asm volatile("barrier.cluster.wait.acquire.aligned; // even" ::: "memory");
#elif BUG == 8
    at = load((at & 0xFFFFFF) - 0x400 | (rank() ^ 1) << 24);
#endif
    out[threadIdx.x] = at;
    arrive();
    wait();
}

// A relaxed arrival tells what fences cover. FENCE: 0 none, 1 of mbarrier.init, 2 of all.
#ifndef FENCE
#define FENCE 0
#endif
extern "C" __global__ void relaxed(u32* out) {
    __shared__ u32 x[32];
    __shared__ u64 full;
    u32 t = threadIdx.x;
    if (t == 0) asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(address(&full)) : "memory");
#if FENCE == 1
    if (t == 0) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#elif FENCE == 2
    x[t] = 100 * rank() + t;
    asm volatile("fence.acq_rel.cluster;" ::: "memory");
#endif
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (t == 0)
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];"  // ARRIVE
                     :: "r"(map(address(&full), rank() ^ 1)) : "memory");
    asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.acquire.cluster.shared.b64 p, [%0], "
                 "0; @!p bra again; }" :: "r"(address(&full)) : "memory");
#if FENCE == 2
    out[blockIdx.x * 32 + t] = load(map(address(x + t), rank() ^ 1));
    arrive();
    wait();
#else
    out[blockIdx.x * 32 + t] = t;
#endif
}
