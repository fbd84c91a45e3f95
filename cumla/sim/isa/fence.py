"""fence and membar. PTX ISA "Parallel Synchronization: membar, fence".

Lanes of a wave see one another's accesses in the order in which they happen, so a fence orders
nothing here; it tells the race detector what the program has ordered.
"""

from __future__ import annotations

from cumla.sim.cohort import Cohort
from cumla.sim.isa.table import Env, Op, Unsupported, instruction, needs, nothing
from cumla.sim.ptx.syntax import Instruction

ORDERS = ("sc", "acq_rel", "acquire", "release")
SCOPES = ("cta", "cluster", "gpu", "sys")
# PTX ISA: "membar is a synonym for fence.sc, and the levels cta, gl and sys are synonymous with
# the scopes cta, gpu and sys".
LEVELS = {"cta": "cta", "gl": "gpu", "sys": "sys"}
# One-way fences limited to a space, or to mbarrier.init, are told as the fences they are part of.
RESTRICTED = {
    ("acquire", "sync_restrict::shared::cluster", "cluster"),
    ("release", "sync_restrict::shared::cta", "cluster"),
    ("mbarrier_init", "release", "cluster"),
}
# Fences of what generic accesses did for asynchronous ones, and the space of those; "": any.
ASYNC = {
    ("async",): "",
    ("async", "global"): "global",
    ("async", "shared::cta"): "shared",
    ("async", "shared::cluster"): "shared",
    ("async::generic", "release", "sync_restrict::shared::cta", "cluster"): "shared",
}
OTHER_PROXIES = {
    ("alias",),
    ("async::generic", "acquire", "sync_restrict::shared::cluster", "cluster"),
}
TENSORMAP = "tensormap::generic"


@instruction("fence")
def fence(ins: Instruction, env: Env) -> Op:
    """fence{.sem}.scope, the restricted one-way forms and fence.proxy.*."""
    words = ins.modifiers
    if words[:1] == ("proxy",):
        return _proxy(ins, env, words[1:])
    if ins.operands:
        raise Unsupported(f"{ins.name!r} with operands")
    if words in RESTRICTED:
        needs(env, 90, ins)
        order = "release" if "release" in words else "acquire"
        return _thread_fence(env, "cluster", order)
    order, scope = (
        words if len(words) == 2 else ("acq_rel", *words) if len(words) == 1 else ("", "")
    )
    if order not in ORDERS or scope not in SCOPES:
        raise Unsupported(f"form {ins.name!r}")
    if scope == "cluster":
        needs(env, 90, ins, of="scope .cluster")
    return _thread_fence(env, scope, order)


@instruction("membar")
def membar(ins: Instruction, env: Env) -> Op:
    """membar.{cta,gl,sys} and membar.proxy.*."""
    words = ins.modifiers
    if words[:1] == ("proxy",):
        return _proxy(ins, env, words[1:])
    if len(words) != 1 or words[0] not in LEVELS or ins.operands:
        raise Unsupported(f"form {ins.name!r}")
    return _thread_fence(env, LEVELS[words[0]], "sc")


def _thread_fence(env: Env, scope: str, order: str) -> Op:
    if not env.check_race:
        return Op(nothing, (), cohort=True)

    def run(c: Cohort) -> None:
        c.wave.race.fence(c, scope, order)

    return Op(run, (), cohort=True)


def _proxy(ins: Instruction, env: Env, words: tuple[str, ...]) -> Op:
    """fence.proxy.*; nothing but the race detector knows of proxies, and only of the async one."""
    kinds: tuple[str, ...] = ()
    if len(words) == 3 and words[0] == TENSORMAP and words[2] in SCOPES:
        known = words[1] in ("acquire", "release")
        if words[1] == "acquire":
            kinds = ("addr", "u32")
    else:
        known = words in ASYNC or words in OTHER_PROXIES
    if not known or len(ins.operands) != len(kinds):
        raise Unsupported(f"form {ins.name!r} with {len(ins.operands)} operands")
    if words != ("alias",):
        needs(env, 90, ins)
    if env.check_race and words in ASYNC:
        limit = ASYNC[words]
        return Op(lambda c: c.wave.race.proxy_fence(c, limit), (), cohort=True)
    return Op(nothing, kinds, cohort=True)
