"""Many mma at once: grids of matrix products, for all warps of a cohort.

A panel is a grid of accumulators, each the end of a chain of mma: the accumulator in row i and
column j takes up, step by step, the product of that step's i-th fragment of A and its j-th of B.
Then one step of one warp is one matrix product, (16 rows, k) by (k, 8 columns) times the grid.

Numbers: products are exact. Their sum over k is made in float64 and rounded to f32, or in f32
where that is exact; then C is added, and the result rounded to its type. PTX leaves the order of
additions open; in float64 it does not matter unless products of one element lie more than 2**27
apart in magnitude, so that a panel gives what its mma one by one would give. NaN results are
0x7fffffff.

Layout: matrices are built from registers by moving quads, the 4 elements of the lanes 4g to 4g + 3.
For that the rows of A are ordered (g, i, half), the columns of B (j, column % 2, column // 2), and
k by (register, element in the register, lane), in A and B alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP
from cumla.sim.isa.mma_forms import ELEMENTS, Form
from cumla.sim.isa.rounding import NAN_BITS, any_nan, half_bits, half_to_single, single_to_half

Array = NDArray[Any]
QUAD = np.dtype(np.complex128)  # for its size, four f32
# Bytes that the matrices of the warps that are worked on together may take.
WORKING_SET = 1 << 21


@dataclass(frozen=True, slots=True)
class Link:
    """One mma of a chain: its sources A and B, and which of its D are which results."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    results: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Chain:
    """mma of which each takes as C the D of the one before; `start` is the first C."""

    start: tuple[int, ...]
    links: list[Link]


class Panels:
    """Panels of equal size, all of one form of mma.

    Args:
        steps: mma in a chain.
        panels: how many panels.
        rows, columns: of the grid of a panel.
        a: which source is each register of A; by (step, panel, row, register).
        b: likewise, by (step, panel, column, register).
        c: likewise of the first C of each chain, by (panel, row, half, column, register).
        results: for each step which results its D are: (place among registers ordered as c's,
            number of the result).
    """

    def __init__(
        self,
        form: Form,
        steps: int,
        panels: int,
        rows: int,
        columns: int,
        a: Sequence[int],
        b: Sequence[int],
        c: Sequence[int],
        results: Sequence[Sequence[tuple[int, int]]],
    ) -> None:
        self.form = form
        self.steps = steps
        self.a, self.b, self.c = list(a), list(b), list(c)
        self.results = results
        self.unpack_a = ELEMENTS[form.a].unpacker()
        self.unpack_b = ELEMENTS[form.b].unpacker()
        self.exact_in_single = form.exact_in_single
        # Shapes of registers as quads, with the elements of a register first, and of matrices.
        self.a_quads = (-1, steps, panels, rows, form.steps, form.halves)
        self.b_quads = (-1, steps, panels, columns, form.steps)
        self.a_shape = (steps, panels, -1, form.m * rows, form.k)
        self.b_shape = (steps, panels, -1, form.n * columns, form.k)
        self.c_shape = (panels, -1, form.m * rows, form.n * columns)
        self.c_dtype = np.int32 if form.c == "s32" else np.float32
        self.d_dtype = _DTYPES[form.d]
        self.d_registers = panels * rows * columns * form.registers()[0]
        bytes_of_warp = (
            8
            * panels
            * (
                2 * steps * form.k * (form.m * rows + form.n * columns)
                + 2 * form.m * form.n * rows * columns
            )
        )
        self.at_once = max(WORKING_SET // bytes_of_warp, 1) * WARP

    def run(self, sources: Sequence[Array], lanes: int, results: list[Any]) -> None:
        """Fill in the results; sources and results have one element a lane of whole warps."""
        made = [
            np.empty((self.d_registers, lanes), self.d_dtype) if wanted else None
            for wanted in self.results
        ]
        if lanes <= self.at_once:
            self.part(sources, lanes, made)
        else:
            for first in range(0, lanes, self.at_once):
                part = slice(first, min(first + self.at_once, lanes))
                of_part = [x if x.shape[0] == 1 else x[part] for x in sources]
                outs = [None if out is None else out[:, part] for out in made]
                self.part(of_part, part.stop - first, outs)
        for out, wanted in zip(made, self.results, strict=True):
            if out is not None:
                if self.d_dtype is np.float32 and any_nan(out.reshape(-1)):
                    out.view(np.uint32)[np.isnan(out)] = NAN_BITS
                rows = list(out)
                for place, number in wanted:
                    results[number] = rows[place]

    def part(self, sources: Sequence[Array], lanes: int, outs: list[Array | None]) -> None:
        """All steps of as many warps as are worked on together."""
        form = self.form
        a, b = self.matrices(sources, lanes)
        total = self.accumulators(sources, lanes)
        product = np.empty((*a.shape[1:-1], b.shape[-1]), a.dtype)
        for step, out in enumerate(outs):
            np.matmul(a[step], b[step], out=product)
            if form.operation == "xor":
                _differences(product, a[step], b[step])
            total = _add(form, total, product)
            if out is not None:
                _to_registers(form.d, total, out)

    def matrices(self, sources: Sequence[Array], lanes: int) -> tuple[Array, Array]:
        """A as [step, panel, warp, row, k] and B as [step, panel, warp, k, column]."""
        if self.form.a == self.form.b:
            both = self.unpack_a(_gather(sources, self.a + self.b, lanes)).view(QUAD)
            a, b = both[:, : len(self.a)], both[:, len(self.a) :]
        else:
            a = self.unpack_a(_gather(sources, self.a, lanes)).view(QUAD)
            b = self.unpack_b(_gather(sources, self.b, lanes)).view(QUAD)
        quads = lanes // 4
        a = a.reshape(*self.a_quads, quads).transpose(1, 2, 6, 3, 5, 4, 0)
        b = b.reshape(*self.b_quads, quads // 8, 4, 2).transpose(1, 2, 5, 3, 7, 6, 4, 0)
        left = np.ascontiguousarray(a).view(np.float32)
        right = np.ascontiguousarray(b).view(np.float32)
        if not self.exact_in_single:
            left, right = left.astype(np.float64), right.astype(np.float64)
        return left.reshape(self.a_shape), right.reshape(self.b_shape).swapaxes(-1, -2)

    def accumulators(self, sources: Sequence[Array], lanes: int) -> Array:
        """C as [panel, warp, row, column]."""
        panels, _, height, width = self.c_shape
        if all(_is_zero(sources[i]) for i in self.c):
            return np.zeros((panels, lanes // WARP, height, width), self.c_dtype)
        registers = _gather(sources, self.c, lanes)
        if self.form.c == "f16":
            quads = _unpack_half(registers).view(QUAD).reshape(2, panels, -1, lanes // 4)
            quads = quads.transpose(1, 3, 2, 0)
        else:
            quads = registers.view(QUAD).reshape(panels, -1, lanes // 4).transpose(0, 2, 1)
        return np.ascontiguousarray(quads).view(self.c_dtype).reshape(self.c_shape)


_DTYPES: dict[str, Any] = {"f32": np.float32, "s32": np.int32, "f16": np.uint32}
_unpack_half = ELEMENTS["f16"].unpacker()


def _is_zero(register: Array) -> bool:
    """Whether a register is known to be 0 (not -0.0) in all lanes."""
    return register.shape[0] == 1 and not register.view(np.uint32)[0]


def _gather(sources: Sequence[Array], which: list[int], lanes: int) -> Array:
    """[registers, lanes] of sources."""
    arrays = [sources[i] for i in which]
    joined = np.concatenate(arrays)
    if joined.shape[0] != len(arrays) * lanes:
        joined = np.concatenate([np.broadcast_to(x, lanes) for x in arrays])
    return joined.reshape(len(arrays), lanes)


def _differences(product: Array, a: Array, b: Array) -> None:
    """Counts of bits that are set in both, in place, to counts of those that differ."""
    np.multiply(product, -2, out=product)
    product += a.sum(axis=-1)[..., :, None]
    product += b.sum(axis=-2)[..., None, :]


def _add(form: Form, total: Array, product: Array) -> Array:
    """The accumulators after one step, in the type of D."""
    if form.d == "s32":
        if form.satfinite:
            wide = total + product.astype(np.int64)
            return np.clip(wide, -(1 << 31), (1 << 31) - 1).astype(np.int32)
        return np.add(total, product.astype(np.int32), out=total)
    np.add(total, product.astype(np.float32, copy=False), out=total)
    if form.d == "f16":
        rounded = single_to_half(total.reshape(-1), "rn")
        return half_to_single(rounded).reshape(total.shape)
    return total


def _to_registers(kind: str, total: Array, out: Array) -> None:
    """[panel, warp, row, column] to [panel and register, lane]."""
    panels, lanes = total.shape[0], out.shape[1]
    quads = total.view(QUAD).reshape(panels, lanes // 4, -1).transpose(0, 2, 1)
    if kind != "f16":
        out.view(QUAD).reshape(quads.shape)[...] = quads
        return
    values = np.ascontiguousarray(quads).view(np.float32).reshape(-1, 2, lanes)
    low = half_bits(values[:, 0].reshape(-1), "rn")
    high = half_bits(values[:, 1].reshape(-1), "rn")
    out[...] = (low | (high << 16)).reshape(out.shape)


def arrange(form: Form, chains: Sequence[Chain]) -> list[Panels]:
    """Chains as panels."""
    panels: dict[tuple[int, int, int], list[list[list[Chain]]]] = {}
    waiting = list(chains)
    while waiting:
        # Chains by their A and B; what has both in common with another must go elsewhere.
        rows: dict[Any, dict[Any, Chain]] = {}
        later = []
        for chain in waiting:
            row = rows.setdefault(tuple(link.a for link in chain.links), {})
            column = tuple(link.b for link in chain.links)
            if column in row:
                later.append(chain)
            else:
                row[column] = chain
        waiting = later
        # Rows with the same columns make a panel.
        grids: dict[frozenset[Any], list[dict[Any, Chain]]] = {}
        for row in rows.values():
            grids.setdefault(frozenset(row), []).append(row)
        for grid in grids.values():
            panel = [[row[column] for column in grid[0]] for row in grid]
            size = (len(panel[0][0].links), len(panel), len(panel[0]))
            panels.setdefault(size, []).append(panel)
    return [_panels(form, size, grids) for size, grids in panels.items()]


def _panels(
    form: Form, size: tuple[int, int, int], grids: Sequence[Sequence[Sequence[Chain]]]
) -> Panels:
    steps, rows, columns = size
    everywhere = [
        (panel, i, j, half)
        for panel in range(len(grids))
        for i in range(rows)
        for half in range(form.halves)
        for j in range(columns)
    ]
    c_pair, d_pair = (1 if kind == "f16" else 2 for kind in (form.c, form.d))
    results: list[list[tuple[int, int]]] = [[] for _ in range(steps)]
    for place, (panel, i, j, half) in enumerate(everywhere):
        for step, link in enumerate(grids[panel][i][j].links):
            for register, number in link.results:
                if register // d_pair == half:
                    results[step].append((place * d_pair + register % d_pair, number))
    return Panels(
        form,
        steps,
        len(grids),
        rows,
        columns,
        tuple(
            source
            for step in range(steps)
            for grid in grids
            for row in grid
            for source in row[0].links[step].a
        ),
        tuple(
            source
            for step in range(steps)
            for grid in grids
            for chain in grid[0]
            for source in chain.links[step].b
        ),
        tuple(
            source
            for panel, i, j, half in everywhere
            for source in grids[panel][i][j].start[half * c_pair : (half + 1) * c_pair]
        ),
        tuple(map(tuple, results)),
    )
