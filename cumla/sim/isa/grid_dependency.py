"""griddepcontrol. PTX ISA "Parallel Synchronization: griddepcontrol"."""

from __future__ import annotations

from typing import Any

import numpy as np

from cumla.sim.cohort import Cohort
from cumla.sim.isa.table import Env, Op, Unsupported, instruction, needs
from cumla.sim.ptx.syntax import Instruction

_NOBODY = np.zeros(1, np.bool_)


@instruction("griddepcontrol")
def griddepcontrol(ins: Instruction, env: Env) -> Op:
    """griddepcontrol.launch_dependents and griddepcontrol.wait.

    In a launch that nothing depends on, and that depends on nothing, they do nothing.
    """
    needs(env, 90, ins)
    if ins.modifiers == ("launch_dependents",):
        return Op(_launch_dependents, (), cohort=True)
    if ins.modifiers != ("wait",):
        raise Unsupported(f"form {ins.name!r}")

    def run(c: Cohort) -> None:
        if c.wave.dependency is not None:
            c.wave.dependency.waited(ins, c)

    return Op(run, (), cohort=True, ready=_ready, waits_for=_waits_for)


def _launch_dependents(c: Cohort) -> None:
    if c.wave.dependency is not None:
        c.wave.dependency.launch_dependents(c.gids)


def _ready(c: Cohort) -> Any:
    return c.wave.dependency is None or c.wave.dependency.may_pass or _NOBODY


def _waits_for(c: Cohort) -> str:
    dependency = c.wave.dependency
    assert dependency is not None
    assert dependency.before is not None
    return f"the grid before it, kernel {dependency.before.grid.name}, to complete"
