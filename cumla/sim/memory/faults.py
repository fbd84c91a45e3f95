"""What is wrong with an access, in words: slow, and only called once something is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort
from cumla.sim.errors import MemoryFault
from cumla.sim.memory.arena import ALLOCATED, FREED, WRITABLE, WRITTEN
from cumla.sim.memory.device import BASE, Allocation, DeviceMemory
from cumla.sim.memory.spaces import in_window
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
        space: "global", "const", "shared", "local" or "param".
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


def fault(access: Access, c: Cohort, address: NDArray[np.int64]) -> MemoryFault:
    """The error for an access that some lane must not make; of those, it names the first."""
    address = c.full(address)
    problems = _problems(access, c, address)
    lane = int(np.flatnonzero(problems.any(axis=0))[0])
    which = int(np.flatnonzero(problems[:, lane])[0])
    many = int(np.count_nonzero(problems[which]))
    at = int(address[lane])
    width = f"{access.nbytes} byte" + ("s" if access.nbytes > 1 else "")
    text = f"{access.kind} of {width} at {access.space} address {at:#x}"
    if access.window:
        text += f" (generic {at + access.window:#x})"
    if KINDS[which] == "misaligned":
        text += f", which is no multiple of {access.nbytes}"
    place = _place(access, c, at)
    if place:
        text += f", {place}"
    if many > 1:
        text += f" ({many} lanes do so)"
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
    elif access.space == "shared":
        offset = wanted + c.shared_base[:, None]
        arena, inside = memory.shared, (wanted >= 0) & (wanted < memory.shared_size)
    else:
        offset = wanted + c.gids[:, None] * memory.local_stride
        arena, inside = memory.local, (wanted >= 0) & (wanted < memory.local_size)
    if access.space in ("shared", "local"):
        if not access.check:
            return np.where(inside, everything, 0)
        # All that is owned may be written; whether it was is in its state.
        written = arena.states[np.dtype(np.uint8)].take(np.where(inside, offset, 0)) & WRITTEN
        return np.where(inside, written | ALLOCATED | WRITABLE, 0)
    return np.where(inside, arena.states[np.dtype(np.uint8)].take(np.where(inside, offset, 0)), 0)


def _place(access: Access, c: Cohort, at: int) -> str:
    """Where an address lies, by what is near it."""
    wave = c.wave
    if access.space in ("global", "const"):
        return _device_place(wave.memory.device, at, access.nbytes)
    if access.space == "shared":
        return _shared_place(wave.shared_size, wave.shared_variables, at)
    if access.space == "local":
        return _end_place(at, wave.memory.local_size, "the thread's {} bytes of local memory")
    return _end_place(at, wave.memory.param_size, "the {} bytes of kernel parameters")


def _end_place(at: int, size: int, owner: str) -> str:
    name = owner.format(size)
    if at < 0:
        return f"{-at} bytes before the start of {name}"
    if at >= size:
        return f"{at - size} bytes past the end of {name}"
    return f"in {name}"


def _shared_place(size: int, variables: list[tuple[str, int, int]], at: int) -> str:
    place = _end_place(at, size, "the block's {} bytes of shared memory")
    before = [v for v in variables if v[1] <= at]
    if before:
        name, start, length = max(before, key=lambda v: v[1])
        end = start + length if length else size  # unsized: the dynamic memory
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
        for space in ("shared", "local", "param"):
            if in_window(np.array([at]), space)[0]:
                return f"which is a generic address of {space} memory"
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
