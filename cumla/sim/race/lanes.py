"""The lanes of a wave as threads of the launch, and groups of them."""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.race.layout import Layout


class Threads:
    """The lanes of a wave as threads of the launch.

    Attributes:
        layout: how a thread is a number.
        thread, block, local: [lanes] int64: the thread, its block in the grid, its place there.
        lanes: lanes of a block.
    """

    def __init__(self, layout: Layout, block_ids: Array) -> None:
        self.layout = layout
        self.lanes = layout.lanes
        self.block = np.repeat(np.asarray(block_ids, np.int64), self.lanes)
        self.local = np.tile(np.arange(self.lanes, dtype=np.int64), len(block_ids))
        self.thread = (self.block << layout.local_bits) | self.local


class Lanes:
    """Lanes that make accesses, as long as they know no more.

    Attributes:
        gids, threads: [n] the lanes, and as threads of the launch.
        limit: 0-d; states below it, in memory that only their blocks use, are of accesses that
            all of them know of.
        limits: [n] states below, of threads of the lane's block, are of accesses that it knows.
        warp_limits: likewise of threads of its warp; None while no warp has met by itself.
        even: all limits are equal.
    """

    __slots__ = ("even", "gids", "limit", "limits", "threads", "warp_limits")

    def __init__(
        self,
        gids: Array,
        threads: Array,
        limit: Array,
        limits: Array,
        warp_limits: Array | None,
        even: bool,
    ) -> None:
        self.gids = gids
        self.threads = threads
        self.limit = limit
        self.limits = limits
        self.warp_limits = warp_limits
        self.even = even

    def take(self, which: Array) -> Lanes:
        """Some lanes, in any order and number."""
        warps = None if self.warp_limits is None else self.warp_limits[which]
        return Lanes(
            self.gids[which],
            self.threads[which],
            self.limit,
            self.limits[which],
            warps,
            self.even,
        )


class Groups:
    """Lanes in consecutive groups: gids[starts[i] : starts[i] + counts[i]] is group i.

    A group is of one block, its lanes ascending.
    """

    __slots__ = ("counts", "gids", "starts")

    def __init__(self, gids: Array, starts: Array) -> None:
        self.gids = gids
        self.starts = starts
        self.counts = np.empty_like(starts)
        np.subtract(starts[1:], starts[:-1], out=self.counts[:-1])
        self.counts[-1:] = gids.shape[0] - starts[-1:]

    @classmethod
    def runs(cls, gids: Array, *labels: Array) -> Groups:
        """A group for each stretch in which no label changes."""
        change = labels[0][1:] != labels[0][:-1]
        for label in labels[1:]:
            change |= label[1:] != label[:-1]
        after = change.nonzero()[0]
        starts = np.zeros(after.shape[0] + 1, np.int64)
        np.add(after, 1, out=starts[1:])
        return cls(gids, starts)

    def pick(self, mask: Array) -> Groups:
        """The groups where mask is true."""
        counts = self.counts[mask]
        starts = np.cumsum(counts) - counts
        return Groups(self.gids[np.repeat(mask, self.counts)], starts)

    def padded(self, size: int) -> Groups:
        """Each group as all lanes of its block or warp of this size."""
        first = self.gids[self.starts] // size * size
        every = (first[:, None] + np.arange(size)).reshape(-1)
        return Groups(every, np.arange(first.shape[0]) * size)

    def spread(self, values: Array) -> Array:
        """One value a group to one a lane."""
        return np.repeat(values, self.counts)

    def numbers(self) -> Array:
        """[n] which group each lane is of."""
        if self.starts.shape[0] == 1:
            return np.zeros(self.gids.shape[0], np.int64)
        return np.repeat(np.arange(self.starts.shape[0]), self.counts)

    def lists(self) -> list[list[int]]:
        """The lanes of each group."""
        return [part.tolist() for part in np.split(self.gids, self.starts[1:])]


def by_key(gids: Array, keys: Array | int, lanes: int) -> tuple[Groups, list[int]]:
    """The lanes of each block that have the same key, and the groups' keys.

    keys: one for each lane, or one for all. lanes: of a block.
    """
    blocks = gids // lanes
    if isinstance(keys, int):
        groups = Groups.runs(gids, blocks)
        return groups, [keys] * groups.starts.shape[0]
    if np.count_nonzero(keys[1:] < keys[:-1]):
        by = np.argsort(keys, kind="stable")
        gids, keys, blocks = gids[by], keys[by], blocks[by]
    groups = Groups.runs(gids, keys, blocks)
    return groups, keys[groups.starts].tolist()
