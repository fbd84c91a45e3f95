"""Counters against counts that are known in closed form."""

from __future__ import annotations

import html
import json
from typing import Any

import numpy as np
import pytest

from cumla.sim.counters import Counters, Row
from cumla.sim.profile import page
from sim import cuda

TRANSPOSE = """
extern "C" __global__ void k(const float* in, float* out) {
    __shared__ float tile[32][32 + PAD];
    int x = threadIdx.x, y = threadIdx.y;
    tile[y][x] = in[(blockIdx.y * 32 + y) * 64 + blockIdx.x * 32 + x]; // FILL
    __syncthreads();
    out[(blockIdx.x * 32 + y) * 64 + blockIdx.y * 32 + x] = tile[x][y]; // DRAIN
}"""


def count(source: str, arrays: list[Any], grid: Any, block: Any, *options: str) -> Counters:
    module = cuda.load(source, *options)
    on_device = [module.device.upload(a) for a in arrays]
    launch = module.kernel("k").launch(grid, block, on_device, counters=True)
    for array, uploaded in zip(arrays, on_device, strict=True):
        array[...] = uploaded.get()
    assert launch.counters is not None
    return launch.counters


def row_at(counters: Counters, source: str, mark: str) -> Row:
    line = cuda.line_of(source, mark)
    (row,) = [r for where, r in counters.lines().items() if where.endswith(f"k.cu:{line}")]
    return row


@pytest.mark.parametrize(("pad", "conflict"), [(0, 32), (1, 1), (2, 2), (4, 4), (16, 16)])
def test_transpose_conflicts(pad: int, conflict: int) -> None:
    arrays = [np.random.default_rng(0).random((64, 64), np.float32), np.zeros((64, 64), np.float32)]
    counters = count(TRANSPOSE, arrays, (2, 2), (32, 32), f"-DPAD={pad}")
    assert np.array_equal(arrays[1], arrays[0].T)
    warps = 4 * 32
    fill, drain = (row_at(counters, TRANSPOSE, mark) for mark in ("FILL", "DRAIN"))
    assert (fill.shared_wavefronts, fill.shared_wavefronts_least) == (warps, warps)
    assert (drain.shared_wavefronts, drain.shared_wavefronts_least) == (conflict * warps, warps)
    total = counters.total()
    assert total.shared_wavefronts == (1 + conflict) * warps
    # 32 floats in a row are four sectors; both arrays are touched once, whole.
    assert total.global_sectors == total.global_sectors_least == 2 * warps * 4
    assert total.dram_bytes == 2 * 64 * 64 * 4
    assert total.barrier_waits == warps
    assert total.thread_instructions == 32 * total.warp_instructions
    assert total.by_class["shared memory"] == total.by_class["global memory"] == 2 * warps


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (3, 12), (8, 32), (40, 32)])
def test_sectors_of_strided_reads(stride: int, sectors: int) -> None:
    source = """
extern "C" __global__ void k(const float* in, float* out) {
    float x = in[threadIdx.x * STRIDE]; // READ
    out[threadIdx.x] = x;
}"""
    arrays = [np.ones(64 * stride, np.float32), np.zeros(64, np.float32)]
    row = row_at(count(source, arrays, 1, 64, f"-DSTRIDE={stride}"), source, "READ")
    assert (row.global_sectors, row.global_sectors_least) == (2 * sectors, 2 * 4)


def test_sectors_of_broadcasts_wide_and_misplaced_reads() -> None:
    source = """
extern "C" __global__ void k(const char* in, int* out) {
    int a = *(const int*)in; // ONE
    int4 b = ((const int4*)in)[threadIdx.x]; // WIDE
    int c = ((const int*)(in + 16))[threadIdx.x]; // SHIFTED
    out[threadIdx.x] = a + b.x + b.w + c;
}"""
    arrays = [np.zeros(1024, np.uint8), np.zeros(32, np.int32)]
    counters = count(source, arrays, 1, 32)
    found = {m: row_at(counters, source, m) for m in ("ONE", "WIDE", "SHIFTED")}
    pairs = {m: (r.global_sectors, r.global_sectors_least) for m, r in found.items()}
    assert pairs == {"ONE": (1, 1), "WIDE": (16, 16), "SHIFTED": (5, 4)}
    assert found["WIDE"].dram_bytes == 512
    assert counters.total().dram_bytes == 512 + 128


def test_wide_shared_accesses_and_broadcasts() -> None:
    source = """
extern "C" __global__ void k(int* out) {
    __shared__ int4 s[64];
    s[threadIdx.x] = make_int4(1, 2, 3, 4); // WIDE
    __syncthreads();
    int4 a = s[threadIdx.x * 2 % 64]; // STRIDED
    int b = s[7].x; // BROADCAST
    int4 c = s[9]; // EIGHTS
    out[threadIdx.x] = a.x + a.w + b + c.x + c.w;
}"""
    counters = count(source, [np.zeros(64, np.int32)], 1, 64)
    marks = ("WIDE", "STRIDED", "BROADCAST", "EIGHTS")
    found = {m: row_at(counters, source, m) for m in marks}
    pairs = {m: (r.shared_wavefronts, r.shared_wavefronts_least) for m, r in found.items()}
    # 16 bytes a lane: 8 lanes at a time; every second 16 bytes meet on half of the banks.
    assert pairs["WIDE"] == (8, 8)
    assert pairs["STRIDED"] == (16, 8)
    assert pairs["BROADCAST"] == (2, 2)
    assert pairs["EIGHTS"] == (8, 8)


def test_divergent_branches_and_lanes() -> None:
    source = """
extern "C" __global__ void k(volatile int* out) {
    int t = threadIdx.x;
    if (t % 64 < LIMIT) { // BRANCH
        out[t] = 1; out[t] = 2; out[t] = 3; // THEN
    }
}"""
    for limit, diverged, warps in ((16, 2, 2), (32, 0, 2), (40, 2, 4), (63, 2, 4)):
        counters = count(source, [np.zeros(128, np.int32)], 1, 128, f"-DLIMIT={limit}")
        total, then = counters.total(), row_at(counters, source, "THEN")
        assert total.divergent_branches == diverged
        assert total.branches == 4
        stores = then.by_class["global memory"]
        assert stores == 3 * warps
        assert then.thread_instructions * stores == then.warp_instructions * 3 * 2 * limit


def test_json_table_and_page() -> None:
    arrays = [np.ones((64, 64), np.float32), np.zeros((64, 64), np.float32)]
    counters = count(TRANSPOSE, arrays, (2, 2), (32, 32), "-DPAD=0")
    data = json.loads(counters.to_json())
    assert (data["kernel"], data["grid"], data["block"]) == ("k", [2, 2, 1], [32, 32, 1])
    assert data["total"]["shared_wavefronts"] == 33 * 128
    assert (
        sum(r["warp_instructions"] for r in data["lines"].values())
        == (data["total"]["warp_instructions"])
    )
    table = counters.table()
    assert "4,224" in table
    assert "shared memory" in table
    text = page(data, {"k.cu": TRANSPOSE})
    for line in TRANSPOSE.splitlines():
        assert html.escape(line) in text
    assert "<span class='bad'>32.00</span>" in text
    assert page(data, {})  # without the source
