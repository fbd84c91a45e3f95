"""The kernels' own PTX, run on the CPU by `cumla.sim`, on NumPy arrays.

Every call copies its arrays to the memory of a simulated GPU and its results back: an array with
all that lies between its first and its last byte, so that strides, gaps and what they hold (NaN,
in the tests) are as a GPU would see them.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds
from numpy.typing import DTypeLike, NDArray

from cumla import sim
from cumla.checks import bad_value
from cumla.jit.build import build
from cumla.kernels.device import Dimensions, Program
from cumla.layouts import KVLayout

Array = NDArray[Any]
TARGET_VARIABLE = "CUMLA_SIM_TARGET"


@dataclass(frozen=True, eq=False)
class SimulatedArray:
    """A view of device memory: `cumla.kernels.device.DeviceArray` on a simulated GPU."""

    memory: sim.DeviceArray
    offset: int
    """Bytes from the start of the memory to the first element."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def address(self) -> int:
        return self.memory.address + self.offset

    def get(self) -> Array:
        """The array's values now, a copy with the same strides."""
        return np.ndarray(
            self.shape, self.dtype, self.memory.get(), offset=self.offset, strides=self.strides
        )


class SimulatedDevice:
    """A simulated GPU that runs cumla's kernels.

    Args:
        target: the architecture, "sm_80" to "sm_121".
        num_sms: its multiprocessors; they decide how decode work is cut.
        checks, delivery, seed: of every launch, see `cumla.sim.Kernel.launch`.
        counters: keep the counters of every launch, see `launches`.

    Attributes:
        launches: (program, sim.Launch) of every launch so far.
    """

    def __init__(
        self,
        target: str = "sm_90a",
        num_sms: int = 8,
        *,
        checks: Collection[str] = ("memory", "race"),
        delivery: str = "eager",
        seed: int = 0,
        counters: bool = False,
    ) -> None:
        self.gpu = sim.Device(target, num_sms)
        self.checks, self.delivery, self.seed, self.counters = checks, delivery, seed, counters
        self.launches: list[tuple[Program, sim.Launch]] = []
        self._kernels: dict[Program, sim.Kernel] = {}

    @classmethod
    def from_environment(cls) -> SimulatedDevice:
        """A device of the architecture that CUMLA_SIM_TARGET names, sm_90a by default."""
        target = os.environ.get(TARGET_VARIABLE) or "sm_90a"
        try:
            return cls(target)
        except sim.LaunchError as error:
            raise bad_value(
                TARGET_VARIABLE, repr(target), str(error), "Name one of them."
            ) from None

    def call(self, *, stream: Any = None, workspace: Any = None) -> SimulatedCall:
        """Start a call of an op; see `cumla.kernels.device.Call`.

        There are no streams, and scratch memory is always new, so that reading what nobody wrote
        is seen.
        """
        return SimulatedCall(self)

    def as_array(self, array: Array) -> Array:
        """A NumPy array as it is."""
        return array

    def empty_pages(self, layout: KVLayout, num_pages: int, page_size: int) -> Array:
        """A zeroed page pool for one KV head: a NumPy array."""
        return layout.empty_pages(num_pages, page_size)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """A NumPy array, uninitialised."""
        return np.empty(shape, dtype)

    def kernel(self, program: Program) -> sim.Kernel:
        """The kernel, compiled and loaded once."""
        if program not in self._kernels:
            built = build(program.path, program.expression, self.gpu.target)
            self._kernels[program] = self.gpu.load(built.ptx).kernel(built.entry)
        return self._kernels[program]


class SimulatedCall:
    """See `cumla.kernels.device.Call`."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._arrays: dict[tuple[Any, ...], SimulatedArray] = {}
        self._results: list[tuple[Array, SimulatedArray]] = []
        self._memory: list[sim.DeviceArray] = []

    @property
    def target(self) -> str:
        return self._device.gpu.target

    @property
    def num_sms(self) -> int:
        return self._device.gpu.num_sms

    @property
    def shared_bytes(self) -> int:
        return self._device.gpu.shared_per_block

    def __enter__(self) -> SimulatedCall:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                for array, copy in self._results:
                    array[...] = copy.get()
        finally:
            for memory in self._memory:
                memory.free()

    def read(self, array: Array) -> SimulatedArray:
        key = (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype)
        if key not in self._arrays:
            self._arrays[key] = self._upload(array)
        return self._arrays[key]

    def write(self, array: Array) -> SimulatedArray:
        copy = self.read(array)
        self._results.append((array, copy))
        return copy

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> SimulatedArray:
        dtype = np.dtype(dtype)
        size = math.prod(shape)
        memory = self._device.gpu.alloc(size * dtype.itemsize, np.uint8)
        self._memory.append(memory)
        steps = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
        return SimulatedArray(memory, 0, shape, tuple(steps), dtype)

    def launch(
        self,
        program: Program,
        *,
        grid: Dimensions,
        block: Dimensions,
        args: Sequence[Any],
        shared_bytes: int = 0,
    ) -> None:
        device = self._device
        launch = device.kernel(program).launch(
            grid,
            block,
            [_argument(one) for one in args],
            shared_bytes=shared_bytes,
            checks=device.checks,
            counters=device.counters,
            delivery=device.delivery,
            seed=device.seed,
        )
        device.launches.append((program, launch))

    def _upload(self, array: Array) -> SimulatedArray:
        low, high = byte_bounds(array)
        # Alignment is as in the caller's memory, up to the 256 bytes of a device allocation.
        pad = low % 256
        data = np.zeros(pad + high - low, np.uint8)
        data[pad:] = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
        memory = self._device.gpu.upload(data)
        self._memory.append(memory)
        offset = pad + array.__array_interface__["data"][0] - low
        return SimulatedArray(memory, offset, array.shape, array.strides, array.dtype)


def _argument(value: SimulatedArray | np.generic | None) -> Any:
    if isinstance(value, SimulatedArray):
        return value.address
    return 0 if value is None else value
