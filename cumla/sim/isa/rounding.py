"""Rounding of integers, f64 and f32 values to f32, f16, bf16 and tf32, in every mode of PTX.

A mode is the PTX modifier: "rn" (nearest, ties to even), "rna" (nearest, ties away from zero),
"rz", "rm", "rp" (towards zero, minus and plus infinity). NaN becomes the canonical NaN, all ones
without a sign, except from f64 to f32, where ptxas keeps the payload.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.isa.table import Unsupported

Array = NDArray[Any]


def constant(value: float, dtype: Any) -> Array:
    """A 0-d array: as an operand it costs half of what a NumPy scalar or a Python number costs."""
    return np.array(value, dtype)


U32 = np.dtype(np.uint32)
ONE = constant(1, U32)
SIXTEEN = constant(16, U32)
LOW_HALF = constant(0xFFFF, U32)
HIGH_HALF = constant(0xFFFF0000, U32)
NAN_BITS = constant(0x7FFFFFFF, U32)
EXPONENT = constant(0x7F800000, U32)
_MAGNITUDE = constant(0x7FFFFFFF, U32)
_SIGN_BIT = constant(0x80000000, U32)
_LEAST = 2.0**-126
SMALLEST_NORMAL = constant(_LEAST, np.float32)

# From here on the integer algorithm below beats NumPy's cast to float16.
LARGE = 1024
# OpenBLAS multiplies vectors of up to 10,000 elements without calling other threads.
DOT = 8192


def any_nan(x: Array) -> bool:
    """Whether an f32 array, not empty, holds a NaN."""
    # A sum of squares is a NaN if one of them is; on few values it costs half of a maximum.
    total = x.dot(x) if x.size <= DOT else np.maximum.reduce(x)
    return bool(total != total)


def any_nan_in_two(x: Array, y: Array) -> bool:
    """Whether one of two arrays holds a NaN; it may say so of infinities as well."""
    if x.size == y.size <= DOT:
        total = x.dot(y)
        return bool(total != total)
    return any_nan(x) or any_nan(y)


def squares_below(x: Array, limit: float) -> bool:
    """Whether the sum of the squares of an f32 array is below a limit; not with a NaN."""
    if x.size <= DOT:
        return bool(x.dot(x) < limit)
    parts = (x[i : i + DOT] for i in range(0, x.size, DOT))
    return sum(float(part.dot(part)) for part in parts) < limit


def any_small(x: Array, exponents: Array) -> bool:
    """Whether an f32, other than zero, has none of these bits of the exponent set."""
    bits = x.view(U32)
    others = np.count_nonzero(np.bitwise_and(bits, exponents))
    return others != x.size and others != np.count_nonzero(np.bitwise_and(bits, _MAGNITUDE))


def flush(x: Array) -> Array:
    """f32 with subnormal numbers replaced by zeros of their sign (`.ftz`).

    Most arrays have none and are returned themselves: looking costs half of what replacing does.
    """
    if x.size == 1:
        value = abs(x.item())
        if value >= _LEAST or value == 0:
            return x
    if not any_small(x, EXPONENT):
        return x
    bits = x.view(U32)
    return np.where(np.bitwise_and(bits, EXPONENT), bits, bits & _SIGN_BIT).view(np.float32)


def directed(nearest: Array, exact: Array, mode: str) -> Array:
    """The mode's rounding of `exact`, given the nearest value: that, or its neighbour."""
    if mode == "rn":
        return nearest
    bits = nearest.view(f"i{nearest.dtype.itemsize}")
    # To the next number away from zero is one up in the bits, whatever the sign.
    if mode == "rz":
        step = -(np.abs(nearest) > np.abs(exact)).astype(bits.dtype)
    elif mode == "rm":
        step = np.where(np.signbit(nearest), 1, -1) * (nearest > exact)
    elif mode == "rp":
        step = np.where(np.signbit(nearest), -1, 1) * (nearest < exact)
    else:
        raise Unsupported(f"rounding .{mode} of this type")
    return (bits + step).astype(bits.dtype).view(nearest.dtype)


def double_to_single(x: Array, mode: str) -> Array:
    """f64 to f32."""
    return directed(x.astype(np.float32), x, mode)


def double_to_odd_single(x: Array) -> Array:
    """f64 to f32: truncated, with the last bit set if anything was cut off.

    Rounding this once more, to two or more bits less, gives what rounding x at once would give.
    """
    cut = directed(x.astype(np.float32), x, "rz")
    return (cut.view(U32) | (cut != x)).view(np.float32)


def wide_to_double(x: Array, mode: str) -> Array:
    """64-bit integers to f64 in a directed mode."""
    upper = (x >> 32).astype(np.float64) * 2.0**32
    lower = (x & 0xFFFFFFFF).astype(np.float64)
    nearest = upper + lower
    error = lower - (nearest - upper)  # exact: upper is zero or at least as large as lower
    if mode == "rz":
        wrong, towards = error * nearest < 0, 0.0
    elif mode == "rm":
        wrong, towards = error < 0, -np.inf
    else:
        wrong, towards = error > 0, np.inf
    return np.where(wrong, np.nextafter(nearest, towards), nearest)


def integer_to_odd_double(x: Array) -> Array:
    """Integers as f64 that round, to f32 or less, as the integers do."""
    if x.dtype.itemsize < 8:
        return x.astype(np.float64)
    # From 2**53 on a multiple of 2**11, odd if anything was cut off, stands for the integer.
    wide = (x >> 53 != 0) & (x >> 53 != -1) if x.dtype.kind == "i" else x >> 53 != 0
    if not wide.any():
        return x.astype(np.float64)
    cut = (x & ~np.array(0x7FF, x.dtype)) | ((x & 0x7FF != 0).astype(x.dtype) << 11)
    return np.where(wide, cut, x).astype(np.float64)


def _added(drop: int) -> dict[str, Array]:
    """What a mode adds to bits, of which `drop` are dropped, to make them carry where it rounds up.

    For "rn" the last bit that is kept is added as well.
    """
    half = 1 << drop - 1
    return {
        "rn": constant(half - 1, U32),
        "rna": constant(half, U32),
        "rm": constant(2 * half - 1, U32),
        "rp": constant(2 * half - 1, U32),
        "drop": constant(drop, U32),
    }


_ADDED = {drop: _added(drop) for drop in (13, 16)}


def round_off(x: Array, drop: int, mode: str, random: Array | None = None) -> Array:
    """The bits of f32 rounded to a format that is f32 without its last 13 or 16 bits.

    The dropped bits of the result mean nothing. Overflow carries into the exponent, up to
    infinity. Mode "rs" adds `random`, `drop` bits wide: PTX ISA cvt, "carry out of the integer
    addition of the supplied random bits to the truncated off (discarded) bits".
    """
    rounded = _carried(x, drop, mode, random)
    return np.where(np.isnan(x), NAN_BITS, rounded) if any_nan(x) else rounded


def _carried(x: Array, drop: int, mode: str, random: Array | None = None) -> Array:
    """`round_off` for what is not a NaN."""
    bits = x.view(U32)
    added = _ADDED[drop]
    if mode == "rn":
        rounded = np.right_shift(bits, added["drop"])
        np.bitwise_and(rounded, ONE, rounded)
        np.add(rounded, added["rn"], rounded)
        return np.add(rounded, bits, rounded)
    if mode == "rz":
        return bits
    if mode == "rna":
        return bits + added["rna"]
    if mode == "rm":
        return bits + added["rm"] * (x < 0)
    if mode == "rp":
        return bits + added["rp"] * (x > 0)
    if mode == "rs" and random is not None:
        return bits + random
    raise Unsupported(f"rounding .{mode} of this type")


def single_to_bf16(x: Array, mode: str) -> Array:
    """f32 to bf16 bits, uint16."""
    return np.right_shift(round_off(x, 16, mode), SIXTEEN).astype(np.uint16)


def single_to_bf16_pair(high: Array, low: Array, mode: str) -> Array:
    """Two f32 to bf16x2."""
    rounded = round_off if any_nan_in_two(high, low) else _carried
    upper = np.bitwise_and(rounded(high, 16, mode), HIGH_HALF)
    return np.bitwise_or(upper, np.right_shift(rounded(low, 16, mode), SIXTEEN))


def bf16_to_single(bits: Array) -> Array:
    """bf16 bits, uint16, to f32."""
    wide = bits.astype(U32)
    return np.left_shift(wide, SIXTEEN, wide).view(np.float32)


_SIGN = constant(0x8000, U32)
_HALF_OVERFLOW = constant(0x47800000, U32)  # 65536.0: its code is that of infinity
_HALF_FIRST = constant(113 << 23, U32)  # 2**-14, the smallest normal f16
_THIRTEEN = constant(13, U32)
_THIRTEEN_BINADES = constant(13 << 23, U32)
_HALF_BIAS = constant((13 << 23) + (113 << 10), U32)


def _nearest_half(x: Array) -> Array:
    """f16 bits, uint32, nearest to f32 values; wrong for NaN.

    With 2**e the power of two at or below |x|, no less than 2**-14, the sum |x| + 2**(e + 13) is
    rounded to multiples of 2**(e - 10), an f16's last place; its last bits are the f16's, with the
    leading one of a normal number, which adds one to the exponent counted from there.
    """
    bits = x.view(U32)
    size = np.minimum(np.bitwise_and(bits, _MAGNITUDE), _HALF_OVERFLOW)
    exponent = np.bitwise_and(size, EXPONENT)
    np.maximum(exponent, _HALF_FIRST, out=exponent)
    total = np.add(exponent, _THIRTEEN_BINADES)
    np.add(size.view(np.float32), total.view(np.float32), total.view(np.float32))
    np.subtract(total, exponent, total)
    np.right_shift(exponent, _THIRTEEN, exponent)
    np.add(total, exponent, total)
    np.subtract(total, _HALF_BIAS, total)
    np.right_shift(bits, SIXTEEN, size)
    np.bitwise_and(size, _SIGN, size)
    return np.bitwise_or(total, size, total)


def half_bits(x: Array, mode: str) -> Array:
    """f32 to f16 bits in the lower half of uint32."""
    if mode != "rn" or x.size < LARGE:
        return _cast_to_half(x, mode).view(np.uint16).astype(U32)
    bits = _nearest_half(x)
    if any_nan(x):
        bits[np.isnan(x)] = 0x7FFF
    return bits


def single_to_half(x: Array, mode: str) -> Array:
    """f32 to f16."""
    if mode != "rn" or x.size < LARGE:
        return _cast_to_half(x, mode)
    return half_bits(x, mode).astype(np.uint16).view(np.float16)


def _cast_to_half(x: Array, mode: str) -> Array:
    half = directed(x.astype(np.float16), x, mode)
    if any_nan(x):
        half.view(np.uint16)[np.isnan(x)] = 0x7FFF
    return half


def random_half_bits(x: Array, random: Array) -> Array:
    """f32 to f16 bits in the lower half of uint32, rounded by 13 random bits.

    The random bits stand for a fraction of the last place, also below 2**-14, where more than 13
    bits are discarded: the PTX ISA does not say more. From 65536 on the result is infinity.
    """
    wide = x.astype(np.float64)
    size = np.abs(wide)
    place = np.exp2(np.maximum(np.frexp(size)[1] - 11, -24))
    steps = size / place
    floor = np.floor(steps)
    steps = floor + (steps - floor + random * 2.0**-13 >= 1.0)
    return half_bits(np.copysign(steps * place, wide).astype(np.float32), "rn")


@cache
def _half_table() -> Array:
    """f32 of every f16."""
    table = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    table.view(U32)[np.isnan(table)] = NAN_BITS
    return table


def look_up(table: Array, index: Array) -> Array:
    """`table[index]` for an index in range: "clip" leaves out NumPy's pass that checks it."""
    return table.take(index.astype(np.intp), mode="clip")


_HALF_EXPONENT = constant(0x7C00, np.int16)
_MOVED = constant(0x8FFFE000, U32).view(np.int32)
_MOVED_BINADES = constant(2.0**112, np.float32)


def half_to_single(x: Array) -> Array:
    """f16 to f32.

    Few values, and infinity and NaN, come from a table. Of many finite ones the bits are moved to
    where f32 has them, in a third of that time; then only the bias of the exponent is wrong.
    """
    bits = x.view(np.int16)
    if x.size >= LARGE:
        greatest = np.bitwise_and(bits, _HALF_EXPONENT) == _HALF_EXPONENT
        if not np.count_nonzero(greatest):
            wide = bits.astype(np.int32)  # with copies of the sign on the left
            np.left_shift(wide, _THIRTEEN.view(np.int32), wide)
            single = np.bitwise_and(wide, _MOVED, wide).view(np.float32)
            return np.multiply(single, _MOVED_BINADES, single)
    return look_up(_half_table(), x.view(np.uint16))
