"""f16, bf16, f16x2 and bf16x2 arithmetic (PTX ISA "Half Precision Floating Point Instructions").

Values are computed in f32 and rounded once more. For sums and products that is exact: f32 has more
than twice the bits and two (Figueroa, "When is double rounding innocuous?", 1995). abs and neg
change nothing but the sign bit, of a NaN too; all else returns the canonical NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cumla.sim.isa.extremes import half_extreme
from cumla.sim.isa.float32 import mixed
from cumla.sim.isa.floating import (
    ZERO,
    Array,
    Run,
    canonical,
    demand,
    options,
    packed,
    saturate,
    then,
)
from cumla.sim.isa.fused import fma_single_odd, odd_sum, pick
from cumla.sim.isa.rounding import (
    EXPONENT,
    LARGE,
    SMALLEST_NORMAL,
    U32,
    bf16_to_single,
    constant,
    double_to_odd_single,
    half_to_single,
    single_to_bf16,
    single_to_half,
    squares_below,
)
from cumla.sim.isa.table import Env, Op, Unsupported, instruction
from cumla.sim.ptx.syntax import Instruction

_I16 = np.dtype(np.int16)
_U16 = np.dtype(np.uint16)


def _half_to_single(x: Array) -> Array:
    return half_to_single(x) if x.size >= LARGE else x.astype(np.float32)


def _single_to_half(x: Array) -> Array:
    """In place up to the last step. Of a canonical NaN NumPy's cast makes a canonical NaN."""
    return single_to_half(x, "rn") if x.size >= LARGE else canonical(x).astype(np.float16)


@dataclass(frozen=True)
class _Format:
    """f16 or bf16.

    Attributes:
        dtype: in which values of this type travel.
        widen, round: to and from f32.
        infinity: its bits.
        least: the smallest normal number.
        cut: bits of f32 that are equal to `tie` in every value halfway between two of this type.
        exact: a finite product in f32 with one of these bits is exact; None if all products are.
    """

    dtype: Any
    widen: Callable[[Array], Array]
    round: Callable[[Array], Array]
    infinity: int
    least: Array
    cut: Array
    tie: Array
    exact: Array | None


_FORMATS = {
    "f16": _Format(
        dtype=np.dtype(np.float16),
        widen=_half_to_single,
        round=_single_to_half,
        infinity=0x7C00,
        least=constant(2.0**-14, np.float32),
        cut=constant(0xFFF, U32),  # between subnormal numbers more bits are 0
        tie=constant(0, U32),
        exact=None,
    ),
    "bf16": _Format(
        dtype=_U16,
        widen=bf16_to_single,
        round=lambda x: single_to_bf16(x, "rn"),
        infinity=0x7F80,
        least=SMALLEST_NORMAL,
        cut=constant(0xFFFF, U32),
        tie=constant(0x8000, U32),
        exact=EXPONENT,
    ),
}


def _fma(form: _Format, a: Array, b: Array, c: Array) -> Array:
    """a * b + c of widened values as f32 that rounds to the format as the exact value does."""
    product = np.multiply(a, b)
    if form.exact is not None:
        inside = np.count_nonzero(np.bitwise_and(product.view(U32), form.exact))
        # The sum of squares is finite only if all products are.
        if inside != product.size or not squares_below(product, np.inf):
            return double_to_odd_single(fma_single_odd(a, b, c))
    total = np.add(product, c)
    doubtful = np.flatnonzero(np.bitwise_and(total.view(U32), form.cut) == form.tie)
    if doubtful.size:
        total[doubtful] = odd_sum(pick(product, doubtful), pick(c, doubtful))
    return total


_COMPUTE: dict[str, Callable[..., Array]] = {
    "add": lambda form, a, b: np.add(a, b),
    "sub": lambda form, a, b: np.subtract(a, b),
    "mul": lambda form, a, b: np.multiply(a, b),
    "fma": _fma,
}


def _arithmetic(name: str, form: _Format, flags: frozenset[str]) -> Run:
    widen, compute, finish = form.widen, _COMPUTE[name], form.round
    if "ftz" not in flags and "sat" not in flags and "relu" not in flags:
        return lambda *sources: finish(compute(form, *map(widen, sources)))

    def flush(x: Array) -> Array:
        return x * (np.abs(x) >= form.least)

    def run(*sources: Array) -> Array:
        singles = map(widen, sources)
        if "ftz" in flags:
            # A result is flushed if it is subnormal before it is rounded.
            result = flush(compute(form, *map(flush, singles)))
        else:
            result = compute(form, *singles)
        if "sat" in flags:
            result = saturate(result)
        if "relu" in flags:
            result = np.maximum(result, ZERO) + ZERO
        return finish(result)

    return run


def _check(ins: Instruction, flags: frozenset[str]) -> None:
    if "ftz" in flags and ins.modifiers[-1].startswith("b"):
        raise Unsupported(f"modifier .ftz of {ins.opcode}.{ins.modifiers[-1]}")
    if {"sat", "relu"} <= flags:
        raise Unsupported("modifiers .sat and .relu together")
    if ("xorsign" in flags) != ("abs" in flags):
        raise Unsupported("modifiers .xorsign and .abs belong together")


@instruction("add.f16", "add.f16x2", "add.bf16", "add.bf16x2")
@instruction("sub.f16", "sub.f16x2", "sub.bf16", "sub.bf16x2")
@instruction("mul.f16", "mul.f16x2", "mul.bf16", "mul.bf16x2")
@instruction("fma.f16", "fma.f16x2", "fma.bf16", "fma.bf16x2")
def _add(ins: Instruction, env: Env) -> Op:
    if ins.modifiers[-2:-1] == ("f32",):
        return mixed(ins)
    kind = ins.modifiers[-1]
    allowed = "rn" if kind.startswith("b") else "rn ftz sat"
    rounding, flags = options(ins, allowed + " relu" if ins.opcode == "fma" else allowed)
    if ins.opcode == "fma":
        demand(ins, rounding)
    _check(ins, flags)
    form = _FORMATS[kind.removesuffix("x2")]
    run = _arithmetic(ins.opcode, form, flags)
    if kind.endswith("x2"):
        run = packed(run, U32, form.dtype)
    return Op(run, (kind,) * (3 if ins.opcode == "fma" else 2), (kind,))


def _on_bits(kind: str, run: Run) -> Run:
    """A function of int16 bits for registers of this type."""
    if kind.endswith("x2"):
        return packed(run, U32, _I16)
    dtype = _FORMATS[kind].dtype
    return lambda *sources: run(*(x.view(_I16) for x in sources)).view(dtype)


_MAGNITUDE = constant(0x7FFF, _I16)
_SIGN = constant(-0x8000, _I16)
_NORMAL = constant(0x0400, _I16)


def _flush_half(bits: Array) -> Array:
    """f16 bits with subnormal numbers replaced by zeros of their sign."""
    return np.where(bits & _MAGNITUDE < _NORMAL, bits & _SIGN, bits)


_SIGN_BITS: dict[str, Run] = {
    "abs": lambda x: np.bitwise_and(x, _MAGNITUDE),
    "neg": lambda x: np.bitwise_xor(x, _SIGN),
}


@instruction("abs.f16", "abs.f16x2", "abs.bf16", "abs.bf16x2")
@instruction("neg.f16", "neg.f16x2", "neg.bf16", "neg.bf16x2")
def _abs(ins: Instruction, env: Env) -> Op:
    _, flags = options(ins, "ftz")
    _check(ins, flags)
    kind, run = ins.modifiers[-1], _SIGN_BITS[ins.opcode]
    return Op(_on_bits(kind, then(_flush_half, run) if "ftz" in flags else run), (kind,), (kind,))


@instruction("min.f16", "min.f16x2", "min.bf16", "min.bf16x2")
@instruction("max.f16", "max.f16x2", "max.bf16", "max.bf16x2")
def _min(ins: Instruction, env: Env) -> Op:
    _, flags = options(ins, "ftz NaN xorsign abs")
    _check(ins, flags)
    kind = ins.modifiers[-1]
    run = half_extreme(ins.opcode, flags, _FORMATS[kind.removesuffix("x2")].infinity)
    return Op(
        _on_bits(kind, then(_flush_half, run) if "ftz" in flags else run), (kind,) * 2, (kind,)
    )
