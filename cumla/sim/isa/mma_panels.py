"""Many mma at once: grids of matrix products, for all warps of a cohort.

A panel is a grid of accumulators, each the end of a chain of mma: the accumulator in row i and
column j takes up, step by step, the product of that step's i-th fragment of A and its j-th of B.
Then one step of one warp is one matrix product, (16 rows, k) by (k, 8 columns) times the grid.

Numbers: products are exact. Their sum over k is made in float64 and rounded to f32, or in f32
where that is exact; then C is added, and the result rounded to its type. PTX leaves the order of
additions open; in float64 it does not matter unless products of one element lie more than 2**27
apart in magnitude, so that a panel gives what its mma one by one would give. Sums of zeros are
+0.0, NaN results are 0x7fffffff.

Layout: matrices are built from registers by moving quads, the 4 elements of the lanes 4g to 4g + 3.
For that the rows of A are ordered (g, i, half), the columns of B (j, column % 2, column // 2), and
k by (register, element in the register, lane), in A and B alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP
from cumla.sim.isa.mma_forms import ELEMENTS, Form
from cumla.sim.isa.rounding import NAN_BITS, any_nan, half_bits, half_to_single, single_to_half

Array = NDArray[Any]
QUAD = np.dtype(np.complex128)  # for its size, four f32
# Bytes of the matrices of those warps that are worked on together: so many that NumPy's cost for
# a call does not count, and few enough to stay in a cache.
WORKING_SET = 1 << 22
# Sizes of cohorts for which panels keep their views.
KEPT_SPACES = 8

_unpack_half = ELEMENTS["f16"].unpacker()
_DTYPES: dict[str, Any] = {"f32": np.float32, "s32": np.int32, "f16": np.uint32}


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
        self.steps, self.panels = steps, panels
        self.rows, self.columns = rows, columns
        self.a, self.b, self.c = list(a), list(b), list(c)
        self.results = results
        self.d_dtype = _DTYPES[form.d]
        self.d_registers = panels * rows * columns * form.registers()[0]
        self.at_once = max(WORKING_SET // _Space.bytes_of_warp(self), 1) * WARP
        self.kept = _Kept()

    def run(self, sources: Sequence[Array], lanes: int, results: list[Any]) -> None:
        """Fill in the results; sources and results have one element a lane of whole warps."""
        made = [
            np.empty((self.d_registers, lanes), self.d_dtype) if wanted else None
            for wanted in self.results
        ]
        if lanes <= self.at_once:
            self.space(lanes).run(sources, made)
        else:
            for first in range(0, lanes, self.at_once):
                part = slice(first, min(first + self.at_once, lanes))
                of_part = [x if x.shape[0] == 1 else x[part] for x in sources]
                outs = [None if out is None else out[:, part] for out in made]
                self.space(part.stop - first).run(of_part, outs)
        for out, wanted in zip(made, self.results, strict=True):
            if out is not None:
                if self.d_dtype is np.float32 and any_nan(out.reshape(-1)):
                    out.view(np.uint32)[np.isnan(out)] = NAN_BITS
                rows = list(out)
                for place, number in wanted:
                    results[number] = rows[place]

    def space(self, lanes: int) -> _Space:
        spaces = self.kept.spaces
        found = spaces.get(lanes)
        if found is None:
            if len(spaces) >= KEPT_SPACES:
                spaces.clear()
            found = spaces[lanes] = _Space(self, lanes)
        return found


class _Kept(threading.local):
    """The spaces that panels have on a thread, by number of lanes."""

    def __init__(self) -> None:
        self.spaces: dict[int, _Space] = {}


class _Memory(threading.local):
    """What all spaces of a thread lie in: only one of them is in use at a time."""

    def __init__(self) -> None:
        self.bytes = np.empty(0, np.uint8)


_memory = _Memory()


class _Space:
    """Arrays in which panels work on a number of lanes, with all views of them made once."""

    def __init__(self, panels: Panels, lanes: int) -> None:
        size = self.bytes_of_warp(panels) * (lanes // WARP)
        if _memory.bytes.size < size:
            _memory.bytes = np.empty(max(size, WORKING_SET), np.uint8)
        self.free = _memory.bytes
        self.form = form = panels.form
        quads = lanes // 4

        self.pick = itemgetter(*panels.a, *panels.b)
        self.registers = self.take((len(panels.a + panels.b), lanes), np.uint32)
        split = len(panels.a)
        # Their elements as f32, by the place in the register.
        count = 32 // ELEMENTS[form.a].room
        planes = self.take((count, *self.registers.shape), np.uint32)
        values = planes.view(np.float32)
        if not ELEMENTS[form.a].exponent:
            values = self.take(planes.shape, np.float32)
        self.unpacking: list[tuple[Any, Array, Array, Array]] = []
        parts = ((form.a, slice(split)), (form.b, slice(split, None)))
        for kind, part in ((form.a, slice(None)),) if form.a == form.b else parts:
            unpack = ELEMENTS[kind].unpacker()
            self.unpacking.append((unpack, self.registers[part], planes[:, part], values[:, part]))
        # As rows of A and columns of B.
        self.quads = values.view(QUAD).reshape(-1)
        self.order = self.matrix_order(panels, count, quads)
        self.singles = self.take((values.size,), np.float32)
        self.matrices = self.singles
        if not form.exact_in_single:
            self.matrices = self.take(self.singles.shape, np.float64)
        many = panels.steps, panels.panels, -1
        split *= lanes * count
        self.a = self.matrices[:split].reshape(*many, form.m * panels.rows, form.k)
        self.b = self.matrices[split:].reshape(*many, form.n * panels.columns, form.k)
        self.b = self.b.swapaxes(-1, -2)

        grid = (*self.a.shape[1:-1], self.b.shape[-1])
        self.product = self.take(grid, self.a.dtype)
        self.integers = self.take(grid, np.int32)
        self.total = self.take(grid, np.int32 if form.c == "s32" else np.float32)
        self.c = panels.c
        self.pick_c = itemgetter(*panels.c)
        self.c_registers = self.take((len(panels.c), lanes), np.uint32)
        if form.c == "f16":
            self.c_planes = self.take((2, *self.c_registers.shape), np.uint32)
            c: Array = self.c_planes.view(QUAD).reshape(2, panels.panels, -1, quads)
            self.c_quads = c.transpose(1, 3, 2, 0)
        else:
            c = self.c_registers.view(QUAD).reshape(panels.panels, -1, quads)
            self.c_quads = c.transpose(0, 2, 1)
        self.total_quads = self.total.view(QUAD).reshape(self.c_quads.shape)
        self.d_shape = panels.panels, -1, quads
        d = self.total.view(QUAD).reshape(panels.panels, quads, -1)
        self.d_quads = d.transpose(0, 2, 1)

    @staticmethod
    def bytes_of_warp(panels: Panels) -> int:
        """About what the arrays take."""
        form = panels.form
        height, width = form.m * panels.rows, form.n * panels.columns
        return panels.panels * (24 * panels.steps * form.k * (height + width) + 24 * height * width)

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array in the thread's memory."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > self.free.size:
            return np.empty(shape, dtype)
        taken, self.free = self.free[:size], self.free[-(-size // 64) * 64 :]
        return taken.view(dtype).reshape(shape)

    @staticmethod
    def matrix_order(panels: Panels, count: int, quads: int) -> Array:
        """Where the quads of A, then those of B, by row or column, are in `values`."""
        form = panels.form
        at = np.arange(count * len(panels.a + panels.b) * quads).reshape(count, -1)
        split = len(panels.a) * quads
        many = count, panels.steps, panels.panels
        a = at[:, :split].reshape(*many, panels.rows, form.steps, form.halves, quads)
        b = at[:, split:].reshape(*many, panels.columns, form.steps, quads // 8, 4, 2)
        a = a.transpose(1, 2, 6, 3, 5, 4, 0)
        b = b.transpose(1, 2, 5, 3, 7, 6, 4, 0)
        return np.concatenate([a.reshape(-1), b.reshape(-1)])

    def run(self, sources: Sequence[Array], outs: list[Array | None]) -> None:
        """All steps; `outs` has for each step where its D go, or None."""
        _gather(sources, self.pick, self.registers)
        for unpack, *arguments in self.unpacking:
            unpack(*arguments)
        self.quads.take(self.order, out=self.singles.view(QUAD), mode="clip")
        if self.matrices is not self.singles:
            np.copyto(self.matrices, self.singles)
        if all(_is_zero(sources[i]) for i in self.c):
            self.total.fill(0)
        else:
            _gather(sources, self.pick_c, self.c_registers)
            if self.form.c == "f16":
                _unpack_half(self.c_registers, self.c_planes, self.c_planes.view(np.float32))
            np.copyto(self.total_quads, self.c_quads)
        for a, b, out in zip(self.a, self.b, outs, strict=True):
            np.matmul(a, b, out=self.product)
            if self.form.operation == "xor":
                # Bits that differ, from those that are set in both.
                np.multiply(self.product, -2, out=self.product)
                self.product += a.sum(axis=-1)[..., :, None]
                self.product += b.sum(axis=-2)[..., None, :]
            self.add_product()
            if out is not None:
                self.give(out)

    def add_product(self) -> None:
        total = self.total
        if self.form.d == "s32":
            np.copyto(self.integers, self.product, casting="unsafe")
            if self.form.satfinite:
                wide = total.astype(np.int64) + self.integers
                np.copyto(total, np.clip(wide, -(1 << 31), (1 << 31) - 1), casting="unsafe")
            else:
                np.add(total, self.integers, total)
            return
        np.add(total, self.product, total, dtype=np.float32, casting="same_kind")
        if self.form.d == "f16":
            rounded = single_to_half(total.reshape(-1), "rn")
            np.copyto(total.reshape(-1), half_to_single(rounded))

    def give(self, out: Array) -> None:
        """D as [panel and register, lane]."""
        if self.form.d != "f16":
            np.copyto(out.view(QUAD).reshape(self.d_shape), self.d_quads)
            return
        values = np.ascontiguousarray(self.d_quads).view(np.float32).reshape(-1, 2, out.shape[1])
        low = half_bits(values[:, 0].reshape(-1), "rn")
        high = half_bits(values[:, 1].reshape(-1), "rn")
        np.copyto(out, (low | (high << 16)).reshape(out.shape))


def _is_zero(register: Array) -> bool:
    """Whether a register is known to be 0 (not -0.0) in all lanes."""
    return register.shape[0] == 1 and not register.view(np.uint32)[0]


def _gather(sources: Sequence[Array], pick: Callable[..., Any], out: Array) -> None:
    """The registers that `pick` takes out of the sources, as bits, [registers, lanes]."""
    arrays = pick(sources)
    flat = out.reshape(-1).view(arrays[0].dtype)
    try:
        np.concatenate(arrays, out=flat)
    except ValueError:  # some are one value for all lanes
        for row, array in zip(flat.reshape(out.shape), arrays, strict=True):
            np.copyto(row, array)
