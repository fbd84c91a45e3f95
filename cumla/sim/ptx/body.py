"""Function bodies: scopes, declarations, labels and instructions.

A body is read twice. First it is cut into statements, and every label enters its scope, since a
branch may come before its label. Then the statements are taken in order, because a name means the
nearest declaration before it. PTX ISA "Statements", "Control Flow Instructions: {}".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from cumla.sim.errors import PTXSyntaxError
from cumla.sim.ptx import declarations
from cumla.sim.ptx.lexer import (
    BRACE,
    DIRECTIVE,
    FILE,
    INSTRUCTION,
    LABEL,
    LOC,
    REST,
    SECTION,
    Expected,
    Text,
    split,
)
from cumla.sim.ptx.operands import OperandParser
from cumla.sim.ptx.sources import Sources
from cumla.sim.ptx.syntax import (
    Function,
    Guard,
    Instruction,
    Module,
    Operand,
    Register,
    SourceLine,
    Symbol,
    Variable,
    Vector,
)

_SPACES = frozenset({"global", "const", "shared", "local", "param"})


@dataclass(slots=True)
class Scope:
    """A block `{ }`.

    Attributes:
        names: what the names declared in it stand for.
        cache: operands by their text, as they are here; shared with the scope around it as long
            as nothing is declared.
    """

    names: dict[str, Operand] = field(default_factory=dict)
    cache: dict[str, Operand] = field(default_factory=dict)


class BodyParser:
    """Reads the body of one function into it."""

    def __init__(self, text: Text, sources: Sources, module: Module, function: Function) -> None:
        self.text = text
        self.clean = text.clean
        self.sources = sources
        self.module = module
        self.function = function
        self.used: set[str] = set()
        self.labels: set[str] = set()
        self.tables: set[str] = set()  # names of .branchtargets
        self.scopes: list[Scope] = [Scope()]
        self.operands = OperandParser(self.find)
        self.names: dict[str, tuple[str, tuple[str, ...]]] = {}

    # Names

    def find(self, name: str) -> Operand | None:
        """What a name stands for here, or None."""
        for scope in reversed(self.scopes):
            if (found := scope.names.get(name)) is not None:
                return found
        if name in self.module.variables or name in self.module.functions:
            return Symbol(name)
        return None

    def resolve(self, name: str) -> str:
        found = self.find(name)
        if not isinstance(found, Symbol):
            raise Expected(f"a declared name instead of {name!r}")
        return found.name

    def target(self, name: str) -> str:
        """The label that a name stands for here."""
        found = self.find(name)
        if not isinstance(found, Symbol) or found.name not in self.labels:
            raise Expected(f"a label instead of {name!r}")
        return found.name

    def unique(self, name: str) -> str:
        """A name that nothing else in the function has; `#` is in no identifier of PTX."""
        made, count, module = name, 0, self.module
        while made in self.used or made in module.variables or made in module.functions:
            count += 1
            made = f"{name}#{count}"
        self.used.add(made)
        return made

    def declare(self, scope: Scope, name: str, meaning: Operand) -> None:
        if name in scope.names:
            raise Expected(f"a new name: {name} is declared already in this block")
        scope.names[name] = meaning

    # Statements

    def parse(self, start: int) -> int:
        """Read the body whose `{` is at `start`; returns the position after its `}`."""
        for variable in (*self.function.returns, *self.function.parameters):
            self.parameter(start, variable)
        statements, end = self.cut(start)
        self.sources.newest.clear()
        source: SourceLine | None = None
        labels = self.function.labels
        for kind, at, what in statements:
            try:
                if kind == "instruction":
                    self.instruction(what, source)
                elif kind == "label":
                    labels[what] = len(self.function.instructions)
                elif kind == "loc":
                    # Line 0 says that the compiler knows of none; the line before is near.
                    if int(what[2]):
                        source = self.sources.locate(what)
                elif kind == "targets":
                    name, listed = what
                    self.function.branch_targets[name] = [self.target(n) for n in split(listed)]
                elif kind == "open":
                    what.cache = what.cache if what.names else self.scopes[-1].cache
                    self.scopes.append(what)
                elif kind == "close":
                    self.scopes.pop()
                else:
                    self.declaration(kind, what)
            except Expected as problem:
                raise self.text.error(at, str(problem)) from None
        return end

    def parameter(self, at: int, variable: Variable) -> None:
        """A parameter of the function, as a name in its body."""
        if variable.name == "_":
            return
        self.used.add(variable.name)
        meaning: Operand = Symbol(variable.name)
        if variable.space == "reg":
            meaning = Register(variable.name)
            self.function.registers[variable.name] = variable.type
        try:
            self.declare(self.scopes[0], variable.name, meaning)
        except Expected as problem:
            raise self.text.error(at, str(problem)) from None

    def cut(self, start: int) -> tuple[list[tuple[str, int, Any]], int]:
        """The statements of a body as (kind, position, what), and where it ends."""
        statements: list[tuple[str, int, Any]] = []
        clean = self.clean
        at = start + 1
        open_scopes = [self.scopes[0]]
        opened_at = [start]
        instruction = INSTRUCTION.match
        while True:
            match = instruction(clean, at)
            if match is not None:
                statements.append(("instruction", match.start(3), match))
                at = match.end()
            elif (match := LOC.match(clean, at)) is not None:
                statements.append(("loc", match.start(1), match))
                at = match.end()
            elif (match := BRACE.match(clean, at)) is not None:
                at = match.end()
                if match[1] == "{":
                    open_scopes.append(Scope())
                    opened_at.append(match.start(1))
                    statements.append(("open", at, open_scopes[-1]))
                else:
                    open_scopes.pop()
                    opened_at.pop()
                    if not open_scopes:
                        return statements, at
                    statements.append(("close", at, None))
            elif (match := LABEL.match(clean, at)) is not None:
                at = self.label(match, open_scopes[-1], statements)
            elif (match := DIRECTIVE.match(clean, at)) is not None:
                at = self.directive(match, statements)
            else:
                where = self.text.skip_space(at)
                if where == len(clean):
                    raise self.text.error(opened_at[-1], "'}' to close this block")
                raise self.text.error(where, self.missing(where))

    def missing(self, at: int) -> str:
        """What to say of text that is no statement."""
        if INSTRUCTION.match(self.clean[at:].split("\n", 1)[0] + ";"):
            return "';' after this instruction"
        return "an instruction, a label or a directive"

    def label(
        self, match: re.Match[str], scope: Scope, statements: list[tuple[str, int, Any]]
    ) -> int:
        """A label, or a table of targets or a prototype, which have names like labels."""
        name, at = match[1], match.end()
        unique = self.unique(name)
        try:
            self.declare(scope, name, Symbol(unique))
        except Expected as problem:
            raise self.text.error(match.start(1), str(problem)) from None
        word = DIRECTIVE.match(self.clean, at)
        if word is not None and word[1] in (".branchtargets", ".calltargets", ".callprototype"):
            rest = REST.match(self.clean, word.end())
            if rest is None:
                raise self.text.error(word.start(1), f"';' after {word[1]}")
            if word[1] == ".branchtargets":
                self.tables.add(unique)
                statements.append(("targets", word.start(1), (unique, rest[1])))
            return rest.end()
        self.labels.add(unique)
        statements.append(("label", match.start(1), unique))
        return at

    def directive(self, match: re.Match[str], statements: list[tuple[str, int, Any]]) -> int:
        for pattern in (FILE, SECTION):
            if (skipped := pattern.match(self.clean, match.start(1))) is not None:
                return skipped.end()
        rest = REST.match(self.clean, match.end())
        if rest is None:
            raise self.text.error(match.start(1), f"';' after {match[1]}")
        if match[1] != ".pragma":
            statements.append((match[1], match.start(1), rest[1]))
        return rest.end()

    # Declarations

    def declaration(self, word: str, what: Any) -> None:
        scope = self.scopes[-1]
        if word == ".reg":
            registers = self.function.registers
            for name, kind in declarations.registers(what):
                unique = self.unique(name)
                self.declare(scope, name, Register(unique))
                registers[unique] = kind
        else:
            self.variables(word[1:], what)
        # What was looked up before the declaration may mean something else after it.
        scope.cache = {}

    def variables(self, space: str, text: str) -> None:
        if space not in _SPACES:
            raise Expected(f"a directive that function bodies have instead of .{space}")
        for variable in declarations.variables(space, text, "", self.resolve):
            unique = self.unique(variable.name)
            self.declare(self.scopes[-1], variable.name, Symbol(unique))
            made = replace(variable, name=unique)
            if space in ("global", "const"):
                self.module.variables[unique] = made
            else:
                self.function.variables.append(made)

    # Instructions

    def instruction(self, match: re.Match[str], source: SourceLine | None) -> None:
        negated, guard_name, opcode, modifiers, text = match.groups()
        key = opcode + modifiers
        name = self.names.get(key)
        if name is None:
            words = tuple(m.strip() for m in modifiers.split(".")[1:])
            name = self.names[key] = (opcode, words)
        cache = self.scopes[-1].cache
        operands: tuple[Operand, ...] = ()
        try:
            if opcode == "call":
                operands = self.call(text or "")
            elif text is None:
                pass
            elif "[" not in text and "{" not in text and "(" not in text:
                operands = tuple(
                    cache.get(part) or self.operands.one(part, cache)
                    for part in map(str.strip, text.split(","))
                )
            else:
                operands = self.operands.all(text, cache)
            if opcode in ("bra", "brx"):
                self.check_branch(opcode, operands)
            guard = None
            if guard_name is not None:
                register = self.find(guard_name)
                if not isinstance(register, Register):
                    raise Expected(f"a predicate register instead of {guard_name!r}")
                guard = Guard(register.name, bool(negated))
        except Expected as problem:
            raise self.error(match, problem) from None
        start = match.start(3) if guard is None else match.start(0)
        self.function.instructions.append(
            Instruction(
                *name,
                operands,
                guard,
                self.text.line(match.start(3)),
                source,
                " ".join(self.clean[start : match.end()].split()),
                len(self.function.instructions),
            )
        )

    def check_branch(self, opcode: str, operands: tuple[Operand, ...]) -> None:
        if len(operands) != (1 if opcode == "bra" else 2):
            raise Expected("a label" if opcode == "bra" else "an index and a list of targets")
        target = operands[-1]
        known = self.labels if opcode == "bra" else self.tables
        if not isinstance(target, Symbol) or target.name not in known:
            raise Expected(f"a {'label' if opcode == 'bra' else 'name of .branchtargets'} to go to")

    def call(self, text: str) -> tuple[Operand, ...]:
        """Function, returns, arguments and prototype. PTX ISA "Control Flow Instructions: call"."""
        parts = split(text)
        returns: tuple[Operand, ...] = ()
        arguments: tuple[Operand, ...] = ()
        if parts[0].startswith("("):
            returns = self.call_list(parts.pop(0))
        if not parts:
            raise Expected("the function to call")
        function = self.call_operand(parts.pop(0))
        if not isinstance(function, (Symbol, Register)):
            raise Expected("a function or a register that holds its address")
        if parts and parts[0].startswith("("):
            arguments = self.call_list(parts.pop(0))
        if len(parts) > 1:
            raise Expected(f"';' instead of {parts[1]!r}")
        prototype = [self.call_operand(part) for part in parts]
        return (function, Vector(returns), Vector(arguments), *prototype)

    def call_list(self, text: str) -> tuple[Operand, ...]:
        if not text.endswith(")"):
            raise Expected("')'")
        inner = text[1:-1]
        if not inner.strip():
            return ()
        return tuple(self.call_operand(part) for part in split(inner))

    def call_operand(self, text: str) -> Operand:
        cache = self.scopes[-1].cache
        return cache.get(text) or self.operands.one(text, cache)

    def error(self, match: re.Match[str], problem: Expected) -> PTXSyntaxError:
        """The error for an operand, or for a semicolon that is missing at the end of its line."""
        line, newline, _ = (match[5] or "").partition("\n")
        if newline and not line.rstrip().endswith((",", "(", "[", "{", "|", "+")):
            return self.text.error(match.start(3), "';' at the end of this line")
        return self.text.error(match.start(3), str(problem))
