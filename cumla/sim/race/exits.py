"""When a block exits its shared memory is gone: what others do there must have happened before."""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.ptx.syntax import Instruction
from cumla.sim.race.layout import SPLIT
from cumla.sim.race.observed import Observations
from cumla.sim.race.past import Past
from cumla.sim.race.report import Reports
from cumla.sim.race.shadow import Shadow


class Exits:
    """Finds accesses to a block's shared memory that its exit may precede."""

    def __init__(self, past: Past, reports: Reports, stride: int, start: int) -> None:
        """stride, start: bytes from a block's shared memory to the next, and before its own."""
        self.past = past
        self.reports = reports
        self.observations = Observations(past.layout, reports.history)
        self.stride = stride
        self.start = start

    def check(self, shadow: Shadow, slot: int, end: Instruction) -> None:
        """The last threads of a block exit.

        Found are accesses of other blocks, and of copies, that none of its threads knows of.
        """
        layout, stride = self.past.layout, self.stride
        gids = np.arange(slot * layout.lanes, (slot + 1) * layout.lanes)
        own = int(self.past.clocks.threads.thread[gids[0]])
        known = self.past.clocks.together(gids)

        def unknown(_: Array, states: Array) -> Array:
            threads, stamps = states & layout.threads, states & layout.stamps
            blocks, locals_ = threads >> layout.local_bits, threads & layout.locals
            mine = (blocks == own >> layout.local_bits) & (locals_ < layout.lanes)
            return ~(mine | known.knows(blocks, locals_, stamps >> layout.stamp_shift))

        site = self.reports.history.site(end, "exit", "weak", "cta")
        self.reports.history.begin(site)
        for level in shadow.words.levels():
            width = level.width
            at = np.arange(slot * stride // width, (slot + 1) * stride // width)
            which, states = level.log.find(at, level.writes)
            cells = np.concatenate([at, at, at[which]])
            states = np.concatenate([level.writes[at], level.reads[at], states])
            others = (states ^ own) & layout.blocks != 0
            others |= states & layout.locals >= layout.lanes
            others &= (states != 0) & (states < SPLIT)
            cells, states = cells[others], states[others]
            bad = unknown(cells, states)
            cells, states = cells[bad], states[bad]
            late = ~self.observations.cover(shadow, level, cells, states, unknown)
            cells, states = cells[late], states[late]
            if cells.shape[0]:
                threads = np.full(cells.shape[0], own)
                offsets = cells * width % stride - self.start
                self.reports.add("shared", offsets, width, states, threads, site)
