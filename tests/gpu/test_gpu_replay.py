"""Calls that are made again: the same launches as by the long way, and the same errors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from naive import same_bits

import cumla
from cumla import ArgumentError, ArgumentTypeError, backends
from cumla.backends import replay
from gpu.calls import DECODES, ints
from gpu.numpy_there import moved
from gpu.stand_in import StandIn, cupy
from gpu.test_gpu_arrays import SHAPES

NAMES = ["dense_bf16", "sparse_v4"]
every_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def driver() -> Iterator[StandIn]:
    """Two GPUs that keep a list of launches and do nothing."""
    made = StandIn(targets=("sm_80", "sm_90"), run=False)
    with made.in_place():
        backends.load_backend("cupy")
        yield made


class LongWay(Exception):
    pass


def only_the_short_way(patch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **more: Any) -> None:
        raise LongWay

    patch.setattr("cumla.attention.dense.Arrays", refuse)
    patch.setattr("cumla.attention.sparse.Arrays", refuse)


def recordings() -> dict[Any, Any]:
    backend: Any = backends.load_backend("cupy")
    found: dict[Any, Any] = backend.device.recordings
    return found


def told(driver: StandIn) -> list[tuple[Any, ...]]:
    """The launches so far, with their arguments' bytes, and then forget them."""
    found = [
        (one.entry, one.device, one.stream, one.grid, one.block, one.shared_bytes, one.values)
        for one in driver.launches
    ]
    driver.launches.clear()
    return found


def complete(driver: StandIn, name: str, device: int = 0) -> tuple[Any, dict[str, Any]]:
    """An op and all of its arguments, results and a workspace included."""
    op, arguments, results = DECODES[name]()
    call = moved(driver, arguments, device)
    for one, (shape, dtype) in results.items():
        call[one] = driver.array(np.zeros(shape, dtype), device)
    b, s_q, h_q, _ = arguments["q"].shape
    size = cumla.decode_workspace_bytes(b, s_q, h_q, 64)
    call["workspace"] = driver.array(np.zeros(size, np.uint8), device)
    return op, call


@every_name
def test_only_the_first_of_its_kind_takes_the_long_way(
    name: str, driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, call = complete(driver, name)
    assert op(**call) == (call["out"], call["lse"])
    first = told(driver)
    assert len(first) == 3
    only_the_short_way(monkeypatch)
    allocated = len(driver.allocations)
    for _ in range(3):
        found = op(**call)
        assert found[0] is call["out"]
        assert found[1] is call["lse"]
        assert told(driver) == first
    assert len(driver.allocations) == allocated
    assert (driver.waits, driver.uploads) == (0, 0)
    with pytest.raises(LongWay):
        op(**call, softmax_scale=0.5)


@every_name
def test_addresses_are_those_of_the_call(
    name: str, driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each argument for itself in new memory: as the long way has it."""
    op, call = complete(driver, name)
    op(**call)
    plan = cumla.plan_decode(driver.array(ints(17, 48)), num_parts=5)
    op(**call, plan=plan)
    for argument, value in call.items():
        if not isinstance(value, cupy.ndarray):
            continue
        for how in ({}, {"plan": plan}, {"plan": _moved_plan(driver, plan)}):
            changed = call | {argument: driver.elsewhere(value)} | how
            told(driver)
            with monkeypatch.context() as patch:
                only_the_short_way(patch)
                op(**changed)
            short = told(driver)
            kept = dict(recordings())
            recordings().clear()
            op(**changed)
            assert short == told(driver), argument
            assert any(_address(changed[argument]) <= one for one in _numbers(short))
            recordings().update(kept)


def _moved_plan(driver: StandIn, plan: cumla.DecodePlan) -> cumla.DecodePlan:
    arrays = (plan.kv_lens, plan.tile_scheduler_metadata, plan.num_splits)
    kv_lens, metadata, num_splits = (driver.elsewhere(one) for one in arrays)
    return cumla.DecodePlan(kv_lens, plan.block_size, metadata, num_splits)


def _address(array: Any) -> int:
    return int(array.data.ptr)


def _numbers(launches: list[tuple[Any, ...]]) -> set[int]:
    return {int.from_bytes(one, "little") for launch in launches for one in launch[-1]}


@pytest.mark.parametrize("name", ["dense_fp16", "sparse_v32", "sparse_v4"])
def test_results_have_the_same_bits(name: str) -> None:
    """In the simulator: known calls with other values, in other memory, without results given."""
    op, arguments, _ = DECODES[name]()
    driver = StandIn(targets=("sm_80",), checks=("memory",))
    with driver.in_place():
        backends.load_backend("cupy")
        call = moved(driver, arguments)
        first = op(**call)
        changed = arguments | {"q": -arguments["q"]}
        again = op(**moved(driver, changed))
        assert len(recordings()) == 1
        recordings().clear()
        want = op(**moved(driver, changed))
        for one, other, before in zip(again, want, first, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert same_bits(driver.numpy(one), driver.numpy(other))
            assert not same_bits(driver.numpy(one), driver.numpy(before))
        assert driver.waits == 0


# ------------------------------------------------------------------------ what is not the same


WRONG = [
    *(one for one in SHAPES if one[0] in NAMES),
    ("dense_bf16", "softmax_scale", True),
    ("dense_bf16", "softmax_scale", "1"),
    ("dense_bf16", "causal", 0),
    ("dense_bf16", "causal", 1.0),
    ("dense_bf16", "stream", "s"),
    ("dense_bf16", "out", None),
    ("sparse_v4", "softmax_scale", float("nan")),
    ("sparse_v4", "stream", object()),
]


@pytest.mark.parametrize(("name", "argument", "wrong"), WRONG)
def test_what_is_wrong_is_refused_after_a_good_call_too(
    name: str, argument: str, wrong: Any, driver: StandIn
) -> None:
    op, call = complete(driver, name)
    if argument == "out":
        wrong = cupy.ndarray(call["out"].shape, call["out"].dtype, call["q"].data)
    for _ in range(2):
        op(**call, **({"softmax_scale": 1.0} if argument == "softmax_scale" else {}))
    told(driver)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}: "):
        op(**call | {argument: moved(driver, wrong)})
    assert not driver.launches


@every_name
def test_every_array_of_another_kind_makes_another_call(name: str, driver: StandIn) -> None:
    """Strides and alignment: the launches are those of the long way, whatever was before."""
    op, call = complete(driver, name)
    op(**call)
    for argument, array in call.items():
        if not isinstance(array, cupy.ndarray) or argument == "workspace":
            continue
        for variant in _variants(driver, argument, array):
            changed = call | {argument: variant}
            told(driver)
            op(**changed)
            known = told(driver)
            op(**changed)
            assert told(driver) == known
            recordings().clear()
            op(**changed)
            assert told(driver) == known
            op(**call)


def _variants(driver: StandIn, argument: str, array: Any) -> Iterator[Any]:
    """The same shape and dtype, at another alignment, and with wider strides."""
    span = replay.span_of(array)[1]
    memory = driver.array(np.zeros(span + 4096, np.uint8))
    offset = 16 if "kv_cache" in argument else 4
    yield cupy.ndarray(array.shape, array.dtype, memory.data + offset, array.strides)
    if array.ndim > 1 and "kv_cache" not in argument:
        strides = (array.strides[0] + 16, *array.strides[1:])
        yield cupy.ndarray(array.shape, array.dtype, memory.data, strides)


def test_the_types_of_numbers_count(driver: StandIn) -> None:
    op, call = complete(driver, "dense_bf16")
    for scale in (1, 1.0, np.float32(1), None):
        op(**call, softmax_scale=scale)
        op(**call, softmax_scale=scale)
    # np.float32 is no plain number: it takes the long way each time.
    assert len(recordings()) == 3


@every_name
def test_results_that_overlap_are_refused_though_the_call_is_known(
    name: str, driver: StandIn
) -> None:
    op, call = complete(driver, name)
    op(**call)
    told(driver)
    q, out, lse = call["q"], call["out"], call["lse"]
    wrong = {
        "in q": ("out", cupy.ndarray(out.shape, out.dtype, q.data)),
        "in the other result": ("lse", cupy.ndarray(lse.shape, lse.dtype, out.data + 256)),
        "the other result in it": ("out", cupy.ndarray(out.shape, out.dtype, lse.data)),
        "at the end of q": ("lse", cupy.ndarray(lse.shape, lse.dtype, q.data + 256)),
        "in the workspace": ("out", cupy.ndarray(out.shape, out.dtype, call["workspace"].data)),
    }
    for why, (argument, value) in wrong.items():
        with pytest.raises(ArgumentError, match=r"^(out|lse): .*shares memory"):
            op(**call | {argument: value})
        assert not driver.launches, why
    op(**call)
    assert driver.launches


def test_an_array_given_twice(driver: StandIn) -> None:
    """Its address does not tell which argument it is, so such a call is not remembered."""
    op, call = complete(driver, "sparse_v4")
    lengths = driver.array(ints(3, 7))
    twice = call | {"topk_length": lengths, "extra_topk_length": lengths}
    apart = call | {"topk_length": lengths, "extra_topk_length": driver.elsewhere(lengths)}
    for _ in range(2):
        op(**twice)
    assert [*recordings().values()] == [None]
    told(driver)
    op(**apart)
    launches = told(driver)
    assert {_address(lengths), _address(apart["extra_topk_length"])} <= _numbers(launches)


# -------------------------------------------------------------------------------------- plans


@every_name
def test_plans_made_on_the_host(
    name: str, driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in them decides what is launched, so each is known for itself."""
    op, call = complete(driver, name)
    if name == "sparse_v4":
        call["topk_length"] = None
        lengths = cumla.sparse_kv_lengths(2, 70, None, 7, None)
        call["extra_topk_length"] = None
    else:
        lengths = ints(17, 48)
    whole = cumla.plan_decode(lengths, num_parts=3, overhead=1000)
    split = cumla.plan_decode(lengths, num_parts=3, block_size=16, overhead=0)
    assert whole.num_parts == split.num_parts
    assert (whole.num_pieces, split.num_pieces > 2) == (2, True)
    for plan in (whole, split):
        told(driver)
        op(**call, plan=plan)
        first = told(driver)
        assert len(first) == (1 if plan is whole else 2)
        for other in (whole, split, plan):
            told(driver)
            op(**call, plan=other)
        assert told(driver) == first
    assert driver.uploads == 6
    only_the_short_way(monkeypatch)
    for plan in (whole, split, whole):
        op(**call, plan=plan)


def test_a_plan_that_is_gone_is_not_taken_for_a_new_one(
    driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new plan may have the id of an old one; here all have the same."""
    monkeypatch.setattr(replay, "id", lambda one: 7, raising=False)
    op, call = complete(driver, "dense_bf16")
    lengths = ints(17, 48)
    for number in range(4):
        cut = {"overhead": 1000} if number % 2 else {"block_size": 16, "overhead": 0}
        plan = cumla.plan_decode(lengths, num_parts=3, **cut)
        told(driver)
        for _ in range(2):
            op(**call, plan=plan)
            assert len(told(driver)) == (1 if number % 2 else 2)
        assert len(recordings()) == 1
        if number > 1:
            del plan
            gc.collect()


def test_plans_on_the_gpu_are_known_by_their_shapes(
    driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, call = complete(driver, "dense_bf16")
    lengths = driver.array(ints(17, 48))
    plans = [cumla.plan_decode(lengths, num_parts=parts) for parts in (5, 5, 6)]
    op(**call, plan=plans[0])
    only_the_short_way(monkeypatch)
    told(driver)
    op(**call, plan=plans[1])
    assert _address(plans[1].num_splits) in _numbers(told(driver))
    with pytest.raises(LongWay):
        op(**call, plan=plans[2])


# ------------------------------------------------------------------- streams, devices, graphs


@every_name
def test_streams_and_devices_are_the_calls(name: str, driver: StandIn) -> None:
    calls = [complete(driver, name, device) for device in (0, 1)]
    for _ in range(2):
        for device, (op, call) in enumerate(calls):
            for stream in (None, 5, 6):
                told(driver)
                op(**call, stream=stream)
                assert {one[1:3] for one in told(driver)} == {(device, stream or 0)}
    assert len(recordings()) == 2
    assert (driver.device, len(driver.streams)) == (0, 1)
    # All of one call must be on one device, a known call or not.
    op, call = calls[0]
    with pytest.raises(ArgumentError, match="GPU 1"):
        op(**call | {"q": calls[1][1]["q"]})


@every_name
def test_a_known_call_is_captured(name: str, driver: StandIn) -> None:
    op, call = complete(driver, name)
    op(**call)
    expected = told(driver)
    stream = cupy.cuda.Stream.from_external(PlainStream())
    with driver.capture(stream) as graph:
        op(**call)
    assert not driver.launches
    assert len(graph.work) == len(expected)


class PlainStream:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 77


def test_a_call_that_failed_is_not_remembered(
    driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, call = complete(driver, "dense_bf16")
    small = call | {"workspace": call["workspace"][:256]}
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"^workspace: got 256 bytes"):
            op(**small)
    assert not recordings()


def test_kinds_are_not_remembered_without_end(
    driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MOST_KINDS", 3)
    op, call = complete(driver, "dense_bf16")
    for number in range(1, 9):
        op(**call, softmax_scale=1.0 / number)
        assert 1 <= len(recordings()) <= 3
