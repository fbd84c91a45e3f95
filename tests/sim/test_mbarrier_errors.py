"""mbarrier: what programs must not do, and what the race detector is told."""

from __future__ import annotations

import numpy as np
import pytest

from cumla.sim.errors import KernelTrap, MemoryFault
from cumla.sim.race import RaceDetector
from sim.async_kit import Kit, bound, flag
from sim.waves import Bound, Recorder, cohort, make_wave

LARGEST = 2**20 - 1


def test_invalidated_and_new_barriers():
    wave = make_wave()
    kit = Kit(check_memory=True)
    c = cohort(wave, [0])
    with pytest.raises(KernelTrap, match="no mbarrier at shared 0x8: it was never initialised"):
        kit.arrive(c, 8)
    kit.init(c, 8, 1)
    kit.arrive(c, 8)
    kit.init(c, 8, 2)  # over a live one
    assert flag(c, kit.test_parity(c, 8, 0)) == [False]
    kit.inval(c, 8)
    for use in (kit.arrive, kit.sink, kit.inval):
        with pytest.raises(
            KernelTrap, match=r"kernel\.cu:7, block \(0, 0, 0\), thread \(0, 0, 0\)"
        ):
            use(c, 8)
    for use in (kit.test_parity, kit.expect, kit.arrive_n):
        with pytest.raises(KernelTrap, match="or was invalidated"):
            use(c, 8, 1)
    with pytest.raises(KernelTrap, match="or was invalidated"):
        kit.wait_parity.ready(c, 8, 0, 1)
    kit.init(c, 8, 3)
    assert kit.pending(kit.arrive(c, 8)) == 3


def test_errors_name_the_lane():
    wave = make_wave((64, 1, 1), (3, 1, 1), [0, 2, 1])
    kit = Kit()
    c = cohort(wave, [3, 70, 130])
    kit.init(cohort(wave, [0, 128]), 8, 1)
    with pytest.raises(KernelTrap, match=r"block \(2, 0, 0\), thread \(6, 0, 0\): .*0x8"):
        kit.arrive(c, 8)


@pytest.mark.parametrize("count", [0, LARGEST + 1, 2**32 - 1])
def test_counts_out_of_range(count):
    wave = make_wave()
    kit = Kit()
    c = cohort(wave, [4, 5])
    with pytest.raises(
        KernelTrap, match=f"count {count} of an mbarrier; it must be 1 to {LARGEST}"
    ):
        kit.init(c, [0, 8], [1, count])
    kit.init(c, 0, LARGEST)
    with pytest.raises(KernelTrap, match=rf"thread \(5, 0, 0\): count {count} of"):
        kit.arrive_n(c, 0, [1, count])


def test_more_arrivals_than_expected():
    wave = make_wave()
    kit = Kit()
    leader = cohort(wave, [0])
    kit.init(leader, 16, 2)
    message = "count 3 on the mbarrier at shared 0x10, whose phase 0 needs only 2 more of 2"
    with pytest.raises(KernelTrap, match=message):
        kit.arrive_n(leader, 16, 3)
    # The phase does not end while bytes are missing.
    kit.expect(leader, 16, 4)
    message = r"thread \(9, 0, 0\): an arrival with count 1 .* phase 0 needs only 0 more of 2"
    with pytest.raises(KernelTrap, match=message):
        kit.sink(cohort(wave, [3, 8, 9, 10]), 16)


def test_the_tx_count_is_bounded():
    wave = make_wave()
    kit = Kit()
    c = cohort(wave, [0])
    kit.init(c, 0, 1)
    kit.expect(c, 0, LARGEST)
    with pytest.raises(
        KernelTrap, match=f"tx-count of the mbarrier at shared 0x0 is beyond {LARGEST}"
    ):
        kit.expect(c, 0, 1)
    kit.finish(c, 0, LARGEST)
    kit.finish(c, 0, LARGEST)
    with pytest.raises(KernelTrap, match="tx-count"):
        kit.finish(c, 0, 1)


def test_misaligned():
    wave = make_wave((64, 1, 1), (2, 1, 1))
    kit = Kit()
    c = cohort(wave, [3, 64 + 7])
    kit.init(c, 8, 1)
    with pytest.raises(
        MemoryFault, match=r"block \(1, 0, 0\), thread \(7.*misaligned.* 0xc;"
    ) as info:
        kit.arrive(c, [8, 12])
    assert info.value.kind == "misaligned"
    assert info.value.address == 12


def test_states_that_mean_nothing():
    wave = make_wave()
    kit = Kit()
    c = cohort(wave, [0, 1])
    kit.init(cohort(wave, [0]), 8, 1)
    old = kit.arrive(cohort(wave, [0]), 8)
    kit.arrive(cohort(wave, [0]), 8)
    with pytest.raises(KernelTrap, match="not of the current phase"):
        kit.test(c, 8, old)


def test_overwritten_by_a_store():
    wave = make_wave()
    kit = Kit()
    c = cohort(wave, [0])
    for value in (0, 3 << 62, 1 | 1 << 20 | 1 << 61 | 2 << 62):
        kit.init(c, 8, 1)
        wave.memory.shared.data.view(np.uint64)[1] = value
        with pytest.raises(KernelTrap, match="mbarrier at shared 0x8 was overwritten"):
            kit.arrive(c, 8)


def test_the_race_detector_learns_who_waits_for_whom():
    wave = make_wave((64, 1, 1), (2, 1, 1), shared=64)
    wave.race = race = Recorder()
    kit = Kit(check_race=True)
    leaders = cohort(wave, [0, 64])
    kit.init(leaders, 8, 2)
    (_, told, space, offset, nbytes, kind, order, scope) = race.named("access")[0]
    assert told is leaders
    assert offset.tolist() == [8, wave.shared_stride + 8]
    assert (space, nbytes, kind, order, scope) == ("shared", 8, "write", "weak", "cta")

    everyone = cohort(wave, [0, 1, 64, 65])
    kit.sink(everyone, 8)
    ((gids, keys),) = race.named("release")
    assert gids.tolist() == [0, 1, 64, 65]
    first, second = int(keys[0]), int(keys[2])
    assert keys.tolist() == [first, first, second, second]
    assert first != second
    assert min(first, second) > 0  # negative names are of other barriers
    assert race.named("access")[-1][5:] == ("atomic", "relaxed", "cta")

    # A wait for the phase that has ended acquires what its arrivals released.
    watchers = cohort(wave, [5, 70, 71])
    kit.test_parity(watchers, 8, [0, 1, 0])
    ((gids, keys),) = race.named("acquire")
    assert gids.tolist() == [5, 71]
    assert keys.tolist() == [first, second]
    state = kit.arrive(cohort(wave, [0]), 8)
    third = int(race.named("release")[-1][1][0])
    assert third not in (first, second)
    kit.test(cohort(wave, [1]), 8, state)
    assert len(race.named("acquire")) == 1  # it failed

    # The phase before the one that has ended can no longer be waited for.
    assert race.named("forget") == []
    kit.arrive(cohort(wave, [0]), 8)
    assert [k.tolist() for (k,) in race.named("forget")] == [[first]]
    kit.wait(cohort(wave, [1]), 8, state)
    assert race.named("acquire")[-1][1].tolist() == [third]
    kit.inval(cohort(wave, [64]), 8)
    assert race.named("access")[-1][5] == "write"
    assert second in race.named("forget")[-1][0].tolist()


def test_waiting_for_the_phase_before_the_first_acquires_nothing():
    wave = make_wave()
    wave.race = race = Recorder()
    kit = Kit(check_race=True)
    c = cohort(wave, [0, 1])
    kit.init(cohort(wave, [0]), 8, 1)
    assert flag(c, kit.test_parity(c, 8, 1)) == [True, True]
    assert race.named("acquire") == []


def write_then_tell(before, after, arrive, wait, synced=True):
    """Races when lane 0 writes shared memory and tells lane 40, which reads, by an mbarrier."""
    options = {"check_race": True}
    wave = make_wave()
    wave.race = RaceDetector(wave)
    init = bound("init.shared.b64", "[%r1]", "%r2", **options)
    one, other = cohort(wave, [0]), cohort(wave, [40])
    init(one, 8, 1)
    if synced:
        wave.race.barrier(cohort(wave).gids)

    def access(c, kind):
        wave.race.access(init.ins, c, "shared", np.array([64]), 4, kind, "weak", "cta")

    access(one, "write")
    for text in before:
        Bound(text, **options)(one)
    bound(arrive, "_", "[%r1]", **options)(one, 8)
    assert flag(other, bound(wait, "%p1", "[%r1]", "%r2", **options)(other, 8, 0)) == [True]
    for text in after:
        Bound(text, **options)(other)
    access(other, "read")
    return wave.race.races()


def test_no_race_where_a_barrier_orders():
    arrive, wait = "arrive.shared.b64", "try_wait.parity.shared.b64"
    assert write_then_tell([], [], arrive, wait) == []
    relaxed = "arrive.relaxed.cta.shared.b64", "test_wait.parity.relaxed.cta.shared.b64"
    assert len(write_then_tell([], [], *relaxed)) == 1
    assert len(write_then_tell([], [], arrive, relaxed[1])) == 1
    assert len(write_then_tell([], [], relaxed[0], wait)) == 1
    fences = ["fence.acq_rel.cta"], ["fence.acq_rel.cta"]
    assert write_then_tell(*fences, *relaxed) == []


def test_using_a_barrier_races_with_initialising_it():
    arrive, wait = "arrive.shared.b64", "try_wait.parity.shared.b64"
    races = write_then_tell([], [], arrive, wait, synced=False)
    assert len(races) == 1
