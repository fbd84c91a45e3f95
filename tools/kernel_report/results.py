"""What was counted and compiled: taken from a file where that has it, else made and put there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cumla.layouts import LAYOUTS

from . import call_time, code, measure, streams
from .code import Code
from .measure import Case, Counts
from .work import STREAM_INSTRUCTIONS

STREAM_TARGETS = ("sm_80", "sm_90a")


@dataclass
class Results:
    """All figures that need the compiler or the simulator."""

    counts: dict[Case, Counts] = field(default_factory=dict)
    streams: dict[tuple[str, str, str], dict[str, float]] = field(default_factory=dict)
    """By kernel, kind of rows and target."""
    code: list[Code] = field(default_factory=list)
    call_us: tuple[float, float] | None = None
    """`call_time.call_times`."""


def collect(path: Path | None, tell: Callable[[str], None]) -> Results:
    """Everything; this takes about ten minutes. `path` keeps what has been made so far."""
    found = load(path) if path is not None and path.exists() else Results()

    def keep() -> None:
        if path is not None:
            save(path, found)

    for case in measure.cases():
        if case not in found.counts:
            tell(str(case))
            found.counts[case] = measure.measure(case)
            keep()
    for kernel, of in STREAM_INSTRUCTIONS:
        for target in STREAM_TARGETS:
            if (kernel, of, target) not in found.streams:
                tell(f"{kernel} {of} {target}")
                counts = streams.stream_counts(kernel, of, target)
                found.streams[kernel, of, target] = counts
    keep()
    for target in code.TARGETS:
        if target not in {one.target for one in found.code}:
            tell(f"compile for {target}")
            found.code += code.compile_all((target,))
            keep()
    if found.call_us is None:
        tell("time a call")
        found.call_us = call_time.call_times()
        keep()
    return found


def save(path: Path, results: Results) -> None:
    text = json.dumps(
        {
            "counts": [
                {**vars(case), "layout": case.layout.name, "counts": vars(counts)}
                for case, counts in results.counts.items()
            ],
            "streams": [[*key, counts] for key, counts in results.streams.items()],
            "code": [vars(one) for one in results.code],
            "call_us": results.call_us,
        },
        indent=1,
    )
    path.write_text(text, encoding="utf-8")


def load(path: Path) -> Results:
    given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    layouts = {one.name: one for one in LAYOUTS}
    return Results(
        {
            Case(one["kernel"], layouts[one["layout"]], one["rows"], one["target"]): Counts(
                **one["counts"]
            )
            for one in given["counts"]
        },
        {(kernel, of, target): counts for kernel, of, target, counts in given["streams"]},
        [Code(**one) for one in given["code"]],
        None if given["call_us"] is None else tuple(given["call_us"]),
    )
