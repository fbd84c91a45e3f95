"""Basic blocks as Python functions.

A block becomes one function of a cohort: a call for each instruction, on local variables that hold
the registers. It returns the number of the next place for all lanes, or, where they part, a list
of (place, cohort). A place is a point where lanes can stop: the start of a block, or an
instruction that may have to wait. In cohorts of whole warps, instructions that wait only for lanes
of their own warp cannot wait, so each block has a second, unbroken form for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cumla.sim.cohort import Cohort
from cumla.sim.isa.mma_fusion import fuse
from cumla.sim.isa.table import Env, Op
from cumla.sim.program.emit import CONDITION, KEPT, Writer, kept_dtype, split_operands, tuple_text
from cumla.sim.program.flow import EXIT, Block, is_terminator, live_registers
from cumla.sim.program.in_flight import InFlight, is_multiply
from cumla.sim.program.inline import FlatKernel, registers_of
from cumla.sim.program.parting import guarded_ready
from cumla.sim.ptx.syntax import Instruction, Operand


@dataclass(slots=True)
class Place:
    """Where lanes can stop.

    Attributes:
        block: number of its block.
        first: index of its first instruction in the flat kernel.
        live: numbers of the registers that are live here.
        step: runs the instructions up to the next place.
        run_whole: likewise, for cohorts of whole warps, past instructions that wait for lanes of
            their warp only.
        gate: which lanes may go on (see `Op.ready`), or None; not for whole warps if `warp_gate`.
        waits_for: what a lane waits for, for messages.
        cost: number of instructions, for the clock.
    """

    block: int
    first: int
    live: list[int]
    step: Callable[[Cohort], Any]
    run_whole: Callable[[Cohort], Any]
    gate: Callable[[Cohort], Any] | None = None
    warp_gate: bool = False
    waits_for: Callable[[Cohort], str] | None = None
    cost: int = 1


@dataclass(slots=True)
class Code:
    """A prepared kernel: its places, and the zeros that its registers start with."""

    places: list[Place]
    initial: list[Any]
    kernel: FlatKernel
    instructions_of: dict[str, list[Instruction | None]] = field(default_factory=dict)


def generate(
    kernel: FlatKernel,
    blocks: list[Block],
    ops: dict[int, Op],
    symbols: dict[str, int],
    ranked: frozenset[str],
    env: Env,
) -> Code:
    """Turn the blocks of a kernel into functions.

    Args:
        ops: what each instruction does, by its index; terminators have none.
        symbols: addresses of variables and offsets of parameters.
        ranked: of these, the variables to whose addresses a block's window is added.
    """
    return Generator(kernel, blocks, ops, symbols, ranked, env).code()


class Generator:
    def __init__(
        self,
        kernel: FlatKernel,
        blocks: list[Block],
        ops: dict[int, Op],
        symbols: dict[str, int],
        ranked: frozenset[str],
        env: Env,
    ) -> None:
        self.kernel = kernel
        self.blocks = blocks
        self.ops = ops
        self.symbols = symbols
        self.ranked = ranked
        self.env = env
        self.numbers = {name: i for i, name in enumerate([*kernel.registers, CONDITION])}
        self.kept = [kept_dtype(k) for k in kernel.registers.values()] + [KEPT["pred"]]
        self.zeros = [np.zeros(1, dtype) for dtype in self.kept]
        self.analyse()

    # Which registers each instruction reads and writes.

    def reads_writes(self, ins: Instruction) -> tuple[set[int], set[int]]:
        reads: set[int] = set()
        writes: set[int] = set()
        if ins.guard is not None:
            reads.add(self.numbers[ins.guard.register])
        op = self.ops.get(ins.index)
        if op is None:
            if ins.opcode == "brx":
                reads |= self.mentioned(ins.operands[0])
            return reads, writes
        destinations, sources = split_operands(ins, op)
        for operand in sources:
            reads |= self.mentioned(operand)
        for operand in destinations:
            writes |= self.mentioned(operand)
        if op.sources[-1:] == (CONDITION,):
            reads.add(self.numbers[CONDITION])
        if op.results[-1:] == (CONDITION,):
            writes.add(self.numbers[CONDITION])
        if ins.guard is not None:
            reads |= writes  # lanes whose guard is false keep what they had
        return reads, writes

    def mentioned(self, operand: Operand) -> set[int]:
        return {self.numbers[r] for r in registers_of(operand) if r in self.numbers}

    def analyse(self) -> None:
        """Places, and the registers that are live at each."""
        instructions = self.kernel.instructions
        self.stops: list[list[int]] = []  # for each block, where its places begin
        effects = [self.reads_writes(ins) for ins in instructions]
        block_reads, block_writes = [], []
        for block in self.blocks:
            stops = [block.first]
            reads: set[int] = set()
            writes: set[int] = set()
            for index in range(block.first, block.last):
                op = self.ops.get(index)
                if op is not None and op.ready is not None and index != block.first:
                    stops.append(index)
                reads |= effects[index][0] - writes
                if instructions[index].guard is None:
                    writes |= effects[index][1]
            self.stops.append(stops)
            block_reads.append(reads)
            block_writes.append(writes)
        self.in_flight: InFlight | None = None
        if self.env.check_race and any(is_multiply(ins) for ins in instructions):
            self.in_flight = InFlight(instructions, self.blocks, effects, self.mentioned)
        live_in = live_registers(self.blocks, block_reads, block_writes)
        self.place_at: dict[int, int] = {}
        self.block_place: list[int] = []
        for stops in self.stops:
            self.block_place.append(len(self.place_at))
            for stop in stops:
                self.place_at[stop] = len(self.place_at)
        self.live: dict[int, set[int]] = {}  # at the start of each instruction that is a place
        self.live_after: dict[int, frozenset[int]] = {}  # after some instructions
        self.live_out: list[set[int]] = []
        for block in self.blocks:
            live: set[int] = set()
            for s in block.successors:
                if s != EXIT:
                    live |= live_in[s]
            self.live_out.append(set(live))
            for index in range(block.last - 1, block.first - 1, -1):
                reads, writes = effects[index]
                if instructions[index].opcode == "mma" or (
                    self.in_flight is not None and self.in_flight.overwritten(instructions[index])
                ):
                    self.live_after[index] = frozenset(live)
                if instructions[index].guard is None:
                    live = live - writes
                live = live | reads
                if index in self.place_at:
                    self.live[index] = set(live)

    def code(self) -> Code:
        code = Code([], self.zeros, self.kernel)
        for number, block in enumerate(self.blocks):
            stops = self.stops[number]
            for i, first in enumerate(stops):
                last = stops[i + 1] if i + 1 < len(stops) else block.last
                op = self.ops.get(first)
                step = self.function(code, number, first, last)
                whole_last = self.whole_end(first, block)
                run_whole = (
                    step if whole_last == last else self.lazy(code, number, first, whole_last)
                )
                place = Place(
                    number, first, sorted(self.live[first]), step, run_whole, cost=last - first
                )
                if op is not None and op.ready is not None:
                    place.gate = self.gate(code, first, op, op.ready)
                    place.warp_gate = op.warp_gate and self.kernel.instructions[first].guard is None
                    if op.waits_for is not None:
                        place.waits_for = self.gate(code, first, op, op.waits_for)
                code.places.append(place)
        return code

    def whole_end(self, first: int, block: Block) -> int:
        """Where the unbroken run for whole warps that starts at `first` has to stop."""
        for index in range(first + 1, block.last):
            op = self.ops.get(index)
            if (
                op is not None
                and op.ready is not None
                and (not op.warp_gate or self.kernel.instructions[index].guard is not None)
            ):
                return index
        return block.last

    def lazy(self, code: Code, number: int, first: int, last: int) -> Callable[[Cohort], Any]:
        """The function for first..last-1, generated when it is first run."""
        made: list[Callable[[Cohort], Any]] = []

        def run(cohort: Cohort) -> Any:
            if not made:
                made.append(self.function(code, number, first, last))
                code.places[self.place_at[first]].run_whole = made[0]
            return made[0](cohort)

        return run

    def function(self, code: Code, number: int, first: int, last: int) -> Callable[[Cohort], Any]:
        writer = Writer(self)
        block = self.blocks[number]
        if self.env.count:
            writer.line(f"c.wave.counters.enter({first}, {last}, c)")
        index = first
        while index < last:
            ins = self.kernel.instructions[index]
            run = self.mma_run(index, last)
            if self.in_flight is not None:
                for checked in run or [ins]:
                    self.test_in_flight(writer, checked, self.in_flight)
            if len(run) > 1:
                after = self.live_after[run[-1].index]
                names = {n for n, number in self.numbers.items() if number in after}
                for part in fuse(run, self.env, names):
                    writer.call(
                        part.instructions[0], part.op, list(part.results), list(part.sources)
                    )
            elif not is_terminator(ins):
                op = self.ops[index]
                writer.call(ins, op, *split_operands(ins, op))
            index += max(len(run), 1)
        live = self.live_out[number] if last == block.last else self.live[last]
        writer.store(live)
        end = self.kernel.instructions[last - 1]
        if last < block.last:
            writer.line(f"return {self.place_at[last]}")
        elif not is_terminator(end):
            writer.line(f"return {self.place_of(block.falls)}")
        else:
            writer.terminator(end, block)
        return writer.finish(code, f"{first}_{last}")

    def test_in_flight(self, writer: Writer, ins: Instruction, in_flight: InFlight) -> None:
        """Tests of what an instruction does to registers that a wgmma may still use."""
        op = self.ops.get(ins.index)
        if op is None:
            return
        names = list(self.numbers)
        reads: set[int] = set()
        for operand in split_operands(ins, op)[1]:
            reads |= self.mentioned(operand)
        tests: list[tuple[str, tuple[Any, ...], list[int]]] = []
        touched = in_flight.touched(ins, reads)
        if touched:
            tests.append(("touched", (ins, [names[r] for r in touched]), touched))
        for register in in_flight.overwritten(ins):
            others = in_flight.before[ins.index].accumulators & self.live_after[ins.index]
            others = others - in_flight.effects[ins.index][1]
            tests.append(("overwritten", (ins, names[register]), [register, *sorted(others)]))
        modified = in_flight.modified(ins)
        if modified:
            tests.append(("modified", (ins, frozenset(names[r] for r in modified)), []))
        tests += [(*call, []) for call in in_flight.watch(ins, names)]
        for method, constants, registers in tests:
            guard = "None" if ins.guard is None else writer.guard(ins)
            arguments = [writer.register(r, self.kept[r]) for r in registers]
            fixed = writer.constant(constants)
            call = f"{method}(*{fixed}, c, {guard}, {tuple_text(arguments)})"
            writer.line(f"c.wave.warpgroups.checks.{call}", ins)

    def mma_run(self, first: int, last: int) -> list[Instruction]:
        """The consecutive unguarded mma from `first` on."""
        run = []
        for ins in self.kernel.instructions[first:last]:
            if ins.opcode != "mma" or ins.guard is not None:
                break
            run.append(ins)
        return run

    def gate(
        self, code: Code, index: int, op: Op, ready: Callable[..., Any]
    ) -> Callable[[Cohort], Any]:
        """A function of a cohort that calls `ready` with the instruction's sources."""
        ins = self.kernel.instructions[index]
        writer = Writer(self)
        _, sources = split_operands(ins, op)
        arguments = writer.sources(ins, op, sources)
        name = writer.constant(ready)
        if ins.guard is None or ready is op.waits_for:  # who waits has a true guard
            writer.line(f"return {name}(c, {', '.join(arguments)})", ins)
        else:
            guard = writer.guard(ins)
            helper = writer.constant(guarded_ready)
            writer.line(f"return {helper}(c, {guard}, {name}, ({tuple_text(arguments)}))", ins)
        return writer.finish(code, f"gate_{index}")

    def place_of(self, block: int) -> int:
        return EXIT if block == EXIT else self.block_place[block]
