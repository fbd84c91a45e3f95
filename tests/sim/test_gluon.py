"""Gluon kernels for Hopper: tensor copies of all kinds, producer and consumer warps, clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sim.triton_kit import DELIVERIES, DTYPES, Compiled, Descriptor, described

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
gluon = pytest.importorskip("triton.experimental.gluon")
gl = pytest.importorskip("triton.experimental.gluon.language")
hopper = pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

tma = hopper.tma
mbarrier = hopper.mbarrier

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@gluon.jit  # type: ignore[untyped-decorator]
def load_tiles(  # type: ignore[no-untyped-def]
    a, b, ready, empty, at, bt, row, column, K, STAGES: gl.constexpr, BK: gl.constexpr
):
    for i in range(K // BK):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(stage), a.nbytes_per_cta + b.nbytes_per_cta)
        tma.async_load(a, [row, i * BK], ready.index(stage), at.index(stage))
        tma.async_load(b, [i * BK, column], ready.index(stage), bt.index(stage))


@gluon.jit  # type: ignore[untyped-decorator]
def multiply_tiles(  # type: ignore[no-untyped-def]
    c, ready, empty, at, bt, ct, row, column, K, STAGES: gl.constexpr, BK: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = c.block_shape[0]
    BN: gl.constexpr = c.block_shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[W, 1], instr_shape=[16, BN, 16]
    )
    total = gl.zeros((BM, BN), gl.float32, layout)
    for i in range(K // BK):
        stage = i % STAGES
        mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        total = hopper.warpgroup_mma(at.index(stage), bt.index(stage), total, is_async=True)
        total = hopper.warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index(stage), count=1)
    ct.store(total.to(c.dtype))
    hopper.fence_async_shared()
    tma.async_store(c, [row, column], ct)
    tma.store_wait(0)


@gluon.jit  # type: ignore[untyped-decorator]
def specialised_matmul(  # type: ignore[no-untyped-def]
    a, b, c, K, STAGES: gl.constexpr, W: gl.constexpr
):
    BM: gl.constexpr = a.block_shape[0]
    BK: gl.constexpr = a.block_shape[1]
    BN: gl.constexpr = b.block_shape[1]
    row = gl.program_id(0) * BM
    column = gl.program_id(1) * BN
    at = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    bt = gl.allocate_shared_memory(b.dtype, [STAGES, BK, BN], b.layout)
    ct = gl.allocate_shared_memory(c.dtype, [BM, BN], c.layout)
    ready = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    gl.warp_specialize(
        [
            (multiply_tiles, (c, ready, empty, at, bt, ct, row, column, K, STAGES, BK, W)),
            (load_tiles, (a, b, ready, empty, at, bt, row, column, K, STAGES, BK)),
        ],
        [1],
        [24],
    )


@gluon.jit  # type: ignore[untyped-decorator]
def multicast_copy(x, y, read: gl.constexpr):  # type: ignore[no-untyped-def]
    rows: gl.constexpr = x.block_shape[0]
    columns: gl.constexpr = x.block_shape[1]
    row = gl.program_id(0) * rows
    tile = gl.allocate_shared_memory(x.dtype, [rows, columns], x.layout)
    full = mbarrier.allocate_mbarrier()
    mbarrier.init(full, count=1)
    gl.barrier(cluster=True)
    mbarrier.expect(full, x.nbytes_per_cta)
    tma.async_load(x, [row, 0], full, tile, multicast=True)
    mbarrier.wait(full, 0)
    at = row + gl.arange(0, rows, gl.SliceLayout(1, read))
    to = y + at[:, None] * columns + gl.arange(0, columns, gl.SliceLayout(0, read))[None, :]
    gl.store(to, tile.load(read))


@gluon.jit  # type: ignore[untyped-decorator]
def store_to_each_other(x, y, N: gl.constexpr, source: gl.constexpr):  # type: ignore[no-untyped-def]
    blocked: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0], cga_layout=[[1]])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0], cga_layout=[[1]])
    tile = gl.allocate_shared_memory(gl.int32, [N], shared)
    full = mbarrier.allocate_mbarrier()
    mbarrier.init(full, count=1)
    gl.barrier(cluster=True)
    mbarrier.expect(full, N * 4 // 2)
    hopper.async_store(tile, gl.load(x + gl.arange(0, N, source)), full)
    mbarrier.wait(full, 0)
    gl.store(y + gl.arange(0, N, blocked), tile.load(blocked) + 1)
    hopper.cluster.barrier(relaxed=True)


@gluon.jit  # type: ignore[untyped-decorator]
def sum_of_cluster(x, y, N: gl.constexpr):  # type: ignore[no-untyped-def]
    blocked: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0], cga_layout=[[1]])
    gl.store(y, gl.sum(gl.load(x + gl.arange(0, N, blocked)), 0))


@triton.jit  # type: ignore[untyped-decorator]
def reduce_into(x, y, OP: tl.constexpr):  # type: ignore[no-untyped-def]
    value = x.load([tl.program_id(0) * x.block_shape[0], 0])
    if OP == "add":
        y.atomic_add([0, 0], value)
    elif OP == "min":
        y.atomic_min([0, 0], value)
    elif OP == "max":
        y.atomic_max([0, 0], value)
    elif OP == "and":
        y.atomic_and([0, 0], value)
    elif OP == "or":
        y.atomic_or([0, 0], value)
    else:
        y.atomic_xor([0, 0], value)


@triton.jit  # type: ignore[untyped-decorator]
def copy_line(x, y):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * x.block_shape[0]
    y.store([at], x.load([at]))


@triton.jit  # type: ignore[untyped-decorator]
def copy_box(x, y):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * x.block_shape[0]
    y.store([at, 0, 0, 0, 0], x.load([at, -1, 1, 0, 16]))


def swizzled(*shape: int, bits: int = 16, bases: Any = ()) -> str:
    """The text of a layout of 128-byte swizzled shared memory; bases tell it over the cluster."""
    return (
        f"NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth={bits}, rank={len(shape)}, "
        f"cga_layout={[list(b) for b in bases]})"
    )


def tile(kind: str, *shape: int, bases: Any = ()) -> str:
    return described(kind, *shape, layout=swizzled(*shape, bases=bases))


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("warps", [4, 8])
def test_specialised_matmul(warps: int, delivery: str) -> None:
    rows = 16 * warps
    kernel = Compiled(
        specialised_matmul,
        {
            "a": tile("bf16", rows, 64),
            "b": tile("bf16", 64, 64),
            "c": tile("bf16", rows, 64),
            "K": "i32",
        },
        {"STAGES": 2, "W": warps},
        num_warps=warps,
    )
    kernel = kernel.with_single_stores()
    # One warp loads; what its warp group has more was added to fill it.
    assert kernel.metadata.num_warps == warps + 4
    assert kernel.has("setmaxnreg.dec.sync.aligned.u32", "wgmma.mma_async", "elect.sync")
    random = np.random.default_rng(0)
    m, n, k = rows + 8, 64, 5 * 64
    a, b = (random.integers(-4, 5, s).astype(DTYPES["bf16"]) for s in ((m, k), (k, n)))
    c = kernel.device.alloc((m, n), DTYPES["bf16"])
    maps = [Descriptor(x) for x in (kernel.device.upload(a), kernel.device.upload(b), c)]
    kernel((2, 1), *maps, k, delivery=delivery)
    expected = (a.astype(np.float64) @ b.astype(np.float64)).astype(DTYPES["bf16"])
    assert np.array_equal(c.get(), expected)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("ctas", [2, 4])
def test_multicast(ctas: int, delivery: str) -> None:
    # Blocks 2i and 2i + 1 have the same rows in shared memory, and each writes half of them.
    rows, held, read = 32 * ctas, [(0, 0)], [[32, 0]]
    if ctas == 4:
        held, read = [(0, 0), (1, 0)], [[32, 0], [64, 0]]
    lanes = [[1, 0], [2, 0], [4, 0], [0, 16], [0, 32]]
    layout = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8]], lanes, [[8, 0], [16, 0]], read, [rows, 64]
    )
    kernel = Compiled(
        multicast_copy,
        {"x": tile("fp16", rows, 64, bases=held), "y": "*fp16"},
        {"read": layout},
        num_ctas=ctas,
    )
    assert kernel.has("multicast::cluster", "barrier.cluster.arrive", "fence.mbarrier_init")
    x = np.random.default_rng(1).standard_normal((3 * rows, 64)).astype(np.float16)
    y = kernel.device.alloc(x.shape, np.float16)
    kernel(3, Descriptor(kernel.device.upload(x)), y, delivery=delivery)
    assert np.array_equal(y.get(), x)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_store_to_each_other(delivery: str) -> None:
    # Even elements are read by block 0, odd ones by block 1; each holds half of all.
    source = gl.DistributedLinearLayout(
        [], [[2], [4], [8], [16], [32]], [[64], [128]], [[1]], [256]
    )
    kernel = Compiled(
        store_to_each_other,
        {"x": "*i32", "y": "*i32"},
        {"N": 256, "source": source},
        num_ctas=2,
    )
    assert kernel.has("st.async.weak.shared::cluster", "mapa.shared::cluster")
    x = np.arange(256, dtype=np.int32) * 7
    y = kernel.device.alloc(256, np.int32)
    kernel(1, kernel.device.upload(x), y, delivery=delivery)
    assert np.array_equal(y.get(), x + 1)


def test_sum_of_cluster() -> None:
    kernel = Compiled(sum_of_cluster, {"x": "*i32", "y": "*i32"}, {"N": 512}, num_ctas=2)
    assert kernel.has("ld.shared::cluster", "mapa.shared::cluster")
    x = np.random.default_rng(2).integers(-1000, 1000, 512).astype(np.int32)
    y = kernel.device.alloc(1, np.int32)
    kernel(1, kernel.device.upload(x), y)
    assert y.get()[0] == x.sum()


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        *((op, kind) for op in ("add", "min", "max") for kind in ("i32", "u32")),
        *((op, "i32") for op in ("and", "or", "xor")),
        *(("add", kind) for kind in ("fp32", "fp16", "bf16")),
    ],
)
@pytest.mark.parametrize("delivery", DELIVERIES)
def test_reduction(op: str, kind: str, delivery: str) -> None:
    descriptor = described(kind, 32, 32)
    kernel = Compiled(reduce_into, {"x": descriptor, "y": descriptor}, {"OP": op})
    assert kernel.has(f"cp.reduce.async.bulk.tensor.2d.global.shared::cta.{op}.bulk_group")
    random = np.random.default_rng(3)
    # Whole numbers of which bf16 holds every sum. As bits of u32 the negative ones are large.
    start, x = (random.integers(-20, 21, s) for s in ((32, 32), (3, 32, 32)))
    dtype = DTYPES[kind]
    start, x = (v.astype(np.int32 if kind == "u32" else dtype).view(dtype) for v in (start, x))
    y = kernel.device.upload(start)
    kernel(3, Descriptor(kernel.device.upload(x.reshape(96, 32))), Descriptor(y), delivery=delivery)
    expected = start
    for part in x:
        expected = REDUCTIONS[op](expected, part).astype(dtype)
    assert np.array_equal(y.get(), expected)


def test_one_dimension() -> None:
    line = described("fp8e4nv", 512)
    kernel = Compiled(copy_line, {"x": line, "y": line}, {})
    x = np.arange(1008, dtype=np.uint8)
    y = kernel.device.alloc(1008, np.uint8)
    kernel(2, Descriptor(kernel.device.upload(x)), Descriptor(y))
    assert np.array_equal(y.get(), x)


def test_five_dimensions_and_what_lies_outside() -> None:
    box = described("bf16", 1, 2, 4, 2, 32)
    kernel = Compiled(copy_box, {"x": box, "y": box}, {})
    assert kernel.has("cp.async.bulk.tensor.5d")
    x = np.random.default_rng(4).standard_normal((3, 2, 4, 2, 32)).astype(DTYPES["bf16"])
    y = kernel.device.alloc(x.shape, DTYPES["bf16"])
    kernel(3, Descriptor(kernel.device.upload(x)), Descriptor(y))
    # The box begins at (i, -1, 1, 0, 16): zeros where it has no tensor.
    expected = np.zeros_like(x)
    expected[:, 1:, :3, :, :16] = x[:, :1, 1:, :, 16:]
    assert np.array_equal(y.get(), expected)
