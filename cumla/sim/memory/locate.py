"""From a lane's address to an element of an arena, checked: the first half of every access.

`locator` makes a function `place(cohort, address)` that gives the arena and the index there of each
lane's access, in units of the access's width. On the way it refuses what cannot be done and calls
the hooks of the race detector and the counters, so far as the checks are on.

The bitwise or of all addresses tells in one reduction whether any is misaligned (a low bit is set),
negative or beyond a power of two: hardware traps on those, so they are refused with the check off
too. The check adds the exact bounds and the state of each byte: the bitwise and of the states of
all bytes must have the bits that the access requires.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cumla.sim.cohort import Cohort
from cumla.sim.isa.table import Env
from cumla.sim.memory.arena import ALLOCATED, WORDS, WRITABLE, WRITTEN, Arena
from cumla.sim.memory.device import BASE
from cumla.sim.memory.faults import Access, fault
from cumla.sim.memory.shared import split
from cumla.sim.memory.spaces import CLUSTER, SHARED, plain_space
from cumla.sim.ptx.syntax import Instruction

Place = Callable[[Cohort, Any], Any]

or_all = np.bitwise_or.reduce
and_all = np.bitwise_and.reduce
BASE_0D = np.array(BASE)
READABLE = ALLOCATED | WRITTEN
STORABLE = ALLOCATED | WRITABLE
# What an access requires of every byte, and how it leaves them.
REQUIRED = {
    "read": READABLE,
    "write": STORABLE,
    "atomic": READABLE | STORABLE,
    "discard": STORABLE,
}
LEFT = {
    "read": READABLE,
    "write": READABLE | STORABLE,
    "atomic": READABLE | STORABLE,
    "discard": STORABLE,
}


def locator(
    ins: Instruction,
    env: Env,
    space: str,
    nbytes: int,
    kind: str,
    order: str = "weak",
    scope: str = "cta",
    hooks: bool = True,
    window: int = 0,
    generic: bool = False,
) -> Place:
    """A function `place(cohort, address) -> (arena, index)`; see the head of this file.

    Args:
        nbytes: width of the access, a power of two.
        kind: "read", "write", "atomic" or "discard" (a write of nothing that is defined).
        window: what was taken from the program's address, for messages.
        generic: addresses are generic and thought to be global; where one is not, the function
            returns None and has done nothing.
    """
    space = plain_space(space)
    if space == "param" and kind != "read":
        raise ValueError("kernel parameters cannot be written")
    access = Access(ins, space, nbytes, kind, env.check_memory, window)
    told = "write" if kind == "discard" else kind
    hook = _hook(ins, env, space, nbytes, told, order, scope) if hooks else None
    if space in ("global", "const"):
        return _device(env, access, hook, generic, strong=order != "weak")
    if space == "param":
        return _param(access)
    return _local(access, hook) if space == "local" else _shared(access, hook)


def _hook(
    ins: Instruction, env: Env, space: str, nbytes: int, kind: str, order: str, scope: str
) -> Callable[[Cohort, Any, Any], None] | None:
    """A function of the cohort, the offsets and the addresses, or None if nobody listens."""
    race = env.check_race and space in ("global", *SHARED)
    if not race and not env.count:
        return None
    if space == CLUSTER:
        space = "shared"

    def hook(c: Cohort, offset: Any, address: Any) -> None:
        wave = c.wave
        if race:
            wave.race.access(ins, c, space, c.full(offset), nbytes, kind, order, scope)
        if env.count:
            wave.counters.access(ins, c, space, c.full(address), nbytes, kind)

    return hook


class _States:
    """Checks and keeps the states of the bytes of one kind of access.

    In shared and local memory bounds say what is owned, and states only what was written.
    """

    def __init__(self, access: Access) -> None:
        self.bounded = access.space in ("local", *SHARED)
        self.word = WORDS[min(access.nbytes, 16)]
        self.twice = access.nbytes == 32
        required, left = REQUIRED[access.kind], LEFT[access.kind]
        if self.bounded:
            required, left = required & WRITTEN, left & WRITTEN
        repeated = int.from_bytes(b"\x01" * min(access.nbytes, 8), "little")
        self.required = required * repeated
        self.changes = access.kind in ("write", "discard")
        # The and of all states that tells that a write changes none of them.
        self.nothing_new = left * repeated if access.kind == "write" else None
        self.word_left = np.full(self.word.itemsize, left, np.uint8).view(self.word)[0]

    def good(self, arena: Arena, index: Any) -> bool:
        """Whether all lanes may; if so, what it does to the states is noted."""
        words = arena.states[self.word]
        if self.twice:
            index = np.concatenate((index << 1, (index << 1) + 1))
        if self.required:
            states = words.take(index, mode="clip")
            if states.dtype.kind == "c":
                states = states.view(np.uint64)
            state = int(and_all(states))
            if state & self.required != self.required:
                return False
            if state == self.nothing_new:
                return True
        if self.changes:
            words[index] = self.word_left
        return True


def _device(env: Env, access: Access, hook: Any, generic: bool, strong: bool) -> Place:
    low = access.nbytes - 1
    shift = np.array(access.nbytes.bit_length() - 1)
    states = _States(access)
    check = env.check_memory
    writes = access.kind in ("write", "atomic") and not check

    def place(c: Cohort, address: Any) -> Any:
        memory = c.wave.memory.device
        if strong and c.wave.dependency is not None:
            c.wave.dependency.strong_access(address - BASE_0D, access.nbytes)
        offset = address - BASE_0D
        bits = int(or_all(offset))
        if bits & low or not 0 <= bits < memory.limit:
            if generic and not 0 <= bits < memory.limit:
                return None
            raise fault(access, c, address)
        arena = memory.arena
        # Of large arrays, a new one costs as much as the work on it.
        index = np.right_shift(offset, shift, out=offset) if hook is None else offset >> shift
        if check and not states.good(arena, index):
            settled = memory.settle()
            if not settled or not states.good(arena, index):
                raise fault(access, c, address)
        if writes:
            memory.unchecked = memory.serial
        if hook is not None:
            hook(c, offset, address)
        return arena, index

    return place


def _shared(access: Access, hook: Any) -> Place:
    nbytes = access.nbytes
    low = nbytes - 1
    shift = np.array(nbytes.bit_length() - 1)
    states = _States(access)
    check = access.check

    def place(c: Cohort, address: Any) -> Any:
        wave = c.wave
        memory = wave.memory
        if wave.slots == 1:
            within = offset = address
        else:
            within, base = split(access, c, address)
            offset = within + base
        bits = int(or_all(within))
        if bits & low or not 0 <= bits < memory.shared_limit:
            raise fault(access, c, address)
        index = offset >> shift
        if check:
            # Between two owners there may be less than the limit: states alone would not do.
            last = memory.shared_start + memory.shared_size - nbytes
            outside = bits > last and int(within.max()) > last
            if (
                outside
                or int(within.min()) < memory.shared_start
                or not states.good(memory.shared, index)
            ):
                raise fault(access, c, address)
        if hook is not None:
            hook(c, offset, address)
        return memory.shared, index

    return place


def _local(access: Access, hook: Any) -> Place:
    nbytes = access.nbytes
    low = nbytes - 1
    shift = np.array(nbytes.bit_length() - 1)
    states = _States(access)
    check = access.check

    def place(c: Cohort, address: Any) -> Any:
        memory = c.wave.memory
        offset = address + c.gids * memory.local_stride
        bits = int(or_all(address))
        if bits & low or not 0 <= bits < memory.local_limit:
            raise fault(access, c, address)
        index = offset >> shift
        last = memory.local_size - nbytes
        if check and bits > last and int(address.max()) > last:
            raise fault(access, c, address)
        if check and not states.good(memory.local, index):
            raise fault(access, c, address)
        if hook is not None:
            hook(c, offset, address)
        return memory.local, index

    return place


def _param(access: Access) -> Place:
    low = access.nbytes - 1
    shift = np.array(access.nbytes.bit_length() - 1)

    def place(c: Cohort, address: Any) -> Any:
        memory = c.wave.memory
        bits = int(or_all(address))
        if bits & low or bits < 0 or int(address.max()) > memory.param_size - access.nbytes:
            raise fault(access, c, address)
        return memory.param, address >> shift

    return place
