"""Products of integers. PTX ISA "Integer Arithmetic Instructions: mul"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cumla.sim.isa.table import DTYPES
from cumla.sim.isa.values import constant, unsigned

WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


@dataclass(frozen=True, slots=True)
class Product:
    """A function of two arrays of type `source` that gives one of type `result`."""

    run: Callable[..., Any]
    source: str
    result: str


def product(kind: str, mode: str) -> Product:
    """a * b of a type: the low half ("lo"), the high half ("hi") or all of it ("wide")."""
    if mode == "lo":
        return Product(np.multiply, unsigned(kind), unsigned(kind))
    if kind not in WIDE:
        return Product(_high_unsigned if kind == "u64" else _high_signed, "u64", "u64")
    wide = DTYPES[WIDE[kind]]
    if mode == "wide":
        return Product(lambda a, b: np.multiply(a, b, dtype=wide), kind, WIDE[kind])
    half = constant(DTYPES[kind].itemsize * 8, WIDE[kind])
    narrow = DTYPES[unsigned(kind)]
    return Product(
        lambda a, b: (np.multiply(a, b, dtype=wide) >> half).astype(narrow), kind, unsigned(kind)
    )


LOW = constant(0xFFFFFFFF, "u64")
HALF = constant(32, "u64")
TOP = constant(63, "s64")


def _high_unsigned(a: Any, b: Any) -> Any:
    # Schoolbook, in digits of 32 bits: no partial sum below reaches 2^64.
    a_low, a_high, b_low, b_high = a & LOW, a >> HALF, b & LOW, b >> HALF
    middle = a_high * b_low + (a_low * b_low >> HALF)
    return a_high * b_high + (middle >> HALF) + ((a_low * b_high + (middle & LOW)) >> HALF)


def _high_signed(a: Any, b: Any) -> Any:
    # A negative a was read as a + 2^64, which put one b too many into the high half.
    excess_b = (a.view(np.int64) >> TOP).view(np.uint64) & b
    excess_a = (b.view(np.int64) >> TOP).view(np.uint64) & a
    return _high_unsigned(a, b) - excess_a - excess_b
