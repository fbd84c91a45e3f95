"""Races between grids that may run at the same time: programmatic dependent launch.

Each grid notes which bytes of global memory each of its instructions touches, and whether the
thread knew then that the grid before had completed: because it passed griddepcontrol.wait, or met
one that had. Once all have ended the notes are compared, so that it does not matter in which order
the grids were simulated. Flags in memory, by which grids could tell each other more, are not
followed: what only they order counts as a race.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.memory.device import DeviceMemory
from cumla.sim.ptx.syntax import Instruction
from cumla.sim.race.clocks import Clocks

_PENDING = 1 << 20  # accesses that are noted before they are made unique


class Touch(NamedTuple):
    """An instruction as a kind of access.

    Attributes:
        strong: atomic or strong at gpu or system scope: such accesses do not race.
        ordered: the threads knew that the grid before had completed.
    """

    ins: Instruction
    kind: str
    strong: bool
    nbytes: int
    ordered: bool


@dataclass(slots=True)
class _Touched:
    """Where lanes accessed nbytes bytes each: byte offsets, not yet sorted nor unique."""

    parts: list[Array] = field(default_factory=list)
    pending: int = 0

    def add(self, offsets: Array) -> None:
        self.parts.append(offsets)
        self.pending += offsets.shape[0]
        if self.pending > _PENDING:
            self.offsets()

    def offsets(self) -> Array:
        """Sorted and unique."""
        self.parts = [np.unique(np.concatenate(self.parts))]
        self.pending = 0
        return self.parts[0]


class Overlap:
    """The accesses of one grid.

    Attributes:
        kernel: its name.
        first: no grid before it may run at the same time.
        waited: a thread has passed griddepcontrol.wait.
        waited_first: a block did so before it executed launch_dependents, or ended.
        touched: what each kind of access touched.
    """

    def __init__(self, kernel: str, first: bool) -> None:
        self.kernel = kernel
        self.first = first
        self.waited = False
        self.waited_first = False
        self.touched: dict[Touch, _Touched] = {}
        self.next_wave(0)

    def next_wave(self, lanes: int) -> None:
        """Other blocks run from now on, in so many lanes."""
        self._knows = np.full(lanes, self.first)
        self._clocks: Clocks | None = None  # once somebody has waited
        self._waiters: dict[int, Array] = {}  # thread of a block -> [slots] stamp of its wait, or 0

    def wait(self, clocks: Clocks, gids: Array, stamp: int) -> None:
        """The lanes have passed griddepcontrol.wait, at this stamp."""
        self.waited = True
        self._clocks = clocks
        new = gids[~self._knows[gids]]
        self._knows[gids] = True
        lanes = clocks.threads.lanes
        for local in np.unique(new % lanes).tolist():
            stamps = self._waiters.setdefault(local, np.zeros(self._knows.shape[0] // lanes, int))
            stamps[new[new % lanes == local] // lanes] = stamp

    def released(self, gids: Array) -> None:
        """The lanes are those of blocks that let the next grid start."""
        if not self.first and self._known(gids).any():
            self.waited_first = True

    def access(
        self,
        ins: Instruction,
        gids: Array,
        offsets: Array,
        nbytes: int,
        kind: str,
        strong: bool,
    ) -> None:
        """Lanes access nbytes bytes of global memory each."""
        known = self._known(gids)
        for ordered in (False, True):
            which = known == ordered
            if which.any():
                touch = Touch(ins, kind, strong, nbytes, ordered)
                touched = self.touched.get(touch)
                if touched is None:
                    touched = self.touched[touch] = _Touched()
                touched.add(offsets[which])

    def _known(self, gids: Array) -> Array:
        """Which lanes know that the grid before has completed."""
        known = self._knows[gids]
        clocks = self._clocks
        if known.all() or clocks is None:
            return known
        threads = clocks.threads
        rest = np.flatnonzero(~known)
        slots = self._knows.shape[0] // threads.lanes
        # A lane may know a waiter of its own block, or, if anything came from there, of another.
        for shift in range(1 if clocks.abroad is None else slots):
            for local, stamps in self._waiters.items():
                slot = (gids[rest] // threads.lanes + shift) % slots
                stamp = stamps[slot]
                waiter = threads.thread[slot * threads.lanes + local]
                found = (stamp > 0) & clocks.known(gids[rest], waiter, stamp)
                self._knows[gids[rest[found]]] = True
                rest = rest[~found]
                if not rest.shape[0]:
                    return self._knows[gids]
        return self._knows[gids]


def races_between(
    memory: DeviceMemory, overlaps: list[Overlap], signalled: list[bool]
) -> tuple[str, ...]:
    """The races between grids that follow one another in a stream, each dependent on the last.

    Args:
        signalled: of each grid, whether a block of it executed launch_dependents: without that the
            next one starts when it has completed.
    """
    found: list[str] = []
    starts: list[set[int]] = []  # which grids have completed when a grid starts,
    ends: list[set[int]] = []  # and when it has completed
    for k, later in enumerate(overlaps):
        start: set[int] = set()
        waited: set[int] = set()
        if k:
            p = k - 1
            start = starts[p] | (set() if signalled[p] else ends[p])
            if p and overlaps[p].waited_first:
                start |= ends[p - 1]
            waited = start | ends[p]
        starts.append(start)
        ends.append({k} | (waited if later.waited else start))
        for j, earlier in enumerate(overlaps[:k]):
            found += _between(memory, earlier, later, j in start, j in waited)
    return tuple(found)


def _between(
    memory: DeviceMemory, earlier: Overlap, later: Overlap, at_start: bool, after_wait: bool
) -> list[str]:
    found = []
    for b, theirs in later.touched.items():
        if at_start or (b.ordered and after_wait):
            continue
        for a, touched in earlier.touched.items():
            if (a.kind == b.kind == "read") or (a.strong and b.strong):
                continue
            mine, other = touched.offsets(), theirs.offsets()
            at = np.searchsorted(mine, other - a.nbytes, side="right")
            meets = at < mine.shape[0]
            meets[meets] = mine[at[meets]] < other[meets] + b.nbytes
            if meets.any():
                offset = int(other[meets][0])
                found.append(_describe(memory, earlier, later, a, b, offset, int(meets.sum())))
    return found


def _describe(
    memory: DeviceMemory,
    earlier: Overlap,
    later: Overlap,
    a: Touch,
    b: Touch,
    offset: int,
    count: int,
) -> str:
    allocation, _ = memory.nearest(offset)
    place = f"at offset {offset:#x}"
    if allocation is not None and offset < allocation.stop:
        place = f"{offset - allocation.start} bytes into {allocation}"
    text = (
        f"global memory race between two grids, {place}: {a.kind} by kernel {earlier.kernel} at "
        f"{a.ins.where}, and {b.kind} by kernel {later.kernel} at {b.ins.where}, "
    )
    if b.ordered:
        text += (
            f"whose griddepcontrol.wait is for the grid right before it, which did not wait "
            f"for {earlier.kernel} itself"
        )
    else:
        text += "which has not executed griddepcontrol.wait before"
    return text + (f" ({count} such conflicts)" if count > 1 else "")
