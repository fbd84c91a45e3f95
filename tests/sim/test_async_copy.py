"""cp.async: what is copied, when it lands, and who is told."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from cumla.sim.copies import TRACKED
from cumla.sim.errors import KernelTrap, MemoryFault
from cumla.sim.isa.table import Env, Unsupported
from cumla.sim.memory.arena import ALLOCATED, WRITABLE, WRITTEN
from cumla.sim.memory.device import BASE
from sim.waves import Bound, Recorder, cohort, make_wave

MODES = ("eager", "late", "random")


def copy_op(size, *rest, cache="ca", extra="", **options):
    return Bound(
        f"cp.async.{cache}.shared.global{extra}", "[%r1]", "[%rd1]", size, *rest, **options
    )


class Groups:
    """The instructions that end and wait for groups."""

    def __init__(self, **options):
        self.commit = Bound("cp.async.commit_group", **options)
        self.wait_all = Bound("cp.async.wait_all", **options)
        self.options = options

    def wait(self, c, newest):
        Bound("cp.async.wait_group", newest, **self.options)(c, newest)


def shared_of(wave, slot):
    start = slot * wave.shared_stride
    return wave.memory.shared.data[start : start + wave.shared_size]


@pytest.mark.parametrize(
    ("size", "cache", "space", "extra"),
    [
        (4, "ca", "shared", ""),
        (8, "ca", "shared::cta", ".L2::64B"),
        (16, "ca", "shared", ".L2::cache_hint"),
        (16, "cg", "shared::cta", ".L2::cache_hint.L2::256B"),
        (16, "cg", "shared", ".L2::128B"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_bytes_arrive(size, cache, space, extra, check):
    rng = np.random.default_rng(size)
    wave = make_wave((50, 1, 1), (3, 1, 1), [1, 2, 0], shared=1024)
    data = rng.integers(0, 256, 4096).astype(np.uint8)
    source = wave.device.memory.upload(data)
    c = cohort(wave, [0, 3, 49, 64, 70, 128, 130, 140])
    to = rng.permutation(1024 // size)[: c.n] * size
    offsets = rng.integers(0, 4096 // size, c.n) * size
    policy = ("%rd9",) if "hint" in extra else ()
    op = Bound(
        f"cp.async.{cache}.{space}.global{extra}",
        "[%r1]",
        "[%rd1]",
        size,
        *policy,
        check_memory=check,
    )
    expected = wave.memory.shared.data.copy()
    assert op(c, to, source.address + offsets, size, *(0 for _ in policy)) is None
    for gid, t, o in zip(c.gids.tolist(), to.tolist(), offsets.tolist(), strict=True):
        start = gid // 64 * wave.shared_stride + t
        expected[start : start + size] = data[o : o + size]
    assert np.array_equal(wave.memory.shared.data, expected)


@pytest.mark.parametrize("delivery", MODES)
@pytest.mark.parametrize("size", [4, 8, 16])
def test_src_size_fills_with_zeros(size, delivery):
    wave = make_wave(delivery=delivery, shared=2048)
    data = np.random.default_rng(0).integers(1, 256, 1024).astype(np.uint8)
    source = wave.device.memory.upload(data)
    op = copy_op(size, "%r3", check_memory=True, delivery=delivery)
    c = cohort(wave, range(size + 1))
    sizes = np.arange(size + 1)
    lanes = np.arange(size + 1) * size
    # Where nothing is read, the pointer may be anything.
    addresses = np.where(sizes == 0, 12345, source.address + lanes)
    op(c, lanes, addresses, size, sizes)
    Groups(delivery=delivery).wait_all(c)
    expected = np.full(2048, 0xFF, np.uint8)
    for k in range(size + 1):
        expected[k * size : k * size + size] = 0
        expected[k * size : k * size + k] = data[k * size : k * size + k]
    assert np.array_equal(shared_of(wave, 0), expected)
    # One size and one source for all lanes.
    op(c, lanes + 512, source.address, size, size - 1)
    Groups(delivery=delivery).wait_all(c)
    for k in range(size + 1):
        got = shared_of(wave, 0)[512 + k * size : 512 + (k + 1) * size]
        assert got.tolist() == [*data[: size - 1].tolist(), 0]


def test_src_size_beyond_cp_size():
    wave = make_wave()
    source = wave.device.memory.upload(np.zeros(64, np.uint8))
    op = copy_op(8, "%r3")
    message = r"thread \(2, 0, 0\): src-size 9 of a cp.async of 8 bytes"
    with pytest.raises(KernelTrap, match=message):
        op(cohort(wave, range(4)), [0, 8, 16, 24], source.address, 8, [8, 0, 9, 9])


@dataclass(frozen=True)
class Typed(Env):
    registers: dict[str, str] = field(default_factory=dict)


@pytest.mark.parametrize("delivery", MODES)
def test_ignore_src(delivery):
    wave = make_wave(delivery=delivery)
    source = wave.device.memory.upload(np.arange(1, 9, dtype=np.uint32))
    env = Typed(90, check_memory=True, delivery=delivery, registers={"%p1": "pred"})
    op = copy_op(4, "%p1", env=env)
    assert op.op.sources == ("addr", "addr", "u32", "pred")
    c = cohort(wave, range(4))
    ignored = np.array([False, True, False, True])
    addresses = np.where(ignored, 0, source.address + 4 * np.arange(4))
    op(c, 4 * np.arange(4), addresses, 4, ignored)
    Groups(delivery=delivery).wait_all(c)
    assert shared_of(wave, 0)[:16].view(np.uint32).tolist() == [1, 0, 3, 0]
    assert copy_op(4, "%r1", env=env).op.sources == ("addr", "addr", "u32", "u32")


# When copies land


def test_eager_without_the_race_check_keeps_nothing():
    wave = make_wave()
    source = wave.device.memory.upload(np.arange(64, dtype=np.uint32))
    groups = Groups()
    c = cohort(wave)
    before = {k: v.copy() if hasattr(v, "copy") else v for k, v in vars(wave.copies).items()}
    copy_op(4)(c, 4 * np.arange(64), source.address + 4 * np.arange(64), 4)
    assert shared_of(wave, 0)[:256].view(np.uint32).tolist() == list(range(64))
    groups.commit(c)
    groups.wait(c, 0)
    groups.wait_all(c)
    after = vars(wave.copies)
    assert all(np.array_equal(after[k], v) for k, v in before.items())


def test_late_copies_read_their_source_when_they_land():
    wave = make_wave(delivery="late")
    source = wave.device.memory.upload(np.full(8, 5, np.uint32))
    groups = Groups(delivery="late")
    c = cohort(wave, range(8))
    copy_op(4, delivery="late")(c, 4 * np.arange(8), source.address + 4 * np.arange(8), 4)
    groups.commit(c)
    source.numpy()[3] = 77
    assert (shared_of(wave, 0) == 0xFF).all()
    version = wave.version
    groups.wait(c, 1)
    assert (shared_of(wave, 0) == 0xFF).all()
    assert wave.version == version
    groups.wait(c, 0)
    assert shared_of(wave, 0)[:32].view(np.uint32).tolist() == [5, 5, 5, 77, 5, 5, 5, 5]
    assert wave.version > version


def test_wait_all_waits_for_copies_of_no_group():
    wave = make_wave(delivery="late")
    source = wave.device.memory.upload(np.full(8, 5, np.uint32))
    groups = Groups(delivery="late")
    c = cohort(wave, range(1))
    copy_op(4, delivery="late")(c, 0, source.address, 4)
    groups.wait(c, 0)
    assert shared_of(wave, 0)[0] == 0xFF
    groups.wait_all(c)
    assert shared_of(wave, 0)[0] == 5


@pytest.mark.parametrize("delivery", ["late", "random"])
@pytest.mark.parametrize("check", [False, True])
def test_groups_are_those_of_each_lane(delivery, check):
    """Random programs of parting lanes: what must have landed has, what must not has not."""
    rng = np.random.default_rng(7)
    options = {"delivery": delivery, "check_memory": check}
    wave = make_wave((64, 1, 1), (3, 1, 1), shared=16384, delivery=delivery, seed=1)
    data = np.arange(1, 8193, dtype=np.uint32)
    source = wave.device.memory.upload(data)
    groups = Groups(**options)
    ops = {4: copy_op(4, **options), 8: copy_op(8, **options), 16: copy_op(16, **options)}
    everyone = np.flatnonzero(wave.live)
    filling = dict.fromkeys(everyone.tolist(), 0)  # the group that each lane fills
    issued = {g: [] for g in everyone.tolist()}  # (group, slot, address, source, size)
    must = set()
    free = [0, 0, 0]  # each block's next free address
    early = 0
    for step in range(150):
        kind = rng.integers(0, 4)
        if kind == 0:
            chosen = everyone
        elif kind == 1:
            chosen = everyone[64:128]
        else:
            chosen = np.sort(rng.choice(everyone, int(rng.integers(1, 30)), replace=False))
        c = cohort(wave, chosen)
        what = rng.integers(0, 10)
        if what < 5:
            size = int(rng.choice([4, 8, 16]))
            counts = np.bincount(chosen // 64, minlength=3)
            if any(free[s] + 16 * counts[s] + 16 > 16384 for s in range(3)):
                break
            to, froms = [], []
            for gid in chosen.tolist():
                slot = gid // 64
                at = -(-free[slot] // size) * size
                free[slot] = at + size
                start = int(rng.integers(0, 8192 * 4 // size)) * size
                issued[gid].append((filling[gid], slot, at, start, size))
                to.append(at)
                froms.append(source.address + start)
            ops[size](c, to, froms, size)
        elif what < 8:
            groups.commit(c)
            for gid in chosen.tolist():
                filling[gid] += 1
        elif what == 8:
            newest = int(rng.integers(0, 4))
            groups.wait(c, newest)
            for gid in chosen.tolist():
                must |= {x for x in issued[gid] if x[0] < filling[gid] - newest}
        else:
            groups.wait_all(c)
            for gid in chosen.tolist():
                filling[gid] += 1
                must |= set(issued[gid])
        for gid, copies in issued.items():
            for copy in copies:
                _, slot, at, start, size = copy
                got = shared_of(wave, slot)[at : at + size].tobytes()
                landed = got == data.tobytes()[start : start + size]
                if not landed:
                    assert got == b"\xff" * size, (step, gid)
                if copy in must:
                    assert landed, (step, gid, copy)
                elif delivery == "late":
                    assert not landed, (step, gid, copy)
                else:
                    early += landed
    assert len(must) > 500
    assert early > 500 or delivery == "late"


def test_random_delivery_follows_the_seed():
    def landed(seed):
        wave = make_wave(delivery="random", seed=seed)
        source = wave.device.memory.upload(np.zeros(64, np.uint32))
        c = cohort(wave)
        copy_op(4, delivery="random")(c, 4 * np.arange(64), source.address + 4 * np.arange(64), 4)
        first = (shared_of(wave, 0)[:256].view(np.uint32) == 0).tolist()
        Groups(delivery="random").commit(cohort(wave, range(0, 64, 2)))
        assert (shared_of(wave, 0)[:256].view(np.uint32) == 0).tolist()[1::2] == first[1::2]
        Groups(delivery="random").commit(c)
        second = (shared_of(wave, 0)[:256].view(np.uint32) == 0).tolist()
        return first, second

    first, second = landed(1)
    assert 10 < sum(first) < 54
    assert sum(first) < sum(second) < 64
    assert landed(1) == (first, second)
    assert landed(2) != (first, second)


def test_copies_that_nobody_waits_for_never_land_late():
    wave = make_wave(delivery="late")
    source = wave.device.memory.upload(np.zeros(64, np.uint32))
    c = cohort(wave)
    copy_op(4, delivery="late")(c, 4 * np.arange(64), source.address, 4)
    assert not wave.copies.deliver_all_arrivals()
    assert (shared_of(wave, 0) == 0xFF).all()


# The memory check


@pytest.mark.parametrize("delivery", MODES)
@pytest.mark.parametrize(
    ("to", "start", "sizes", "kind", "space"),
    [
        (0, 256, (), "out of bounds", "global"),
        (0, 4, (), "misaligned", "global"),
        (0, 128, (), "read of unwritten memory", "global"),
        (4096, 0, (), "out of bounds", "shared"),
        (-16, 0, (), "out of bounds", "shared"),
        (4, 0, (), "misaligned", "shared"),
        (0, 248, (15,), "misaligned", "global"),
        (0, 112, (16,), None, None),
        (0, 128, (4,), None, None),
        (0, 128, (9,), "read of unwritten memory", "global"),
    ],
)
def test_faults_at_the_line_of_issue(delivery, to, start, sizes, kind, space):
    wave = make_wave(delivery=delivery)
    array = wave.device.memory.alloc(256, name="kv")
    start_of_array = array.address - BASE
    states = ALLOCATED | WRITABLE | WRITTEN
    array.memory.arena.mark(start_of_array, start_of_array + 132, states)
    op = copy_op(16, *["%r3"] * len(sizes), check_memory=True, delivery=delivery)
    c = cohort(wave, [0, 5])
    arguments = ([64, to], [array.address, array.address + start], 16, *sizes)
    if kind is None:
        op(c, *arguments)
        return
    with pytest.raises(MemoryFault, match=rf"kernel\.cu:7.*thread \(5.*{space} address") as caught:
        op(c, *arguments)
    assert caught.value.kind == kind


@pytest.mark.parametrize("delivery", ["eager", "late"])
def test_landing_is_what_writes(delivery):
    wave = make_wave(delivery=delivery)
    source = wave.device.memory.upload(np.arange(4, dtype=np.uint32))
    options = {"check_memory": True, "delivery": delivery}
    load = Bound("ld.shared.u32", "%r1", "[%r2]", **options)
    c = cohort(wave, [0])
    copy_op(16, **options)(c, 32, source.address, 16)
    if delivery == "late":
        with pytest.raises(MemoryFault, match="read of unwritten memory"):
            load(c, 36)
    Groups(**options).wait_all(c)
    assert int(np.atleast_1d(load(c, 36))[0]) == 1


# Hooks


@pytest.mark.parametrize("delivery", MODES)
def test_the_race_detector_follows_each_copy(delivery):
    wave = make_wave((64, 1, 1), (2, 1, 1), delivery=delivery)
    wave.race = race = Recorder()
    options = {"check_race": True, "delivery": delivery}
    source = wave.device.memory.upload(np.zeros(1024, np.uint8))
    groups = Groups(**options)
    c = cohort(wave, [3, 5, 64, 70])
    op = copy_op(8, **options)
    op(c, [0, 8, 0, 16], source.address + np.array([0, 8, 16, 24]), 8)
    ((ins, told, space, offset, nbytes, kind, order, _),) = race.named("access")
    assert (ins, told, space, nbytes, kind, order) == (op.ins, c, "global", 8, "read", "weak")
    assert np.diff(offset).tolist() == [8, 8, 8]
    ((ins, told, offset, nbytes),) = race.named("copy_issued")
    assert (ins, told, nbytes) == (op.ins, c, 8)
    stride = wave.shared_stride
    assert offset.tolist() == [0, 8, stride, stride + 16]
    token = next(i for i, (name, _) in enumerate(race.calls) if name == "copy_issued")

    groups.commit(cohort(wave, [3, 64]))
    groups.wait(c, 0)
    waited = np.zeros(4, bool)
    for given, mask in race.named("copy_landed"):
        assert given == token
        waited |= mask
    assert waited.tolist() == [True, False, True, False]
    count = len(race.named("copy_landed"))
    groups.wait(c, 0)
    assert len(race.named("copy_landed")) == count
    groups.wait_all(cohort(wave, [5]))
    groups.wait_all(cohort(wave, [70]))
    later = [mask.tolist() for _, mask in race.named("copy_landed")[count:]]
    assert later == [[False, True, False, False], [False, False, False, True]]


def test_all_lanes_of_a_copy_are_told_as_none():
    wave = make_wave(delivery="late")
    wave.race = race = Recorder()
    options = {"check_race": True, "delivery": "late"}
    source = wave.device.memory.upload(np.zeros(1024, np.uint8))
    c = cohort(wave, range(32))
    copy_op(4, **options)(c, 4 * np.arange(32), source.address, 4)
    Groups(**options).wait_all(cohort(wave))
    ((_, mask),) = race.named("copy_landed")
    assert mask is None


def test_counters_are_told_what_is_read_and_written():
    wave = make_wave()
    wave.counters = Recorder()
    source = wave.device.memory.upload(np.zeros(1024, np.uint8))
    op = copy_op(16, "%r3", count=True)
    c = cohort(wave, range(5))
    to = 16 * np.arange(5)
    froms = source.address + to
    op(c, to, froms, 16, [16, 0, 7, 16, 12])
    calls = []
    for ins, told, space, address, nbytes, kind in wave.counters.named("access"):
        assert ins is op.ins
        sizes = np.broadcast_to(nbytes, address.shape).tolist()
        calls.append((space, kind, told.gids.tolist(), address.tolist(), sizes))
    assert calls == [
        ("global", "read", [0, 3], froms[[0, 3]].tolist(), [16, 16]),
        ("global", "read", [2, 4], froms[[2, 4]].tolist(), [7, 12]),
        ("shared", "write", [0, 1, 2, 3, 4], to.tolist(), [16] * 5),
    ]


# Arrival on mbarriers


def barrier_kit(**options):
    return (
        Bound("mbarrier.init.shared.b64", "[%r1]", "%r2", **options),
        Bound("mbarrier.arrive.shared.b64", "_", "[%r1]", **options),
        Bound("mbarrier.test_wait.parity.shared.b64", "%p1", "[%r1]", "%r2", **options),
        Bound("mbarrier.try_wait.parity.shared.b64", "%p1", "[%r1]", "%r2", **options),
    )


def arrive_op(noinc=False, **options):
    word = ".noinc" if noinc else ""
    return Bound(f"cp.async.mbarrier.arrive{word}.shared.b64", "[%r1]", **options)


@pytest.mark.parametrize("noinc", [False, True])
@pytest.mark.parametrize("check", [False, True])
def test_late_copies_arrive_when_nobody_can_move(noinc, check):
    options = {"delivery": "late", "check_memory": check}
    wave = make_wave((64, 1, 1), (2, 1, 1), delivery="late")
    init, arrive, _, wait = barrier_kit(**options)
    source = wave.device.memory.upload(np.arange(1024, dtype=np.uint32))
    init(cohort(wave, [0, 64]), 1024, 32)
    producers = cohort(wave, [*range(32), *range(64, 96)])
    lanes = producers.gids % 64
    copy = copy_op(4, **options)
    copy(producers, 4 * lanes, source.address + 4 * producers.gids, 4)
    arrive_op(noinc, **options)(producers, 1024)
    copy(producers, 4 * lanes + 512, source.address + 4 * producers.gids, 4)  # not tracked
    if not noinc:
        # The arrivals of the copies come on top of those that init counted.
        arrive(producers, 1024)
    consumers = cohort(wave, [40, 104])
    assert not np.any(wait.ready(consumers, 1024, 0))
    assert (shared_of(wave, 0)[:128] == 0xFF).all()
    version = wave.version
    assert wave.copies.deliver_all_arrivals() is True
    assert wave.version > version
    assert wait.ready(consumers, 1024, 0) is True
    for slot in range(2):
        words = shared_of(wave, slot).view(np.uint32)
        assert words[:32].tolist() == list(range(64 * slot, 64 * slot + 32))
        assert (words[128:160] == 0xFFFFFFFF).all()
    assert wave.copies.deliver_all_arrivals() is False


def test_eager_copies_arrive_at_once():
    wave = make_wave()
    init, arrive, test, _ = barrier_kit()
    c = cohort(wave, range(4))
    init(cohort(wave, [0]), 8, 4)
    arrive_op(True)(c, 8)
    assert test(c, 8, 0).all()
    arrive_op(False)(c, 8)  # adds as many arrivals as it makes
    assert not test(c, 8, 1).any()
    arrive(c, 8)
    assert test(c, 8, 1).all()


def test_waiting_for_the_group_does_not_arrive_yet():
    options = {"delivery": "late"}
    wave = make_wave(delivery="late")
    init, _, _, wait = barrier_kit(**options)
    source = wave.device.memory.upload(np.zeros(16, np.uint8))
    c = cohort(wave, [0])
    init(c, 8, 1)
    copy_op(16, **options)(c, 32, source.address, 16)
    arrive_op(True, **options)(c, 8)
    Groups(**options).wait_all(c)
    assert (shared_of(wave, 0)[32:48] == 0).all()
    assert not wait.ready(c, 8, 0).any()
    assert wave.copies.deliver_all_arrivals()
    assert wait.ready(c, 8, 0) is True


def test_looking_at_a_barrier_makes_its_copies_land():
    """A loop of test_wait is never blocked, so nobody else would make them land."""
    options = {"delivery": "late"}
    wave = make_wave(delivery="late")
    init, _, test, _ = barrier_kit(**options)
    source = wave.device.memory.upload(np.zeros(32, np.uint8))
    c = cohort(wave, [0])
    for barrier, to in ((8, 32), (16, 64)):
        init(c, barrier, 1)
        copy_op(16, **options)(c, to, source.address, 16)
        arrive_op(True, **options)(c, barrier)
    other = cohort(wave, [1])
    assert not test(other, 16, 0).any()
    assert test(other, 16, 0).all()
    # All that the lane had issued before has landed.
    assert (shared_of(wave, 0)[[*range(32, 48), *range(64, 80)]] == 0).all()
    assert not test(other, 8, 0).any()
    assert test(other, 8, 0).all()


def test_random_arrivals_land_sometimes_at_once():
    seen = set()
    for seed in range(16):
        options = {"delivery": "random"}
        wave = make_wave(delivery="random", seed=seed)
        init, _, test, wait = barrier_kit(**options)
        source = wave.device.memory.upload(np.zeros(1024, np.uint8))
        c = cohort(wave, range(32))
        init(cohort(wave, [0]), 1024, 32)
        copy_op(16, **options)(c, 16 * np.arange(32), source.address, 16)
        arrive_op(True, **options)(c, 1024)
        complete = bool(np.all(wait.ready(c, 1024, 0)))
        landed = bool((shared_of(wave, 0)[:512] == 0).all())
        assert landed or not complete
        seen.add(complete)
        wave.copies.deliver_all_arrivals()
        assert test(c, 1024, 0).all()
        assert (shared_of(wave, 0)[:512] == 0).all()
    assert seen == {False, True}


@pytest.mark.parametrize("delivery", ["eager", "late"])
def test_others_learn_of_copies_from_the_barrier(delivery):
    options = {"check_race": True, "delivery": delivery}
    wave = make_wave((64, 1, 1), (2, 1, 1), delivery=delivery)
    wave.race = race = Recorder()
    init, _, test, _ = barrier_kit(**options)
    source = wave.device.memory.upload(np.zeros(1024, np.uint8))
    init(cohort(wave, [0, 64]), 1024, [3, 2])
    c = cohort(wave, [0, 1, 2, 64, 65])
    copy_op(4, **options)(c, 4 * (c.gids % 64), source.address, 4)
    token = next(i for i, (name, _) in enumerate(race.calls) if name == "copy_issued")
    arriving = cohort(wave, [0, 1, 50, 64, 65])  # lane 50 has copied nothing
    arrive_op(True, **options)(arriving, 1024)
    wave.copies.deliver_all_arrivals()
    ((given, mask, keys),) = race.named("copy_released")
    assert given == token
    assert mask.tolist() == [True, True, False, True, True]
    assert keys.shape == (4,)
    assert keys[0] == keys[1] != keys[2] == keys[3]
    # No lane's own past is released: only the copies are tracked.
    assert race.named("release") == []
    test(cohort(wave, [70]), 1024, 0)
    ((_, acquired),) = race.named("acquire")
    assert acquired.tolist() == [keys[2]]
    # The lanes may wait for their groups as well.
    Groups(**options).wait_all(c)
    told = np.zeros(5, bool)
    for _, mask in race.named("copy_landed"):
        told |= mask
    assert told.all()


def test_a_producer_that_never_waits_keeps_little():
    options = {"check_race": True, "delivery": "late"}
    wave = make_wave(delivery="late")
    wave.race = Recorder()
    init, _, test, _ = barrier_kit(**options)
    source = wave.device.memory.upload(np.zeros(64, np.uint8))
    c = cohort(wave, [0])
    init(c, 1024, 1)
    for step in range(60):
        copy_op(4, **options)(c, 0, source.address, 4)
        arrive_op(True, **options)(c, 1024)
        test(c, 1024, step % 2)
        assert test(c, 1024, step % 2).all()
    wave.race.calls.clear()
    Groups(**options).wait_all(c)
    assert len(wave.race.named("copy_landed")) == TRACKED


def test_arrivals_on_what_is_no_barrier():
    wave = make_wave()
    with pytest.raises(KernelTrap, match="no mbarrier at shared 0x40"):
        arrive_op()(cohort(wave, [0]), 64)
    init, _, _, _ = barrier_kit()
    init(cohort(wave, [0]), 64, 2**20 - 1)
    with pytest.raises(KernelTrap, match="more than 1048575 arrivals pending"):
        arrive_op()(cohort(wave, [0]), 64)


@pytest.mark.parametrize(
    ("text", "operands"),
    [
        ("cp.async.cg.shared.global", ("[%r1]", "[%rd1]", 8)),
        ("cp.async.ca.shared.global", ("[%r1]", "[%rd1]", 12)),
        ("cp.async.ca.shared.global", ("[%r1]", "[%rd1]", "%r2")),
        ("cp.async.ca.shared.global", ("[%r1]", "[%rd1]")),
        ("cp.async.ca.shared.global.L2::cache_hint", ("[%r1]", "[%rd1]", 16)),
        ("cp.async.ca.shared.global.L2::64B.L2::128B", ("[%r1]", "[%rd1]", 16)),
        ("cp.async.ca.shared.global.L1::evict_last", ("[%r1]", "[%rd1]", 16)),
        ("cp.async.ca.shared::cluster.global", ("[%r1]", "[%rd1]", 16)),
        ("cp.async.ca.shared.shared", ("[%r1]", "[%rd1]", 16)),
        ("cp.async.ca.shared.global", ("[%r1]", "[%rd1]", 16, "%r2", "%r3")),
        ("cp.async.ca", ("[%r1]", "[%rd1]", 16)),
        ("cp.async.bulk.shared::cluster.global", ("[%r1]", "[%rd1]", "%r1", "[%r2]")),
        ("cp.async.wait_group", ("%r1",)),
        ("cp.async.wait_group", ()),
        ("cp.async.commit_group", (1,)),
        ("cp.async.mbarrier.arrive.b32", ("[%r1]",)),
        ("cp.async.mbarrier.arrive.shared::cluster.b64", ("[%r1]",)),
        ("cp.async.mbarrier.arrive.shared.noinc.b64", ("[%r1]",)),
        ("cp.async.mbarrier.arrive.noinc.b64", ()),
        ("cp.reduce", ()),
    ],
)
def test_refused_forms(text, operands):
    with pytest.raises(Unsupported, match="cp."):
        Bound(text, *operands)


def test_generic_address_of_the_barrier():
    wave = make_wave()
    init, _, test, _ = barrier_kit()
    c = cohort(wave, [0])
    init(c, 64, 1)
    Bound("cp.async.mbarrier.arrive.noinc.b64", "[%rd1]")(c, 0x7E00_0000_0040)
    assert test(c, 64, 0).all()
