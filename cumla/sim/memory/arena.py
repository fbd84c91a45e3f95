"""A stretch of memory as NumPy arrays of every access width, and the state of each of its bytes."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What is known of a byte; its state is the sum of these.
ALLOCATED = 1
WRITTEN = 2
WRITABLE = 4
FREED = 8

# Accesses are powers of two up to 32 bytes (ld.v8.b32). No NumPy integer has 16 bytes, so those
# travel as pairs of doubles, which are copied and never computed with; 32 bytes are two of these.
WORDS: dict[int, Any] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
    16: np.dtype(np.complex128),
}
WIDEST = 32


class _Views(dict[Any, Any]):
    """Views of an array of bytes, by dtype, made when first asked for."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        super().__init__()
        self.data = data

    def __missing__(self, dtype: Any) -> Any:
        self[dtype] = view = self.data.view(dtype)
        return view


class Arena:
    """Bytes, and one state for each.

    Attributes:
        data: the bytes.
        size: how many there are, a multiple of `WIDEST`.
        views: `views[dtype]` is `data` as elements of that dtype.
    """

    __slots__ = ("_states", "data", "size", "views")

    def __init__(self, size: int) -> None:
        self.size = -(-size // WIDEST) * WIDEST
        self.data = lazy_zeros(self.size)
        self.views = _Views(self.data)
        self._states: _Views | None = None

    @property
    def states(self) -> _Views:
        """Views, by dtype, of the state of each byte (all 0 at first)."""
        if self._states is None:
            self._states = _Views(lazy_zeros(self.size))
        return self._states

    def mark(self, start: int, stop: int, state: int) -> None:
        """Give the bytes [start, stop) a state."""
        self.states.data[start:stop] = state

    def discard(self, start: int, stop: int) -> None:
        """Hand the whole pages in [start, stop) back to the operating system; they read as 0."""
        pages = getattr(self.data.base, "obj", None)
        if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            last = stop // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                pages.madvise(mmap.MADV_DONTNEED, first, last - first)


# From this size on, memory is mapped: pages that nobody touches cost nothing.
MAPPED = 1 << 20
# So that a device may have more memory than the host; Python 3.13 was the first to name it.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def lazy_zeros(size: int) -> NDArray[np.uint8]:
    """Zero bytes that take room only once they are written."""
    if size < MAPPED:
        return np.zeros(size, np.uint8)
    if not hasattr(mmap, "MAP_PRIVATE"):
        return np.frombuffer(mmap.mmap(-1, size), np.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)
