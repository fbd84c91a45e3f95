"""The state of every byte of an arena: last write, last read, and a log where those do not say all.

States are kept for words of four bytes. A word that a smaller access touches is divided into
halves, a half into bytes, and its own state becomes SPLIT.
"""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.race.layout import SPLIT, Layout

WORD = 4
PAGE_SHIFT = 16  # bytes of a page of a paged shadow: 64 KiB
_PAGE_WORDS = (1 << PAGE_SHIFT) // WORD
_NOWHERE = 1 << 48  # added to a cell of a page that has no states yet: take() raises IndexError


class Log:
    """Accesses to cells whose state stands for many.

    It may hold accesses that the state tells as well, or that no longer matter; each did happen.

    Attributes:
        limit: of entries. Beyond it the oldest are dropped: a race with one of those is missed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._recent: list[tuple[int, Array, Array]] = []
        self._cells = np.zeros(0, np.int64)
        self._states = np.zeros(0, np.int64)
        self._newest = 0  # stamp up to which _cells and _states go
        self._size = 0
        self._clean_at = 0
        self._marks = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return self._size

    def add(self, stamp: int, cells: Array, states: Array) -> None:
        """Accesses, not older than those before; states broadcasts to the shape of cells."""
        self._recent.append((stamp, cells, states))
        self._size += cells.size
        if self._size > self.limit:
            self._shrink()

    def drop(self, stamp: int) -> None:
        """Forget what was added up to this stamp."""
        if self._newest <= stamp:
            self._drop_settled()
        recent = self._recent
        done = 0
        while done < len(recent) and recent[done][0] <= stamp:
            self._size -= recent[done][1].size
            done += 1
        del recent[:done]

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
        del self._recent[:done]

    def _settle(self, writes: Array, layout: Layout) -> None:
        """One pair of arrays for all entries, now and then without those that a write ended."""
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
            self._size = self._cells.shape[0]
        if self._size > self._clean_at:
            last = writes.take(self._cells)
            ended = ends(last, layout) & (self._states & layout.stamps <= last & layout.stamps)
            self._cells = self._cells[~ended]
            self._states = self._states[~ended]
            self._size = self._cells.shape[0]
            self._clean_at = 2 * self._size + 4096

    def find(self, cells: Array, writes: Array, layout: Layout) -> tuple[Array, Array]:
        """Pairs (i, state): an access to cells[i] and its state. writes: of the log's level."""
        self._settle(writes, layout)
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


def ends(writes: Array, layout: Layout) -> Array:
    """Whether these last writes end the matter for all that was before them.

    A weak write was checked against everything before; who conflicts with something older
    conflicts with it too, and is ordered after it only if after all that.
    """
    flags = layout.strengths | layout.many
    return ((writes & flags) == 0) & (writes != 0) & (writes < SPLIT)


class Level:
    """The states of cells of one width.

    Attributes:
        width: bytes of a cell.
        writes, reads: [cells] int64: the last write and the last read, see `Layout`; 0: none.
        log: further accesses.
        split: some cell has been divided.
    """

    def __init__(self, width: int, cells: int, limit: int) -> None:
        self.width = width
        self.writes = np.zeros(cells, np.int64)
        self.reads = np.zeros(cells, np.int64)
        self.log = Log(limit)
        self.split = False
        self._below: Level | None = None

    @property
    def below(self) -> Level:
        """The level of half the width; cell c is its cells 2 * c and 2 * c + 1."""
        if self._below is None:
            cells = 2 * self.writes.shape[0]
            self._below = Level(self.width // 2, cells, self.log.limit)
        return self._below

    def levels(self) -> list[Level]:
        """This level and those below it that are in use."""
        return [self] if self._below is None else [self, *self._below.levels()]

    def grow(self, cells: int) -> None:
        """Have this many cells."""
        for name in ("writes", "reads"):
            old = getattr(self, name)
            new = np.zeros(cells, np.int64)
            new[: old.shape[0]] = old
            setattr(self, name, new)
        if self._below is not None:
            self._below.grow(2 * cells)

    def divide(self, cells: Array) -> None:
        """Split these cells where they are not."""
        writes = self.writes.take(cells)
        closed = writes < SPLIT
        if not np.count_nonzero(closed):
            return
        cells, writes = cells[closed], writes[closed]
        below = self.below
        below.writes[2 * cells] = below.writes[2 * cells + 1] = writes
        below.reads[2 * cells] = below.reads[2 * cells + 1] = self.reads.take(cells)
        self.writes[cells] = SPLIT
        self.reads[cells] = 0
        self.split = True

    def unite(self, cells: Array, limit: Array) -> None:
        """Undo the division of these cells where all states below are older than the limit."""
        below = self.below
        first = 2 * cells
        if below.split:
            for half in (first, first + 1):
                divided = half[below.writes.take(half) >= SPLIT]
                if divided.shape[0]:
                    below.unite(divided, limit)
        old = below.writes.take(first) < limit
        old &= below.reads.take(first) < limit
        first += 1
        old &= below.writes.take(first) < limit
        old &= below.reads.take(first) < limit
        self.writes[cells[old]] = 0


class Shadow:
    """The states of an arena.

    Attributes:
        space: "shared" or "global".
        words: the level of whole words.
    """

    def __init__(self, space: str, size: int | None, limit: int) -> None:
        """size: of the arena in bytes; None: it may be anything, keep only pages in use."""
        self.space = space
        self.paged = size is None
        self.words = Level(WORD, _PAGE_WORDS if size is None else -(-size // WORD), limit)
        self._deltas = np.full(64, _NOWHERE, np.int64)
        self._pages: list[int] = []

    def cells(self, offsets: Array) -> Array:
        """The words at these byte offsets; IndexError, here or at use, if a page is missing."""
        if not self.paged:
            return offsets >> 2
        return (offsets >> 2) + self._deltas.take(offsets >> PAGE_SHIFT)

    def above(self, level: Level) -> list[Level]:
        """The level and those above it: what was logged before a cell was divided counts."""
        levels = self.words.levels()
        return levels[levels.index(level) :: -1]

    def offsets(self, level: Level, cells: Array) -> Array:
        """The byte offsets of cells."""
        at = cells * level.width
        if not self.paged:
            return at
        return (np.array(self._pages, np.int64)[at >> PAGE_SHIFT] << PAGE_SHIFT) | (
            at & ((1 << PAGE_SHIFT) - 1)
        )

    def add_pages(self, offsets: Array, nbytes: int) -> None:
        """Have states for the pages of nbytes bytes at each of these offsets."""
        steps = (*range(0, nbytes, 1 << PAGE_SHIFT), nbytes - 1)
        touched = np.concatenate([offsets + step for step in steps]) >> PAGE_SHIFT
        first = int(touched.min())
        if int(touched.max()) - first < 1 << 20:
            pages = (np.flatnonzero(np.bincount(touched - first)) + first).tolist()
        else:
            pages = np.unique(touched).tolist()
        if pages[-1] >= self._deltas.shape[0]:
            deltas = np.full(2 * pages[-1], _NOWHERE, np.int64)
            deltas[: self._deltas.shape[0]] = self._deltas
            self._deltas = deltas
        for page in pages:
            if self._deltas[page] == _NOWHERE:
                self._deltas[page] = (len(self._pages) - page) * _PAGE_WORDS
                self._pages.append(page)
        have = self.words.writes.shape[0]
        need = len(self._pages) * _PAGE_WORDS
        if need > have:
            self.words.grow(max(need, 2 * have))

    def logged(self) -> int:
        """How many accesses the logs hold."""
        return sum(len(level.log) for level in self.words.levels())

    def drop(self, stamp: int) -> None:
        """Forget logged accesses up to a stamp that everyone knows."""
        for level in self.words.levels():
            level.log.drop(stamp)
