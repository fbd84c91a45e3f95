"""The sixteen named barriers of each block (bar, barrier) of a wave.

PTX ISA "Parallel Synchronization: bar, barrier": a barrier completes when as many threads as it
counts have arrived; without a count, all threads of the block that have not exited. Arrivals are
counted by whole warps: a warp arrives when all of its lanes that have not exited stand there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP, Cohort
from cumla.sim.errors import KernelTrap
from cumla.sim.ptx.syntax import Instruction

if TYPE_CHECKING:
    from cumla.sim.wave import Wave

NAMED = 16
Array = NDArray[Any]


class _Phase:
    """One use of a barrier of a block, from its first arrival to its completion."""

    def __init__(self, number: int, count: int | None, ins: Instruction) -> None:
        self.number = number  # unique in the wave, for the race detector
        self.count = count
        self.ins = ins
        self.arrived = 0  # threads, a partial last warp counts as 32 (PTX counts whole warps)
        self.waiting: list[Array] = []
        self.leaving: list[Array] = []  # lanes that arrived without waiting
        self.values: list[Array] = []


class Barriers:
    """State of all barriers of a wave."""

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.phases: dict[tuple[int, int], _Phase] = {}
        self.started = 0
        self.at = np.full(wave.live.shape[0], -1, np.int8)  # the barrier a lane waits at
        self.passed = np.zeros(wave.live.shape[0], np.bool_)  # it may go on
        self.value = np.zeros(wave.live.shape[0], np.uint32)  # bar.red's answer for it

    # bar.sync and bar.red

    def ready(
        self, ins: Instruction, c: Cohort, barrier: Array, count: Array | None, value: Array | None
    ) -> Any:
        """Arrive with the lanes that have not yet; which lanes may go on."""
        wave = self.wave
        alone = not self.phases and count is None and value is None and barrier.shape[0] == 1
        if alone and c.n == wave.live_count:  # everybody is here: nothing to keep
            self.check_number(ins, c, barrier)
            if wave.race is not None:
                wave.race.barrier(c.gids)
            return True
        new = self.at[c.gids] < 0
        if new.any():
            self.arrive(ins, c, barrier, count, value, new, waits=True)
        return self.passed[c.gids]

    def pass_on(self, c: Cohort, red: bool) -> Array:
        """The lanes go on: they are at no barrier any more. Their answers, for bar.red."""
        if self.at[c.gids[:1]][0] < 0:
            return np.zeros(1, np.uint32)
        self.at[c.gids] = -1
        self.passed[c.gids] = False
        return self.value[c.gids] if red else np.zeros(1, np.uint32)

    def arrive(
        self,
        ins: Instruction,
        c: Cohort,
        barrier: Array,
        count: Array | None,
        value: Array | None,
        new: Array,
        waits: bool,
    ) -> None:
        """The lanes of c where `new` arrive, as far as their warps are all there."""
        wave = self.wave
        self.check_number(ins, c, barrier)
        here = np.zeros(wave.live.shape[0] // WARP, np.int64)
        np.add.at(here, c.gids[new] >> 5, 1)
        alive = wave.live.reshape(-1, WARP).sum(axis=1)
        complete = (here == alive)[c.gids >> 5] & new
        if not complete.any():
            return
        gids = c.gids[complete]
        numbers = c.full(barrier)[complete]
        counts = None if count is None else c.full(count)[complete]
        values = None if value is None else c.full(value)[complete]
        keys = (gids // wave.lanes_per_block) * NAMED + numbers
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
        for part in np.split(order, starts[1:]):
            members = gids[part]
            key = divmod(int(keys[part[0]]), NAMED)
            wanted = None if counts is None else int(counts[part[0]])
            self.join(ins, key, wanted, members, None if values is None else values[part], waits)

    def join(
        self,
        ins: Instruction,
        key: tuple[int, int],
        count: int | None,
        members: Array,
        values: Array | None,
        waits: bool,
    ) -> None:
        wave = self.wave
        if count is not None and (count % WARP or count == 0):
            raise KernelTrap(
                f"barrier {key[1]} counts {count} threads; the count must be a positive "
                f"multiple of {WARP}",
                wave.where(ins, int(members[0])),
            )
        phase = self.phases.get(key)
        if phase is None:
            self.started += 1
            phase = self.phases[key] = _Phase(self.started, count, ins)
        elif phase.count != count:
            raise KernelTrap(
                f"barrier {key[1]} counts {count or 'all'} threads here and "
                f"{phase.count or 'all'} at {phase.ins.where}",
                wave.where(ins, int(members[0])),
            )
        phase.arrived += WARP * int(np.unique(members >> 5).shape[0])
        if waits:
            self.at[members] = key[1]
            phase.waiting.append(members)
            if values is not None:
                phase.values.append(values)
        else:
            phase.leaving.append(members)
        self.settle(key, phase)

    def settle(self, key: tuple[int, int], phase: _Phase) -> bool:
        """Complete the phase if everybody has arrived."""
        wave = self.wave
        slot = key[0]
        if phase.count is None:
            lanes = wave.live.reshape(wave.slots, -1, WARP)[slot]
            # Lanes that wait here have not exited, so live warps are those that must arrive.
            expected = WARP * int(lanes.any(axis=1).sum())
        else:
            expected = phase.count
        if phase.arrived < expected:
            return False
        if phase.arrived > expected:
            gid = (phase.waiting + phase.leaving)[-1][0]
            raise KernelTrap(
                f"{phase.arrived} threads arrived at barrier {key[1]}, which counts {expected}",
                wave.where(phase.ins, int(gid)),
            )
        del self.phases[key]
        waiting = np.sort(np.concatenate(phase.waiting)) if phase.waiting else np.empty(0, np.int64)
        self.passed[waiting] = True
        if phase.values:
            self.value[waiting] = _reduce(phase.ins, np.concatenate(phase.values))
        wave.version += 1
        if wave.race is not None:
            if not phase.leaving:
                wave.race.barrier(waiting)
            else:
                everyone = np.sort(np.concatenate([waiting, *phase.leaving]))
                name = -phase.number  # mbarriers have positive names
                wave.race.release(everyone, name)
                wave.race.acquire(waiting, name)
                wave.race.forget(name)
        return True

    def lanes_exited(self) -> None:
        """Barriers that wait for all threads may be complete now."""
        for key, phase in list(self.phases.items()):
            if phase.count is None:
                self.settle(key, phase)

    def check_number(self, ins: Instruction, c: Cohort, barrier: Array) -> None:
        if (barrier >= NAMED).any():
            raise KernelTrap(
                f"barrier {int(barrier.max())} does not exist; a block has {NAMED}",
                self.wave.where(ins, int(c.gids[0])),
            )

    def describe(self, c: Cohort, barrier: Array) -> str:
        """What the first lane of c waits for."""
        gid = int(c.gids[0])
        slot = gid // self.wave.lanes_per_block
        number = int(barrier[0])
        if self.at[gid] < 0:
            return f"the other lanes of its warp at barrier {number}"
        phase = self.phases.get((slot, number))
        if phase is None:
            return f"barrier {number}"
        expected = phase.count
        if expected is None:
            lanes = self.wave.live.reshape(self.wave.slots, -1, WARP)[slot]
            expected = WARP * int(lanes.any(axis=1).sum())
        return f"barrier {number}: {phase.arrived} of {expected} threads have arrived"


def _reduce(ins: Instruction, predicates: Array) -> int:
    if "popc" in ins.modifiers:
        return int(np.count_nonzero(predicates))
    return int(predicates.all() if "and" in ins.modifiers else predicates.any())
