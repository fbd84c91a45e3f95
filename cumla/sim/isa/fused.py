"""Exact fused multiply-add, and sums that are rounded to odd.

A value rounded to odd is the exact one truncated, its last bit set if anything was cut off.
Rounding it once more, to two or more bits less, in any mode, gives what rounding the exact value
would give (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms
using rounding to odd", 2008).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.isa import exact
from cumla.sim.isa.floating import canonical
from cumla.sim.isa.rounding import SMALLEST_NORMAL, constant, double_to_single

Array = NDArray[Any]

_U64 = np.dtype(np.uint64)
_SIGNED: dict[Any, Any] = {4: np.dtype(np.int32), 8: np.dtype(np.int64)}
# Of the 53 bits of an f64 an f32 keeps 24; a tie between two f32 has but the highest of the 29
# others. Where the result is subnormal, a tie has 28 zeros and more at its end.
_BELOW_TIE = constant((1 << 28) - 1, _U64)
_CUT = constant((1 << 29) - 1, _U64)
_TIE = constant(1 << 28, _U64)

_SPLITTER = constant(2.0**27 + 1, np.float64)
_SMALL = constant(2.0**-900, np.float64)
_LARGE = constant(2.0**990, np.float64)


def _lost(a: Array, b: Array, total: Array) -> Array:
    """`a + b - total`, exactly, where `total` is the nearest value to a + b (Knuth's TwoSum)."""
    part = total - a
    return (a - (total - part)) + (b - part)


def _to_odd(nearest: Array, lost: Array) -> Array:
    """The exact value `nearest + lost` rounded to odd; infinity and NaN as they are."""
    inexact = np.abs(lost) > 0
    if not np.count_nonzero(inexact):
        return nearest
    signed = _SIGNED[nearest.itemsize]
    bits = nearest.view(signed)
    too_far = np.bitwise_xor(bits, lost.view(signed)) < 0
    return (bits - (too_far & inexact) | inexact).view(nearest.dtype)


def odd_sum(a: Array, b: Array) -> Array:
    """The sum of two f32, or of two f64, rounded to odd; without overflow."""
    total = a + b
    return _to_odd(total, _lost(a, b, total))


def pick(x: Array, lanes: Array) -> Array:
    """The elements of some lanes; one element that stands for all stays that."""
    return x if x.size == 1 else x[lanes]


def fma_single(a: Array, b: Array, c: Array) -> Array:
    """f32 a * b + c to the nearest; NaN canonical.

    The product of two f32 is exact in f64. Rounding the sum to f64 first does no harm unless it
    yields a tie between two f32; those lanes are done again, by way of rounding to odd.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    result = total.astype(np.float32)
    if np.count_nonzero(np.bitwise_and(total.view(_U64), _BELOW_TIE)) != len(result):
        _mend_ties(product, c, total, result)
    return canonical(result)


def _mend_ties(product: Array, c: Array, total: Array, result: Array) -> None:
    doubtful = np.bitwise_and(total.view(_U64), _CUT) == _TIE
    tiny = np.abs(total) < SMALLEST_NORMAL
    if np.count_nonzero(tiny):
        doubtful |= tiny & (total != 0)
    if np.count_nonzero(doubtful):
        lanes = np.flatnonzero(doubtful)
        total = odd_sum(pick(product, lanes), pick(c, lanes).astype(np.float64))
        result[lanes] = total.astype(np.float32)


def fma_single_odd(a: Array, b: Array, c: Array) -> Array:
    """f32 a * b + c as f64 that rounds, to f32 or less in any mode, as the exact value does."""
    return odd_sum(np.multiply(a, b, dtype=np.float64), c.astype(np.float64))


def fma_single_directed(a: Array, b: Array, c: Array, mode: str) -> Array:
    """f32 a * b + c in a directed mode; NaN canonical."""
    total = fma_single_odd(a, b, c)
    result = double_to_single(total, mode)
    if mode == "rm":
        # IEEE 754 "The sign bit": a sum that is exactly zero is -0 unless both parts are +0.
        positive = ~(np.signbit(a) ^ np.signbit(b) | np.signbit(c))
        result = np.where((total == 0) & ~positive, -np.float32(0), result)
    return canonical(result)


def _split(x: Array) -> tuple[Array, Array]:
    """x as the sum of two numbers of at most 26 bits (Veltkamp)."""
    scaled = x * _SPLITTER
    high = scaled - (scaled - x)
    return high, x - high


def fma_double(a: Array, b: Array, c: Array) -> Array:
    """f64 a * b + c to the nearest.

    The exact product is a sum of two f64 (Dekker); the low parts of the whole are summed to odd.
    Lanes where a part could overflow or underflow are done one by one.
    """
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    rest = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    low = c + rest
    lower = _lost(c, rest, low)
    high = product + low
    middle = _lost(product, low, high)
    result = high + odd_sum(middle, lower)
    plain = product + c
    zero = result == 0
    if np.count_nonzero(zero):  # its sign is that of the plain sum: the parts have zeros too
        result[zero] = plain[zero]
    size = np.abs(product)
    largest = np.maximum(np.maximum(np.abs(a), np.abs(b)), np.maximum(size, np.abs(c)))
    safe = (size > _SMALL) & (largest < _LARGE)
    if np.count_nonzero(safe) != len(safe):
        safe |= ((a == 0) | (b == 0)) & (largest < _LARGE)
        _mend_extremes(a, b, c, plain, result, np.flatnonzero(~safe))
    return result


def _mend_extremes(a: Array, b: Array, c: Array, plain: Array, result: Array, lanes: Array) -> None:
    a, b, c = (np.broadcast_to(x, result.shape)[lanes] for x in (a, b, c))
    finite = np.isfinite(a) & np.isfinite(b)
    # Where there is an infinity or NaN nothing is rounded; finite factors do not make another one.
    result[lanes] = np.where(finite, c, plain[lanes])
    finite &= np.isfinite(c)
    if finite.any():
        result[lanes[finite]] = exact.lane_by_lane(exact.fma, "rn")(a[finite], b[finite], c[finite])
