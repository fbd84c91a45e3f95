"""What a backend is asked to compute: one frozen description per op.

The rooms above fill these in after every rule has been checked, so a backend trusts them. All
arrays belong to the backend (NumPy arrays for "numpy"); outputs are allocated. Names and shapes
are the public functions', where their meaning is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.layouts import KVLayout
from cumla.schedule import DecodePlan

Array = NDArray[Any]
Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class DenseDecode:
    q: Array  # [b, s_q, h_q, d_qk]
    kv_cache: Array  # [pages, page_size, h_kv, d_qk]
    block_table: Int32  # [b, max_blocks]
    cache_seqlens: Int32  # [b]
    layout: KVLayout
    softmax_scale: float
    causal: bool
    plan: DecodePlan | None  # None: as the backend likes
    out: Array  # [b, s_q, h_q, d_v]
    lse: Float32  # [b, h_q, s_q]
    workspace: Array | None = None  # uint8, scratch memory of the caller
    stream: Any = None  # of a GPU


@dataclass(frozen=True)
class TokenPool:
    """A page pool and the tokens of it that each query selects."""

    pages: Array  # [pages, page_size, 1, row_elements]
    layout: KVLayout
    indices: Int32  # [b, s_q, topk]
    topk_length: Int32 | None  # [b] or [b, s_q]; None: all of them


@dataclass(frozen=True)
class SparseDecode:
    q: Array  # [b, s_q, h_q, d_qk]
    main: TokenPool
    extra: TokenPool | None
    attn_sink: Float32 | None  # [h_q]
    softmax_scale: float
    plan: DecodePlan | None  # None: as the backend likes
    out: Array  # [b, s_q, h_q, d_v]
    lse: Float32  # [b, h_q, s_q]
    workspace: Array | None = None  # uint8, scratch memory of the caller
    stream: Any = None  # of a GPU


@dataclass(frozen=True)
class SparsePrefill:
    q: Array  # [s_q, h_q, d_qk]
    kv: Array  # [s_kv, 1, d_qk]
    indices: Int32  # [s_q, 1, topk]
    topk_length: Int32 | None  # [s_q]
    attn_sink: Float32 | None  # [h_q]
    softmax_scale: float
    d_v: int
    out: Array  # [s_q, h_q, d_v]
    max_logits: Float32  # [s_q, h_q]
    lse: Float32  # [s_q, h_q]


@dataclass(frozen=True)
class MhaVarlen:
    q: Array  # [total_q, h_q, d_qk]
    k: Array  # [total_k, h_kv, d_qk]
    v: Array  # [total_k, h_kv, d_v]
    cu_seqlens_q: Int32  # [b + 1]
    cu_seqlens_k: Int32  # [b + 1]
    softmax_scale: float
    causal: bool
    out: Array  # [total_q, h_q, d_v]
    lse: Float32  # [total_q, h_q]


@dataclass(frozen=True)
class MhaVarlenBackward:
    forward: MhaVarlen  # its out and lse hold the forward results
    dout: Array  # [total_q, h_q, d_v]
    dq: Array  # as q
    dk: Array  # as k
    dv: Array  # as v


@dataclass(frozen=True)
class MergeAttention:
    outs: tuple[Array, ...]  # each [..., h, d_v]
    lses: tuple[Float32, ...]  # each outs[i].shape[:-1] (views: the caller's order may differ)
    out: Array
    lse: Float32
    stream: Any = None  # of a GPU
