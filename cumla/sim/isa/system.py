"""Calls of functions that the CUDA runtime provides: printf and assert.

CUDA C Programming Guide, "Formatted Output": `vprintf(format, arguments)` gets two generic
pointers; the arguments lie one behind the other, each aligned to its size, floats as doubles.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from cumla.sim.cohort import Cohort
from cumla.sim.errors import KernelAssert
from cumla.sim.isa.table import Env, Op, Unsupported, instruction
from cumla.sim.memory.access import reader
from cumla.sim.ptx.syntax import Instruction, Symbol, Vector

CONVERSION = re.compile(
    r"%([-+ #0]*)(\*|\d+)?(?:\.(\*|\d+))?(hh|h|ll|l|z|j|t)?([diouxXcsfFeEgGaAp%])"
)


@instruction("call")
def call(ins: Instruction, env: Env) -> Op:
    """call (ret), vprintf, (format, arguments) and call __assertfail, (...)."""
    target = ins.operands[0]
    assert isinstance(target, Symbol)
    if target.name == "vprintf":
        return _with_memory(ins, env, _printf)
    if target.name == "__assertfail":
        return _with_memory(ins, env, _assert)
    raise Unsupported(f"function {target.name}")


Read = Callable[[int, Any], Any]


def _with_memory(
    ins: Instruction, env: Env, act: Callable[[Instruction, Cohort, Callable[..., Any], Any], None]
) -> Op:
    """An Op that gives `act` the addresses of the call's parameters, in local memory."""
    parameters = [p for o in ins.operands[1:] if isinstance(o, Vector) for p in o.items]
    reads = {w: reader(ins, env, "generic", np.dtype(f"u{w}"), hooks=False) for w in (1, 4, 8)}
    local = {w: reader(ins, env, "local", np.dtype(f"u{w}"), hooks=False) for w in (4, 8)}
    count = len(parameters)

    def run(c: Cohort, target: Any, *addresses: Any) -> None:
        act(ins, c, lambda space, width: (local if space == "local" else reads)[width], addresses)

    return Op(run, ("s64",) + ("addr",) * count, cohort=True)


def _text(read: Any, c: Cohort, address: int) -> str:
    characters = bytearray()
    while True:
        (value,) = read(c, np.array([address + len(characters)], np.int64))
        byte = int(value.reshape(-1)[0])
        if byte == 0:
            return characters.decode(errors="replace")
        characters.append(byte)


def _printf(ins: Instruction, c: Cohort, reads: Any, addresses: Any) -> None:
    # The last two parameters; a first one is where the result goes.
    pointers = [reads("local", 8)(c, a)[0] for a in addresses[-2:]]
    formats, arguments = (c.full(p).view(np.int64) for p in pointers)
    for lane in range(c.n):
        one = c.subset(np.arange(c.n) == lane)
        text = _text(reads("generic", 1), one, int(formats[lane]))
        c.wave.printed.append(_format(text, one, reads, int(arguments[lane])))


def _format(text: str, c: Cohort, reads: Any, address: int) -> str:
    def take(width: int) -> int:
        nonlocal address
        address = -(-address // width) * width
        (value,) = reads("generic", width)(c, np.array([address], np.int64))
        address += width
        return int(value.reshape(-1)[0])

    def signed(width: int) -> int:
        value = take(width)
        return value - (1 << (8 * width)) if value >> (8 * width - 1) else value

    def replace(match: re.Match[str]) -> str:
        flags, width, precision, size, kind = match.groups()
        if kind == "%":
            return "%"
        width = str(signed(4)) if width == "*" else width or ""
        precision = str(signed(4)) if precision == "*" else precision
        form = f"%{flags}{width}" + ("" if precision is None else f".{precision}")
        wide = 8 if size in ("l", "ll", "z", "j", "t") else 4
        if kind in "di":
            return (form + "d") % signed(wide)
        if kind in "ouxX":
            return (form + kind.replace("u", "d")) % take(wide)
        if kind == "c":
            return (form + "c") % chr(take(4) & 0xFF)
        if kind == "s":
            return (form + "s") % _text(reads("generic", 1), c, take(8))
        if kind == "p":
            return (form + "s") % hex(take(8))
        value = float(np.array([take(8)], np.uint64).view(np.float64)[0])
        if kind in "aA":
            return value.hex()
        return (form + kind) % value

    return CONVERSION.sub(replace, text)


def _assert(ins: Instruction, c: Cohort, reads: Any, addresses: Any) -> None:
    # void __assertfail(const char *message, const char *file, unsigned line,
    #                   const char *function, size_t charSize)
    one = c.subset(np.arange(c.n) == 0)
    pointers = []
    for number, width in ((0, 8), (1, 8), (2, 4), (3, 8)):
        (value,) = reads("local", width)(one, addresses[number])
        pointers.append(int(value.reshape(-1)[0]))
    read = reads("generic", 1)
    message, file, function = (_text(read, one, pointers[i]) for i in (0, 1, 3))
    raise KernelAssert(
        f"assertion `{message}` failed, {file}:{pointers[2]}, {function}",
        c.wave.where(ins, int(c.gids[0])),
    )
