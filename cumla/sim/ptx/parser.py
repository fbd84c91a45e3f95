"""PTX text to a `Module`."""

from __future__ import annotations

import re
from dataclasses import replace

from cumla.sim.ptx import declarations
from cumla.sim.ptx.body import BodyParser
from cumla.sim.ptx.lexer import (
    DIRECTIVE,
    FILE,
    LOC,
    NAME,
    QUOTED,
    REST,
    SECTION,
    Expected,
    Text,
    split,
)
from cumla.sim.ptx.sources import Sources
from cumla.sim.ptx.syntax import Function, Module, Variable

LINKAGES = frozenset({"extern", "visible", "weak", "common"})
SPACES = frozenset({"global", "const", "shared", "local"})
# Directives between the parameters of a function and its body.
_PERFORMANCE = frozenset(
    {
        "maxntid",
        "reqntid",
        "minnctapersm",
        "maxnctapersm",
        "maxnreg",
        "reqnctapercluster",
        "explicitcluster",
        "maxclusterrank",
        "blocksareclusters",
        "noreturn",
        "abi_preserve",
        "abi_preserve_control",
    }
)

_VERSION = re.compile(r"\s*(\d+)\.(\d+)")
_TARGET = re.compile(r"\s*(\w+)((?:\s*,\s*\w+)*)")
_SM = re.compile(r"sm_\d+[af]?")
_NUMBER = re.compile(r"\s*(\d+)")
_NAME = re.compile(rf"\s*({NAME})")
_GROUP = re.compile(r"\s*\(((?:[^()]|\([^()]*\))*)\)")
_NUMBERS = re.compile(r"\s*(\d+(?:\s*,\s*\d+)*)?")
_PRAGMA = re.compile(rf"\s*{QUOTED}(?:\s*,\s*{QUOTED})*\s*;?")


def parse(text: str) -> Module:
    """The parts of a PTX module.

    Raises:
        PTXSyntaxError: the text is not PTX; the message has the line and what was expected there.
    """
    return _Parser(Text(text)).module()


class _Parser:
    def __init__(self, text: Text) -> None:
        self.text = text
        self.clean = text.clean
        self.at = 0
        self.sources = Sources(text)

    def expect(self, pattern: re.Pattern[str], what: str) -> re.Match[str]:
        """Go past a match, or raise that `what` was expected."""
        match = pattern.match(self.clean, self.at)
        if match is None:
            raise self.text.error(self.text.skip_space(self.at), what)
        self.at = match.end()
        return match

    def accept(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self.clean, self.at)
        if match is not None:
            self.at = match.end()
        return match

    def directive(self, what: str) -> tuple[int, str]:
        """The next directive, without its dot, and where it stands."""
        match = self.expect(DIRECTIVE, what)
        return match.start(1), match[1][1:]

    def module(self) -> Module:
        at, word = self.directive("'.version'")
        if word != "version":
            raise self.text.error(at, "'.version' first")
        version = self.expect(_VERSION, "a version such as 8.7")
        at, word = self.directive("'.target'")
        if word != "target":
            raise self.text.error(at, "'.target' after '.version'")
        target = self.expect(_TARGET, "a target such as sm_90a")
        if _SM.fullmatch(target[1]) is None:
            raise self.text.error(target.start(1), "a target such as sm_90a")
        self.made = Module((int(version[1]), int(version[2])), target[1], 64)
        self.made.files = self.sources.files
        while (start := self.text.skip_space(self.at)) < len(self.clean):
            self.at = start
            self.statement()
        return self.made

    def statement(self) -> None:
        """One directive at module scope."""
        for pattern in (SECTION, FILE, LOC):
            if self.accept(pattern):
                return
        at, word = self.directive("a directive")
        linkage = ""
        if word in LINKAGES:
            linkage = word
            at, word = self.directive("a directive after the linkage")
        if word in ("func", "entry"):
            self.function(at, word == "entry", linkage)
        elif word in SPACES:
            self.variables(at, word, linkage)
        elif word == "address_size":
            self.made.address_size = int(self.expect(_NUMBER, "32 or 64")[1])
        elif word == "pragma":
            self.expect(_PRAGMA, "a string")
        elif word == "alias":
            self.alias(at)
        else:
            raise self.text.error(at, f"a directive that PTX has instead of '.{word}'")

    def variables(self, at: int, space: str, linkage: str) -> None:
        rest = self.expect(REST, f"';' at the end of this .{space} variable")
        try:
            found = declarations.variables(space, rest[1], linkage, self.resolve)
        except Expected as problem:
            raise self.text.error(at, str(problem)) from None
        for variable in found:
            self.declare(at, variable)

    def declare(self, at: int, variable: Variable) -> None:
        """Add a module variable; a definition takes the place of an extern declaration."""
        known = self.made.variables.get(variable.name)
        if variable.name in self.made.functions or (
            known is not None
            and known.linkage not in ("extern", "common")
            and variable.linkage != "extern"
        ):
            raise self.text.error(at, f"a new name: {variable.name} is declared already")
        if known is None or variable.linkage != "extern":
            self.made.variables[variable.name] = variable

    def resolve(self, name: str) -> str:
        if name in self.made.variables or name in self.made.functions:
            return name
        raise Expected(f"a declared name instead of {name!r}")

    def alias(self, at: int) -> None:
        rest = self.expect(REST, "';'")
        names = [n.strip() for n in rest[1].split(",")]
        if len(names) != 2 or names[1] not in self.made.functions:
            raise self.text.error(at, "two names, the second of a function")
        self.made.functions[names[0]] = replace(self.made.functions[names[1]], name=names[0])

    def function(self, at: int, entry: bool, linkage: str) -> None:
        if self.clean.startswith(".attribute", self.text.skip_space(self.at)):
            self.directive("")
            self.expect(_GROUP, "'(' after .attribute")
        returns = None if entry else self.accept(_GROUP)
        name = self.expect(_NAME, "the name of a function")[1]
        given = self.accept(_GROUP)
        made = Function(name, entry, linkage)
        try:
            made.returns = self.parameters(returns)
            made.parameters = self.parameters(given)
        except Expected as problem:
            raise self.text.error(at, str(problem)) from None
        while (start := self.text.skip_space(self.at)) < len(self.clean):
            self.at = start
            if self.clean[start] in "{;":
                break
            self.performance(made)
        else:
            raise self.text.error(start, f"the body of {name}, or ';'")
        known = self.made.functions.get(name)
        if name in self.made.variables or (known is not None and known.entry != entry):
            raise self.text.error(at, f"a new name: {name} is declared already")
        self.at += 1
        if self.clean[start] == ";":
            self.made.functions.setdefault(name, made)
            return
        if known is not None and known.body:
            raise self.text.error(at, f"one body of {name}: it has one already")
        made.body = True
        self.made.functions[name] = made
        self.at = BodyParser(self.text, self.sources, self.made, made).parse(start)

    def parameters(self, match: re.Match[str] | None) -> list[Variable]:
        return [] if match is None else declarations.parameters(match[1], self.resolve)

    def performance(self, function: Function) -> None:
        at, word = self.directive(f"'{{' before the body of {function.name}, or ';'")
        if word == "pragma":
            self.expect(_PRAGMA, "a string")
        elif word in _PERFORMANCE:
            numbers = self.expect(_NUMBERS, "numbers")[1]
            function.directives[word] = tuple(int(n) for n in split(numbers)) if numbers else ()
        else:
            raise self.text.error(at, f"a directive of functions instead of '.{word}'")
