"""Synchronisation through memory: fences, strong accesses, what they release and acquire.

PTX ISA "Memory Consistency Model", "Release and Acquire Patterns" and "Synchronizes-with": a
release, or a fence before a strong write, synchronises with an acquire, or a strong read before a
fence, that reads what was written, or what atomics made of it since. On two counts more is taken
as ordered, because CUDA's own samples rely on it: see `FenceClocks`, and `MemoryOrder.barrier`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.race.clock import Clock, merged
from cumla.sim.race.clocks import Clocks, Rows
from cumla.sim.race.fences import FenceClocks
from cumla.sim.race.lanes import Threads
from cumla.sim.race.report import History, Site

_ACQUIRES = ("acquire", "acq_rel")
_RELEASES = ("release", "acq_rel")


@dataclass(slots=True)
class _Place:
    """What who reads a place can acquire.

    Attributes:
        wide: what was released to the whole device.
        near: by block, what was released by and to the threads of the block.
        writer: the thread that stored last, and, if it did so with a release, what that released:
            its later strong stores release it as well.
    """

    wide: Clock | None = None
    near: dict[int, Clock] = field(default_factory=dict)
    writer: int = -1
    released: tuple[Clock | None, Clock | None] = (None, None)


class Places:
    """The places in memory that something was released to: (space, byte offset) -> `_Place`."""

    def __init__(self) -> None:
        self.places: dict[tuple[str, int], _Place] = {}

    def forget_shared(self) -> None:
        """The blocks have gone, and their shared memory."""
        for key in [key for key in self.places if key[0] == "shared"]:
            del self.places[key]


class MemoryOrder:
    """The fences and strong accesses of the lanes of a wave.

    Attributes:
        flows: the clocks that go along when lanes meet: those of fences, narrow and wide.
    """

    def __init__(
        self, threads: Threads, rows: Rows, clocks: Clocks, history: History, places: Places
    ) -> None:
        self.threads = threads
        self.clocks = clocks
        self.history = history
        self.flows: list[FenceClocks] = []
        self._rows = rows
        self._places = places.places
        self._narrow: FenceClocks | None = None
        self._wide: FenceClocks | None = None
        # By lane: clocks that strong reads saw; whether only a wide fence makes them known.
        self._seen: dict[int, dict[Clock, bool]] = {}

    def fence(self, gids: Array, scope: str, order: str) -> None:
        """The lanes execute a fence of this scope: "acq_rel", "sc", "acquire" or "release"."""
        wide = scope != "cta"
        if order != "release":
            self._know(gids, wide)
        if order == "acquire":
            return
        now = self.history.now
        if self._narrow is None:
            self._narrow = FenceClocks(self.threads, self._rows)
            self.flows.append(self._narrow)
        self._narrow.fence(gids, self.clocks, now)
        if wide:
            if self._wide is None:
                self._wide = FenceClocks(self.threads, self._rows)
                self.flows.append(self._wide)
            self._wide.fence(gids, self.clocks, now)

    def barrier(self, gids: Array) -> None:
        """The lanes meet at a barrier of their block.

        It completes an acquire: that one thread reads a flag or takes a ticket, and then all go on
        to read what that announces, is how reductions by the last block are written.
        """
        self._know(gids, True)

    def _know(self, gids: Array, wide: bool) -> None:
        """The lanes, ascending, get to know what they have seen."""
        if not self._seen:
            return
        seers = np.fromiter(self._seen, np.int64)
        at = np.searchsorted(gids, seers)
        at[at == gids.shape[0]] = 0
        for gid in seers[gids[at] == seers].tolist():
            seen = self._seen.pop(gid)
            for clock, needs_wide in list(seen.items()):
                if wide or not needs_wide:
                    self.clocks.absorb(gid, clock)
                    del seen[clock]
            if seen:
                self._seen[gid] = seen

    def access(self, space: str, offsets: Array, gids: Array, site: Site) -> None:
        """Strong accesses to byte offsets, in the order of the lanes."""
        releases = site.order in _RELEASES and site.writes
        if not (releases or self.flows or self._places):
            return
        if site.writes and self._narrow is not None and not releases:
            active = self._narrow.fenced(gids)
        else:
            active = np.full(gids.shape[0], releases)
        if not active.all() and self._places:
            held = np.array([at for where, at in self._places if where == space], np.int64)
            active |= np.isin(offsets, held)
        if site.writes and active.any():
            # What one lane releases the next ones may acquire, or overwrite.
            active |= np.isin(offsets, offsets[active])
        for i in np.flatnonzero(active).tolist():
            self._access(space, int(offsets[i]), int(gids[i]), site, releases)

    def _access(self, space: str, offset: int, gid: int, site: Site, releases: bool) -> None:
        place = self._places.get((space, offset))
        wide = site.strength == 2
        block = int(self.threads.block[gid])
        if place is not None and site.kind != "write":
            self._see(gid, place.near.get(block), False, site)
            if wide:
                self._see(gid, place.wide, True, site)
        if site.kind == "read":
            return
        near, far = self._released(gid, releases, wide)
        thread = int(self.threads.thread[gid])
        if site.kind == "write":
            old = place.released if place is not None and place.writer == thread else (None, None)
            near, far = merged(old[0], near), merged(old[1], far)
            if near is None and far is None:
                self._places.pop((space, offset), None)
                return
            place = self._places[space, offset] = _Place(writer=thread)
            place.released = (near, far) if releases else old
        elif place is None:
            if near is None and far is None:
                return
            place = self._places[space, offset] = _Place()
        both = merged(place.near.get(block), near)
        if both is not None:
            place.near[block] = both
        place.wide = merged(place.wide, far)

    def _see(self, gid: int, clock: Clock | None, needs_wide: bool, site: Site) -> None:
        if clock is None:
            return
        if site.order in _ACQUIRES:
            self.clocks.absorb(gid, clock)
        else:
            seen = self._seen.setdefault(gid, {})
            seen[clock] = needs_wide and seen.get(clock, True)

    def _released(self, gid: int, releases: bool, wide: bool) -> tuple[Clock | None, Clock | None]:
        """What a strong write of the lane releases: to its block, to the device."""
        if releases:
            clock = self.clocks.export(gid, self.history.now)
            return clock, clock if wide else None
        gids = np.array([gid])
        near = far = None
        if self._narrow is not None and self._narrow.fenced(gids)[0]:
            near = self._narrow.cached_export(gid)
        if wide and self._wide is not None and self._wide.fenced(gids)[0]:
            far = self._wide.cached_export(gid)
        return near, far
