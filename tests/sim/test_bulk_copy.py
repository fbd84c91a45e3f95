"""cp.async.bulk between global and shared memory, from CUDA C."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from sim import cuda
from sim.bulk_kit import DELIVERIES, HEAD, alone, launch

# Every block loads 256 words, doubles them, and stores them.
ROUND_TRIP = r"""
extern "C" __global__ void k(const u32* in, u32* out) {
    __shared__ __align__(16) u32 buffer[256];
    __shared__ u64 bar;
    int t = threadIdx.x;
    if (t == 0) init(&bar, 1);
    __syncthreads();
    if (t == 0) {
#ifdef EARLY
        load(buffer, in + blockIdx.x * 256, 1024, &bar); // LOAD
        expect(&bar, 1024);
#else
        expect(&bar, 1024);
        load(buffer, in + blockIdx.x * 256, 512, &bar);
        load(buffer + 128, in + blockIdx.x * 256 + 128, 512, &bar);
#endif
    }
#ifndef NO_WAIT
    wait(&bar, 0);
#endif
    buffer[t] *= 2;
    buffer[t + 128] *= 2; // USE
    proxy_fence();
    __syncthreads();
    if (t == 0) {
        store(out + blockIdx.x * 256, buffer, 1024); // STORE
        commit();
        wait_group<0>();
    }
}
"""


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("options", [(), ("-DEARLY",)])
def test_round_trip(delivery, options):
    """Also where complete_tx may come before expect_tx."""
    x = np.arange(1024, dtype=np.uint32)
    out = np.zeros_like(x)
    for seed in range(3):
        result = launch(ROUND_TRIP, 4, 128, x, out, options=options, delivery=delivery, seed=seed)
        assert np.array_equal(result[1], 2 * x)


def test_late_loads_are_seen_only_by_who_waits():
    x = np.arange(1024, dtype=np.uint32)
    options = ("-DNO_WAIT",)
    _, eager = launch(ROUND_TRIP, 4, 128, x, 0 * x, options=options)
    assert np.array_equal(eager, 2 * x)
    with pytest.raises(sim.MemoryFault, match="read of unwritten memory") as caught:
        launch(ROUND_TRIP, 4, 128, x, 0 * x, options=options, delivery="late")
    line = int(caught.value.where.line.rpartition(":")[2])
    assert line in (cuda.line_of(HEAD + ROUND_TRIP, "// USE") - k for k in (0, 1))


def test_late_loads_read_late():
    """What is written to a load's source before it is waited for may be what it reads."""
    source = r"""
extern "C" __global__ void k(u32* in, u32* out) {
    __shared__ __align__(16) u32 buffer[4];
    __shared__ u64 bar;
    init(&bar, 1);
    expect(&bar, 16);
    load(buffer, in, 16, &bar);
    for (int i = 0; i < 4; ++i) in[i] = 9;
    wait(&bar, 0);
    for (int i = 0; i < 4; ++i) out[i] = buffer[i];
}"""
    x = np.arange(4, dtype=np.uint32)
    for delivery, read in (("eager", [0, 1, 2, 3]), ("late", [9] * 4)):
        _, out = launch(source, 1, 1, x, 0 * x, delivery=delivery)
        assert out.tolist() == read
    source = source.replace("for (int", "commit(); for (int", 1)  # some more chances
    found = {
        launch(source, 1, 1, x, 0 * x, delivery="random", seed=seed)[1].tobytes()
        for seed in range(12)
    }
    assert found == {x.tobytes(), np.full(4, 9, np.uint32).tobytes()}


# Two stores in two groups; the source is changed after N groups were waited for.
GROUPS = r"""
extern "C" __global__ void k(u32* out, u32* seen) {
    __shared__ __align__(16) u32 buffer[8];
    if (threadIdx.x) return;
    for (int i = 0; i < 8; ++i) buffer[i] = i + 1;
    proxy_fence();
    store(out, buffer, 16); commit();
    store(out + 4, buffer + 4, 16); commit();
    WAIT;
    for (int i = 0; i < 4; ++i) seen[i] = out[i];
    for (int i = 0; i < 8; ++i) buffer[i] = 99;
    for (int i = 4; i < 8; ++i) seen[i] = out[i];
}
"""


@pytest.mark.parametrize(
    ("wait", "out", "seen"),
    [
        # (what is stored at last, what the thread reads of it before)
        ("wait_group<0>()", [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]),
        ("wait_group<1>()", [1, 2, 3, 4, 99, 99, 99, 99], [1, 2, 3, 4, 0, 0, 0, 0]),
        ("wait_group<2>()", [99] * 8, [0] * 8),
        ("wait_read<0>()", [1, 2, 3, 4, 5, 6, 7, 8], [0] * 8),
        ("wait_read<1>()", [1, 2, 3, 4, 99, 99, 99, 99], [0] * 8),
        ("wait_read<0>(); wait_group<1>()", [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 0, 0, 0, 0]),
    ],
)
def test_groups(wait, out, seen):
    blank = np.zeros(8, np.uint32)
    source = GROUPS.replace("WAIT", wait)
    late = launch(source, 1, 32, blank, blank, delivery="late")
    assert [x.tolist() for x in late] == [out, seen]
    eager = launch(source, 1, 32, blank, blank, delivery="eager")
    assert [x.tolist() for x in eager] == [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
    found = set()
    for seed in range(12):
        stored, read = launch(source, 1, 32, blank, blank, delivery="random", seed=seed)
        # At any time between: each store as early or as late as may be.
        for got, first, last in ((stored, [1, 2, 3, 4, 5, 6, 7, 8], out),
                                 (read, [1, 2, 3, 4, 5, 6, 7, 8], seen)):  # fmt: skip
            assert all(g in (a, b) for g, a, b in zip(got.tolist(), first, last, strict=True))
        found.add((tuple(stored.tolist()), tuple(read.tolist())))
    assert len(found) > (wait != "wait_group<0>()")
    if wait == "wait_group<2>()":
        # A store may have read its source, but not written yet.
        assert any(out[:4] == (1, 2, 3, 4) and seen[:4] == (0,) * 4 for out, seen in found)


def test_groups_are_of_a_thread():
    """A thread waits for its own groups only, and a group is what it committed."""
    source = r"""
extern "C" __global__ void k(u32* out, u32* seen) {
    __shared__ __align__(16) u32 buffer[128];
    int t = threadIdx.x;
    buffer[4 * t] = buffer[4 * t + 1] = buffer[4 * t + 2] = buffer[4 * t + 3] = t + 1;
    proxy_fence();
    store(out + 4 * t, buffer + 4 * t, 16);
    if (t % 2 == 0) commit();
    wait_group<0>();
    seen[t] = out[4 * t];
}"""
    out, seen = launch(
        source, 1, 32, np.zeros(128, np.uint32), np.zeros(32, np.uint32), delivery="late"
    )
    assert out.tolist() == np.repeat(np.arange(1, 33), 4).tolist()
    assert seen.tolist() == [t + 1 if t % 2 == 0 else 0 for t in range(32)]


POLL = r"""
extern "C" __global__ void k(const u32* in, u32* out) {
    __shared__ __align__(16) u32 buffer[64];
    __shared__ u64 bar[2];
    if (threadIdx.x == 0) { init(bar, 1); init(bar + 1, 1); }
    __syncthreads();
    if (threadIdx.x == 0) {
        expect(bar, 128); load(buffer, in, 128, bar);
        expect(bar + 1, 128); load(buffer + 32, in + 32, 128, bar + 1);
        u32 done = 0, rounds = 0;
        while (!done) {
            ++rounds;
            asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], 0;"
                         " selp.u32 %0, 1, 0, p; }"
                         : "=r"(done) : "r"(shared_address(bar + 1)) : "memory");
        }
        out[64] = rounds;
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], 0;"
                     " selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(shared_address(bar)) : "memory");
        out[65] = done;
    }
    __syncthreads();
    wait(bar, 0);
    out[threadIdx.x] = buffer[threadIdx.x];
}
"""


def test_polling_delivers_what_is_polled_for():
    x = np.arange(64, dtype=np.uint32)
    for delivery, rounds, other in (("eager", 1, 1), ("late", 2, 0)):
        _, out = launch(POLL, 1, 64, x, np.zeros(66, np.uint32), delivery=delivery)
        assert out[:64].tolist() == x.tolist()
        assert out[64:].tolist() == [rounds, other]


def test_prefetch_moves_nothing_but_looks_at_its_addresses():
    source = r"""
extern "C" __global__ void k(const u32* in, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(in), "r"(bytes));
}"""
    x = np.zeros(64, np.uint32)
    launch(source, 1, 1, x, 256)
    with pytest.raises(sim.MemoryFault, match="out of bounds"):
        launch(source, 1, 1, x, 272)
    with pytest.raises(sim.KernelTrap, match="size 40 of a bulk copy"):
        launch(source, 1, 1, x, 40)


def test_a_byte_mask_chooses_bytes_of_each_chunk():
    source = r"""
extern "C" __global__ void k(unsigned char* out) {
    __shared__ __align__(16) unsigned char buffer[64];
    for (int i = 0; i < 64; ++i) buffer[i] = i + 1;
    proxy_fence();
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%0], [%1], 48, %2;"
                 :: "l"(out), "r"(shared_address(buffer)), "h"((unsigned short)0x80f1)
                 : "memory");
    commit();
    wait_group<0>();
}"""
    device = sim.Device("sm_100a", memory_bytes=1 << 20)
    out = device.upload(np.zeros(64, np.uint8))
    device.load(cuda.ptx(HEAD + source, "sm_100a")).kernel("k").launch(1, 1, [out])
    chosen = [0x80F1 >> (i % 16) & 1 if i < 48 else 0 for i in range(64)]
    assert out.get().tolist() == [(i + 1) * c for i, c in enumerate(chosen)]


# What goes wrong

ONE = r"""
extern "C" __global__ void k(u32* memory, u32 offset, u32 at, u32 bytes, int live) {
    __shared__ __align__(16) u32 buffer[64];
    __shared__ u64 bar;
    if (live) init(&bar, 1);
    if (live) expect(&bar, bytes);
    COPY; // COPY
    commit();
}
"""
LOAD = "load((char*)buffer + at, (char*)memory + offset, bytes, &bar)"
STORE = "store((char*)memory + offset, (char*)buffer + at, bytes)"


def fails(error, match, copy, *, size=64, offset=0, at=0, nbytes=64, live=1, **how):
    source = ONE.replace("COPY;", copy + ";")
    device = sim.Device("sm_90a", memory_bytes=1 << 20)
    array = device.upload(np.zeros(size, np.uint32), name="memory")
    if how.pop("unwritten", False):
        array = device.alloc(size, np.uint32, name="memory")
    with pytest.raises(error, match=match) as caught:
        launch(source, 1, 1, array, offset, at, nbytes, live, device=device, **how)
    return str(caught.value)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_bad_copies(delivery):
    how = {"delivery": delivery}
    text = fails(sim.MemoryFault, "out of bounds: read", LOAD, offset=208, **how)
    assert "'memory' of 256 bytes" in text
    assert "of a bulk copy of 64 bytes" in text
    fails(sim.MemoryFault, "out of bounds: write", LOAD, at=208, **how)
    fails(sim.MemoryFault, "misaligned", LOAD, offset=8, **how)
    fails(sim.MemoryFault, "misaligned", LOAD, at=8, **how)
    fails(sim.MemoryFault, "read of unwritten memory", LOAD, unwritten=True, **how)
    fails(sim.KernelTrap, "size 24 of a bulk copy; it must be a multiple of 16", LOAD, nbytes=24)
    fails(sim.KernelTrap, "no mbarrier at shared", LOAD, live=0, **how)
    fails(sim.MemoryFault, "read of unwritten memory", STORE, **how)


def test_bad_stores():
    written = "for (int i = 0; i < 64; ++i) buffer[i] = i; " + STORE
    fails(sim.MemoryFault, "out of bounds: write", written, offset=208)
    fails(sim.MemoryFault, "out of bounds: read", written, at=208)
    fails(sim.MemoryFault, "misaligned", written, offset=8)
    fails(sim.MemoryFault, "misaligned", written, at=8)
    assert "size 72" in fails(sim.KernelTrap, "multiple of 16", written, nbytes=72)


def test_without_checks_memory_still_ends():
    with pytest.raises(sim.MemoryFault):
        launch(ONE.replace("COPY;", LOAD + ";"), 1, 1, np.zeros(4, np.uint32), 1 << 30, 0, 64, 1,
               checks=())  # fmt: skip


def test_what_unchecked_copies_write_counts_as_written():
    """Of a launch without the memory check nothing is known, so all may be written."""
    device = sim.Device("sm_90a", memory_bytes=1 << 20)
    middle = device.alloc(256, np.uint32)
    x = np.arange(256, dtype=np.uint32)
    launch(ROUND_TRIP, 1, 128, x, middle, device=device, checks=())
    *_, out = launch(ROUND_TRIP, 1, 128, middle, 0 * x, device=device)
    assert np.array_equal(out, 4 * x)


def test_counters():
    x = np.arange(1024, dtype=np.uint32)
    device = sim.Device("sm_90a", memory_bytes=1 << 20)
    module = device.load(cuda.ptx(HEAD + ROUND_TRIP))
    arrays = [device.upload(x), device.upload(0 * x)]
    counters = module.kernel("k").launch(4, 128, arrays, counters=True).counters
    total = counters.total()
    assert total.bulk_bytes == 2 * x.nbytes
    assert total.bulk_sectors == 2 * x.nbytes // 32
    assert total.multicast_bytes_saved == 0
    assert total.dram_bytes == 2 * x.nbytes
    assert total.by_class["asynchronous copy"] == 4 * 5
    assert "bulk sectors" in counters.table()


REFUSED = [
    ("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.multicast::cluster"
     " [%r1], [%rd1], %r2, [%r3], %h1;", "form"),
    ("cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%rd1], [%r1], %r2, %h1;", "cp_mask"),
    ("cp.async.bulk.shared::cta.global.bulk_group [%r1], [%rd1], %r2;", "form"),
    ("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.L2::cache_hint"
     " [%r1], [%r2], %r2, [%r3], %rd2;", "form"),
    ("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], %r2;",
     "with 3 operands"),
    ("cp.async.bulk.wait_group %r1;", "not a constant"),
    ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s64 [%rd1], [%r1], %r2;", "form"),
    ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [%rd1], [%r1], %r2;", "form"),
    ("cp.reduce.async.bulk.global.shared::cta.bulk_group.min.noftz.f16 [%rd1], [%r1], %r2;",
     "form"),
    ("cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.f32"
     " [%r1], [%r2], %r2, [%r3];", "form"),
]  # fmt: skip
TAKEN = [
    "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint"
    " [%r1], [%rd1], %r2, [%r3], %rd2;",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
    ".L2::cache_hint [%r1], [%rd1], 256, [%r3], %h1, %rd2;",
    "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%rd1], [%r1], %r2, %rd2;",
    "cp.async.bulk.prefetch.L2.global.L2::cache_hint [%rd1], %r2, %rd2;",
    "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
    " [%r1], [%r2], %r2, [%r3];",
    "cp.async.bulk.wait_group.read 3;",
]


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_forms_that_are_refused(text, reason):
    with pytest.raises(sim.UnsupportedPTX) as caught:
        sim.load(alone(text))
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", TAKEN)
def test_forms_that_are_taken(text):
    sim.load(alone(text))


def test_bulk_copies_need_sm_90():
    with pytest.raises(sim.UnsupportedPTX, match="sm_90"):
        sim.load(alone("cp.async.bulk.commit_group;").replace("sm_90a", "sm_89"))
