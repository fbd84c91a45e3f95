"""Programmatic dependent launch: griddepcontrol and streams."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from tests.sim import pdl_kit
from tests.sim.cuda import line_of, load
from tests.sim.pdl_kit import BLOCKS, THREADS, N, add, buffers_of, stream_of

SOURCE = (
    pdl_kit.SOURCE
    + r"""
extern "C" __global__ void produce_silent(int *x) { x[I] = I + 1; x[N + I] = 2 * I + 1; }

extern "C" __global__ void consume(const int *x, int *y, int *own) {
    own[I] = 7;
    WAIT;
    y[I] = x[I] + x[N + I] + own[I];
}

extern "C" __global__ void log_start(int *log, int *count, int who) {
    if (threadIdx.x == 0) log[atomicAdd(count, 1)] = who + blockIdx.x;
    LAUNCH;
    __syncthreads();
    if (threadIdx.x == 0) log[atomicAdd(count, 1)] = 100 + who + blockIdx.x;
}

extern "C" __global__ void log_wait(int *log, int *count, int who) {
    if (threadIdx.x == 0) log[atomicAdd(count, 1)] = who + blockIdx.x;
    WAIT;
    if (threadIdx.x == 0) log[atomicAdd(count, 1)] = 100 + who + blockIdx.x;
}

// Some blocks end without a word, the others have to see the next grid start.
extern "C" __global__ void some_end(volatile int *flag) {
    if (blockIdx.x % 2) return;
    LAUNCH;
    while (*flag == 0);
}

extern "C" __global__ void flag_waiter(volatile int *flag) { LAUNCH; while (*flag == 0); }
extern "C" __global__ void flag_setter_early(volatile int *flag) { *flag = 1; WAIT; }
extern "C" __global__ void flag_setter_late(volatile int *flag) { WAIT; *flag = 1; }

extern "C" __global__ void faulty(int *x) { WAIT; x[1 << 20] = 1; }  // far away
extern "C" __global__ void faulty_early(int *x) { x[1 << 20] = 1; }  // far away too early

extern "C" __global__ void counts(int *count) { LAUNCH; atomicAdd(count, 1); }
extern "C" __global__ void counts_early(int *count) { atomicAdd(count, 1); WAIT; }
"""
)


@pytest.fixture
def module():
    return load(SOURCE)


@pytest.fixture
def buffers(module):
    return buffers_of(module)


@pytest.mark.parametrize("start", ["early", "ordinary", None])
@pytest.mark.parametrize("checks", [set(), {"memory"}, {"memory", "race"}])
@pytest.mark.parametrize("wave_blocks", [None, 1, 2])
@pytest.mark.parametrize("producer", ["produce", "produce_silent"])
def test_the_wait_gives_all(module, buffers, start, checks, wave_blocks, producer):
    x, y, own = buffers
    options = {"checks": checks, "wave_blocks": wave_blocks}
    with stream_of(module, start) as stream:
        add(stream, module, producer, x, **options)
        add(stream, module, "consume", x, y, own, **options)
    i = np.arange(N)
    np.testing.assert_array_equal(y.get(), i + 1 + 2 * i + 1 + 7)


@pytest.mark.parametrize("at", [0, 1])
def test_what_was_not_waited_for_is_unwritten(module, buffers, at):
    x, y, _ = buffers
    stream = stream_of(module)
    add(stream, module, "produce", x)
    add(stream, module, "forgetful", x, y, at)
    with pytest.raises(sim.MemoryFault, match="read of unwritten memory") as caught:
        stream.synchronize()
    assert caught.value.where.kernel == "forgetful"
    assert caught.value.where.line.endswith(f"k.cu:{line_of(SOURCE, 'reads early')}")
    assert "kernel produce before it has not completed" in str(caught.value)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("checks", [set(), {"memory"}])
def test_what_was_not_waited_for_is_old(module, buffers, at, checks):
    x, y, _ = buffers
    x.set(-1)
    with stream_of(module) as stream:
        add(stream, module, "produce", x, checks=checks)
        add(stream, module, "forgetful", x, y, at, checks=checks)
    assert (y.get() == -1).all()
    np.testing.assert_array_equal(x.get()[:N], np.arange(N) + 1)
    np.testing.assert_array_equal(x.get()[N:], 2 * np.arange(N) + 1)


def test_without_launch_dependents_nothing_is_early(module, buffers):
    x, y, _ = buffers
    with stream_of(module, "early") as stream:
        add(stream, module, "produce_silent", x, checks={"memory", "race"})
        add(stream, module, "forgetful", x, y, 1, checks={"memory", "race"})
    np.testing.assert_array_equal(y.get(), 2 * np.arange(N) + 1)


@pytest.mark.parametrize("programmatic", [False, True])
def test_ordinary_launches_wait(module, buffers, programmatic):
    """The first launch of a stream has nothing to wait for; others wait unless programmatic."""
    x, y, _ = buffers
    with stream_of(module, "early") as stream:
        add(stream, module, "produce", x, programmatic=programmatic)
        add(stream, module, "forgetful", x, y, 1, programmatic=False)
    np.testing.assert_array_equal(y.get(), 2 * np.arange(N) + 1)
    assert (module.kernel("forgetful").launch(BLOCKS, THREADS, [x, y, 0]).kernel) == "forgetful"


def order_of(module, *kernels, start="early", wave_blocks=None):
    log, count = module.device.alloc(64, np.int32), module.device.upload(np.zeros(1, np.int32))
    log.set(0)
    with stream_of(module, start) as stream:
        for name, *rest in kernels:
            add(stream, module, name, log, count, *rest, wave_blocks=wave_blocks, checks=set())
    return log.get()[: int(count.get()[0])].tolist()


def test_the_second_grid_runs_to_its_wait_first(module):
    log = order_of(module, ("log_start", 10), ("log_wait", 20))
    assert sorted(log[:3]) == [10, 11, 12]
    assert sorted(log[3:6]) == [20, 21, 22]
    assert sorted(log[6:9]) == [110, 111, 112]
    assert sorted(log[9:]) == [120, 121, 122]


def test_in_ordinary_order(module):
    log = order_of(module, ("log_start", 10), ("log_wait", 20), start="ordinary")
    assert sorted(log[3:6]) == [110, 111, 112]
    assert sorted(log[6:9]) == [20, 21, 22]


def test_dependents_start_in_the_last_wave(module):
    log = order_of(module, ("log_start", 10), ("log_wait", 20), wave_blocks=2)
    at = {what: i for i, what in enumerate(log)}
    begun = sorted(at[w] for w in (10, 11, 12))
    ended = sorted(at[w] for w in (110, 111, 112))
    early = min(at[w] for w in (20, 21, 22))
    assert ended[1] < begun[2] < early < ended[2]


def test_blocks_that_end_let_dependents_start(module):
    flag = module.device.upload(np.zeros(1, np.int32), name="flag")
    with stream_of(module, "early") as stream:
        add(stream, module, "some_end", flag)
        add(stream, module, "flag_setter_early", flag)
    assert flag.get()[0] == 1


def test_a_chain_starts_as_far_as_it_may(module):
    """The second grid does not wait, so that the third passes its wait before the first ends."""
    log = order_of(module, ("log_start", 10), ("log_start", 20), ("log_wait", 30))
    assert [sorted(log[i : i + 3])[0] for i in range(0, 18, 3)] == [10, 20, 30, 120, 130, 110]


def test_long_chains(module):
    """More grids than Python could nest calls for."""
    kernels = [("log_start", 0)] * 300
    device = module.device
    log, count = device.alloc(4096, np.int32), device.upload(np.zeros(1, np.int32))
    with stream_of(module, "early") as stream:
        for name, who in kernels:
            add(stream, module, name, log, count, who, checks=set())
    assert count.get()[0] == 300 * 2 * BLOCKS


def test_grids_communicate_by_strong_accesses(module):
    flag = module.device.upload(np.zeros(1, np.int32), name="flag")
    for checks in (set(), {"memory", "race"}):
        flag.set(0)
        with stream_of(module, "early") as stream:
            add(stream, module, "flag_waiter", flag, checks=checks)
            add(stream, module, "flag_setter_early", flag, checks=checks)
        assert flag.get()[0] == 1


def test_atomics_of_both_grids_count(module):
    count = module.device.upload(np.zeros(1, np.int32), name="count")
    for number, checks in enumerate((set(), {"memory", "race"})):
        with stream_of(module, "early") as stream:
            add(stream, module, "counts", count, checks=checks)
            add(stream, module, "counts_early", count, checks=checks)
        assert count.get()[0] == 2 * N * (number + 1)


def test_deadlock_names_both(module):
    flag = module.device.upload(np.zeros(1, np.int32), name="flag")
    stream = stream_of(module, "early")
    add(stream, module, "flag_waiter", flag)
    add(stream, module, "flag_setter_late", flag)
    with pytest.raises(sim.Deadlock) as caught:
        stream.synchronize()
    text = str(caught.value)
    assert "kernel flag_waiter: deadlock" in text
    assert "memory to change" in text
    assert "kernel flag_setter_late: deadlock" in text
    assert "waits for the grid before it, kernel flag_waiter, to complete" in text
    line = line_of(SOURCE, "void flag_setter_late")
    assert f"k.cu:{line}: waits for the grid before it" in text


@pytest.mark.parametrize("name", ["faulty", "faulty_early"])
def test_errors_name_the_kernel_and_leave_memory_right(module, buffers, name):
    x, _, own = buffers
    x.set(-1)
    mark = "far away too early" if name == "faulty_early" else "WAIT; x[1 << 20]"
    stream = stream_of(module, "early")
    add(stream, module, "produce", x)
    add(stream, module, name, own)
    add(stream, module, "produce", own)
    with pytest.raises(sim.MemoryFault, match="out of bounds") as caught:
        stream.synchronize()
    assert caught.value.where.kernel == name
    assert caught.value.where.line.endswith(f"k.cu:{line_of(SOURCE, mark)}")
    np.testing.assert_array_equal(x.get()[:N], np.arange(N) + 1)
    assert stream.synchronize() == []


def test_results_in_order(module, buffers):
    x, y, own = buffers
    stream = stream_of(module)
    before = module.device.launches
    add(stream, module, "produce", x, counters=True)
    add(stream, module, "consume", x, y, own)
    launches = stream.synchronize()
    assert [launch.kernel for launch in launches] == ["produce", "consume"]
    assert launches[0].counters is not None
    assert launches[1].counters is None
    assert module.device.launches == before + 2


def test_refused(module, buffers):
    x, _, _ = buffers
    with pytest.raises(sim.LaunchError, match="start: got 'soon'"):
        module.device.stream("soon")
    with pytest.raises(sim.LaunchError, match="another device"):
        sim.Device("sm_90a").stream().launch(module.kernel("produce"), 1, 1, [x])
    stream = stream_of(module)
    with pytest.raises(sim.LaunchError, match="block: got"):
        stream.launch(module.kernel("produce"), 1, 2048, [x])
    assert stream.synchronize() == []
    old = load('extern "C" __global__ void k() {}', target="sm_89")
    with pytest.raises(sim.LaunchError, match="sm_90 and later"):
        old.device.stream().launch(old.kernel("k"), 1, 1, [], programmatic=True)


def test_nothing_runs_before_synchronize_nor_after_an_error(module, buffers):
    x, _, _ = buffers
    x.set(-1)
    stream = stream_of(module)
    add(stream, module, "produce", x)
    assert (x.get() == -1).all()
    with pytest.raises(ZeroDivisionError), stream:
        raise ZeroDivisionError
    assert stream.synchronize() == []
    assert (x.get() == -1).all()
