"""Instructions that compute nothing. PTX ISA "Miscellaneous Instructions" and nanosleep."""

from __future__ import annotations

from typing import Any

from cumla.sim.cohort import Cohort
from cumla.sim.errors import KernelTrap
from cumla.sim.isa.table import Env, Op, Unsupported, instruction, nothing
from cumla.sim.ptx.syntax import Instruction

LONGEST_SLEEP = 1_000_000  # ns; PTX ISA "nanosleep": "The maximum sleep duration is 1 millisecond"

NO_EFFECT: dict[str, dict[tuple[str, ...], tuple[str, ...]]] = {
    "pmevent": {(): ("u32",), ("mask",): ("u32",)},
}


@instruction(*NO_EFFECT)
def no_effect(ins: Instruction, env: Env) -> Op:
    """pmevent{.mask} a."""
    kinds = NO_EFFECT[ins.opcode].get(ins.modifiers)
    if kinds is None:
        raise Unsupported(f"form {ins.name!r}")
    return Op(nothing, kinds, cohort=True)


@instruction("nanosleep")
def nanosleep(ins: Instruction, env: Env) -> Op:
    """nanosleep.u32 t: the wave's clock, which counts nanoseconds too, goes on by t."""
    if ins.modifiers != ("u32",):
        raise Unsupported(f"form {ins.name!r}")

    def run(c: Cohort, duration: Any) -> None:
        # All lanes wake together; PTX lets a lane sleep for any time from 0 to 2 t.
        c.wave.clock += min(int(duration.max()), LONGEST_SLEEP)

    return Op(run, ("u32",), cohort=True)


@instruction("trap", "brkpt")
def trap(ins: Instruction, env: Env) -> Op:
    """trap; brkpt (no debugger is there to go on from it)."""
    if ins.modifiers:
        raise Unsupported(f"form {ins.name!r}")

    def run(c: Cohort) -> None:
        raise KernelTrap(f"the kernel executed {ins.opcode}", c.wave.where(ins, int(c.gids[0])))

    return Op(run, (), cohort=True)
