"""The forms of mma: shapes, element types, and how registers hold them.

PTX ISA "Warp-level matrix instructions using mma": in all forms that are known here lane l = 4g + t
holds of A the rows g and g + 8 (if there are 16), of B the column g, and of C and D columns 2t and
2t + 1 of those rows. With E elements to a register, register r of A holds row g + 8 * (r % 2),
columns E * (t + 4 * (r // 2)) onwards; register r of B holds rows E * (t + 4r) onwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.isa.rounding import NAN_BITS
from cumla.sim.isa.table import Unsupported
from cumla.sim.ptx.syntax import Instruction

Array = NDArray[Any]
Unpack = Callable[[Array, Array, Array], None]


@dataclass(frozen=True, slots=True)
class Element:
    """How elements of a type lie in a register, low ones first.

    Attributes:
        room: bits from one element to the next.
        width: bits of an element.
        pad: bits of its room below it.
        exponent, mantissa, bias: of a floating-point type; exponent is 0 for integers.
        limit: codes of this magnitude and above are NaN; the limit itself is infinity if
            `infinity`. 0 for types without NaN, and those that have it as f32 does.
        signed: of an integer type.
        span: the largest magnitude in units of the smallest but 0, if sums of products in f32
            may be exact; else 0.
    """

    room: int
    width: int
    pad: int = 0
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0
    limit: float = 0.0
    infinity: bool = False
    signed: bool = False
    span: int = 0

    def unpacker(self) -> Unpack:
        """A function of [...] uint32 registers and two arrays of [elements of a register, ...].

        It leaves the elements, f32, in the second; for floating-point types the first must be the
        same memory as uint32, for integers it is any.
        """
        # Each element to the top of its word: then all are treated alike.
        shifts = [
            np.array(32 - self.width - self.pad - low, np.uint32) for low in range(0, 32, self.room)
        ]
        if not self.exponent:
            return partial(_integers, shifts, np.array(32 - self.width, np.uint32), self.signed)
        fields = (1 << self.exponent + self.mantissa) - 1 << 23 - self.mantissa
        mask = np.array(1 << 31 | fields, np.uint32)
        if self.exponent == 8:
            return partial(_singles, shifts, mask)
        down = np.array(8 - self.exponent, np.int32)
        scale = np.array(2.0 ** (127 - self.bias), np.float32)
        limit = self.limit or np.inf
        return partial(_floats, shifts, down, mask, scale, limit, self.infinity)


def _integers(
    shifts: list[Array], down: Array, signed: bool, bits: Array, planes: Array, values: Array
) -> None:
    for plane, up in zip(planes, shifts, strict=True):
        np.left_shift(bits, up, plane)
    words = planes.view(np.int32)
    if signed:
        np.right_shift(words, down.view(np.int32), words)
    else:
        np.right_shift(planes, down, planes)
    np.copyto(values, words)


def _singles(shifts: list[Array], mask: Array, bits: Array, planes: Array, values: Array) -> None:
    """Types that are f32 with a shorter mantissa."""
    for plane, up in zip(planes, shifts, strict=True):
        if up:
            np.left_shift(bits, up, plane)
        else:
            np.bitwise_and(bits, mask, plane)


def _floats(
    shifts: list[Array],
    down: Array,
    mask: Array,
    scale: Array,
    limit: float,
    infinity: bool,
    bits: Array,
    planes: Array,
    values: Array,
) -> None:
    for plane, up in zip(planes, shifts, strict=True):
        np.left_shift(bits, up, plane)
    # The fields go to where f32 has its mantissa and the low end of its exponent, below copies of
    # the sign, which the mask clears. Then only the bias is wrong.
    words = planes.view(np.int32)
    np.right_shift(words, down, words)
    np.bitwise_and(planes, mask, planes)
    np.multiply(values, scale, values)
    flat = values.reshape(-1)
    if np.maximum.reduce(flat) >= limit or np.minimum.reduce(flat) <= -limit:
        size = np.abs(values)
        planes[size >= limit] |= NAN_BITS
        if infinity:
            values[size == limit] = np.copysign(np.float32(np.inf), values[size == limit])


ELEMENTS = {
    "f16": Element(16, 16, exponent=5, mantissa=10, bias=15, limit=2.0**16, infinity=True),
    "bf16": Element(16, 16, exponent=8, mantissa=7, bias=127),
    # The lower 13 bits of the register are not part of the number.
    "tf32": Element(32, 32, exponent=8, mantissa=10, bias=127),
    "e4m3": Element(8, 8, exponent=4, mantissa=3, bias=7, limit=480.0),
    "e5m2": Element(8, 8, exponent=5, mantissa=2, bias=15, limit=2.0**16, infinity=True),
    "e2m3": Element(8, 6, exponent=2, mantissa=3, bias=1, span=60),
    "e3m2": Element(8, 6, exponent=3, mantissa=2, bias=3, span=448),
    # PTX ISA mma, .kind::f8f6f4: 4-bit elements stand in the middle of their bytes.
    "e2m1": Element(8, 4, 2, exponent=2, mantissa=1, bias=1, span=12),
    "s8": Element(8, 8, signed=True, span=128),
    "u8": Element(8, 8, span=255),
    "s4": Element(4, 4, signed=True, span=8),
    "u4": Element(4, 4, span=15),
    "b1": Element(1, 1, span=1),
}
_SHAPES = {
    "f16": ((16, 8, 8), (16, 8, 16)),
    "bf16": ((16, 8, 8), (16, 8, 16)),
    "tf32": ((16, 8, 4), (16, 8, 8)),
    "fp8": ((16, 8, 16), (16, 8, 32)),
    "f8f6f4": ((16, 8, 32),),
    "int8": ((8, 8, 16), (16, 8, 16), (16, 8, 32)),
    "int4": ((8, 8, 32), (16, 8, 32), (16, 8, 64)),
    "b1": ((8, 8, 128), (16, 8, 128), (16, 8, 256)),
    "f64": ((8, 8, 4), (16, 8, 4), (16, 8, 8), (16, 8, 16)),
}
_FAMILIES = {
    "e4m3": "fp8",
    "e5m2": "fp8",
    "s8": "int8",
    "u8": "int8",
    "s4": "int4",
    "u4": "int4",
}
# What the registers of accumulators travel as.
KINDS = {"f32": "f32", "f16": "b32", "s32": "s32", "f64": "f64"}


@dataclass(frozen=True, slots=True)
class Form:
    """One form of mma.

    Attributes:
        a, b: element types, names of ELEMENTS or "f64".
        c, d: accumulator types, "f32", "f16", "s32" or "f64".
        operation: "mul", or "xor" or "and" for b1.
        satfinite: integer sums are clamped.
    """

    m: int
    n: int
    k: int
    a: str
    b: str
    c: str
    d: str
    operation: str = "mul"
    satfinite: bool = False

    @property
    def halves(self) -> int:
        """Rows of A and C that a lane holds."""
        return self.m // 8

    @property
    def steps(self) -> int:
        """Registers that hold a row of A, or a column of B, for a lane."""
        count = 1 if self.a == "f64" else 32 // ELEMENTS[self.a].room
        return self.k // (4 * count)

    @property
    def flops(self) -> int:
        """Operations of one warp."""
        return 2 * self.m * self.n * self.k

    @property
    def exact_in_single(self) -> bool:
        """Whether every sum of products of A and B is a f32, in whatever order it is added."""
        if self.a == "f64":
            return False
        a, b = ELEMENTS[self.a].span, ELEMENTS[self.b].span
        return 0 < a * b * self.k <= 1 << 24

    def registers(self) -> tuple[int, int, int, int]:
        """How many D, A, B and C have."""
        each = {"f16": 1}
        return (
            self.halves * each.get(self.d, 2),
            self.halves * self.steps,
            self.steps,
            self.halves * each.get(self.c, 2),
        )


def parse(ins: Instruction) -> Form:
    """The form of an mma instruction; raises Unsupported."""
    words = list(ins.modifiers)
    if words[:2] != ["sync", "aligned"]:
        raise Unsupported(f"form {ins.name!r}")
    del words[:2]
    kinds = [w for w in words if w.startswith("kind::")]
    words = [w for w in words if w not in kinds]
    operation = "mul"
    if words[-1:] == ["popc"]:
        operation = words[-2]
        del words[-2:]
    satfinite = "satfinite" in words
    words = [w for w in words if w != "satfinite" and (w != "rn" or "f64" not in words)]
    if len(words) != 7 or words[1:3] != ["row", "col"] or kinds not in ([], ["kind::f8f6f4"]):
        raise Unsupported(f"form {ins.name!r}")
    shape, _, _, d, a, b, c = words
    family, accumulators = _family(a, b, bool(kinds))
    size = next((s for s in _SHAPES.get(family, ()) if "m{}n{}k{}".format(*s) == shape), None)
    if size is None:
        raise Unsupported(f"mma of .{a} and .{b} in shape .{shape}")
    if c not in accumulators or d not in accumulators:
        raise Unsupported(f"mma of .{a} and .{b} with accumulators .{d} and .{c}")
    if (operation in ("xor", "and")) != (family == "b1") or (satfinite and c != "s32"):
        raise Unsupported(f"form {ins.name!r}")
    return Form(*size, a, b, c, d, operation, satfinite)


def _family(a: str, b: str, f8f6f4: bool) -> tuple[str, tuple[str, ...]]:
    """What decides on shapes, and the types that accumulators may have."""
    if f8f6f4:
        narrow = {"e4m3", "e5m2", "e2m3", "e3m2", "e2m1"}
        return ("f8f6f4" if {a, b} <= narrow else "", ("f32", "f16"))
    family = _FAMILIES.get(a, a)
    if family != _FAMILIES.get(b, b):
        return "", ()
    if family in ("f16", "fp8"):
        return family, ("f32", "f16")
    if family in ("bf16", "tf32"):
        return family, ("f32",)
    return family, ("f64",) if family == "f64" else ("s32",)
