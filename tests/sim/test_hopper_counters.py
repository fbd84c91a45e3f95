"""Kernels for Hopper: what is counted of them, by sizes of matrices; the versions of their PTX."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from cumla import sim
from cumla.sim.profile import page
from sim import cuda, kernel_files
from sim import hopper_kernels as hopper

M, N, K = 256, 128, 192


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[sim.Launch]:
    """The launches of a test, with counters."""
    launches: list[sim.Launch] = []
    original = sim.Kernel.launch

    def launch(self: sim.Kernel, *args: Any, **options: Any) -> sim.Launch:
        launches.append(original(self, *args, **{**options, "counters": True}))
        return launches[-1]

    monkeypatch.setattr(sim.Kernel, "launch", launch)
    return launches


def test_gemm(counted: list[sim.Launch]) -> None:
    hopper.gemm(hopper.integers(0, M, K), hopper.integers(1, N, K), checks=())
    (launch,) = counted
    assert launch.counters is not None
    total = launch.counters.total()
    assert total.tensor_flops == 2 * M * N * K
    # Each of 2 x 1 blocks loads its rows of A and of B, and stores its part of C.
    loaded = 2 * K * (M + 2 * N)
    assert total.bulk_bytes == loaded + 4 * M * N
    assert total.bulk_sectors == total.bulk_bytes // 32
    assert total.multicast_bytes_saved == 0
    text = page(json.loads(launch.counters.to_json()), {})
    assert f"{total.bulk_bytes:,}" in text
    assert "bulk sectors" in text


def test_multicast(counted: list[sim.Launch]) -> None:
    hopper.cluster_gemm(hopper.integers(0, M, K), hopper.integers(1, N, K), checks=())
    (launch,) = counted
    assert launch.counters is not None
    total = launch.counters.total()
    assert total.tensor_flops == 2 * M * N * K
    # Both blocks of a cluster get all of B; each reads half of it for the two.
    assert total.multicast_bytes_saved == 2 * K * N
    assert total.bulk_bytes == 2 * K * (M + 2 * N) + 4 * M * N
    assert total.bulk_sectors * 32 == total.bulk_bytes - total.multicast_bytes_saved


@pytest.mark.parametrize("version", ["8.0", "8.8", "9.0"])
def test_versions_of_ptx(version: str) -> None:
    """Compilers since the first for Hopper differ in the version that they write."""
    source = (kernel_files.FOLDER / "hopper_gemm.cu").read_text()
    ptx = cuda.ptx(source, "sm_90a", f"-I{kernel_files.FOLDER}", "-DSTAGES=2")
    found, count = re.subn(r"(?m)^\.version .*$", f".version {version}", ptx)
    assert count == 1
    assert set(sim.load(found).kernels) >= {"gemm_f32", "gemm_bf16"}
