"""ld, st, cvta, isspacep and the cache instructions. PTX ISA "Data Movement and Conversion"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cumla.sim.cohort import RANK_SHIFT, Cohort
from cumla.sim.isa.table import DTYPES, Env, Op, Unsupported, instruction, nothing
from cumla.sim.memory.access import reader, writer
from cumla.sim.memory.arena import WIDEST
from cumla.sim.memory.faults import Access, fault
from cumla.sim.memory.locate import locator
from cumla.sim.memory.spaces import (
    CLUSTER,
    CLUSTER_BITS,
    SHARED,
    in_space,
    in_window,
    plain_space,
    window_of,
)
from cumla.sim.ptx.syntax import Instruction

SCOPES = frozenset({"cta", "cluster", "gpu", "sys"})
VECTORS = {"v2": 2, "v4": 4, "v8": 8}
SPACES = frozenset(
    {
        "const",
        "global",
        "local",
        "param",
        "param::entry",
        "param::func",
        "shared",
        "shared::cta",
        "shared::cluster",
    }
)
LOADED_SPACES = SPACES
STORED_SPACES = SPACES - {"const", "param", "param::entry"}
# What a load or store moves; `.b128` needs 128-bit registers.
TYPES = frozenset({f"{k}{w}" for k in "bus" for w in (8, 16, 32, 64)} | {"f32", "f64"})
EVICTIONS = frozenset(
    {
        *(f"L1::{p}" for p in ("evict_normal", "evict_unchanged", "evict_first", "evict_last")),
        "L1::no_allocate",
        *(f"L2::{p}" for p in ("evict_normal", "evict_first", "evict_last")),
    }
)
# These change how long it takes, and nothing else.
LOAD_HINTS = EVICTIONS | {"ca", "cg", "cs", "lu", "cv", "nc", "unified", "L2::cache_hint"}
LOAD_HINTS |= {"L2::64B", "L2::128B", "L2::256B"}
STORE_HINTS = EVICTIONS | {"wb", "cg", "cs", "wt", "L2::cache_hint"}
PREFETCHES = (
    frozenset({"L1"}),
    frozenset({"L2"}),
    frozenset({"L2::evict_last"}),
    frozenset({"L2::evict_normal"}),
    frozenset({"tensormap"}),
)
PRIORITIES = frozenset(
    {"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"}
)
LINE = 128  # bytes; what discard and applypriority work on


@dataclass(frozen=True, slots=True)
class Form:
    """The modifiers of a load or store, sorted out."""

    space: str
    type: str
    count: int
    order: str
    scope: str
    hinted: bool  # it has a cache policy operand


def _form(
    ins: Instruction, orders: frozenset[str], spaces: frozenset[str], hints: frozenset[str]
) -> Form:
    space, order, scope, count, kind = "generic", "weak", "cta", 1, ""
    seen: dict[str, str] = {}

    def once(role: str, word: str) -> str:
        if role in seen:
            raise Unsupported(f"both .{seen[role]} and .{word}")
        seen[role] = word
        return word

    for word in ins.modifiers:
        if word in spaces:
            space = once("space", word)
        elif word in TYPES:
            kind = once("type", word)
        elif word in VECTORS:
            count = VECTORS[once("vector", word)]
        elif word in orders:
            order = once("order", word)
        elif word in SCOPES:
            scope = once("scope", word)
        elif word == "mmio":
            once("mmio", word)
        elif word not in hints:
            raise Unsupported(f"modifier .{word} of {ins.opcode}")
    if not kind:
        raise Unsupported(f"{ins.name} has no type that is known")
    if DTYPES[kind].itemsize * count > 32:
        raise Unsupported(f"{count} elements of .{kind} are more than 32 bytes")
    synchronises = order in ("relaxed", "acquire", "release")
    if synchronises != ("scope" in seen) or (
        "mmio" in seen and (order, scope) != ("relaxed", "sys")
    ):
        raise Unsupported(f"order and scope of {ins.name}")
    if order == "volatile":
        # PTX ISA "ld": a volatile access is a relaxed one of the system's scope.
        scope = "sys"
    return Form(space, kind, count, order, scope, "L2::cache_hint" in ins.modifiers)


@instruction("ld", "ldu")
def ld(ins: Instruction, env: Env) -> Op:
    """ld{.order}{.scope}{.space}{.cop}{.L1::..}{.L2::..}{.vec}.type d, [a]{, cache-policy}."""
    orders = frozenset({"weak", "volatile", "relaxed", "acquire"})
    form = _form(ins, orders, LOADED_SPACES, LOAD_HINTS)
    dtype = DTYPES[form.type]
    read = reader(ins, env, form.space, dtype, form.count, form.order, form.scope)

    def one(c: Cohort, address: Any, policy: Any = None) -> Any:
        return read(c, address)[0]

    def many(c: Cohort, address: Any, policy: Any = None) -> Any:
        return read(c, address)

    sources = ("addr", "b64") if form.hinted else ("addr",)
    return Op(one if form.count == 1 else many, sources, (form.type,) * form.count, cohort=True)


@instruction("st")
def st(ins: Instruction, env: Env) -> Op:
    """st{.order}{.scope}{.space}{.cop}{.L1::..}{.L2::..}{.vec}.type [a], b{, cache-policy}."""
    orders = frozenset({"weak", "volatile", "relaxed", "release"})
    form = _form(ins, orders, STORED_SPACES, STORE_HINTS)
    count = form.count
    space = form.space
    write = writer(ins, env, space, DTYPES[form.type], count, form.order, form.scope)

    def run(c: Cohort, address: Any, *values: Any) -> None:
        write(c, address, values[:count])

    def run_alone(c: Cohort, address: Any, *values: Any) -> None:
        """For the race detector: of lanes of a warp that store the same, one does.

        CUDA C Programming Guide "SIMT Architecture": one of a warp's writes to a place is made.
        """
        others = _repeated(c, c.full(address), [c.full(v) for v in values[:count]])
        if others is not None and space == "generic":
            others &= ~in_window(c.full(address), "local")
        if others is None:
            write(c, address, values[:count])
            return
        kept = ~others
        write(
            c.subset(kept),
            c.full(address)[kept],
            tuple(c.full(v)[kept] for v in values[:count]),
        )

    policy = ("b64",) if form.hinted else ()
    if env.check_race and plain_space(space) in ("global", "generic", *SHARED):
        run = run_alone
    return Op(run, ("addr", *(form.type,) * count, *policy), cohort=True)


def _repeated(c: Cohort, address: Any, values: list[Any]) -> Any:
    """The lanes that store what a higher lane of their warp stores in the same place, or None."""
    padded = c.to_warps(address)
    if c.whole:
        padded = np.sort(padded, axis=1)
        if not (padded[:, 1:] == padded[:, :-1]).any():
            return None
    order = np.lexsort((c.gids, address, c.gids >> 5))
    same = (address[order][1:] == address[order][:-1]) & (
        c.gids[order][1:] >> 5 == c.gids[order][:-1] >> 5
    )
    # All lanes at a place must store the same, or the conflict is a race.
    group = np.concatenate([[0], np.cumsum(~same)])
    differs = np.zeros(group[-1] + 1, np.bool_)
    for value in values:
        bits = value.view(f"u{value.dtype.itemsize}")[order]
        differs[group[1:][same & (bits[1:] != bits[:-1])]] = True
    dropped = np.zeros(c.n, np.bool_)
    dropped[order[:-1]] = same & ~differs[group[:-1]]
    return dropped if dropped.any() else None


@instruction("cvta")
def cvta(ins: Instruction, env: Env) -> Op:
    """cvta{.to}.space.u64: between an address in a space and the generic address of the same."""
    words = list(ins.modifiers)
    to = words[:1] == ["to"]
    if to:
        words.pop(0)
    if len(words) != 2 or words[0] not in SPACES - {"param::func"} or words[1] != "u64":
        raise Unsupported(f"form {ins.name!r}")
    window = np.array(window_of(plain_space(words[0])), np.uint64)
    if not window:
        # Global addresses are generic addresses; constant memory lies among them.
        return Op(_same, ("u64",), ("u64",))

    def from_generic(address: Any) -> Any:
        return address - window

    def to_generic(address: Any) -> Any:
        return address + window

    return Op(from_generic if to else to_generic, ("u64",), ("u64",))


def _same(value: Any) -> Any:
    return value


@instruction("isspacep")
def isspacep(ins: Instruction, env: Env) -> Op:
    """isspacep.space p, a: whether a generic address lies in a space."""
    if len(ins.modifiers) != 1 or ins.modifiers[0] not in SPACES - {"param::func"}:
        raise Unsupported(f"form {ins.name!r}")
    space = plain_space(ins.modifiers[0])

    def run(c: Cohort, address: Any) -> Any:
        return in_space(address.view(np.int64), space, c.wave.memory.device)

    def run_own(c: Cohort, address: Any) -> Any:
        address = address.view(np.int64)
        own = (address & (1 << CLUSTER_BITS) - 1) >> RANK_SHIFT == c.shared_window >> RANK_SHIFT
        return in_window(address, CLUSTER) & own

    if space == "shared":
        run = run_own

    return Op(run, ("u64",), ("pred",), cohort=True)


@instruction("prefetch", "prefetchu")
def prefetch(ins: Instruction, env: Env) -> Op:
    """prefetch{.space}.level [a]: nothing but time; a bad address does not trap either."""
    what = frozenset(ins.modifiers) - {"global", "local", "const", "param"}
    if what not in PREFETCHES or (ins.opcode == "prefetchu" and ins.modifiers != ("L1",)):
        raise Unsupported(f"form {ins.name!r}")
    return Op(nothing, ("addr",), cohort=True)


@instruction("applypriority")
def applypriority(ins: Instruction, env: Env) -> Op:
    """applypriority{.global}.L2::evict_normal [a], 128: nothing but time."""
    if frozenset(ins.modifiers) - {"global"} != {"L2::evict_normal"}:
        raise Unsupported(f"form {ins.name!r}")
    return Op(nothing, ("addr", "u32"), cohort=True)


@instruction("discard")
def discard(ins: Instruction, env: Env) -> Op:
    """discard{.global}.L2 [a], 128: the line's bytes are undefined from here on.

    They are left as they are; with the memory check they count as not written.
    """
    if frozenset(ins.modifiers) - {"global"} != {"L2"}:
        raise Unsupported(f"form {ins.name!r}")
    place = locator(ins, env, "global", WIDEST, "discard")
    line = Access(ins, "global", LINE, "discard", env.check_memory)

    def run(c: Cohort, address: Any, size: Any) -> None:
        if (address & (LINE - 1)).any():
            raise fault(line, c, address)
        for piece in range(0, LINE, WIDEST):
            place(c, address + piece)

    return Op(run, ("addr", "u32"), cohort=True)


@instruction("createpolicy")
def createpolicy(ins: Instruction, env: Env) -> Op:
    """createpolicy.{fractional,range,cvt}...b64: an opaque policy, here always 0."""
    words = list(ins.modifiers)
    sources: tuple[str, ...]
    if words == ["cvt", "L2", "b64"]:
        sources = ("b64",)
    else:
        levels = [w for w in words[1:-1] if w != "global"]
        known = words[-1:] == ["b64"] and 1 <= len(levels) <= 2 and PRIORITIES.issuperset(levels)
        if not known or words[0] not in ("fractional", "range"):
            raise Unsupported(f"form {ins.name!r}")
        if words[0] == "range":
            sources = ("addr", "u32", "u32")
        else:
            sources = ("f32",) * (len(ins.operands) - 1)
    policy = np.zeros(1, np.uint64)

    def run(*operands: Any) -> Any:
        return policy

    return Op(run, sources, ("b64",))
