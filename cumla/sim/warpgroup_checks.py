"""What must not be done with registers of a wgmma, found while a kernel runs, for the race check.

PTX ISA "wgmma.mma_async": before a wgmma.wait_group accumulators must not be accessed, nor the
registers of a fragment of A be modified. PTX ISA "wgmma.fence": there must be one before the first
wgmma.mma_async, and between an access to a register and a wgmma.mma_async that uses it, but for
accumulators that a wgmma.mma_async wrote. The code generator calls this where its analysis
(program/in_flight.py) says that it may be so; here it is known exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort
from cumla.sim.errors import RaceError
from cumla.sim.ptx.syntax import Instruction

if TYPE_CHECKING:
    from cumla.sim.warpgroups import Operation, Warpgroups

Array = NDArray[Any]
# A tag is the number of an operation, from 1, times this, plus the row; 0 is not in flight.
TAG_ROWS = 1024
# A mark is how many fences a lane had executed when it wrote a register, times this, plus the index
# of the instruction and 1; 0 is a register that needs no fence.
MARK_WRITERS = 1 << 32


class Checks:
    """The registers of the lanes of a wave; all raise RaceError for what must not be."""

    def __init__(self, warpgroups: Warpgroups) -> None:
        self.warpgroups = warpgroups
        self._fences: Array | None = None  # [lanes] that each has executed
        self._marks: dict[int, Array] = {}  # by the number of the register: [lanes]
        self._writers: dict[int, Instruction] = {}  # by their index

    # Registers in flight.

    def touched(
        self, ins: Instruction, names: Sequence[str], c: Cohort, mask: Array | None, *registers: Any
    ) -> None:
        """The lanes where mask is true (None: all) read registers: report those in flight."""
        if not self.warpgroups.under_way:
            return
        for name, register in zip(names, registers, strict=True):
            tags = self.warpgroups.tags(register)
            if tags is not None:
                self._report(ins, name, c, tags, mask, "reads")

    def overwritten(
        self, ins: Instruction, name: str, c: Cohort, mask: Array | None, old: Array, *others: Array
    ) -> None:
        """The lanes give a register that was `old` another value: report what is lost in flight.

        `others` are the registers that will still be used and may be in flight. If one of them is
        what the register was, only a name is given up, as it is if a later wgmma has taken it up.
        """
        if not self.warpgroups.under_way:
            return
        tags = self.warpgroups.tags(old)
        if tags is None:
            return
        lost = tags.copy()
        for other in others:
            found = self.warpgroups.tags(other)
            if found is not None:
                lost[found == tags] = 0
        for number in np.unique(lost // TAG_ROWS).tolist():
            operation = self.warpgroups.under(number)
            if operation is not None and operation.taken_up:
                lost[lost // TAG_ROWS == number] = 0
        self._report(ins, name, c, lost, mask, "overwrites")

    def _report(
        self, ins: Instruction, name: str, c: Cohort, tags: Array, mask: Array | None, how: str
    ) -> None:
        if mask is not None:
            tags = np.where(mask, tags, 0)
        if tags.any():
            lane = int(np.argmax(tags != 0))
            operation = self.warpgroups.operation(int(tags[lane]))
            raise self.error(ins, name, int(c.gids[lane]), operation, how, "is an accumulator")

    def modified(
        self, ins: Instruction, names: frozenset[str], c: Cohort, mask: Array | None
    ) -> None:
        """The lanes write registers with these names, which may hold a fragment of A."""
        for operation in self.warpgroups.operations:
            for name in sorted(names & operation.held):
                waiting = np.isin(c.gids >> 5, operation.warps[~operation.completed])
                if mask is not None:
                    waiting = waiting & mask
                if waiting.any():
                    gid = int(c.gids[np.argmax(waiting)])
                    raise self.error(ins, name, gid, operation, "overwrites", "holds A")

    # Registers that need a fence.

    def fenced(self, c: Cohort, mask: Array | None) -> None:
        """The lanes where mask is true (None: all) execute a wgmma.fence."""
        self._executed()[_lanes(c, mask)] += 1

    def wrote(
        self, ins: Instruction, registers: Sequence[int], c: Cohort, mask: Array | None
    ) -> None:
        """The lanes write registers, given by number, that a wgmma.mma_async may use."""
        self._writers[ins.index] = ins
        gids = _lanes(c, mask)
        marks = self._executed()[gids] * MARK_WRITERS + (ins.index + 1)
        for register in registers:
            self._marks_of(register)[gids] = marks

    def cleared(self, registers: Sequence[int], c: Cohort, mask: Array | None) -> None:
        """The lanes write registers so that they need no fence."""
        gids = _lanes(c, mask)
        for register in registers:
            self._marks_of(register)[gids] = 0

    def copied(self, target: int, source: int, c: Cohort, mask: Array | None) -> None:
        """The lanes give a register another name."""
        gids = _lanes(c, mask)
        self._marks_of(target)[gids] = self._marks_of(source)[gids]

    def unfenced(
        self,
        ins: Instruction,
        names: Sequence[str],
        registers: Sequence[int],
        c: Cohort,
        mask: Array | None,
    ) -> None:
        """The lanes use registers in a wgmma.mma_async: report those that lack a fence."""
        gids = _lanes(c, mask)
        fences = self._executed()[gids]
        if (fences == 0).any():
            self._report_unfenced(ins, int(gids[np.argmin(fences)]), "none was executed before")
        for name, register in zip(names, registers, strict=True):
            marks = self._marks_of(register)[gids]
            lacking = (marks != 0) & (marks // MARK_WRITERS == fences)
            if lacking.any():
                lane = int(np.argmax(lacking))
                writer = self._writers[int(marks[lane]) % MARK_WRITERS - 1]
                self._report_unfenced(
                    ins,
                    int(gids[lane]),
                    f"there was none since `{writer.text}` at {writer.where} wrote {name}",
                    "; if there is one in the source, the compiler moved the write below it: tie "
                    'the registers to their place by asm volatile("" : "+f"(x) :: "memory") '
                    "before the fence",
                )

    def _executed(self) -> Array:
        if self._fences is None:
            self._fences = np.zeros(self.warpgroups.wave.live.shape, np.int64)
        return self._fences

    def _marks_of(self, register: int) -> Array:
        marks = self._marks.get(register)
        if marks is None:
            marks = self._marks[register] = np.zeros(self.warpgroups.wave.live.shape, np.int64)
        return marks

    def _report_unfenced(self, ins: Instruction, gid: int, why: str, advice: str = "") -> None:
        text = (
            f"{self.warpgroups.wave.where(ins, gid)}: `{ins.text}` needs a wgmma.fence before it, "
            f"and {why}; put wgmma.fence.sync.aligned between them{advice}"
        )
        raise RaceError(text, (text,))

    def error(
        self, ins: Instruction, name: str, gid: int, operation: Operation, how: str, what: str
    ) -> RaceError:
        """The report of a register that is used before its wgmma was waited for."""
        where = self.warpgroups.wave.where(ins, gid)
        text = (
            f"{where}: `{ins.text}` {how} {name}, which {what} of the "
            f"wgmma.mma_async at {operation.ins.where} that is still under way; "
            "a wgmma.wait_group is missing between them"
        )
        return RaceError(text, (text,))


def _lanes(c: Cohort, mask: Array | None) -> Array:
    """The lanes of a cohort where a mask, [n] or [1], is true."""
    return c.gids if mask is None else c.gids[np.broadcast_to(mask, c.gids.shape)]
