"""Sorting kernels of CUDA C against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sim import cuda
from sim.kernel_files import SIZES, Empty, module, run

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("target", cuda.TARGETS)
@pytest.mark.parametrize("n", [1, 31, 33, 200])
def test_bitonic_in_shared_memory(target: str, n: int) -> None:
    loaded, random = module("sorting", target), np.random.default_rng(n)
    block = max(32, 1 << (n - 1).bit_length() >> 1)
    floats = random.standard_normal(n).astype(np.float32)
    floats[::7] = -np.inf
    for kind, x in (
        ("int", random.integers(-9, 9, n).astype(np.int32)),
        ("float", floats),
        ("u64", random.integers(0, 2**64, n, np.uint64)),
    ):
        (out,) = run(loaded, f"bitonic_{kind}", 1, block, x, n, shared_bytes=2 * block * x.itemsize)
        assert np.array_equal(out, np.sort(x))


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_bitonic_in_many_launches(target: str) -> None:
    loaded, size = module("sorting", target), 512
    data = loaded.device.upload(np.random.default_rng(0).integers(-99, 99, size).astype(np.int32))
    expected = np.sort(data.get())
    k = 2
    while k <= size:
        j = k // 2
        while j:
            loaded.kernel("bitonic_step").launch(
                3, 96, [data, j, k, size], checks={"memory", "race"}, seed=k
            )
            j //= 2
        k *= 2
    assert np.array_equal(data.get(), expected)


@pytest.mark.parametrize("target", cuda.TARGETS)
@pytest.mark.parametrize("n", SIZES)
def test_bitonic_in_registers(target: str, n: int) -> None:
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    _, out = run(module("sorting", target), "bitonic_warp", -(-n // 64), 64, x, Empty(n), n)
    for got, given in zip(*(np.split(a, range(32, n, 32)) for a in (out, x)), strict=True):
        assert np.array_equal(got, np.sort(given))


@pytest.mark.parametrize("target", cuda.TARGETS)
@pytest.mark.parametrize("scatter", ["radix_ballots", "radix_match"])
@pytest.mark.parametrize("n", SIZES)
def test_radix_passes(target: str, scatter: str, n: int) -> None:
    loaded = module("sorting", target)
    keys = np.random.default_rng(n).integers(0, 1 << 12, n).astype(np.uint32)
    values = np.arange(n, dtype=np.uint32)
    order = np.argsort(keys, kind="stable")
    block = 128
    grid = -(-n // block)
    for shift in (0, 4, 8):
        counts = run(
            loaded, "radix_count", grid, block, keys, Empty((16, grid), np.uint32), n, shift
        )[1]
        (starts,) = run(loaded, "scan_one_thread", 1, 1, counts, 16 * grid)
        keys, values = run(
            loaded, scatter, grid, block, keys, values, Empty(n, np.uint32), Empty(n, np.uint32),
            starts, n, shift, seed=shift,
        )[2:4]  # fmt: skip
    assert np.array_equal(values, order)
    assert (np.diff(keys.astype(np.int64)) >= 0).all()


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_odd_even_transposition_of_bytes(target: str) -> None:
    for n in (1, 31, 40):
        x = np.random.default_rng(n).integers(0, 256, n).astype(np.uint8)
        out, rounds = run(module("sorting", target), "odd_even", 1, 64, x, Empty(1, np.int32), n)
        assert np.array_equal(out, np.sort(x))
        assert 1 <= rounds[0] <= n // 2 + 2


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_merge_path(target: str) -> None:
    random = np.random.default_rng(0)
    for na, nb in ((1, 31), (500, 33), (31, 1)):
        a, b = (np.sort(random.integers(0, 50, n)).astype(np.int32) for n in (na, nb))
        total = na + nb
        grid = -(-total // (7 * 32))
        out = run(
            module("sorting", target), "merge_path", grid, 32,
            a, na, b, nb, Empty(total, np.int32), 7,
        )[2]  # fmt: skip
        assert np.array_equal(out, np.sort(np.concatenate([a, b]), kind="stable"))


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_merge_sort_of_structs(target: str) -> None:
    for n in (1, 31, 33, 200):
        pairs = np.random.default_rng(n).integers(-5, 5, (n, 2)).astype(np.int32)
        (out,) = run(module("sorting", target), "merge_pairs", 1, 96, pairs, n)
        assert out.tolist() == sorted(pairs.tolist(), key=lambda p: (p[0], -p[1]))


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_top_k_of_rows(target: str) -> None:
    for columns, k in ((1, 1), (33, 7), (150, 5)):
        x = np.random.default_rng(k).integers(0, 40, (8, columns)).astype(np.float32)
        places = np.argsort(-x, axis=1, kind="stable")[:, :k]
        _, top, at = run(
            module("sorting", target), "top_k", 2, 128,
            x, Empty((8, k)), Empty((8, k), np.int32), columns, k,
        )  # fmt: skip
        assert np.array_equal(at, places)
        assert np.array_equal(top, np.take_along_axis(x, places, 1))
