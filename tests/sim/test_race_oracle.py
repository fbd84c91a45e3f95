"""The race detector against races by definition, on random programs."""

from __future__ import annotations

import random

import pytest

from sim.race_programs import STRIDE, Both, hand_over


def play(rng, both, events, waves, copies, atomics):
    pending, key = [], 0
    keys = [100 + i for i in range(3)]
    wave = 0
    calm = rng.choice([0, 0.5, 0.9])
    spread = rng.choice([1, 1, 3])
    for _ in range(events):
        live = both.live()
        if not live:
            break
        some = sorted(rng.sample(live, rng.randint(1, min(len(live), 4))))
        choice = rng.random()
        if choice < 0.55:
            space = rng.choice(["shared", "global"])
            nbytes = rng.choice([1, 2, 4, 4, 4, 8])
            kind = rng.choice(["read", "write"])
            order, scope = "weak", "cta"
            if rng.random() < atomics:
                kind = rng.choice(["read", "write", "atomic", "atomic"])
                order = rng.choice(["volatile", "relaxed", "relaxed", "acquire", "release"])
                if kind == "atomic":
                    order = rng.choice(["relaxed", "relaxed", "acquire", "release", "acq_rel"])
                elif (kind, order) in (("read", "release"), ("write", "acquire")):
                    order = "relaxed"
                scope = rng.choice(["cta", "gpu", "gpu"])
                nbytes = 4
            places = rng.choice([1, 2, 4]) * spread
            offsets = [rng.randrange(places) * nbytes % STRIDE for _ in some]
            if kind == "write" and rng.random() < calm:
                offsets = [(offsets[0] + i * nbytes) % STRIDE for i in range(len(some))]
            if space == "shared":
                offsets = [o + g // both.lanes * STRIDE for o, g in zip(offsets, some, strict=True)]
            elif rng.random() < 0.2:
                offsets = [o + (1 << 20) for o in offsets]
            both.access(some, space, offsets, nbytes, kind, order, scope)
            if rng.random() < calm:
                if rng.random() < 0.5:
                    both.barrier(live)
                else:
                    hand_over(rng, both, live)
        elif choice < 0.62:
            slots = sorted(rng.sample(range(len(both.blocks)), rng.randint(1, len(both.blocks))))
            both_lanes = [g for g in live if g // both.lanes in slots]
            if both_lanes:
                both.barrier(both_lanes)
        elif choice < 0.66:
            both.barrier(some)
        elif choice < 0.72:
            whole = rng.random() < 0.5
            gids = live if whole else some
            masks = [1 if whole else rng.choice([1, 2]) for _ in gids]
            both.warp_sync(gids, masks)
        elif choice < 0.78:
            if rng.random() < 0.3:
                both.release(some, rng.choice(keys))
            else:
                both.release(some, [rng.choice(keys) for _ in some])
        elif choice < 0.84:
            both.acquire(some, [rng.choice(keys) for _ in some])
        elif choice < 0.90:
            order = rng.choice(["acq_rel", "sc", "acq_rel", "sc", "acquire", "release"])
            both.fence(some, rng.choice(["cta", "gpu", "gpu"]), order)
        elif choice < 0.91:
            both.exit(some[:1])
        elif choice < 0.92 and wave + 1 < len(waves):
            wave += 1
            pending = []
            both.next("wave")
            both.wave(waves[wave])
        elif copies and choice < 0.96:
            nbytes = rng.choice([4, 8])
            slots = [g // both.lanes * STRIDE for g in some]
            offsets = [rng.randrange(4) * nbytes + s for s in slots]
            pending.append(both.copy(some, offsets, nbytes))
        elif pending:
            copy = pending.pop(rng.randrange(len(pending)))
            mask = [rng.random() < 0.8 for _ in copy[1]]
            if any(mask):
                if rng.random() < 0.5:
                    both.landed(copy, mask)
                else:
                    key += 1
                    keys.append(key)
                    both.completed(copy, mask, key)


SHAPES = {
    "two warps, two blocks": (64, [0, 1, 32, 33], [[0, 1]]),
    "one warp": (32, [0, 1, 5], [[1, 0]]),
    "waves": (32, [0, 3], [[2, 0], [1, 3], [4]]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", range(4))
def test_few_threads(shape, part):
    lanes, active, waves = SHAPES[shape]
    first = []
    for seed in range(20):
        rng = random.Random(f"{shape} {part} {seed}")
        both = Both(lanes, active, waves)
        play(rng, both, rng.choice([10, 25, 50]), waves, part % 2, [0.1, 0.8][part // 2])
        first.append(both.check() / (both.number + 1))
    # Programs that race early, and late or not at all.
    assert min(first) < 0.3
    assert max(first) > 0.6


def message(rng, both, live, at):
    """Somebody leaves data at an offset of its own and raises a flag, others look and read it.

    Every step may be left out, or be of a scope or order that is too weak.
    """
    giver = rng.choice(live)
    takers = sorted(rng.sample(live, rng.randint(1, min(3, len(live)))))
    block = [g for g in live if g // both.lanes == giver // both.lanes]
    flag = 4 * rng.randrange(2)
    space = "global"
    if rng.random() < 0.2:
        space, flag = "shared", giver // both.lanes * STRIDE + flag
        takers = [g for g in takers if g in block] or [giver]
    scope = rng.choice(["gpu", "gpu", "cta"])
    both.access([giver], "global", [at], 4, "write", "weak", "cta")
    if rng.random() < 0.7:
        both.fence([giver], rng.choice(["gpu", "gpu", "cta"]), rng.choice(["sc", "sc", "acquire"]))
    raiser = giver
    if rng.random() < 0.3:
        if rng.random() < 0.5:
            both.barrier(block)
        else:
            warp = [g for g in live if g >> 5 == giver >> 5]
            both.warp_sync(warp, [1] * len(warp))
        raiser = rng.choice(block)
    kind = rng.choice(["write", "atomic", "atomic"])
    order = rng.choice(["relaxed", "relaxed", "release"])
    raisers = sorted({raiser, rng.choice(block)}) if kind == "atomic" else [raiser]
    both.access(raisers, space, [flag] * len(raisers), 4, kind, order, scope)
    kind = rng.choice(["read", "atomic"])
    order = rng.choice(["relaxed", "relaxed", "acquire"])
    scope = rng.choice(["gpu", "gpu", "cta"])
    both.access(takers, space, [flag] * len(takers), 4, kind, order, scope)
    choice = rng.random()
    if choice < 0.5:
        both.fence(takers, rng.choice(["gpu", "gpu", "cta"]), rng.choice(["sc", "sc", "release"]))
    elif choice < 0.7:
        blocks = {taker // both.lanes for taker in takers}
        both.barrier([g for g in live if g // both.lanes in blocks])
    readers = sorted({*takers, rng.choice(live)})
    both.access(readers, "global", [at] * len(readers), 4, "read", "weak", "cta")


@pytest.mark.parametrize("seed", range(60))
def test_messages(seed):
    rng = random.Random(f"messages {seed}")
    lanes, active, waves = SHAPES[rng.choice(["two warps, two blocks", "one warp"])]
    both = Both(lanes, active, waves)
    for i in range(12):
        live = both.live()
        message(rng, both, live, 64 + 4 * i)
        if rng.random() < 0.1 and len(live) > 3:
            both.exit([rng.choice(live)])
    both.check()


def test_messages_race_or_not():
    """Of the messages above many are ordered and many are not."""
    raced = received = 0
    for seed in range(10):
        rng = random.Random(f"messages {seed}")
        both = Both(*SHAPES["two warps, two blocks"])
        for i in range(12):
            message(rng, both, both.live(), 64 + 4 * i)
        bad = {at for _, new, bytes_, _ in both.program.races for at in bytes_ if at >= 64}
        raced += len(bad) // 4
        received += 12 - len(bad) // 4
    assert raced > 20
    assert received > 20


ONCE_WRONG = {
    "the look is one of several reads": (
        "one warp",
        [
            ("exit", [1]),
            ("access", [32], "global", [4], 4, "write", "volatile", "gpu"),
            ("access", [5], "global", [4], 4, "read", "relaxed", "gpu"),
            ("warp_sync", [0, 5, 32, 33, 37], [1] * 5),
            ("access", [0], "global", [4], 4, "read", "relaxed", "gpu"),
            ("access", [5], "global", [4], 4, "atomic", "relaxed", "cta"),
        ],
    ),
    "a weak write among many ends what was before": (
        "waves",
        [
            ("access", [32, 35], "global", [0, 0], 4, "atomic", "relaxed", "gpu"),
            ("access", [35], "global", [0], 1, "write", "weak", "cta"),
            ("access", [0], "global", [0], 4, "atomic", "acquire", "gpu"),
            ("access", [32], "global", [0], 4, "write", "weak", "cta"),
            ("access", [35], "global", [0], 4, "atomic", "relaxed", "cta"),
            ("warp_sync", [0, 3, 32, 35], [1] * 4),
            ("access", [3], "global", [0], 4, "atomic", "release", "cta"),
        ],
    ),
    "a store that took a place of one that was looked at": (
        "one warp",
        [
            ("access", [0, 1], "shared", [0, 0], 4, "write", "relaxed", "cta"),
            ("access", [1], "shared", [0], 4, "read", "acquire", "gpu"),
            ("access", [1], "shared", [0], 4, "write", "weak", "cta"),
        ],
    ),
    "one instruction releases and acquires": (
        "two warps, two blocks",
        [
            ("access", [0], "global", [0], 4, "read", "weak", "cta"),
            ("release", [0], 102),
            ("acquire", [64], [102]),
            ("fence", [64], "cta", "acq_rel"),
            ("access", [64, 96], "shared", [64, 64], 4, "atomic", "acquire", "cta"),
            ("access", [96], "global", [0], 4, "write", "weak", "cta"),
        ],
    ),
    "a word that was read is divided": (
        "two warps, two blocks",
        [
            ("access", [0, 1, 32], "shared", [0, 0, 0], 4, "read", "weak", "cta"),
            ("barrier", [0, 1]),
            ("access", [0], "shared", [0], 1, "write", "weak", "cta"),
        ],
    ),
    "who has exited told others": (
        "two warps, two blocks",
        [
            ("access", [0], "global", [0], 4, "write", "weak", "cta"),
            ("release", [0], 7),
            ("acquire", [64], [7]),
            ("exit", [64]),
            ("barrier", [65, 96, 97]),
            ("access", [96], "global", [0], 4, "read", "weak", "cta"),
            ("access", [1], "global", [0], 4, "read", "weak", "cta"),
        ],
    ),
}


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_once_wrong(name):
    shape, events = ONCE_WRONG[name]
    both = Both(*SHAPES[shape])
    for event, *arguments in events:
        getattr(both, event)(*arguments)
    both.check()


def pattern(rng, lanes, nbytes, kind, live):
    """An offset for each lane, as kernels have them; writes mostly apart."""
    step = rng.choice([1, 1, 2])
    ways = {
        "own": [i % lanes for i in live],
        "next": [(i + step) % lanes for i in live],
        "transposed": [i % lanes // 8 + i % 8 * (lanes // 8) for i in live],
        "half": [i % lanes // 2 for i in live],
        "one": [0 for _ in live],
    }
    names = ["own", "own", "transposed", "next"]
    if kind != "write" or rng.random() < 0.1:
        names += ["half", "one"]
    return [at * nbytes for at in ways[rng.choice(names)]]


@pytest.mark.parametrize("seed", range(24))
def test_many_threads(seed):
    rng = random.Random(f"many {seed}")
    lanes, stride = 64, 2048
    both = Both(lanes, range(lanes - 4), [[1, 0]], stride)
    live = both.live()
    for _ in range(10):
        space = rng.choice(["shared", "shared", "global"])
        nbytes = rng.choice([1, 2, 4, 4, 8, 16])
        kind = rng.choice(["read", "write", "read", "write", "atomic"])
        nbytes = 4 if kind == "atomic" else nbytes
        chosen = rng.choice([live, live, live[: len(live) // 2], live[::2]])
        offsets = pattern(rng, lanes, nbytes, kind, chosen)
        slots = [gid // lanes * stride for gid in chosen]
        if space == "shared" or rng.random() < 0.7:  # else the blocks share the memory
            offsets = [o + s for o, s in zip(offsets, slots, strict=True)]
        order = "relaxed" if kind == "atomic" else "weak"
        both.access(chosen, space, offsets, nbytes, kind, order, "gpu")
        choice = rng.random()
        if choice < 0.55:
            both.barrier(live)
        elif choice < 0.65:
            both.barrier([gid for gid in live if gid % lanes < 32])
        elif choice < 0.8:
            both.warp_sync(live, [0xFFFFFFFF] * len(live))
        elif choice < 0.85:
            both.warp_sync(live, [0xFF << (gid & 24) for gid in live])
        elif choice < 0.9:
            keys = [gid // lanes for gid in live]
            both.release(live, keys)
            both.acquire(live, keys)
    both.check()
