"""When a wgmma reads its operands and writes D: at issue, at the wait, or in between."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from cumla.sim.race import RaceDetector
from cumla.sim.warpgroups import Operation, Warpgroups
from sim.waves import Bound, cohort, make_wave
from sim.wgmma_programs import fragments, image, launch, products

# B of step 0 is overwritten with that of step 1 before the wait, by a thread that need not wait.
OVERWRITTEN = """
    fence();
    mma(d, a, b);
    commit();
    wait<1>();
    if (threadIdx.x < 64) ((unsigned*)dyn)[512 * steps + threadIdx.x]
        = ((unsigned*)dyn)[512 * steps + 64 + threadIdx.x];
    wait<0>();
"""


def second_b():
    """A of step 0 times B of step 1."""
    data = image()
    data[2048 * 5 // 2 :][:128] = data[2048 * 5 // 2 :][128:256]

    def operand(start, rows):
        part = data[start // 2 : start // 2 + rows * 16].astype(np.float32)
        return part.reshape(rows // 8, 2, 8, 8).transpose(0, 2, 1, 3).reshape(rows, 16)

    return fragments(operand(0, 64) @ operand(2048 * 5, 8).T)


def test_a_buffer_that_is_overwritten_too_early_gives_the_wrong_answer_it_deserves():
    right, wrong = fragments(products()[0]), second_b()
    assert (right != wrong).mean() > 0.5
    how = {"checks": ("memory",)}
    np.testing.assert_array_equal(launch(OVERWRITTEN, delivery="eager", **how), right)
    np.testing.assert_array_equal(launch(OVERWRITTEN, delivery="late", **how), wrong)
    seen = set()
    for seed in range(40):
        got = launch(OVERWRITTEN, delivery="random", seed=seed, **how)
        seen.add(("wrong", "right")[int(np.array_equal(got, right))])
        assert np.array_equal(got, right) or np.array_equal(got, wrong)
    assert seen == {"right", "wrong"}


def test_a_wait_for_the_right_group_makes_all_deliveries_agree():
    body = OVERWRITTEN.replace("wait<1>", "wait<0>")
    for delivery in ("eager", "late", "random"):
        got = launch(body, delivery=delivery, checks=("memory",))
        np.testing.assert_array_equal(got, fragments(products()[0]))


# One warp waits and lets B be overwritten, as a copy does once one thread has released a buffer;
# the others come to their wait after that. `go` is a warp's flag for the others.
ONE_WARP_WAITS_FIRST = """
    __shared__ u64 go;
    unsigned bar = (unsigned)__cvta_generic_to_shared(&go), done = 0, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) asm volatile("mbarrier.init.shared.b64 [%0], 32;" :: "r"(bar) : "memory");
    __syncthreads();
    fence();
    mma(d, a, b);
    commit();
    mma(d, a + 128, b + 16);
    commit();
    while (warp != FIRST && !done)
        asm volatile("{\\n.reg .pred p;\\nmbarrier.try_wait.parity.shared.b64 p, [%1], 0;\\n"
                     "selp.u32 %0, 1, 0, p;\\n}\\n" : "=r"(done) : "r"(bar) : "memory");
    wait<0>();
    if (warp == FIRST) {
        for (int i = 0; i < 4; i++)
            ((unsigned*)dyn)[512 * steps + threadIdx.x % 32 + 32 * i] = 0;
        asm volatile("{\\n.reg .b64 s;\\nmbarrier.arrive.shared.b64 s, [%0];\\n}\\n"
                     :: "r"(bar) : "memory");
    }
"""


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize(("delivery", "seeds"), [("eager", 1), ("late", 1), ("random", 8)])
def test_the_whole_warpgroup_is_done_when_one_warp_has_waited(first, delivery, seeds):
    body = ONE_WARP_WAITS_FIRST.replace("FIRST", str(first))
    for seed in range(seeds):
        got = launch(body, delivery=delivery, seed=seed)
        np.testing.assert_array_equal(got, fragments(products()[:2].sum(axis=0)))
    # Waiting for the older group only, the newer one may still read: that is a race.
    with pytest.raises(sim.RaceError, match="asynchronous read"):
        launch(body.replace("wait<0>", "wait<1>") + "wait<0>();", delivery=delivery)


def test_what_is_never_waited_for_never_lands_late():
    body = "fence(); mma(d, a, b); commit();"
    assert not launch(body, delivery="late", checks=()).any()
    np.testing.assert_array_equal(
        launch(body, delivery="eager", checks=()), fragments(products()[0])
    )


def test_an_empty_group_counts():
    body = """
    fence();
    mma(d, a, b);
    commit();
    commit();
    wait<1>();
    d[0] += 1;
"""
    want = fragments(products()[0]) + np.array([1, 0, 0, 0])
    for delivery in ("eager", "late", "random"):
        np.testing.assert_array_equal(launch(body, delivery=delivery), want)


# The state itself, without a program.


def operation(gids, value, old=None, told=None, asked=None):
    """D of one register is `value` for the lanes of the warpgroups that are asked for."""

    def work(groups):
        if asked is not None:
            asked.append(groups.tolist())
        assert groups.shape == (gids.shape[0] // 128,)
        made = np.repeat(groups, 128)
        return np.full((1, gids.shape[0]), value, np.uint32)[:, made]

    held = frozenset({"%a"})
    tell = None if told is None else told.append
    bound = Bound("wgmma.fence.sync.aligned").ins
    buffer = np.zeros((1, gids.shape[0]), np.uint32)
    return Operation(bound, (8, "f32"), gids, buffer, work, held, old, tell)


@pytest.mark.parametrize("delivery", ["eager", "late"])
def test_a_group_is_complete_for_its_warpgroup_and_known_to_warps_that_have_waited(delivery):
    wave = make_wave(block=(256, 1, 1), delivery=delivery)
    state: Warpgroups = wave.warpgroups
    everybody = cohort(wave)
    told: list = []
    asked: list = []
    made = operation(everybody.gids, 7, told=told, asked=asked)
    state.issue(made)
    (row,) = made.buffer
    name = row.view(np.float32)  # a register under another name
    assert (row == (7 if delivery == "eager" else 0)).all()
    assert (state.tags(name) != 0).all()
    state.commit(everybody)
    some = cohort(wave, np.arange(32, 64))
    state.wait(some, 1)
    assert (state.tags(name) != 0).all()
    assert not told
    state.wait(some, 0)
    waited = np.arange(256) // 32 == 1
    if delivery == "late":
        np.testing.assert_array_equal(row, np.where(np.arange(256) < 128, 7, 0))
    np.testing.assert_array_equal(state.tags(name) == 0, waited)
    np.testing.assert_array_equal(told[0], waited)
    state.wait(everybody, 0)
    assert (row == 7).all()
    assert state.tags(name) is None
    assert not state.under_way
    np.testing.assert_array_equal(told[1], ~waited)
    # Operands of a warpgroup are read once.
    want = [[True, True]] if delivery == "eager" else [[True, False], [False, True]]
    assert asked == want


def test_who_knows_of_the_newest_operation_is_told_once():
    wave = make_wave(block=(128, 1, 1))
    state, everybody = wave.warpgroups, cohort(wave)
    first, second, third = [], [], []
    for told in (first, second):
        state.issue(operation(everybody.gids, 1, told=told))
    state.commit(everybody)
    state.issue(operation(everybody.gids, 1, told=third))
    state.commit(everybody)
    state.wait(everybody, 1)
    assert (len(first), len(second), len(third)) == (0, 1, 0)
    assert second[0].all()
    state.wait(everybody, 0)
    assert (len(first), len(second), len(third)) == (0, 1, 1)


def test_a_fragment_is_free_for_the_warps_that_have_waited():
    wave = make_wave(block=(128, 1, 1))
    state = wave.warpgroups
    made = operation(np.arange(128), 1)
    state.issue(made)
    state.commit(cohort(wave))
    waited, others = cohort(wave, np.arange(32)), cohort(wave, np.arange(32, 128))
    state.wait(waited, 0)
    names = frozenset({"%a", "%b"})
    state.checks.modified(made.ins, names, waited, None)
    state.checks.modified(made.ins, frozenset({"%b"}), others, None)
    state.checks.modified(made.ins, names, others, np.zeros(1, np.bool_))
    with pytest.raises(sim.RaceError, match="overwrites %a, which holds A"):
        state.checks.modified(made.ins, names, others, None)


def test_registers_that_were_parted_and_joined_get_their_values():
    wave = make_wave(block=(256, 1, 1), delivery="late")
    state = wave.warpgroups
    gids = np.arange(256)
    first, second = operation(gids, 3), operation(gids[128:], 4)
    state.issue(first)
    state.issue(second)
    state.commit(cohort(wave))
    mask = gids < 128
    (row,), (other,) = first.buffer, second.buffer
    part = row[mask]
    state.picked(row, mask, gids[mask], part)
    order = np.r_[128:256, 0:128]
    joined = np.concatenate([other, part])[order]
    state.joined([other, part], order, gids, joined)
    chosen = np.where(gids % 2 == 0, joined, row)
    state.chosen(gids % 2 == 0, joined, row, gids, chosen)
    for register in (part, joined, chosen):
        assert (state.tags(register) != 0).all()
        assert not register.any()
    state.wait(cohort(wave), 0)
    assert (part == 3).all()
    np.testing.assert_array_equal(joined, np.where(mask, 3, 4))
    np.testing.assert_array_equal(chosen, np.where((gids % 2 == 0) & ~mask, 4, 3))
    assert state.tags(chosen) is None


def test_what_has_not_landed_holds_what_was_there_before():
    """The second operation takes up the first's D: until it lands, that is what a lane sees."""
    wave = make_wave(block=(128, 1, 1), delivery="late")
    state, everybody = wave.warpgroups, cohort(wave)
    first = operation(everybody.gids, 5)
    state.issue(first)
    state.commit(everybody)
    second = operation(everybody.gids, 9, old=list(first.buffer))
    state.issue(second)
    state.commit(everybody)
    assert not second.buffer.any()
    state.wait(everybody, 1)
    assert (second.buffer == 5).all()
    state.wait(everybody, 0)
    assert (second.buffer == 9).all()


def test_what_has_not_landed_follows_through_copies():
    """The second takes up a copy of the first's D; its own D has a copy, too."""
    wave = make_wave(block=(256, 1, 1), delivery="late")
    state, gids = wave.warpgroups, np.arange(256)
    first = operation(gids, 5)
    state.issue(first)
    mask = gids >= 128
    (row,) = first.buffer
    part = row[mask]
    state.picked(row, mask, gids[mask], part)
    state.commit(cohort(wave))
    second = operation(gids[mask], 9, old=[part])
    state.issue(second)
    (row,) = second.buffer
    copy = row.copy()
    state.picked(row, np.ones(128, np.bool_), gids[mask], copy)
    state.commit(cohort(wave, gids[mask]))
    state.wait(cohort(wave, gids[~mask]), 0)
    assert not part.any()  # the other warpgroup has not waited
    assert not copy.any()
    state.wait(cohort(wave, gids[128:160]), 1)
    assert (part == 5).all()
    assert (copy == 5).all()
    state.wait(cohort(wave, gids[mask]), 0)
    assert (copy == 9).all()
    assert (part == 5).all()


def test_copies_that_nobody_holds_are_forgotten():
    wave = make_wave(block=(128, 1, 1), delivery="late")
    state, everybody = wave.warpgroups, cohort(wave)
    made = operation(everybody.gids, 5)
    state.issue(made)
    state.commit(everybody)
    (row,) = made.buffer
    everything = np.ones(128, np.bool_)
    for _ in range(3):
        copy = row.copy()
        state.picked(row, everything, everybody.gids, copy)
    assert list(made.copies) == [id(copy)]
    state.wait(everybody, 0)
    assert (copy == 5).all()
    assert state.tags(copy) is None
    assert not state._copies


@pytest.mark.parametrize("waiting", [32, 128, 256])
def test_at_random_warpgroups_land_by_themselves(waiting):
    """A wait for nothing gives what is under way a chance."""
    seen = set()
    for seed in range(100):
        wave = make_wave(block=(256, 1, 1), delivery="late")
        state, gids = wave.warpgroups, np.arange(256)
        made = [operation(gids, 3), operation(gids, 4)]
        for each in made:
            state.issue(each)
            state.commit(cohort(wave))
        state.delivery, wave.rng = "random", np.random.default_rng(seed)
        state.wait(cohort(wave, gids[:waiting]), 2)
        landed = np.stack([each.buffer[0] != 0 for each in made]).reshape(2, 2, 128)
        assert (landed == landed[:, :, :1]).all()
        seen.add(tuple(landed[:, :, 0].sum(axis=0).tolist()))
    both = {(i, j) for i in range(3) for j in range(3 if waiting == 256 else 1)}
    assert seen == both


def test_the_race_detector_hears_what_is_read_and_when_that_is_known(monkeypatch):
    source = """
    fence();
    mma(d, a, b);
    commit();
    wait<0>();
"""
    heard = []

    asynchronous, completed = RaceDetector.asynchronous, RaceDetector.completed

    def hear(self, ins, issuers, agents, space, kind, offsets, rows, nbytes):
        heard.append((space, kind, nbytes, offsets, issuers.tolist()))
        assert (rows == np.repeat(np.arange(len(issuers)), len(offsets) // len(issuers))).all()
        return asynchronous(self, ins, issuers, agents, space, kind, offsets, rows, nbytes)

    def hear_completed(self, gids, agents, stamp):
        heard.append((gids, agents))
        completed(self, gids, agents, stamp)

    monkeypatch.setattr(RaceDetector, "asynchronous", hear)
    monkeypatch.setattr(RaceDetector, "completed", hear_completed)
    launch(source, threads=256)
    (a, b, done) = heard
    assert a[:3] == b[:3] == ("shared", "read", 16)
    assert a[4] == b[4] == [0, 128]
    start = int(a[3].min())
    for begins, size, found in ((0, 2048, a[3]), (2048 * 5, 256, b[3])):
        want = np.arange(begins, begins + size, 16) + start
        np.testing.assert_array_equal(np.sort(found), np.sort(np.r_[want, want]))
    gids, agents = done
    np.testing.assert_array_equal(gids, np.arange(256))
    assert len(set(agents[:128])) == len(set(agents[128:])) == 1
    assert agents[0] != agents[128]


def test_warps_that_do_not_come_are_named():
    body = """
    fence();
    if (threadIdx.x / 32 == 1) __syncthreads();
    mma(d, a, b);
    if (threadIdx.x / 32 != 1) __syncthreads();
    commit();
    wait<0>();
"""
    with pytest.raises(sim.Deadlock, match="the other warps of its warpgroup at wgmma.mma_async"):
        launch(body)
