"""Global memory of a simulated device, and the arrays in it."""

from __future__ import annotations

import sys
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from cumla.sim.errors import SimError
from cumla.sim.memory.arena import ALLOCATED, FREED, WRITABLE, WRITTEN, Arena
from cumla.sim.memory.heap import Heap

# Where device memory begins in the generic address space. cudaMalloc aligns to 256 bytes.
BASE = 0x7F00_0000_0000
ALIGN = 256
# Between two allocations lie at least this many bytes that nobody owns.
GUARD = 256
DEFAULT_CAPACITY = 1 << 32
LARGEST = 1 << 39  # from BASE to the end of 47-bit addresses there is room for twice that


class OutOfMemory(SimError, MemoryError):
    """An allocation does not fit in the memory of the simulated device."""


@dataclass(slots=True, eq=False)
class Allocation:
    """A stretch of device memory.

    Attributes:
        start: offset in the arena.
        name: for messages, "" for one without.
        serial: its number, from 1.
        made, freed: the line of Python that did so; freed is None while it lives.
    """

    start: int
    nbytes: int
    name: str
    read_only: bool
    serial: int
    made: str
    freed: str | None = None

    @property
    def address(self) -> int:
        return BASE + self.start

    @property
    def stop(self) -> int:
        return self.start + self.nbytes

    def __str__(self) -> str:
        name = f"'{self.name}'" if self.name else "an allocation"
        return f"{name} of {self.nbytes} bytes at {self.address:#x} (made at {self.made})"


class DeviceMemory:
    """All global and constant memory of a device.

    Attributes:
        capacity: bytes of memory; host memory is used as it is touched.
        limit: the power of two from which on no offset can be good.
        arena: the bytes and their states.
        serial: number of the newest allocation.
        unchecked: what `serial` was when a kernel last wrote without keeping the states, or 0.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        if not 2 * ALIGN <= capacity <= LARGEST:
            raise ValueError(f"capacity: got {capacity}; it is {2 * ALIGN} to {LARGEST} bytes")
        self.capacity = capacity
        self.limit = 1 << (capacity - 1).bit_length()
        self.arena = Arena(self.limit)
        self.serial = 0
        self.unchecked = 0
        self._heap = Heap(capacity)
        self._starts: list[int] = []
        self._allocations: list[Allocation] = []

    def alloc(
        self,
        shape: int | Sequence[int],
        dtype: DTypeLike = np.uint8,
        *,
        name: str = "",
        written: bool = False,
        read_only: bool = False,
    ) -> DeviceArray:
        """An array whose contents are not defined, or with `written` count as defined.

        Args:
            shape: its shape; one number n means (n,).
            name: what messages call it.
            written: reading it before it was written is no error.
            read_only: kernels must not write it.
        """
        lengths = (shape,) if isinstance(shape, (int, np.integer)) else shape
        shape = tuple(int(n) for n in lengths)
        if any(n < 0 for n in shape):
            raise ValueError(f"shape {shape} has a negative length")
        kind = np.dtype(dtype)
        nbytes = kind.itemsize * prod(shape)
        owner = _Owner(self, self._allocate(nbytes, name, written, read_only))
        return DeviceArray(self, owner, shape, kind)

    def upload(self, array: ArrayLike, *, name: str = "", read_only: bool = False) -> DeviceArray:
        """A copy of a NumPy array in device memory."""
        host = np.asarray(array)
        made = self.alloc(host.shape, host.dtype, name=name, written=True, read_only=read_only)
        made.set(host)
        return made

    def _allocate(self, nbytes: int, name: str, written: bool, read_only: bool) -> Allocation:
        taken = self._heap.take(-(-nbytes // ALIGN) * ALIGN + GUARD, ALIGN)
        if taken is None:
            raise OutOfMemory(
                f"{nbytes} bytes do not fit in the device's {self.capacity} bytes of memory, of "
                f"which {self.used} are in use; free arrays, or make the device larger"
            )
        start, forgotten = taken
        for first, stop in forgotten:
            self._forget(first, stop)
        start += GUARD  # each has its guard in front
        self.serial += 1
        allocation = Allocation(start, nbytes, name, read_only, self.serial, _caller())
        at = bisect_left(self._starts, start)
        self._starts.insert(at, start)
        self._allocations.insert(at, allocation)
        state = ALLOCATED | (0 if read_only else WRITABLE) | (WRITTEN if written else 0)
        self.arena.mark(start, allocation.stop, state)
        return allocation

    def _forget(self, first: int, stop: int) -> None:
        low, high = bisect_left(self._starts, first), bisect_left(self._starts, stop)
        del self._starts[low:high]
        del self._allocations[low:high]
        self.arena.mark(first, stop, 0)

    def free(self, allocation: Allocation) -> None:
        """Kernels must not touch it from now on."""
        if allocation.freed is not None:
            raise ValueError(f"freed twice, first at {allocation.freed}: {allocation}")
        allocation.freed = _caller()
        self.arena.mark(allocation.start, allocation.stop, FREED)
        self.arena.discard(allocation.start, allocation.stop)
        size = -(-allocation.nbytes // ALIGN) * ALIGN + GUARD
        for first, stop in self._heap.give(allocation.start - GUARD, size):
            self._forget(first, stop)

    def allocations(self) -> list[Allocation]:
        """Those that live, in ascending order."""
        return [a for a in self._allocations if a.freed is None]

    @property
    def used(self) -> int:
        """Bytes in allocations that live."""
        return sum(a.nbytes for a in self._allocations if a.freed is None)

    def nearest(self, offset: int) -> tuple[Allocation | None, Allocation | None]:
        """The last allocation that begins at or before an offset, and the first one after it."""
        at = bisect_right(self._starts, offset)
        before = self._allocations[at - 1] if at else None
        after = self._allocations[at] if at < len(self._allocations) else None
        return before, after

    def is_read_only(self, offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these offsets lie in read-only allocations, the constant memory."""
        inside = np.zeros(offsets.shape[0], np.bool_)
        for a in self._allocations:
            if a.read_only and a.freed is None:
                inside |= (offsets >= a.start) & (offsets < a.stop)
        return inside

    def settle(self) -> bool:
        """Count as written what kernels that keep no states may have written; True if any could.

        A launch without the memory check writes and marks nothing. A later launch with the check
        cannot tell what, so all that existed at the time counts as written.
        """
        last, self.unchecked = self.unchecked, 0
        for a in self._allocations:
            if a.serial <= last and a.freed is None and not a.read_only:
                self.arena.mark(a.start, a.stop, ALLOCATED | WRITABLE | WRITTEN)
        return last > 0


class _Owner:
    """Frees an allocation when the last array in it is gone."""

    def __init__(self, memory: DeviceMemory, allocation: Allocation) -> None:
        self.memory = memory
        self.allocation = allocation
        self.finalizer = weakref.finalize(self, memory.free, allocation)
        self.finalizer.atexit = False


class DeviceArray:
    """An array in device memory. Its memory is freed when the last array that shares it is gone.

    Attributes:
        address: of its first byte, as kernels see it.
        shape, dtype, size, nbytes, ndim: as in NumPy; arrays are contiguous, in C order.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        owner: _Owner,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        self.memory = memory
        self._owner = owner
        self.address = owner.allocation.address
        self.nbytes = owner.allocation.nbytes
        self.shape = shape
        self.dtype = dtype

    def __repr__(self) -> str:
        return f"DeviceArray({self.address:#x}, shape={self.shape}, dtype={self.dtype})"

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without dimensions")
        return self.shape[0]

    @property
    def size(self) -> int:
        return self.nbytes // self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._owner.allocation.name

    def _bytes(self) -> NDArray[np.uint8]:
        allocation = self._owner.allocation
        if allocation.freed is not None:
            raise ValueError(f"freed at {allocation.freed}: {allocation}")
        return self.memory.arena.data[allocation.start : allocation.stop]

    def _live(self) -> NDArray[Any]:
        return self._bytes().view(self.dtype).reshape(self.shape)

    def get(self) -> NDArray[Any]:
        """A copy as a NumPy array."""
        return self._live().copy()

    def set(self, array: ArrayLike) -> None:
        """Copy a NumPy array or a number into it, broadcast and cast "same_kind" as by copyto."""
        np.copyto(self._live(), array, casting="same_kind")
        self._mark_written()

    def numpy(self) -> NDArray[Any]:
        """The memory itself as a NumPy array, to be read and written; all of it counts as written.

        Do not use it after `free`.
        """
        self._mark_written()
        return self._live()

    def _mark_written(self) -> None:
        a = self._owner.allocation
        state = ALLOCATED | WRITTEN | (0 if a.read_only else WRITABLE)
        self.memory.arena.mark(a.start, a.stop, state)

    def view(self, dtype: DTypeLike) -> DeviceArray:
        """The same memory as elements of another dtype; the last axis changes as in NumPy."""
        kind = np.dtype(dtype)
        if kind.itemsize == self.dtype.itemsize:
            return DeviceArray(self.memory, self._owner, self.shape, kind)
        if not self.shape or self.shape[-1] * self.dtype.itemsize % kind.itemsize:
            raise ValueError(f"rows of {self.shape} {self.dtype} are no whole number of {kind}")
        last = self.shape[-1] * self.dtype.itemsize // kind.itemsize
        return DeviceArray(self.memory, self._owner, (*self.shape[:-1], last), kind)

    def reshape(self, *shape: int) -> DeviceArray:
        """The same memory in another shape; one length may be -1."""
        known = prod(n for n in shape if n != -1)
        if shape.count(-1) == 1 and known and self.size % known == 0:
            shape = tuple(self.size // known if n == -1 else n for n in shape)
        if min(shape, default=0) < 0 or prod(shape) != self.size:
            raise ValueError(f"shape {self.shape} does not become {shape}")
        return DeviceArray(self.memory, self._owner, shape, self.dtype)

    def protect(self) -> None:
        """From now on kernels must not write it."""
        self._owner.allocation.read_only = True
        start, stop = self._owner.allocation.start, self._owner.allocation.stop
        self.memory.arena.states[np.dtype(np.uint8)][start:stop] &= 0xFF ^ WRITABLE

    def free(self) -> None:
        """Free the memory now, for all arrays that share it."""
        self.memory.free(self._owner.allocation)
        self._owner.finalizer.detach()


def _caller() -> str:
    """The line of Python outside this package that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("cumla.sim"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
