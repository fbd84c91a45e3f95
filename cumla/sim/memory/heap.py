"""Which parts of a range of addresses are taken, and which were freed and when."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque

# How many freed stretches are kept from being handed out again.
REMEMBERED = 4096


class Heap:
    """Hands out stretches of [0, size).

    Freed stretches are not handed out again while there is untouched room, so that accesses
    through stale pointers can be told from accesses to what came after.
    """

    def __init__(self, size: int) -> None:
        self._free: list[tuple[int, int]] = [(0, size)]  # (start, stop), ascending, never adjacent
        self._quarantine: deque[tuple[int, int]] = deque()

    def take(self, size: int, align: int) -> tuple[int, list[tuple[int, int]]] | None:
        """The start of a free stretch, and the freed stretches forgotten for it; None if full."""
        start = self._fit(size, align)
        forgotten: list[tuple[int, int]] = []
        while start is None and self._quarantine:
            oldest = self._quarantine.popleft()
            forgotten.append(oldest)
            self._insert(*oldest)
            start = self._fit(size, align)
        return None if start is None else (start, forgotten)

    def give(self, start: int, size: int) -> list[tuple[int, int]]:
        """A stretch is no longer used. Returns the old freed stretches forgotten for it."""
        self._quarantine.append((start, start + size))
        forgotten: list[tuple[int, int]] = []
        while len(self._quarantine) > REMEMBERED:
            oldest = self._quarantine.popleft()
            forgotten.append(oldest)
            self._insert(*oldest)
        return forgotten

    def _fit(self, size: int, align: int) -> int | None:
        for i, (first, stop) in enumerate(self._free):
            start = -(-first // align) * align
            if start + size <= stop:
                rest = [(first, start), (start + size, stop)]
                self._free[i : i + 1] = [(a, b) for a, b in rest if a < b]
                return start
        return None

    def _insert(self, start: int, stop: int) -> None:
        at = bisect_right(self._free, (start, stop))
        if at < len(self._free) and self._free[at][0] == stop:
            stop = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == start:
            start = self._free.pop(at - 1)[0]
        insort(self._free, (start, stop))
