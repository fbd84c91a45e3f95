"""Programmatic dependent launch: races between grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cumla import sim
from cumla.sim.memory.device import BASE
from cumla.sim.race import RaceDetector
from cumla.sim.race.overlap import Overlap, races_between
from tests.sim import pdl_kit
from tests.sim.cuda import line_of, load
from tests.sim.ops import instruction
from tests.sim.pdl_kit import N, add, buffers_of, stream_of
from tests.sim.waves import cohort, make_wave

SOURCE = (
    pdl_kit.SOURCE
    + r"""
extern "C" __global__ void never_waits(const int *x, int *y) {
    y[I] = x[I];  // reads
}

extern "C" __global__ void overwrites(int *x) { x[I] = 0; WAIT; }  // clears too soon

// Only one thread waits, and tells the others, or does not.
extern "C" __global__ void one_waits(const int *x, int *y, int synchronise) {
    if (threadIdx.x == 0) WAIT;
    if (synchronise) __syncthreads();
    y[I] = x[I];  // after another's wait
}

extern "C" __global__ void pass_on(int *y, int wait) {
    if (wait) WAIT;
    LAUNCH;
    y[I] = 5;
}

extern "C" __global__ void last(const int *x, int *z) {
    WAIT;
    z[I] = x[I];  // the last reads
}

extern "C" __global__ void last_early(const int *x, int *z) {
    z[I] = x[I];  // too soon
    WAIT;
}
"""
)


@pytest.fixture
def module():
    return load(SOURCE)


@pytest.fixture
def buffers(module):
    return buffers_of(module)


def one_race(error):
    """The text of its only race, with file names instead of paths."""
    (race,) = error.races
    return race.replace(f"{Path.cwd()}/", "")


@pytest.mark.parametrize("start", ["early", "ordinary", None])
@pytest.mark.parametrize(
    ("late", "mark", "first"),
    [
        (("forgetful", 0), "reads early", "before the launch"),
        (("forgetful", 1), "reads early", "after the launch"),
        (("overwrites",), "clears too soon", "before the launch"),
        (("never_waits",), "y[I] = x[I];  // reads", "before the launch"),
        (("one_waits", 0), "after another's wait", "before the launch"),
    ],
)
def test_races_between_grids(module, buffers, start, late, mark, first):
    x, y, _ = buffers
    x.set(0)
    name, *rest = late
    arguments = (x,) if name == "overwrites" else (x, y, *rest)
    stream = stream_of(module, start)
    add(stream, module, "produce", x, checks={"memory", "race"})
    add(stream, module, name, *arguments, checks={"memory", "race"})
    with pytest.raises(sim.RaceError, match="kernels produce, ") as caught:
        stream.synchronize()
    race = one_race(caught.value)
    assert f"write by kernel produce at k.cu:{line_of(SOURCE, first)}" in race
    assert f"by kernel {name} at k.cu:{line_of(SOURCE, mark)}" in race
    assert "'x' of" in race
    assert "griddepcontrol.wait" in race


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("waits", [False, True])
def test_the_asynchronous_proxy_races_between_grids(kind, waits):
    """As the instructions that copy in bulk tell the detector; a copy is its issuer's."""
    wave = make_wave((32, 1, 1))
    array = wave.device.memory.upload(np.zeros(64, np.int32), name="x")
    at = array.address - BASE + 16 * np.arange(16)
    ins = instruction("st.global.u32"), instruction("cp.async.bulk.global")
    first, second = Overlap("first", True), Overlap("second", False)
    for overlap in (first, second):
        detector = RaceDetector(wave)
        detector.overlap = overlap
        overlap.next_wave(32)
        lanes = cohort(wave)
        if overlap is first:
            other = "write" if kind == "read" else "read"
            detector.access(ins[0], lanes, "global", at[0] + 4 * np.arange(32), 4, other)
        else:
            if waits:
                detector.grid_waited(ins[1], lanes)
            issuer, rows = np.array([3]), np.zeros(16, np.int64)
            detector.asynchronous(ins[1], issuer, issuer, "global", kind, at, rows, 16)
    found = races_between(wave.device.memory, [first, second], [True, False])
    if waits:
        assert found == ()
    else:
        (race,) = found
        assert "0 bytes into 'x'" in race
        assert f"{kind} by kernel second" in race
        assert "(8 such conflicts)" in race


def test_a_barrier_passes_the_wait_on(module, buffers):
    x, y, _ = buffers
    with stream_of(module) as stream:
        add(stream, module, "produce", x, checks={"memory", "race"})
        add(stream, module, "one_waits", x, y, 1, checks={"memory", "race"}, wave_blocks=2)
    np.testing.assert_array_equal(y.get(), np.arange(N) + 1)


def test_completion_is_not_transitive_without_a_wait(module, buffers):
    x, y, own = buffers
    x.set(0)

    def run(wait, final, checks):
        stream = stream_of(module)
        add(stream, module, "produce", x, checks=checks)
        add(stream, module, "pass_on", y, wait, checks=checks)
        add(stream, module, final, x, own, checks=checks)
        stream.synchronize()

    run(1, "last", {"memory", "race"})
    np.testing.assert_array_equal(own.get(), np.arange(N) + 1)
    # The middle grid has waited before it let the last one start.
    run(1, "last_early", {"memory", "race"})
    np.testing.assert_array_equal(own.get(), np.arange(N) + 1)
    with pytest.raises(sim.RaceError) as caught:
        run(0, "last", {"memory", "race"})
    race = one_race(caught.value)
    assert f"by kernel produce at k.cu:{line_of(SOURCE, 'before the launch')}" in race
    assert f"by kernel last at k.cu:{line_of(SOURCE, 'the last reads')}" in race
    assert "did not wait for produce itself" in race
    x.set(-1)
    run(0, "last", {"memory"})
    assert (own.get() == -1).all()
    np.testing.assert_array_equal(x.get()[:N], np.arange(N) + 1)
