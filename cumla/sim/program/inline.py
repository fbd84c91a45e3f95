"""A kernel with the device functions that it calls put in place: one flat list of instructions.

Calls are inlined rather than run on a stack: then a register is one array, whatever function it is
of, and lanes that are in different calls of a function can never be confused. What PTX allows and
this does not are recursion and calls through a pointer; both are refused by name. Parameters of a
call live in local memory, as PTX ISA "Parameter State Space" lets them: `ld.param` and `st.param`
of a device function become accesses to local variables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cumla.sim.ptx.syntax import (
    Address,
    Function,
    Guard,
    Instruction,
    Module,
    Negated,
    Operand,
    Pair,
    Register,
    Symbol,
    Variable,
    Vector,
)

# Functions that the CUDA runtime provides; they stay calls, see isa/system.py.
SYSTEM_FUNCTIONS = frozenset({"vprintf", "__assertfail", "__nv_fdiv_unreachable"})


@dataclass(slots=True)
class FlatKernel:
    """An entry function without calls; the fields are those of `Function`, and

    Attributes:
        problems: calls that could not be inlined, and why.
        call_parameters: names of the local variables that are parameters of calls.
    """

    name: str
    parameters: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    problems: list[tuple[Instruction, str]] = field(default_factory=list)
    call_parameters: set[str] = field(default_factory=set)


def flatten(module: Module, entry: Function) -> FlatKernel:
    """Inline all calls of `entry`; what cannot be is listed in `problems`."""
    flat = FlatKernel(entry.name, entry.parameters)
    _Inliner(module, flat).body(entry, "", {}, None, (entry.name,))
    return flat


class _Inliner:
    def __init__(self, module: Module, flat: FlatKernel) -> None:
        self.module = module
        self.flat = flat
        self.copies = 0

    def body(
        self,
        function: Function,
        prefix: str,
        symbols: dict[str, str],
        return_label: str | None,
        stack: tuple[str, ...],
    ) -> None:
        """Append a function's instructions, its own names prefixed and `symbols` replaced."""
        flat = self.flat
        names = dict(symbols)
        for variable in function.variables:
            # Parameters of calls that this function makes are memory of its lanes.
            space = variable.space
            if space == "param":
                space = "local"
                flat.call_parameters.add(prefix + variable.name)
            names[variable.name] = prefix + variable.name
            flat.variables.append(replace(variable, name=prefix + variable.name, space=space))
        for label in function.labels:
            names[label] = prefix + label
        registers = {name: prefix + name for name in function.registers}
        flat.registers.update((prefix + n, kind) for n, kind in function.registers.items())
        for table, targets in function.branch_targets.items():
            names[table] = prefix + table
            flat.branch_targets[prefix + table] = [names[t] for t in targets]
        parameters = {p.name for p in self.flat.parameters} if return_label is None else set()
        labels_at: dict[int, list[str]] = {}
        for label, index in function.labels.items():
            labels_at.setdefault(index, []).append(prefix + label)

        for index, ins in enumerate(function.instructions):
            for label in labels_at.get(index, ()):
                flat.labels[label] = len(flat.instructions)
            guard = ins.guard
            if guard is not None:
                guard = Guard(registers.get(guard.register, guard.register), guard.negated)
            operands = tuple(_rename(o, registers, names) for o in ins.operands)
            modifiers = ins.modifiers
            if ins.opcode in ("ld", "st") and not _names_parameter(ins, parameters):
                modifiers = tuple(
                    "local" if m in ("param", "param::func", "param::entry") else m
                    for m in modifiers
                )
            moved = replace(
                ins,
                operands=operands,
                guard=guard,
                modifiers=modifiers,
                index=len(flat.instructions),
            )
            if ins.opcode == "call":
                self.call(moved, prefix, stack)
            elif ins.opcode == "ret" and return_label is not None:
                self.append(replace(moved, opcode="bra", operands=(Symbol(return_label),)))
            else:
                self.append(moved)
        for label in labels_at.get(len(function.instructions), ()):
            flat.labels[label] = len(flat.instructions)

    def append(self, ins: Instruction) -> None:
        self.flat.instructions.append(replace(ins, index=len(self.flat.instructions)))

    def call(self, ins: Instruction, prefix: str, stack: tuple[str, ...]) -> None:
        target = ins.operands[0]
        if not isinstance(target, Symbol):
            self.flat.problems.append((ins, "calls through a pointer are not supported"))
            return
        name = target.name
        if name in SYSTEM_FUNCTIONS:
            self.append(ins)
            return
        function = self.module.functions.get(name)
        if function is None or not function.body:
            self.flat.problems.append((ins, f"function {name} has no body in this module"))
            return
        if name in stack:
            self.flat.problems.append((ins, f"recursion ({name} calls itself) is not supported"))
            return
        self.copies += 1
        inner = f"{name}#{self.copies}:"
        done = f"{inner}done"
        symbols: dict[str, str] = {}
        entering: list[Instruction] = []
        leaving: list[Instruction] = []
        given = [o.items if isinstance(o, Vector) else (o,) for o in ins.operands[1:3]]
        actual_returns, actual_parameters = given if len(given) == 2 else ((), ())
        for formals, actuals, moves in (
            (function.parameters, actual_parameters, entering),
            (function.returns, actual_returns, leaving),
        ):
            for formal, actual in zip(formals, actuals, strict=False):
                if formal.space == "param" and isinstance(actual, Symbol):
                    symbols[formal.name] = actual.name
                    continue
                inside = Register(inner + formal.name)
                pair = (inside, actual) if moves is entering else (actual, inside)
                moves.append(
                    replace(ins, opcode="mov", modifiers=(formal.type,), operands=pair, guard=None)
                )
        skip = f"{inner}skipped"
        if ins.guard is not None:
            opposite = Guard(ins.guard.register, not ins.guard.negated)
            self.append(
                replace(ins, opcode="bra", modifiers=(), operands=(Symbol(skip),), guard=opposite)
            )
        for move in entering:
            self.append(move)
        self.body(function, inner, symbols, done, (*stack, name))
        self.flat.labels[done] = len(self.flat.instructions)
        for move in leaving:
            self.append(move)
        self.flat.labels[skip] = len(self.flat.instructions)


def _names_parameter(ins: Instruction, parameters: set[str]) -> bool:
    """Whether an ld or st speaks of a kernel parameter by name, or by a register (cvta.param)."""
    for operand in ins.operands:
        if isinstance(operand, Address) and isinstance(operand.base, Symbol):
            return operand.base.name in parameters
    return True


def _rename(operand: Operand, registers: dict[str, str], names: dict[str, str]) -> Operand:
    if isinstance(operand, Register):
        return Register(registers.get(operand.name, operand.name))
    if isinstance(operand, Symbol):
        return Symbol(names.get(operand.name, operand.name), operand.offset)
    if isinstance(operand, Address):
        if operand.base is None:
            return operand
        base = _rename(operand.base, registers, names)
        assert isinstance(base, (Register, Symbol))
        return Address(base, operand.offset)
    if isinstance(operand, Vector):
        return Vector(tuple(_rename(o, registers, names) for o in operand.items))
    if isinstance(operand, Pair):
        return Pair(
            _rename(operand.first, registers, names), _rename(operand.second, registers, names)
        )
    if isinstance(operand, Negated):
        return Negated(Register(registers.get(operand.operand.name, operand.operand.name)))
    return operand


def registers_of(operand: Operand) -> Iterator[str]:
    """Names of the registers that an operand mentions, special ones included."""
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Address):
        if isinstance(operand.base, Register):
            yield operand.base.name
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from registers_of(item)
    elif isinstance(operand, Pair):
        yield from registers_of(operand.first)
        yield from registers_of(operand.second)
    elif isinstance(operand, Negated):
        yield operand.operand.name
