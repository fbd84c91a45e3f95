"""Clusters of blocks: barrier.cluster, mapa, getctarank.

PTX ISA "barrier.cluster", "mapa" and "getctarank". What the addresses mean is said in
memory/spaces.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import RANK_SHIFT, Cohort
from cumla.sim.errors import KernelTrap
from cumla.sim.isa.convergence import waits_for_lanes, whole_warps
from cumla.sim.isa.table import DTYPES, Env, Op, Unsupported, instruction, needs
from cumla.sim.memory.spaces import CLUSTER, SHARED_WINDOW, WITHIN_BLOCK, in_window
from cumla.sim.ptx.syntax import Instruction

Array = NDArray[Any]


def cluster_barrier(ins: Instruction, env: Env) -> Op:
    """barrier.cluster.arrive{.release,.relaxed}{.aligned} and barrier.cluster.wait{.acquire}{...}.

    `barrier.py` hands on what begins with `barrier.cluster`.
    """
    words = [w for w in ins.modifiers[1:] if w != "aligned"]
    aligned = len(words) < len(ins.modifiers) - 1
    if ins.opcode != "barrier" or ins.operands:
        raise Unsupported(f"form {ins.name!r}")
    needs(env, 90, ins)
    if words in (["arrive"], ["arrive", "release"], ["arrive", "relaxed"]):
        return _arrive(ins, releases="relaxed" not in words, aligned=aligned)
    if words in (["wait"], ["wait", "acquire"]):
        return _wait(ins, env, aligned)
    raise Unsupported(f"form {ins.name!r}")


def _arrive(ins: Instruction, releases: bool, aligned: bool) -> Op:
    def run(c: Cohort) -> None:
        c.wave.cluster_barriers.arrive(ins, c, releases)

    if not aligned:
        return Op(run, (), cohort=True)
    return Op(
        run,
        (),
        cohort=True,
        ready=whole_warps,
        waits_for=lambda c: waits_for_lanes(ins, c),
        warp_gate=True,
    )


def _wait(ins: Instruction, env: Env, aligned: bool) -> Op:
    def run(c: Cohort) -> None:
        c.wave.cluster_barriers.wait(c)
        if env.count:
            c.wave.counters.wait(ins, c)

    def ready(c: Cohort) -> Any:
        done = c.wave.cluster_barriers.ready(ins, c)
        here = whole_warps(c) if aligned else True
        return done if here is True else here & done

    def waits_for(c: Cohort) -> str:
        if aligned and whole_warps(c) is not True:
            return waits_for_lanes(ins, c)
        return c.wave.cluster_barriers.describe(c)

    return Op(run, (), cohort=True, ready=ready, waits_for=waits_for)


@instruction("mapa")
def mapa(ins: Instruction, env: Env) -> Op:
    """mapa{.shared::cluster}.{u32,u64} d, a, b: the address a in the block of rank b.

    A rank that the cluster does not have gives an address that nobody may access, as on hardware.
    """
    kind = _kind(ins, env)
    generic = len(ins.modifiers) == 1

    def run(c: Cohort, address: Array, rank: Array) -> Array:
        if generic:
            _check_generic(ins, c, address)
        base = SHARED_WINDOW if generic else 0
        # Nobody has the last rank, so what is beyond it goes there.
        there = (address & WITHIN_BLOCK) + (np.minimum(rank, 0xFF).astype(np.int64) << RANK_SHIFT)
        there += base
        return there.astype(DTYPES[kind])

    return Op(run, ("addr", "u32"), (kind,), cohort=True)


@instruction("getctarank")
def getctarank(ins: Instruction, env: Env) -> Op:
    """getctarank{.shared::cluster}.{u32,u64} d, a: the rank of the block that has the address a."""
    _kind(ins, env)
    generic = len(ins.modifiers) == 1

    def run(c: Cohort, address: Array) -> Array:
        if generic:
            _check_generic(ins, c, address)
        return ((address >> RANK_SHIFT) & 0xFF).astype(np.uint32)

    return Op(run, ("addr",), ("u32",), cohort=True)


def _kind(ins: Instruction, env: Env) -> str:
    words = ins.modifiers
    if words[-1:] not in (("u32",), ("u64",)) or words[:-1] not in ((), (CLUSTER,)):
        raise Unsupported(f"form {ins.name!r}")
    needs(env, 90, ins)
    return words[-1]


def _check_generic(ins: Instruction, c: Cohort, address: Array) -> None:
    outside = ~in_window(address, CLUSTER)
    if outside.any():
        lane = int(np.argmax(outside))
        raise KernelTrap(
            f"{ins.opcode} of the generic address {int(address[lane]):#x}, which is not in shared "
            "memory",
            c.wave.where(ins, int(c.gids[lane])),
        )
