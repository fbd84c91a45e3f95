"""The benchmark's GEMM (cp.async in three stages, ldmatrix, mma.sync): exact and without races."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sim import cuda

TOOL = Path(__file__).parents[2] / "tools" / "sim_speed.py"
SPEC = importlib.util.spec_from_file_location("sim_speed", TOOL)
assert SPEC is not None
assert SPEC.loader is not None
sim_speed = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sim_speed)


@pytest.mark.parametrize("delivery", ["eager", "late", "random"])
@pytest.mark.parametrize("target", cuda.TARGETS)
def test_gemm(target: str, delivery: str) -> None:
    m, n, k = 128, 64, 256
    kernel = cuda.load(sim_speed.GEMM, target=target).kernel("gemm")
    device = kernel.owner.device
    # Small integers: every sum is exact, in whatever order.
    random = np.random.default_rng(0)
    a, b = (random.integers(-128, 128, s).astype(ml_dtypes.bfloat16) for s in ((m, k), (n, k)))
    c = device.alloc((m, n), np.float32)
    launch = kernel.launch(
        (n // 64, m // 64),
        128,
        [device.upload(a.view(np.uint8)), device.upload(b.view(np.uint8)), c, m, n, k],
        shared_bytes=sim_speed.GEMM_SHARED,
        checks={"memory", "race"},
        delivery=delivery,
        counters=True,
    )
    assert np.array_equal(c.get(), a.astype(np.float32) @ b.astype(np.float32).T)
    assert launch.counters is not None
    total = launch.counters.total()
    assert total.tensor_flops == 2 * m * n * k
    assert total.shared_wavefronts == total.shared_wavefronts_least  # the swizzle has no conflicts
    assert total.dram_bytes == 2 * (m + n) * k + 4 * m * n
