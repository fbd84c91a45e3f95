"""CUDA streams of any library, and making one CuPy's current stream."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from cumla.checks import bad_type, bad_value

_NOTHING: AbstractContextManager[None] = nullcontext()


class _Pointer:
    """A stream that somebody else made, by CUDA's stream protocol."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def as_stream(stream: Any) -> Any:
    """A caller's `stream` as a CuPy stream; None stays None.

    Args:
        stream: a CuPy stream, an object with __cuda_stream__ (CUDA's stream protocol), with
            cuda_stream (torch) or with ptr, or the cudaStream_t as an int.

    Raises:
        ArgumentTypeError: it is nothing of the kind.
    """
    import cupy

    if stream is None or isinstance(stream, (cupy.cuda.Stream, cupy.cuda.ExternalStream)):
        return stream
    pointer = None
    try:
        if hasattr(stream, "__cuda_stream__"):
            return cupy.cuda.Stream.from_external(stream)
        pointer = getattr(stream, "cuda_stream", getattr(stream, "ptr", stream))
    except (AttributeError, TypeError, ValueError):
        pass
    if isinstance(pointer, bool) or not isinstance(pointer, numbers.Integral) or pointer < 0:
        raise bad_type(
            "stream",
            repr(stream),
            "it must be a CuPy stream, an object with __cuda_stream__, or a stream's address",
            "Leave it out for CuPy's current stream.",
        )
    return cupy.cuda.Stream.from_external(_Pointer(int(pointer)))


def current(device_id: int, stream: Any = None) -> AbstractContextManager[None]:
    """In the block, CuPy's current device is `device_id` and its current stream is `stream`.

    Costs nothing where they are that already. `stream` is as for `as_stream`; None leaves that
    device's current stream.

    Raises:
        ArgumentError: the stream belongs to another device.
        ArgumentTypeError: it is no stream.
    """
    import cupy

    away = cupy.cuda.runtime.getDevice() != device_id
    if stream is None and not away:
        return _NOTHING
    stream = as_stream(stream)
    if stream is not None and stream.device_id not in (-1, device_id):
        raise bad_value(
            "stream",
            f"a stream of GPU {stream.device_id}",
            f"the arrays are on GPU {device_id}",
            "Pass a stream of that GPU.",
        )
    return _entered(device_id if away else None, stream)


@contextmanager
def _entered(device_id: int | None, stream: Any) -> Iterator[None]:
    import cupy

    # In this order: a stream belongs to the device that is current.
    with ExitStack() as stack:
        if device_id is not None:
            stack.enter_context(cupy.cuda.Device(device_id))
        if stream is not None:
            stack.enter_context(stream)
        yield
