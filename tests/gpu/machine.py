"""A real GPU, by the same few methods as the stand-in, so that both run the same checks."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

cupy = pytest.importorskip("cupy")

Array = NDArray[Any]


def why_not() -> str | None:
    """None if there is a GPU that the backend runs on, else the reason why not."""
    from cumla.backends import availability

    return availability()["cupy"]


class _Allocations(cupy.cuda.MemoryHook):
    """Counts what is taken from CuPy's pool."""

    name = "cumla's tests"

    def __init__(self) -> None:
        self.count = 0

    def malloc_preprocess(self, **how: Any) -> None:
        self.count += 1


class RealGpu:
    """The GPU that is CuPy's current device."""

    def array(self, array: Array) -> Any:
        """A CuPy array of the same bytes and strides, with all that lies between its elements."""
        low, high = byte_bounds(array)
        data = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
        start = array.__array_interface__["data"][0] - low
        memory = cupy.asarray(data)
        cupy.cuda.runtime.deviceSynchronize()  # it may be used on another stream next
        return cupy.ndarray(array.shape, array.dtype, memory.data + start, array.strides)

    def numpy(self, array: Any) -> Array:
        """What a contiguous CuPy array holds, when all work that was queued is done."""
        assert array.flags.c_contiguous
        cupy.cuda.runtime.deviceSynchronize()
        # CuPy copies numbers; what ml_dtypes calls them is not its business.
        return array.view(np.uint8).get().view(array.dtype)

    def write(self, target: Any, values: Array) -> None:
        """Overwrite a contiguous CuPy array."""
        target.view(np.uint8).set(np.ascontiguousarray(values).view(np.uint8))
        cupy.cuda.runtime.deviceSynchronize()

    def stream(self) -> Any:
        return cupy.cuda.Stream(non_blocking=True)

    def capture(self, stream: Any) -> _Capture:
        return _Capture(stream)

    @contextmanager
    def nothing_hidden(self) -> Iterator[None]:
        """Raise if the block takes memory from the pool or waits for the GPU.

        The GPU is held up by a function on the host that ends only behind the block: who waits for
        the GPU in there, waits for longer than it is held up.
        """
        done, waited = threading.Event(), []
        hook = _Allocations()
        stream = cupy.cuda.get_current_stream()
        assert stream.ptr, "the default stream waits for others by its nature"
        stream.launch_host_func(lambda _: waited.append(not done.wait(5)), None)
        try:
            with hook:
                yield
        finally:
            done.set()
            stream.synchronize()
        assert waited == [False], "a call waited for the GPU"
        assert hook.count == 0, f"{hook.count} allocations"


class _Capture:
    """A CUDA graph, and the context manager that fills it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.graph: Any = None

    def __enter__(self) -> _Capture:
        self.stream.__enter__()
        # "Global": whatever could wait or allocate behind CuPy's back is an error.
        self.stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.graph = self.stream.end_capture()
        finally:
            self.stream.__exit__(*error)

    def launch(self) -> None:
        self.graph.launch(self.stream)
        self.stream.synchronize()
