"""Atomic updates by many lanes at once, with the results of doing them one after the other.

Lanes are brought into groups that update the same element. Within a group an operation is a scan:
the value that a lane finds is what the lanes before it, in ascending order, have left. Scans of
associative operations are vectorised; floating-point additions are rounded one by one, as they are
on hardware, where only the order of lanes is not defined.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cumla.sim.isa.table import DTYPES
from cumla.sim.memory.access import Update

Array = NDArray[Any]
# (element before, operands, groups) -> (what each lane finds, what each group leaves)
Scan = Callable[[Array, tuple[Array, ...], "Groups"], tuple[Array, Array]]

BF16: Any = np.dtype(ml_dtypes.bfloat16)
# PTX ISA "Floating Point Instructions": NaN results are canonical, but for .f64.
CANONICAL_NAN = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}
SMALLEST_NORMAL = np.float32(2.0**-126)
# Sums of multiples of 2^-125 are such multiples too, so no sum of these is subnormal.
NEVER_SUBNORMAL = np.float32(2.0**-102)
CAS_ROUNDS = 8
UFUNCS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def element_dtype(kind: str) -> Any:
    """The dtype of an element of memory that an atomic of this type works on."""
    return BF16 if kind == "bf16" else DTYPES[kind]


class Groups:
    """Lanes by the element that they update; in a group they keep their order.

    Attributes:
        order: [n] lanes, group by group, or None if they stand so already.
        starts: where each group begins, in that order.
        where: the element of each group.
        distinct: each lane is a group of its own.
    """

    def __init__(self, index: Array) -> None:
        self.n = index.shape[0]
        self.order: Array | None = None
        steps = index[1:] - index[:-1]
        if (steps < 0).any():
            least = int(index.min())
            # NumPy sorts 16-bit numbers much faster than wider ones.
            near = int(index.max()) - least < 1 << 16
            self.order = np.argsort(
                (index - least).astype(np.uint16) if near else index, kind="stable"
            )
            index = index[self.order]
            steps = index[1:] - index[:-1]
        self._new = np.append(True, steps != 0)
        self.starts = np.flatnonzero(self._new)
        self.distinct = self.starts.shape[0] == self.n
        self.where = index if self.distinct else index[self.starts]

    @cached_property
    def member(self) -> Array:
        """[n] the group of each lane, in that order."""
        return np.cumsum(self._new) - 1

    @property
    def sizes(self) -> Array:
        return np.diff(self.starts, append=self.n)

    @property
    def ends(self) -> Array:
        """The last lane of each group."""
        return np.append(self.starts[1:], self.n) - 1

    def ordered(self, values: Array) -> Array:
        return values if self.order is None else values[self.order]

    def restored(self, values: Array) -> Array:
        """The opposite of `ordered`."""
        if self.order is None:
            return values
        back = np.empty_like(values)
        back[self.order] = values
        return back

    def found(self, before: Array, left: Array) -> Array:
        """What each lane finds, given what each lane leaves behind it."""
        if self.distinct:
            return before
        found = np.empty_like(left)
        found[1:] = left[:-1]
        found[self.starts] = before
        return found


def atomic(op: str, kind: str, wanted: bool, flush: bool) -> Update:
    """The update of an atomic instruction.

    Args:
        op: "add", "min", "max", "and", "or", "xor", "exch", "cas", "inc" or "dec".
        kind: the PTX type of an element.
        wanted: whether the old values are asked for.
        flush: an f32 addition takes and gives subnormals as zeros.
    """
    scan = _scan(op, kind, flush)

    def update(elements: Array, index: Array, operands: tuple[Array, ...]) -> tuple[Any, bool]:
        groups = Groups(index)
        before = elements[groups.where]
        found, left = scan(before, tuple(groups.ordered(o) for o in operands), groups)
        changed = before.tobytes() != left.tobytes()
        if changed:
            elements[groups.where] = left
        return (groups.restored(found) if wanted else None), changed

    if wanted or op not in UFUNCS or kind in ("f16", "bf16"):
        return update
    ufunc = UFUNCS[op]

    def reduce(elements: Array, index: Array, operands: tuple[Array, ...]) -> tuple[Any, bool]:
        (values,) = operands
        if kind == "f32" and not _only_rounds(elements, index, values, flush):
            return update(elements, index, operands)
        before = elements.take(index)
        ufunc.at(elements, index, values)
        return None, bool((elements.take(index) != before).any())

    return reduce


def _only_rounds(elements: Array, index: Array, values: Array, flush: bool) -> bool:
    """Whether f32 additions, in any number, can neither give NaN nor a subnormal to flush."""
    for given in (values, elements.take(index)):
        if not np.isfinite(given).all():
            return False
        if flush and ((np.abs(given) < NEVER_SUBNORMAL) & (given != 0)).any():
            return False
    return True


def _scan(op: str, kind: str, flush: bool) -> Scan:
    if op == "exch":
        return lambda before, operands, groups: (
            groups.found(before, operands[0]),
            operands[0][groups.ends],
        )
    if op == "cas":
        return _cas
    if op in ("inc", "dec"):
        return lambda before, operands, groups: _wrap(op, before, operands[0], groups)
    if op == "add" and kind in ("f16", "bf16", "f32", "f64"):
        return lambda before, operands, groups: _add_floats(
            before, operands[0], groups, kind, flush
        )
    if kind in ("f16", "bf16"):
        return lambda before, operands, groups: _extreme(op, before, operands[0], groups)
    if op in ("add", "xor"):
        return lambda before, operands, groups: _invertible(op, before, operands[0], groups)
    return lambda before, operands, groups: _associative(UFUNCS[op], before, operands[0], groups)


def _invertible(op: str, before: Array, values: Array, groups: Groups) -> tuple[Array, Array]:
    """add and xor: one scan over all lanes, less what came before the group."""
    forward, back = UFUNCS[op], np.subtract if op == "add" else np.bitwise_xor
    if groups.distinct:
        return before, forward(before, values)
    sums = forward.accumulate(values, dtype=values.dtype)
    start = back(before, back(sums, values)[groups.starts])
    left = forward(sums, start[groups.member])
    return groups.found(before, left), left[groups.ends]


def _associative(ufunc: Any, before: Array, values: Array, groups: Groups) -> tuple[Array, Array]:
    left = _running(ufunc, before, values, groups)
    return groups.found(before, left), left[groups.ends]


def _running(ufunc: Any, before: Array, values: Array, groups: Groups) -> Array:
    """What each lane leaves: in each group, lanes are joined over a distance that doubles."""
    if groups.distinct:
        return ufunc(values, before)
    alone = groups.starts.shape[0] == 1
    joined: Array = ufunc.accumulate(values) if alone else values.copy()
    longest = 1 if alone else int(groups.sizes.max())
    distance = 1
    while distance < longest:
        same = groups.member[distance:] == groups.member[:-distance]
        further = ufunc(joined[distance:], joined[:-distance])
        joined[distance:][same] = further[same]
        distance *= 2
    left: Array = ufunc(joined, before[groups.member])
    return left


def _extreme(op: str, before: Array, values: Array, groups: Groups) -> tuple[Array, Array]:
    """min and max of f16 and bf16: of numbers in the same order, NaN the last to be chosen.

    PTX ISA "min", "max": a NaN loses against a number, and +0.0 > -0.0.
    """
    lost = np.uint16(0x7FFF if op == "min" else 0xFFFF)

    def key(x: Array) -> Array:
        bits = np.where(x != x, lost, x.view(np.uint16))
        return (bits ^ np.where(bits >> 15, 0x7FFF, 0).astype(np.uint16)).view(np.int16)

    ufunc = np.minimum if op == "min" else np.maximum
    keys = _running(ufunc, key(before), key(values), groups)
    bits = keys.view(np.uint16)
    bits = bits ^ np.where(bits >> 15, 0x7FFF, 0).astype(np.uint16)
    left = np.where(bits == lost, np.uint16(0x7FFF), bits).view(values.dtype)
    return groups.found(before, left), left[groups.ends]


def _wrap(op: str, before: Array, bounds: Array, groups: Groups) -> tuple[Array, Array]:
    """inc: old >= b ? 0 : old + 1; dec: old == 0 or old > b ? b : old - 1."""
    of_group = bounds[groups.starts]
    if not np.array_equal(of_group[groups.member], bounds):
        return _wrap_one_by_one(op, before, bounds, groups)
    steps = np.arange(1, groups.n + 1) - groups.starts[groups.member]
    first = before.astype(np.int64)
    bound = of_group.astype(np.int64)
    # Above the bound, one step leads to the start of the cycle: 0 for inc, b for dec.
    start = np.where(first > bound, -1 if op == "inc" else bound + 1, first)[groups.member]
    position = start + steps if op == "inc" else start - steps
    left = (position % (bound + 1)[groups.member]).astype(before.dtype)
    return groups.found(before, left), left[groups.ends]


def _wrap_one_by_one(op: str, before: Array, bounds: Array, groups: Groups) -> tuple[Array, Array]:
    """Lanes of one group with different bounds: there is no closed form."""
    now = before.tolist()
    left = []
    for member, bound in zip(groups.member.tolist(), bounds.tolist(), strict=True):
        old = now[member]
        if op == "inc":
            new = 0 if old >= bound else old + 1
        else:
            new = bound if old == 0 or old > bound else old - 1
        now[member] = new
        left.append(new)
    return groups.found(before, np.array(left, before.dtype)), np.array(now, before.dtype)


def _cas(before: Array, operands: tuple[Array, ...], groups: Groups) -> tuple[Array, Array]:
    """Each round finds the next lane of each group that changes the element."""
    compare, value = operands
    member = groups.member
    position = np.arange(groups.n)
    now = before.copy()
    found = now[member]
    changes = compare != value
    last = np.full(now.shape[0], -1)  # the newest lane of each group that changed it
    for _ in range(CAS_ROUNDS):
        hits = np.flatnonzero((compare == found) & changes & (position > last[member]))
        if hits.shape[0] == 0:
            return found, now
        of = member[hits]
        new = np.append(True, of[1:] != of[:-1])
        hits, of = hits[new], of[new]
        now[of] = value[hits]
        last[of] = hits
        later = position > last[member]
        found[later] = now[member[later]]
    return _cas_one_by_one(before, operands, groups)


def _cas_one_by_one(
    before: Array, operands: tuple[Array, ...], groups: Groups
) -> tuple[Array, Array]:
    """A long chain of lanes of which each matches what another left."""
    now = before.tolist()
    found = []
    lanes = (groups.member.tolist(), operands[0].tolist(), operands[1].tolist())
    for member, compare, value in zip(*lanes, strict=True):
        old = now[member]
        found.append(old)
        if old == compare:
            now[member] = value
    return np.array(found, before.dtype), np.array(now, before.dtype)


# Additions of floating-point numbers


def _flushed(values: Array) -> Array:
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def _canonical(values: Array, kind: str) -> Array:
    """NaN as the hardware gives it."""
    nan = values != values
    if kind not in CANONICAL_NAN or not nan.any():
        return values
    bits = np.dtype(f"u{values.dtype.itemsize}")
    return np.where(nan, bits.type(CANONICAL_NAN[kind]), values.view(bits)).view(values.dtype)


def _add_floats(
    before: Array, values: Array, groups: Groups, kind: str, flush: bool
) -> tuple[Array, Array]:
    start = before
    if flush:
        start, values = _flushed(before), _flushed(values)
    if groups.distinct:
        left = start + values
        left = _canonical(_flushed(left) if flush else left, kind)
        return before, left
    sizes = groups.sizes
    longest = int(sizes.max())
    left = np.empty_like(values)
    if longest <= sizes.shape[0]:
        # Many groups: the first lanes of all, then the second lanes of all...
        now = start.copy()
        for rank in range(longest):
            some = np.flatnonzero(sizes > rank)
            lanes = groups.starts[some] + rank
            sums = now[some] + values[lanes]
            if flush:
                sums = _flushed(sums)
            now[some] = left[lanes] = sums
    else:
        for first, size, value in zip(groups.starts.tolist(), sizes.tolist(), start, strict=True):
            left[first : first + size] = _running_sum(value, values[first : first + size], flush)
    left = _canonical(left, kind)
    return groups.found(before, left), left[groups.ends]


def _running_sum(start: Any, values: Array, flush: bool) -> Array:
    """Sums of one group, each rounded: np.add.accumulate adds in order."""
    terms = np.append(np.array([start], values.dtype), values)
    sums = np.add.accumulate(terms)[1:]
    if flush and ((np.abs(sums) < SMALLEST_NORMAL) & (sums != 0)).any():
        now = terms[0]
        for i, value in enumerate(values):
            now = now + value
            if abs(now) < SMALLEST_NORMAL:
                now = np.copysign(np.float32(0), now)
            sums[i] = now
    return sums
