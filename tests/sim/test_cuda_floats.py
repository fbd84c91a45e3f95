"""Floating-point kernels of CUDA C against NumPy; bounds are of CUDA's guide or of rounding."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import ml_dtypes
import mpmath as mp
import numpy as np
import pytest

from sim import cuda
from sim.kernel_files import SIZES, Empty, module, run

targets = pytest.mark.parametrize("target", cuda.TARGETS)
F32 = 2.0**-23  # an ulp at 1
F64 = 2.0**-52


@targets
def test_mandelbrot(target: str) -> None:
    width, height, most = 45, 33, 40
    args = (Empty((height, width), np.int32), width, height, most)
    (out,) = run(module("floats", target), "mandelbrot", (3, 5), (16, 8), *args)
    f = np.float32
    # The compiler contracts the first lines of the kernel: a fused multiply-add of a quotient.
    x, y = np.arange(width, dtype=f), np.arange(height, dtype=f)
    cr = f(-2) + f(3) * x / f(width)
    ci = (f(-1.25) + f(2.5) * y / f(height))[:, None]
    r = i = np.zeros((height, width), f)
    n = np.zeros((height, width), np.int32)
    for _ in range(most):
        inside = r * r + i * i <= 4
        n += inside
        r, i = (
            np.where(inside, r * r - i * i + cr, r),
            np.where(inside, f(2) * r * i + ci, i),
        )
    assert np.array_equal(out, n)
    assert len(np.unique(n)) > 10


@targets
def test_bodies(target: str) -> None:
    for n in (1, 31, 100):
        at = np.random.default_rng(n).standard_normal((n, 4)).astype(np.float32)
        at[:, 3] = np.abs(at[:, 3])
        args = (at, Empty((n, 4)), n)
        _, out = run(module("floats", target), "bodies", -(-n // 64), 64, *args)
        p = at.astype(np.float64)
        d = p[None, :, :3] - p[:, None, :3]
        terms = d * (p[:, 3] * ((d**2).sum(2) + 0.01) ** -1.5)[..., None]
        # A term has about ten roundings (rsqrtf: 2 ulp, cubed), a sum n more.
        bound = (n + 20) * F32 * np.abs(terms).sum(1)
        assert (np.abs(out[:, :3] - terms.sum(1)) <= bound).all()
        length = np.linalg.norm(out[:, :3].astype(np.float64), axis=1)
        np.testing.assert_allclose(out[:, 3], length, rtol=4 * F32)


def doubles(n: int, largest: float) -> Any:
    random = np.random.default_rng(n)
    x = random.standard_normal(n) * 10.0 ** random.uniform(-5, math.log10(largest), n)
    return np.where(x == 0, 1.0, x)


def by(x: float) -> Any:
    """Division by a constant, as the kernels do before they call."""
    return lambda v: v / v.dtype.type(x)


def size(v: Any) -> Any:
    return np.abs(v) + v.dtype.type(1e-300 if v.dtype == np.float64 else 1e-30)


# The function; its argument made from x in the kernel's precision; its definition; and the most
# ulps between result and rounded definition by the CUDA C Programming Guide "Mathematical
# Functions", for doubles and for floats (None: not in the kernel).
FUNCTIONS: list[tuple[str, Any, Any, int | None, int | None]] = [
    ("sin", None, mp.sin, 2, 2), ("cos", None, mp.cos, 2, 2), ("exp", by(100), mp.exp, 1, 2),
    ("log", size, mp.log, 1, 1), ("sqrt", size, mp.sqrt, 0, 0),
    ("rsqrt", size, lambda v: 1 / mp.sqrt(v), 1, 2),
    ("cbrt", None, lambda v: mp.sign(v) * mp.cbrt(abs(v)), 1, 1), ("atan", None, mp.atan, 2, 2),
    ("tanh", by(50), mp.tanh, 1, 2), ("erf", by(100), mp.erf, 2, 2),
    ("reciprocal", None, lambda v: 1 / v, 0, 0), ("pow", size, None, 2, 4),
    ("fmod", None, None, 0, 0), ("hypot", None, lambda v: mp.hypot(v, 2.5), 2, 3),
    ("floor", None, mp.floor, 0, None), ("tan", None, mp.tan, None, 4),
    ("expm1", by(1000), mp.expm1, 1, 1), ("log1p", size, mp.log1p, 1, 1),
    ("asinh", None, mp.asinh, 3, 3),
    ("tgamma", lambda v: np.fmod(size(v), 20) + 0.5, mp.gamma, 10, None),
    ("lgamma", lambda v: size(v) + 0.1, mp.loggamma, 4, None),
    ("atan2", None, lambda v: mp.atan2(v, 3), None, 3), ("sinpi", None, mp.sinpi, 2, None),
    ("exp2", by(100), lambda v: mp.mpf(2) ** v, 1, 2),
    ("log2", size, lambda v: mp.log(v, 2), 1, 1),
    ("acos", lambda v: v / (size(v) + 1), mp.acos, None, 2),
    ("sinpi", None, mp.sinpi, None, 1),
]  # fmt: skip


@np.errstate(all="ignore")
def check_functions(x: Any, out: Any, which: int) -> None:
    """Each column of out against the function of x."""
    kind = x.dtype.type
    wanted = [f for f in FUNCTIONS if f[3 + which] is not None]
    for column, (name, argument, definition, *ulps) in zip(out.T, wanted, strict=True):
        of = x if argument is None else argument(x)
        if name == "pow":
            definition = partial(mp_power, y=float(kind(0.3)))
        if name == "fmod":
            expected = np.fmod(of, kind(3.7))
        else:
            with mp.workdps(40 if name not in ("sin", "cos", "tan") else 340):
                rounded = [float(definition(mp.mpf(float(v)))) for v in of]
            expected = np.array(rounded).astype(kind)
        bound = ulps[which] * np.spacing(np.abs(expected)).astype(np.float64)
        same = column == expected  # infinities too
        error = np.abs(column.astype(np.float64) - expected)
        assert (same | (error <= bound)).all(), (name, x[~(same | (error <= bound))])


def mp_power(v: Any, y: float) -> Any:
    return v ** mp.mpf(y)


@targets
def test_functions_in_double(target: str) -> None:
    n = 64
    x = doubles(n, 1e4)
    x[:6] = [1e15, -3e22, 1e300, 2.0**53 * math.pi, 710, -1e5]  # Payne and Hanek's reduction
    _, out = run(module("floats", target), "functions", 1, 64, x, Empty((n, 23), np.float64), n)
    check_functions(x, out, 0)


@targets
def test_functions_in_float(target: str) -> None:
    n = 64
    x = doubles(n, 1e4).astype(np.float32)
    x[:4] = [1e10, -3e22, 1e38, 105615]
    args = (x, Empty((n, 23)), n)
    _, out = run(module("floats", target), "functionsf", 1, 64, *args)
    check_functions(x, out, 1)


@targets
def test_intrinsics(target: str) -> None:
    n = 100
    x = np.random.default_rng(0).uniform(-3, 3, n).astype(np.float32)
    _, out = run(module("floats", target), "fast_functions", 1, 128, x, Empty((n, 12)), n)
    v = x.astype(np.float64)
    q = (np.abs(x) + np.float32(0.01)).astype(np.float64)
    root = np.sqrt(q).astype(np.float32)
    down = np.where(root.astype(np.float64) ** 2 > q, np.nextafter(root, np.float32(0)), root)
    # CUDA C Programming Guide "Intrinsic Functions": errors of these, absolute or in ulps.
    expected = [
        (np.sin(v), 2.0**-21.41), (np.cos(v), 2.0**-21.19),
        (np.exp(v), (2 + 1.173 * 3) * F32 * np.exp(v)),
        (np.log(q), 2.0**-21.41 + 4 * F32 * np.abs(np.log(q))), (v / (q + 1), 3 * F32),
        (q**1.5, 2.0**-19 * (1 + q**1.5)), ((1 / np.sqrt(q)).astype(np.float32), 0),
        ((1 / q).astype(np.float32), 0), (down, 0), (np.clip(x, 0, 1), 0),
        (np.log2(q), 2.0**-21 + 2 * F32 * np.abs(np.log2(q))), (10**v, 4 * F32 * 10**v),
    ]  # fmt: skip
    for number, (column, (value, bound)) in enumerate(zip(out.T, expected, strict=True)):
        assert (np.abs(column - value) <= bound).all(), number


@targets
def test_simpson(target: str) -> None:
    n = 400
    (out,) = run(module("floats", target), "integrals", 3, 32, Empty(3, np.float64), n)
    for got, f, a, b in zip(
        out,
        (lambda x: np.exp(-x * x) * np.cos(20 * x), lambda x: np.sin(1e6 + x) * x,
         lambda x: np.sqrt(1 + x**3)),
        (-4, 0, 0), (4, 3, 2), strict=True,
    ):  # fmt: skip
        x = np.linspace(a, b, n + 1)
        weights = np.where(np.arange(n + 1) % 2, 4.0, 2.0)
        weights[[0, -1]] = 1
        terms = f(x) * weights * ((b - a) / n / 3)
        # Rounding of sums, and of x by half an ulp of 1e6 where sin takes it.
        assert abs(got - terms.sum()) <= 20 * F64 * np.abs(terms).sum() + 2e-10 * (b == 3)


@targets
def test_kahan_sums(target: str) -> None:
    for rows, columns in ((1, 1), (33, 100)):
        x = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
        args = (x, Empty(rows), rows, columns)
        _, out = run(module("floats", target), "kahan", -(-rows // 32), 32, *args)
        total = lost = np.zeros(rows, np.float32)
        for column in x.T:
            y = column - lost
            t = total + y
            lost, total = (t - total) - y, t
        assert np.array_equal(out, total)


@targets
def test_fourier(target: str) -> None:
    x = np.random.default_rng(0).standard_normal((3, 256, 2)).astype(np.float32)
    _, out = run(module("floats", target), "fft", 3, 128, x, Empty(x.shape))
    expected = np.fft.fft(x[..., 0].astype(np.float64) + 1j * x[..., 1], axis=1)
    error = np.abs(out[..., 0] + 1j * out[..., 1] - expected)
    # Eight stages, each of a few roundings of values whose norm is the signal's.
    assert (error <= 8 * 4 * F32 * np.linalg.norm(x, axis=(1, 2))[:, None]).all()


@targets
def test_cholesky(target: str) -> None:
    for n in (1, 17, 33):
        a = np.random.default_rng(n).standard_normal((2, n, n))
        a = a @ a.transpose(0, 2, 1) + n * np.eye(n)
        (out,) = run(module("floats", target), "cholesky", 2, 64, a, n, shared_bytes=8 * n * n)
        # Backward stable: Higham, "Accuracy and Stability", theorem 10.3.
        bound = (n + 1) * F64 * np.einsum("bij,bkj->bik", np.abs(out), np.abs(out))
        assert (np.abs(out @ out.transpose(0, 2, 1) - a) <= bound).all()
        assert (np.triu(out, 1) == 0).all()


@targets
def test_sparse_products(target: str) -> None:
    loaded = module("floats", target)
    for rows in SIZES[:3]:
        random = np.random.default_rng(rows)
        lengths = random.integers(0, 50, rows)
        starts = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        n = int(starts[-1])
        columns = random.integers(0, 40, max(n, 1)).astype(np.int32)
        values, x = (random.integers(-9, 9, k).astype(np.float32) for k in (max(n, 1), 40))
        owners = np.repeat(np.arange(rows, dtype=np.int32), lengths)
        expected = np.zeros(rows)
        np.add.at(expected, owners, (values * x[columns])[:n])
        grid = -(-rows * 32 // 96)
        args = (starts, columns, values, x, Empty(rows), rows)
        assert np.array_equal(run(loaded, "spmv_rows", grid, 96, *args)[4], expected)
        if n:
            args = (owners, columns, values, x, np.zeros(rows, np.float32), n)
            out = run(loaded, "spmv_entries", -(-n // 64), 64, *args, seed=rows)[4]
            assert np.array_equal(out, expected)  # integers: exact in any order


@targets
def test_shortest_paths(target: str) -> None:
    n = 20
    d = np.random.default_rng(0).integers(1, 100, (n, n)).astype(np.float32)
    np.fill_diagonal(d, 0)
    expected = d.copy()
    for k in range(n):
        (d,) = run(module("floats", target), "shortest_paths", (2, 2), (16, 16), d, n, k)
        expected = np.minimum(expected, expected[:, k : k + 1] + expected[k])
    assert np.array_equal(d, expected)


@targets
def test_halves(target: str) -> None:
    loaded = module("floats", target)
    for n in SIZES[:3]:
        random = np.random.default_rng(n)
        a, b = ((random.standard_normal(n) * 300).astype(np.float16) for _ in range(2))
        _, _, out = run(loaded, "halves", 1, 64, a, b, Empty((5, n), np.float16), n)
        x, y = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(over="ignore"):
            # Doubles hold these exactly, so casting rounds once.
            expected = np.array([x + y, x * y, x * y + x, np.minimum(x, y)]).astype(np.float16)
            assert np.array_equal(out[:4].view(np.uint16), expected.view(np.uint16))
            fused = (x * y + 1).astype(np.float32).astype(np.float16)
        assert np.array_equal(out[4].view(np.uint16), fused.view(np.uint16))
        y0 = np.append(b, np.float16(0))[: n + n % 2]
        x0 = np.append(a, np.float16(0))[: n + n % 2]
        scale = np.float16(1.5)
        args = (scale.view(np.uint16), x0.view(np.uint32), y0.view(np.uint32), n)
        out = run(loaded, "axpy_half2", 1, 64, *args)[1].view(np.float16)[:n]
        assert np.array_equal(out, (1.5 * x + y).astype(np.float16))


@targets
def test_bfloats(target: str) -> None:
    bf16 = ml_dtypes.bfloat16
    for n in SIZES[:3]:
        random = np.random.default_rng(n)
        a, b = ((random.standard_normal(n) * 300).astype(bf16) for _ in range(2))
        x = random.standard_normal(n).astype(np.float32)
        out = run(
            module("floats", target), "bfloats", 1, 64, a.view(np.uint16), b.view(np.uint16), x,
            Empty((3, n), np.uint16), Empty(n, np.uint32), n,
        )  # fmt: skip
        va, vb = a.astype(np.float64), b.astype(np.float64)
        f = np.float32
        # A product of bfloat16 plus another fits a double; casts to bfloat16 go through float,
        # which may round twice, so these are rounded by the definition: to 8 bits, ties to even.
        expected = [once(va * vb + va), x.astype(bf16), (a.astype(f) / b.astype(f)).astype(bf16)]
        assert np.array_equal(out[3], np.array([e.view(np.uint16) for e in expected]))
        pair = x.astype(bf16).view(np.uint16).astype(np.uint32) << 16 | b.view(np.uint16)
        assert np.array_equal(out[4], pair)


def once(x: Any) -> Any:
    """Doubles, of normal size, rounded to bfloat16 once."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256), exponent - 8).astype(ml_dtypes.bfloat16)
