"""Clusters of blocks: names, addresses, distributed shared memory, barriers, from CUDA C."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cumla import sim
from sim import cuda
from sim.kernel_files import DELIVERIES, FOLDER, Empty, module, run
from sim.waves import Bound, cohort, make_wave

SOURCE = (FOLDER / "clusters.cu").read_text()


def launch(kernel: str, grid: Any, block: Any, *args: Any, options: Any = (), **how: Any) -> Any:
    return run(module("clusters", "sm_90a", "-DHOW=0", *options), kernel, grid, block, *args, **how)


@pytest.mark.parametrize(
    ("grid", "cluster"),
    [
        ((4, 2, 2), (2, 1, 1)),
        ((4, 6, 2), (2, 3, 1)),
        ((2, 2, 2), (1, 1, 2)),
        ((4, 4, 2), (2, 2, 2)),
        ((16, 1, 1), 16),
        ((3, 2, 2), None),
        ((3, 2, 2), 1),
    ],
)
def test_names_and_addresses(grid: Any, cluster: Any) -> None:
    (out,) = launch("names", grid, 32, Empty((*grid[::-1], 32), np.uint32), cluster=cluster,
                    shared_bytes=64, checks={"race"})  # fmt: skip
    dims = np.array([cluster, 1, 1] if isinstance(cluster, int) else cluster or (1, 1, 1))
    size = int(dims.prod())
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                at = np.array([x, y, z])
                inside = at % dims
                rank = int(inside[0] + dims[0] * (inside[1] + dims[1] * inside[2]))
                got = out[z, y, x]
                assert got[:2].tolist() == [rank, size]
                assert got[2:5].tolist() == inside.tolist()
                assert got[5:8].tolist() == dims.tolist()
                assert got[8:11].tolist() == (at // dims).tolist()
                assert got[11:14].tolist() == (np.array(grid) // dims).tolist()
                assert got[14] == (cluster is not None)
                # The system has the first KiB; a block's rank is in its own addresses, too.
                assert got[15] == rank << 24 | 0x400
                assert got[16] == rank << 24 | 0x410
                assert got[17] == (size - 1) << 24 | 0x400
                assert int(got[18]) == (size - 1 - rank) << 24
                assert got[19] == got[23] == size - 1
                assert got[20:23].tolist() == [1, rank == size - 1, 1]


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("how", [0, 1, 2])
@pytest.mark.parametrize(("blocks", "cluster"), [(6, 2), (8, 4), (8, 8)])
def test_blocks_read_each_other(how: int, blocks: int, cluster: int, delivery: str) -> None:
    x = np.random.default_rng(0).integers(0, 1000, (blocks, 64)).astype(np.uint32)
    loaded = module("clusters", "sm_90a", f"-DHOW={how}")
    _, out = run(loaded, "sums", blocks, 64, x, Empty(x.shape, np.uint32), cluster=cluster,
                 delivery=delivery, wave_blocks=cluster)  # fmt: skip
    expected = np.zeros_like(x)
    for block in range(blocks):
        for rank in range(cluster):
            expected[block] += np.roll(x[block // cluster * cluster + rank], -rank)
    assert np.array_equal(out, expected)


def test_atomics_and_stores() -> None:
    (out,) = launch("atomics", 8, 96, Empty((8, 2), np.uint32), cluster=4)
    assert out[:, 0].tolist() == [4 * 96, 0, 0, 0] * 2
    assert out[:, 1].tolist() == [103, 100, 101, 102] * 2


def test_without_the_first_barrier() -> None:
    x = np.zeros((4, 64), np.uint32)
    with pytest.raises(sim.RaceError, match=r"barrier\.cluster, or an mbarrier") as caught:
        launch("sums", 4, 64, x, Empty(x.shape, np.uint32), cluster=2, options=("-DNO_BARRIER",),
               checks={"race"})  # fmt: skip
    assert f"k.cu:{cuda.line_of(SOURCE, '// LOAD')} (inlined at " in str(caught.value)


def test_without_the_last_barrier() -> None:
    x = np.zeros((4, 64), np.uint32)
    options = ("-DNO_LAST_BARRIER",)
    with pytest.raises(
        sim.RaceError, match=r"then the exit of block .*the block may be gone"
    ) as caught:
        launch("sums", 4, 64, x, Empty(x.shape, np.uint32), cluster=2, options=options)
    line = cuda.line_of(SOURCE, "// LOAD")
    assert f"k.cu:{line} (inlined at " in str(caught.value)


@pytest.mark.parametrize("fence", [1, 2])
def test_a_relaxed_arrival_tells_what_fences_cover(fence: int) -> None:
    (out,) = launch("relaxed", 4, 32, Empty((4, 32), np.uint32), cluster=2,
                    options=(f"-DFENCE={fence}",))  # fmt: skip
    lanes = np.arange(32)
    assert np.array_equal(out[0], lanes if fence == 1 else lanes + 100)


def test_a_relaxed_arrival_without_a_fence_orders_nothing() -> None:
    with pytest.raises(
        sim.RaceError, match=r"shared memory race .* of block \([01], 0, 0\): write"
    ):
        launch("relaxed", 2, 32, Empty((2, 32), np.uint32), cluster=2)


def test_blocks_return_between_arrival_and_wait() -> None:
    (out,) = launch("returns", 4, 32, Empty((4, 32), np.uint32), cluster=2, checks={"race"})
    assert np.array_equal(out[::2], np.tile(np.arange(32), (2, 1)))


def test_memory_of_a_block_that_may_have_exited() -> None:
    with pytest.raises(sim.RaceError, match="the block may be gone before"):
        launch("returns", 4, 32, Empty((4, 32), np.uint32), cluster=2, options=("-DLATE",))
    wave = make_wave((32, 1, 1), (2, 1, 1), shared=64, cluster=(2, 1, 1))
    first = cohort(wave, range(32))
    Bound("st.shared::cluster.u32", "[%r1]", "%r2", check_memory=True)(first, 1 << 24, 7)
    wave.exit(np.arange(32, 64))
    with pytest.raises(sim.MemoryFault, match="block of rank 1, which has exited"):
        Bound("ld.shared::cluster.u32", "%r1", "[%r2]", check_memory=True)(first, 1 << 24)


@pytest.mark.parametrize(
    ("bug", "error", "message"),
    [
        (1, sim.MemoryFault, r"the block's of rank [01] in the cluster, not the thread's own"),
        (2, sim.MemoryFault, r"rank 2 of a cluster of 2 blocks"),
        (3, sim.MemoryFault, r"0 bytes past the end of the block's 128 bytes of shared memory"),
        (4, sim.MemoryFault, r"rank 2 of a cluster of 2 blocks"),
        (5, sim.KernelTrap, r"arrives again without barrier.cluster.wait"),
        (6, sim.KernelTrap, r"waits without barrier.cluster.arrive"),
        (7, sim.Deadlock, r"the cluster barrier: 32 of 64 threads of the cluster have arrived"),
        (8, sim.MemoryFault, r"1024 bytes before the start of the block's 128 bytes"),
        (9, sim.MemoryFault, r"rank 255 of a cluster of 2 blocks"),
        (10, sim.MemoryFault, r"the block's of rank [01] in the cluster, not the thread's own"),
        (11, sim.Deadlock, r"lanes 0x\w+ of its warp at barrier.cluster.wait"),
    ],
)
def test_what_must_not_be(bug: int, error: type[sim.SimError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        launch("wrong", 2, 32, Empty(32, np.uint32), cluster=2, options=(f"-DBUG={bug}",),
               checks={"memory"})  # fmt: skip
    assert "kernel wrong" in str(caught.value)
    assert "k.cu:" in str(caught.value)


@pytest.mark.parametrize(
    ("grid", "cluster", "target", "message"),
    [
        (4, 3, "sm_90a", r"cluster: got \(3, 1, 1\); the grid \(4, 1, 1\) must be multiples"),
        (32, 32, "sm_90a", r"cluster: got \(32, 1, 1\), 32 blocks; at most 16 are allowed"),
        (4, 2, "sm_89", r"cluster: got \(2, 1, 1\); sm_89 has no clusters"),
        (4, 0, "sm_90a", r"cluster: got 0; one to three positive integers"),
    ],
)
def test_launches_that_cannot_be(grid: int, cluster: Any, target: str, message: str) -> None:
    loaded = cuda.load('extern "C" __global__ void k() {}', target=target)
    with pytest.raises(sim.LaunchError, match=message):
        loaded.kernel("k").launch(grid, 32, cluster=cluster)


def test_directives() -> None:
    source = 'extern "C" __global__ void __cluster_dims__(2, 1, 1) k(unsigned* out) {\n'
    source += '  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(out[blockIdx.x])); }'
    loaded = cuda.load(source)
    (out,) = run(loaded, "k", 4, 1, Empty(4, np.uint32))
    assert out.tolist() == [2] * 4
    with pytest.raises(sim.LaunchError, match=r"\.reqnctapercluster of k is \(2, 1, 1\)"):
        loaded.kernel("k").launch(4, 1, [0], cluster=4)
    most = cuda.ptx(source.replace("__cluster_dims__(2, 1, 1)", ""), "sm_90a")
    most = most.replace(")\n{", ")\n.maxclusterrank 2\n{")
    with pytest.raises(sim.LaunchError, match="4 blocks; at most 2 are allowed"):
        sim.load(most).kernel("k").launch(4, 1, [0], cluster=4)


def test_the_systems_part_of_shared_memory_is_not_the_programs() -> None:
    wave = make_wave((32, 1, 1), shared=64, shared_start=0x400)
    lanes = cohort(wave, [0])
    store = Bound("st.shared.u32", "[%r1]", "%r2", check_memory=True)
    store(lanes, 0x400, 1)
    store(lanes, 0x43C, 1)
    for address in (0x3FC, 0x440):
        with pytest.raises(sim.MemoryFault, match="out of bounds: write of 4 bytes"):
            store(lanes, address, 1)
