"""f32 and f32x2 arithmetic, and f32 with f16 or bf16 operands.

PTX ISA "Floating Point Instructions" and "Mixed Precision Floating Point Instructions". abs, neg
and copysign change nothing but the sign bit, of a NaN too; all else returns the canonical NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cumla.sim.isa.approx import single_approximation
from cumla.sim.isa.extremes import single_extreme
from cumla.sim.isa.floating import (
    ONE,
    Array,
    Run,
    binary,
    canonical,
    demand,
    flushing,
    options,
    packed,
    saturate,
    then,
    unary,
)
from cumla.sim.isa.fused import fma_single, fma_single_directed
from cumla.sim.isa.rounding import (
    U32,
    any_small,
    bf16_to_single,
    constant,
    double_to_single,
    flush,
    half_to_single,
    squares_below,
)
from cumla.sim.isa.table import Env, Op, Unsupported, instruction
from cumla.sim.ptx.syntax import Instruction

# From 2**-95 on, an operand below 2**-126 does not change the nearest value to a sum; and a sum
# that is zero stays that zero.
_FAR = constant(0x70000000, U32)
# A subnormal factor times one below 2**20 is below 2**-106, which does not change the nearest
# value to a sum of 2**-50 or more either, unless the sum is halfway between two f32 without it.
_FACTORS = 2.0**40  # the sum of their squares
_RESULT = constant(2.0**-50, np.float32)


def _directed_mul(a: Array, b: Array, mode: str) -> Array:
    return canonical(double_to_single(np.multiply(a, b, dtype=np.float64), mode))


def _directed_div(a: Array, b: Array, mode: str) -> Array:
    # A quotient of 24-bit numbers that is not one itself is 2**-48 of it or more away from all of
    # them, so its nearest f64 lies between the same two f32. So does that of a square root.
    return canonical(double_to_single(np.divide(a, b, dtype=np.float64), mode))


def _directed_sqrt(a: Array, mode: str) -> Array:
    return canonical(double_to_single(np.sqrt(a, dtype=np.float64), mode))


_NEAREST: dict[str, Run] = {
    "add": binary(np.add),
    "sub": binary(np.subtract),
    "mul": binary(np.multiply),
    "div": binary(np.divide),
    "sqrt": unary(np.sqrt),
    "fma": fma_single,
}
_DIRECTED: dict[str, Callable[..., Array]] = {
    "add": lambda a, b, mode: fma_single_directed(a, ONE, b, mode),
    "sub": lambda a, b, mode: fma_single_directed(a, ONE, np.negative(b), mode),
    "mul": _directed_mul,
    "div": _directed_div,
    "sqrt": _directed_sqrt,
    "fma": fma_single_directed,
}


def _arithmetic(name: str, rounding: str, flags: frozenset[str]) -> Run:
    if rounding in ("", "rn"):
        run = _NEAREST[name]
    else:
        general = _DIRECTED[name]

        def run(*sources: Array) -> Array:
            return general(*sources, rounding)

    if "ftz" in flags:
        run = _FLUSHING.get(run, flushing)(run)
    if "sat" in flags:
        run = then(saturate, run)
    return run


def _flushing_sum(run: Run) -> Run:
    """`flushing`, but look at the result alone where that is enough."""
    slow = flushing(run)

    def fast(a: Array, b: Array) -> Array:
        result = run(a, b)
        return slow(a, b) if any_small(result, _FAR) else result

    return fast


def _flushing_product(run: Run) -> Run:
    """`flushing` for mul and fma, but do not look for subnormal factors where none can matter.

    An addend is an f32, so that with a factor that is subnormal no sum is close to halfway.
    """
    slow = flushing(run)

    def fast(a: Array, b: Array, *c: Array) -> Array:
        result = run(a, b, *map(flush, c))
        if (
            squares_below(a, _FACTORS)
            and squares_below(b, _FACTORS)
            and not np.count_nonzero(np.abs(result) < _RESULT)
        ):
            return result
        return slow(a, b, *c)

    return fast


_FLUSHING: dict[Run, Callable[[Run], Run]] = {
    _NEAREST["add"]: _flushing_sum,
    _NEAREST["sub"]: _flushing_sum,
    _NEAREST["mul"]: _flushing_product,
    _NEAREST["fma"]: _flushing_product,
}


@instruction("add.f32", "sub.f32", "mul.f32")
def _add(ins: Instruction, env: Env) -> Op:
    run = _arithmetic(ins.opcode, *options(ins, "rn rz rm rp ftz sat"))
    return Op(run, ("f32", "f32"), ("f32",))


@instruction("fma.f32", "mad.f32")
def _fma(ins: Instruction, env: Env) -> Op:
    rounding, flags = options(ins, "rn rz rm rp ftz sat")
    run = _arithmetic("fma", demand(ins, rounding), flags)
    return Op(run, ("f32", "f32", "f32"), ("f32",))


@instruction("add.f32x2", "sub.f32x2", "mul.f32x2", "fma.f32x2")
def _add_pair(ins: Instruction, env: Env) -> Op:
    rounding, flags = options(ins, "rn rz rm rp ftz")
    if ins.opcode == "fma":
        demand(ins, rounding)
    run = packed(_arithmetic(ins.opcode, rounding, flags), np.uint64, np.float32)
    return Op(run, ("b64", "b64", "b64") if ins.opcode == "fma" else ("b64", "b64"), ("b64",))


def mixed(ins: Instruction) -> Op:
    """add, sub and fma of f32 whose first operands are f16 or bf16 (`.f32.f16`, `.f32.bf16`)."""
    rounding, flags = options(ins, "rn rz rm rp sat", types=2)
    if ins.opcode == "fma":
        demand(ins, rounding)
    run = _arithmetic(ins.opcode, rounding, flags)
    kind = ins.modifiers[-1]
    widen = half_to_single if kind == "f16" else bf16_to_single
    if ins.opcode == "fma":
        return Op(lambda a, b, c: run(widen(a), widen(b), c), (kind, kind, "f32"), ("f32",))
    return Op(lambda a, c: run(widen(a), c), (kind, "f32"), ("f32",))


@instruction("div.f32", "rcp.f32", "sqrt.f32")
def _div(ins: Instruction, env: Env) -> Op:
    """With a rounding. `.approx` and `.full` are in `approx`."""
    sources = ("f32", "f32") if ins.opcode == "div" else ("f32",)
    if "approx" in ins.modifiers or "full" in ins.modifiers:
        return Op(single_approximation(ins), sources, ("f32",))
    rounding, flags = options(ins, "rn rz rm rp ftz")
    demand(ins, rounding)
    if ins.opcode == "rcp":
        divide = _arithmetic("div", rounding, flags)
        return Op(lambda a: divide(ONE, a), sources, ("f32",))
    return Op(_arithmetic(ins.opcode, rounding, flags), sources, ("f32",))


_SIGN: dict[str, Run] = {"abs": np.absolute, "neg": np.negative}
_TEST: dict[str, Run] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda x: x == x,
    "notanumber": np.isnan,
    "normal": lambda x: np.isfinite(x) & ~_subnormal(x),  # zeros count as normal numbers
    "subnormal": lambda x: _subnormal(x),
}


def _subnormal(x: Array) -> Array:
    return (np.abs(x) < np.finfo(x.dtype).smallest_normal) & (x != 0)


@instruction("testp.f32", "testp.f64")
def _testp(ins: Instruction, env: Env) -> Op:
    _, flags = options(ins, " ".join(_TEST))
    if len(flags) != 1:
        raise Unsupported(f"{ins.name} without a test")
    return Op(_TEST[next(iter(flags))], (ins.modifiers[-1],), ("pred",))


@instruction("abs.f32", "neg.f32")
def _abs(ins: Instruction, env: Env) -> Op:
    _, flags = options(ins, "ftz")
    run = _SIGN[ins.opcode]
    return Op(then(flush, run) if "ftz" in flags else run, ("f32",), ("f32",))


@instruction("copysign.f32")
def _copysign(ins: Instruction, env: Env) -> Op:
    options(ins, "")
    return Op(lambda a, b: np.copysign(b, a), ("f32", "f32"), ("f32",))


@instruction("min.f32", "max.f32")
def _min(ins: Instruction, env: Env) -> Op:
    count = 3 if len(ins.operands) == 4 else 2
    _, flags = options(ins, "ftz NaN xorsign abs")
    if "xorsign" in flags and ("abs" not in flags or count == 3):
        raise Unsupported("modifier .xorsign without .abs or with three operands")
    if count == 2 and "abs" in flags and "xorsign" not in flags:
        raise Unsupported("modifier .abs without .xorsign and with two operands")
    run = single_extreme(ins.opcode, flags, count)
    return Op(then(flush, run) if "ftz" in flags else run, ("f32",) * count, ("f32",))
