"""What `cumla bench` times: for each op, random data of the wanted shapes and a call on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

import cumla
from cumla.layouts import BF16, FP16, LAYOUTS, KVLayout

Array = NDArray[Any]
Generator = np.random.Generator

LAYOUT_NAMED = {layout.name: layout for layout in LAYOUTS}
DTYPE_NAMED = {"bf16": BF16.dtype, "fp16": FP16.dtype}
_D_V = BF16.d_v


@dataclass(frozen=True)
class Work:
    """What to time, and what one call of it has to do."""

    call: Callable[[], object]
    bytes: int
    """That any implementation moves once: inputs that are used, and results but lse. For the
    codecs, those of the decoded rows alone."""
    flop: int | None = None
    """None for the codecs."""


def _normal(rng: Generator, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return rng.standard_normal(shape, np.float32).astype(dtype)


def _decoded_pages(
    rng: Generator, tokens: int, layout: KVLayout, page_size: int, h_kv: int = 1
) -> Array:
    """Random rows for at least `tokens` tokens: [pages, page_size, h_kv, d_qk]."""
    shape = (-(-tokens // page_size), page_size, h_kv, layout.d_qk)
    return _normal(rng, shape, layout.compute_dtype)


def dense_decode(
    rng: Generator,
    batch: int,
    s_q: int,
    h_q: int,
    h_kv: int,
    seq_len: int,
    layout: str,
    page_size: int,
    causal: bool,
) -> Work:
    """cumla.dense_decode: all tokens of a paged cache."""
    kind = LAYOUT_NAMED[layout]
    blocks = -(-seq_len // page_size)
    pages = _decoded_pages(rng, batch * blocks * page_size, kind, page_size, h_kv)
    table = rng.permutation(batch * blocks).reshape(batch, blocks).astype(np.int32)
    seqlens = np.full(batch, seq_len, np.int32)
    q = _normal(rng, (batch, s_q, h_q, kind.d_qk), kind.compute_dtype)
    per_head = kind.d_qk + kind.d_v
    q_and_out = batch * s_q * h_q * per_head * 2
    return Work(
        lambda: cumla.dense_decode(q, pages, table, seqlens, causal=causal),
        bytes=q_and_out + batch * seq_len * h_kv * kind.row_bytes,
        flop=2 * batch * s_q * h_q * per_head * seq_len,
    )


def sparse_decode(
    rng: Generator,
    batch: int,
    s_q: int,
    h_q: int,
    seq_len: int,
    topk: int,
    layout: str,
    page_size: int,
    scale_rule: Any,
) -> Work:
    """cumla.sparse_decode: random tokens of a pool of batch x seq-len."""
    kind = LAYOUT_NAMED[layout]
    tokens = max(batch * seq_len, topk)
    rows = _decoded_pages(rng, tokens, kind, page_size)
    pages = cumla.pack_kv(rows, kind, page_size, scale_rule=scale_rule)
    indices = rng.integers(0, tokens, (batch, s_q, topk)).astype(np.int32)
    q = _normal(rng, (batch, s_q, h_q, kind.d_qk), kind.compute_dtype)
    per_head = kind.d_qk + kind.d_v
    q_and_out = batch * s_q * h_q * per_head * 2
    return Work(
        lambda: cumla.sparse_decode(q, pages, indices),
        bytes=q_and_out + len(np.unique(indices)) * kind.row_bytes,
        flop=2 * batch * s_q * h_q * per_head * topk,
    )


def sparse_prefill(
    rng: Generator, s_q: int, h_q: int, seq_len: int, topk: int, d_qk: int, dtype: str
) -> Work:
    """cumla.sparse_prefill: random tokens of a flat KV array."""
    q = _normal(rng, (s_q, h_q, d_qk), DTYPE_NAMED[dtype])
    kv = _normal(rng, (seq_len, 1, d_qk), DTYPE_NAMED[dtype])
    indices = rng.integers(0, seq_len, (s_q, 1, topk)).astype(np.int32)
    q_and_out = s_q * h_q * (d_qk + _D_V) * 2
    return Work(
        lambda: cumla.sparse_prefill(q, kv, indices, d_qk**-0.5),
        bytes=q_and_out + len(np.unique(indices)) * d_qk * 2,
        flop=2 * s_q * h_q * (d_qk + _D_V) * topk,
    )


@dataclass(frozen=True)
class _Mha:
    """Random sequences for mha_varlen and its gradients."""

    inputs: tuple[Array, Array, Array, Array, Array]
    causal: bool
    pairs: int
    """Unmasked pairs of query and key, of all heads."""

    def forward(self) -> Any:
        return cumla.mha_varlen(*self.inputs, causal=self.causal)

    @property
    def bytes(self) -> int:
        """Of q, k and v."""
        return sum(one.nbytes for one in self.inputs[:3])


def _mha(
    rng: Generator,
    batch: int,
    h_q: int,
    h_kv: int,
    seq_len: int,
    d_qk: int,
    d_v: int,
    causal: bool,
    dtype: str,
) -> _Mha:
    total = batch * seq_len
    q = _normal(rng, (total, h_q, d_qk), DTYPE_NAMED[dtype])
    k = _normal(rng, (total, h_kv, d_qk), DTYPE_NAMED[dtype])
    v = _normal(rng, (total, h_kv, d_v), DTYPE_NAMED[dtype])
    starts = (np.arange(batch + 1) * seq_len).astype(np.int32)
    pairs = seq_len * (seq_len + 1) // 2 if causal else seq_len**2
    return _Mha((q, k, v, starts, starts), causal, batch * h_q * pairs)


def mha_varlen(rng: Generator, **values: Any) -> Work:
    """cumla.mha_varlen: packed sequences of one length."""
    mha = _mha(rng, **values)
    rows = len(mha.inputs[0]) * values["h_q"]
    return Work(
        mha.forward,
        bytes=mha.bytes + rows * values["d_v"] * 2,
        flop=2 * mha.pairs * (values["d_qk"] + values["d_v"]),
    )


def mha_varlen_backward(rng: Generator, **values: Any) -> Work:
    """cumla.mha_varlen_backward: gradients of packed sequences of one length."""
    mha = _mha(rng, **values)
    out, lse = mha.forward()
    dout = _normal(rng, out.shape, out.dtype)
    # Five products: the logits once more, dp and dv with d_v, dq and dk with d_qk.
    flop = 2 * mha.pairs * (3 * values["d_qk"] + 2 * values["d_v"])
    q, k, v, starts_q, starts_k = mha.inputs
    return Work(
        lambda: cumla.mha_varlen_backward(
            dout, q, k, v, out, lse, starts_q, starts_k, causal=mha.causal
        ),
        bytes=2 * mha.bytes + out.nbytes + dout.nbytes,
        flop=flop,
    )


def pack_kv(
    rng: Generator, batch: int, seq_len: int, layout: str, page_size: int, scale_rule: Any
) -> Work:
    """cumla.pack_kv: encode batch x seq-len rows, whole pages."""
    kind = LAYOUT_NAMED[layout]
    rows = _decoded_pages(rng, batch * seq_len, kind, page_size)
    return Work(
        lambda: cumla.pack_kv(rows, kind, page_size, scale_rule=scale_rule), bytes=rows.nbytes
    )


def unpack_kv(
    rng: Generator, batch: int, seq_len: int, layout: str, page_size: int, scale_rule: Any
) -> Work:
    """cumla.unpack_kv: decode batch x seq-len rows, whole pages."""
    kind = LAYOUT_NAMED[layout]
    rows = _decoded_pages(rng, batch * seq_len, kind, page_size)
    pages = cumla.pack_kv(rows, kind, page_size, scale_rule=scale_rule)
    return Work(lambda: cumla.unpack_kv(pages, kind, page_size), bytes=rows.nbytes)
