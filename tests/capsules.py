"""DLPack capsules by hand: dlpack.h written down a second time, for the tests of ours.

Every struct that a capsule hands out is remembered until it is given back, which must happen once.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

# DLDataTypeCode.
KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}
NAMED = {
    np.dtype(ml_dtypes.bfloat16): 4,
    np.dtype(ml_dtypes.float8_e4m3fn): 10,
    np.dtype(ml_dtypes.float8_e8m0fnu): 14,
}
# What a freed struct says it holds: a type of its own that is read differently.
_FREED = NAMED[np.dtype(ml_dtypes.bfloat16)]
CPU, CUDA, METAL = 1, 2, 8
_READ_ONLY = 1


class DLTensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_: ClassVar = [
        ("tensor", DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class ManagedVersioned(ctypes.Structure):
    _fields_: ClassVar = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


STRUCTS = {b"dltensor": Managed, b"dltensor_versioned": ManagedVersioned}

# Prototypes of our own: attributes of ctypes.pythonapi are shared by the whole process.
_capsule_new = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))
# Capsules as plain addresses: a destructor meets its capsule when no reference may be taken.
is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

live: dict[int, Any] = {}
freed: list[Any] = []
"""Structs that were given back stay allocated, with a type code that nobody may believe."""


def _delete(address: int) -> None:
    struct, array = live.pop(address)
    struct.tensor.code = _FREED
    struct.tensor.data = None
    freed.append((struct, type(array)))


def _destroy(capsule: int) -> None:
    for name in STRUCTS:
        if is_valid(capsule, name):  # not consumed
            _delete(_get_pointer(capsule, name))


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_delete)
_destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_destroy)


def make(
    array: Any,
    address: int,
    device: tuple[int, int] = (CPU, 0),
    *,
    versioned: bool = True,
    read_only: bool = False,
) -> Any:
    """A capsule of `array`, anything with shape, strides, dtype and itemsize, at `address`."""
    struct: Any = ManagedVersioned() if versioned else Managed()
    if versioned:
        struct.major, struct.flags = 1, _READ_ONLY if read_only else 0
    tensor = struct.tensor
    tensor.data = address
    tensor.device_type, tensor.device_id = device
    tensor.ndim, tensor.lanes, tensor.bits = array.ndim, 1, 8 * array.itemsize
    code = NAMED.get(array.dtype)
    tensor.code = KINDS[array.dtype.kind] if code is None else code
    tensor.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    tensor.strides = (ctypes.c_int64 * array.ndim)(
        *(one // array.itemsize for one in array.strides)
    )
    struct.deleter = ctypes.cast(_deleter, ctypes.c_void_p)
    live[ctypes.addressof(struct)] = (struct, array)
    name = b"dltensor_versioned" if versioned else b"dltensor"
    return _capsule_new(ctypes.addressof(struct), name, ctypes.cast(_destructor, ctypes.c_void_p))


def tensor_of(capsule: Any) -> Any:
    """The tensor inside a capsule, to read and to change."""
    name = next(one for one in STRUCTS if is_valid(id(capsule), one))
    return STRUCTS[name].from_address(_get_pointer(id(capsule), name)).tensor


def read(capsule: Any) -> tuple[DLTensor, tuple[int, ...], tuple[int, ...] | None, np.dtype[Any]]:
    """What a capsule says: tensor, shape, strides in bytes (None: C order), dtype."""
    tensor = tensor_of(capsule)
    dtypes = {code: dtype for dtype, code in NAMED.items()}
    if tensor.code not in dtypes:
        kind = next(one for one, code in KINDS.items() if code == tensor.code)
        dtypes[tensor.code] = np.dtype(f"{kind}{tensor.bits // 8}")
    dtype = dtypes[tensor.code]
    assert tensor.bits == 8 * dtype.itemsize
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = None
    if tensor.strides:
        strides = tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim))
    return tensor, shape, strides, dtype
