"""The sixteen named barriers of each block (bar, barrier) of a wave.

PTX ISA "Parallel Synchronization: bar, barrier": a barrier completes when as many threads as it
counts have arrived; without a count, all threads of the block that have not exited. Arrivals are
counted by whole warps: a warp arrives when all of its lanes that have not exited stand there. With
.aligned (bar always is) they must stand at one instruction; without, each may be at its own, of
.sync, .red and .arrive, and .arrive waits for the other lanes too.
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
_NOBODY = np.empty(0, np.int64)


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


class _Gathering:
    """Lanes of a warp that stand at a barrier, at several instructions, before it has arrived."""

    def __init__(self, ins: Instruction, count: int | None) -> None:
        self.ins = ins
        self.count = count
        self.waiting: list[Array] = []
        self.leaving: list[Array] = []
        self.values: list[Array] = []

    @property
    def lanes(self) -> Array:
        return np.concatenate([*self.waiting, *self.leaving])


class Barriers:
    """State of all barriers of a wave."""

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.gathering: dict[tuple[int, int], _Gathering] = {}  # by warp and barrier
        self.phases: dict[tuple[int, int], _Phase] = {}
        self.started = 0
        self.at = np.full(wave.live.shape[0], -1, np.int8)  # the barrier a lane waits at
        self.passed = np.zeros(wave.live.shape[0], np.bool_)  # it may go on
        self.value = np.zeros(wave.live.shape[0], np.uint32)  # bar.red's answer for it

    # All but bar.arrive

    def ready(
        self,
        ins: Instruction,
        c: Cohort,
        barrier: Array,
        count: Array | None,
        value: Array | None,
        aligned: bool,
        waits: bool = True,
    ) -> Any:
        """Arrive with the lanes that have not yet; which lanes may go on."""
        wave = self.wave
        alone = not (self.phases or self.gathering) and count is None and value is None
        # If everybody is here, there is nothing to keep.
        if alone and barrier.shape[0] == 1 and c.n == wave.live_count:
            self.check_number(ins, c, barrier)
            if wave.race is not None:
                wave.race.barrier(c.gids)
            return True
        new = self.at[c.gids] < 0
        if new.any():
            self.arrive(ins, c, barrier, count, value, new, waits, aligned)
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
        aligned: bool,
    ) -> None:
        """The lanes of c where `new` arrive, as far as their warps are all there."""
        wave = self.wave
        self.check_number(ins, c, barrier)
        here = np.zeros(wave.live.shape[0] // WARP, np.int64)
        np.add.at(here, c.gids[new] >> 5, 1)
        alive = wave.live.reshape(-1, WARP).sum(axis=1)
        complete = (here == alive)[c.gids >> 5] & new
        if not aligned:
            one = barrier.shape[0] == 1 and not self.gathering
            apart = new & (~complete if one else True)
            if apart.any():
                self.gather(ins, c, barrier, count, value, apart, waits)
                complete &= ~apart
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
            got = [] if values is None else [values[part]]
            if waits:
                self.at[members] = key[1]
                self.join(ins, key, wanted, members, _NOBODY, got)
            else:
                if not aligned:
                    self.at[members] = key[1]
                self.join(ins, key, wanted, _NOBODY, members, got)

    def gather(
        self,
        ins: Instruction,
        c: Cohort,
        barrier: Array,
        count: Array | None,
        value: Array | None,
        which: Array,
        waits: bool,
    ) -> None:
        """Lanes whose warps may be at several instructions arrive one by one."""
        gids, numbers = c.gids[which], c.full(barrier)[which].astype(np.int64)
        keys = (gids >> 5) * NAMED + numbers
        for key in np.unique(keys).tolist():
            mine = keys == key
            lanes = gids[mine]
            wanted = None if count is None else int(c.full(count)[which][mine][0])
            place = divmod(key, NAMED)
            group = self.gathering.get(place)
            if group is None:
                group = self.gathering[place] = _Gathering(ins, wanted)
            elif group.count != wanted:
                raise self._count_differs(ins, lanes, place[1], wanted, group)
            self.at[lanes] = place[1]
            (group.waiting if waits else group.leaving).append(lanes)
            if value is not None:
                group.ins = ins  # says how values are reduced
                group.values.append(c.full(value)[which][mine])
            self.gathered(place, group)

    def gathered(self, place: tuple[int, int], group: _Gathering) -> None:
        """The warp arrives if all of its lanes that live are there."""
        lanes = group.lanes
        warp, number = place
        if np.count_nonzero(self.wave.live[warp * WARP : (warp + 1) * WARP]) > lanes.shape[0]:
            return
        del self.gathering[place]
        waiting = np.sort(np.concatenate([_NOBODY, *group.waiting]))
        leaving = np.sort(np.concatenate([_NOBODY, *group.leaving]))
        slot = warp * WARP // self.wave.lanes_per_block
        self.join(group.ins, (slot, number), group.count, waiting, leaving, group.values)

    def _count_differs(
        self,
        ins: Instruction,
        lanes: Array,
        number: int,
        count: int | None,
        other: _Phase | _Gathering,
    ) -> KernelTrap:
        return KernelTrap(
            f"barrier {number} counts {count or 'all'} threads here and "
            f"{other.count or 'all'} at {other.ins.where}",
            self.wave.where(ins, int(lanes[0])),
        )

    def join(
        self,
        ins: Instruction,
        key: tuple[int, int],
        count: int | None,
        waiting: Array,
        leaving: Array,
        values: list[Array],
    ) -> None:
        """Whole warps arrive; of their lanes some wait for others, some go on."""
        wave = self.wave
        members = np.concatenate([waiting, leaving])
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
            raise self._count_differs(ins, members, key[1], count, phase)
        phase.arrived += WARP * int(np.unique(members >> 5).shape[0])
        if waiting.shape[0]:
            phase.waiting.append(waiting)
        if leaving.shape[0]:
            self.passed[leaving] = self.at[leaving] >= 0
            phase.leaving.append(leaving)
        if values:
            phase.ins = ins  # says how they are reduced
            phase.values += values
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
        for place, group in list(self.gathering.items()):
            self.gathered(place, group)
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
        if self.at[gid] < 0 or (gid >> 5, number) in self.gathering:
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
