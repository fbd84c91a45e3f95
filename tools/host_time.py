"""What a decode call costs on the CPU, for arrays on a GPU, without one.

    python tools/host_time.py [--profile]

Real CuPy arrays over memory that is not there, and in the driver's place the tests' stand-in with
kernels that do nothing. So this is all of Python from the call to its last launch, but not what
CuPy then takes to hand over arguments: about 0.2 us for each scalar.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import cumla
from cumla.backends import load_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from gpu.stand_in import StandIn, cupy

BF16 = ml_dtypes.bfloat16
RUNS, REPEATS = 1000, 7


class Nothing:
    """A kernel without a GPU."""

    max_dynamic_shared_size_bytes = 0

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        pass


class Module:
    def __init__(self, *, path: str) -> None:
        pass

    def get_function(self, name: str) -> Nothing:
        return Nothing()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    profiled = parser.parse_args().profile
    driver = StandIn(targets=("sm_90",), num_sms=132, run=False)
    with driver.in_place():
        cupy.RawModule = Module
        for name, (op, call) in calls().items():
            known = best(lambda op=op, call=call: op(**call))
            new = best(lambda op=op, call=call: (forget(), op(**call)))
            print(f"{name:7} {known:6.1f} us, the first of its kind {new:6.1f} us")
            if profiled:
                with cProfile.Profile() as profile:
                    for _ in range(RUNS):
                        op(**call)
                pstats.Stats(profile).sort_stats("tottime").print_stats(15)


def best(call: Callable[[], object]) -> float:
    """Microseconds of a call, the best of some."""
    call()
    return min(timeit.repeat(call, number=RUNS, repeat=REPEATS)) / RUNS * 1e6


def forget() -> None:
    backend: Any = load_backend("cupy")
    backend.device.recordings.clear()


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A step of DeepSeek V3 and V3.2, with results, workspace and plan given."""
    b, parts = 128, 132
    plan = cumla.DecodePlan(
        array((b,), np.int32), 64, array((parts, 8), np.int32), array((b + 1,), np.int32)
    )
    results = {
        "softmax_scale": 0.1,
        "out": array((b, 1, 128, 512), BF16),
        "lse": array((b, 128, 1), np.float32),
        "workspace": array((cumla.decode_workspace_bytes(b, 1, 128, parts),), np.uint8),
        "plan": plan,
    }
    q = array((b, 1, 128, 576), BF16)
    dense = {
        "q": q,
        "kv_cache": array((10_000, 64, 1, 576), BF16),
        "block_table": array((b, 64), np.int32),
        "cache_seqlens": array((b,), np.int32),
    }
    sparse = {
        "q": q,
        "kv_cache": array((10_000, 64, 1, 656), np.uint8),
        "indices": array((b, 1, 2048), np.int32),
        "topk_length": array((b,), np.int32),
        "attn_sink": array((128,), np.float32),
    }
    return {
        "dense": (cumla.dense_decode, dense | results),
        "sparse": (cumla.sparse_decode, sparse | results),
    }


_free = 0x7F00_0000_0000


def array(shape: tuple[int, ...], dtype: Any) -> Any:
    """A CuPy array of its own memory, which nobody may touch."""
    global _free
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = cupy.cuda.UnownedMemory(_free, size, None, 0)
    _free += -(-size // 512) * 512 + 512
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


if __name__ == "__main__":
    main()
