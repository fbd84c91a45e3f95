"""Matmuls and attention in Triton, and whole numbers to feed them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sim.triton_kit import DTYPES

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit  # type: ignore[untyped-decorator]
def pointer_matmul(  # type: ignore[no-untyped-def]
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    total = tl.zeros((BM, BN), dtype=ACC)
    for k in range(0, K, BK):
        left = a + rows[:, None] * K + (k + ks)[None, :]
        right = b + (k + ks)[:, None] * N + columns[None, :]
        if EDGES:
            x = tl.load(left, mask=(rows[:, None] < M) & ((k + ks)[None, :] < K), other=0.0)
            y = tl.load(right, mask=((k + ks)[:, None] < K) & (columns[None, :] < N), other=0.0)
        else:
            x = tl.load(left)
            y = tl.load(right)
        total = tl.dot(x.to(y.dtype), y, total, out_dtype=ACC)
    to = c + rows[:, None] * N + columns[None, :]
    tl.store(to, total, mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit  # type: ignore[untyped-decorator]
def descriptor_matmul(  # type: ignore[no-untyped-def]
    a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
    TRANSPOSED: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM
    column = tl.program_id(1) * BN
    total = tl.zeros((BM, BN), dtype=ACC)
    for k in tl.range(0, K, BK, warp_specialize=SPECIALISED):
        left = a.load([row, k])
        right = b.load([column, k]).T if TRANSPOSED else b.load([k, column])
        total = tl.dot(left, right, total, out_dtype=ACC)
    c.store([row, column], total.to(c.dtype))


@triton.jit  # type: ignore[untyped-decorator]
def persistent_matmul(  # type: ignore[no-untyped-def]
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FLAT: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * across
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT, warp_specialize=SPECIALISED
    ):
        row = tile // across * BM
        column = tile % across * BN
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, K, BK):
            total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
        c.store([row, column], total.to(c.dtype))


@triton.jit  # type: ignore[untyped-decorator]
def own_descriptors(  # type: ignore[no-untyped-def]
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    da = tl.make_tensor_descriptor(a, shape=[M, K], strides=[K, 1], block_shape=[BM, BK])
    db = tl.make_tensor_descriptor(b, shape=[N, K], strides=[K, 1], block_shape=[BN, BK])
    dc = tl.make_tensor_descriptor(c, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    row = tl.program_id(0) * BM
    column = tl.program_id(1) * BN
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        total = tl.dot(da.load([row, k]), db.load([column, k]).T, total)
    dc.store([row, column], total.to(tl.bfloat16))


@triton.jit  # type: ignore[untyped-decorator]
def pointer_attention(  # type: ignore[no-untyped-def]
    q, k, v, o, T, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr
):
    base = tl.program_id(1) * T * D
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ds = tl.arange(0, D)
    own = base + rows[:, None] * D + ds[None, :]
    queries = tl.load(q + own, mask=rows[:, None] < T, other=0.0)
    best = tl.full((BM,), -float("inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, D), tl.float32)
    for start in range(0, tl.minimum(T, (tl.program_id(0) + 1) * BM), BN):
        at = start + tl.arange(0, BN)
        keys = tl.load(k + base + at[None, :] * D + ds[:, None], mask=at[None, :] < T, other=0.0)
        scores = tl.dot(queries, keys) * scale
        scores = tl.where(at[None, :] <= rows[:, None], scores, -1.0e30)
        new = tl.maximum(best, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        factor = tl.exp2(best - new)
        weight = weight * factor + tl.sum(p, 1)
        values = tl.load(v + base + at[:, None] * D + ds[None, :], mask=at[:, None] < T, other=0.0)
        total = tl.dot(p.to(values.dtype), values, total * factor[:, None])
        best = new
    tl.store(o + own, total / weight[:, None], mask=rows[:, None] < T)


@triton.jit  # type: ignore[untyped-decorator]
def descriptor_attention(  # type: ignore[no-untyped-def]
    q, k, v, o, T, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(1) * T
    row = base + tl.program_id(0) * BM
    queries = q.load([row, 0])
    best = tl.full((BM,), -float("inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, D), tl.float32)
    for start in tl.range(0, T, BN, warp_specialize=SPECIALISED):
        scores = tl.dot(queries, k.load([base + start, 0]).T) * scale
        new = tl.maximum(best, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        factor = tl.exp2(best - new)
        weight = weight * factor + tl.sum(p, 1)
        values = v.load([base + start, 0])
        total = tl.dot(p.to(values.dtype), values, total * factor[:, None])
        best = new
    o.store([row, 0], total / weight[:, None])


def integers(seed: int, shape: tuple[int, ...], kind: str) -> Any:
    """Small whole numbers: sums of products of these are exact."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(DTYPES[kind])


def product(a: Any, b: Any, kind: str) -> Any:
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(DTYPES[kind])


def tiles(m: int, n: int, k: int, **more: Any) -> dict[str, Any]:
    return {"BM": m, "BN": n, "BK": k, **more}
