"""Copies, packing, and bytes in another order. PTX ISA "mov" and "prmt".

The code generator gives `mov` the address of a variable, or the value of a special register, as its
source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cumla.sim.isa.forms import literal, only_type, unsupported
from cumla.sim.isa.table import DTYPES, Env, Op, Unsupported, instruction
from cumla.sim.isa.values import constant, parts, unsigned
from cumla.sim.ptx.syntax import Instruction, Vector


@instruction("mov")
def mov(ins: Instruction, env: Env) -> Op:
    """mov.type d, a; mov.b16, .b32 and .b64 of {...} to a register or back."""
    kind = only_type(ins, *DTYPES)
    to, source = ins.operands[:2]
    if isinstance(source, Vector):
        return _pack(ins, kind, len(source.items))
    if isinstance(to, Vector):
        return _unpack(ins, kind, len(to.items))
    kind = unsigned(kind)
    return Op(lambda a: a, (kind,), (kind,))


def _part(ins: Instruction, kind: str, count: int) -> str:
    width = DTYPES[kind].itemsize * 8 // count
    if kind not in ("b16", "b32", "b64") or count not in (2, 4) or width < 8:
        raise Unsupported(f"{count} parts of .{kind}")
    return f"b{width}"


def _pack(ins: Instruction, kind: str, count: int) -> Op:
    part = _part(ins, kind, count)
    dtype, small = DTYPES[kind], DTYPES[part]
    if count == 2 and kind != "b64":
        shift = constant(8 * small.itemsize, kind)
        return Op(
            lambda low, high: low.astype(dtype) | (high.astype(dtype) << shift),
            (part, part),
            (kind,),
        )

    def run(*elements: Any) -> Any:
        joined = np.empty((max([e.size for e in elements]), count), small)
        for i, element in enumerate(elements):
            joined[:, i] = element
        return joined.view(dtype).reshape(-1)

    return Op(run, (part,) * count, (kind,))


def _unpack(ins: Instruction, kind: str, count: int) -> Op:
    part = _part(ins, kind, count)
    small = DTYPES[part]

    def run(a: Any) -> tuple[Any, ...]:
        split = parts(a, small)
        return tuple(split[:, i].copy() for i in range(count))

    return Op(run, (kind,), (part,) * count)


# PTX ISA "prmt": for each mode the four selectors that c[1:0] chooses from.
PRMT_MODES = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


@instruction("prmt")
def prmt(ins: Instruction, env: Env) -> Op:
    """prmt.b32{.f4e,.b4e,.rc8,.ecl,.ecr,.rc16} d, a, b, c."""
    modes = [m for m in ins.modifiers if m != "b32"]
    if len(ins.modifiers) != len(modes) + 1 or len(modes) > 1 or not PRMT_MODES.keys() >= {*modes}:
        raise unsupported(ins)
    selector = literal(ins.operands[3])
    if selector is None:
        run = _permute_by_register
        if modes:
            table, low2 = np.array(PRMT_MODES[modes[0]], np.uint32), constant(3, "u32")
            return Op(lambda a, b, c: run(a, b, table[c & low2]), ("b32",) * 3, ("b32",))
        return Op(run, ("b32",) * 3, ("b32",))
    if modes:
        selector = PRMT_MODES[modes[0]][selector & 3]
    zeros = tuple(literal(operand) == 0 for operand in ins.operands[1:3])
    return Op(_permute(selector, zeros), ("b32",) * 3, ("b32",))


def _permute(selector: int, zeros: tuple[bool, ...]) -> Callable[..., Any]:
    """The function for a constant selector; `zeros` says which of a and b are the literal 0."""
    shifted: dict[tuple[str, int], int] = {}  # (source, bits to the left) -> mask of the result
    spread: dict[tuple[str, int], int] = {}  # (source, first bit) -> factor for a single byte
    signs: dict[tuple[str, int], int] = {}  # (source, its bit) -> mask of the result
    chosen = [selector >> 4 * i & 15 for i in range(4)]
    for i, choice in enumerate(chosen):
        source, byte = "ab"[choice >> 2 & 1], choice & 3
        if zeros[choice >> 2 & 1]:
            continue
        if choice & 8:
            key = source, 8 * byte + 7
            signs[key] = signs.get(key, 0) | 255 << 8 * i
        elif chosen.count(choice) > 2:
            key = source, 8 * byte
            spread[key] = spread.get(key, 0) | 1 << 8 * i
        else:
            key = source, 8 * (i - byte)
            shifted[key] = shifted.get(key, 0) | 255 << 8 * i
    if chosen in ([3, 2, 1, 0], [7, 6, 5, 4]) and not any(zeros):
        return eval(f"lambda a, b, c: {'ab'[chosen[0] >> 2]}.byteswap()")

    constants: dict[str, Any] = {}

    def name(value: int) -> str:
        constants[f"k{value}"] = constant(value, "u32")
        return f"k{value}"

    def down(source: str, bit: int) -> str:
        return f"({source} >> {name(bit)})" if bit else source

    terms = []
    for (source, up), mask in shifted.items():
        text = source
        if up:
            text = f"({source} {'<<' if up > 0 else '>>'} {name(abs(up))})"
        remains = 0xFFFFFFFF << up if up > 0 else 0xFFFFFFFF >> -up
        terms.append(text if mask == remains & 0xFFFFFFFF else f"({text} & {name(mask)})")
    for (source, bit), factor in spread.items():
        terms.append(f"(({down(source, bit)} & {name(255)}) * {name(factor)})")
    for (source, bit), mask in signs.items():
        terms.append(f"(({down(source, bit)} & {name(1)}) * {name(mask)})")
    return eval(f"lambda a, b, c: {' | '.join(terms) or 'a ^ a'}", constants)


SEVEN, THREE, THIRTY_TWO = constant(7, "u32"), constant(3, "u32"), constant(32, "u64")
NIBBLES = [constant(shift, "u32") for shift in (0, 4, 8, 12)]


def _permute_by_register(a: Any, b: Any, c: Any) -> Any:
    both = b.astype(np.uint64) << THIRTY_TWO | a
    result = np.empty((max(both.size, c.size), 4), np.uint8)
    for i, nibble in enumerate(NIBBLES):
        choice = c >> nibble
        byte = (both >> ((choice & SEVEN) << THREE)).astype(np.uint8)
        if (choice & 8).any():
            sign = (byte.view(np.int8) >> 7).view(np.uint8)
            byte = np.where(choice & 8, sign, byte)
        result[:, i] = byte
    return result.view(np.uint32).reshape(-1)
