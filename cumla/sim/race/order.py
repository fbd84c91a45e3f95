"""Synchronisation through memory: fences, strong accesses, what they release and acquire.

PTX ISA "Memory Consistency Model", "Release and Acquire Patterns" and "Synchronizes-with": a
release, or a fence before a strong write, synchronises with an acquire, or a strong read before a
fence, that reads what was written, or what atomics made of it since. On two counts more is taken
as ordered, because CUDA's own samples rely on it: see `FenceClocks`, and `MemoryOrder.barrier`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.race.clock import Clock, Covered, merged
from cumla.sim.race.clocks import Clocks, Rows
from cumla.sim.race.fences import FenceClocks, Fences, Proxies
from cumla.sim.race.lanes import Groups, Threads
from cumla.sim.race.report import History, Site

_Pair = tuple[Clock | None, Clock | None]  # for the thread's block, for the device
_POLLS_KEPT = 256
_HELD_KEPT = 4096
_ACQUIRES = ("acquire", "acq_rel")
_RELEASES = ("release", "acq_rel")


@dataclass(slots=True)
class _Place:
    """What who reads a place can acquire.

    Attributes:
        wide: what was released to the whole device.
        near: by block, what was released by and to the threads of the block.
        held: the clocks that are part of wide, or of some near, already: (block or -1, clock).
        writer: the thread that stored last, and, if it did so with a release, what that released:
            its later strong stores release it as well.
    """

    wide: Clock | None = None
    near: dict[int, Clock] = field(default_factory=dict)
    held: set[tuple[int, Clock]] = field(default_factory=set)
    writer: int = -1
    released: _Pair = (None, None)

    def add(self, block: int, near: Clock | None, wide: Clock | None) -> bool:
        """A thread of the block released near to its block, wide to the device; whether new."""
        if len(self.held) > _HELD_KEPT:
            self.held.clear()
        before = len(self.held)
        if near is not None and (block, near) not in self.held:
            self.held.add((block, near))
            both = merged(self.near.get(block), near)
            assert both is not None
            self.near[block] = both
        if wide is not None and (-1, wide) not in self.held:
            self.held.add((-1, wide))
            self.wide = merged(self.wide, wide)
        return len(self.held) != before


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
        flows: the clocks that go along when lanes meet: those of fences, narrow and wide, and of
            proxy fences.
        proxy: the clocks of proxy fences.
        changes: counts what may change the effect of an access. Who lets lanes meet or acquire
            adds to it.
    """

    def __init__(
        self, threads: Threads, rows: Rows, clocks: Clocks, history: History, places: Places
    ) -> None:
        self.threads = threads
        self.clocks = clocks
        self.history = history
        self.flows: list[FenceClocks] = []
        self.proxy = Proxies(threads, rows, self.flows)
        self._proxied: dict[tuple[Clock, Covered], Clock] = {}
        self.changes = 0
        self._idle: dict[tuple[int, bytes, bytes], int] = {}
        self._rows = rows
        self._places = places.places
        self._narrow: Fences | None = None
        self._wide: Fences | None = None
        # Clocks that strong reads of lanes saw: those that any fence makes known, and those that
        # only a wide one does.
        self._seen: tuple[dict[Clock, set[int]], dict[Clock, set[int]]] = ({}, {})

    def fence(self, gids: Array, scope: str, order: str) -> None:
        """The lanes execute a fence of this scope: "acq_rel", "sc", "acquire" or "release"."""
        wide = scope != "cta"
        if order != "release":
            self._know(gids, wide)
        if order == "acquire":
            return
        self.changes += 1
        if self._narrow is None:
            self._narrow = Fences(self.threads, self._rows, self.flows)
        self._narrow.fence(gids, self.clocks, self.proxy, self.history.now)
        if wide:
            if self._wide is None:
                self._wide = Fences(self.threads, self._rows, self.flows)
            self._wide.fence(gids, self.clocks, self.proxy, self.history.now)

    def proxy_fence(self, gids: Array, limit: str) -> None:
        """The lanes execute fence.proxy.async, limited to a space or ("") not."""
        self.changes += 1
        self.proxy.fence(gids, limit, self.clocks, self.history.now)

    def barrier(self, gids: Array) -> None:
        """The lanes are about to meet at a barrier of their block.

        It completes an acquire: that one thread reads a flag or takes a ticket, and then all go on
        to read what that announces, is how reductions by the last block are written.
        """
        self._know(gids, True, meeting=True)

    def _know(self, gids: Array, wide: bool, meeting: bool = False) -> None:
        """The lanes get to know what they have seen; one of each block will do if they meet."""
        if not (self._seen[0] or self._seen[1]):
            return
        here = set(gids.tolist())
        self.changes += 1
        known: dict[int, Clock] = {}
        for seen in self._seen if wide else self._seen[:1]:
            for clock in list(seen):
                lanes = seen[clock] & here
                seen[clock] -= lanes
                if not seen[clock]:
                    del seen[clock]
                if meeting:
                    lanes = {gid // self.threads.lanes * self.threads.lanes for gid in lanes}
                for gid in lanes:
                    known[gid] = merged(known.get(gid), clock) or clock
        for gid, clock in known.items():
            self._absorb(self._first(gid, here) if meeting else gid, clock)

    def _absorb(self, gid: int, clock: Clock) -> None:
        """A lane gets to know what somebody released in memory."""
        self.clocks.absorb(gid, clock)
        self.proxy.absorb(gid, clock.proxy)

    def _first(self, gid: int, here: set[int]) -> int:
        """The first lane of those here from this one on."""
        return next(lane for lane in range(gid, gid + self.threads.lanes) if lane in here)

    def access(self, space: str, offsets: Array, gids: Array, site: Site) -> None:
        """Strong accesses to byte offsets, in the order of the lanes."""
        releases = site.order in _RELEASES and site.writes
        if not (releases or self.flows or self._places):
            return
        active = np.full(gids.shape[0], releases)
        if site.writes and self._narrow is not None:
            active |= self._narrow.clocks.fenced(gids)
        if self._places and not active.all():
            places = self._places
            active |= [(space, offset) in places for offset in offsets.tolist()]
        if site.writes and active.any():
            # What one lane releases the next ones may acquire, or overwrite.
            active |= np.isin(offsets, offsets[active])
        chosen = active.nonzero()[0]
        if not chosen.shape[0]:
            return
        offsets, gids = offsets[chosen], gids[chosen]
        # Lanes that poll do the same over and over.
        what = (site.number, offsets.tobytes(), gids.tobytes())
        if self._idle.get(what) == self.changes:
            return
        before = self.changes
        for offset, lanes in self._alike(offsets, gids, site, releases):
            self._access((space, offset), lanes, site, releases)
        if self.changes == before:
            self._idle[what] = before
            if len(self._idle) > _POLLS_KEPT:
                self._idle.clear()

    def _alike(
        self, offsets: Array, gids: Array, site: Site, releases: bool
    ) -> Iterator[tuple[int, list[int]]]:
        """Lanes that do the same at a place, one group after the other."""
        if releases or site.kind == "write" or gids.shape[0] == 1:
            for offset, gid in zip(offsets.tolist(), gids.tolist(), strict=True):
                yield offset, [gid]
            return
        order = np.argsort(offsets, kind="stable")
        offsets, gids = offsets[order], gids[order]
        labels = [offsets, self.threads.block[gids]]
        if site.writes:
            for clocks in self.flows:
                labels += clocks.contents(gids)
        groups = Groups.runs(gids, *labels)
        yield from zip(offsets[groups.starts].tolist(), groups.lists(), strict=True)

    def _access(self, key: tuple[str, int], gids: list[int], site: Site, releases: bool) -> None:
        place = self._places.get(key)
        wide = site.strength == 2
        block = int(self.threads.block[gids[0]])
        if place is not None and site.kind != "write":
            acquires = site.order in _ACQUIRES
            self._see(gids, place.near.get(block), 0, acquires)
            if wide:
                self._see(gids, place.wide, 1, acquires)
        if site.kind == "read":
            return
        near, far = self._released(gids[0], releases, wide)
        if site.kind == "write":
            thread = int(self.threads.thread[gids[0]])
            old: _Pair = (None, None)
            if place is not None and place.writer == thread:
                old = place.released
            near, far = merged(old[0], near), merged(old[1], far)
            self.changes += 1
            if near is None and far is None:
                self._places.pop(key, None)
                return
            place = self._places[key] = _Place(writer=thread)
            place.released = (near, far) if releases else old
        elif place is None:
            if near is None and far is None:
                return
            place = self._places[key] = _Place()
        self.changes += place.add(block, near, far)

    def _see(self, gids: list[int], clock: Clock | None, needs_wide: int, acquires: bool) -> None:
        if clock is None:
            return
        if acquires:
            self.changes += 1
            for gid in gids:
                self._absorb(gid, clock)
            return
        seers = self._seen[needs_wide].setdefault(clock, set())
        before = len(seers)
        seers.update(gids)
        self.changes += len(seers) != before

    def _released(self, gid: int, releases: bool, wide: bool) -> _Pair:
        """What a strong write of the lane releases."""
        if releases:
            clock = self._covered(self.clocks.export(gid, self.history.now), self.proxy.held(gid))
            return clock, clock if wide else None
        near = None if self._narrow is None else self._covered(*self._narrow.held(gid))
        far = None if self._wide is None or not wide else self._covered(*self._wide.held(gid))
        return near, far

    def release_fenced(self, gids: Array, keys: Array) -> None:
        """What each lane's fences, of more than its block, cover goes to the object of its key."""
        for gid, key in zip(gids.tolist(), keys.tolist(), strict=True):
            _, clock = self._released(gid, False, True)
            if clock is not None:
                self.changes += 1
                self.clocks.tell_all(key, clock)
                self.proxy.tell_all(key, clock.proxy)

    def _covered(self, clock: Clock | None, proxy: Covered | None) -> Clock | None:
        """A clock with what of it proxy fences cover: for equals the same."""
        if clock is None or proxy is None:
            return clock
        if len(self._proxied) > _HELD_KEPT:
            self._proxied.clear()
        return self._proxied.setdefault((clock, proxy), Clock(clock.parts, clock.lanes, proxy))
