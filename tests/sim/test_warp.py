"""Exchange between the lanes of a warp, against definitions that look at one lane at a time."""

from __future__ import annotations

import math
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cumla.sim.cohort import Cohort
from cumla.sim.errors import KernelTrap, Where
from cumla.sim.isa.convergence import converged, members, waits_for_lanes, whole_warps
from cumla.sim.isa.table import Unsupported
from cumla.sim.ptx.syntax import Pair, Register
from sim.ops import instruction, op

FULL = 0xFFFFFFFF
PAIR = Pair(Register("%d"), Register("%p"))
ONE = Register("%d")
REST = tuple(Register(f"%r{i}") for i in range(4))


def wave(lanes: int, dead: tuple[int, ...] = ()) -> Any:
    live = np.ones(lanes, np.bool_)
    live[list(dead)] = False
    return SimpleNamespace(
        lanes_per_block=lanes,
        live=live,
        live_count=int(live.sum()),
        where=lambda ins, gid=None: Where("k", ins.where, None, (gid, 0, 0)),
    )


def cohort(gids: Any, lanes: int = 96, dead: tuple[int, ...] = ()) -> Cohort:
    return Cohort(wave(lanes, dead), np.asarray(gids, np.int64), [])


def whole(warps: int = 3) -> Cohort:
    return cohort(np.arange(32 * warps), 32 * warps)


def some(seed: int = 0, warps: int = 3) -> Cohort:
    """About half of the lanes of each warp."""
    gids = np.flatnonzero(np.random.default_rng(seed).random(32 * warps) < 0.5)
    return cohort(gids, 32 * warps)


def u32(*values: int) -> Any:
    return np.array(values, np.uint32)


def random_u32(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32)


def run(name: str, c: Cohort, *sources: Any, destination: Any = ONE, target: int = 90) -> Any:
    made = op(name, destination, *REST[: len(sources)], target=target)
    assert made.cohort
    with np.errstate(all="ignore"):
        return made.run(c, *sources)


def masks_of(c: Cohort, groups: int, seed: int = 0) -> Any:
    """A membermask for each lane of c: its warp's lanes are dealt out to so many groups."""
    side = np.random.default_rng(seed).integers(0, groups, 3 * 32)
    masks = []
    for gid in c.gids.tolist():
        warp = gid >> 5
        mine = [g for g in c.gids.tolist() if g >> 5 == warp and side[g] == side[gid]]
        masks.append(sum(1 << (g & 31) for g in mine))
    return np.array(masks, np.uint32)


def groups_of(c: Cohort, masks: Any) -> list[list[int]]:
    """For each lane of c, the positions in c of those it executes with."""
    full = np.broadcast_to(masks, c.n)
    gids = c.gids.tolist()
    return [
        [j for j, h in enumerate(gids) if h >> 5 == g >> 5 and int(full[i]) >> (h & 31) & 1]
        for i, g in enumerate(gids)
    ]


COHORTS = {
    "whole": (whole(), u32(FULL)),
    "whole, masks in lanes": (whole(), np.full(96, FULL, np.uint32)),
    "whole, three groups": (whole(), masks_of(whole(), 3)),
    "some": (some(), masks_of(some(), 1)),
    "some, two groups": (some(1), masks_of(some(1), 2)),
    "exited": (cohort(range(70), 96, tuple(range(70, 96))), u32(FULL)),
    "exited lanes are named": (
        cohort(range(70), 96, tuple(range(70, 96))),
        np.array([0xFFFF] * 16 + [0xFFFF0000] * 16 + [FULL] * 32 + [0xFF] * 6, np.uint32),
    ),
}


@pytest.fixture(params=list(COHORTS))
def lanes(request: pytest.FixtureRequest) -> tuple[Cohort, Any]:
    return COHORTS[request.param]


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """PTX ISA "shfl.sync", for one lane: where it reads from, and its predicate."""
    b, clamp, segment = b & 0x1F, c & 0x1F, c >> 8 & 0x1F
    top = (lane & segment) | (clamp & ~segment & 0x1F)
    low = lane & segment
    if mode == "up":
        j = lane - b
        inside = j >= top
    elif mode == "down":
        j = lane + b
        inside = j <= top
    elif mode == "bfly":
        j = lane ^ b
        inside = j <= top
    else:
        j = low | (b & ~segment & 0x1F)
        inside = j <= top
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("varies", [False, True])
def test_shfl(mode: str, varies: bool, lanes: tuple[Cohort, Any]) -> None:
    c, masks = lanes
    a = random_u32(c.n)
    for width in (32, 16, 8, 2, 1):
        clamp = (32 - width) << 8 | (0 if mode == "up" else 0x1F)
        for b in (0, 1, 2, 3, 7, 16, 31, 37):
            offsets = (np.arange(c.n) + b).astype(np.uint32) if varies else u32(b)
            got, inside = run(
                f"shfl.sync.{mode}.b32", c, a, offsets, u32(clamp), masks, destination=PAIR
            )
            full = np.broadcast_to(offsets, c.n)
            at = {g: i for i, g in enumerate(c.gids.tolist())}
            groups = groups_of(c, masks)
            for i, g in enumerate(c.gids.tolist()):
                j, p = shuffled(mode, g & 31, int(full[i]), clamp)
                source = at.get((g & ~31) + j)
                takes_part = source is not None and source in groups[i]
                assert int(got[i]) == (int(a[source]) if takes_part else 0)
                assert bool(inside[i]) == p
            alone = run(f"shfl.sync.{mode}.b32", c, a, offsets, u32(clamp), masks)
            assert np.array_equal(alone, got)


def test_shfl_of_one_value() -> None:
    c = whole()
    got, inside = run(
        "shfl.sync.down.b32", c, u32(7), u32(30), u32(31), u32(FULL), destination=PAIR
    )
    assert np.array_equal(np.broadcast_to(got, 96), np.full(96, 7))
    assert inside.tolist() == ([True, True] + [False] * 30) * 3


@pytest.mark.parametrize("bits", [0, 1, FULL, 0x80000000, 0x7FFFFFFF, 0x00FF0F31])
def test_vote(bits: int, lanes: tuple[Cohort, Any]) -> None:
    c, masks = lanes
    a = np.array([bits >> (g & 31) & 1 == 1 for g in c.gids.tolist()])
    ballot = run("vote.sync.ballot.b32", c, a, masks)
    every = run("vote.sync.all.pred", c, a, masks)
    some_ = run("vote.sync.any.pred", c, a, masks)
    same = run("vote.sync.uni.pred", c, a, masks)
    assert ballot.dtype == np.uint32
    for i, group in enumerate(groups_of(c, masks)):
        said = [bool(a[j]) for j in group]
        expected = sum(1 << int(c.gids[j] & 31) for j in group if a[j])
        assert int(ballot[i]) == expected
        assert bool(every[i]) == all(said)
        assert bool(some_[i]) == any(said)
        assert bool(same[i]) == (len(set(said)) == 1)


@pytest.mark.parametrize("value", [False, True])
def test_vote_on_one_value(value: bool) -> None:
    c, a = whole(), np.array([value])
    assert run("vote.sync.ballot.b32", c, a, u32(FULL)).tolist() == [FULL if value else 0]
    assert run("vote.sync.all.pred", c, a, u32(FULL)).tolist() == [value]
    assert run("vote.sync.any.pred", c, a, u32(FULL)).tolist() == [value]
    assert run("vote.sync.uni.pred", c, a, u32(FULL)).tolist() == [True]


@pytest.mark.parametrize("kind", ["b32", "b64"])
@pytest.mark.parametrize("kinds_of_values", [1, 2, 9])
def test_match(kind: str, kinds_of_values: int, lanes: tuple[Cohort, Any]) -> None:
    c, masks = lanes
    a = np.random.default_rng(3).integers(0, kinds_of_values, c.n).astype(f"u{int(kind[1:]) // 8}")
    a = a + (1 << 40) * (a & 1) if kind == "b64" else a  # differ above the lower word only
    any_ = run(f"match.any.sync.{kind}", c, a, masks)
    all_, agreed = run(f"match.all.sync.{kind}", c, a, masks, destination=PAIR)
    assert np.array_equal(run(f"match.all.sync.{kind}", c, a, masks), all_)
    for i, group in enumerate(groups_of(c, masks)):
        alike = sum(1 << int(c.gids[j] & 31) for j in group if a[j] == a[i])
        everyone = sum(1 << int(c.gids[j] & 31) for j in group)
        one_value = len({int(a[j]) for j in group}) == 1
        assert int(any_[i]) == alike
        assert bool(agreed[i]) == one_value
        assert int(all_[i]) == (everyone if one_value else 0)


def integers_reduced(name: str, values: list[int]) -> int:
    operation, kind = name.split(".")
    if kind == "s32":
        values = [v - (1 << 32) if v >> 31 else v for v in values]
    result = values[0]
    for v in values[1:]:
        result = {
            "add": result + v,
            "min": min(result, v),
            "max": max(result, v),
            "and": result & v,
            "or": result | v,
            "xor": result ^ v,
        }[operation]
    return result & FULL


@pytest.mark.parametrize(
    "name",
    [
        "add.u32",
        "min.u32",
        "max.u32",
        "add.s32",
        "min.s32",
        "max.s32",
        "and.b32",
        "or.b32",
        "xor.b32",
    ],
)
@pytest.mark.parametrize("shift", [0, 3])
def test_redux(name: str, shift: int, lanes: tuple[Cohort, Any]) -> None:
    c, masks = lanes
    # Shifted or with the top bits set, so that and, or, and the sign are put to the test.
    a = random_u32(c.n, 5) >> shift if shift else random_u32(c.n, 5) | 0xC0000001
    kind = np.int32 if name.endswith("s32") else np.uint32
    got = run(f"redux.sync.{name}", c, a.view(kind), masks)
    assert got.dtype == kind
    for i, group in enumerate(groups_of(c, masks)):
        expected = integers_reduced(name, [int(a[j]) for j in group])
        assert int(got[i]) & FULL == expected


def test_redux_of_one_value() -> None:
    assert set(run("redux.sync.add.u32", whole(), u32(3), u32(FULL)).tolist()) == {96}


def single(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


FLOATS = [0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00001]
FLOATS += [0xFFC12345, 0x00000001, 0x80000001, 0x42F6E979]


@pytest.mark.parametrize("operation", ["min", "max"])
@pytest.mark.parametrize("extra", ["", ".abs", ".NaN", ".abs.NaN"])
@pytest.mark.parametrize("choices", [[6], [0, 1], [0, 1, 6], [6, 7], [4, 5, 7], range(11)])
def test_redux_f32(operation: str, extra: str, choices: Any, lanes: tuple[Cohort, Any]) -> None:
    c, masks = lanes
    a = np.random.default_rng(8).choice([FLOATS[i] for i in choices], c.n).astype(np.uint32)
    name = f"redux.sync.{operation}{extra}.f32"
    got = run(name, c, a.view(np.float32), masks, target=100).view(np.uint32)
    for i, group in enumerate(groups_of(c, masks)):
        bits = [int(a[j]) & (0x7FFFFFFF if "abs" in extra else FULL) for j in group]
        numbers = [b for b in bits if not math.isnan(single(b))]
        if not numbers or ("NaN" in extra and len(numbers) < len(bits)):
            assert int(got[i]) == 0x7FFFFFFF
            continue
        # -0.0 is less than +0.0.
        ordered = sorted(numbers, key=lambda b: (single(b), math.copysign(1, single(b))))
        assert int(got[i]) == ordered[0 if operation == "min" else -1]


def test_activemask_and_elect(lanes: tuple[Cohort, Any]) -> None:
    c, masks = lanes
    active = np.broadcast_to(run("activemask.b32", c), c.n)
    leader, leads = run("elect.sync", c, masks, destination=PAIR)
    leader = np.broadcast_to(leader, c.n)
    for i, group in enumerate(groups_of(c, masks)):
        warp = [int(g) & 31 for g in c.gids if g >> 5 == c.gids[i] >> 5]
        assert int(active[i]) == sum(1 << lane for lane in warp)
        first = min(int(c.gids[j]) & 31 for j in group)
        assert int(leader[i]) == first
        assert bool(leads[i]) == (int(c.gids[i]) & 31 == first)


@pytest.mark.parametrize(
    "name",
    [
        "shfl.bfly.b32",
        "shfl.sync.bfly.b64",
        "shfl.sync.left.b32",
        "vote.all.pred",
        "vote.sync.all",
        "activemask",
        "vote.sync.ballot.pred",
        "match.sync.any.b32",
        "match.any.sync.f32",
        "redux.sync.add.f32",
        "elect",
        "redux.sync.and.u32",
        "redux.add.u32",
        "redux.sync.min.abs.s32",
    ],
)
def test_forms_that_are_refused(name: str) -> None:
    with pytest.raises(Unsupported):
        op(name)


def test_match_any_has_no_predicate() -> None:
    with pytest.raises(Unsupported):
        op("match.any.sync.b32", PAIR, *REST[:2])


# Convergence


def ready_of(answer: Any, c: Cohort) -> list[bool]:
    return [True] * c.n if answer is True else np.broadcast_to(answer, c.n).tolist()


def test_whole_warps() -> None:
    c = cohort([*range(32), *range(40, 64), 70], 96, dead=tuple({*range(64, 96)} - {70}))
    # Warp 0 is whole, of warp 1 lanes 0 to 7 are missing, warp 2 has one lane left.
    assert ready_of(whole_warps(c), c) == [True] * 32 + [False] * 24 + [True]
    assert whole_warps(whole()) is True
    everyone = cohort(range(40), 64, dead=tuple(range(40, 64)))
    assert whole_warps(everyone) is True
    left = cohort([*range(32, 40)], 64, dead=tuple(range(40, 64)))
    assert whole_warps(left) is True


@pytest.mark.parametrize("varies", [False, True])
def test_converged(varies: bool) -> None:
    c = cohort([0, 1, 2, 32, 33, 65], 96, dead=(3, 34))
    gids = c.gids.tolist()
    for mask in (0x1, 0x3, 0x7, 0xF, 0x1F, 0x22, FULL):
        masks = np.full(c.n, mask, np.uint32) if varies else u32(mask)
        expected = []
        for g in gids:
            named = [(g & ~31) + lane for lane in range(32) if mask >> lane & 1]
            here = all(n in gids or not c.wave.live[n] for n in named)
            expected.append(here or g not in named)
        assert ready_of(converged(c, masks), c) == expected


def test_converged_wants_the_same_mask() -> None:
    c = cohort([0, 1, 2, 3], 32)
    masks = u32(0b0011, 0b0011, 0b1100, 0b1000)
    assert ready_of(converged(c, masks), c) == [True, True, False, True]


def test_ready_uses_the_last_operand() -> None:
    made = op("shfl.sync.idx.b32", ONE, *REST)
    c = cohort([0, 1, 5], 32)
    assert made.ready is not None
    assert made.waits_for is not None
    assert made.warp_gate
    arguments = (u32(1), u32(0), u32(31), u32(3, 3, 0xFF20))
    assert ready_of(made.ready(c, *arguments), c) == [True, True, False]
    waiting = cohort([5], 32, dead=(8,))
    text = made.waits_for(waiting, u32(1), u32(0), u32(31), u32(0xFF20))
    assert text == "lanes 0x0000fe00 of its warp at shfl.sync"


def test_what_a_warp_waits_for() -> None:
    mma = instruction("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
    assert waits_for_lanes(mma) == "the other lanes of its warp at mma.sync"
    c = cohort(range(16), 32, dead=(31,))
    assert waits_for_lanes(mma, c) == "lanes 0x7fff0000 of its warp at mma.sync"
    assert waits_for_lanes(instruction("bar.warp.sync")).endswith("at bar.warp.sync")
    assert waits_for_lanes(instruction("bar.arrive")).endswith("at bar.arrive")


@pytest.mark.parametrize("varies", [False, True])
def test_a_lane_outside_its_mask(varies: bool) -> None:
    c = whole()
    masks = np.full(96, FULL, np.uint32) if varies else u32(0xFFFF)
    if varies:
        masks[37] = FULL - (1 << 5)
    with pytest.raises(KernelTrap, match="does not name the lane itself") as caught:
        run("vote.sync.ballot.b32", c, np.ones(96, np.bool_), masks)
    assert caught.value.where is not None
    assert caught.value.where.thread == ((37 if varies else 16), 0, 0)


def test_lanes_that_disagree() -> None:
    masks = np.full(96, FULL, np.uint32)
    masks[64:80] = 0xFFFF
    masks[80:96] = 0xFFFF0000
    shfl = instruction("shfl.sync.idx.b32")
    found = members(shfl, whole(), masks)
    assert found is not None
    assert np.array_equal(found.reshape(-1), masks)
    masks[80:96] = FULL
    with pytest.raises(
        KernelTrap, match="of lane 16 names lane 15, whose membermask is 0x0000ffff"
    ):
        members(shfl, whole(), masks)
