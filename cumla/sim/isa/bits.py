"""Counting, finding and moving bits. PTX ISA "Integer Arithmetic Instructions: popc" to "bmsk".

These rely on NumPy's shifts: by the width of the type or more they give 0, or the sign for a right
shift of a signed type, just as PTX's shifts do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cumla.sim.isa.forms import literal, only_type, unsupported
from cumla.sim.isa.table import DTYPES, Env, Op, instruction
from cumla.sim.isa.values import constant
from cumla.sim.ptx.syntax import Instruction


@instruction("popc")
def popc(ins: Instruction, env: Env) -> Op:
    """popc.type d, a."""
    kind = only_type(ins, "b32", "b64")
    return Op(lambda a: np.bitwise_count(a).astype(np.uint32), (kind,), ("u32",))


# Floating point with the width of an integer: type, mantissa bits, exponent bias.
FLOATS = {32: (np.float32, 23, 127), 64: (np.float64, 52, 1023)}


def _top_bit(width: int) -> Any:
    """A function of unsigned integers: the place of the highest 1, plus the bias; 0 for 0."""
    real, mantissa, _ = FLOATS[width]
    one, shift = constant(1, f"u{width}"), constant(mantissa, f"u{width}")
    bits = DTYPES[f"u{width}"]

    def run(a: Any) -> Any:
        # The exponent of a as a float. With the bit after the highest cleared, rounding cannot
        # carry into the next power of two.
        return (a & ~(a >> one)).astype(real).view(bits) >> shift

    return run


@instruction("clz")
def clz(ins: Instruction, env: Env) -> Op:
    """clz.type d, a."""
    kind = only_type(ins, "b32", "b64")
    width = int(kind[1:])
    top_bit = _top_bit(width)
    highest = constant(FLOATS[width][2] + width - 1, kind)
    most = constant(width, kind)
    return Op(lambda a: np.minimum(highest - top_bit(a), most).astype(np.uint32), (kind,), ("u32",))


@instruction("bfind")
def bfind(ins: Instruction, env: Env) -> Op:
    """bfind{.shiftamt}.type d, a."""
    *words, kind = ins.modifiers or ("",)
    if words not in ([], ["shiftamt"]) or kind not in ("u32", "s32", "u64", "s64"):
        raise unsupported(ins)
    width = int(kind[1:])
    top_bit = _top_bit(width)
    signed, bits = DTYPES[f"s{width}"], DTYPES[f"u{width}"]
    sign_shift = constant(width - 1, f"s{width}")
    bias = constant(FLOATS[width][2], f"s{width}")
    none, most = constant(-1, f"s{width}"), constant(width - 1, f"s{width}")

    def place(a: Any) -> Any:
        if kind[0] == "s":
            a = (a ^ (a >> sign_shift)).view(bits)
        return np.maximum(top_bit(a).view(signed) - bias, none)

    def shift_amount(a: Any) -> Any:
        at = place(a)
        return (most - at | at >> sign_shift).astype(np.uint32)  # -1 where the place is -1

    run = shift_amount if words else lambda a: place(a).astype(np.uint32)
    return Op(run, (kind,), ("u32",))


@instruction("fns")
def fns(ins: Instruction, env: Env) -> Op:
    """fns.b32 d, mask, base, offset. A base over 31, which PTX leaves open, finds nothing."""
    only_type(ins, "b32")
    return Op(_nth_set_bit, ("b32", "u32", "s32"), ("b32",))


def _nth_set_bit(mask: Any, base: Any, offset: Any) -> Any:
    # Downwards is upwards in the mask reversed. Offset 0 asks for the bit at base itself. A base
    # over 31 shifts every bit out.
    down = offset < 0
    start = np.where(down, 31 - base, base)
    mask = np.where(down, _reversed(mask), mask) >> start
    rank = np.maximum(np.abs(offset.astype(np.int64)), 1)
    found = (np.bitwise_count(mask) >= rank) & ((offset != 0) | (mask & 1 == 1))
    place = start
    for width in (16, 8, 4, 2, 1):
        below = np.bitwise_count(mask & ((1 << width) - 1))
        above = below < rank
        rank = rank - below * above
        step = above.astype(np.uint32) * np.uint32(width)
        mask, place = mask >> step, place + step
    return np.where(found, np.where(down, 31 - place, place), constant(-1, "u32"))


def _reversed(a: Any) -> Any:
    flat = np.unpackbits(np.ascontiguousarray(a).view(np.uint8), bitorder="big")
    return np.packbits(flat, bitorder="little").view(a.dtype).byteswap()


@instruction("brev")
def brev(ins: Instruction, env: Env) -> Op:
    """brev.type d, a."""
    kind = only_type(ins, "b32", "b64")
    return Op(_reversed, (kind,), (kind,))


@instruction("bfe")
def bfe(ins: Instruction, env: Env) -> Op:
    """bfe.type d, a, b, c: c bits of a from bit b on; only the low 8 bits of b and c count."""
    kind = only_type(ins, "u32", "s32", "u64", "s64")
    width = int(kind[1:])
    dtype = DTYPES[kind]
    low8 = constant(255, "u32")
    start, length = (literal(operand) for operand in ins.operands[2:4])
    if start is not None and length is not None:
        return _bfe_constant(kind, start & 255, length & 255)
    most, ones = constant(width, "u32"), constant(-1, kind)
    if kind[0] == "u":

        def run(a: Any, b: Any, c: Any) -> Any:
            return (a >> (b & low8).astype(dtype)) & ~(ones << (c & low8).astype(dtype))
    else:

        def run(a: Any, b: Any, c: Any) -> Any:
            # Shift the field to the top and down again, which repeats its sign.
            unused = (most - np.minimum(c & low8, most)).astype(dtype)
            return a >> (b & low8).astype(dtype) << unused >> unused

    return Op(run, (kind, "u32", "u32"), (kind,))


def _bfe_constant(kind: str, start: int, length: int) -> Op:
    width = int(kind[1:])
    down = constant(start, kind)
    if kind[0] == "u":
        mask = constant((1 << length) - 1, kind)
        return Op(lambda a, b, c: (a >> down) & mask, (kind, "u32", "u32"), (kind,))
    unused = constant(width - min(length, width), kind)
    return Op(lambda a, b, c: a >> down << unused >> unused, (kind, "u32", "u32"), (kind,))


@instruction("bfi")
def bfi(ins: Instruction, env: Env) -> Op:
    """bfi.type f, a, b, c, d: b, with the low d bits of a at bit c; c and d as in bfe."""
    kind = only_type(ins, "b32", "b64")
    dtype = DTYPES[kind]
    low8, ones = constant(255, "u32"), constant(-1, kind)
    start, length = (literal(operand) for operand in ins.operands[3:5])
    if start is not None and length is not None:
        field = constant(((1 << (length & 255)) - 1) << (start & 255), kind)
        up = constant(start & 255, kind)
        return Op(
            lambda a, b, c, d: b ^ ((b ^ (a << up)) & field),
            (kind, kind, "u32", "u32"),
            (kind,),
        )

    def run(a: Any, b: Any, c: Any, d: Any) -> Any:
        at = (c & low8).astype(dtype)
        mask = ~(ones << (d & low8).astype(dtype)) << at
        return b ^ ((b ^ (a << at)) & mask)

    return Op(run, (kind, kind, "u32", "u32"), (kind,))


def _bit_count(ins: Instruction) -> Any:
    """For szext and bmsk: how .clamp or .wrap limits a number of bits."""
    low5, most = constant(31, "u32"), constant(32, "u32")
    if len(ins.modifiers) == 2 and ins.modifiers[0] == "clamp":
        return lambda n: np.minimum(n, most)
    if len(ins.modifiers) == 2 and ins.modifiers[0] == "wrap":
        return lambda n: n & low5
    raise unsupported(ins)


@instruction("szext")
def szext(ins: Instruction, env: Env) -> Op:
    """szext{.clamp,.wrap}.type d, a, b: the low b bits of a, sign or zero-extended."""
    limited = _bit_count(ins)
    kind = ins.modifiers[1]
    if kind not in ("u32", "s32"):
        raise unsupported(ins)
    dtype, most = DTYPES[kind], constant(32, "u32")

    def run(a: Any, b: Any) -> Any:
        unused = (most - limited(b)).astype(dtype)
        return a << unused >> unused

    return Op(run, (kind, "u32"), (kind,))


@instruction("bmsk")
def bmsk(ins: Instruction, env: Env) -> Op:
    """bmsk{.clamp,.wrap}.b32 d, a, b: b ones from bit a on."""
    limited = _bit_count(ins)
    if ins.modifiers[1] != "b32":
        raise unsupported(ins)
    ones = constant(-1, "u32")
    return Op(lambda a, b: ~(ones << limited(b)) << limited(a), ("u32", "u32"), ("b32",))
