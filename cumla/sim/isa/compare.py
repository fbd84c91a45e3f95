"""Comparison and selection. PTX ISA "Comparison and Selection Instructions" and "Half Precision
Comparison Instructions".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cumla.sim.isa.forms import unsupported
from cumla.sim.isa.table import DTYPES, Env, Op, instruction
from cumla.sim.isa.values import constant, unsigned
from cumla.sim.ptx.syntax import Immediate, Instruction, Operand, Pair

Function = Callable[..., Any]

EQUALITY: dict[str, Function] = {"eq": np.equal, "ne": np.not_equal}
ORDER: dict[str, Function] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_ORDER: dict[str, Function] = {
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
# PTX ISA "Comparisons: Floating Point Comparisons": with a NaN the first six are false, those that
# end in u true. NumPy's != is true with a NaN, its other comparisons are false.
FLOAT_ORDER: dict[str, Function] = {
    **ORDER,
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
BOOLEAN: dict[str, Function] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
WIDTHS = ("16", "32", "64")
INTEGERS = tuple(letter + width for letter in "bus" for width in WIDTHS)
FLUSHED = ("f32", "f16", "f16x2")  # the types that .ftz applies to


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A comparison of two registers of type `source`: one function for each of their values."""

    source: str
    functions: tuple[Function, ...]


def _comparison(ins: Instruction, name: str, kind: str, ftz: bool, operands: Any) -> _Comparison:
    if ftz and kind not in FLUSHED:
        raise unsupported(ins)
    if kind in INTEGERS:
        table = EQUALITY
        if kind[0] != "b":
            table = {**table, **ORDER}
        if kind[0] == "u":
            table = {**table, **UNSIGNED_ORDER}
        if name not in table:
            raise unsupported(ins)
        source = unsigned(kind) if name in EQUALITY else kind
        return _Comparison(source, (table[name],))
    if kind not in FLOATS or name not in FLOAT_ORDER:
        raise unsupported(ins)
    function = FLOAT_ORDER[name]
    a, b = operands
    if a == b and name in ("num", "nan"):
        function = np.equal if name == "num" else np.not_equal
    if ftz and name not in ("num", "nan"):
        if kind == "f32" and (_size(a) >= TINY or _size(b) >= TINY):
            # Any subnormal compares with a normal number as zero does.
            return _Comparison(kind, (function,))
        if kind == "f32" and _size(b) == 0:
            return _Comparison(kind, (lambda a, b: function(_flush(a), b),))
        source, readings = FLUSHED_FLOATS[kind]
    else:
        source, readings = FLOATS[kind]
    return _Comparison(source, tuple(_reading(function, read) for read in readings))


def _reading(function: Function, read: Function | None) -> Function:
    if read is None:
        return function
    return lambda a, b: function(read(a), read(b))


TINY = 2.0**-126  # the smallest normal .f32


def _size(operand: Operand) -> float:
    """The absolute value of a literal; NaN, which compares false, for other operands."""
    return abs(operand.value) if isinstance(operand, Immediate) else math.nan


SIXTEEN = constant(16, "u32")
HIGH = constant(0xFFFF0000, "u32")


def _low_half(x: Any) -> Any:
    return x.astype(np.uint16).view(np.float16)


def _high_half(x: Any) -> Any:
    return (x >> SIXTEEN).astype(np.uint16).view(np.float16)


# For each type: how its registers are read, and what gives their values as numbers.
FLOATS: dict[str, tuple[str, tuple[Function | None, ...]]] = {
    "f32": ("f32", (None,)),
    "f64": ("f64", (None,)),
    "f16": ("f16", (None,)),
    "f16x2": ("b32", (_low_half, _high_half)),
    "bf16": ("b16", (lambda x: (x.astype(np.uint32) << SIXTEEN).view(np.float32),)),
    "bf16x2": (
        "b32",
        (
            lambda x: (x << SIXTEEN).view(np.float32),
            lambda x: (x & HIGH).view(np.float32),
        ),
    ),
}

SMALLEST_NORMAL = np.array(TINY, np.float32)
HALF_EXPONENT = constant(0x7C00, "b16")


def _flush(x: Any) -> Any:
    return x * (np.abs(x) >= SMALLEST_NORMAL)


def _flush_half(x: Any) -> Any:
    bits = x.view(np.uint16)
    return (bits * ((bits & HALF_EXPONENT) != 0)).view(np.float16)


# Likewise with .ftz. A flushed zero may lose its sign here: comparisons do not see it.
FLUSHED_FLOATS: dict[str, tuple[str, tuple[Function | None, ...]]] = {
    "f32": ("f32", (_flush,)),
    "f16": ("f16", (_flush_half,)),
    "f16x2": (
        "b32",
        (lambda x: _flush_half(_low_half(x)), lambda x: _flush_half(_high_half(x))),
    ),
}


def _words(ins: Instruction, types: int) -> tuple[str, str | None, bool]:
    """(comparison, Boolean operator or None, .ftz) of a set or setp with so many types."""
    name, *rest = ins.modifiers[: len(ins.modifiers) - types]
    combine = [word for word in rest if word in BOOLEAN]
    ftz = [word for word in rest if word == "ftz"]
    if len(combine) + len(ftz) != len(rest) or len(combine) > 1 or len(ftz) > 1:
        raise unsupported(ins)
    return name, combine[0] if combine else None, bool(ftz)


@instruction("setp")
def setp(ins: Instruction, env: Env) -> Op:
    """setp.CmpOp{.BoolOp}{.ftz}.type p{|q}, a, b{, {!}c}.

    q is the opposite comparison, combined with c; for two packed values it is that of the high
    ones, and p that of the low ones.
    """
    if len(ins.modifiers) < 2:
        raise unsupported(ins)
    name, combine, ftz = _words(ins, 1)
    compare = _comparison(ins, name, ins.modifiers[-1], ftz, ins.operands[1:3])
    sources: tuple[str, ...] = (compare.source, compare.source)
    if combine is not None:
        sources = (*sources, "pred")
    paired = isinstance(ins.operands[0], Pair)
    functions = compare.functions if paired else compare.functions[:1]
    results = ("pred",) * (2 if paired else 1)
    if len(functions) == 2:
        return Op(_two(functions, combine), sources, results)
    return Op(_one(functions[0], combine, paired), sources, results)


def _one(test: Function, combine: str | None, paired: bool) -> Function:
    if combine is None:
        if not paired:
            return test

        def both(a: Any, b: Any) -> tuple[Any, Any]:
            t = test(a, b)
            return t, ~t

        return both
    join = BOOLEAN[combine]
    if not paired:
        return lambda a, b, c: join(test(a, b), c)

    def both_joined(a: Any, b: Any, c: Any) -> tuple[Any, Any]:
        t = test(a, b)
        return join(t, c), join(~t, c)

    return both_joined


def _two(tests: tuple[Function, ...], combine: str | None) -> Function:
    low, high = tests
    if combine is None:
        return lambda a, b: (low(a, b), high(a, b))
    join = BOOLEAN[combine]
    return lambda a, b, c: (join(low(a, b), c), join(high(a, b), c))


# PTX ISA "set": the types of the result for each type of the operands.
SET_RESULTS = {
    "f16": ("u16", "s16", "u32", "s32", "f16", "bf16"),
    "bf16": ("u16", "s16", "u32", "s32", "bf16"),
    "f16x2": ("f16x2", "u32", "s32"),
    "bf16x2": ("bf16x2", "u32", "s32"),
}
OTHER_SET_RESULTS = ("u32", "s32", "f32", "f16", "bf16")
# The bits of "true"; for packed operands those of the low value.
TRUE = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80, "f16x2": 0x3C00, "bf16x2": 0x3F80}


@instruction("set")
def set_(ins: Instruction, env: Env) -> Op:
    """set.CmpOp{.BoolOp}{.ftz}.dtype.stype d, a, b{, {!}c}."""
    if len(ins.modifiers) < 3:
        raise unsupported(ins)
    name, combine, ftz = _words(ins, 2)
    result, kind = ins.modifiers[-2:]
    if result not in SET_RESULTS.get(kind, OTHER_SET_RESULTS):
        raise unsupported(ins)
    compare = _comparison(ins, name, kind, ftz, ins.operands[1:3])
    sources: tuple[str, ...] = (compare.source, compare.source)
    if combine is not None:
        sources = (*sources, "pred")
    bits = f"u{DTYPES[result].itemsize * 8}"
    dtype = DTYPES[bits]
    if len(compare.functions) == 1:
        test = _one(compare.functions[0], combine, False)
        true = constant(TRUE.get(result, -1), bits)
        return Op(lambda *s: np.multiply(test(*s), true, dtype=dtype), sources, (bits,))
    tests = _two(compare.functions, combine)
    low_true = constant(TRUE.get(result, 0xFFFF), bits)
    high_true = low_true << SIXTEEN

    def packed(*operands: Any) -> Any:
        low, high = tests(*operands)
        return np.multiply(low, low_true, dtype=dtype) | np.multiply(high, high_true, dtype=dtype)

    return Op(packed, sources, (bits,))


# From this many lanes on, choosing by arithmetic is faster than `np.where`, whose branches a CPU
# mispredicts where neighbouring lanes differ: 27 us instead of 27 to 115 at 32,768 lanes of 32
# bits. Wider values cost more in arithmetic than in branches.
MANY = 8192


def _select(kind: str) -> Function:
    """A function (c, a, b): a where c is true, else b."""
    dtype = DTYPES[kind]
    bits = np.dtype(f"u{dtype.itemsize}")

    def select(c: Any, a: Any, b: Any) -> Any:
        if c.size == 1:
            return a if c.item() else b
        if c.size < MANY or bits.itemsize == 8:
            return np.where(c, a, b)
        a, b = a.view(bits), b.view(bits)
        return (b ^ ((a ^ b) * c.astype(bits))).view(dtype)

    return select


SELECTED = (*INTEGERS, "f32", "f64")


@instruction("selp")
def selp(ins: Instruction, env: Env) -> Op:
    """selp.type d, a, b, c."""
    if len(ins.modifiers) != 1 or ins.modifiers[0] not in SELECTED:
        raise unsupported(ins)
    kind = unsigned(ins.modifiers[0])
    select = _select(kind)
    return Op(lambda a, b, c: select(c, a, b), (kind, kind, "pred"), (kind,))


@instruction("slct")
def slct(ins: Instruction, env: Env) -> Op:
    """slct{.ftz}.dtype{.s32,.f32} d, a, b, c: a where c >= 0, else b (also where c is NaN)."""
    *ftz, kind, by = ins.modifiers if len(ins.modifiers) > 1 else ("", "")
    if kind not in SELECTED or by not in ("s32", "f32") or ftz not in ([], ["ftz"]):
        raise unsupported(ins)
    if ftz and by != "f32":
        raise unsupported(ins)
    kind = unsigned(kind)
    select = _select(kind)
    if ftz:
        below = np.array(-TINY, np.float32)  # the largest number that does not count as zero
        return Op(lambda a, b, c: select(c > below, a, b), (kind, kind, by), (kind,))
    zero = np.array(0, DTYPES[by])
    return Op(lambda a, b, c: select(c >= zero, a, b), (kind, kind, by), (kind,))
