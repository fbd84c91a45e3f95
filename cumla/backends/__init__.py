"""Where an op runs: the backends, one small interface, and the rule that picks one.

numpy  any CPU: the default for NumPy arrays.
cupy   an NVIDIA GPU: what CuPy arrays run on.
sim    any CPU: the GPU kernels' own PTX, for NumPy arrays, when asked for by name.

Nothing ever falls back silently from one to another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cumla.backends.problems import (
    DenseDecode,
    MergeAttention,
    MhaVarlen,
    MhaVarlenBackward,
    SparseDecode,
    SparsePrefill,
)
from cumla.checks import bad_type, bad_value
from cumla.fp8 import ScaleRule
from cumla.layouts import KVLayout

Array = NDArray[Any]
BACKEND_NAMES = ("numpy", "cupy", "sim")
ENVIRONMENT_VARIABLE = "CUMLA_BACKEND"
# Not a backend that a caller can name: `oracle` is the way in.
_ORACLE = "numpy-float64"


class BackendUnavailable(RuntimeError):
    """The backend that the arrays or the caller ask for cannot run here; the message says why."""


class Backend(Protocol):
    """What every backend can do. Its arguments have been checked; it writes where it is told."""

    name: str

    def result_dtype(self, dtype: DTypeLike) -> np.dtype[Any]:
        """The dtype of a result that is `dtype` in the op's definition."""

    def as_array(self, array: Array) -> Array:
        """A NumPy array as its callers hold arrays: itself, or a copy where they are."""

    def empty_pages(self, layout: KVLayout, num_pages: int, page_size: int) -> Array:
        """A zeroed page pool for one KV head."""

    def write_rows(
        self, pages: Array, layout: KVLayout, slots: Array, rows: Array, rule: ScaleRule | None
    ) -> None:
        """Encode rows [n, d_qk], bf16, fp16 or float32, into the distinct slots [n] of the pool."""

    def read_rows(self, pages: Array, layout: KVLayout, slots: Array) -> Array:
        """The decoded rows [n, d_qk] at slots [n], in the layout's compute dtype."""

    def copy_page(self, pages: Array, layout: KVLayout, source: int, target: int) -> None:
        """Copy the bytes of page `source` over page `target`."""

    def dense_decode(self, problem: DenseDecode) -> None: ...
    def sparse_decode(self, problem: SparseDecode) -> None: ...
    def sparse_prefill(self, problem: SparsePrefill) -> None: ...
    def mha_varlen(self, problem: MhaVarlen) -> None: ...
    def mha_varlen_backward(self, problem: MhaVarlenBackward) -> None: ...
    def merge_attention(self, problem: MergeAttention) -> None: ...


def _numpy() -> Backend:
    from cumla.backends.numpy import NumpyBackend

    return NumpyBackend()


def _float64() -> Backend:
    from cumla.backends.numpy import NumpyBackend

    return NumpyBackend(np.float64)


def _cupy() -> Backend:
    from cumla.backends.gpu import GpuDevice
    from cumla.backends.kernel_backend import KernelBackend

    return KernelBackend("cupy", GpuDevice())


def _sim() -> Backend:
    from cumla.backends.kernel_backend import KernelBackend
    from cumla.backends.simulated import SimulatedDevice
    from cumla.jit import nvrtc

    try:
        nvrtc.version()
    except Exception as error:  # a library that is missing or broken fails in many ways
        raise BackendUnavailable(
            f"backend 'sim': NVRTC, which compiles the kernels, cannot be used "
            f"({type(error).__name__}: {error}). Install nvidia-cuda-nvrtc-cu12 and cupy-cuda12x."
        ) from error
    return KernelBackend("sim", SimulatedDevice.from_environment())


_LOADERS: dict[str, Callable[[], Backend]] = {
    "numpy": _numpy,
    _ORACLE: _float64,
    "cupy": _cupy,
    "sim": _sim,
}
_loaded: dict[str, Backend] = {}
_chosen: ContextVar[str | None] = ContextVar("cumla_backend", default=None)


def _check_name(argument: str, name: object) -> str:
    if not isinstance(name, str):
        raise bad_type(argument, repr(name), "it must be a string", f"One of {BACKEND_NAMES}.")
    if name not in BACKEND_NAMES:
        raise bad_value(argument, repr(name), "it names no backend", f"One of {BACKEND_NAMES}.")
    return name


def get_backend() -> str:
    """The name of the backend that NumPy arrays run on now.

    The innermost `use_backend`, else the environment variable CUMLA_BACKEND, else "numpy".
    """
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return _check_name(ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE) or "numpy")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run NumPy arrays on backend `name` inside the `with` block (this thread or task only).

    Raises:
        ArgumentError: no backend has that name.
        BackendUnavailable: it cannot run on this machine; raised at entry.
    """
    load_backend(_check_name("name", name))
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def oracle() -> Iterator[None]:
    """Run NumPy arrays through the ops' definitions in float64, to judge other results by.

    Results are float64 and unrounded, whatever the dtype of the inputs.
    """
    token = _chosen.set(_ORACLE)
    try:
        yield
    finally:
        _chosen.reset(token)


def load_backend(name: str | None = None) -> Backend:
    """The backend `name`, or the one in force for NumPy arrays; loaded once.

    Raises:
        ArgumentError: no backend has that name.
        BackendUnavailable: it cannot run on this machine.
    """
    name = get_backend() if name is None else _check_name("backend", name)
    if name not in _loaded:
        _loaded[name] = _LOADERS[name]()
    return _loaded[name]


def availability() -> dict[str, str | None]:
    """For every backend: None if it can run here, else the reason why not."""
    reasons: dict[str, str | None] = {}
    for name in BACKEND_NAMES:
        try:
            load_backend(name)
            reasons[name] = None
        except BackendUnavailable as error:
            reasons[name] = str(error)
    return reasons
