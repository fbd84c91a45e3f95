"""Many words of memory that one lane's copy reads or writes, checked as its accesses are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort
from cumla.sim.errors import MemoryFault
from cumla.sim.memory.access import Update
from cumla.sim.memory.arena import WORDS, WRITTEN, Arena
from cumla.sim.memory.device import BASE
from cumla.sim.memory.faults import Access, fault
from cumla.sim.memory.locate import LEFT, REQUIRED
from cumla.sim.ptx.syntax import Instruction

if TYPE_CHECKING:
    from cumla.sim.wave import Wave

Array = NDArray[Any]


@dataclass(slots=True)
class Words:
    """Words of one width in an arena.

    Attributes:
        space: "global" or "shared".
        offset: [k] int64: byte offsets in the arena, multiples of the width.
        width: bytes of a word, a power of two up to 16.
        check: whether the states of bytes are kept.
    """

    wave: Wave
    space: str
    offset: Array
    width: int
    check: bool

    @property
    def arena(self) -> Arena:
        memory = self.wave.memory
        return memory.device.arena if self.space == "global" else memory.shared

    @property
    def index(self) -> Array:
        return self.offset >> (self.width.bit_length() - 1)

    def read(self) -> Array:
        """[k] the words."""
        found: Array = self.arena.views[WORDS[self.width]].take(self.index)
        return found

    def write(self, words: Array) -> None:
        index = self.index
        self.arena.views[WORDS[self.width]][index] = words
        self.mark(index)

    def update(self, change: Update, elements: Any, values: Array) -> None:
        """Change each word, an element of this dtype, by an atomic update with its value."""
        index = self.index
        if index.shape[0] == 0:
            return
        change(self.arena.views[elements], index, (values,))
        self.mark(index)

    def mark(self, index: Array) -> None:
        """These words have been written."""
        self.wave.version += 1
        if not self.check:
            if self.space == "global":
                memory = self.wave.memory.device
                memory.unchecked = memory.serial
            return
        left = LEFT["write"] if self.space == "global" else WRITTEN
        word = np.full(self.width, left, np.uint8).view(WORDS[self.width])[0]
        self.arena.states[WORDS[self.width]][index] = word

    def first_bad(self, kind: str) -> int:
        """The first word that must not be accessed, or -1; `kind` as of `memory.faults.Access`."""
        if self.offset.shape[0] == 0:
            return -1
        if self.space == "global":
            bad = (self.offset < 0) | (self.offset >= self.wave.memory.device.limit)
            if bad.any():
                return int(np.argmax(bad))
        if not self.check:
            return -1
        found = self._first_unfit(kind)
        if found >= 0 and self.space == "global" and self.wave.memory.device.settle():
            found = self._first_unfit(kind)
        return found

    def _first_unfit(self, kind: str) -> int:
        """The first word whose bytes do not have the states that the access requires, or -1."""
        required = REQUIRED[kind] if self.space == "global" else REQUIRED[kind] & WRITTEN
        if not required:
            return -1
        states = self.arena.states[WORDS[self.width]].take(self.index)
        states = states.view(np.uint8).reshape(-1, self.width)
        if int(np.bitwise_and.reduce(states, axis=None)) & required == required:
            return -1
        return int(np.argmax((states & required != required).any(axis=1)))


def of_global(wave: Wave, address: Array, width: int, check: bool) -> Words:
    """The words at these global addresses."""
    return Words(wave, "global", address - BASE, width, check)


def refuse(
    ins: Instruction, gid: int, words: Words, which: int, address: int, kind: str, detail: str
) -> MemoryFault:
    """The fault for a word that `Words.first_bad` has found, at this address of the program."""
    c = Cohort(words.wave, np.array([gid]), [])
    access = Access(ins, words.space, words.width, kind, words.check)
    return fault(access, c, np.array([address]), detail)
