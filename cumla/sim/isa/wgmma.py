"""wgmma: matrix products that four warps start together and wait for later.

PTX ISA "Asynchronous Warpgroup Level Matrix Instructions". A warpgroup is four consecutive warps of
a block, the first of them with a number divisible by four. Descriptors are checked, and the race
detector and the counters told, when an operation is issued; when operands are read and D is
written is the business of `Warpgroups`. Eager delivery without the race check computes at once and
keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort
from cumla.sim.errors import KernelTrap, MemoryFault
from cumla.sim.isa.convergence import waits_for_lanes, whole_warps
from cumla.sim.isa.table import Env, Op, Unsupported, instruction, needs, nothing
from cumla.sim.isa.wgmma_operands import (
    CHUNK,
    ROWS,
    Descriptor,
    Form,
    a_words,
    chunk_addresses,
    parse,
)
from cumla.sim.isa.wgmma_product import KINDS, accumulate, gather, multiply
from cumla.sim.memory.arena import WORDS, WRITTEN
from cumla.sim.ptx.syntax import Immediate, Instruction, Register, Vector
from cumla.sim.warpgroup_steps import LANES, numbers
from cumla.sim.warpgroups import Operation
from cumla.sim.wave import Wave

Array = NDArray[Any]
# The race detector names the queue of a warpgroup by a number of its own below this; those of bulk
# copies are from the AGENTS of bulk_places.py up.
AGENTS = -(1 << 40)
WRITTEN_8 = np.uint64(int.from_bytes(bytes([WRITTEN]) * 8, "little"))


@instruction("wgmma")
def wgmma(ins: Instruction, env: Env) -> Op:
    """wgmma.mma_async and what orders it and waits for it. PTX ISA: it requires sm_90a."""
    needs(env, 90, ins, only=(90,))
    kind = ins.modifiers[0] if ins.modifiers else ""
    if kind == "mma_async":
        return _mma_async(ins, env)
    if ins.modifiers[1:] != ("sync", "aligned"):
        raise Unsupported(f"form {ins.name!r}")
    if kind == "fence" and not ins.operands:
        return _by_warp(ins, env, nothing)
    if kind == "commit_group" and not ins.operands:
        return _by_warp(ins, env, _commit if env.tracked else nothing)
    if kind == "wait_group" and len(ins.operands) == 1:
        newest = ins.operands[0]
        if not isinstance(newest, Immediate) or newest.value < 0:
            raise Unsupported("wgmma.wait_group with a number that is not a constant")
        number = int(newest.value)

        def wait(c: Cohort, newest: Array) -> None:
            c.wave.warpgroups.wait(c, number)

        return _by_warp(ins, env, wait if env.tracked else nothing, ("u32",))
    raise Unsupported(f"form {ins.name!r}")


def _commit(c: Cohort) -> None:
    c.wave.warpgroups.commit(c)


def _by_warp(
    ins: Instruction, env: Env, run: Callable[..., None], kinds: tuple[str, ...] = ()
) -> Op:
    """What each warp does by itself: .sync waits for its lanes only."""

    def checked(c: Cohort, *operands: Array) -> None:
        c.wave.warpgroups.steps.executed(ins, c)
        run(c, *operands)

    return Op(
        checked if env.check_race else run,
        kinds,
        cohort=True,
        ready=whole_warps,
        waits_for=lambda c, *_: waits_for_lanes(ins, c),
        warp_gate=True,
    )


# Warpgroups


def whole_warpgroups(c: Cohort, *_: Any) -> Any:
    """`Op.ready` of wgmma.mma_async: lanes whose warpgroups are here, all of them that live."""
    if c.n == c.wave.live_count:
        return True
    everybody = numbers(c.wave, np.flatnonzero(c.wave.live))
    living = np.bincount(everybody)
    here = numbers(c.wave, c.gids)
    present = np.bincount(here, minlength=living.shape[0])
    if present.shape == living.shape and bool((present[here] == living[here]).all()):
        return True
    return present[here] == living[here]


def _demand_warpgroups(ins: Instruction, c: Cohort) -> None:
    """Refuse warpgroups that are not four whole warps."""
    gids = c.gids
    if c.n % LANES == 0 and c.wave.lanes_per_block % LANES == 0:
        first = gids[::LANES]
        if not (first & LANES - 1).any() and (gids[LANES - 1 :: LANES] - first < LANES).all():
            return
    groups = numbers(c.wave, gids)
    _, start, counts = np.unique(groups, return_index=True, return_counts=True)
    short = np.flatnonzero(counts != LANES)
    if short.shape[0]:
        gid = int(gids[start[short[0]]])
        raise KernelTrap(
            f"wgmma.mma_async by {int(counts[short[0]])} threads of a warpgroup; all 128 of four "
            "warps, the first with a number divisible by 4, must execute it",
            c.wave.where(ins, gid),
        )


def _uniform(ins: Instruction, c: Cohort, name: str, values: Array) -> Array:
    """[1] or [warpgroups]: an operand that must be the same in a whole warpgroup."""
    if values.shape[0] == 1:
        return values
    rows = values.reshape(-1, LANES)
    differ = rows != rows[:, :1]
    if differ.any():
        at = int(np.flatnonzero(differ.reshape(-1))[0])
        first = rows[at // LANES, 0]
        raise KernelTrap(
            f"{name} of wgmma.mma_async is {_text(values[at])} here and {_text(first)} in the "
            "first thread of the warpgroup; it must be the same in all of it",
            c.wave.where(ins, int(c.gids[at])),
        )
    firsts = rows[:, 0]
    return firsts[:1] if (firsts == firsts[0]).all() else firsts


def _text(value: Any) -> str:
    return f"{int(value):#018x}" if value.dtype == np.uint64 else str(bool(value))


# Operands in shared memory


@dataclass(frozen=True, slots=True)
class _Shared:
    """One of the operands of an instruction, as descriptors.

    Attributes:
        name: "A" or "B", for messages.
        rows: of A, or columns of B.
    """

    ins: Instruction
    name: str
    rows: int
    mn_major: bool
    check: bool

    def offsets(self, c: Cohort, descriptors: Array) -> Array:
        """[warpgroups, ...] arena offsets of the chunks; raises MemoryFault."""
        wave = c.wave
        slots = c.gids[::LANES] // wave.lanes_per_block
        found = [chunk_addresses(d, self.rows, self.mn_major) for d in descriptors.tolist()]
        # Descriptors hold the lower 18 bits of an address in the block's own shared memory.
        found_at = [f.addresses for f in found]
        addresses = np.stack(found_at) if len(found) > 1 else found_at[0][None]
        low, high = 0, wave.shared_stride
        if self.check:
            low = wave.shared_start
            high = low + wave.shared_size
        if min(f.low for f in found) < low or max(f.high for f in found) > high:
            bad = (addresses < low) | (addresses > high - CHUNK)
            raise self.fault(c, descriptors, addresses, bad, "out of bounds")
        offsets: Array = addresses + (slots * wave.shared_stride)[:, None, None]
        if self.check:
            states = wave.memory.shared.states[WORDS[CHUNK]].take(offsets >> 4).view(np.uint64)
            if (np.bitwise_and.reduce(states.reshape(-1)) & WRITTEN_8) != WRITTEN_8:
                missing = ((states & WRITTEN_8) != WRITTEN_8).reshape(*offsets.shape, 2)
                bad = missing.any(axis=-1)
                spread = np.broadcast_to(addresses, offsets.shape)
                raise self.fault(c, descriptors, spread, bad, "read of unwritten memory")
        return offsets

    def fault(
        self, c: Cohort, descriptors: Array, addresses: Array, bad: Array, kind: str
    ) -> MemoryFault:
        group = int(np.argmax(bad.reshape(bad.shape[0], -1).any(axis=1)))
        descriptor = Descriptor.of(int(descriptors[min(group, descriptors.shape[0] - 1)]))
        wave = c.wave
        start = wave.shared_start
        at = int(addresses[group][bad[group]].min())
        size = wave.shared_size
        text = (
            f"wgmma.mma_async reads {self.name} at shared address {at:#x}, by {descriptor}; "
            f"the block has {size} bytes of shared memory, [{start:#x}, {start + size:#x})"
        )
        return MemoryFault(kind, text, at, wave.where(self.ins, int(c.gids[group * LANES])))


def _read(wave: Wave, offsets: Array) -> Array:
    """Chunks at arena offsets [..., chunks] as [..., words]."""
    chunks = wave.memory.shared.views[WORDS[CHUNK]].take(offsets >> 4)
    words: Array = chunks.view(np.uint32).reshape(*offsets.shape[:-1], -1)
    return words


# wgmma.mma_async


def _mma_async(ins: Instruction, env: Env) -> Op:
    form = parse(ins, env)
    kind = KINDS[form.d]
    a_kinds = ("b32",) * 4 if form.a_in_registers else ("b64",)
    kinds = (kind,) * form.d_registers + a_kinds + ("b64", "pred")
    options = len(ins.operands) - 4  # immediates, which the form holds
    return Op(
        _runner(ins, env, form),
        kinds + ("s32",) * options,
        (kind,) * form.d_registers,
        cohort=True,
        ready=whole_warpgroups,
        waits_for=lambda c, *_: f"the other warps of its warpgroup at {ins.name}",
        updates=True,
    )


def _runner(ins: Instruction, env: Env, form: Form) -> Callable[..., tuple[Array, ...]]:
    registers = form.d_registers
    a_operand = _Shared(ins, "A", ROWS, form.a_mn_major, env.check_memory)
    b_operand = _Shared(ins, "B", form.n, form.b_mn_major, env.check_memory)
    tracked = env.tracked
    held = frozenset(_names(ins) if form.a_in_registers else ())

    def run(c: Cohort, *values: Array) -> tuple[Array, ...]:
        _demand_warpgroups(ins, c)
        old: Sequence[Array] = values[:registers]
        rest = values[registers:]
        wave = c.wave
        if form.a_in_registers:
            a = a_words(gather(rest[:4], (4, c.n), np.uint32))
            rest, reads = rest[4:], []
        else:
            a = a_operand.offsets(c, _uniform(ins, c, "a-desc", rest[0]))
            rest, reads = rest[1:], [a]
        b_at = b_operand.offsets(c, _uniform(ins, c, "b-desc", rest[0]))
        takes = _uniform(ins, c, "scale-d", rest[1])
        if env.count:
            wave.counters.flops(ins, c, form.flops_of_warp)

        def work(groups: Array | None) -> Array:
            """D of the warpgroups where the mask is true; None: of all."""
            some: Any = slice(None)
            lanes: Any = slice(None)
            if groups is not None and not groups.all():
                some, lanes = groups, np.repeat(groups, LANES)
            a_data = a[some] if form.a_in_registers else _read(wave, a[some])
            product = multiply(form, a_data, _read(wave, b_at[some]))
            if takes.shape[0] == 1:
                if groups is None or not takes[0]:
                    return accumulate(form, product, old if takes[0] else None)
                taken = [r if r.shape[0] == 1 else r[lanes] for r in old]
                return accumulate(form, product, taken)
            scale = np.repeat(takes, LANES)[lanes]
            zero = np.zeros(1, old[0].dtype)
            taken = [np.where(scale, r if r.shape[0] == 1 else r[lanes], zero) for r in old]
            return accumulate(form, product, taken)

        if not tracked:
            return tuple(work(None))
        shape = (form.n, form.d)
        if env.check_race:
            wave.warpgroups.steps.met(ins, c)
            _take_up(ins, c, shape, old)
        tell = _tell(ins, env, c, [*reads, b_at]) if env.check_race else None
        buffer = gather(old, (registers, c.n), old[0].dtype)
        operation = Operation(ins, shape, c.gids, buffer, work, held, old, tell)
        wave.warpgroups.issue(operation)
        return tuple(buffer)

    return run


def _names(ins: Instruction) -> list[str]:
    a = ins.operands[1]
    assert isinstance(a, Vector)
    return [r.name for r in a.items if isinstance(r, Register)]


def _take_up(ins: Instruction, c: Cohort, shape: Any, old: Sequence[Array]) -> None:
    """D may hold accumulators in flight only of operations of the same shape."""
    warpgroups = c.wave.warpgroups
    found = warpgroups.take_up(shape, old)
    if found is not None:
        place, lanes, other = found
        gid = int(c.gids[np.argmax(lanes)])
        name = f"register {place} of D, in another shape"
        raise warpgroups.checks.error(ins, name, gid, other, "takes up", "is an accumulator")


def _tell(
    ins: Instruction, env: Env, c: Cohort, operands: Sequence[Array]
) -> Callable[[Array], None]:
    """Tell the race detector what is read; what tells it that lanes have waited for that."""
    race = c.wave.race
    issuers = c.gids[::LANES]
    agents = AGENTS - numbers(c.wave, issuers)
    stamps = []
    for offsets in operands:
        rows = np.repeat(np.arange(issuers.shape[0]), offsets[0].size)
        stamps.append(
            race.asynchronous(
                ins, issuers, agents, "shared", "read", offsets.reshape(-1), rows, CHUNK
            )
        )
    stamp, gids = max(stamps), c.gids

    def tell(lanes: Array) -> None:
        some = gids[lanes]
        race.completed(some, np.repeat(agents, LANES)[lanes], stamp)

    return tell
