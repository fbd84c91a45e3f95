from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cumla.sim.isa.table import Unsupported
from sim import ops
from sim.reference import MODES, edges, expected, pairs, random_bits, ties, triples, values

SIGN = np.uint64(1 << 63)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def run(name: str, *bits: Any) -> Any:
    """Result bits of an instruction on operand bits."""
    op = ops.op(name)
    assert op.sources == ("f64",) * len(bits)
    assert op.results == ("f64",)
    sources = [np.atleast_1d(x).view(np.float64) for x in bits]
    kept = [x.tobytes() for x in sources]
    result = op.run(*sources)
    assert [x.tobytes() for x in sources] == kept  # registers share arrays
    assert result.dtype == np.float64
    return result.view(np.uint64)


def double(*numbers: float) -> Any:
    return np.array(numbers, np.float64).view(np.uint64)


def same(got: Any, want: Any, *operands: Any) -> None:
    """Equal bits, but that the bits of a NaN are free."""
    nan = np.isnan(want.view(np.float64))
    wrong = np.flatnonzero((got != want) & ~(nan & np.isnan(got.view(np.float64))))
    assert got.shape == want.shape
    if wrong.size:
        i = wrong[0]
        shown = [f"{int(x[i]):#x}" for x in operands]
        pytest.fail(f"{wrong.size} wrong, {shown} gives {got[i]:#x}, not {want[i]:#x}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_two_operands(name: str, mode: str) -> None:
    a, b = pairs("f64", 600, 1)
    want = expected(name, "f64", mode, a, b)
    same(run(f"{name}.{mode}.f64", a, b), want, a, b)
    if mode == "rn" and name != "div":
        same(run(f"{name}.f64", a, b), want, a, b)


@pytest.mark.parametrize("mode", MODES)
def test_one_operand(mode: str) -> None:
    a = np.concatenate([np.array(edges("f64"), np.uint64), random_bits("f64", 500, 2)])
    squares = random_bits("f64", 100, 3).view(np.float64) ** 2  # roots near a number
    roots = np.ldexp(np.arange(2**26 - 9, 2**26 - 1, dtype=np.float64), -530)
    close = [np.nextafter(roots**2, x) for x in (-1, 1)]  # and next to a square, tiny
    a = np.concatenate([a, *(x.view(np.uint64) for x in (squares, roots**2, *close))])
    for name in ("rcp", "sqrt"):
        same(run(f"{name}.{mode}.f64", a), expected(name, "f64", mode, a), a)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["fma", "mad"])
def test_fma(name: str, mode: str) -> None:
    operands = triples("f64", 500, 4)
    same(run(f"{name}.{mode}.f64", *operands), expected("fma", "f64", mode, *operands), *operands)


def test_fma_near_ties() -> None:
    operands = ties("f64", 300, 5)
    a, b, c = (x.view(np.float64) for x in operands)
    want = expected("fma", "f64", "rn", *operands)
    assert np.count_nonzero((a * b + c).view(np.uint64) != want) > 200  # the data tells
    for mode in MODES:
        want = expected("fma", "f64", mode, *operands)
        same(run(f"fma.{mode}.f64", *operands), want, *operands)


def test_fma_at_the_ends_of_the_range() -> None:
    rng = np.random.default_rng(6)
    a, b, c = (random_bits("f64", 1500, 7 + i).view(np.float64) for i in range(3))
    size = rng.choice([-1074, -1022, -970, -900, 990, 1023], 1500)
    part = rng.integers(-600, 600, 1500)
    a = np.ldexp(np.frexp(a)[0], part)
    b = np.ldexp(np.frexp(b)[0], size - part + rng.integers(-3, 4, 1500))
    c = np.ldexp(np.frexp(c)[0], size + rng.integers(-60, 60, 1500))
    c = np.where(rng.random(1500) < 0.3, -(a * b), c)
    operands = tuple(x.view(np.uint64) for x in (a, b, c))
    same(run("fma.rn.f64", *operands), expected("fma", "f64", "rn", *operands), *operands)
    # One safe lane beside one that is not, and one element for all lanes.
    for a, b, c in [(1e200, 1e200, -math.inf), (5e-324, 0.5, 5e-324), (0.0, 1.0, -0.0)]:
        x, y, z = double(a, 3.0), double(b), double(c)
        same(run("fma.rn.f64", x, y, z), expected("fma", "f64", "rn", x, [y[0]] * 2, [z[0]] * 2))


def test_fma_of_many_lanes() -> None:
    a, b, c = (x.view(np.float64) for x in triples("f64", 2000, 10))
    small = np.abs(a) < 1e100
    a, b, c = a[small], b[small], c[small]
    whole = run("fma.rn.f64", *(x.view(np.uint64) for x in (a, b, c)))
    for i in range(0, a.size, 1000):
        part = [x[i : i + 3].view(np.uint64) for x in (a, b, c)]
        same(whole[i : i + 3], expected("fma", "f64", "rn", *part), *part)


@pytest.mark.parametrize("name", ["min", "max"])
def test_min_max(name: str) -> None:
    a, b = pairs("f64", 300, 11)
    want = []
    for p, q, x, y in zip(a.tolist(), b.tolist(), values(a, "f64"), values(b, "f64"), strict=True):
        below = (x, -(p >> 63)) < (y, -(q >> 63))
        number = p if below == (name == "min") else q
        want.append(q if x != x else p if y != y else number)
    same(run(f"{name}.f64", a, b), np.array(want, np.uint64), a, b)


def test_sign_bits() -> None:
    a, b = pairs("f64", 100, 12)
    assert (run("abs.f64", a) == a & ~SIGN).all()
    assert (run("neg.f64", a) == a ^ SIGN).all()
    assert (run("copysign.f64", a, b) == a & SIGN | b & ~SIGN).all()


def test_nan_payload_passes_through() -> None:
    payload = np.array([0x7FF8000000001234], np.uint64)
    for name in ("add.f64", "mul.f64", "div.rn.f64"):
        assert run(name, payload, double(1.0)) == payload
    for operands in ((payload, double(2), double(3)), (double(2), double(3), payload)):
        assert run("fma.rn.f64", *operands) == payload


@pytest.mark.parametrize(
    "name", ["add.sat.f64", "fma.f64", "div.f64", "div.approx.f64", "add.ftz.f64", "sqrt.f64"]
)
def test_forms_that_ptx_does_not_have(name: str) -> None:
    with pytest.raises(Unsupported):
        ops.op(name)
