"""ldmatrix, stmatrix and movmatrix: 8x8 matrices of 16-bit elements, a row of 16 bytes.

PTX ISA "Warp-level matrix load instruction: ldmatrix": lanes 8i to 8i + 7 give the addresses of the
rows of matrix i, and lane 4g + t holds elements 2t and 2t + 1 of row g (with .trans, of column g).
A row is read by the lane that gives its address, which is whom the checks name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP, Cohort
from cumla.sim.isa.convergence import waits_for_lanes, whole_warps
from cumla.sim.isa.table import Env, Op, Unsupported, instruction
from cumla.sim.memory.access import reader, writer
from cumla.sim.ptx.syntax import Instruction

Array = NDArray[Any]

WORD = np.dtype(np.uint32)
COUNTS = {"x1": 1, "x2": 2, "x4": 4}


def _form(ins: Instruction) -> tuple[int, bool, str]:
    """(number of matrices, transposed, space) of an ldmatrix or stmatrix."""
    words = list(ins.modifiers)
    trans = "trans" in words
    words = [w for w in words if w != "trans"]
    if words[:3] != ["sync", "aligned", "m8n8"] or len(words) not in (5, 6) or words[-1] != "b16":
        raise Unsupported(f"form {ins.name!r}; m8n8 of b16 is known")
    space = words[4].partition("::")[0] if len(words) == 6 else "generic"
    if words[3] not in COUNTS or space not in ("shared", "generic"):
        raise Unsupported(f"form {ins.name!r}")
    return COUNTS[words[3]], trans, space


def _givers(c: Cohort, count: int) -> Cohort:
    """The lanes that give addresses: 8 for each matrix."""
    return c if count == 4 else c.subset(c.lanes < 8 * count)


def _transposed(words: Array) -> Array:
    """[..., 8, 4] words of 8x8 matrices of 16 bits, transposed."""
    halves = np.ascontiguousarray(words).view(np.uint16)
    return np.ascontiguousarray(halves.swapaxes(-1, -2)).view(WORD)


@instruction("ldmatrix")
def ldmatrix(ins: Instruction, env: Env) -> Op:
    """ldmatrix.sync.aligned.m8n8.{x1,x2,x4}{.trans}{.shared{::cta}}.b16 r, [p]."""
    count, trans, space = _form(ins)
    read = reader(ins, env, space, WORD, count=4)

    def run(c: Cohort, address: Array) -> Any:
        givers = _givers(c, count)
        if givers is not c and address.shape[0] > 1:
            address = address[c.lanes < 8 * count]
        rows = np.stack([givers.full(v) for v in read(givers, address)], axis=1)
        # [warp, matrix, row, word]; warps lack no lane here but those that have exited.
        if c.whole:
            matrices = rows.reshape(-1, count, 8, 4)
        else:
            padded = np.zeros((c.warps.shape[0] * WARP, 4), WORD)
            padded[np.flatnonzero(c.active.reshape(-1))[c.lanes < 8 * count]] = rows
            matrices = padded.reshape(-1, 4, 8, 4)[:, :count]
        if trans:
            matrices = _transposed(matrices)
        out = np.ascontiguousarray(matrices.reshape(-1, count, WARP).swapaxes(0, 1))
        results = tuple(c.from_warps(out[m]) for m in range(count))
        return results if count > 1 else results[0]

    return Op(
        run,
        ("addr",),
        ("b32",) * count,
        cohort=True,
        ready=whole_warps,
        waits_for=lambda c, address: waits_for_lanes(ins, c),
        warp_gate=True,
    )


@instruction("stmatrix")
def stmatrix(ins: Instruction, env: Env) -> Op:
    """stmatrix.sync.aligned.m8n8.{x1,x2,x4}{.trans}{.shared{::cta}}.b16 [p], r."""
    count, trans, space = _form(ins)
    write = writer(ins, env, space, WORD, count=4)

    def run(c: Cohort, address: Array, *values: Array) -> None:
        matrices = np.stack([c.to_warps(v) for v in values], axis=1).reshape(-1, count, 8, 4)
        if trans:
            matrices = _transposed(matrices)
        rows = matrices.reshape(-1, 8 * count, 4)
        givers = _givers(c, count)
        if givers is not c and address.shape[0] > 1:
            address = address[c.lanes < 8 * count]
        rows = rows[c.active[:, : 8 * count]]
        write(givers, address, tuple(np.ascontiguousarray(rows[:, w]) for w in range(4)))

    return Op(
        run,
        ("addr",) + ("b32",) * count,
        cohort=True,
        ready=whole_warps,
        waits_for=lambda c, *_: waits_for_lanes(ins, c),
        warp_gate=True,
    )


@instruction("movmatrix")
def movmatrix(ins: Instruction, env: Env) -> Op:
    """movmatrix.sync.aligned.m8n8.trans.b16 d, a: a matrix held by a warp, transposed."""
    if ins.modifiers != ("sync", "aligned", "m8n8", "trans", "b16"):
        raise Unsupported(f"form {ins.name!r}")

    def run(c: Cohort, a: Array) -> Array:
        matrices = _transposed(c.to_warps(a).reshape(-1, 8, 4))
        return c.from_warps(matrices.reshape(-1, WARP))

    return Op(
        run,
        ("b32",),
        ("b32",),
        cohort=True,
        ready=whole_warps,
        waits_for=lambda c, a: waits_for_lanes(ins, c),
        warp_gate=True,
    )
