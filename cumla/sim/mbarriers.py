"""mbarrier objects. PTX ISA "Parallel Synchronization: mbarrier".

An mbarrier is a 64-bit word of shared memory, whose encoding PTX leaves open. Here it is

    bits  0-19  pending: arrivals that the current phase still needs
    bits 20-39  expected: arrivals that the next phase needs
    bits 40-60  tx-count: bytes of asynchronous copies that the phase still needs, signed
    bit  61     parity of the current phase
    bits 62-63  binary 10

and the state that an arrival returns, opaque to programs as well, is

    bits  0-19  pending before the arrival
    bits 20-63  number of the phase that it belongs to

`Wave.mbarriers` holds the barriers that are alive: offset in the wave's shared memory -> number of
the current phase, counted from 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort
from cumla.sim.errors import KernelTrap, MemoryFault
from cumla.sim.isa.table import Env
from cumla.sim.memory.arena import WRITTEN
from cumla.sim.memory.faults import Access
from cumla.sim.memory.shared import address_of, offsets
from cumla.sim.memory.spaces import CLUSTER, SHARED_WINDOW, in_window
from cumla.sim.ptx.syntax import Instruction

Array = NDArray[Any]

COUNT_BITS = 20
# PTX ISA "Contents of the mbarrier object": the largest count, and the largest tx-count either way.
LARGEST = (1 << COUNT_BITS) - 1
TX_SHIFT = 40
TX_MASK, TX_SIGN = (1 << 21) - 1, 1 << 20
PARITY_SHIFT = 61
MARK_SHIFT, MARK = 62, 0b10
WORD = np.dtype(np.uint64)
WRITTEN_WORD = WRITTEN * int.from_bytes(b"\x01" * 8, "little")


def phase_key(offset: Array, phase: Array) -> Array:
    """The race detector's names of phases: positive, and unlike for different barriers."""
    return ((offset >> 3) + 1) << 32 | (phase & 0xFFFFFFFF)


class Mbarriers:
    """The way of one instruction to mbarriers.

    Args:
        space: "shared", "shared::cluster" or "generic".
        own: only the block's own barriers may be meant, by generic addresses, too.
    """

    def __init__(self, ins: Instruction, env: Env, space: str, own: bool = False) -> None:
        self.ins = ins
        self.check_memory = env.check_memory
        self.check_race = env.check_race
        self.generic = space == "generic"
        window = SHARED_WINDOW if self.generic else 0
        if self.generic:
            space = "shared" if own else CLUSTER
        self.access = Access(ins, space, 8, "atomic", env.check_memory, window)

    def offsets(self, c: Cohort, address: Array) -> Array:
        """[n] the program's addresses as offsets in the wave's shared memory."""
        if self.generic:
            outside = ~in_window(address, CLUSTER)
            if outside.any():
                lane = int(np.argmax(outside))
                at = int(address[lane])
                raise self.trap(c, lane, f"mbarrier at {at:#x}, which is not in shared memory")
            address = address - SHARED_WINDOW
        if np.bitwise_or.reduce(address) & 7:
            lane = int(np.argmax(address & 7 != 0))
            at = int(address[lane])
            raise MemoryFault(
                "misaligned",
                f"mbarrier at shared {at:#x}; its address must be a multiple of 8",
                at,
                c.wave.where(self.ins, int(c.gids[lane])),
            )
        return offsets(self.access, c, address)

    def find(self, c: Cohort, address: Array) -> Found:
        """The barriers at these addresses; all must be alive."""
        return Found(self, c, self.offsets(c, address))

    def create(self, c: Cohort, address: Array, count: Array) -> Array:
        """mbarrier.init; the memory of an old barrier may be taken for a new one.

        Returns [n] where they are.
        """
        self.check_count(c, count)
        at = self.offsets(c, address)
        counts = count.astype(np.uint64)
        self.write(c, at, counts | counts << COUNT_BITS | np.uint64(MARK << MARK_SHIFT))
        if self.check_memory:
            c.wave.memory.shared.states[WORD][at >> 3] = WRITTEN_WORD
        distinct = np.unique(at)
        if self.check_race:
            self.forget_old(c, distinct)
        c.wave.mbarriers.update(dict.fromkeys(distinct.tolist(), 0))
        return at

    def destroy(self, c: Cohort, address: Array) -> Array:
        """mbarrier.inval. Returns [n] where they were."""
        found = self.find(c, address)
        if self.check_race:
            self.forget_old(c, found.offsets)
        for offset in found.offsets.tolist():
            del c.wave.mbarriers[offset]
        self.write(c, found.lane_offsets, np.zeros(1, WORD))
        return found.lane_offsets

    def read(self, c: Cohort, at: Array) -> Array:
        """The words at these offsets."""
        words: Array = c.wave.memory.shared.views[WORD].take(at >> 3)
        return words

    def write(self, c: Cohort, at: Array, words: Array) -> None:
        c.wave.memory.shared.views[WORD][at >> 3] = words
        c.wave.version += 1

    def forget_old(self, c: Cohort, offsets: Array) -> None:
        """The phases that lanes could still name are of a barrier that ends."""
        numbers = [c.wave.mbarriers.get(offset, -1) for offset in offsets.tolist()]
        phases = np.array(numbers, np.int64)
        live = phases >= 0
        if live.any():
            keys = phase_key(offsets[live], phases[live])
            c.wave.race.forget(np.concatenate([keys, phase_key(offsets[live], phases[live] - 1)]))

    def check_count(self, c: Cohort, count: Array) -> None:
        bad = (count == 0) | (count > LARGEST)
        if np.count_nonzero(bad):
            lane = int(np.argmax(bad))
            raise self.trap(
                c, lane, f"count {int(count[lane])} of an mbarrier; it must be 1 to {LARGEST}"
            )

    def trap(self, c: Cohort, lane: int, message: str) -> KernelTrap:
        return KernelTrap(message, c.wave.where(self.ins, int(c.gids[lane])))


class Found:
    """The distinct barriers that the lanes of a cohort name, u of them.

    Attributes:
        lane_offsets: [n] offset in the wave's shared memory of each lane's barrier.
        offsets: [u] the distinct ones.
        rows: [u] the first lane of each.
        lanes: [u] how many lanes name it.
        index: [n] which barrier each lane names, or None if u is 1.
        phases: [u] number of the current phase.
    """

    def __init__(self, words: Mbarriers, c: Cohort, lane_offsets: Array) -> None:
        self.words = words
        self.c = c
        self.lane_offsets = lane_offsets
        self.index: Array | None = None
        starts = np.flatnonzero(lane_offsets[1:] != lane_offsets[:-1]) + 1
        if starts.shape[0] == 0:
            self.rows = np.zeros(1, np.int64)
            self.lanes = np.array([c.n])
            self.offsets = lane_offsets[:1]
        else:
            self.offsets, self.rows, self.lanes, self.index = _distinct(lane_offsets, starts)
        live = c.wave.mbarriers
        phases = [live.get(offset, -1) for offset in self.offsets.tolist()]
        self.phases = np.array(phases, np.int64)
        if min(phases) < 0:
            self._must_not(
                self.phases < 0,
                "there is no mbarrier at shared {at}: it was never initialised, or was invalidated",
            )

    # Between barriers and lanes.

    def spread(self, values: Array) -> Array:
        """[u] values as [n], or as [1] if there is one barrier."""
        return values if self.index is None else values[self.index]

    def total(self, values: Array) -> Array:
        """[u] int64: for each barrier the sum over its lanes of values, [n] or [1]."""
        if values.shape[0] == 1:
            return self.lanes * int(values[0])
        if self.index is None:
            return values.sum(dtype=np.int64, keepdims=True)
        sums = np.zeros(self.offsets.shape[0], np.int64)
        np.add.at(sums, self.index, values.astype(np.int64))
        return sums

    def earlier(self, values: Array) -> Array:
        """[n] int64: the sum over the lanes of the same barrier that come before each lane."""
        values = self.c.full(values).astype(np.int64)
        if self.index is None:
            return np.cumsum(values) - values
        order = np.argsort(self.index, kind="stable")
        sums = np.cumsum(values[order]) - values[order]
        starts = np.cumsum(self.lanes) - self.lanes
        sums -= np.repeat(sums[starts], self.lanes)
        result = np.empty_like(sums)
        result[order] = sums
        return result

    def tell(self, scope: str) -> None:
        """Tell the race detector that each lane uses its barrier."""
        if self.words.check_race:
            self.c.wave.race.access(
                self.words.ins, self.c, "shared", self.lane_offsets, 8, "atomic", "relaxed", scope
            )

    # What the barriers hold.

    def load(self) -> None:
        """Read the counts: `pending`, `expected` and `tx`, [u] int64 each."""
        words = self.words.read(self.c, self.offsets).view(np.int64)
        self._must_not(
            (words >> MARK_SHIFT & 3 != MARK) | (words >> PARITY_SHIFT & 1 != self.phases & 1),
            "the mbarrier at shared {at} was overwritten by something else",
        )
        self.pending = words & LARGEST
        self.expected = words >> COUNT_BITS & LARGEST
        self.tx = (words >> TX_SHIFT & TX_MASK ^ TX_SIGN) - TX_SIGN

    def store(self) -> None:
        """Complete the phases that need nothing more, and write the words."""
        done = (self.pending == 0) & (self.tx == 0)
        if np.count_nonzero(done):
            self.pending = np.where(done, self.expected, self.pending)
            self._next_phase(done)
        word = self.pending | self.expected << COUNT_BITS | (self.tx & TX_MASK) << TX_SHIFT
        word |= (self.phases & 1) << PARITY_SHIFT
        self.words.write(self.c, self.offsets, word.view(np.uint64) | np.uint64(MARK << MARK_SHIFT))

    def _next_phase(self, done: Array) -> None:
        wave = self.c.wave
        self.phases = self.phases + done
        ended = zip(self.offsets[done].tolist(), self.phases[done].tolist(), strict=True)
        wave.mbarriers.update(ended)
        if self.words.check_race:
            # A wait may name the phase that has just ended, but none before it.
            old = done & (self.phases >= 2)
            if old.any():
                wave.race.forget(phase_key(self.offsets[old], self.phases[old] - 2))

    def state(self, count: Array) -> Array:
        """What arrivals of so many return, lane after lane; call it after `load`."""
        before = self.spread(self.pending) - self.earlier(count)
        return (before | self.spread(self.phases) << COUNT_BITS).view(np.uint64)

    def keys(self) -> Array:
        """The race detector's names of the current phases, one for each lane or one for all."""
        return self.spread(phase_key(self.offsets, self.phases))

    def fits(self, count: Array) -> Array | None:
        """[n] bool: whose arrivals the current phases still need; None for all.

        Of each barrier the first lane is among them, for `take_arrivals` to refuse it if need be.
        """
        if not np.count_nonzero(self.total(count) > self.pending):
            return None
        fit: Array = self.earlier(count) + self.c.full(count) <= self.spread(self.pending)
        fit[self.rows] = True
        return None if fit.all() else fit

    # Changes, between `load` and `store`.

    def take_arrivals(self, count: Array, drop: bool = False) -> None:
        """Arrive; with `drop`, later phases expect as many fewer."""
        arrived = self.total(count)
        over = arrived > self.pending
        if np.count_nonzero(over):
            which = int(np.argmax(over))
            self._must_not(
                over,
                f"an arrival with count {arrived[which]} on the mbarrier at shared {{at}}, whose "
                f"phase {self.phases[which]} needs only {self.pending[which]} more of "
                f"{self.expected[which]}",
            )
        self.pending = self.pending - arrived
        if drop:
            # Arrivals that cp.async.mbarrier.arrive has added are not expected in later phases.
            self._must_not(
                arrived > self.expected,
                "more arrivals are dropped than the mbarrier at shared {at} expects",
            )
            self.expected = self.expected - arrived

    def add_pending(self, count: Array) -> None:
        """The current phase needs more arrivals."""
        self.pending = self.pending + self.total(count)
        self._must_not(
            self.pending > LARGEST,
            f"the mbarrier at shared {{at}} has more than {LARGEST} arrivals pending",
        )

    def add_tx(self, count: Array) -> None:
        """The current phase needs more bytes, or fewer where the count is negative."""
        self.tx = self.tx + self.total(count)
        self._must_not(
            abs(self.tx) > LARGEST,
            f"the tx-count of the mbarrier at shared {{at}} is beyond {LARGEST}",
        )

    def must_not_complete(self) -> None:
        """For .noComplete."""
        self._must_not(
            (self.pending == 0) & (self.tx == 0),
            "an arrival with .noComplete completes the phase of the mbarrier at shared {at}",
        )

    def describe(self) -> str:
        """What the first lane's barrier waits for."""
        self.load()
        at = address_of(self.c, int(self.offsets[0]))
        text = (
            f"mbarrier at shared {at:#x} phase {self.phases[0]}: "
            f"{self.pending[0]} of {self.expected[0]} arrivals missing"
        )
        tx = int(self.tx[0])
        if tx:
            text += f", {tx} bytes missing" if tx > 0 else f", {-tx} bytes more than expected"
        return text

    def _must_not(self, bad: Array, message: str) -> None:
        """KernelTrap for the first barrier where `bad`; `{at}` in the message is its address."""
        if np.count_nonzero(bad):
            which = int(np.argmax(bad))
            at = f"{address_of(self.c, int(self.offsets[which])):#x}"
            raise self.words.trap(self.c, int(self.rows[which]), message.replace("{at}", at))


def in_turns(
    words: Mbarriers, c: Cohort, at: Array, count: Array
) -> Iterator[tuple[Array | None, Found]]:
    """(rows of the cohort, or None for all; their barriers, loaded) for lanes that arrive in turn.

    Lanes arrive one after the other, ascending, and phases may end in between: on a barrier that
    expects 16, all 32 lanes of a warp complete two. In a turn each barrier has arrivals of one
    phase. The caller takes and stores them before it asks for the next.

    at: [n] offsets of the barriers.
    """
    found = Found(words, c, at)
    found.load()
    fit = found.fits(count)
    if fit is None:
        yield None, found
        return
    at, count, rest = c.full(at), c.full(count), np.arange(c.n)
    while fit is not None:
        turn, rest = rest[fit], rest[~fit]
        found = Found(words, Cohort(c.wave, c.gids[turn], []), at[turn])
        found.load()
        yield turn, found
        found = Found(words, Cohort(c.wave, c.gids[rest], []), at[rest])
        found.load()
        fit = found.fits(count[rest])
    yield rest, found


def _distinct(offsets: Array, starts: Array) -> tuple[Array, Array, Array, Array]:
    """(distinct offsets, first row of each, how many rows, [n] which), by first row.

    Runs of one offset begin at row 0 and at `starts`.
    """
    rows = np.concatenate([np.zeros(1, np.int64), starts])
    distinct = offsets[rows]
    if (distinct[1:] > distinct[:-1]).all():
        lanes = np.diff(rows, append=offsets.shape[0])
        return distinct, rows, lanes, np.repeat(np.arange(rows.shape[0]), lanes)
    distinct, rows, index, lanes = np.unique(
        offsets, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(rows)
    back = np.empty_like(order)
    back[order] = np.arange(order.shape[0])
    return distinct[order], rows[order], lanes[order], back[index]
