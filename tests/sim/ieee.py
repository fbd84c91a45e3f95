"""What conversions should give: IEEE rounding by its definition, on Python's integers."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

# Bits of the significand, exponent of the smallest normal and of the largest number.
FORMATS = {
    "f64": (53, -1022, 1023),
    "f32": (24, -126, 127),
    "f16": (11, -14, 15),
    "bf16": (8, -126, 127),
    "tf32": (11, -126, 127),
}


def ends(kind: str) -> tuple[int, int]:
    bits = int(kind[1:])
    return (0, 2**bits - 1) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def wrapped(value: int, kind: str) -> int:
    low, high = ends(kind)
    return (value - low) % (high - low + 1) + low


def rounded(value: float, kind: str, mode: str) -> float:
    """The definition of IEEE rounding of a float or an int; exact: all results are doubles."""
    if value == 0 or (isinstance(value, float) and not math.isfinite(value)):
        return value
    numerator, denominator = abs(value).as_integer_ratio()
    places, least, most = FORMATS[kind]
    scale = 1 - denominator.bit_length()  # the size is numerator * 2**scale
    exponent = max(numerator.bit_length() - 1 + scale, least)
    place = exponent - places + 1
    unit = 1 << max(place - scale, 0)
    steps, rest = divmod(numerator << max(scale - place, 0), unit)
    away = {
        "rn": 2 * rest > unit or (2 * rest == unit and steps % 2 == 1),
        "rna": 2 * rest >= unit,
        "rz": False,
        "rm": value < 0 and rest > 0,
        "rp": value > 0 and rest > 0,
    }[mode]
    steps += away
    if steps << place + 2000 < 1 << most + 2001:
        size = math.ldexp(steps, place)
    elif mode in ("rn", "rna") or mode == ("rm" if value < 0 else "rp"):
        size = math.inf
    else:
        size = math.ldexp(2**places - 1, most - places + 1)
    return -size if value < 0 else size


def as_double(values: Any, kind: str) -> Any:
    if kind == "bf16":
        values = values.view(ml_dtypes.bfloat16)
    if kind == "tf32":
        assert not (values & 0x1FFF).any()
        values = values.view(np.float32)
    return values.astype(np.float64)


def assert_same(got: Any, expected: Any) -> None:
    """Equal as float64, zeros with their signs and NaN included."""
    expected = np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    wrong = (got != expected) & ~(np.isnan(got) & np.isnan(expected))
    wrong |= np.signbit(got) != np.signbit(expected)
    wrong &= ~np.isnan(expected) | ~np.isnan(got)
    where = np.flatnonzero(wrong)
    assert where.size == 0, (where.size, where[0], got[where[0]], expected[where[0]])
