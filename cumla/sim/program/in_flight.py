"""Which registers a wgmma.mma_async may still read or write, at each instruction of a kernel.

PTX ISA "wgmma.mma_async": before a wgmma.wait_group accumulators must not be accessed, nor the
registers of a fragment of A be modified; and registers that other instructions wrote need a
wgmma.fence before wgmma uses them. With the race check the code generator puts a test where this
analysis says "may", and whether a register is in flight then is known exactly at run time. `mov`
of a register to another is no access: compilers rename accumulators wherever they like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from cumla.sim.isa.table import Op
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
        unfenced: registers that, on every way here, were written by another instruction since
            the last wgmma.fence; each with that instruction.
        uncommitted: some wgmma may not have been committed to a group.
        never: on every way here there was no wgmma.fence.
    """

    accumulators: Numbers
    held: Numbers
    unfenced: Mapping[int, Instruction]
    uncommitted: bool
    never: bool

    def meet(self, other: State) -> State:
        """What is so where two ways meet."""
        both = {r: i for r, i in self.unfenced.items() if r in other.unfenced}
        return State(
            self.accumulators | other.accumulators,
            self.held | other.held,
            both,
            self.uncommitted or other.uncommitted,
            self.never and other.never,
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
        ops: Mapping[int, Op],
        effects: list[tuple[set[int], set[int]]],
        mentioned: Callable[..., set[int]],
    ) -> None:
        self.instructions = instructions
        self.effects = effects
        self.mentioned = mentioned
        self.relevant = self._relevant()
        nothing = State(NONE, NONE, {}, False, False)
        self.before: dict[int, State] = {ins.index: nothing for ins in instructions}
        entry: dict[int, State] = {0: State(NONE, NONE, {}, False, True)}
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
        writes = self.effects[ins.index][1] & self.relevant
        if not writes:
            return state
        accumulators, unfenced = state.accumulators, state.unfenced
        copies = accumulators & self.mentioned(ins.operands[1]) if is_copy(ins) else NONE
        if ins.guard is None:
            accumulators = accumulators - writes
        if copies:
            accumulators = accumulators | writes
        marked = dict.fromkeys(writes, ins)
        if is_copy(ins):
            (source,) = self.mentioned(ins.operands[1]) or (-1,)
            marked = dict.fromkeys(writes, unfenced[source]) if source in unfenced else {}
        elif ins.opcode == "mov" and isinstance(ins.operands[1], Immediate):
            marked = {}  # compilers place constants where they like
        if ins.guard is None:
            rest = {r: i for r, i in unfenced.items() if r not in writes}
            unfenced = {**rest, **marked}
        return replace(state, accumulators=accumulators, unfenced=unfenced)

    def _after_wgmma(self, ins: Instruction, state: State) -> State:
        if is_multiply(ins):
            d = frozenset(self.effects[ins.index][1])
            unfenced = {r: i for r, i in state.unfenced.items() if r not in d}
            held = state.held | self.fragment(ins)
            return State(state.accumulators | d, held, unfenced, True, state.never)
        if ins.modifiers[0] == "fence":
            return replace(state, unfenced={}, never=False)
        if ins.guard is not None:
            return state
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

    def unfenced(self, ins: Instruction) -> tuple[int, Instruction] | None:
        """For a wgmma.mma_async: a register that lacks a fence, and who wrote it."""
        if is_multiply(ins):
            uses = self.effects[ins.index][1] | self.fragment(ins)
            found = self.before[ins.index].unfenced
            for register in sorted(uses & found.keys()):
                return register, found[register]
        return None

    def never_fenced(self, ins: Instruction) -> bool:
        """For a wgmma.mma_async: there was no wgmma.fence at all."""
        return is_multiply(ins) and self.before[ins.index].never
