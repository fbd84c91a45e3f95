"""Consecutive mma as one operation, which unpacks each fragment once and gives the same bits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cumla.sim.isa.mma import items, mma, panels_op
from cumla.sim.isa.mma_chains import Chain, Link, arrange
from cumla.sim.isa.mma_forms import KINDS, parse
from cumla.sim.isa.table import Env, Op
from cumla.sim.ptx.syntax import Instruction, Operand, Register, Sink


@dataclass(frozen=True, slots=True)
class Fused:
    """Consecutive mma as one instruction.

    Attributes:
        instructions: what it stands for.
        op: as for one instruction.
        sources: the operands that `op.run` takes.
        results: the registers, or sinks, that it gives, with their last values.
    """

    instructions: tuple[Instruction, ...]
    op: Op
    sources: tuple[Operand, ...]
    results: tuple[Operand, ...]


def fuse(
    instructions: Sequence[Instruction], env: Env, live: Collection[str] | None = None
) -> list[Fused]:
    """Consecutive mma instructions as few operations, to be carried out in order.

    All must be known to `mma`. `live` names the registers that are read after the last of them;
    others need not be results. None stands for all.
    """
    groups: list[_Group] = []
    for ins in instructions:
        if not groups or not groups[-1].take(ins):
            groups.append(_Group(ins))
            groups[-1].take(ins)
    fused: list[Fused] = []
    wanted = None if live is None else set(live)
    for group in reversed(groups):
        fused.append(group.fused(env, wanted))
        if wanted is not None:
            wanted |= {o.name for o in fused[-1].sources if isinstance(o, Register)}
    return fused[::-1]


class _Group:
    """mma of one form of which none reads as A or B what another gives."""

    def __init__(self, first: Instruction) -> None:
        self.first = first
        self.form = parse(first)
        self.instructions: list[Instruction] = []
        self.numbers: dict[tuple[Operand, str], int] = {}  # sources and their types
        self.chains: list[Chain] = []
        # Register -> (chain, link, place among its D) of its newest value.
        self.newest: dict[Operand, tuple[int, int, int]] = {}

    def take(self, ins: Instruction) -> bool:
        """Add an instruction if it fits in; the first always does."""
        alone = self.form.a == "f64" or self.first.guard is not None
        if self.instructions and (
            alone or ins.guard is not None or ins.modifiers != self.first.modifiers
        ):
            return False
        d, a, b, c = (items(o) for o in ins.operands)
        if any(o in self.newest for o in (*a, *b)):
            return False
        came_from = [self.newest.get(o) for o in c]
        if came_from[0] is None:
            if any(came_from):
                return False
            number = len(self.chains)
            self.chains.append(Chain(self.sources(c, KINDS[self.form.c]), []))
        else:
            # C must be all of the D of the chain's last mma, and in the type that D has.
            number, last, _ = came_from[0]
            if (
                came_from != [(number, last, i) for i in range(len(c))]
                or last != len(self.chains[number].links) - 1
                or self.form.c != self.form.d
            ):
                return False
        links = self.chains[number].links
        links.append(Link(self.sources(a, "b32"), self.sources(b, "b32"), []))
        for place, register in enumerate(d):
            if isinstance(register, Register):
                self.newest[register] = (number, len(links) - 1, place)
        self.instructions.append(ins)
        return True

    def sources(self, operands: Sequence[Operand], kind: str) -> tuple[int, ...]:
        return tuple(self.numbers.setdefault((o, kind), len(self.numbers)) for o in operands)

    def fused(self, env: Env, live: set[str] | None) -> Fused:
        """The operation; results that are not live are left out."""
        ins = self.instructions[0]
        if self.form.a == "f64" or ins.guard is not None:
            op = mma(ins, env)
            given = items(ins.operands[0])
            if isinstance(ins.operands[0], Sink):
                given *= len(op.results)
            return Fused((ins,), op, sum(map(items, ins.operands[1:]), ()), given)
        results: list[Operand] = []
        for register, (chain, link, place) in self.newest.items():
            assert isinstance(register, Register)
            if live is None or register.name in live:
                self.chains[chain].links[link].results.append((place, len(results)))
                results.append(register)
        operands = tuple(operand for operand, _ in self.numbers)
        kinds = tuple(kind for _, kind in self.numbers)
        panels = arrange(self.form, self.chains)
        op = panels_op(self.instructions, env, self.form, panels, kinds, len(results))
        return Fused(tuple(self.instructions), op, operands, tuple(results))
