"""The arrays of a call, on their way in and out: NumPy's, CuPy's, and anybody's through DLPack.

An op computes on NumPy arrays or on CuPy arrays, and answers in the caller's array type. Where the
arrays are decides which backend runs: the GPU's for arrays on a GPU, for NumPy arrays the one in
force. Another library's array (a torch tensor, a JAX array) is wrapped without a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cumla.backends import Backend, BackendUnavailable, load_backend
from cumla.backends.dlpack import CPU, CUDA, in_type_of, namespace_of, to_cupy, to_numpy
from cumla.backends.streams import current
from cumla.checks import bad_type, bad_value, check_array

Array = NDArray[Any]
Device = tuple[int, int]


def is_cupy(value: Any) -> bool:
    """Whether it is a CuPy array; does not import CuPy."""
    kind = getattr(sys.modules.get("cupy"), "ndarray", None)
    return kind is not None and isinstance(value, kind)


def _device(argument: str, value: Any) -> Device:
    """Where an array is: (CPU, 0) or (CUDA, number of the GPU)."""
    if isinstance(value, np.ndarray):
        return CPU, 0
    if is_cupy(value):
        # Its own __dlpack_device__ would ask the driver.
        return CUDA, value.data.device_id
    if hasattr(value, "__dlpack_device__"):
        try:
            kind, number = (int(one) for one in value.__dlpack_device__())
        except (BufferError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise bad_type(
                argument,
                f"a {type(value).__name__} that does not export through DLPack ({error})",
                "it must be on the CPU or a CUDA GPU",
                "Copy it there.",
            ) from error
        if kind in (CPU, CUDA):
            return kind, number if kind == CUDA else 0
        raise bad_value(
            argument,
            f"an array on DLPack device type {kind}",
            "it must be on the CPU or a CUDA GPU",
            "Copy it there.",
        )
    raise bad_type(
        argument,
        type(value).__name__,
        "it must be a NumPy or CuPy array, or export one through DLPack",
        "Convert it with numpy.asarray.",
    )


def is_on_gpu(argument: str, value: Any) -> bool:
    """Whether it is an array on a GPU; of what is no array, nothing is said."""
    return hasattr(value, "__dlpack_device__") and _device(argument, value)[0] == CUDA


def _check_one_device(devices: Mapping[str, Device]) -> Device:
    """Where all of them are; raises if they are not in one place."""
    first, place = next(iter(devices.items()))
    if len(set(devices.values())) == 1:
        return place
    name, other = next((name, one) for name, one in devices.items() if one != place)
    names = {one: "the CPU" if one[0] == CPU else "the GPU" for one in (place, other)}
    if place[0] == other[0]:
        names = {one: f"GPU {one[1]}" for one in (place, other)}
    raise bad_value(
        name,
        f"an array on {names[other]}",
        f"all arrays of a call must be on one device, and {first} is on {names[place]}",
        f"Copy {name} or {first} over.",
    )


def span_of(array: Any) -> tuple[int, int]:
    """A CuPy array's first byte and the one behind its last, counted from its address."""
    low = high = 0
    if not array.size:
        return low, high
    for size, step in zip(array.shape, array.strides, strict=True):
        if step < 0:
            low += (size - 1) * step
        else:
            high += (size - 1) * step
    return low, high + array.itemsize


def _addresses(array: Any) -> Array:
    """A NumPy array over the addresses of a CuPy array: to compare, never to touch."""
    interface = {
        "data": (array.data.ptr, True),
        "shape": array.shape,
        "strides": array.strides,
        "typestr": f"|V{array.itemsize}",
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def shares_memory(one: Any, other: Any) -> bool:
    """Whether an element of one is in the memory of the other, exactly. Both NumPy's or CuPy's.

    dk and dv may well be the interleaved halves of one array.
    """
    if isinstance(one, np.ndarray):
        return np.shares_memory(one, other)
    (low, high), (other_low, other_high) = span_of(one), span_of(other)
    apart = other.data.ptr - one.data.ptr
    if low >= apart + other_high or apart + other_low >= high:
        return False
    return np.shares_memory(_addresses(one), _addresses(other))


class Arrays:
    """The array arguments of one call, by name, as NumPy or CuPy arrays; None stays None.

    Args:
        stream: the caller's CUDA stream, for arrays on a GPU; see `streams.as_stream`.
        given: the arrays.

    Attributes:
        on_gpu: whether they are on a GPU.
        backend: the one that runs them.

    Raises:
        ArgumentTypeError: an argument is no array.
        ArgumentError: some are on another device than the first, or there is a stream for arrays
            on the CPU.
        BackendUnavailable: they are on a GPU, whose backend cannot run here.
    """

    on_gpu: bool
    backend: Backend

    def __init__(self, *, stream: Any = None, **given: Any) -> None:
        self._given: Mapping[str, Any] = {
            name: value for name, value in given.items() if value is not None
        }
        devices = {name: _device(name, value) for name, value in self._given.items()}
        if not devices:
            first = next(iter(given))
            raise bad_type(first, "None", "it is needed", "Pass an array.")
        first = next(iter(devices))
        kind, self._device_id = _check_one_device(devices)
        self.on_gpu = kind == CUDA
        self._stream = stream
        self._read_only: set[str] = set()
        self._example = self._given[first]
        if self.on_gpu:
            try:
                self.backend = load_backend("cupy")
            except BackendUnavailable as error:
                raise BackendUnavailable(
                    f"{first}: it is on a GPU, which cannot be used. {error} Copy it to the CPU "
                    "with cupy.asnumpy (torch: .cpu()) to compute it there."
                ) from error
        self._check_ways_back(first)
        with self.place():
            self._arrays = {name: self._import(name, one) for name, one in self._given.items()}
        if not self.on_gpu:
            check_no_stream(stream)
            self.backend = load_backend()

    def _check_ways_back(self, first: str) -> None:
        """Raise for an array whose library could not be handed a result."""
        # On a GPU each library must be, for its stream to wait for the call.
        for name in self._given if self.on_gpu else (first,):
            value = self._given[name]
            if not self._is_own(value) and namespace_of(value) is None:
                raise bad_type(
                    name,
                    f"a {type(value).__name__}, whose module has no from_dlpack",
                    "the results are made in its array type",
                    f"Pass {'CuPy' if self.on_gpu else 'NumPy'} arrays: from_dlpack(...) of it.",
                )

    def _is_own(self, value: Any) -> bool:
        return is_cupy(value) if self.on_gpu else isinstance(value, np.ndarray)

    def _import(self, name: str, value: Any) -> Array:
        if not self.on_gpu:
            own = isinstance(value, np.ndarray)
            return check_array(name, value) if own else to_numpy(name, value)
        if is_cupy(value):
            return value
        array, writable = to_cupy(name, value)
        if not writable:
            self._read_only.add(name)
        return array

    def place(self) -> AbstractContextManager[None]:
        """In the block, arrays are made where those of the call are, on its device and stream."""
        if not self.on_gpu:
            return nullcontext()
        return current(self._device_id, self._stream)

    def __getitem__(self, name: str) -> Array:
        if name not in self._arrays:
            raise bad_type(name, "None", "it is needed", "Pass an array.")
        return self._arrays[name]

    def optional(self, name: str) -> Array | None:
        return self._arrays.get(name)

    def items(self) -> Iterable[tuple[str, Array]]:
        """The arrays that were given, with their names."""
        return self._arrays.items()

    def is_read_only(self, name: str) -> bool:
        """Whether the array given as `name` must not be written to. CuPy's own always may."""
        if self.on_gpu:
            return name in self._read_only
        return not self._arrays[name].flags.writeable

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """A new array; within `place`."""
        if not self.on_gpu:
            return np.empty(shape, dtype)
        import cupy

        return cupy.empty(shape, dtype)

    def give_back(self, name: str, array: Array) -> Any:
        """A result: the caller's own object if it passed one as `name`, else in its array type.

        Within `place`: a library that is not CuPy makes its stream wait for that of the call.
        """
        if name in self._given:
            given = self._given[name]
            if self.on_gpu and not is_cupy(given):
                in_type_of(array, given)
            return given
        if self._is_own(self._example):
            return array
        return in_type_of(array, self._example)


def check_no_stream(stream: Any) -> None:
    """Raise if a CPU call got a CUDA stream."""
    if stream is not None:
        raise bad_value(
            "stream",
            repr(stream),
            "NumPy arrays are computed on the CPU before the call returns",
            "Leave stream out.",
        )
