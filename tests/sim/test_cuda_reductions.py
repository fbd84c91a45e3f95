"""Reductions of CUDA C, in the ways that people write them, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from sim import cuda
from sim.kernel_files import SIZES, Empty, module, run

F32 = 2.0**-24
F64 = 2.0**-53


def close(got: object, exact: float, terms: np.ndarray, unit: float) -> None:
    """A sum of n terms in any order is off by at most (n - 1) roundings of sums of magnitudes."""
    bound = max(terms.size - 1, 1) * 1.01 * unit * np.abs(terms).astype(np.float64).sum()
    assert abs(float(got) - exact) <= bound


@pytest.mark.parametrize("target", cuda.TARGETS)
@pytest.mark.parametrize("n", SIZES)
def test_trees_in_shared_memory(target: str, n: int) -> None:
    loaded, random = module("reductions", target), np.random.default_rng(n)
    for kind in ("int", "float", "double"):
        dtype = np.dtype(kind if kind != "int" else np.int32).newbyteorder("=")
        dtype = {"int": np.int32, "float": np.float32, "double": np.float64}[kind]
        x = (random.standard_normal(n) * 1e6).astype(dtype)
        block = 64
        grid = -(-n // (2 * block))
        how = {"shared_bytes": block * x.itemsize, "seed": n}
        _, parts = run(loaded, f"tree_sum_{kind}", grid, block, x, Empty(grid, dtype), n, **how)
        padded = np.zeros(grid * 2 * block, dtype)
        padded[:n] = x
        tree = padded.reshape(grid, 2, block).sum(axis=1, dtype=dtype)
        while tree.shape[1] > 1:
            tree = tree[:, : tree.shape[1] // 2] + tree[:, tree.shape[1] // 2 :]
        assert np.array_equal(parts, tree[:, 0])  # the same order, so the same bits
        if kind != "double":
            _, parts = run(loaded, f"tree_max_{kind}", grid, block, x, Empty(grid, dtype), n, **how)
            assert parts.max() == x.max()


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_last_warp_unrolled(target: str) -> None:
    loaded = module("reductions", target)
    for n in SIZES:
        x = np.random.default_rng(n).integers(-(2**31), 2**31, n).astype(np.int32)
        for block in (64, 256):
            _, parts = run(loaded, f"unrolled_{block}", 3, block, x, Empty(3, np.int32), n)
            assert parts.sum(dtype=np.int32) == x.sum(dtype=np.int32)


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_shuffles_then_atomics(target: str) -> None:
    loaded = module("reductions", target)
    for n in SIZES:
        for kind, dtype, unit in (("float", np.float32, F32), ("double", np.float64, F64)):
            x = np.random.default_rng(n).standard_normal(n).astype(dtype)
            for seed, block in ((0, 32), (1, 96), (2, 256)):
                start = np.zeros(1, dtype)
                name = f"shuffle_sum_{kind}"
                _, out = run(loaded, name, 3, block, x, start, n, seed=seed)
                close(out[0], x.astype(np.longdouble).sum(), x, unit)


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_compare_and_swap_loops(target: str) -> None:
    x = np.random.default_rng(1).integers(-1000, 1000, 333).astype(np.float64)
    for seed, values in enumerate((x, -np.abs(x) - 1)):
        start = np.array([-np.inf], np.float32)
        _, total, most = run(
            module("reductions", target), "cas_sum_double", 3, 128, values, np.zeros(1), start, 333,
            seed=seed,
        )  # fmt: skip
        assert total[0] == values.sum()  # integers: exact in any order
        assert most[0] == values.max()


@pytest.mark.parametrize("target", cuda.TARGETS)
@pytest.mark.parametrize("n", SIZES)
def test_redux(target: str, n: int) -> None:
    x = np.random.default_rng(n).integers(-(2**31), 2**31, n).astype(np.int32)
    grid = -(-n // 96)
    rows = -(-n // 32)
    _, out = run(module("reductions", target), "redux", grid, 96, x, Empty((rows, 7), np.int32), n)
    for row, part in zip(out, np.split(x, range(32, n, 32)), strict=True):
        u = part.view(np.uint32)
        ands, ors, xors = (f.reduce(u) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor))
        assert row[:3].tolist() == [part.sum(dtype=np.int32), part.min(), part.max()]
        assert row[3:].view(np.uint32).tolist() == [u.min(), ands, ors, xors]


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_half2(target: str) -> None:
    for n8 in SIZES:
        x = np.random.default_rng(n8).integers(-3, 4, (n8, 8)).astype(np.float16)
        # Sums of these integers stay below 2048, so every half addition is exact.
        _, out = run(module("reductions", target), "half2_sum", 1, 64, x, Empty(2), n8)
        assert out.sum() == x.sum(dtype=np.float64)


@pytest.mark.parametrize("target", cuda.TARGETS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_last_block_done(target: str, seed: int) -> None:
    n = 1000
    x = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    for grid, waves in ((1, None), (7, None), (7, 3)):
        results = run(
            module("reductions", target), "last_block", grid, 64,
            x, Empty(grid), np.zeros(1, np.uint32), Empty(1), n, seed=seed, wave_blocks=waves,
        )  # fmt: skip
        close(results[3][0], x.astype(np.float64).sum(), x, F32)
        assert results[2][0] == 0  # atomicInc wraps to zero for the next launch


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_moments(target: str) -> None:
    for n in SIZES:
        x = (5 + np.random.default_rng(n).standard_normal(n)).astype(np.float32)
        _, out = run(module("reductions", target), "moments", 1, 128, x, Empty(2), n)
        # About log2(n) + n / 128 joins of a few roundings each, of numbers below 10.
        np.testing.assert_allclose(
            out, [x.mean(dtype=np.float64), x.var(dtype=np.float64)], rtol=100 * F32, atol=100 * F32
        )


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_argmax(target: str) -> None:
    for n in SIZES:
        x = np.random.default_rng(n).integers(-9, 9, n).astype(np.float32)
        _, out = run(module("reductions", target), "argmax", 1, 128, x, Empty(1, np.int32), n)
        assert out[0] == x.argmax()
