"""The one comparison of the tests: `cumla smoke`'s, raising instead of reporting."""

from __future__ import annotations

from numpy.typing import DTypeLike

from cumla.cli.comparison import (
    DENSE_OUT,
    LSE_DECODE,
    LSE_MHA,
    LSE_PREFILL,
    MHA_OUT,
    PREFILL_OUT,
    SPARSE_OUT,
    Array,
    Tolerance,
    compare,
)

__all__ = [
    "DENSE_OUT",
    "LSE_DECODE",
    "LSE_MHA",
    "LSE_PREFILL",
    "MHA_OUT",
    "PREFILL_OUT",
    "SPARSE_OUT",
    "Tolerance",
    "assert_close",
]


def assert_close(
    name: str, result: Array, reference: Array, tolerance: Tolerance, *, dtype: DTypeLike
) -> None:
    """Raise AssertionError unless `result` has `dtype` and is `reference` within `tolerance`.

    The message tells the name, how many elements fail, the worst coordinate with both values, and
    the cosine difference.
    """
    found = compare(name, result, reference, tolerance, dtype=dtype)
    if not found.passed:
        raise AssertionError(found.message)
