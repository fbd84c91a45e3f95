"""Layouts as the template arguments of kernels: the types in kernels_cu/include/rows.cuh."""

from __future__ import annotations

from typing import Any

import numpy as np

from cumla.fp8 import BF16
from cumla.layouts import KVLayout

_TYPES = {
    BF16: "cumla::bf16",
    np.dtype(np.float16): "cumla::f16",
    np.dtype(np.float32): "float",
}


def number_type(dtype: np.dtype[Any]) -> str:
    """The C++ type of a number: "cumla::bf16", "cumla::f16" or "float"."""
    return _TYPES[dtype]


def row_type(layout: KVLayout) -> str:
    """The C++ type that describes the rows of `layout`."""
    if not layout.is_fp8:
        return f"cumla::HalfRows<{number_type(layout.dtype)}, {layout.d_qk}, {layout.d_v}>"
    numbers = (
        layout.d_qk,
        layout.d_v,
        layout.d_nope,
        layout.tile,
        layout.data_row_bytes,
        layout.rope_offset,
        layout.scale_bytes,
        str(layout.scales_at_page_end).lower(),
    )
    return f"cumla::Fp8Rows<{', '.join(map(str, numbers))}>"
