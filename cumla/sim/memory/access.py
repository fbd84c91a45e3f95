"""Reads, writes and atomic updates of memory, as closures made once for each instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cumla.sim.cohort import Cohort
from cumla.sim.isa.table import Env
from cumla.sim.memory.arena import WORDS, Arena
from cumla.sim.memory.locate import locator
from cumla.sim.memory.spaces import CLUSTER, SHARED, WINDOWS, parts, plain_space
from cumla.sim.ptx.syntax import Instruction

Values = tuple[Any, ...]
Read = Callable[[Cohort, Any], Values]
Write = Callable[[Cohort, Any, Values], None]
# (elements, index of each lane's element, operands) -> (old values or None, whether any changed)
Update = Callable[[Any, Any, Values], tuple[Any, bool]]


def reader(
    ins: Instruction,
    env: Env,
    space: str,
    dtype: Any,
    count: int = 1,
    order: str = "weak",
    scope: str = "cta",
    hooks: bool = True,
) -> Read:
    """`read(cohort, address)`: `count` consecutive elements at each lane's address.

    A uniform address gives uniform values where all lanes read the same memory.
    """
    dtype = np.dtype(dtype)
    nbytes = dtype.itemsize * count
    gather = _gather(dtype, count)
    space = plain_space(space)

    def one(space: str, window: int = 0, generic: bool = False) -> Read:
        place = locator(ins, env, space, nbytes, "read", order, scope, hooks, window, generic)

        def read(c: Cohort, address: Any) -> Values:
            return gather(*place(c, address))

        return read

    if space == "param":
        return _remembered(one("param"))
    if space != "generic":
        return one(space)
    spaces = {name: one(name, WINDOWS.get(name, 0)) for name in (*WINDOWS, "global")}
    place = locator(ins, env, "global", nbytes, "read", order, scope, hooks, generic=True)

    def generic_read(c: Cohort, address: Any) -> Values:
        found = place(c, address)
        if found is not None:
            return gather(*found)
        mixed = parts(address)
        if len(mixed) == 1:
            name = mixed[0][0]
            return spaces[name](c, address - WINDOWS.get(name, 0))
        results = tuple(np.empty(c.n, dtype) for _ in range(count))
        for name, mask in mixed:
            values = spaces[name](c.subset(mask), address[mask] - WINDOWS.get(name, 0))
            for result, value in zip(results, values, strict=True):
                result[mask] = value
        return results

    return generic_read


def writer(
    ins: Instruction,
    env: Env,
    space: str,
    dtype: Any,
    count: int = 1,
    order: str = "weak",
    scope: str = "cta",
    hooks: bool = True,
) -> Write:
    """`write(cohort, address, values)`: store `count` consecutive elements at each lane's address.

    PTX leaves open which of several lanes that write one address wins; here it is the highest.
    """
    dtype = np.dtype(dtype)
    nbytes = dtype.itemsize * count
    scatter = _scatter(dtype, count)
    space = plain_space(space)

    def one(space: str, window: int = 0, generic: bool = False) -> Write:
        place = locator(ins, env, space, nbytes, "write", order, scope, hooks, window, generic)

        def write(c: Cohort, address: Any, values: Values) -> None:
            arena, index = place(c, address)
            scatter(arena, index, values)
            c.wave.version += 1

        return write

    if space != "generic":
        return one(space)
    spaces = {name: one(name, WINDOWS.get(name, 0)) for name in (CLUSTER, "local", "global")}
    place = locator(ins, env, "global", nbytes, "write", order, scope, hooks, generic=True)

    def generic_write(c: Cohort, address: Any, values: Values) -> None:
        found = place(c, address)
        if found is not None:
            arena, index = found
            scatter(arena, index, values)
            c.wave.version += 1
            return
        mixed = parts(address)
        for name, mask in mixed:
            write = spaces.get(name, spaces["global"])
            at = address - WINDOWS.get(name, 0) if name in spaces else address
            if len(mixed) == 1:
                write(c, at, values)
            else:
                some = tuple(v if v.shape[0] == 1 else v[mask] for v in values)
                write(c.subset(mask), at[mask], some)

    return generic_write


def updater(
    ins: Instruction,
    env: Env,
    space: str,
    dtype: Any,
    update: Update,
    order: str = "relaxed",
    scope: str = "gpu",
    count: int = 1,
    in_shared: Update | None = None,
) -> Callable[..., Values | None]:
    """`change(cohort, address, *operands)`: an atomic update of each lane's `count` elements.

    `update` is given all elements of the arena, the index of each lane's element and the operands
    of that element, and does the lanes' updates one after the other in ascending order. It returns
    the values that each lane found, or None, and whether any element changed. Operands come
    flattened: all `count` of the first, then all of the second. The result is a tuple of `count`
    arrays of old values, or None where `update` gives none. `in_shared`, if given, takes its place
    where a generic address is one of shared memory.
    """
    dtype = np.dtype(dtype)
    nbytes = dtype.itemsize * count
    space = plain_space(space)

    def apply(
        c: Cohort, arena: Arena, index: Any, operands: Values, update: Update = update
    ) -> Values | None:
        elements = arena.views[dtype]
        if index.shape[0] != c.n:
            index = np.repeat(index, c.n)
        if count > 1:
            index = index * count
        olds = []
        changed = False
        for k in range(count):
            mine = tuple(c.full(value) for value in operands[k::count])
            old, new = update(elements, index + k if k else index, mine)
            olds.append(old)
            changed |= new
        if changed:
            c.wave.version += 1
        return None if olds[0] is None else tuple(olds)

    def one(space: str, window: int = 0) -> Callable[..., Values | None]:
        place = locator(ins, env, space, nbytes, "atomic", order, scope, window=window)

        mine = update if in_shared is None or space not in SHARED else in_shared

        def change(c: Cohort, address: Any, *operands: Any) -> Values | None:
            arena, index = place(c, address)
            return apply(c, arena, index, operands, mine)

        return change

    if space != "generic":
        return one(space)
    spaces = {name: one(name, WINDOWS.get(name, 0)) for name in (CLUSTER, "global")}
    place = locator(ins, env, "global", nbytes, "atomic", order, scope, generic=True)

    def generic_change(c: Cohort, address: Any, *operands: Any) -> Values | None:
        found = place(c, address)
        if found is not None:
            arena, index = found
            return apply(c, arena, index, operands)
        mixed = parts(address)
        results: Values | None = None
        for name, mask in mixed:
            # PTX ISA "atom": local and parameter memory have no atomics; "global" refuses them.
            change = spaces.get(name, spaces["global"])
            at = address - WINDOWS[name] if name == CLUSTER else address
            if len(mixed) == 1:
                return change(c, at, *operands)
            some = (v if v.shape[0] == 1 else v[mask] for v in operands)
            olds = change(c.subset(mask), at[mask], *some)
            if olds is not None:
                if results is None:
                    results = tuple(np.empty(c.n, dtype) for _ in range(count))
                for result, old in zip(results, olds, strict=True):
                    result[mask] = old
        return results

    return generic_change


def _remembered(read: Read) -> Read:
    """A reader of parameters that reads each uniform address once for each launch."""
    key = object()

    def read_once(c: Cohort, address: Any) -> Values:
        if address.shape[0] > 1:
            return read(c, address)
        seen = c.wave.memory.seen_params
        at = (key, int(address[0]))
        if at not in seen:
            seen[at] = read(c, address)
        values: Values = seen[at]
        return values

    return read_once


def _gather(dtype: Any, count: int) -> Callable[[Arena, Any], Values]:
    """A function of an arena and indices in units of `count` elements.

    The locator has seen to it that they are in range; "clip" costs less than "raise".
    """
    if count == 1:

        def one(arena: Arena, index: Any) -> Values:
            return (arena.views[dtype].take(index, mode="clip"),)

        return one
    nbytes = dtype.itemsize * count
    word = WORDS[min(nbytes, 16)]

    def rows(arena: Arena, index: Any) -> Values:
        words = arena.views[word]
        if nbytes == 32:
            words = words.reshape(-1, 2)
        lanes = words.take(index, axis=0, mode="clip").view(dtype).reshape(-1, count)
        return tuple(np.ascontiguousarray(lanes.T))

    return rows


def _scatter(dtype: Any, count: int) -> Callable[[Arena, Any, Values], None]:
    """A function of an arena, indices in units of `count` elements, and the values."""

    def one(arena: Arena, index: Any, values: Values) -> None:
        value = values[0]
        if index.shape[0] < value.shape[0]:
            value = value[-1:]
        arena.views[dtype][index] = value

    if count == 1:
        return one
    nbytes = dtype.itemsize * count
    word = WORDS[min(nbytes, 16)]

    def rows(arena: Arena, index: Any, values: Values) -> None:
        n = index.shape[0]
        lanes = np.empty((n, count), dtype)
        for k, value in enumerate(values):
            lanes[:, k] = value if value.shape[0] <= n else value[-1:]
        halves = lanes.view(word)
        words = arena.views[word]
        if nbytes == 32:
            # The same lane wins both halves of a row: each half is assigned in lane order.
            words[index << 1] = halves[:, 0]
            words[(index << 1) + 1] = halves[:, 1]
        else:
            words[index] = halves[:, 0]

    return rows
