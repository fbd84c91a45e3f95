"""Operands of bulk and tensor copies in shared memory, and what is told of a copy at issue."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.bulk import NO_BARRIER, Target, Transfer
from cumla.sim.cohort import Cohort
from cumla.sim.errors import KernelTrap, MemoryFault
from cumla.sim.isa.table import Env
from cumla.sim.mbarriers import Mbarriers
from cumla.sim.memory.faults import Access
from cumla.sim.memory.shared import address_of, offsets
from cumla.sim.memory.spaces import CLUSTER
from cumla.sim.memory.words import Words
from cumla.sim.ptx.syntax import Instruction

Array = NDArray[Any]

CHUNK = 16
RACE_WORD = 4  # the narrowest access that the race detector is told of
# Names of queues: for copies that an mbarrier counts, one by its offset, and one for stores that it
# counts; for copies in groups, two of each lane, as reads are known before writes.
AGENTS = 1 << 60
COUNTED, READS, WRITES, STORES = range(4)


class Place:
    """An operand in shared memory.

    Args:
        space: "shared::cta" or "shared::cluster".
        kind: "read", "write" or "atomic".
        align: what its address must be a multiple of.
    """

    def __init__(self, ins: Instruction, env: Env, space: str, kind: str, align: int) -> None:
        self.ins = ins
        self.align = align
        space = CLUSTER if space == CLUSTER else "shared"
        self.access = Access(ins, space, CHUNK, kind, env.check_memory)

    def offsets(self, c: Cohort, address: Array) -> Array:
        """[n] offsets in the arena of shared memory of the lanes' addresses."""
        wrong = c.full(address) % self.align != 0
        if wrong.any():
            lane = int(np.argmax(wrong))
            at = int(c.full(address)[lane])
            raise MemoryFault(
                "misaligned",
                f"{self.access.kind} of shared memory at {at:#x}; the address must be a multiple "
                f"of {self.align}",
                at,
                c.wave.where(self.ins, int(c.gids[lane])),
            )
        return offsets(self.access, c, address)

    def room(self, c: Cohort, lane: int, address: int, length: int) -> None:
        """Refuse a lane's copy that reaches beyond the block's shared memory that it begins in."""
        one = Cohort(c.wave, c.gids[lane : lane + 1], [])
        if length > CHUNK:
            offsets(self.access, one, np.array([address + length - CHUNK]))


class Barrier:
    """The mbarrier operand of a copy.

    Args:
        space: "shared::cta", "shared::cluster" or "generic".
    """

    def __init__(self, ins: Instruction, env: Env, space: str) -> None:
        self.words = Mbarriers(ins, env, "shared" if space == "shared::cta" else space)

    def offsets(self, c: Cohort, address: Array) -> Array:
        """[n] offsets in the arena of shared memory."""
        return self.words.offsets(c, address)

    def must_belong(self, c: Cohort, to: Array, bars: Array) -> None:
        """KernelTrap unless each mbarrier is of the block that the data go to."""
        stride = c.wave.shared_stride
        apart = to // stride != bars // stride
        if apart.any():
            lane = int(np.argmax(apart))
            raise self.words.trap(
                c,
                lane,
                f"destination {address_of(c, int(to[lane])):#x} and mbarrier "
                f"{address_of(c, int(bars[lane])):#x} are of different blocks; the mbarrier must "
                "be of the block that the data go to",
            )

    def must_live(self, c: Cohort, lane: int, targets: list[tuple[Target, Words]]) -> None:
        """KernelTrap unless there is an mbarrier for each target."""
        for target, _ in targets:
            if target.barrier not in c.wave.mbarriers:
                raise self.words.trap(
                    c,
                    lane,
                    f"there is no mbarrier at shared {address_of(c, target.barrier):#x} to "
                    "complete on: it was never initialised, or was invalidated",
                )


def multicast(
    ins: Instruction, c: Cohort, lane: int, offset: int, barrier: int, mask: int | None
) -> list[tuple[int, int]]:
    """(destination, mbarrier) as offsets in the arena, for each block that a copy goes to.

    Args:
        mask: the blocks, by rank, perhaps none; they get the data where it would go in the block
            that the address names. None for no multicast.
    """
    if mask is None:
        return [(offset, barrier)]
    wave = c.wave
    size, stride = wave.cluster_size, wave.shared_stride
    if mask >> size:
        raise KernelTrap(
            f"multicast to blocks {mask:#06x} of a cluster of {size}",
            wave.where(ins, int(c.gids[lane])),
        )
    first = int(c.slots[lane]) // size * size
    slots = [first + rank for rank in range(size) if mask >> rank & 1]
    if slots and not (alive := wave.slot_alive(np.array(slots))).all():
        raise KernelTrap(
            f"multicast to the block of rank {slots[int(np.argmin(alive))] - first}, which has "
            "exited",
            wave.where(ins, int(c.gids[lane])),
        )
    return [(slot * stride + offset % stride, slot * stride + barrier % stride) for slot in slots]


def tell(
    ins: Instruction,
    env: Env,
    c: Cohort,
    transfer: Transfer,
    written: list[Words],
    kind: str = "write",
) -> None:
    """Tell the counters and the race detector of a copy that is issued.

    Args:
        written: what each of the transfer's targets writes.
        kind: "atomic" for a reduction.
    """
    assert transfer.source is not None
    if env.count:
        c.wave.counters.bulk(ins, transfer.source, written)
    if not env.check_race:
        return
    gid, barrier = transfer.gid, transfer.targets[0].barrier
    # Copies that complete on one mbarrier, or in the groups of one lane, do so in order.
    grouped = barrier == NO_BARRIER
    transfer.agent = queue(gid if grouped else barrier, READS if grouped else COUNTED)
    transfer.stamp = _tell_race(ins, c, gid, transfer.agent, transfer.source, "read")
    for target, words in zip(transfer.targets, written, strict=True):
        target.agent = queue(gid if grouped else target.barrier, WRITES if grouped else COUNTED)
        target.stamp = _tell_race(ins, c, gid, target.agent, words, kind)
        if not grouped:
            tell_counting(ins, c, gid, target)


def tell_counting(ins: Instruction, c: Cohort, gid: int, target: Target) -> None:
    """Tell the race detector of the access to a target's mbarrier.

    PTX ISA "cp.async.bulk", "st.async": it is made through the generic proxy, with release
    semantics; so the barrier must have been initialised before.
    """
    target.counter = queue(target.barrier, STORES)
    target.counted = c.wave.race.asynchronous(
        ins,
        np.array([gid]),
        np.array([target.counter]),
        "shared",
        "arrival",
        np.array([target.barrier]),
        np.zeros(1, np.int64),
        8,
        proxy=False,
    )


def queue(number: int, kind: int) -> int:
    """The race detector's name for what does the work: unlike all keys of mbarriers' phases."""
    return AGENTS | number << 2 | kind


def _tell_race(ins: Instruction, c: Cohort, gid: int, agent: int, words: Words, kind: str) -> int:
    width = max(words.width, RACE_WORD)
    offset = words.offset if width == words.width else np.unique(words.offset & -width)
    rows = np.zeros(offset.shape[0], np.int64)
    stamp: int = c.wave.race.asynchronous(
        ins, np.array([gid]), np.array([agent]), words.space, kind, offset, rows, width
    )
    return stamp
