"""The forms of wgmma.mma_async, its matrix descriptors, and where operands lie.

PTX ISA "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions". D is 64 by N, K is
32 bytes of A's elements. An operand in shared memory is made of chunks of 16 bytes: of one row
(of A; a column of B) where it is K-major, of 8 rows at one k where it is MN-major.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.isa.mma_forms import ELEMENTS
from cumla.sim.isa.table import Env, Unsupported
from cumla.sim.ptx.syntax import Immediate, Instruction, Operand, Register, Vector

Array = NDArray[Any]

ROWS = 64
CHUNK = 16
K_BYTES = 32
HALF_TYPES = ("f16", "bf16")
# A's element type -> the types that B, and D, may have with it.
TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "f16": (("f16",), ("f32", "f16")),
    "bf16": (("bf16",), ("f32",)),
    "tf32": (("tf32",), ("f32",)),
    "e4m3": (("e4m3", "e5m2"), ("f32", "f16")),
    "e5m2": (("e4m3", "e5m2"), ("f32", "f16")),
    "s8": (("s8", "u8"), ("s32",)),
    "u8": (("s8", "u8"), ("s32",)),
    "b1": (("b1",), ("s32",)),
}
ANY_N = frozenset(range(8, 257, 8))
# Integer forms have no other N.
INTEGER_N = frozenset((8, 24, *range(16, 257, 16)))


@dataclass(frozen=True, slots=True)
class Form:
    """One form of wgmma.mma_async.

    Attributes:
        n, k: of the shape m64nNkK.
        d, a, b: types of D and of the elements of A and B, names of ELEMENTS.
        a_in_registers: A is a fragment, not a descriptor.
        negate: only one of A and B is negated.
        a_mn_major, b_mn_major: the operand in shared memory is transposed.
        satfinite: integer sums are clamped.
    """

    n: int
    k: int
    d: str
    a: str
    b: str
    a_in_registers: bool
    negate: bool
    a_mn_major: bool
    b_mn_major: bool
    satfinite: bool

    @property
    def d_registers(self) -> int:
        """Registers of D that a lane has."""
        return self.n // 4 if self.d == "f16" else self.n // 2

    @property
    def exact_in_single(self) -> bool:
        """Whether every sum of products is a f32, in whatever order it is added."""
        a, b = ELEMENTS[self.a].span, ELEMENTS[self.b].span
        return 0 < a * b * self.k <= 1 << 24

    @property
    def flops_of_warp(self) -> int:
        """Operations of one of the four warps."""
        return 2 * ROWS * self.n * self.k // 4


def parse(ins: Instruction, env: Env) -> Form:
    """The form of a wgmma.mma_async; raises Unsupported.

    wgmma.mma_async.sync.aligned.shape{.satfinite}.dtype.atype.btype d, a, b-desc, scale-d
    {, imm-scale-a, imm-scale-b{{, imm-trans-a}, imm-trans-b}}; scales for floating-point types
    only, imm-trans for f16 and bf16 in shared memory; a is a descriptor or a vector of four
    registers. b1 has .and.popc behind the types.
    """
    words = list(ins.modifiers)
    if "sp" in words:
        raise Unsupported("sparse wgmma (.sp)")
    if words[:3] != ["mma_async", "sync", "aligned"]:
        raise Unsupported(f"form {ins.name!r}")
    del words[:3]
    satfinite = "satfinite" in words
    words = [w for w in words if w != "satfinite"]
    bits = words[-2:] == ["and", "popc"]
    if bits:
        del words[-2:]
    if len(words) != 4:
        raise Unsupported(f"form {ins.name!r}")
    shape, d, a, b = words
    b_types, d_types = TYPES.get(a, ((), ()))
    if b not in b_types or d not in d_types or (a == "b1") != bits:
        raise Unsupported(f"wgmma of .{a} and .{b} with accumulators .{d}")
    if satfinite and a not in ("s8", "u8"):
        raise Unsupported(f".satfinite of .{a}")
    k = 8 * K_BYTES // ELEMENTS[a].room
    match = re.fullmatch(r"m64n(\d+)k(\d+)", shape)
    if match is None or int(match[2]) != k:
        raise Unsupported(f"wgmma of .{a} in shape .{shape}; it is m64nNk{k}")
    n = int(match[1])
    if n not in (INTEGER_N if d == "s32" else ANY_N):
        rule = "8, 24 or a multiple of 16" if d == "s32" else "a multiple of 8"
        raise Unsupported(f"wgmma of .{a} with N = {n}; it is {rule}, at most 256")
    in_registers = len(ins.operands) > 1 and isinstance(ins.operands[1], Vector)
    negate, a_mn, b_mn = _options(ins, a, in_registers)
    form = Form(n, k, d, a, b, in_registers, negate, a_mn, b_mn, satfinite)
    _check_registers(ins, env, form)
    return form


def _options(ins: Instruction, kind: str, in_registers: bool) -> tuple[bool, bool, bool]:
    """Whether the product is negated, A is MN-major, B is MN-major."""
    floating = bool(ELEMENTS[kind].exponent)
    turns = 0 if kind not in HALF_TYPES else 1 if in_registers else 2
    wanted = 4 + 2 * floating + turns
    if len(ins.operands) != wanted:
        raise Unsupported(f"{len(ins.operands)} operands of {ins.name!r}, {wanted} expected")
    scales = [_immediate(o, "imm-scale", (1, -1)) for o in ins.operands[4 : 4 + 2 * floating]]
    trans = [_immediate(o, "imm-trans", (0, 1)) for o in ins.operands[wanted - turns :]]
    a_mn = turns == 2 and trans[0] == 1
    return scales.count(-1) == 1, a_mn, turns > 0 and trans[-1] == 1


def _immediate(operand: Operand, name: str, allowed: tuple[int, int]) -> int:
    if not isinstance(operand, Immediate) or operand.value not in allowed:
        found = operand.value if isinstance(operand, Immediate) else operand
        raise Unsupported(f"{name} {found}; it is {allowed[0]} or {allowed[1]}")
    return int(operand.value)


def _check_registers(ins: Instruction, env: Env, form: Form) -> None:
    d, a = ins.operands[:2]
    found = len(d.items) if isinstance(d, Vector) else 1
    if found != form.d_registers:
        raise Unsupported(f"D of {found} registers, {form.d_registers} expected")
    if isinstance(a, Vector) and len(a.items) != 4:
        raise Unsupported(f"A of {len(a.items)} registers, 4 expected")
    wide = {"b64", "u64", "s64"}
    for name, operand in zip("ab", ins.operands[1 + form.a_in_registers : 3], strict=False):
        kind = env.registers.get(operand.name) if isinstance(operand, Register) else None
        if kind is not None and kind not in wide:
            raise Unsupported(f"{name}-desc in a register of .{kind}; it is one of 64 bits")


# Matrix descriptors. PTX ISA "Matrix Descriptor Format".

# Swizzling mode -> chunks of 16 bytes in a row of its pattern.
PATTERN_CHUNKS = (1, 8, 4, 2)
SWIZZLE_NAMES = ("no swizzle", "128-byte swizzle", "64-byte swizzle", "32-byte swizzle")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A matrix descriptor, its fields in bytes.

    Attributes:
        start: shared address of the matrix, modulo 2**18.
        leading, stride: the two byte offsets; see `chunk_addresses`.
        base: phase of the swizzling pattern's start: bits 7 to 9 of its address.
        swizzle: 0: none, 1: 128 bytes, 2: 64 bytes, 3: 32 bytes.
    """

    start: int
    leading: int
    stride: int
    base: int
    swizzle: int

    @classmethod
    def of(cls, bits: int) -> Descriptor:
        """The descriptor in a 64-bit register."""
        fields = (bits >> low & 0x3FFF for low in (0, 16, 32))
        start, leading, stride = (field << 4 for field in fields)
        return cls(start, leading, stride, bits >> 49 & 7, bits >> 62)

    @property
    def bits(self) -> int:
        """The opposite of `of`."""
        fields = (self.start, self.leading, self.stride)
        low = sum((value >> 4) << 16 * i for i, value in enumerate(fields))
        return low | self.base << 49 | self.swizzle << 62

    def __str__(self) -> str:
        return (
            f"descriptor {self.bits:#018x} (start {self.start:#x}, leading byte offset "
            f"{self.leading}, stride byte offset {self.stride}, base offset {self.base}, "
            f"{SWIZZLE_NAMES[self.swizzle]})"
        )


@dataclass(frozen=True, slots=True)
class Chunks:
    """Where the chunks of an operand lie.

    Attributes:
        addresses: shared addresses, int64, read-only.
        low, high: they lie in [low, high).
    """

    addresses: Array
    low: int
    high: int


@lru_cache(maxsize=4096)
def chunk_addresses(bits: int, rows: int, mn_major: bool) -> Chunks:
    """Where the chunks of an operand of 32 bytes along K lie.

    PTX ISA "Canonical Layouts". K-major: [rows, 2]; eight rows, a swizzling pattern's width apart,
    make a block, and blocks are `stride` apart; the two chunks of a row are next to each other, or
    without swizzle `leading` apart. MN-major (16-bit elements): [16, rows / 8], by k and by eights
    of rows; without swizzle eight k, 16 bytes apart, make a block, `stride` from the next along
    the rows and `leading` along k; with it a block is a pattern's width of rows, `leading` from
    the next along the rows and `stride` along k.

    A swizzle exchanges chunks in a row of the pattern: the number of the chunk is xored with the
    number of the row, both taken from the address itself; `base` is subtracted for patterns that
    do not begin at a multiple of their size. Bits that the format does not name are ignored. An
    H200 reads the same bytes in each of 684 probes of 341 pairs of a form and a descriptor, of all
    modes, base offsets and starts.
    """
    descriptor = Descriptor.of(bits)
    width = PATTERN_CHUNKS[descriptor.swizzle]
    leading, stride = descriptor.leading, descriptor.stride
    if mn_major:
        k, chunk = np.arange(16)[:, None], np.arange(rows // 8)
        if width == 1:
            offsets = k % 8 * CHUNK + k // 8 * leading + chunk * stride
        else:
            offsets = chunk % width * CHUNK + chunk // width * leading
            offsets = offsets + k % 8 * (width * CHUNK) + k // 8 * stride
    else:
        row, chunk = np.arange(rows)[:, None], np.arange(2)
        apart = leading if width == 1 else CHUNK
        offsets = row % 8 * (width * CHUNK) + row // 8 * stride + chunk * apart
    address = descriptor.start + offsets
    if width > 1:
        address = address ^ ((address >> 7) - descriptor.base & width - 1) << 4
    address.flags.writeable = False
    return Chunks(address, int(address.min()), int(address.max()) + CHUNK)


# Fragments. PTX ISA "Register Fragments": lane 4g + t of warp w has of D the rows 16w + g and 8
# further down, columns 8j + 2t and one further; of A, by 32-bit words of a row, words t and t + 4
# of those rows.


def a_words(registers: Array) -> Array:
    """[4, lanes] uint32 registers of A as [warpgroups, 64, 8] words."""
    parts = registers.reshape(2, 2, -1, 4, 8, 4)  # word // 4, half, warpgroup, w, g, t
    return np.ascontiguousarray(parts.transpose(2, 3, 1, 4, 0, 5)).reshape(-1, ROWS, 8)


def to_fragments(matrix: Array) -> Array:
    """[warpgroups, 64, N] as [N / 2, lanes], a register for each element of D that a lane has."""
    groups, _, n = matrix.shape
    parts = matrix.reshape(groups, 4, 2, 8, n // 8, 4, 2)  # group, w, half, g, j, t, e
    return np.ascontiguousarray(parts.transpose(4, 2, 6, 0, 1, 3, 5)).reshape(n // 2, -1)
