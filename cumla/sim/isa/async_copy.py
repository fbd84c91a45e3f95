"""cp.async. PTX ISA "Data Movement and Conversion Instructions: Non-bulk copy".

Addresses are checked, and the race detector and the counters told, when a copy is issued; when the
data moves is the business of `Copies`. Eager delivery without the race check moves it at once
and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort
from cumla.sim.copies import Land
from cumla.sim.errors import KernelTrap
from cumla.sim.isa.bulk import bulk, reduce_bulk
from cumla.sim.isa.table import Env, Op, Unsupported, instruction, nothing
from cumla.sim.isa.tensor_copy import reduce_tensor, tensor
from cumla.sim.mbarriers import Mbarriers, in_turns
from cumla.sim.memory.access import reader, writer
from cumla.sim.memory.arena import WORDS
from cumla.sim.memory.faults import Access, fault
from cumla.sim.memory.shared import offsets
from cumla.sim.ptx.syntax import Immediate, Instruction, Operand, Register

Array = NDArray[Any]
Read = Callable[[Cohort, Array, Array | None], Array]

SHARED = {"shared", "shared::cta"}
PREFETCH = {"L2::64B", "L2::128B", "L2::256B"}
HINT = "L2::cache_hint"
ONE = np.ones(1, np.uint32)


@instruction("cp")
def cp(ins: Instruction, env: Env) -> Op:
    """cp.async and what waits for it; bulk and tensor copies have files of their own."""
    words = ins.modifiers
    if words[:4] == ("reduce", "async", "bulk", "tensor"):
        return reduce_tensor(ins, env)
    if words[:3] == ("reduce", "async", "bulk"):
        return reduce_bulk(ins, env)
    if words[:2] == ("async", "bulk"):
        tensors = "tensor" in words[2:3] or words[2:4] == ("prefetch", "tensor")
        return tensor(ins, env) if tensors else bulk(ins, env)
    if words[:1] != ("async",):
        raise Unsupported(f"form {ins.name!r}")
    if words[1:] == ("commit_group",) and not ins.operands:
        return _for_groups(env, lambda c: c.wave.copies.commit(c), ())
    if words[1:] == ("wait_group",) and len(ins.operands) == 1:
        return _wait_group(ins, env)
    if words[1:] == ("wait_all",) and not ins.operands:
        return _for_groups(env, _wait_all, ())
    if words[1:3] == ("mbarrier", "arrive"):
        return _mbarrier_arrive(ins, env)
    if words[1:2] in (("ca",), ("cg",)) and len(words) > 3:
        return _copy(ins, env)
    raise Unsupported(f"form {ins.name!r}")


def _for_groups(env: Env, run: Callable[..., None], kinds: tuple[str, ...]) -> Op:
    return Op(run if env.tracked else nothing, kinds, cohort=True)


def _wait_group(ins: Instruction, env: Env) -> Op:
    """cp.async.wait_group N: at most the newest N groups may be under way."""
    newest = ins.operands[0]
    if not isinstance(newest, Immediate):
        raise Unsupported("cp.async.wait_group with a number that is not a constant")
    number = int(newest.value)
    return _for_groups(env, lambda c, newest: c.wave.copies.wait(c, number), ("u32",))


def _wait_all(c: Cohort) -> None:
    """PTX ISA: the same as commit_group and wait_group 0."""
    c.wave.copies.commit(c)
    c.wave.copies.wait(c, 0)


def _copy(ins: Instruction, env: Env) -> Op:
    """The copy.

    cp.async.{ca,cg}.shared{::cta}.global{.L2::cache_hint}{.L2::64B,.L2::128B,.L2::256B}
        [dst], [src], cp-size{, src-size}{, cache-policy};
    with ignore-src, a predicate, in the place of src-size.
    """
    _, cache, shared, source_space, *hints = ins.modifiers
    known = shared in SHARED and source_space == "global" and len(set(hints)) == len(hints)
    if not known or set(hints) - PREFETCH - {HINT} or len(set(hints) & PREFETCH) > 1:
        raise Unsupported(f"form {ins.name!r}")
    extra = len(ins.operands) - 3 - (HINT in hints)
    size = ins.operands[2] if len(ins.operands) > 2 else None
    if extra not in (0, 1) or not isinstance(size, Immediate):
        raise Unsupported(f"{ins.name!r} with {len(ins.operands)} operands")
    nbytes = int(size.value)
    if nbytes not in (4, 8, 16) or (cache == "cg" and nbytes != 16):
        raise Unsupported(f"{ins.name!r} of {nbytes} bytes")
    ignores = extra == 1 and _is_predicate(ins.operands[3], env)
    kinds: tuple[str, ...] = ("addr", "addr", "u32")
    if extra:
        kinds += ("pred",) if ignores else ("u32",)
    if HINT in hints:
        kinds += ("b64",)
    return Op(_mover(ins, env, nbytes, extra == 1, ignores), kinds, cohort=True)


def _is_predicate(operand: Operand, env: Env) -> bool:
    """Whether the fourth operand is ignore-src rather than src-size."""
    registers: Mapping[str, str] = env.registers
    return isinstance(operand, Register) and registers.get(operand.name) == "pred"


def _mover(
    ins: Instruction, env: Env, nbytes: int, sized: bool, ignores: bool
) -> Callable[..., None]:
    told = _source_reader(ins, env, nbytes, hooks=True)
    untold = _source_reader(ins, env, nbytes, hooks=False)
    write = writer(ins, env, "shared", WORDS[nbytes], hooks=False)
    eager = env.delivery == "eager"
    tracked = env.tracked
    destination = Access(ins, "shared", nbytes, "write", env.check_memory)

    def move(c: Cohort, to: Array, source: Array, *size: Array) -> None:
        write(c, to, (untold(c, source, *size),))

    def run(c: Cohort, to: Array, source: Array, cp_size: Array, *rest: Array) -> None:
        size: tuple[Array, ...] = ()
        if sized:
            size = (_source_size(ins, c, rest[0], nbytes, ignores),)
        data = told(c, source, *size)
        if eager:
            write(c, to, (data,))
        elif env.check_memory:
            offsets(destination, c, to)
        if env.count:
            c.wave.counters.access(ins, c, "shared", c.full(to), nbytes, "write")
        if tracked:
            token = None
            if env.check_race:
                token = c.wave.race.copy_issued(ins, c, offsets(destination, c, to), nbytes)
            c.wave.copies.issue(c, move, (to, source, *size), token)

    if not tracked and not sized and not env.count:

        def run_plain(c: Cohort, to: Array, source: Array, cp_size: Array, *rest: Array) -> None:
            write(c, to, (told(c, source),))

        return run_plain
    return run


def _source_size(ins: Instruction, c: Cohort, operand: Array, nbytes: int, ignores: bool) -> Array:
    """How many bytes of the source each lane reads; zeros take the place of the others."""
    if ignores:
        return np.where(operand, np.uint32(0), np.uint32(nbytes))
    if (operand > nbytes).any():
        lane = int(np.argmax(operand > nbytes))
        raise KernelTrap(
            f"src-size {int(operand[lane])} of a cp.async of {nbytes} bytes",
            c.wave.where(ins, int(c.gids[lane])),
        )
    return operand


def _source_reader(ins: Instruction, env: Env, nbytes: int, hooks: bool) -> Callable[..., Array]:
    """A function of a cohort, addresses and perhaps sizes: the source as words of `nbytes`."""
    access = Access(ins, "global", nbytes, "read", env.check_memory)
    whole = reader(ins, env, "global", WORDS[nbytes], hooks=hooks)
    # A part is read in powers of two, widest first, so each is aligned; it counts as one access.
    uncounted = replace(env, count=False)
    pieces = [
        (width, reader(ins, uncounted, "global", WORDS[width], hooks=hooks))
        for width in (8, 4, 2, 1)
        if width < nbytes
    ]

    def read(c: Cohort, source: Array, size: Array | None = None) -> Array:
        if size is None or (size == nbytes).all():
            return whole(c, source)[0]
        source, size = c.full(source), c.full(size)
        words = np.zeros(c.n, WORDS[nbytes])
        full = size == nbytes
        if full.any():
            words[full] = whole(c.subset(full), source[full])[0]
        part = (size > 0) & ~full
        if part.any():
            # The address must be a multiple of cp-size, however little is read.
            if (source[part] & (nbytes - 1)).any():
                raise fault(access, c.subset(part), source[part])
            if hooks and env.count:
                lanes = c.subset(part)
                c.wave.counters.access(ins, lanes, "global", source[part], size[part], "read")
            data = words.view(np.uint8).reshape(c.n, nbytes)
            for width, piece in pieces:
                rows = np.flatnonzero(part & (size & width != 0))
                if rows.shape[0]:
                    start = (size[rows] & ~np.uint32(2 * width - 1)).astype(np.int64)
                    (some,) = piece(c.subset(rows), source[rows] + start)
                    columns = start[:, None] + np.arange(width)
                    data[rows[:, None], columns] = some.view(np.uint8).reshape(-1, width)
        return words

    return read


def _mbarrier_arrive(ins: Instruction, env: Env) -> Op:
    """cp.async.mbarrier.arrive{.noinc}{.shared{::cta}}.b64 [addr]."""
    *middle, kind = ins.modifiers[3:] or ("",)
    spaces = [word for word in middle if word in SHARED]
    if kind != "b64" or middle not in (spaces, ["noinc", *spaces]) or len(spaces) > 1:
        raise Unsupported(f"form {ins.name!r}")
    if len(ins.operands) != 1:
        raise Unsupported(f"{ins.name!r} with {len(ins.operands)} operands")
    increments = middle == spaces
    words = Mbarriers(ins, env, "shared" if spaces else "generic")

    def arrive(c: Cohort, at: Array, land: Land) -> None:
        for _, barriers in in_turns(words, c, at, ONE):
            land(barriers.c, barriers.keys())
            barriers.take_arrivals(ONE)
            barriers.store()

    def run(c: Cohort, address: Array) -> None:
        barriers = words.find(c, address)
        if increments:
            barriers.load()
            barriers.add_pending(ONE)
            barriers.store()
        barriers.tell("cta")
        c.wave.copies.arrive(c, barriers.lane_offsets, arrive)

    return Op(run, ("addr",), cohort=True)
