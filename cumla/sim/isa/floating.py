"""What the floating-point families share: modifiers, the canonical NaN, .ftz, .sat, packed types.

PTX ISA leaves the NaN that an f32 or half instruction returns unspecified; GPUs return the
canonical one, all ones without a sign, and so does this: programs that compare floats as integers
(sorting keys, atomicMax on bits) see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.isa.rounding import NAN_BITS, any_nan, constant, flush
from cumla.sim.isa.table import Unsupported
from cumla.sim.ptx.syntax import Instruction

Array = NDArray[Any]
Run = Callable[..., Array]

ROUNDINGS = ("rn", "rz", "rm", "rp")

NAN = NAN_BITS.view(np.float32)
ZERO = constant(0.0, np.float32)
ONE = constant(1.0, np.float32)


def options(ins: Instruction, allowed: str, types: int = 1) -> tuple[str, frozenset[str]]:
    """The rounding ("" if none is written) and the other modifiers before the types.

    Args:
        allowed: the words that may stand there, with spaces between them.
        types: how many words at the end are types.
    """
    words = ins.modifiers[:-types]
    known = allowed.split()
    for word in words:
        if word not in known:
            raise Unsupported(f"modifier .{word} of {ins.opcode}.{ins.modifiers[-1]}")
    if len(set(words)) < len(words):
        raise Unsupported(f"a modifier of {ins.name} is written twice")
    roundings = [word for word in words if word in ROUNDINGS]
    if len(roundings) > 1:
        raise Unsupported(f"two roundings, .{roundings[0]} and .{roundings[1]}")
    return "".join(roundings), frozenset(words) - {*roundings}


def demand(ins: Instruction, rounding: str) -> str:
    """The rounding of an instruction that has no default."""
    if not rounding:
        raise Unsupported(f"{ins.name} without a rounding modifier")
    return rounding


def canonical(result: Array) -> Array:
    """f32 with every NaN made canonical, in place: `result` belongs to the caller."""
    if any_nan(result):
        np.putmask(result, result != result, NAN)
    return result


def unary(ufunc: Run) -> Run:
    """An f32 ufunc of one argument, with canonical NaN."""
    return lambda a: canonical(ufunc(a))


def binary(ufunc: Run) -> Run:
    """An f32 ufunc of two arguments, with canonical NaN."""
    return lambda a, b: canonical(ufunc(a, b))


def saturate(result: Array) -> Array:
    """`.sat` of f32: clamped to [0, 1], NaN and -0 become +0."""
    return np.fmin(np.fmax(result, ZERO), ONE) + ZERO


def then(change: Run, run: Run) -> Run:
    """`run` with something done to its result."""
    return lambda *sources: change(run(*sources))


def flushing(run: Run) -> Run:
    """An f32 function with `.ftz`: subnormal inputs and results become zeros of their sign.

    What is subnormal is decided after rounding.
    """
    return lambda *sources: flush(run(*map(flush, sources)))


def packed(run: Run, wide: Any, narrow: Any) -> Run:
    """A function of `narrow` values, for registers of type `wide` that hold two each."""

    def both(*sources: Array) -> Array:
        lanes = max(map(len, sources))
        halves = (
            np.ascontiguousarray(x if len(x) == lanes else np.repeat(x, lanes)).view(narrow)
            for x in sources
        )
        return run(*halves).view(wide)

    return both
