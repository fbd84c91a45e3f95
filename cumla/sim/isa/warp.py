"""Instructions by which the lanes of a warp exchange values: shfl, vote, match, redux, elect.

What a lane gets from a lane that does not take part is undefined in PTX; here it is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP, Cohort
from cumla.sim.isa.convergence import (
    FULL,
    LANES,
    converged,
    members,
    pack,
    unpack,
    waits_for_lanes,
)
from cumla.sim.isa.table import Env, Op, Unsupported, instruction, needs
from cumla.sim.ptx.syntax import Instruction, Pair

Array = NDArray[Any]

NAN_BITS = np.uint32(0x7FFFFFFF)
_FULL_BITS = np.array([FULL], np.uint32)
_FIRST_LANE = np.zeros(1, np.uint32)


def _synchronous(
    ins: Instruction,
    run: Callable[..., Any],
    sources: tuple[str, ...],
    results: tuple[str, ...],
) -> Op:
    """An Op of an instruction whose last operand is a membermask."""
    return Op(
        run,
        sources,
        results,
        cohort=True,
        ready=converged,
        waits_for=lambda c, *operands: waits_for_lanes(ins, c, operands[-1]),
        warp_gate=True,
    )


def _two_results(ins: Instruction) -> bool:
    """Whether the destination is `d|p`."""
    return bool(ins.operands) and isinstance(ins.operands[0], Pair)


def _by_warp(values: Array) -> Array:
    """[w] values as [w * 32], one for each lane."""
    return np.repeat(values, WARP)


# shfl


@instruction("shfl")
def shfl(ins: Instruction, env: Env) -> Op:
    """shfl.sync.{up,down,bfly,idx}.b32 d{|p}, a, b, c, membermask."""
    if len(ins.modifiers) != 3 or ins.modifiers[0] != "sync" or ins.modifiers[2] != "b32":
        raise Unsupported(f"form {ins.name!r} (only shfl.sync.mode.b32 is known)")
    mode = ins.modifiers[1]
    if mode not in ("up", "down", "bfly", "idx"):
        raise Unsupported(f"shfl mode .{mode}")
    pair = _two_results(ins)

    def run(c: Cohort, a: Array, b: Array, clamp: Array, masks: Array) -> Any:
        group = members(ins, c, masks)
        if group is None and b.shape[0] == 1 and clamp.shape[0] == 1:
            source = _route(mode, int(b[0]), int(clamp[0]))[0]
            if a.shape[0] == 1:
                value = a
            else:
                value = a.reshape(-1, WARP).take(source, axis=1, mode="clip").reshape(-1)
            return (value, _tiled(mode, int(b[0]), int(clamp[0]), c.n)) if pair else value
        sources, insides = _sources(mode, c.to_warps(b), c.to_warps(clamp))
        first = np.arange(0, sources.size, WARP, dtype=np.int64)[:, None]
        values = c.to_warps(a).reshape(-1).take(sources + first, mode="clip")
        if group is not None:
            values *= (group >> sources.astype(np.uint32)) & 1
        value = c.from_warps(values)
        return (value, c.from_warps(insides)) if pair else value

    results = ("b32", "pred") if pair else ("b32",)
    return _synchronous(ins, run, ("b32", "u32", "u32", "u32"), results)


@lru_cache(maxsize=256)
def _route(mode: str, b: int, clamp: int) -> tuple[Array, Array]:
    """`_sources` for operands that are the same in all lanes: [32] and [32]."""
    sources, inside = _sources(mode, np.array([[b]], np.uint32), np.array([[clamp]], np.uint32))
    return sources[0], inside[0]


@lru_cache(maxsize=64)
def _tiled(mode: str, b: int, clamp: int, lanes: int) -> Array:
    """Whether each lane of whole warps reads from a lane in range."""
    return np.tile(_route(mode, b, clamp)[1], lanes // WARP)


def _sources(mode: str, b: Array, clamp: Array) -> tuple[Array, Array]:
    """From which lane each lane reads, and whether that was in range (PTX ISA "shfl.sync")."""
    lane = LANES.astype(np.int8)
    b = (b & 31).astype(np.int8)
    segment = ((clamp >> 8) & 31).astype(np.int8)
    clamp = (clamp & 31).astype(np.int8)
    lowest = lane & segment
    limit = lowest | (clamp & ~segment)
    if mode == "up":
        source = lane - b
        inside = source >= limit
    else:
        if mode == "down":
            source = lane + b
        elif mode == "bfly":
            source = lane ^ b
        else:
            source = lowest | (b & ~segment)
        inside = source <= limit
    return np.where(inside, source, lane), inside


# vote, activemask, elect


@instruction("vote")
def vote(ins: Instruction, env: Env) -> Op:
    """vote.sync.{all,any,uni}.pred and vote.sync.ballot.b32 d, a, membermask."""
    if ins.modifiers not in (
        ("sync", "all", "pred"),
        ("sync", "any", "pred"),
        ("sync", "uni", "pred"),
        ("sync", "ballot", "b32"),
    ):
        raise Unsupported(f"form {ins.name!r}")
    mode = ins.modifiers[1]

    def answer(said: Array, asked: Any) -> Array:
        if mode == "ballot":
            return said
        if mode == "any":
            return said != 0
        if mode == "all":
            return said == asked
        return (said == 0) | (said == asked)

    def run(c: Cohort, a: Array, masks: Array) -> Array:
        group = members(ins, c, masks)
        if group is None:
            if a.shape[0] == 1:
                return answer(np.where(a, _FULL_BITS, np.uint32(0)), FULL)
            return _by_warp(answer(pack(a.reshape(-1, WARP)), FULL))
        said = pack(c.to_warps(a))[:, None] & group
        return c.from_warps(answer(said, group))

    result = "b32" if mode == "ballot" else "pred"
    return _synchronous(ins, run, ("pred", "u32"), (result,))


@instruction("activemask")
def activemask(ins: Instruction, env: Env) -> Op:
    """activemask.b32 d: the lanes that stand at the instruction together."""
    if ins.modifiers != ("b32",):
        raise Unsupported(f"form {ins.name!r}")

    def run(c: Cohort) -> Array:
        return _FULL_BITS if c.whole else c.from_warps(_by_warp(pack(c.active)))

    return Op(run, (), ("b32",), cohort=True)


@instruction("elect")
def elect(ins: Instruction, env: Env) -> Op:
    """elect.sync d|p, membermask: the lowest lane that takes part is the leader."""
    needs(env, 90, ins)
    if ins.modifiers != ("sync",):
        raise Unsupported(f"form {ins.name!r}")

    def run(c: Cohort, masks: Array) -> tuple[Array, Array]:
        group = members(ins, c, masks)
        if group is None:
            return _FIRST_LANE, c.lanes == _FIRST_LANE
        leader = unpack(group).argmax(axis=-1).astype(np.uint32)
        return c.from_warps(leader), c.from_warps(leader == LANES)

    return _synchronous(ins, run, ("u32",), ("b32", "pred"))


# match


@instruction("match")
def match(ins: Instruction, env: Env) -> Op:
    """match.any.sync.{b32,b64} d, a, membermask; match.all.sync.{b32,b64} d{|p}, a, membermask."""
    if (
        len(ins.modifiers) != 3
        or ins.modifiers[0] not in ("any", "all")
        or ins.modifiers[1] != "sync"
        or ins.modifiers[2] not in ("b32", "b64")
    ):
        raise Unsupported(f"form {ins.name!r}")
    mode, _, kind = ins.modifiers
    pair = _two_results(ins)
    if pair and mode == "any":
        raise Unsupported("match.any with a predicate result")

    def run(c: Cohort, a: Array, masks: Array) -> Any:
        group = members(ins, c, masks)
        if group is None:
            group = np.full((c.warps.shape[0], WARP), FULL, np.uint32)
        values = c.to_warps(a)
        same = pack(values[:, :, None] == values[:, None, :]) & group
        if mode == "any":
            return c.from_warps(same)
        agreed = same == group
        found = c.from_warps(np.where(agreed, group, np.uint32(0)))
        return (found, c.from_warps(agreed)) if pair else found

    return _synchronous(ins, run, (kind, "u32"), ("b32", "pred") if pair else ("b32",))


# redux

_INT_MIN, _INT_MAX = -(1 << 31), (1 << 31) - 1
# operation and type -> how it reduces, and the value that changes nothing
_REDUCTIONS: dict[tuple[str, str], tuple[Any, int]] = {
    ("add", "u32"): (np.add, 0),
    ("add", "s32"): (np.add, 0),
    ("min", "u32"): (np.minimum, FULL),
    ("max", "u32"): (np.maximum, 0),
    ("min", "s32"): (np.minimum, _INT_MAX),
    ("max", "s32"): (np.maximum, _INT_MIN),
    ("and", "b32"): (np.bitwise_and, FULL),
    ("or", "b32"): (np.bitwise_or, 0),
    ("xor", "b32"): (np.bitwise_xor, 0),
}


@instruction("redux")
def redux(ins: Instruction, env: Env) -> Op:
    """redux.sync.op.type dst, src, membermask; for f32 .min and .max with {.abs}{.NaN}."""
    words = ins.modifiers
    if len(words) < 3 or words[0] != "sync":
        raise Unsupported(f"form {ins.name!r}")
    operation, extra, kind = words[1], words[2:-1], words[-1]
    if kind == "f32":
        if operation not in ("min", "max") or extra not in ((), ("abs",), ("NaN",), ("abs", "NaN")):
            raise Unsupported(f"form {ins.name!r}")
        needs(env, 100, ins, only=(100, 103))
        return _redux_f32(ins, operation, "abs" in extra, "NaN" in extra)
    if extra or (operation, kind) not in _REDUCTIONS:
        raise Unsupported(f"form {ins.name!r}")
    reduction, neutral = _REDUCTIONS[operation, kind]

    def run(c: Cohort, a: Array, masks: Array) -> Array:
        return _reduce(ins, c, a, masks, reduction, neutral)

    return _synchronous(ins, run, (kind, "u32"), (kind,))


def _reduce(
    ins: Instruction, c: Cohort, a: Array, masks: Array, reduction: Any, neutral: int
) -> Array:
    group = members(ins, c, masks)
    values = c.to_warps(a)
    if group is None:
        return _by_warp(reduction.reduce(values, axis=1, dtype=values.dtype))
    taken = np.where(unpack(group), values[:, None, :], values.dtype.type(neutral))
    return c.from_warps(reduction.reduce(taken, axis=2, dtype=values.dtype))


def _redux_f32(ins: Instruction, operation: str, absolute: bool, nan: bool) -> Op:
    """Reduces integers that are ordered as f32 are, -0.0 below +0.0.

    NaN stands at the end where it wins (.NaN) or loses to everybody.
    """
    reduction, neutral = _REDUCTIONS[operation, "s32"]
    winner = _INT_MIN if operation == "min" else _INT_MAX
    nan_key = np.int32(winner if nan else neutral)

    def run(c: Cohort, a: Array, masks: Array) -> Array:
        keys = (np.abs(a) if absolute else a).view(np.int32)
        keys = np.where(np.isnan(a), nan_key, keys ^ ((keys >> 31) & _INT_MAX))
        keys = _reduce(ins, c, keys, masks, reduction, neutral)
        result = keys ^ ((keys >> 31) & _INT_MAX)
        found = result.view(np.float32)
        return np.where(np.isnan(found), NAN_BITS, result.view(np.uint32)).view(np.float32)

    return _synchronous(ins, run, ("f32", "u32"), ("f32",))
