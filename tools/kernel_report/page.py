"""The generated parts of kernels_cu/README.md: each between two comments that name it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cumla.jit import nvrtc, sources
from cumla.jit.occupancy import limits
from cumla.kernels.decode import tile_for
from cumla.layouts import BF16, FP16, LAYOUTS, V32_FP8, KVLayout

from . import budget, code, measure
from .gpus import GPUS
from .measure import Case, Counts
from .results import STREAM_TARGETS, Results
from .work import STREAM_INSTRUCTIONS

PAGE = sources.root() / "README.md"
FORMULAS = ("gpus", "tiles", "budgets")
"""The parts that need neither compiler nor simulator."""
MEASURED = ("figures", "counters", "code")

_HALF = (BF16, FP16)


def replaced(page: str, name: str, text: str) -> str:
    """The page with another text in its part `name`."""
    begin, end = f"<!-- {name} (python -m tools.kernel_report) -->\n", f"<!-- end of {name} -->\n"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{PAGE.name} has not just one part {name!r}")
    before, rest = page.split(begin)
    return before + begin + "\n" + text.strip("\n") + "\n\n" + end + rest.split(end)[1]


def part(page: str, name: str) -> str:
    """The text of a part."""
    found = re.search(
        rf"<!-- {name} \(.*?\) -->\n\n(.*?)\n\n<!-- end of {name} -->", page, re.DOTALL
    )
    if found is None:
        raise ValueError(f"{PAGE.name} has no part {name!r}")
    return found[1]


def formulas(name: str) -> str:
    """One of FORMULAS."""
    if name == "gpus":
        return _gpus()
    if name == "tiles":
        return _tiles()
    shown = []
    for one in budget.budgets():
        shown.append(f"`{one.path}`\n\n{one.table()}")
    return "\n".join(shown)


def measured(name: str, results: Results) -> str:
    """One of MEASURED."""
    if name == "figures":
        return _figures(results)
    if name == "counters":
        return "\n".join([*_counters(results), _streams(results)])
    return _code(results.code)


def table(heads: Iterable[str], left: int, rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table whose first `left` columns are text."""
    heads = list(heads)
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "".join(f"| {' | '.join(row)} |\n" for row in [heads, rule, *rows])


# ------------------------------------------------------------------------------------- formulas


def _gpus() -> str:
    rows = [
        [
            one.name,
            one.target,
            str(one.sms),
            f"{one.clock / 1e9:.2f}",
            f"{one.dram / 1e9:,.0f}",
            f"{one.dram_per_cycle:.1f}",
            f"{one.tensor:,.0f}",
        ]
        for one in GPUS
    ]
    heads = ["GPU", "target", "SMs", "GHz", "DRAM GB/s", "its bytes a cycle and SM"]
    text = table([*heads, "MMA FLOPs a cycle and SM"], 2, rows)
    return text + "\n" + "\n".join(f"- {one.name}: {one.source}." for one in GPUS)


def _tiles() -> str:
    rows = []
    for targets in (("sm_86", "sm_89", "sm_120"), ("sm_80",), ("sm_90a", "sm_100")):
        room = limits(targets[0]).shared_bytes_per_block
        for layout in (BF16, V32_FP8):
            for height in (16, 32, 64):
                tile = tile_for(layout, height, room)
                if tile.rows != height:
                    continue
                size = layout.data_row_bytes if layout.is_fp8 else 2 * layout.d_qk
                # A stage of 16-bit rows is in use while the next ones are fetched.
                ahead = tile.stages - (not layout.is_fp8)
                rows.append(
                    [
                        ", ".join(targets),
                        "FP8" if layout.is_fp8 else "16-bit",
                        *map(str, (height, tile.warps, tile.stages)),
                        f"{tile.shared_bytes:,}",
                        str(tile.blocks_per_sm),
                        f"{ahead * 32 * size * tile.blocks_per_sm / 1024:.0f}",
                    ]
                )
    heads = ["targets", "keys", "rows", "warps", "stages", "shared bytes", "blocks an SM"]
    return table([*heads, "KiB under way"], 2, rows)


# ------------------------------------------------------------------------------------- measured


@dataclass(frozen=True)
class Figure:
    """A row of the first table."""

    name: str
    target: str
    value: str
    met: bool

    def cells(self) -> list[str]:
        return [self.name, self.target, self.value, "yes" if self.met else "**missed**"]


def _figures(results: Results) -> str:
    rows = [one.cells() for one in figures(results)]
    return table(["figure", "target", "now", "met"], 2, rows)


def figures(results: Results) -> Iterator[Figure]:
    """What the kernels are held against."""
    compiled, counts = results.code, results.counts
    memory = max(one.spill_bytes + one.local_bytes for one in compiled)
    different = len({one.expression for one in compiled})
    yield Figure(
        f"spills and local memory, bytes: the worst of {different} instantiations on "
        f"{', '.join(code.TARGETS)}",
        "0",
        str(memory),
        memory == 0,
    )

    def at_most(name: str, limit: float, values: Iterable[float]) -> Figure:
        worst = max(values)
        return Figure(name, f"<= {limit:.2f}", f"{worst:.3f}", worst <= limit)

    yield at_most(
        "shared wavefronts / least possible",
        1.05,
        (_ratio(one.whole, "shared_wavefronts") for one in counts.values()),
    )
    for kernel, limit in (("dense", 1.02), ("sparse", 1.10)):
        yield at_most(
            f"global sectors / least possible, main loop, {kernel}",
            limit,
            (_ratio(one.loop, "global_sectors") for case, one in counts.items()
             if case.kernel == kernel),
        )  # fmt: skip
    yield at_most(
        "DRAM bytes touched / compulsory, in whole sectors",
        1.02,
        (one.whole["dram_bytes"] / one.dram_needed for one in counts.values()),
    )
    for name, fp8 in (("16-bit rows", False), ("FP8 rows", True)):
        yield at_most(
            f"DRAM bytes touched / bytes of rows and indices, main loop, lone tokens, {name}",
            1.02,
            (
                one.loop["dram_bytes"] / (case.layout.row_bytes + 4 * (case.kernel == "sparse"))
                for case, one in counts.items()
                if case.layout.is_fp8 == fp8
            ),
        )
    yield at_most(
        "MMA FLOPs issued / needed, rows a multiple of 16",
        1.05,
        (one.whole["tensor_flops"] / one.flops_needed for one in counts.values()),
    )
    for name, limit, fp8 in (("16-bit rows", 0.40, False), ("FP8 rows", 0.60, True)):
        yield at_most(
            f"all warp instructions, 16 heads / 64 heads on the same tokens, {name}",
            limit,
            (
                one.whole["warp_instructions"]
                / counts[_of_height(case, 64)].whole["warp_instructions"]
                for case, one in counts.items()
                if case.rows == 16 and case.layout.is_fp8 == fp8
            ),
        )
    known, first = results.call_us or (math.nan, math.nan)
    what = "Python microseconds of a decode call up to the launch, plan reused"
    for kind, us in (
        ("every argument check run (the first call of its kind)", first),
        ("a kind of call seen before, whose checks are remembered", known),
    ):
        yield Figure(f"{what}: {kind}", "<= 60", f"{us:.0f}", us <= 60)
    slowest = max(compiled, key=lambda one: one.seconds)
    yield Figure(
        "NVRTC seconds for one kernel and target, PTX and cubin, of one core",
        "<= 1.5",
        f"{slowest.seconds:.2f}",
        slowest.seconds <= 1.5,
    )


def _ratio(counts: dict[str, float], name: str) -> float:
    return counts[name] / counts[f"{name}_least"]


def _of_height(case: Case, rows: int) -> Case:
    return Case(case.kernel, case.layout, rows, case.target)


def _counters(results: Results) -> Iterator[str]:
    for kernel in ("dense", "sparse"):
        layouts = (BF16,) if kernel == "dense" else (BF16, *LAYOUTS[2:])
        for layout in layouts:
            name = layout.name
            if layout in _HALF and _same_for_halves(results.counts, kernel):
                name = "BF16 and FP16"
            rows = list(_counter_rows(results.counts, kernel, layout))
            heads = ["rows", "tiles", "targets", "warp instructions", "tensor FLOPs"]
            heads += ["shared wavefronts", "sectors (least)", "DRAM bytes"]
            yield f"`decode_{kernel}`, {name}, for each KV token:\n\n{table(heads, 3, rows)}"


def _same_for_halves(counts: dict[Case, Counts], kernel: str) -> bool:
    return all(
        one.loop == counts[Case(kernel, FP16, case.rows, case.target)].loop
        for case, one in counts.items()
        if case.kernel == kernel and case.layout == BF16
    )


def _counter_rows(counts: dict[Case, Counts], kernel: str, layout: KVLayout) -> Iterator[list[str]]:
    for rows in measure.HEIGHTS:
        lines: dict[tuple[str, ...], list[Case]] = {}
        for target in measure.TARGETS:
            case = Case(kernel, layout, rows, target)
            loop = counts[case].loop
            height = tile_for(layout, rows, limits(target).shared_bytes_per_block).rows
            rest = (
                f"{-(-rows // height)}x{height}",
                f"{loop['tensor_flops']:,.0f}",
                f"{loop['shared_wavefronts']:.1f}",
                f"{loop['global_sectors']:.1f} ({loop['global_sectors_least']:.1f})",
                f"{loop['dram_bytes']:,.0f}",
            )
            lines.setdefault(rest, []).append(case)
        for (tiles, *rest), cases in lines.items():
            instructions = [f"{counts[one].loop['warp_instructions']:.1f}" for one in cases]
            if len(set(instructions)) == 1:
                instructions = instructions[:1]
            targets = ", ".join(one.target for one in cases)
            yield [str(rows), tiles, targets, ", ".join(instructions), *rest]


def _streams(results: Results) -> str:
    rows = []
    for kernel, of in STREAM_INSTRUCTIONS:
        found = [results.streams[kernel, of, target] for target in STREAM_TARGETS]
        instructions = [f"{one['warp_instructions']:.0f}" for one in found]
        one = found[0]
        rows.append(
            [
                kernel,
                of,
                ", ".join(instructions[: len(set(instructions))]),
                f"{one['global_sectors']:.1f} ({one['global_sectors_least']:.1f})",
                f"{one['dram_bytes']:,.0f}",
            ]
        )
    heads = ["kernel", "of", "warp instructions", "sectors (least)", "DRAM bytes"]
    targets = " and ".join(STREAM_TARGETS)
    return (
        f"The kernels that move or join rows, for each row of bf16 numbers, on {targets}:\n\n"
        + table(heads, 2, rows)
    )


def _code(compiled: list[code.Code]) -> str:
    lines: dict[tuple[str, str], dict[str, code.Code]] = {}
    for one in compiled:
        lines.setdefault(one.name, {})[one.target] = one
    folded: dict[tuple[str, ...], list[str]] = {}  # variants that need the same of a GPU
    for (kernel, variant), found in lines.items():
        cells = [
            f"{found[one].registers}, {found[one].blocks}" if one in found else ""
            for one in code.TARGETS
        ]
        folded.setdefault((kernel, *cells), []).append(variant)
    rows = []
    for (kernel, *cells), variants in folded.items():
        some = [one for variant in variants for one in lines[kernel, variant].values()]
        size = max(one.code_bytes for one in some) / 1024
        seconds = max(one.seconds for one in some)
        names = "; ".join(variants)
        rows.append([f"`{kernel}`", names, *cells, f"{size:.0f}", f"{seconds:.1f}"])
    version = ".".join(map(str, nvrtc.version()))
    heads = ["kernel", "variants", *code.TARGETS, "KiB", "s"]
    text = (
        f"NVRTC {version}. For each target the registers of a thread and the blocks that an SM\n"
        "holds; the size of the largest code; the longest compilation, in CPU seconds (one of\n"
        f"more than {code.SECONDS} is tried again, at most twice, and the least counts).\n\n"
    )
    return text + table(heads, 2, rows)
