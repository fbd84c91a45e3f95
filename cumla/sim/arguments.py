"""Kernel arguments as the bytes of a parameter block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cumla.sim.errors import LaunchError
from cumla.sim.memory import DeviceArray
from cumla.sim.ptx.syntax import Variable
from cumla.sim.tensormap import TensorMap


def marshal(kernel: str, parameters: Sequence[Variable], args: Sequence[Any], size: int) -> bytes:
    """The parameter block: each argument at the aligned offset of its parameter.

    Raises:
        LaunchError: a wrong number of arguments, or one that does not fit its parameter.
    """
    if len(args) != len(parameters):
        raise LaunchError(
            f"args: got {len(args)} values; {kernel} has {len(parameters)} parameters"
        )
    block = bytearray(size)
    at = 0
    for number, (parameter, value) in enumerate(zip(parameters, args, strict=True)):
        data = _encode(f"args[{number}]", parameter, value)
        at = -(-at // parameter.align) * parameter.align
        block[at : at + parameter.size] = data
        at += parameter.size
    return bytes(block)


def _encode(name: str, parameter: Variable, value: Any) -> bytes:
    if isinstance(value, DeviceArray):
        data = value.address.to_bytes(8, "little")
    elif isinstance(value, (bytes, bytearray, memoryview, TensorMap)):
        data = bytes(value)
    elif isinstance(value, np.generic):
        data = value.tobytes()
    elif isinstance(value, (bool, int)):
        if parameter.type in ("f32", "f64"):
            return _encode(name, parameter, float(value))
        bits = 8 * parameter.size
        if parameter.size > 8 or not -(1 << (bits - 1)) <= value < (1 << bits):
            raise LaunchError(f"{name}: got {value}; the parameter has {parameter.size} bytes")
        data = (value % (1 << bits)).to_bytes(parameter.size, "little")
    elif isinstance(value, float) and parameter.type in ("f32", "f64"):
        data = (
            np.dtype(parameter.type.replace("f32", "f4").replace("f64", "f8")).type(value).tobytes()
        )
    else:
        raise LaunchError(
            f"{name}: got a {type(value).__name__} for a parameter of type .{parameter.type}; pass "
            "a device array (Device.upload), a NumPy scalar, a Python number, a tensor map or bytes"
        )
    if len(data) != parameter.size:
        raise LaunchError(
            f"{name}: got {value!r}, {len(data)} bytes; the parameter has {parameter.size} bytes"
        )
    return data
