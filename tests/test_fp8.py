"""FP8 codecs, on every code, every midpoint between neighbours and the numbers beside it.

The oracles share no code with `cumla.fp8`: float64 formulas, exact fractions, a search in the
sorted table of values, and `ml_dtypes`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from poison import scattered

from cumla import fp8
from cumla.fp8 import SCALE_RULES, ScaleRule

Array = NDArray[Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
CODES = np.arange(256, dtype=np.uint8)
LARGEST_BF16 = (2 - 2.0**-7) * 2.0**127
RULES = pytest.mark.parametrize("rule", SCALE_RULES)


def e4m3_value(code: int) -> float:
    """The value of an e4m3 code by the format's definition."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return math.copysign(value, -1.0 if sign else 1.0)


# The 127 finite magnitudes, ascending, so that a code is also a rank.
MAGNITUDES = np.array([e4m3_value(code) for code in range(127)])
# Exact in float64: neighbours are at most 4 mantissa bits and one exponent apart. The last is the
# midpoint between 448 and the 480 that e4m3 has not got.
MIDPOINTS = np.append((MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2, 464.0)


def encode_by_search(values: Array) -> Array:
    """e4m3 codes of float64 `values` by search: nearest, ties to the even code, saturating."""
    magnitude = np.minimum(np.abs(values), 448.0)
    # A code is even exactly when its mantissa is. Midpoint i lies between codes i and i + 1.
    below = np.searchsorted(MIDPOINTS, magnitude, side="left")
    upto = np.searchsorted(MIDPOINTS, magnitude, side="right")
    codes = np.where(below % 2 == 0, below, upto)
    codes += np.where(np.signbit(values), 128, 0)
    return np.where(np.isnan(values), 0x7F, codes).astype(np.uint8)


def round_to_bf16(values: Array) -> Array:
    """float64 `values` rounded to bf16, nearest even, still as float64."""
    with np.errstate(invalid="ignore"):
        _, exponent = np.frexp(values)
        # 8 significant bits, and nothing finer than the least subnormal, 2**-133.
        last_place = np.maximum(exponent - 8, -133)
        rounded = np.ldexp(np.rint(np.ldexp(values, -last_place)), last_place)
        rounded = np.where(np.isfinite(values), rounded, values)
    return np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, rounded), rounded)


def floats(*bits: int) -> Array:
    """float32 numbers from their bits."""
    return np.array(bits, np.uint32).view(np.float32)


def bf16s(*bits: int) -> Array:
    """bf16 numbers from their bits."""
    return np.array(bits, np.uint16).view(BF16)


def bits_of(values: Array) -> Array:
    """The bits of float32 or bf16 `values`, to compare signed zeros and NaNs by."""
    return values.view(np.uint32 if values.itemsize == 4 else np.uint16)


def around(values: Array) -> Array:
    """float32 `values` with the float32 numbers just below and just above each."""
    exact = values.astype(np.float32)
    assert (exact.astype(np.float64) == values).all()
    down, up = np.nextafter(exact, np.float32(-np.inf)), np.nextafter(exact, np.float32(np.inf))
    return np.concatenate([down, exact, up])


def random_floats(count: int, seed: int) -> Array:
    """float32 numbers of every exponent: random bits, NaNs left in."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    return bits.view(np.float32)


NANS = floats(0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001, 0xFFD5AAAA)
SIGNALLING_NANS = floats(0x7F800001, 0xFF800001, 0x7FBFFFFF, 0xFFA00000)


# --- the oracles themselves -----------------------------------------------------------------------


def test_round_to_bf16_agrees_with_ml_dtypes() -> None:
    values = random_floats(200_000, 1)
    values = np.concatenate(
        [values[np.isfinite(values)], floats(1, 0x8000, 0x7F7F7FFF, 0x7F7F8000)]
    )
    mine = round_to_bf16(values.astype(np.float64))
    with np.errstate(over="ignore"):
        theirs = values.astype(BF16).astype(np.float64)
    np.testing.assert_array_equal(mine, theirs)


def test_encode_by_search_agrees_with_ml_dtypes() -> None:
    values = np.concatenate([MAGNITUDES, MIDPOINTS[:-1], -MAGNITUDES, -MIDPOINTS[:-1]])
    np.testing.assert_array_equal(
        encode_by_search(values), values.astype(np.float32).astype(E4M3).view(np.uint8)
    )


# --- e4m3 -----------------------------------------------------------------------------------------


def test_decode_e4m3_of_every_code() -> None:
    values = fp8.decode_e4m3(CODES)
    assert values.dtype == np.float32
    expected = np.array([e4m3_value(code) for code in range(256)])
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(np.signbit(values[[0, 0x80]]), [False, True])
    np.testing.assert_array_equal(values, CODES.view(E4M3).astype(np.float32))
    assert (values.max(where=~np.isnan(values), initial=0), np.isnan(values).sum()) == (448, 2)


def test_decode_e4m3_of_any_shape_and_strides() -> None:
    codes = scattered(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    expected = np.array([e4m3_value(code) for code in range(24)]).reshape(2, 3, 4)
    np.testing.assert_array_equal(fp8.decode_e4m3(codes), expected)


def test_encode_e4m3_returns_every_code() -> None:
    codes = fp8.encode_e4m3(fp8.decode_e4m3(CODES))
    assert codes.dtype == np.uint8
    expected = CODES.copy()
    expected[0xFF] = 0x7F  # one NaN code is written
    np.testing.assert_array_equal(codes, expected)


def test_encode_e4m3_rounds_to_nearest_even_at_every_midpoint() -> None:
    # By hand, so that not everything hangs on the oracle: below, at and above the midpoint.
    ranks = np.arange(len(MIDPOINTS) - 1)
    down, tie, up = around(MIDPOINTS[:-1]).reshape(3, -1)
    np.testing.assert_array_equal(fp8.encode_e4m3(down), ranks)
    np.testing.assert_array_equal(fp8.encode_e4m3(tie), ranks + ranks % 2)
    np.testing.assert_array_equal(fp8.encode_e4m3(up), ranks + 1)
    np.testing.assert_array_equal(fp8.encode_e4m3(-down), ranks + 128)
    np.testing.assert_array_equal(fp8.encode_e4m3(-tie), ranks + ranks % 2 + 128)
    np.testing.assert_array_equal(fp8.encode_e4m3(-up), ranks + 129)


def test_encode_e4m3_beside_every_value() -> None:
    beside = around(MAGNITUDES)
    np.testing.assert_array_equal(fp8.encode_e4m3(beside), encode_by_search(beside))
    np.testing.assert_array_equal(fp8.encode_e4m3(-beside), encode_by_search(-beside))


def test_encode_e4m3_of_zeros_and_what_rounds_to_them() -> None:
    half = 2.0**-10  # half the least subnormal: a tie, to even, to 0
    least = [0.0, 2.0**-149, 2.0**-126, 2.0**-11, half]
    for value in least:
        np.testing.assert_array_equal(
            fp8.encode_e4m3(np.array([value, -value], np.float32)), [0x00, 0x80], str(value)
        )
    above = np.nextafter(np.float32(half), np.float32(1))
    np.testing.assert_array_equal(fp8.encode_e4m3(np.array([above, -above])), [0x01, 0x81])


def test_encode_e4m3_saturates() -> None:
    largest = np.finfo(np.float32).max
    over = [448, 449, 463.99997, 464, 464.00003, 480, 512, 1e10, largest, np.inf]
    values = np.array(over, np.float32)
    np.testing.assert_array_equal(fp8.encode_e4m3(values), [0x7E] * len(over))
    np.testing.assert_array_equal(fp8.encode_e4m3(-values), [0xFE] * len(over))


@pytest.mark.parametrize("nans", [NANS, SIGNALLING_NANS], ids=["quiet", "signalling"])
def test_encode_e4m3_of_nan(nans: Array) -> None:
    np.testing.assert_array_equal(fp8.encode_e4m3(nans), [0x7F] * len(nans))
    # Long enough for vector instructions, between numbers that must not be touched.
    mixed = np.ones(1000, np.float32)
    mixed[::7] = np.resize(nans, mixed[::7].shape)
    expected = np.where(np.isnan(mixed), 0x7F, 0x38)
    np.testing.assert_array_equal(fp8.encode_e4m3(mixed), expected)


def test_encode_e4m3_of_a_million_random_floats() -> None:
    rng = np.random.default_rng(2)
    anything = random_floats(600_000, 3)
    anything = anything[~np.isnan(anything)]
    # Most random bits are far outside e4m3's range; these are inside, ties among them.
    inside = np.ldexp(rng.integers(-(2**12), 2**12, 400_000), rng.integers(-24, -2, 400_000))
    values = np.concatenate([anything, inside.astype(np.float32)])
    codes = fp8.encode_e4m3(values)
    np.testing.assert_array_equal(codes, np.clip(values, -448, 448).astype(E4M3).view(np.uint8))
    np.testing.assert_array_equal(codes, encode_by_search(values.astype(np.float64)))


def test_encode_e4m3_of_any_shape_and_stride() -> None:
    values = np.linspace(-500, 500, 120, dtype=np.float32).reshape(2, 3, 20)
    expected = encode_by_search(values)
    np.testing.assert_array_equal(fp8.encode_e4m3(scattered(values)), expected)
    np.testing.assert_array_equal(fp8.encode_e4m3(values[:, ::-1, ::2]), expected[:, ::-1, ::2])
    assert fp8.encode_e4m3(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_encode_e4m3_of_a_scalar_array() -> None:
    assert fp8.encode_e4m3(np.array(-1.0, np.float32)) == 0xB8
    assert fp8.encode_e4m3(np.array(np.nan, np.float32)) == 0x7F


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=False)))
def test_encode_e4m3_fuzzed(values: Array) -> None:
    np.testing.assert_array_equal(
        fp8.encode_e4m3(values), encode_by_search(values.astype(np.float64))
    )


# --- UE8M0 ----------------------------------------------------------------------------------------


def test_ue8m0_of_every_code_both_ways() -> None:
    values = fp8.decode_ue8m0(CODES)
    assert values.dtype == np.float32
    expected = [*(2.0 ** (code - 127) for code in range(255)), np.nan]
    np.testing.assert_array_equal(values.astype(np.float64), expected)
    np.testing.assert_array_equal(values, CODES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    codes = fp8.encode_ue8m0(values)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, CODES)
    assert fp8.decode_ue8m0(CODES.reshape(4, 64)).shape == (4, 64)


def test_encode_ue8m0_of_anything_else_is_nan() -> None:
    powers = np.ldexp(np.float32(1), np.arange(-127, 128))
    beside = np.concatenate(
        [np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))]
    )
    np.testing.assert_array_equal(fp8.encode_ue8m0(beside), [255] * 510)
    np.testing.assert_array_equal(fp8.encode_ue8m0(-powers), [255] * 255)
    others = [0.0, -0.0, 3.0, 0.1, np.inf, -np.inf, 2.0**-128, 2.0**-149, np.finfo(np.float32).max]
    np.testing.assert_array_equal(fp8.encode_ue8m0(np.array(others, np.float32)), [255] * 9)
    nans = np.concatenate([NANS, SIGNALLING_NANS])
    np.testing.assert_array_equal(fp8.encode_ue8m0(nans), [255] * len(nans))


# --- scales ---------------------------------------------------------------------------------------


def exact_ceil_power_of_two(value: Fraction) -> Fraction:
    """The least power of two >= a positive fraction, by integer arithmetic."""
    # Within one of the right exponent, then stepped to it.
    exponent = value.numerator.bit_length() - value.denominator.bit_length() - 1
    while Fraction(2) ** exponent < value:
        exponent += 1
    return Fraction(2) ** exponent


def exact_scale(amax: float, rule: ScaleRule) -> float:
    """The scale of a tile by its rule's formula, in exact arithmetic."""
    exact, least = Fraction(amax), Fraction(1, 10_000)
    if rule == "flashmla":
        return float(exact_ceil_power_of_two(max(exact / 448, least)))
    if rule == "v4":
        return float(exact_ceil_power_of_two(max(exact, least) / 448))
    # Rounding a float32 quotient by way of float64 rounds it right: 53 >= 2 * 24 + 2 bits.
    return float(np.float32(max(float(exact / 448), 2.0**-126)))


def test_ceil_power_of_two() -> None:
    powers = np.ldexp(np.float32(1), np.arange(-126, 128))
    values = random_floats(100_000, 4)
    values = np.abs(values[np.isfinite(values)])
    values = np.concatenate([powers, around(powers[1:-1].astype(np.float64)), values])
    # The greatest have no power of two above them in float32.
    values = values[(values >= 2.0**-126) & (values <= 2.0**127)]
    assert len(values) > 90_000
    mantissa, exponent = np.frexp(values.astype(np.float64))
    expected = np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))
    result = fp8.ceil_power_of_two(values)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)


def test_tile_amax() -> None:
    tiles = np.random.default_rng(5).standard_normal((3, 5, 64)).astype(BF16)
    amax = fp8.tile_amax(tiles)
    assert amax.dtype == np.float32
    assert amax.shape == (3, 5)
    np.testing.assert_array_equal(amax, np.abs(tiles.astype(np.float64)).max(axis=-1))
    # The sign of zero and of the peak make no difference.
    assert fp8.tile_amax(bf16s(0x8000, 0x8000)[None])[0] == 0
    assert fp8.tile_amax(np.array([[1, -3, 2]], BF16))[0] == 3


def test_tile_amax_leaves_nan_out_and_takes_infinity_as_the_largest_bf16() -> None:
    largest, nan, inf = LARGEST_BF16, math.nan, math.inf
    tiles = np.array(
        [[1, nan, -2], [nan, nan, nan], [inf, 1, 2], [1, -inf, nan], [largest, 1, 2], [0, 0, 3]]
    ).astype(BF16)
    expected = [2, 0, largest, largest, largest, 3]
    for part in (slice(None), slice(0, 2), slice(2, 4), slice(4, None)):
        np.testing.assert_array_equal(fp8.tile_amax(tiles[part]), expected[part])
    for bits in (0x7F81, 0xFF81, 0x7FFF, 0xFFFF, 0x7FC0):
        assert fp8.tile_amax(bf16s(bits, 0x3F80)[None])[0] == 1
    untouched = tiles.copy()
    fp8.tile_amax(tiles)
    np.testing.assert_array_equal(bits_of(tiles), bits_of(untouched))


def awkward_amax() -> Array:
    """float32 magnitudes where a scale rule turns over, with their bf16 and float32 neighbours."""
    turns = np.concatenate([448 * 2.0 ** np.arange(-30, 119), [1e-4, 448e-4, 2.0**-126 * 448]])
    turns = turns.astype(np.float32)
    rounded = turns.astype(BF16).view(np.uint16)
    neighbours = np.concatenate([rounded - 1, rounded, rounded + 1]).astype(np.uint16).view(BF16)
    beside = [np.nextafter(turns, np.float32(0)), np.nextafter(turns, np.float32(np.inf))]
    edges = [0, 2.0**-149, 2.0**-133, 2.0**-126, 1e-30, LARGEST_BF16]
    return np.concatenate(
        [turns, neighbours.astype(np.float32), *beside, np.array(edges, np.float32)]
    )


@RULES
def test_tile_scale_against_the_exact_formula(rule: ScaleRule) -> None:
    random = np.exp(np.random.default_rng(6).uniform(-30, 80, 3000)).astype(np.float32)
    amax = np.concatenate([awkward_amax(), random, random.astype(BF16).astype(np.float32)])
    scales = fp8.tile_scale(amax, rule)
    assert scales.dtype == np.float32
    assert scales.shape == amax.shape
    expected = [exact_scale(float(one), rule) for one in amax]
    np.testing.assert_array_equal(scales, expected)


def test_the_least_scales_are_the_documented_ones() -> None:
    for rule, least in (("flashmla", 2.0**-13), ("v4", 2.0**-22), ("raw", 2.0**-126)):
        for amax in (0.0, 2.0**-149, 2.0**-133):
            assert fp8.tile_scale(np.array([amax], np.float32), rule)[0] == least  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["flashmla", "v4"])
@pytest.mark.parametrize("power", [-8, 0, 1, 100])
def test_tile_scale_turns_over_just_above_448_times_a_power(rule: ScaleRule, power: int) -> None:
    peak = np.float32(448 * 2.0**power)
    # bf16 has 8 bits: its neighbours of 448 are 446 and 450.
    amax = np.array([peak * (446 / 448), peak, peak * (450 / 448)], np.float32)
    expected = [2.0**power, 2.0**power, 2.0 ** (power + 1)]
    np.testing.assert_array_equal(fp8.tile_scale(amax, rule), expected)


# --- tiles ----------------------------------------------------------------------------------------


def decoded(codes: Array, scales: Array) -> Array:
    """decode_tiles into a fresh output, which must be bf16 numbers."""
    out = np.full(codes.shape, np.nan, np.float32)
    fp8.decode_tiles(codes, scales, out)
    assert not (bits_of(out)[~np.isnan(out)] & 0xFFFF).any()
    return out


def random_tiles(seed: int, count: int, low: float, high: float, tile: int = 64) -> Array:
    """bf16 tiles whose sizes differ by many powers of two, within a tile as well as between."""
    rng = np.random.default_rng(seed)
    size = np.exp2(rng.uniform(low, high, (count, 1))) * np.exp2(rng.uniform(-12, 0, (count, tile)))
    return (size * rng.standard_normal((count, tile))).astype(BF16)


@RULES
def test_encode_tiles_against_the_oracles(rule: ScaleRule) -> None:
    tiles = random_tiles(7, 400, -40, 100).reshape(20, 20, 64)
    codes, scales = fp8.encode_tiles(tiles, rule)
    assert codes.dtype == np.uint8
    assert codes.shape == tiles.shape
    assert scales.dtype == np.float32
    assert scales.shape == tiles.shape[:-1]
    values = tiles.astype(np.float64)
    expected = [exact_scale(one, rule) for one in np.abs(values).max(axis=-1).ravel().tolist()]
    np.testing.assert_array_equal(scales.ravel(), expected)
    # x / scale is a float32 quotient, rounded once more to e4m3: that is what a kernel computes.
    quotient = (values / scales[..., None].astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(codes, encode_by_search(quotient.astype(np.float64)))


@RULES
def test_an_all_zero_tile_gives_zeros(rule: ScaleRule) -> None:
    tiles = np.zeros((2, 64), BF16)
    tiles[1, 1] = -0.0
    codes, scales = fp8.encode_tiles(tiles, rule)
    assert np.isin(codes, (0x00, 0x80)).all()
    assert (codes == 0x80).sum() == 1
    np.testing.assert_array_equal(
        bits_of(decoded(codes, scales)), bits_of(tiles.astype(np.float32))
    )


@RULES
@pytest.mark.parametrize("nan_bits", [0x7FC0, 0xFFC0, 0x7FFF, 0x7F81, 0xFF81])
def test_a_nan_element_touches_no_neighbour(rule: ScaleRule, nan_bits: int) -> None:
    clean = random_tiles(8, 3, -3, 3)
    clean[1, 5] = 0
    dirty = clean.copy()
    dirty[1, 5] = bf16s(nan_bits)[0]
    clean_codes, clean_scales = fp8.encode_tiles(clean, rule)
    codes, scales = fp8.encode_tiles(dirty, rule)
    np.testing.assert_array_equal(scales, clean_scales)
    clean_codes[1, 5] = 0x7F
    np.testing.assert_array_equal(codes, clean_codes)
    assert np.argwhere(np.isnan(decoded(codes, scales))).tolist() == [[1, 5]]


@RULES
def test_a_tile_of_nan_alone(rule: ScaleRule) -> None:
    codes, scales = fp8.encode_tiles(np.full((1, 64), np.nan, BF16), rule)
    assert (codes == 0x7F).all()
    assert scales[0] == fp8.tile_scale(np.zeros(1, np.float32), rule)[0]
    assert np.isnan(decoded(codes, scales)).all()


@RULES
def test_infinities_saturate(rule: ScaleRule) -> None:
    tiles = random_tiles(9, 2, 0, 1)
    tiles[0, 3], tiles[0, 4], tiles[0, 5] = np.inf, -np.inf, np.nan
    codes, scales = fp8.encode_tiles(tiles, rule)
    assert codes[0, 3:6].tolist() == [0x7E, 0xFE, 0x7F]
    assert scales[0] == exact_scale(LARGEST_BF16, rule)
    # The tile beside it does not notice.
    alone = fp8.encode_tiles(tiles[1:], rule)
    np.testing.assert_array_equal(codes[1:], alone[0])
    np.testing.assert_array_equal(scales[1:], alone[1])
    values = decoded(codes, scales)
    # 448 * 2**120 is beyond bf16: an infinity comes back as one.
    assert values[0, 3:5].tolist() == [math.inf, -math.inf]
    # Everything else is far below the tile's last place.
    assert (values[0, 6:] == 0).all()


SCALES = {
    "powers of two": np.ldexp(np.float32(1), np.arange(-149, 128)),
    "negative": -np.ldexp(np.float32(1.3), np.arange(-140, 120)),
    "one to two": np.linspace(1, 2, 300, dtype=np.float32),
    "tiny": np.linspace(1e-38, 2e-36, 100, dtype=np.float32),
    "subnormal": floats(1, 2, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x123456, 0x7FFFFF, 0x807FFFFF),
    "huge": floats(0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7E012345, 0x7B801234),
    "ties of bf16": floats(0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0xBF808000),
    "zeros": floats(0, 0x80000000),
    "infinities": floats(0x7F800000, 0xFF800000),
    "quiet nan": NANS,
    "signalling nan": SIGNALLING_NANS,
    "anything": random_floats(1000, 10)[:-2],
}


@pytest.mark.parametrize("kind", list(SCALES))
def test_decode_tiles_with_any_scale(kind: str) -> None:
    scales = SCALES[kind]
    codes = np.broadcast_to(CODES, (len(scales), 256))
    values = np.array([e4m3_value(code) for code in range(256)])
    with np.errstate(invalid="ignore"):
        expected = round_to_bf16(values * round_to_bf16(scales.astype(np.float64))[:, None])
    out = decoded(codes, scales)
    np.testing.assert_array_equal(out, expected)
    # assert_array_equal takes -0.0 for 0.0.
    signed = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(out)[signed], np.signbit(expected)[signed])
    # Alone too: whether the second rounding is needed is decided for all of the scales at once.
    for at in range(len(scales)):
        np.testing.assert_array_equal(
            decoded(codes[at : at + 1], scales[at : at + 1])[0], expected[at]
        )


def test_decode_tiles_takes_one_inexact_scale_among_exact_ones() -> None:
    codes = np.full((3, 4), 0x39, np.uint8)  # 1.125
    scales = np.array([1, 1.0078125, 2], np.float32)  # the middle product has 12 bits
    expected = [1.125, float(round_to_bf16(np.array(1.125 * 1.0078125))), 2.25]
    np.testing.assert_array_equal(decoded(codes, scales)[:, 0], expected)


def test_decode_tiles_writes_into_a_strided_output() -> None:
    codes = CODES.reshape(2, 2, 64)
    scales = np.array([[1, 3.3], [0.7, 2.0**-120]], np.float32)
    out = scattered(np.zeros((2, 2, 64), np.float32))
    fp8.decode_tiles(codes, scales, out)
    np.testing.assert_array_equal(out, decoded(codes, scales))


@RULES
def test_decode_of_encode_is_near(rule: ScaleRule) -> None:
    tiles = random_tiles(11, 3000, -20, 40)
    tiles[::50] = 0
    codes, scales = fp8.encode_tiles(tiles, rule)
    exact = tiles.astype(np.float64)
    error = np.abs(decoded(codes, scales).astype(np.float64) - exact)
    # Three mantissa bits: half a last place is 2**-4 of the least value it belongs to; below the
    # subnormal line the last place is the tile's, 2**-9 scales. A raw scale is moved by its own
    # rounding to bf16 and the product by another, 2**-9 each, of what may be 2 |x|.
    half_place = 2.0**-10 * scales[..., None].astype(np.float64)
    allowed = np.maximum(2.0**-4 * np.abs(exact), half_place)
    if rule == "raw":
        allowed += 2.0**-7 * np.abs(exact)
    assert (error <= allowed).all()
    # And no better than e4m3 can be: the bound is not met by keeping more bits.
    assert (error > 0.9 * 2.0**-4 * np.abs(exact)).any()


@RULES
@settings(max_examples=100, deadline=None)
@given(bits=hnp.arrays(np.uint16, (2, 64)))
def test_tiles_of_any_bits(rule: ScaleRule, bits: Array) -> None:
    tiles = bits.view(BF16)
    codes, scales = fp8.encode_tiles(tiles, rule)
    assert ((scales > 0) & np.isfinite(scales)).all()
    out = decoded(codes, scales)
    np.testing.assert_array_equal(np.isnan(out), (bits & 0x7FFF) > 0x7F80)
    numbers = ~np.isnan(out)
    np.testing.assert_array_equal(np.signbit(out)[numbers], (bits >> 15).astype(bool)[numbers])
    # Decoding is by the stored numbers alone, whatever made them.
    values = np.array([e4m3_value(code) for code in codes.ravel().tolist()]).reshape(codes.shape)
    exact = round_to_bf16(values * round_to_bf16(scales.astype(np.float64))[:, None])
    np.testing.assert_array_equal(out, exact)
