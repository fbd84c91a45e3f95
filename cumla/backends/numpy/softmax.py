"""Attention over a growing set of keys, the one definition that every op is made of.

For one query row with logits z_j = scale * q . k_j over its visible keys j:

    peak     = max_j z_j
    total    = sum_j exp(z_j - peak)
    weighted = sum_j exp(z_j - peak) v_j

    out = weighted / total        lse = peak + ln(total)

Two disjoint key sets with states a and b join to a state with peak = max(a.peak, b.peak), and each
side's total and weighted scaled by exp(side.peak - peak) and added. That is all of split-KV
attention: blocks of a piece join, pieces of a request join, and so do two caches.

In float64 this is the oracle, in float32 the backend; logits, as in all of cumla, are natural.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cumla.backends.numpy.parallel import run_ordered
from cumla.backends.problems import MergeAttention
from cumla.scratch import scratch

Array = NDArray[Any]

# Rows merged at a time: 512 KB of float32 a part.
_MERGED_ROWS = 256
# Query rows that meet a chunk of keys at a time: the logits of both are 512 KB of float32.
TILE_ROWS = 256


def chunk_tokens(rows: int) -> int:
    """How many keys to decode and multiply at a time for so many query rows.

    1024 keys of 576 float32 are 2.4 MB. Fewer sit better in a core's L2 cache, which is what counts
    when BLAS reads them for many rows; but every NumPy call takes Python's lock, and with few rows
    threads would wait for that more than they compute.
    """
    return 1024 if rows <= 64 else 512


def scaled_queries(q: Array, softmax_scale: float, dtype: DTypeLike) -> Array:
    """scale * q for q [..., d_qk], as [rows, d_qk]."""
    rows = q.reshape(-1, q.shape[-1]).astype(dtype)
    rows *= np.asarray(softmax_scale, dtype)
    return rows


class SoftmaxState:
    """`peak` [rows], `total` [rows] and `weighted` [rows, d_v] of the keys seen so far."""

    def __init__(self, rows: int, d_v: int, dtype: DTypeLike) -> None:
        self.peak: Array = np.full(rows, -np.inf, dtype)
        self.total: Array = np.zeros(rows, dtype)
        self.weighted: Array = np.zeros((rows, d_v), dtype)

    def add_keys(self, q_scaled: Array, k: Array, v: Array, visible: Array | None = None) -> None:
        """Join the keys k [n, d_qk] with values v [n, d_v].

        q_scaled is scale * q, [rows, d_qk]. `visible` [n, rows] tells which row may see which key;
        None means all. Nothing of a key that a row may not see reaches it, not even NaN.
        """
        # Tokens down, rows across: of BLAS's orders this is the fastest for few rows.
        logits = scratch("logits", (len(k), len(q_scaled)), k.dtype)
        np.matmul(k, q_scaled.T, out=logits)
        if visible is not None:
            logits[~visible] = -np.inf
        peak = np.maximum(self.peak, logits.max(axis=0))
        # A row that has seen nothing keeps peak -inf; shifting by 0 then gives exp(-inf) = 0.
        shift = np.where(peak == -np.inf, 0, peak)
        logits -= shift
        weights = np.exp(logits, out=logits)
        decay = np.exp(self.peak - shift)
        self.peak = peak
        self.total = self.total * decay + np.ones(len(k), k.dtype) @ weights
        self.weighted *= decay[:, None]
        self.weighted += weighted_sum(weights, v, visible)

    def join(self, other: SoftmaxState) -> None:
        """Join the state of a disjoint set of keys."""
        peak = np.maximum(self.peak, other.peak)
        shift = np.where(peak == -np.inf, 0, peak)
        mine, theirs = np.exp(self.peak - shift), np.exp(other.peak - shift)
        self.peak = peak
        self.total = self.total * mine + other.total * theirs
        self.weighted *= mine[:, None]
        self.weighted += other.weighted * theirs[:, None]

    def result(self, attn_sink: Array | None = None) -> tuple[Array, Array]:
        """(out [rows, d_v], lse [rows]); a row without a key gives 0 and +inf.

        attn_sink [rows] joins a key with that logit and no value to `out` alone:
        out * exp(lse) / (exp(lse) + exp(sink)). A row whose sum is NaN gives NaN and lse +inf.
        """
        empty = self.total == 0
        out = self.weighted / np.where(empty, 1, self.total)[:, None]
        lse = np.where(self.total > 0, self.peak + np.log(self.total), np.inf)
        if attn_sink is not None:
            share = np.where(empty, 0, 1 / (1 + np.exp(attn_sink.astype(lse.dtype) - lse)))
            out *= share[:, None]
        return out, lse


def weighted_sum(weights: Array, values: Array, visible: Array | None) -> Array:
    """sum_j weights[j, row] * values[j] over the j that `visible` [n, rows] shows to the row.

    The weights of other j are 0 already; this keeps their values out even where those are NaN.
    The result may be scratch memory of this thread: use it before the next call.
    """
    if visible is None:
        result = scratch("weighted_sum", (weights.shape[1], values.shape[1]), values.dtype)
        return np.matmul(weights.T, values, out=result)
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if not len(broken):
        return weights.T @ values
    clean = values.copy()
    clean[broken] = 0
    result = weights.T @ clean
    for j in broken:
        rows = visible[j]
        result[rows] += weights[j, rows, None] * values[j]
    return result


def merge_attention(problem: MergeAttention, dtype: DTypeLike) -> None:
    """Join the results of disjoint key sets: their (out, lse) as states of peak lse and total 1.

    out = sum_i exp(lse_i - lse) out_i with exp(lse) = sum_i exp(lse_i). An lse of -inf marks a row
    without a key, and so does +inf unless out is NaN: that is what a row whose sum is NaN has.
    """
    rows, d_v = problem.lse.size, problem.out.shape[-1]
    outs = [out.reshape(rows, d_v) for out in problem.outs]
    lses = [lse.reshape(rows) for lse in problem.lses]
    merged_out, merged_lse = np.empty((rows, d_v), problem.out.dtype), np.empty(rows, dtype)

    def merge(part: slice) -> tuple[Array, Array]:
        states = [
            _state_of(out[part], lse[part], dtype) for out, lse in zip(outs, lses, strict=True)
        ]
        for state in states[1:]:
            states[0].join(state)
        return states[0].result()

    def store(part: slice, result: tuple[Array, Array]) -> None:
        merged_out[part], merged_lse[part] = result

    run_ordered(merge, [slice(i, i + _MERGED_ROWS) for i in range(0, rows, _MERGED_ROWS)], store)
    problem.out[...] = merged_out.reshape(problem.out.shape)
    problem.lse[...] = merged_lse.reshape(problem.lse.shape)


def _state_of(out: Array, lse: Array, dtype: DTypeLike) -> SoftmaxState:
    """A state whose result is out [rows, d_v] and lse [rows]."""
    rows, d_v = out.shape
    state = SoftmaxState(rows, d_v, dtype)
    spoilt = np.isposinf(lse) & np.isnan(out).any(axis=1)
    empty = np.isinf(lse) & ~spoilt
    state.peak = np.where(empty, -np.inf, lse).astype(dtype)
    state.total = np.where(empty, 0, np.where(spoilt, np.nan, 1)).astype(dtype)
    state.weighted = np.where(empty[:, None], 0, out).astype(dtype)
    return state
