"""How cumla refuses bad input: it names the argument, the value, the rule and the way out.

Every public function checks all of its arguments with these before it writes anything. A wrong
value raises `ArgumentError` (a ValueError), a wrong type `ArgumentTypeError` (a TypeError).
This module imports nothing of ours, so every room may use it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_FLOAT32 = np.finfo(np.float32)


class ArgumentError(ValueError):
    """An argument has a value, shape or stride that the function cannot take."""


class ArgumentTypeError(TypeError):
    """An argument has a type or dtype that the function cannot take."""


def bad_value(argument: str, got: object, rule: str, fix: str) -> ArgumentError:
    """The error for a wrong value, for the caller to raise."""
    return ArgumentError(f"{argument}: got {got}; {rule}. {fix}")


def bad_type(argument: str, got: object, rule: str, fix: str) -> ArgumentTypeError:
    """The error for a wrong type, for the caller to raise."""
    return ArgumentTypeError(f"{argument}: got {got}; {rule}. {fix}")


def check_array(argument: str, value: Any) -> NDArray[Any]:
    """Return `value` if it is a NumPy array, else raise."""
    if isinstance(value, np.ma.MaskedArray):
        raise bad_type(
            argument,
            "a masked array",
            "its mask would be lost",
            "Fill it with .filled(...), or select rows another way.",
        )
    if not isinstance(value, np.ndarray):
        raise bad_type(
            argument,
            type(value).__name__,
            "it must be a numpy.ndarray here",
            "Convert it with numpy.asarray.",
        )
    return value


def check_dtype(argument: str, array: NDArray[Any], allowed: Sequence[DTypeLike]) -> None:
    """Raise unless `array` has one of the `allowed` dtypes."""
    if not array.dtype.isnative:
        raise bad_type(
            argument,
            f"dtype {array.dtype.str}",
            "it must have this machine's byte order",
            "Convert it with .astype(a.dtype.newbyteorder('=')).",
        )
    if array.dtype not in [np.dtype(one) for one in allowed]:
        names = " or ".join(np.dtype(one).name for one in allowed)
        raise bad_type(
            argument,
            f"dtype {array.dtype.name}",
            f"it must be {names}",
            f"Convert it with .astype({np.dtype(allowed[0]).name}).",
        )


def check_shape(argument: str, array: NDArray[Any], expected: Sequence[str | int]) -> None:
    """Raise unless `array` has the `expected` shape.

    An entry of `expected` is a number that the dimension must equal, or a name for a free one.
    """
    wanted = "[" + ", ".join(str(one) for one in expected) + "]"
    if array.ndim != len(expected):
        raise bad_value(
            argument,
            f"{array.ndim} dimensions {array.shape}",
            f"it must have {len(expected)}: {wanted}",
            "Reshape it.",
        )
    for size, want in zip(array.shape, expected, strict=True):
        if isinstance(want, int) and size != want:
            raise bad_value(
                argument,
                f"shape {array.shape}",
                f"it must be {wanted}",
                "Pass arrays whose shapes belong to one problem.",
            )


def check_int(argument: str, value: Any, *, low: int, high: int | None = None) -> int:
    """Return `value` as an int in [low, high], else raise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise bad_type(argument, repr(value), "it must be an integer", f"Pass an int >= {low}.")
    number = int(value)
    if number < low or (high is not None and number > high):
        bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise bad_value(argument, number, f"it must be {bounds}", "Pass a value in that range.")
    return number


def check_in_range(argument: str, lengths: NDArray[Any], high: int | None, fix: str) -> None:
    """Raise unless all `lengths` are in [0, high] (None: any high); names the first that is not."""
    outside = lengths < 0
    rule = "it must be >= 0"
    if high is not None:
        outside |= lengths > high
        rule = f"it must be in [0, {high}]"
    if outside.any():
        first = [int(one) for one in np.unravel_index(outside.argmax(), outside.shape)]
        where = ", ".join(str(one) for one in first)
        raise bad_value(argument, f"{lengths[tuple(first)]} at [{where}]", rule, fix)


def check_scale(argument: str, value: Any, default: float) -> float:
    """Return the softmax scale (`default` for None); raise unless it is finite and > 0."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise bad_type(
            argument, repr(value), "it must be a number", "Pass a float such as d_qk**-0.5."
        )
    try:
        number = float(value)
    except OverflowError:  # an integer beyond float's range
        number = math.inf
    # The negation also catches NaN.
    if not _FLOAT32.tiny <= number <= _FLOAT32.max:
        raise bad_value(
            argument,
            value,
            "it must be > 0 and finite, as a normal float32",
            "Fold a sign into q; the masking relies on a positive scale.",
        )
    return number


def check_last_stride(argument: str, array: NDArray[Any]) -> None:
    """Raise unless the last dimension is contiguous (a dimension of size 1 always is)."""
    if array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        raise bad_value(
            argument,
            f"a last-dimension stride of {array.strides[-1]} bytes",
            f"it must be {array.itemsize} (contiguous elements)",
            "Pass numpy.ascontiguousarray(...) of it.",
        )
