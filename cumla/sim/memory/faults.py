"""What is wrong with an access, in words: slow, and only called once something is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import RANK_SHIFT, Cohort
from cumla.sim.errors import MemoryFault
from cumla.sim.memory.arena import ALLOCATED, FREED, WRITABLE, WRITTEN
from cumla.sim.memory.device import BASE, Allocation, DeviceMemory
from cumla.sim.memory.spaces import CLUSTER, SHARED, WITHIN_BLOCK, in_window
from cumla.sim.ptx.syntax import Instruction

# Addresses below this are taken for a null pointer plus an offset.
NULL_PAGE = 1 << 16
KINDS = (
    "misaligned",
    "use after free",
    "out of bounds",
    "write to read-only memory",
    "read of unwritten memory",
)


@dataclass(frozen=True, slots=True)
class Access:
    """What an instruction does to memory.

    Attributes:
        space: "global", "const", "shared", "shared::cluster", "local" or "param".
        nbytes: bytes for each lane.
        kind: "read", "write", "atomic" or "discard".
        check: whether the states of bytes are kept.
        window: what was taken from the program's address to give the address in the space.
    """

    ins: Instruction
    space: str
    nbytes: int
    kind: str
    check: bool
    window: int = 0


def fault(access: Access, c: Cohort, address: NDArray[np.int64], detail: str = "") -> MemoryFault:
    """The error for an access that some lane must not make; of those, it names the first.

    Args:
        detail: what else there is to say of the access.
    """
    address = c.full(address)
    problems = _problems(access, c, address)
    lane = int(np.flatnonzero(problems.any(axis=0))[0])
    which = int(np.flatnonzero(problems[:, lane])[0])
    many = int(np.count_nonzero(problems[which]))
    at = int(address[lane])
    width = f"{access.nbytes} byte" + ("s" if access.nbytes > 1 else "")
    space = "shared" if access.space in SHARED else access.space
    text = f"{access.kind} of {width} at {space} address {at:#x}"
    if access.window:
        text += f" (generic {at + access.window:#x})"
    if KINDS[which] == "misaligned":
        text += f", which is no multiple of {access.nbytes}"
    place = _place(access, c, lane, at)
    if place:
        text += f", {place}"
    if detail:
        text += f", {detail}"
    if many > 1:
        text += f" ({many} lanes do so)"
    if KINDS[which] == "read of unwritten memory" and c.wave.dependency is not None:
        text += c.wave.dependency.note()
    where = c.wave.where(access.ins, int(c.gids[lane]))
    return MemoryFault(KINDS[which], text, at + access.window, where)


def _problems(access: Access, c: Cohort, address: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[kind, lane]: which of `KINDS` is the matter with which lane."""
    states = _states(access, c, address)
    absent = ((states & ALLOCATED) == 0).any(axis=1)
    freed = ((states & FREED) != 0).any(axis=1)
    locked = ((states & WRITABLE) == 0).any(axis=1) & (access.kind != "read")
    unwritten = ((states & WRITTEN) == 0).any(axis=1) & (access.kind in ("read", "atomic"))
    problems = np.array([address % access.nbytes != 0, freed, absent, locked, unwritten])
    if not access.check:
        problems[3:] = False
    return problems


def _states(access: Access, c: Cohort, address: NDArray[np.int64]) -> Any:
    """[lane, byte]: the state of each byte; 0 where there is none."""
    memory = c.wave.memory
    wanted = address[:, None] + np.arange(access.nbytes)
    everything = np.uint8(ALLOCATED | WRITTEN | WRITABLE)
    if access.space in ("global", "const"):
        offset = wanted - BASE
        arena, inside = memory.device.arena, (offset >= 0) & (offset < memory.device.limit)
    elif access.space == "param":
        inside = (wanted >= 0) & (wanted < memory.param_size)
        return np.where(inside, everything, 0)
    elif access.space in SHARED:
        slots, there = _owners(access, c, address)
        within = wanted - (slots % c.wave.cluster_size << RANK_SHIFT)[:, None]
        offset = within + (slots * memory.shared_stride)[:, None]
        inside = (within >= memory.shared_start) & there[:, None]
        inside &= within < memory.shared_start + memory.shared_size
        arena = memory.shared
    else:
        offset = wanted + c.gids[:, None] * memory.local_stride
        arena, inside = memory.local, (wanted >= 0) & (wanted < memory.local_size)
    if access.space in ("local", *SHARED):
        if not access.check:
            return np.where(inside, everything, 0)
        # All that is owned may be written; whether it was is in its state.
        written = arena.states[np.dtype(np.uint8)].take(np.where(inside, offset, 0)) & WRITTEN
        return np.where(inside, written | ALLOCATED | WRITABLE, 0)
    return np.where(inside, arena.states[np.dtype(np.uint8)].take(np.where(inside, offset, 0)), 0)


def _owners(access: Access, c: Cohort, address: NDArray[np.int64]) -> tuple[Any, Any]:
    """The slots of the blocks whose shared memory is accessed, and which are there to access."""
    wave = c.wave
    if access.space != CLUSTER or wave.cluster_size == 1:
        return c.slots, np.ones(c.n, np.bool_)
    rank = address >> RANK_SHIFT
    there = (rank >= 0) & (rank < wave.cluster_size)
    slots = np.where(there, c.slots - c.slots % wave.cluster_size + rank, c.slots)
    if access.check:
        there &= wave.slot_alive(slots)
    return slots, there


def _place(access: Access, c: Cohort, lane: int, at: int) -> str:
    """Where an address lies, by what is near it."""
    wave = c.wave
    if access.space in ("global", "const"):
        return _device_place(wave.memory.device, at, access.nbytes)
    if access.space in SHARED:
        return _shared_place(access, c, int(c.slots[lane]), at)
    if access.space == "local":
        return _end_place(at, wave.memory.local_size, "the thread's {} bytes of local memory")
    return _end_place(at, wave.memory.param_size, "the {} bytes of kernel parameters")


def _end_place(at: int, size: int, owner: str, start: int = 0) -> str:
    name = owner.format(size)
    if at < start:
        return f"{start - at} bytes before the start of {name}"
    if at >= start + size:
        return f"{at - start - size} bytes past the end of {name}"
    return f"in {name}"


def _shared_place(access: Access, c: Cohort, own: int, at: int) -> str:
    wave = c.wave
    if wave.cluster_size > 1 and at >= 0:
        rank = at >> RANK_SHIFT
        rest = own % wave.cluster_size
        if rank >= wave.cluster_size:
            return f"rank {rank} of a cluster of {wave.cluster_size} blocks"
        if access.space != CLUSTER and rest != rank:
            return f"which is the block's of rank {rank} in the cluster, not the thread's own"
        if access.check and not wave.slot_alive(np.array([own - rest + rank]))[0]:
            return f"in the shared memory of the block of rank {rank}, which has exited"
        at &= WITHIN_BLOCK
    place = _end_place(
        at, wave.shared_size, "the block's {} bytes of shared memory", wave.shared_start
    )
    before = [v for v in wave.shared_variables if v[1] <= at]
    if before:
        name, start, length = max(before, key=lambda v: v[1])
        # Unsized: the dynamic memory.
        end = start + length if length else wave.shared_start + wave.shared_size
        if at < end:
            place += f", {at - start} bytes into '{name}'"
        else:
            place += f", {at - end} bytes past the end of '{name}' ({end - start} bytes)"
    return place


def _device_place(memory: DeviceMemory, at: int, nbytes: int) -> str:
    offset = at - BASE
    if not 0 <= offset < memory.limit:
        if 0 <= at < NULL_PAGE:
            return f"a null pointer plus {at}" if at else "a null pointer"
        for space in (CLUSTER, "local", "param"):
            if in_window(np.array([at]), space)[0]:
                return f"which is a generic address of {space.partition('::')[0]} memory"
        return "which is not in device memory"
    before, after = memory.nearest(offset)
    if before is not None and offset < before.stop:
        if offset + nbytes > before.stop:
            return f"{offset + nbytes - before.stop} bytes of it past the end of {_named(before)}"
        return f"{offset - before.start} bytes into {_named(before)}"
    past = offset - before.stop if before is not None else memory.limit
    ahead = after.start - offset if after is not None else memory.limit
    if before is not None and past <= ahead:
        return f"{past} bytes past the end of {_named(before)}"
    if after is not None:
        return f"{ahead} bytes before the start of {_named(after)}"
    return "where nothing was allocated"


def _named(allocation: Allocation) -> str:
    freed = "" if allocation.freed is None else f", freed at {allocation.freed}"
    return f"{allocation}{freed}"
