"""Integer arithmetic. PTX ISA "Integer Arithmetic Instructions".

Where the bits of a result do not depend on the sign, signed types are computed as unsigned ones.
Instructions on bit fields are in bits.py, those with a carry in carry.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product as pairs
from typing import Any

import numpy as np

from cumla.sim.isa.carry import add_or_subtract_setting_carry, mad_setting_carry
from cumla.sim.isa.forms import literal, only_type, unsupported
from cumla.sim.isa.product import WIDE, product
from cumla.sim.isa.table import DTYPES, Env, Op, instruction
from cumla.sim.isa.values import aligned, constant, parts, unsigned
from cumla.sim.ptx.syntax import Instruction

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
SIGNED = ("s16", "s32", "s64")
PACKED = {"u16x2": np.dtype(np.uint16), "s16x2": np.dtype(np.int16)}


def _typed(opcodes: tuple[str, ...], *kinds: str) -> Callable[..., Any]:
    return instruction(*(f"{opcode}.{kind}" for opcode, kind in pairs(opcodes, kinds)))


def _packed(ufunc: Callable[..., Any], element: Any) -> Op:
    """A function of two 32-bit registers, applied to the halves of each."""

    def run(a: Any, b: Any) -> Any:
        a, b = aligned(a, b)
        return ufunc(a.view(element), b.view(element)).view(np.uint32)

    return Op(run, ("b32", "b32"), ("b32",))


LOWEST, HIGHEST = constant(-(2**31), "s64"), constant(2**31 - 1, "s64")


def _saturated(wide: Any) -> Any:
    """int64 sums, limited to the range of .s32."""
    return np.minimum(np.maximum(wide, LOWEST), HIGHEST).astype(np.int32)


@_typed(("add", "sub"), *INTEGERS, *PACKED)
def add(ins: Instruction, env: Env) -> Op:
    """add.type, sub.type; .sat.s32; .cc.type; add{.u16x2,.s16x2}."""
    *words, kind = ins.modifiers
    ufunc = np.add if ins.opcode == "add" else np.subtract
    if words == ["cc"]:
        return add_or_subtract_setting_carry(ins)
    if words == ["sat"] and kind == "s32":
        return Op(lambda a, b: _saturated(ufunc(a, b, dtype=np.int64)), ("s32", "s32"), ("s32",))
    if words:
        raise unsupported(ins)
    if kind in PACKED:
        if ins.opcode == "sub":
            raise unsupported(ins)
        return _packed(ufunc, np.uint16)
    kind = unsigned(kind)
    return Op(ufunc, (kind, kind), (kind,))


@_typed(("mul",), *INTEGERS)
def mul(ins: Instruction, env: Env) -> Op:
    """mul{.lo,.hi,.wide}.type d, a, b."""
    mode, kind = _mode(ins)
    if mode == "wide":
        factor = literal(ins.operands[2])
        if factor is not None:
            return _times_constant(constant(factor, kind), kind)
    multiply = product(kind, mode)
    return Op(multiply.run, (multiply.source, multiply.source), (multiply.result,))


def _mode(ins: Instruction) -> tuple[str, str]:
    if len(ins.modifiers) != 2:
        raise unsupported(ins)
    mode, kind = ins.modifiers
    if mode not in ("lo", "hi", "wide") or (mode == "wide" and kind not in WIDE):
        raise unsupported(ins)
    return mode, kind


def _times_constant(factor: Any, kind: str) -> Op:
    """mul.wide by a literal, the commonest step of address arithmetic."""
    wide = DTYPES[WIDE[kind]]
    widened = factor.astype(wide)

    def run(a: Any, _: Any) -> Any:
        result = a.astype(wide)
        result *= widened
        return result

    return Op(run, (kind, kind), (WIDE[kind],))


@_typed(("mad",), *INTEGERS)
def mad(ins: Instruction, env: Env) -> Op:
    """mad{.lo,.hi,.wide}.type d, a, b, c; mad.hi.sat.s32; mad{.lo,.hi}.cc.type."""
    if ins.modifiers == ("hi", "sat", "s32"):
        return Op(
            lambda a, b, c: _saturated((np.multiply(a, b, dtype=np.int64) >> 32) + c),
            ("s32", "s32", "s32"),
            ("s32",),
        )
    if len(ins.modifiers) == 3 and ins.modifiers[1] == "cc":
        return mad_setting_carry(ins)
    multiply = product(*reversed(_mode(ins)))
    times = multiply.run
    return Op(
        lambda a, b, c: times(a, b) + c,
        (multiply.source, multiply.source, multiply.result),
        (multiply.result,),
    )


@instruction("mul24", "mad24")
def mul24(ins: Instruction, env: Env) -> Op:
    """mul24{.hi,.lo}.type d, a, b; mad24{.hi,.lo}.type d, a, b, c; mad24.hi.sat.s32.

    Of each factor only the low 24 bits are read; .hi gives bits 47..16 of the product.
    """
    if len(ins.modifiers) < 2:
        raise unsupported(ins)
    mode, *sat, kind = ins.modifiers
    adds = ins.opcode == "mad24"
    if mode not in ("hi", "lo") or kind not in ("u32", "s32"):
        raise unsupported(ins)
    if sat and (sat != ["sat"] or not adds or (mode, kind) != ("hi", "s32")):
        raise unsupported(ins)
    wide = DTYPES[WIDE[kind]]
    eight = constant(8, kind)
    shift = constant(16 if mode == "hi" else 0, WIDE[kind])

    def times(a: Any, b: Any) -> Any:
        return np.multiply(a << eight >> eight, b << eight >> eight, dtype=wide) >> shift

    if sat:
        # c may be added to the product's bits 47..16 only when those are read as an .s32.
        return Op(
            lambda a, b, c: _saturated(np.add(times(a, b).astype(np.int32), c, dtype=np.int64)),
            (kind, kind, kind),
            (kind,),
        )
    narrow = DTYPES[kind]
    if adds:
        return Op(lambda a, b, c: times(a, b).astype(narrow) + c, (kind, kind, kind), (kind,))
    return Op(lambda a, b: times(a, b).astype(narrow), (kind, kind), (kind,))


@instruction("sad")
def sad(ins: Instruction, env: Env) -> Op:
    """sad.type d, a, b, c: |a - b| + c."""
    kind = only_type(ins, *INTEGERS)
    return Op(lambda a, b, c: np.maximum(a, b) - np.minimum(a, b) + c, (kind, kind, kind), (kind,))


@_typed(("div", "rem"), *INTEGERS)
def div(ins: Instruction, env: Env) -> Op:
    """div.type, rem.type, rounding towards zero.

    PTX leaves division by zero open; here the quotient is all ones and the remainder is the
    dividend, as the unsigned division of the hardware gives. The lowest number divided by -1
    wraps to itself, with remainder 0.
    """
    kind = only_type(ins, *INTEGERS)
    divides = ins.opcode == "div"
    ones = constant(-1, kind)

    def fixed(result: Any, a: Any, b: Any) -> Any:
        if b.all():
            return result
        return np.where(b == 0, ones if divides else a, result)

    if kind[0] == "u":
        ufunc = np.floor_divide if divides else np.remainder
        return Op(lambda a, b: fixed(ufunc(a, b), a, b), (kind, kind), (kind,))
    top = constant(DTYPES[kind].itemsize * 8 - 1, kind)
    signed, magnitude = DTYPES[kind], DTYPES[unsigned(kind)]

    def quotient(a: Any, b: Any) -> Any:
        sign = (a ^ b) >> top  # -1 where the quotient is negative: (x ^ -1) + 1 is -x
        size = np.abs(a).view(magnitude) // np.abs(b).view(magnitude)
        return fixed((size.view(signed) ^ sign) - sign, a, b)

    def remainder(a: Any, b: Any) -> Any:
        sign = a >> top
        size = np.abs(a).view(magnitude) % np.abs(b).view(magnitude)
        return fixed((size.view(signed) ^ sign) - sign, a, b)

    return Op(quotient if divides else remainder, (kind, kind), (kind,))


@_typed(("abs", "neg"), *SIGNED)
def absolute(ins: Instruction, env: Env) -> Op:
    """abs.type, neg.type; the lowest number stays what it is."""
    kind = only_type(ins, *SIGNED)
    if ins.opcode == "neg":
        return Op(np.negative, (unsigned(kind),), (unsigned(kind),))
    return Op(np.abs, (kind,), (kind,))


@_typed(("min", "max"), *INTEGERS, *PACKED, "relu")
def minimum(ins: Instruction, env: Env) -> Op:
    """min, max {.u16x2,.s16x2,.u16,...,.s64}; {.relu} with .s32 and .s16x2, before or after it."""
    words = [m for m in ins.modifiers if m != "relu"]
    relu = len(ins.modifiers) - len(words)
    if len(words) != 1 or words[0] not in (*INTEGERS, *PACKED):
        raise unsupported(ins)
    kind = words[0]
    if relu and (relu > 1 or kind not in ("s32", "s16x2")):
        raise unsupported(ins)
    ufunc: Callable[..., Any] = np.minimum if ins.opcode == "min" else np.maximum
    if relu:
        ufunc = _relu(ufunc, constant(0, kind.removesuffix("x2")))
    if kind in PACKED:
        return _packed(ufunc, PACKED[kind])
    return Op(ufunc, (kind, kind), (kind,))


def _relu(ufunc: Callable[..., Any], zero: Any) -> Callable[..., Any]:
    return lambda a, b: np.maximum(ufunc(a, b), zero)


@instruction("dp4a")
def dp4a(ins: Instruction, env: Env) -> Op:
    """dp4a.atype.btype d, a, b, c: c plus the dot product of four bytes."""
    if len(ins.modifiers) != 2:
        raise unsupported(ins)
    a_byte, b_byte = (_part(ins, kind, 1) for kind in ins.modifiers)

    def run(a: Any, b: Any, c: Any) -> Any:
        a, b = aligned(a, b)
        terms = np.multiply(a.view(a_byte), b.view(b_byte), dtype=np.int32).reshape(-1, 4)
        return terms[:, 0] + terms[:, 1] + (terms[:, 2] + terms[:, 3]) + c

    return Op(run, ("b32", "b32", "s32"), ("s32",))


@instruction("dp2a")
def dp2a(ins: Instruction, env: Env) -> Op:
    """dp2a{.lo,.hi}.atype.btype d, a, b, c: c plus two halves of a times two bytes of b."""
    if len(ins.modifiers) != 3 or ins.modifiers[0] not in ("lo", "hi"):
        raise unsupported(ins)
    first = 0 if ins.modifiers[0] == "lo" else 2
    a_half, b_byte = _part(ins, ins.modifiers[1], 2), _part(ins, ins.modifiers[2], 1)

    def run(a: Any, b: Any, c: Any) -> Any:
        chosen = parts(b, b_byte)[:, first : first + 2]
        terms = np.multiply(parts(a, a_half), chosen, dtype=np.int32)
        return terms[:, 0] + terms[:, 1] + c

    return Op(run, ("b32", "b32", "s32"), ("s32",))


def _part(ins: Instruction, kind: str, size: int) -> Any:
    if kind not in ("u32", "s32"):
        raise unsupported(ins)
    return np.dtype(f"{'u' if kind == 'u32' else 'i'}{size}")
