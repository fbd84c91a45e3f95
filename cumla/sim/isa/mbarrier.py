"""mbarrier instructions. PTX ISA "Parallel Synchronization: mbarrier".

For the race detector an arrival releases the phase that it belongs to, and a wait that succeeds
acquires the phase that it waited for. All are relaxed atomic accesses to the barrier's word
besides: initialising a barrier races with using it, and fences around the .relaxed forms order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort
from cumla.sim.errors import KernelTrap
from cumla.sim.isa.table import Env, Op, Unsupported, instruction, needs
from cumla.sim.mbarriers import COUNT_BITS, LARGEST, Found, Mbarriers, in_turns, phase_key
from cumla.sim.memory.spaces import CLUSTER
from cumla.sim.ptx.syntax import Instruction, Sink

Array = NDArray[Any]

ONE = np.ones(1, np.uint32)
NO_STATE = np.zeros(1, np.uint64)
OWN = {"shared", "shared::cta"}
ANY = OWN | {CLUSTER}
SCOPES = {"cta", "cluster"}
# With random delivery, the chance of a try_wait not to wait.
GIVES_UP = 0.2


@instruction("mbarrier")
def mbarrier(ins: Instruction, env: Env) -> Op:
    """All mbarrier instructions; the first modifier says which."""
    made = FORMS.get(ins.modifiers[0] if ins.modifiers else "")
    if made is None:
        raise Unsupported(f"form {ins.name!r}")
    if made is _tx or ins.modifiers[0] == "try_wait" or "expect_tx" in ins.modifiers:
        needs(env, 90, ins)
    return made(ins, env)


def _parse(ins: Instruction, spaces: set[str], *groups: set[str]) -> set[str]:
    """The modifiers between the first one and .b64: at most one of each group, and a space."""
    *words, kind = ins.modifiers[1:] or ("",)
    found = set(words)
    for group in (spaces, *groups):
        if len(found & group) > 1:
            raise Unsupported(f"form {ins.name!r}")
    if kind != "b64" or found - spaces - set().union(*groups) or len(found) != len(words):
        raise Unsupported(f"form {ins.name!r}")
    return found


def _operands(ins: Instruction, *numbers: int) -> int:
    if len(ins.operands) not in numbers:
        raise Unsupported(f"{ins.name!r} with {len(ins.operands)} operands")
    return len(ins.operands)


def _words(ins: Instruction, env: Env, found: set[str], own: bool = False) -> Mbarriers:
    space = "shared" if found & OWN else CLUSTER if CLUSTER in found else "generic"
    return Mbarriers(ins, env, space, own)


def _written(words: Mbarriers, c: Cohort, offsets: Array) -> None:
    """Tell the race detector that barriers begin or end."""
    if words.check_race:
        c.wave.race.access(words.ins, c, "shared", offsets, 8, "write", "weak", "cta")


def _scope(found: set[str]) -> str:
    """The scope; one that is not given reaches a peer's barrier, too.

    PTX ISA says .cta then, but CUDA programs arrive on barriers of other blocks without a scope.
    """
    return "cta" if "cta" in found else "cluster"


def _init(ins: Instruction, env: Env) -> Op:
    """mbarrier.init{.shared{::cta}}.b64 [addr], count."""
    words = _words(ins, env, _parse(ins, OWN), own=True)
    _operands(ins, 2)

    def run(c: Cohort, address: Array, count: Array) -> None:
        _written(words, c, words.create(c, address, count))

    return Op(run, ("addr", "u32"), cohort=True)


def _inval(ins: Instruction, env: Env) -> Op:
    """mbarrier.inval{.shared{::cta}}.b64 [addr]."""
    words = _words(ins, env, _parse(ins, OWN), own=True)
    _operands(ins, 1)

    def run(c: Cohort, address: Array) -> None:
        _written(words, c, words.destroy(c, address))

    return Op(run, ("addr",), cohort=True)


def _arrive(ins: Instruction, env: Env) -> Op:
    """mbarrier.arrive and mbarrier.arrive_drop.

    {.sem.scope}{.space}.b64 state, [addr]{, count};
    .expect_tx{.sem.scope}{.space}.b64 state, [addr], txCount;
    .noComplete{.release.cta}{.space}.b64 state, [addr], count;
    the state may be `_`, and must be for .shared::cluster.
    """
    found = _parse(ins, ANY, {"release", "relaxed"}, SCOPES, {"expect_tx", "noComplete"})
    expects_tx, no_complete = "expect_tx" in found, "noComplete" in found
    counted = _operands(ins, *((3,) if expects_tx or no_complete else (2, 3))) == 3
    releases, scope = "relaxed" not in found, _scope(found)
    drop = ins.modifiers[0] == "arrive_drop"
    wanted = not isinstance(ins.operands[0], Sink)
    if wanted and CLUSTER in found:
        raise Unsupported("state of an arrival in .shared::cluster; it must be _")
    words = _words(ins, env, found, own=wanted)

    def run(c: Cohort, address: Array, operand: Array = ONE) -> Array:
        if not expects_tx and operand is not ONE:
            words.check_count(c, operand)
        at, count = words.offsets(c, address), ONE if expects_tx else operand
        states: Array | None = None
        for rows, barriers in in_turns(words, c, at, count):
            if rows is None:
                return arrive(barriers, operand)
            if states is None:
                states, operand = np.zeros(c.n, np.uint64), c.full(operand)
            states[rows] = arrive(barriers, operand[rows])
        assert states is not None
        return states

    def arrive(barriers: Found, operand: Array) -> Array:
        c, count = barriers.c, ONE if expects_tx else operand
        state = barriers.state(count) if wanted else NO_STATE
        if env.check_race:
            barriers.tell(scope)
            if releases:
                c.wave.race.release(c.gids, c.full(barriers.keys()))
        if expects_tx:
            # PTX ISA "mbarrier.arrive": the expect-tx operation comes before the arrive-on.
            barriers.add_tx(operand)
        barriers.take_arrivals(count, drop)
        if no_complete:
            barriers.must_not_complete()
        barriers.store()
        return state

    return Op(run, ("addr", "u32") if counted else ("addr",), ("b64",), cohort=True)


def _tx(ins: Instruction, env: Env) -> Op:
    """mbarrier.{expect_tx,complete_tx}{.relaxed.scope}{.space}.b64 [addr], txCount."""
    found = _parse(ins, ANY, {"relaxed"}, SCOPES)
    _operands(ins, 2)
    words, scope = _words(ins, env, found), _scope(found)
    sign = 1 if ins.modifiers[0] == "expect_tx" else -1

    def run(c: Cohort, address: Array, count: Array) -> None:
        barriers = words.find(c, address)
        barriers.load()
        barriers.tell(scope)
        barriers.add_tx(count.astype(np.int64) * sign)
        barriers.store()

    return Op(run, ("addr", "u32"), cohort=True)


def _wait(ins: Instruction, env: Env) -> Op:
    """mbarrier.test_wait and mbarrier.try_wait.

    {.sem.scope}{.shared{::cta}}.b64 done, [addr], state; likewise .parity with a phaseParity;
    try_wait may have a last operand, the time in ns after which it gives up. When that is the
    system decides without it, so that programs must look at `done`: with random delivery it gives
    up now and then for no reason.
    """
    blocks = ins.modifiers[0] == "try_wait"
    found = _parse(ins, OWN, {"acquire", "relaxed"}, SCOPES, {"parity"})
    hinted = _operands(ins, *((3, 4) if blocks else (3,))) == 4
    words, scope = _words(ins, env, found, own=True), _scope(found)
    acquires = "relaxed" not in found
    test = _by_parity if "parity" in found else _by_state
    impatient = env.delivery == "random"

    def run(c: Cohort, address: Array, wanted: Array, hint: Any = None) -> Array:
        barriers = words.find(c, address)
        done = test(words, barriers, wanted)
        if env.check_race:
            barriers.tell(scope)
            if acquires:
                _acquire(barriers, done)
        if env.count and blocks:
            c.wave.counters.wait(ins, c)
        if not blocks and not done.all():
            waited_for = barriers.lane_offsets[~c.full(done)]
            c.wave.copies.deliver_arrivals(waited_for)
            c.wave.bulk.deliver_arrivals(waited_for)
        return done

    def ready(c: Cohort, address: Array, wanted: Array, hint: Any = None) -> Any:
        if c.wave.expired or (impatient and c.wave.rng.random() < GIVES_UP):
            return True
        done = test(words, words.find(c, address), wanted)
        return True if done.all() else done

    def waits_for(c: Cohort, address: Array, wanted: Array, hint: Any = None) -> str:
        return words.find(c, address).describe()

    kinds = ("addr", "u32" if "parity" in found else "b64") + (("u32",) if hinted else ())
    if not blocks:
        return Op(run, kinds, ("pred",), cohort=True)
    return Op(run, kinds, ("pred",), cohort=True, ready=ready, waits_for=waits_for)


def _by_parity(words: Mbarriers, barriers: Found, parity: Array) -> Array:
    """Whether the phase of this parity, the current one or the one before, is complete.

    PTX ISA has 0 and 1 only. Triton passes -1 for 1, and GPUs look at the lowest bit.
    """
    return barriers.spread(barriers.phases & 1).astype(np.uint32) != (parity & 1)


def _by_state(words: Mbarriers, barriers: Found, state: Array) -> Array:
    """Whether the phase of the arrival that returned this state is complete."""
    age = barriers.spread(barriers.phases) - (state >> np.uint64(COUNT_BITS)).view(np.int64)
    bad = (age < 0) | (age > 1)
    if bad.any():
        raise _wrong(
            words,
            barriers,
            bad,
            "a wait with a state that is not of the current phase of its "
            "mbarrier nor of the phase before",
        )
    done: Array = age == 1
    return done


def _wrong(words: Mbarriers, barriers: Found, bad: Array, message: str) -> KernelTrap:
    return words.trap(barriers.c, int(np.argmax(bad)), message)


def _acquire(barriers: Found, done: Array) -> None:
    """Lanes that are done see what came before the arrivals of the phase that has ended."""
    c = barriers.c
    # Before phase 0 nobody arrived: waiting for parity 1 succeeds on a new barrier.
    over = c.full(done & barriers.spread(barriers.phases > 0))
    if over.any():
        keys = barriers.spread(phase_key(barriers.offsets, barriers.phases - 1))
        c.wave.race.acquire(c.gids[over], c.full(keys)[over])


def _pending_count(ins: Instruction, env: Env) -> Op:
    """mbarrier.pending_count.b64 count, state."""
    _parse(ins, set())
    _operands(ins, 2)
    return Op(lambda state: (state & np.uint64(LARGEST)).astype(np.uint32), ("b64",), ("u32",))


FORMS: dict[str, Callable[[Instruction, Env], Op]] = {
    "init": _init,
    "inval": _inval,
    "arrive": _arrive,
    "arrive_drop": _arrive,
    "expect_tx": _tx,
    "complete_tx": _tx,
    "test_wait": _wait,
    "try_wait": _wait,
    "pending_count": _pending_count,
}
