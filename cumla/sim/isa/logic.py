"""Logic and shifts. PTX ISA "Logic and Shift Instructions".

NumPy's shifts by the width of the type or more give 0, or the sign for a right shift of a signed
type: PTX's clamping.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from cumla.sim.isa.forms import literal, only_type, unsupported
from cumla.sim.isa.table import DTYPES, Env, Op, Unsupported, instruction
from cumla.sim.isa.values import constant
from cumla.sim.ptx.syntax import Instruction, Pair

BITWISE: dict[str, Callable[..., Any]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction("and", "or", "xor")
def bitwise(ins: Instruction, env: Env) -> Op:
    """and.type, or.type, xor.type; .pred, .b16, .b32, .b64."""
    kind = only_type(ins, "pred", "b16", "b32", "b64")
    return Op(BITWISE[ins.opcode], (kind, kind), (kind,))


@instruction("not")
def invert(ins: Instruction, env: Env) -> Op:
    """not.type; .pred, .b16, .b32, .b64."""
    kind = only_type(ins, "pred", "b16", "b32", "b64")
    return Op(np.invert, (kind,), (kind,))


@instruction("cnot")
def cnot(ins: Instruction, env: Env) -> Op:
    """cnot.type: 1 where a is 0, else 0."""
    kind = only_type(ins, "b16", "b32", "b64")
    dtype, zero = DTYPES[kind], constant(0, kind)
    return Op(lambda a: np.equal(a, zero).astype(dtype), (kind,), (kind,))


@cache
def _formulas() -> dict[int, str]:
    """A shortest formula of &, |, ^ and ~ in a, b and c for each of the 256 truth tables.

    A table's bit 4a + 2b + c is the value of the function, so that those of a, b and c are 0xF0,
    0xCC and 0xAA, as PTX ISA "lop3" has them. Found by the number of operators: a formula of k is
    `~x`, or joins formulas x and y of k - 1 operators together.
    """
    formulas = {0xF0: "a", 0xCC: "b", 0xAA: "c"}
    by_cost = [list(formulas.items())]
    while len(formulas) < 256:
        new = {~table & 255: f"~{x}" for table, x in by_cost[-1]}
        for cost, joined in enumerate(reversed(by_cost)):
            for left, x in by_cost[cost]:
                for right, y in joined:
                    tables = left & right, left | right, left ^ right
                    for sign, table in zip("&|^", tables, strict=True):
                        if table not in formulas and table not in new:
                            new[table] = f"({x} {sign} {y})"
        by_cost.append([(table, x) for table, x in new.items() if table not in formulas])
        formulas.update(by_cost[-1])
    return formulas


@instruction("lop3")
def lop3(ins: Instruction, env: Env) -> Op:
    """lop3.b32 d, a, b, c, immLut; lop3{.or,.and}.b32 d|p, a, b, c, immLut, q."""
    words = [m for m in ins.modifiers if m != "b32"]
    if len(ins.modifiers) != len(words) + 1 or words not in ([], ["or"], ["and"]):
        raise unsupported(ins)
    paired = isinstance(ins.operands[0], Pair)
    table = literal(ins.operands[4])
    if table is None or paired != bool(words):
        raise Unsupported(f"operands of {ins.text!r}")
    formula = _formulas()[table & 255]
    run = eval(f"lambda a, b, c, _: {formula}")
    sources = ("b32", "b32", "b32", "u32")
    if not words:
        return Op(run, sources, ("b32",))
    combine, zero = BITWISE[words[0]], constant(0, "b32")

    def both(a: Any, b: Any, c: Any, lut: Any, q: Any) -> tuple[Any, Any]:
        d = run(a, b, c, lut)
        return d, combine(np.not_equal(d, zero), q)

    return Op(both, (*sources, "pred"), ("b32", "pred"))


@instruction("shf")
def shf(ins: Instruction, env: Env) -> Op:
    """shf{.l,.r}{.clamp,.wrap}.b32 d, a, b, c: 32 bits of the 64 of b:a, shifted by c."""
    if len(ins.modifiers) != 3 or ins.modifiers[2] != "b32":
        raise unsupported(ins)
    direction, mode, _ = ins.modifiers
    if direction not in ("l", "r") or mode not in ("clamp", "wrap"):
        raise unsupported(ins)
    sources, low5, most = ("b32", "b32", "u32"), constant(31, "u32"), constant(32, "u32")
    amount = literal(ins.operands[3])
    if amount is not None:
        amount &= 0xFFFFFFFF
        by = amount & 31 if mode == "wrap" else min(amount, 32)
        up = constant(by if direction == "l" else 32 - by, "u32")
        down = constant(32 - by if direction == "l" else by, "u32")
        return Op(lambda a, b, c: (b << up) | (a >> down), sources, ("b32",))

    def limited(c: Any) -> Any:
        return c & low5 if mode == "wrap" else np.minimum(c, most)

    def left(a: Any, b: Any, c: Any) -> Any:
        n = limited(c)
        return (b << n) | (a >> (most - n))

    def right(a: Any, b: Any, c: Any) -> Any:
        n = limited(c)
        return (b << (most - n)) | (a >> n)

    return Op(left if direction == "l" else right, sources, ("b32",))


@instruction("shl", "shr")
def shift(ins: Instruction, env: Env) -> Op:
    """shl{.b16,.b32,.b64} d, a, b; shr with those, .u and .s types; b is an .u32, clamped."""
    widths = ("16", "32", "64")
    letters = "b" if ins.opcode == "shl" else "bus"
    kind = only_type(ins, *(letter + width for letter in letters for width in widths))
    ufunc = np.left_shift if ins.opcode == "shl" else np.right_shift
    amount = literal(ins.operands[2])
    width = int(kind[1:])
    if width == 32:
        # An amount over 2^31 is negative as .s32; NumPy takes that for a large one, too.
        return Op(ufunc, (kind, kind), (kind,))
    if amount is not None and 0 <= amount < width:
        return Op(ufunc, (kind, kind), (kind,))  # the amount as a constant of a's type
    if width == 64:
        return Op(ufunc, (kind, "u32"), (kind,))
    dtype, most = DTYPES[kind], constant(width, "u32")
    return Op(lambda a, b: ufunc(a, np.minimum(b, most).astype(dtype)), (kind, "u32"), (kind,))
