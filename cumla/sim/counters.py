"""What a launch did, counted exactly: for the kernel, and for each line of its source.

Warp instructions are counted as the simulator runs them: lanes of a warp that stand at the same
instruction run it together, and the lanes that are behind run first, so a warp reconverges where a
GPU's does. Shared memory is counted by the published rule of its 32 banks of 4 bytes: accesses of
up to 4 bytes are served for 32 lanes at a time, of 8 bytes for 16, of 16 bytes for 8; a wavefront
serves at most one word of each bank.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP, Cohort
from cumla.sim.memory.device import BASE
from cumla.sim.memory.words import Words
from cumla.sim.program.inline import FlatKernel
from cumla.sim.ptx.syntax import Instruction
from cumla.sim.wave import Geometry

SECTOR = 32
BANKS = 32

# The class of an instruction by its opcode; loads, stores and arithmetic are told apart below.
CLASSES = {
    "bra": "branch", "brx": "branch", "ret": "branch", "exit": "branch", "call": "branch",
    "bar": "barrier", "barrier": "barrier", "mbarrier": "barrier", "fence": "barrier",
    "membar": "barrier", "mma": "tensor", "wgmma": "tensor", "ldmatrix": "shared memory",
    "stmatrix": "shared memory", "atom": "atomic", "red": "atomic", "cvt": "conversion",
    "shfl": "warp", "vote": "warp", "match": "warp", "redux": "warp", "activemask": "warp",
    "elect": "warp", "movmatrix": "warp", "mov": "move", "selp": "move", "setp": "compare",
    "set": "compare", "slct": "compare", "ex2": "special function", "lg2": "special function",
    "sin": "special function", "cos": "special function", "rcp": "special function",
    "sqrt": "special function", "rsqrt": "special function", "tanh": "special function",
    "cp": "asynchronous copy", "cvta": "integer", "prefetch": "memory hint",
    "createpolicy": "memory hint", "nanosleep": "other", "trap": "other",
}  # fmt: skip


def instruction_class(ins: Instruction) -> str:
    """A class for the table of instructions by class."""
    if ins.opcode in ("ld", "st", "ldu"):
        for space in ("global", "shared", "local", "const", "param"):
            if any(m.split("::")[0] == space for m in ins.modifiers):
                return f"{space} memory"
        return "generic memory"
    if ins.opcode in CLASSES:
        return CLASSES[ins.opcode]
    kind = ins.modifiers[-1] if ins.modifiers else ""
    if kind in ("f32", "f32x2"):
        return "float32"
    if kind == "f64":
        return "float64"
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return "float16"
    return "integer"


@dataclass(slots=True)
class Row:
    """Counts of a kernel or of one line.

    Attributes:
        warp_instructions: instructions run, one for each warp that runs it.
        thread_instructions: the same, one for each lane.
        branches, divergent_branches: conditional branches run by warps, and those where lanes of
            a warp went different ways.
        global_sectors: 32-byte sectors of global memory that requests of warps asked for.
        global_sectors_least: the least that would hold the bytes that they used.
        dram_bytes: 32 times the number of distinct sectors touched.
        shared_wavefronts, shared_wavefronts_least: passes over shared memory, and the least that
            would do without bank conflicts.
        tensor_flops: floating point (or integer) operations of mma and wgmma.
        barrier_waits: warps that waited at barriers.
        bulk_bytes: bytes that bulk and tensor copies wrote to their destinations.
        bulk_sectors: 32-byte sectors of global memory that each of them read or wrote.
        multicast_bytes_saved: bytes that multicast read once for several blocks, less that once.
        by_class: warp instructions of each class.
    """

    warp_instructions: int = 0
    thread_instructions: int = 0
    branches: int = 0
    divergent_branches: int = 0
    global_sectors: int = 0
    global_sectors_least: int = 0
    dram_bytes: int = 0
    shared_wavefronts: int = 0
    shared_wavefronts_least: int = 0
    tensor_flops: int = 0
    barrier_waits: int = 0
    bulk_bytes: int = 0
    bulk_sectors: int = 0
    multicast_bytes_saved: int = 0
    by_class: dict[str, int] = field(default_factory=dict)

    def add(self, other: Row) -> None:
        """Add another row's counts, all but dram_bytes, which do not add up."""
        for f in fields(self):
            if f.name == "by_class":
                for name, number in other.by_class.items():
                    self.by_class[name] = self.by_class.get(name, 0) + number
            elif f.name != "dram_bytes":
                setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


class Counters:
    """Counts of one launch."""

    def __init__(self, kernel: FlatKernel, geometry: Geometry) -> None:
        self.kernel = kernel
        self.geometry = geometry
        self._ranges: dict[tuple[int, int], list[int]] = {}
        self._rows: dict[int, Row] = {}
        self._sectors: dict[int, list[NDArray[np.int64]]] = {}

    # Called while the kernel runs.

    def enter(self, first: int, last: int, c: Cohort) -> None:
        """The lanes of c run instructions first..last-1."""
        counted = self._ranges.setdefault((first, last), [0, 0])
        counted[0] += c.warps.shape[0]
        counted[1] += c.n

    def row(self, index: int) -> Row:
        if index not in self._rows:
            self._rows[index] = Row()
        return self._rows[index]

    def divergent(self, index: int, c: Cohort, taken: NDArray[np.bool_]) -> None:
        """The lanes of c parted at a branch."""
        goes = c.to_warps(taken)
        stays = c.active & ~goes
        self.row(index).divergent_branches += int((goes.any(axis=1) & stays.any(axis=1)).sum())

    def flops(self, ins: Instruction, c: Cohort, per_warp: int) -> None:
        self.row(ins.index).tensor_flops += per_warp * int(c.warps.shape[0])

    def wait(self, ins: Instruction, c: Cohort) -> None:
        self.row(ins.index).barrier_waits += int(c.warps.shape[0])

    def access(
        self,
        ins: Instruction,
        c: Cohort,
        space: str,
        address: NDArray[np.int64],
        nbytes: Any,
        kind: str,
    ) -> None:
        """The lanes of c access nbytes each at address."""
        address = c.full(address)
        sizes = np.broadcast_to(np.asarray(nbytes, np.int64), address.shape)
        row = self.row(ins.index)
        if space == "global":
            owner = c.gids >> 5
            sectors, owners = _units(address, sizes, owner, SECTOR)
            asked = _distinct(sectors, owners)
            row.global_sectors += int(asked.shape[0])
            row.global_sectors_least += _least(address, sizes, owner, SECTOR)
            self._sectors.setdefault(ins.index, []).append(np.unique(sectors))
        elif space == "shared":
            # Lanes are served in groups, so that a group without conflicts takes one wavefront.
            widest = int(sizes.max(initial=1))
            group = WARP if widest <= 4 else 128 // widest
            owner = c.gids // group
            words, owners = _units(address, sizes, owner, 4)
            pairs = _distinct(words, owners)
            words, owners = pairs[:, 1], pairs[:, 0]
            _, first = np.unique(owners, return_index=True)
            number = np.repeat(np.arange(first.shape[0]), np.diff(first, append=owners.shape[0]))
            load = np.zeros((first.shape[0], BANKS), np.int64)
            np.add.at(load, (number, words % BANKS), 1)
            row.shared_wavefronts += int(load.max(axis=1).sum())
            row.shared_wavefronts_least += int((-(-load.sum(axis=1) // BANKS)).sum())

    def bulk(self, ins: Instruction, source: Words, written: list[Words]) -> None:
        """A lane copies from source to each of `written`."""
        row = self.row(ins.index)
        row.bulk_bytes += sum(words.offset.shape[0] * words.width for words in written)
        row.multicast_bytes_saved += (len(written) - 1) * source.offset.shape[0] * source.width
        for words in (source, written[0]):
            if words.space == "global":
                sectors = np.unique((words.offset + BASE) // SECTOR)
                row.bulk_sectors += int(sectors.shape[0])
                self._sectors.setdefault(ins.index, []).append(sectors)

    # Asked for afterwards.

    def lines(self) -> dict[str, Row]:
        """A Row for each source line, in the order of the lines."""
        found: dict[str, list[int]] = {}
        for ins in self.kernel.instructions:
            found.setdefault(ins.source_line, []).append(ins.index)
        executed = self._executed()
        rows = {}
        for where, indices in sorted(found.items(), key=lambda item: _line_order(item[0])):
            row = self._sum(indices, executed)
            if row.warp_instructions:
                rows[where] = row
        return rows

    def total(self) -> Row:
        """The Row of the whole kernel."""
        return self._sum([ins.index for ins in self.kernel.instructions], self._executed())

    def _executed(self) -> NDArray[np.int64]:
        """[instructions, 2]: warps and lanes that ran each instruction."""
        executed = np.zeros((len(self.kernel.instructions), 2), np.int64)
        for (first, last), counted in self._ranges.items():
            executed[first:last] += counted
        return executed

    def _sum(self, indices: list[int], executed: NDArray[np.int64]) -> Row:
        total = Row()
        touched = []
        for index in indices:
            ins = self.kernel.instructions[index]
            warps, lanes = (int(n) for n in executed[index])
            row = Row(warps, lanes, by_class={instruction_class(ins): warps} if warps else {})
            if ins.opcode == "bra" and ins.guard is not None:
                row.branches = warps
            total.add(row)
            if index in self._rows:
                total.add(self._rows[index])
            touched += self._sectors.get(index, [])
        if touched:
            total.dram_bytes = SECTOR * int(np.unique(np.concatenate(touched)).shape[0])
        return total

    def to_json(self) -> str:
        """Everything, as JSON: {"kernel", "grid", "block", "total", "lines"}."""
        return json.dumps(
            {
                "kernel": self.kernel.name,
                "grid": self.geometry.grid,
                "block": self.geometry.block,
                "total": asdict(self.total()),
                "lines": {where: asdict(row) for where, row in self.lines().items()},
            },
            indent=1,
        )

    def table(self) -> str:
        """A plain-text table, a line of the source a row."""
        columns = [f.name for f in fields(Row) if f.name != "by_class"]
        heads = ["line", *(c.replace("_", " ") for c in columns)]
        rows = [
            [where, *(f"{getattr(row, c):,}" for c in columns)]
            for where, row in [*self.lines().items(), ("total", self.total())]
        ]
        widths = [max(len(r[i]) for r in [heads, *rows]) for i in range(len(heads))]
        text = ["  ".join(h.rjust(w) for h, w in zip(heads, widths, strict=True))]
        text += ["  ".join(x.rjust(w) for x, w in zip(r, widths, strict=True)) for r in rows]
        classes = sorted(self.total().by_class.items(), key=lambda item: -item[1])
        text += ["", "warp instructions by class"]
        text += [f"  {name:20s} {number:>14,}" for name, number in classes]
        return "\n".join(text)


def _line_order(where: str) -> tuple[str, int]:
    file, _, line = where.rpartition(":")
    return (file, int(line)) if line.isdigit() else (where, 0)


def _units(
    address: NDArray[np.int64], sizes: NDArray[np.int64], owner: NDArray[np.int64], unit: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the `unit`-byte units that each access covers, and the owner of each."""
    first = address // unit
    count = (address + sizes - 1) // unit - first + 1
    most = int(count.max(initial=1))
    if most == 1:
        return first, owner
    wide = first[:, None] + np.arange(most)
    keep = np.arange(most) < count[:, None]
    return wide[keep], np.broadcast_to(owner[:, None], wide.shape)[keep]


def _distinct(units: NDArray[np.int64], owners: NDArray[np.int64]) -> NDArray[np.int64]:
    """[m, 2] the distinct (owner, unit) pairs, sorted."""
    order = np.lexsort((units, owners))
    pairs = np.stack([owners[order], units[order]], axis=1)
    if pairs.shape[0] == 0:
        return pairs
    keep = np.ones(pairs.shape[0], np.bool_)
    keep[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[keep]


def _least(
    address: NDArray[np.int64], sizes: NDArray[np.int64], owner: NDArray[np.int64], unit: int
) -> int:
    """Units that would hold the distinct bytes of each owner, summed over the owners."""
    order = np.lexsort((address, owner))
    start, owners = address[order], owner[order]
    end = start + sizes[order]
    # Bytes of an access that no earlier one of the same owner covers.
    base = owners * (1 << 48)  # an owner's addresses come before the next owner's
    reach = np.maximum.accumulate(end + base) if end.shape[0] else end
    before = np.concatenate([[np.iinfo(np.int64).min], reach[:-1]])
    new = np.maximum(end + base - np.maximum(start + base, before), 0)
    _, first = np.unique(owners, return_index=True)
    used = np.add.reduceat(new, first) if first.shape[0] else new
    return int((-(-used // unit)).sum())
