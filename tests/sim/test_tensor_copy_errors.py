"""Tensor copies that cannot be: what they say of it, and of which element."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cumla import sim
from cumla.sim.tensor_box import box_bytes
from cumla.sim.tensormap import DATA_TYPES
from sim import cuda
from sim.bulk_kit import DELIVERIES, HEAD
from sim.tensor_kit import REGION, SOURCE, THREADS, Runner, ptx


def fails(error, runner, m, start, at, match, kernel="load_box", **how):
    data = np.zeros(REGION // 4, np.uint32)
    more = (box_bytes(m), data) if kernel == "load_box" else (data,)
    with pytest.raises(error, match=match) as caught:
        runner.run(kernel, m, start, at, *more, **how)
    assert caught.value.where.block == (0, 0, 0)
    assert caught.value.where.thread == (0, 0, 0)
    mark = "// " + kernel.removesuffix("_box").upper()
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


def test_stores_of_unwritten_memory():
    runner = Runner(np.zeros((16, 64), np.uint8))
    m = sim.tensor_map(runner.array, box_dim=[64, 4])
    # The kernel fills only the bytes before REGION.
    match = rf"read of unwritten memory: .*{0x400 + REGION:#x}.*of a box of 64 x 4 uint8"
    fails(sim.MemoryFault, runner, m, (0, 2), REGION, match, "store_box")


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


# The first coordinate of each side, how many bytes off, and what it must be a multiple of.
MISPLACED = [
    ("float32", 1, "4 bytes", "4 elements"), ("float32", -2, "-8 bytes", "4 elements"),
    ("float32", 1021, "4084 bytes", "4 elements"), ("uint8", -8, "-8 bytes", "16 elements"),
    ("float64", 7, "56 bytes", "2 elements"), ("bfloat16", -(1 << 31) + 4, "-4294967288 bytes",
     "8 elements"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "first", "off", "step"), MISPLACED)
@pytest.mark.parametrize("kernel", ["load_box", "store_box", "reduce_box", "prefetch_box"])
def test_boxes_begin_at_multiples_of_16_bytes(kernel, kind, first, off, step):
    runner = Runner(np.zeros(1 << 12, np.uint8))
    m = sim.tensor_map(
        runner.base, data_type=kind, global_dim=[128 // DATA_TYPES[kind], 16],
        global_strides=[128], box_dim=[32 // DATA_TYPES[kind], 4],
    )  # fmt: skip
    match = rf"first coordinate {first} of a box of .* is {off} from .* which is {step}"
    fails(sim.KernelTrap, runner, m, (first, 3), 0, match, kernel)


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
