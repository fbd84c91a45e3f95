"""f64 arithmetic (PTX ISA "Floating Point Instructions").

NaN payloads pass through, as PTX ISA says; what NumPy does is what it does here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from cumla.sim.isa import exact
from cumla.sim.isa.approx import double_approximation
from cumla.sim.isa.extremes import double_extreme
from cumla.sim.isa.floating import Run, demand, options
from cumla.sim.isa.fused import fma_double
from cumla.sim.isa.rounding import constant
from cumla.sim.isa.table import Env, Op, instruction
from cumla.sim.ptx.syntax import Instruction

_NEAREST: dict[str, Run] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "rcp": partial(np.divide, constant(1.0, np.float64)),
    "sqrt": np.sqrt,
    "fma": fma_double,
}
_EXACT: dict[str, Any] = {
    "add": exact.add,
    "sub": exact.sub,
    "mul": exact.mul,
    "div": exact.div,
    "rcp": exact.rcp,
    "sqrt": exact.sqrt,
    "fma": exact.fma,
}
_COUNT = {"rcp": 1, "sqrt": 1, "fma": 3}


@instruction(
    "add.f64",
    "sub.f64",
    "mul.f64",
    "fma.f64",
    "mad.f64",
    "div.f64",
    "rcp.f64",
    "sqrt.f64",
    "rsqrt.f64",
)
def _arithmetic(ins: Instruction, env: Env) -> Op:
    name = "fma" if ins.opcode == "mad" else ins.opcode
    sources = ("f64",) * _COUNT.get(name, 2)
    if name == "rsqrt" or "approx" in ins.modifiers:
        return Op(double_approximation(ins), ("f64",), ("f64",))
    rounding, _ = options(ins, "rn rz rm rp")
    if name not in ("add", "sub", "mul"):
        demand(ins, rounding)
    if rounding in ("", "rn"):
        return Op(_NEAREST[name], sources, ("f64",))
    return Op(exact.lane_by_lane(_EXACT[name], rounding), sources, ("f64",))


_SIGN: dict[str, Run] = {"abs": np.absolute, "neg": np.negative}


@instruction("abs.f64", "neg.f64")
def _abs(ins: Instruction, env: Env) -> Op:
    options(ins, "")
    return Op(_SIGN[ins.opcode], ("f64",), ("f64",))


@instruction("copysign.f64")
def _copysign(ins: Instruction, env: Env) -> Op:
    options(ins, "")
    return Op(lambda a, b: np.copysign(b, a), ("f64", "f64"), ("f64",))


@instruction("min.f64", "max.f64")
def _min(ins: Instruction, env: Env) -> Op:
    options(ins, "")
    return Op(double_extreme(ins.opcode), ("f64", "f64"), ("f64",))
