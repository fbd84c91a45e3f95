"""Cases of the prefill ops: sparse_prefill, mha_varlen and its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

import cumla
from cumla.backends import oracle
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
from cumla.cli.cases.storage import Storages
from cumla.layouts import V4_FP8, KVLayout

Array = NDArray[Any]


@dataclass(frozen=True)
class PrefillCase:
    """Sparse prefill over a flat KV array: DeepSeek V3.2 (576) and V4 (512)."""

    op: ClassVar[str] = "sparse_prefill"
    layout: KVLayout
    d_qk: int
    h_q: int
    topk: int
    s_q: int = 62
    s_kv: int = 4000

    @property
    def format(self) -> str:
        return self.layout.name

    @property
    def shape(self) -> str:
        return f"s_q={self.s_q} h_q={self.h_q} d={self.d_qk} topk={self.topk}"

    def run(self, storages: Storages, rng: Generator) -> Outcome:
        outcome = Outcome()
        dtype = self.layout.compute_dtype
        q = normal(rng, (self.s_q, self.h_q, self.d_qk), dtype)
        kv = normal(rng, (self.s_kv, 1, self.d_qk), dtype)
        # A tenth of the indices are no token, below and beyond; query 0 selects none at all.
        low, high = -self.s_kv // 20, self.s_kv + self.s_kv // 20
        indices = rng.integers(low, high, (self.s_q, 1, self.topk)).astype(np.int32)
        indices[0] = INT32_MAX
        more: dict[str, Any] = {}
        if self.d_qk == V4_FP8.d_qk:
            more["attn_sink"] = rng.standard_normal(self.h_q, np.float32)
            more["topk_length"] = rng.integers(0, self.topk + 1, self.s_q).astype(np.int32)
        scale = V4_SCALE if self.d_qk == V4_FP8.d_qk else V3_SCALE

        def attend() -> Any:
            return cumla.sparse_prefill(q, kv, indices, scale, **more)

        out, max_logits, lse = outcome.timed(attend)
        with oracle():
            exact_out, exact_max, exact_lse = attend()
        outcome.judge("out", out, exact_out, c.PREFILL_OUT, dtype)
        sink = more.get("attn_sink")
        for s in (0, 1, self.s_q - 1):
            chosen = indices[s, 0, : more["topk_length"][s]] if more else indices[s, 0]
            rows = kv[chosen[(chosen >= 0) & (chosen < self.s_kv)], 0]
            plain_out, plain_lse = plain_attention(q[s], rows, rows[:, :512], scale, sink)
            outcome.judge_reference("out", exact_out[s], plain_out)
            outcome.judge_reference("lse", exact_lse[s], plain_lse)
        outcome.judge("max_logits", max_logits, exact_max, c.LSE_PREFILL, np.float32)
        outcome.judge("lse", lse, exact_lse, c.LSE_PREFILL, np.float32)
        return outcome


@dataclass(frozen=True)
class MhaCase:
    """Prefill as multi-head attention over packed sequences, or its gradients."""

    layout: KVLayout
    d_qk: int
    h_q: int
    h_kv: int
    causal: bool
    backward: bool = False

    @property
    def op(self) -> str:
        return "mha_varlen_backward" if self.backward else "mha_varlen"

    @property
    def format(self) -> str:
        return self.layout.name

    @property
    def shape(self) -> str:
        heads = f"{self.h_q}/{self.h_kv}" if self.h_q != self.h_kv else f"{self.h_q}"
        return f"b=5 h={heads} d={self.d_qk}/128{' causal' if self.causal else ''}"

    def run(self, storages: Storages, rng: Generator) -> Outcome:
        outcome = Outcome()
        dtype = self.layout.compute_dtype
        # One sequence without queries, one without keys, one with fewer keys than queries.
        lengths_q, lengths_k = (300, 0, 61, 126, 700), (300, 53, 0, 61, 900)
        starts_q = np.cumsum([0, *lengths_q], dtype=np.int32)
        starts_k = np.cumsum([0, *lengths_k], dtype=np.int32)
        q = normal(rng, (int(starts_q[-1]), self.h_q, self.d_qk), dtype)
        k = normal(rng, (int(starts_k[-1]), self.h_kv, self.d_qk), dtype)
        v = normal(rng, (int(starts_k[-1]), self.h_kv, 128), dtype)

        def forward() -> Any:
            return cumla.mha_varlen(q, k, v, starts_q, starts_k, causal=self.causal)

        def backward(out: Array, lse: Array) -> Any:
            return cumla.mha_varlen_backward(
                dout, q, k, v, out, lse, starts_q, starts_k, causal=self.causal
            )

        if not self.backward:
            out, lse = outcome.timed(forward)
            with oracle():
                exact_out, exact_lse = forward()
            self._judge_oracle(outcome, (q, k, v), exact_out, exact_lse, starts_q, starts_k)
            outcome.judge("out", out, exact_out, c.MHA_OUT, dtype)
            outcome.judge("lse", lse, exact_lse, c.LSE_MHA, np.float32)
            return outcome
        dout = normal(rng, (len(q), self.h_q, 128), dtype)
        out, lse = forward()
        gradients = outcome.timed(lambda: backward(out, lse))
        with oracle():
            # Of the same out and lse: that the forward op rounded them is not this op's doing.
            exact = backward(out, lse)
        # The last sequence and the last KV head, with all the query heads that share it.
        last_q, last_k = slice(starts_q[-2], starts_q[-1]), slice(starts_k[-2], starts_k[-1])
        heads = slice(self.h_q - self.h_q // self.h_kv, self.h_q)
        plain = _plain_gradients(
            dout[last_q, heads],
            q[last_q, heads],
            k[last_k, -1],
            v[last_k, -1],
            out[last_q, heads],
            lse[last_q, heads],
            self.causal,
        )
        parts = (exact[0][last_q, heads], exact[1][last_k, -1], exact[2][last_k, -1])
        for name, part, want in zip(("dq", "dk", "dv"), parts, plain, strict=True):
            outcome.judge_reference(name, part, want)
        for name, got, want in zip(("dq", "dk", "dv"), gradients, exact, strict=True):
            outcome.judge(name, got, want, c.MHA_OUT, dtype)
        return outcome

    def _judge_oracle(
        self,
        outcome: Outcome,
        inputs: tuple[Array, Array, Array],
        out: Array,
        lse: Array,
        starts_q: Array,
        starts_k: Array,
    ) -> None:
        """Judge some rows of the oracle's forward results: of every sequence, every seventh."""
        q, k, v = inputs
        for i in range(len(starts_q) - 1):
            s_q, s_k = (int(one[i + 1] - one[i]) for one in (starts_q, starts_k))
            for t in range(0, s_q, 7):
                row, head = int(starts_q[i]) + t, t % self.h_q
                visible = max(s_k - (s_q - 1 - t), 0) if self.causal else s_k
                keys = slice(int(starts_k[i]), int(starts_k[i]) + visible)
                kv_head = head // (self.h_q // self.h_kv)
                plain_out, plain_lse = plain_attention(
                    q[row, None, head], k[keys, kv_head], v[keys, kv_head], self.d_qk**-0.5
                )
                outcome.judge_reference("out", out[row, None, head], plain_out)
                outcome.judge_reference("lse", lse[row, None, head], plain_lse)


def _plain_gradients(
    dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, causal: bool
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) in float64 for the query heads of one KV head: [s_q, heads, d] and [s_k, d].

    dlogit = p (dout . v - dout . out), the derivative of a softmax; see `plain_attention`.
    """
    dout, q, k, v, out = (one.astype(np.float64) for one in (dout, q, k, v, out))
    s_q, s_k, scale = len(q), len(k), q.shape[-1] ** -0.5
    visible = np.arange(s_k) < s_k - np.arange(s_q)[::-1, None] if causal else np.True_
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for head in range(q.shape[1]):
        logits = scale * (q[:, head] @ k.T)
        p = np.where(visible, np.exp(np.minimum(logits - lse[:, head, None], 700.0)), 0.0)
        inner = np.sum(dout[:, head] * out[:, head], axis=1)
        dlogits = p * (dout[:, head] @ v.T - inner[:, None])
        dq[:, head] = scale * (dlogits @ k)
        dk += scale * (dlogits.T @ q[:, head])
        dv += p.T @ dout[:, head]
    return dq, dk, dv
