"""Locks, queues, grid barriers, tables and graphs: what they come to in any order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cumla import sim
from sim import cuda
from sim.kernel_files import SIZES, Empty, module, run

SEEDS = (0, 1)
targets = pytest.mark.parametrize("target", cuda.TARGETS)
seeds = pytest.mark.parametrize("seed", SEEDS)


def zeros(n: int = 1, dtype: Any = np.int32) -> Any:
    return np.zeros(n, dtype)


@targets
@seeds
def test_locks(target: str, seed: int) -> None:
    loaded = module("sync", target)
    data, mutex = run(loaded, "lock_by_block", 5, 64, zeros(64), zeros(), 2, seed=seed)
    assert (data == (3**10 - 1) // 2).all()
    assert mutex[0] == 0
    for name in ("lock_by_thread", "lock_acquire"):
        for grid, block in ((1, 1), (2, 21)):
            n = grid * block
            data, mutex = run(loaded, name, grid, block, zeros(2), zeros(), seed=seed)
            assert data.tolist() == [n, n * (n - 1) // 2]
            assert mutex[0] == 0
    data = run(loaded, "lock_ticket", 7, 32, zeros(), zeros(), zeros(), seed=seed)[0]
    expected = 0
    for ticket in range(7):
        expected = expected * 5 + ticket
    assert data[0] == expected


@targets
@seeds
def test_locks_in_shared_memory(target: str, seed: int) -> None:
    for n in (1, 33, 150):
        x = np.random.default_rng(n).integers(0, 1000, n).astype(np.int32)
        _, out = run(
            module("sync", target), "lock_shared", 1, 96, x, Empty(16, np.int32), n, seed=seed
        )
        assert np.array_equal(out[:8], np.bincount(x & 7, weights=x, minlength=8))
        assert np.array_equal(out[8:], np.bincount(x & 7, minlength=8))


@targets
@seeds
def test_persistent_blocks_take_work(target: str, seed: int) -> None:
    for n in (1, 31):
        costs = np.random.default_rng(n).integers(0, 20, n).astype(np.int32)
        out = run(
            module("sync", target), "work_queue", 4, 64,
            costs, Empty((n, 64), np.uint64), zeros(), zeros(4), n, seed=seed,
        )  # fmt: skip
        x = (np.arange(n)[:, None] * 1000 + np.arange(64)).astype(np.uint64)
        for k in range(costs.max()):
            more = x * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            x = np.where(k < costs[:, None], more, x)
        assert np.array_equal(out[1], x)
        assert out[3].sum() == n


@targets
@seeds
def test_a_queue_that_its_own_tasks_fill(target: str, seed: int) -> None:
    tasks, ready = np.zeros((200, 2), np.int32), zeros(200)
    tasks[0], ready[0] = (0, 100), 1
    out = run(
        module("sync", target), "growing_queue", 3, 64,
        tasks, ready, zeros(), np.ones(1, np.int32), np.ones(1, np.int32), zeros(), seed=seed,
    )  # fmt: skip
    assert out[5][0] == sum(i * i for i in range(100))
    assert out[2][0] == out[3][0]
    assert out[4][0] == 0


@targets
@seeds
def test_grid_barriers(target: str, seed: int) -> None:
    loaded = module("sync", target)
    for grid, n, rounds in ((1, 31, 3), (5, 1000, 4)):
        x = np.random.default_rng(n).integers(-99, 99, n).astype(np.float32)
        args = (x, Empty(n), zeros(1, np.uint32), zeros(1, np.uint32), n, rounds)
        out = run(loaded, "jacobi", grid, 64, *args, seed=seed)
        expected = x
        for _ in range(rounds):
            wide = np.pad(expected, 1)
            expected = (wide[:-2] + wide[2:]) / 2
        assert np.array_equal(out[rounds % 2], expected)  # halves: exact
        assert out[3][0] == rounds
    for n in (1, 33, 200):
        x = np.random.default_rng(n).integers(-99, 99, n).astype(np.int32)
        args = (x, Empty(n, np.int32), zeros(1, np.uint32), n)
        out = run(loaded, "prefix_by_doubling", -(-n // 32), 32, *args, seed=seed)
        assert np.array_equal(out[(n - 1).bit_length() % 2], x.cumsum())


@targets
@seeds
def test_a_chain_of_blocks(target: str, seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, 100, (6, 64)).astype(np.int32)
    args = (x, Empty(x.shape, np.int32), zeros(6, np.uint32), Empty(6, np.int32))
    out = run(module("sync", target), "chain", 6, 64, *args, seed=seed)[1]
    carry = 1
    for got, row in zip(out, x, strict=True):
        assert np.array_equal(got, row * carry)
        carry = 3 * carry + int((row & 1).sum())


@targets
@seeds
def test_hash_table(target: str, seed: int) -> None:
    loaded = module("sync", target)
    for n, size in ((1, 1), (33, 64), (500, 512)):
        random = np.random.default_rng(n + seed)
        keys = random.integers(0, 2 * n, n).astype(np.uint32)
        values = random.integers(0, 1000, n).astype(np.uint32)
        empty = np.full(size, 2**64 - 1, np.uint64)
        args = (empty, size - 1, keys, values, zeros(), n)
        slots, _, _, full = run(loaded, "hash_insert", -(-n // 96), 96, *args, seed=seed)
        assert full[0] == 0
        sums = np.bincount(keys, weights=values, minlength=2 * n)
        used = slots[slots != empty[0]]
        assert np.array_equal(np.sort(used >> np.uint64(32)), np.unique(keys))
        assert np.array_equal(sums[used >> np.uint64(32)], used & np.uint64(0xFFFFFFFF))
        if used.size < size:
            ask = np.arange(2 * n, dtype=np.uint32)
            args = (slots, size - 1, ask, Empty(2 * n, np.uint32), 2 * n)
            found = run(loaded, "hash_find", -(-n // 32), 64, *args)[2]
            present = np.isin(ask, keys)
            assert np.array_equal(found[present], sums[present])
            assert (found[~present] == 0xFFFFFFFF).all()


@targets
@seeds
def test_linked_lists(target: str, seed: int) -> None:
    loaded = module("sync", target)
    for n in (1, 33, 200):
        x = np.random.default_rng(n).integers(0, 1000, n).astype(np.int32)
        args = (Empty((n, 2), np.int32), np.full(4, -1, np.int32), x, n)
        nodes, heads, _ = run(loaded, "push", -(-n // 64), 64, *args, seed=seed)
        _, _, sums, lengths = run(
            loaded, "walk", 1, 4, nodes, heads, Empty(4, np.int32), Empty(4, np.int32)
        )
        assert np.array_equal(sums, np.bincount(x & 3, weights=x, minlength=4))
        assert np.array_equal(lengths, np.bincount(x & 3, minlength=4))


def graph(n: int, m: int) -> Any:
    return np.random.default_rng(n).integers(0, n, (m, 2)).astype(np.int32)


@targets
@seeds
def test_breadth_first_search(target: str, seed: int) -> None:
    n = 150
    edges = graph(n, 300)
    edges = edges[np.argsort(edges[:, 0], kind="stable")]
    starts = np.searchsorted(edges[:, 0], np.arange(n + 1)).astype(np.int32)
    levels, frontier = np.full(n, -1, np.int32), np.zeros(1, np.int32)
    levels[0] = 0
    expected = levels.copy()
    level = 0
    while frontier.size:
        reached = np.unique(edges[np.isin(edges[:, 0], frontier), 1])
        reached = reached[expected[reached] < 0]
        expected[reached] = level + 1
        out = run(
            module("sync", target), "bfs", -(-frontier.size // 32), 32,
            starts, np.ascontiguousarray(edges[:, 1]), levels, frontier, frontier.size,
            Empty(n, np.int32), zeros(), level, seed=seed,
        )  # fmt: skip
        levels, frontier = out[2], out[4][: out[5][0]]
        assert np.array_equal(np.sort(frontier), reached)
        level += 1
    assert np.array_equal(levels, expected)
    assert level > 3


@targets
@seeds
def test_components_of_a_graph(target: str, seed: int) -> None:
    n, m = 200, 150
    edges = graph(n, m)
    _, parent = run(
        module("sync", target), "components", -(-m // 64), 64, edges, np.arange(n, dtype=np.int32),
        m, seed=seed,
    )  # fmt: skip
    while not np.array_equal(parent, parent[parent]):
        parent = parent[parent]
    label = np.arange(n)
    for _ in range(n):
        for a, b in edges:
            label[[a, b]] = label[[a, b]].min()
    assert np.array_equal(parent, label)


@targets
def test_few_threads_print(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.linspace(-1, 1, 50, dtype=np.float32)
    run(module("sync", target), "speak", 2, 32, x, 50)
    lines = sorted(capsys.readouterr().out.splitlines())
    assert lines == sorted(
        f"thread {i} of 32: x = {x[i]:g}, {'less' if x[i] < 0 else 'more'}" for i in (5, 25, 45)
    )


@targets
@pytest.mark.parametrize("n", SIZES)
def test_many_ways_out(target: str, n: int) -> None:
    x = np.random.default_rng(n).integers(-3, 100, n).astype(np.int32)
    _, out = run(module("sync", target), "exits", -(-n // 96), 96, x, Empty(n, np.int32), n)
    for start, got in zip(x.tolist(), out.tolist(), strict=True):
        value, steps = start, 0
        while value > 1 and steps <= 40:
            value = 3 * value + 1 if value & 1 else value >> 1
            steps += 1
        ended = steps if value == 1 else -3
        assert got == (-1 if start < 0 else -2 if start == 0 else ended)


@targets
def test_warps_leave_before_barriers(target: str) -> None:
    (out,) = run(module("sync", target), "warps_leave", 3, 128, Empty(3, np.int32), 4)
    assert (out == 32 * 4).all()


POLLING = """
extern "C" __global__ void k(volatile int* flag, int* out, int count) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, polls = 0;
    if (warp == 0) {
        // One lane polls, the others wait for its answer.
        for (;;) {
            int seen = 0;
            if (lane == 0) seen = *flag;
            if (__shfl_sync(~0u, seen, 0)) break;
            polls += count;
        }
        __threadfence();
        __syncwarp();
        out[lane] += 1;
    } else {
        int x = lane;
        for (int i = 0; i < 100; ++i) x = x * 5 + (i & lane);
        if (warp == 1) out[lane] = x;
        __threadfence();
        if (GOOD) asm volatile("bar.sync 1, 32;");
        if (lane == 7 && warp == 1 && GOOD) *flag = 1;
    }
}"""


@targets
@pytest.mark.parametrize("count", [0, 1])
def test_one_lane_polls_for_its_warp(target: str, count: int) -> None:
    """The warp that polls parts and meets over and over, and must let the other one run."""
    loaded = cuda.load(POLLING, "-DGOOD=1", target=target)
    _, out = run(loaded, "k", 1, 64, zeros(), Empty(32, np.int32), count)
    x = np.arange(32, dtype=np.int32)
    for i in range(100):
        x = x * np.int32(5) + (i & np.arange(32, dtype=np.int32))
    assert np.array_equal(out, x + 1)


def test_a_poll_in_vain_is_a_deadlock() -> None:
    loaded = cuda.load(POLLING, "-DGOOD=0")
    with pytest.raises(sim.Deadlock, match=r"memory to change.*\n?.*warp 0"):
        run(loaded, "k", 3, 64, zeros(), Empty(32, np.int32), 0)
