"""Whether earlier accesses, as states tell of them, happen before an access by a lane."""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import Array
from cumla.sim.race.clocks import Clocks
from cumla.sim.race.fences import Proxies
from cumla.sim.race.layout import Layout


class Past:
    """What lanes know of accesses that left states.

    proxy: the space, if it is the asynchronous proxy that makes the access now, on behalf of the
        lanes; else "".
    """

    def __init__(self, layout: Layout, clocks: Clocks, fences: Proxies) -> None:
        self.layout = layout
        self.clocks = clocks
        self.fences = fences

    def unknown(self, states: Array, gids: Array, proxy: str) -> Array:
        """[n] bool: whether each lane does not know the one access that left each state."""
        unknown = ~self._known(self.clocks, states, gids)
        if proxy:
            unknown |= self.unfenced(states, gids, proxy)
        return unknown

    def unseen(self, states: Array, gids: Array, proxy: str) -> Array:
        """As `unknown`, of accesses that saw a write: it takes a proxy fence after reads, too."""
        return self.unknown(states | self.layout.write, gids, proxy)

    def _known(self, clocks: Clocks, states: Array, gids: Array) -> Array:
        stamps = (states & self.layout.stamps) >> self.layout.stamp_shift
        return clocks.known(gids, states & self.layout.threads, stamps)

    def unfenced(self, states: Array, gids: Array, space: str) -> Array:
        """[n] bool: which states are writes that no proxy fence made known to the lanes' copies.

        Those through the generic proxy, that is. PTX ISA "Causality order": operations through
        different proxies are ordered only with a proxy fence along the way from one to the other.
        That reads come before later copies into the same memory takes no such fence in CUDA's own
        programs, so it takes none here.
        """
        layout = self.layout
        local = states & layout.locals
        generic = (local < layout.lanes) | (local >= layout.generic)
        at = np.flatnonzero((states & layout.write != 0) & generic)
        unfenced = np.zeros(states.shape, np.bool_)
        unfenced[at] = True
        for fences in self.fences.of(space):
            unfenced[at] &= ~self._known(fences, states[at], gids[at])
        return unfenced

    def unfenced_only(self, states: Array, gids: Array, space: str) -> Array:
        """[n] bool: which of the unfenced have happened before, but for that."""
        pending = states & self.layout.pending != 0
        known = self._known(self.clocks, states, gids) & ~pending
        return self.unfenced(states, gids, space) & known

    def known_by_warps(self, noted: Array | None, gids: Array, ended: Array) -> Array:
        """[n] bool: whether each lane knows all that warps did up to their last reads, noted."""
        if noted is None:
            return np.zeros(gids.shape[0], np.bool_)
        after = ended[:, None] >> self.layout.stamp_shift
        known: Array = (noted <= self.clocks.known_warps(gids)) | (noted <= after)
        return np.logical_and.reduce(known, axis=1)
