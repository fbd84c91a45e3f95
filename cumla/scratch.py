"""Memory that a thread uses again and again for intermediate results.

The C library gives large freed blocks back to the system, which zeroes and maps them anew, page
by page, at the next allocation: for a block of keys that costs more than decoding it. Arrays from
here stay mapped. Each is one thread's own, and is valid until the thread asks for that name again.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# Larger arrays are rare, and worth more to others than to a thread that may never ask again.
_LARGEST = 8 << 20


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_name: dict[str, NDArray[np.uint8]] = {}


_buffers = _Buffers()


def scratch(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An uninitialised, contiguous array, over the memory of the last one of that name."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size > _LARGEST:
        return np.empty(shape, dtype)
    buffer = _buffers.by_name.get(name)
    if buffer is None or len(buffer) < size:
        buffer = _buffers.by_name[name] = np.empty(size, np.uint8)
    return buffer[:size].view(dtype).reshape(shape)
