"""Transposes, copies, histograms, stencils and convolutions of CUDA C against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from sim import cuda
from sim.kernel_files import DELIVERIES, SIZES, Empty, module, run

SHAPES = ((1, 1), (31, 33), (33, 64), (70, 1), (100, 65))


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_transposes(target: str) -> None:
    loaded = module("tiles", target)
    for rows, columns in SHAPES:
        x = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
        grid = (-(-columns // 32), -(-rows // 32))
        args = (x, Empty((columns, rows)), rows, columns)
        _, out = run(loaded, "transpose", grid, (32, 8), *args, seed=rows)
        assert np.array_equal(out, x.T)
    for n in (1, 31, 33):
        x = np.arange(n * n, dtype=np.int16).reshape(n, n)
        (out,) = run(loaded, "transpose_in_place", (-(-n // 16),) * 2, (16, 16), x, n, seed=n)
        assert np.array_equal(out, x.T)
    x = np.arange(8 * 64, dtype=np.int32).reshape(8, 8, 8)
    _, out = run(loaded, "transpose_shuffled", 1, 64, x, Empty(x.shape, np.int32))
    assert np.array_equal(out, x.transpose(0, 2, 1))


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_vector_copies(target: str) -> None:
    for kind, dtype in (
        ("int4", np.int32), ("float2", np.float32), ("double2", np.float64),
        ("uchar4", np.uint8), ("short4", np.int16),
    ):  # fmt: skip
        for n in SIZES:
            x = np.random.default_rng(n).integers(0, 200, n).astype(dtype)
            _, out = run(module("tiles", target), f"copy_{kind}", 3, 96, x, Empty(n, dtype), n)
            assert np.array_equal(out, x)


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_loads_with_hints(target: str) -> None:
    x = np.random.default_rng(0).standard_normal((33, 4)).astype(np.float32)
    _, out = run(module("tiles", target), "copy_hinted", 2, 32, x, Empty((33, 4)), 33)
    expected = [x[:, 0] + x[:, 1], x[:, 2] - x[:, 3], x[:, 0] * x[:, 1], x[:, 2]]
    assert np.array_equal(out, np.stack(expected, axis=1))


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_arrays_of_structs(target: str) -> None:
    fields = [("x", "f4"), ("y", "f4"), ("z", "f4"), ("id", "i4"), ("kind", "i2"), ("alive", "?"),
              ("mass", "f8")]  # fmt: skip
    for n in SIZES:
        random = np.random.default_rng(n)
        p = np.zeros(n, np.dtype(fields, align=True))
        for name, _ in fields:
            p[name] = random.integers(0, 2 if name == "alive" else 100, n)
        out = run(
            module("tiles", target), "unzip", -(-n // 96), 96,
            p.view(np.uint8), Empty((3, n)), Empty(n, np.float64), Empty(n, np.int32), n,
        )  # fmt: skip
        assert np.array_equal(out[1], [p["x"], p["y"], p["z"]])
        assert np.array_equal(out[2], p["mass"])
        assert np.array_equal(out[3], np.where(p["alive"], p["id"] * 8 + p["kind"], -1))


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_histograms(target: str) -> None:
    loaded = module("tiles", target)
    for n in SIZES:
        x = (np.random.default_rng(n).standard_normal(n) * 30).astype(np.int64).astype(np.uint8)
        words = np.pad(x, (0, -n % 4)).view(np.uint32)
        args = (words, words.size, n, np.zeros(256, np.uint32))
        _, counts = run(loaded, "histogram", 2, 128, *args, seed=n)
        assert np.array_equal(counts, np.bincount(x, minlength=256))
        _, counts = run(loaded, "histogram_packed", 1, 32, x, n, Empty(64, np.uint32))
        assert np.array_equal(counts, np.bincount(x >> 2, minlength=64))


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_game_of_life(target: str) -> None:
    for rows, columns in ((16, 32), (33, 45)):
        now = np.random.default_rng(rows).integers(0, 2, (rows, columns)).astype(np.uint8)
        grid = (-(-columns // 32), -(-rows // 16))
        for generation in range(3):
            _, out = run(
                module("tiles", target), "life", grid, (32, 8),
                now, Empty(now.shape, np.uint8), rows, columns, seed=generation,
            )  # fmt: skip
            shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
            around = sum(np.roll(now, shift, (0, 1)) for shift in shifts)
            now = ((around == 3) | ((around == 2) & (now == 1))).astype(np.uint8)
            assert np.array_equal(out, now)


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_stencil_in_three_dimensions(target: str) -> None:
    for nx, ny, nz in ((1, 1, 1), (33, 10, 4), (16, 8, 7)):
        x = np.random.default_rng(nx).integers(-50, 50, (nz, ny, nx)).astype(np.float32)
        grid = (-(-nx // 16), -(-ny // 8))
        args = (x, Empty(x.shape), nx, ny, nz)
        _, out = run(module("tiles", target), "stencil", grid, (16, 8), *args)
        wide = np.pad(x, 1)
        expected = -6 * x
        for axis in range(3):
            for step in (-1, 1):
                expected += np.roll(wide, step, axis)[1:-1, 1:-1, 1:-1]
        assert np.array_equal(out, expected)  # small integers: exact


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_convolution_with_constant_weights(target: str) -> None:
    taps = np.array([0.5, -1, 0.25, 2, 3, -0.125, 1.5, 0.75, -2])
    for n in SIZES:
        x = np.random.default_rng(n).integers(-99, 99, n).astype(np.float32)
        _, out = run(module("tiles", target), "convolve4", -(-n // 64), 64, x, Empty(n), n)
        assert np.array_equal(out, np.correlate(np.pad(x, 4), taps, "valid"))  # eighths: exact


@pytest.mark.parametrize("target", cuda.TARGETS)
@pytest.mark.parametrize("delivery", DELIVERIES)
def test_prefetch_ring(target: str, delivery: str) -> None:
    for rows, width in ((1, 96), (2, 33), (9, 70)):
        x = np.random.default_rng(rows).integers(0, 1000, (rows, width)).astype(np.int32)
        args = (x, Empty(x.shape, np.int32), rows, width)
        for seed in (0, 1):
            _, out = run(
                module("tiles", target), "prefetch_ring", 1, 96, *args, delivery=delivery, seed=seed
            )
            wide = np.pad(x, ((0, 0), (1, 1)))
            assert np.array_equal(out, 10 * x + wide[:, :-2] - wide[:, 2:])
