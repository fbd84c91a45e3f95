"""setmaxnreg. PTX ISA "Miscellaneous Instructions: setmaxnreg"."""

from __future__ import annotations

from typing import Any

import numpy as np

from cumla.sim.cohort import WARP, Cohort
from cumla.sim.isa.table import Env, Op, Unsupported, instruction, needs
from cumla.sim.ptx.syntax import Immediate, Instruction
from cumla.sim.register_pool import RegisterPool

TARGETS = (90, 100, 103, 120, 121)


@instruction("setmaxnreg")
def setmaxnreg(ins: Instruction, env: Env) -> Op:
    """setmaxnreg.{inc,dec}.sync.aligned.u32 n: n is a constant, 24, 32 to 256."""
    if ins.modifiers[1:] != ("sync", "aligned", "u32") or ins.modifiers[0] not in ("inc", "dec"):
        raise Unsupported(f"form {ins.name!r}")
    needs(env, 90, ins, only=TARGETS)
    operand = ins.operands[0] if ins.operands else None
    if not isinstance(operand, Immediate):
        raise Unsupported(f"{ins.name!r} with a number of registers that is not a constant")
    action, count = ins.modifiers[0], int(operand.value)
    if not 24 <= count <= 256 or count % 8:
        raise Unsupported(f"{ins.name!r} of {count} registers: a multiple of 8 from 24 to 256")

    def ready(c: Cohort, number: Any) -> Any:
        warps = _pool(c).may_change(c, count, action)
        return bool(warps.all()) or c.from_warps(np.repeat(warps, WARP))

    def run(c: Cohort, number: Any) -> None:
        _pool(c).change(ins, c, count, action)

    def waits_for(c: Cohort, number: Any) -> str:
        return _pool(c).describe(c, count)

    return Op(run, ("u32",), cohort=True, ready=ready, waits_for=waits_for)


def _pool(c: Cohort) -> RegisterPool:
    """The registers of the wave's blocks, kept from the first setmaxnreg on."""
    if c.wave.registers is None:
        c.wave.registers = RegisterPool(c.wave)
    pool: RegisterPool = c.wave.registers
    return pool
