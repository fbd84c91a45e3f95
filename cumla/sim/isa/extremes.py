"""min and max of floats (PTX ISA "Floating Point Instructions: min", "max").

A NaN loses to a number, or wins with `.NaN`; -0 is less than +0. Subnormal numbers need not be
flushed before: flushing keeps the order, so that it may come last.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from cumla.sim.isa.floating import NAN, ZERO, Array, Run
from cumla.sim.isa.rounding import U32, any_nan, constant

_UFUNCS: dict[tuple[str, bool], Any] = {
    ("min", False): np.fmin,
    ("max", False): np.fmax,
    ("min", True): np.minimum,
    ("max", True): np.maximum,
}
_SIGN = constant(1 << 31, U32)


def _extreme(name: str, propagate: bool, a: Array, b: Array) -> Array:
    """min or max of f32 or f64, f32 NaN canonical."""
    ufunc = _UFUNCS[name, propagate]
    plain = result = ufunc(a, b)
    if np.count_nonzero(plain == ZERO):
        # NumPy may take either of two zeros, by their order or by their signs.
        signs = np.bitwise_or if name == "min" else np.bitwise_and
        integer = f"u{plain.itemsize}"
        result = signs(plain.view(integer), ufunc(b, a).view(integer)).view(plain.dtype)
    if any_nan(plain):
        result = np.where(plain != plain, NAN if plain.itemsize == 4 else plain, result)
    return result


def double_extreme(name: str) -> Run:
    """min or max of f64."""
    return partial(_extreme, name, False)


def single_extreme(name: str, flags: frozenset[str], count: int) -> Run:
    """min or max of two or three f32, with `.NaN`, `.abs` and `.xorsign`."""
    two = partial(_extreme, name, "NaN" in flags)
    if count == 3:
        change: Run = np.abs if "abs" in flags else np.asarray
        return lambda a, b, c: two(two(change(a), change(b)), change(c))
    if "abs" not in flags:
        return two

    def run(a: Array, b: Array) -> Array:
        result = two(np.abs(a), np.abs(b))
        sign = np.bitwise_and(np.bitwise_xor(a.view(U32), b.view(U32)), _SIGN)
        signed = np.bitwise_or(result.view(U32), sign).view(np.float32)
        return np.where(result != result, result, signed) if any_nan(result) else signed

    return run


_MAGNITUDE = constant(0x7FFF, np.int16)
_HALF_SIGN = constant(-0x8000, np.int16)
_FIFTEEN = constant(15, np.int16)


def _order(x: Array) -> Array:
    """Integers in the order of the half-precision floats with these bits; its own inverse."""
    return np.bitwise_xor(x, np.bitwise_and(np.right_shift(x, _FIFTEEN), _MAGNITUDE))


def half_extreme(name: str, flags: frozenset[str], infinity: int) -> Run:
    """min or max of f16 or bf16 as bits, int16, given the bits of infinity; NaN is canonical."""
    ufunc: Any = np.minimum if name == "min" else np.maximum
    greatest = constant(infinity, np.int16)

    def run(a: Array, b: Array) -> Array:
        a_size, b_size = np.bitwise_and(a, _MAGNITUDE), np.bitwise_and(b, _MAGNITUDE)
        a_nan, b_nan = a_size > greatest, b_size > greatest
        sign = None
        if "xorsign" in flags:
            sign = np.bitwise_and(np.bitwise_xor(a, b), _HALF_SIGN)
            a, b = a_size, b_size
            result = ufunc(a, b)
        else:
            result = _order(ufunc(_order(a), _order(b)))
        any_nan = np.count_nonzero(a_nan) or np.count_nonzero(b_nan)
        if any_nan:
            result = np.where(a_nan, b, np.where(b_nan, a, result))
        if sign is not None:
            result = np.bitwise_or(result, sign)
        if any_nan:
            neither = a_nan | b_nan if "NaN" in flags else a_nan & b_nan
            result = np.where(neither, _MAGNITUDE, result)
        return result

    return run
