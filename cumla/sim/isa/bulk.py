"""cp.async.bulk and cp.reduce.async.bulk.

PTX ISA "Data Movement and Conversion Instructions: Bulk copy", "cp.async.bulk.commit_group",
"cp.async.bulk.wait_group". Addresses are checked, and the race detector and the counters told, when
a copy is issued; when the data moves is the business of `cumla.sim.bulk`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.bulk import Target, Transfer
from cumla.sim.cohort import Cohort
from cumla.sim.errors import KernelTrap
from cumla.sim.isa.bulk_places import CHUNK, Barrier, Place, multicast, tell
from cumla.sim.isa.table import Env, Op, Unsupported, needs, nothing
from cumla.sim.memory.sequence import atomic, element_dtype
from cumla.sim.memory.words import Words, of_global, refuse
from cumla.sim.ptx.syntax import Immediate, Instruction

Array = NDArray[Any]

HINT = "L2::cache_hint"
COMPLETES = "mbarrier::complete_tx::bytes"
GROUP = "bulk_group"
MULTICAST = "multicast::cluster"
# PTX ISA "cp.reduce.async.bulk": operations and types by destination. Its examples have s32 with
# .xor too, but its table does not, nor does ptxas.
REDUCTIONS = {
    "shared::cluster": {
        "add": {"u32", "s32", "u64"},
        "min": {"u32", "s32"},
        "max": {"u32", "s32"},
        "inc": {"u32"},
        "dec": {"u32"},
        "and": {"b32"},
        "or": {"b32"},
        "xor": {"b32"},
    },
    "global": {
        "add": {"u32", "s32", "u64", "f32", "f64", "f16", "bf16"},
        "min": {"u32", "s32", "u64", "s64", "f16", "bf16"},
        "max": {"u32", "s32", "u64", "s64", "f16", "bf16"},
        "inc": {"u32"},
        "dec": {"u32"},
        "and": {"b32", "b64"},
        "or": {"b32", "b64"},
        "xor": {"b32", "b64"},
    },
}


def bulk(ins: Instruction, env: Env) -> Op:
    """The forms of cp.async.bulk that know no tensors; `words` are those behind it."""
    words = ins.modifiers[2:]
    needs(env, 90, ins)
    if words == ("commit_group",) and not ins.operands:
        return _commit(env)
    if words[:1] == ("wait_group",) and words[1:] in ((), ("read",)) and len(ins.operands) == 1:
        return _wait(ins, env, words[1:] == ("read",))
    if words[:3] == ("prefetch", "L2", "global"):
        return _prefetch(ins, env, words[3:])
    if len(words) < 3:
        raise Unsupported(f"form {ins.name!r}")
    to, source, completion, *rest = words
    direction = (to, source, completion)
    if direction in (
        ("shared::cta", "global", COMPLETES),
        ("shared::cluster", "global", COMPLETES),
        ("shared::cluster", "shared::cta", COMPLETES),
    ):
        return _to_shared(ins, env, to, source, rest)
    if direction == ("global", "shared::cta", GROUP):
        return _to_global(ins, env, rest)
    raise Unsupported(f"form {ins.name!r}")


def _modifiers(ins: Instruction, rest: list[str], *known: str) -> set[str]:
    """The modifiers that may be there or not, in the order in which they must stand."""
    if rest != [word for word in known if word in rest]:
        raise Unsupported(f"form {ins.name!r}")
    return set(rest)


def _operands(ins: Instruction, number: int) -> None:
    if len(ins.operands) != number:
        raise Unsupported(f"{ins.name!r} with {len(ins.operands)} operands")


def _commit(env: Env) -> Op:
    if not env.tracked:
        return Op(nothing, (), cohort=True)
    return Op(lambda c: c.wave.bulk.commit(c), (), cohort=True)


def _wait(ins: Instruction, env: Env, read: bool) -> Op:
    newest = ins.operands[0]
    if not isinstance(newest, Immediate):
        raise Unsupported(f"{ins.name!r} with a number that is not a constant")
    number = int(newest.value)
    if not env.tracked:
        return Op(nothing, ("u32",), cohort=True)
    return Op(lambda c, newest: c.wave.bulk.wait(c, number, read), ("u32",), cohort=True)


def _prefetch(ins: Instruction, env: Env, rest: tuple[str, ...]) -> Op:
    """cp.async.bulk.prefetch.L2.global{.L2::cache_hint} [src], size{, policy}: it moves nothing.

    The addresses must be good all the same.
    """
    hinted = HINT in _modifiers(ins, list(rest), HINT)
    _operands(ins, 2 + hinted)

    def run(c: Cohort, source: Array, size: Array, *policy: Array) -> None:
        _check_sizes(ins, c, size)
        for gid, start, length in _lanes(c, source, size):
            _global(ins, env, c, gid, start, length, "read")

    return Op(run, ("addr", "u32", *(("b64",) if hinted else ())), cohort=True)


def _to_shared(ins: Instruction, env: Env, to: str, source: str, rest: list[str]) -> Op:
    """A copy that an mbarrier tracks.

    cp.async.bulk.{shared::cta,shared::cluster}.global.mbarrier::complete_tx::bytes
        {.multicast::cluster}{.L2::cache_hint} [dst], [src], size, [mbar]{, mask}{, policy};
    cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes
        [dst], [src], size, [mbar];
    """
    optional = [MULTICAST] if to == "shared::cluster" and source == "global" else []
    optional += [HINT] if source == "global" else []
    found = _modifiers(ins, rest, *optional)
    _operands(ins, 4 + len(found))
    place, barrier = Place(ins, env, to, "write", CHUNK), Barrier(ins, env, to)
    taken = Place(ins, env, "shared::cta", "read", CHUNK) if source != "global" else None

    def run(c: Cohort, to: Array, start: Array, size: Array, mbar: Array, *more: Array) -> None:
        _check_sizes(ins, c, size)
        offsets, bars = place.offsets(c, to), barrier.offsets(c, mbar)
        barrier.must_belong(c, offsets, bars)
        froms = taken.offsets(c, start) if taken is not None else offsets
        masks = c.full(more[0]).tolist() if MULTICAST in found else [None] * c.n
        to, froms_program = c.full(to), c.full(start)
        for k, (gid, source, length) in enumerate(_lanes(c, start, size)):
            place.room(c, k, int(to[k]), length)
            if taken is None:
                words = _global(ins, env, c, gid, source, length, "read")
            else:
                at = int(froms_program[k])
                taken.room(c, k, at, length)
                words = _shared(ins, env, c, gid, at, int(froms[k]), length)
            targets = [
                _target(c, env, at, bar, length)
                for at, bar in multicast(ins, c, k, int(offsets[k]), int(bars[k]), masks[k])
            ]
            if not targets:
                continue
            barrier.must_live(c, k, targets)
            transfer = Transfer(gid, barrier.words, words, [t for t, _ in targets], length)
            tell(ins, env, c, transfer, [w for _, w in targets])
            c.wave.bulk.issue(transfer)

    kinds: tuple[str, ...] = ("addr", "addr", "u32", "addr")
    kinds += (("u16",) if MULTICAST in found else ()) + (("b64",) if HINT in found else ())
    return Op(run, kinds, cohort=True)


def _target(c: Cohort, env: Env, at: int, bar: int, length: int) -> tuple[Target, Words]:
    """A destination in shared memory, at an offset in the arena."""
    words = Words(
        c.wave, "shared", at + np.arange(0, length, CHUNK, dtype=np.int64), CHUNK, env.check_memory
    )
    return Target(words.write, at // c.wave.shared_stride, bar), words


def _to_global(ins: Instruction, env: Env, rest: list[str]) -> Op:
    """cp.async.bulk.global.shared::cta.bulk_group{.L2::cache_hint}{.cp_mask}
    [dst], [src], size{, policy}{, mask};
    """
    found = _modifiers(ins, rest, HINT, "cp_mask")
    if "cp_mask" in found:
        needs(env, 100, ins, of=".cp_mask")
    _operands(ins, 3 + len(found))
    taken = Place(ins, env, "shared::cta", "read", CHUNK)

    def run(c: Cohort, to: Array, source: Array, size: Array, *more: Array) -> None:
        _check_sizes(ins, c, size)
        offsets, program = taken.offsets(c, source), c.full(source)
        masks = c.full(more[-1]).tolist() if "cp_mask" in found else [0xFFFF] * c.n
        for k, (gid, start, length) in enumerate(_lanes(c, to, size)):
            at = int(program[k])
            taken.room(c, k, at, length)
            words = _shared(ins, env, c, gid, at, int(offsets[k]), length)
            mask = masks[k]
            target = _global(ins, env, c, gid, start, length, "write", mask)
            write = target.write if mask == 0xFFFF else partial(_masked, target, mask)
            transfer = Transfer(gid, None, words, [Target(write)], length)
            tell(ins, env, c, transfer, [target])
            c.wave.bulk.issue(transfer)

    kinds: tuple[str, ...] = ("addr", "addr", "u32")
    kinds += (("b64",) if HINT in found else ()) + (("u16",) if "cp_mask" in found else ())
    return Op(run, kinds, cohort=True)


def _masked(target: Words, mask: int, words: Array) -> None:
    """Write the bytes of each 16 that the mask names."""
    chosen = (mask >> np.arange(CHUNK) & 1).astype(np.bool_)
    target.write(words.view(np.uint8).reshape(-1, CHUNK)[:, chosen].reshape(-1))


def reduce_bulk(ins: Instruction, env: Env) -> Op:
    """cp.reduce.async.bulk.

    .shared::cluster.shared::cta.mbarrier::complete_tx::bytes.op.type [dst], [src], size, [mbar];
    .global.shared::cta.bulk_group{.L2::cache_hint}.op{.noftz}.type [dst], [src], size{, policy};
    .noftz goes with .add of .f16 and .bf16.
    """
    to, source, completion, *rest = (*ins.modifiers[3:], "", "", "")[: len(ins.modifiers)]
    rest = [word for word in rest if word]
    counted = (to, source, completion) == ("shared::cluster", "shared::cta", COMPLETES)
    grouped = (to, source, completion) == ("global", "shared::cta", GROUP)
    needs(env, 90, ins)
    if not (counted or grouped) or len(rest) < 2:
        raise Unsupported(f"form {ins.name!r}")
    hinted = grouped and rest[0] == HINT
    op, *noftz, kind = rest[hinted:] if len(rest) - hinted >= 2 else ["", ""]
    halves = op == "add" and kind in ("f16", "bf16")
    if kind not in REDUCTIONS[to].get(op, ()) or noftz != ["noftz"] * halves:
        raise Unsupported(f"form {ins.name!r}")
    _operands(ins, 4 if counted else 3 + hinted)
    change = reducer(op, kind)
    taken = Place(ins, env, "shared::cta", "read", CHUNK)
    width = element_dtype(kind).itemsize
    place = Place(ins, env, to, "atomic", CHUNK) if counted else None
    barrier = Barrier(ins, env, to) if counted else None

    def run(c: Cohort, to: Array, source: Array, size: Array, *more: Array) -> None:
        _check_sizes(ins, c, size)
        offsets, program, goals = taken.offsets(c, source), c.full(source), c.full(to)
        arena = place.offsets(c, to) if place is not None else offsets
        bars = barrier.offsets(c, more[0]) if barrier is not None else offsets
        if barrier is not None:
            barrier.must_belong(c, arena, bars)
        for k, (gid, start, length) in enumerate(_lanes(c, to, size)):
            at = int(program[k])
            taken.room(c, k, at, length)
            words = _shared(ins, env, c, gid, at, int(offsets[k]), length)
            target: Words
            if place is None or barrier is None:
                target = _global(ins, env, c, gid, start, length, "atomic", width=width)
                goal = Target(partial(change, target))
                transfer = Transfer(gid, None, words, [goal], length)
            else:
                goal_at = int(arena[k])
                place.room(c, k, int(goals[k]), length)
                steps = goal_at + np.arange(0, length, width, dtype=np.int64)
                target = Words(c.wave, "shared", steps, width, env.check_memory)
                _must(ins, c, gid, target, int(goals[k]) - goal_at, "atomic", length)
                goal = Target(
                    partial(change, target), goal_at // c.wave.shared_stride, int(bars[k])
                )
                barrier.must_live(c, k, [(goal, target)])
                transfer = Transfer(gid, barrier.words, words, [goal], length)
            tell(ins, env, c, transfer, [target], "atomic")
            c.wave.bulk.issue(transfer)

    kinds: tuple[str, ...] = ("addr", "addr", "u32")
    kinds += ("addr",) if counted else ("b64",) * hinted
    return Op(run, kinds, cohort=True)


def reducer(op: str, kind: str) -> Callable[[Words, Array], None]:
    """A function that reduces the words of a destination by what was read, of any width.

    PTX ISA says that .add.f32 flushes subnormals; an H200 keeps them.
    """
    update, elements = atomic(op, kind, False, False), element_dtype(kind)

    def change(target: Words, data: Array) -> None:
        target.update(update, elements, np.ascontiguousarray(data).view(elements).reshape(-1))

    return change


# Of one lane


def _lanes(c: Cohort, address: Array, size: Array) -> list[tuple[int, int, int]]:
    """(lane, address, size) of each."""
    columns = (c.gids.tolist(), c.full(address).tolist(), c.full(size).tolist())
    return list(zip(*columns, strict=True))


def _check_sizes(ins: Instruction, c: Cohort, size: Array) -> None:
    if (size & np.uint32(CHUNK - 1)).any():
        lane = int(np.argmax(c.full(size & np.uint32(CHUNK - 1) != 0)))
        raise KernelTrap(
            f"size {int(c.full(size)[lane])} of a bulk copy; it must be a multiple of {CHUNK}",
            c.wave.where(ins, int(c.gids[lane])),
        )


def _global(
    ins: Instruction,
    env: Env,
    c: Cohort,
    gid: int,
    start: int,
    length: int,
    kind: str,
    mask: int = 0xFFFF,
    width: int = CHUNK,
) -> Words:
    """The words of a stretch of global memory, checked."""
    if mask != 0xFFFF:
        width = 1
    if start % CHUNK:
        whole = of_global(c.wave, np.array([start]), CHUNK, env.check_memory)
        raise refuse(ins, gid, whole, 0, start, kind, f"of a bulk copy of {length} bytes")
    address = start + np.arange(0, length, width, dtype=np.int64)
    if mask != 0xFFFF:
        address = address[(mask >> (address & CHUNK - 1) & 1).astype(np.bool_)]
    words = of_global(c.wave, address, width, env.check_memory)
    bad = words.first_bad(kind)
    if bad >= 0:
        at = int(address[bad])
        raise refuse(ins, gid, words, bad, at, kind, f"of a bulk copy of {length} bytes")
    return words


def _shared(
    ins: Instruction, env: Env, c: Cohort, gid: int, start: int, at: int, length: int
) -> Words:
    """The words that a copy reads of the block's own shared memory, checked."""
    steps = at + np.arange(0, length, CHUNK, dtype=np.int64)
    words = Words(c.wave, "shared", steps, CHUNK, env.check_memory)
    _must(ins, c, gid, words, start - at, "read", length)
    return words


def _must(
    ins: Instruction, c: Cohort, gid: int, words: Words, shift: int, kind: str, length: int
) -> None:
    """Refuse words of shared memory that must not be accessed; shift leads to program addresses."""
    bad = words.first_bad(kind)
    if bad >= 0:
        at = int(words.offset[bad]) + shift
        raise refuse(ins, gid, words, bad, at, kind, f"of a bulk copy of {length} bytes")
