"""cp.async: what the race detector and the counters are told, and arrival on mbarriers."""

from __future__ import annotations

import numpy as np
import pytest

from cumla.sim.copies import TRACKED
from cumla.sim.errors import KernelTrap
from cumla.sim.mbarriers import phase_key
from sim.async_kit import MODES, Groups, arrive_op, barrier_kit, copy_op, shared_of
from sim.waves import Bound, Recorder, cohort, make_wave

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


@pytest.mark.parametrize("delivery", ["eager", "late"])
def test_copies_complete_several_phases(delivery):
    options = {"delivery": delivery, "check_race": True}
    wave = make_wave(delivery=delivery)
    wave.race = race = Recorder()
    init, *_ = barrier_kit(**options)
    source = wave.device.memory.upload(np.arange(32, dtype=np.uint32))
    init(cohort(wave, [0]), 512, 16)
    c = cohort(wave, range(32))
    copy_op(4, **options)(c, 4 * np.arange(32), source.address + 4 * np.arange(32), 4)
    arrive_op(True, **options)(c, 512)
    wave.copies.deliver_all_arrivals()
    assert wave.mbarriers == {512: 2}
    assert shared_of(wave, 0).view(np.uint32)[:32].tolist() == list(range(32))
    released = [
        (np.flatnonzero(mask).tolist(), np.unique(keys).tolist())
        for _, mask, keys in race.named("copy_released")
    ]
    keys = phase_key(np.array([512]), np.array([0, 1])).tolist()
    assert released == [([*range(16)], keys[:1]), ([*range(16, 32)], keys[1:])]


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


def test_generic_address_of_the_barrier():
    wave = make_wave()
    init, _, test, _ = barrier_kit()
    c = cohort(wave, [0])
    init(c, 64, 1)
    Bound("cp.async.mbarrier.arrive.noinc.b64", "[%rd1]")(c, 0x7E00_0000_0040)
    assert test(c, 64, 0).all()
