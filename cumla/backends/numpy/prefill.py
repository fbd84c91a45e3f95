"""Sparse MLA prefill: every query token attends to its own selection of a flat KV array."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from cumla.backends.numpy.parallel import run_ordered
from cumla.backends.numpy.softmax import SoftmaxState, chunk_tokens, scaled_queries
from cumla.backends.problems import SparsePrefill
from cumla.scratch import scratch

# Query tokens a thread takes at a time, so that handing them out costs nothing beside them.
_QUERIES_PER_ITEM = 8


def sparse_prefill(problem: SparsePrefill, dtype: DTypeLike) -> None:
    """out[t, h] = sum_j softmax_j(scale * q[t, h] . kv_j) kv_j[:d_v] over t's selected tokens j.

    Those are the valid ones, in [0, s_kv), of its first topk_length indices; one named twice
    counts twice. max_logits[t, h] = max_j scale * q[t, h] . kv_j, and -inf without a token.
    """
    num_queries, h_q, d_qk = problem.q.shape
    s_kv = len(problem.kv)

    def attend(query: int) -> SoftmaxState:
        length = problem.indices.shape[2]
        if problem.topk_length is not None:
            length = int(problem.topk_length[query])
        tokens = problem.indices[query, 0, :length]
        tokens = tokens[(tokens >= 0) & (tokens < s_kv)]
        q_scaled = scaled_queries(problem.q[query], problem.softmax_scale, dtype)
        state = SoftmaxState(h_q, problem.d_v, dtype)
        step = chunk_tokens(h_q)
        buffer = scratch("keys", (min(step, len(tokens)), d_qk), dtype)
        for begin in range(0, len(tokens), step):
            chunk = tokens[begin : begin + step]
            k = buffer[: len(chunk)]
            np.copyto(k, problem.kv[chunk, 0])
            state.add_keys(q_scaled, k, k[:, : problem.d_v])
        return state

    def attend_all(queries: range) -> list[SoftmaxState]:
        return [attend(query) for query in queries]

    def store(queries: range, states: list[SoftmaxState]) -> None:
        for query, state in zip(queries, states, strict=True):
            out, lse = state.result(problem.attn_sink)
            problem.out[query] = out
            problem.lse[query] = lse
            problem.max_logits[query] = state.peak

    starts = range(0, num_queries, _QUERIES_PER_ITEM)
    items = [range(one, min(one + _QUERIES_PER_ITEM, num_queries)) for one in starts]
    run_ordered(attend_all, items, store)
