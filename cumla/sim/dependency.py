"""Grids of a stream that may overlap: programmatic dependent launch.

PTX ISA "griddepcontrol": a dependent grid may start once every block of the grid before it has
executed launch_dependents or ended. Its griddepcontrol.wait returns when that grid has completed
and what it wrote is visible; that grid's own predecessors have completed only if it waited for them
itself. Without the wait nothing is known of what the grid before wrote, whenever it did so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort
from cumla.sim.memory.hidden import Hidden
from cumla.sim.ptx.syntax import Instruction
from cumla.sim.race.overlap import Overlap

if TYPE_CHECKING:
    from cumla.sim.grid import Grid
    from cumla.sim.wave import Wave

# Grids that start early run inside the instruction that lets them: so deep may that go.
DEEPEST = 24


class Dependency:
    """What a grid has to do with the grid before it and the one after it.

    Attributes:
        before: the grid that it may overlap with and that its wait waits for, or None.
        after: likewise the grid that may start before this one has completed, or None.
        early: it starts as early as the hardware could start it, not when `before` has completed.
        started, completed: its blocks have begun, or all ended.
        signalled: one of its blocks has executed launch_dependents.
        overlap: its accesses to global memory, if there is a race check.
    """

    def __init__(self, grid: Grid, before: Dependency | None, early: bool) -> None:
        self.grid = grid
        self.before = before
        self.after: Dependency | None = None
        self.early = early and before is not None and before._depth < DEEPEST
        self._depth: int = before._depth + 1 if before is not None and self.early else 0
        self.started = before is None
        self.completed = False
        self.signalled = False
        self.overlap: Overlap | None = None
        if grid.env.check_race:
            self.overlap = Overlap(grid.name, before is None)
        if before is not None:
            before.after = self
        grid.dependency = self
        self._hidden: Hidden | None = None
        self._ready = np.zeros(grid.geometry.blocks, np.bool_)
        self._left = grid.geometry.blocks
        self._wave: Wave | None = None

    # Told by the launch.

    def next_wave(self, wave: Wave) -> None:
        """The next blocks of the grid begin."""
        first = self._wave is None
        self._wave = wave
        wave.dependency = self
        if self.overlap is not None:
            self.overlap.next_wave(wave.live.shape[0])
        if first and self.after is not None and self.after.early:
            self.after._hidden = Hidden(wave.device.memory)

    def complete(self) -> None:
        """All blocks have ended: the grid after it may begin, or go on."""
        if self.completed:
            return
        self.completed = True
        self._hidden = None
        after = self.after
        if after is None:
            return
        after.started = True
        if after.early and self._overlaps():
            # Inside what runs within an earlier grid: what that writes stays hidden.
            after.grid.advance()

    def _overlaps(self) -> bool:
        """Whether an earlier grid has not completed."""
        earlier = self.before
        while earlier is not None and earlier.completed:
            earlier = earlier.before
        return earlier is not None

    # Told by the blocks.

    @property
    def may_pass(self) -> bool:
        """Whether griddepcontrol.wait returns."""
        return self.before is None or self.before.completed

    def waited(self, ins: Instruction, c: Cohort) -> None:
        """The lanes have passed griddepcontrol.wait."""
        if self.overlap is not None and self.before is not None:
            c.wave.race.grid_waited(ins, c)

    def launch_dependents(self, gids: NDArray[np.int64]) -> None:
        """The lanes execute griddepcontrol.launch_dependents; one of a block does it for all."""
        self.signalled = True
        if self._left:
            assert self._wave is not None
            self._settle(np.unique(gids // self._wave.lanes_per_block), gids)

    def exited(self, gids: NDArray[np.int64]) -> None:
        """The lanes have ended."""
        wave = self._wave
        if not self._left:
            return
        assert wave is not None
        slots = np.unique(gids // wave.lanes_per_block)
        ended = slots[~wave.live.reshape(wave.slots, -1)[slots].any(axis=1)]
        if ended.shape[0]:
            lanes = ended[:, None] * wave.lanes_per_block + np.arange(wave.lanes_per_block)
            self._settle(ended, lanes.reshape(-1))

    def _settle(self, slots: NDArray[np.int64], gids: NDArray[np.int64]) -> None:
        """For all that the blocks in these slots have against it the grid after may start."""
        assert self._wave is not None
        blocks = self._wave.block_ids[slots]
        new = ~self._ready[blocks]
        if not new.any():
            return
        if self.overlap is not None:
            self.overlap.released(gids)
        self._ready[blocks] = True
        self._left -= int(np.count_nonzero(new))
        after = self.after
        if self._left or not self.signalled or after is None or not after.early:
            return
        if not after.started:
            after.started = True
            assert after._hidden is not None
            with after._hidden.applied():
                after.grid.advance()

    def strong_access(self, offsets: Any, nbytes: int) -> None:
        """Lanes access bytes of global memory atomically, or as strong operations.

        Such accesses of two grids that run at the same time see one another.
        """
        dependency: Dependency | None = self
        while dependency is not None:
            if dependency._hidden is not None:
                dependency._hidden.touch(offsets, nbytes)
            dependency = dependency.before

    def note(self) -> str:
        """For messages of reads of unwritten memory: what the blocks cannot see yet."""
        if self.may_pass:
            return ""
        assert self.before is not None
        return (
            f"; kernel {self.before.grid.name} before it has not completed, and without "
            "griddepcontrol.wait nothing that it writes is visible"
        )
