"""Run the decode kernels in the simulator and count."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

import cumla
from cumla.backends.simulated import SimulatedDevice
from cumla.kernels import decode
from cumla.layouts import BF16, FP16, LAYOUTS, KVLayout
from cumla.sim.counters import Row

Array = NDArray[Any]

TARGETS = ("sm_80", "sm_89", "sm_90a")
HEIGHTS = (16, 32, 48, 64, 128)
PAGE_SIZE = 64
SPREAD = 4
"""The pool of a sparse case has so many times the tokens that are selected."""
_ALIGNMENT = 256  # of device memory; NumPy's own 16 would spoil the sectors


@dataclass(frozen=True)
class Case:
    """One decode kernel at one height, on one target."""

    kernel: str
    """ "dense" or "sparse"."""
    layout: KVLayout
    rows: int
    """h_q; s_q is 1."""
    target: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.layout} {self.rows} {self.target}"


def cases() -> list[Case]:
    """All that the report has."""
    kinds = [("dense", BF16), ("dense", FP16)] + [("sparse", one) for one in LAYOUTS]
    return [
        Case(kernel, layout, rows, target)
        for kernel, layout in kinds
        for rows in HEIGHTS
        for target in TARGETS
    ]


@dataclass(frozen=True)
class Counts:
    """What a case was seen to do.

    Attributes:
        loop: per KV token in the main loop: what the long run counts beyond the short one. q, out
            and all else that is done once are in both.
        whole: of the long run, all of it.
        tokens: of the long run.
        flops_needed: what its products need.
        dram_needed: bytes of the sectors that its operands and results lie in.
    """

    loop: dict[str, float]
    whole: dict[str, float]
    tokens: int
    flops_needed: int
    dram_needed: int


COUNTED = (
    "warp_instructions",
    "tensor_flops",
    "shared_wavefronts",
    "shared_wavefronts_least",
    "global_sectors",
    "global_sectors_least",
    "dram_bytes",
)


def measure(case: Case, short: int = 1024, long: int = 3072) -> Counts:
    """Run `case` over two numbers of KV tokens, multiples of 64, and compare."""
    first, _ = run(case, short)
    whole, dram_needed = run(case, long)
    loop = {
        name: (getattr(whole, name) - getattr(first, name)) / (long - short) for name in COUNTED
    }
    flops = 2 * long * case.rows * (case.layout.d_qk + case.layout.d_v)
    all_of_it = {name: getattr(whole, name) for name in COUNTED}
    return Counts(loop, all_of_it, long, flops, dram_needed)


def run(case: Case, tokens: int) -> tuple[Row, int]:
    """The counters of one launch, and the bytes of the sectors that it cannot but touch."""
    layout = case.layout
    rng = np.random.default_rng(0)
    q = aligned(
        np.clip(rng.standard_normal((1, 1, case.rows, layout.d_qk)), -1, 1), layout.compute_dtype
    )
    out = aligned(np.zeros((1, 1, case.rows, layout.d_v)), q.dtype)
    lse = aligned(np.zeros((1, case.rows, 1)), np.float32)
    lens = aligned(np.array([tokens]), np.int32)
    plan = cumla.plan_decode(lens, num_parts=1)
    metadata = aligned(plan.tile_scheduler_metadata, np.int32)
    num_splits = aligned(plan.num_splits, np.int32)
    device = SimulatedDevice(case.target, counters=True, checks=())
    with device.call() as call:
        common: dict[str, Any] = {
            "q": call.read(q),
            "layout": layout,
            "softmax_scale": layout.d_qk**-0.5,
            "block_size": plan.block_size,
            "metadata": call.read(metadata),
            "num_splits": call.read(num_splits),
            "o_accum": None,
            "lse_accum": None,
            "out": call.write(out),
            "lse": call.write(lse),
            "aligned": decode.alignment(q, out),
        }
        if case.kernel == "dense":
            kv = pool(layout, tokens)
            table = aligned(rng.permutation(tokens // PAGE_SIZE)[None], np.int32)
            touched = [table, kv]
            decode.dense_decode(
                call,
                kv_cache=call.read(kv),
                block_table=call.read(table),
                cache_seqlens=call.read(lens),
                causal=False,
                **common,
            )
        else:
            kv = pool(layout, SPREAD * tokens)
            chosen = np.arange(tokens)
            indices = rng.permutation(SPREAD * chosen + chosen % SPREAD).astype(np.int32)
            given = aligned(indices[None, None], np.int32)
            touched = [given, *rows_of(layout, kv, indices)]
            decode.sparse_decode(
                call,
                main=decode.Selection(call.read(kv), call.read(given), None),
                extra=None,
                attn_sink=None,
                kv_lens=call.read(lens),
                **common,
            )
    assert np.isfinite(lse).all()
    _, launch = device.launches[-1]
    assert launch.counters is not None
    needed = sectors([*touched, q, out, lse, lens, metadata, num_splits])
    return launch.counters.total(), 32 * needed


@cache
def pool(layout: KVLayout, tokens: int) -> Array:
    """Pages of so many random tokens."""
    rng = np.random.default_rng(tokens)
    kv = np.clip(rng.standard_normal((tokens, layout.d_qk), np.float32) / 4, -1, 1)
    kv = kv.astype(layout.compute_dtype).reshape(-1, PAGE_SIZE, 1, layout.d_qk)
    pages = cumla.pack_kv(kv, layout, PAGE_SIZE) if layout.is_fp8 else kv
    return aligned(pages, pages.dtype)


def rows_of(layout: KVLayout, pages: Array, indices: Array) -> list[Array]:
    """The bytes of some tokens of a pool, as views of it."""
    low, high = byte_bounds(pages)
    stride = pages.strides[0]
    raw = np.lib.stride_tricks.as_strided(pages.view(np.uint8), (high - low,), (1,))
    views = []
    for page, offset in zip(*divmod(indices.astype(np.int64), PAGE_SIZE), strict=True):
        start = page * stride + offset * layout.data_row_bytes
        views.append(raw[start : start + layout.data_row_bytes])
        if layout.scales_at_page_end:
            start = page * stride + PAGE_SIZE * layout.data_row_bytes + offset * layout.scale_bytes
            views.append(raw[start : start + layout.scale_bytes])
    return views


def sectors(arrays: list[Array]) -> int:
    """The 32-byte sectors that arrays without gaps lie in, each counted once."""
    found = [np.arange(low // 32, -(-high // 32)) for low, high in map(byte_bounds, arrays)]
    return int(np.unique(np.concatenate(found)).shape[0])


def aligned(array: Array, dtype: Any) -> Array:
    """A copy at a multiple of 256 bytes, with the same strides if the dtype is the same."""
    array = array.astype(dtype) if array.dtype != dtype else array
    low, high = byte_bounds(array)
    buffer = np.zeros(high - low + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    copy = np.ndarray(array.shape, array.dtype, buffer, start, array.strides)
    copy[...] = array
    return copy
