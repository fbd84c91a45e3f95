"""Chains of mma, found in a program, arranged as panels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cumla.sim.isa.mma_forms import Form
from cumla.sim.isa.mma_panels import Panels


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
