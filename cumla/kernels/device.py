"""What a launcher needs of a device. `backends/gpu.py` and `backends/simulated.py` provide it.

A launcher is a function of a `Call` and arrays; it knows shapes and strides, never memory:

    def double(call: Call, source: Array, target: Array) -> None:
        call.launch(
            Program("portable/example/double.cuh", "cumla::double_all<float>"),
            grid=ceil_div(source.size, 256),
            block=256,
            args=[call.read(source), call.write(target), np.int64(source.size)],
        )
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
Dimensions = int | tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A kernel of one file under kernels_cu, with its template arguments."""

    path: str
    """The file that defines it, relative to kernels_cu: "portable/decode/dense.cuh"."""
    expression: str
    """The C++ name of the instantiation: "cumla::decode_dense<...>"."""


def address_of(array: Any) -> int:
    """The address of the first element of a NumPy or CuPy array."""
    if isinstance(array, np.ndarray):
        return int(array.__array_interface__["data"][0])
    return int(array.data.ptr)


class DeviceArray(Protocol):
    """An array where a kernel can reach it; as an argument of a launch, a pointer to its start."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]:
        """In bytes, as NumPy's."""

    @property
    def dtype(self) -> np.dtype[Any]: ...


class Call(Protocol):
    """One call of an op on a device and stream: its arrays, and the kernels that it launches.

    A context manager; what `write` gave out holds its results when the block ends (on a GPU, when
    the stream has come so far).
    """

    @property
    def target(self) -> str:
        """The architecture, such as "sm_90a"."""

    @property
    def num_sms(self) -> int: ...

    @property
    def shared_bytes(self) -> int:
        """The most shared memory a block can have."""

    def read(self, array: Array) -> DeviceArray:
        """An input. The same array given twice has one place."""

    def write(self, array: Array) -> DeviceArray:
        """An output, or an input that is changed in place; what is not written keeps its value."""

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """Scratch memory, uninitialised, 256-byte aligned, until the block ends."""

    def launch(
        self,
        program: Program,
        *,
        grid: Dimensions,
        block: Dimensions,
        args: Sequence[DeviceArray | np.generic | None],
        shared_bytes: int = 0,
    ) -> None:
        """Queue a kernel behind those before it.

        Args:
            args: one for each parameter of the kernel: a device array (its address is passed), a
                NumPy scalar of just the parameter's size, or None for a null pointer.
            shared_bytes: dynamic shared memory of a block.
        """
