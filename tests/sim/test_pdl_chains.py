"""Chains of grids that may overlap: what each sees of those that are not right before it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cumla import sim
from tests.sim import pdl_kit
from tests.sim.cuda import load
from tests.sim.pdl_kit import BLOCKS, N, add, stream_of

ARRAYS, MOST = 6, 2  # arrays of N ints; operations between two steps of a kernel
STORE, ADD = 0, 1

SOURCE = (
    pdl_kit.SOURCE
    + r"""
extern "C" __global__ void first(int *x, int when) {
    if (when == 0) LAUNCH;
    x[I] = I + 1;
    if (when == 1) LAUNCH;
}

extern "C" __global__ void middle(const int *x, int *y) { WAIT; LAUNCH; y[I] = 2 * x[I]; }
extern "C" __global__ void hasty(const int *x, int *y) { LAUNCH; WAIT; y[I] = 2 * x[I]; }

// One thread waits, and lets the next grid start if it knows that it did.
extern "C" __global__ void by_hand(const int *x, int *y, int synchronise) {
    if (threadIdx.x == 0) WAIT;
    if (synchronise) __syncthreads();
    if (threadIdx.x == 40) LAUNCH;
    __syncthreads();
    y[I] = 2 * x[I];
}

extern "C" __global__ void early_reader(const int *x, const int *y, int *z) {
    int v = x[I];
    WAIT;
    z[I] = y[I] + v;
}

extern "C" __global__ void fibonacci(const int *x, const int *y, int *z) {
    int v = x[I];
    WAIT;
    LAUNCH;
    z[I] = y[I] + v;
}

extern "C" __global__ void count_then_launch(int *count) { atomicAdd(count, 1); LAUNCH; }
extern "C" __global__ void says_nothing(int *count) { LAUNCH; }
extern "C" __global__ void wait_then_count(int *count) { WAIT; atomicAdd(count, 1); }

// Only one block waits before it lets the next grid start.
extern "C" __global__ void one_block_waits(const int *x, int *y) {
    if (blockIdx.x == 1) WAIT;
    LAUNCH;
    WAIT;
    y[I] = 2 * x[I];
}

// A block of a cluster waits when it has let the next grid start, and tells those that have not.
extern "C" __global__ void cluster_waits(const int *x, int *y) {
    if (blockIdx.x == 0) { LAUNCH; WAIT; }
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
    LAUNCH;
    y[I] = 2 * x[I];
}

// Both may count in the same place, with atomics, and write something else besides.
extern "C" __global__ void counting_first(int *x, int *count) {
    x[I] = I + 1;
    if (count) atomicAdd(count, 1);
    LAUNCH;
}
extern "C" __global__ void counting_middle(const int *x, int *y, int *count) {
    y[I] = 5;
    if (count) atomicAdd(count, 1);
    WAIT;
    LAUNCH;
    y[I] += x[I];
}

// ops: [section][MOST] of {destination or -1, STORE or ADD, a, b}; steps come between sections.
#define SECTION(s)                                                            \
    for (int i = 0; i < MOST; i++) {                                          \
        const int *op = ops + 4 * (MOST * (s) + i);                           \
        if (op[0] < 0) continue;                                              \
        int v = 3 * memory[op[2] * N + I] + memory[op[3] * N + I] + (s) + who; \
        if (op[1] == ADD) atomicAdd(&memory[op[0] * N + I], v);               \
        else memory[op[0] * N + I] = v;                                       \
    }
#define STEP(s) \
    if (wait == s) WAIT; \
    if (launch == s) LAUNCH;
extern "C" __global__ void random_ops(
    int *memory, const int *ops, int wait, int launch, int who) {
    SECTION(0)
    if (who % 2 && wait == launch) LAUNCH;  // before the wait
    STEP(0)
    SECTION(1)
    STEP(1)
    SECTION(2)
}
""".replace("MOST", str(MOST)).replace("ADD)", f"{ADD})")
)


@pytest.fixture
def module():
    return load(SOURCE)


@pytest.fixture
def buffers(module):
    """Three arrays of N ints, none of them written."""
    return [module.device.alloc(N, np.int32, name=name) for name in "xyz"]


def run(module, kernels, start="early", waves=(None,), **options):
    """Run (name, arguments...) each, dependent on the one before, with so many blocks in a wave."""
    with stream_of(module, start) as stream:
        for (name, *args), blocks in zip(kernels, itertools.cycle(waves)):
            add(stream, module, name, *args, wave_blocks=blocks, **options)


@pytest.mark.parametrize("start", ["early", "ordinary"])
@pytest.mark.parametrize("when", [0, 1, 2])
@pytest.mark.parametrize("wave_blocks", [None, 1, 2])
@pytest.mark.parametrize("written", [False, True])
def test_what_the_grid_before_waited_for_is_seen_before_the_wait(
    module, buffers, start, when, wave_blocks, written
):
    x, y, z = buffers
    for array in buffers if written else ():
        array.set(-1)
    chain = [("first", x, when), ("middle", x, y), ("early_reader", x, y, z)]
    run(module, chain, start, [wave_blocks], checks={"memory", "race"})
    np.testing.assert_array_equal(z.get(), 3 * np.arange(1, N + 1))


@pytest.mark.parametrize("checks", [set(), {"memory"}])
@pytest.mark.parametrize("wave_blocks", [None, 1, 2])
def test_along_a_longer_chain(module, checks, wave_blocks):
    """Each reads before its wait what the grid two before it wrote."""
    sums = [module.device.upload(np.full(N, -1, np.int32), name=f"a{i}") for i in range(8)]
    chain = [("first", sums[0], 1), ("middle", *sums[:2])]
    chain += [("fibonacci", *sums[k : k + 3]) for k in range(6)]
    run(module, chain, waves=[wave_blocks], checks=checks)
    for k, factor in enumerate([1, 2, 3, 5, 8, 13, 21, 34]):
        np.testing.assert_array_equal(sums[k].get(), factor * np.arange(1, N + 1))


@pytest.mark.parametrize("wave_blocks", [None, 1, 2])
def test_a_missing_wait_in_the_middle_shows_old_values(module, buffers, wave_blocks):
    """The middle grid lets the last start before it waits: that one may run beside the first."""
    x, y, z = buffers
    for array in buffers:
        array.set(-1)
    chain = [("first", x, 1), ("hasty", x, y), ("early_reader", x, y, z)]
    waves = None, wave_blocks, None
    run(module, chain, waves=waves)
    np.testing.assert_array_equal(z.get(), 2 * np.arange(1, N + 1) - 1)
    with pytest.raises(sim.RaceError, match="write by kernel first .* read by kernel early_reader"):
        run(module, chain, waves=waves, checks={"memory", "race"})


@pytest.mark.parametrize("communicates", [False, True])
def test_what_the_middle_writes_stays_hidden(module, buffers, communicates):
    """Before it waits and after, whatever the grid before it wrote in between."""
    x, y, z = buffers
    count = module.device.upload(np.zeros(1, np.int32), name="count") if communicates else 0
    for array in buffers:
        array.set(-1)
    chain = [("counting_first", x, count), ("counting_middle", x, y, count)]
    run(module, [*chain, ("early_reader", y, x, z)])
    i = np.arange(1, N + 1)
    np.testing.assert_array_equal(y.get(), 5 + i)
    np.testing.assert_array_equal(z.get(), i - 1)
    if communicates:
        assert count.get()[0] == 2 * N


def test_what_the_first_wrote_is_seen_though_the_middle_communicates(module, buffers):
    """An atomic access shows the middle grid what the first wrote; the last sees it, too."""
    x, y, z = buffers
    count = module.device.upload(np.zeros(1, np.int32), name="count")
    x.set(-1)
    chain = [("counting_first", x, count), ("counting_middle", x, y, count)]
    run(module, [*chain, ("early_reader", x, y, z)])
    np.testing.assert_array_equal(z.get(), 2 * np.arange(1, N + 1) + 5)
    run(module, [*chain, ("early_reader", x, y, z)], checks={"memory", "race"})


@pytest.mark.parametrize("synchronise", [0, 1])
def test_a_barrier_passes_the_wait_on_to_who_launches(module, buffers, synchronise):
    x, y, z = buffers
    chain = [("first", x, 0), ("by_hand", x, y, synchronise), ("early_reader", x, y, z)]
    if not synchronise:
        with pytest.raises(sim.RaceError, match="by kernel first .* by kernel early_reader"):
            run(module, chain, "ordinary", checks={"memory", "race"})
        return
    for start in ("early", "ordinary"):
        run(module, chain, start, checks={"memory", "race"})
        np.testing.assert_array_equal(z.get(), 3 * np.arange(1, N + 1))


@pytest.mark.parametrize("start", ["early", "ordinary"])
@pytest.mark.parametrize("name", ["one_block_waits", "cluster_waits"])
def test_a_wait_of_one_block_is_enough(module, buffers, name, start):
    x, y, z = buffers
    with stream_of(module, start) as stream:
        options = {"checks": {"memory", "race"}}
        add(stream, module, "first", x, 0, **options)
        add(stream, module, name, x, y, cluster=BLOCKS, **options)
        add(stream, module, "early_reader", x, y, z, **options)
    np.testing.assert_array_equal(z.get(), 3 * np.arange(1, N + 1))


def test_atomics_count_beside_a_grid_that_is_hidden(module):
    """The middle grid ends within the first; the last adds to what it does not see."""
    count = module.device.upload(np.zeros(1, np.int32), name="count")
    run(
        module, [(name, count) for name in ("count_then_launch", "says_nothing", "wait_then_count")]
    )
    assert count.get()[0] == 2 * N


def random_chain(rng, grids):
    """For each grid its operations [3, MOST, 4], and after which section it waits and launches.

    After the last it does neither.
    """
    chain = []
    for _ in range(grids):
        ops = np.full((3, MOST, 4), -1, np.int32)
        for section, number in itertools.product(range(3), range(MOST)):
            if rng.random() < (0.35, 0.5, 0.5)[section]:
                kind = ADD if rng.random() < 0.25 else STORE
                ops[section, number] = (rng.integers(ARRAYS), kind, *rng.integers(ARRAYS, size=2))
        wait = 0 if rng.random() < 0.8 else int(rng.integers(3))
        chain.append((ops, wait, int(rng.integers(3))))
    return chain


def outcome(module, chain, start, checks, waves):
    memory = module.device.upload(np.arange(ARRAYS * N, dtype=np.int32), name="memory")
    kernels = [
        ("random_ops", memory, module.device.upload(ops), *steps, who)
        for who, (ops, *steps) in enumerate(chain)
    ]
    run(module, kernels, start, waves, checks=checks)
    return memory.get()


def test_without_races_an_early_start_changes_nothing(module):
    """Random chains: what the race detector finds nothing in computes the same in either order."""
    rng = np.random.default_rng(11)
    legal = unlike = 0
    for _ in range(120):
        chain = random_chain(rng, int(rng.integers(2, 6)))
        waves = rng.choice([BLOCKS, BLOCKS, 1, 2], 5).tolist()
        early = outcome(module, chain, "early", {"memory"}, waves)
        try:
            ordinary = outcome(module, chain, "ordinary", {"memory", "race"}, waves)
        except sim.RaceError:
            ordinary = outcome(module, chain, "ordinary", {"memory"}, waves)
            unlike += bool((early != ordinary).any())
            continue
        legal += 1
        np.testing.assert_array_equal(early, ordinary, err_msg=str((chain, waves)))
    assert legal > 40
    assert unlike > 20
