"""Asynchronous copies: writes that nobody, not even who started them, is ordered with yet."""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.race.layout import COPY_AGENTS, PROXY_AGENTS, SPECIAL, SPLIT, Layout
from cumla.sim.race.report import Site
from cumla.sim.race.shadow import Level

GENERIC_AGENTS = COPY_AGENTS - PROXY_AGENTS


class Copy:
    """A copy on its way: `RaceDetector.copy_issued` makes it.

    Attributes:
        site: the instruction.
        gids: [n] the lanes that started it.
        agents: [n] the local thread that stands for the copy, once it completed a phase; or -1.
        stamps: [n] when it did.
    """

    def __init__(
        self, site: Site, gids: Array, cells: Array, lane: Array | None, states: Array
    ) -> None:
        """cells: [k, n] the words, or [m] with lane, [m], who writes each.

        states: [n] what that left there.
        """
        self.site = site
        self.gids = gids
        self.agents = np.full(gids.shape[0], -1, np.int64)
        self.stamps = np.zeros(gids.shape[0], np.int64)
        self._cells = cells
        self._lane = lane
        self._states = states
        self._pending = np.ones(gids.shape[0], np.bool_)

    def land(self, level: Level, mask: Array, states: Array) -> Array:
        """Leave these states where mask [n] is true and nobody wrote since; where it was true."""
        landing = mask & self._pending
        self._pending &= ~mask
        if self._lane is None:
            at = lanes = landing.nonzero()[0]
        else:
            at = landing[self._lane].nonzero()[0]
            lanes = self._lane[at]
        if at.shape[0]:
            _settle(level, self._cells[..., at], self._states[lanes], states[lanes])
        return landing


def _settle(level: Level, cells: Array, before: Array, after: Array) -> None:
    found = level.writes.take(cells)
    same = found == before
    if np.count_nonzero(same) == same.size:
        level.writes[cells] = after
        return
    after = np.broadcast_to(after, cells.shape)
    level.writes[cells[same]] = after[same]
    divided = found >= SPLIT
    if np.count_nonzero(divided):
        halves = 2 * cells[divided]
        before = np.broadcast_to(before, cells.shape)[divided]
        for half in (halves, halves + 1):
            _settle(level.below, half, before, after[divided])


class Agents:
    """The threads that stand for the copies which complete phases of mbarriers.

    Each key has its own in its block, so that to wait for one copy is not to wait for another.
    There are COPY_AGENTS in a block, given out in turn, those of either proxy by themselves: who
    waits for a key knows too much, namely the copies of a key so many before it. That may hide a
    race; it cannot invent one.

    Attributes:
        used: whether any has been given out.
    """

    def __init__(self, layout: Layout) -> None:
        self._lanes = layout.lanes
        self.used = False
        self._next: dict[tuple[int, bool], int] = {}
        self._of: dict[int, dict[int, int]] = {}

    def of(self, block: int, key: int, proxy: bool = False) -> int:
        """The local number of the thread that stands for copies to a key, through either proxy."""
        self.used = True
        agents = self._of.setdefault(key, {})
        agent = agents.get(block)
        if agent is None:
            turn = self._next.get((block, proxy), 0)
            self._next[block, proxy] = turn + 1
            first, count = (0, PROXY_AGENTS) if proxy else (PROXY_AGENTS, GENERIC_AGENTS)
            agent = agents[block] = self._lanes + first + turn % count
        return agent

    def forget(self, key: int) -> None:
        """The key will not be used again."""
        self._of.pop(key, None)


def pending(values: Array, layout: Layout) -> Array:
    """The states of writes that have not landed."""
    return values | (SPECIAL | layout.pending)
