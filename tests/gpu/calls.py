"""One call of every op, with all of its arrays, on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import cumla
from cumla.layouts import BF16, FP16, V4_FP8, V32_FP8, KVLayout, pack_kv

Array = NDArray[Any]
Call = tuple[Callable[..., Any], dict[str, Any], dict[str, tuple[tuple[int, ...], Any]]]
bf16 = np.dtype(ml_dtypes.bfloat16)


def normal(seed: int, *shape: int, dtype: Any = bf16) -> Array:
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32) / 4
    return numbers.astype(dtype)


def ints(*values: Any) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def dense(layout: KVLayout = BF16) -> Call:
    arguments = {
        "q": normal(1, 2, 2, 4, 576, dtype=layout.dtype),
        "kv_cache": pack_kv(normal(2, 6, 16, 2, 576, dtype=layout.dtype), layout, 16),
        "block_table": ints([0, 3, 2147480000], [2, 1, 5]),
        "cache_seqlens": ints(17, 48),
        "causal": True,
    }
    return cumla.dense_decode, arguments, _decoded(2, 2, 4, layout)


def sparse(layout: KVLayout = V4_FP8) -> Call:
    rng = np.random.default_rng(3)
    dtype = layout.compute_dtype
    arguments = {
        "q": normal(1, 2, 1, 3, layout.d_qk, dtype=dtype),
        "kv_cache": pack_kv(normal(2, 4, 8, 1, layout.d_qk, dtype=dtype), layout, 8),
        "indices": rng.integers(-1, 32, (2, 1, 70), np.int32),
        "attn_sink": np.array([0.5, 1, -np.inf], np.float32),
        "extra_kv_cache": pack_kv(normal(4, 2, 5, 1, layout.d_qk, dtype=dtype), layout, 5),
        "extra_indices": rng.integers(-1, 10, (2, 1, 7), np.int32),
        "topk_length": ints(3, 70),
        "extra_topk_length": ints([0], [7]),
    }
    return cumla.sparse_decode, arguments, _decoded(2, 1, 3, layout)


def _decoded(b: int, s_q: int, h_q: int, layout: KVLayout) -> dict[str, tuple[Any, Any]]:
    return {
        "out": ((b, s_q, h_q, 512), layout.compute_dtype),
        "lse": ((b, h_q, s_q), np.dtype(np.float32)),
    }


def prefill() -> Call:
    arguments = {
        "q": normal(1, 4, 3, 576),
        "kv": normal(2, 9, 1, 576),
        "indices": np.random.default_rng(3).integers(-1, 10, (4, 1, 6), np.int32),
        "sm_scale": 0.1,
        "topk_length": ints(0, 6, 3, 6),
    }
    float32 = np.dtype(np.float32)
    results = {"out": ((4, 3, 512), bf16)} | dict.fromkeys(("max_logits", "lse"), ((4, 3), float32))
    return cumla.sparse_prefill, arguments, results


def _sequences() -> dict[str, Any]:
    arrays = {"q": normal(1, 9, 4, 24), "k": normal(2, 7, 2, 24), "v": normal(3, 7, 2, 16)}
    return arrays | {"cu_seqlens_q": ints(0, 3, 9), "cu_seqlens_k": ints(0, 7, 7)}


def mha() -> Call:
    results = {"out": ((9, 4, 16), bf16), "lse": ((9, 4), np.dtype(np.float32))}
    return cumla.mha_varlen, _sequences(), results


def mha_backward() -> Call:
    given = _sequences()
    out, lse = cumla.mha_varlen(**given)
    arguments = {"dout": normal(7, 9, 4, 16), "out": out, "lse": lse} | given
    results = {f"d{name}": (given[name].shape, bf16) for name in "qkv"}
    return cumla.mha_varlen_backward, arguments, results


def merge() -> Call:
    outs = [normal(seed, 2, 1, 3, 512) for seed in (1, 2)]
    lses = [normal(seed, 2, 3, 1, dtype=np.float32) for seed in (3, 4)]
    return cumla.merge_attention, {"outs": outs, "lses": lses}, _decoded(2, 1, 3, BF16)


DECODES: dict[str, Callable[[], Call]] = {
    "dense_bf16": dense,
    "dense_fp16": lambda: dense(FP16),
    "sparse_bf16": lambda: sparse(BF16),
    "sparse_fp16": lambda: sparse(FP16),
    "sparse_v32": lambda: sparse(V32_FP8),
    "sparse_v4": sparse,
}
CALLS = DECODES | {"prefill": prefill, "mha": mha, "mha_backward": mha_backward, "merge": merge}
