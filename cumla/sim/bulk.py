"""Bulk and tensor copies of a wave that are under way.

PTX ISA "Data Movement: Asynchronous copy", "Completion mechanisms". A copy to shared memory counts
its bytes on an mbarrier when it has landed. A copy to global memory belongs to the bulk group that
its thread commits next; the thread waits for all groups but its newest N, or, with .read, only
until their sources have been read. Between issue and wait a copy reads and writes at any time, so
`delivery` chooses when: "eager" at issue; "late" when somebody waits for it, or at the end of all
blocks; "random" somewhere in between. Addresses were checked at issue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort
from cumla.sim.mbarriers import Found, Mbarriers
from cumla.sim.memory.words import Words

if TYPE_CHECKING:
    from cumla.sim.wave import Wave

Array = NDArray[Any]

# Random delivery: the chance of a copy to go on whenever there is one.
CHANCE = 0.3
NO_BARRIER = -1


@dataclass(slots=True)
class Target:
    """Where a copy writes.

    Attributes:
        write: does so, given what was read.
        block: the slot whose shared memory it is, or -1.
        barrier: arena offset of the mbarrier that counts the bytes, or NO_BARRIER.
        agent, stamp: what the race detector calls the writes.
        counter, counted: what it calls the access to the mbarrier.
    """

    write: Callable[[Array], None]
    block: int = -1
    barrier: int = NO_BARRIER
    agent: int = 0
    stamp: int = 0
    counter: int = 0
    counted: int = 0


@dataclass(slots=True)
class Transfer:
    """A copy of one lane.

    Attributes:
        gid: the lane.
        barriers: the instruction's way to mbarriers, or None for a copy that a group tracks.
        source: what it reads; None for a store, whose data are there from the start.
        nbytes: what it counts on each mbarrier.
        agent, stamp: what the race detector calls the reads.
        group: the lane's bulk group that it is in, counted from 0.
        data: what was read, once it was.
        landed: all is written.
    """

    gid: int
    barriers: Mbarriers | None
    source: Words | None
    targets: list[Target]
    nbytes: int
    agent: int = 0
    stamp: int = 0
    group: int = 0
    data: Array | None = None
    landed: bool = False


class Bulk:
    """The bulk and tensor copies that are under way in a wave, and what waits for them."""

    def __init__(self, wave: Wave, delivery: str) -> None:
        self.wave = wave
        self.delivery = delivery
        self._committed: dict[int, int] = {}  # lane -> groups that it has committed
        self._loads: list[Transfer] = []  # in the order of issue
        self._stores: dict[int, list[Transfer]] = {}  # by lane, in the order of issue

    # What lanes do.

    def issue(self, transfer: Transfer) -> None:
        """A lane has started a copy."""
        loads = transfer.barriers is not None
        if self.delivery == "eager":
            self._land(transfer)
        elif loads:
            self._loads.append(transfer)
        if not loads and (self.delivery != "eager" or self.wave.race is not None):
            transfer.group = self._committed.get(transfer.gid, 0)
            self._stores.setdefault(transfer.gid, []).append(transfer)
        if self.delivery == "random":
            self._chance()

    def commit(self, c: Cohort) -> None:
        """The lanes' copies since their last commit are a group."""
        for gid in self._lanes(c):
            self._committed[gid] = self._committed.get(gid, 0) + 1
        if self.delivery == "random":
            self._chance()

    def wait(self, c: Cohort, newest: int, read: bool) -> None:
        """Complete the lanes' groups but the `newest`; with `read`, only read the sources."""
        if self.delivery == "random":
            self._chance()
        for gid in self._lanes(c):
            over = self._committed.get(gid, 0) - newest
            kept = []
            for transfer in self._stores[gid]:
                if transfer.group >= over:
                    kept.append(transfer)
                    continue
                self._read(transfer)
                if read:
                    kept.append(transfer)
                else:
                    self._land(transfer)
                if self.wave.race is not None:
                    self._known(transfer, read)
            if kept:
                self._stores[gid] = kept
            else:
                del self._stores[gid]

    def _lanes(self, c: Cohort) -> list[int]:
        """Those of the lanes that have copies in groups: only they need to count groups."""
        if not self._stores:
            return []
        lanes = np.fromiter(self._stores, np.int64)
        found: list[int] = lanes[np.isin(lanes, c.gids)].tolist()
        return found

    # What makes copies land.

    def deliver_next(self) -> bool:
        """Let mbarriers have all their copies: of each block, those of its oldest copy.

        False for none. Blocks go on together, as they do when nothing is late.
        """
        if not self._loads:
            return False
        oldest: dict[int, Transfer] = {}
        for transfer in self._loads:
            oldest.setdefault(transfer.gid // self.wave.lanes_per_block, transfer)
        barriers = [target.barrier for t in oldest.values() for target in t.targets]
        self.deliver_arrivals(np.array(barriers))
        return True

    def deliver_arrivals(self, offsets: Array) -> None:
        """Let copies land that count on the mbarriers at these offsets: somebody waits."""
        wanted = set(offsets.tolist())
        asked, self._loads = self._loads, []
        for transfer in asked:
            if wanted.isdisjoint(target.barrier for target in transfer.targets):
                self._loads.append(transfer)
            else:
                self._land(transfer)

    def lanes_exited(self) -> None:
        """Nobody can wait for what lands in a block whose lanes have all ended."""
        if self._loads:
            alive = self.wave.slot_alive(np.arange(self.wave.slots))
            self._loads = [t for t in self._loads if any(alive[x.block] for x in t.targets)]

    def finish(self) -> None:
        """The wave has ended: what nobody waited for is written now."""
        for transfers in self._stores.values():
            for transfer in transfers:
                self._land(transfer)
        self._stores.clear()
        self._loads.clear()

    def _chance(self) -> None:
        """Random delivery: some of what is under way goes on now."""
        rng = self.wave.rng
        loads, self._loads = self._loads, []
        for transfer in loads:
            if rng.random() < CHANCE:
                self._land(transfer)
            else:
                self._loads.append(transfer)
        for transfers in self._stores.values():
            for transfer in transfers:
                if rng.random() < CHANCE:
                    if transfer.data is None:
                        self._read(transfer)
                    else:
                        self._land(transfer)

    def _read(self, transfer: Transfer) -> None:
        if transfer.data is None:
            assert transfer.source is not None
            transfer.data = transfer.source.read()

    def _land(self, transfer: Transfer) -> None:
        """Read and write, if that has not been done, and count the bytes."""
        if transfer.landed:
            return
        self._read(transfer)
        assert transfer.data is not None
        transfer.landed = True
        for target in transfer.targets:
            target.write(transfer.data)
            if transfer.barriers is not None:
                self._complete(transfer, target)
        transfer.data = transfer.data[:0]

    def _complete(self, transfer: Transfer, target: Target) -> None:
        """complete_tx on a target's mbarrier."""
        assert transfer.barriers is not None
        c = Cohort(self.wave, np.array([transfer.gid]), [])
        found = Found(transfer.barriers, c, np.array([target.barrier]))
        found.load()
        if self.wave.race is not None:
            keys, race = found.keys(), self.wave.race
            race.completed_to(keys, c.gids, np.array([target.agent]), target.stamp)
            race.completed_to(keys, c.gids, np.array([target.counter]), target.counted)
            if transfer.agent != target.agent:  # else its reads come before its writes
                race.completed_to(keys, c.gids, np.array([transfer.agent]), transfer.stamp)
        found.add_tx(np.array([-transfer.nbytes]))
        found.store()

    def _known(self, transfer: Transfer, read: bool) -> None:
        """Tell the race detector that the lane knows what a copy of its did."""
        gids, race = np.array([transfer.gid]), self.wave.race
        race.completed(gids, np.array([transfer.agent]), transfer.stamp)
        if not read:
            for target in transfer.targets:
                race.completed(gids, np.array([target.agent]), target.stamp)
