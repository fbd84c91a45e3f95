"""Where the bytes of a box of a tensor lie, in global and in shared memory.

PTX ISA "Tensors": "Tiled mode", "Interleave layout", "Swizzling modes". A box is rows of units. A
unit is an element or, in an interleaved layout, a slice of 16 or 32 bytes of channels; the units of
a row lie along dimension 0, the rows along the others, dimension 1 fastest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.tensormap import INTERLEAVES, SWIZZLES, TensorMap

Array = NDArray[Any]

# What fills elements out of bounds with oob_fill "nan_request_zero_fma": 16 bits, repeated.
OOB_NAN = 0x7FF7
# What a load as tf32 keeps of an f32, and what it makes of a NaN.
TF32_MASK, TF32_NAN = np.uint32(0xFFFFE000), np.uint32(0x7FFFE000)
# Swizzles depend on these bits of a shared address, and repeat after so many bytes.
SWIZZLE_SHIFT, SWIZZLE_PERIOD = 7, 1024
CHUNK = 16


def unit_bytes(m: TensorMap) -> int:
    """Bytes of an element, or of a slice of an interleaved layout."""
    return INTERLEAVES[m.interleave] or m.itemsize


def start_step(m: TensorMap) -> int:
    """What the first coordinate of a box must be a multiple of.

    Without interleave an H200 calls a load or store that begins anywhere but at a multiple of 16
    bytes from the tensor's origin, on either side of it, an illegal instruction. Coordinates of
    slices have no such rule.
    """
    return CHUNK // m.itemsize if m.interleave == "none" else 1


def counts(m: TensorMap) -> tuple[int, ...]:
    """[rank] how many units a copy moves along each dimension.

    An element stride of e moves every e-th, ceil(box / e) of them. Dimension 0 has no element
    stride without interleave; with it, the last dimension but one counts slices of channels, of
    which a box holds one.
    """
    steps = _steps(m)
    found = [-(-size // step) for size, step in zip(m.box_dim, steps, strict=True)]
    if m.interleave != "none":
        found[m.rank - 2] = 1
    return tuple(found)


def _steps(m: TensorMap) -> tuple[int, ...]:
    return m.element_strides if m.interleave != "none" else (1, *m.element_strides[1:])


def row_bytes(m: TensorMap) -> int:
    return counts(m)[0] * unit_bytes(m)


def row_pitch(m: TensorMap) -> int:
    """Bytes from a row of a box to the next in shared memory.

    Rows narrower than the span of the swizzle are padded to it, but not those of slices.
    """
    return max(row_bytes(m), SWIZZLES[m.swizzle][0] if m.interleave == "none" else 0)


def box_bytes(m: TensorMap) -> int:
    """Bytes that a copy of the box moves, those out of bounds included: what an mbarrier counts."""
    return prod(counts(m)) * unit_bytes(m)


def swizzled(address: Array, swizzle: str) -> Array:
    """Where the byte for a shared address lies: the same in memory of any block.

    The chunks of a line of 128 bytes are exchanged by an exclusive or with the number of the line.
    """
    span, atom, flip = SWIZZLES[swizzle]
    if not span:
        return address
    line = address >> SWIZZLE_SHIFT
    moved = address ^ ((line & (span // atom - 1)) * atom)
    return moved ^ ((line & 1) << 3) if flip else moved


def piece_bytes(m: TensorMap) -> int:
    """How many bytes of a box stay together in shared memory whatever its address."""
    return 8 if SWIZZLES[m.swizzle][2] else CHUNK


@lru_cache(maxsize=256)
def _shared_offsets(m: TensorMap, phase: int) -> Array:
    inner, pitch = row_bytes(m), row_pitch(m)
    rows = np.arange(prod(counts(m)[1:]), dtype=np.int64) * pitch
    pieces = np.arange(0, inner, piece_bytes(m))
    address = phase + (rows[:, None] + pieces).reshape(-1)
    found = swizzled(address, m.swizzle) - phase
    found.flags.writeable = False
    return found


def shared_offsets(m: TensorMap, address: int) -> Array:
    """Where the pieces of a box at a shared address lie, in the order of the box.

    Returns:
        [box_bytes / piece_bytes] int64: offsets from the address, of `piece_bytes` each.
    """
    return _shared_offsets(m, address % SWIZZLE_PERIOD)


@dataclass(frozen=True, slots=True)
class Placement:
    """The part of a box that is in bounds, as words of global memory.

    A word is in bounds where its row and its column are.

    Attributes:
        width: bytes of a word, 1 to 16.
        rows: [R] bool: which rows are in bounds.
        row_address: [R] int64: where each row of the tensor begins in global memory.
        columns: [W] bool: which words of a row are in bounds.
        column_offset: [W] int64: from the row's address to each word.
    """

    width: int
    rows: Array
    row_address: Array
    columns: Array
    column_offset: Array

    @property
    def addresses(self) -> Array:
        """[rows in bounds, columns in bounds] int64 global addresses."""
        found: Array = self.row_address[self.rows][:, None] + self.column_offset[self.columns]
        return found


@lru_cache(maxsize=256)
def _outer(m: TensorMap) -> tuple[Array, Array]:
    """([rank - 1, R] coordinates of each row from the box's corner, [R] bytes)."""
    sizes, steps = counts(m)[1:], _steps(m)[1:]
    if not sizes:
        return np.zeros((0, 1), np.int64), np.zeros(1, np.int64)
    # Dimension 1 is the fastest: the last axis of an index array.
    grid = np.indices(sizes[::-1], np.int64).reshape(len(sizes), -1)[::-1]
    moved = grid * np.array(steps, np.int64)[:, None]
    strides = np.array(m.global_strides, np.int64)
    return moved, strides @ moved


def place(m: TensorMap, coordinates: tuple[int, ...], widest: int = CHUNK) -> Placement:
    """Where the box at these coordinates lies in global memory.

    Args:
        coordinates: [rank] of its corner, innermost first; they may be negative or beyond the
            tensor. The first one is a multiple of `start_step`.
        widest: the widest word that is wanted.
    """
    unit, step = unit_bytes(m), _steps(m)[0]
    number = counts(m)[0]
    inner, size = coordinates[0], m.global_dim[0]
    first = min(max(-(inner // step), 0), number)  # units before it have negative coordinates
    last = min(max(-((inner - size) // step), first), number)
    width = widest
    # Words must not straddle a bound. Tensors, unlike boxes, may end anywhere.
    while last * unit % width:
        width //= 2
    words = np.arange(0, number * unit, width, dtype=np.int64)
    units = words // unit
    offset = (inner + units * step) * unit + words % unit
    moved, outer = _outer(m)
    rows = np.ones(outer.shape[0], np.bool_)
    base = m.global_address
    for axis, coordinate in enumerate(coordinates[1:], 1):
        at = moved[axis - 1] + coordinate
        rows &= (at >= 0) & (at < m.global_dim[axis])
        base += coordinate * m.global_strides[axis - 1]
    return Placement(width, rows, outer + base, (units >= first) & (units < last), offset)


def where_in_tensor(
    m: TensorMap, coordinates: tuple[int, ...], row: int, offset: int
) -> tuple[int, ...]:
    """Coordinates in the tensor of a byte of a box: of a row, so many bytes into it."""
    moved, _ = _outer(m)
    inner = coordinates[0] + offset // unit_bytes(m) * _steps(m)[0]
    outer = (c + int(moved[axis, row]) for axis, c in enumerate(coordinates[1:]))
    return (inner, *outer)


def filled(m: TensorMap, rows: int) -> Array:
    """[rows, row_bytes] uint8: a box all out of bounds, ready to be written."""
    shape = (rows, row_bytes(m))
    if m.oob_fill == "none":
        return np.zeros(shape, np.uint8)
    return np.full((rows, shape[1] // 2), OOB_NAN, np.uint16).view(np.uint8)


def converted(m: TensorMap, words: Array) -> Array:
    """What a load makes of elements in bounds: tf32 is rounded, all else is copied.

    PTX ISA "Alternate Floating-Point Data Formats": tf32 is f32 with 10 bits of mantissa.
    """
    if not m.data_type.startswith("tfloat32"):
        return words
    bits = np.ascontiguousarray(words).view(np.uint32)
    # To the nearest, ties to even.
    rounded = bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))
    magnitude = bits & np.uint32(0x7FFFFFFF)
    rounded = np.where(
        magnitude > 0x7F800000, TF32_NAN, np.where(magnitude == 0x7F800000, bits, rounded)
    )
    made: Array = (rounded & TF32_MASK).view(words.dtype).reshape(words.shape)
    return made
