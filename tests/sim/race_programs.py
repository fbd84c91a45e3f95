"""Programs told to the race detector and to the definition of a race at the same time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from cumla.sim.cohort import Cohort
from cumla.sim.ptx.syntax import Instruction
from cumla.sim.race import RaceDetector
from sim.happens_before import Did, Program

STRIDE = 64


def instruction(number):
    return Instruction("ld", (), (), None, number + 1, None, f"ld {number};", number)


def fake_wave(lanes, block_ids, active, grid, stride=STRIDE):
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
        cluster_size=1,
        shared_start=0,
        shared_stride=stride,
        shared_size=stride,
        slots=len(block_ids),
    )


class Both:
    """A program told to the detector and to the definition; `check` compares what they found."""

    def __init__(self, lanes, active, waves, stride=STRIDE):
        self.lanes = lanes
        self.active = active
        self.stride = stride
        self.grid = sum(len(blocks) for blocks in waves)
        self.program = Program(lanes)
        self.detector = None
        self.number = 0
        self.found = []  # (event, byte, first thread or None, first event, second thread)
        self.event_of = {}  # stamp: event
        self.told = []
        self.wave(waves[0])

    def wave(self, blocks):
        self.blocks = blocks
        self.cohorts = {}
        self.now = fake_wave(self.lanes, blocks, self.active, self.grid, self.stride)
        if self.detector is None:
            self.detector = RaceDetector(self.now)
            self.detector._reports.add = self.reported
        else:
            self.detector.next_wave(self.now)
            self.program.keys.clear()
        self.shared = f"shared {blocks}"

    def reported(self, space, offsets, nbytes, states, threads, site):
        layout = self.detector._layout
        name = self.shared if space == "shared" else space
        for offset, state, thread in zip(offsets, states, threads, strict=True):
            stamp = int(state & layout.stamps) >> layout.stamp_shift
            second = self.thread(int(thread))
            at = int(offset)
            if space == "shared":
                at += self.blocks.index(second[0]) * self.stride
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
        self.program.access(dids)
        return token, dids

    def landed(self, copy, mask):
        token, dids = copy
        self.next("landed", dids[0].event, mask)
        self.detector.copy_landed(token, None if all(mask) else np.array(mask))
        self.program.landed([did for did, there in zip(dids, mask, strict=True) if there])

    def completed(self, copy, mask, key):
        token, dids = copy
        self.next("completed", dids[0].event, mask, key)
        self.detector.copy_released(token, None if all(mask) else np.array(mask), key)
        self.program.completed([did for did, there in zip(dids, mask, strict=True) if there], key)

    def exit(self, gids):
        self.next("exit", gids)
        self.now.live[gids] = False

    # Comparison

    def check(self):
        """Nothing reported that does not race; of each byte's sure races the first, or before."""
        true = {}
        due = {}
        for old, new, places, sure in self.program.races:
            for place in places:
                true.setdefault((new.event, (new.space, place), new.thread), []).append(old)
            for place in sure:
                at = (new.space, place)
                due[at] = min(due.get(at, new.event), new.event)
        mine = {}
        text = "\n".join(map(str, self.told))
        for event, place, who, before, second in self.found:
            fits = [
                old
                for old in true.get((event, place, second), [])
                if old.kind == "copy" or (old.event == before and old.thread == who)
            ]
            # Of two lanes of one instruction either may be told as the first.
            if before == event:
                fits += [o for t in true if t[:2] == (event, place) for o in true[t]]
            assert fits, f"false: {event} {place} {who} {before} {second}\n{text}"
            mine[place] = min(mine.get(place, event), event)
        late = [at for at, event in due.items() if mine.get(at, event + 1) > event]
        assert not late, f"missed: {late}\n{text}"
        return min((new.event for _, new, _, _ in self.program.races), default=self.number + 1)
