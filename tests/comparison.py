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
    "KV_SIZE",
    "LSE_DECODE",
    "LSE_MHA",
    "LSE_PREFILL",
    "MHA_OUT",
    "PREFILL_OUT",
    "SPARSE_OUT",
    "Tolerance",
    "assert_close",
]

KV_SIZE = 0.1
"""The standard deviation of the numbers in the caches of FlashMLA's tests, clipped to [-1, 1].

DENSE_OUT and SPARSE_OUT are for these. A kernel rounds the weights to 16 bits before they meet V,
bfloat16 by up to 2**-8 of each, which moves out by up to 2**-8 * sum(weight * |v|): about 3.1e-4,
as the mean |v| is 0.08. With three times larger numbers that is 9.4e-4, more than DENSE_OUT allows
where values cancel out, and a few of a correct kernel's elements are beyond.
"""


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
