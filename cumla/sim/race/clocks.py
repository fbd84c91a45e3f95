"""What every lane knows: up to which stamp each other thread's accesses happen before its own.

Most synchronisation is of whole blocks or warps, so a lane's clock is the largest of a number for
its block, a number for its warp, a row with one number for each thread of its block (shared by
lanes that know the same, made only by synchronisation among some) and a sparse `Clock` for the
threads of other blocks (made only by synchronisation through memory).
"""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import WARP, Array
from cumla.sim.race.clock import Abroad, Clock, Part, merged
from cumla.sim.race.lanes import Groups, Threads
from cumla.sim.race.layout import COPY_AGENTS


class Rows:
    """Rows of stamps for the threads of a block, and for its copies. Row 0 is all zero.

    A row is never changed while anyone's number stands for it.
    """

    def __init__(self, lanes: int) -> None:
        self.data = np.zeros((64, lanes + COPY_AGENTS), np.int32)
        self.users: list[Clocks] = []
        self.collections = 0
        self._free = np.arange(1, 64)

    def add(self, rows: Array) -> Array:
        """The numbers of these new rows."""
        count = rows.shape[0]
        if count > self._free.shape[0]:
            self._collect(count)
        numbers, self._free = self._free[:count], self._free[count:]
        self.data[numbers] = rows
        return numbers

    def _collect(self, count: int) -> None:
        self.collections += 1
        capacity, width = self.data.shape
        used = np.zeros(capacity, np.bool_)
        used[0] = True
        for user in self.users:
            used[user.row] = True
            for parts in user.objects.values():
                used[list(parts.values())] = True
        kept = int(used.sum())
        while capacity < 2 * (kept + count):
            capacity *= 2
        if capacity > self.data.shape[0]:
            data = np.zeros((capacity, width), np.int32)
            data[: self.data.shape[0]] = self.data
            self.data = data
            used = np.append(used, np.zeros(capacity - used.shape[0], np.bool_))
        self._free = np.flatnonzero(~used)


class Clocks:
    """The clocks of the lanes of a wave.

    Attributes:
        block, warp: [lanes] int64: stamps up to which all threads of the lane's block, or of its
            warp, are known. Copies are not threads: only rows know of them.
        row: [lanes] the number of the lane's row.
        abroad: what lanes know of other blocks' threads; None while nobody knows any.
        objects: by key, by block: the row that was released there.
        copies: whether rows may know of asynchronous copies.
    """

    def __init__(self, threads: Threads, rows: Rows) -> None:
        self.threads = threads
        self.rows = rows
        rows.users.append(self)
        lanes = threads.thread.shape[0]
        self.block = np.zeros(lanes, np.int64)
        self.warp = np.zeros(lanes, np.int64)
        self.row = np.zeros(lanes, np.int64)
        self.abroad: Abroad | None = None
        self.objects: dict[int, dict[int, int]] = {}
        self.objects_abroad: dict[int, Clock] = {}
        self.copies = False
        self._rowed = False  # some lane may have a row

    @property
    def plain(self) -> bool:
        """Whether `block` and `warp` tell all that is known."""
        return not self._rowed and self.abroad is None

    def known(self, gids: Array, threads: Array, stamps: Array) -> Array:
        """[n] bool: whether lane gids[i] knows what threads[i] did up to stamps[i]."""
        layout = self.threads.layout
        apart = self.threads.thread.take(gids) ^ threads
        local = threads & layout.locals
        near = apart >> layout.local_bits == 0
        if self._rowed:
            data = self.rows.data
            ok = data.reshape(-1).take(self.row.take(gids) * data.shape[1] + local) >= stamps
            ok &= near
            if np.count_nonzero(ok) == ok.shape[0]:
                return ok
        else:
            ok = np.zeros(gids.shape[0], np.bool_)
        ok |= near & (stamps <= self.block.take(gids)) & (local < layout.lanes)
        ok |= self._itself(gids, apart, stamps)
        ok |= (apart >> 5 == 0) & (stamps <= self.warp.take(gids))
        if self.abroad is not None:
            rest = np.flatnonzero(~near)
            if rest.shape[0]:
                blocks = threads[rest] >> layout.local_bits
                ok[rest] = self.abroad.knows(gids[rest], blocks, local[rest], stamps[rest])
        return ok

    def _itself(self, gids: Array, apart: Array, stamps: Array) -> Array:
        """[n] bool: where apart is 0, whether the lane knows what it did itself up to stamps."""
        return apart == 0

    def known_warps(self, gids: Array) -> Array:
        """[n, warps + 1] up to which stamp each lane knows all threads of each warp of its block.

        The last column is of the threads that stand for copies.
        """
        threads = self.threads
        runs = Groups.runs(gids, self.row[gids], gids // WARP)
        first = gids[runs.starts]
        rows = self.rows.data[self.row[first]]
        known = rows.reshape(first.shape[0], -1, WARP).min(axis=2)
        warps = known[:, :-1]
        np.maximum(warps, self.block[first, None], out=warps, casting="same_kind")
        at = np.arange(first.shape[0]), threads.local[first] // WARP
        known[at] = np.maximum(known[at], self.warp[first])
        return np.repeat(known, runs.counts, axis=0)

    def known_to_all(self, gids: Array, cluster: int) -> int:
        """Up to which stamp all these lanes know all threads of their clusters of so many blocks.

        It may be more than is told here.
        """
        least = int(self.block[gids].min())
        if cluster == 1:
            return least
        if self.abroad is None:
            return 0
        blocks, lanes = self.threads.block[:: self.threads.lanes].tolist(), self.threads.lanes
        runs = Groups.runs(gids, self.abroad.names[gids], gids // lanes)
        for gid in gids[runs.starts].tolist():
            clock, slot = self.abroad[gid], gid // lanes
            first = slot // cluster * cluster
            for other in range(first, first + cluster):
                if other != slot:
                    part = None if clock is None else clock.parts.get(blocks[other])
                    least = min(least, 0 if part is None else part.low)
        return least

    def meet_some(self, groups: Groups, now: int) -> None:
        """Each group's lanes met: some of a block, or of a warp."""
        joined = self._joined(groups, now)
        self.row[groups.gids] = groups.spread(self.rows.add(joined))
        self._rowed = True
        if self.abroad is not None:
            self.abroad.share(groups)

    def meet_all(self, groups: Groups, blocks: bool, now: int) -> None:
        """Each group's lanes met: all the lanes of a block (or else of a warp), exited or not."""
        if self._rowed:
            if blocks and not self.copies:
                self.row[groups.gids] = 0
                self._rowed = bool(self.row.any())
            else:
                self._share_rows(groups, now)
        column = self.block if blocks else self.warp
        column[groups.gids] = now
        if self.abroad is not None:
            self.abroad.share(groups)

    def _share_rows(self, groups: Groups, now: int) -> None:
        """Give the lanes of each group, who know each other from now on, one row."""
        numbers = self.row[groups.gids]
        low = np.minimum.reduceat(numbers, groups.starts)
        differ = low != np.maximum.reduceat(numbers, groups.starts)
        if differ.any():
            some = groups.pick(differ)
            self.row[some.gids] = some.spread(self.rows.add(self._joined(some, now)))

    def release(self, groups: Groups, keys: list[int], now: int) -> None:
        """Each group's lanes release what they know into the object of its key."""
        rows = self._joined(groups, now)
        blocks = self.threads.block[groups.gids[groups.starts]].tolist()
        places = [self.objects.setdefault(key, {}) for key in keys]
        held = [place.get(block, 0) for place, block in zip(places, blocks, strict=True)]
        if any(held):
            np.maximum(rows, self.rows.data[held], out=rows)
        numbers = self.rows.add(rows).tolist()
        for place, block, number in zip(places, blocks, numbers, strict=True):
            place[block] = number
        if self.abroad is not None:
            for key, gids in zip(keys, groups.lists(), strict=True):
                known = self.abroad.together(np.array(gids))
                clock = merged(self.objects_abroad.get(key), known)
                if clock is not None:
                    self.objects_abroad[key] = clock

    def acquire(self, groups: Groups, keys: list[int]) -> None:
        """Each group's lanes get to know what was released into the object of its key."""
        blocks = self.threads.block[groups.gids[groups.starts]].tolist()
        parts = [self.objects.get(key, {}) for key in keys]
        theirs = np.array([part.get(b, 0) for part, b in zip(parts, blocks, strict=True)])
        self._take_rows(groups, theirs)
        for i, (key, block, part) in enumerate(zip(keys, blocks, parts, strict=True)):
            clock = self.objects_abroad.get(key)
            if len(part) > (block in part):
                others = {b: self._part(self.rows.data[n]) for b, n in part.items() if b != block}
                clock = merged(clock, Clock(others, self.threads.lanes))
            if clock is not None:
                at = int(groups.starts[i])
                self.absorb_all(groups.gids[at : at + int(groups.counts[i])], clock)

    def _take_rows(self, groups: Groups, theirs: Array) -> None:
        gids = groups.gids
        runs = Groups.runs(gids, self.row[gids], groups.spread(theirs))
        mine = self.row[gids[runs.starts]]
        theirs = groups.spread(theirs)[runs.starts]
        result = np.where(mine == 0, theirs, mine)
        both = np.flatnonzero((mine != 0) & (theirs != 0) & (mine != theirs))
        if both.shape[0]:
            data = self.rows.data
            result[both] = self.rows.add(np.maximum(data[mine[both]], data[theirs[both]]))
        self.row[gids] = runs.spread(result)
        self._rowed = True

    def tell(self, key: int, block: int, agent: int, stamp: int) -> None:
        """The object of the key gets to know a copy: local thread `agent` of the block."""
        self.copies = True
        part = self.objects.setdefault(key, {})
        part[block] = self._with(part.get(block, 0), agent, stamp)

    def tell_all(self, key: int, clock: Clock) -> None:
        """The object of the key gets to know what a clock knows."""
        known = merged(self.objects_abroad.get(key), clock)
        assert known is not None
        self.objects_abroad[key] = known

    def learn(self, gid: int, agent: int, stamp: int) -> None:
        """A lane gets to know a copy of its block."""
        self.copies = self._rowed = True
        self.row[gid] = self._with(int(self.row[gid]), agent, stamp)

    def learn_all(self, gids: Array, agents: Array, stamp: int) -> None:
        """Each lane gets to know what a copy of its block did up to a stamp."""
        self.copies = self._rowed = True
        numbers = self.row[gids]
        width = self.rows.data.shape[1]
        pairs, which = np.unique(numbers * width + agents, return_inverse=True)
        old, agent = pairs // width, pairs % width
        fresh = np.flatnonzero(self.rows.data[old, agent] < stamp)
        if fresh.shape[0]:
            rows = self.rows.data[old[fresh]]
            rows[np.arange(fresh.shape[0]), agent[fresh]] = stamp
            old[fresh] = self.rows.add(rows)
            self.row[gids] = old[which]

    def _with(self, number: int, agent: int, stamp: int) -> int:
        row = self.rows.data[number].copy()
        if row[agent] >= stamp:
            return number
        row[agent] = stamp
        return int(self.rows.add(row[None])[0])

    def forget(self, key: int) -> None:
        """The object of the key will not be used again."""
        self.objects.pop(key, None)
        self.objects_abroad.pop(key, None)

    def absorb(self, gid: int, clock: Clock) -> None:
        """A lane gets to know what a clock knows."""
        self.absorb_all(np.array([gid]), clock)

    def absorb_all(self, gids: Array, clock: Clock) -> None:
        """Lanes of one block get to know what a clock knows."""
        part = clock.parts.get(int(self.threads.block[gids[0]]))
        if part is not None:
            old, which = np.unique(self.row[gids], return_inverse=True)
            before = self.rows.data[old]
            rows = np.maximum(before, part.row)
            fresh = np.flatnonzero((rows != before).any(axis=1))
            if fresh.shape[0]:
                old[fresh] = self.rows.add(rows[fresh])
                self.row[gids] = old[which]
                self._rowed = True
        if self.abroad is None:
            self.abroad = Abroad(self.row.shape[0])
        self.abroad.add(gids, clock)

    def export(self, gid: int, now: int) -> Clock:
        """All that a lane knows."""
        gids = np.array([gid])
        row = self._joined(Groups(gids, np.zeros(1, np.int64)), now)[0]
        own = Clock({int(self.threads.block[gid]): self._part(row)}, self.threads.lanes)
        return merged(None if self.abroad is None else self.abroad[gid], own) or own

    def together(self, gids: Array) -> Clock:
        """All that any of the lanes of a block knows of threads other than themselves."""
        row = self.rows.data[np.unique(self.row[gids])].max(axis=0)
        own = Clock({int(self.threads.block[gids[0]]): self._part(row)}, self.threads.lanes)
        return merged(None if self.abroad is None else self.abroad.together(gids), own) or own

    def _part(self, row: Array) -> Part:
        return Part(row.copy(), self.threads.lanes)

    def _own(self, gids: Array, now: int) -> Array | int:
        """Up to which stamp the lanes' own accesses count."""
        return now

    def _joined(self, groups: Groups, now: int) -> Array:
        """[groups, width] what the lanes of each group know of their block, together."""
        gids, starts = groups.gids, groups.starts
        numbers = self.row[gids]
        low = np.minimum.reduceat(numbers, starts)
        high = np.maximum.reduceat(numbers, starts)
        data = self.rows.data
        rows = data[low]
        if np.count_nonzero(low != high):
            if ((numbers == groups.spread(low)) | (numbers == groups.spread(high))).all():
                np.maximum(rows, data[high], out=rows)
            else:
                rows = np.maximum.reduceat(data[numbers], starts, axis=0)
        lanes = self.threads.lanes
        local = self.threads.local[gids]
        group = groups.numbers()
        floor = np.maximum.reduceat(self.block[gids], starts).astype(np.int32)
        np.maximum(rows[:, :lanes], floor[:, None], out=rows[:, :lanes])
        warp = self.warp[gids]
        if np.count_nonzero(warp):
            runs = Groups.runs(gids, group, local >> 5)
            floor = np.maximum.reduceat(warp, runs.starts).astype(np.int32)[:, None]
            at = group[runs.starts][:, None]
            to = (local[runs.starts] & -WARP)[:, None] + np.arange(WARP)
            rows[at, to] = np.maximum(rows[at, to], floor)
        rows[group, local] = np.maximum(rows[group, local], self._own(gids, now))
        return rows
