"""ldmatrix, stmatrix and movmatrix: 8 by 8 and 16 by 16 matrices between memory and the registers
of a warp.

A lane gives the address of one row of 16 bytes: lanes 0 to 7 those of the first 8 by 8 matrix, and
so on. Where a lane that should give one has exited, its row is not touched, and reads as zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP, Cohort
from cumla.sim.isa.convergence import waits_for_lanes, whole_warps
from cumla.sim.isa.table import Env, Op, Unsupported, instruction, needs
from cumla.sim.memory.access import reader, writer
from cumla.sim.ptx.syntax import Instruction, Vector

Array = NDArray[Any]
ROW = np.dtype(np.complex128)  # for its size, the 16 bytes of a row
# Whose architecture-specific targets have matrices of elements of one byte and less.
BYTE_TARGETS = (100, 103, 120, 121)
# (addressing lanes, their addresses) -> rows, 16 bytes each
Fetch = Callable[[Cohort, Array], Array]


@dataclass(frozen=True, slots=True)
class _Form:
    """The words of an instruction.

    Attributes:
        matrices: how many.
        rows: of a matrix.
        kind: element type, or "b8x16.b4x16_p64" and the like.
    """

    shape: str
    matrices: int
    trans: bool
    space: str
    kind: str

    @property
    def rows(self) -> int:
        return 16 if self.shape == "m16n16" else 8


def _parse(ins: Instruction) -> _Form:
    words = list(ins.modifiers)
    number = next((w for w in words if w in ("x1", "x2", "x4")), "")
    spaces = [w for w in words if w in ("shared", "shared::cta")]
    rest = [w for w in words if w not in (number, "trans", *spaces)]
    if rest[:2] != ["sync", "aligned"] or len(rest) < 4 or not number or len(spaces) > 1:
        raise Unsupported(f"form {ins.name!r}")
    space = "shared" if spaces else "generic"
    return _Form(rest[2], int(number[1]), "trans" in words, space, ".".join(rest[3:]))


def _aligned(ins: Instruction, run: Callable[..., Any], sources: Any, results: Any) -> Op:
    return Op(
        run,
        sources,
        results,
        cohort=True,
        ready=whole_warps,
        waits_for=lambda c, *_: waits_for_lanes(ins, c),
        warp_gate=True,
    )


def _demand_registers(ins: Instruction, operand: int, count: int) -> None:
    found = ins.operands[operand] if len(ins.operands) > operand else None
    if isinstance(found, Vector) and len(found.items) != count:
        raise Unsupported(f"{len(found.items)} registers, {count} expected")


# Who gives addresses


def _addressing(c: Cohort, lanes: int, address: Array) -> tuple[Cohort, Array]:
    """The first lanes of each warp, and their addresses."""
    if lanes == WARP:
        return c, address
    one = address.shape[0] == 1
    if c.whole:
        gids = c.gids.reshape(-1, WARP)[:, :lanes].reshape(-1)
        sub = Cohort(c.wave, gids, [], whole=False)
        return sub, address if one else address.reshape(-1, WARP)[:, :lanes].reshape(-1)
    mask = (c.gids & (WARP - 1)) < lanes
    return c.subset(mask), address if one else address[mask]


def _rows_by_warp(c: Cohort, rows: Array, lanes: int) -> Array:
    """Rows of those lanes that are here as [warp, lane]."""
    if c.whole:
        return rows.reshape(-1, lanes)
    padded = np.zeros((c.warps.shape[0], lanes), rows.dtype)
    padded[c.active[:, :lanes]] = rows
    return padded


def _to_lanes(c: Cohort, registers: Array) -> tuple[Array, ...] | Array:
    """[register, warp * 32] as results."""
    each = tuple(registers if c.whole else (c.from_warps(r) for r in registers))
    return each if len(each) > 1 else each[0]


# ldmatrix


@instruction("ldmatrix")
def ldmatrix(ins: Instruction, env: Env) -> Op:
    """ldmatrix.sync.aligned.shape.num{.trans}{.shared{::cta}}.type r, [p].

    Shape and type: m8n8 b16 with num x1, x2, x4; m16n16 b8 with x1, x2 and .trans; m8n16 without
    .trans and m16n16 with it of b8x16.b6x16_p32 and b8x16.b4x16_p64.
    """
    form = _parse(ins)
    wide = form.shape == "m16n16"
    fetches = {
        "b16": _plain_rows,
        "b8": _plain_rows,
        "b8x16.b4x16_p64": _four_bit_rows,
        "b8x16.b6x16_p32": _six_bit_rows,
    }
    kinds = {"m8n8": ("b16",), "m16n16": ("b8", *list(fetches)[2:]), "m8n16": list(fetches)[2:]}
    if (
        form.kind not in kinds.get(form.shape, ())
        or (form.shape != "m8n8" and form.trans != wide)
        or (wide and form.matrices > 2)
    ):
        raise Unsupported(f"form {ins.name!r}")
    if form.shape != "m8n8":
        needs(env, 100, ins, only=BYTE_TARGETS)
    lanes = form.rows * form.matrices
    registers = form.matrices * (2 if wide else 1)
    _demand_registers(ins, 0, registers)
    fetch = fetches[form.kind](ins, env, form.space)

    def run(c: Cohort, address: Array) -> Any:
        sub, address = _addressing(c, lanes, address)
        rows = _rows_by_warp(c, sub.full(fetch(sub, address)), lanes)
        warps = rows.shape[0]
        if wide:
            # Lane 4b + a gets rows 4a to 4a + 3 of columns b and b + 8.
            parts = rows.view(np.uint8).reshape(warps, form.matrices, 4, 4, 2, 8)
            found = np.ascontiguousarray(parts.transpose(1, 4, 0, 5, 2, 3))
        elif form.trans:
            # Lane 4b + a gets rows 2a and 2a + 1 of column b.
            halves = rows.view(np.uint16).reshape(warps, form.matrices, 8, 8)
            found = np.ascontiguousarray(halves.transpose(1, 0, 3, 2))
        else:
            # Lane 4b + a gets the a-th word of row b.
            found = np.ascontiguousarray(rows.reshape(warps, form.matrices, 8).transpose(1, 0, 2))
        return _to_lanes(c, found.reshape(-1).view(np.uint32).reshape(registers, -1))

    return _aligned(ins, run, ("addr",), ("b32",) * registers)


def _plain_rows(ins: Instruction, env: Env, space: str) -> Fetch:
    read = reader(ins, env, space, ROW)

    def fetch(c: Cohort, address: Array) -> Array:
        rows: Array = read(c, address)[0]
        return rows

    return fetch


def _four_bit_rows(ins: Instruction, env: Env, space: str) -> Fetch:
    """16 elements of 4 bits in 8 bytes, each to a byte of its own; 8 bytes of padding follow."""
    read = reader(ins, env, space, np.uint64)
    refuse = reader(ins, env, space, ROW)

    def fetch(c: Cohort, address: Array) -> Array:
        if np.bitwise_or.reduce(address) & 15:
            refuse(c, address)
        packed = read(c, address)[0].view(np.uint8)
        rows = np.empty((packed.shape[0], 2), np.uint8)
        rows[:, 0] = packed & 0xF
        rows[:, 1] = packed >> 4
        return rows.reshape(-1).view(ROW)

    return fetch


def _six_bit_rows(ins: Instruction, env: Env, space: str) -> Fetch:
    """16 elements of 6 bits in 12 bytes, each to a byte of its own; 4 bytes of padding follow."""
    read_first = reader(ins, env, space, np.uint64)
    read_last = reader(ins, env, space, np.uint32)
    refuse = reader(ins, env, space, ROW)

    def fetch(c: Cohort, address: Array) -> Array:
        if np.bitwise_or.reduce(address) & 15:
            refuse(c, address)
        first = read_first(c, address)[0]
        last = read_last(c, address + 8)[0].astype(np.uint64)
        elements = [first >> (6 * i) for i in range(10)]
        elements.append((first >> 60) | (last << 4))
        elements += [last >> (6 * i - 64) for i in range(11, 16)]
        rows = np.stack(elements, axis=-1).astype(np.uint8) & 0x3F
        return rows.reshape(-1).view(ROW)

    return fetch


# stmatrix, movmatrix


@instruction("stmatrix")
def stmatrix(ins: Instruction, env: Env) -> Op:
    """stmatrix.sync.aligned.shape.num{.trans}{.shared{::cta}}.type [p], r.

    Shape and type: m8n8 b16; m16n8 b8 with .trans; num is x1, x2 or x4.
    """
    form = _parse(ins)
    wide = form.shape == "m16n8"
    if (form.shape, form.kind) not in (("m8n8", "b16"), ("m16n8", "b8")):
        raise Unsupported(f"form {ins.name!r}")
    if wide and not form.trans:
        raise Unsupported("stmatrix.m16n8 without .trans")
    if wide:
        needs(env, 100, ins, only=BYTE_TARGETS)
    needs(env, 90, ins)
    matrices = form.matrices
    lanes = 8 * matrices
    _demand_registers(ins, 1, matrices)
    write = writer(ins, env, form.space, ROW)

    def run(c: Cohort, address: Array, *registers: Array) -> None:
        words = np.stack([c.to_warps(r) for r in registers])
        warps = words.shape[1]
        if wide:
            # Lane 4b + a has rows b and b + 8 of columns 2a and 2a + 1; columns become rows.
            parts = words.view(np.uint8).reshape(matrices, warps, 8, 4, 2, 2)
            found = parts.transpose(1, 0, 3, 5, 4, 2)
        elif form.trans:
            found = words.view(np.uint16).reshape(matrices, warps, 8, 8).transpose(1, 0, 3, 2)
        else:
            found = words.view(ROW).reshape(matrices, warps, 8).transpose(1, 0, 2)
        rows = np.ascontiguousarray(found).reshape(-1).view(ROW)
        if not c.whole:
            rows = rows[c.active[:, :lanes].reshape(-1)]
        sub, address = _addressing(c, lanes, address)
        write(sub, address, (rows,))

    return _aligned(ins, run, ("addr",) + ("b32",) * matrices, ())


@instruction("movmatrix")
def movmatrix(ins: Instruction, env: Env) -> Op:
    """movmatrix.sync.aligned.m8n8.trans.b16 d, a."""
    if ins.modifiers != ("sync", "aligned", "m8n8", "trans", "b16"):
        raise Unsupported(f"form {ins.name!r}")

    def run(c: Cohort, a: Array) -> Array:
        halves = c.to_warps(a).view(np.uint16).reshape(-1, 8, 8)
        turned = np.ascontiguousarray(halves.transpose(0, 2, 1))
        return c.from_warps(turned.reshape(-1).view(np.uint32).reshape(-1, WARP))

    return _aligned(ins, run, ("b32",), ("b32",))
