"""Triton kernels with tensor descriptors made on the device, and so tensor copies."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sim.test_triton import CHECKS, DELIVERIES, Compiled

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@triton.jit  # type: ignore[untyped-decorator]
def scale_kernel(x, y, rows, columns, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    source = tl.make_tensor_descriptor(x, [rows, columns], [columns, 1], [BM, BN])
    target = tl.make_tensor_descriptor(y, [rows, columns], [columns, 1], [BM, BN])
    row = tl.program_id(0) * BM
    for column in range(0, columns, BN):
        target.store([row, column], source.load([row, column]) * 2)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_tiles_of_descriptors(delivery: str, dtype: Any) -> None:
    name = "fp32" if dtype is np.float32 else "bf16"
    kernel = Compiled(
        scale_kernel,
        {"x": f"*{name}", "y": f"*{name}", "rows": "i32", "columns": "i32"},
        {"BM": 16, "BN": 64},
        "sm_90a",
    )
    assert "tensormap.replace" in kernel.ptx
    assert "cp.async.bulk.tensor.2d" in kernel.ptx
    x = np.random.default_rng(0).standard_normal((40, 144)).astype(dtype)
    source, target = kernel.device.upload(x), kernel.device.alloc(x.shape, dtype)
    scratch = kernel.device.alloc(1 << 16, np.uint8, name="scratch")
    spare = len(kernel.kernel.entry.parameters) - 5
    arguments = [source, target, 40, 144, scratch, *[0] * spare]
    kernel.kernel.launch(3, kernel.threads, arguments, shared_bytes=kernel.shared, checks=CHECKS,
                         delivery=delivery)  # fmt: skip
    assert np.array_equal(target.get(), x * dtype(2))
