"""mha_varlen: multi-head attention over packed sequences, MLA as in prefill, and its gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.attention.arguments import (
    check_flag,
    check_half,
    check_heads,
    result_array,
)
from cumla.backends.arrays import Arrays, is_cupy
from cumla.backends.problems import MhaVarlen, MhaVarlenBackward
from cumla.checks import bad_value, check_dtype, check_scale, check_shape

Array = NDArray[Any]


def mha_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    out: Any = None,
    lse: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Attention within each of b sequences that lie packed one after the other.

    Args:
        q: [total_q, h_q, d_qk], bfloat16 or float16. Head h belongs to KV head h // (h_q / h_kv).
        k: [total_k, h_kv, d_qk], q's dtype.
        v: [total_k, h_kv, d_v], q's dtype. Head dims are free; DeepSeek V3 has 192 and 128.
        cu_seqlens_q, cu_seqlens_k: int32 [b + 1], where each sequence begins, from 0 to the total;
            on a GPU what they hold is not checked.
        softmax_scale: > 0; d_qk**-0.5 by default.
        causal: query token t of s_q sees key tokens j < s_k - (s_q - 1 - t) only.
        out, lse: where to put the results, of their shapes and dtypes.
        stream: a CUDA stream, for arrays on a GPU.

    Returns:
        out [total_q, h_q, d_v] in q's dtype and lse [total_q, h_q], float32, natural log. A row
        that sees no key gives 0 and +inf.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the arrays are on a GPU that cannot be used.
    """
    arrays = Arrays(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        out=out,
        lse=lse,
        stream=stream,
    )
    out_shape = _check(arrays, causal)
    inputs = _inputs(arrays, softmax_scale, causal)
    with arrays.place():
        problem = MhaVarlen(
            **inputs,
            out=result_array(arrays, "out", out_shape, arrays["q"].dtype),
            lse=result_array(arrays, "lse", out_shape[:2], np.float32),
        )
        arrays.backend.mha_varlen(problem)
        return arrays.give_back("out", problem.out), arrays.give_back("lse", problem.lse)


def mha_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    stream: Any = None,
) -> tuple[Any, Any, Any]:
    """The gradients of `mha_varlen`, given the gradient of its out. Deterministic.

    Args:
        dout: [total_q, h_q, d_v], q's dtype.
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal: as in the forward call.
        out, lse: its results. A row without a key may have lse +inf or -inf.
        dq, dk, dv: where to put the results, of their shapes and dtypes.
        stream: a CUDA stream, for arrays on a GPU.

    Returns:
        dq, dk, dv: shaped and typed as q, k and v. With fewer KV heads than query heads, dk and
        dv are summed over the query heads of each KV head.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the arrays are on a GPU that cannot be used.
    """
    arrays = Arrays(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        dout=dout,
        out=out,
        lse=lse,
        dq=dq,
        dk=dk,
        dv=dv,
        stream=stream,
    )
    backend = arrays.backend
    out_shape = _check(arrays, causal)
    dtype = arrays["q"].dtype
    for name in ("dout", "out"):
        # The oracle's own forward results are not rounded to q's dtype.
        wanted = arrays[name].dtype if arrays[name].dtype == backend.result_dtype(dtype) else dtype
        check_half(name, arrays[name], out_shape, wanted, may_be_empty=True)
    check_dtype("lse", arrays["lse"], [np.float32, backend.result_dtype(np.float32)])
    check_shape("lse", arrays["lse"], out_shape[:2])
    inputs = _inputs(arrays, softmax_scale, causal)
    with arrays.place():
        problem = MhaVarlenBackward(
            forward=MhaVarlen(**inputs, out=arrays["out"], lse=arrays["lse"]),
            dout=arrays["dout"],
            dq=result_array(arrays, "dq", arrays["q"].shape, dtype),
            dk=result_array(arrays, "dk", arrays["k"].shape, dtype),
            dv=result_array(arrays, "dv", arrays["v"].shape, dtype),
        )
        backend.mha_varlen_backward(problem)
        return (
            arrays.give_back("dq", problem.dq),
            arrays.give_back("dk", problem.dk),
            arrays.give_back("dv", problem.dv),
        )


def _inputs(arrays: Arrays, softmax_scale: float | None, causal: bool) -> dict[str, Any]:
    """The fields of MhaVarlen that are inputs."""
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    scale = check_scale("softmax_scale", softmax_scale, arrays["q"].shape[2] ** -0.5)
    fields: dict[str, Any] = {name: arrays[name] for name in names}
    return fields | {"softmax_scale": scale, "causal": bool(causal)}


def _check(arrays: Arrays, causal: Any) -> tuple[int, int, int]:
    """Check q, k, v and the sequences' bounds; returns the shape of out."""
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    check_half("q", q, ("total_q", "h_q", "d_qk"), may_be_empty=True)
    total_q, h_q, d_qk = q.shape
    check_half("k", k, ("total_k", "h_kv", d_qk), q.dtype, may_be_empty=True)
    total_k, h_kv, _ = k.shape
    check_half("v", v, (total_k, h_kv, "d_v"), q.dtype, may_be_empty=True)
    check_heads(h_q, h_kv)
    check_flag("causal", causal)
    starts_q, starts_k = arrays["cu_seqlens_q"], arrays["cu_seqlens_k"]
    _check_bounds("cu_seqlens_q", starts_q, "b + 1", total_q)
    _check_bounds("cu_seqlens_k", starts_k, len(starts_q), total_k)
    return total_q, h_q, v.shape[2]


def _check_bounds(argument: str, bounds: Array, size: str | int, total: int) -> None:
    """Raise unless `bounds` runs from 0 to `total` without a step back.

    What an array on a GPU holds is not looked at.
    """
    check_dtype(argument, bounds, [np.int32])
    check_shape(argument, bounds, [size])
    if is_cupy(bounds):
        return
    # Compared, not subtracted: a difference may wrap around in int32.
    falls = (bounds[1:] < bounds[:-1]).any()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != total or falls:
        raise bad_value(
            argument,
            np.array2string(bounds, threshold=8),
            f"it must begin with 0, never decrease and end with {total}, the number of rows",
            "Pass the running sum of the sequences' lengths, with a 0 in front.",
        )
