from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import mpmath
import numpy as np
import pytest

from cumla.sim.isa.table import Unsupported
from sim import ops
from sim.reference import edges, random_bits

INF, NAN = math.inf, math.nan
EXACT: dict[str, Callable[..., Any]] = {
    "rcp": lambda x: 1 / x,
    "sqrt": mpmath.sqrt,
    "rsqrt": lambda x: 1 / mpmath.sqrt(x),
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "lg2": lambda x: mpmath.log(x, 2),
    "ex2": lambda x: mpmath.power(2, x),
    "tanh": mpmath.tanh,
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def run(name: str, *operands: Any) -> Any:
    """Results of an instruction on values."""
    op = ops.op(name)
    kind = name.split(".")[-1]
    assert op.sources == (kind,) * len(operands)
    kept = [x.tobytes() for x in operands]
    result = op.run(*operands)
    assert [x.tobytes() for x in operands] == kept  # registers share arrays
    assert result.dtype == operands[0].dtype
    return result


def single(*numbers: float) -> Any:
    return np.array(numbers, np.float32)


def worst(got: Any, exact: list[Any], relative: bool) -> float:
    """The greatest error: relative, or absolute."""
    errors = (
        abs(mpmath.mpf(float(x)) - y) / (abs(y) if relative else 1)
        for x, y in zip(got, exact, strict=True)
    )
    return float(max(errors))


def normals(count: int, seed: int, low: int, high: int) -> Any:
    """f32 with exponents from low to high."""
    rng = np.random.default_rng(seed)
    size = np.ldexp(rng.uniform(1, 2, count), rng.integers(low, high + 1, count))
    return size.astype(np.float32)


# PTX ISA allows 1 ulp (up to 2**-23) for rcp, 2**-23 for sqrt, 2**-22.9 for rsqrt, 2**-22 for lg2
# (absolute in (0.5, 2)), 2 ulp for ex2 and 2**-11 for tanh.
@pytest.mark.parametrize(
    ("name", "inputs", "bound"),
    [
        ("rcp", normals(500, 1, -126, 125), 2.0**-24),
        ("sqrt", normals(500, 2, -126, 127), 2.0**-24),
        ("rsqrt", normals(500, 3, -126, 127), 2.0**-22.9),
        ("lg2", normals(500, 4, -126, 127), 2.0**-22),
        ("lg2", normals(500, 5, -1, 0), 2.0**-22),
        ("ex2", np.linspace(-125.9, 127.9, 500, dtype=np.float32), 2.0**-22),
        ("tanh", normals(500, 6, -30, 4), 2.0**-21),
    ],
)
@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_relative_error(name: str, inputs: Any, bound: float, ftz: str) -> None:
    if name == "tanh" and ftz:
        with pytest.raises(Unsupported):
            ops.op("tanh.approx.ftz.f32")
        return
    exact = [EXACT[name](mpmath.mpf(float(x))) for x in inputs]
    assert worst(run(f"{name}.approx{ftz}.f32", inputs), exact, True) <= bound


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_absolute_error_of_sine(name: str) -> None:
    near = np.linspace(-2 * math.pi, 2 * math.pi, 500, dtype=np.float32)
    far = np.linspace(-100 * math.pi, 100 * math.pi, 501, dtype=np.float32)
    for inputs in (near, far):  # PTX ISA allows 2**-20.5 and 2**-14.7
        exact = [EXACT[name](mpmath.mpf(float(x))) for x in inputs]
        assert worst(run(f"{name}.approx.f32", inputs), exact, False) <= 2.0**-23


def test_division() -> None:
    a, b = normals(500, 7, -60, 60), normals(500, 8, -60, 60)
    exact = [mpmath.mpf(float(x)) / float(y) for x, y in zip(a, b, strict=True)]
    assert worst(run("div.full.f32", a, b), exact, True) <= 2.0**-24
    assert worst(run("div.approx.f32", a, b), exact, True) <= 2.0**-23
    assert worst(run("div.approx.ftz.f32", a, b), exact, True) <= 2.0**-23


def check(name: str, *table: tuple[float, float]) -> None:
    """Operands and results, by their bits; NaN is canonical."""
    got = run(name, single(*(operand for operand, _ in table)))
    want = single(*(result for _, result in table))
    want.view(np.uint32)[np.isnan(want)] = 0x7FFFFFFF
    assert got.view(np.uint32).tolist() == want.view(np.uint32).tolist()


SUBNORMAL, LEAST = 2.0**-130, 2.0**-149


def test_tables_of_special_values() -> None:
    """PTX ISA, the tables of each instruction."""
    zeros = ((-0.0, -0.0), (0.0, 0.0), (NAN, NAN))
    check("rcp.approx.f32", (-INF, -0.0), (-0.0, -INF), (0.0, INF), (INF, 0.0), (NAN, NAN))
    check("rcp.approx.f32", (2.0**127, 2.0**-127), (-SUBNORMAL, -INF), (2.0**-128, INF))
    check("rcp.approx.ftz.f32", (2.0**127, 0.0), (-SUBNORMAL, -INF), (SUBNORMAL, INF), (-INF, -0.0))
    check("sqrt.approx.f32", (-INF, NAN), (-1.0, NAN), *zeros, (INF, INF), (LEAST * 2, 2.0**-74))
    check("sqrt.approx.ftz.f32", (-SUBNORMAL, -0.0), (SUBNORMAL, 0.0), (-1.0, NAN))
    check(
        "rsqrt.approx.f32",
        (-INF, NAN),
        (-1.0, NAN),
        (-0.0, -INF),
        (0.0, INF),
        (INF, 0.0),
        (NAN, NAN),
    )
    check("rsqrt.approx.f32", (2.0**-148, 2.0**74), (-SUBNORMAL, NAN))
    check("rsqrt.approx.ftz.f32", (-SUBNORMAL, -INF), (SUBNORMAL, INF))
    check("sin.approx.f32", (-INF, NAN), *zeros, (INF, NAN), (SUBNORMAL, SUBNORMAL))
    check("sin.approx.ftz.f32", (-SUBNORMAL, -0.0), (SUBNORMAL, 0.0))
    check(
        "cos.approx.f32", (-INF, NAN), (-0.0, 1.0), (0.0, 1.0), (INF, NAN), (NAN, NAN), (LEAST, 1.0)
    )
    check(
        "lg2.approx.f32",
        (-INF, NAN),
        (-1.0, NAN),
        (-0.0, -INF),
        (0.0, -INF),
        (INF, INF),
        (NAN, NAN),
    )
    check("lg2.approx.f32", (LEAST, -149.0), (-SUBNORMAL, NAN), (1.0, 0.0), (0.125, -3.0))
    check("lg2.approx.ftz.f32", (-SUBNORMAL, -INF), (SUBNORMAL, -INF))
    check(
        "ex2.approx.f32", (-INF, 0.0), (-0.0, 1.0), (0.0, 1.0), (INF, INF), (NAN, NAN), (128.0, INF)
    )
    check("ex2.approx.f32", (-149.0, LEAST), (SUBNORMAL, 1.0), (-151.0, 0.0))
    check("ex2.approx.ftz.f32", (-SUBNORMAL, 1.0), (-127.0, 0.0), (-126.0, 2.0**-126))
    check("tanh.approx.f32", (-INF, -1.0), *zeros, (INF, 1.0), (-SUBNORMAL, -SUBNORMAL))


def test_division_by_large_numbers() -> None:
    """PTX ISA div: for 2**126 < |b| < 2**128, 0, or NaN if a is infinite."""
    a = single(1.0, -3.0, INF, -INF, 2.0**127, 1.0, -1.0, NAN)
    b = single(2.0**127, 1.5 * 2.0**126, 2.0**127, -(2.0**127), 2.0**126, INF, 0.0, 1.0)
    want = single(0.0, -0.0, NAN, NAN, 2.0, 0.0, -INF, NAN)
    want.view(np.uint32)[np.isnan(want)] = 0x7FFFFFFF
    for name in ("div.approx.f32", "div.approx.ftz.f32"):
        assert run(name, a, b).tobytes() == want.tobytes()
    full = run("div.full.f32", a[:5], b[:5])
    assert full.tolist() == [2.0**-127, -(2.0**-125), INF, INF, 2.0]
    assert run("div.full.ftz.f32", a[:2], b[:2]).tolist() == [0.0, -(2.0**-125)]


def test_gross_approximations_of_f64() -> None:
    """20 bits of mantissa, the low word ignored and zero."""
    rng = np.random.default_rng(9)
    a = np.ldexp(rng.uniform(1, 2, 500), rng.integers(-1000, 1000, 500))
    for name in ("rcp", "rsqrt"):
        got = run(f"{name}.approx.ftz.f64", a)
        assert not (got.view(np.uint64) & 0xFFFFFFFF).any()
        assert worst(got, [EXACT[name](mpmath.mpf(float(x))) for x in a], True) <= 2.0**-19
        other = (a.view(np.uint64) ^ np.uint64(0xFFFFFFFF)).view(np.float64)
        assert (run(f"{name}.approx.ftz.f64", other) == got).all()
    tiny = 2.0**-1030
    special = np.array([-INF, -tiny, -0.0, 0.0, tiny, INF, NAN, 2.0**1023, -(2.0**1022), -4.0])
    tables = {
        "rcp": [-0.0, -INF, -INF, INF, INF, 0.0, NAN, 0.0, -(2.0**-1022), -0.25],
        "rsqrt": [NAN, -INF, -INF, INF, INF, 0.0, NAN, 2.0**-511.5, NAN, NAN],
    }
    for name, table in tables.items():
        want = np.array(table).view(np.uint64)
        want[np.isnan(table)] = 0x7FFFFFFF << 32
        got = run(f"{name}.approx.ftz.f64", special).view(np.uint64)
        sure = np.array(table) != 2.0**-511.5
        assert got[sure].tolist() == want[sure].tolist()


def test_rsqrt_f64() -> None:
    rng = np.random.default_rng(10)
    a = np.ldexp(rng.uniform(1, 2, 300), rng.integers(-1074, 1000, 300))
    with mpmath.workprec(200):
        exact = [1 / mpmath.sqrt(mpmath.mpf(float(x))) for x in a]
        assert worst(run("rsqrt.approx.f64", a), exact, True) <= 2.0**-52
    special = run("rsqrt.approx.f64", np.array([-INF, -1.0, -0.0, 0.0, INF]))
    assert np.isnan(special[:2]).all()
    assert special[2:].tolist() == [-INF, INF, 0.0]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["ex2", "tanh"])
def test_every_half(name: str, kind: str) -> None:
    """All operands against the nearest value, computed in f64; a sample against mpmath."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    dtype = np.float16 if kind == "f16" else ml_dtypes.bfloat16
    flush = (name, kind) == ("ex2", "bf16")
    values = bits.view(dtype).astype(np.float64)
    if flush:
        values = np.where(np.abs(values) < 2.0**-126, 0.0, values)
    function = np.exp2 if name == "ex2" else np.tanh
    exact = function(values)
    want = exact.astype(dtype).view(np.uint16)
    if flush:
        want[np.abs(exact) < 2.0**-126] = 0
    want[np.isnan(values)] = 0x7FFF
    whole = f"{name}.approx{'.ftz' if flush else ''}.{kind}"
    operand = bits if kind == "bf16" else bits.view(np.float16)
    got = run(whole, operand).view(np.uint16)
    assert got.tolist() == want.tolist()
    for i in np.random.default_rng(11).choice(1 << 16, 300):
        if math.isfinite(values[i]) and 2.0**-14 < abs(exact[i]) < 60000:
            true = EXACT[name](mpmath.mpf(float(values[i])))
            half_ulp = 2.0**-11 if kind == "f16" else 2.0**-8
            assert abs(float(got[i : i + 1].view(dtype)[0]) - true) <= half_ulp * abs(true) * 1.001
    high = np.roll(bits, 5)
    packed = run(whole + "x2", bits.astype(np.uint32) | high.astype(np.uint32) << 16)
    assert (packed & 0xFFFF == want).all()
    assert (packed >> 16 == np.roll(want, 5)).all()


@pytest.mark.parametrize("name", ["rcp.approx", "sqrt.approx", "ex2.approx", "lg2.approx"])
def test_ftz_equals_flushing_by_hand(name: str) -> None:
    bits = np.concatenate([np.array(edges("f32"), np.uint32), random_bits("f32", 500, 12)])

    def flush(x: Any) -> Any:
        return np.where(x & 0x7F800000 == 0, x & np.uint32(1 << 31), x)

    got = run(f"{name}.ftz.f32", bits.view(np.float32)).view(np.uint32)
    want = flush(run(f"{name}.f32", flush(bits).view(np.float32)).view(np.uint32))
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize(
    "name",
    [
        "sin.f32",
        "ex2.ftz.f32",
        "rsqrt.rn.f32",
        "rcp.approx.f64",
        "sqrt.approx.f64",
        "ex2.approx.bf16",
        "ex2.approx.ftz.f16",
        "tanh.f16",
        "tanh.approx.ftz.bf16",
    ],
)
def test_forms_that_ptx_does_not_have(name: str) -> None:
    with pytest.raises(Unsupported):
        ops.op(name)
