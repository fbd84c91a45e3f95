"""Cases of the decode ops and of the merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

import cumla
from cumla.backends import get_backend, oracle
from cumla.cli import comparison as c
from cumla.cli.cases.base import (
    INT32_MAX,
    V3_SCALE,
    V4_SCALE,
    Generator,
    Outcome,
    normal,
    plain_attention,
)
from cumla.cli.cases.storage import CSA, HCA, MAIN, Storage, Storages
from cumla.layouts import BF16, V4_FP8, KVLayout

Array = NDArray[Any]

_H100_SMS = 132


@dataclass(frozen=True)
class DenseCase:
    """DeepSeek V3 decoding over whole sequences."""

    op: ClassVar[str] = "dense_decode"
    layout: KVLayout
    h_q: int
    s_q: int

    @property
    def format(self) -> str:
        return self.layout.name

    @property
    def shape(self) -> str:
        return f"b=8 s_q={self.s_q} h_q={self.h_q} kv<=4096{' causal' if self.s_q > 1 else ''}"

    def run(self, storages: Storages, rng: Generator) -> Outcome:
        outcome = Outcome()
        stored = storages[MAIN[self.layout.name]]
        seqlens = stored.lengths
        dtype = self.layout.compute_dtype
        q = normal(rng, (len(seqlens), self.s_q, self.h_q, self.layout.d_qk), dtype)

        def attend(pages: Array, table: Array, plan: cumla.DecodePlan | None = None) -> Any:
            return cumla.dense_decode(
                q,
                pages,
                table,
                seqlens,
                softmax_scale=V3_SCALE,
                causal=self.s_q > 1,
                plan=plan,
            )

        table = stored.cache.block_table(stored.sequences)
        parts = cumla.dense_num_parts(_H100_SMS, self.s_q, self.h_q, 1)
        plan = cumla.plan_decode(stored.cache.cache_seqlens(stored.sequences), num_parts=parts)
        out, lse = outcome.timed(lambda: attend(stored.cache.pages, table))
        results = [("", out, lse)]
        if _time_for_both_plans():
            results.append((" (balanced)", *attend(stored.cache.pages, table, plan)))
        with oracle():
            exact_out, exact_lse = attend(stored.flat_pages, stored.flat_table)

        def seen(i: int, s: int) -> Array:
            visible = int(seqlens[i]) - (self.s_q - 1 - s if self.s_q > 1 else 0)
            return stored.flat_decoded[stored.first_slots[i] :][: max(visible, 0)]

        _judge_oracle(outcome, q, exact_out, exact_lse, V3_SCALE, seen)
        for name, result, lses in results:
            outcome.judge("out" + name, result, exact_out, c.DENSE_OUT, dtype)
            outcome.judge("lse" + name, lses, exact_lse, c.LSE_DECODE, np.float32)
        return outcome


@dataclass(frozen=True)
class SparseCase:
    """DeepSeek V3.2 decoding over an indexer's choice of tokens."""

    op: ClassVar[str] = "sparse_decode"
    layout: KVLayout
    s_q: int
    h_q: int = 128
    topk: int = 2048

    @property
    def format(self) -> str:
        return self.layout.name

    @property
    def shape(self) -> str:
        return f"b=8 s_q={self.s_q} h_q={self.h_q} topk={self.topk}"

    def run(self, storages: Storages, rng: Generator) -> Outcome:
        stored = storages[MAIN[self.layout.name]]
        positions = _choose(rng, stored.lengths, self.s_q, self.topk)
        return _sparse(rng, self.h_q, V3_SCALE, _Selected(stored, positions))


@dataclass(frozen=True)
class V4Case:
    """DeepSeek V4 decoding: a window of 128 tokens and compressed entries in one softmax."""

    op: ClassVar[str] = "sparse_decode"
    format: ClassVar[str] = V4_FP8.name
    h_q: int
    extra: str
    """CSA: the indexer's choice of entries. HCA: all entries, and how many of them there are."""
    extra_topk: int
    s_q: int = 2

    @property
    def shape(self) -> str:
        return f"b=8 s_q={self.s_q} h_q={self.h_q} SWA+{self.extra} 128+{self.extra_topk}"

    def run(self, storages: Storages, rng: Generator) -> Outcome:
        window = storages[MAIN[V4_FP8.name]]
        entries = storages[CSA if self.extra == "CSA" else HCA]
        # Query s sees the last 128 tokens up to its own place.
        last = window.lengths[:, None, None] - self.s_q + np.arange(self.s_q)[:, None]
        positions = np.maximum(last - np.arange(128), -1)
        if self.extra == "CSA":
            chosen, lengths = _choose(rng, entries.lengths, self.s_q, self.extra_topk), None
        else:
            lengths = np.minimum(entries.lengths, self.extra_topk).astype(np.int32)
            order = np.broadcast_to(
                np.arange(self.extra_topk), (len(lengths), self.s_q, self.extra_topk)
            )
            chosen = np.where(order < lengths[:, None, None], order, -1)
        return _sparse(
            rng,
            self.h_q,
            V4_SCALE,
            _Selected(window, positions),
            _Selected(entries, chosen, lengths),
            attn_sink=rng.standard_normal(self.h_q, np.float32),
        )


@dataclass(frozen=True)
class _Selected:
    """What the queries select from one cache: positions [b, s_q, topk], -1 for nothing."""

    stored: Storage
    positions: Array
    topk_length: NDArray[np.int32] | None = None

    def indices(self) -> Array:
        """Slots of the paged cache, and what is no slot where nothing is selected."""
        slots = self.stored.cache.token_indices(self.stored.sequences, self.positions)
        slots[..., 1::2][slots[..., 1::2] < 0] = INT32_MAX
        if self.topk_length is not None:
            # Beyond the length stands a slot like any other, which does not count.
            beyond = np.arange(slots.shape[2]) >= self.topk_length[:, None, None]
            slots[np.broadcast_to(beyond, slots.shape)] = self.stored.cache.page_size
        return slots

    def rows(self, i: int, s: int) -> Array:
        """The rows that query s of request i selects, as the cache decodes them."""
        chosen = self.positions[i, s][self.positions[i, s] >= 0]
        return self.stored.flat_decoded[self.stored.first_slots[i] + chosen]

    def flat_indices(self) -> Array:
        return self.stored.flat_indices(self.positions)


def _time_for_both_plans() -> bool:
    """In the simulator a case takes seconds, and its default plan is a balanced one already."""
    return get_backend() != "sim"


def _choose(rng: Generator, lengths: Array, s_q: int, topk: int) -> Array:
    """Positions [b, s_q, topk]: a random choice without repeats, in random order, then -1."""
    positions = np.full((len(lengths), s_q, topk), -1, np.int64)
    for chosen, length in zip(positions, lengths, strict=True):
        for one in chosen:
            one[: min(topk, length)] = rng.permutation(length)[:topk]
    return positions


def _sparse(
    rng: Generator,
    h_q: int,
    scale: float,
    main: _Selected,
    extra: _Selected | None = None,
    attn_sink: Array | None = None,
) -> Outcome:
    """Run and judge a sparse decode over one cache or two."""
    outcome = Outcome()
    layout = main.stored.cache.layout
    batch, s_q, topk = main.positions.shape
    q = normal(rng, (batch, s_q, h_q, layout.d_qk), layout.compute_dtype)
    pools = [main] if extra is None else [main, extra]

    def attend(
        pages: list[Array], indices: list[Array], plan: cumla.DecodePlan | None = None
    ) -> Any:
        more = {}
        if extra is not None:
            more = {"extra_kv_cache": pages[1], "extra_indices": indices[1]}
        return cumla.sparse_decode(
            q,
            pages[0],
            indices[0],
            extra_topk_length=extra.topk_length if extra else None,
            attn_sink=attn_sink,
            softmax_scale=scale,
            plan=plan,
            **more,
        )

    pages = [one.stored.cache.pages for one in pools]
    indices = [one.indices() for one in pools]
    kv_lens = cumla.sparse_kv_lengths(
        batch,
        topk,
        None,
        extra.positions.shape[2] if extra else 0,
        extra.topk_length if extra else None,
    )
    plan = cumla.plan_decode(kv_lens, num_parts=cumla.sparse_num_parts(_H100_SMS, s_q, h_q))
    out, lse = outcome.timed(lambda: attend(pages, indices))
    results = [("", out, lse)]
    if _time_for_both_plans():
        results.append((" (balanced)", *attend(pages, indices, plan)))
    with oracle():
        exact_out, exact_lse = attend(
            [one.stored.flat_pages for one in pools], [one.flat_indices() for one in pools]
        )
    for name, result, lses in results:
        outcome.judge("out" + name, result, exact_out, c.SPARSE_OUT, layout.compute_dtype)
        outcome.judge("lse" + name, lses, exact_lse, c.LSE_DECODE, np.float32)

    def seen(i: int, s: int) -> Array:
        return np.concatenate([one.rows(i, s) for one in pools])

    _judge_oracle(outcome, q, exact_out, exact_lse, scale, seen, attn_sink)
    if layout.is_fp8:
        unencoded = _over_unencoded_rows(q, pools, scale, attn_sink)
        moved = float(np.sum((unencoded - exact_out) ** 2) / np.sum(unencoded**2))
        outcome.storage_error = moved**0.5
    return outcome


def _judge_oracle(
    outcome: Outcome,
    q: Array,
    out: Array,
    lse: Array,
    scale: float,
    seen: Callable[[int, int], Array],
    attn_sink: Array | None = None,
) -> None:
    """Judge one query of every request in the oracle's results; `seen` are the rows it sees."""
    d_v = out.shape[-1]
    queries = [(i, i % q.shape[1]) for i in range(len(q))]
    pairs = []
    for i, s in queries:
        rows = seen(i, s)
        pairs.append(plain_attention(q[i, s], rows, rows[:, :d_v], scale, attn_sink))
    outcome.judge_reference(
        "out", np.stack([out[at] for at in queries]), np.stack([one for one, _ in pairs])
    )
    outcome.judge_reference(
        "lse", np.stack([lse[i, :, s] for i, s in queries]), np.stack([one for _, one in pairs])
    )


def _over_unencoded_rows(
    q: Array, pools: list[_Selected], scale: float, attn_sink: Array | None
) -> Array:
    """The exact out over the rows as they were before FP8."""
    batch, s_q, h_q, d_qk = q.shape
    begins = np.cumsum([0, *(len(one.stored.flat_rows) for one in pools)])
    indices = []
    for begin, one in zip(begins, pools, strict=False):
        flat = one.flat_indices()
        indices.append(np.where(flat < 0, -1, flat + begin).astype(np.int32))
    rows = np.concatenate([one.stored.flat_rows for one in pools])
    with oracle():
        out, _, _ = cumla.sparse_prefill(
            q.reshape(-1, h_q, d_qk),
            rows[:, None],
            np.concatenate(indices, axis=-1).reshape(batch * s_q, 1, -1),
            scale,
            attn_sink=attn_sink,
        )
    return np.asarray(out).reshape(batch, s_q, h_q, -1)


@dataclass(frozen=True)
class MergeCase:
    """Attention over thirds of a selection, joined, is attention over all of it."""

    op: ClassVar[str] = "merge_attention"
    format: ClassVar[str] = "FP32"
    topk: int = 2047
    h_q: int = 128

    @property
    def shape(self) -> str:
        return f"3 parts b=8 s_q=1 h_q={self.h_q}"

    def run(self, storages: Storages, rng: Generator) -> Outcome:
        outcome = Outcome()
        stored = storages[MAIN[BF16.name]]
        chosen = _Selected(stored, _choose(rng, stored.lengths, 1, self.topk))
        indices = chosen.flat_indices()
        q = normal(rng, (len(indices), 1, self.h_q, BF16.d_qk), BF16.compute_dtype)

        def attend(part: Array) -> Any:
            return cumla.sparse_decode(q, stored.flat_pages, part, softmax_scale=V3_SCALE)

        with oracle():
            exact_out, exact_lse = attend(indices)
            parts = [attend(part) for part in np.array_split(indices, 3, axis=-1)]
        # Float32 parts: what rounding them to bf16 costs is not the merge's doing.
        outs = [out.astype(np.float32) for out, _ in parts]
        lses = [lse.astype(np.float32) for _, lse in parts]
        out, lse = outcome.timed(lambda: cumla.merge_attention(outs, lses))
        _judge_oracle(outcome, q, exact_out, exact_lse, V3_SCALE, chosen.rows)
        outcome.judge("out", out, exact_out, c.DENSE_OUT, np.float32)
        outcome.judge("lse", lse, exact_lse, c.LSE_DECODE, np.float32)
        return outcome
