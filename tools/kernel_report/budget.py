"""Budgets: cycles that an SM spends, by pipe, for the heads of kernel files and the README."""

from __future__ import annotations

from dataclasses import dataclass

from cumla.jit import sources
from cumla.kernels.decode import tile_for
from cumla.layouts import BF16, V4_FP8, V32_FP8, KVLayout

from .gpus import GPU, GPUS
from .work import STREAM_INSTRUCTIONS, Work, decode_work, stream_work

TOKENS = 64
ROWS = (16, 64, 128)
NAMES = {"BF16": "16-bit rows", "V32_FP8": "V32_FP8", "V4_FP8": "V4_FP8"}
_PRAGMA = "#pragma once"
_BEGIN = "// Budget: "


@dataclass(frozen=True)
class Cost:
    """Cycles of one SM, for each thing that it can be short of."""

    tensor: float
    shared: float
    issue: float
    DRAM: float

    @property
    def binds(self) -> str:
        """The one that takes longest."""
        return max(vars(self), key=lambda name: float(getattr(self, name)))


def cost(gpu: GPU, work: Work, times: int = TOKENS) -> Cost:
    """What `times` times `work` costs an SM that has its share of DRAM."""
    return Cost(
        tensor=times * work.flops / gpu.tensor,
        shared=times * work.wavefronts / gpu.shared,
        issue=times * work.instructions / gpu.issue,
        DRAM=times * work.dram_bytes / gpu.dram_per_cycle,
    )


@dataclass(frozen=True)
class Budget:
    """The budget of one kernel file.

    Attributes:
        path: of the file, relative to kernels_cu.
        text: what its cycles are for, as comment lines.
        heads: of the columns before the cycles.
        widths: of these columns in the comment; negative: to the left.
        lines: what the columns hold, and the cycles.
    """

    path: str
    text: str
    heads: tuple[str, ...]
    widths: tuple[int, ...]
    lines: tuple[tuple[tuple[str, ...], Cost], ...]

    @property
    def pipes(self) -> list[str]:
        """What the kernel uses at all."""
        used = {name for _, spent in self.lines for name, value in vars(spent).items() if value}
        return [name for name in vars(self.lines[0][1]) if name in used]

    def comment(self) -> str:
        """It as lines for the head of the kernel's file."""
        text = [_BEGIN + self.text.replace("\n", "\n// "), "//"]
        text.append("//  " + self._cells(self.heads) + "".join(f"{one:>9}" for one in self.pipes))
        for labels, spent in self.lines:
            cells = [
                f"{'*' if name == spent.binds else ''}{getattr(spent, name):.0f}"
                for name in self.pipes
            ]
            text.append("//  " + self._cells(labels) + "".join(f"{one:>9}" for one in cells))
        return "\n".join(line.rstrip() for line in text) + "\n"

    def table(self) -> str:
        """It as a table for the README."""
        text = [
            f"| {' | '.join([*self.heads, *self.pipes])} |",
            "|"
            + "".join(" --- |" if w < 0 else " ---: |" for w in self.widths)
            + " ---: |" * len(self.pipes),
        ]
        for labels, spent in self.lines:
            cells = [f"{getattr(spent, name):,.0f}" for name in self.pipes]
            cells[self.pipes.index(spent.binds)] = f"**{cells[self.pipes.index(spent.binds)]}**"
            text.append(f"| {' | '.join([*labels, *cells])} |")
        return "\n".join(text) + "\n"

    def _cells(self, cells: tuple[str, ...]) -> str:
        return "".join(
            f" {cell:<{-width}}" if width < 0 else f" {cell:>{width}}"
            for cell, width in zip(cells, self.widths, strict=True)
        )

    def read(self) -> str:
        """The text of the file."""
        return sources.read(self.path)

    def put_into(self, source: str) -> str:
        """The text `source` of the file with this budget at its head, before `#pragma once`."""
        head, pragma, body = source.partition(_PRAGMA)
        if not pragma:
            raise ValueError(f"{self.path} has no {_PRAGMA}")
        head = head.split(_BEGIN)[0].removesuffix("//\n")
        return f"{head}//\n{self.comment()}{pragma}{body}"

    def write(self) -> None:
        """Put it into the file."""
        path = sources.root() / self.path
        path.write_text(self.put_into(self.read()), encoding="utf-8")


_BY = "Written by `python -m tools.kernel_report --write budgets`."


def decode_budget(kernel: str) -> Budget:
    """Of the "dense" or the "sparse" kernel."""
    layouts: tuple[KVLayout, ...] = (BF16,) if kernel == "dense" else (BF16, V32_FP8, V4_FP8)
    rows_are = "h_q / h_kv * s_q" if kernel == "dense" else "h_q"
    lines = []
    for layout in layouts:
        for gpu in GPUS:
            for rows in ROWS:
                tile = tile_for(layout, rows, gpu.shared_per_block)
                tiles = f"{-(-rows // tile.rows)}x{tile.rows}"
                work = decode_work(kernel, layout, rows, gpu.shared_per_block)
                labels = (NAMES[layout.name], gpu.name, str(rows), tiles)
                lines.append((labels, cost(gpu, work)))
    return Budget(
        f"portable/decode/{kernel}.cuh",
        f"cycles of an SM for {TOKENS} KV tokens, by what it spends them on. The largest, *, binds."
        f"\nRows are {rows_are}; DRAM is the SM's share of it, and keys that several tiles read "
        f"come\nfrom there once. {_BY}",
        ("keys", "GPU", "rows", "tiles"),
        (-11, -8, 5, 6),
        tuple(lines),
    )


def stream_budget(kernel: str, path: str, what: str) -> Budget:
    """Of a kernel that reads rows and writes rows."""
    kinds = [of for name, of in STREAM_INSTRUCTIONS if name == kernel]
    lines = [
        ((of, gpu.name), cost(gpu, stream_work(kernel, of, gpu.target)))
        for of in kinds
        for gpu in GPUS
    ]
    return Budget(
        path,
        f"cycles of an SM for {TOKENS} rows of bf16 numbers, by what it spends them on. The\n"
        f"largest, *, binds; DRAM is the SM's share of it. {what}\n{_BY}",
        ("rows", "GPU"),
        (-10, -8),
        tuple(lines),
    )


def budgets() -> tuple[Budget, ...]:
    """All of them."""
    half = "Rows of FP16 pools cost the same as BF16's."
    return (
        decode_budget("dense"),
        decode_budget("sparse"),
        stream_budget("append", "portable/cache/append.cuh", half),
        stream_budget("gather", "portable/cache/gather.cuh", half),
        stream_budget("combine", "portable/combine/combine.cuh", "Pieces may be in L2."),
        stream_budget("merge", "portable/combine/merge.cuh", "Results may be in L2."),
    )
