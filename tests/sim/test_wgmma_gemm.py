"""A matrix product as kernels write it: swizzled tiles, two stages, one group always under way."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cumla import sim
from sim.kernel_files import DELIVERIES, Empty, module, run

M, N, K = 256, 128, 320


def operands():
    rng = np.random.default_rng(4)
    a, b = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((M, K), (K, N)))
    return a, b, [x.astype(ml_dtypes.bfloat16).view(np.uint16) for x in (a, b)]


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("checks", [("memory", "race"), ()])
def test_product(delivery, checks):
    a, b, bits = operands()
    loaded = module("wgmma_gemm", "sm_90a")
    grid = (N // 64, M // 128)
    given = [*bits, Empty((M, N)), K, N]
    how = {"delivery": delivery, "checks": checks, "seed": 3}
    *_, c = run(loaded, "wgmma_gemm", grid, 256, *given, **how)
    np.testing.assert_array_equal(c, a @ b)


def test_a_stage_filled_again_too_early():
    a, b, bits = operands()
    loaded = module("wgmma_gemm", "sm_90a", "-DWAIT_TOO_LATE")
    grid = (N // 64, M // 128)
    given = [*bits, Empty((M, N)), K, N]
    with pytest.raises(sim.RaceError, match="asynchronous read"):
        run(loaded, "wgmma_gemm", grid, 256, *given)
    *_, c = run(loaded, "wgmma_gemm", grid, 256, *given, checks=(), delivery="late")
    assert (c != a @ b).mean() > 0.9
    *_, c = run(loaded, "wgmma_gemm", grid, 256, *given, checks=(), delivery="eager")
    np.testing.assert_array_equal(c, a @ b)


def test_counters():
    _, _, bits = operands()
    loaded = module("wgmma_gemm", "sm_90a")
    device = loaded.device
    given = [device.upload(x) for x in bits] + [device.alloc((M, N), np.float32), K, N]
    launch = loaded.kernel("wgmma_gemm").launch((N // 64, M // 128), 256, given, counters=True)
    assert launch.counters.total().tensor_flops == 2 * M * N * K
