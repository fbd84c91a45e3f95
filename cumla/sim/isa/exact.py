"""f64 arithmetic in any rounding mode, one lane at a time with Python's integers.

Slow, some microseconds a lane: for the directed modes, which programs hardly use in f64, and for
lanes where the fast way of `fused` has no room.
"""

from __future__ import annotations

from collections.abc import Callable
from math import copysign, inf, isfinite, isqrt, ldexp
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LARGEST = float(np.finfo(np.float64).max)
_LEAST_EXPONENT = -1074


def lane_by_lane(function: Callable[..., float], mode: str) -> Callable[..., Array]:
    """A function of Python floats and a mode as one of f64 arrays."""

    def run(*sources: Array) -> Array:
        lanes = np.broadcast_arrays(*sources)
        return np.array(
            [function(*x, mode) for x in zip(*(s.tolist() for s in lanes), strict=True)]
        )

    return run


def _round(numerator: int, denominator: int, mode: str) -> float:
    """The positive or negative fraction, not zero, rounded to f64."""
    negative = numerator < 0
    size = abs(numerator)
    exponent = size.bit_length() - denominator.bit_length() - 53
    if size << max(-exponent, 0) >= denominator << max(exponent, 0) + 53:
        exponent += 1
    exponent = max(exponent, _LEAST_EXPONENT)
    units, rest = divmod(size << max(-exponent, 0), denominator << max(exponent, 0))
    if mode == "rn":
        up = (2 * rest, units & 1) > (denominator << max(exponent, 0), 0)
    else:
        up = rest > 0 and mode == ("rm" if negative else "rp")
    try:
        rounded = ldexp(units + up, exponent)
    except OverflowError:
        away = mode in ("rn", "rm" if negative else "rp")
        rounded = inf if away else _LARGEST
    return -rounded if negative else rounded


def fma(a: float, b: float, c: float, mode: str) -> float:
    """a * b + c."""
    if not (isfinite(a) and isfinite(b)):
        return a * b + c
    if not isfinite(c):
        return c
    (an, ad), (bn, bd), (cn, cd) = (x.as_integer_ratio() for x in (a, b, c))
    numerator = an * bn * cd + cn * ad * bd
    if numerator:
        return _round(numerator, ad * bd * cd, mode)
    sign = copysign(1.0, a) * copysign(1.0, b)
    if a * b == 0 and c == 0 and sign == copysign(1.0, c):
        return c
    return -0.0 if mode == "rm" else 0.0


def add(a: float, b: float, mode: str) -> float:
    """a + b."""
    return fma(a, 1.0, b, mode)


def sub(a: float, b: float, mode: str) -> float:
    """a - b."""
    return fma(a, 1.0, -b, mode)


def mul(a: float, b: float, mode: str) -> float:
    """a * b."""
    return fma(a, b, copysign(0.0, a) * copysign(1.0, b), mode)


def div(a: float, b: float, mode: str) -> float:
    """a / b."""
    if a == 0 or b == 0 or not (isfinite(a) and isfinite(b)):
        return float(np.divide(a, b))
    (an, ad), (bn, bd) = a.as_integer_ratio(), b.as_integer_ratio()
    sign = -1 if bn < 0 else 1
    return _round(sign * an * bd, ad * abs(bn), mode)


def rcp(a: float, mode: str) -> float:
    """1 / a."""
    return div(1.0, a, mode)


def sqrt(a: float, mode: str) -> float:
    """The square root of a."""
    if not 0 < a < inf:
        return float(np.sqrt(a))
    numerator, denominator = a.as_integer_ratio()
    # A root that is no f64, nor halfway between two, is 2**-108 of it away from all of them, and
    # 2**-1000 is less than that of any root.
    return _round(isqrt((numerator << 2000) // denominator), 1 << 1000, mode)
