"""Python time of a decode call up to the launch, on this CPU: no driver, no kernel.

Arrays are CuPy's, on the tests' stand-in for a driver; what CuPy would call to launch does nothing.
"""

from __future__ import annotations

import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import cumla
from cumla import backends

_TESTS = Path(__file__).resolve().parents[2] / "tests"
_BATCH, _PARTS, _HEADS = 128, 132, 128
_PAGES, _TOPK = 10_000, 2048


class _Kernel:
    """In the place of a kernel that CuPy has loaded."""

    max_dynamic_shared_size_bytes = 0

    def __call__(self, *args: Any, **how: Any) -> None:
        pass


class _Module:
    def __init__(self, **how: Any) -> None:
        pass

    def get_function(self, name: str) -> _Kernel:
        return _Kernel()


def call_times() -> tuple[float, float]:
    """Microseconds of the slower of a dense and a sparse decode, results and workspace given.

    Of a kind of call that was made before, which compares a key and remembers that the checks
    passed, and of the first of its kind, which runs them all (its kernel is loaded already).
    """
    sys.path.insert(0, str(_TESTS))
    from gpu.stand_in import StandIn, cupy

    with StandIn(targets=("sm_90a",), num_sms=_PARTS, run=False).in_place():
        loaded, cupy.RawModule = cupy.RawModule, _Module
        try:
            known, first = [], []
            for call in _calls(cupy):
                call()
                known.append(_seconds(call, 2000))

                def forgotten(call: Any = call) -> None:
                    device: Any = backends._loaded["cupy"]
                    device.device.recordings.clear()
                    call()

                first.append(_seconds(forgotten, 200))
        finally:
            cupy.RawModule = loaded
    return 1e6 * max(known), 1e6 * max(first)


def _seconds(call: Callable[[], Any], number: int) -> float:
    """Of one call; of this process alone."""
    return min(timeit.repeat(call, timer=time.process_time, number=number, repeat=9)) / number


def _calls(cupy: Any) -> list[Any]:
    end = 0x7F00_0000_0000

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        """Of memory that nobody looks at."""
        nonlocal end
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = cupy.cuda.UnownedMemory(end, size, None, 0)
        end += -(-size // 256) * 256
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))

    bf16 = ml_dtypes.bfloat16
    lengths = array((_BATCH,), np.int32)
    plan = cumla.DecodePlan(
        array((_BATCH,), np.int32),
        64,
        array((_PARTS, 8), np.int32),
        array((_BATCH + 1,), np.int32),
    )
    common = {
        "q": array((_BATCH, 1, _HEADS, 576), bf16),
        "softmax_scale": 0.1,
        "out": array((_BATCH, 1, _HEADS, 512), bf16),
        "lse": array((_BATCH, _HEADS, 1), np.float32),
        "workspace": array((cumla.decode_workspace_bytes(_BATCH, 1, _HEADS, _PARTS),), np.uint8),
        "plan": plan,
    }
    dense = {
        **common,
        "kv_cache": array((_PAGES, 64, 1, 576), bf16),
        "block_table": array((_BATCH, 64), np.int32),
        "cache_seqlens": lengths,
        "causal": True,
    }
    sparse = {
        **common,
        "kv_cache": array((_PAGES, 64, 1, 656), np.uint8),
        "indices": array((_BATCH, 1, _TOPK), np.int32),
        "topk_length": lengths,
        "attn_sink": array((_HEADS,), np.float32),
    }
    return [lambda: cumla.dense_decode(**dense), lambda: cumla.sparse_decode(**sparse)]
