"""What generated code calls where lanes part: at branches, and at predicated instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cumla.sim.cohort import Cohort


def branch(c: Cohort, p: Any, taken: int, falls: int, index: int) -> Any:
    size = p.shape[0]
    number = np.count_nonzero(p)
    if number == size:
        return taken
    if number == 0:
        return falls
    if c.wave.counters is not None:
        c.wave.counters.divergent(index, c, p)
    return [(taken, p), (falls, ~p)]


def switch(c: Cohort, index: Any, places: list[int], guard: Any, falls: int) -> Any:
    # PTX ISA "brx.idx": an index outside the table is undefined; here it leaves by the last entry.
    which = np.minimum(index, len(places) - 1).astype(np.int64)
    goes = np.array(places)[which]
    if guard is not None:
        goes = np.where(guard, goes, falls)
    distinct = np.unique(goes)
    if distinct.shape[0] == 1:
        return int(distinct[0])
    return [(int(place), goes == place) for place in distinct]


def guarded(c: Cohort, p: Any, run: Callable[..., Any], sources: Any, olds: Any) -> Any:
    results = run(*sources)
    if not isinstance(results, tuple):
        results = (results,)
    made = tuple(np.where(p, new, old) for new, old in zip(results, olds, strict=True))
    if c.wave.warpgroups.under_way:
        for value, new, old in zip(made, results, olds, strict=True):
            c.wave.warpgroups.chosen(p, new, old, c.gids, value)
    return made


def guarded_cohort(c: Cohort, p: Any, run: Callable[..., Any], sources: Any, olds: Any) -> Any:
    number = np.count_nonzero(p)
    if number == 0:
        return olds
    if number == p.shape[0]:
        results = run(c, *sources)
        if results is None:
            return ()
        return results if isinstance(results, tuple) else (results,)
    some = c.subset(p)
    taken = [s if s.shape[0] == 1 else s[p] for s in sources]
    if c.wave.warpgroups.under_way:
        for source, part in zip(sources, taken, strict=True):
            c.wave.warpgroups.picked(source, p, some.gids, part)
    results = run(some, *taken)
    if results is None:
        return ()
    if not isinstance(results, tuple):
        results = (results,)
    merged = []
    for new, old in zip(results, olds, strict=True):
        out = np.empty(c.n, old.dtype)
        out[:] = old
        out[p] = new
        if c.wave.warpgroups.under_way:
            c.wave.warpgroups.chosen(p, new, old, c.gids, out)
        merged.append(out)
    return tuple(merged)


def guarded_ready(c: Cohort, p: Any, ready: Callable[..., Any], sources: Any) -> Any:
    number = np.count_nonzero(p)
    if number == 0:
        return True
    if number == p.shape[0]:
        return ready(c, *sources)
    answer = ready(c.subset(p), *(s if s.shape[0] == 1 else s[p] for s in sources))
    if answer is True:
        return True
    out = np.ones(c.n, np.bool_)
    out[p] = answer
    return out
