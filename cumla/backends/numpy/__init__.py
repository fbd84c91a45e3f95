"""The CPU backend: the definitions of all ops in NumPy, float32, through BLAS and threads.

The same code in float64 is the oracle that `cumla.backends.oracle` gives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cumla import layouts
from cumla.backends.numpy import decode, mha, prefill
from cumla.backends.numpy.softmax import merge_attention
from cumla.backends.problems import (
    DenseDecode,
    MergeAttention,
    MhaVarlen,
    MhaVarlenBackward,
    SparseDecode,
    SparsePrefill,
)
from cumla.fp8 import ScaleRule
from cumla.layouts import KVLayout

Array = NDArray[Any]


class NumpyBackend:
    """See `cumla.backends.Backend`. `dtype` is what it computes in: float32, or float64."""

    name = "numpy"

    def __init__(self, dtype: DTypeLike = np.float32) -> None:
        self.dtype = np.dtype(dtype)

    def result_dtype(self, dtype: DTypeLike) -> np.dtype[Any]:
        return np.dtype(dtype) if self.dtype == np.float32 else self.dtype

    def as_array(self, array: Array) -> Array:
        return array

    def empty_pages(self, layout: KVLayout, num_pages: int, page_size: int) -> Array:
        return layout.empty_pages(num_pages, page_size)

    def write_rows(
        self, pages: Array, layout: KVLayout, slots: Array, rows: Array, rule: ScaleRule | None
    ) -> None:
        rows = np.ascontiguousarray(layouts.as_rows(rows, layout))
        layouts.write_rows(pages, layout, slots, rows[:, None, :], rule)

    def read_rows(self, pages: Array, layout: KVLayout, slots: Array) -> Array:
        return layouts.read_rows(pages, layout, slots)

    def copy_page(self, pages: Array, layout: KVLayout, source: int, target: int) -> None:
        pages[target] = pages[source]

    def dense_decode(self, problem: DenseDecode) -> None:
        decode.dense_decode(problem, self.dtype)

    def sparse_decode(self, problem: SparseDecode) -> None:
        decode.sparse_decode(problem, self.dtype)

    def sparse_prefill(self, problem: SparsePrefill) -> None:
        prefill.sparse_prefill(problem, self.dtype)

    def mha_varlen(self, problem: MhaVarlen) -> None:
        mha.mha_varlen(problem, self.dtype)

    def mha_varlen_backward(self, problem: MhaVarlenBackward) -> None:
        mha.mha_varlen_backward(problem, self.dtype)

    def merge_attention(self, problem: MergeAttention) -> None:
        merge_attention(problem, self.dtype)
