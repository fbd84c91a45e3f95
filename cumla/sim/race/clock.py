"""What is known of threads of other blocks: sparse over blocks, one row for each that counts."""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import Array


class Clock:
    """For each block in it, the stamp up to which each of its threads' accesses are known.

    Never changed once made, and compared by identity. Rows are shared between clocks.
    """

    __slots__ = ("_blocks", "_rows", "parts")

    def __init__(self, parts: dict[int, Array]) -> None:
        self.parts = parts
        self._blocks: Array | None = None
        self._rows: Array | None = None

    def knows(self, blocks: Array, locals_: Array, stamps: Array) -> Array:
        """[n] bool: whether the accesses of these threads up to these stamps are known."""
        if self._blocks is None or self._rows is None:
            self._blocks = np.array(sorted(self.parts), np.int64)
            self._rows = np.stack([self.parts[block] for block in self._blocks.tolist()])
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
    for block, row in second.parts.items():
        old = parts.get(block)
        if old is None:
            parts[block] = row
        elif old is not row:
            parts[block] = np.maximum(old, row)
    return Clock(parts)
