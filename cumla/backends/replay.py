"""Calls that were made before: their launches again, without the checks and the choices.

What a decode call on a GPU checks and launches depends on its arrays' shapes, strides, dtypes and
alignment, on numbers and on flags, and on no value in memory. A serving loop makes the same kind of
call for every layer and step, so all of that is remembered under a key, the first time by the long
way. From then on a call costs the key, a look at which results overlap other arrays, and the
launches with its own addresses in them.

Whatever is not plainly the same takes the long way again, which also makes all errors.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cumla import backends
from cumla.backends.arrays import span_of
from cumla.backends.streams import current
from cumla.schedule import DecodePlan

# Of an address, what counts: a workspace is cut at multiples of 256 bytes.
_ALIGNMENT_MASK = 255
# More kinds of call than any program makes; when they are so many, all are forgotten.
MOST_KINDS = 1024
_PLAIN = frozenset((bool, int, float, type(None)))


@dataclass
class Log:
    """What a call did on a device: filled by GpuCall."""

    launches: list[tuple[Any, Any, Any, Sequence[Any], int]] = field(default_factory=list)
    """Kernel, grid, block, arguments, bytes of dynamic shared memory."""
    scratch: list[Any] = field(default_factory=list)
    """Arrays from CuPy's pool."""


@dataclass(frozen=True)
class _Launch:
    kernel: Any
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    args: list[Any]
    patches: list[tuple[int, int, int]]
    """Arguments that are addresses: their place, the number of the array, bytes from its start."""


@dataclass(frozen=True)
class Recording:
    """The launches of a kind of call. Arrays are numbered: those given, the plan's, new ones."""

    spans: list[tuple[int, int]]
    """For every given array, its first byte and the one behind its last, from its address."""
    results: list[tuple[int | None, tuple[int, ...], np.dtype[Any]]]
    """Which given array each result is; None: a new one of that shape and dtype."""
    scratch: list[tuple[tuple[int, ...], np.dtype[Any]]]
    launches: list[_Launch]
    plan: weakref.ref[DecodePlan] | None
    """The plan, if it was made on the CPU: what it holds may have mattered."""


class Attempt:
    """A call, which ran again if it was a known one.

    Attributes:
        results: the results, in their order; None: it did not run.
    """

    __slots__ = ("_device", "_given", "_key", "_plan", "results")

    def __init__(self) -> None:
        self.results: tuple[Any, ...] | None = None
        self._key: Any = None
        self._device: Any = None
        self._given: list[Any] = []
        self._plan: DecodePlan | None = None

    @contextmanager
    def recorded(self, results: Sequence[Any]) -> Iterator[None]:
        """Remember what the block launches, if calls of this kind can be remembered.

        Args:
            results: where the call's results go, in the order of `attempt`'s.
        """
        if self._key is None:
            yield
            return
        with self._device.logged() as log:
            yield
        records = self._device.recordings
        if len(records) >= MOST_KINDS:
            records.clear()
        records[self._key] = _record(self._device, log, self._given, self._plan, results)


_LONG_WAY = Attempt()


def attempt(
    op: str,
    inputs: Sequence[Any],
    results: Sequence[Any],
    plan: Any,
    options: tuple[Any, ...],
    stream: Any,
) -> Attempt:
    """Run a call again if one of its kind is remembered.

    Args:
        op: its name.
        inputs: its arrays, the first not None, then maybe None; all that it reads but the plan.
        results: where its results go, None for new arrays.
        plan: the caller's.
        options: its numbers and flags.
        stream: the caller's.

    Raises:
        ArgumentTypeError: `stream` is none.
    """
    array_type: Any = getattr(sys.modules.get("cupy"), "ndarray", None)
    if type(inputs[0]) is not array_type:
        return _LONG_WAY
    # Plain numbers and flags alone: True is 1 for a dictionary, so their types are in the key.
    if not _PLAIN.issuperset(map(type, options)):
        return _LONG_WAY
    key: list[Any] = [op, options, *map(type, options)]
    given: list[Any] = []
    for one in (*inputs, *results):
        if type(one) is array_type:
            key.append((one.shape, one.strides, one.dtype, one.data.ptr & _ALIGNMENT_MASK))
            given.append(one)
        elif one is None:
            key.append(None)
        else:
            return _LONG_WAY
    device_id = given[0].data.device_id
    for one in given:
        if one.data.device_id != device_id:
            return _LONG_WAY
    key.append(device_id)
    if type(plan) is DecodePlan:
        if isinstance(plan.kv_lens, np.ndarray):
            key.append(id(plan))
        else:
            key.append(plan.block_size)
            for one in _arrays_of(plan):
                if type(one) is not array_type or one.data.device_id != device_id:
                    return _LONG_WAY
                key.append((one.shape, one.strides, one.dtype, one.data.ptr & _ALIGNMENT_MASK))
    elif plan is not None:
        return _LONG_WAY
    backend: Any = backends._loaded.get("cupy")
    device = getattr(backend, "device", None)
    if device is None:
        return _LONG_WAY
    tried = Attempt()
    tried._key, tried._device, tried._given, tried._plan = tuple(key), device, given, plan
    recording = device.recordings.get(tried._key, tried)
    if recording is tried or (recording and recording.plan and recording.plan() is not plan):
        return tried  # a new kind, or a new plan where another one was
    if recording is None or _overlap(recording, given):
        return _LONG_WAY
    with current(device_id, stream):
        tried.results = _run(recording, device, given, plan)
    return tried


def _overlap(recording: Recording, given: list[Any]) -> bool:
    """Whether a result may share memory with another array of the call."""
    ends = [
        (one.data.ptr + low, one.data.ptr + high)
        for one, (low, high) in zip(given, recording.spans, strict=True)
    ]
    for number, _, _ in recording.results:
        if number is not None:
            first, last = ends[number]
            # Itself, and no other.
            if sum([low < last and first < high for low, high in ends]) != 1:
                return True
    return False


def _run(recording: Recording, device: Any, given: list[Any], plan: Any) -> tuple[Any, ...]:
    """The launches once more, in CuPy's current device and stream."""
    arrays = given
    if plan is not None:
        arrays = [*given, *_plan_arrays(device, plan)]
    results = []
    for number, shape, dtype in recording.results:
        if number is None:
            results.append(device.empty(shape, dtype))
            arrays = [*arrays, results[-1]]
        else:
            results.append(given[number])
    if recording.scratch:
        arrays = [*arrays, *(device.empty(*one) for one in recording.scratch)]
    for launch in recording.launches:
        args = launch.args.copy()
        for place, number, offset in launch.patches:
            array = arrays[number]
            args[place] = np.uint64(array.data.ptr + offset) if offset else array
        launch.kernel(launch.grid, launch.block, tuple(args), shared_mem=launch.shared_bytes)
    return tuple(results)


def _arrays_of(plan: DecodePlan) -> tuple[Any, ...]:
    return plan.kv_lens, plan.tile_scheduler_metadata, plan.num_splits


def _plan_arrays(device: Any, plan: DecodePlan) -> tuple[Any, ...]:
    """The plan's arrays where the kernels can read them."""
    arrays = _arrays_of(plan)
    if isinstance(plan.kv_lens, np.ndarray):
        return tuple(device.here(one) for one in arrays)
    return arrays


def _record(
    device: Any, log: Log, given: list[Any], plan: DecodePlan | None, results: Sequence[Any]
) -> Recording | None:
    """The recording of a call that was just made.

    None if its addresses cannot be told apart, or if it did all of its work in another way.
    """
    if not log.launches:
        return None
    arrays = [*given, *(_plan_arrays(device, plan) if plan is not None else ())]
    where: list[tuple[int | None, tuple[int, ...], np.dtype[Any]]] = []
    for one in results:
        number = next((n for n, other in enumerate(given) if other is one), None)
        if number is None:
            arrays.append(one)
        where.append((number, one.shape, one.dtype))
    arrays += log.scratch
    spans = [span_of(one) for one in arrays]
    launches = []
    for kernel, grid, block, args, shared_bytes in log.launches:
        patches = []
        for place, one in enumerate(args):
            if isinstance(one, type(given[0])):
                owners = [
                    number
                    for number, (array, (low, high)) in enumerate(zip(arrays, spans, strict=True))
                    if low <= one.data.ptr - array.data.ptr < high
                ]
                if len(owners) != 1:
                    return None
                patches.append((place, owners[0], one.data.ptr - arrays[owners[0]].data.ptr))
        plain = [None if isinstance(one, type(given[0])) else one for one in args]
        launches.append(_Launch(kernel, grid, block, shared_bytes, plain, patches))
    made_on_host = plan is not None and isinstance(plan.kv_lens, np.ndarray)
    return Recording(
        spans[: len(given)],
        where,
        [(one.shape, one.dtype) for one in log.scratch],
        launches,
        weakref.ref(plan) if plan is not None and made_on_host else None,
    )
