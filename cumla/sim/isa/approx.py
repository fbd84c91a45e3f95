"""Approximations: the instructions with `.approx` or `.full`.

PTX ISA bounds their errors and defines their results for infinities, zeros and subnormal numbers.
These are closer than the bounds, mostly the nearest value; a GPU's differ in their last bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from cumla.sim.isa.floating import ONE, Array, Run, binary, flushing, options, packed, unary
from cumla.sim.isa.rounding import (
    constant,
    double_to_odd_single,
    flush,
    look_up,
    single_to_bf16,
)
from cumla.sim.isa.table import Env, Op, Unsupported, instruction
from cumla.sim.ptx.syntax import Instruction


def _reciprocal(a: Array) -> Array:
    return np.divide(ONE, a)


_product = binary(np.multiply)


def _quotient(a: Array, b: Array) -> Array:
    """div.approx: a * (1 / b), where a subnormal reciprocal, from |b| > 2**126, counts as 0."""
    return _product(a, flush(_reciprocal(b)))


_SINGLE: dict[str, Run] = {
    "rcp": unary(_reciprocal),
    "sqrt": unary(np.sqrt),
    # Two roundings: within 2**-23, where the bound is 2**-22.9.
    "rsqrt": unary(lambda a: np.divide(ONE, np.sqrt(a))),
    "sin": unary(np.sin),
    "cos": unary(np.cos),
    "lg2": unary(np.log2),
    "ex2": unary(np.exp2),
    "tanh": unary(np.tanh),
}


def single_approximation(ins: Instruction) -> Run:
    """An f32 function with `.approx`, or div with `.full`."""
    _, flags = options(ins, "approx full ftz" if ins.opcode == "div" else "approx ftz")
    if len(flags & {"approx", "full"}) != 1:
        raise Unsupported(f"{ins.name} without .approx")
    if ins.opcode != "div":
        run = _SINGLE[ins.opcode]
    else:
        run = _quotient if "approx" in flags else binary(np.divide)
    return flushing(run) if "ftz" in flags else run


@instruction("rsqrt.f32", "sin.f32", "cos.f32", "lg2.f32", "ex2.f32", "tanh.f32")
def _single(ins: Instruction, env: Env) -> Op:
    if ins.opcode == "tanh" and "ftz" in ins.modifiers:
        raise Unsupported("modifier .ftz of tanh.f32")
    return Op(single_approximation(ins), ("f32",), ("f32",))


_HIGH_WORD = constant(0xFFFFFFFF00000000, np.uint64)
_HALF_UNIT = constant(1 << 31, np.uint64)
_HIGH_NAN = constant(0x7FFFFFFF00000000, np.uint64).view(np.float64)
_DOUBLE_ONE = constant(1.0, np.float64)
_LEAST_DOUBLE = constant(2.0**-1022, np.float64)


def _flush_double(x: Array) -> Array:
    return x * (np.abs(x) >= _LEAST_DOUBLE)


def _gross(run: Run) -> Run:
    """Of f64 with 20 bits of mantissa: the low word is neither looked at nor filled."""

    def rough(a: Array) -> Array:
        high = np.bitwise_and(a.view(np.uint64), _HIGH_WORD).view(np.float64)
        result = _flush_double(run(_flush_double(high)))
        nearest = np.bitwise_and(result.view(np.uint64) + _HALF_UNIT, _HIGH_WORD)
        return np.where(np.isnan(result), _HIGH_NAN, nearest.view(np.float64))

    return rough


_DOUBLE: dict[str, Run] = {
    "rcp": lambda a: np.divide(_DOUBLE_ONE, a),
    "rsqrt": lambda a: np.divide(_DOUBLE_ONE, np.sqrt(a)),
}


def double_approximation(ins: Instruction) -> Run:
    """rcp.approx.ftz.f64, rsqrt.approx.ftz.f64 and rsqrt.approx.f64."""
    _, flags = options(ins, "approx ftz")
    needed = {"approx"} if ins.opcode == "rsqrt" else {"approx", "ftz"}
    if ins.opcode not in _DOUBLE or not needed <= flags:
        raise Unsupported(f"{ins.name}: f64 has rcp.approx.ftz, rsqrt.approx and its .ftz")
    run = _DOUBLE[ins.opcode]
    return _gross(run) if "ftz" in flags else run


_HALF: dict[str, Any] = {"ex2": np.exp2, "tanh": np.tanh}
_ALL_BITS = np.arange(1 << 16, dtype=np.uint32)


@cache
def _half_table(name: str, kind: str, ftz: bool) -> Array:
    """The nearest results, as bits, of a function of f16 or bf16 for all bits of the operand.

    With `ftz` only results are flushed: of a subnormal operand and of zero ex2 is 1.
    """
    if kind == "f16":
        values = _ALL_BITS.astype(np.uint16).view(np.float16).astype(np.float64)
        least = 2.0**-14
    else:
        values = (_ALL_BITS << 16).view(np.float32).astype(np.float64)
        least = 2.0**-126
    with np.errstate(all="ignore"):
        results = _HALF[name](values)
        if kind == "f16":
            bits = results.astype(np.float16).view(np.uint16)
        else:
            bits = single_to_bf16(double_to_odd_single(results), "rn")
        if ftz:
            bits[np.abs(results) < least] = 0
        bits[np.isnan(results)] = 0x7FFF
    return bits


@instruction("ex2.f16", "ex2.f16x2", "ex2.bf16", "ex2.bf16x2")
@instruction("tanh.f16", "tanh.f16x2", "tanh.bf16", "tanh.bf16x2")
def _half(ins: Instruction, env: Env) -> Op:
    """Every result is looked up: with 16 bits there are few."""
    whole = ins.modifiers[-1]
    kind = whole.removesuffix("x2")
    _, flags = options(ins, "approx ftz" if ins.opcode == "ex2" else "approx")
    if "approx" not in flags:
        raise Unsupported(f"{ins.name} without .approx")
    if ins.opcode == "ex2" and ("ftz" in flags) != (kind == "bf16"):
        raise Unsupported(f"{ins.name}: .ftz belongs to bf16")
    table = _half_table(ins.opcode, kind, "ftz" in flags)

    def run(a: Array) -> Array:
        return look_up(table, a)

    if whole.endswith("x2"):
        return Op(packed(run, np.uint32, np.uint16), (whole,), (whole,))
    if kind == "f16":
        return Op(lambda a: run(a.view(np.uint16)).view(np.float16), (kind,), (kind,))
    return Op(run, (kind,), (kind,))
