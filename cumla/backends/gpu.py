"""NVIDIA GPUs through CuPy: what `cumla.kernels.device` asks of a device.

CuPy's own rules hold. Work is queued on CuPy's current stream of its current device, and memory
comes from that stream's part of CuPy's pool, so that memory which is given back is used again
only behind the kernels that still need it. Nothing here waits for a GPU, and all of it may be
captured in a CUDA graph.

This module, `streams` and the CUDA side of `dlpack` are what calls CuPy for the ops. They name its
functions in full at each call, so that a test can put a stand-in at that very boundary.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cumla.backends import BackendUnavailable
from cumla.backends.replay import Log, Recording
from cumla.backends.streams import current
from cumla.checks import bad_type, bad_value
from cumla.jit.build import build
from cumla.kernels.device import Dimensions, Program
from cumla.layouts import KVLayout

Array = NDArray[Any]

ALIGNMENT = 256
"""Bytes; every array that is carved from a workspace begins at a multiple of it."""
OLDEST = (8, 0)
"""The lowest compute capability that the kernels run on."""
# Code for X.y runs on X.z with z > y, but not from or to the embedded GPUs: CUDA C++ Programming
# Guide, "Binary Compatibility". Nor does sm_90a's.
_RUN_ON_NEWER = frozenset((80, 86, 89, 100, 103, 120, 121))
# Dynamic shared memory of a block that needs no leave of the driver. CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability".
_USUAL_SHARED_BYTES = 48 << 10
# cudaDeviceAttr, driver_types.h; CuPy has no names for these two.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76

_NOTHING: AbstractContextManager[None] = nullcontext()
_CPU_INSTEAD = "NumPy arrays run on the 'numpy' backend, without a GPU."


def load_cupy() -> Any:
    """The module cupy, if it is installed and finds a GPU and its driver.

    Raises:
        BackendUnavailable: it is not there or cannot be used; the message says why.
    """
    try:
        import cupy
    except Exception as error:
        # Not only ImportError: a broken installation fails in many ways.
        raise BackendUnavailable(
            f"backend 'cupy': CuPy cannot be imported ({type(error).__name__}: {error}). Install "
            f"cupy-cuda12x or cupy-cuda13x, 14 or later. {_CPU_INSTEAD}"
        ) from error
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise BackendUnavailable(
            f"backend 'cupy': CuPy found no usable NVIDIA driver ({error}). Install or update the "
            f"driver, nvidia-smi must list the GPU. {_CPU_INSTEAD}"
        ) from error
    if not count:
        raise BackendUnavailable(
            "backend 'cupy': the driver lists no GPU. Look at nvidia-smi and at "
            f"CUDA_VISIBLE_DEVICES. {_CPU_INSTEAD}"
        )
    return cupy


@dataclass(frozen=True)
class Facts:
    """What a launch needs to know of a GPU."""

    target: str
    num_sms: int
    shared_bytes: int
    """The most shared memory a block can have."""


def nvrtc_targets() -> list[int]:
    """The architectures that NVRTC compiles for, as numbers: 90 for sm_90."""
    from cupy_backends.cuda.libs import nvrtc

    return [int(one) for one in nvrtc.getSupportedArchs()]


def target_for(major: int, minor: int, known: Sequence[int]) -> str:
    """The target to compile for on a GPU of that compute capability.

    `known` is what NVRTC compiles for, 90 for sm_90. A GPU that is newer than NVRTC gets the code
    of the newest that it can run. Kernels for 9.0 may use what only sm_90a has.

    Raises:
        BackendUnavailable: the GPU is older than the kernels, or newer than NVRTC.
    """
    if (major, minor) < OLDEST:
        raise BackendUnavailable(
            f"backend 'cupy': this GPU has compute capability {major}.{minor}, the kernels need "
            f"{OLDEST[0]}.{OLDEST[1]} or later (A100 and newer). {_CPU_INSTEAD}"
        )
    wanted = 10 * major + minor
    older = {one for one in _RUN_ON_NEWER if 10 * major <= one < wanted}
    fitting = [one for one in known if one == wanted or one in older]
    if not fitting:
        names = ", ".join(f"sm_{one}" for one in sorted(known))
        raise BackendUnavailable(
            f"backend 'cupy': this GPU has compute capability {major}.{minor}, and NVRTC knows "
            f"{names} only. Install a newer CUDA toolkit or nvidia-cuda-nvrtc."
        )
    best = max(fitting)
    return f"sm_{best}a" if best == 90 else f"sm_{best}"


# ----------------------------------------------------------------------------------------- device


class GpuDevice:
    """The GPUs of this machine; a call runs on the one that is current when its block begins.

    Raises:
        BackendUnavailable: there is no CuPy, no driver or no GPU.
    """

    def __init__(self) -> None:
        self._cupy = load_cupy()
        self._lock = threading.Lock()
        self._facts: dict[int, Facts] = {}
        self._kernels: dict[tuple[Program, int], _Kernel] = {}
        # Copies of host arrays, by id(array), device and stream; see GpuCall.read.
        self._copies: dict[tuple[int, int, int], Any] = {}
        # Kinds of calls that were made before, by their keys; None: not to be remembered.
        self.recordings: dict[Any, Recording | None] = {}
        self._logging = threading.local()

    def call(self, *, stream: Any = None, workspace: Any = None) -> GpuCall:
        """Start a call of an op; see `cumla.kernels.device.Call`.

        Args:
            stream: where its kernels go, as for `as_stream`; None: CuPy's current stream.
            workspace: uint8 array, contiguous, that all scratch memory is carved from; None: it
                comes from CuPy's pool.
        """
        return GpuCall(self, stream, workspace)

    @contextmanager
    def logged(self) -> Iterator[Log]:
        """What this thread's calls do in the block."""
        self._logging.log = log = Log()
        try:
            yield log
        finally:
            self._logging.log = None

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """A CuPy array on the current device, uninitialised."""
        return self._cupy.empty(shape, dtype)

    def as_array(self, array: Array) -> Any:
        """A copy of a NumPy array on the current device."""
        copy = self._cupy.empty(array.shape, array.dtype)
        copy.set(array)
        return copy

    def empty_pages(self, layout: KVLayout, num_pages: int, page_size: int) -> Any:
        """As `layout.empty_pages` for one KV head, a CuPy array on the current device."""
        stride = layout.page_stride(page_size)
        return self._cupy.ndarray(
            (num_pages, page_size, 1, layout.row_elements),
            layout.dtype,
            self._cupy.zeros(num_pages * stride, np.uint8).data,
            (stride, layout.row_bytes, layout.row_bytes, layout.dtype.itemsize),
        )

    def facts(self, device_id: int) -> Facts:
        """What GPU `device_id` is; asked for once."""
        found = self._facts.get(device_id)
        if found is None:
            runtime = self._cupy.cuda.runtime
            major, minor, num_sms, shared_bytes = (
                runtime.deviceGetAttribute(one, device_id)
                for one in (
                    _CAPABILITY_MAJOR,
                    _CAPABILITY_MINOR,
                    runtime.cudaDevAttrMultiProcessorCount,
                    runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin,
                )
            )
            found = Facts(target_for(major, minor, nvrtc_targets()), num_sms, shared_bytes)
            self._facts[device_id] = found
        return found

    def kernel(self, program: Program, device_id: int, shared_bytes: int) -> Any:
        """The RawKernel, compiled and loaded once for each device, with leave for `shared_bytes`.

        Device `device_id` must be the current one.
        """
        found = self._kernels.get((program, device_id))
        if found is None or shared_bytes > found.shared_bytes:
            with self._lock:
                found = self._kernels.get((program, device_id))
                if found is None:
                    found = self._load(program, device_id)
                    self._kernels[program, device_id] = found
                if shared_bytes > found.shared_bytes:
                    found.kernel.max_dynamic_shared_size_bytes = shared_bytes
                    found.shared_bytes = shared_bytes
        return found.kernel

    def _load(self, program: Program, device_id: int) -> _Kernel:
        built = build(program.path, program.expression, self.facts(device_id).target)
        module = self._cupy.RawModule(path=str(built.cubin))
        return _Kernel(module.get_function(built.entry), _USUAL_SHARED_BYTES)

    def here(self, array: Array) -> Any:
        """A copy of a host array for the current device and stream; see GpuCall.read."""
        device_id = self._cupy.cuda.runtime.getDevice()
        stream = self._cupy.cuda.get_current_stream()
        # An array that nobody can change is copied once. Each stream has its own copy: no other
        # stream knows when the copying is done, or when the memory may be used for something else.
        constant = not array.flags.writeable and array.base is None
        key = (id(array), device_id, stream.ptr)
        if constant and key in self._copies:
            return self._copies[key]
        if stream.is_capturing():
            raise bad_value(
                "plan",
                "a plan made on the CPU that this stream has not used yet",
                "it would have to be copied while a CUDA graph is captured",
                "Run the call once on this stream before the capture, or plan from lengths on "
                "the GPU.",
            )
        copy = self.as_array(array)
        if constant:
            self._copies[key] = copy
            weakref.finalize(array, self._copies.pop, key, None).atexit = False
        return copy


@dataclass
class _Kernel:
    """A loaded kernel."""

    kernel: Any
    shared_bytes: int
    """The dynamic shared memory that the driver lets a block have."""


# ------------------------------------------------------------------------------------------- call


class GpuCall:
    """See `cumla.kernels.device.Call`. Its device arrays are CuPy arrays, the caller's own."""

    def __init__(self, device: GpuDevice, stream: Any, workspace: Any) -> None:
        self._device = device
        self._cupy = device._cupy
        self._stream, self._workspace = stream, workspace
        self._place = _NOTHING
        self._used = 0
        self._device_id = -1
        self._log: Log | None = None

    @property
    def target(self) -> str:
        return self._device.facts(self._device_id).target

    @property
    def num_sms(self) -> int:
        return self._device.facts(self._device_id).num_sms

    @property
    def shared_bytes(self) -> int:
        return self._device.facts(self._device_id).shared_bytes

    def __enter__(self) -> GpuCall:
        self._device_id = self._cupy.cuda.runtime.getDevice()
        self._log = getattr(self._device._logging, "log", None)
        if self._stream is not None:
            self._place = current(self._device_id, self._stream)
        self._place.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._place.__exit__(kind, error, trace)

    def read(self, array: Any) -> Any:
        """An input: a CuPy array as it is, a NumPy array as a copy on the device.

        A read-only NumPy array that owns its memory, as the arrays of a plan that was made on the
        CPU, is copied once for each stream, and the copy lives as long as the array. The copy is
        queued on the stream; only its staging through pinned memory is the host's work.
        """
        return self._device.here(array) if isinstance(array, np.ndarray) else array

    def write(self, array: Any) -> Any:
        """An output: a CuPy array as it is."""
        if isinstance(array, np.ndarray):
            raise bad_type(
                "array", "a numpy.ndarray", "a GPU cannot write to it", "Pass a CuPy array."
            )
        return array

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Scratch memory: the next of the workspace if there is one, else of CuPy's pool."""
        dtype = np.dtype(dtype)
        if self._workspace is None:
            made = self._cupy.empty(shape, dtype)
            if self._log is not None:
                self._log.scratch.append(made)
            return made
        memory = self._workspace.data
        begin = self._used + -(memory.ptr + self._used) % ALIGNMENT
        end = begin + math.prod(shape) * dtype.itemsize
        if end > self._workspace.nbytes:
            raise bad_value(
                "workspace",
                f"{self._workspace.nbytes} bytes",
                f"this call needs at least {end}",
                "Ask cumla.decode_workspace_bytes for the size.",
            )
        self._used = end
        return self._cupy.ndarray(shape, dtype, memory + begin)

    def launch(
        self,
        program: Program,
        *,
        grid: Dimensions,
        block: Dimensions,
        args: Sequence[Any],
        shared_bytes: int = 0,
    ) -> None:
        kernel = self._device.kernel(program, self._device_id, shared_bytes)
        grid, block, args = _extent(grid), _extent(block), marshal(args)
        kernel(grid, block, args, shared_mem=shared_bytes)
        if self._log is not None:
            self._log.launches.append((kernel, grid, block, args, shared_bytes))


def _extent(dimensions: Dimensions) -> tuple[int, ...]:
    """A grid or block as CuPy takes it, which would silently launch 1 for 0."""
    sizes = dimensions if isinstance(dimensions, tuple) else (dimensions,)
    if min(sizes) < 1:
        raise bad_value("grid", sizes, "every dimension must be at least 1", "Skip the launch.")
    return sizes


# CuPy would pass these as 8 bytes, whatever the kernel's parameter is.
_PYTHON_NUMBERS = frozenset((bool, int, float))


def marshal(args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of a kernel as CuPy takes them: the one place where they are looked at.

    A CuPy array is passed as the address of its first element, None as a null pointer, a NumPy
    scalar as its own bytes. CuPy refuses all else but Python's numbers; this does.
    """
    if not _PYTHON_NUMBERS.isdisjoint(map(type, args)):
        number = next(i for i, one in enumerate(args) if type(one) in _PYTHON_NUMBERS)
        raise bad_type(
            f"args[{number}]",
            repr(args[number]),
            "it must be a device array, a NumPy scalar or None",
            "Wrap it in the NumPy type of the kernel's parameter.",
        )
    return tuple(args)
