"""Counters as an HTML page: the CUDA source with a heat column and the counts of each line."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

# Column -> (heading, what it says, for the page's legend).
COLUMNS = {
    "warp_instructions": ("warp instr.", "instructions run, one for each warp that runs it"),
    "lanes": ("lanes", "mean number of active lanes of a warp, of 32"),
    "divergence": ("diverged", "branches at which lanes of a warp parted, of all branches"),
    "sectors": ("sectors", "32-byte sectors of global memory asked for"),
    "sector_ratio": ("/ least", "sectors over the fewest that hold the bytes used"),
    "dram_bytes": ("DRAM bytes", "distinct bytes of global memory touched, in whole sectors"),
    "wavefronts": ("wavefronts", "passes over shared memory"),
    "wavefront_ratio": ("/ least", "passes over the fewest possible: bank conflicts"),
    "tensor_flops": ("tensor FLOP", "operations of mma and wgmma instructions"),
    "bulk_bytes": ("bulk bytes", "bytes that bulk and tensor copies wrote"),
    "bulk_sectors": ("bulk sectors", "32-byte sectors of global memory that they read or wrote"),
    "multicast": ("multicast", "bytes that multicast did not read again"),
    "barrier_waits": ("waits", "waits of warps at barriers"),
}

STYLE = """
body { font: 14px/1.35 system-ui, sans-serif; margin: 1.5em; color: #1b1b1b; background: #fff; }
table { border-collapse: collapse; }
th, td { padding: 1px 8px; text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #999; font-weight: 600; }
td.code { text-align: left; font-family: ui-monospace, monospace; white-space: pre; }
td.heat { padding: 0; width: 70px; text-align: left; }
td.heat div { height: 1em; background: #d9480f; }
td.number { color: #888; }
tr:hover td { background: #f3f3f3; }
.bad { color: #c00; font-weight: 600; }
dl { columns: 2; max-width: 75em; } dt { font-weight: 600; } dd { margin: 0 0 .3em 1em; }
"""


def page(counters: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """The HTML page of a launch.

    Args:
        counters: what `Counters.to_json` holds.
        sources: text of source files by the name that the counters' lines have; lines of files
            that are not here are shown without their text.
    """
    title = (
        f"{counters['kernel']}, grid {_size(counters['grid'])}, block {_size(counters['block'])}"
    )
    by_file: dict[str, dict[int, Mapping[str, Any]]] = {}
    for where, row in counters["lines"].items():
        file, _, line = where.rpartition(":")
        if line.isdigit():
            by_file.setdefault(file, {})[int(line)] = row
        else:
            by_file.setdefault("instructions without a source line", {})[0] = row
    total = counters["total"]
    most = max((r["warp_instructions"] for r in counters["lines"].values()), default=1) or 1
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1><p>Simulated counts, exact for this run; no times.</p>",
        "<table>",
        _heading("total"),
        f"<tr><td></td><td></td>{_cells(total)}<td class='code'>whole kernel</td></tr></table>",
        "<h2>Warp instructions by class</h2><table>",
    ]
    for name, number in sorted(total["by_class"].items(), key=lambda item: -item[1]):
        share = number / max(total["warp_instructions"], 1)
        parts.append(
            f"<tr><td class='code'>{html.escape(name)}</td><td>{number:,}</td>"
            f"<td>{share:.1%}</td><td class='heat'>{_bar(share)}</td></tr>"
        )
    parts.append("</table>")
    for file, rows in by_file.items():
        parts.append(f"<h2>{html.escape(file)}</h2><table>{_heading('source')}")
        text = _source(file, sources)
        last = max(max(rows), len(text))
        for number in range(min(rows) if not text else 1, last + 1):
            code = text[number - 1] if 0 < number <= len(text) else ""
            row = rows.get(number)
            if row is None and not text:
                continue
            heat = _bar(row["warp_instructions"] / most) if row else ""
            cells = _cells(row) if row else "<td></td>" * len(COLUMNS)
            parts.append(
                f"<tr><td class='number'>{number}</td><td class='heat'>{heat}</td>{cells}"
                f"<td class='code'>{html.escape(code)}</td></tr>"
            )
        parts.append("</table>")
    parts.append("<h2>Columns</h2><dl>")
    for heading, meaning in COLUMNS.values():
        parts.append(f"<dt>{heading}</dt><dd>{meaning}</dd>")
    parts.append("</dl></body></html>")
    return "\n".join(parts)


def _size(numbers: list[int]) -> str:
    return " x ".join(str(n) for n in numbers)


def _source(file: str, sources: Mapping[str, str]) -> list[str]:
    for name, text in sources.items():
        if name == file or PurePath(name).name == PurePath(file).name:
            return text.splitlines()
    return []


def _heading(last: str) -> str:
    heads = "".join(f"<th title='{why}'>{head}</th>" for head, why in COLUMNS.values())
    return f"<tr><th></th><th>heat</th>{heads}<th style='text-align:left'>{last}</th></tr>"


def _bar(share: float) -> str:
    return f"<div style='width:{100 * share:.1f}%;opacity:{0.25 + 0.75 * share:.2f}'></div>"


def _cells(row: Mapping[str, Any]) -> str:
    warps = row["warp_instructions"]
    ratios = []
    for had, least in (
        ("global_sectors", "global_sectors_least"),
        ("shared_wavefronts", "shared_wavefronts_least"),
    ):
        ratio = row[had] / row[least] if row[least] else 0.0
        text = f"{ratio:.2f}" if ratio else ""
        ratios.append(f"<span class='bad'>{text}</span>" if ratio > 1.05 else text)
    branches, diverged = row["branches"], row["divergent_branches"]
    lanes = row["thread_instructions"] / warps if warps else 0.0
    cells = [
        f"{warps:,}",
        f"<span class='bad'>{lanes:.1f}</span>" if 0 < lanes < 24 else f"{lanes:.1f}",
        f"{diverged:,} / {branches:,}" if branches else "",
        _number(row["global_sectors"]),
        ratios[0],
        _number(row["dram_bytes"]),
        _number(row["shared_wavefronts"]),
        ratios[1],
        _number(row["tensor_flops"]),
        _number(row["bulk_bytes"]),
        _number(row["bulk_sectors"]),
        _number(row["multicast_bytes_saved"]),
        _number(row["barrier_waits"]),
    ]
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _number(value: int) -> str:
    return f"{value:,}" if value else ""
