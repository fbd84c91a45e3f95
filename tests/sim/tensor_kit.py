"""CUDA C of tensor copies for tests: kernels of any rank, and how to run them."""

from __future__ import annotations

from functools import cache

import numpy as np

from cumla import sim
from cumla.sim.tensor_box import box_bytes
from sim import cuda
from sim.bulk_kit import HEAD

REGION = 8192
THREADS = 64

SOURCE = r"""
struct alignas(64) Map { u64 words[16]; };
#define REGION 8192

#if RANK == 1
#define COORDINATES "{%3}"
#define VALUES "r"(x[0])
#elif RANK == 2
#define COORDINATES "{%3, %4}"
#define VALUES "r"(x[0]), "r"(x[1])
#elif RANK == 3
#define COORDINATES "{%3, %4, %5}"
#define VALUES "r"(x[0]), "r"(x[1]), "r"(x[2])
#elif RANK == 4
#define COORDINATES "{%3, %4, %5, %6}"
#define VALUES "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
#else
#define COORDINATES "{%3, %4, %5, %6, %7}"
#define VALUES "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(x[4])
#endif
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define ND TEXT(RANK) "d"
#define OP TEXT(REDUCTION)

__device__ u32 region(unsigned char* raw) { return (shared_address(raw) + 1023) & ~1023u; }

__device__ void fill(u32 base, const u32* from, u32 n) {
    for (u32 i = threadIdx.x; i < n; i += blockDim.x)
        asm volatile("st.shared.u32 [%0], %1;" :: "r"(base + 4 * i), "r"(from[i]) : "memory");
}

// Shared memory holds `before`; a box is loaded to offset `at` of it; then it is written back.
extern "C" __global__ void load_box(const __grid_constant__ Map map, const int* start, u32 at,
                                    u32 bytes, u32* dump) {
    extern __shared__ unsigned char raw[];
    __shared__ u64 bar;
    u32 base = region(raw);
    int x[5];
    for (int k = 0; k < RANK; ++k) x[k] = start[k];
    fill(base, dump, REGION / 4);
    if (threadIdx.x == 0) init(&bar, 1);
    proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        expect(&bar, bytes);
        asm volatile("cp.async.bulk.tensor." ND ".shared::cluster.global.tile" // LOAD
                     ".mbarrier::complete_tx::bytes [%0], [%1, " COORDINATES "], [%2];"
                     :: "r"(base + at), "l"(&map), "r"(shared_address(&bar)), VALUES : "memory");
    }
    wait(&bar, 0);
    for (u32 i = threadIdx.x; i < REGION / 4; i += blockDim.x)
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(dump[i]) : "r"(base + 4 * i) : "memory");
}

// Shared memory holds `data`; a box of it is stored from offset `at`.
extern "C" __global__ void store_box(const __grid_constant__ Map map, const int* start, u32 at,
                                     const u32* data) {
    extern __shared__ unsigned char raw[];
    u32 base = region(raw), unused = 0;
    int x[5];
    for (int k = 0; k < RANK; ++k) x[k] = start[k];
    fill(base, data, REGION / 4);
    proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("cp.async.bulk.tensor." ND ".global.shared::cta.tile.bulk_group" // STORE
                     " [%1, " COORDINATES "], [%0];"
                     :: "r"(base + at), "l"(&map), "r"(unused), VALUES : "memory");
        commit();
        wait_group<0>();
    }
}

extern "C" __global__ void reduce_box(const __grid_constant__ Map map, const int* start, u32 at,
                                   const u32* data) {
    extern __shared__ unsigned char raw[];
    u32 base = region(raw), unused = 0;
    int x[5];
    for (int k = 0; k < RANK; ++k) x[k] = start[k];
    fill(base, data, REGION / 4);
    proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("cp.reduce.async.bulk.tensor." ND ".global.shared::cta." OP ".tile" // REDUCE
                     ".bulk_group [%1, " COORDINATES "], [%0];"
                     :: "r"(base + at), "l"(&map), "r"(unused), VALUES : "memory");
        commit();
        wait_group<0>();
    }
}

extern "C" __global__ void prefetch_box(const __grid_constant__ Map map, const int* start, u32,
                                        const u32*) {
    int x[5];
    for (int k = 0; k < RANK; ++k) x[k] = start[k];
    u32 unused = 0;
    if (threadIdx.x == 0)
        asm volatile("cp.async.bulk.prefetch.tensor." ND ".L2.global.tile" // PREFETCH
                     " [%1, " COORDINATES "];"
                     :: "r"(unused), "l"(&map), "r"(unused), VALUES : "memory");
}

// All in one pipeline of two buffers: tile k of a row of tiles is loaded, doubled and stored.
extern "C" __global__ void pipeline(const __grid_constant__ Map in, const __grid_constant__ Map out,
                                    int tiles) {
    extern __shared__ unsigned char raw[];
    __shared__ u64 full[2];
    u32 base = region(raw);
    if (threadIdx.x == 0) { init(&full[0], 1); init(&full[1], 1); }
    __syncthreads();
    auto get = [&](int k) {
        expect(&full[k % 2], 2048);
        asm volatile("cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
                     " [%0], [%1, {%3, %4}], [%2];"
                     :: "r"(base + 2048 * (k % 2)), "l"(&in), "r"(shared_address(&full[k % 2])),
                        "r"(32 * k), "r"(16 * (int)blockIdx.x) : "memory");
    };
    if (threadIdx.x == 0) get(0);
    for (int k = 0; k < tiles; ++k) {
        if (threadIdx.x == 0 && k + 1 < tiles) {
            wait_read<0>(); // WAIT_READ
            get(k + 1);
        }
        wait(&full[k % 2], k / 2 % 2);
        for (u32 i = threadIdx.x; i < 512; i += blockDim.x) {
            float v;
            u32 a = base + 2048 * (k % 2) + 4 * i;
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(a) : "memory");
            asm volatile("st.shared.f32 [%0], %1;" :: "r"(a), "f"(2 * v) : "memory");
        }
        proxy_fence();
        __syncthreads();
        if (threadIdx.x == 0) {
            asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"
                         " [%0, {%2, %3}], [%1];"
                         :: "l"(&out), "r"(base + 2048 * (k % 2)), "r"(32 * k),
                            "r"(16 * (int)blockIdx.x) : "memory");
            commit();
        }
    }
    if (threadIdx.x == 0) wait_group<0>();
}
"""


@cache
def ptx(rank, op="add"):
    """The kernels for boxes of a rank; `op` is what reduce_box does."""
    return cuda.ptx(HEAD + SOURCE, "sm_90a", f"-DRANK={rank}", f"-DREDUCTION={op}")


class Runner:
    """A device with a tensor of these bytes, and how to run kernels on boxes of it."""

    def __init__(self, memory, target="sm_90a"):
        self.device = sim.Device(target, memory_bytes=1 << 24)
        self.array = self.device.upload(memory, name="tensor")
        self.base = self.array.address

    def run(self, kernel, m, start, at, *more, op="add", blocks=1, **how):
        loaded = self.device.load(ptx(m.rank, op)).kernel(kernel)
        first = self.device.upload(np.array(start, np.int32))
        given = [self.device.upload(x) if isinstance(x, np.ndarray) else x for x in more]
        loaded.launch(blocks, THREADS, [m, first, at, *given], shared_bytes=REGION + 1024, **how)
        return [g.get() for g in given if isinstance(g, sim.DeviceArray)]

    def load(self, m, start, at, before, **how):
        words = before.view(np.uint32)
        (after,) = self.run("load_box", m, start, at, box_bytes(m), words, **how)
        return after.view(np.uint8)
