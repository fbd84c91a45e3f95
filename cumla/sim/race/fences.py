"""What each lane knew at its last fence, and at its last proxy fences."""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.race.clock import Abroad, Clock, Covered
from cumla.sim.race.clocks import Clocks, Rows
from cumla.sim.race.lanes import Groups, Threads

# The spaces that proxy fences are limited to; "": they are not.
LIMITS = ("", "shared", "global")


class FenceClocks(Clocks):
    """What each lane knew at its last fence: what its strong writes release.

    PTX ISA "Release and Acquire Patterns" wants fence and write from one thread. CUDA's own
    programs rely on more: that writes which each thread of a block fenced, before a barrier of the
    block, are released by a write of one of them after it. So these clocks, too, are joined where
    lanes meet.

    Attributes:
        own: [lanes] int64: the stamp of the lane's last fence, 0 once it is part of the row.
    """

    def __init__(self, threads: Threads, rows: Rows) -> None:
        super().__init__(threads, rows)
        self.own = np.zeros(self.row.shape[0], np.int64)
        self._exports: dict[tuple[object, ...], Clock] = {}
        self._collections = 0

    def fence(self, gids: Array, clocks: Clocks, own: Array | int) -> None:
        """The lanes executed a fence: all that the clocks know, and themselves up to a stamp."""
        self.own[gids] = own
        self.block[gids] = clocks.block[gids]
        self.warp[gids] = clocks.warp[gids]
        self.row[gids] = clocks.row[gids]
        self._rowed |= clocks._rowed
        self.copies |= clocks.copies
        if clocks.abroad is not None:
            if self.abroad is None:
                self.abroad = Abroad(self.row.shape[0])
            self.abroad.copy(clocks.abroad, gids)

    def fenced(self, gids: Array) -> Array:
        """[n] bool: which lanes have something to release."""
        fenced = (self.own[gids] | self.row[gids] | self.block[gids]) > 0
        if self.abroad is not None:
            fenced |= self.abroad.names[gids] != 0
        return fenced

    def contents(self, gids: Array) -> list[Array]:
        """Labels that are the same for lanes which would release the same."""
        labels = [np.where(self.own[gids] > 0, -1 - gids, self.row[gids]), self.block[gids]]
        if self.abroad is not None:
            labels.append(self.abroad.names[gids])
        return labels

    def held(self, gid: int) -> Clock | None:
        """What the lane would release: the same object for all that would release the same."""
        own, block, row = int(self.own[gid]), int(self.block[gid]), int(self.row[gid])
        abroad = None if self.abroad is None else self.abroad[gid]
        if not (own or block or row or abroad):
            return None
        if self._collections != self.rows.collections or len(self._exports) > 4096:
            self._collections = self.rows.collections
            self._exports = {}
        who = gid if own else -1 - int(self.threads.block[gid])
        key = (who, own, int(self.warp[gid]), block, row, abroad)
        clock = self._exports.get(key)
        if clock is None:
            clock = self._exports[key] = self.export(gid, 0)
        return clock

    def _own(self, gids: Array, now: int) -> Array | int:
        return self.own[gids].astype(np.int32)

    def meet_some(self, groups: Groups, now: int) -> None:
        """Each group's lanes met."""
        gids, starts = groups.gids, groups.starts
        # Where a lane's own fence counts it knows itself better than the others know it.
        differ = np.maximum.reduceat(self.own[gids], starts) > 0
        for values in (self.warp, self.block, self.row):
            found = values[gids]
            differ |= np.minimum.reduceat(found, starts) != np.maximum.reduceat(found, starts)
        if differ.any():
            some = groups.pick(differ)
            self.row[some.gids] = some.spread(self.rows.add(self._joined(some, now)))
            self._rowed = True
            self.own[some.gids] = self.warp[some.gids] = self.block[some.gids] = 0
        if self.abroad is not None:
            self.abroad.share(groups)

    def meet_all(self, groups: Groups, blocks: bool, now: int) -> None:
        """Each group's lanes met."""
        self.meet_some(groups, now)


class ProxyFences(FenceClocks):
    """What each lane's asynchronous copies know of what threads wrote: what a proxy fence covered.

    PTX ISA "fence.proxy": a fence by any thread on the way from the write to the copy will do, so
    these clocks, too, go along whenever lanes synchronise.
    """

    def _itself(self, gids: Array, apart: Array, stamps: Array) -> Array:
        return (apart == 0) & (stamps <= self.own.take(gids))


class Proxies:
    """The clocks of proxy fences: those of each limit by themselves.

    An access is covered if a fence of its space or one of no limit covers it. There are clocks
    only for the limits that were seen: most programs have fences of one.
    """

    def __init__(self, threads: Threads, rows: Rows, flows: list[FenceClocks]) -> None:
        """flows: where to add clocks, that go along when lanes meet, once there are such fences."""
        self._threads = threads
        self._rows = rows
        self._flows = flows
        self._fences: dict[str, ProxyFences] = {}

    def _limited(self, limit: str) -> ProxyFences:
        if limit not in self._fences:
            self._fences[limit] = ProxyFences(self._threads, self._rows)
            self._flows.append(self._fences[limit])
        return self._fences[limit]

    def of(self, space: str) -> list[ProxyFences]:
        """The fences that cover accesses to a space."""
        return [fences for limit, fences in self._fences.items() if limit in ("", space)]

    def fence(self, gids: Array, limit: str, clocks: Clocks, now: int) -> None:
        """The lanes execute proxy fences of a limit."""
        self._limited(limit).fence(gids, clocks, now)

    def copy(self, other: Proxies, gids: Array) -> None:
        """Give the lanes what they have in other."""
        for limit, fences in other._fences.items():
            self._limited(limit).fence(gids, fences, fences.own[gids])

    def held(self, gid: int) -> Covered | None:
        """What the lane's fences cover: for equals the same clocks."""
        held = {limit: fences.held(gid) for limit, fences in self._fences.items()}
        return tuple(map(held.get, LIMITS)) if any(held.values()) else None

    def absorb(self, gid: int, covered: Covered | None) -> None:
        """A lane gets to know what fences covered."""
        for limit, clock in zip(LIMITS, covered or (), strict=False):
            if clock is not None:
                self._limited(limit).absorb(gid, clock)

    def tell_all(self, key: int, covered: Covered | None) -> None:
        """The object of the key gets to know what fences covered."""
        for limit, clock in zip(LIMITS, covered or (), strict=False):
            if clock is not None:
                self._limited(limit).tell_all(key, clock)


class Fences:
    """What strong writes release for the sake of fences of a scope, or of a wider one.

    Attributes:
        clocks: what each lane knew at its last such fence.
        proxy: what of that proxy fences covered.
    """

    def __init__(self, threads: Threads, rows: Rows, flows: list[FenceClocks]) -> None:
        """flows: where to add the clocks, that go along when lanes meet."""
        self.clocks = FenceClocks(threads, rows)
        self.proxy = Proxies(threads, rows, flows)
        flows.append(self.clocks)

    def fence(self, gids: Array, clocks: Clocks, proxy: Proxies, now: int) -> None:
        """The lanes execute a fence: what they know goes with it, and what proxy fences cover."""
        self.clocks.fence(gids, clocks, now)
        self.proxy.copy(proxy, gids)

    def held(self, gid: int) -> tuple[Clock | None, Covered | None]:
        """What the lane would release, and what of that proxy fences cover."""
        return self.clocks.held(gid), self.proxy.held(gid)
