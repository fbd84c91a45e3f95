"""Run the kernels that move or join rows in the simulator and count."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

import cumla
from cumla.backends.simulated import SimulatedDevice
from cumla.kernels import cache, combine, merge
from cumla.layouts import LAYOUTS, KVLayout
from cumla.sim.counters import Row

from .measure import COUNTED, PAGE_SIZE, aligned

BF16 = ml_dtypes.bfloat16
ROWS = 64
D_V = 512


def stream_counts(kernel: str, of: str, target: str) -> dict[str, float]:
    """Counters of a launch over 64 rows, for each of them; `kernel` and `of` as `stream_work`."""
    total = _RUNS[kernel](of, target)
    return {name: getattr(total, name) / ROWS for name in COUNTED}


def _append(of: str, target: str) -> Row:
    layout, slots, rows, device = _cache(of, target)
    with device.call() as call:
        pages = _pages(layout, rows)
        rule = layout.default_scale_rule
        cache.append_rows(call, pages, layout, slots, rows, rule)
    return _total(device)


def _gather(of: str, target: str) -> Row:
    layout, slots, rows, device = _cache(of, target)
    with device.call() as call:
        cache.gather_rows(call, _pages(layout, rows), layout, slots, rows)
    return _total(device)


def _cache(of: str, target: str) -> tuple[KVLayout, Any, Any, SimulatedDevice]:
    [layout] = [one for one in LAYOUTS if one.name == of]
    rng = np.random.default_rng(0)
    rows = aligned(rng.standard_normal((ROWS, layout.d_qk)), BF16)
    slots = aligned(rng.permutation(ROWS), np.int64)
    return layout, slots, rows, SimulatedDevice(target, 1, counters=True, checks=())


def _pages(layout: KVLayout, rows: Any) -> Any:
    kv = rows.reshape(-1, PAGE_SIZE, 1, layout.d_qk)
    pages = cumla.pack_kv(kv, layout, PAGE_SIZE) if layout.is_fp8 else kv
    return aligned(pages, pages.dtype)


def _combine(of: str, target: str) -> Row:
    pieces = int(of.split()[0])
    rng = np.random.default_rng(0)
    device = SimulatedDevice(target, 1, counters=True, checks=())
    out = aligned(np.zeros((1, 1, ROWS, D_V)), BF16)
    lse = aligned(np.zeros((1, ROWS, 1)), np.float32)
    with device.call() as call:
        combine.combine(
            call,
            o_accum=call.read(aligned(rng.standard_normal((pieces, 1, ROWS, D_V)), np.float32)),
            lse_accum=call.read(aligned(rng.standard_normal((pieces, 1, ROWS)), np.float32)),
            num_splits=call.read(aligned(np.array([0, pieces]), np.int32)),
            attn_sink=None,
            out=call.write(out),
            lse=call.write(lse),
        )
    return _total(device)


def _merge(of: str, target: str) -> Row:
    results = int(of.split()[0])
    rng = np.random.default_rng(0)
    device = SimulatedDevice(target, 1, counters=True, checks=())
    shape = (1, ROWS, D_V)
    with device.call() as call:
        merge.merge_attention(
            call,
            outs=[aligned(rng.standard_normal(shape), BF16) for _ in range(results)],
            lses=[aligned(rng.standard_normal(shape[:2]), np.float32) for _ in range(results)],
            out=aligned(np.zeros(shape), BF16),
            lse=aligned(np.zeros(shape[:2]), np.float32),
        )
    return _total(device)


def _total(device: SimulatedDevice) -> Row:
    [(_, launch)] = device.launches
    assert launch.counters is not None
    return launch.counters.total()


_RUNS = {"append": _append, "gather": _gather, "combine": _combine, "merge": _merge}
