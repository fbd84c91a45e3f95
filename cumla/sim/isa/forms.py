"""Reading an instruction when it is specialised."""

from __future__ import annotations

from cumla.sim.isa.table import Unsupported
from cumla.sim.ptx.syntax import Immediate, Instruction, Operand


def unsupported(ins: Instruction) -> Unsupported:
    """The error for a combination of modifiers that PTX or this file does not have."""
    return Unsupported(f"form {ins.name!r}")


def only_type(ins: Instruction, *kinds: str) -> str:
    """The one modifier of an instruction: its type, one of `kinds`."""
    if len(ins.modifiers) != 1 or ins.modifiers[0] not in kinds:
        raise unsupported(ins)
    return ins.modifiers[0]


def literal(operand: Operand) -> int | None:
    """The value of an integer literal; None for other operands."""
    if isinstance(operand, Immediate) and isinstance(operand.value, int):
        return operand.value
    return None
