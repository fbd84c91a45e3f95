"""Kernels that another compiler made: Triton emits PTX without a GPU. Run where it is installed."""

from __future__ import annotations

import numpy as np
import pytest

from sim.triton_kit import DELIVERIES, DTYPES, Compiled

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@triton.jit  # type: ignore[untyped-decorator]
def softmax_kernel(x, y, columns, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    values = tl.load(x + row * columns + at, mask=at < columns, other=-float("inf"))
    values = tl.exp(values - tl.max(values, axis=0))
    tl.store(y + row * columns + at, values / tl.sum(values, axis=0), mask=at < columns)


@triton.jit  # type: ignore[untyped-decorator]
def matmul_kernel(  # type: ignore[no-untyped-def]
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        left = tl.load(
            a + rows[:, None] * K + (k + ks)[None, :],
            mask=(rows[:, None] < M) & ((k + ks)[None, :] < K),
            other=0.0,
        )
        right = tl.load(
            b + (k + ks)[:, None] * N + columns[None, :],
            mask=((k + ks)[:, None] < K) & (columns[None, :] < N),
            other=0.0,
        )
        total = tl.dot(left, right, total)
    tl.store(
        c + rows[:, None] * N + columns[None, :],
        total,
        mask=(rows[:, None] < M) & (columns[None, :] < N),
    )


@triton.jit  # type: ignore[untyped-decorator]
def histogram_kernel(x, bins, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < n, other=0)
    tl.atomic_add(bins + values, 1, mask=at < n)


@triton.jit  # type: ignore[untyped-decorator]
def scan_kernel(x, y, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.cumsum(tl.load(x + at), axis=0))


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90a", "sm_120"])
def test_softmax(target: str) -> None:
    kernel = Compiled(
        softmax_kernel, {"x": "*fp32", "y": "*fp32", "columns": "i32"}, {"WIDTH": 1024}, target
    )
    x = np.random.default_rng(0).standard_normal((5, 700)).astype(np.float32)
    y = kernel.device.alloc((5, 700), np.float32)
    kernel(5, kernel.device.upload(x), y, 700)
    e = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    np.testing.assert_allclose(y.get(), e / e.sum(axis=1, keepdims=True), rtol=2e-6)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_120"])
@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32"])
def test_matmul(kind: str, target: str, delivery: str) -> None:
    kernel = Compiled(
        matmul_kernel,
        {"a": f"*{kind}", "b": f"*{kind}", "c": "*fp32", "M": "i32", "N": "i32", "K": "i32"},
        {"BM": 64, "BN": 64, "BK": 32},
        target,
        num_warps=4,
        num_stages=3,
    )
    dtype = DTYPES[kind]
    m, n, k = 100, 72, 136
    random = np.random.default_rng(1)
    a, b = (random.standard_normal(s).astype(dtype) for s in ((m, k), (k, n)))
    c = kernel.device.alloc((m, n), np.float32)
    upload = kernel.device.upload
    kernel((2, 2), upload(a), upload(b), c, m, n, k, delivery=delivery)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    # tf32 keeps 10 bits of each factor.
    bound = 2.0**-9 if kind == "fp32" else 2.0**-20
    scale = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
    assert (np.abs(c.get() - expected) <= bound * scale).all()


def test_histogram_and_scan() -> None:
    kernel = Compiled(
        histogram_kernel, {"x": "*i32", "bins": "*i32", "n": "i32"}, {"BLOCK": 256}, "sm_90a"
    )
    x = np.random.default_rng(2).integers(0, 10, 1000).astype(np.int32)
    bins = kernel.device.upload(np.zeros(10, np.int32))
    kernel(4, kernel.device.upload(x), bins, 1000)
    assert np.array_equal(bins.get(), np.bincount(x, minlength=10))
    scan = Compiled(scan_kernel, {"x": "*i32", "y": "*i32"}, {"BLOCK": 512}, "sm_90a")
    y = scan.device.alloc(512, np.int32)
    scan(1, scan.device.upload(x[:512]), y)
    assert np.array_equal(y.get(), np.cumsum(x[:512]))
