"""Multi-head attention over packed sequences of unequal lengths, forward and backward.

For one sequence, query token t and key token j, and head h with KV head g = h // (h_q / h_kv):

    z[t, j] = scale * q[t] . k[j]      visible if j < s_k (causal: j < s_k - (s_q - 1 - t))
    p[t, j] = exp(z[t, j] - lse[t])    out[t] = sum_j p[t, j] v[j]

Backward, with D[t] = sum_c dout[t, c] out[t, c]:

    dv[j] = sum_t p[t, j] dout[t]
    dz[t, j] = p[t, j] (dout[t] . v[j] - D[t])
    dq[t] = scale * sum_j dz[t, j] k[j]        dk[j] = scale * sum_t dz[t, j] q[t]

where the sums over t of dv and dk also run over the query heads of the KV head. No atomics: a
thread owns the gradients that it adds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cumla.backends.numpy.parallel import run_ordered
from cumla.backends.numpy.softmax import (
    TILE_ROWS,
    SoftmaxState,
    chunk_tokens,
    scaled_queries,
    weighted_sum,
)
from cumla.backends.problems import MhaVarlen, MhaVarlenBackward

Array = NDArray[Any]


@dataclass(frozen=True)
class _Tile:
    """Some query tokens of one sequence, with all heads of one KV head."""

    head: int
    """KV head."""
    heads: slice
    """Its query heads."""
    queries: slice
    """Rows of q."""
    keys: slice
    """Rows of k and v: the whole sequence."""
    limit: Array
    """[rows]: keys before it, counted from the sequence's first, are visible to a row."""


def _tiles(problem: MhaVarlen) -> list[list[_Tile]]:
    """All the work, by (sequence, KV head)."""
    group = problem.q.shape[1] // problem.k.shape[1]
    step = max(TILE_ROWS // group, 1)
    groups = []
    for sequence in range(len(problem.cu_seqlens_q) - 1):
        q_begin, q_end = (int(one) for one in problem.cu_seqlens_q[sequence : sequence + 2])
        k_begin, k_end = (int(one) for one in problem.cu_seqlens_k[sequence : sequence + 2])
        length = k_end - k_begin
        for head in range(problem.k.shape[1]):
            tiles = []
            # A sequence without queries still has one tile, whose keys get gradients of 0.
            for first in range(q_begin, max(q_end, q_begin + 1), step):
                last = min(first + step, q_end)
                limit = np.full(last - first, length)
                if problem.causal:
                    limit -= q_end - 1 - np.arange(first, last)
                tiles.append(
                    _Tile(
                        head,
                        slice(head * group, (head + 1) * group),
                        slice(first, last),
                        slice(k_begin, k_end),
                        np.repeat(limit, group),
                    )
                )
            groups.append(tiles)
    return groups


def _chunks(tile: _Tile) -> Iterator[tuple[slice, Array | None]]:
    """The runs of keys that some row of the tile sees, and who sees which (None: all see all)."""
    length = int(tile.limit.max(initial=0))
    step = chunk_tokens(len(tile.limit))
    for begin in range(0, length, step):
        end = min(begin + step, length)
        token = np.arange(begin, end)
        visible = None if end <= tile.limit[0] else token[:, None] < tile.limit
        yield slice(tile.keys.start + begin, tile.keys.start + end), visible


def mha_varlen(problem: MhaVarlen, dtype: DTypeLike) -> None:
    """Fill problem.out and problem.lse; a row without a visible key gives 0 and +inf."""
    d_v = problem.v.shape[2]

    def attend(tile: _Tile) -> tuple[Array, Array]:
        q = problem.q[tile.queries, tile.heads]
        q_scaled = scaled_queries(q, problem.softmax_scale, dtype)
        state = SoftmaxState(len(tile.limit), d_v, dtype)
        for keys, visible in _chunks(tile):
            k = problem.k[keys, tile.head].astype(dtype)
            v = problem.v[keys, tile.head].astype(dtype)
            state.add_keys(q_scaled, k, v, visible)
        return state.result()

    def store(tile: _Tile, result: tuple[Array, Array]) -> None:
        out, lse = result
        target = problem.out[tile.queries, tile.heads]
        target[...] = out.reshape(target.shape)
        problem.lse[tile.queries, tile.heads] = lse.reshape(target.shape[:2])

    run_ordered(attend, [tile for tiles in _tiles(problem) for tile in tiles], store)


def mha_varlen_backward(problem: MhaVarlenBackward, dtype: DTypeLike) -> None:
    """Fill problem.dq, problem.dk and problem.dv from the forward's results."""
    forward = problem.forward
    d_qk, d_v = forward.q.shape[2], forward.v.shape[2]
    scale = np.asarray(forward.softmax_scale, dtype)

    def differentiate(tiles: list[_Tile]) -> tuple[Array, Array, list[Array]]:
        keys = tiles[0].keys
        k = forward.k[keys, tiles[0].head].astype(dtype)
        v = forward.v[keys, tiles[0].head].astype(dtype)
        dk, dv = np.zeros_like(k), np.zeros_like(v)
        dqs = []
        for tile in tiles:
            q = forward.q[tile.queries, tile.heads].reshape(-1, d_qk).astype(dtype)
            dout = problem.dout[tile.queries, tile.heads].reshape(-1, d_v).astype(dtype)
            out = forward.out[tile.queries, tile.heads].reshape(-1, d_v).astype(dtype)
            lse = forward.lse[tile.queries, tile.heads].reshape(-1).astype(dtype)
            lse = np.where(np.isneginf(lse), np.inf, lse)  # both mean: no key, so p = 0
            delta = (dout * out).sum(axis=1)
            dq = np.zeros_like(q)
            for chunk, visible in _chunks(tile):
                part = slice(chunk.start - keys.start, chunk.stop - keys.start)
                logits = (q @ k[part].T) * scale
                p = np.exp(logits - lse[:, None])
                dz = dout @ v[part].T
                dz -= delta[:, None]
                dz *= p
                dz *= scale
                if visible is not None:
                    # Selected, not multiplied: what a row may not see may be NaN.
                    p[~visible.T] = 0
                    dz[~visible.T] = 0
                seen_by = None if visible is None else visible.T
                dv[part] += weighted_sum(p, dout, seen_by)
                dq += weighted_sum(dz.T, k[part], visible)
                dk[part] += weighted_sum(dz, q, seen_by)
            dqs.append(dq)
        return dk, dv, dqs

    def store(tiles: list[_Tile], result: tuple[Array, Array, list[Array]]) -> None:
        dk, dv, dqs = result
        problem.dk[tiles[0].keys, tiles[0].head] = dk
        problem.dv[tiles[0].keys, tiles[0].head] = dv
        for tile, dq in zip(tiles, dqs, strict=True):
            target = problem.dq[tile.queries, tile.heads]
            target[...] = dq.reshape(target.shape)

    run_ordered(differentiate, _tiles(forward), store)
