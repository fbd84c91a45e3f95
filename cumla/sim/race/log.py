"""Accesses that a cell's state has no room for.

A log is written much more often than it is read, so what it is given it keeps as it is.
"""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import WARP, Array
from cumla.sim.race.layout import SPECIAL, SPLIT, Layout

_WARP_SHIFT = WARP.bit_length() - 1


def ends(writes: Array, layout: Layout) -> Array:
    """Whether these last writes end the matter for all that was before them.

    A weak write was checked against everything before; who conflicts with something older
    conflicts with it too, and is ordered after it only if after all that.
    """
    flags = layout.strengths | layout.many
    return ((writes & flags) == 0) & (writes != 0) & (writes < SPLIT)


class Log:
    """Accesses to cells whose state stands for many.

    It may hold accesses that the state tells as well, or that no longer matter; each did happen.

    Attributes:
        layout: of the states.
        limit: of entries. Beyond it the oldest are dropped: a race with one of those is missed.
        warps: of a block, if each cell is of one block; else 0.
    """

    def __init__(self, layout: Layout, limit: int, warps: int) -> None:
        self.layout = layout
        self.limit = limit
        self.warps = warps
        self._recent: list[tuple[int, Array, Array]] = []
        self._cells = np.zeros(0, np.int64)
        self._states = np.zeros(0, np.int64)
        self._newest = 0  # stamp up to which _cells and _states go
        self._size = 0
        self._clean_at = 0
        self._marks = np.zeros(0, np.int32)
        self._noted = 0  # how many of the recent ones the next one has
        # [cells * warps] stamps of the last read by each warp of the block.
        self._by_warp: Array | None = None

    def __len__(self) -> int:
        return self._size

    def add(self, stamp: int, cells: Array, states: Array) -> None:
        """Accesses, not older than those before; states broadcasts to the shape of cells."""
        self._recent.append((stamp, cells, states))
        self._size += cells.size
        if self._size > self.limit:
            self._shrink()

    def drop(self, stamp: int, proxied: bool) -> None:
        """Forget what threads, not copies, did up to this stamp.

        proxied: but not strong accesses: no proxy fence may have covered the writes, and they may
            have seen what copies did. A weak write is here only if another took its place.
        """
        lasting = SPECIAL | self.layout.strengths if proxied else SPECIAL
        if self._newest <= stamp:
            left = self._states & lasting != 0
            self._cells, self._states = self._cells[left], self._states[left]
            self._size += self._cells.shape[0] - left.shape[0]
            self._clean_at = 0
        kept = []
        done = 0
        for when, cells, states in self._recent:
            if when > stamp:
                break
            done += 1
            self._size -= cells.size
            left = np.broadcast_to(states & lasting != 0, cells.shape)
            if np.count_nonzero(left):
                kept.append((when, cells[left], np.broadcast_to(states, cells.shape)[left]))
                self._size += kept[-1][1].size
        self._forget(done)
        self._recent[:0] = kept

    def _forget(self, count: int) -> None:
        """Drop the first of the recent ones."""
        del self._recent[:count]
        self._noted = max(self._noted - count, 0)

    def _drop_settled(self) -> None:
        self._size -= self._cells.shape[0]
        self._cells = self._states = np.zeros(0, np.int64)
        self._newest = self._clean_at = 0

    def _shrink(self) -> None:
        self._drop_settled()
        done = 0
        while self._size > self.limit // 2 and done < len(self._recent) - 1:
            self._size -= self._recent[done][1].size
            done += 1
        self._forget(done)

    def reads_by_warp(self, cells: Array, writes: Array) -> Array | None:
        """[n, warps + 1] the stamp of each warp's last read of cells [n] added; None: none.

        writes: the last ones of all cells of the level.
        """
        self._note(writes.shape[0])
        if self._by_warp is None:
            return None
        return self._by_warp.reshape(-1, self.warps + 1)[cells]

    def _note(self, cells: int) -> None:
        if not self.warps:
            return
        layout = self.layout
        for _, at, states in self._recent[self._noted :]:
            if states.flat[0] & layout.write:
                continue
            # What stands for copies is one more warp.
            warps = self.warps + 1
            if self._by_warp is None:
                self._by_warp = np.zeros(cells * warps, np.int32)
            warp = (states & layout.locals) >> _WARP_SHIFT
            stamps = (states & layout.stamps) >> layout.stamp_shift
            self._by_warp[at * warps + warp] = stamps
        self._noted = len(self._recent)

    def _settle(self, writes: Array) -> None:
        """One pair of arrays for all entries, now and then without those that a write ended."""
        layout = self.layout
        self._note(writes.shape[0])
        if self._recent:
            cells, states = [self._cells], [self._states]
            for _, at, values in self._recent:
                # States that stand for several accesses, or for none, are no entries.
                real = (values & (layout.many | layout.pending) == 0) & (values != 0)
                real = np.broadcast_to(real, at.shape)
                cells.append(at[real])
                states.append(np.broadcast_to(values, at.shape)[real])
            self._cells = np.concatenate(cells)
            self._states = np.concatenate(states)
            self._newest = self._recent[-1][0]
            self._recent = []
            self._noted = 0
            self._size = self._cells.shape[0]
        if self._size > self._clean_at:
            last = writes.take(self._cells)
            ended = ends(last, layout) & (self._states & layout.stamps <= last & layout.stamps)
            self._cells = self._cells[~ended]
            self._states = self._states[~ended]
            self._size = self._cells.shape[0]
            self._clean_at = 2 * self._size + 4096

    def find(self, cells: Array, writes: Array) -> tuple[Array, Array]:
        """Pairs (i, state): an access to cells[i] and its state.

        writes: the last ones of all cells of the level.
        """
        self._settle(writes)
        if self._marks.shape[0] < writes.shape[0]:
            self._marks = np.zeros(writes.shape[0], np.int32)
        order = np.argsort(cells, kind="stable")
        ordered = cells[order]
        first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        counts = np.diff(first, append=ordered.shape[0])
        self._marks[ordered[first]] = np.arange(1, first.shape[0] + 1)
        found = self._marks.take(self._cells)
        self._marks[ordered[first]] = 0
        hits = np.flatnonzero(found)
        group = found[hits] - 1
        times = counts[group]
        ends_ = np.cumsum(times)
        within = np.arange(ends_[-1] if hits.shape[0] else 0) - np.repeat(ends_ - times, times)
        return order[np.repeat(first[group], times) + within], np.repeat(self._states[hits], times)
