"""Device memory as it was: what a grid sees that has not waited for the grids before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.memory.device import Allocation, DeviceMemory

_U8 = np.dtype(np.uint8)


class Hidden:
    """Hides, where `applied` is in force, what has been written since this was made.

    What is written there is seen by all. Once a byte that is hidden is touched by a strong access
    nothing is hidden any more: the grids communicate.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        data, states = self._arrays()
        self._before: list[tuple[Allocation, Any, Any]] = [
            (a, data[a.start : a.stop].copy(), states[a.start : a.stop].copy())
            for a in memory.allocations()
        ]
        self._at: NDArray[np.int64] = np.empty(0, np.int64)
        self._old: list[Any] = []
        self._present: list[Any] = []
        self._active = False

    def _arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The bytes, and their states."""
        return self._memory.arena.data, self._memory.arena.states[_U8]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, memory is as it was. Only once: what it was is not kept any longer."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def touch(self, offsets: NDArray[np.int64], nbytes: int) -> None:
        """A strong access to nbytes bytes at each of these offsets."""
        if not self._active:
            return
        at = np.searchsorted(self._at, offsets)
        inside = at < self._at.shape[0]
        if (self._at[at[inside]] < offsets[inside] + nbytes).any():
            self._leave()

    def _enter(self) -> None:
        arrays = self._arrays()
        at, old = [np.empty(0, np.int64)], [[np.empty(0, np.uint8)] * 2]
        for allocation, *before in self._before:
            if allocation.freed is None:
                here = slice(allocation.start, allocation.stop)
                unlike = [now[here] != was for now, was in zip(arrays, before, strict=True)]
                differ = np.flatnonzero(unlike[0] | unlike[1])
                at.append(allocation.start + differ)
                old.append([was[differ] for was in before])
        self._before = []
        self._at = np.concatenate(at)
        self._old = [np.concatenate(parts) for parts in zip(*old, strict=True)]
        self._present = [now[self._at] for now in arrays]
        for now, was in zip(arrays, self._old, strict=True):
            now[self._at] = was
        self._active = True

    def _leave(self) -> None:
        """Show what was hidden, except where something else was written meanwhile."""
        if not self._active:
            return
        self._active = False
        arrays = self._arrays()
        kept = np.ones(self._at.shape[0], np.bool_)
        for now, was in zip(arrays, self._old, strict=True):
            kept &= now[self._at] == was
        at = self._at[kept]
        for now, present in zip(arrays, self._present, strict=True):
            now[at] = present[kept]
        self._at, self._old, self._present = at[:0], [], []
