"""Constants, and registers that hold several small values."""

from __future__ import annotations

from typing import Any

import numpy as np

from cumla.sim.isa.table import DTYPES


def unsigned(kind: str) -> str:
    """The type of the same width in which registers are kept: "s32" gives "u32".

    For operations whose bits do not depend on the sign it saves a view of each operand.
    """
    return "u" + kind[1:] if kind[0] == "s" else kind


def constant(value: int, kind: str) -> Any:
    """A value of a type, for use inside functions of arrays.

    It has no dimension: NumPy runs a ufunc on [n] and [] twice as fast as on [n] and [1].
    """
    bits = DTYPES[kind].itemsize * 8
    return np.array(value & ((1 << bits) - 1), np.dtype(f"u{bits // 8}")).view(DTYPES[kind])


def aligned(*arrays: Any) -> list[Any]:
    """The arrays, contiguous and all of one length, so that they may be viewed as parts."""
    size = max(a.size for a in arrays)
    return [np.ascontiguousarray(a) if a.size == size else np.repeat(a, size) for a in arrays]


def parts(values: Any, dtype: Any) -> Any:
    """[n] registers as [n, k] values of a smaller dtype, lowest bits first."""
    count = values.dtype.itemsize // np.dtype(dtype).itemsize
    return np.ascontiguousarray(values).view(dtype).reshape(-1, count)
