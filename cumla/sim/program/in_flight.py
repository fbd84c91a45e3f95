"""Which registers a wgmma.mma_async may still read or write, at each instruction of a kernel.

PTX ISA "wgmma.mma_async": before a wgmma.wait_group accumulators must not be accessed, nor the
registers of a fragment of A be modified; and registers that other instructions wrote need a
wgmma.fence before wgmma uses them. With the race check the code generator puts a test where this
analysis says "may", and whether a register is in flight then is known exactly at run time. `mov`
of a register to another is no access: compilers rename accumulators wherever they like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cumla.sim.program.flow import EXIT, Block
from cumla.sim.ptx.syntax import Immediate, Instruction, Register, Vector

Numbers = frozenset[int]
NONE: Numbers = frozenset()


@dataclass(frozen=True, slots=True)
class State:
    """What is so before an instruction.

    Attributes:
        accumulators: registers that may hold an accumulator in flight.
        held: registers that may hold a fragment of A for a wgmma under way.
        unfenced: registers that another instruction may have written since the last wgmma.fence.
        uncommitted: some wgmma may not have been committed to a group.
        never: there may have been no wgmma.fence.
    """

    accumulators: Numbers
    held: Numbers
    unfenced: Numbers
    uncommitted: bool
    never: bool

    def meet(self, other: State) -> State:
        """What is so where two ways meet."""
        return State(
            self.accumulators | other.accumulators,
            self.held | other.held,
            self.unfenced | other.unfenced,
            self.uncommitted or other.uncommitted,
            self.never or other.never,
        )


def is_multiply(ins: Instruction) -> bool:
    """Whether it is a wgmma.mma_async."""
    return ins.opcode == "wgmma" and ins.modifiers[:1] == ("mma_async",)


def is_copy(ins: Instruction) -> bool:
    """Whether it only gives a register's value another name."""
    return ins.opcode == "mov" and all(isinstance(o, Register) for o in ins.operands)


class InFlight:
    """The analysis of a kernel.

    Args:
        effects: (registers read, registers written) of each instruction.
        mentioned: the registers in an operand.
    """

    def __init__(
        self,
        instructions: list[Instruction],
        blocks: list[Block],
        effects: list[tuple[set[int], set[int]]],
        mentioned: Callable[..., set[int]],
    ) -> None:
        self.instructions = instructions
        self.effects = effects
        self.mentioned = mentioned
        self.relevant = self._relevant()
        nothing = State(NONE, NONE, NONE, False, False)
        self.before: dict[int, State] = {ins.index: nothing for ins in instructions}
        entry: dict[int, State] = {0: State(NONE, NONE, NONE, False, True)}
        waiting = [0]
        while waiting:
            number = waiting.pop()
            *_, after = self._through(blocks[number], entry[number])
            for successor in blocks[number].successors:
                if successor != EXIT:
                    old = entry.get(successor)
                    new = after if old is None else old.meet(after)
                    if new != old:
                        entry[successor] = new
                        waiting.append(successor)
        for number, state in entry.items():
            block = blocks[number]
            states = self._through(block, state)
            self.before.update(zip(range(block.first, block.last), states, strict=False))
        # Whether it must be known while the kernel runs which registers lack a fence.
        self.watches = any(self.unfenced(ins) is not None for ins in instructions)

    def _relevant(self) -> Numbers:
        """The registers that a wgmma.mma_async uses, and those that are copied to or from them."""
        found: set[int] = set()
        copies: list[set[int]] = []
        for ins in self.instructions:
            if is_multiply(ins):
                found |= self.effects[ins.index][1] | self.fragment(ins)
            elif is_copy(ins):
                copies.append(self.effects[ins.index][1] | self.mentioned(ins.operands[1]))
        size = -1
        while size != len(found):
            size = len(found)
            for pair in copies:
                if pair & found:
                    found |= pair
        return frozenset(found)

    def _through(self, block: Block, state: State) -> Iterator[State]:
        """The states before each instruction of a block, and the one after it."""
        yield state
        for ins in self.instructions[block.first : block.last]:
            state = self._after(ins, state)
            yield state

    def _after(self, ins: Instruction, state: State) -> State:
        if ins.opcode == "wgmma":
            return self._after_wgmma(ins, state)
        writes = self.relevant & self.effects[ins.index][1]
        if not writes:
            return state
        accumulators, unfenced = state.accumulators, state.unfenced
        copies = accumulators & self.mentioned(ins.operands[1]) if is_copy(ins) else NONE
        if ins.guard is None:
            accumulators = accumulators - writes
        if copies:
            accumulators = accumulators | writes
        marked = self.needs_fence(ins, writes, unfenced)
        if ins.guard is None:
            unfenced = unfenced - writes
        unfenced = unfenced | marked
        return replace(state, accumulators=accumulators, unfenced=unfenced)

    def needs_fence(self, ins: Instruction, writes: Numbers, unfenced: Numbers) -> Numbers:
        """Of the registers that it writes, those that need a wgmma.fence from then on."""
        if is_copy(ins):
            return writes if self.mentioned(ins.operands[1]) & unfenced else NONE
        # Compilers place constants where they like.
        constant = ins.opcode == "mov" and isinstance(ins.operands[1], Immediate)
        return NONE if constant else writes

    def _after_wgmma(self, ins: Instruction, state: State) -> State:
        if is_multiply(ins):
            d = frozenset(self.effects[ins.index][1])
            unfenced = state.unfenced if ins.guard is not None else state.unfenced - d
            held = state.held | self.fragment(ins)
            return State(state.accumulators | d, held, unfenced, True, state.never)
        if ins.guard is not None:
            return state
        if ins.modifiers[0] == "fence":
            return replace(state, unfenced=NONE, never=False)
        if ins.modifiers[0] == "commit_group":
            return replace(state, uncommitted=False)
        newest = ins.operands[0] if ins.operands else None
        if isinstance(newest, Immediate) and newest.value == 0 and not state.uncommitted:
            return replace(state, accumulators=NONE, held=NONE)
        return state

    def fragment(self, ins: Instruction) -> Numbers:
        """The registers of A of a wgmma.mma_async."""
        a = ins.operands[1]
        return frozenset(self.mentioned(a)) if isinstance(a, Vector) else NONE

    # What has to be tested before an instruction.

    def touched(self, ins: Instruction, reads: set[int]) -> list[int]:
        """Of the registers that it reads, those that may be accumulators in flight."""
        if is_copy(ins):
            return []
        if is_multiply(ins):
            reads = reads - self.effects[ins.index][1]
        return sorted(reads & self.before[ins.index].accumulators)

    def overwritten(self, ins: Instruction) -> list[int]:
        """Of the registers that it writes, those that may be accumulators in flight."""
        if is_multiply(ins):
            return []
        return sorted(self.effects[ins.index][1] & self.before[ins.index].accumulators)

    def modified(self, ins: Instruction) -> list[int]:
        """Of the registers that it writes, those that may hold a fragment of A."""
        if ins.opcode == "mov" or is_multiply(ins):
            return []
        return sorted(self.effects[ins.index][1] & self.before[ins.index].held)

    def unfenced(self, ins: Instruction) -> list[int] | None:
        """For a wgmma.mma_async: registers that may lack a fence; None if it cannot lack one."""
        if not is_multiply(ins):
            return None
        uses = self.fragment(ins) | self.effects[ins.index][1]
        found = sorted(uses & self.before[ins.index].unfenced)
        return found if found or self.before[ins.index].never else None

    def watch(self, ins: Instruction, names: list[str]) -> list[tuple[str, tuple[Any, ...]]]:
        """What `warpgroup_checks.Checks` is told at an instruction of registers without a fence.

        Returns:
            Names of its methods, and the first arguments of each.
        """
        if not self.watches:
            return []
        if ins.opcode == "wgmma" and ins.modifiers[0] == "fence":
            return [("fenced", ())]
        writes = self.relevant & self.effects[ins.index][1]
        if not writes:
            return []
        clear = "cleared", (sorted(writes),)
        if is_multiply(ins):
            lacking = self.unfenced(ins)
            if lacking is None:
                return [clear]
            return [("unfenced", (ins, [names[r] for r in lacking], lacking)), clear]
        if is_copy(ins):
            source = self.mentioned(ins.operands[1])  # none if it is a special register
            return [("copied", (*writes, *source)) if source else clear]
        return [("wrote", (ins, sorted(writes))) if self.needs_fence(ins, writes, NONE) else clear]
