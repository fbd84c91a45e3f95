"""Device memory as it was: what a grid sees that has not waited for the grids before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from cumla.sim.memory.device import Allocation, DeviceMemory

_U8 = np.dtype(np.uint8)
_NONE = np.empty(0, np.int64)

# The bytes, and their states; some of them or all.
Pair = list[NDArray[np.uint8]]


class _Old:
    """An allocation as it was. Positions count from its start.

    Attributes:
        was: [nbytes] each.
        withheld: positions that `renew` leaves as they were.
        newer: positions, and what is there after `renew`.
    """

    def __init__(self, allocation: Allocation, arrays: Pair) -> None:
        self.allocation = allocation
        self.was = [part.copy() for part in self._here(arrays)]
        self.withheld: NDArray[np.int64] = _NONE
        self.newer: tuple[NDArray[np.int64], Pair] = _NONE, [np.empty(0, np.uint8)] * 2

    def _here(self, arrays: Pair) -> Pair:
        return [array[self.allocation.start : self.allocation.stop] for array in arrays]

    def changed(self, arrays: Pair) -> NDArray[np.int64]:
        """Positions where it is not as it was."""
        if self.allocation.freed is not None:
            return _NONE
        data, states = (a != b for a, b in zip(self._here(arrays), self.was, strict=True))
        return np.flatnonzero(data | states)

    def renew(self, arrays: Pair) -> None:
        at = np.setdiff1d(self.changed(arrays), self.withheld, assume_unique=True)
        self.newer = at, [part[at] for part in self._here(arrays)]

    def take_newer(self) -> None:
        at, values = self.newer
        for part, value in zip(self.was, values, strict=True):
            part[at] = value


class Hidden:
    """What a grid does not see that starts early: all written since the grid before it began.

    Only what grids wrote that are known to have completed by then it sees: `renew` is for that.
    What is written where `applied` is in force is seen by all. Once a byte that is hidden is
    touched by a strong access nothing is hidden any more: the grids communicate.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._old: list[_Old] = [_Old(a, self._arrays()) for a in memory.allocations()]
        self._withheld = False
        self._at: NDArray[np.int64] = _NONE
        self._shown: Pair = []
        self._present: Pair = []
        self._active = False

    def _arrays(self) -> Pair:
        return [self._memory.arena.data, self._memory.arena.states[_U8]]

    def withhold(self) -> None:
        """What was written up to now was the work of the grid before: it stays hidden.

        Only the first call counts.
        """
        if not self._withheld:
            self._withheld = True
            arrays = self._arrays()
            for old in self._old:
                old.withheld = old.changed(arrays)

    def renew(self) -> None:
        """The grid that the one before waits for has completed: its writes may be known."""
        arrays = self._arrays()
        for old in self._old:
            old.renew(arrays)

    @contextmanager
    def applied(self, renewed: bool) -> Iterator[None]:
        """Within, memory is as it was. Only once: what it was is not kept any longer.

        Args:
            renewed: it is as `renew` left it, if that was called.
        """
        self._begin(renewed)
        try:
            yield
        finally:
            self.end()

    def hides(self, offsets: NDArray[np.int64], nbytes: int) -> bool:
        """Whether some of the nbytes bytes at each of these offsets are hidden now."""
        if not self._active:
            return False
        at = np.searchsorted(self._at, offsets)
        inside = at < self._at.shape[0]
        return bool((self._at[at[inside]] < offsets[inside] + nbytes).any())

    def _begin(self, renewed: bool) -> None:
        arrays = self._arrays()
        at, shown = [_NONE], [[np.empty(0, np.uint8)] * 2]
        for old in self._old:
            if renewed:
                old.take_newer()
            changed = old.changed(arrays)
            at.append(old.allocation.start + changed)
            shown.append([part[changed] for part in old.was])
        self._old = []
        self._at = np.concatenate(at)
        self._shown = [np.concatenate(parts) for parts in zip(*shown, strict=True)]
        self._present = [array[self._at] for array in arrays]
        for array, values in zip(arrays, self._shown, strict=True):
            array[self._at] = values
        self._active = True

    def end(self) -> None:
        """Show what was hidden, except where something else was written meanwhile."""
        if not self._active:
            return
        self._active = False
        arrays = self._arrays()
        kept = np.ones(self._at.shape[0], np.bool_)
        for array, values in zip(arrays, self._shown, strict=True):
            kept &= array[self._at] == values
        at = self._at[kept]
        for array, present in zip(arrays, self._present, strict=True):
            array[at] = present[kept]
        self._at, self._shown, self._present = _NONE, [], []
