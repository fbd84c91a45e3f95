"""Short PTX texts for tests of the parser, with what they need around them."""

from __future__ import annotations

from cumla.sim.ptx import parse
from cumla.sim.ptx.syntax import (
    Function,
    Immediate,
    Module,
    Operand,
    Register,
    Variable,
)

CALLED = """
.func (.reg .u32 rv) f(.reg .u32 a, .param .b32 b);
.func g(.param .b32 a);
.func h();
"""

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n"
REGISTERS = """
.reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<8>; .reg .b64 %rd<8>;
.reg .f32 %f<8>; .reg .f64 %fd<4>; .reg .v4 .f32 v4; .reg .v2 .b32 v2;
"""


def module(text: str) -> Module:
    return parse(HEADER + text)


def kernel(body: str, before: str = "") -> Function:
    """The kernel `k` with some registers and this body."""
    made = module(f"{before}\n.visible .entry k(.param .u64 a)\n{{{REGISTERS}{body}\n}}")
    return made.functions["k"]


def operands(text: str) -> tuple[Operand, ...]:
    """Operands of an instruction that may name `arr`, `dyn` and the registers above."""
    before = ".global .u32 arr[4]; .extern .shared .align 16 .b8 dyn[];"
    (ins,) = kernel(text, before).instructions
    return ins.operands


def variable(text: str) -> Variable:
    """The last variable of the text."""
    return list(module(text).variables.values())[-1]


def R(name: str) -> Register:
    return Register(name)


def immediate(text: str) -> Immediate:
    value = operands(f"mov.b64 %rd1, {text};")[1]
    assert isinstance(value, Immediate)
    return value
