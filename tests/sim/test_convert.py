"""cvt among integers and floats, against exact arithmetic on Python's integers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cumla.sim.isa.rounding import DOT, LARGE
from cumla.sim.isa.table import DTYPES
from sim.ieee import FORMATS, as_double, assert_same, ends, rounded, wrapped
from sim.ops import run

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
MODES = ("rn", "rz", "rm", "rp")
INTEGRAL = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
ALL_16 = np.arange(1 << 16, dtype=np.uint16)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def assert_rounds(to: str, source: str, values: Any) -> None:
    """All four modes, of values that are arrays of the source's dtype."""
    exact = values.tolist() if source[0] in "us" else as_double(values, source).tolist()
    for mode in MODES:
        got = as_double(run(f"cvt.{mode}.{to}.{source}", values), to)
        assert_same(got, [rounded(value, to, mode) for value in exact])


def integers(kind: str) -> Any:
    """Integers about every power of two, about midpoints of every format, and random ones."""
    low, high = ends(kind)
    random = np.random.default_rng(3)
    found = {low, high}
    for power in range(65):
        for places in (0, 8, 9, 11, 12, 24, 25, 53, 54):
            step = 1 << max(0, power - places)
            for near in (-1, 0, 1):
                for count in (0, 1, 3, 5):
                    found.add((1 << power) + count * step + near)
                    found.add((1 << power) - count * step + near)
    found |= {-value for value in found}
    found |= {int(v) >> int(s) for v, s in random.integers(0, [1 << 63, 63], (200, 2))}
    return np.array(sorted(v for v in found if low <= v <= high), DTYPES[kind])


# Integers


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("to", INTEGERS)
def test_integer_to_integer(to: str, source: str) -> None:
    bits = int(source[1:])
    values = np.arange(1 << bits).astype(DTYPES[source]) if bits <= 16 else integers(source)
    got = run(f"cvt.{to}.{source}", values)
    assert got.dtype == DTYPES[to]
    assert got.tolist() == [wrapped(value, to) for value in values.tolist()]
    low, high = ends(to)
    got = run(f"cvt.sat.{to}.{source}", values)
    assert got.dtype == DTYPES[to]
    assert got.tolist() == [min(max(value, low), high) for value in values.tolist()]


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
def test_integer_to_float(to: str, source: str) -> None:
    values = integers(source)
    assert_rounds(to, source, values)
    got = run(f"cvt.rn.{to}.{source}", values)
    assert got.dtype == DTYPES[to]


@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s16"])
@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_all_small_integers_to_halves(to: str, source: str) -> None:
    assert_rounds(to, source, np.arange(1 << int(source[1:])).astype(DTYPES[source]))


def test_integer_to_float_sat_is_zero_or_one() -> None:
    values = np.array([-(2**31), -1, 0, 1, 2, 2**31 - 1], np.int32)
    for to in ("f16", "f32", "f64"):
        assert run(f"cvt.rn.sat.{to}.s32", values).tolist() == [0, 0, 0, 1, 1, 1]
    assert run("cvt.rn.ftz.f32.s32", values).tolist()[1:4] == [-1, 0, 1]


# Floats to integers


def clamped(value: float, to: str, source: str, mode: str) -> int:
    low, high = ends(to)
    if math.isnan(value):  # PTX ISA cvt, Integer Notes
        if source != "f64" and to not in ("s64", "u64"):
            return 0
        return low if to[0] == "s" else 2 ** (int(to[1:]) - 1)
    if math.isinf(value):
        return high if value > 0 else low
    return min(max(INTEGRAL[mode](value), low), high)


@pytest.mark.parametrize("mode", INTEGRAL)
@pytest.mark.parametrize("source", ["f16", "bf16"])
def test_all_halves_to_integers(source: str, mode: str) -> None:
    values = ALL_16.view(DTYPES[source])
    exact = as_double(values, source).tolist()
    # Rounded once; min and max are then the same as those in clamped.
    whole = [v if math.isnan(v) or math.isinf(v) else INTEGRAL[mode](v) for v in exact]
    for to in INTEGERS:
        low, high = ends(to)
        nan = clamped(math.nan, to, source, mode)
        expected = [nan if v != v else low if v < low else high if v > high else v for v in whole]
        got = run(f"cvt.{mode}.{to}.{source}", values)
        assert got.dtype == DTYPES[to]
        assert got.tolist() == expected, to


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_float_to_integer(source: str, to: str) -> None:
    dtype = DTYPES[source]
    centres = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 3.5, 100.5, 101.5, 2.0**22 + 0.5, 2.0**51 + 0.5]
    centres += [2.0**k + d for k in range(66) for d in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    centres += [math.inf, 1e30, np.finfo(dtype).smallest_subnormal]
    near = np.array(centres).astype(dtype)
    near = np.concatenate(
        [near, np.nextafter(near, dtype.type(0)), np.nextafter(near, dtype.type(np.inf))]
    )
    near = np.concatenate([near, -near, np.array([np.nan, -np.nan], dtype)])
    for mode in INTEGRAL:
        expected = [clamped(value, to, source, mode) for value in near.tolist()]
        assert run(f"cvt.{mode}.{to}.{source}", near).tolist() == expected
        assert run(f"cvt.{mode}.sat.{to}.{source}", near).tolist() == expected
        # Values in range go another way when nothing else is there.
        inside = np.array([v for v in near if ends(to)[0] <= v < 2.0 ** int(to[1:]) / 2 - 1], dtype)
        expected = [clamped(value, to, source, mode) for value in inside.tolist()]
        assert run(f"cvt.{mode}.{to}.{source}", inside).tolist() == expected


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("size", [1, 5, DOT + 1])
def test_one_value_out_of_range_among_others(size: int, to: str) -> None:
    """Whether all values are in range is found out in one of two ways, by their number."""
    beyond = 2.0 ** (int(to[1:]) - (to[0] == "s"))
    for edge in (beyond, -beyond, 1.25 * beyond, -1.25 * beyond, -1.0, math.nan):
        for source in ("f32", "f64"):
            values = np.full(size, 3, DTYPES[source])
            values[size // 2] = edge
            got = run(f"cvt.rni.{to}.{source}", values)
            assert got[size // 2] == clamped(edge, to, source, "rni")
            assert (np.delete(got, size // 2) == 3).all()


def test_ftz_before_rounding_to_an_integer() -> None:
    tiny = np.array([2.0**-127, -(2.0**-149), 2.0**-126, -(2.0**-126)], np.float32)
    assert run("cvt.rpi.s32.f32", tiny).tolist() == [1, 0, 1, 0]
    assert run("cvt.rpi.ftz.s32.f32", tiny).tolist() == [0, 0, 1, 0]
    assert run("cvt.rmi.s32.f32", tiny).tolist() == [0, -1, 0, -1]
    assert run("cvt.rmi.ftz.s32.f32", tiny).tolist() == [0, 0, 0, -1]
    assert run("cvt.rni.ftz.s32.f32", tiny).tolist() == [0, 0, 0, 0]


# Floats to floats


@pytest.mark.parametrize("source", ["f16", "bf16"])
@pytest.mark.parametrize("to", ["f32", "f64"])
def test_all_halves_widened(to: str, source: str) -> None:
    got = run(f"cvt.{to}.{source}", ALL_16.view(DTYPES[source]))
    assert got.dtype == DTYPES[to]
    reference = ALL_16.view(np.float16 if source == "f16" else ml_dtypes.bfloat16)
    assert_same(got.astype(np.float64), reference.astype(np.float64))


@pytest.mark.parametrize(("to", "source"), [("f16", "bf16"), ("bf16", "f16")])
def test_all_halves_to_the_other_kind(to: str, source: str) -> None:
    values = ALL_16.view(DTYPES[source])
    assert_rounds(to, source, values)
    unsaid, nearest = run(f"cvt.{to}.{source}", values), run(f"cvt.rn.{to}.{source}", values)
    assert np.array_equal(unsaid.view(np.uint16), nearest.view(np.uint16))


def between(kind: str) -> tuple[Any, Any, Any]:
    """For the positive codes c of a 16-bit format, with infinity as the last: f32 values at c, at
    the midpoint of c and c + 1, and their neighbours; the code c; and where between c and c + 1
    the value is: 0 at c, 1 below, 2 at, 3 above the midpoint.
    """
    code = np.arange(0x7C00 if kind == "f16" else 0x7F80, dtype=np.uint32)
    if kind == "f16":
        base = code.astype(np.uint16).view(np.float16).astype(np.float32)
        after = np.append(base[1:], np.float32(65536))
        middle = ((base.astype(np.float64) + after) / 2).astype(np.float32)
    else:
        base = (code << 16).view(np.float32)
        after = ((code + 1) << 16).view(np.float32)
        middle = (code << 16 | 0x8000).view(np.float32)
    below = np.nextafter(middle, np.float32(0))
    above = np.nextafter(middle, np.float32(np.inf))
    first = np.nextafter(base, np.float32(np.inf))
    last = np.nextafter(after, np.float32(0))
    values = np.concatenate([base, first, below, middle, above, last])
    place = np.repeat(np.array([0, 1, 1, 2, 3, 3], np.uint32), code.size)
    return values, np.tile(code, 6), place


@pytest.mark.parametrize("size", ["few", "many"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_single_to_half_at_every_midpoint(kind: str, size: str) -> None:
    values, code, place = between(kind)
    if size == "few":
        chosen = np.random.default_rng(5).choice(values.size, LARGE - 1, replace=False)
        values, code, place = values[chosen], code[chosen], place[chosen]
    up = {
        "rn": (place == 3) | ((place == 2) & (code & 1 == 1)),
        "rz": place > 3,
        "rm": place > 3,
        "rp": place > 0,
    }
    for mode, rises in up.items():
        got = run(f"cvt.{mode}.{kind}.f32", values)
        np.testing.assert_array_equal(got.view(np.uint16), code + rises)
        opposite = {"rm": "rp", "rp": "rm"}.get(mode, mode)
        got = run(f"cvt.{opposite}.{kind}.f32", -values)
        np.testing.assert_array_equal(got.view(np.uint16), (code + rises) | 0x8000)
        if mode in ("rn", "rz"):
            got = run(f"cvt.{mode}.{kind}x2.f32", values, -values)
            np.testing.assert_array_equal(got, ((code + rises) << 16) | (code + rises) | 0x8000)


def test_single_to_tf32() -> None:
    random = np.random.default_rng(7)
    bits = random.integers(0, 1 << 32, 4000, np.uint32)
    bits[::4] &= 0xFFFFF000  # midpoints and representable values
    bits[1::4] = (bits[1::4] & 0xFFFFE000) | 0x0FFF
    bits[2::8] &= 0x807FFFFF  # subnormal
    bits[3::64] = 0x7F7FFFFF
    values = bits.view(np.float32)
    for mode in ("rn", "rz", "rna"):
        expected = [rounded(value, "tf32", mode) for value in values.tolist()]
        assert_same(as_double(run(f"cvt.{mode}.tf32.f32", values), "tf32"), expected)
    assert run("cvt.rna.tf32.f32", np.float32(np.nan)).tolist() == [0x7FFFE000]


def hard_doubles(kind: str) -> Any:
    """Midpoints of a format, values of it, and the doubles next to both: where rounding to f32
    first and to the format then goes wrong."""
    places, least, most = FORMATS[kind]
    random = np.random.default_rng(11)
    found = [0.0, math.inf, math.nan, 5e-324, 1e308, 2.0**-151, 2.0**-150, 2.0**-149]
    exponents = [*range(least - places - 2, least + 3), -1, 0, 1, *range(most - 2, most + 2)]
    for exponent in exponents:
        place = 2.0 ** (max(exponent, least) - places + 1)
        for start in (2.0**exponent, 2.0**exponent * (1 + random.random())):
            whole = math.floor(start / place) * place
            for step in (0.0, 0.5, 1.0, 1.5):
                centre = whole + step * place
                found += [centre, centre + place * 2.0**-30, centre - place * 2.0**-30]
    values = np.array(found)
    values = np.concatenate([values, np.nextafter(values, 0), np.nextafter(values, np.inf)])
    return np.concatenate([values, -values])


@pytest.mark.parametrize("to", ["f16", "bf16", "f32"])
def test_double_to_float(to: str) -> None:
    assert_rounds(to, "f64", hard_doubles(to))
    random = np.random.default_rng(13)
    spread = np.ldexp(random.standard_normal(2000), random.integers(-160, 130, 2000))
    assert_rounds(to, "f64", spread)


def test_single_to_double_is_exact() -> None:
    bits = np.random.default_rng(17).integers(0, 1 << 32, 5000, np.uint32)
    values = bits.view(np.float32)
    got = run("cvt.f64.f32", values)
    assert_same(got, [float(value) for value in values])


@pytest.mark.parametrize("mode", INTEGRAL)
@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_rounding_to_a_whole_number_of_the_same_type(kind: str, mode: str) -> None:
    if kind in ("f16", "bf16"):
        values = ALL_16.view(DTYPES[kind])
    else:
        values = hard_doubles("f16").astype(DTYPES[kind])
        values = np.concatenate([values, np.linspace(-9, 9, 145, dtype=DTYPES[kind])])
    expected = [
        v if math.isnan(v) or math.isinf(v) else math.copysign(INTEGRAL[mode](v), v)
        for v in as_double(values, kind).tolist()
    ]
    got = run(f"cvt.{mode}.{kind}.{kind}", values)
    assert got.dtype == DTYPES[kind]
    assert_same(as_double(got, kind), expected)


def test_the_canonical_nan() -> None:
    """Payloads and signs go, but not between f32 and f64 or where nothing is converted."""
    nan16 = np.array([0x7C01, 0xFE55, 0x7FFF], np.uint16)
    bf16 = np.array([0x7F81, 0xFFC1, 0x7FFF], np.uint16)
    f32 = np.array([0x7F800001, 0xFFC12345, 0x7FFFFFFF], np.uint32).view(np.float32)
    f64 = np.array([0x7FF0000000000001, 0xFFF8000010000123], np.uint64).view(np.float64)
    assert run("cvt.f32.f16", nan16.view(np.float16)).view(np.uint32).tolist() == [0x7FFFFFFF] * 3
    assert run("cvt.rn.bf16.f16", nan16.view(np.float16)).tolist() == [0x7FFF] * 3
    assert run("cvt.rni.f16.f16", nan16.view(np.float16)).view(np.uint16).tolist() == [0x7FFF] * 3
    assert run("cvt.rn.f16.bf16", bf16).view(np.uint16).tolist() == [0x7FFF] * 3
    for mode in MODES:
        assert run(f"cvt.{mode}.f16.f32", f32).view(np.uint16).tolist() == [0x7FFF] * 3
        assert run(f"cvt.{mode}.bf16.f32", f32).tolist() == [0x7FFF] * 3
        assert run(f"cvt.{mode}.f16.f64", f64).view(np.uint16).tolist() == [0x7FFF] * 2
        assert run(f"cvt.{mode}.bf16.f64", f64).tolist() == [0x7FFF] * 2
    many = np.full(2 * LARGE, -1.0, np.float32)
    many[5] = f32[1]
    got = run("cvt.rn.f16.f32", many).view(np.uint16)
    assert got[5] == 0x7FFF
    assert (np.delete(got, 5) == 0xBC00).all()
    assert run("cvt.rn.f16x2.f32", f32[1], 1.0).tolist() == [0x7FFF3C00]
    assert run("cvt.rz.bf16x2.f32", 1.0, f32[1]).tolist() == [0x3F807FFF]
    assert run("cvt.rni.f32.f32", f32).view(np.uint32).tolist() == [0x7FFFFFFF] * 3
    assert run("cvt.f32.f32", f32).view(np.uint32).tolist() == f32.view(np.uint32).tolist()
    assert run("cvt.rn.f32.f64", f64).view(np.uint32).tolist() == [0x7FC00000, 0xFFC00000]
    assert run("cvt.f64.f32", f32[1]).view(np.uint64).tolist() == [0xFFF82468A0000000]
