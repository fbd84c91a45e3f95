"""Strong writes that somebody has seen are ordered before what comes after the look.

PTX ISA "Causality order": X precedes Y if X precedes some Z in observation order and Z precedes Y
in base causality order. So who takes the last ticket of an atomic counter may reset it with a
plain store: the atomic saw all the others'. No fence is needed for that, and nothing but the
counter itself is ordered by it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.race.layout import SPLIT, Layout
from cumla.sim.race.report import History
from cumla.sim.race.shadow import Level, Shadow


class Observations:
    """Who has seen which strong writes, as far as the states and the logs tell."""

    def __init__(self, layout: Layout, history: History) -> None:
        self.layout = layout
        self.history = history

    def cover(
        self,
        shadow: Shadow,
        level: Level,
        cells: Array,
        states: Array,
        unknown: Callable[[Array, Array], Array],
    ) -> Array:
        """[n] bool: what left states[i] in cells[i] was seen, and of that is known.

        unknown: given indices i and states, whether who accesses cells[i] now does not know those.
        """
        layout = self.layout
        shift = layout.stamp_shift
        stamps = (states & layout.stamps) >> shift
        strong = (states & layout.write != 0) & (states & layout.strengths != 0)
        seen = np.zeros(cells.shape[0], np.bool_)
        some = np.flatnonzero(strong)
        if not some.shape[0]:
            return seen
        i, found = self._accesses(shadow, level, cells[some])
        i = some[i]
        when = (found & layout.stamps) >> shift
        atomic = self.history.atomic_at(when)
        stores = (found & layout.write != 0) & ~atomic
        # Lanes of one instruction take their turns one after the other.
        turn = self.history.turn
        later = when > stamps[i]
        later |= (when == stamps[i]) & (
            turn(found & layout.threads) > turn(states[i] & layout.threads)
        )
        # The first store after the write took its place; what looked later saw that.
        end = np.full(cells.shape[0], layout.last_stamp + 1, np.int64)
        after = stores & later
        np.minimum.at(end, i[after], when[after])
        strength = np.minimum(found & layout.strengths, states[i] & layout.strengths)
        apart = (found ^ states[i]) & layout.threads
        near = apart >> layout.local_bits == 0
        looks = (strength == 2 << layout.strength_shift) | ((strength != 0) & near)
        looks &= ~stores & (when < end[i])
        # A weak access after it has been judged already, and counts as ordered.
        weak = (found & layout.strengths == 0) & (when > stamps[i])
        ok = np.flatnonzero((looks & later) | weak)
        i, found = i[ok], found[ok]
        seen[i[~unknown(i, found)]] = True
        return seen

    def _accesses(self, shadow: Shadow, level: Level, cells: Array) -> tuple[Array, Array]:
        """Pairs (i, state) of what is known to have accessed cells[i]."""
        every = np.arange(cells.shape[0])
        i, found = shadow.logged_at(level, cells)
        places, states = [i], [found]
        for shift, above in enumerate(shadow.above(level)):
            places += [every, every]
            states += [above.writes.take(cells >> shift), above.reads.take(cells >> shift)]
        place, state = np.concatenate(places), np.concatenate(states)
        # Of many, the log has each.
        there = np.flatnonzero((state != 0) & (state < SPLIT) & (state & self.layout.many == 0))
        return place[there], state[there]
