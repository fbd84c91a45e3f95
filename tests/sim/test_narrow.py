"""Formats of 8, 6 and 4 bits, against ml_dtypes and against the definition of nearest."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cumla.sim.isa.narrow import decoded, upper_half
from cumla.sim.isa.table import Unsupported
from sim.ops import op, run

# Type, bits of a code, and what NaN is converted to (PTX ISA cvt, .satfinite).
NARROW: dict[str, tuple[Any, int, int]] = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 8, 0x7F),
    "e5m2": (ml_dtypes.float8_e5m2, 8, 0x7F),
    "e2m3": (ml_dtypes.float6_e2m3fn, 6, 0x1F),
    "e3m2": (ml_dtypes.float6_e3m2fn, 6, 0x1F),
    "e2m1": (ml_dtypes.float4_e2m1fn, 4, 0x07),
}
ALL_16 = np.arange(1 << 16, dtype=np.uint16)
ALL_8 = np.arange(256, dtype=np.uint8)


@np.errstate(all="ignore")
def values_of(name: str) -> Any:
    """Values of all codes, by ml_dtypes."""
    dtype, bits, _ = NARROW[name]
    return np.arange(1 << bits, dtype=np.uint8).view(dtype).astype(np.float32)


@np.errstate(all="ignore")
def expected_codes(name: str, values: Any, relu: bool = False) -> Any:
    """Codes of f32 values by ml_dtypes, which rounds to nearest even, with the rules of PTX for
    what is not finite or too large."""
    dtype, bits, nan = NARROW[name]
    largest = float(ml_dtypes.finfo(dtype).max)
    codes = np.clip(values, -largest, largest).astype(dtype).view(np.uint8)
    codes = codes & ((1 << bits) - 1)
    if relu:
        codes = np.where(np.signbit(values), 0, codes)
    return np.where(np.isnan(values), nan, codes)


def split(pair: Any, name: str) -> tuple[Any, Any]:
    """Upper and lower code; nothing else may be set."""
    shift = 4 if name == "e2m1" else 8
    upper, lower = pair >> shift, pair & ((1 << shift) - 1)
    assert int(max(upper.max(), lower.max())) < 1 << NARROW[name][1]
    return upper, lower


@np.errstate(all="ignore")
def midpoints(name: str) -> tuple[Any, Any]:
    """f32 values at, between and next to all positive codes, and the codes nearest to them."""
    values = values_of(name)
    finite = values[np.isfinite(values) & ~np.signbit(values)]  # ascending: codes 0, 1, 2, ...
    found: list[np.float32] = []
    codes: list[int] = []
    up, down = np.float32(np.inf), np.float32(0)
    for code, (low, high) in enumerate(pairwise(finite)):
        middle = np.float32((float(low) + float(high)) / 2)
        even = code + (code & 1)
        found += [low, np.nextafter(low, up), np.nextafter(middle, down), middle]
        codes += [code, code, code, even]
        found += [np.nextafter(middle, up), np.nextafter(high, down), high]
        codes += [code + 1, code + 1, code + 1]
    top = len(finite) - 1
    past = np.float32(1.5) * finite[-1]
    found += [np.nextafter(finite[-1], up), past, np.float32(3e38), up]
    codes += [top] * 4
    return np.array(found, np.float32), np.array(codes)


@pytest.mark.parametrize("name", NARROW)
def test_every_code_means_what_ml_dtypes_says(name: str) -> None:
    table = decoded(name)
    assert table.dtype == np.float32
    assert table.shape == (256,)
    expected = values_of(name)
    got = table[: expected.size]
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(
        np.signbit(got)[~np.isnan(got)], np.signbit(expected)[~np.isnan(got)]
    )
    # Bits above the code are ignored.
    np.testing.assert_array_equal(table, np.tile(got, 256 // got.size))


def test_every_scale_code() -> None:
    np.testing.assert_array_equal(
        decoded("ue8m0"), ALL_8.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    )


@pytest.mark.parametrize("name", NARROW)
def test_singles_at_every_midpoint(name: str) -> None:
    values, codes = midpoints(name)
    sign = 1 << NARROW[name][1] - 1
    convert = f"cvt.rn.satfinite.{name}x2.f32"
    upper, lower = split(run(convert, values, -values), name)
    np.testing.assert_array_equal(upper, codes)
    np.testing.assert_array_equal(lower, codes | sign)
    upper, lower = split(run(convert.replace(".rn", ".rn.relu"), -values, values), name)
    assert not upper.any()
    np.testing.assert_array_equal(lower, codes)
    other = split(run(convert.replace(".satfinite", ".satfinite.relu"), -values, values), name)
    np.testing.assert_array_equal(other[1], codes)


@pytest.mark.parametrize("name", NARROW)
def test_random_singles(name: str) -> None:
    random = np.random.default_rng(1)
    bits = random.integers(0, 1 << 32, 20000, np.uint32)
    bits[::2] = bits[::2] & 0x8FFFFFFF | 0x38000000  # about 1
    bits[::5] &= 0xFFFF0000
    values = bits.view(np.float32)
    for relu in ("", ".relu"):
        got = run(f"cvt.rn.satfinite{relu}.{name}x2.f32", values, values[::-1])
        upper, lower = split(got, name)
        expected = expected_codes(name, values, bool(relu))
        np.testing.assert_array_equal(upper, expected)
        np.testing.assert_array_equal(lower, expected[::-1])


@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("source", ["f16", "bf16"])
@pytest.mark.parametrize("name", NARROW)
def test_all_halves(name: str, source: str, relu: str) -> None:
    values = ALL_16.view(np.float16 if source == "f16" else ml_dtypes.bfloat16).astype(np.float32)
    shifted = ALL_16 * np.uint16(3)  # another half above
    pairs = (shifted.astype(np.uint32) << 16) | ALL_16
    upper, lower = split(run(f"cvt.rn.satfinite{relu}.{name}x2.{source}x2", pairs), name)
    expected = expected_codes(name, values, bool(relu))
    np.testing.assert_array_equal(lower, expected)
    np.testing.assert_array_equal(upper, expected[shifted])


@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("name", NARROW)
def test_all_pairs_to_halves(name: str, relu: str) -> None:
    bits = NARROW[name][1]
    values = values_of(name)
    if relu:
        values = np.where(np.signbit(values) & ~np.isnan(values), np.float32(0), values)
    halves = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    halves[np.isnan(values)] = 0x7FFF
    upper, lower = (
        grid.reshape(-1) for grid in np.meshgrid(np.arange(1 << bits), np.arange(1 << bits))
    )
    pairs = upper << (4 if name == "e2m1" else 8) | lower
    got = run(f"cvt.rn{relu}.f16x2.{name}x2", pairs)
    np.testing.assert_array_equal(got, halves[upper] << 16 | halves[lower])


def test_result_types() -> None:
    assert op("cvt.rn.satfinite.e4m3x2.f32").results == ("b16",)
    assert op("cvt.rn.satfinite.e2m3x2.f32").results == ("b16",)
    assert op("cvt.rn.satfinite.e2m1x2.f32").results == ("b8",)
    assert op("cvt.rn.f16x2.e2m1x2").sources == ("b8",)
    assert run("cvt.rn.satfinite.e5m2x2.f32", 1.0, 2.0).dtype == np.uint16
    assert run("cvt.rn.satfinite.e4m3x2.f16x2", 0).dtype == np.uint16
    assert run("cvt.rn.satfinite.e2m1x2.f32", 1.0, 2.0).dtype == np.uint8
    assert run("cvt.rn.satfinite.e2m1x2.f16x2", 0).dtype == np.uint8
    assert run("cvt.rp.ue8m0x2.f32", 1.0, 2.0).dtype == np.uint16
    assert run("cvt.rn.f16x2.e4m3x2", 0).dtype == np.uint32


def test_one_value_for_all_lanes() -> None:
    lanes = np.array([1.0, 2.0, -448.0], np.float32)
    assert run("cvt.rn.satfinite.e4m3x2.f32", 1.0, lanes).tolist() == [0x3838, 0x3840, 0x38FE]
    assert run("cvt.rn.satfinite.e2m1x2.f32", lanes, 1.0).tolist() == [0x22, 0x42, 0xF2]


def test_halves_that_do_not_lie_side_by_side() -> None:
    pairs = np.arange(64, dtype=np.uint32) * 0x01010101
    name = "cvt.rn.satfinite.e4m3x2.f16x2"
    assert run(name, pairs[::3]).tolist() == run(name, pairs).tolist()[::3]


# Scales


def scale_code(value: float, mode: str, satfinite: bool) -> int:
    """The smallest power of two not below |value| (rp), or the largest not above it (rz)."""
    size = abs(value)
    if math.isnan(size):
        return 0xFF
    exponent = -127
    if math.isinf(size):
        exponent = 128
    elif size > 2.0**-127:
        mantissa, exponent = math.frexp(size)  # mantissa in [0.5, 1)
        exponent -= 1 if mode == "rz" or mantissa == 0.5 else 0
    if exponent > 127:
        return 0xFE if satfinite else 0xFF
    return exponent + 127


@pytest.mark.parametrize("satfinite", ["", ".satfinite"])
@pytest.mark.parametrize("mode", ["rz", "rp"])
def test_scales(mode: str, satfinite: str) -> None:
    values = ALL_16.view(ml_dtypes.bfloat16).astype(np.float32)
    expected = np.array([scale_code(v, mode, bool(satfinite)) for v in values.tolist()])
    pairs = ((ALL_16 ^ 0x5555).astype(np.uint32) << 16) | ALL_16
    got = run(f"cvt.{mode}{satfinite}.ue8m0x2.bf16x2", pairs)
    np.testing.assert_array_equal(got & 0xFF, expected)
    np.testing.assert_array_equal(got >> 8, expected[ALL_16 ^ 0x5555])

    powers = np.ldexp(np.float32(1), np.arange(-149, 128))
    powers = np.append(powers, [np.float32(0), np.float32(3.4e38), np.float32(1.7014119e38)])
    powers = np.concatenate(
        [powers, np.nextafter(powers, np.float32(np.inf)), np.nextafter(powers, 0)]
    )
    powers = powers.astype(np.float32)
    expected = np.array([scale_code(v, mode, bool(satfinite)) for v in powers.tolist()])
    got = run(f"cvt.{mode}{satfinite}.ue8m0x2.f32", powers, -powers)
    np.testing.assert_array_equal(got >> 8, expected)
    np.testing.assert_array_equal(got & 0xFF, expected)


def test_all_scale_pairs_to_bf16() -> None:
    values = ALL_8.view(ml_dtypes.float8_e8m0fnu).astype(ml_dtypes.bfloat16)
    bits = values.view(np.uint16).astype(np.uint32)
    bits[255] = 0x7FFF
    got = run("cvt.rn.bf16x2.ue8m0x2", ALL_16)
    np.testing.assert_array_equal(got, bits[ALL_16 >> 8] << 16 | bits[ALL_16 & 0xFF])


def test_upper_half_keeps_what_lies_below() -> None:
    bits = np.array([0, 1, 0xFFFF, 0x10000, 0x1FFFF, 0x80000000, 0x7F800001, 0x7F800000], np.uint32)
    assert upper_half(bits.view(np.float32)).tolist() == [0, 1, 1, 1, 1, 0x8000, 0x7F81, 0x7F80]


@pytest.mark.parametrize(
    "name",
    [
        "cvt.rn.e4m3x2.f32",
        "cvt.rz.satfinite.e4m3x2.f32",
        "cvt.satfinite.e4m3x2.f32",
        "cvt.rn.satfinite.e4m3x2.f16",
        "cvt.rn.satfinite.e4m3.f32",
        "cvt.rn.satfinite.f16x2.e4m3x2",
        "cvt.f16x2.e4m3x2",
        "cvt.rn.f16x2.e4m3",
        "cvt.rn.f16x2.f16x2",
        "cvt.rn.ftz.f16x2.e4m3x2",
        "cvt.rn.satfinite.ftz.e4m3x2.f32",
        "cvt.rs.satfinite.e4m3x4.f32",
        "cvt.rn.satfinite.s2f6x2.f32",
        "cvt.rn.ue8m0x2.f32",
        "cvt.rz.relu.ue8m0x2.f32",
        "cvt.rz.ue8m0x2.f16x2",
        "cvt.rn.relu.bf16x2.ue8m0x2",
        "cvt.rn.f16x2.ue8m0x2",
    ],
)
def test_what_is_not_a_conversion_is_refused(name: str) -> None:
    with pytest.raises(Unsupported):
        op(name)
