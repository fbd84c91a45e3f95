"""One instruction as a function of arrays, without an engine around it."""

from __future__ import annotations

from typing import Any

import numpy as np

from cumla.sim.isa import load_families
from cumla.sim.isa.table import DTYPES, Env, Op, lookup
from cumla.sim.ptx.syntax import Instruction, Operand, Register


def instruction(name: str, *operands: Operand) -> Instruction:
    """The instruction called `name` ("add.rn.f32"), with these operands or with none given."""
    opcode, *modifiers = name.split(".")
    return Instruction(opcode, tuple(modifiers), operands, None, 1, None, name, 0)


def op(name: str, *operands: Operand, target: int = 90, **env: Any) -> Op:
    """The Op of an instruction; without operands it is given eight registers."""
    load_families()
    if not operands:
        operands = tuple(Register(f"%r{i}") for i in range(8))
    ins = instruction(name, *operands)
    return lookup(ins)(ins, Env(target=target, **env))


def run(name: str, *sources: Any, target: int = 90) -> Any:
    """Result of a lane-wise instruction on arrays or numbers, cast to the types that it reads."""
    made = op(name, target=target)
    assert not made.cohort
    assert len(sources) == len(made.sources), made.sources
    arrays = []
    for value, kind in zip(sources, made.sources, strict=True):
        array = np.atleast_1d(np.asarray(value))
        if array.dtype != DTYPES[kind]:
            array = array.astype(DTYPES[kind])
        arrays.append(array)
    with np.errstate(all="ignore"):
        return made.run(*arrays)
