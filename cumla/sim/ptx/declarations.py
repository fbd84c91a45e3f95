"""Declarations: variables with their initialisers, parameters, registers.

PTX ISA "State Spaces, Types, and Variables".
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Union

from cumla.sim.ptx.constants import immediate, integer
from cumla.sim.ptx.lexer import NAME, Expected, split
from cumla.sim.ptx.syntax import Variable

TYPE_BYTES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bsu" for bits in (8, 16, 32, 64)},
    "b128": 16,
    "f16": 2,
    "bf16": 2,
    "f16x2": 4,
    "bf16x2": 4,
    "f32": 4,
    "f64": 8,
    # Opaque handles; PTX ISA "Texture Sampler and Surface Types".
    "texref": 8,
    "samplerref": 8,
    "surfref": 8,
}
REGISTER_TYPES = frozenset({"pred", *TYPE_BYTES})
_OPAQUE = frozenset({"texref", "samplerref", "surfref"})
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
COMPONENTS = ("x", "y", "z", "w")

# So that a damaged count does not fill the memory.
_MOST_REGISTERS = 1 << 20

_WORD = re.compile(r"\s*\.(\w+)")
_NUMBER = re.compile(r"\s*(\d+)")
_ATTRIBUTE = re.compile(r"\s*\((?:[^()]|\([^()]*\))*\)")
_DECLARATOR = re.compile(
    rf"(?P<name>{NAME}|_)?\s*(?P<dims>(?:\[[^\]]*\]\s*)*)(?:=\s*(?P<initial>.+))?", re.DOTALL
)
_REGISTER = re.compile(rf"({NAME})\s*(?:<\s*(\d+)\s*>)?")
_MASK = re.compile(r"0[xX]([fF]{2}(?:00){0,7})\s*\((.*)\)", re.DOTALL)
_GENERIC = re.compile(rf"generic\s*\(\s*({NAME})\s*\)\s*([+-].*)?", re.DOTALL)
_SYMBOL = re.compile(rf"({NAME})\s*([+-].*)?", re.DOTALL)
_DECIMALS = re.compile(r"-?\d+(?:,-?\d+)*")
_OCTAL = re.compile(r"\b0\d")

# An initialiser: nested braces with the texts of its elements.
Tree = Union[str, "list[Tree]"]
# How a symbol in an initialiser is called in the module; raises Expected if it is not declared.
Resolve = Callable[[str], str]


@dataclass(slots=True)
class _Type:
    """What stands before the names: type, vector length, alignment, `.ptr`."""

    type: str = ""
    vector: int = 1
    align: int = 0
    pointer: tuple[str, int] | None = None


def _type(text: str) -> tuple[_Type, str]:
    """The type words at the start of a declaration, and what follows them."""
    made = _Type()
    at = 0
    while (match := _WORD.match(text, at)) is not None:
        word, at = match[1], match.end()
        if word == "align":
            number = _NUMBER.match(text, at)
            if number is None or int(number[1]).bit_count() != 1:
                raise Expected("a power of two after .align")
            at = number.end()
            if made.pointer is not None:
                made.pointer = (made.pointer[0], int(number[1]))
            else:
                made.align = int(number[1])
        elif word == "attribute":
            arguments = _ATTRIBUTE.match(text, at)
            if arguments is None:
                raise Expected("'(' after .attribute")
            at = arguments.end()
        elif word in _VECTORS and made.vector == 1:
            made.vector = _VECTORS[word]
        elif word == "ptr":
            # PTX ISA "Kernel Parameter Attribute: .ptr": 4 bytes unless said otherwise.
            made.pointer = ("generic", 4)
        elif made.pointer is not None and word in ("global", "const", "local", "shared"):
            made.pointer = (word, made.pointer[1])
        elif word in REGISTER_TYPES and not made.type:
            made.type = word
        else:
            raise Expected(f"a type instead of .{word}")
    if not made.type:
        raise Expected("a type such as .b32")
    return made, text[at:].strip()


def registers(text: str) -> list[tuple[str, str]]:
    """(name, type) of what `.reg` declares; a vector register is its components, `v.x`, `v.y`."""
    kind, rest = _type(text)
    found: list[tuple[str, str]] = []
    for part in split(rest):
        match = _REGISTER.fullmatch(part)
        if match is None:
            raise Expected(f"a register name instead of {part!r}")
        name, count = match[1], match[2]
        if count is not None and int(count) > _MOST_REGISTERS:
            raise Expected(f"at most {_MOST_REGISTERS} registers instead of {count}")
        names = [name] if count is None else [f"{name}{i}" for i in range(int(count))]
        if kind.vector > 1:
            names = [f"{n}.{c}" for n in names for c in COMPONENTS[: kind.vector]]
        found.extend((n, kind.type) for n in names)
    return found


def variables(space: str, text: str, linkage: str, resolve: Resolve) -> list[Variable]:
    """What a statement like `.shared .align 4 .b32 a[4], b;` declares; `text` follows the space."""
    kind, rest = _type(text)
    if kind.type == "pred":
        raise Expected("a type that memory can hold instead of .pred")
    return [_variable(space, kind, part, linkage, resolve) for part in split(rest)]


def parameters(text: str, resolve: Resolve) -> list[Variable]:
    """A list of `.param` and `.reg` declarations, as functions and prototypes have them."""
    if not text.strip():
        return []
    found = []
    for part in split(text):
        match = _WORD.match(part)
        if match is None or match[1] not in ("param", "reg"):
            raise Expected(f"'.param' or '.reg' instead of {part!r}")
        kind, rest = _type(part[match.end() :])
        if match[1] == "reg":
            if re.fullmatch(NAME, rest) is None:
                raise Expected(f"a register name instead of {rest!r}")
            found.append(Variable(rest, "reg", kind.type, 1, TYPE_BYTES.get(kind.type, 1)))
        else:
            found.append(_variable("param", kind, rest, "", resolve))
    return found


def _variable(space: str, kind: _Type, text: str, linkage: str, resolve: Resolve) -> Variable:
    match = _DECLARATOR.fullmatch(text)
    if match is None or (match["name"] is None and space != "param"):
        raise Expected(f"a variable name instead of {text!r}")
    element = TYPE_BYTES[kind.type]
    dims: list[int | None] = []
    for size in re.findall(r"\[([^\]]*)\]", match["dims"]):
        if not size.strip() and dims:
            raise Expected("a size for every dimension but the first")
        dims.append(integer(size) if size.strip() else None)
        if (dims[-1] or 0) < 0:
            raise Expected("a size that is not negative")
    if kind.vector > 1:
        dims.append(kind.vector)
    initial = None
    addresses: tuple[tuple[int, int, str, int, bool], ...] = ()
    if match["initial"] is not None and kind.type not in _OPAQUE:
        if space not in ("global", "const"):
            raise Expected("no initial value: only .global and .const variables have one")
        tree = _braces(match["initial"].strip())
        if dims and dims[0] is None:
            dims[0] = len(tree) if isinstance(tree, list) else 0
        image = _Image(kind.type, element, resolve)
        image.add(_values(tree, dims, kind.vector))
        initial, addresses = bytes(image.data), tuple(image.addresses)
    size = element * math.prod(d or 0 for d in dims)
    align = kind.align or element * kind.vector
    return Variable(
        match["name"] or "_",
        space,
        kind.type,
        align,
        size,
        initial,
        addresses,
        linkage,
        kind.pointer,
    )


def _braces(text: str) -> Tree:
    """`{a, {b, c}}` as nested lists of texts."""
    if not text.startswith("{"):
        return text
    if not text.endswith("}"):
        raise Expected("'}' at the end of the initial value")
    inner = text[1:-1]
    if "{" not in inner and "(" not in inner:
        return [part.strip() for part in inner.split(",")] if inner.strip() else []
    return [_braces(part) for part in split(inner)]


def _values(tree: Tree, dims: list[int | None], vector: int) -> list[str]:
    """The elements of an initialiser in order; as in ptxas, a short row leaves no gap."""
    if not dims:
        if isinstance(tree, list):
            raise Expected("a value instead of '{'")
        return [tree]
    if not isinstance(tree, list):
        raise Expected(f"'{{' before {tree!r}")
    if len(tree) > (dims[0] or 0):
        raise Expected(f"at most {dims[0]} values instead of {len(tree)}")
    if len(dims) == 1 and vector > 1 and len(tree) != vector:
        raise Expected(f"{vector} values for a vector instead of {len(tree)}")
    return [value for item in tree for value in _values(item, dims[1:], vector)]


@dataclass(slots=True)
class _Image:
    """The bytes of an initialiser and the addresses in it."""

    type: str
    width: int
    resolve: Resolve
    data: bytearray = field(default_factory=bytearray)
    addresses: list[tuple[int, int, str, int, bool]] = field(default_factory=list)

    def add(self, values: list[str]) -> None:
        # Large tables are plain decimal numbers.
        text = ",".join(values)
        if self.type[0] in "bsu" and _DECIMALS.fullmatch(text) and not _OCTAL.search(text):
            modulus = 1 << 8 * self.width
            self.data += b"".join(
                (int(value) % modulus).to_bytes(self.width, "little") for value in values
            )
            return
        for value in values:
            self.element(value)

    def element(self, text: str) -> None:
        mask = _MASK.fullmatch(text)
        byte = None
        if mask is not None:
            byte, text = len(mask[1]) // 2 - 1, mask[2].strip()
        match = _GENERIC.fullmatch(text)
        generic = match is not None
        if match is None:
            match = _SYMBOL.fullmatch(text)
        if match is not None and match[1] != "WARP_SZ":
            addend = integer(match[2]) if match[2] else 0
            self.address(self.resolve(match[1]), addend, generic, byte)
        elif byte is not None:
            self.data += bytes([integer(text) >> 8 * byte & 0xFF]).ljust(self.width, b"\0")
        else:
            self.data += self.number(text)

    def address(self, name: str, addend: int, generic: bool, byte: int | None) -> None:
        at = len(self.data)
        self.data += bytes(self.width)
        if byte is None:
            if self.type not in ("b32", "u32", "s32", "b64", "u64", "s64"):
                raise Expected(f"a variable of type .u32 or .u64 for the address of {name}")
            self.addresses.append((at, self.width, name, addend, generic))
            return
        if self.width != 1:
            raise Expected("a .b8 variable for single bytes of an address")
        # `0xFF(x), 0xFF00(x), ...`: the bytes of an address, joined into one entry.
        if byte == 0:
            self.addresses.append((at, 1, name, addend, generic))
        elif self.addresses and self.addresses[-1] == (at - byte, byte, name, addend, generic):
            self.addresses[-1] = (at - byte, byte + 1, name, addend, generic)
        else:
            raise Expected(f"the bytes of the address of {name} in order, from 0xFF on")

    def number(self, text: str) -> bytes:
        literal = immediate(text)
        value = literal.value
        if self.type in ("f16", "f16x2", "bf16", "bf16x2"):
            raise Expected(f"no initial value for a variable of type .{self.type}")
        if isinstance(value, int):
            if self.type[0] == "f":
                raise Expected(f"a floating-point number instead of {text!r}")
            return (value % (1 << 8 * self.width)).to_bytes(self.width, "little")
        if self.type not in ("f32", "b32", "f64", "b64"):
            raise Expected(f"an integer instead of {text!r}")
        if literal.single_bits is not None:
            # As in ptxas, a 0f literal is bits, of a wider variable too.
            return struct.pack("<I", literal.single_bits).ljust(self.width, b"\0")
        if self.width == 8:
            if literal.double_bits is not None:
                return struct.pack("<Q", literal.double_bits)
            return struct.pack("<d", value)
        try:
            return struct.pack("<f", value)
        except OverflowError:
            return struct.pack("<f", math.copysign(math.inf, value))
