"""st.async and red.async: stores to a block of the cluster that an mbarrier counts.

PTX ISA "st.async" and "red.async". They are weak, or relaxed, operations of the generic proxy that
happen some time after they were issued; the mbarrier counts their bytes, with release semantics.
When that is, is the business of `cumla.sim.bulk`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.bulk import Target, Transfer
from cumla.sim.cohort import Cohort
from cumla.sim.isa.bulk import COMPLETES
from cumla.sim.isa.bulk_places import STORES, Barrier, queue, tell_counting
from cumla.sim.isa.table import DTYPES, Env, Op, Unsupported, instruction, needs
from cumla.sim.memory.arena import WORDS
from cumla.sim.memory.faults import Access
from cumla.sim.memory.sequence import atomic, element_dtype
from cumla.sim.memory.shared import offsets
from cumla.sim.memory.spaces import CLUSTER, SHARED_WINDOW
from cumla.sim.memory.words import Words
from cumla.sim.ptx.syntax import Instruction

Array = NDArray[Any]

VECTORS = {"v2": 2, "v4": 4}
STORED = frozenset({"b32", "b64", "u32", "u64", "s32", "s64", "f32", "f64"})
REDUCED = {
    "inc": {"u32"},
    "dec": {"u32"},
    "min": {"u32", "s32"},
    "max": {"u32", "s32"},
    "add": {"u32", "s32", "u64"},
    "and": {"b32"},
    "or": {"b32"},
    "xor": {"b32"},
}
# (where to, what each lane gives, word after word) -> nothing
Change = Callable[[Words, Array], None]


@instruction("st.async")
def store_async(ins: Instruction, env: Env) -> Op:
    """st.async{.weak}{.shared::cluster}.mbarrier::complete_tx::bytes{.v2,.v4}.type
    [a], b, [mbar].
    """
    needs(env, 90, ins)
    words = list(ins.modifiers[1:])
    for optional in ("weak", CLUSTER):
        if words[:1] == [optional]:
            words.pop(0)
    if words[:1] != [COMPLETES] or len(ins.operands) != 3:
        raise Unsupported(f"form {ins.name!r} with {len(ins.operands)} operands")
    *vector, kind = words[1:] or [""]
    if kind not in STORED or vector not in ([], ["v2"], ["v4"]):
        raise Unsupported(f"form {ins.name!r}")
    count = VECTORS[vector[0]] if vector else 1
    if count * DTYPES[kind].itemsize > 16:
        raise Unsupported(f"{count} elements of .{kind} are more than 16 bytes")
    return _operation(ins, env, kind, count, "write", Words.write)


@instruction("red.async")
def reduce_async(ins: Instruction, env: Env) -> Op:
    """red.async.relaxed.cluster{.shared::cluster}.mbarrier::complete_tx::bytes.op.type
    [a], b, [mbar].
    """
    needs(env, 90, ins)
    words = list(ins.modifiers[1:])
    if words[:2] != ["relaxed", "cluster"]:
        raise Unsupported(f"form {ins.name!r}")
    del words[:2]
    if words[:1] == [CLUSTER]:
        words.pop(0)
    if len(words) != 3 or words[0] != COMPLETES or len(ins.operands) != 3:
        raise Unsupported(f"form {ins.name!r} with {len(ins.operands)} operands")
    op, kind = words[1:]
    if kind not in REDUCED.get(op, ()):
        raise Unsupported(f"form {ins.name!r}")
    update, elements = atomic(op, kind, False, False), element_dtype(kind)

    def change(target: Words, values: Array) -> None:
        target.update(update, elements, values.view(elements))

    return _operation(ins, env, kind, 1, "atomic", change)


def _operation(
    ins: Instruction, env: Env, kind: str, count: int, access: str, change: Change
) -> Op:
    width = DTYPES[kind].itemsize * count
    generic = CLUSTER not in ins.modifiers
    place = Access(ins, CLUSTER, width, access, env.check_memory, SHARED_WINDOW if generic else 0)
    barrier = Barrier(ins, env, "generic" if generic else CLUSTER)

    def run(c: Cohort, address: Array, *rest: Array) -> None:
        *values, mbar = rest
        # What is not in the window is in no block: `offsets` refuses it.
        to, bars = offsets(place, c, address - place.window), barrier.offsets(c, mbar)
        barrier.must_belong(c, to, bars)
        given = np.stack([c.full(value) for value in values], axis=1)
        data = np.ascontiguousarray(given).view(np.uint8).reshape(c.n, width)
        # What goes from one block to one mbarrier lands together.
        for slot, bar in sorted({*zip(c.slots.tolist(), bars.tolist(), strict=True)}):
            mine = np.flatnonzero((bars == bar) & (c.slots == slot))
            _issue(ins, env, c, mine, to[mine], data[mine], bar, barrier, access, change)

    return Op(run, ("addr", *(kind,) * count, "addr"), cohort=True)


def _issue(
    ins: Instruction,
    env: Env,
    c: Cohort,
    mine: Array,
    to: Array,
    data: Array,
    bar: int,
    barrier: Barrier,
    kind: str,
    change: Change,
) -> None:
    """The operations of some lanes that one mbarrier counts."""
    width = data.shape[1]
    words = Words(c.wave, "shared", to, width, env.check_memory)
    target = Target(partial(change, words), int(to[0]) // c.wave.shared_stride, bar)
    barrier.must_live(c, int(mine[0]), [(target, words)])
    transfer = Transfer(int(c.gids[mine[0]]), barrier.words, None, [target], data.size)
    transfer.data = data.reshape(-1).view(WORDS[width])
    if env.count:
        lanes = Cohort(c.wave, c.gids[mine], [])
        c.wave.counters.access(ins, lanes, "shared", to, width, kind)
    if env.check_race:
        transfer.agent = target.agent = queue(bar, STORES)
        issuers = c.gids[mine]
        agents = np.full(mine.shape[0], target.agent)
        target.stamp = c.wave.race.asynchronous(
            ins, issuers, agents, "shared", kind, to, np.arange(mine.shape[0]), width, proxy=False
        )
        tell_counting(ins, c, transfer.gid, target)
    c.wave.bulk.issue(transfer)
