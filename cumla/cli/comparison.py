"""Is a result the same as its reference? The one rule that the tests and `cumla smoke` judge by.

In order: shape and dtype are as wanted; +inf, -inf and NaN stand at the same places (and count as
equal from there on); every element has an absolute error below `abs` or a relative error
|result - reference| / (|reference| + 1e-6) below `rel`; and the whole array has a cosine
difference |1 - 2 sum(a r) / (sum a^2 + sum r^2)| of at most `cos`. The element rule alone lets an
all-zero output pass where the reference is small, and a scale error that no single element shows:
the cosine catches both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cumla.checks import bad_value, check_array

Array = NDArray[Any]

_RELATIVE_FLOOR = 1e-6
# A reference with a smaller sum of squares has no direction to speak of.
_COSINE_FLOOR = 1e-12


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from its reference; see the top of this module."""

    abs: float
    rel: float
    cos: float

    def __post_init__(self) -> None:
        for name, value in (("abs", self.abs), ("rel", self.rel), ("cos", self.cos)):
            # An infinite tolerance makes a check that cannot fail; 0 or NaN one that cannot pass.
            if not math.isfinite(value) or value <= 0:
                raise bad_value(
                    name, value, "it must be finite and > 0", "For equal bits use array_equal."
                )


# FlashMLA's own tests hold the same ops to these.
DENSE_OUT = Tolerance(8e-4, 2.01 / 128, 5e-6)
SPARSE_OUT = Tolerance(1e-3, 2.01 / 128, 5e-6)
PREFILL_OUT = Tolerance(8e-4, 3.01 / 128, 7e-6)
MHA_OUT = Tolerance(1e-3, 8.01 / 128, 7e-6)
"""Its gradients dq, dk and dv too."""
LSE_DECODE = Tolerance(1e-6, 8.01 / 65536, 1e-7)
"""Dense and sparse decode."""
LSE_PREFILL = Tolerance(1e-6, 2.01 / 65536, 1e-7)
"""Sparse prefill, its max_logits too."""
LSE_MHA = Tolerance(1e-6, 2.01 / 65536, 1e-7)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. The three figures are NaN where it could not get as far as them."""

    passed: bool
    max_abs_error: float
    max_rel_error: float
    cosine_difference: float
    message: str
    """One line for a person, whether it passed or not."""


def compare(
    name: str, result: Array, reference: Array, tolerance: Tolerance, *, dtype: DTypeLike
) -> Comparison:
    """Judge `result` by `reference`.

    Args:
        name: what to call the result in the message.
        result: any shape, real numbers.
        reference: the wanted shape; its dtype is free (float64 for a float32 or bfloat16 result).
        tolerance: one of the constants above, or another.
        dtype: the dtype that `result` must have.

    Returns:
        A Comparison; it is the caller who raises when that did not pass.

    Raises:
        ArgumentTypeError: `result` or `reference` is not a numpy.ndarray.
    """
    check_array("result", result)
    check_array("reference", reference)
    if result.shape != reference.shape:
        return _failed(name, f"shape {result.shape}, wanted {reference.shape}")
    if result.dtype != np.dtype(dtype):
        return _failed(name, f"dtype {result.dtype.name}, wanted {np.dtype(dtype).name}")
    with np.errstate(invalid="ignore"):  # a signalling NaN is as good a NaN as another
        got, want = result.astype(np.float64), reference.astype(np.float64)

    misplaced = _misplaced(got, want)
    if misplaced.any():
        at = _coordinate(misplaced.argmax(), misplaced)
        return _failed(
            name,
            f"{misplaced.sum()} of {misplaced.size} elements differ in being +inf, -inf or NaN, "
            f"first at {at}: got {got[at]!s}, reference {want[at]!s}",
        )
    finite = np.isfinite(want)
    got, want = np.where(finite, got, 0.0), np.where(finite, want, 0.0)

    abs_error = np.abs(got - want)
    rel_error = abs_error / (np.abs(want) + _RELATIVE_FLOOR)
    wrong = (abs_error >= tolerance.abs) & (rel_error >= tolerance.rel)
    cosine = _cosine_difference(got, want)
    passed = not wrong.any() and cosine <= tolerance.cos

    worst = "no elements"
    if want.size:
        # The worst is the failing element with the largest relative error, which is what makes it
        # stand out; when the cosine alone fails, or nothing does, any element may be it.
        at = _coordinate(np.where(wrong | ~wrong.any(), rel_error, -1.0).argmax(), want)
        worst = (
            f"worst at {at}: got {got[at]:.9g}, reference {want[at]:.9g}, "
            f"abs error {abs_error[at]:.3g}, rel error {rel_error[at]:.3g}"
        )
    message = (
        f"{name}: {'close' if passed else 'NOT close'}: "
        f"{wrong.sum()} of {want.size} elements fail abs {tolerance.abs:.3g} and rel "
        f"{tolerance.rel:.3g}; cosine difference {cosine:.3g} (at most {tolerance.cos:.3g}); "
        f"{worst}"
    )
    return Comparison(
        passed=bool(passed),
        max_abs_error=float(abs_error.max(initial=0.0)),
        max_rel_error=float(rel_error.max(initial=0.0)),
        cosine_difference=cosine,
        message=message,
    )


def _failed(name: str, reason: str) -> Comparison:
    return Comparison(False, math.nan, math.nan, math.nan, f"{name}: NOT close: {reason}")


def _misplaced(got: Array, want: Array) -> NDArray[np.bool_]:
    """Where one of the two is NaN or an infinity and the other is not just the same."""
    unordered = np.isnan(got) != np.isnan(want)
    infinite = np.isinf(got) | np.isinf(want)
    wrong: NDArray[np.bool_] = np.asarray(unordered | (infinite & (got != want)))
    return wrong


def _coordinate(flat: np.intp, array: Array) -> tuple[int, ...]:
    return tuple(int(one) for one in np.unravel_index(flat, array.shape))


def _cosine_difference(got: Array, want: Array) -> float:
    squares = float(np.sum(want * want))
    if squares < _COSINE_FLOOR:
        return 0.0
    return abs(1.0 - 2.0 * float(np.sum(got * want)) / (float(np.sum(got * got)) + squares))
