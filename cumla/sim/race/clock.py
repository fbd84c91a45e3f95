"""What is known of threads of other blocks: sparse over blocks, one row for each that counts."""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.race.lanes import Groups


class Part:
    """The stamps up to which the threads of a block, and its copies, are known.

    Attributes:
        row: one stamp for each; never changed.
        low: the least of the threads' stamps.
        high: the largest of all.
        copies: whether any copy is known.
    """

    __slots__ = ("copies", "high", "low", "row")

    def __init__(self, row: Array, lanes: int) -> None:
        self.row = row
        self.low = int(row[:lanes].min())
        self.high = int(row.max())
        self.copies = bool(row[lanes:].any())

    def covers(self, other: Part) -> bool:
        """Whether it is plain that this has all that other has."""
        return self is other or (self.low >= other.high and not other.copies)


# What proxy fences covered, for each of `fences.LIMITS`.
Covered = tuple["Clock | None", ...]


class Clock:
    """What is known of the threads of the blocks in it. Never changed; compared by identity.

    Attributes:
        parts: by block. Clocks share them.
        lanes: threads of a block.
        proxy: what of it proxy fences covered, or None.
    """

    __slots__ = ("_blocks", "_rows", "lanes", "parts", "proxy")

    def __init__(self, parts: dict[int, Part], lanes: int, proxy: Covered | None = None) -> None:
        self.parts = parts
        self.lanes = lanes
        if proxy is not None and any(clock and clock.proxy for clock in proxy):
            # Nobody asks what of that was covered; kept, it would get longer with every release.
            proxy = tuple(clock and Clock(clock.parts, lanes) for clock in proxy)
        self.proxy: Covered | None = proxy
        self._blocks: Array | None = None
        self._rows: Array | None = None

    def knows(self, blocks: Array, locals_: Array, stamps: Array) -> Array:
        """[n] bool: whether the accesses of these threads up to these stamps are known."""
        if self._blocks is None or self._rows is None:
            self._blocks = np.array(sorted(self.parts), np.int64)
            self._rows = np.stack([self.parts[block].row for block in self._blocks.tolist()])
        at = np.searchsorted(self._blocks, blocks)
        at[at == self._blocks.shape[0]] = 0
        return (self._blocks[at] == blocks) & (self._rows[at, locals_] >= stamps)


def merged(first: Clock | None, second: Clock | None) -> Clock | None:
    """What either knows."""
    if first is None or first is second:
        return second
    if second is None:
        return first
    parts = dict(first.parts)
    changed = False
    for block, part in second.parts.items():
        old = parts.get(block)
        if old is not None and old.covers(part):
            continue
        changed = True
        if old is None or part.covers(old):
            parts[block] = part
        else:
            parts[block] = Part(np.maximum(old.row, part.row), first.lanes)
    proxy = _covered_by_either(first.proxy, second.proxy)
    if not changed and proxy is first.proxy:
        return first
    return Clock(parts, first.lanes, proxy)


def _covered_by_either(first: Covered | None, second: Covered | None) -> Covered | None:
    if first is None or second is None:
        return second if first is None else first
    both = tuple(map(merged, first, second))
    return first if both == first else both


class Abroad:
    """For each lane of a wave, a `Clock` of what it knows of other blocks, or None."""

    def __init__(self, lanes: int) -> None:
        self._clocks = np.full(lanes, None, np.object_)
        # The clocks' identities, to compare many at a time.
        self.names = np.zeros(lanes, np.int64)

    def __getitem__(self, gid: int) -> Clock | None:
        clock: Clock | None = self._clocks[gid]
        return clock

    def __setitem__(self, gids: Array | int, clock: Clock | None) -> None:
        self._clocks[gids] = clock
        self.names[gids] = 0 if clock is None else id(clock)

    def copy(self, other: Abroad, gids: Array) -> None:
        """Give the lanes what they have in other."""
        self._clocks[gids] = other._clocks[gids]
        self.names[gids] = other.names[gids]

    def add(self, gids: Array, clock: Clock) -> None:
        """The lanes get to know what a clock knows."""
        # Not each lane by itself: those with the same clock go on to have the same one.
        _, first, which = np.unique(self.names[gids], return_index=True, return_inverse=True)
        for i, gid in enumerate(gids[first].tolist()):
            self[gids[which == i]] = merged(self[gid], clock)

    def together(self, gids: Array) -> Clock | None:
        """What any of the lanes knows."""
        _, first = np.unique(self.names[gids], return_index=True)
        clock: Clock | None = None
        for gid in gids[first].tolist():
            clock = merged(clock, self[gid])
        return clock

    def share(self, groups: Groups) -> None:
        """Give all lanes of each group what any of them knows."""
        names = self.names[groups.gids]
        low = np.minimum.reduceat(names, groups.starts)
        differ = low != np.maximum.reduceat(names, groups.starts)
        if np.count_nonzero(differ):
            some = groups.pick(differ)
            for gids in np.split(some.gids, some.starts[1:]):
                self[gids] = self.together(gids)

    def knows(self, gids: Array, blocks: Array, locals_: Array, stamps: Array) -> Array:
        """[n] bool: as `Clock.knows`, for each lane by its clock."""
        ok = np.zeros(gids.shape[0], np.bool_)
        _, first, which = np.unique(self.names[gids], return_index=True, return_inverse=True)
        for i, gid in enumerate(gids[first].tolist()):
            clock = self[gid]
            if clock is not None:
                at = np.flatnonzero(which == i)
                ok[at] = clock.knows(blocks[at], locals_[at], stamps[at])
        return ok
