"""The wgmma of a wave that its warps have not waited for, and the registers that they will write.

PTX ISA "wgmma.mma_async": D is written, and operands are read, at any time before a wait for the
group that the instruction was committed to. `delivery` chooses when: "eager" at issue; "late" when
it is waited for; "random" somewhere in between. What a warpgroup issued is done in order, each
operation at once for all four warps: PTX ISA "wgmma.commit_group": there is one group for the
warpgroup, so it is complete for all of them when one has waited for it. But only warps that have
waited may use their registers.

A register is an array of one value for each lane, and a register of D in flight is a row of its
operation's buffer, which is filled in place when the operation lands. So whatever merely holds the
row, under another name, gets the value then. Where lanes part or meet, their registers are copied:
such a copy is kept here with a tag for each lane that says which row of which operation it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP, Cohort
from cumla.sim.ptx.syntax import Instruction
from cumla.sim.warpgroup_checks import TAG_ROWS, Checks
from cumla.sim.warpgroup_steps import LANES, WARPS, Steps, numbers

if TYPE_CHECKING:
    from cumla.sim.wave import Wave

Array = NDArray[Any]


@dataclass(slots=True, eq=False)
class Operation:
    """A wgmma.mma_async of some warpgroups.

    Attributes:
        shape: what D's layout depends on: an operation may take up the D of another in flight if
            theirs are equal.
        gids: [n] lanes of whole warpgroups, ascending.
        buffer: [registers, n] D; before it has landed, what D held before.
        work: reads the operands and gives [registers, lanes] D of the warpgroups where a mask is
            true.
        held: names of the kernel's registers that hold a fragment of A.
        old: the registers that D had before, or None if they are not taken up.
        taken_up: a later operation has taken up its D.
        tell: called with the lanes of warps that have waited for it, or None.
        sources: numbers of the operations whose D may be among `old`.
        copies: of registers of D, by the id of the array.
        groups: [warps] the group of each warp that it is in, counted from 0.
        landed: [warpgroups] whose D is written.
        completed: [warps] who has waited for that.
    """

    ins: Instruction
    shape: Any
    gids: Array
    buffer: Array
    work: Callable[[Array], Array]
    held: frozenset[str]
    old: Sequence[Array] | None
    tell: Callable[[Array], None] | None
    number: int = 0
    taken_up: bool = False
    sources: frozenset[int] = frozenset()
    copies: dict[int, _Copy] = field(default_factory=dict)
    warps: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    groups: Array = field(default_factory=lambda: np.zeros(0, np.int32))
    landed: Array = field(default_factory=lambda: np.zeros(0, np.bool_))
    completed: Array = field(default_factory=lambda: np.zeros(0, np.bool_))

    def tags(self, row: int) -> Array:
        """[n] the tags of a register of D."""
        tag = self.number * TAG_ROWS + row
        return np.repeat(np.where(self.completed, 0, tag), WARP)

    def land(self, groups: Array) -> None:
        """Write D of the warpgroups where the mask is true."""
        lanes: Any = slice(None) if groups.all() else np.repeat(groups, LANES)
        self.buffer[:, lanes] = self.work(groups)
        self.landed |= groups

    def refresh(self) -> None:
        """D that has not landed holds what it was, which has been written meanwhile."""
        if self.old is not None:
            lanes = np.repeat(~self.landed, LANES)
            for row, old in zip(self.buffer.view(np.uint32), self.old, strict=True):
                row[lanes] = old.view(np.uint32)[lanes if old.shape[0] > 1 else [0]]

    def follow(self) -> None:
        """Give copies of D the values that it has now."""
        buffer = self.buffer.view(np.uint32)
        for copy in list(self.copies.values()):
            values = copy.values()
            if values is not None:
                lanes, columns = copy.places(self)
                values.view(np.uint32)[lanes] = buffer[copy.tags[lanes] % TAG_ROWS, columns]


@dataclass(slots=True, eq=False)
class _Copy:
    """A copy of registers in flight, as long as somebody holds it.

    Attributes:
        values: [n] of 32 bits.
        gids, tags: [n] its lanes, and the tags that they had when it was made.
        numbers: of the operations that tags may name.
    """

    values: weakref.ref[Array]
    gids: Array
    tags: Array
    numbers: frozenset[int]
    found: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def places(self, operation: Operation) -> tuple[Array, Array]:
        """Which lanes are D of an operation, and which columns of it they are."""
        found = self.found.get(operation.number)
        if found is None:
            lanes = np.flatnonzero(self.tags // TAG_ROWS == operation.number)
            found = lanes, np.searchsorted(operation.gids, self.gids[lanes])
            self.found[operation.number] = found
        return found


class Warpgroups:
    """What is under way in a wave.

    Attributes:
        operations: those that some warp has not waited for, oldest first.
        under_way: some register may be in flight.
        checks, steps: for the race check: what must not be done with such registers, and that the
            warps of a warpgroup do the same.
    """

    def __init__(self, wave: Wave, delivery: str) -> None:
        self.wave = wave
        self.delivery = delivery
        warps = wave.live.shape[0] // WARP
        self.committed = np.zeros(warps, np.int32)  # groups that each warp has committed
        self.under_way = False
        self.checks = Checks(self)
        self.steps = Steps(wave)
        self._limits = np.zeros(warps, np.int32)  # scratch: groups below are complete
        self.operations: list[Operation] = []
        self._copies: dict[int, _Copy] = {}  # by the id of the array
        self._buffers: dict[int, Operation] = {}  # likewise
        self._numbers: dict[int, Operation] = {}
        self._issued = 0

    def issue(self, operation: Operation) -> None:
        """Start an operation; its warps, number and groups are filled in here."""
        self._issued += 1
        operation.number = self._issued
        operation.warps = operation.gids[::WARP] >> 5
        operation.groups = self.committed[operation.warps]
        operation.landed = np.zeros(operation.warps.shape[0] // WARPS, np.bool_)
        operation.completed = np.zeros(operation.warps.shape, np.bool_)
        operation.sources = self._operations_of(operation.old or ())
        self.operations.append(operation)
        self._buffers[id(operation.buffer)] = operation
        self._numbers[operation.number] = operation
        self.under_way = True
        if self.delivery == "eager":
            operation.land(~operation.landed)
        elif self.delivery == "random":
            self._chance(operation.gids)

    def commit(self, c: Cohort) -> None:
        """What the warps issued since they last committed is a group."""
        self.committed[c.warps] += 1
        if self.delivery == "random" and self.under_way:
            self._chance(c.gids)

    def wait(self, c: Cohort, newest: int) -> None:
        """Complete all groups of the warps but the `newest`."""
        if not self.under_way:
            return
        warps = c.warps
        self._limits[warps] = self.committed[warps] - newest
        self._land(lambda operation: operation.groups < self._limits[operation.warps])
        # Who knows of a warp's newest operation knows of those before it.
        told = np.zeros(self._limits.shape, np.bool_)
        for operation in reversed(self.operations):
            over = (operation.groups < self._limits[operation.warps]) & ~operation.completed
            operation.completed |= over
            over &= ~told[operation.warps]
            if operation.tell is not None and over.any():
                operation.tell(np.repeat(over, WARP))
                told[operation.warps] |= over
        self._limits[warps] = 0
        self._forget()
        if self.delivery == "random" and self.under_way:
            self._chance(c.gids)

    def _chance(self, gids: Array) -> None:
        """Random delivery: of each warpgroup, the operations up to some one land now."""
        mine = [o.number for o in self.operations if not o.landed.all()]
        if mine:
            groups, which = np.unique(numbers(self.wave, gids[::WARP]), return_inverse=True)
            last = np.zeros(self.committed.shape, np.int64)
            last[gids[::WARP] >> 5] = self.wave.rng.choice([0, *mine], groups.shape)[which]
            self._land(lambda operation: operation.number <= last[operation.warps])

    def _land(self, choose: Callable[[Operation], Array]) -> None:
        """Land an operation for the warpgroups of which a warp is chosen."""
        changed: set[int] = set()
        for operation in self.operations:
            if operation.landed.all():
                continue
            now = choose(operation).reshape(-1, WARPS).any(axis=1) & ~operation.landed
            if now.any():
                operation.land(now)
            if not operation.sources.isdisjoint(changed) and not operation.landed.all():
                operation.refresh()
            elif not now.any():
                continue
            changed.add(operation.number)
            operation.follow()  # a later operation may take up a copy

    def _forget(self) -> None:
        """Let go of what has been waited for."""
        kept = []
        for operation in self.operations:
            if operation.completed.all():
                del self._buffers[id(operation.buffer)], self._numbers[operation.number]
                for key, copy in operation.copies.items():
                    if copy.numbers.isdisjoint(self._numbers):
                        self._copies.pop(key, None)
            else:
                kept.append(operation)
        self.operations = kept
        self.under_way = bool(kept)

    # Which registers are in flight.

    def tags(self, register: Array) -> Array | None:
        """[n] the tags of a register, or None if no lane of it is in flight."""
        owner = register if register.base is None else register.base
        operation = self._buffers.get(id(owner))
        if operation is not None:
            at = register.__array_interface__["data"][0]
            start = operation.buffer.__array_interface__["data"][0]
            tags = operation.tags((at - start) // operation.buffer.strides[0])
            return tags if tags.any() else None
        copy = self._copies.get(id(owner))
        return None if copy is None else self._still(copy)

    def _still(self, copy: _Copy) -> Array | None:
        """[n] the tags of a copy that have not been waited for, or None if there are none."""
        tags = copy.tags
        for number in copy.numbers:
            operation = self._numbers.get(number)
            if operation is None:
                tags = np.where(tags // TAG_ROWS == number, 0, tags)
            elif operation.completed.any():
                lanes, columns = copy.places(operation)
                tags = tags.copy()
                tags[lanes[operation.completed[columns // WARP]]] = 0
        return tags if tags.any() else None

    def operation(self, tag: int) -> Operation:
        """The operation of a tag that is not 0."""
        return self._numbers[tag // TAG_ROWS]

    def under(self, number: int) -> Operation | None:
        """The operation under way with a number, if there is one."""
        return self._numbers.get(number)

    def take_up(
        self, shape: Any, registers: Sequence[Array]
    ) -> tuple[int, Array, Operation] | None:
        """An operation of a shape takes up all of the registers that are in flight.

        Returns:
            None; or the place of a register among them that is D of another shape, for which
            lanes, and of which operation.
        """
        found = [self._numbers[number] for number in self._operations_of(registers)]
        for operation in found:
            operation.taken_up = True
        if all(operation.shape == shape for operation in found):
            return None
        for place, register in enumerate(registers):
            tags = self.tags(register)
            for tag in [] if tags is None else np.unique(tags[tags != 0]).tolist():
                if self.operation(tag).shape != shape:
                    return place, tags == tag, self.operation(tag)
        return None

    def _operations_of(self, registers: Sequence[Array]) -> frozenset[int]:
        """Numbers of the operations under way of which some of the registers may be D."""
        found: set[int] = set()
        for register in registers:
            owner = id(register if register.base is None else register.base)
            if owner in self._buffers:
                found.add(self._buffers[owner].number)
            elif owner in self._copies:
                found |= self._copies[owner].numbers & self._numbers.keys()
        return frozenset(found)

    def picked(self, register: Array, mask: Array, gids: Array, made: Array) -> None:
        """`made` is a new array of the lanes of a register where mask is true: `gids`."""
        tags = None if made is register else self.tags(register)
        if tags is not None:
            self._keep(made, gids, tags[mask], [register])

    def joined(self, registers: Sequence[Array], order: Array, gids: Array, made: Array) -> None:
        """`made` is a new array of registers with a value for each lane, end to end, in an order.

        `gids` are the lanes of `made`.
        """
        found = [self.tags(r) for r in registers]
        if any(tags is not None for tags in found):
            pairs = zip(registers, found, strict=True)
            every = [np.zeros(r.shape, np.int64) if t is None else t for r, t in pairs]
            self._keep(made, gids, np.concatenate(every)[order], registers)

    def chosen(self, mask: Array, new: Array, old: Array, gids: Array, made: Array) -> None:
        """`made` is a new array: where mask is true it is `new` ([n], [1] or [mask.sum()])."""
        tags = np.zeros(gids.shape, np.int64)
        for register, lanes in ((old, ~mask), (new, mask)):
            found = self.tags(register)
            if found is not None:
                lanes = np.broadcast_to(lanes, tags.shape)
                tags[lanes] = found[lanes] if found.shape == tags.shape else found
        if made.shape == tags.shape:
            self._keep(made, gids, tags, [new, old])

    def _keep(self, made: Array, gids: Array, tags: Array, sources: Sequence[Array]) -> None:
        if tags.any():
            key = id(made)
            values = weakref.ref(made, lambda _: self._lose(key))
            copy = _Copy(values, gids, tags, self._operations_of(sources))
            self._copies[key] = copy
            for number in copy.numbers:
                self._numbers[number].copies[key] = copy

    def _lose(self, key: int) -> None:
        """Nobody holds a copy any more."""
        copy = self._copies.pop(key, None)
        for number in () if copy is None else copy.numbers:
            if number in self._numbers:
                self._numbers[number].copies.pop(key, None)
