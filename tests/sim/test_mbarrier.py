"""mbarrier against a model of one object for each barrier, written after PTX's description."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest

from cumla.sim.errors import KernelTrap, MemoryFault
from cumla.sim.isa.table import Unsupported
from cumla.sim.memory.spaces import SHARED_WINDOW
from cumla.sim.race import RaceDetector
from sim.waves import Bound, Recorder, cohort, make_wave

LARGEST = 2**20 - 1


def bound(text, *operands, **options):
    return Bound(f"mbarrier.{text}", *operands, **options)


class Kit:
    """The instructions that most tests need."""

    def __init__(self, **options):
        self.init = bound("init.shared.b64", "[%r1]", "%r2", **options)
        self.inval = bound("inval.shared.b64", "[%r1]", **options)
        self.arrive = bound("arrive.shared.b64", "%rd1", "[%r1]", **options)
        self.arrive_n = bound("arrive.shared::cta.b64", "%rd1", "[%r1]", "%r2", **options)
        self.sink = bound("arrive.release.cta.shared::cta.b64", "_", "[%r1]", **options)
        self.drop = bound("arrive_drop.shared.b64", "%rd1", "[%r1]", "%r2", **options)
        self.hold = bound("arrive.noComplete.shared.b64", "%rd1", "[%r1]", "%r2", **options)
        self.arrive_tx = bound("arrive.expect_tx.shared.b64", "%rd1", "[%r1]", "%r2", **options)
        self.drop_tx = bound("arrive_drop.expect_tx.shared.b64", "%rd1", "[%r1]", "%r2", **options)
        self.expect = bound("expect_tx.relaxed.cta.shared::cta.b64", "[%r1]", "%r2", **options)
        self.finish = bound("complete_tx.relaxed.cta.shared::cta.b64", "[%r1]", "%r2", **options)
        self.test = bound("test_wait.shared.b64", "%p1", "[%r1]", "%rd1", **options)
        self.test_parity = bound("test_wait.parity.shared.b64", "%p1", "[%r1]", "%r2", **options)
        self.wait = bound("try_wait.shared.b64", "%p1", "[%r1]", "%rd1", **options)
        self.wait_parity = bound(
            "try_wait.parity.acquire.cta.shared::cta.b64", "%p1", "[%r1]", "%r2", "%r3", **options
        )
        self.count = bound("pending_count.b64", "%r1", "%rd1", **options)

    def pending(self, state):
        return int(self.count.op.run(np.atleast_1d(state))[0])


def flag(c, result):
    """A predicate as one bool for each lane."""
    assert result.dtype == np.bool_
    return c.full(result).tolist()


@dataclass
class Model:
    """One barrier."""

    expected: int
    pending: int = 0
    tx: int = 0
    phase: int = 0

    def __post_init__(self):
        self.pending = self.expected

    def settle(self):
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.expected


def test_random_programs_agree_with_the_model():
    rng = np.random.default_rng(3)
    kit = Kit(check_memory=True)
    flips = 0
    for _ in range(12):
        wave = make_wave((64, 1, 1), (3, 1, 1), [2, 0, 1], shared=256)
        models = {}
        states = {}  # barrier -> (state, phase) of its newest arrival
        for slot in range(3):
            for address in (8, 64, 248):
                count = int(rng.choice([1, 2, 7, 64, 200, LARGEST]))
                kit.init(cohort(wave, [slot * 64]), address, count)
                models[slot, address] = Model(count)
        for _ in range(60):
            # Each lane has its own barrier of those in its block.
            lanes = np.sort(rng.choice(192, int(rng.integers(1, 40)), replace=False))
            c = cohort(wave, lanes)
            addresses = rng.choice([8, 64, 248], lanes.shape[0])
            if rng.random() < 0.4:
                addresses = addresses[:1]
            keys = [(g // 64, int(a)) for g, a in zip(lanes, c.full(addresses), strict=True)]
            counts = rng.integers(1, 4, lanes.shape[0])
            what = str(rng.choice(["arrive_n", "drop", "arrive_tx", "expect", "finish", "jump"]))
            if what == "jump":
                # One arrival, of all that is missing.
                c = cohort(wave, lanes[:1])
                model = models[keys[0]]
                if model.pending:
                    kit.arrive_n(c, keys[0][1], model.pending)
                    model.pending = 0
                    model.settle()
                    flips += 1
                continue
            needs = {}
            for k, n in zip(keys, counts.tolist(), strict=True):
                needs[k] = needs.get(k, 0) + (1 if what == "arrive_tx" else n)
            if what in ("arrive_n", "drop", "arrive_tx") and any(
                needs[k] > models[k].pending for k in needs
            ):
                with pytest.raises(KernelTrap):
                    getattr(kit, what)(c, addresses, counts)
                continue
            result = getattr(kit, what)(c, addresses, counts)
            for i, (k, n) in enumerate(zip(keys, counts.tolist(), strict=True)):
                model = models[k]
                if what in ("arrive_n", "drop", "arrive_tx"):
                    assert kit.pending(result[i]) == model.pending
                    states[k] = result[i], model.phase
                if what == "arrive_tx":
                    model.tx += n
                    model.pending -= 1
                elif what == "expect":
                    model.tx += n
                elif what == "finish":
                    model.tx -= n
                else:
                    model.pending -= n
                    if what == "drop":
                        model.expected -= n
            for k in needs:
                before = models[k].phase
                models[k].settle()
                flips += models[k].phase - before
            # Every lane looks at every barrier.
            for slot in range(3):
                watchers = cohort(wave, range(slot * 64, slot * 64 + 64, 7))
                for address in (8, 64, 248):
                    phase = models[slot, address].phase
                    for parity in (0, 1):
                        done = kit.test_parity(watchers, address, parity)
                        assert flag(watchers, done) == [phase % 2 != parity] * watchers.n
                    if (slot, address) in states:
                        state, of = states[slot, address]
                        if phase - of <= 1:
                            done = kit.test(watchers, address, state)
                            assert flag(watchers, done) == [phase > of] * watchers.n
    assert flips > 50


def test_word_encoding():
    # bits 0-19 pending, 20-39 expected, 40-60 tx, 61 parity, 62-63 binary 10
    kit = Kit()
    wave = make_wave((64, 1, 1), (2, 1, 1), shared=128)
    c = cohort(wave, [64 + 5])
    kit.init(c, 24, 300)
    words = wave.memory.shared.data.view(np.uint64)
    at = (wave.shared_stride + 24) // 8
    assert words[at] == 300 | 300 << 20 | 2 << 62
    kit.arrive_n(c, 24, 200)
    kit.finish(c, 24, 77)
    assert words[at] == 100 | 300 << 20 | (2**21 - 77) << 40 | 2 << 62
    kit.arrive_n(c, 24, 100)
    kit.expect(c, 24, 77)
    assert words[at] == 300 | 300 << 20 | 1 << 61 | 2 << 62
    assert words[24 // 8] == 2**64 - 1  # the other block's memory is as it was


def test_one_instruction_of_many_lanes_and_blocks():
    wave = make_wave((96, 1, 1), (5, 1, 1), shared=64)
    kit = Kit()
    leaders = cohort(wave, range(0, 480, 96))
    kit.init(leaders, 16, 96)
    everyone = cohort(wave)
    states = kit.arrive(everyone, 16)
    assert wave.mbarriers == {slot * wave.shared_stride + 16: 1 for slot in range(5)}
    assert [kit.pending(s) for s in states] == list(range(96, 0, -1)) * 5
    assert flag(everyone, kit.test(everyone, 16, states)) == [True] * 480
    assert flag(everyone, kit.test_parity(everyone, 16, 1)) == [False] * 480


def test_barriers_out_of_order_among_the_lanes():
    wave = make_wave(shared=512)
    kit = Kit(check_memory=True)
    c = cohort(wave, range(40))
    for number in range(8):
        kit.init(cohort(wave, [0]), 8 * number, 5)
    addresses = (np.arange(40) * 3 % 8) * 8
    counts = np.ones(40, int)
    states = kit.arrive_n(c, addresses, counts)
    rank = [int((addresses[:i] == addresses[i]).sum()) for i in range(40)]
    assert [kit.pending(s) for s in states] == [5 - r for r in rank]
    assert wave.mbarriers == {8 * n: 1 for n in range(8)}


def test_dropping_out_changes_later_phases():
    wave = make_wave()
    kit = Kit()
    c = cohort(wave, [3])
    kit.init(c, 0, 4)
    kit.drop(c, 0, 3)
    assert flag(c, kit.test_parity(c, 0, 0)) == [False]
    kit.arrive(c, 0)
    assert flag(c, kit.test_parity(c, 0, 0)) == [True]
    kit.arrive(c, 0)  # one is enough now
    assert flag(c, kit.test_parity(c, 0, 1)) == [True]
    kit.drop_tx(c, 0, 40)
    assert flag(c, kit.test_parity(c, 0, 0)) == [False]
    kit.finish(c, 0, 40)
    assert flag(c, kit.test_parity(c, 0, 0)) == [True]
    with pytest.raises(KernelTrap, match="1 arrivals at once .* needs only 0 more of 0"):
        kit.arrive(c, 0)


def test_bytes_may_come_before_they_are_expected():
    wave = make_wave()
    kit = Kit()
    c = cohort(wave, [0])
    kit.init(c, 8, 1)
    kit.finish(c, 8, 100)
    assert flag(c, kit.test_parity(c, 8, 0)) == [False]
    kit.arrive_tx(c, 8, 100)
    assert flag(c, kit.test_parity(c, 8, 0)) == [True]


def test_no_complete():
    wave = make_wave()
    kit = Kit()
    c = cohort(wave, [0])
    kit.init(c, 8, 5)
    assert kit.pending(kit.hold(c, 8, 3)) == 5
    assert kit.pending(kit.hold(c, 8, 1)) == 2
    with pytest.raises(KernelTrap, match=r"\.noComplete completes the phase.*0x8"):
        kit.hold(c, 8, 1)


def test_a_phase_flip_is_seen_by_spinning_lanes():
    wave = make_wave()
    kit = Kit()
    c = cohort(wave, [0])
    kit.init(c, 8, 2)
    version = wave.version
    kit.test_parity(c, 8, 0)
    kit.wait_parity.ready(c, 8, 0, 1000)
    assert wave.version == version
    kit.arrive_n(c, 8, 2)
    assert wave.version > version


def test_try_wait_blocks_until_the_phase_is_complete():
    wave = make_wave((64, 1, 1), (2, 1, 1))
    kit = Kit()
    leaders = cohort(wave, [0, 64])
    kit.init(leaders, 64, 32)
    waiting = cohort(wave, [1, 2, 65, 66, 67])
    state = kit.arrive(cohort(wave, [0]), 64)
    zeros = [0] * 5
    assert waiting.full(kit.wait_parity.ready(waiting, 64, zeros, 100)).tolist() == [False] * 5
    kit.arrive_n(cohort(wave, [64]), 64, 32)
    answer = kit.wait_parity.ready(waiting, 64, zeros, 100)
    assert answer.tolist() == [False, False, True, True, True]
    # What a lane waits for.
    text = kit.wait_parity.waits_for(waiting, 64, zeros, 100)
    assert text == "mbarrier at shared 0x40 phase 0: 31 of 32 arrivals missing"
    kit.expect(cohort(wave, [0]), 64, 512)
    text = kit.wait.waits_for(waiting, 64, np.repeat(state, 5))
    assert text.endswith("phase 0: 31 of 32 arrivals missing, 512 bytes missing")
    # The engine lets everybody go on when nobody can move.
    wave.expired = True
    assert kit.wait_parity.ready(waiting, 64, zeros, 100) is True
    done = kit.wait_parity(waiting, 64, zeros, 100)
    assert flag(waiting, done) == [False, False, True, True, True]
    wave.expired = False
    kit.arrive_n(cohort(wave, [0]), 64, 31)
    kit.finish(cohort(wave, [0]), 64, 512)
    assert kit.wait_parity.ready(waiting, 64, 0, 100) is True
    assert kit.wait.ready(cohort(wave, [1]), 64, state) is True
    assert flag(waiting, kit.wait_parity(waiting, 64, 0, 100)) == [True] * 5


def test_test_wait_never_blocks():
    kit = Kit()
    assert kit.test.op.ready is None
    assert kit.test_parity.op.ready is None


def test_generic_addresses():
    wave = make_wave((64, 1, 1), (2, 1, 1), shared=256)
    c = cohort(wave, [64])
    bound("init.b64", "[%rd1]", "%r1")(c, SHARED_WINDOW + 32, 1)
    assert list(wave.mbarriers) == [wave.shared_stride + 32]
    bound("arrive.b64", "_", "[%rd1]")(c, SHARED_WINDOW + 32)
    assert flag(c, Kit().test_parity(c, 32, 0)) == [True]
    wait = bound("try_wait.parity.b64", "%p1", "[%rd1]", "%r1")
    assert flag(c, wait(c, SHARED_WINDOW + 32, 0)) == [True]
    for outside in (32, SHARED_WINDOW - 8, SHARED_WINDOW + 256, 0x7F00_0000_0100):
        with pytest.raises(KernelTrap, match=f"{outside:#x}, which is not in shared memory"):
            bound("arrive.b64", "_", "[%rd1]")(c, outside)


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
    c = cohort(wave, range(32))
    kit.init(cohort(wave, [0]), 16, 1)
    message = "32 arrivals at once on the mbarrier at shared 0x10, whose phase 0 needs only 1 more"
    with pytest.raises(KernelTrap, match=message):
        kit.sink(c, 16)


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


def test_parities_and_states_that_mean_nothing():
    wave = make_wave()
    kit = Kit()
    c = cohort(wave, [0, 1])
    kit.init(cohort(wave, [0]), 8, 1)
    with pytest.raises(KernelTrap, match=r"thread \(1, 0, 0\): phase parity 2; it is 0 or 1"):
        kit.test_parity(c, 8, [0, 2])
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


def test_waits_are_counted():
    wave = make_wave()
    wave.counters = Recorder()
    kit = Kit(count=True)
    c = cohort(wave)
    kit.init(cohort(wave, [0]), 8, 64)
    kit.sink(c, 8)
    kit.test_parity(c, 8, 0)
    assert wave.counters.calls == []
    kit.wait_parity(c, 8, 0, 0)
    assert wave.counters.named("wait") == [(kit.wait_parity.ins, c)]


ACCEPTED = [
    ("init.shared::cta.b64", "[%r1]", 1),
    ("inval.shared::cta.b64", "[%r1]"),
    ("inval.b64", "[%r1]"),
    ("arrive.relaxed.cluster.shared::cta.b64", "%rd1", "[%r1]", "%r2"),
    ("arrive.release.cluster.shared::cluster.b64", "_", "[%r1]"),
    ("arrive.noComplete.release.cta.shared.b64", "%rd1", "[%r1]", 3),
    ("arrive.expect_tx.release.cluster.shared::cluster.b64", "_", "[%r1]", "%r2"),
    ("arrive_drop.noComplete.shared.b64", "%rd1", "[%r1]", 3),
    ("arrive_drop.release.cta.shared::cta.b64", "_", "[%r1]"),
    ("expect_tx.relaxed.cluster.shared::cluster.b64", "[%r1]", "%r2"),
    ("complete_tx.b64", "[%r1]", "%r2"),
    ("test_wait.acquire.cta.shared::cta.b64", "%p1", "[%r1]", "%rd1"),
    ("try_wait.relaxed.cluster.shared::cta.b64", "%p1", "[%r1]", "%rd1", "%r3"),
    ("test_wait.parity.relaxed.cta.b64", "%p1", "[%r1]", 0),
]
REFUSED = [
    ("init.shared::cluster.b64", "[%r1]", 1),
    ("init.shared.b32", "[%r1]", 1),
    ("init.shared.b64", "[%r1]"),
    ("arrive.acquire.cta.shared.b64", "_", "[%r1]"),
    ("arrive.shared::cluster.b64", "%rd1", "[%r1]"),
    ("arrive.noComplete.shared.b64", "%rd1", "[%r1]"),
    ("arrive.noComplete.expect_tx.shared.b64", "%rd1", "[%r1]", 1),
    ("arrive.shared.shared::cta.b64", "%rd1", "[%r1]"),
    ("arrive.release.gpu.shared.b64", "%rd1", "[%r1]"),
    ("arrive.expect_tx.shared.b64", "%rd1", "[%r1]"),
    ("test_wait.shared.b64", "%p1", "[%r1]", "%rd1", 10),
    ("test_wait.release.cta.shared.b64", "%p1", "[%r1]", "%rd1"),
    ("try_wait.shared::cluster.b64", "%p1", "[%r1]", "%rd1"),
    ("try_wait.parity.parity.b64", "%p1", "[%r1]", "%rd1"),
    ("pending_count.shared.b64", "%r1", "%rd1"),
    ("wait.b64", "%r1", "%rd1"),
    ("arrive",),
]


@pytest.mark.parametrize("form", ACCEPTED)
def test_accepted_forms(form):
    bound(*form)


@pytest.mark.parametrize("form", REFUSED)
def test_refused_forms(form):
    with pytest.raises(Unsupported, match=re.escape("mbarrier") + "|cluster"):
        bound(*form)


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
