"""Tensor maps: what a tensor copy knows of a tensor, its box and their layout.

CUDA driver API "Tensor Map Object Management", cuTensorMapEncodeTiled; PTX ISA "Tensors". Where the
documentation and the driver of an H200 disagree, the rules here are the driver's. The 128 bytes
of a map are opaque on a GPU; here they have a layout of our own, `LAYOUT`, that begins with
a mark, so that a copy which is given anything else can say so. Where the bytes of a box lie is
told by `cumla.sim.tensor_box`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cumla.sim.errors import LaunchError
from cumla.sim.memory import DeviceArray

# In the order in which tensormap.replace numbers them; PTX ISA "tensormap.replace".
DATA_TYPES = {
    "uint8": 1, "uint16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8, "float16": 2,
    "float32": 4, "float32_ftz": 4, "float64": 8, "bfloat16": 2, "tfloat32": 4, "tfloat32_ftz": 4,
}  # fmt: skip
PACKED = ("16u4_align8b", "16u4_align16b", "16u6_align16b")
INTERLEAVES = {"none": 0, "16B": 16, "32B": 32}
# Name -> (span in bytes, bytes that stay together, whether their halves change places).
SWIZZLES = {
    "none": (0, 16, False), "32B": (32, 16, False), "64B": (64, 16, False),
    "128B": (128, 16, False), "128B_ATOM_32B": (128, 32, False),
    "128B_ATOM_32B_FLIP_8B": (128, 32, True), "128B_ATOM_64B": (128, 64, False),
}  # fmt: skip
PROMOTIONS = ("none", "64B", "128B", "256B")
FILLS = ("none", "nan_request_zero_fma")

MAP_BYTES, MAP_ALIGN = 128, 64
ATOMS_SINCE = 100  # the compute capability that swizzles with larger atoms came with
LARGEST_DIM, LARGEST_BOX, LARGEST_ELEMENT_STRIDE = 1 << 32, 256, 8
STRIDE_LIMIT = 1 << 40
MARK = 0x50414D544C4D5543  # "CUMLTMAP"
# Mark, address, 4 strides, 5 dimensions (0 is 2^32), 5 sizes of the box, 5 element strides, and a
# byte each for the data type, rank less one, interleave, swizzle, L2 promotion and fill.
LAYOUT = struct.Struct("<QQ4Q5I5I5I6B")
# Where fields begin, by the names that tensormap.replace has for them.
OFFSETS = {
    "global_address": 8, "global_stride": 16, "global_dim": 48, "box_dim": 68,
    "element_stride": 88, "elemtype": 108, "rank": 109, "interleave_layout": 110,
    "swizzle_mode": 111, "fill_mode": 113,
}  # fmt: skip


class TensorMapError(LaunchError):
    """A tensor map that cannot be, which the driver refuses with CUDA_ERROR_INVALID_VALUE.

    Attributes:
        argument: the argument of `tensor_map` at fault, e.g. "box_dim[0]".
    """

    def __init__(self, argument: str, got: str, rule: str) -> None:
        super().__init__(f"{argument}: got {got}; {rule} (CUDA_ERROR_INVALID_VALUE)")
        self.argument = argument


class NotATensorMap(ValueError):
    """128 bytes that are no tensor map, or one that is not complete; the argument says why."""


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A tensor map; `bytes(map)` are its 128 bytes.

    Pass it for a `const __grid_constant__ CUtensorMap` parameter of a kernel, or upload
    `np.frombuffer(bytes(map), np.uint8)` and pass the array's address. A map does not keep the
    tensor's memory alive. All tuples begin with the innermost dimension.

    Attributes:
        data_type: a name of `DATA_TYPES`.
        global_address: of the element at coordinates (0, 0, ...).
        global_dim: [rank] sizes of the tensor.
        global_strides: [rank - 1] bytes from an element to the next along dimensions 1, 2, ...
        box_dim: [rank] how far a copy reaches along each dimension.
        element_strides: [rank] along each dimension every so many elements are copied.
        interleave, swizzle, l2_promotion, oob_fill: names of `INTERLEAVES`, `SWIZZLES`,
            `PROMOTIONS` and `FILLS`.
    """

    data_type: str
    global_address: int
    global_dim: tuple[int, ...]
    global_strides: tuple[int, ...]
    box_dim: tuple[int, ...]
    element_strides: tuple[int, ...]
    interleave: str = "none"
    swizzle: str = "none"
    l2_promotion: str = "none"
    oob_fill: str = "none"

    @property
    def rank(self) -> int:
        return len(self.global_dim)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DATA_TYPES[self.data_type]

    def __bytes__(self) -> bytes:
        rank = self.rank
        packed = LAYOUT.pack(
            MARK,
            self.global_address,
            *(*self.global_strides, *[0] * (5 - rank)),
            *_five(n % LARGEST_DIM for n in self.global_dim),
            *_five(self.box_dim),
            *_five(self.element_strides),
            list(DATA_TYPES).index(self.data_type),
            rank - 1,
            list(INTERLEAVES).index(self.interleave),
            list(SWIZZLES).index(self.swizzle),
            PROMOTIONS.index(self.l2_promotion),
            FILLS.index(self.oob_fill),
        )
        return packed.ljust(MAP_BYTES, b"\0")


def tensor_map(
    array: DeviceArray | int,
    *,
    box_dim: Sequence[int],
    data_type: Any = None,
    global_dim: Sequence[int] | None = None,
    global_strides: Sequence[int] | None = None,
    element_strides: Sequence[int] | None = None,
    interleave: str = "none",
    swizzle: str = "none",
    l2_promotion: str = "none",
    oob_fill: str = "none",
    target: str = "sm_90a",
) -> TensorMap:
    """A tensor map, with the arguments and rules of cuTensorMapEncodeTiled.

    Args:
        array: a device array, or a global address; then data_type and global_dim must be given.
        box_dim: [rank] sizes of the box that a copy moves, innermost dimension first.
        data_type: a name of the driver's, in lower case without CU_TENSOR_MAP_DATA_TYPE_
            ("bfloat16", "tfloat32_ftz", ...), or a dtype; 1-byte dtypes such as int8 and
            float8_e4m3fn are "uint8", int16 is "uint16". By default the array's.
        global_dim: [rank] sizes of the tensor, innermost first; by default the array's shape.
        global_strides: [rank - 1] bytes from an element to the next one along dimensions 1, 2, ...;
            by default those of a contiguous tensor.
        element_strides: [rank] by default all 1.
        interleave: "none", "16B" or "32B".
        swizzle: "none", "32B", "64B", "128B", or, for sm_100 and later, "128B_ATOM_32B",
            "128B_ATOM_32B_FLIP_8B", "128B_ATOM_64B".
        l2_promotion: "none", "64B", "128B" or "256B"; it changes nothing here.
        oob_fill: "none" (zeros) or "nan_request_zero_fma".
        target: the device's architecture.

    Raises:
        TensorMapError: where the driver says CUDA_ERROR_INVALID_VALUE.
    """
    if isinstance(array, DeviceArray):
        address = array.address
        data_type = array.dtype if data_type is None else data_type
        global_dim = array.shape[::-1] if global_dim is None else global_dim
    else:
        address = int(array)
    if data_type is None or global_dim is None:
        missing = "data_type" if data_type is None else "global_dim"
        raise TensorMapError(missing, "nothing", "an address alone does not tell it")
    dims = tuple(int(n) for n in global_dim)
    kind = data_type_name(data_type)
    if global_strides is None:
        strides = [DATA_TYPES[kind]]
        for size in dims[:-1]:
            strides.append(strides[-1] * size)
        global_strides = strides[1:]
    made = TensorMap(
        kind,
        address,
        dims,
        tuple(int(n) for n in global_strides),
        tuple(int(n) for n in box_dim),
        (1,) * len(dims) if element_strides is None else tuple(int(n) for n in element_strides),
        _named("interleave", interleave, INTERLEAVES),
        _named("swizzle", swizzle, SWIZZLES),
        _named("l2_promotion", l2_promotion, PROMOTIONS),
        _named("oob_fill", oob_fill, FILLS),
    )
    check(made)
    if "ATOM" in made.swizzle and int(target[3:].rstrip("af")) < ATOMS_SINCE:
        raise TensorMapError("swizzle", f"{swizzle!r} for {target}", "it needs sm_100 or later")
    return made


def data_type_name(given: Any) -> str:
    """The name in `DATA_TYPES` of a name or dtype; TensorMapError if there is none."""
    name = given.lower() if isinstance(given, str) else np.dtype(given).name
    name = name.removeprefix("cu_tensor_map_data_type_")
    if name in PACKED:
        raise TensorMapError("data_type", f"{given!r}", "packed types are not implemented")
    if name not in DATA_TYPES and not isinstance(given, str):
        kind = np.dtype(given)
        if kind.itemsize == 1 and kind.kind != "b":
            return "uint8"
        if kind == np.int16:
            return "uint16"
    if name not in DATA_TYPES:
        raise TensorMapError("data_type", f"{given!r}", f"choose one of {', '.join(DATA_TYPES)}")
    return name


def check(m: TensorMap) -> None:
    """The rules of the driver for the arguments of cuTensorMapEncodeTiled.

    Raises:
        TensorMapError: for the first rule that is broken.
    """
    rank, interleaved = m.rank, INTERLEAVES[m.interleave]
    unit = 32 if interleaved == 32 else 16
    if not 1 <= rank <= 5:
        raise TensorMapError("global_dim", f"{m.global_dim}", "a tensor has 1 to 5 dimensions")
    if interleaved and rank < 3:
        raise TensorMapError(
            "interleave", f"{m.interleave!r} with {rank} dimensions", "it needs at least 3"
        )
    for name, values, wanted in (
        ("global_strides", m.global_strides, rank - 1),
        ("box_dim", m.box_dim, rank),
        ("element_strides", m.element_strides, rank),
    ):
        if len(values) != wanted:
            raise TensorMapError(
                name, f"{values}", f"a tensor of {rank} dimensions needs {wanted} of them"
            )
    if m.global_address % unit or not 0 <= m.global_address < 1 << 64:
        raise TensorMapError(
            "array",
            f"address {m.global_address:#x}",
            f"it must be a multiple of {unit}" + (" with interleave 32B" if unit == 32 else ""),
        )
    for axis, size in enumerate(m.global_dim):
        if not 1 <= size <= LARGEST_DIM:
            raise TensorMapError(f"global_dim[{axis}]", f"{size}", "it must be 1 to 2^32")
    for axis, stride in enumerate(m.global_strides):
        if stride % unit or not 0 <= stride < STRIDE_LIMIT:
            raise TensorMapError(
                f"global_strides[{axis}]",
                f"{stride}",
                f"it must be a multiple of {unit} bytes below 2^40",
            )
    for axis, size in enumerate(m.box_dim):
        if not 1 <= size <= LARGEST_BOX:
            raise TensorMapError(f"box_dim[{axis}]", f"{size}", "it must be 1 to 256")
    for axis, step in enumerate(m.element_strides):
        # The first one too, though without interleave copies ignore it.
        if not 1 <= step <= LARGEST_ELEMENT_STRIDE:
            raise TensorMapError(f"element_strides[{axis}]", f"{step}", "it must be 1 to 8")
    _check_layout(m)


def _check_layout(m: TensorMap) -> None:
    interleaved, span = INTERLEAVES[m.interleave], SWIZZLES[m.swizzle][0]
    inner = m.box_dim[0] * m.itemsize
    box = f"{m.box_dim[0]} of {m.data_type}, {inner} bytes"
    if inner % 16:
        raise TensorMapError("box_dim[0]", box, "it must be a multiple of 16 bytes")
    if not interleaved and span and inner > span:
        raise TensorMapError("box_dim[0]", box, f"with swizzle {m.swizzle} at most {span} bytes")
    if m.oob_fill != "none" and "float" not in m.data_type:
        raise TensorMapError(
            "oob_fill", f"{m.oob_fill!r} for {m.data_type}", "NaN is for floating-point types"
        )


@lru_cache(maxsize=1024)
def decode(data: bytes) -> TensorMap:
    """The map that 128 bytes hold.

    Raises:
        NotATensorMap: they do not begin with the mark, or a field has no meaning.
    """
    mark, address, *fields = LAYOUT.unpack_from(data)
    if mark != MARK:
        raise NotATensorMap("these 128 bytes are no tensor map; make one with cumla.sim.tensor_map")
    kind, last, interleave, swizzle, promotion, fill = fields[19:]
    if last > 4:
        raise NotATensorMap(f"its rank less one is {last}; it must be 0 to 4")
    for name, value, known in (
        ("data type", kind, DATA_TYPES),
        ("interleave", interleave, INTERLEAVES),
        ("swizzle", swizzle, SWIZZLES),
        ("L2 promotion", promotion, PROMOTIONS),
        ("fill", fill, FILLS),
    ):
        if value >= len(known):
            raise NotATensorMap(f"its {name} is number {value}, which is not known")
    rank = last + 1
    made = TensorMap(
        list(DATA_TYPES)[kind],
        address,
        tuple(n or LARGEST_DIM for n in fields[4 : 4 + rank]),
        tuple(fields[:last]),
        tuple(fields[9 : 9 + rank]),
        tuple(fields[14 : 14 + rank]),
        list(INTERLEAVES)[interleave],
        list(SWIZZLES)[swizzle],
        PROMOTIONS[promotion],
        FILLS[fill],
    )
    try:
        check(made)
    except TensorMapError as error:
        raise NotATensorMap(f"it breaks a rule of tensor maps: {error}") from None
    return made


def _five(values: Any) -> list[int]:
    return [*values, 0, 0, 0, 0, 0][:5]


def _named(argument: str, given: str, known: Any) -> str:
    """A name as `known` has it, in any case."""
    for name in known:
        if str(given).lower() == name.lower():
            return str(name)
    raise TensorMapError(argument, f"{given!r}", f"choose one of {', '.join(known)}")
