"""sparse_prefill: every query token attends to its own selection of a flat KV array."""

from __future__ import annotations

from typing import Any

import numpy as np

from cumla.attention.arguments import (
    check_half,
    check_indices,
    check_lengths,
    check_sink,
    result_array,
)
from cumla.backends.arrays import Arrays
from cumla.backends.problems import SparsePrefill
from cumla.checks import (
    bad_value,
    check_dtype,
    check_int,
    check_last_stride,
    check_scale,
    check_shape,
)
from cumla.layouts import LAYOUTS

_QK_DIMS = sorted({layout.d_qk for layout in LAYOUTS})
_V_DIM = 512


def sparse_prefill(
    q: Any,
    kv: Any,
    indices: Any,
    sm_scale: float,
    *,
    d_v: int = _V_DIM,
    attn_sink: Any = None,
    topk_length: Any = None,
    out: Any = None,
    max_logits: Any = None,
    lse: Any = None,
    stream: Any = None,
) -> tuple[Any, Any, Any]:
    """Attention of query tokens over the KV tokens that each of them selects. No batch, no pages.

    Args:
        q: [s_q, h_q, d_qk], bfloat16 or float16, d_qk 576 or 512. Any h_q.
        kv: [s_kv, 1, d_qk], q's dtype; V is the first 512 numbers of a row.
        indices: int32 [s_q, 1, topk]. One that is negative or >= s_kv selects nothing; one that
            occurs twice counts twice.
        sm_scale: > 0, multiplies q . k.
        d_v: 512.
        attn_sink: float32 [h_q]; out is multiplied by exp(lse) / (exp(lse) + exp(attn_sink)).
        topk_length: int32 [s_q], how many of a query's indices count, from the first; all by
            default. What stands beyond is never looked at. On a GPU a length is not checked.
        out, max_logits, lse: where to put the results, of their shapes and dtypes.
        stream: a CUDA stream, for arrays on a GPU.

    Returns:
        out [s_q, h_q, 512] in q's dtype; max_logits [s_q, h_q], float32, the largest
        sm_scale * q . k; lse [s_q, h_q], float32, natural log. A row that selects no valid token
        gives 0, -inf and +inf.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the arrays are on a GPU that cannot be used.
    """
    arrays = Arrays(
        q=q,
        kv=kv,
        indices=indices,
        attn_sink=attn_sink,
        topk_length=topk_length,
        out=out,
        max_logits=max_logits,
        lse=lse,
        stream=stream,
    )
    queries, keys, selected = arrays["q"], arrays["kv"], arrays["indices"]
    check_half("q", queries, ("s_q", "h_q", "d_qk"))
    s_q, h_q, d_qk = queries.shape
    if d_qk not in _QK_DIMS:
        raise bad_value(
            "q", f"d_qk {d_qk}", f"it must be one of {_QK_DIMS}", "Check the last dimension."
        )
    check_dtype("kv", keys, [queries.dtype])
    check_shape("kv", keys, ["s_kv", 1, d_qk])
    check_last_stride("kv", keys)
    check_indices("indices", selected, (s_q, 1, "topk"))
    lengths = arrays.optional("topk_length")
    if lengths is not None:
        topk = selected.shape[2]
        check_lengths(
            "topk_length", lengths, ((s_q,),), topk, f"indices has {topk} for each query."
        )
    check_sink(arrays.optional("attn_sink"), h_q)
    d_v = check_int("d_v", d_v, low=_V_DIM, high=_V_DIM)
    if sm_scale is None:
        raise bad_value("sm_scale", None, "it has no default", "Pass a float such as d_qk**-0.5.")
    scale = check_scale("sm_scale", sm_scale, sm_scale)
    with arrays.place():
        problem = SparsePrefill(
            q=queries,
            kv=keys,
            indices=selected,
            topk_length=lengths,
            attn_sink=arrays.optional("attn_sink"),
            softmax_scale=scale,
            d_v=d_v,
            out=result_array(arrays, "out", (s_q, h_q, d_v), queries.dtype),
            max_logits=result_array(arrays, "max_logits", (s_q, h_q), np.float32),
            lse=result_array(arrays, "lse", (s_q, h_q), np.float32),
        )
        arrays.backend.sparse_prefill(problem)
        return (
            arrays.give_back("out", problem.out),
            arrays.give_back("max_logits", problem.max_logits),
            arrays.give_back("lse", problem.lse),
        )
