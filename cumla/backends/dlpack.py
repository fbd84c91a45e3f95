"""Other libraries' arrays as NumPy's or CuPy's, and back, through DLPack and without a copy.

NumPy's and CuPy's DLPack readers do not know bfloat16 and float8, so their type code is changed, in
the capsule, to the unsigned integer of the same width, and the bytes are then viewed as the
ml_dtypes type; on the way out the reverse.

On a GPU, DLPack also orders the streams: who exports an array makes the importer's stream wait for
what it has queued on its own. So an array that comes in is ready on our stream, and to hand out an
array is how its library's stream learns to wait for ours.

Structs: DLPack 1.0 specification, dlpack.h. Streams: array API standard, `__dlpack__`.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cumla.checks import bad_type

Array = NDArray[Any]

CPU, CUDA = 1, 2
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
_FLAGS = 24
_READ_ONLY, _COPIED = 1, 2

# Prototypes of our own: the attributes of ctypes.pythonapi are shared by the whole process, and
# whoever sets their argtypes last wins.
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

_REFUSALS = (AttributeError, BufferError, KeyError, RuntimeError, TypeError, ValueError)


def _refused(argument: str, exporter: Any, error: Exception, where: str) -> Exception:
    return bad_type(
        argument,
        f"a {type(exporter).__name__} that does not export through DLPack ({error})",
        f"it must be a plain {where} array",
        f"Detach it from autograd, or convert it to a {'Num' if where == 'CPU' else 'Cu'}Py array.",
    )


def _type_code(capsule: object) -> ctypes.c_uint8:
    """The type code inside a DLPack capsule, to read and to change while the capsule lives."""
    name = _capsule_name(capsule)
    return ctypes.c_uint8.from_address(_capsule_pointer(capsule, name) + _OFFSETS[name])


def _is_writable(capsule: object) -> bool:
    """Whether the capsule says that what is written to it reaches its owner, who may be JAX."""
    name = _capsule_name(capsule)
    if name != b"dltensor_versioned":
        return False
    flags = ctypes.c_uint64.from_address(_capsule_pointer(capsule, name) + _FLAGS).value
    return not flags & (_READ_ONLY | _COPIED)


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


def _capsule_of(exporter: Any, **how: Any) -> object:
    """A capsule: versioned where the exporter can, as read-only memory needs it."""
    try:
        return exporter.__dlpack__(max_version=(1, 0), **how)
    except TypeError:
        return exporter.__dlpack__(**how)


def to_numpy(argument: str, exporter: Any) -> Array:
    """An exporter on the CPU as a NumPy array.

    Raises:
        ArgumentTypeError: it does not export itself.
    """
    try:
        # The name keeps the capsule, and with it the struct, alive while it is read.
        capsule = _capsule_of(exporter)
        peek = _type_code(capsule).value
        del capsule
        if peek not in _FOREIGN_TYPES:
            return np.from_dlpack(exporter)
        unsigned: Any = _Retyped(exporter, _UNSIGNED)
        return np.from_dlpack(unsigned).view(_FOREIGN_TYPES[peek])
    except _REFUSALS as error:
        raise _refused(argument, exporter, error, "CPU") from error


def to_cupy(argument: str, exporter: Any) -> tuple[Any, bool]:
    """An exporter on a GPU as a CuPy array, ready on CuPy's current stream; may it be written?

    The GPU must be CuPy's current device.

    Raises:
        ArgumentTypeError: it does not export itself.
    """
    import cupy

    # The standard's number for CUDA's default stream is 1; 0 means nothing.
    stream = cupy.cuda.get_current_stream().ptr or 1
    try:
        capsule = _capsule_of(exporter, stream=stream)
        field = _type_code(capsule)
        dtype = _FOREIGN_TYPES.get(field.value)
        writable = _is_writable(capsule)
        if dtype is None:
            return cupy.from_dlpack(capsule), writable
        field.value = _UNSIGNED
        return cupy.from_dlpack(capsule).view(dtype), writable
    except _REFUSALS as error:
        raise _refused(argument, exporter, error, "GPU") from error


def namespace_of(example: Any) -> Any:
    """The module of the array type of `example` that has from_dlpack, None if it has none."""
    own = getattr(example, "__array_namespace__", None)
    # A subclass may live in another package: torch's in a user's module.
    modules = [sys.modules.get(one.__module__.split(".")[0]) for one in type(example).__mro__]
    for module in [own() if own else None, *modules]:
        if hasattr(module, "from_dlpack"):
            return module
    return None


def in_type_of(array: Any, example: Any) -> Any:
    """A NumPy or CuPy `array` in the array type of `example`, sharing its memory.

    On a GPU the library of `example` thereby makes its stream wait for CuPy's current one.
    """
    namespace = namespace_of(example)
    code = _CODES.get(array.dtype)
    if code is None:
        return namespace.from_dlpack(array)
    unsigned = np.dtype(f"u{array.itemsize}")
    return namespace.from_dlpack(_Retyped(array.view(unsigned), code))
