"""What reductions of bulk and tensor copies make of elements, and elements to try them on."""

from __future__ import annotations

import ml_dtypes
import numpy as np

DTYPES = {
    "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64, "b32": np.uint32,
    "b64": np.uint64, "f32": np.float32, "f64": np.float64, "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}  # fmt: skip


def reduced(op, kind, old, new):
    """What an element of the destination becomes."""
    if op == "inc":
        return np.where(old >= new, 0, old + np.uint32(1)).astype(old.dtype)
    if op == "dec":
        return np.where((old == 0) | (old > new), new, old - np.uint32(1)).astype(old.dtype)
    functions = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    with np.errstate(over="ignore"):
        return functions[op](old, new)


def values(rng, kind, n):
    """Elements of a type: half of the integers small, some floats subnormal."""
    dtype = np.dtype(DTYPES[kind])
    if dtype.kind in "ui":
        few = rng.integers(0, 4, n).astype(dtype)
        many = rng.integers(0, 1 << 64, n, np.uint64).astype(dtype)
        return np.where(rng.random(n) < 0.5, few, many)
    scales = rng.choice([1.0, 2.0**-130, 2.0**-14] if kind == "f32" else [1.0, 2.0**-5], n)
    return (rng.standard_normal(n) * scales).astype(dtype)
