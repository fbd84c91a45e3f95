"""Whether the warps of a warpgroup execute the same wgmma instructions, for the race check.

PTX ISA "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group": `.aligned` means that all threads
of the warpgroup must execute the same instruction; in code that only some of them reach, what it
does is undefined. `.sync` waits for the warp alone, so warps may run apart. Compared are the
instructions that each warp executes between two wgmma.mma_async, and before the last of the
warpgroup exits. Copies that a compiler made of an instruction count as the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP, Cohort
from cumla.sim.errors import RaceError
from cumla.sim.ptx.syntax import Instruction

if TYPE_CHECKING:
    from cumla.sim.wave import Wave

Array = NDArray[Any]
WARPS = 4
LANES = WARPS * WARP


def numbers(wave: Wave, gids: Array) -> Array:
    """The number in the wave of each lane's warpgroup; the last of a block may be short."""
    lanes = wave.lanes_per_block
    if lanes % LANES == 0:
        return gids >> 7
    return gids // lanes * -(-lanes // LANES) + (gids % lanes >> 7)


class Steps:
    """What the warps of a wave have executed since their warpgroup's last wgmma.mma_async."""

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self._kinds: dict[str, int] = {}  # texts of instructions, numbered from 1
        self._seen: dict[int, Instruction] = {}  # by index
        self._count: Array | None = None  # [warps] how many each has executed

    def _start(self) -> Array:
        if self._count is None:
            self._groups = numbers(self.wave, np.arange(0, self.wave.live.shape[0], WARP))
            # [warpgroups, steps]: the kind of what was executed first, and its index; kind 0: none.
            self._log = np.zeros((2, int(self._groups[-1]) + 1, 8), np.int64)
            self._count = np.zeros(self._groups.shape, np.int64)
        return self._count

    def executed(self, ins: Instruction, c: Cohort) -> None:
        """The warps of a cohort execute a fence, a commit or a wait."""
        count, warps = self._start(), c.warps
        groups, steps = self._groups[warps], count[warps]
        if steps.max(initial=0) >= self._log.shape[2]:
            self._log = np.concatenate([self._log, np.zeros_like(self._log)], axis=2)
        self._seen[ins.index] = ins
        kind = self._kinds.setdefault(ins.text, len(self._kinds) + 1)
        kinds, indices = self._log
        old = kinds[groups, steps]
        differ = (old != 0) & (old != kind)
        if differ.any():
            which = int(np.argmax(differ))
            other = self._seen[int(indices[groups[which], steps[which]])]
            instead = f"another has executed `{other.text}` at {other.where} instead"
            raise self._error(ins, int(warps[which]), instead)
        first = old == 0
        indices[groups[first], steps[first]] = ins.index
        kinds[groups, steps] = kind
        count[warps] += 1

    def met(self, ins: Instruction, c: Cohort) -> None:
        """Whole warpgroups execute a wgmma.mma_async."""
        if self._count is not None:
            groups = np.unique(self._groups[c.warps])
            self._compare(groups, f"another went on to `{ins.name}` at {ins.where} without it")

    def exited(self) -> None:
        """Some lanes have exited."""
        if self._count is not None and self._count.any():
            living = np.zeros(self._log.shape[1], np.bool_)
            living[self._groups[self.wave.live.reshape(-1, WARP).any(axis=1)]] = True
            self._compare(np.flatnonzero(~living), "another exited without it")

    def _compare(self, groups: Array, instead: str) -> None:
        """The warps of these warpgroups must have executed equally many; begin anew."""
        assert self._count is not None
        most = np.zeros(self._log.shape[1], np.int64)
        np.maximum.at(most, self._groups, self._count)
        here = np.zeros(most.shape, np.bool_)
        here[groups] = True
        behind = here[self._groups] & (self._count < most[self._groups])
        if behind.any():
            group, step = self._groups[behind][0], self._count[behind][0]
            ins = self._seen[int(self._log[1, group, step])]
            ahead = (self._groups == group) & (self._count > step)
            raise self._error(ins, int(np.argmax(ahead)), instead)
        self._count[here[self._groups]] = 0
        self._log[0, groups] = 0

    def _error(self, ins: Instruction, warp: int, instead: str) -> RaceError:
        text = (
            f"{self.wave.where(ins, warp * WARP)}: `{ins.text}` by this warp of its warpgroup; "
            f"{instead}; .aligned means that all four must execute it, or none"
        )
        return RaceError(text, (text,))
