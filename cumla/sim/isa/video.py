"""Video instructions. PTX ISA "Scalar Video Instructions" and "SIMD Video Instructions".

Without selectors (`a.b0`, `d.h1`), vshl, vshr and vmad: those are Unsupported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from cumla.sim.isa.forms import unsupported
from cumla.sim.isa.table import Env, Op, Unsupported, instruction
from cumla.sim.isa.values import aligned, constant
from cumla.sim.ptx.syntax import Instruction, Register

Function = Callable[..., Any]


def _average(a: Any, b: Any) -> Any:
    total = a + b
    return total + (total >= 0) >> 1


ARITHMETIC: dict[str, Function] = {
    "vadd": np.add,
    "vsub": np.subtract,
    "vavrg": _average,
    "vabsdiff": lambda a, b: np.abs(a - b),
    "vmin": np.minimum,
    "vmax": np.maximum,
}
COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
SECONDARY: dict[str, Function] = {"add": np.add, "min": np.minimum, "max": np.maximum}


def _types(ins: Instruction, *kinds: str) -> list[bool]:
    """Which of these types are signed; the operands must have no selectors."""
    for operand in ins.operands:
        if isinstance(operand, Register) and re.search(r"\.[bh]\d+$", operand.name):
            raise Unsupported(f"selector in {ins.text!r}")
    if not {*kinds} <= {"u32", "s32"}:
        raise unsupported(ins)
    return [kind == "s32" for kind in kinds]


def _part(width: int, signed: bool) -> Any:
    return np.dtype(f"{'i' if signed else 'u'}{width // 8}")


def _limits(width: int, signed: bool) -> tuple[Any, Any]:
    if signed:
        return constant(-(1 << width - 1), "s64"), constant((1 << width - 1) - 1, "s64")
    return constant(0, "s64"), constant((1 << width) - 1, "s64")


def _parse(ins: Instruction) -> tuple[Function, list[bool], list[str]]:
    """(operation, signs of result, a and b, the words after the types)."""
    name, words = ins.opcode.rstrip("24"), list(ins.modifiers)
    if name == "vset" and words[2:] and words[2] in COMPARISONS:
        return COMPARISONS[words[2]], [False, *_types(ins, *words[:2])], words[3:]
    if name == "vset" or len(words) < 3:
        raise unsupported(ins)
    return ARITHMETIC[name], _types(ins, *words[:3]), words[3:]


@instruction("vadd", "vsub", "vabsdiff", "vmin", "vmax", "vset")
def scalar(ins: Instruction, env: Env) -> Op:
    """vop.dtype.atype.btype{.sat}{.op2} d, a, b{, c}; vset.atype.btype.cmp{.op2}."""
    operation, (d_sign, a_sign, b_sign), words = _parse(ins)
    saturates = words[:1] == ["sat"] and ins.opcode != "vset"
    second = words[saturates:]
    if len(second) > 1 or not SECONDARY.keys() >= {*second}:
        raise unsupported(ins)
    low, high = _limits(32, d_sign)
    kinds = ("s32" if a_sign else "u32", "s32" if b_sign else "u32")
    kind = "s32" if d_sign else "u32"
    dtype = _part(32, d_sign)

    def first(a: Any, b: Any) -> Any:
        result = operation(a.astype(np.int64), b.astype(np.int64)).astype(np.int64)
        if saturates:
            result = np.minimum(np.maximum(result, low), high)
        return result.astype(dtype)

    if not second:
        return Op(first, kinds, (kind,))
    combine = SECONDARY[second[0]]
    return Op(lambda a, b, c: combine(first(a, b), c), (*kinds, kind), (kind,))


SIMD = tuple(
    f"{name}{count}"
    for name in ("vadd", "vsub", "vavrg", "vabsdiff", "vmin", "vmax", "vset")
    for count in (2, 4)
)


@instruction(*SIMD)
def simd(ins: Instruction, env: Env) -> Op:
    """vop{2,4}.dtype.atype.btype{.sat,.add} d, a, b, c; vset{2,4}.atype.btype.cmp{.add}.

    With .add the result is c plus all the parts, else the parts themselves.
    """
    operation, (d_sign, a_sign, b_sign), words = _parse(ins)
    if words not in ([], ["add"], ["sat"]) or (words == ["sat"] and "vset" in ins.opcode):
        raise unsupported(ins)
    count = int(ins.opcode[-1])
    width = 32 // count
    low, high = _limits(width, d_sign)
    part, a_part, b_part = (_part(width, sign) for sign in (d_sign, a_sign, b_sign))

    def run(a: Any, b: Any, c: Any) -> Any:
        a, b = aligned(a, b)
        parts = operation(a.view(a_part).astype(np.int32), b.view(b_part).astype(np.int32))
        if words == ["add"]:
            parts = parts.astype(np.int32, copy=False).reshape(-1, count)
            total = parts[:, 0] + parts[:, 1]
            if count == 4:
                total += parts[:, 2] + parts[:, 3]
            return total.view(np.uint32) + c
        if words == ["sat"]:
            parts = np.minimum(np.maximum(parts, low), high)
        return parts.astype(part).view(np.uint32)

    return Op(run, ("b32", "b32", "b32"), ("b32",))
