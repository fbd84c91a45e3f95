"""cp.async.bulk.tensor from CUDA C, against boxes copied element by element."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from sim.boxes import expected_load, place_in_line, random_map, random_start, units
from sim.bulk_kit import DELIVERIES
from sim.tensor_kit import REGION, THREADS, Runner, ptx


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
    m = sim.tensor_map(
        runner.base,
        data_type="float16",
        global_dim=[29, 13],
        global_strides=[64],
        box_dim=[16, 6],
        swizzle=swizzle,
        oob_fill="nan_request_zero_fma" if side % 2 else "none",
    )
    start = ((-8, 8, 24)[side % 3], (-4, 2, 10)[side // 3])
    before = rng.integers(0, 256, REGION, np.uint8)
    found = runner.load(m, start, 1024, before)
    wanted = expected_load(m, start, 1024, runner.array.get(), runner.base, before)
    assert np.array_equal(found, wanted)
    # Far away nothing is read, and the whole box still counts.
    far = runner.load(m, (-(1 << 31), (1 << 31) - 1), 0, before)
    wanted = expected_load(m, (-104, 100), 0, runner.array.get(), runner.base, before)
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


def test_slices_begin_anywhere():
    """As on an H200, where these cases are no multiples of 16 bytes of elements."""
    rng = np.random.default_rng(6)
    memory = rng.integers(0, 256, 1 << 12, np.uint8)
    runner = Runner(memory)
    m = sim.tensor_map(
        runner.base, data_type="float32", global_dim=[10, 4, 3], global_strides=[160, 640],
        box_dim=[8, 1, 2], interleave="16B",
    )  # fmt: skip
    before = rng.integers(0, 256, REGION, np.uint8)
    for first in (1, -3, 7):
        found = runner.load(m, (first, 1, 0), 0, before)
        wanted = expected_load(m, (first, 1, 0), 0, memory, runner.base, before)
        assert np.array_equal(found, wanted)
