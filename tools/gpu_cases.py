"""The decode calls that gpu_bench.py checks and times, and their arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cumla
from cumla.layouts import BF16, FP16, V4_FP8, V32_FP8, KVLayout

Array = NDArray[Any]

SAME_BLOCK = 64 << 20
"""Random bytes that a large cache is filled with, over and over."""


@dataclass(frozen=True)
class Dense:
    """Every request has `length` tokens; pages lie scattered."""

    b: int
    h_q: int
    length: int
    s_q: int = 1
    h_kv: int = 1
    page_size: int = 64
    layout: KVLayout = BF16

    @property
    def name(self) -> str:
        return (
            f"dense {self.layout} b {self.b} s_q {self.s_q} h_q {self.h_q} h_kv {self.h_kv} "
            f"tokens {self.length}"
        )

    @property
    def flop(self) -> int:
        return self.b * self.h_q * self.s_q * 2 * self.length * (576 + 512)

    @property
    def bytes(self) -> int:
        rows = self.s_q * self.h_q * (576 + 512) + self.length * self.h_kv * 576
        return self.b * rows * 2


@dataclass(frozen=True)
class Sparse:
    """Every query selects `topk` distinct ones of `tokens` a request, and of another pool."""

    b: int
    h_q: int
    tokens: int
    topk: int
    layout: KVLayout
    s_q: int = 2
    page_size: int = 64
    extra_tokens: int = 0
    extra_topk: int = 0
    extra_page_size: int = 64

    @property
    def name(self) -> str:
        extra = f" + {self.extra_topk} (page {self.extra_page_size})" if self.extra_topk else ""
        return (
            f"sparse {self.layout} b {self.b} s_q {self.s_q} h_q {self.h_q} topk {self.topk}{extra}"
        )

    @property
    def flop(self) -> int:
        selected = self.b * self.s_q * (self.topk + self.extra_topk)
        return 2 * self.h_q * (self.layout.d_qk + 512) * selected


Case = Dense | Sparse


def dense_cases() -> Iterator[Dense]:
    for h_q in (16, 64, 128):
        for s_q in (1, 2):
            for length in (1024, 4096, 8192, 16384, 32768):
                yield Dense(128, h_q, length, s_q)
    for b in (1, 8):
        yield Dense(b, 128, 32768)
    yield Dense(128, 128, 4096, layout=FP16)
    yield Dense(128, 128, 4096, h_kv=2)


def sparse_cases() -> Iterator[Sparse]:
    for b in (2, 64, 74, 128):
        yield Sparse(b, 128, 32768, 2048, V32_FP8)
    for h_q in (16, 64):
        yield Sparse(128, h_q, 32768, 2048, V32_FP8)
    for b in (2, 74, 128):
        main: dict[str, Any] = {"tokens": 16384, "topk": 128, "layout": V4_FP8, "page_size": 256}
        for h_q, extra_topk, page in (
            (64, 512, 64),
            (128, 1024, 64),
            (64, 1024, 2),
            (128, 1024, 2),
        ):
            extra = {"extra_tokens": 16384, "extra_topk": extra_topk, "extra_page_size": page}
            yield Sparse(b, h_q, **main, **extra)
    yield Sparse(128, 128, 32768, 2048, BF16)
    yield Sparse(148, 128, 32768, 16384, V32_FP8)


QUICK = (
    Dense(128, 16, 4096),
    Dense(128, 128, 4096),
    Dense(8, 128, 32768),
    Sparse(128, 128, 32768, 2048, V32_FP8),
    Sparse(128, 64, 16384, 128, V4_FP8, page_size=256, extra_tokens=16384, extra_topk=512),
)
# Small enough for the CPU: every layout, few and many heads, causal, two pools.
CHECKS: tuple[Case, ...] = (
    Dense(3, 16, 300, s_q=2),
    Dense(2, 128, 700, page_size=53),
    Dense(2, 128, 200, h_kv=2, layout=FP16),
    Sparse(2, 16, 900, 300, V32_FP8),
    Sparse(2, 128, 900, 130, V32_FP8, page_size=61),
    Sparse(2, 64, 700, 128, V4_FP8, extra_tokens=300, extra_topk=70, extra_page_size=2),
    Sparse(2, 16, 500, 100, BF16),
)


# -------------------------------------------------------------------------------------- inputs


def on_gpu(array: Array) -> Any:
    """A copy of a contiguous NumPy array."""
    import cupy

    copy = cupy.empty(array.shape, array.dtype)
    copy.view(np.uint8).set(np.ascontiguousarray(array).view(np.uint8))
    return copy


def from_gpu(array: Any) -> Array:
    """What a contiguous CuPy array holds; waits for it."""
    return array.view(np.uint8).get().view(array.dtype)


def random_rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, size: float) -> Array:
    return np.clip(rng.standard_normal(shape, np.float32) * size, -1, 1).astype(dtype)


@lru_cache(8)
def random_pages(layout: KVLayout, tokens: int, page_size: int, h_kv: int, whole: bool) -> Array:
    """Pages for at least so many tokens; if not `whole`, as many as are worth making."""
    rng = np.random.default_rng(tokens)
    pages = -(-tokens // page_size)
    if not whole:
        pages = min(pages, max(SAME_BLOCK // layout.page_stride(page_size, h_kv), 1))
    kv = random_rows(rng, (pages, page_size, h_kv, layout.d_qk), layout.compute_dtype, 0.1)
    return cumla.pack_kv(kv, layout, page_size)


def large_pool(block: Array, tokens: int) -> Any:
    """A pool on the GPU for so many tokens, filled with the pages of `block` over and over."""
    import cupy

    pages, stride = -(-tokens // block.shape[1]), block.strides[0]
    memory = cupy.empty(pages * stride, np.uint8)
    flat = np.lib.stride_tricks.as_strided(block.view(np.uint8), (len(block), stride), (stride, 1))
    source = on_gpu(flat)
    for first in range(0, pages, len(block)):
        size = min(len(block), pages - first) * stride
        (memory.data + first * stride).copy_from_device_async(source.data, size)
    shape = (pages, *block.shape[1:])
    return cupy.ndarray(shape, block.dtype, memory.data, block.strides)


def selection(rng: np.random.Generator, case: Sparse, tokens: int, topk: int) -> Array:
    """Distinct tokens of the request's own part of the pool for each query, in any order."""
    first = np.arange(case.b)[:, None, None] * tokens
    step = rng.integers(1, max(tokens // topk, 2), (case.b, case.s_q, 1))
    begin = rng.integers(0, tokens, (case.b, case.s_q, 1))
    spread = (begin + np.arange(topk) * step) % tokens
    return rng.permuted(first + spread, axis=2).astype(np.int32)


def make(case: Case, *, whole: bool) -> dict[str, Any]:
    """The arguments of the op, NumPy arrays; pools are cut short if not `whole`."""
    rng = np.random.default_rng(0)
    layout, page_size = case.layout, case.page_size
    q = random_rows(rng, (case.b, case.s_q, case.h_q, layout.d_qk), layout.compute_dtype, 1)
    if isinstance(case, Dense):
        blocks = -(-case.length // page_size)
        table = rng.permutation(case.b * blocks).astype(np.int32).reshape(case.b, blocks)
        tokens = case.b * blocks * page_size
        return {
            "q": q,
            "kv_cache": random_pages(layout, tokens, page_size, case.h_kv, whole),
            "block_table": table,
            "cache_seqlens": np.full(case.b, case.length, np.int32),
            "causal": case.s_q > 1,
        }
    pool = random_pages(layout, case.b * case.tokens, page_size, 1, whole)
    arguments: dict[str, Any] = {
        "q": q,
        "kv_cache": pool,
        "indices": selection(rng, case, case.tokens, case.topk),
        "attn_sink": rng.standard_normal(case.h_q).astype(np.float32),
        "softmax_scale": layout.d_qk**-0.55,
    }
    if case.extra_topk:
        tokens, size = case.b * case.extra_tokens, case.extra_page_size
        arguments["extra_kv_cache"] = random_pages(layout, tokens, size, 1, whole)
        arguments["extra_indices"] = selection(rng, case, case.extra_tokens, case.extra_topk)
    return arguments


def op_of(case: Case) -> Callable[..., tuple[Any, Any]]:
    return cumla.dense_decode if isinstance(case, Dense) else cumla.sparse_decode


def pool_tokens(case: Case) -> dict[str, int]:
    """For how many tokens each pool must have room."""
    if isinstance(case, Dense):
        return {"kv_cache": case.b * -(-case.length // case.page_size) * case.page_size}
    sizes = {"kv_cache": case.b * case.tokens}
    return sizes | ({"extra_kv_cache": case.b * case.extra_tokens} if case.extra_topk else {})


def needed_bytes(case: Case) -> int:
    sizes = {"kv_cache": case.page_size}
    if isinstance(case, Sparse):
        sizes["extra_kv_cache"] = case.extra_page_size
    h_kv = case.h_kv if isinstance(case, Dense) else 1
    return sum(
        -(-tokens // sizes[name]) * case.layout.page_stride(sizes[name], h_kv)
        for name, tokens in pool_tokens(case).items()
    )


def distinct_bytes(case: Sparse, arguments: dict[str, Any]) -> int:
    """What a sparse call reads and writes at least: each selected row once, q and out."""
    row = case.layout.row_bytes
    rows = len(np.unique(arguments["indices"])) * row
    if case.extra_topk:
        rows += len(np.unique(arguments["extra_indices"])) * row
    return rows + 2 * case.b * case.s_q * case.h_q * (case.layout.d_qk + 512)
