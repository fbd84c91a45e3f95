"""Floating-point formats of 8, 6 and 4 bits: what their codes mean, and rounding to them.

    e4m3   no infinity, one NaN (0x7f)            largest 448
    e5m2   IEEE-like, NaN written as 0x7f         largest 57344
    e2m3   no infinity, no NaN                    largest 7.5
    e3m2   no infinity, no NaN                    largest 28
    e2m1   no infinity, no NaN                    largest 6
    ue8m0  2**(code - 127), no sign, NaN 0xff     largest 2**127

Every conversion is a table of 65,536 entries, made when first asked for: the sources are f16, a
pair of codes, or the upper half of an f32 (see `upper_half`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.isa.rounding import LOW_HALF, SIXTEEN, U32, bf16_to_single, constant, look_up

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Format:
    """A format with a sign bit above its exponent and mantissa fields.

    Attributes:
        mantissa: width of the mantissa field.
        bias: of the exponent.
        bits: width of a code.
        largest: code of the largest finite number.
        nan: code that a NaN is written as: the largest number where there is no NaN.
        infinity: code of infinity, or None.
    """

    mantissa: int
    bias: int
    bits: int
    largest: int
    nan: int
    infinity: int | None = None


FORMATS = {
    "e4m3": Format(3, 7, 8, largest=0x7E, nan=0x7F),
    "e5m2": Format(2, 15, 8, largest=0x7B, nan=0x7F, infinity=0x7C),
    "e2m3": Format(3, 1, 6, largest=0x1F, nan=0x1F),
    "e3m2": Format(2, 3, 6, largest=0x1F, nan=0x1F),
    "e2m1": Format(1, 1, 4, largest=0x07, nan=0x07),
}
_ALL_UPPER_HALVES = np.arange(1 << 16, dtype=np.uint16)


@cache
@np.errstate(all="ignore")
def decoded(name: str) -> Array:
    """f32 of each of the 256 bytes; bits above a code of 6 or 4 bits are ignored."""
    code = np.arange(256)
    if name == "ue8m0":
        values = np.ldexp(np.float32(1), code - 127)
        values[255] = np.nan
    else:
        form = FORMATS[name]
        code &= (1 << form.bits) - 1
        magnitude = code & ((1 << form.bits - 1) - 1)
        exponent = magnitude >> form.mantissa
        fraction = magnitude & ((1 << form.mantissa) - 1)
        fraction += (exponent > 0) << form.mantissa
        scale = np.maximum(exponent, 1) - form.bias - form.mantissa
        values = np.ldexp(fraction.astype(np.float32), scale)
        values[magnitude > form.largest] = np.nan
        if form.infinity is not None:
            values[magnitude == form.infinity] = np.inf
        values[code != magnitude] *= -1
    values.flags.writeable = False
    return values


def encode(values: Array, name: str, relu: bool = False) -> Array:
    """Codes, uint8, nearest to float64 values, as `.satfinite` has it: no infinity results.

    PTX ISA cvt, `.satfinite`: a NaN becomes the format's NaN, or its largest number if it has
    none; what is larger than the largest number becomes that, with its sign.
    """
    form = FORMATS[name]
    nan = np.isnan(values)
    size = np.minimum(np.abs(values), 2.0**20)  # beyond all of them
    size[nan] = 0.0
    lowest = 1 - form.bias
    exponent = np.frexp(np.maximum(size, 2.0**lowest))[1] - 1
    # Steps of the last place. From the second binade on they include the leading one, which
    # counts as the first step of the exponent field.
    steps = np.rint(np.ldexp(size, form.mantissa - exponent)).astype(np.int64)
    code = np.minimum(steps + (exponent - lowest << form.mantissa), form.largest)
    negative = np.signbit(values)
    if relu:
        code[negative] = 0
    else:
        code |= negative.astype(np.int64) << form.bits - 1
    code[nan] = form.nan
    return code.astype(np.uint8)


@cache
@np.errstate(all="ignore")
def from_half(name: str, relu: bool) -> Array:
    """[65536] uint8: the code for each f16."""
    return encode(_ALL_UPPER_HALVES.view(np.float16).astype(np.float64), name, relu)


@cache
@np.errstate(all="ignore")
def from_upper_half(name: str, relu: bool) -> Array:
    """[65536] uint8: the code for each `upper_half` of an f32, a bf16 among them."""
    return encode(bf16_to_single(_ALL_UPPER_HALVES).astype(np.float64), name, relu)


@cache
def scale_from_upper_half(mode: str, satfinite: bool) -> Array:
    """[65536] uint8: the ue8m0 code for each `upper_half` of an f32, rounded by "rz" or "rp".

    The sign is ignored, and what is below 2**-127 becomes that. Infinity, and what rounds to more
    than 2**127, becomes NaN, or 2**127 with satfinite.
    """
    size = _ALL_UPPER_HALVES & 0x7FFF
    code = size >> 7
    if mode == "rp":
        code += ((size & 0x7F) > 0) & (size > 0x40) & (size < 0x7F80)
    if satfinite:
        code[(code == 0xFF) & (size <= 0x7F80)] = 0xFE
    return code.astype(np.uint8)


def upper_half(x: Array) -> Array:
    """The upper 16 bits of f32, uint32, with the last bit set if any of the lower ones is.

    With 8 bits of mantissa that last bit says all that rounding to 6 bits or less, in any mode,
    needs to know of the lower ones.
    """
    bits = x.view(U32)
    lower = np.bitwise_and(bits, LOW_HALF)
    np.add(lower, LOW_HALF, lower)  # carries into bit 16 unless zero
    np.bitwise_or(lower, bits, lower)
    return np.right_shift(lower, SIXTEEN, lower)


@cache
@np.errstate(all="ignore")
def pair_to_half_pair(name: str, relu: bool) -> Array:
    """uint32 f16x2 for each pair of codes: [65536] for 8 and 6 bits in bytes, [256] for e2m1."""
    values = decoded(name)
    halves = values.astype(np.float16).view(np.uint16).astype(U32)
    if relu:
        halves[np.signbit(values)] = 0
    halves[np.isnan(values)] = 0x7FFF
    if name == "e2m1":
        codes = np.arange(256)
        return (halves[codes >> 4] << 16) | halves[codes & 15]
    return _all_pairs(halves)


@cache
def scale_pair_to_bf16_pair() -> Array:
    """[65536] uint32: bf16x2 for each pair of ue8m0 codes."""
    values = decoded("ue8m0")
    upper = values.view(U32) >> SIXTEEN
    upper[np.isnan(values)] = 0x7FFF
    return _all_pairs(upper)


def _all_pairs(one: Array) -> Array:
    return np.bitwise_or.outer(one << SIXTEEN, one).reshape(-1)


def singles_to_pair(codes: Array, bits: int) -> Callable[[Array, Array], Array]:
    """Two f32, the upper one first, through a table from `upper_half` to codes: a uint16 of two
    bytes, or a uint8 of two e2m1 codes."""
    kind, width = (np.uint8, 4) if bits == 4 else (np.uint16, 8)
    table, shift = codes.astype(kind), constant(width, kind)

    def convert(high: Array, low: Array) -> Array:
        upper = look_up(table, upper_half(high))
        np.left_shift(upper, shift, upper)
        return np.bitwise_or(upper, look_up(table, upper_half(low)))

    return convert


def halves_to_pair(codes: Array, bits: int) -> Callable[[Array], Array]:
    """f16x2 or bf16x2 through a table from 16 bits to codes, packed likewise."""

    def convert(x: Array) -> Array:
        found = look_up(codes, np.ascontiguousarray(x).view(np.uint16))
        return (found[1::2] << 4) | found[::2] if bits == 4 else found.view(np.uint16)

    return convert
