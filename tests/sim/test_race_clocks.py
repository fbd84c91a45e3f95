"""Clocks of many lanes at once, against lanes one by one."""

from __future__ import annotations

import numpy as np
import pytest

from cumla.sim.race.clock import Clock, Part, merged
from cumla.sim.race.clocks import Clocks, Rows
from cumla.sim.race.lanes import Threads
from cumla.sim.race.layout import COPY_AGENTS, Layout

LANES, BLOCKS = 32, 3


def empty() -> Clocks:
    threads = Threads(Layout(BLOCKS, LANES), np.arange(BLOCKS))
    return Clocks(threads, Rows(LANES))


def random_clock(rng: np.random.Generator) -> Clock:
    blocks = np.flatnonzero(rng.random(BLOCKS) < 0.6).tolist() or [1]
    rows = rng.integers(0, 40, (len(blocks), LANES + COPY_AGENTS)).astype(np.int32)
    return Clock({b: Part(row, LANES) for b, row in zip(blocks, rows, strict=True)}, LANES)


def all_known(clocks: Clocks) -> list[bool]:
    """Whether each lane knows each thread up to each stamp."""
    threads = clocks.threads
    everyone = threads.thread.tolist()
    everyone += [
        block << threads.layout.local_bits | LANES + k
        for block in range(BLOCKS)
        for k in range(COPY_AGENTS)
    ]
    gids, others, stamps = np.meshgrid(
        np.arange(BLOCKS * LANES), np.array(everyone), np.arange(1, 41, 3), indexing="ij"
    )
    known = clocks.known(gids.reshape(-1), others.reshape(-1), stamps.reshape(-1))
    return [bool(k) for k in known]


@pytest.mark.parametrize("seed", range(4))
def test_lanes_absorb_a_clock_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    together, apart = empty(), empty()
    for _ in range(5):
        clock = random_clock(rng)
        block = int(rng.integers(BLOCKS))
        gids = block * LANES + np.flatnonzero(rng.random(LANES) < 0.5)
        if gids.shape[0]:
            together.absorb_all(gids, clock)
            for gid in gids.tolist():
                apart.absorb(gid, clock)
    known = all_known(together)
    assert known == all_known(apart)
    assert 0.05 < np.mean(known) < 0.95


def test_lanes_that_know_the_same_go_on_to_share_it() -> None:
    rng = np.random.default_rng(1)
    clocks, gids = empty(), np.arange(LANES)
    for clock in (random_clock(rng), random_clock(rng)):
        clocks.absorb_all(gids, clock)
        assert clocks.abroad is not None
        assert np.unique(clocks.row[gids]).shape == (1,)
        assert np.unique(clocks.abroad.names[gids]).shape == (1,)


def test_what_proxy_fences_covered_does_not_nest() -> None:
    rng = np.random.default_rng(2)
    first, second, third = (random_clock(rng) for _ in range(3))
    covered = Clock(second.parts, LANES, (third, None, None))
    clock = Clock(first.parts, LANES, (None, covered, None))
    assert clock.proxy is not None
    none, covered_again, none_either = clock.proxy
    assert covered_again is not None
    assert covered_again.parts is second.parts
    assert covered_again.proxy is none is none_either is None


def test_what_proxy_fences_covered_is_merged_each_for_itself() -> None:
    rng = np.random.default_rng(3)
    first, second, third, other = (random_clock(rng) for _ in range(4))
    one = Clock(first.parts, LANES, (second, None, None))
    two = Clock(first.parts, LANES, (None, third, None))
    both = merged(one, two)
    assert both is not None
    assert both.proxy == (second, third, None)
    assert merged(both, one) is both  # so that what polls see stays the same
    assert merged(both, Clock(first.parts, LANES)) is both
    more = merged(Clock(other.parts, LANES), one)
    assert more is not None
    assert more.proxy is one.proxy
