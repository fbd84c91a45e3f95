// Locks, queues, barriers and tables built from atomics.
typedef unsigned int u32;
typedef unsigned long long u64;

// One lock, taken by thread 0 of every block.
extern "C" __global__ void lock_by_block(int* data, int* mutex, int rounds) {
    for (int r = 0; r < rounds; ++r) {
        if (threadIdx.x == 0)
            while (atomicCAS(mutex, 0, 1) != 0) __nanosleep(100);
        __syncthreads();
        if (threadIdx.x == 0) __threadfence();
        __syncthreads();
        data[threadIdx.x] = data[threadIdx.x] * 3 + 1;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) atomicExch(mutex, 0);
    }
}
// Test and test-and-set, by every thread, with the volatile read that spares the bus.
struct Lock {
    int* word;
    __device__ bool try_take() {
        if (*(volatile int*)word != 0) return false;
        if (atomicCAS(word, 0, 1) != 0) return false;
        __threadfence();
        return true;
    }
    __device__ void give() { __threadfence(); *(volatile int*)word = 0; }
};
extern "C" __global__ void lock_by_thread(int* data, int* mutex) {
    Lock lock = {mutex};
    for (bool done = false; !done;)
        if (lock.try_take()) {
            data[1] += data[0]++;
            lock.give();
            done = true;
        }
}
// acquire and release instructions.
extern "C" __global__ void lock_acquire(int* data, int* mutex) {
    for (int lane = 0; lane < 32; ++lane) {
        if (lane != threadIdx.x % 32) continue;
        int old;
        do asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], 0, 1;" : "=r"(old) : "l"(mutex) : "memory");
        while (old);
        data[1] += data[0]++;
        asm volatile("st.release.gpu.global.b32 [%0], 0;" :: "l"(mutex) : "memory");
    }
}
// Tickets: first come, first served.
extern "C" __global__ void lock_ticket(int* data, int* next, int* serving) {
    if (threadIdx.x == 0) {
        int mine = atomicAdd(next, 1);
        while (*(volatile int*)serving != mine) {}
        __threadfence();
        data[0] = data[0] * 5 + mine;
        __threadfence();
        atomicAdd(serving, 1);
    }
}
// A lock for every bin, in shared memory.
extern "C" __global__ void lock_shared(const int* in, int* out, int n) {
    __shared__ int mutex[8], sums[8], counts[8];
    int t = threadIdx.x;
    if (t < 8) mutex[t] = sums[t] = counts[t] = 0;
    __syncthreads();
    for (int i = t; i < n; i += blockDim.x) {
        int bin = in[i] & 7;
        bool waiting = true;
        while (waiting) {
            if (atomicExch(&mutex[bin], 1) == 0) {
                __threadfence_block();
                sums[bin] += in[i];
                counts[bin] += 1;
                __threadfence_block();
                atomicExch(&mutex[bin], 0);
                waiting = false;
            }
        }
    }
    __syncthreads();
    if (t < 8) { out[t] = sums[t]; out[8 + t] = counts[t]; }
}

// Blocks take items until there are none; an item costs as it likes.
extern "C" __global__ void work_queue(const int* costs, u64* results, int* next, int* taken, int n) {
    __shared__ int item;
    for (;;) {
        if (threadIdx.x == 0) item = atomicAdd(next, 1);
        __syncthreads();
        int i = item;
        if (i >= n) return;
        u64 x = i * 1000 + threadIdx.x;
        for (int k = 0; k < costs[i]; ++k) x = x * 6364136223846793005ull + 1442695040888963407ull;
        results[i * blockDim.x + threadIdx.x] = x;
        if (threadIdx.x == 0) atomicAdd(taken + blockIdx.x, 1);
        __syncthreads();  // nobody takes the next item before all have read this one
    }
}
// Tasks that make tasks: a warp pops an interval, splits it or counts it. Ends when none is open.
extern "C" __global__ void growing_queue(volatile int2* tasks, volatile int* ready, int* head, int* tail,
                                         int* open, int* sum) {
    int lane = threadIdx.x & 31;
    for (;;) {
        int slot = -1;
        if (lane == 0) {
            int h = *(volatile int*)head;
            while (h < *(volatile int*)tail) {
                int seen = atomicCAS(head, h, h + 1);
                if (seen == h) { slot = h; break; }
                h = seen;
            }
        }
        slot = __shfl_sync(~0u, slot, 0);
        if (slot < 0) {
            int left = 0;
            if (lane == 0) left = atomicAdd(open, 0);
            if (__shfl_sync(~0u, left, 0) == 0) return;
            continue;
        }
        if (lane == 0) {
            while (ready[slot] == 0) {}
            __threadfence();
            int a = tasks[slot].x, b = tasks[slot].y;
            if (b - a > 3) {
                int mid = (a + b) / 2;
                atomicAdd(open, 2);
                for (int half = 0; half < 2; ++half) {
                    int at = atomicAdd(tail, 1);
                    tasks[at].x = half ? mid : a;
                    tasks[at].y = half ? b : mid;
                    __threadfence();
                    ready[at] = 1;
                }
            } else {
                for (int i = a; i < b; ++i) atomicAdd(sum, i * i);
            }
            __threadfence();
            atomicSub(open, 1);
        }
        __syncwarp();
    }
}

// A barrier of the whole grid: a counter, and a generation that the last one turns.
__device__ void grid_barrier(u32* count, volatile u32* generation) {
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 mine = *generation;
        __threadfence();
        if (atomicAdd(count, 1) == gridDim.x - 1) {
            *count = 0;
            __threadfence();
            *generation = mine + 1;
        } else {
            while (*generation == mine) {}
        }
        __threadfence();
    }
    __syncthreads();
}
extern "C" __global__ void jacobi(float* a, float* b, u32* count, u32* generation, int n, int rounds) {
    for (int r = 0; r < rounds; ++r) {
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
            float left = i ? a[i - 1] : 0.f, right = i + 1 < n ? a[i + 1] : 0.f;
            b[i] = 0.5f * (left + right);
        }
        grid_barrier(count, generation);
        float* t = a; a = b; b = t;
    }
}
// As cooperative groups do it: block 0 adds so much that the top bit flips when all have come.
__device__ void flip_barrier(u32* word) {
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 add = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u, old, now;
        asm volatile("atom.add.release.gpu.u32 %0, [%1], %2;" : "=r"(old) : "l"(word), "r"(add) : "memory");
        do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
        while (((old ^ now) & 0x80000000u) == 0);
    }
    __syncthreads();
}
extern "C" __global__ void prefix_by_doubling(int* a, int* b, u32* word, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    for (int d = 1; d < n; d *= 2) {
        if (i < n) b[i] = a[i] + (i >= d ? a[i - d] : 0);
        flip_barrier(word);
        int* t = a; a = b; b = t;
    }
}

// A chain of blocks: each waits for the flag of the one before.
extern "C" __global__ void chain(const int* in, int* out, u32* flags, int* carries) {
    __shared__ int carry;
    int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    if (t == 0) {
        carry = 1;
        if (blockIdx.x > 0) {
            u32 flag;
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(flag) : "l"(flags + blockIdx.x - 1) : "memory");
            while (flag != 1);
            carry = carries[blockIdx.x - 1];
        }
    }
    __syncthreads();
    out[i] = in[i] * carry;
    int sum = __syncthreads_count(in[i] & 1);
    if (t == 0) {
        carries[blockIdx.x] = carry * 3 + sum;
        asm volatile("st.release.gpu.global.u32 [%0], 1;" :: "l"(flags + blockIdx.x) : "memory");
    }
}

// Open addressing, 64-bit slots: key above, value below. The first of equal keys stays, values add.
__device__ u32 hash(u32 x) {
    x ^= x >> 16; x *= 0x85ebca6bu; x ^= x >> 13; x *= 0xc2b2ae35u; x ^= x >> 16;
    return x;
}
extern "C" __global__ void hash_insert(u64* slots, u32 mask, const u32* keys, const u32* values, int* full, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u64 mine = (u64)keys[i] << 32 | values[i];
    u32 at = hash(keys[i]) & mask;
    for (u32 probe = 0; probe <= mask; ++probe, at = (at + 1) & mask) {
        u64 seen = atomicCAS(slots + at, ~0ull, mine);
        if (seen == ~0ull) return;
        if (seen >> 32 == keys[i]) { atomicAdd(slots + at, (u64)values[i]); return; }
    }
    *(volatile int*)full = 1;
}
extern "C" __global__ void hash_find(const u64* slots, u32 mask, const u32* keys, u32* values, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u32 at = hash(keys[i]) & mask, found = 0xffffffffu;
    while (slots[at] != ~0ull) {
        if (slots[at] >> 32 == keys[i]) { found = (u32)slots[at]; break; }
        at = (at + 1) & mask;
    }
    values[i] = found;
}

// Lists: nodes pushed on heads; then walked. And a stack that is pushed and popped at once.
struct Node { int next, value; };
extern "C" __global__ void push(Node* nodes, int* heads, const int* values, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    nodes[i].value = values[i];
    __threadfence();
    nodes[i].next = atomicExch(heads + (values[i] & 3), i);
}
extern "C" __global__ void walk(const Node* nodes, const int* heads, int* sums, int* lengths) {
    int sum = 0, length = 0;
    for (int i = heads[threadIdx.x]; i >= 0; i = nodes[i].next) { sum += nodes[i].value; ++length; }
    sums[threadIdx.x] = sum;
    lengths[threadIdx.x] = length;
}

// Breadth-first search by levels, a frontier that grows by atomics.
extern "C" __global__ void bfs(const int* starts, const int* edges, int* levels, const int* frontier,
                               int size, int* next, int* next_size, int level) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    int v = frontier[i];
    for (int e = starts[v]; e < starts[v + 1]; ++e)
        if (atomicCAS(levels + edges[e], -1, level + 1) == -1) next[atomicAdd(next_size, 1)] = edges[e];
}
// Labels of components: hook and halve paths until nothing changes (plain reads of what others
// may lower are volatile).
extern "C" __global__ void components(const int2* edges, int* parent, int m) {
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= m) return;
    volatile int* p = parent;
    int a = edges[e].x, b = edges[e].y;
    for (;;) {
        while (p[a] != a) a = p[a];
        while (p[b] != b) b = p[b];
        if (a == b) return;
        int high = max(a, b), low = min(a, b);
        if (atomicCAS(parent + high, high, low) == high) return;
    }
}

// Few threads print.
extern "C" __global__ void speak(const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && i % 20 == 5) printf("thread %d of %u: x = %g, %s\n", i, blockDim.x, x[i], x[i] < 0 ? "less" : "more");
}

// Many ways out.
extern "C" __global__ void exits(const int* in, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int x = in[i];
    if (x < 0) { out[i] = -1; return; }
    int steps = 0;
    while (x != 1) {
        if (x == 0) { out[i] = -2; return; }
        if (steps > 40) { out[i] = -3; return; }
        x = x & 1 ? 3 * x + 1 : x >> 1;
        ++steps;
        if (__popc(__activemask()) == 0) return;
    }
    __syncwarp(__activemask());
    out[i] = steps;
}
// Blocks whose warps leave early, while the others go on to barriers.
extern "C" __global__ void warps_leave(int* out, int n) {
    __shared__ int s;
    if (threadIdx.x == 0) s = 0;
    __syncthreads();
    int warp = threadIdx.x / 32;
    for (int r = 0; r < n; ++r) {
        if (warp > r) return;
        atomicAdd(&s, 1);
        __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = s;
}
