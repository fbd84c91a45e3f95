"""The state of every byte of an arena: last write, last read, and a log where those do not say all.

States are kept for words of four bytes. A word that a smaller access touches is divided into
halves, a half into bytes, and its own state becomes SPLIT.
"""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.race.layout import SPLIT, Layout
from cumla.sim.race.log import Log

WORD = 4
PAGE_SHIFT = 16  # bytes of a page of a paged shadow: 64 KiB
_PAGE_WORDS = (1 << PAGE_SHIFT) // WORD
_FIRST_WORDS = 1 << 22  # not touched before they are needed
_NOWHERE = 1 << 48  # added to a cell of a page that has no states yet: take() raises IndexError


class Level:
    """The states of cells of one width.

    Attributes:
        width: bytes of a cell.
        writes, reads: [cells] int64: the last write and the last read, see `Layout`; 0: none.
        log: further accesses.
        split: some cell has been divided.
    """

    def __init__(self, width: int, cells: int, log: Log) -> None:
        self.width = width
        self.writes = np.zeros(cells, np.int64)
        self.reads = np.zeros(cells, np.int64)
        self.log = log
        self.split = False
        self._below: Level | None = None

    @property
    def below(self) -> Level:
        """The level of half the width; cell c is its cells 2 * c and 2 * c + 1."""
        if self._below is None:
            cells = 2 * self.writes.shape[0]
            log = Log(self.log.layout, self.log.limit, self.log.warps)
            self._below = Level(self.width // 2, cells, log)
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
        crossed: threads of several blocks may access the same bytes.
        proxied: the asynchronous proxy may access it, for which writes count that no proxy fence
            covered, though every thread may have known of them long since.
        words: the level of whole words.
    """

    def __init__(
        self,
        space: str,
        layout: Layout,
        size: int | None,
        limit: int,
        warps: int = 0,
        proxied: bool = True,
    ) -> None:
        """The shadow of an arena with nothing done yet.

        Args:
            size: of the arena in bytes; None: it may be anything, keep only pages in use.
            limit: of the entries of each log.
            warps: of a block, if the bytes are accessed by one block each.
        """
        self.space = space
        self.paged = size is None
        self.crossed = not warps
        self.proxied = proxied
        words = _FIRST_WORDS if size is None else -(-size // WORD)
        self.words = Level(WORD, words, Log(layout, limit, warps))
        self._deltas = np.full(64, _NOWHERE, np.int64)
        self._pages: list[int] = []

    def cells(self, offsets: Array) -> Array:
        """The words at these byte offsets; IndexError, here or at use, if a page is missing."""
        if not self.paged:
            return offsets >> 2
        return (offsets >> 2) + self._deltas.take(offsets >> PAGE_SHIFT)

    def above(self, level: Level) -> list[Level]:
        """The level and those above it."""
        levels = self.words.levels()
        return levels[levels.index(level) :: -1]

    def logged_at(self, level: Level, cells: Array) -> tuple[Array, Array]:
        """Pairs (i, state): a logged access to cells[i], maybe before it was divided off."""
        found = [
            at.log.find(cells >> shift, at.writes) for shift, at in enumerate(self.above(level))
        ]
        return np.concatenate([i for i, _ in found]), np.concatenate([s for _, s in found])

    def reads_by_warp(self, level: Level, cells: Array) -> Array | None:
        """As `Log.reads_by_warp`, reads before the cells were divided off included."""
        noted: Array | None = None
        for shift, above in enumerate(self.above(level)):
            found = above.log.reads_by_warp(cells >> shift, above.writes)
            if found is not None:
                noted = found if noted is None else np.maximum(noted, found)
        return noted

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
            self.words.grow(max(need, 4 * have))

    def logged(self) -> int:
        """How many accesses the logs hold."""
        return sum(len(level.log) for level in self.words.levels())

    def drop(self, stamp: int) -> None:
        """Forget logged accesses up to a stamp that everyone knows."""
        for level in self.words.levels():
            level.log.drop(stamp, self.proxied)
