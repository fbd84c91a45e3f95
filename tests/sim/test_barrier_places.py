"""One barrier that warps, or lanes of a warp, reach at different instructions."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from tests.sim.cuda import line_of, load

SOURCE = r"""
#define ASM(text) asm volatile(text ::: "memory")

// Warp 0 produces, warps 1 and 2 consume, each at instructions of its own.
#define PRODUCE_CONSUME(name, full_there, full_here, empty_there, empty_here)      \
extern "C" __global__ void name(int *out) {                                        \
    __shared__ int s[32];                                                          \
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;                          \
    for (int i = 0; i < 4; i++) {                                                  \
        if (warp == 0) {                                                           \
            s[lane] = 100 * i + lane;                                              \
            full_there;                                                            \
            empty_here;                                                            \
        } else if (warp == 1) {                                                    \
            full_here;                                                             \
            out[64 * i + lane] = s[31 - lane];                                     \
            empty_there;                                                           \
        } else {                                                                   \
            full_here;                                                             \
            out[64 * i + 32 + lane] = s[lane ^ 1];                                 \
            empty_there;                                                           \
        }                                                                          \
    }                                                                              \
}
#define NOTHING
PRODUCE_CONSUME(all_sync, ASM("bar.sync 1, 96;"), ASM("bar.sync 1, 96;"),
                ASM("bar.sync 2, 96;"), ASM("bar.sync 2, 96;"))
PRODUCE_CONSUME(same_number, ASM("bar.sync 1, 96;"), ASM("bar.sync 1, 96;"),
                ASM("bar.sync 1, 96;"), ASM("bar.sync 1, 96;"))
PRODUCE_CONSUME(uncounted, ASM("bar.sync 1;"), ASM("barrier.sync 1;"),
                ASM("bar.sync 1;"), ASM("barrier.sync.aligned 1;"))
PRODUCE_CONSUME(arrive_sync, ASM("bar.arrive 1, 96;"), ASM("bar.sync 1, 96;"),
                ASM("bar.arrive 2, 96;"), ASM("bar.sync 2, 96;"))
PRODUCE_CONSUME(unaligned, ASM("barrier.arrive 1, 96;"), ASM("barrier.sync 1, 96;"),
                ASM("barrier.arrive 2, 96;"), ASM("barrier.sync 2, 96;"))
PRODUCE_CONSUME(no_empty, ASM("bar.arrive 1, 96;"), ASM("bar.sync 1, 96;"), NOTHING,
                ASM("bar.sync 3, 32;"))
PRODUCE_CONSUME(no_full, NOTHING, ASM("bar.sync 1, 64;"), ASM("bar.arrive 2, 96;"),
                ASM("bar.sync 2, 96;"))

// Lanes of one warp reach the barrier at different instructions.
#define APART(name, here, there)                                                   \
extern "C" __global__ void name(int *out) {                                        \
    __shared__ int s[64];                                                          \
    int t = threadIdx.x;                                                           \
    if (t % 3 == 0) {                                                              \
        s[t] = t;                                                                  \
        here;                                                                      \
        out[t] = s[63 - t];                                                        \
    } else if (t % 3 == 1) {                                                       \
        s[t] = t + 1000;                                                           \
        there;                                                                     \
        out[t] = s[63 - t];                                                        \
    } else {                                                                       \
        s[t] = t + 2000;                                                           \
        here;                                                                      \
        out[t] = s[63 - t];                                                        \
    }                                                                              \
}
APART(lanes, ASM("barrier.sync 1, 64;"), ASM("barrier.sync 1, 64;"))
APART(lanes_uncounted, ASM("barrier.sync 0;"), ASM("barrier.sync 0;"))
APART(lanes_aligned, ASM("bar.sync 0;"), ASM("bar.sync 0;"))  // undefined
APART(lanes_counts, ASM("barrier.sync 1, 64;"), ASM("barrier.sync 1, 32;"))
APART(lanes_numbers, ASM("barrier.sync 1, 64;"), ASM("barrier.sync 2, 64;"))
APART(lanes_leave, ASM("barrier.sync 1, 64;"), ASM("barrier.arrive 1, 64;"))

extern "C" __global__ void lanes_exit(int *out) {
    int t = threadIdx.x;
    if (t % 4 == 0) { out[t] = 9; return; }
    if (t % 4 == 1) { ASM("barrier.sync 1;"); out[t] = 9; }
    else if (t % 4 == 2) { ASM("barrier.sync 1;"); out[t] = 9; }
    else out[t] = 9;  // ends when the others wait already
}

extern "C" __global__ void lanes_reduce(int *out) {
    int t = threadIdx.x, sum;
    #define RED asm volatile("{ .reg .pred p; setp.lt.s32 p, %1, 41;"                \
                             " barrier.red.popc.u32 %0, 3, p; }" : "=r"(sum) : "r"(t))
    if (t % 2) { RED; out[t] = sum; }
    else { RED; out[t] = sum + 100; }
}
"""


@pytest.fixture(scope="module")
def module():
    return load(SOURCE)


def launch(module, name, threads, size, checks=("memory", "race"), grid=1):
    out = module.device.upload(np.zeros(size, np.int32), name="out")
    module.kernel(name).launch(grid, threads, [out], checks=checks)
    return out.get()


EXPECTED = np.array(
    [
        [[100 * i + 31 - lane for lane in range(32)], [100 * i + (lane ^ 1) for lane in range(32)]]
        for i in range(4)
    ]
).reshape(-1)


@pytest.mark.parametrize("checks", [("memory",), ("memory", "race")])
@pytest.mark.parametrize(
    "name", ["all_sync", "same_number", "uncounted", "arrive_sync", "unaligned"]
)
def test_producers_and_consumers(module, name, checks):
    np.testing.assert_array_equal(launch(module, name, 96, 256, checks), EXPECTED)


@pytest.mark.parametrize("name", ["no_empty", "no_full"])
def test_a_missing_half_is_a_race(module, name):
    # Without "empty" the producer arrives at "full" twice in a phase, so consumers wait for ever.
    with pytest.raises((sim.RaceError, sim.Deadlock), match="shared memory race") as caught:
        launch(module, name, 96, 256)
    assert f"k.cu:{line_of(SOURCE, f'PRODUCE_CONSUME({name}')}" in str(caught.value)


@pytest.mark.parametrize("checks", [("memory",), ("memory", "race")])
@pytest.mark.parametrize("name", ["lanes", "lanes_uncounted"])
def test_lanes_of_a_warp_arrive_apart(module, name, checks):
    t = np.arange(64)
    s = t + 1000 * (t % 3)
    np.testing.assert_array_equal(launch(module, name, 64, 64, checks), s[::-1])


@pytest.mark.parametrize("name", ["lanes_aligned", "lanes_numbers"])
def test_lanes_that_must_not_part_deadlock(module, name):
    with pytest.raises(sim.Deadlock, match="waits for the other lanes of its warp at barrier"):
        launch(module, name, 64, 64)


def test_lanes_with_different_counts(module):
    with pytest.raises(sim.KernelTrap, match="barrier 1 counts (64|32) threads here and (64|32) a"):
        launch(module, "lanes_counts", 64, 64)


def test_lanes_that_only_arrive_race(module):
    """Lanes that arrive wait for their own warp only, so they read what others may still write."""
    with pytest.raises(sim.RaceError, match="shared memory race"):
        launch(module, "lanes_leave", 64, 64)


def test_lanes_that_end_are_not_waited_for(module):
    assert (launch(module, "lanes_exit", 64, 64) == 9).all()


@pytest.mark.parametrize("threads", [64, 50])
def test_lanes_reduce_together(module, threads):
    got = launch(module, "lanes_reduce", threads, threads)
    np.testing.assert_array_equal(got, np.where(np.arange(threads) % 2, 41, 141))
