"""The CUDA C of tests/sim/kernels, run on NumPy arrays with all checks on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cumla import sim
from sim import cuda

FOLDER = Path(__file__).parent / "kernels"
CHECKS = ("memory", "race")
DELIVERIES = ("eager", "late", "random")
# One element, not a warp, a warp and more, no multiple of a block, many blocks.
SIZES = (1, 31, 33, 1000)


@dataclass(frozen=True)
class Empty:
    """An array that the kernel must write before anybody reads it."""

    shape: Any
    dtype: Any = np.float32


@cache
def module(name: str, target: str, *options: str) -> sim.LoadedModule:
    """The module of kernels/<name>.cu; all tests share it, so no kernel keeps state in it."""
    return cuda.load((FOLDER / f"{name}.cu").read_text(), *options, target=target)


def run(
    loaded: sim.LoadedModule, kernel: str, grid: Any, block: Any, *args: Any, **how: Any
) -> list[Any]:
    """Launch a kernel; what its array arguments hold afterwards.

    Args:
        args: arrays of at least one dimension (copied to the device), Empty, and what a launch
            takes for other parameters.
        how: options of the launch; both checks are on.
    """
    device = loaded.device
    given: list[Any] = []
    arrays = []
    for arg in args:
        if isinstance(arg, Empty):
            given.append(device.alloc(arg.shape, arg.dtype))
            arrays.append(given[-1])
        elif isinstance(arg, np.ndarray):
            given.append(device.upload(arg))
            arrays.append(given[-1])
        else:
            given.append(arg)
    loaded.kernel(kernel).launch(grid, block, given, **{"checks": CHECKS, **how})
    return [array.get() for array in arrays]
