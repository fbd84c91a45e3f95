"""The race detector on the asynchronous proxy and on clusters, against races by definition."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from cumla.sim.race import detector
from cumla.sim.race.layout import COPY_AGENTS
from sim.race_programs import PART, STRIDE, Both, hand_over

QUEUES = (11, 12, 13)
GENERIC_QUEUE = 14  # what st.async does
KEYS = (100, 101, 102)
LIMITS = ("", "shared", "global")


class Player:
    """Makes up a program, event after event."""

    def __init__(self, rng, both, queues=QUEUES):
        self.rng = rng
        self.both = both
        self.queues = queues
        self.calm = rng.choice([0, 0.6, 0.9])
        self.atomics = rng.choice([0, 0.3])
        self.limits = rng.choice([LIMITS, LIMITS[:1], LIMITS[1:]])
        self.waves = 1

    def play(self, events, waves=()):
        ways = [
            (40, self.access),
            (20, self.asynchronous),
            (12, self.complete),
            (10, self.proxy_fence),
            (5, self.barrier),
            (5, self.sync_warps),
            (8, self.keys),
            (6, self.hand_over),
            (2, self.exit),
            (1, lambda: self.wave(waves)),
        ]
        for _ in range(events):
            self.live = self.both.live()
            if not self.live:
                break
            self.rng.choices([way for _, way in ways], [weight for weight, _ in ways])[0]()

    def some(self, most=4):
        count = self.rng.randint(1, min(len(self.live), most))
        return sorted(self.rng.sample(self.live, count))

    def place(self, gid, nbytes):
        """A byte offset in shared memory that the lane can access."""
        both = self.both
        at = self.rng.randrange(self.rng.choice([1, 2, 4, PART]) // nbytes or 1) * nbytes
        slot = own = gid // both.lanes
        if both.cluster and self.rng.random() < 0.5:
            first = slot // both.cluster * both.cluster
            slots = {g // both.lanes for g in self.live}
            slot = self.rng.choice([s for s in range(first, first + both.cluster) if s in slots])
        assert both.cluster or slot == own
        return slot * STRIDE + (slot * PART if both.cluster else 0) + at % PART

    def places(self, gids, space, nbytes):
        if space == "shared":
            return [self.place(gid, nbytes) for gid in gids]
        return [self.rng.randrange(3) * nbytes % PART for _ in gids]

    def access(self):
        rng, some = self.rng, self.some()
        space = rng.choice(["shared", "shared", "global"])
        kind, order, scope = rng.choice(["read", "write"]), "weak", "cta"
        nbytes = rng.choice([1, 2, 4, 4, 4, 8])
        if rng.random() < self.atomics:
            kind, order = rng.choice(["read", "write", "atomic"]), "relaxed"
            nbytes, scope = 4, rng.choice(["cta", "gpu"])
        if kind == "write" and rng.random() < self.calm:
            some = some[:1]
        self.both.access(some, space, self.places(some, space, nbytes), nbytes, kind, order, scope)
        if rng.random() < self.calm:
            if rng.random() < 0.7:
                limit = rng.choice(self.limits)
                if limit and rng.random() < 0.9:
                    limit = space
                self.both.proxy_fence(rng.choice([some, self.live]), limit)
            self.settle()

    def asynchronous(self):
        rng = self.rng
        kind = rng.choice(["read", "read", "write", "write", "atomic"])
        gids = self.some(2 if kind == "read" else 1)
        space = rng.choice(["shared", "shared", "global"])
        nbytes = 4 if kind == "atomic" else rng.choice([4, 4, 8])
        proxy = rng.random() < 0.85
        issues = []
        for gid in gids:
            queue = rng.choice(self.queues) if proxy else GENERIC_QUEUE
            places = {self.places([gid], space, nbytes)[0] for _ in range(rng.randint(1, 2))}
            issues.append((gid, queue, sorted(places)))
        event = self.both.asynchronous(issues, space, kind, nbytes, proxy)
        if rng.random() < self.calm:
            self.completed([(self.both.of(gid)[0], queue) for gid, queue, _ in issues], event)
            self.settle()

    def complete(self):
        """Somebody waits for what some queue did up to some event."""
        if self.both.queued:
            place = self.rng.choice(sorted(self.both.queued))
            self.completed([place], self.rng.choice(self.both.queued[place]).event)

    def completed(self, places, event):
        both, rng = self.both, self.rng
        for block, queue in dict.fromkeys(places):
            if block not in both.blocks:
                continue
            slot = both.blocks.index(block)
            own = [gid for gid in self.live if gid // both.lanes == slot]
            if own and rng.random() < 0.5:
                own = rng.choice([own, own[:1], own[-1:]])
                both.queue_completed(own, [queue] * len(own), event)
            else:
                key = rng.choice(KEYS)
                both.queue_completed_to([key], [slot * both.lanes], [queue], event)
                takers = rng.choice([self.live, self.some()])
                if rng.random() < 0.8:
                    both.acquire(takers, [key] * len(takers))

    def settle(self):
        if self.rng.random() < 0.5:
            self.both.barrier(self.live)
        if self.rng.random() < 0.5:
            hand_over(self.rng, self.both, self.live)

    def proxy_fence(self):
        gids = self.rng.choice([self.live, self.some()])
        self.both.proxy_fence(gids, self.rng.choice(self.limits))

    def barrier(self):
        self.both.barrier(self.rng.choice([self.live, self.some()]))

    def sync_warps(self):
        gids = self.rng.choice([self.live, self.some()])
        self.both.warp_sync(gids, [1] * len(gids))

    def keys(self):
        some = self.some()
        keys = [self.rng.choice(KEYS) for _ in some]
        both = self.both
        self.rng.choice([both.release, both.release_fenced, both.acquire])(some, keys)

    def hand_over(self):
        hand_over(self.rng, self.both, self.live)

    def exit(self):
        both = self.both
        block = [g for g in self.live if g // both.lanes == self.live[-1] // both.lanes]
        both.exit(self.rng.choice([block, self.some(1)]))

    def wave(self, waves):
        if self.waves < len(waves):
            self.both.next("wave")
            self.both.wave(waves[self.waves])
            self.both.queued.clear()
            self.waves += 1


SHAPES = {
    "two warps, two blocks": (64, [0, 1, 32], [[0, 1]], 0),
    "one warp": (32, [0, 1, 5], [[1, 0]], 0),
    "waves": (32, [0, 3], [[2, 0], [1]], 0),
    "a cluster of two": (64, [0, 1, 40], [[0, 1]], 2),
    "a cluster of three": (32, [0, 7], [[3, 4, 5], [0, 1, 2]], 3),
}


def program(shape, seed):
    lanes, active, waves, cluster = SHAPES[shape]
    rng = random.Random(f"{shape} {seed}")
    both = Both(lanes, active, waves, cluster=cluster, proxied=True)
    Player(rng, both).play(rng.choice([10, 25, 50]), waves)
    return both


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", range(3))
def test_random(shape, part, monkeypatch):
    if part:
        monkeypatch.setattr(detector, "_LOG_SHORT", 0)  # logs are looked through at every barrier
    first = []
    for seed in range(20):
        both = program(shape, f"{part} {seed}")
        first.append(both.check() / (both.number + 1))
    # Programs that race early, and late or not at all.
    assert min(first) < 0.3
    assert max(first) > 0.6


@pytest.mark.parametrize("shape", SHAPES)
def test_more_queues_than_are_told_apart(shape):
    """Who waits for one may then be taken to know another, but no race is invented."""
    lanes, active, waves, cluster = SHAPES[shape]
    found = 0
    for seed in range(10):
        rng = random.Random(f"queues {shape} {seed}")
        both = Both(lanes, active, waves, cluster=cluster, proxied=True)
        Player(rng, both, range(200, 200 + 3 * COPY_AGENTS)).play(60, waves)
        both.check(exact=False)
        found += len(both.found)
    assert found


def maybe_fence(rng, both, gids):
    if rng.random() < 0.4:
        both.proxy_fence(sorted(gids), rng.choice(LIMITS))


def pass_on(rng, both, giver, taker):
    """What one lane knows goes to another; proxy fences here and there."""
    live = both.live()
    maybe_fence(rng, both, [giver])
    ways = ["key", "relaxed key", "flag", "flag", "acquire", "block", "warp", "late fence"]
    way = rng.choice(ways)
    if way == "relaxed key":
        both.fence([giver], "gpu", "release")
        maybe_fence(rng, both, [giver])
        both.release_fenced([giver], [KEYS[2]])
        both.acquire([taker], [KEYS[2]])
    elif way == "key":
        both.release([giver], KEYS[0])
        maybe_fence(rng, both, [giver])
        both.acquire([taker], [KEYS[0]])
    elif way in ("flag", "late fence"):
        flag = 512 + 4 * rng.randrange(2)
        both.fence([giver], "gpu", "acq_rel")
        maybe_fence(rng, both, [giver])
        both.access([giver], "global", [flag], 4, rng.choice(["write", "atomic"]), "relaxed", "gpu")
        maybe_fence(rng, both, [giver])
        both.access([taker], "global", [flag], 4, rng.choice(["read", "atomic"]), "relaxed", "gpu")
        if way == "late fence":
            maybe_fence(rng, both, [taker])
        both.fence([taker], "gpu", "acq_rel")
    elif way == "acquire":
        both.access([giver], "global", [520], 4, "atomic", "release", "gpu")
        both.access([taker], "global", [520], 4, "read", "acquire", "gpu")
    elif way == "block":
        both.barrier(live)
    else:
        both.warp_sync(live, [0xFFFFFFFF] * len(live))
    maybe_fence(rng, both, [taker])


def message(rng, both, at):
    """A lane writes, and its word goes from lane to lane, until one has a queue access the data."""
    live = both.live()
    chain = [rng.choice(live) for _ in range(rng.choice([2, 3, 3, 4]))]
    kind, order = rng.choice([("write", "weak"), ("write", "weak"), ("atomic", "relaxed")])
    both.access([chain[0]], "global", [at], rng.choice([1, 4]) if kind == "write" else 4, kind,
                order, "gpu")  # fmt: skip
    if rng.random() < 0.3:
        seer = rng.choice(live)
        both.access([seer], "global", [at], 4, rng.choice(["read", "atomic"]), "relaxed", "gpu")
        chain[0] = rng.choice([chain[0], seer])
    for giver, taker in pairwise(chain):
        pass_on(rng, both, giver, taker)
    queue = rng.choice(QUEUES)
    event = both.asynchronous(
        [(chain[-1], queue, [at])], "global", rng.choice(["read", "write"]), 4
    )
    if rng.random() < 0.8:
        both.queue_completed_to([KEYS[1]], [chain[-1]], [queue], event)
        relay = rng.choice(live)
        both.acquire([relay], [KEYS[1]])
        last = rng.choice(live)
        pass_on(rng, both, relay, last)
        kind = rng.choice(["read", "write"])
        both.access([last], "global", [at], rng.choice([1, 4]), kind, "weak", "cta")


def messages(seed):
    rng = random.Random(f"messages {seed}")
    lanes, active, waves, cluster = SHAPES[rng.choice(["one warp", "a cluster of three"])]
    both = Both(lanes, active, waves, cluster=cluster, proxied=True)
    for i in range(12):
        message(rng, both, 64 + 4 * i)
        if rng.random() < 0.1 and len(both.live()) > 3:
            both.exit([rng.choice(both.live())])
    return both


@pytest.mark.parametrize("seed", range(60))
def test_messages(seed):
    messages(seed).check()


def test_messages_race_or_not():
    """Of the messages above many are ordered and many are not."""
    raced = sum(
        len({at for _, new, bytes_, _ in messages(seed).program.races for at in bytes_}) // 4
        for seed in range(10)
    )
    assert 20 < raced < 100


def farewells(seed):
    """Blocks of a cluster access each other's memory and exit, one after the other."""
    rng = random.Random(f"farewells {seed}")
    lanes, active, waves, cluster = SHAPES[rng.choice(["a cluster of two", "a cluster of three"])]
    both = Both(lanes, active, waves, cluster=cluster, proxied=True)
    slots = list(range(cluster))
    rng.shuffle(slots)
    for slot in slots:
        own = [gid for gid in both.live() if gid // lanes == slot]
        words = [slot * (STRIDE + PART) + at for at in range(0, PART, 4)]
        for at in rng.sample(words, rng.randint(1, 4)):
            other, taker = rng.choice(both.live()), rng.choice(own)
            way = rng.choice(["weak", "weak", "strong", "queue"])
            if way == "queue":
                kind, queue = rng.choice(["read", "write"]), rng.choice(QUEUES)
                event = both.asynchronous([(other, queue, [at])], "shared", kind, 4)
                if rng.random() < 0.7:
                    both.queue_completed_to([KEYS[0]], [other], [queue], event)
                    both.acquire([taker], [KEYS[0]])
                continue
            nbytes = rng.choice([1, 2, 4]) if way == "weak" else 4
            kind = rng.choice(["read", "write", "atomic"] if way == "strong" else ["read", "write"])
            order = "weak" if way == "weak" else "relaxed"
            both.access([other], "shared", [at], nbytes, kind, order, "gpu")
            if rng.random() < 0.3:
                both.access([taker], "shared", [at], 4, "read", "relaxed", "gpu")
            if rng.random() < 0.6:
                pass_on(rng, both, other, taker)
        first = rng.randint(0, len(own))
        for gids in (own[:first], own[first:]):
            if gids:
                both.exit(gids)
    return both


@pytest.mark.parametrize("seed", range(40))
def test_farewells(seed):
    farewells(seed).check()


def test_farewells_race_or_not():
    """Of the accesses above some come too late for an exit and some do not."""
    ended = [
        new.kind == "exit" for seed in range(20) for _, new, _, _ in farewells(seed).program.races
    ]
    assert 20 < sum(ended) < 100
