"""bar, barrier and bar.warp.sync. PTX ISA "Parallel Synchronization and Communication"."""

from __future__ import annotations

from typing import Any

import numpy as np

from cumla.sim.cohort import Cohort
from cumla.sim.isa.cluster import cluster_barrier
from cumla.sim.isa.convergence import converged, members, waits_for_lanes, whole_warps
from cumla.sim.isa.table import Env, Op, Unsupported, instruction
from cumla.sim.ptx.syntax import Instruction

PERFORMANCE = {"cta", "aligned"}


@instruction("bar", "barrier")
def bar(ins: Instruction, env: Env) -> Op:
    """bar{.cta}.sync a{, b}; .arrive a, b; .red.{popc.u32,and.pred,or.pred} d, a{, b}, c.

    Also barrier.cluster, which cluster.py knows.
    """
    if ins.modifiers[:1] == ("cluster",):
        return cluster_barrier(ins, env)
    words = [m for m in ins.modifiers if m not in PERFORMANCE]
    if words == ["warp", "sync"]:
        return _warp_sync(ins, env)
    if words == ["sync"]:
        return _sync(ins, env, len(ins.operands) == 2)
    if words == ["arrive"] and len(ins.operands) == 2:
        return _arrive(ins) if _aligned(ins) else _arrive_apart(ins)
    if words in (["red", "popc", "u32"], ["red", "and", "pred"], ["red", "or", "pred"]):
        return _red(ins, env, words[2], len(ins.operands) == 4)
    raise Unsupported(f"form {ins.name!r} with {len(ins.operands)} operands")


def _aligned(ins: Instruction) -> bool:
    """Whether all lanes of a warp must stand at this very instruction."""
    return ins.opcode == "bar" or "aligned" in ins.modifiers


def _sync(ins: Instruction, env: Env, counted: bool) -> Op:
    aligned = _aligned(ins)

    def ready(c: Cohort, barrier: Any, count: Any = None) -> Any:
        return c.wave.barriers.ready(ins, c, barrier, count, None, aligned)

    def run(c: Cohort, barrier: Any, count: Any = None) -> None:
        c.wave.barriers.pass_on(c, red=False)
        if env.count:
            c.wave.counters.wait(ins, c)

    def waits_for(c: Cohort, barrier: Any, count: Any = None) -> str:
        return c.wave.barriers.describe(c, barrier)

    kinds = ("u32", "u32") if counted else ("u32",)
    return Op(run, kinds, cohort=True, ready=ready, waits_for=waits_for)


def _arrive(ins: Instruction) -> Op:
    def run(c: Cohort, barrier: Any, count: Any) -> None:
        everyone = np.ones(c.n, np.bool_)
        c.wave.barriers.arrive(ins, c, barrier, count, None, everyone, waits=False, aligned=True)

    return Op(
        run,
        ("u32", "u32"),
        cohort=True,
        ready=lambda c, barrier, count: whole_warps(c),
        waits_for=lambda c, barrier, count: waits_for_lanes(ins),
        warp_gate=True,
    )


def _arrive_apart(ins: Instruction) -> Op:
    """barrier.arrive without .aligned: lanes wait for those of their warp at other instructions."""

    def ready(c: Cohort, barrier: Any, count: Any) -> Any:
        barriers = c.wave.barriers
        return barriers.ready(ins, c, barrier, count, None, aligned=False, waits=False)

    def run(c: Cohort, barrier: Any, count: Any) -> None:
        c.wave.barriers.pass_on(c, red=False)

    def waits_for(c: Cohort, barrier: Any, count: Any) -> str:
        return c.wave.barriers.describe(c, barrier)

    return Op(run, ("u32", "u32"), cohort=True, ready=ready, waits_for=waits_for)


def _red(ins: Instruction, env: Env, kind: str, counted: bool) -> Op:
    aligned = _aligned(ins)

    def split(arguments: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        return arguments[0], arguments[1] if counted else None, arguments[-1]

    def ready(c: Cohort, *arguments: Any) -> Any:
        return c.wave.barriers.ready(ins, c, *split(arguments), aligned)

    def run(c: Cohort, *arguments: Any) -> Any:
        answer = c.wave.barriers.pass_on(c, red=True)
        if env.count:
            c.wave.counters.wait(ins, c)
        return answer if kind == "u32" else answer.astype(np.bool_)

    def waits_for(c: Cohort, *arguments: Any) -> str:
        return c.wave.barriers.describe(c, arguments[0])

    kinds = ("u32", "u32", "pred") if counted else ("u32", "pred")
    return Op(run, kinds, (kind,), cohort=True, ready=ready, waits_for=waits_for)


def _warp_sync(ins: Instruction, env: Env) -> Op:
    def run(c: Cohort, membermask: Any) -> None:
        members(ins, c, membermask)  # refuses masks that contradict each other
        if env.check_race:
            c.wave.race.warp_sync(c, membermask)

    return Op(
        run,
        ("u32",),
        cohort=True,
        ready=converged,
        waits_for=lambda c, membermask: waits_for_lanes(ins),
        warp_gate=True,
    )
