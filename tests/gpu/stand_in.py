"""A stand-in for the CUDA driver under CuPy: real CuPy arrays whose memory is `cumla.sim`'s.

It takes the place of the CuPy calls that reach a driver, and of nothing else: arrays, their
pointers, strides and views, and `cupy.empty` through an allocator, are CuPy's own code. A kernel
runs in the simulator, with all checks, on the very addresses that CuPy would hand to the driver,
the moment it is launched. It is a test's tool and never a fallback.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import capsules
import numpy as np
import pytest
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

from cumla import backends, sim
from cumla.backends import gpu
from cumla.jit import nvrtc
from cumla.jit.build import build
from cumla.sim.memory import arena
from cumla.sim.memory.device import BASE

cupy = pytest.importorskip("cupy")

Array = NDArray[Any]

_USUAL_SHARED_BYTES = 48 << 10


@dataclass
class Launched:
    """A kernel that was launched."""

    entry: str
    device: int
    stream: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    values: tuple[bytes, ...]
    """The arguments, as the driver gets them."""
    shared_bytes: int


@dataclass
class StandIn:
    """The driver, its GPUs, and what it was asked to do.

    Attributes:
        targets: one for each GPU.
        num_sms: of each.
        launches, allocations (bytes), waits, uploads, modules (paths): what happened so far.
        orders: (exporting stream, importing stream) of arrays that went out by DLPack.
        graphs: launches that were captured, by stream, while a capture runs.
        run: False: launches do nothing but count.
        sources: CUDA C of kernels that the tests bring along, by path; the expression is the name.
        built: PTX by the path of the cubin that it stands for.
    """

    targets: tuple[str, ...] = ("sm_80",)
    num_sms: int = 4
    checks: tuple[str, ...] = ("memory", "race")
    delivery: str = "eager"
    run: bool = True
    launches: list[Launched] = field(default_factory=list)
    allocations: list[int] = field(default_factory=list)
    waits: int = 0
    uploads: int = 0
    modules: list[str] = field(default_factory=list)
    orders: list[tuple[int, int]] = field(default_factory=list)
    graphs: dict[int, list[tuple[Any, ...]]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    built: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gpus = [_gpu(one, self.num_sms, n) for n, one in enumerate(self.targets)]
        self.device = self._newest = 0
        self.streams: list[Any] = [cupy.cuda.Stream.null]

    # ---------------------------------------------------------------------------------- memory

    def allocate(self, nbytes: int) -> Any:
        """What CuPy's pool does, on the current device; freed when CuPy lets go of it."""
        self.allocations.append(nbytes)
        memory = self.gpus[self.device].alloc(max(nbytes, 1))
        return self._pointer(memory, self.device)

    def _pointer(self, memory: sim.DeviceArray, device: int) -> Any:
        base = cupy.cuda.UnownedMemory(memory.address, memory.nbytes, memory, device)
        return cupy.cuda.MemoryPointer(base, 0)

    def array(self, array: Array, device: int = 0) -> Any:
        """A CuPy array of the same bytes and strides, with all that lies between its elements.

        The first of its bytes is at a multiple of 256, as in an allocation of its own.
        """
        low, high = byte_bounds(array)
        data = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
        pointer = self._pointer(self.gpus[device].upload(data), device)
        start = array.__array_interface__["data"][0] - low
        return cupy.ndarray(array.shape, array.dtype, pointer + start, array.strides)

    def elsewhere(self, array: Any) -> Any:
        """A copy of a CuPy array in memory of its own, with the same strides and all between."""
        host = self._host(array)
        copy = self.array(host, array.data.device_id)
        assert copy.strides == array.strides
        return copy

    def _host(self, array: Any) -> Array:
        """The memory of a CuPy array itself, as a NumPy array."""
        data = self.gpus[array.data.device_id].memory.arena.data
        return np.ndarray(array.shape, array.dtype, data, array.data.ptr - BASE, array.strides)

    def numpy(self, array: Any) -> Array:
        """What a CuPy array holds."""
        return self._host(array).copy()

    def write(self, target: Any, values: Array) -> None:
        """Write to a CuPy array, as a copy from the host does."""
        host = self._host(target)
        host[...] = values
        low, high = byte_bounds(host)
        state = arena.ALLOCATED | arena.WRITTEN | arena.WRITABLE
        first = target.data.ptr - BASE + low - host.__array_interface__["data"][0]
        memory = self.gpus[target.data.device_id].memory
        memory.arena.mark(first, first + high - low, state)

    # ---------------------------------------------------------------------------------- driver

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Take the driver's place, and give cumla a "cupy" backend that meets it first here."""
        before, loaded = cupy.cuda.get_allocator(), dict(backends._loaded)
        backends._loaded.pop("cupy", None)
        with pytest.MonkeyPatch.context() as patch:
            self._install(patch)
            cupy.cuda.set_allocator(self.allocate)
            try:
                yield
            finally:
                cupy.cuda.set_allocator(before)
                backends._loaded.pop("cupy", None)
                backends._loaded.update(loaded)

    def _install(self, patch: pytest.MonkeyPatch) -> None:
        runtime = cupy.cuda.runtime
        patch.setattr(runtime, "getDeviceCount", lambda: len(self.gpus))
        patch.setattr(runtime, "getDevice", lambda: self.device)
        patch.setattr(runtime, "deviceGetAttribute", self._attribute)
        patch.setattr(runtime, "deviceSynchronize", self._wait)
        patch.setattr(cupy.cuda, "get_current_stream", lambda device_id=-1: self.streams[-1])
        patch.setattr(cupy.cuda, "Device", lambda number: _CurrentDevice(self, number))
        patch.setattr(cupy, "RawModule", lambda *, path: _Module(self, path))
        patch.setattr(cupy, "zeros", self._zeros)
        stream = cupy.cuda.stream._BaseStream
        patch.setattr(stream, "__enter__", lambda one: self.streams.append(one))
        patch.setattr(stream, "__exit__", lambda one, *error: self.streams.pop() and None)
        patch.setattr(stream, "is_capturing", lambda one: one.ptr in self.graphs)
        patch.setattr(stream, "synchronize", lambda one: self._wait())
        # CuPy's class of arrays is a Python class on top of one that is not.
        kind = cupy.ndarray
        patch.setattr(kind, "set", lambda to, values: self._set(to, values), raising=False)
        patch.setattr(kind, "get", lambda one, *how, **more: self._get(one), raising=False)
        place = lambda one: (capsules.CUDA, one.data.device_id)  # noqa: E731
        patch.setattr(kind, "__dlpack_device__", place, raising=False)
        patch.setattr(
            kind, "__dlpack__", lambda one, **how: self._export(one, **how), raising=False
        )
        # A cubin takes seconds for ptxas, and nothing here could read it.
        patch.setattr(gpu, "build", self._build)

    def _attribute(self, attribute: int, device: int) -> int:
        device_of = self.gpus[device]
        number = device_of.capability
        runtime = cupy.cuda.runtime
        facts = {
            75: number // 10,
            76: number % 10,
            runtime.cudaDevAttrMultiProcessorCount: device_of.num_sms,
            runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin: device_of.shared_per_block,
        }
        return facts[attribute]

    def _wait(self) -> None:
        self.waits += 1

    def _zeros(self, shape: Any, dtype: Any) -> Any:
        made = cupy.empty(shape, dtype)
        self.write(made, np.zeros(made.shape, made.dtype))
        return made

    def _set(self, target: Any, values: Array) -> None:
        assert self.streams[-1].ptr not in self.graphs, "copied from the host while capturing"
        self.uploads += 1
        self.write(target, values)

    def _get(self, array: Any) -> Array:
        self._wait()
        return self.numpy(array)

    def _export(self, array: Any, *, stream: Any = None, **how: Any) -> Any:
        self.orders.append((self.streams[-1].ptr, stream))
        device = (capsules.CUDA, array.data.device_id)
        versioned = (how.get("max_version") or (0, 0)) >= (1, 0)
        return capsules.make(array, array.data.ptr, device, versioned=versioned)

    def _build(self, path: str, expression: str, target: str) -> Any:
        """The kernel as PTX, by a path that is its name."""
        if path in self.sources:
            ptx, entry = _ptx(self.sources[path], path, target), expression
        else:
            built = build(path, expression, target)
            ptx, entry = built.ptx, built.entry
        cubin = f"{path}/{target}/{expression}"
        self.built[cubin] = ptx
        return SimpleNamespace(cubin=cubin, entry=entry)

    # ---------------------------------------------------------------------------------- launch

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Any],
        shared_bytes: int,
    ) -> None:
        """Queue a kernel on the current stream: run it now, or add it to the graph of a capture."""
        stream = self.streams[-1].ptr
        values = tuple(_parameter(one).tobytes() for one in args)
        done = Launched(kernel.name, self.device, stream, grid, block, values, shared_bytes)
        if stream in self.graphs:
            self.graphs[stream].append((kernel, grid, block, args, shared_bytes))
            return
        self.launches.append(done)
        if self.run:
            self.replay((kernel, grid, block, args, shared_bytes))

    def replay(self, work: tuple[Any, ...]) -> None:
        kernel, grid, block, args, shared_bytes = work
        kernel.launch(
            grid,
            block,
            [_parameter(one) for one in args],
            shared_bytes=shared_bytes,
            checks=self.checks,
            delivery=self.delivery,
        )

    def stream(self) -> Any:
        """A new stream."""
        self._newest += 1
        return cupy.cuda.Stream.from_external(_Pointer(1000 + self._newest))

    @contextmanager
    def nothing_hidden(self) -> Iterator[None]:
        """Raise if the block takes memory, copies from the host or waits for the GPU."""
        before = (len(self.allocations), self.uploads, self.waits)
        yield
        assert (len(self.allocations), self.uploads, self.waits) == before

    def capture(self, stream: Any) -> _Capture:
        """What is launched on `stream` in the block is kept, and run by the graph's `launch`."""
        return _Capture(self, stream)


# One for all tests: a kernel takes seconds to load and to prepare.
@cache
def _gpu(target: str, num_sms: int, number: int) -> sim.Device:
    return sim.Device(target, num_sms)


@cache
def _loaded(device: sim.Device, ptx: str) -> sim.LoadedModule:
    return device.load(ptx)


@cache
def _ptx(source: str, name: str, target: str) -> str:
    return nvrtc.compile_to_ptx(source, name, target, ["-lineinfo"])


def _parameter(value: Any) -> Any:
    """As cupy.cuda.function makes a parameter of a value, for what gpu.py may pass."""
    if value is None:
        return np.uint64(0)
    if isinstance(value, cupy.ndarray):
        return np.uint64(value.data.ptr)
    assert type(value).__name__ in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    ), f"CuPy takes no {type(value).__name__}"
    return value


@dataclass
class _Pointer:
    """A stream that somebody else made."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class _CurrentDevice:
    """cupy.cuda.Device as a context manager."""

    def __init__(self, driver: StandIn, number: int) -> None:
        self.driver, self.number = driver, number

    def __enter__(self) -> None:
        self.before, self.driver.device = self.driver.device, self.number

    def __exit__(self, *error: object) -> None:
        self.driver.device = self.before


class _Capture:
    """A CUDA graph, and the context manager that fills it."""

    def __init__(self, driver: StandIn, stream: Any) -> None:
        self.driver, self.stream = driver, stream
        self.work: list[tuple[Any, ...]] = []

    def __enter__(self) -> _Capture:
        self.driver.graphs[self.stream.ptr] = self.work
        self.driver.streams.append(self.stream)
        return self

    def __exit__(self, *error: object) -> None:
        self.driver.streams.pop()
        del self.driver.graphs[self.stream.ptr]

    def launch(self) -> None:
        for one in self.work:
            self.driver.replay(one)


class _Module:
    """cupy.RawModule of a file."""

    def __init__(self, driver: StandIn, path: str) -> None:
        driver.modules.append(path)
        self.driver = driver
        self.ptx = driver.built[path]
        # Loading takes a second: only for what is run.
        self.module = _loaded(driver.gpus[driver.device], self.ptx) if driver.run else None

    def get_function(self, name: str) -> _Function:
        if self.module is not None:
            return _Function(self.driver, self.module.kernels[name])
        assert f".entry {name}(" in self.ptx
        return _Function(self.driver, SimpleNamespace(name=name))


class _Function:
    """cupy.RawKernel, as its caller sees it."""

    def __init__(self, driver: StandIn, kernel: Any) -> None:
        self.driver, self.kernel = driver, kernel
        self.device = driver.device
        self._allowed = _USUAL_SHARED_BYTES

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._allowed

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        assert self.driver.device == self.device, "a function of another device's module"
        assert size <= self.driver.gpus[self.device].shared_per_block, "cudaErrorInvalidValue"
        self._allowed = size

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        assert self.driver.device == self.device, "a function of another device's module"
        assert shared_mem <= self._allowed, "cudaErrorInvalidValue: too much shared memory"
        for sizes in (grid, block):
            assert isinstance(sizes, tuple), "CuPy takes tuples"
            assert 1 <= len(sizes) <= 3
            # CuPy would launch one block for none, without a word.
            assert all(type(one) is int and one >= 1 for one in sizes), sizes
        assert isinstance(args, (tuple, list))
        self.driver.launch(self.kernel, grid, block, args, shared_mem)
