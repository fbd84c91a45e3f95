"""The registers of each block, which setmaxnreg moves between its warps.

PTX ISA "Miscellaneous Instructions: setmaxnreg": a block has a pool of free registers, at first
none; `.dec` gives registers of a warp to it, `.inc` waits until it has as many as the warp asks
for. What a warp owns at the start is only known of kernels with .maxnreg, or with .minnctapersm and
.maxntid or .reqntid; for others setmaxnreg has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP, Cohort
from cumla.sim.errors import KernelTrap
from cumla.sim.isa.convergence import pack
from cumla.sim.ptx.syntax import Instruction

if TYPE_CHECKING:
    from cumla.sim.wave import Wave

FILE = 65536  # registers of an SM
UNIT = 8  # registers of a thread are owned in so many
LEAST, MOST = 24, 255
MOST_BLOCKS = 32  # per SM: .minnctapersm above it is ignored
WARPGROUP = 4  # warps

Array = NDArray[Any]


def at_start(directives: Mapping[str, tuple[int, ...]]) -> int | None:
    """Registers of a thread when a kernel starts, or None if its directives do not tell.

    As ptxas counts them: what lets .minnctapersm blocks of .maxntid threads, in whole warps, share
    an SM, at most .maxnreg.
    """
    known = []
    if "maxnreg" in directives:
        known.append(max(directives["maxnreg"][0], LEAST))
    threads = directives.get("maxntid") or directives.get("reqntid")
    blocks = directives.get("minnctapersm", (0,))[0]
    if threads and 0 < blocks <= MOST_BLOCKS:
        lanes = -(-prod(threads) // WARP) * WARP
        known.append(min(FILE // (lanes * blocks) // UNIT * UNIT, MOST))
    return min(known, default=None)


def _units(count: int) -> int:
    """Registers that a thread owns so that it has `count`."""
    return -(-count // UNIT) * UNIT


class RegisterPool:
    """The registers of the blocks of a wave.

    Attributes:
        start: what a thread owned at the start, None if that is not known.
        owned: [warps] what a thread of each warp owns.
        free: [slots] registers of each block that no warp owns, in registers of a warp's threads.
    """

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.start = wave.geometry.registers
        warps = wave.live.shape[0] // WARP
        self.warps_per_block = warps // wave.slots
        self.owned = np.full(warps, _units(self.start or 0), np.int64)
        self.free = np.zeros(wave.slots, np.int64)
        self._granted = np.zeros(warps, np.bool_)
        # How many setmaxnreg each warp has executed, and of each warpgroup, which they were.
        self._count = np.zeros(warps, np.int64)
        self._executed: dict[int, list[Instruction]] = {}

    def may_change(self, c: Cohort, count: int, action: str) -> Array:
        """[w] which warps may go on: all of their lanes are here, and `.inc` has what it wants."""
        alive = pack(self.wave.live.reshape(-1, WARP)[c.warps])
        ready: Array = pack(c.active) == alive
        if self.start is None or action == "dec":
            return ready
        for i in np.flatnonzero(ready).tolist():
            warp = int(c.warps[i])
            if self._granted[warp]:
                continue
            more = self._more(warp, count)
            slot = warp // self.warps_per_block
            if more > self.free[slot]:
                ready[i] = False
            elif more > 0:
                self._granted[warp] = True
                self.free[slot] -= more
        return ready

    def _more(self, warp: int, count: int) -> int:
        return WARP * (_units(count) - int(self.owned[warp]))

    def change(self, ins: Instruction, c: Cohort, count: int, action: str) -> None:
        """The warps own `count` registers a thread from now on."""
        for warp in c.warps.tolist():
            self._follow(ins, warp)
            if self.start is None:
                continue
            more = self._more(warp, count)
            if more > 0 if action == "dec" else more < 0:
                raise KernelTrap(
                    f"setmaxnreg.{action} to {count} registers in a warp that has "
                    f"{self.owned[warp]} a thread: .dec must not be to more, .inc not to fewer",
                    self.wave.where(ins, warp * WARP),
                )
            if more < 0:
                self.free[warp // self.warps_per_block] -= more
            self.owned[warp] = _units(count)
            self._granted[warp] = False
        self.wave.version += 1

    def _follow(self, ins: Instruction, warp: int) -> None:
        """All warps of a warpgroup must execute the same setmaxnreg instructions, in order.

        The same is: with the same direction and number. Where roles are split by warps a compiler
        may give each of them a copy of the instruction. That they synchronise before the next one,
        which PTX asks for as well, is not looked at: Triton's warps do not, and run on hardware.
        """
        number = int(self._count[warp])
        group = self._group(warp)
        executed = self._executed.setdefault(group.start, [])
        if number < len(executed) and not _same(executed[number], ins):
            raise self._apart(
                ins,
                warp,
                f"{self._name(warp)} executes this one, others the one at {executed[number].where}",
            )
        if number == len(executed):
            executed.append(ins)
        gone = [w for w in group if not self._alive(w) and self._count[w] <= number]
        if gone:
            raise self._apart(ins, warp, f"{self._name(gone[0])} has exited without it")
        self._count[warp] += 1

    def exited(self, gids: Array) -> None:
        """The lanes have ended: their warps should have executed what their warpgroup did."""
        for warp in np.unique(gids // WARP).tolist():
            executed = self._executed.get(self._group(warp).start, [])
            number = int(self._count[warp])
            if number < len(executed) and not self._alive(warp):
                raise self._apart(
                    executed[number], warp, f"{self._name(warp)} has exited without it"
                )

    def _alive(self, warp: int) -> bool:
        return bool(self.wave.live[warp * WARP : (warp + 1) * WARP].any())

    def _group(self, warp: int) -> range:
        """The warps of a warp's warpgroup."""
        block = warp // self.warps_per_block * self.warps_per_block
        first = block + (warp - block) // WARPGROUP * WARPGROUP
        return range(first, min(first + WARPGROUP, block + self.warps_per_block))

    def _name(self, warp: int) -> str:
        return f"warp {warp % self.warps_per_block}"

    def _apart(self, ins: Instruction, warp: int, what: str) -> KernelTrap:
        return KernelTrap(
            f"{ins.name}: {what}; all warps of a warpgroup must execute the same setmaxnreg",
            self.wave.where(ins, warp * WARP),
        )

    def describe(self, c: Cohort, count: int) -> str:
        """What the first warp of c waits for at `.inc`."""
        warp = int(c.warps[0])
        alive = pack(self.wave.live.reshape(-1, WARP)[warp])
        if pack(c.active)[0] != alive:
            return "the other lanes of its warp at setmaxnreg"
        return (
            f"registers: it wants {self._more(warp, count)} more, to have {count} a thread instead "
            f"of {self.owned[warp]}, and its block has {self.free[warp // self.warps_per_block]} "
            "free"
        )


def _same(one: Instruction, other: Instruction) -> bool:
    """Whether two places of a program ask for the same: compilers copy the instruction."""
    return one.modifiers == other.modifiers and one.operands == other.operands
