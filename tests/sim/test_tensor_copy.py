"""cp.async.bulk.tensor from CUDA C, against boxes copied element by element."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

from cumla import sim
from cumla.sim.tensor_box import box_bytes
from sim import cuda
from sim.boxes import expected_load, place_in_line, random_map, random_start, units
from sim.bulk_kit import DELIVERIES, HEAD

BOTH = ("memory", "race")
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

extern "C" __global__ void add_box(const __grid_constant__ Map map, const int* start, u32 at,
                                   const u32* data) {
    extern __shared__ unsigned char raw[];
    u32 base = region(raw), unused = 0;
    int x[5];
    for (int k = 0; k < RANK; ++k) x[k] = start[k];
    fill(base, data, REGION / 4);
    proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("cp.reduce.async.bulk.tensor." ND ".global.shared::cta.add.tile.bulk_group"
                     " [%1, " COORDINATES "], [%0];"
                     :: "r"(base + at), "l"(&map), "r"(unused), VALUES : "memory");
        commit();
        wait_group<0>();
    }
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
def ptx(rank):
    return cuda.ptx(HEAD + SOURCE, "sm_90a", f"-DRANK={rank}")


class Runner:
    """A device with `memory_bytes` of tensor, and the kernels of a rank."""

    def __init__(self, memory, target="sm_90a"):
        self.device = sim.Device(target, memory_bytes=1 << 24)
        self.array = self.device.upload(memory, name="tensor")
        self.base = self.array.address

    def run(self, kernel, m, start, at, *more, **how):
        loaded = self.device.load(ptx(m.rank)).kernel(kernel)
        first = self.device.upload(np.array(start, np.int32))
        given = [self.device.upload(x) if isinstance(x, np.ndarray) else x for x in more]
        loaded.launch(1, THREADS, [m, first, at, *given], shared_bytes=REGION + 1024, **how)
        return [g.get() for g in given if isinstance(g, sim.DeviceArray)]

    def load(self, m, start, at, before, **how):
        words = before.view(np.uint32)
        (after,) = self.run("load_box", m, start, at, box_bytes(m), words, **how)
        return after.view(np.uint8)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(8))
def test_loads(rank, seed):
    rng = np.random.default_rng([rank, seed])
    runner = Runner(rng.integers(0, 256, 1 << 15, np.uint8))
    before = rng.integers(0, 256, REGION, np.uint8)
    m = random_map(rng, runner.base, 1 << 15, rank=rank)
    start, at = random_start(rng, m), int(rng.integers(0, 8)) * 128
    found = runner.load(m, start, at, before, delivery=DELIVERIES[seed % 3])
    wanted = expected_load(m, start, at, runner.array.get(), runner.base, before)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("swizzle", ["none", "32B", "64B", "128B"])
@pytest.mark.parametrize("side", range(9))
def test_out_of_bounds_on_every_side(swizzle, side):
    """A box of 2 dimensions beside, before, behind, above, below and in the tensor."""
    rng = np.random.default_rng(side)
    runner = Runner(rng.integers(0, 256, 1 << 12, np.uint8))
    width = 8 if swizzle == "32B" else 16
    m = sim.tensor_map(
        runner.base,
        data_type="float16",
        global_dim=[21, 13],
        global_strides=[48],
        box_dim=[width, 6],
        swizzle=swizzle,
        oob_fill="nan_request_zero_fma" if side % 2 else "none",
    )
    start = ((-5, 3, 17)[side % 3], (-4, 2, 10)[side // 3])
    before = rng.integers(0, 256, REGION, np.uint8)
    found = runner.load(m, start, 1024, before)
    wanted = expected_load(m, start, 1024, runner.array.get(), runner.base, before)
    assert np.array_equal(found, wanted)
    # Far away nothing is read, and the whole box still counts.
    far = runner.load(m, (-(1 << 31), (1 << 31) - 1), 0, before)
    wanted = expected_load(m, (-100, 100), 0, runner.array.get(), runner.base, before)
    assert np.array_equal(far, wanted)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(6))
def test_stores(rank, seed):
    rng = np.random.default_rng([7, rank, seed])
    memory = rng.integers(0, 256, 1 << 15, np.uint8)
    runner = Runner(memory)
    data = rng.integers(0, 256, REGION, np.uint8)
    m = random_map(rng, runner.base, 1 << 15, rank=rank)
    start = tuple(max(x, 0) for x in random_start(rng, m))
    at = int(rng.integers(0, 8)) * 128
    runner.run("store_box", m, start, at, data.view(np.uint32), delivery=DELIVERIES[seed % 3])
    wanted = memory.copy()
    for _, to, source, size in units(m, start, at):
        if to is not None:
            for k in range(size):
                wanted[to - runner.base + k] = data[place_in_line(m.swizzle, source + k)]
    assert np.array_equal(runner.array.get(), wanted)


@pytest.mark.parametrize("seed", range(6))
def test_reductions(seed):
    rng = np.random.default_rng(seed)
    memory = rng.integers(0, 1 << 31, 1 << 12, np.int32)
    runner = Runner(memory)
    data = rng.integers(-(1 << 31), 1 << 31, REGION // 4, np.int64).astype(np.int32)
    m = random_map(rng, runner.base, memory.nbytes, types=["int32"])
    while m.interleave != "none":
        m = random_map(rng, runner.base, memory.nbytes, types=["int32"])
    start = tuple(max(x, 0) for x in random_start(rng, m))
    runner.run("add_box", m, start, 128, data.view(np.uint32), delivery=DELIVERIES[seed % 3])
    wanted = memory.copy()
    for _, to, source, _ in units(m, start, 128):
        if to is not None:
            with np.errstate(over="ignore"):
                wanted[(to - runner.base) // 4] += data[place_in_line(m.swizzle, source) // 4]
    assert np.array_equal(runner.array.get(), wanted)


def test_tf32_rounds_on_load():
    memory = np.array([1.0, 1.0 + 2**-11, 1.0 + 3 * 2**-11, np.pi] * 8, np.float32)
    runner = Runner(memory)
    m = sim.tensor_map(runner.array, data_type="tfloat32", box_dim=[32])
    found = runner.load(m, (0,), 0, np.zeros(REGION, np.uint8)).view(np.float32)[:32]
    assert found[:4].tolist() == [1.0, 1.0, 1.0 + 2**-9, np.float32(3.140625)]


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("seed", range(3))
def test_pipeline(delivery, seed):
    tiles, blocks = 5, 3
    x = np.random.default_rng(seed).random((16 * blocks - 5, 32 * tiles), np.float32)
    device = sim.Device("sm_90a", memory_bytes=1 << 24)
    source, target = device.upload(x), device.alloc(x.shape, np.float32)
    maps = [sim.tensor_map(a, box_dim=[32, 16], swizzle="128B") for a in (source, target)]
    kernel = device.load(ptx(2)).kernel("pipeline")
    kernel.launch(blocks, THREADS, [*maps, tiles], shared_bytes=8192, delivery=delivery, seed=seed)
    assert np.array_equal(target.get(), 2 * x)


# What goes wrong


def fails(error, runner, m, start, at, match, kernel="load_box", **how):
    data = np.zeros(REGION // 4, np.uint32)
    more = (box_bytes(m), data) if kernel == "load_box" else (data,)
    with pytest.raises(error, match=match) as caught:
        runner.run(kernel, m, start, at, *more, **how)
    assert caught.value.where.block == (0, 0, 0)
    assert caught.value.where.thread == (0, 0, 0)
    mark = {"load_box": "// LOAD", "store_box": "// STORE"}[kernel]
    first = cuda.line_of(HEAD + SOURCE, mark)
    line = int(caught.value.where.line.rpartition(":")[2])
    assert first <= line <= first + 3
    return caught.value


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_faults_name_the_element(delivery):
    device_bytes = np.zeros(4096, np.uint8)
    runner = Runner(device_bytes)
    m = sim.tensor_map(runner.base, data_type="float32", global_dim=[32, 40], global_strides=[128],
                       box_dim=[8, 4])  # fmt: skip
    error = fails(sim.MemoryFault, runner, m, (4, 30), 0, "out of bounds", delivery=delivery)
    assert "element (4, 32) of a box of 8 x 4 float32 at coordinates (4, 30)" in str(error)
    assert "'tensor'" in str(error)
    fails(sim.MemoryFault, runner, m, (4, 30), 0, "out of bounds: write", "store_box",
          delivery=delivery)  # fmt: skip
    runner.array.protect()
    fails(sim.MemoryFault, runner, m, (0, 0), 0, "read-only", "store_box", delivery=delivery)


def test_reads_of_unwritten_and_freed_memory():
    runner = Runner(np.zeros(16, np.uint8))
    empty = runner.device.alloc((16, 64), np.uint8, name="empty")
    m = sim.tensor_map(empty, box_dim=[64, 4])
    fails(sim.MemoryFault, runner, m, (0, 2), 0, r"read of unwritten memory: .*element \(0, 2\)")
    fails(sim.MemoryFault, runner, m, (0, -2), 0, r"read of unwritten memory: .*element \(0, 0\)")
    # All of it out of bounds: nothing is read.
    assert not runner.load(m, (0, 16), 0, np.ones(REGION, np.uint8))[:256].any()
    empty.free()
    fails(sim.MemoryFault, runner, m, (0, 2), 0, "use after free")


def test_unchecked_loads_only_stop_at_the_end_of_memory():
    runner = Runner(np.arange(64, dtype=np.uint8))
    m = sim.tensor_map(runner.base, data_type="uint8", global_dim=[256], box_dim=[256])
    found = runner.load(m, (0,), 0, np.ones(REGION, np.uint8), checks=())
    assert found[:64].tolist() == list(range(64))


def test_shared_memory_is_checked():
    runner = Runner(np.zeros((64, 32), np.float32))
    m = sim.tensor_map(runner.array, box_dim=[32, 64], swizzle="128B")
    fails(sim.MemoryFault, runner, m, (0, 0), 2048, "out of bounds: .*past the end")
    fails(sim.MemoryFault, runner, m, (0, 0), 64, "misaligned: .*multiple of 128")
    fails(sim.MemoryFault, runner, m, (0, 0), 2048, "out of bounds: .*past the end", "store_box")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": 1}, "has 1 dimensions, not 2"),
        ({"data": np.zeros(16, np.uint64)}, "no tensor map"),
        ({"swizzle": "128B_ATOM_32B"}, "128B_ATOM_32B needs sm_100"),
    ],
)
def test_maps_that_cannot_be(change, reason):
    runner = Runner(np.zeros((16, 32), np.float32))
    m = sim.tensor_map(runner.array, box_dim=[32, 4], swizzle=change.get("swizzle", "none"),
                       target="sm_100a")  # fmt: skip
    given = bytes(m)
    if "rank" in change:
        given = bytes(sim.tensor_map(runner.base, data_type="uint8", global_dim=[64], box_dim=[16]))
    if "data" in change:
        given = change["data"].tobytes()
    kernel = runner.device.load(ptx(2)).kernel("load_box")
    start, dump = (runner.device.upload(np.zeros(2048, np.uint32)) for _ in range(2))
    with pytest.raises(sim.KernelTrap, match=reason):
        kernel.launch(1, THREADS, [given, start, 0, 512, dump], shared_bytes=REGION + 1024)


def test_stores_do_not_begin_before_the_tensor():
    runner = Runner(np.zeros((16, 32), np.float32))
    m = sim.tensor_map(runner.array, box_dim=[32, 4])
    fails(sim.KernelTrap, runner, m, (0, -1), 0, r"\(0, -1\): only loads", "store_box")


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize(
    ("bytes_off", "missing"), [(16, " 16 bytes missing"), (-16, " 16 bytes more than expected")]
)
def test_wrong_bytes_expected(delivery, bytes_off, missing):
    """Too many: nobody ever arrives. Too few: the phase never gets back to zero."""
    runner = Runner(np.zeros((16, 32), np.float32))
    m = sim.tensor_map(runner.array, box_dim=[32, 4])
    data = np.zeros(REGION // 4, np.uint32)
    with pytest.raises(sim.Deadlock, match=missing) as caught:
        runner.run("load_box", m, (0, 0), 0, box_bytes(m) + bytes_off, data, delivery=delivery)
    assert re.search(r"mbarrier at shared 0x[0-9a-f]+ phase 0", str(caught.value))
