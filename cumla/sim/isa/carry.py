"""Arithmetic with carry. PTX ISA "Extended-Precision Integer Arithmetic Instructions".

The carry of the condition code register, CC.CF, is one more source or result: of type "cc", a
bool array, always the last. After a subtraction it is the borrow, as the PTX ISA defines it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cumla.sim.isa.forms import unsupported
from cumla.sim.isa.product import product
from cumla.sim.isa.table import Env, Op, instruction
from cumla.sim.isa.values import unsigned
from cumla.sim.ptx.syntax import Instruction

TYPES = ("u32", "s32", "u64", "s64")


def _add(a: Any, b: Any) -> tuple[Any, Any]:
    total = a + b
    return total, total < a


def _add_with_carry(a: Any, b: Any, carry: Any) -> tuple[Any, Any]:
    partial = a + b
    total = partial + carry.astype(a.dtype)
    return total, (partial < a) | (total < partial)


def _subtract(a: Any, b: Any) -> tuple[Any, Any]:
    return a - b, a < b


def _subtract_with_borrow(a: Any, b: Any, borrow: Any) -> tuple[Any, Any]:
    partial = a - b
    borrow = borrow.astype(a.dtype)
    return partial - borrow, (a < b) | (partial < borrow)


def _result_only(run: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    return lambda *sources: run(*sources)[0]


def _op(
    ins: Instruction, run: Callable[..., tuple[Any, Any]], kind: str, reads: bool, writes: bool
) -> Op:
    if kind not in TYPES:
        raise unsupported(ins)
    kind = unsigned(kind)
    return Op(
        run if writes else _result_only(run),
        (kind, kind, "cc") if reads else (kind, kind),
        (kind, "cc") if writes else (kind,),
    )


def add_or_subtract_setting_carry(ins: Instruction) -> Op:
    """add.cc and sub.cc."""
    return _op(ins, _add if ins.opcode == "add" else _subtract, ins.modifiers[-1], False, True)


@instruction("addc", "subc")
def addc(ins: Instruction, env: Env) -> Op:
    """addc{.cc}.type d, a, b; subc{.cc}.type d, a, b."""
    if ins.modifiers[:-1] not in ((), ("cc",)) or not ins.modifiers:
        raise unsupported(ins)
    run = _add_with_carry if ins.opcode == "addc" else _subtract_with_borrow
    return _op(ins, run, ins.modifiers[-1], True, len(ins.modifiers) == 2)


def mad_setting_carry(ins: Instruction) -> Op:
    """mad{.hi,.lo}.cc."""
    return _mad(ins, ins.modifiers[0], ins.modifiers[-1], False, True)


@instruction("madc")
def madc(ins: Instruction, env: Env) -> Op:
    """madc{.hi,.lo}{.cc}.type d, a, b, c."""
    mode, *cc, kind = ins.modifiers if len(ins.modifiers) > 1 else ("", "")
    if cc not in ([], ["cc"]):
        raise unsupported(ins)
    return _mad(ins, mode, kind, True, bool(cc))


def _mad(ins: Instruction, mode: str, kind: str, reads: bool, writes: bool) -> Op:
    if mode not in ("lo", "hi") or kind not in TYPES:
        raise unsupported(ins)
    multiply = product(kind, mode)
    times = multiply.run
    total = _add_with_carry if reads else _add

    def run(a: Any, b: Any, c: Any, *carry: Any) -> tuple[Any, Any]:
        return total(times(a, b), c, *carry)

    sources = (multiply.source, multiply.source, multiply.result)
    return Op(
        run if writes else _result_only(run),
        (*sources, "cc") if reads else sources,
        (multiply.result, "cc") if writes else (multiply.result,),
    )
