"""Dense and sparse MLA decoding over paged caches, cut into the pieces of a plan.

A piece is a run of 64-token blocks of one request. Pieces are computed in parallel and joined in
their order, so the result depends on the plan but not on the number of threads. Of the cache, no
more than `chunk_tokens` a thread is decoded at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cumla import layouts
from cumla.backends.numpy.parallel import run_ordered
from cumla.backends.numpy.softmax import TILE_ROWS, SoftmaxState, chunk_tokens, scaled_queries
from cumla.backends.problems import DenseDecode, SparseDecode, TokenPool
from cumla.schedule import DecodePlan, Piece, plan_for_cpu, sparse_kv_lengths
from cumla.scratch import scratch

Array = NDArray[Any]
Part = TypeVar("Part")


def dense_decode(problem: DenseDecode, dtype: DTypeLike) -> None:
    """out[s, h] = sum_j softmax_j(scale * q[s, h] . K_j) K_j[:d_v] over the tokens j of a request.

    Query s of s_q sees tokens j < cache_seqlens - (s_q - 1 - s) if causal, else all. Query head h
    belongs to KV head h // (h_q / h_kv); some queries with all heads of one KV head are one matrix.
    """
    _, s_q, h_q, d_qk = problem.q.shape
    _, page_size, h_kv, _ = problem.kv_cache.shape
    group = h_q // h_kv
    d_v = problem.layout.d_v
    plan = problem.plan or plan_for_cpu(problem.cache_seqlens)
    steps_back = (s_q - 1 - np.arange(s_q)) if problem.causal else np.zeros(s_q, np.int64)

    def attend(piece: Piece, part: tuple[slice, slice, int]) -> SoftmaxState:
        queries, heads, kv_head = part
        q = problem.q[piece.request, queries, heads]
        q_scaled = scaled_queries(q, problem.softmax_scale, dtype)
        length = int(problem.cache_seqlens[piece.request])
        limit = np.repeat(length - steps_back[queries], group)
        state = SoftmaxState(len(limit), d_v, dtype)
        first = piece.begin_block * plan.block_size
        last = min(piece.end_block * plan.block_size, int(limit[-1]))
        chunk = chunk_tokens(len(limit))
        for begin in range(first, last, chunk):
            token = np.arange(begin, min(begin + chunk, last))
            k = scratch("keys", (len(token), d_qk), dtype)
            block, offset = np.divmod(token, page_size)
            slots = problem.block_table[piece.request, block].astype(np.int64) * page_size + offset
            layouts.decode_rows(problem.kv_cache, problem.layout, slots, k, kv_head)
            visible = token[:, None] < limit if token[-1] >= limit[0] else None
            state.add_keys(q_scaled, k, k[:, :d_v], visible)
        return state

    def store(request: int, part: tuple[slice, slice, int], state: SoftmaxState) -> None:
        queries, heads, _ = part
        out, lse = state.result()
        out_part = problem.out[request, queries, heads]
        out_part[...] = out.reshape(out_part.shape)
        problem.lse[request, heads, queries] = lse.reshape(-1, group).T

    step = max(TILE_ROWS // group, 1)
    parts = [
        (slice(first, first + step), slice(head * group, (head + 1) * group), head)
        for head in range(h_kv)
        for first in range(0, s_q, step)
    ]
    _run_pieces(plan, parts, attend, store)


def sparse_decode(problem: SparseDecode, dtype: DTypeLike) -> None:
    """out[s, h] = sum_j softmax_j(scale * q[s, h] . K_j) K_j[:d_v] over the selected tokens j.

    The selection of query s is the valid ones among its first topk_length indices of the main
    pool, then likewise of the extra pool, in one softmax. An index that is negative or beyond
    the pool is dropped before it is looked at. A token named twice counts twice.
    """
    _, s_q, h_q, d_qk = problem.q.shape
    d_v = problem.main.layout.d_v
    plan = problem.plan or plan_for_cpu(_kv_lengths(problem))

    def attend(piece: Piece, s: int) -> SoftmaxState:
        q_scaled = scaled_queries(problem.q[piece.request, s], problem.softmax_scale, dtype)
        state = SoftmaxState(h_q, d_v, dtype)
        chunk = chunk_tokens(h_q)
        rows = scratch("rows", (chunk, d_qk), np.float32)
        filled = 0
        for pool, slots in _selections(problem, plan.block_size, piece, s):
            begin = 0
            while begin < len(slots):
                part = slots[begin : begin + chunk - filled]
                target = rows[filled : filled + len(part)]
                layouts.decode_rows(pool.pages, pool.layout, part, target)
                begin += len(part)
                filled += len(part)
                if filled == chunk:
                    _add(state, q_scaled, rows, d_v)
                    filled = 0
        if filled:
            _add(state, q_scaled, rows[:filled], d_v)
        return state

    def store(request: int, s: int, state: SoftmaxState) -> None:
        out, lse = state.result(problem.attn_sink)
        problem.out[request, s] = out
        problem.lse[request, :, s] = lse

    _run_pieces(plan, range(s_q), attend, store)


def _kv_lengths(problem: SparseDecode) -> Array:
    main, extra = problem.main, problem.extra
    return sparse_kv_lengths(
        len(problem.q),
        main.indices.shape[2],
        main.topk_length,
        extra.indices.shape[2] if extra else 0,
        extra.topk_length if extra else None,
    )


def _add(state: SoftmaxState, q_scaled: Array, rows: Array, d_v: int) -> None:
    k = rows.astype(q_scaled.dtype, copy=False)
    state.add_keys(q_scaled, k, k[:, :d_v])


def _selections(
    problem: SparseDecode, block: int, piece: Piece, s: int
) -> list[tuple[TokenPool, Array]]:
    """What query s of the piece's request selects within the piece's blocks: slots of each pool.

    The blocks count the main pool's indices first, rounded up to a block and at least one, then
    the extra pool's (see `schedule.sparse_kv_lengths`).
    """
    begin, end = piece.begin_block * block, piece.end_block * block
    selections = [(problem.main, _slots(problem.main, piece.request, s, begin, end))]
    if problem.extra is not None:
        longest = _longest(problem.main, piece.request)
        extra_start = -(-max(longest, 1) // block) * block
        begin, end = begin - extra_start, end - extra_start
        selections.append((problem.extra, _slots(problem.extra, piece.request, s, begin, end)))
    return selections


def _slots(pool: TokenPool, request: int, s: int, begin: int, end: int) -> Array:
    """The valid indices among positions [begin, end) of one query's list."""
    length = pool.indices.shape[2]
    if pool.topk_length is not None:
        lengths = pool.topk_length[request]
        length = int(lengths if lengths.ndim == 0 else lengths[s])
    slots = pool.indices[request, s, max(begin, 0) : max(min(end, length), 0)]
    num_tokens = pool.pages.shape[0] * pool.pages.shape[1]
    return slots[(slots >= 0) & (slots < num_tokens)]


def _longest(pool: TokenPool, request: int) -> int:
    if pool.topk_length is None:
        return pool.indices.shape[2]
    return int(np.max(pool.topk_length[request]))


def _run_pieces(
    plan: DecodePlan,
    parts: Sequence[Part],
    attend: Callable[[Piece, Part], SoftmaxState],
    store: Callable[[int, Part, SoftmaxState], None],
) -> None:
    """Attend to every piece for every part of its request's rows; join the pieces, and store."""
    requests = [list(pieces) for _, pieces in groupby(plan.pieces(), lambda one: one.request)]
    items = [
        (piece, part, piece is pieces[-1])
        for pieces in requests
        for part in parts
        for piece in pieces
    ]
    # Results come in this order, so that no more than one request's part is open at a time.
    joined: SoftmaxState

    def consume(item: tuple[Piece, Part, bool], state: SoftmaxState) -> None:
        nonlocal joined
        piece, part, is_last = item
        if piece.fragment == 0:
            joined = state
        else:
            joined.join(state)
        if is_last:
            store(piece.request, part, joined)

    run_ordered(lambda item: attend(item[0], item[1]), items, consume)
