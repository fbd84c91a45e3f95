"""mma.sync: products of matrices that the lanes of a warp hold in registers.

What the numbers are is said in mma_panels.py; f64 forms are chains of fused multiply-adds over k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP, Cohort
from cumla.sim.isa.convergence import waits_for_lanes, whole_warps
from cumla.sim.isa.fused import fma_double
from cumla.sim.isa.mma_chains import Chain, Link, arrange
from cumla.sim.isa.mma_forms import KINDS, Form, parse
from cumla.sim.isa.mma_panels import Panels
from cumla.sim.isa.table import Env, Op, Unsupported, instruction
from cumla.sim.ptx.syntax import Instruction, Operand, Sink, Vector

Array = NDArray[Any]


@instruction("mma")
def mma(ins: Instruction, env: Env) -> Op:
    """mma.sync.aligned.shape.row.col.dtype.atype.btype.ctype d, a, b, c; dense, without scales."""
    form = parse(ins)
    if len(ins.operands) != 4:
        raise Unsupported(f"{len(ins.operands)} operands")
    counts = form.registers()
    found = tuple(len(items(o)) for o in ins.operands)
    if found != counts and not isinstance(ins.operands[0], Sink):
        raise Unsupported(f"operands of {found} registers, {counts} expected")
    if form.a == "f64":
        return _double(ins, env, form)
    d, a, b, c = counts
    link = Link(tuple(range(a)), tuple(range(a, a + b)), list(enumerate(range(d))))
    panels = arrange(form, [Chain(tuple(range(a + b, a + b + c)), [link])])
    kinds = ("b32",) * (a + b) + (KINDS[form.c],) * c
    return panels_op([ins], env, form, panels, kinds, d)


def items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def panels_op(
    instructions: Sequence[Instruction],
    env: Env,
    form: Form,
    panels: Sequence[Panels],
    sources: tuple[str, ...],
    results: int,
) -> Op:
    """The Op of mma instructions that are worked on as panels."""

    def run(c: Cohort, *values: Array) -> Any:
        if env.count:
            for ins in instructions:
                c.wave.counters.flops(ins, c, form.flops)
        lanes = c.n
        if not c.whole:
            lanes = c.warps.shape[0] * WARP
            values = tuple(v if v.shape[0] == 1 else c.to_warps(v).reshape(-1) for v in values)
        made: list[Any] = [None] * results
        for panel in panels:
            panel.run(values, lanes, made)
        if not c.whole:
            made = [c.from_warps(x) for x in made]
        return made[0] if results == 1 else tuple(made)

    return Op(
        run,
        sources,
        (KINDS[form.d],) * results,
        cohort=True,
        ready=whole_warps,
        waits_for=lambda c, *_: waits_for_lanes(instructions[0], c),
        warp_gate=True,
    )


def _double(ins: Instruction, env: Env, form: Form) -> Op:
    """f64: for each element C, then A * B for k = 0, 1, ... by fused multiply-add."""
    halves, steps = form.halves, form.steps

    def run(c: Cohort, *values: Array) -> tuple[Array, ...]:
        if env.count:
            c.wave.counters.flops(ins, c, form.flops)
        # [register, warp, g, t]
        registers = np.stack([c.to_warps(v).reshape(-1, 8, 4) for v in values])
        a = registers[: halves * steps].reshape(steps, halves, -1, 8, 4)
        b = registers[halves * steps :][:steps]
        accumulators = registers[halves * steps + steps :].reshape(halves, 2, -1, 8, 4)
        total = accumulators.transpose(0, 2, 3, 4, 1).reshape(halves, -1, 8, 8)
        for step in range(steps):
            for t in range(4):
                pair = a[step, ..., t, None], b[step, :, None, :, t]
                each = (x.reshape(-1) for x in np.broadcast_arrays(*pair, total))
                total = fma_double(*each).reshape(total.shape)
        results = total.reshape(halves, -1, 8, 4, 2).transpose(0, 4, 1, 2, 3)
        return tuple(c.from_warps(d) for d in results.reshape(halves * 2, -1, WARP))

    d, a, b, c = form.registers()
    return Op(
        run,
        ("f64",) * (a + b + c),
        ("f64",) * d,
        cohort=True,
        ready=whole_warps,
        waits_for=lambda c, *_: waits_for_lanes(ins, c),
        warp_gate=True,
    )
