"""The race detector on bulk and tensor copies: what orders them, and what is missing."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cumla import sim
from sim import cuda
from sim.bulk_kit import DELIVERIES, HEAD, launch

BOTH = ("memory", "race")

# A ring of buffers: each block loads tiles, changes them in place, and stores them.
RING = r"""
extern "C" __global__ void k(const u32* in, u32* out, int tiles) {
    __shared__ __align__(16) u32 buffer[2][64];
    __shared__ u64 full[2];
    int t = threadIdx.x;
    in += blockIdx.x * tiles * 64;
    out += blockIdx.x * tiles * 64;
    if (t == 0) { init(full, 1); init(full + 1, 1); }
    __syncthreads();
    if (t == 0) { expect(full, 256); load(buffer[0], in, 256, full); }
    for (int k = 0; k < tiles; ++k) {
        if (t == 0 && k + 1 < tiles) {
            READ_WAIT;
            expect(full + (k + 1) % 2, 256);
            load(buffer[(k + 1) % 2], in + 64 * (k + 1), 256, full + (k + 1) % 2);
        }
        WAIT;
        buffer[k % 2][t] = 3 * buffer[k % 2][t]; // USE
        FENCE;
        SYNC;
        if (t == 0) { store(out + 64 * k, buffer[k % 2], 256); commit(); }
    }
    if (t == 0) { FINAL; (void)*(volatile u32*)out; } // AFTER
}
"""
GOOD = {
    "READ_WAIT": "wait_read<0>()", "WAIT": "wait(full + k % 2, k / 2 % 2)",
    "FENCE": "proxy_fence()", "SYNC": "__syncthreads()", "FINAL": "wait_group<0>()",
}  # fmt: skip


def ring(**changes):
    text = RING
    for name, value in {**GOOD, **changes}.items():
        text = text.replace(name + ";", value + ";")
    return text


def run(source, delivery="eager", **how):
    x = np.arange(2 * 4 * 64, dtype=np.uint32)
    _, out = launch(source, 2, 64, x, np.zeros_like(x), 4, checks=BOTH, delivery=delivery, **how)
    return x, out


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_correct_ring_has_no_race(delivery):
    for seed in range(3):
        x, out = run(ring(), delivery, seed=seed)
        assert np.array_equal(out, 3 * x)


# What is left out, and the lines of two accesses that then race.
LOAD, STORE = "// BULK LOAD", "// BULK STORE"
USE, AFTER = "// USE", "// AFTER"
PLANTED = [
    ({"WAIT": ""}, LOAD, USE),
    ({"READ_WAIT": ""}, STORE, LOAD),
    ({"FENCE": ""}, USE, STORE),
    ({"SYNC": ""}, USE, STORE),
    ({"FINAL": "wait_read<0>()"}, STORE, AFTER),
]


@pytest.mark.parametrize(("changes", "first", "second"), PLANTED)
def test_planted_races(changes, first, second):
    source = ring(**changes)
    with pytest.raises(sim.RaceError) as caught:
        run(source)
    at = [cuda.line_of(HEAD + source, mark) for mark in (first, second)]
    races = [re.sub(r" \(inlined at [^)]*\)", "", race) for race in caught.value.races]
    assert at in [[int(n) for n in re.findall(r"k\.cu:(\d+)", race)] for race in races]


def test_the_groups_that_were_waited_for_are_known():
    """out[0] was stored by the first of four groups."""
    late = "if (t == 0) wait_read<0>();"
    for groups, races in ((0, False), (3, False), (4, True)):
        source = ring(FINAL=f"wait_group<{groups}>()").replace("// AFTER", f"// AFTER\n{late}")

        if races:
            with pytest.raises(sim.RaceError, match="asynchronous copy"):
                run(source)
        else:
            x, out = run(source)
            assert np.array_equal(out, 3 * x)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_block_must_not_end_before_its_copies_have_read(delivery):
    source = ring(FINAL="wait_read<0>()")
    source = source.replace("(void)*(volatile u32*)out;", "")
    x, out = run(source, delivery)
    assert np.array_equal(out, 3 * x)
    with pytest.raises(sim.RaceError, match="asynchronous read .* not waited for before"):
        run(source.replace("if (t == 0) { wait_read<0>();", "if (t == 0) {"), delivery)


# What was written in shared memory is stored, and what was written in global memory is loaded.
SPACES = r"""
__device__ void fence_of_all() { proxy_fence(); }
__device__ void fence_of_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
__device__ void fence_of_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
extern "C" __global__ void k(u32* out, u32* data) {
    __shared__ __align__(16) u32 buffer[64];
    __shared__ u64 bar;
    int t = threadIdx.x;
    if (t == 0) init(&bar, 1);
    WRITE; // USE
    FENCE;
    __syncthreads();
    if (t == 0) { COPY; }
    if (t == 0) wait_group<0>();
}
"""
BULK_STORE = {"WRITE": "buffer[t] = t + 1", "COPY": "store(out, buffer, 256); commit()"}
BULK_LOAD = {
    "WRITE": "data[t] = t + 1",
    "COPY": "expect(&bar, 256); load(buffer, data, 256, &bar); wait(&bar, 0); out[7] = buffer[7]",
}


@pytest.mark.parametrize("fence", ["all", "shared", "global"])
@pytest.mark.parametrize(
    ("program", "needs", "copy"), [(BULK_STORE, "shared", STORE), (BULK_LOAD, "global", LOAD)]
)
def test_a_proxy_fence_of_a_space_is_for_what_was_written_there(program, needs, copy, fence):
    source = SPACES.replace("FENCE", f"fence_of_{fence}()")
    for name, text in program.items():
        source = source.replace(name, text)
    x = np.zeros(64, np.uint32)
    if fence in ("all", needs):
        out, _ = launch(source, 1, 64, x, x, checks=BOTH)
        assert out[7] == 8
        return
    with pytest.raises(sim.RaceError, match="fence.proxy.async missing between them") as caught:
        launch(source, 1, 64, x, x, checks=BOTH)
    (race,) = caught.value.races
    at = [cuda.line_of(HEAD + source, mark) for mark in (USE, copy)]
    race = re.sub(r" \(inlined at [^)]*\)", "", race)
    assert [int(n) for n in re.findall(r"k\.cu:(\d+)", race)] == at


REDUCE = r"""
extern "C" __global__ void k(u32* sum, const u32* in) {
    __shared__ __align__(16) u32 buffer[64];
    buffer[threadIdx.x] = in[threadIdx.x];
    proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%0], [%1], 256;"
                     :: "l"(sum), "r"(shared_address(buffer)) : "memory");
        commit();
        wait_group<0>();
        EXTRA;
    }
}
"""


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_reductions_do_not_race_with_each_other(delivery):
    x = np.arange(64, dtype=np.uint32)
    source = REDUCE.replace("EXTRA;", "")
    total, _ = launch(source, 5, 64, 0 * x, x, checks=BOTH, delivery=delivery)
    assert np.array_equal(total, 5 * x)


def test_reductions_race_with_stores():
    x = np.arange(64, dtype=np.uint32)
    with pytest.raises(sim.RaceError, match="asynchronous"):
        launch(REDUCE.replace("EXTRA", "sum[3] = 7"), 5, 64, 0 * x, x, checks=BOTH)
    with pytest.raises(sim.RaceError, match="asynchronous"):
        launch(REDUCE.replace("EXTRA", "store(sum, buffer, 256)"), 5, 64, 0 * x, x, checks=BOTH)


FLAG = r"""
extern "C" __global__ void k(const u32* in, u32* out) {
    __shared__ __align__(16) u32 buffer[64];
    __shared__ u64 bar[2];
    int t = threadIdx.x;
    if (t == 0) { init(bar, 1); init(bar + 1, 1); }
    __syncthreads();
    if (t == 0) {
        expect(bar, 128); load(buffer, in, 128, bar);
        expect(bar + 1, 128); load(buffer + 32, in + 32, 128, bar + 1);
    }
    wait(bar + WHICH, 0);
    out[t] = buffer[t];
    wait(bar + 1 - WHICH, 0);
}
"""


@pytest.mark.parametrize("which", [0, 1])
def test_a_barrier_tells_of_its_own_copies_only(which):
    x = np.arange(64, dtype=np.uint32)
    with pytest.raises(sim.RaceError, match="asynchronous copy"):
        launch(FLAG.replace("WHICH", str(which)), 1, 64, x, 0 * x, checks=BOTH)
    half = FLAG.replace("WHICH", str(which)).replace(
        "buffer[t];", f"buffer[t % 32 + {32 * which}];"
    )
    _, out = launch(half, 1, 64, x, 0 * x, checks=BOTH)
    assert np.array_equal(out, np.tile(x[32 * which : 32 * which + 32], 2))


def test_the_source_of_a_load_must_not_change():
    source = FLAG.replace("WHICH", "0").replace("buffer[t];", "1; if (t < N) ((u32*)in)[t] = 5;")
    x = np.arange(64, dtype=np.uint32)
    launch(source.replace("N", "32"), 1, 64, x, 0 * x, checks=BOTH)
    with pytest.raises(sim.RaceError, match="asynchronous read"):
        launch(source.replace("N", "33"), 1, 64, x, 0 * x, checks=BOTH)
