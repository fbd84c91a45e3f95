"""Grids of a stream that may overlap: programmatic dependent launch.

PTX ISA "griddepcontrol": a dependent grid may start once every block of the grid before it has
executed launch_dependents or ended. Its griddepcontrol.wait returns when that grid has completed
and what it wrote is visible; that grid's own predecessors have completed only if it waited for them
itself. Without the wait nothing is known of what the grid before wrote, whenever it did so; but
what came before that grid is known if one of its blocks waited before it let the next grid start.
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
        self._hidden: Hidden | None = None  # from the first wave of `before` on
        self._waited_first = False  # a block, or its cluster, waited before it counted as ready
        self._ready = np.zeros(grid.geometry.blocks, np.bool_)
        self._left = grid.geometry.blocks
        self._wave: Wave | None = None

    # Told by the launch.

    def next_wave(self, wave: Wave) -> None:
        """The next blocks of the grid begin."""
        first = self._wave is None
        self._wave = wave
        wave.dependency = self
        self._waited = np.zeros(wave.slots // wave.cluster_size, np.bool_)  # a lane of the cluster
        if self.overlap is not None:
            self.overlap.next_wave(wave.live.shape[0])
        if first and self.after is not None and self.after.early:
            self.after._hidden = Hidden(wave.device.memory)

    def complete(self) -> None:
        """All blocks have ended: the grid after it may begin, or go on."""
        if self.completed:
            return
        self.completed = True
        after = self.after
        if after is None:
            return
        if after._hides_from_next is not None:
            after._hides_from_next.renew()
        if not after.started:
            after.started = True
            after._hidden = None
        if after.early and self._overlaps():
            # Inside what runs within an earlier grid: what that writes stays hidden.
            after.grid.advance()

    @property
    def _hides_from_next(self) -> Hidden | None:
        """What the grid after this one will not see, while it has not started."""
        return None if self.after is None else self.after._hidden

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
        self._waited[c.slots // c.wave.cluster_size] = True
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
        """The grid after may start as soon as all other blocks than those in these slots let it.

        gids: the lanes of these blocks that say so.
        """
        wave = self._wave
        assert wave is not None
        slots = slots[~self._ready[wave.block_ids[slots]]]
        if not slots.shape[0]:
            return
        self._ready[wave.block_ids[slots]] = True
        self._left -= slots.shape[0]
        if self._waited[slots // wave.cluster_size].any():
            self._waited_first = True
        if self.overlap is not None:
            self.overlap.released(gids[np.isin(gids // wave.lanes_per_block, slots)])
        after = self.after
        if self._left or not self.signalled or after is None or not after.early or after.started:
            return
        after.started = True
        hidden = after._hidden
        assert hidden is not None
        with hidden.applied(renewed=self._waited_first):
            after.grid.advance()
            if after._hides_from_next is not None:
                after._hides_from_next.withhold()
        after._hidden = None

    def strong_access(self, offsets: Any, nbytes: int) -> None:
        """Lanes access bytes of global memory atomically, or as strong operations.

        Such accesses of two grids that run at the same time see one another.
        """
        touched = []
        dependency: Dependency | None = self
        while dependency is not None:
            hidden = dependency._hidden
            if hidden is not None and hidden.hides(offsets, nbytes):
                touched.append(hidden)
            dependency = dependency.before
        if touched and self._hides_from_next is not None:
            self._hides_from_next.withhold()
        for hidden in touched:
            hidden.end()

    def note(self) -> str:
        """For messages of reads of unwritten memory: what the blocks cannot see yet."""
        if self.may_pass:
            return ""
        assert self.before is not None
        return (
            f"; kernel {self.before.grid.name} before it has not completed, and without "
            "griddepcontrol.wait nothing that it writes is visible"
        )
