"""The race detector of a launch: what accesses and synchronisation tell it, and what it finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cumla.sim.cohort import WARP, Array, Cohort
from cumla.sim.ptx.syntax import Instruction
from cumla.sim.race.access import Accesses, Step
from cumla.sim.race.clocks import Clocks, Rows
from cumla.sim.race.copies import Agents, Copy, pending
from cumla.sim.race.exits import Exits
from cumla.sim.race.lanes import Groups, Lanes, Threads, by_key
from cumla.sim.race.layout import SPECIAL, Layout
from cumla.sim.race.order import MemoryOrder, Places
from cumla.sim.race.overlap import Overlap
from cumla.sim.race.past import Past
from cumla.sim.race.report import History, Race, Reports, Site
from cumla.sim.race.shadow import Shadow

if TYPE_CHECKING:
    from cumla.sim.wave import Wave

# What an asynchronous access is called, its order and its scope.
_ASYNCHRONOUS = {
    "read": ("asynchronous read", "weak", "cta"),
    "write": ("asynchronous copy", "weak", "cta"),
    "atomic": ("asynchronous reduction", "relaxed", "gpu"),
    "arrival": ("asynchronous arrival", "relaxed", "gpu"),
}
_LANES_KEPT = 64
_LOG_SHORT = 1 << 12
_ALL_LANES = 0xFFFFFFFF
_LOG_LIMIT = 1 << 23  # entries of a log: 16 bytes each


class RaceDetector:
    """Finds accesses to the same bytes, not both reads, that no synchronisation orders.

    Ordered is what happens before, in the sense of the PTX ISA's causality order, between threads:
    lanes of a warp are not ordered without __syncwarp. Of the accesses to a byte at least the
    first that races is found, and none is reported that does not race, whatever the order in
    which the simulator happened to run the lanes. Blocks of different waves are not ordered.
    What is kept of reads by many threads is bounded (`Log.limit`): beyond it a race may be missed.

    An atomic counts as a write, also a compare-and-swap that fails. Not looked at is whether
    strong accesses that overlap in part do so wholly (PTX ISA "Morally strong operations", 3).
    Of proxies the asynchronous one is told apart, see `asynchronous`.

    Attributes:
        overlap: notes of accesses, to be compared with those of grids that may run at the same
            time; None if there are none.
    """

    def __init__(self, wave: Wave, end: Instruction | None = None, proxied: bool = False) -> None:
        """Begin with the first wave of a launch.

        Args:
            end: the instruction at which blocks exit, for the messages about those of clusters.
            proxied: the target has the asynchronous proxy.
        """
        blocks = wave.grid[0] * wave.grid[1] * wave.grid[2]
        self._end = end
        self._proxied = proxied
        self._layout = Layout(blocks, wave.lanes_per_block)
        self._history = History(self._layout, blocks)
        self._reports = Reports(wave, self._layout, self._history)
        self._places = Places()
        self._global = Shadow("global", self._layout, None, _LOG_LIMIT)
        self.overlap: Overlap | None = None
        self.next_wave(wave)

    def next_wave(self, wave: Wave) -> None:
        """Other blocks of the same launch begin, in no order with those before."""
        self._wave = wave
        slots = len(wave.block_ids)
        self._history.seat(wave.block_ids)
        self._threads = threads = Threads(self._layout, wave.block_ids)
        rows = Rows(self._layout.lanes)
        self._clocks = clocks = Clocks(threads, rows)
        self._places.forget_shared()
        self._order = MemoryOrder(threads, rows, clocks, self._history, self._places)
        self._agents = Agents(self._layout)
        # In a cluster other blocks access a block's shared memory, too.
        warps = self._layout.lanes // WARP if wave.cluster_size == 1 else 0
        size = slots * wave.shared_stride
        self._shared = Shadow("shared", self._layout, size, _LOG_LIMIT, warps, self._proxied)
        past = Past(self._layout, clocks, self._order.proxy)
        self._accesses = Accesses(past, self._reports, wave.shared_stride, wave.shared_start)
        self._exits = Exits(past, self._reports, wave.shared_stride, wave.shared_start)
        self._lanes: dict[int, Lanes] = {}
        self._warps_met = False
        self._log_short = _LOG_SHORT  # a shared log is not looked through before it is longer

    def races(self) -> list[Race]:
        """What was found so far, one race for each pair of instructions."""
        return list(self._reports.races.values())

    def access(
        self,
        ins: Instruction,
        cohort: Cohort,
        space: str,
        offset: Array,
        nbytes: int,
        kind: str,
        order: str = "weak",
        scope: str = "cta",
    ) -> None:
        """The lanes access nbytes bytes each, at byte offsets in the arena of the space.

        Args:
            kind: "read", "write" or "atomic".
            order: "weak", "volatile", "relaxed", "acquire", "release" or "acq_rel".
            scope: "cta", "cluster", "gpu" or "sys"; of no matter for weak and volatile accesses.
        """
        if not cohort.n:
            return
        offset = cohort.full(offset)
        site = self._history.site(ins, kind, order, scope)
        shadow = self._shared if space == "shared" else self._global
        step = self._step(cohort.gids, shadow, site)
        self._run(step, offset, nbytes)
        if self.overlap is not None and shadow.paged:
            strong = site.strength > 0 and (scope in ("gpu", "sys") or order == "volatile")
            self.overlap.access(ins, cohort.gids, offset, nbytes, kind, strong)
        if site.strength:
            self._order.access(space, offset, cohort.gids, site)

    def grid_waited(self, ins: Instruction, cohort: Cohort) -> None:
        """The lanes know from now on that the grid before theirs has completed."""
        if self.overlap is not None:
            self._history.begin(self._history.site(ins, "read", "weak", "cta"))
            self.overlap.wait(self._clocks, cohort.gids, self._history.now)

    def _step(self, gids: Array, shadow: Shadow, site: Site) -> Step:
        lanes = self._lanes.get(id(gids))
        if lanes is None or lanes.gids is not gids:
            lanes = self._new_lanes(gids)
        state = self._history.begin(site)
        return Step(shadow, site, self._history.now, lanes, lanes.threads | state)

    def _new_lanes(self, gids: Array) -> Lanes:
        shift = self._layout.stamp_shift
        limits = self._clocks.block.take(gids) + 1 << shift
        least = np.minimum.reduce(limits)
        even = bool(least == np.maximum.reduce(limits))
        warps = self._clocks.warp.take(gids) + 1 << shift if self._warps_met else None
        threads = self._threads.thread.take(gids)
        if len(self._lanes) > _LANES_KEPT:
            self._lanes.clear()
        lanes = self._lanes[id(gids)] = Lanes(gids, threads, np.array(least), limits, warps, even)
        return lanes

    def _run(self, step: Step, offset: Array, nbytes: int) -> None:
        try:
            self._accesses.run(step, offset, nbytes)
        except IndexError:
            if not step.shadow.paged:
                raise
            step.shadow.add_pages(offset, nbytes)
            self._accesses.run(step, offset, nbytes)

    def barrier(self, gids: Array) -> None:
        """The lanes, ascending, met at a barrier of their blocks."""
        self._order.barrier(gids)
        lanes = self._layout.lanes
        if not self._met_quickly(gids, lanes):
            groups = Groups.runs(gids, gids // lanes)
            self._meet(groups, self._whole(groups, lanes), lanes)
        self._lanes.clear()
        self._shorten_logs()

    def exited(self, gids: Array) -> None:
        """The lanes have exited: of a block that has no others its shared memory is gone."""
        if self._end is None or not (self._shared.crossed or self._agents.used):
            return
        lanes = self._layout.lanes
        for slot in np.unique(gids // lanes).tolist():
            if not self._wave.live[slot * lanes :][:lanes].any():
                self._exits.check(self._shared, slot, self._end)

    def warp_sync(self, cohort: Cohort, membermask: Array) -> None:
        """Lanes of one warp that are here and have the same mask meet, as in bar.warp.sync."""
        gids = cohort.gids
        self._warps_met = True
        self._lanes.clear()
        if membermask.shape[0] == 1:
            full = cohort.whole and int(membermask[0]) == _ALL_LANES
            if full and self._met_quickly(gids, WARP):
                return
            groups = Groups.runs(gids, gids >> 5)
        else:
            by = np.lexsort((membermask, gids >> 5))
            gids = gids[by]
            groups = Groups.runs(gids, gids >> 5, membermask[by])
        self._meet(groups, self._whole(groups, WARP), WARP)

    def _met_quickly(self, gids: Array, size: int) -> bool:
        """Do a meeting of whole blocks or whole warps, if it is one of the simple ones."""
        clocks = self._clocks
        if not clocks.plain or self._order.flows:
            return False
        if size == WARP and self._layout.lanes != WARP:
            clocks.warp[gids] = self._history.now
            return True
        lanes = self._layout.lanes
        first, end = int(gids[0]) // lanes * lanes, (int(gids[-1]) // lanes + 1) * lanes
        if np.count_nonzero(self._wave.live[first:end]) != gids.shape[0]:
            return False
        clocks.block[first:end] = self._history.now
        return True

    def _shorten_logs(self) -> None:
        live = self._wave.live
        if self._shared.logged() > self._log_short and np.count_nonzero(live):
            self._shared.drop(self._clocks.known_to_all(live.nonzero()[0], self._wave.cluster_size))
            self._log_short = _LOG_SHORT + 2 * self._shared.logged()

    def _whole(self, groups: Groups, size: int) -> Array:
        """Which groups are all the lanes that have not exited of a block or warp of this size."""
        live = self._wave.live.reshape(-1, size).sum(axis=1)
        return live[groups.gids[groups.starts] // size] == groups.counts

    def _meet(self, groups: Groups, whole: Array, size: int) -> None:
        """Groups of lanes meet; a whole one together with the lanes that have exited."""
        self._order.changes += 1
        now, flows = self._history.now, (self._clocks, *self._order.flows)
        if not whole.all():
            some = groups.pick(~whole)
            for clocks in flows:
                clocks.meet_some(some, now)
            groups = groups.pick(whole)
            if not groups.gids.shape[0]:
                return
        if (groups.counts != size).any():
            groups = groups.padded(size)
        for clocks in flows:
            clocks.meet_all(groups, size == self._layout.lanes, now)

    def asynchronous(
        self,
        ins: Instruction,
        issuers: Array,
        agents: Array,
        space: str,
        kind: str,
        offsets: Array,
        rows: Array,
        nbytes: int,
        proxy: bool = True,
    ) -> int:
        """Asynchronous operations access memory on behalf of lanes: bulk copies, wgmma, st.async.

        Ordered before that is what the issuer knows; for those of the asynchronous proxy, of what
        was written through the generic one only what a proxy fence covered. Ordered after it is
        nothing until `completed` or `completed_to` is called.

        Args:
            issuers: [m] the lanes.
            agents: [m] names of the queues that do the work, any int64: what one does is known up
                to a stamp. Of a call, a queue that writes has one issuer.
            space: "shared" or "global".
            kind: "read", "write", "atomic", or "arrival" (of bytes, on an mbarrier).
            offsets: [k] byte offsets in the arena of the space, of nbytes bytes each.
            rows: [k] which of the issuers each is for.
            proxy: they are of the asynchronous proxy; always the same for a queue.

        Returns:
            The stamp of these accesses.
        """
        site = self._history.site(ins, *_ASYNCHRONOUS[kind])
        shadow = self._shared if space == "shared" else self._global
        state = self._history.begin(site) | SPECIAL
        blocks = self._threads.block[issuers] << self._layout.local_bits
        who = blocks | self._locals(issuers, agents, proxy)
        nothing = np.ones(issuers.shape[0], np.int64)
        lanes = Lanes(issuers, who, nothing[0], nothing, None, even=False)
        through = space if proxy else ""
        step = Step(shadow, site, self._history.now, lanes, who | state, True, through)
        self._run(step.take(rows), offsets, nbytes)
        if self.overlap is not None and shadow.paged:
            self.overlap.access(ins, issuers[rows], offsets, nbytes, kind, False)
        return self._history.now

    def _locals(self, gids: Array, agents: Array, proxy: bool = True) -> Array:
        """[m] the local threads that stand for queues of the lanes' blocks."""
        blocks = self._threads.block[gids].tolist()
        pairs = zip(blocks, agents.tolist(), strict=True)
        return np.array([self._agents.of(block, agent, proxy) for block, agent in pairs], np.int64)

    def completed(self, gids: Array, agents: Array, stamp: int) -> None:
        """Lane gids[i] knows what queue agents[i] of its block did up to the stamp."""
        self._clocks.learn_all(gids, self._locals(gids, agents), stamp)

    def completed_to(self, keys: Array, issuers: Array, agents: Array, stamp: int) -> None:
        """Whoever acquires keys[i] knows what queue agents[i] of the issuer's block did."""
        blocks = self._threads.block[issuers].tolist()
        locals_ = self._locals(issuers, agents).tolist()
        for key, block, agent in zip(keys.tolist(), blocks, locals_, strict=True):
            self._clocks.tell(key, block, agent, stamp)

    def proxy_fence(self, cohort: Cohort, limit: str) -> None:
        """The lanes execute fence.proxy.async, of "shared" or "global" accesses or ("") both."""
        self._order.proxy_fence(cohort.gids, limit)

    def fence(self, cohort: Cohort, scope: str, order: str) -> None:
        """The lanes execute a fence: "acq_rel", "sc", "acquire" or "release", of a scope."""
        self._order.fence(cohort.gids, scope, order)

    def release(self, gids: Array, keys: Array | int) -> None:
        """What the lanes did so far happens before what others do after they acquire the key.

        keys: one for each lane, or one for all; any int64.
        """
        groups, names = by_key(gids, keys, self._layout.lanes)
        now = self._history.now
        self._clocks.release(groups, names, now)
        for clocks in self._order.flows:
            if clocks.fenced(gids).any():
                clocks.release(groups, names, now)

    def release_fenced(self, gids: Array, keys: Array) -> None:
        """As `release`, of what the lanes' last fences cover: what a relaxed arrival tells."""
        self._order.release_fenced(gids, keys)

    def acquire(self, gids: Array, keys: Array | int) -> None:
        """What was released into the keys happens before what the lanes do from now on."""
        groups, names = by_key(gids, keys, self._layout.lanes)
        self._clocks.acquire(groups, names)
        self._order.changes += 1
        for clocks in self._order.flows:
            clocks.acquire(groups, names)

    def forget(self, keys: Array | int) -> None:
        """The keys will not be used again, or only with another meaning."""
        for key in np.unique(np.asarray(keys)).tolist():
            self._agents.forget(key)
            for clocks in (self._clocks, *self._order.flows):
                clocks.forget(key)

    def copy_issued(
        self, ins: Instruction, cohort: Cohort, offset: Array, nbytes: Array | int
    ) -> Copy:
        """The lanes start asynchronous writes of shared memory: multiples of four bytes."""
        site = self._history.site(ins, "asynchronous copy", "weak", "cta")
        step = self._step(cohort.gids, self._shared, site)
        step.values = pending(step.values, self._layout)
        offset = cohort.full(offset)
        if isinstance(nbytes, int):
            self._accesses.run(step, offset, nbytes)
            cells = (offset >> 2) + np.arange(nbytes >> 2)[:, None]
            return Copy(site, cohort.gids, cells, None, step.values)
        words = cohort.full(nbytes) >> 2
        lane = np.repeat(np.arange(cohort.n), words)
        within = np.arange(lane.shape[0]) - np.repeat(np.cumsum(words) - words, words)
        cells = (offset >> 2)[lane] + within
        if lane.shape[0]:
            self._accesses.run(step.take(lane), cells << 2, 4)
        return Copy(site, cohort.gids, cells, lane, step.values)

    def copy_landed(self, copy: Copy, mask: Array | None) -> None:
        """The lanes of the copy where mask is true (None: all) have waited for their part."""
        if mask is None:
            mask = np.ones(copy.gids.shape[0], np.bool_)
        value = self._history.begin(copy.site)
        states = self._threads.thread[copy.gids] | value
        landed = copy.land(self._shared.words, mask, states)
        for i in np.flatnonzero(mask & ~landed & (copy.agents >= 0)).tolist():
            self._clocks.learn(int(copy.gids[i]), int(copy.agents[i]), int(copy.stamps[i]))

    def copy_released(self, copy: Copy, mask: Array | None, keys: Array | int) -> None:
        """Parts of the copy landed and completed phases: those who acquire a key know them.

        keys: one for each lane where mask is true, or one for all.
        """
        if mask is None:
            mask = np.ones(copy.gids.shape[0], np.bool_)
        value = self._history.begin(copy.site) | SPECIAL
        lanes = np.flatnonzero(mask)
        names = np.broadcast_to(np.asarray(keys, np.int64), lanes.shape)
        blocks = self._threads.block[copy.gids]
        places: dict[tuple[int, int], list[int]] = {}
        for i, block, key in zip(
            lanes.tolist(), blocks[lanes].tolist(), names.tolist(), strict=True
        ):
            places.setdefault((block, key), []).append(i)
        states = np.zeros(mask.shape[0], np.int64)
        for (block, key), members in places.items():
            before = copy.agents[members]
            # Who acquires the phase knows the copy, whichever phase it completed before.
            done = {(int(a), int(s)) for a, s in zip(before, copy.stamps[members], strict=True)}
            for agent, stamp in done:
                if agent >= 0:
                    self._clocks.tell(key, block, agent, stamp)
            fresh = np.array(members)[before < 0]
            if fresh.shape[0]:
                agent = self._agents.of(block, key)
                self._clocks.tell(key, block, agent, self._history.now)
                copy.agents[fresh] = agent
                copy.stamps[fresh] = self._history.now
                states[fresh] = block << self._layout.local_bits | agent | value
        copy.land(self._shared.words, mask & (states != 0), states)
