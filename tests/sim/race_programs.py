"""Programs told to the race detector and to the definition of a race at the same time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from cumla.sim.cohort import Cohort
from cumla.sim.ptx.syntax import Instruction
from cumla.sim.race import RaceDetector
from sim.happens_before import Did, Program

STRIDE = 64
PART = 16


def instruction(number):
    return Instruction("ld", (), (), None, number + 1, None, f"ld {number};", number)


END = instruction(1 << 20)


def fake_wave(lanes, block_ids, active, grid, stride=STRIDE, cluster_size=1):
    live = np.zeros(len(block_ids) * lanes, np.bool_)
    for slot in range(len(block_ids)):
        live[slot * lanes + np.array(active)] = True
    return SimpleNamespace(
        grid=(grid, 1, 1),
        block=(lanes, 1, 1),
        block_ids=np.array(block_ids),
        lanes_per_block=lanes,
        threads_per_block=lanes,
        live=live,
        cluster_size=cluster_size,
        shared_start=0,
        shared_stride=stride,
        shared_size=stride,
        slots=len(block_ids),
    )


class Both:
    """A program told to the detector and to the definition; `check` compares what they found.

    cluster: the blocks of a wave are clusters of so many. The bytes that a program accesses in the
        shared memory of slot s must then be those from s * PART on, by which reports are told
        apart. A block's exit is checked, too.
    proxied: the asynchronous proxy may access memory.
    """

    def __init__(self, lanes, active, waves, stride=STRIDE, cluster=0, proxied=False):
        self.lanes = lanes
        self.active = active
        self.stride = stride
        self.cluster = cluster
        self.proxied = proxied
        self.grid = sum(len(blocks) for blocks in waves)
        self.program = Program(lanes)
        self.detector = None
        self.number = 0
        self.found = []  # (event, byte, first thread or None, first event, second thread)
        self.event_of = {}  # stamp: event
        self.told = []
        self.queued = {}  # block, queue: dids
        self.wave(waves[0])

    def wave(self, blocks):
        self.blocks = blocks
        self.cohorts = {}
        cluster = self.cluster or 1
        self.now = fake_wave(self.lanes, blocks, self.active, self.grid, self.stride, cluster)
        if self.detector is None:
            self.detector = RaceDetector(self.now, END if self.cluster else None, self.proxied)
            self.add = self.detector._reports.add
            self.detector._reports.add = self.reported
        else:
            self.detector.next_wave(self.now)
            self.program.keys.clear()
            self.program.told.clear()
        self.shared = f"shared {blocks}"

    def reported(self, space, offsets, nbytes, states, threads, site, unfenced=None, slots=None):
        self.add(space, offsets, nbytes, states, threads, site, unfenced, slots)
        layout = self.detector._layout
        name = self.shared if space == "shared" else space
        for offset, state, thread in zip(offsets, states, threads, strict=True):
            stamp = int(state & layout.stamps) >> layout.stamp_shift
            second = self.thread(int(thread))
            at = int(offset)
            if space == "shared":
                slot = at // PART if self.cluster else self.blocks.index(second[0])
                at += slot * self.stride
            first = self.thread(int(state) & layout.threads)
            for byte in range(at, at + nbytes):
                self.found.append((self.number, (name, byte), first, self.event_of[stamp], second))

    def thread(self, packed):
        layout = self.detector._layout
        return packed >> layout.local_bits, packed & layout.locals

    def of(self, gid):
        return self.blocks[gid // self.lanes], gid % self.lanes

    def live(self, gids=None):
        gids = np.flatnonzero(self.now.live) if gids is None else gids
        return [int(gid) for gid in gids if self.now.live[gid]]

    def past(self, gids, size):
        """The lanes that have exited of blocks or warps of which all other lanes are in gids."""
        found = []
        for first in range(0, self.now.live.shape[0], size):
            lanes = range(first, first + size)
            mine = [gid for gid in gids if gid in lanes]
            if mine and len(mine) == len(self.live(lanes)):
                found += [gid for gid in lanes if not self.now.live[gid]]
        return found

    def cohort(self, gids):
        """The same object for the same lanes, as the engine has it in straight code."""
        key = tuple(gids)
        if key not in self.cohorts:
            self.cohorts[key] = Cohort(self.now, np.array(gids, np.int64), [])
        return self.cohorts[key]

    def next(self, *told):
        self.number += 1
        self.event_of[self.detector._history.now + 1] = self.number
        self.told.append((self.number, *told))

    # Events

    def dids(self, gids, space, offsets, nbytes, kind, order, scope):
        name = self.shared if space == "shared" else space
        return [
            Did(-1, self.number, self.of(gid), name, offset, nbytes, kind, order, scope)
            for gid, offset in zip(gids, offsets, strict=True)
        ]

    def access(self, gids, space, offsets, nbytes, kind, order, scope):
        self.next(space, kind, order, scope, nbytes, list(zip(gids, offsets, strict=True)))
        self.detector.access(
            instruction(self.number),
            self.cohort(gids),
            space,
            np.array(offsets, np.int64),
            nbytes,
            kind,
            order,
            scope,
        )
        self.program.access(self.dids(gids, space, offsets, nbytes, kind, order, scope))

    def barrier(self, gids):
        self.next("barrier", gids)
        self.detector.barrier(self.cohort(gids).gids)
        for slot in range(len(self.blocks)):
            mine = [gid for gid in gids if gid // self.lanes == slot]
            if mine:
                self.program.barrier(
                    [self.of(gid) for gid in mine],
                    [self.of(gid) for gid in self.past(mine, self.lanes)],
                )

    def warp_sync(self, gids, masks):
        self.next("warp_sync", list(zip(gids, masks, strict=True)))
        uniform = len(set(masks)) == 1
        self.detector.warp_sync(
            self.cohort(gids), np.array(masks[:1] if uniform else masks, np.uint32)
        )
        for warp in {gid >> 5 for gid in gids}:
            for mask in sorted(set(masks)):
                mine = [g for g, m in zip(gids, masks, strict=True) if g >> 5 == warp and m == mask]
                if mine:
                    self.program.join(
                        [self.of(gid) for gid in mine],
                        [self.of(gid) for gid in self.past(mine, 32)],
                    )

    def fence(self, gids, scope, order):
        self.next("fence", gids, scope, order)
        self.detector.fence(self.cohort(gids), scope, order)
        self.program.fence([self.of(gid) for gid in gids], scope, order)

    def release(self, gids, keys):
        self.next("release", gids, keys)
        self.detector.release(np.array(gids), keys if isinstance(keys, int) else np.array(keys))
        for gid, key in zip(gids, np.broadcast_to(keys, len(gids)).tolist(), strict=True):
            self.program.release([self.of(gid)], key)

    def release_fenced(self, gids, keys):
        self.next("release_fenced", gids, keys)
        self.detector.release_fenced(np.array(gids), np.array(keys))
        for gid, key in zip(gids, keys, strict=True):
            self.program.release_fenced(self.of(gid), key)

    def acquire(self, gids, keys):
        self.next("acquire", gids, keys)
        self.detector.acquire(np.array(gids), np.array(keys))
        for gid, key in zip(gids, keys, strict=True):
            self.program.acquire([self.of(gid)], key)

    def copy(self, gids, offsets, nbytes):
        self.next("copy", list(zip(gids, offsets, strict=True)), nbytes)
        token = self.detector.copy_issued(
            instruction(self.number), self.cohort(gids), np.array(offsets, np.int64), nbytes
        )
        dids = self.dids(gids, "shared", offsets, nbytes, "copy", "weak", "cta")
        for did in dids:
            did.ends = []
        self.program.access(dids)
        return token, dids

    def landed(self, copy, mask):
        token, dids = copy
        self.next("landed", dids[0].event, mask)
        self.detector.copy_landed(token, None if all(mask) else np.array(mask))
        for did, there in zip(dids, mask, strict=True):
            if there:
                self.program.landed([did], did.thread)

    def completed(self, copy, mask, key):
        token, dids = copy
        self.next("completed", dids[0].event, mask, key)
        self.detector.copy_released(token, None if all(mask) else np.array(mask), key)
        self.program.completed([did for did, there in zip(dids, mask, strict=True) if there], key)

    def asynchronous(self, issues, space, kind, nbytes, proxy=True):
        """issues: (lane, queue, byte offsets) of each issuer. Returns the event."""
        self.next("asynchronous", issues, space, kind, nbytes, proxy)
        offsets = [(i, at) for i, (_, _, places) in enumerate(issues) for at in places]
        rows, places = np.array(offsets, np.int64).reshape(-1, 2).T
        gids, queues, _ = zip(*issues, strict=True)
        self.detector.asynchronous(
            instruction(self.number), np.array(gids), np.array(queues), space, kind, places, rows,
            nbytes, proxy,
        )  # fmt: skip
        order = "relaxed" if kind == "atomic" else "weak"
        for gid, queue, at in issues:
            dids = self.dids([gid] * len(at), space, at, nbytes, kind, order, "gpu")
            for did in dids:
                did.ends, did.proxy = [], proxy
            self.program.access(dids)
            self.queued.setdefault((self.of(gid)[0], queue), []).extend(dids)
        return self.number

    def _done(self, gid, queue, event):
        """What a queue of the lane's block did up to an event, and the event's stamp."""
        dids = [did for did in self.queued[self.of(gid)[0], queue] if did.event <= event]
        return dids, max(stamp for stamp, number in self.event_of.items() if number <= event)

    def queue_completed(self, gids, queues, event):
        self.next("queue_completed", gids, queues, event)
        for gid, queue in zip(gids, queues, strict=True):
            dids, stamp = self._done(gid, queue, event)
            self.program.landed(dids, self.of(gid))
        self.detector.completed(np.array(gids), np.array(queues), stamp)

    def queue_completed_to(self, keys, issuers, queues, event):
        self.next("queue_completed_to", keys, issuers, queues, event)
        for key, gid, queue in zip(keys, issuers, queues, strict=True):
            dids, stamp = self._done(gid, queue, event)
            self.program.completed(dids, key)
        self.detector.completed_to(np.array(keys), np.array(issuers), np.array(queues), stamp)

    def proxy_fence(self, gids, limit=""):
        self.next("proxy_fence", gids, limit)
        self.detector.proxy_fence(self.cohort(gids), limit)
        self.program.proxy_fence([self.of(gid) for gid in gids], limit)

    def exit(self, gids):
        self.next("exit", gids)
        self.now.live[gids] = False
        if not self.cluster:
            return
        self.detector.exited(np.array(gids))
        for slot in sorted({gid // self.lanes for gid in gids}):
            lanes = range(slot * self.lanes, (slot + 1) * self.lanes)
            if not self.live(lanes):
                (did,) = self.dids(
                    lanes[:1], "shared", [slot * self.stride], self.stride, "exit", "weak", "cta"
                )
                self.program.end(did, [self.of(gid) for gid in lanes])

    # Comparison

    def check(self, exact=True):
        """Nothing reported that does not race; of each byte's sure races the first, or before.

        exact: False if races may be missed.
        """
        true = {}
        due = {}
        for old, new, places, sure in self.program.races:
            for place in places:
                true.setdefault((new.event, (new.space, place), new.thread), []).append(old)
            for place in sure:
                at = (new.space, place)
                due[at] = min(due.get(at, new.event), new.event)
        mine = {}

        def same(old, who):
            return old.thread == who or (old.ends is not None and old.thread[0] == who[0])

        text = "\n".join(map(str, self.told))
        for event, place, who, before, second in self.found:
            fits = [
                old
                for old in true.get((event, place, second), [])
                if old.kind == "copy" or (old.event == before and same(old, who))
            ]
            # Of two lanes of one instruction either may be told as the first.
            if before == event:
                fits += [o for t in true if t[:2] == (event, place) for o in true[t]]
            assert fits, f"false: {event} {place} {who} {before} {second}\n{text}"
            mine[place] = min(mine.get(place, event), event)
        late = [at for at, event in due.items() if mine.get(at, event + 1) > event]
        assert not (late and exact), f"missed: {late}\n{text}"
        return min((new.event for _, new, _, _ in self.program.races), default=self.number + 1)


def hand_over(rng, both, live):
    """Some lane's past goes to others, through a key or through memory."""
    giver = rng.choice(live)
    takers = sorted(rng.sample(live, rng.randint(1, len(live))))
    if rng.random() < 0.4:
        both.release([giver], 99)
        both.acquire(takers, [99] * len(takers))
        return
    if rng.random() < 0.3:
        both.access([giver], "global", [512], 4, "atomic", "release", "gpu")
        both.access(takers, "global", [512] * len(takers), 4, "read", "acquire", "gpu")
        return
    both.fence([giver], "gpu", "acq_rel")
    if rng.random() < 0.3:
        both.barrier([g for g in live if g // both.lanes == giver // both.lanes])
    both.access([giver], "global", [512], 4, "atomic", "relaxed", "gpu")
    if rng.random() < 0.5:
        both.access(takers, "global", [512] * len(takers), 4, "atomic", "relaxed", "gpu")
    else:
        both.access(takers, "global", [512] * len(takers), 4, "read", "volatile", "cta")
    if rng.random() < 0.5:
        both.fence(takers, "gpu", "sc")
    else:
        blocks = {taker // both.lanes for taker in takers}
        both.barrier([g for g in live if g // both.lanes in blocks])
