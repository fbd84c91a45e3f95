"""What a race is, in data and in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cumla.sim.cohort import WARP, Array
from cumla.sim.errors import SimError
from cumla.sim.ptx.syntax import Instruction
from cumla.sim.race.layout import SPECIAL, Layout

if TYPE_CHECKING:
    from cumla.sim.wave import Wave

Triple = tuple[int, int, int]
_READS = ("read", "asynchronous read")
_ATOMICS = ("atomic", "asynchronous reduction", "asynchronous arrival")


@dataclass(frozen=True, slots=True)
class Access:
    """One of the two accesses of a race.

    Attributes:
        kind: "read", "write", "atomic", "asynchronous copy", "asynchronous read", "asynchronous
            reduction", or "exit" of the block whose shared memory it is.
        thread: None for a block's exit, and for an earlier asynchronous access, which is not its
            issuer's; but a copy by cp.async that was waited for is.
        line: source line, "file.cu:12", or the PTX line where there is no line information.
        text: the PTX instruction.
    """

    kind: str
    thread: Triple | None
    block: Triple
    line: str
    text: str


@dataclass(frozen=True, slots=True)
class Race:
    """Two accesses to the same bytes, not both reads, that nothing orders.

    Attributes:
        space: "shared" or "global".
        offset: of the first of the bytes: in the block's shared memory, or in the simulated
            global memory.
        nbytes: bytes that conflict there.
        first, second: in the order in which they were simulated.
        hint: what may be missing.
        count: how often this pair of instructions raced, in words of memory.
        owner: the block whose shared memory it is, where blocks of a cluster share theirs.
    """

    space: str
    offset: int
    nbytes: int
    first: Access
    second: Access
    hint: str
    count: int = 1
    owner: Triple | None = None

    def __str__(self) -> str:
        first, second = self.first, self.second
        who = "" if first.thread is None else f"by thread {_triple(first.thread)} "
        text = (
            f"{self.space} memory race at offset {self.offset:#x} ({self.nbytes} bytes)"
            f"{'' if self.owner is None else f' of block {_triple(self.owner)}'}: "
            f"{first.kind} {who}of block {_triple(first.block)} at {first.line}, then "
        )
        if second.thread is None:
            text += f"the {second.kind} of block {_triple(second.block)}"
        else:
            text += f"{second.kind} by thread {_triple(second.thread)}"
            if second.block != first.block:
                text += f" of block {_triple(second.block)}"
        text += f" at {second.line}, nothing orders them"
        if self.hint:
            text += f"; {self.hint}"
        if self.count > 1:
            text += f" ({self.count} such conflicts)"
        return text


def _triple(values: Triple) -> str:
    return "({}, {}, {})".format(*values)


def _unravel(index: int, shape: Triple) -> Triple:
    return index % shape[0], index // shape[0] % shape[1], index // (shape[0] * shape[1])


@dataclass(frozen=True, slots=True)
class Site:
    """An instruction as a kind of access.

    Attributes:
        number: among all sites of the launch.
        kind: "read", "write", "atomic", "asynchronous copy", "asynchronous read", "asynchronous
            reduction", or "exit" of the block whose shared memory it is.
        strength: 0: weak; 1: strong, for threads of one block; 2: strong for all.
        flags: of the states that it leaves, the stamp and thread left out.
    """

    number: int
    ins: Instruction
    kind: str
    order: str
    strength: int
    flags: int

    @property
    def writes(self) -> bool:
        return self.kind not in _READS


class History:
    """The accesses of a launch, numbered from 1, and their sites.

    Attributes:
        now: the number of the last access, its stamp.
        blocks: those that run together, as numbers in the grid, by slot.
    """

    def __init__(self, layout: Layout, blocks: int) -> None:
        self.layout = layout
        self.now = 0
        self._sites: list[Site] = []
        self._known: dict[tuple[Instruction, str, str, str], Site] = {}
        self._of = np.zeros(1024, np.uint32)
        self._atomic = np.zeros(64, np.bool_)
        self._turns = np.zeros(blocks, np.int32)
        self.blocks = np.zeros(0, np.int64)

    def site(self, ins: Instruction, kind: str, order: str, scope: str) -> Site:
        """The site of an instruction."""
        key = (ins, kind, order, scope)
        site = self._known.get(key)
        if site is None:
            # PTX ISA "Operation types": volatile is relaxed at system scope. Without clusters a
            # cluster is a block, but with them the detector could not tell whose it is.
            if kind != "atomic" and order == "weak":
                strength = 0
            else:
                strength = 1 if scope == "cta" and order != "volatile" else 2
            flags = strength << self.layout.strength_shift
            if kind not in _READS:
                flags |= self.layout.write
            site = Site(len(self._sites), ins, kind, order, strength, flags)
            if site.number >= self._atomic.shape[0]:
                self._atomic = np.append(self._atomic, np.zeros_like(self._atomic))
            self._atomic[site.number] = kind in _ATOMICS
            self._sites.append(site)
            self._known[key] = site
        return site

    def begin(self, site: Site) -> int:
        """Number a new access; the flags and stamp of its states."""
        self.now += 1
        if self.now >= self._of.shape[0]:
            if self.now > self.layout.last_stamp:
                raise SimError("the launch is too long for race checks: launch a smaller grid")
            self._of = np.append(self._of, np.zeros_like(self._of))
        self._of[self.now] = site.number
        return self.now << self.layout.stamp_shift | site.flags

    def site_at(self, stamp: int) -> Site:
        """The site of an access."""
        return self._sites[self._of[stamp]]

    def sites_at(self, stamps: Array) -> Array:
        """The numbers of the sites of accesses."""
        return self._of[stamps]

    def atomic_at(self, stamps: Array) -> Array:
        """Whether accesses were atomic updates."""
        return self._atomic[self._of[stamps]]

    def seat(self, block_ids: Array) -> None:
        """These blocks run together, in the order of the lanes."""
        self.blocks = np.asarray(block_ids)
        self._turns[block_ids] = np.arange(len(block_ids))

    def turn(self, threads: Array) -> Array:
        """The order in which threads of one wave take part in one instruction."""
        blocks = threads >> self.layout.local_bits
        return (self._turns[blocks].astype(np.int64) << self.layout.local_bits) | (
            threads & self.layout.locals
        )


class Reports:
    """The races found so far, one for each pair of instructions."""

    def __init__(self, wave: Wave, layout: Layout, history: History) -> None:
        self.block: Triple = wave.block
        self.grid: Triple = wave.grid
        self.layout = layout
        self.history = history
        self.races: dict[tuple[str, int, int], Race] = {}

    def add(
        self,
        space: str,
        offsets: Array,
        nbytes: int,
        states: Array,
        threads: Array,
        site: Site,
        unfenced: Array | None = None,
        slots: Array | None = None,
    ) -> None:
        """Conflicts of a site's accesses by threads with earlier ones that left these states.

        unfenced: where what may be missing is a proxy fence.
        slots: whose shared memory it is, if that is to be said.
        """
        stamps = (states & self.layout.stamps) >> self.layout.stamp_shift
        numbers = self.history.sites_at(stamps)
        for number in np.unique(numbers).tolist():
            at = np.flatnonzero(numbers == number)
            key = (space, number, site.number)
            old = self.races.get(key)
            if old is not None:
                self.races[key] = replace(old, count=old.count + at.shape[0])
                continue
            i = int(at[np.argmax(self._apart(states[at], threads[at]))])
            alike = (states ^ states[i] | threads ^ threads[i]) & self.layout.threads == 0
            mine = np.unique(offsets[at[alike[at]]])
            # Of the stretches of bytes without a gap, the one that holds this conflict.
            edges = np.flatnonzero(np.diff(mine) != nbytes) + 1
            stretch = next(s for s in np.split(mine, edges) if offsets[i] in s)
            self.races[key] = self._race(
                space,
                int(stretch[0]),
                nbytes * stretch.shape[0],
                int(states[i]),
                int(threads[i]),
                site,
                at.shape[0],
                unfenced is not None and bool(unfenced[i]),
                None if slots is None else int(self.history.blocks[slots[i]]),
            )

    def _apart(self, states: Array, threads: Array) -> Array:
        """How much it takes to order each two threads: a warp's barrier, a block's, or more."""
        apart = (states ^ threads) & self.layout.threads
        return (apart >> 5 != 0) + (apart >> self.layout.local_bits != 0).astype(np.int64)

    def _race(
        self,
        space: str,
        offset: int,
        nbytes: int,
        state: int,
        thread: int,
        site: Site,
        count: int,
        unfenced: bool,
        owner: int | None,
    ) -> Race:
        layout = self.layout
        before = self.history.site_at((state & layout.stamps) >> layout.stamp_shift)
        other = state & layout.threads
        first = self._access(before, other)
        second = self._access(site, thread)
        hint = self._hint(space, state, thread, before, site, unfenced)
        block = None if owner is None else _unravel(owner, self.grid)
        return Race(space, offset, nbytes, first, second, hint, count, block)

    def _access(self, site: Site, thread: int) -> Access:
        local = thread & self.layout.locals
        block = _unravel(thread >> self.layout.local_bits, self.grid)
        single = local < self.layout.lanes and site.kind != "exit"
        who = _unravel(local, self.block) if single else None
        return Access(site.kind, who, block, site.ins.where, site.ins.text)

    def _hint(
        self, space: str, state: int, thread: int, before: Site, site: Site, unfenced: bool
    ) -> str:
        layout = self.layout
        other = state & layout.threads
        if site.kind == "exit":
            if state & layout.locals >= layout.lanes:
                return f"the {before.kind} was not waited for before the block's end"
            return "the block may be gone before: barrier.cluster missing before its end"
        if unfenced:
            return "fence.proxy.async missing between them"
        if state >= SPECIAL and before.kind.startswith("asynchronous"):
            return f"the {before.kind} was not waited for"
        if (state & layout.stamps) >> layout.stamp_shift == self.history.now:
            return "both threads write in one instruction"
        if other >> layout.local_bits != thread >> layout.local_bits:
            if before.strength and site.strength:
                return "a scope of .cta does not include the other block"
            if space == "shared":
                return "barrier.cluster, or an mbarrier of the other block, missing between them"
            return (
                "between blocks only a release (__threadfence before an atomic) and an acquire "
                "order accesses"
            )
        if other // WARP == thread // WARP:
            return "__syncwarp missing between them"
        return "__syncthreads or another barrier missing between them"
