"""The Python text of one generated function: registers in local variables, a call a line."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from cumla.sim.cohort import Cohort
from cumla.sim.isa.special import SPECIAL
from cumla.sim.isa.table import DTYPES, Op
from cumla.sim.program.flow import Block
from cumla.sim.program.inline import SYSTEM_FUNCTIONS
from cumla.sim.program.parting import branch, guarded, guarded_cohort, switch
from cumla.sim.ptx.syntax import (
    Address,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    Symbol,
    Vector,
)

if TYPE_CHECKING:
    from cumla.sim.program.codegen import Code, Generator

INT64 = np.dtype(np.int64)
# Registers of a type are kept in this form between blocks.
KEPT = {
    "pred": np.dtype(np.bool_),
    "8": np.dtype(np.uint8),
    "16": np.dtype(np.uint16),
    "32": np.dtype(np.uint32),
    "64": np.dtype(np.uint64),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
# Instructions whose functions give [n] or [1] also where literals are given as scalars; not for
# packed types.
TAKE_SCALARS = frozenset(
    {"add", "sub", "mul", "mad", "fma", "and", "or", "xor", "shl", "shr", "setp", "min", "max"}
)
SERIAL = count()  # so that each function has a file name of its own
CONDITION = "cc"  # the condition code register of add.cc and the like


def kept_dtype(kind: str) -> Any:
    """The dtype that holds a register declared with this type."""
    if kind in KEPT:
        return KEPT[kind]
    return KEPT[kind.removesuffix("x2").lstrip("busf")]


def split_operands(ins: Instruction, op: Op) -> tuple[list[Operand], list[Operand]]:
    """(destinations, sources) of an instruction, vectors and pairs flattened."""
    flat: list[Operand] = []
    for operand in ins.operands:
        if isinstance(operand, Vector):
            flat.extend(operand.items)
        elif isinstance(operand, Pair):
            flat.extend((operand.first, operand.second))
        else:
            flat.append(operand)
    results = len(op.results) - (op.results[-1:] == (CONDITION,))
    if op.results and ins.operands and isinstance(ins.operands[0], Sink):
        # One `_` stands for all the destinations of an instruction.
        single = flat[1:]
        return [Sink()] * results, single
    return flat[:results], flat if op.updates else flat[results:]


def tuple_text(items: list[str]) -> str:
    """The inside of a tuple's brackets."""
    return "".join(f"{item}, " for item in items)


class Writer:
    """Writes the Python text of one function."""

    def __init__(self, owner: Generator) -> None:
        self.owner = owner
        self.lines: list[str] = []
        self.at: list[Instruction | None] = []
        self.names: dict[str, Any] = {}
        self.known: dict[Any, str] = {}  # (register, dtype) or other value -> variable
        self.made: dict[int, Any] = {}  # register -> dtype of the newest value
        self.written: set[int] = set()
        self.fresh = count()

    def line(self, text: str, ins: Instruction | None = None) -> None:
        self.lines.append(text)
        self.at.append(ins)

    def variable(self) -> str:
        return f"v{next(self.fresh)}"

    def constant(self, value: Any) -> str:
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name

    def array(self, value: Any, dtype: Any) -> str:
        made = np.array([value]).astype(dtype) if not isinstance(value, np.ndarray) else value
        key = ("constant", made.tobytes(), str(made.dtype), made.shape)
        if key not in self.known:
            self.known[key] = self.constant(made)
        return self.known[key]

    # Reading

    def register(self, number: int, dtype: Any) -> str:
        """A variable that holds a register in this dtype (of its width, or narrower)."""
        key = (number, dtype)
        if key in self.known:
            return self.known[key]
        if number not in self.made:
            self.made[number] = self.owner.kept[number]
            name = f"r{number}"
            self.line(f"{name} = c.regs[{number}]")
            self.known[number, self.owner.kept[number]] = name
            if key in self.known:
                return name
        have = self.made[number]
        source = self.known[number, have]
        name = self.variable()
        if have.itemsize == dtype.itemsize:
            self.line(f"{name} = {source}.view({self.dtype(dtype)})")
        else:
            bits = np.dtype(f"u{have.itemsize}")
            if have != bits:
                source = self.register(number, bits)
            self.line(f"{name} = {source}.astype({self.dtype(dtype)})")
        self.known[key] = name
        return name

    def dtype(self, dtype: Any) -> str:
        name = f"t_{dtype.name}"
        self.names[name] = dtype
        return name

    def source(self, ins: Instruction, operand: Operand, kind: str) -> str:
        if kind == "addr":
            return self.address(ins, operand)
        dtype = DTYPES[kind]
        if isinstance(operand, Register):
            number = self.owner.numbers.get(operand.name)
            if number is not None:
                return self.register(number, dtype)
            return self.special(ins, operand.name, dtype)
        if isinstance(operand, Negated):
            inner = self.source(ins, operand.operand, "pred")
            key = ("not", inner)
            if key not in self.known:
                self.known[key] = self.variable()
                self.line(f"{self.known[key]} = ~{inner}")
            return self.known[key]
        if isinstance(operand, Immediate):
            return self.array(immediate(operand, dtype), dtype)
        if isinstance(operand, Symbol):
            name = self.symbol_address(ins, operand, 0)
            if operand.name in self.owner.ranked:
                cast = self.variable()
                self.line(f"{cast} = {name}.astype({self.dtype(dtype)})")
                return cast
            return self.array(self.names[name].astype(dtype), dtype)
        if isinstance(operand, Sink):
            return self.array(np.zeros(1, dtype), dtype)
        raise AssertionError(f"operand {operand} of {ins.text}")

    def symbol(self, ins: Instruction, name: str) -> int:
        if name in SYSTEM_FUNCTIONS:
            return 0
        return self.owner.symbols[name]

    def symbol_address(self, ins: Instruction, symbol: Symbol, offset: int) -> str:
        """A constant, or a variable, int64: where offset bytes behind a symbol are."""
        at = np.array([self.symbol(ins, symbol.name) + symbol.offset + offset], np.int64)
        constant = self.array(at, INT64)
        if symbol.name not in self.owner.ranked:
            return constant
        name = self.variable()
        self.line(f"{name} = {constant} + c.shared_window")
        return name

    def special(self, ins: Instruction, name: str, dtype: Any) -> str:
        kind, value = SPECIAL[name]
        made = self.variable()
        self.line(f"{made} = {self.constant(value)}(c)", ins)
        have = DTYPES[kind]
        if have == dtype:
            return made
        cast = self.variable()
        if have.itemsize == dtype.itemsize:
            self.line(f"{cast} = {made}.view({self.dtype(dtype)})")
        else:
            self.line(f"{cast} = {made}.astype({self.dtype(dtype)})")
        return cast

    def address(self, ins: Instruction, operand: Operand) -> str:
        offset = 0
        base: Operand | None = operand
        if isinstance(operand, Address):
            base, offset = operand.base, operand.offset
        if base is None or isinstance(base, Immediate):
            start = base.value if isinstance(base, Immediate) else 0
            return self.array(np.array([int(start) + offset], np.int64), INT64)
        if isinstance(base, Symbol):
            return self.symbol_address(ins, base, offset)
        assert isinstance(base, Register)
        number = self.owner.numbers[base.name]
        key = (number, "addr", offset)
        if key in self.known:
            return self.known[key]
        if offset:
            start_name = self.address(ins, base)
            name = self.variable()
            self.line(f"{name} = {start_name} + {self.array(offset, INT64)}")
        elif self.owner.kept[number].itemsize == 8:
            name = self.register(number, INT64)
        else:
            bits = self.register(number, np.dtype(np.uint32))
            name = self.variable()
            self.line(f"{name} = {bits}.astype({self.dtype(INT64)})")
        self.known[key] = name
        return name

    def sources(self, ins: Instruction, op: Op, operands: list[Operand]) -> list[str]:
        kinds = op.sources
        names = []
        if kinds[-1:] == (CONDITION,):
            kinds = kinds[:-1]
        # NumPy takes half the time for [n] with a scalar that it takes for [n] with [1].
        scalars = (
            ins.opcode in TAKE_SCALARS
            and any(isinstance(o, Register) for o in operands)
            and not any(kind.endswith("x2") for kind in kinds)
        )
        for operand, kind in zip(operands, kinds, strict=True):
            if scalars and isinstance(operand, Immediate):
                value = immediate(operand, DTYPES[kind]).astype(DTYPES[kind])
                names.append(self.array(value.reshape(()), DTYPES[kind]))
            else:
                names.append(self.source(ins, operand, kind))
        if op.sources[-1:] == (CONDITION,):
            names.append(self.register(self.owner.numbers[CONDITION], KEPT["pred"]))
        return names

    def guard(self, ins: Instruction) -> str:
        assert ins.guard is not None
        register = Register(ins.guard.register)
        return self.source(ins, Negated(register) if ins.guard.negated else register, "pred")

    # Writing

    def call(
        self, ins: Instruction, op: Op, destinations: list[Operand], sources: list[Operand]
    ) -> None:
        """Call the function of an instruction and keep its results."""
        arguments = self.sources(ins, op, sources)
        targets = [self.target(d) for d in destinations]
        if op.results[-1:] == (CONDITION,):
            targets.append(self.owner.numbers[CONDITION])
        kinds = [DTYPES["pred" if k == CONDITION else k] for k in op.results]
        names = [self.variable() for _ in targets]
        run = self.constant(op.run)
        if ins.guard is None:
            call = f"{run}({', '.join((['c'] if op.cohort else []) + arguments)})"
        else:
            guard = self.guard(ins)
            # The old values, as the types that the instruction gives.
            olds = [
                self.array(np.zeros(1, kind), kind) if t is None else self.old(t, kind)
                for t, kind in zip(targets, kinds, strict=True)
            ]
            helper = self.constant(guarded_cohort if op.cohort else guarded)
            call = f"{helper}(c, {guard}, {run}, ({tuple_text(arguments)}), ({tuple_text(olds)}))"
        if not names:
            self.line(call, ins)
        elif len(names) == 1 and ins.guard is None:
            self.line(f"{names[0]} = {call}", ins)
        else:
            self.line(f"{tuple_text(names)} = {call}", ins)
        for target, kind, name in zip(targets, kinds, names, strict=True):
            if target is not None:
                self.define(target, kind, name)

    def target(self, operand: Operand) -> int | None:
        if isinstance(operand, Sink):
            return None
        assert isinstance(operand, Register), operand
        return self.owner.numbers[operand.name]

    def old(self, number: int, kind: Any) -> str:
        return self.register(number, kind)

    def define(self, number: int, kind: Any, name: str) -> None:
        """Register `number` now holds variable `name`, whose dtype is `kind`."""
        for key in [k for k in self.known if k[0] == number and not isinstance(k[0], (str, bool))]:
            del self.known[key]
        kept = self.owner.kept[number]
        if kind.itemsize < kept.itemsize:
            # PTX ISA "Operand Size Exceeding Instruction-Type Size": extended by its own sign.
            if kind.kind == "f":
                bits = self.variable()
                self.line(f"{bits} = {name}.view({self.dtype(np.dtype(f'u{kind.itemsize}'))})")
                name = bits
            wide = self.variable()
            bits_kept = np.dtype(f"u{kept.itemsize}")
            self.line(f"{wide} = {name}.astype({self.dtype(bits_kept)})")
            name, kind = wide, bits_kept
        self.known[number, kind] = name
        self.made[number] = kind
        self.written.add(number)

    def store(self, live: set[int]) -> None:
        for number in sorted(self.written & live):
            self.line(f"c.regs[{number}] = {self.register(number, self.owner.kept[number])}")

    # The end of a block

    def terminator(self, ins: Instruction, block: Block) -> None:
        owner = self.owner
        fall = owner.place_of(block.falls)
        if ins.opcode == "brx":
            index = self.source(ins, ins.operands[0], "u32")
            places = [owner.place_of(t) for t in block.targets]
            helper = self.constant(switch)
            if ins.guard is None:
                self.line(
                    f"return {helper}(c, {index}, {self.constant(places)}, None, {fall})", ins
                )
            else:
                guard = self.guard(ins)
                self.line(
                    f"return {helper}(c, {index}, {self.constant(places)}, {guard}, {fall})", ins
                )
            return
        taken = owner.place_of(block.targets[0])
        if ins.guard is None:
            self.line(f"return {taken}")
            return
        assert ins.guard is not None
        guard = self.source(ins, Register(ins.guard.register), "pred")
        if ins.guard.negated:
            taken, fall = fall, taken
        helper = self.constant(branch)
        self.line(f"return {helper}(c, {guard}, {taken}, {fall}, {ins.index})", ins)

    def finish(self, code: Code, label: str) -> Callable[[Cohort], Any]:
        filename = f"<ptx {self.owner.kernel.name} {label} #{next(SERIAL)}>"
        text = "def run(c):\n" + "".join(f"    {line}\n" for line in self.lines or ["pass"])
        names = dict(self.names)
        exec(compile(text, filename, "exec"), names)
        code.instructions_of[filename] = [None, *self.at]  # line 1 is the def
        linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
        function: Callable[[Cohort], Any] = names["run"]
        return function


def immediate(operand: Immediate, dtype: Any) -> Any:
    """A literal as one value of a dtype; bits of float literals survive."""
    if dtype == np.float32 and operand.single_bits is not None:
        return np.array([operand.single_bits], np.uint32).view(np.float32)
    if dtype == np.float64 and operand.double_bits is not None:
        return np.array([operand.double_bits], np.uint64).view(np.float64)
    if dtype.kind in "ui" and operand.single_bits is not None:
        return np.array([operand.single_bits], np.uint32).astype(dtype)
    if dtype.kind in "ui" and operand.double_bits is not None:
        return np.array([operand.double_bits], np.uint64).astype(dtype)
    if dtype.kind in "ui":
        bits = int(operand.value) & ((1 << (8 * dtype.itemsize)) - 1)
        return np.array([bits], np.uint64).astype(dtype)
    if dtype == np.bool_:
        return np.array([bool(operand.value)])
    return np.array([operand.value]).astype(dtype)
