"""The arrays of a call, on their way in and out: NumPy's own, and anybody's through DLPack.

An op computes on NumPy arrays and answers in the caller's array type. An exporter on the CPU (a
torch tensor, a JAX array) is wrapped without a copy. NumPy's DLPack reader does not know bfloat16
and float8, so their type code is changed, in the capsule, to the unsigned integer of the same
width, and the bytes are then viewed as the ml_dtypes type; on the way out the reverse.

Structs: DLPack 1.0 specification, dlpack.h.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cumla.backends import BackendUnavailable
from cumla.checks import bad_type, bad_value, check_array

Array = NDArray[Any]

_CPU, _CUDA = 1, 2
_UNSIGNED = 1
# DLDataTypeCode of the types that NumPy cannot import, and what ml_dtypes calls them.
_FOREIGN_TYPES = {
    4: np.dtype(ml_dtypes.bfloat16),
    10: np.dtype(ml_dtypes.float8_e4m3fn),
    14: np.dtype(ml_dtypes.float8_e8m0fnu),
}
_CODES = {dtype: code for code, dtype in _FOREIGN_TYPES.items()}

# DLTensor: void* data; {int32, int32} device; int32 ndim; {uint8 code, uint8 bits, uint16 lanes}.
_TYPE_CODE = 20
# In a versioned capsule {uint32, uint32} version, void* manager, void* deleter, uint64 flags lead.
_OFFSETS = {b"dltensor": _TYPE_CODE, b"dltensor_versioned": 32 + _TYPE_CODE}

# Prototypes of our own: the attributes of ctypes.pythonapi are shared by the whole process, and
# whoever sets their argtypes last wins.
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _type_code(capsule: object) -> ctypes.c_uint8:
    """The type code inside a DLPack capsule, to read and to change while the capsule lives."""
    name = _capsule_name(capsule)
    return ctypes.c_uint8.from_address(_capsule_pointer(capsule, name) + _OFFSETS[name])


class _Retyped:
    """A DLPack exporter that hands on another's memory under type code `code`."""

    def __init__(self, exporter: Any, code: int) -> None:
        self.exporter, self.code = exporter, code

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.exporter.__dlpack_device__()
        return device

    def __dlpack__(self, **how: Any) -> object:
        capsule = self.exporter.__dlpack__(**how)
        field = _type_code(capsule)
        field.value = self.code
        return capsule


def _capsule_of(exporter: Any) -> object:
    """A capsule to look at: versioned where the exporter can, as read-only memory needs it."""
    try:
        return exporter.__dlpack__(max_version=(1, 0))
    except TypeError:
        return exporter.__dlpack__()


def _import(argument: str, exporter: Any) -> Array:
    try:
        # The name keeps the capsule, and with it the struct, alive while it is read.
        capsule = _capsule_of(exporter)
        peek = _type_code(capsule).value
        del capsule
        if peek not in _FOREIGN_TYPES:
            return np.from_dlpack(exporter)
        unsigned: Any = _Retyped(exporter, _UNSIGNED)
        return np.from_dlpack(unsigned).view(_FOREIGN_TYPES[peek])
    except (AttributeError, BufferError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise bad_type(
            argument,
            f"a {type(exporter).__name__} that does not export through DLPack ({error})",
            "it must be a plain CPU array",
            "Detach it from autograd, or convert it to a NumPy array.",
        ) from error


def _namespace(example: Any) -> Any:
    """The module of the array type of `example` that has from_dlpack, None if it has none."""
    own = getattr(example, "__array_namespace__", None)
    # A subclass may live in another package: torch's in a user's module.
    modules = [sys.modules.get(one.__module__.split(".")[0]) for one in type(example).__mro__]
    for module in [own() if own else None, *modules]:
        if hasattr(module, "from_dlpack"):
            return module
    return None


def in_type_of(array: Array, example: Any) -> Any:
    """`array` in the array type of `example`, sharing its memory."""
    namespace = _namespace(example)
    code = _CODES.get(array.dtype)
    if code is None:
        return namespace.from_dlpack(array)
    unsigned = np.dtype(f"u{array.itemsize}")
    return namespace.from_dlpack(_Retyped(array.view(unsigned), code))


def _device(argument: str, value: Any) -> int:
    if isinstance(value, np.ndarray):
        return _CPU
    if hasattr(value, "__dlpack_device__"):
        try:
            kind = int(value.__dlpack_device__()[0])
        except (BufferError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise bad_type(
                argument,
                f"a {type(value).__name__} that does not export through DLPack ({error})",
                "it must be on the CPU or a CUDA GPU",
                "Copy it there.",
            ) from error
        if kind in (_CPU, _CUDA):
            return kind
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


class Arrays:
    """The array arguments of one call, by name, as NumPy arrays; None stays None.

    Raises:
        ArgumentTypeError: an argument is no array.
        ArgumentError: some are on the GPU and some are not.
        BackendUnavailable: they are on a GPU, whose backend cannot run here.
    """

    def __init__(self, **given: Any) -> None:
        self._given: Mapping[str, Any] = {
            name: value for name, value in given.items() if value is not None
        }
        devices = {name: _device(name, value) for name, value in self._given.items()}
        if not devices:
            first = next(iter(given))
            raise bad_type(first, "None", "it is needed", "Pass an array.")
        first = next(iter(devices))
        for name, device in devices.items():
            if device != devices[first]:
                places = {_CPU: "the CPU", _CUDA: "the GPU"}
                raise bad_value(
                    name,
                    f"an array on {places[device]}",
                    f"all arrays of a call must be on one device, and {first} is on "
                    f"{places[devices[first]]}",
                    f"Copy {name} or {first} over.",
                )
        if devices[first] == _CUDA:
            raise BackendUnavailable(
                f"{first}: it is on a GPU, and this version of cumla has no GPU kernels yet. Copy "
                "it to the CPU with cupy.asnumpy (torch: .cpu()) and pass NumPy arrays."
            )
        self._example = self._given[first]
        if not isinstance(self._example, np.ndarray) and _namespace(self._example) is None:
            raise bad_type(
                first,
                f"a {type(self._example).__name__}, whose module has no from_dlpack",
                "the results are made in its array type",
                "Pass NumPy arrays: numpy.from_dlpack(...) of it.",
            )
        self._arrays = {
            name: check_array(name, value)
            if isinstance(value, np.ndarray)
            else _import(name, value)
            for name, value in self._given.items()
        }

    def __getitem__(self, name: str) -> Array:
        if name not in self._arrays:
            raise bad_type(name, "None", "it is needed", "Pass an array.")
        return self._arrays[name]

    def optional(self, name: str) -> Array | None:
        return self._arrays.get(name)

    def items(self) -> Iterable[tuple[str, Array]]:
        """The arrays that were given, with their names."""
        return self._arrays.items()

    def give_back(self, name: str, array: Array) -> Any:
        """A result: the caller's own object if it passed one as `name`, else in its array type."""
        if name in self._given:
            return self._given[name]
        if isinstance(self._example, np.ndarray):
            return array
        return in_type_of(array, self._example)
