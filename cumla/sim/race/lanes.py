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
        live: [lanes] bool, changing: lanes that have not exited.
    """

    def __init__(self, layout: Layout, block_ids: Array, live: Array) -> None:
        self.layout = layout
        self.lanes = layout.lanes
        self.live = live
        self.block = np.repeat(np.asarray(block_ids, np.int64), self.lanes)
        self.local = np.tile(np.arange(self.lanes, dtype=np.int64), len(block_ids))
        self.thread = (self.block << layout.local_bits) | self.local


class Groups:
    """Lanes in consecutive groups: gids[starts[i] : starts[i] + counts[i]] is group i.

    A group is of one block, its lanes ascending.
    """

    __slots__ = ("counts", "gids", "starts")

    def __init__(self, gids: Array, starts: Array) -> None:
        self.gids = gids
        self.starts = starts
        self.counts = np.diff(starts, append=gids.shape[0])

    @classmethod
    def runs(cls, gids: Array, *labels: Array) -> Groups:
        """A group for each stretch in which no label changes."""
        change = np.zeros(gids.shape[0], np.bool_)
        change[0] = True
        for label in labels:
            change[1:] |= label[1:] != label[:-1]
        return cls(gids, np.flatnonzero(change))

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

    def lists(self) -> list[list[int]]:
        """The lanes of each group."""
        return [part.tolist() for part in np.split(self.gids, self.starts[1:])]
