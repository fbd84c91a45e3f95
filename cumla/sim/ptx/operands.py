"""Operands of instructions. PTX ISA "Instruction Operands"."""

from __future__ import annotations

import re
from collections.abc import Callable

from cumla.sim.ptx.constants import WARP_SIZE, immediate, integer
from cumla.sim.ptx.lexer import NAME, ONE_OR_MORE, Expected, split
from cumla.sim.ptx.syntax import (
    Address,
    Immediate,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    Symbol,
    Vector,
)

_DECIMAL = re.compile(r"-?(?:[1-9]\d{0,17}|0)")
_NAMED = re.compile(rf"({NAME})(?:\.(\w+))?")
_NAME_AND_REST = re.compile(rf"({NAME})((?:\.\w+)?)\s*([+-].*)?", re.DOTALL)
_PAIR = re.compile(rf"({NAME}|_)\s*\|\s*({NAME}|_)")
_SUBSCRIPT = re.compile(rf"({NAME})\s*\[[^\]]*\]")
_NOT = re.compile(rf"!\s*({NAME})")
# PTX ISA "Special Registers": nothing declares these.
_SPECIAL = re.compile(
    r"%(?:n?tid|laneid|n?warpid|n?ctaid|n?smid|gridid|is_explicit_cluster|n?clusterid"
    r"|cluster_n?cta(?:id|rank)|lanemask_(?:eq|le|lt|ge|gt)|clock(?:_hi|64)?|pm[0-7](?:_64)?"
    r"|envreg\d+|globaltimer(?:_lo|_hi)?|reserved_smem_offset_(?:begin|end|cap|[01])"
    r"|(?:total|aggr|dynamic)_smem_size|current_graph_exec)"
)
_SAME_COMPONENT = {"r": "x", "g": "y", "b": "z", "a": "w"}
_SINK = Sink()


class OperandParser:
    """Turns the texts of operands into operands.

    Args:
        find: what a name stands for where the operand is, or None.
    """

    def __init__(self, find: Callable[[str], Operand | None]) -> None:
        self.find = find

    def all(self, text: str, cache: dict[str, Operand]) -> tuple[Operand, ...]:
        """The operands of an instruction; `cache` knows those that have been seen here."""
        found: list[Operand] = []
        for part in split(text):
            known = cache.get(part)
            if known is not None:
                found.append(known)
            elif part[0] == "[":
                found.extend(self.bracket(part, cache))
            else:
                found.append(self.one(part, cache))
        return tuple(found)

    def one(self, text: str, cache: dict[str, Operand]) -> Operand:
        """A single operand."""
        made = cache[text] = self.make(text, cache)
        return made

    def make(self, text: str, cache: dict[str, Operand]) -> Operand:
        if (found := self.find(text)) is not None:
            return found
        if not text:
            raise Expected(ONE_OR_MORE)
        if _DECIMAL.fullmatch(text):
            return Immediate(int(text))
        if text[:1] == "{":
            if text[-1] != "}":
                raise Expected(f"'}}' at the end of {text!r}")
            return Vector(
                tuple(cache.get(part) or self.one(part, cache) for part in split(text[1:-1]))
            )
        if text == "_":
            return _SINK
        if (match := _NAMED.fullmatch(text)) is not None:
            return self.named(match[1], match[2])
        if (match := _PAIR.fullmatch(text)) is not None:
            pair = [self.one(side, cache) for side in match.groups()]
            if all(isinstance(side, (Register, Sink)) for side in pair):
                return Pair(pair[0], pair[1])
            raise Expected(f"two registers in {text!r}")
        if (match := _NOT.fullmatch(text)) is not None:
            inner = self.named(match[1], None)
            if isinstance(inner, Register):
                return Negated(inner)
        if (match := _NAME_AND_REST.fullmatch(text)) is not None and match[3]:
            inner = self.named(match[1], None)
            if isinstance(inner, Symbol):
                return Symbol(inner.name, integer(match[3]))
        if (match := _SUBSCRIPT.fullmatch(text)) is not None:
            raise Expected(f"an address such as [{match[1]}+8] instead of {text!r}")
        return immediate(text)

    def named(self, name: str, component: str | None) -> Operand:
        if name == "WARP_SZ" and component is None:
            return Immediate(WARP_SIZE)
        if component is not None:
            component = _SAME_COMPONENT.get(component, component)
            whole = self.find(f"{name}.{component}")
            if whole is not None:
                return whole
            base = self.find(name)
            if isinstance(base, Register):
                # A part of a register: `.b0` or `.h1` of video instructions.
                return Register(f"{base.name}.{component}")
            if _SPECIAL.fullmatch(name):
                return Register(f"{name}.{component}")
            raise Expected(f"a declared name instead of {name!r}")
        found = self.find(name)
        if found is not None:
            return found
        if (found := self.find(f"{name}.x")) is not None:
            parts = [self.find(f"{name}.{c}") for c in "xyzw"]
            return Vector(tuple(p for p in parts if p is not None))
        if _SPECIAL.fullmatch(name):
            return Register(name)
        raise Expected(f"a declared name instead of {name!r}")

    def bracket(self, text: str, cache: dict[str, Operand]) -> list[Operand]:
        """`[address]`, or `[map, {x, y}]`: the address, and the coordinates as an operand."""
        if text[-1] != "]":
            raise Expected(f"']' at the end of {text!r}")
        first, *others = split(text[1:-1])
        address = self.address(first)
        if not others:
            cache[text] = address
        return [address, *(cache.get(o) or self.one(o, cache) for o in others)]

    def address(self, text: str) -> Address:
        match = _NAME_AND_REST.fullmatch(text)
        if match is None or match[1] == "WARP_SZ":
            return Address(None, integer(text))
        base = self.named(match[1], match[2][1:] or None)
        if not isinstance(base, (Register, Symbol)):
            raise Expected(f"a register or a variable instead of {match[1]!r}")
        return Address(base, integer(match[3]) if match[3] else 0)
