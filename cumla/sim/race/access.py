"""One access of many lanes: is it ordered after what conflicts with it, and what it leaves.

As in FastTrack (Flanagan and Freund, PLDI 2009) a cell has its last write and its last read; where
one read does not stand for all reads since the write, or one strong write for all those that need
no order among them, the state says "many" and the others are in the level's log. The common case,
in which everything found is older than the last barrier of the block, is decided by one
comparison for all lanes.
"""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.race.clocks import Clocks
from cumla.sim.race.layout import SPECIAL, SPLIT
from cumla.sim.race.observed import Observations
from cumla.sim.race.report import Reports, Site
from cumla.sim.race.shadow import Level, Shadow, ends


class Step:
    """Lanes that access cells.

    Attributes:
        gids, threads: [n] the lanes, and as threads of the launch.
        values: [n] the state that each would leave.
        limit: states below it are of accesses that all the lanes know of, however they compare.
    """

    __slots__ = ("gids", "limit", "shadow", "site", "stamp", "threads", "values")

    def __init__(
        self,
        shadow: Shadow,
        site: Site,
        stamp: int,
        gids: Array,
        threads: Array,
        values: Array,
        limit: int,
    ) -> None:
        self.shadow = shadow
        self.site = site
        self.stamp = stamp
        self.gids = gids
        self.threads = threads
        self.values = values
        self.limit = limit

    def take(self, lanes: Array) -> Step:
        """The step of some lanes, in any order and number."""
        return Step(
            self.shadow,
            self.site,
            self.stamp,
            self.gids[lanes],
            self.threads[lanes],
            self.values[lanes],
            self.limit,
        )


def _any(mask: Array) -> bool:
    return bool(np.logical_or.reduce(mask, axis=None))


def _most(states: Array) -> int:
    return int(np.maximum.reduce(states, axis=None))


class Accesses:
    """Carries out steps on the levels of a shadow.

    Attributes:
        clocks: what the lanes know.
    """

    def __init__(self, clocks: Clocks, reports: Reports, stride: int) -> None:
        self.layout = reports.layout
        self.clocks = clocks
        self.observations = Observations(self.layout, clocks, reports.history)
        self.reports = reports
        self.stride = stride

    def run(self, step: Step, offsets: Array, nbytes: int) -> None:
        """Access nbytes bytes at the byte offset of each lane."""
        words = step.shadow.words
        if nbytes & 3 or nbytes > 32:
            self._run_odd(step, offsets, nbytes)
            return
        cells = step.shadow.cells(offsets)
        if nbytes > 4:
            cells = cells[:, None] + np.arange(nbytes >> 2)
        self._do(words, cells, step)

    def _run_odd(self, step: Step, offsets: Array, nbytes: int) -> None:
        words = step.shadow.words
        if nbytes & 3 == 0:
            cells = step.shadow.cells(offsets[:, None] + np.arange(0, nbytes, 4))
            self._do(words, cells, step)
            return
        width = 2 if nbytes & 1 == 0 else 1
        if nbytes > width:
            offsets = offsets[:, None] + np.arange(0, nbytes, width)
        cells = step.shadow.cells(offsets)
        words.divide(cells.reshape(-1))
        cells = 2 * cells + (offsets >> 1 & 1)
        level = words.below
        if width == 1:
            level.divide(cells.reshape(-1))
            cells = 2 * cells + (offsets & 1)
            level = level.below
        self._do(level, cells, step)

    def _do(self, level: Level, cells: Array, step: Step) -> None:
        """Access cells, [n] or [n, k]: check, and leave the new state."""
        values = step.values if cells.ndim == 1 else step.values[:, None]
        site, limit = step.site, step.limit
        writes = level.writes.take(cells)
        old = _most(writes) < limit
        if not old:
            if level.split and _any(writes >= SPLIT):
                self._do_divided(level, cells, step)
                return
            self._check(level, cells, step, writes, None)
        reads = level.reads.take(cells)
        if site.writes:
            if _most(reads) >= limit:
                self._check(level, cells, step, reads, writes)
            if site.strength and not old:
                values = self._together(level, cells, step, writes, values, None)
            level.writes[cells] = values
            states = level.writes
        else:
            if _most(reads) >= limit:
                values = self._together(level, cells, step, reads, values, None if old else writes)
            level.reads[cells] = values
            states = level.reads
        left = states.take(cells)
        clash = left != values
        if _any(clash):
            self._clash(level, cells, step, states, left, values, clash)

    def _do_divided(self, level: Level, cells: Array, step: Step) -> None:
        flat = cells.reshape(-1)
        divided = level.writes.take(flat) >= SPLIT
        level.unite(flat[divided], step.limit)
        divided = level.writes.take(flat) >= SPLIT
        lane = np.arange(flat.shape[0]) // (flat.shape[0] // cells.shape[0])
        at = np.flatnonzero(divided)
        if at.shape[0]:
            part = step.take(lane[at])
            halves = 2 * flat[at]
            self._do(level.below, np.stack([halves, halves + 1], axis=-1), part)
            if step.site.writes and not step.site.strength:
                level.writes[flat[at]] = part.values
        at = np.flatnonzero(~divided)
        if at.shape[0]:
            self._do(level, flat[at], step.take(lane[at]))

    def _check(
        self, level: Level, cells: Array, step: Step, states: Array, writes: Array | None
    ) -> None:
        """Find conflicts with states: last writes, or, where writes has those, last reads."""
        layout, site = self.layout, step.site
        states = states.reshape(-1)
        each = states.shape[0] // cells.shape[0]
        at = np.flatnonzero(states >= step.limit)
        states = states[at]
        lane = at // each if each > 1 else at
        threads = step.threads[lane]
        apart = states ^ threads
        # Done with: the thread's own, what the block's last barrier ordered, what may race.
        need = (apart & (layout.threads | layout.many | layout.pending)) != 0
        near = ((apart & layout.threads) >> layout.local_bits == 0) & (states & layout.cross == 0)
        floor = (self.clocks.block.take(step.gids[lane]) + 1) << layout.stamp_shift
        need &= ~(near & (states < floor))
        if site.strength:
            strength = np.minimum(
                (states & layout.strengths) >> layout.strength_shift, site.strength
            )
            need &= ~((strength == 2) | ((strength == 1) & near))
        if writes is not None:
            last = writes.reshape(-1)[at]
            need &= ~(ends(last, layout) & (states & layout.stamps <= last & layout.stamps))
        if not _any(need):
            return
        some = np.flatnonzero(need)
        at, states, lane, threads = at[some], states[some], lane[some], threads[some]
        gids = step.gids[lane]
        stamps = (states & layout.stamps) >> layout.stamp_shift
        many = states & layout.many != 0
        bad = (states & layout.pending != 0) & ~many
        rest = np.flatnonzero(~many & ~bad)
        if rest.shape[0]:
            others = states[rest] & layout.threads
            bad[rest] = ~self.clocks.known(gids[rest], others, stamps[rest])
        cells = cells.reshape(-1)[at]
        if _any(bad):
            self._report(level, cells[bad], states[bad], gids[bad], threads[bad], step)
        if _any(many):
            ended = None
            if writes is not None:
                last = writes.reshape(-1)[at[many]]
                ended = np.where(ends(last, layout), last & layout.stamps, 0)
            self._consult(level, cells[many], gids[many], threads[many], step, ended)

    def _consult(
        self,
        level: Level,
        cells: Array,
        gids: Array,
        threads: Array,
        step: Step,
        ended: Array | None,
    ) -> None:
        """Find conflicts with logged reads newer than ended; where that is None, with writes."""
        layout = self.layout
        kind = layout.write if ended is None else 0
        shift = 0
        up: Level | None = level
        for up in self._above(step.shadow, level):
            i, states = up.log.find(cells >> shift, up.writes, layout)
            shift += 1
            mine = threads[i]
            need = ((states & layout.write) == kind) & ((states ^ mine) & layout.threads != 0)
            if ended is not None:
                need &= states & layout.stamps > ended[i]
            if step.site.strength:
                strength = np.minimum(
                    (states & layout.strengths) >> layout.strength_shift, step.site.strength
                )
                near = ((states ^ mine) & layout.threads) >> layout.local_bits == 0
                need &= ~((strength == 2) | ((strength == 1) & near))
            some = np.flatnonzero(need)
            if not some.shape[0]:
                continue
            i, states = i[some], states[some]
            stamps = (states & layout.stamps) >> layout.stamp_shift
            bad = ~self.clocks.known(gids[i], states & layout.threads, stamps)
            i, states = i[bad], states[bad]
            if i.shape[0]:
                self._report(level, cells[i], states, gids[i], threads[i], step)

    @staticmethod
    def _above(shadow: Shadow, level: Level) -> list[Level]:
        """The level and those above it: what was logged before a cell was divided counts."""
        levels = shadow.words.levels()
        return levels[levels.index(level) :: -1]

    def _together(
        self,
        level: Level,
        cells: Array,
        step: Step,
        states: Array,
        values: Array,
        writes: Array | None,
    ) -> Array:
        """The states that stand for these and for the accesses that values are of."""
        layout, site = self.layout, step.site
        gids, threads = step.gids, step.threads
        if cells.ndim > 1:
            gids, threads = gids[:, None], threads[:, None]
        apart = states ^ threads
        # The new access stands for the old one if it is ordered after it, and if whatever
        # conflicts with the old one conflicts with it.
        same = (apart & (layout.threads | layout.many | layout.pending)) == 0
        floor = (self.clocks.block.take(gids) + 1) << layout.stamp_shift
        near = ((apart & layout.threads) >> layout.local_bits == 0) & (states & layout.cross == 0)
        known = near & (states < floor)
        strength = (states & layout.strengths) >> layout.strength_shift
        if site.strength:
            weaker = strength < site.strength
            same &= ~weaker
            if step.shadow.paged:
                known &= ~weaker
        merge = ~(same | known) & (states != 0) & (states & layout.pending == 0)
        if writes is not None:
            merge &= ~(ends(writes, layout) & (states & layout.stamps <= writes & layout.stamps))
        if not _any(merge):
            return values
        together = values | layout.many
        if step.shadow.paged:
            together = together | np.where(near, 0, layout.cross)
        if site.strength:
            least = np.minimum(strength, site.strength) << layout.strength_shift
            together = (together & ~layout.strengths) | least
        together = together | (states & SPECIAL)
        single = merge & (states & layout.many == 0)
        if _any(single):
            level.log.add(step.stamp - 1, cells[single], states[single])
        level.log.add(step.stamp, cells, values)
        return np.where(merge, together, values)

    def _clash(
        self,
        level: Level,
        cells: Array,
        step: Step,
        states: Array,
        left: Array,
        values: Array,
        clash: Array,
    ) -> None:
        """Lanes of the step met at a cell: left has the states of those that prevailed."""
        layout, site = self.layout, step.site
        shape = cells.shape
        values = np.broadcast_to(values, shape)[clash]
        left, at = left[clash], cells[clash]
        far = ((left ^ values) & layout.threads) >> layout.local_bits != 0
        if site.writes and site.strength < 2:
            bad = far if site.strength else np.ones(at.shape[0], np.bool_)
            if _any(bad):
                lane = np.nonzero(clash)[0][bad]
                self._report(level, at[bad], left[bad], step.gids[lane], step.threads[lane], step)
        if site.writes and not site.strength:
            return
        states[at] = left | layout.many
        # Of the lanes that lost at a cell, one may be of the winner's block and one not.
        states[at[far]] |= layout.cross
        level.log.add(step.stamp, cells, step.values if len(shape) == 1 else step.values[:, None])

    def _report(
        self,
        level: Level,
        cells: Array,
        states: Array,
        gids: Array,
        threads: Array,
        step: Step,
    ) -> None:
        shadow = step.shadow
        seen = self.observations.cover(self._above(shadow, level), cells, states, gids)
        if _any(seen):
            fresh = ~seen
            if not _any(fresh):
                return
            cells, states = cells[fresh], states[fresh]
            gids, threads = gids[fresh], threads[fresh]
        offsets = shadow.offsets(level, cells)
        if not shadow.paged:
            offsets = offsets - gids // self.clocks.threads.lanes * self.stride
        self.reports.add(shadow.space, offsets, level.width, states, threads, step.site)
