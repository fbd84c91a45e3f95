"""atom and red. PTX ISA "Parallel Synchronization and Communication: atom, red"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cumla.sim.cohort import Cohort
from cumla.sim.isa.memory import SCOPES, VECTORS
from cumla.sim.isa.table import Env, Op, Unsupported, instruction
from cumla.sim.memory.access import updater
from cumla.sim.memory.sequence import atomic, element_dtype
from cumla.sim.ptx.syntax import Instruction

SPACES = frozenset({"global", "shared", "shared::cta", "shared::cluster"})
ORDERS = frozenset({"relaxed", "acquire", "release", "acq_rel"})
BITS = frozenset({"b32", "b64"})
INTEGERS = frozenset({"u32", "s32", "u64", "s64"})
HALVES = frozenset({"f16", "bf16", "f16x2", "bf16x2"})
TYPES = {
    "and": BITS,
    "or": BITS,
    "xor": BITS,
    "exch": BITS,
    "cas": BITS | {"b16"},
    "add": INTEGERS | HALVES | {"f32", "f64"},
    "inc": frozenset({"u32"}),
    "dec": frozenset({"u32"}),
    "min": INTEGERS,
    "max": INTEGERS,
}
# Of vectors, PTX ISA has add of f32, and add, min and max of the half-width types.
VECTOR_TYPES = {"add": HALVES | {"f32"}, "min": HALVES, "max": HALVES}
LENGTHS = {"f32": (2, 4), "f16x2": (2, 4), "bf16x2": (2, 4), "f16": (2, 4, 8), "bf16": (2, 4, 8)}


@instruction("atom")
def atom(ins: Instruction, env: Env) -> Op:
    """atom{.sem}{.scope}{.space}.op{.noftz}{.L2::cache_hint}{.vec}.type d, [a], b{, c}{, p}."""
    return _specialise(ins, env, wanted=True)


@instruction("red")
def red(ins: Instruction, env: Env) -> Op:
    """red{.sem}{.scope}{.space}.op{.noftz}{.L2::cache_hint}{.vec}.type [a], b{, policy}."""
    return _specialise(ins, env, wanted=False)


def _specialise(ins: Instruction, env: Env, wanted: bool) -> Op:
    space, order, scope, count, op, kind = "generic", "relaxed", "gpu", 1, "", ""
    words = list(ins.modifiers)
    if words:
        kind = words.pop()
    hinted = noftz = False
    for word in words:
        if word in SPACES:
            space = word
        elif word in ORDERS:
            order = word
        elif word in SCOPES:
            scope = word
        elif word in TYPES and not op:
            op = word
        elif word in VECTORS:
            count = VECTORS[word]
        elif word == "noftz":
            noftz = True
        elif word == "L2::cache_hint":
            hinted = True
        else:
            raise Unsupported(f"modifier .{word} of {ins.opcode}")
    vector = count > 1
    known = (VECTOR_TYPES if vector else TYPES).get(op, frozenset())
    if kind not in known or (vector and count not in LENGTHS[kind]):
        raise Unsupported(f"form {ins.name!r}")
    if noftz != (kind in HALVES):
        raise Unsupported(f"form {ins.name!r}: .noftz goes with half-width types, and only these")
    if (vector and space not in ("generic", "global")) or (not wanted and op in ("exch", "cas")):
        raise Unsupported(f"form {ins.name!r}")

    element = kind.removesuffix("x2")
    packed = 2 if element != kind else 1
    # PTX ISA "atom": .add.f32 flushes subnormal inputs and results in global memory, and keeps
    # them in shared memory.
    flush = op == "add" and kind == "f32"
    change = updater(
        ins,
        env,
        space,
        element_dtype(element),
        atomic(op, element, wanted, flush and space in ("generic", "global")),
        order,
        scope,
        count * packed,
        in_shared=atomic(op, element, wanted, False) if flush and space == "generic" else None,
    )
    operands = 2 * count if op == "cas" else count
    run = _runner(change, count, operands, kind, wanted)
    sources = ("addr", *(kind,) * operands, *(("b64",) if hinted else ()))
    return Op(run, sources, (kind,) * count if wanted else (), cohort=True)


def _runner(
    change: Callable[..., Any], count: int, operands: int, kind: str, wanted: bool
) -> Callable[..., Any]:
    """Around an update: values as registers hold them become elements of memory, and back."""
    element = element_dtype(kind.removesuffix("x2"))

    def scalar(c: Cohort, address: Any, *values: Any) -> Any:
        olds = change(c, address, *values[:operands])
        return olds[0] if wanted else None

    def vector(c: Cohort, address: Any, *values: Any) -> Any:
        elements = (e for v in values[:operands] for e in _elements(v, kind, element))
        olds = change(c, address, *elements)
        if not wanted:
            return None
        results = _registers(olds, kind)
        return results if count > 1 else results[0]

    return vector if kind in HALVES or count > 1 else scalar


def _elements(value: Any, kind: str, element: Any) -> tuple[Any, ...]:
    if kind.endswith("x2"):
        halves = value.view(element).reshape(-1, 2)
        return np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(halves[:, 1])
    return (value.view(element),)


def _registers(olds: tuple[Any, ...], kind: str) -> tuple[Any, ...]:
    if kind.endswith("x2"):
        pairs = [np.stack(olds[k : k + 2], axis=1) for k in range(0, len(olds), 2)]
        return tuple(pair.view(np.uint32)[:, 0] for pair in pairs)
    if kind == "bf16":
        return tuple(old.view(np.uint16) for old in olds)
    return olds
