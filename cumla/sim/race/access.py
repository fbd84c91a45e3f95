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
from cumla.sim.race.lanes import Lanes
from cumla.sim.race.layout import SPECIAL, SPLIT
from cumla.sim.race.log import ends
from cumla.sim.race.observed import Observations
from cumla.sim.race.past import Past
from cumla.sim.race.report import Reports, Site
from cumla.sim.race.shadow import Level, Shadow

_ANYTHING = np.array(1)  # the limit where other blocks may have been: any state counts
_SPLIT = np.array(SPLIT)
_STEPS = {k: np.arange(k)[:, None] for k in (1, 2, 3, 4, 6, 8)}
_WIDEST = 32  # bytes that a lane accesses at most, but for bulk copies

_count = np.count_nonzero


class Step:
    """An access by lanes.

    Attributes:
        values: [n] the state that each lane would leave.
        queued: queues make the access, on behalf of the lanes: of a queue's accesses the last one
            stands for the others, but none is ordered after another.
        proxy: the space, if they do so through the asynchronous proxy; else "".
        limit: 0-d; states below it need not be looked at.
    """

    __slots__ = ("lanes", "limit", "proxy", "queued", "shadow", "site", "stamp", "values")

    def __init__(
        self,
        shadow: Shadow,
        site: Site,
        stamp: int,
        lanes: Lanes,
        values: Array,
        queued: bool = False,
        proxy: str = "",
    ) -> None:
        self.shadow = shadow
        self.site = site
        self.stamp = stamp
        self.lanes = lanes
        self.values = values
        self.queued = queued
        self.proxy = proxy
        self.limit = _ANYTHING if shadow.crossed else lanes.limit

    def take(self, which: Array) -> Step:
        """The access by some lanes, in any order and number."""
        return Step(
            self.shadow,
            self.site,
            self.stamp,
            self.lanes.take(which),
            self.values[which],
            self.queued,
            self.proxy,
        )


class Accesses:
    """Carries out steps on the levels of a shadow.

    Cells are [n], or [k, n] where a lane accesses k of them; what is told of lanes, [n],
    broadcasts to either.
    """

    def __init__(self, past: Past, reports: Reports, stride: int, start: int) -> None:
        """stride, start: bytes from a block's shared memory to the next, and before its own."""
        self.layout = reports.layout
        self.past = past
        self.reports = reports
        self.observations = Observations(self.layout, reports.history)
        self.stride = stride
        self.start = start

    def run(self, step: Step, offsets: Array, nbytes: int) -> None:
        """Access nbytes bytes at the byte offset of each lane."""
        if nbytes & 3:
            self._run_odd(step, offsets, nbytes)
        elif nbytes == 4:
            self._do(step.shadow.words, step.shadow.cells(offsets), step)
        elif nbytes <= _WIDEST:
            cells = step.shadow.cells(offsets) + _STEPS[nbytes >> 2]
            self._do(step.shadow.words, cells, step)
        else:
            cells = step.shadow.cells(offsets + np.arange(0, nbytes, 4)[:, None])
            self._do(step.shadow.words, cells, step)

    def _run_odd(self, step: Step, offsets: Array, nbytes: int) -> None:
        width = 1 if nbytes & 1 else 2
        if nbytes > width:
            offsets = offsets + np.arange(0, nbytes, width)[:, None]
        level = step.shadow.words
        cells = step.shadow.cells(offsets)
        level.divide(cells)
        cells = 2 * cells + (offsets >> 1 & 1)
        level = level.below
        if width == 1:
            level.divide(cells)
            cells = 2 * cells + (offsets & 1)
            level = level.below
        self._do(level, cells, step)

    def _do(self, level: Level, cells: Array, step: Step) -> None:
        """Access cells: check, and leave the new state."""
        layout = self.layout
        site, values, limit = step.site, step.values, step.limit
        writes = level.writes.take(cells)
        written = writes >= limit
        recent = _count(written) != 0
        if recent:
            if level.split:
                divided = writes >= _SPLIT
                if _count(divided):
                    level.unite(cells[divided], _ANYTHING if step.shadow.proxied else limit)
                    writes = level.writes.take(cells)
                    divided = writes >= _SPLIT
                    if _count(divided):
                        self._do_divided(level, cells, step, divided)
                        return
                    written = writes >= limit
            self._check(level, cells, step, writes, written, None)
        reads = level.reads.take(cells)
        read = reads >= limit
        if site.writes:
            if _count(read):
                self._check(level, cells, step, reads, read, writes)
            if site.strength and recent:
                values = self._together(level, cells, step, writes, written, None)
            states = level.writes
        else:
            found = _count(read)
            if found:
                if found == read.size and not site.strength:
                    # What many lanes read over and over: there is nothing to decide.
                    flags = layout.all_cross if step.shadow.crossed else layout.all_wide
                    if _count((reads & flags) == flags) == found:
                        level.log.add(step.stamp, cells, values)
                        level.reads[cells] = values | flags | (reads & SPECIAL)
                        return
                values = self._together(level, cells, step, reads, read, writes if recent else None)
            if recent and site.strength:
                level.log.add(step.stamp, cells, values)  # for `Observations`
            states = level.reads
        states[cells] = values
        left = states.take(cells)
        clash = left != values
        if _count(clash):
            self._clash(level, cells, step, states, left, values, clash)

    def _do_divided(self, level: Level, cells: Array, step: Step, divided: Array) -> None:
        flat, divided = cells.reshape(-1), divided.reshape(-1)
        at = divided.nonzero()[0]
        part = step.take(at % cells.shape[-1])
        halves = 2 * flat[at]
        self._do(level.below, np.stack([halves, halves + 1]), part)
        if step.site.writes and not step.site.strength:
            level.writes[flat[at]] = part.values
        at = (~divided).nonzero()[0]
        if at.shape[0]:
            self._do(level, flat[at], step.take(at % cells.shape[-1]))

    def _unordered(self, states: Array, mask: Array, step: Step) -> Array:
        """Of the states where mask is true, those that are not known at a glance.

        Known is what the lane did itself, and what its warp or block did before it last met.
        """
        layout, lanes = self.layout, step.lanes
        apart = states ^ lanes.threads
        need = (apart & layout.not_own) != 0
        need &= mask
        if lanes.warp_limits is not None and _count(need):
            near = (apart & layout.warp_alone) == 0
            near &= states < lanes.warp_limits
            need &= ~near
        if (step.shadow.crossed or not lanes.even) and _count(need):
            near = (apart & layout.block_alone) == 0
            near &= states < lanes.limits
            need &= ~near
        return need

    def _check(
        self,
        level: Level,
        cells: Array,
        step: Step,
        states: Array,
        mask: Array,
        writes: Array | None,
    ) -> None:
        """Find conflicts with states: last writes, or, where writes has those, last reads."""
        layout, site = self.layout, step.site
        need = mask if step.queued else self._unordered(states, mask, step)
        if not _count(need):
            return
        at = need.reshape(-1).nonzero()[0]
        states = states.reshape(-1)[at]
        lane = at % cells.shape[-1]
        ended = None
        if site.strength or writes is not None:
            keep = ~self._exempt(states, step.lanes.threads[lane], site.strength)
            if writes is not None:
                last = writes.reshape(-1)[at]
                ended = np.where(ends(last, layout), last & layout.stamps, 0)
                keep &= states & layout.stamps > ended
                ended = ended[keep]
            if not _count(keep):
                return
            at, states, lane = at[keep], states[keep], lane[keep]
        gids = step.lanes.gids[lane]
        many = states & layout.many != 0
        pending = states & layout.pending != 0
        if _count(many) or _count(pending):
            bad = pending & ~many
            rest = (~many & ~bad).nonzero()[0]
            bad[rest] = self.past.unknown(states[rest], gids[rest], step.proxy)
        else:
            bad = self.past.unknown(states, gids, step.proxy)
        if not (_count(bad) or _count(many)):
            return
        threads, cells = step.lanes.threads[lane], cells.reshape(-1)[at]
        if _count(bad):
            self._report(level, cells[bad], states[bad], gids[bad], step)
        if ended is not None and _count(many):
            noted = step.shadow.reads_by_warp(level, cells[many])
            many[many] = ~self.past.known_by_warps(noted, gids[many], ended[many])
        if _count(many):
            if ended is not None:
                ended = ended[many]
            self._consult(level, cells[many], gids[many], threads[many], step, ended)

    def _exempt(self, states: Array, threads: Array, strength: int) -> Array:
        """Which accesses may be at the same time as one of this strength by these threads."""
        layout = self.layout
        if not strength:
            return np.zeros(states.shape, np.bool_)
        least = np.minimum((states & layout.strengths) >> layout.strength_shift, strength)
        near = ((states ^ threads) & layout.block_alone) == 0
        return (least == 2) | ((least == 1) & near)

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
        i, states = step.shadow.logged_at(level, cells)
        stamps = states & layout.stamps
        # A weak write ends the matter, as in `ends`, if it is one of many as well.
        last = np.zeros(cells.shape[0], np.int64) if ended is None else ended + 1
        weak = (states & (layout.write | layout.strengths)) == layout.write
        np.maximum.at(last, i[weak], stamps[weak])
        mine = threads[i]
        need = (states & layout.write) == kind
        if not step.queued:
            need &= (states ^ mine) & layout.threads != 0
        need &= (stamps >= last[i]) & ~self._exempt(states, mine, step.site.strength)
        i, states = i[need], states[need]
        bad = self.past.unknown(states, gids[i], step.proxy)
        i, states = i[bad], states[bad]
        if i.shape[0]:
            self._report(level, cells[i], states, gids[i], step)

    def _together(
        self,
        level: Level,
        cells: Array,
        step: Step,
        states: Array,
        mask: Array,
        writes: Array | None,
    ) -> Array:
        """The states that stand for the new accesses and for these, where mask is true."""
        layout, strength, values = self.layout, step.site.strength, step.values
        # The new access stands for the old one if it is ordered after it, and if whatever
        # conflicts with the old one conflicts with it.
        merge = self._unordered(states, mask, step)
        if strength:
            before = (states & layout.strengths) >> layout.strength_shift
            merge |= mask & (before < strength)
            merge &= states & layout.pending == 0
        if writes is not None:
            merge &= ~(ends(writes, layout) & (states & layout.stamps <= writes & layout.stamps))
        if not _count(merge):
            return values
        single = merge & ((states & layout.many_flag) == 0)
        if _count(single):
            level.log.add(step.stamp - 1, cells[single], states[single])
        level.log.add(step.stamp, cells, values)
        flags = np.multiply(merge, layout.many_flag)
        apart = states ^ step.lanes.threads
        flags |= np.multiply(merge & ((apart & layout.warp_alone) != 0), layout.wide_flag)
        if step.shadow.crossed:
            flags |= np.multiply(merge & ((apart & layout.block_alone) != 0), layout.cross_flag)
        if not strength:
            return values | flags | np.where(merge, states & SPECIAL, 0)
        least = np.minimum(before, strength) << layout.strength_shift
        together = (values & ~layout.strengths) | least | flags | (states & SPECIAL)
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
        at, lane = cells[clash], clash.nonzero()[-1]
        values = np.broadcast_to(values, cells.shape)[clash]
        left = left[clash]
        apart = left ^ values
        far = (apart & layout.blocks) != 0
        if site.writes and site.strength < 2:
            bad = far if site.strength else np.ones(far.shape, np.bool_)
            if _count(bad):
                self._report(level, at[bad], left[bad], step.lanes.gids[lane[bad]], step)
            if not site.strength:
                return
        states[at] = left | layout.many
        # Of the lanes that lost at a cell, one may be of the winner's warp or block and one not.
        wide = (apart & layout.warps) != 0
        if _count(wide):
            states[at[wide]] |= layout.wide
        if _count(far):
            states[at[far]] |= layout.cross
        level.log.add(step.stamp, cells, step.values)

    def _report(self, level: Level, cells: Array, states: Array, gids: Array, step: Step) -> None:
        shadow = step.shadow

        def unknown(i: Array, others: Array) -> Array:
            return self.past.unseen(others, gids[i], step.proxy)

        fresh = ~self.observations.cover(shadow, level, cells, states, unknown)
        if not _count(fresh):
            return
        cells, states, gids = cells[fresh], states[fresh], gids[fresh]
        offsets = shadow.offsets(level, cells)
        slots = None
        if not shadow.paged:
            # In a cluster it has to be said whose memory it is.
            slots = offsets // self.stride if shadow.crossed else None
            offsets = offsets % self.stride - self.start
        threads = self.past.clocks.threads.thread[gids]
        unfenced = None
        if step.proxy:
            unfenced = self.past.unfenced_only(states, gids, step.proxy)
        self.reports.add(
            shadow.space, offsets, level.width, states, threads, step.site, unfenced, slots
        )
