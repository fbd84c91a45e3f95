"""Prefix sums and compaction of CUDA C against NumPy: integers, so exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sim import cuda
from sim.kernel_files import SIZES, Empty, module, run

Array = np.ndarray[Any, Any]


def numbers(n: int) -> Array:
    """Any 32-bit integers: sums wrap."""
    return np.random.default_rng(n).integers(-(2**31), 2**31, n).astype(np.int32)


def by_block(x: Array, size: int) -> Array:
    """Inclusive sums that start anew at every block."""
    parts = np.split(x, range(size, x.size, size))
    return np.concatenate([p.cumsum(dtype=np.int32) for p in parts])


@pytest.mark.parametrize("target", cuda.TARGETS)
@pytest.mark.parametrize("n", SIZES)
def test_within_blocks(target: str, n: int) -> None:
    loaded, x = module("scans", target), numbers(n)
    for block in (32, 128):
        grid = -(-n // block)
        args = (grid, block, x, Empty(n, np.int32), n)
        _, out = run(loaded, "hillis_steele", *args, shared_bytes=8 * block)
        assert np.array_equal(out, by_block(x, block))
        _, out = run(loaded, "shuffled", *args)
        assert np.array_equal(out, by_block(x, block))


@pytest.mark.parametrize("target", cuda.TARGETS)
@pytest.mark.parametrize("n", SIZES)
def test_blelloch_of_blelloch(target: str, n: int) -> None:
    loaded, x, block = module("scans", target), numbers(n), 64
    grid, shared = -(-n // 128), 4 * (128 + 4)
    args = (x, Empty(n, np.int32), Empty(grid, np.int32), n)
    _, out, sums = run(loaded, "blelloch_int", grid, block, *args, shared_bytes=shared)
    args = (sums, Empty(grid, np.int32), Empty(1, np.int32), grid)
    _, before, total = run(loaded, "blelloch_int", 1, block, *args, shared_bytes=shared)
    out, _ = run(loaded, "add_sums", 2, 96, out, before, n, 128)
    assert total[0] == x.sum(dtype=np.int32)
    assert np.array_equal(out, x.cumsum(dtype=np.int32) - x)


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_blelloch_in_double(target: str) -> None:
    x = np.random.default_rng(0).integers(-1000, 1000, 100).astype(np.float64) / 64
    args = (x, Empty(100, np.float64), Empty(1, np.float64), 100)
    _, out, total = run(
        module("scans", target), "blelloch_double", 1, 64, *args, shared_bytes=8 * 132
    )
    assert np.array_equal(out, x.cumsum() - x)  # sixty-fourths: exact in any order
    assert total[0] == x.sum()


@pytest.mark.parametrize("target", cuda.TARGETS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_decoupled_look_back(target: str, seed: int) -> None:
    loaded = module("scans", target)
    for n, block in ((1, 32), (33, 32), (1000, 64), (2600, 32)):
        grid, x = -(-n // block), numbers(n)
        zeros = np.zeros(grid, np.int32)
        out = run(
            loaded, "look_back_volatile", grid, block,
            x, Empty(n, np.int32), zeros, Empty(grid, np.int32), Empty(grid, np.int32),
            np.zeros(1, np.int32), n, seed=seed,
        )[1]  # fmt: skip
        assert np.array_equal(out, x.cumsum(dtype=np.int32))
        args = (x, Empty(n, np.int32), np.zeros(grid, np.uint64), n)
        out = run(loaded, "look_back_packed", grid, block, *args, seed=seed)[1]
        assert np.array_equal(out, x.cumsum(dtype=np.int32))


@pytest.mark.parametrize("target", cuda.TARGETS)
@pytest.mark.parametrize("n", SIZES)
def test_compaction(target: str, n: int) -> None:
    loaded, x = module("scans", target), np.abs(numbers(n) // 2)
    kept = x[x % 3 == 1]
    args = (x, Empty(n, np.int32), np.zeros(1, np.int32), n)
    _, out, count = run(loaded, "compact", 1, 96, *args)
    assert count[0] == kept.size
    assert np.array_equal(out[: kept.size], kept)
    _, out, count = run(loaded, "compact_any", -(-n // 96), 96, *args, seed=n)
    assert count[0] == kept.size
    assert np.array_equal(np.sort(out[: kept.size]), np.sort(kept))
