"""A backend for the arrays of the stand-in that computes with NumPy: for tests of what is above."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from cumla.backends import problems
from cumla.backends.gpu import GpuDevice
from cumla.backends.numpy import NumpyBackend
from gpu.stand_in import StandIn, cupy

_RESULTS = ("out", "lse", "max_logits", "dq", "dk", "dv")


class NumpyThere(NumpyBackend):
    """Every op as the numpy backend computes it, on copies.

    Attributes:
        asked: the problems, the streams and the devices that they came on.
    """

    name = "cupy"

    def __init__(self, driver: StandIn) -> None:
        super().__init__()
        self.device = GpuDevice()
        self.driver = driver
        self.asked: list[tuple[Any, int, int]] = []

    def dense_decode(self, problem: problems.DenseDecode) -> None:
        self._run("dense_decode", problem)

    def sparse_decode(self, problem: problems.SparseDecode) -> None:
        self._run("sparse_decode", problem)

    def sparse_prefill(self, problem: problems.SparsePrefill) -> None:
        self._run("sparse_prefill", problem)

    def mha_varlen(self, problem: problems.MhaVarlen) -> None:
        self._run("mha_varlen", problem)

    def mha_varlen_backward(self, problem: problems.MhaVarlenBackward) -> None:
        self._run("mha_varlen_backward", problem)

    def merge_attention(self, problem: problems.MergeAttention) -> None:
        self._run("merge_attention", problem)

    def _run(self, op: str, problem: Any) -> None:
        stream = cupy.cuda.get_current_stream().ptr
        self.asked.append((problem, stream, cupy.cuda.runtime.getDevice()))
        there = self._moved(problem)
        getattr(super(), op)(there)
        for name in _RESULTS:
            if hasattr(problem, name):
                self.driver.write(getattr(problem, name), getattr(there, name))

    def _moved(self, value: Any) -> Any:
        if isinstance(value, cupy.ndarray):
            return self.driver.numpy(value)
        if isinstance(value, tuple):
            return tuple(self._moved(one) for one in value)
        if is_dataclass(value) and type(value).__name__ != "KVLayout":
            changed = {one.name: self._moved(getattr(value, one.name)) for one in fields(value)}
            return replace(value, **changed)
        return value


def moved(driver: StandIn, value: Any, device: int = 0) -> Any:
    """NumPy arrays as CuPy's, in lists and dictionaries too; all else as it is."""
    if isinstance(value, np.ndarray):
        return driver.array(value, device)
    if isinstance(value, list):
        return [moved(driver, one, device) for one in value]
    if isinstance(value, dict):
        return {name: moved(driver, one, device) for name, one in value.items()}
    return value
