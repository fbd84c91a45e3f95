"""The ops once more, slow and obvious, in float64: what the package's own definitions are held to.

Nothing here comes from the package. A row's keys are gathered one by one into a list, so there is
no mask, no chunk, no running maximum and nothing to join: a key that a row may not see is never
touched. FP8 caches come in decoded (by `cumla.unpack_kv`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from comparison import Tolerance
from numpy.typing import NDArray

Array = NDArray[Any]
Rows = list[Array]

TIGHT = Tolerance(1e-9, 1e-9, 1e-12)
"""For two float64 results that differ in the order of their sums only."""

D_V = 512


def same_bits(left: Array, right: Array) -> bool:
    """Are the two arrays the same, bit for bit (NaN too)?"""
    return (left.dtype, left.shape) == (right.dtype, right.shape) and (
        np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()
    )


def attend(
    q: Array, keys: Array, values: Array, scale: float, sink: float | None = None
) -> tuple[Array, float, float]:
    """(out, lse, largest logit) of one row q [d_qk] over all keys [n, d_qk], values [n, d_v].

    `sink` is the logit of one more key, whose value is 0 and that the lse does not count.
    """
    if not len(keys):
        return np.zeros(values.shape[1]), np.inf, -np.inf
    with np.errstate(all="ignore"):
        logits = keys @ q.astype(np.float64) * scale
        largest = logits.max()
        weights = np.exp(logits - largest)
        below = weights.sum()
        if sink is not None:
            below += np.exp(np.float64(sink) - largest)
        out = (weights / below) @ values
        lse = largest + np.log(weights.sum())
    return out, (np.inf if np.isnan(lse) else float(lse)), float(largest)


def dense_decode(
    q: Array,
    kv_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[Array, Array]:
    """out [b, s_q, h_q, 512], lse [b, h_q, s_q]."""
    b, s_q, h_q, d_qk = q.shape
    page_size, h_kv = kv_cache.shape[1:3]
    scale = d_qk**-0.5 if softmax_scale is None else softmax_scale
    out, lse = np.zeros((b, s_q, h_q, D_V)), np.zeros((b, h_q, s_q))
    for i in range(b):
        for s in range(s_q):
            count = int(cache_seqlens[i])
            if causal:
                count -= s_q - 1 - s
            for group in range(h_kv):
                keys = []
                for token in range(count):
                    page = block_table[i, token // page_size]
                    keys.append(kv_cache[page, token % page_size, group])
                k = _stacked(keys, d_qk)
                for h in range(h_q):
                    if h // (h_q // h_kv) == group:
                        out[i, s, h], lse[i, h, s], _ = attend(q[i, s, h], k, k[:, :D_V], scale)
    return out, lse


def sparse_decode(
    q: Array,
    kv: Array,
    indices: Array,
    *,
    topk_length: Array | None = None,
    attn_sink: Array | None = None,
    extra_kv: Array | None = None,
    extra_indices: Array | None = None,
    extra_topk_length: Array | None = None,
    softmax_scale: float | None = None,
) -> tuple[Array, Array]:
    """out [b, s_q, h_q, 512], lse [b, h_q, s_q]; kv and extra_kv [pages, page, 1, d_qk] decoded."""
    b, s_q, h_q, d_qk = q.shape
    scale = d_qk**-0.5 if softmax_scale is None else softmax_scale
    out, lse = np.zeros((b, s_q, h_q, D_V)), np.zeros((b, h_q, s_q))
    for i in range(b):
        for s in range(s_q):
            keys = _selected(kv, indices[i, s], _length(topk_length, i, s))
            if extra_kv is not None and extra_indices is not None:
                keys += _selected(extra_kv, extra_indices[i, s], _length(extra_topk_length, i, s))
            k = _stacked(keys, d_qk)
            for h in range(h_q):
                sink = None if attn_sink is None else float(attn_sink[h])
                out[i, s, h], lse[i, h, s], _ = attend(q[i, s, h], k, k[:, :D_V], scale, sink)
    return out, lse


def sparse_prefill(
    q: Array,
    kv: Array,
    indices: Array,
    sm_scale: float,
    *,
    attn_sink: Array | None = None,
    topk_length: Array | None = None,
) -> tuple[Array, Array, Array]:
    """out [s_q, h_q, 512], max_logits [s_q, h_q], lse [s_q, h_q]."""
    s_q, h_q, d_qk = q.shape
    out, peaks, lse = np.zeros((s_q, h_q, D_V)), np.zeros((s_q, h_q)), np.zeros((s_q, h_q))
    for s in range(s_q):
        keys = _selected(kv[:, None], indices[s, 0], _length(topk_length, s, 0))
        k = _stacked(keys, d_qk)
        for h in range(h_q):
            sink = None if attn_sink is None else float(attn_sink[h])
            out[s, h], lse[s, h], peaks[s, h] = attend(q[s, h], k, k[:, :D_V], sm_scale, sink)
    return out, peaks, lse


def mha_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[Array, Array]:
    """out [total_q, h_q, d_v], lse [total_q, h_q]."""
    total_q, h_q, d_qk = q.shape
    scale = d_qk**-0.5 if softmax_scale is None else softmax_scale
    out, lse = np.zeros((total_q, h_q, v.shape[2])), np.zeros((total_q, h_q))
    for row, visible in enumerate(_visible(cu_seqlens_q, cu_seqlens_k, causal)):
        for h in range(h_q):
            group = h // (h_q // k.shape[1])
            keys = _stacked([k[j, group] for j in visible], d_qk)
            values = _stacked([v[j, group] for j in visible], v.shape[2])
            out[row, h], lse[row, h], _ = attend(q[row, h], keys, values, scale)
    return out, lse


def mha_varlen_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[Array, Array, Array]:
    """dq, dk, dv by the chain rule, one query row after the other.

    For one row: dp_j = dout . v_j; through the softmax dz_j = p_j (dp_j - sum_i p_i dp_i).
    """
    h_q, d_qk = q.shape[1:]
    scale = d_qk**-0.5 if softmax_scale is None else softmax_scale
    dq, dk, dv = (np.zeros(one.shape) for one in (q, k, v))
    q, k, v, dout = (one.astype(np.float64) for one in (q, k, v, dout))
    for row, visible in enumerate(_visible(cu_seqlens_q, cu_seqlens_k, causal)):
        if not visible:
            continue
        for h in range(h_q):
            group = h // (h_q // k.shape[1])
            keys = np.array([k[j, group] for j in visible])
            values = np.array([v[j, group] for j in visible])
            logits = keys @ q[row, h] * scale
            p = np.exp(logits - logits.max())
            p /= p.sum()
            dp = values @ dout[row, h]
            dz = p * (dp - (p * dp).sum())
            dv[visible, group] += p[:, None] * dout[row, h]
            dk[visible, group] += scale * dz[:, None] * q[row, h]
            dq[row, h] = scale * (dz @ keys)
    return dq, dk, dv


def _visible(cu_seqlens_q: Array, cu_seqlens_k: Array, causal: bool) -> list[list[int]]:
    """For every row of q, the rows of k that it sees."""
    found = []
    for i in range(len(cu_seqlens_q) - 1):
        s_q = int(cu_seqlens_q[i + 1] - cu_seqlens_q[i])
        first, end = int(cu_seqlens_k[i]), int(cu_seqlens_k[i + 1])
        for t in range(s_q):
            last = end - (s_q - 1 - t) if causal else end
            found.append(list(range(first, last)))
    return found


def _selected(kv: Array, indices: Array, length: int | None) -> Rows:
    """The rows of kv [pages, page, 1, d] that the first `length` of `indices` [topk] select."""
    pages, page_size = kv.shape[:2]
    keys = []
    for index in indices[:length].tolist():
        if 0 <= index < pages * page_size:
            keys.append(kv[index // page_size, index % page_size, 0])
    return keys


def _length(lengths: Array | None, i: int, s: int) -> int | None:
    if lengths is None:
        return None
    return int(lengths[i] if lengths.ndim == 1 else lengths[i, s])


def _stacked(rows: Rows, d: int) -> Array:
    """The rows [n][d], of which there may be none, as float64 [n, d]."""
    return np.array(rows).astype(np.float64) if rows else np.zeros((0, d))
