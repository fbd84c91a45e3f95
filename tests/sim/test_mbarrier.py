"""mbarrier against a model of one object for each barrier, written after PTX's description."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest

from cumla.sim.errors import KernelTrap, MemoryFault
from cumla.sim.isa.table import Unsupported
from cumla.sim.mbarriers import phase_key
from cumla.sim.memory.spaces import SHARED_WINDOW
from sim.async_kit import Kit, bound, flag
from sim.waves import Recorder, cohort, make_wave

LARGEST = 2**20 - 1
KINDS = ["arrive_n", "drop", "arrive_tx", "expect", "finish", "jump"]
WEIGHTS = [0.3, 0.1, 0.1, 0.1, 0.1, 0.3]


@dataclass
class Model:
    """One barrier."""

    expected: int
    pending: int
    tx: int = 0
    phase: int = 0

    @classmethod
    def new(cls, count):
        return cls(count, count)

    def arrive(self, count, tx=0, drop=False):
        """Whether it may."""
        self.tx += tx
        if count > self.pending:
            return False
        self.pending -= count
        self.expected -= count if drop else 0
        self.settle()
        return True

    def settle(self):
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.expected


def test_random_programs_agree_with_the_model():
    rng = np.random.default_rng(3)
    kit = Kit(check_memory=True)
    flips = several = 0
    for _ in range(30):
        wave = make_wave((64, 1, 1), (3, 1, 1), [2, 0, 1], shared=256)
        models = {}
        states = {}  # barrier -> (state, phase) of its newest arrival
        for slot in range(3):
            for address in (8, 64, 248):
                count = int(rng.choice([1, 2, 7, 64, 200, LARGEST]))
                kit.init(cohort(wave, [slot * 64]), address, count)
                models[slot, address] = Model.new(count)
        for _ in range(60):
            # Each lane has its own barrier of those in its block.
            lanes = np.sort(rng.choice(192, int(rng.integers(1, 40)), replace=False))
            if rng.random() < 0.5:
                lanes = lanes[lanes // 64 == lanes[0] // 64]
            c = cohort(wave, lanes)
            addresses = rng.choice([8, 64, 248], lanes.shape[0])
            if rng.random() < 0.4:
                addresses = addresses[:1]
            keys = [(g // 64, int(a)) for g, a in zip(lanes, c.full(addresses), strict=True)]
            counts = rng.integers(1, rng.choice([2, 4]), lanes.shape[0])
            what = str(rng.choice(KINDS, p=WEIGHTS))
            if what == "jump":
                # All bytes that are missing, and one arrival, of all that is missing then.
                c = cohort(wave, lanes[:1])
                model, address = models[keys[0]], keys[0][1]
                if model.tx:
                    (kit.finish if model.tx > 0 else kit.expect)(c, address, abs(model.tx))
                    model.tx = 0
                    model.settle()
                if model.pending:
                    kit.arrive_n(c, address, model.pending)
                    assert model.arrive(model.pending)
                    flips += 1
                continue
            after = {k: replace(models[k]) for k in keys}
            expected, may = [], True  # states; whether nothing forbidden happens
            for k, n in zip(keys, counts.tolist(), strict=True):
                model = after[k]
                expected.append((model.pending, model.phase))
                if what in ("expect", "finish"):
                    model.tx += n if what == "expect" else -n
                elif what == "arrive_tx":
                    may &= model.arrive(1, tx=n)
                else:
                    may &= model.arrive(n, drop=what == "drop")
            if not may:
                data, phases = wave.memory.shared.data.copy(), dict(wave.mbarriers)
                with pytest.raises(KernelTrap, match="needs only"):
                    getattr(kit, what)(c, addresses, counts)
                wave.memory.shared.data[:], wave.mbarriers = data, phases
                continue
            result = getattr(kit, what)(c, addresses, counts)
            if what in ("expect", "finish"):
                for model in after.values():
                    model.settle()
            else:
                assert [(kit.pending(s), int(s) >> 20) for s in result] == expected
                for k, s, (_, phase) in zip(keys, result, expected, strict=True):
                    states[k] = s, phase
            steps = [model.phase - models[k].phase for k, model in after.items()]
            flips += sum(steps)
            several += max(steps) > 1
            models.update(after)
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
    assert several > 20


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


def test_lanes_of_one_instruction_complete_several_phases():
    wave = make_wave((64, 1, 1), (2, 1, 1), shared=64)
    wave.race = race = Recorder()
    kit = Kit(check_race=True)
    kit.init(cohort(wave, [0, 64]), 16, [16, 32])
    c = cohort(wave, [*range(32), *range(64, 96)])
    states = kit.arrive(c, 16)
    assert [kit.pending(s) for s in states] == [*range(16, 0, -1)] * 2 + [*range(32, 0, -1)]
    assert [int(s) >> 20 for s in states] == [0] * 16 + [1] * 16 + [0] * 32
    assert wave.mbarriers == {16: 2, wave.shared_stride + 16: 1}
    # Each lane releases the phase that it arrives on.
    at = np.repeat([16, wave.shared_stride + 16], 32)
    told = {}
    for gids, keys in race.named("release"):
        told |= zip(gids.tolist(), np.broadcast_to(keys, gids.shape).tolist(), strict=True)
    phases = np.repeat([0, 1, 0, 0], 16)
    assert told == dict(zip(c.gids.tolist(), phase_key(at, phases).tolist(), strict=True))
    ((forgotten,),) = race.named("forget")
    assert forgotten.tolist() == [phase_key(16, 0)]


def test_far_more_phases_than_python_could_nest_calls_for():
    wave = make_wave((1024, 1, 1), shared=64)
    kit = Kit()
    kit.init(cohort(wave, [0]), 16, 1)
    kit.sink(cohort(wave), 16)
    assert wave.mbarriers == {16: 1024}


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


@pytest.mark.parametrize("parity", [0, 1, 2, 3, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1])
def test_lowest_bit_of_a_parity_counts(parity):
    # As an H200 has it; PTX ISA has 0 and 1 only.
    wave = make_wave()
    kit = Kit()
    c = cohort(wave, [3])
    kit.init(c, 0, 1)
    for phase in range(3):
        assert flag(c, kit.test_parity(c, 0, parity)) == [parity & 1 != phase & 1]
        kit.arrive(c, 0)


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
    with pytest.raises(KernelTrap, match="an arrival with count 1 .* needs only 0 more of 0"):
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
    arrive = bound("arrive.b64", "_", "[%rd1]")
    for outside in (32, SHARED_WINDOW - 8, 0x7F00_0000_0100):
        with pytest.raises(KernelTrap, match=f"{outside:#x}, which is not in shared memory"):
            arrive(c, outside)
    for past in (SHARED_WINDOW + 256, SHARED_WINDOW + (1 << 24)):
        with pytest.raises(MemoryFault, match=f"generic {past:#x}.* past the end"):
            arrive(c, past)


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
