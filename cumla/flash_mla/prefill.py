"""FlashMLA's prefill calls: sparse MLA, and multi-head attention with its packed variants."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.attention import mha_varlen, sparse_prefill
from cumla.attention.arguments import check_flag, check_half
from cumla.backends.arrays import Arrays
from cumla.checks import bad_type, bad_value, check_dtype, check_int, check_shape
from cumla.flash_mla.names import check_given, speaking_of

Array = NDArray[Any]


def flash_mla_sparse_fwd(
    q: Any,
    kv: Any,
    indices: Any,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Any = None,
    topk_length: Any = None,
    out: Any = None,
) -> tuple[Any, Any, Any]:
    """Attention of query tokens over the KV tokens that each of them selects. No batch, no pages.

    Args:
        q: [s_q, h_q, d_qk], bfloat16 or float16, d_qk 576 or 512.
        kv: [s_kv, 1, d_qk], q's dtype.
        indices: int32 [s_q, 1, topk]; a value that is negative or >= s_kv selects nothing.
        sm_scale: > 0, multiplies q . k.
        d_v: 512.
        attn_sink: float32 [h_q].
        topk_length: int32 [s_q], how many of a query's indices count.
        out: where to put the result, [s_q, h_q, 512] in q's dtype.

    Returns:
        out [s_q, h_q, 512] in q's dtype; max_logits and lse [s_q, h_q], float32, natural log. A
        row without a token gives 0, -inf and +inf.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the arrays are on a GPU that cannot be used.
    """
    check_given(q=q, kv=kv, indices=indices)
    return sparse_prefill(
        q, kv, indices, sm_scale, d_v=d_v, attn_sink=attn_sink, topk_length=topk_length, out=out
    )


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_qo: Any,
    cu_seqlens_kv: Any,
    max_seqlen_qo: int | None,
    max_seqlen_kv: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Any, Any]:
    """Multi-head attention within each of b sequences that lie packed one after the other.

    Args:
        q: [total_q, h_q, d_qk], bfloat16 or float16.
        k: [total_k, h_kv, d_qk], q's dtype; h_kv divides h_q.
        v: [total_k, h_kv, d_v], q's dtype.
        cu_seqlens_qo, cu_seqlens_kv: int32 [b + 1], where each sequence begins, from 0 to the
            total.
        max_seqlen_qo, max_seqlen_kv: at least the longest sequence; only checked. None is taken.
        dropout_p: 0.
        softmax_scale: > 0; d_qk**-0.5 by default.
        causal: query token t of s_q sees key tokens j < s_k - (s_q - 1 - t) only.
        deterministic: changes nothing; the results always are.
        is_varlen: False: all b sequences are equally long, and of cu_seqlens only the size counts.

    Returns:
        out [total_q, h_q, d_v] in q's dtype and lse [total_q, h_q], float32, natural log. A row
        without a key gives 0 and -inf: FlashMLA's rule here, and not that of the MLA functions.
        `cumla.mha_varlen_backward` takes both as they are.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the arrays are on a GPU that cannot be used.
    """
    check_given(q=q, k=k, v=v, cu_seqlens_qo=cu_seqlens_qo, cu_seqlens_kv=cu_seqlens_kv)
    arrays = Arrays(q=q, k=k, v=v, cu_seqlens_qo=cu_seqlens_qo, cu_seqlens_kv=cu_seqlens_kv)
    return _mha(
        arrays,
        (arrays["q"], arrays["k"], arrays["v"]),
        ("cu_seqlens_qo", "cu_seqlens_kv"),
        {"max_seqlen_qo": max_seqlen_qo, "max_seqlen_kv": max_seqlen_kv},
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: int | None,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Any, Any]:
    """`flash_attn_varlen_func` with q, k and v side by side in one array.

    Args:
        qkv: [total, h, 2 * head_dim_qk + d_v]: q, k, v, in this order, in the last dimension.
        cu_seqlens, max_seqlen: of queries and keys alike.
        head_dim_qk: size of q's and of k's part.
        dropout_p, softmax_scale, causal, deterministic, is_varlen: as there.

    Returns, raises: as there.
    """
    check_given(qkv=qkv, cu_seqlens=cu_seqlens)
    arrays = Arrays(qkv=qkv, cu_seqlens=cu_seqlens)
    packed = arrays["qkv"]
    check_half("qkv", packed, ("total", "h", "2 * head_dim_qk + d_v"), may_be_empty=True)
    d_qk = check_int("head_dim_qk", head_dim_qk, low=1, high=(packed.shape[2] - 1) // 2)
    return _mha(
        arrays,
        (packed[..., :d_qk], packed[..., d_qk : 2 * d_qk], packed[..., 2 * d_qk :]),
        ("cu_seqlens", "cu_seqlens"),
        {"max_seqlen": max_seqlen},
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_qo: Any,
    cu_seqlens_kv: Any,
    max_seqlen_qo: int | None,
    max_seqlen_kv: int | None,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Any, Any]:
    """`flash_attn_varlen_func` with k and v side by side in one array.

    Args:
        q: as there.
        kv: [total_k, h_kv, head_dim_qk + d_v]: k, then v, in the last dimension.
        cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv: as there.
        head_dim_qk: size of k's part: q's last dimension.
        dropout_p, softmax_scale, causal, deterministic, is_varlen: as there.

    Returns, raises: as there.
    """
    check_given(q=q, kv=kv, cu_seqlens_qo=cu_seqlens_qo, cu_seqlens_kv=cu_seqlens_kv)
    arrays = Arrays(q=q, kv=kv, cu_seqlens_qo=cu_seqlens_qo, cu_seqlens_kv=cu_seqlens_kv)
    queries, packed = arrays["q"], arrays["kv"]
    check_half("q", queries, ("total_q", "h_q", "head_dim_qk"), may_be_empty=True)
    check_half(
        "kv",
        packed,
        ("total_k", "h_kv", "head_dim_qk + d_v"),
        queries.dtype,
        may_be_empty=True,
    )
    d_qk = check_int("head_dim_qk", head_dim_qk, low=queries.shape[2], high=queries.shape[2])
    if packed.shape[2] <= d_qk:
        raise bad_value(
            "kv",
            f"shape {packed.shape}",
            f"after head_dim_qk = {d_qk} numbers of k the last dimension must hold v",
            "Concatenate k and v along the last dimension.",
        )
    return _mha(
        arrays,
        (queries, packed[..., :d_qk], packed[..., d_qk:]),
        ("cu_seqlens_qo", "cu_seqlens_kv"),
        {"max_seqlen_qo": max_seqlen_qo, "max_seqlen_kv": max_seqlen_kv},
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def _mha(
    arrays: Arrays,
    qkv: tuple[Array, Array, Array],
    bounds_names: tuple[str, str],
    longest: Mapping[str, Any],
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    is_varlen: bool,
) -> tuple[Any, Any]:
    """mha_varlen of q, k, v between the bounds that `arrays` has by name, FlashMLA's way.

    `longest` are the max_seqlen arguments, by name, for queries and keys (or one for both).
    """
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real):
        raise bad_type("dropout_p", repr(dropout_p), "it must be a number", "Pass 0.0.")
    if dropout_p != 0:
        raise bad_value("dropout_p", dropout_p, "there is no dropout", "Pass 0.0.")
    check_flag("causal", causal)
    check_flag("deterministic", deterministic)
    check_flag("is_varlen", is_varlen)
    q, k, v = qkv
    check_shape("q", q, ["total_q", "h_q", "d_qk"])
    check_shape("k", k, ["total_k", "h_kv", "d_qk"])
    bounds_q, bounds_k = (
        _bounds(name, arrays[name], len(rows), is_varlen)
        for name, rows in zip(bounds_names, (q, k), strict=True)
    )
    for (name, value), bounds in zip(longest.items(), (bounds_q, bounds_k), strict=False):
        _check_longest(name, value, bounds)
    with speaking_of(dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds_names, strict=True))):
        out, lse = mha_varlen(
            q, k, v, bounds_q, bounds_k, softmax_scale=softmax_scale, causal=causal
        )
    lse[_rows_without_key(bounds_q, bounds_k, causal)] = -np.inf
    return arrays.give_back("out", out), arrays.give_back("lse", lse)


def _bounds(argument: str, bounds: Array, total: int, is_varlen: bool) -> Array:
    """`bounds` themselves, or, unless is_varlen, those of as many equally long sequences."""
    check_dtype(argument, bounds, [np.int32])
    check_shape(argument, bounds, ["b + 1"])
    batch = len(bounds) - 1
    if is_varlen or batch < 1:
        return bounds
    if total % batch:
        raise bad_value(
            argument,
            f"a batch of {batch}",
            f"with is_varlen=False the {total} rows must divide into equally long sequences",
            "Pass is_varlen=True.",
        )
    return (np.arange(batch + 1) * (total // batch)).astype(np.int32)


def _check_longest(argument: str, value: Any, bounds: Array) -> None:
    """Raise if max_seqlen `value` is less than the longest sequence; None is not checked."""
    if value is None:
        return
    try:
        promised = operator.index(value)
    except TypeError:
        raise bad_type(
            argument, repr(value), "it must be an integer", "Pass the longest sequence's length."
        ) from None
    longest = int(np.diff(bounds.astype(np.int64)).max(initial=0))
    if promised < longest:
        raise bad_value(
            argument,
            promised,
            f"the longest sequence has {longest} tokens",
            f"Pass {longest} or more.",
        )


def _rows_without_key(bounds_q: Array, bounds_k: Array, causal: bool) -> NDArray[np.bool_]:
    """Which of the query rows [total_q] see no key."""
    lens_q, lens_k = np.diff(bounds_q), np.diff(bounds_k)
    visible = np.repeat(lens_k, lens_q)
    if causal:
        # The last row of a sequence sees all of its keys, the one before it one less.
        visible = visible - (np.repeat(bounds_q[1:], lens_q) - 1 - np.arange(len(visible)))
    empty: NDArray[np.bool_] = visible <= 0
    return empty
