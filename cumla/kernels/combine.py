"""Join the pieces of split requests: kernels_cu/portable/combine/combine.cuh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cumla.kernels.device import Call, DeviceArray, Program
from cumla.kernels.formats import number_type
from cumla.layouts import LAYOUTS

_WARPS = 8
"""kernels_cu's COMBINE_WARPS."""
_NARROW = 128
"""Columns of a warp where rows are few."""
_WARPS_PER_SM = 16
"""Fewer rows than so many for each SM, a warp each, leave a GPU short of loads under way."""


def combine(
    call: Call,
    *,
    o_accum: DeviceArray,
    lse_accum: DeviceArray,
    num_splits: DeviceArray,
    attn_sink: DeviceArray | None,
    out: DeviceArray,
    lse: DeviceArray,
) -> None:
    """Launch the kernel. It touches only the requests that have several pieces.

    Args:
        o_accum: float32 [slots, s_q, h_q, d_v], contiguous, at a multiple of 16 bytes: each piece's
            output, divided by the piece's own sum.
        lse_accum: float32 [slots, s_q, h_q], contiguous: its lse in log2 units; -inf: it has no
            key, and its output does not count.
        num_splits: int32 [b + 1], contiguous; the slots of request i begin at num_splits[i].
        attn_sink: float32 [h_q], natural logits, or None. Applied here and to no piece.
        out: bfloat16 or float16 [b, s_q, h_q, d_v], the last stride 1; written.
        lse: float32 [b, h_q, s_q], natural log, without the sink; written. A row without a key
            gets out 0 and lse +inf, a row that has met a NaN out NaN and lse +inf.
    """
    batch, s_q, h_q, d_v = out.shape
    rows = batch * s_q * h_q
    if not rows:
        return
    columns = _NARROW if rows < _WARPS_PER_SM * call.num_sms else d_v
    size = out.dtype.itemsize
    sink_step = 0 if attn_sink is None else attn_sink.strides[0] // 4
    call.launch(
        _program(out.dtype, d_v, columns),
        grid=-(-rows * (d_v // columns) // _WARPS),
        block=32 * _WARPS,
        args=[
            *(o_accum, lse_accum, num_splits, attn_sink, np.int64(sink_step)),
            *(out, *(np.int64(step // size) for step in out.strides[:3])),
            *(lse, *(np.int64(step // 4) for step in lse.strides)),
            *map(np.uint32, (batch, s_q, h_q)),
        ],
    )


def _program(dtype: np.dtype[Any], d_v: int, columns: int) -> Program:
    expression = f"cumla::combine_pieces<{number_type(dtype)}, {d_v}, {columns}>"
    return Program("portable/combine/combine.cuh", expression)


def instances(target_shared_bytes: int) -> Iterator[tuple[Program, int, int]]:
    """All instantiations, the threads of a block, and its dynamic shared memory."""
    for dtype, d_v in sorted({(one.compute_dtype, one.d_v) for one in LAYOUTS}, key=str):
        for columns in (_NARROW, d_v):
            yield _program(dtype, d_v, columns), 32 * _WARPS, 0
