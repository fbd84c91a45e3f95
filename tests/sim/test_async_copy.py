"""cp.async: what is copied, when it lands, and who is told."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from cumla.sim.errors import KernelTrap, MemoryFault
from cumla.sim.isa.table import Env, Unsupported
from cumla.sim.memory.arena import ALLOCATED, WRITABLE, WRITTEN
from cumla.sim.memory.device import BASE
from sim.async_kit import MODES, Groups, copy_op, shared_of
from sim.waves import Bound, cohort, make_wave


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
