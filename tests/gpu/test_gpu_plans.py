"""Plans that are made on a GPU, through the public functions; and what a workspace must hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import cumla
from cumla import ArgumentError, ArgumentTypeError, backends
from cumla.backends.gpu import ALIGNMENT, GpuCall, GpuDevice
from gpu.stand_in import StandIn, cupy


class PlansOnly:
    """What the planners need of a backend."""

    name = "cupy"

    def __init__(self) -> None:
        self.device = GpuDevice()


@pytest.fixture
def driver() -> Iterator[StandIn]:
    made = StandIn(targets=("sm_80", "sm_90"))
    with made.in_place(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._loaded, "cupy", PlansOnly())
        yield made


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    cut: dict[str, int]
    host_cut: dict[str, int] | None = None


CASES = [
    Case((0,), {"num_parts": 1}),
    Case((100, 0, 4096, 1), {"num_parts": 7}),
    Case((64, 65, 128), {"num_parts": 3, "block_size": 16, "overhead": 0}),
    Case((1000, 3), {"split_blocks": 2, "num_parts": 12}, {"split_blocks": 2}),
]


def same_plan(driver: StandIn, found: cumla.DecodePlan, expected: cumla.DecodePlan) -> None:
    assert found.block_size == expected.block_size
    for name in ("kv_lens", "num_splits", "tile_scheduler_metadata"):
        array, want = getattr(found, name), getattr(expected, name)
        assert isinstance(array, cupy.ndarray)
        values = driver.numpy(array)
        assert (values[: len(want)] == want).all(), name
        # Parts without work, where there was more room than a fixed plan needs.
        assert all(row.tolist() == [found.batch, *[0] * 7] for row in values[len(want) :])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lengths_on_a_gpu_are_planned_there(driver: StandIn, case: Case) -> None:
    lengths = np.array(case.lengths, np.int32)
    found = cumla.plan_decode(driver.array(lengths), **case.cut)
    same_plan(driver, found, cumla.plan_decode(lengths, **(case.host_cut or case.cut)))
    assert (driver.waits, driver.uploads, len(driver.launches)) == (0, 0, 1)
    assert (found.batch, found.num_parts) == (len(lengths), case.cut["num_parts"])
    assert driver.waits == 0


def test_every_second_length(driver: StandIn) -> None:
    lengths = np.array([100, 2147480000, 7, -5, 300, 9], np.int32)
    found = cumla.plan_decode(driver.array(lengths)[::2], num_parts=4)
    same_plan(driver, found, cumla.plan_decode(lengths[::2].copy(), num_parts=4))


def test_what_waits_for_the_gpu(driver: StandIn) -> None:
    lengths = np.array([100, 0, 700], np.int32)
    plan, expected = (
        cumla.plan_decode(one, num_parts=4) for one in (driver.array(lengths), lengths)
    )
    assert plan.num_pieces == expected.num_pieces
    assert plan.pieces() == expected.pieces()
    plan.check_lengths("cache_seqlens", lengths)
    with pytest.raises(ArgumentError, match=r"KV length 5 for request 1; .* length 0 there"):
        plan.check_lengths("cache_seqlens", np.array([100, 5, 700], np.int32))
    assert driver.waits > 0


def test_a_plan_is_made_again_whenever_a_graph_runs(driver: StandIn) -> None:
    lengths = driver.array(np.array([100, 200], np.int32))
    stream = cupy.cuda.Stream.from_external(PlainStream())
    with driver.capture(stream) as graph:
        plan = cumla.plan_decode(lengths, num_parts=3)
    for values in ([100, 200], [0, 5000]):
        new = np.array(values, np.int32)
        driver.write(lengths, new)
        graph.launch()
        same_plan(driver, plan, cumla.plan_decode(new, num_parts=3))


class PlainStream:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 77


def test_stream_and_device(driver: StandIn) -> None:
    lengths = driver.array(np.array([100, 200], np.int32), device=1)
    plan = cumla.plan_decode(lengths, num_parts=3, stream=77)
    assert plan.num_splits.data.device_id == 1
    (launch,) = driver.launches
    assert (launch.device, launch.stream) == (1, 77)
    assert (driver.device, len(driver.streams)) == (0, 1)


@pytest.mark.parametrize(
    ("wrong", "error", "argument"),
    [
        ({"kv_lens": np.zeros(2, np.int64)}, ArgumentTypeError, "kv_lens"),
        ({"kv_lens": np.zeros((2, 1), np.int32)}, ArgumentError, "kv_lens"),
        ({"kv_lens": np.zeros(0, np.int32)}, ArgumentError, "kv_lens"),
        ({"num_parts": None}, ArgumentError, "num_parts"),
        ({"num_parts": None, "split_blocks": 4}, ArgumentError, "num_parts"),
        ({"num_parts": 1, "split_blocks": 4}, ArgumentError, "num_parts"),
        ({"num_parts": 0}, ArgumentError, "num_parts"),
        ({"num_parts": 2.0}, ArgumentTypeError, "num_parts"),
        ({"split_blocks": 0}, ArgumentError, "split_blocks"),
        ({"block_size": 0}, ArgumentError, "block_size"),
        ({"overhead": -1}, ArgumentError, "overhead"),
        ({"stream": "s"}, ArgumentTypeError, "stream"),
    ],
    ids=str,
)
def test_bad_plans(
    driver: StandIn, wrong: dict[str, Any], error: type[Exception], argument: str
) -> None:
    call = {"kv_lens": np.array([1, 2], np.int32), "num_parts": 3} | wrong
    call["kv_lens"] = driver.array(call["kv_lens"])
    with pytest.raises(error, match=f"^{argument}: got"):
        cumla.plan_decode(**call)
    assert not driver.launches


SPARSE = [
    {"batch": 2, "topk": 100, "topk_length": [5, 100]},
    {"batch": 2, "topk": 100, "topk_length": [[5, 0], [0, 64]], "extra_topk": 30},
    {
        "batch": 3,
        "topk": 130,
        "topk_length": [0, 130, 65],
        "extra_topk": 40,
        "extra_topk_length": [[0], [40], [3]],
        "block_size": 32,
    },
    {"batch": 1, "topk": 64, "extra_topk": 64, "extra_topk_length": [1]},
]


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_sparse_lengths_on_a_gpu(driver: StandIn, case: dict[str, Any]) -> None:
    on_cpu = {
        name: np.array(one, np.int32) if isinstance(one, list) else one
        for name, one in case.items()
    }
    on_gpu = {
        name: driver.array(one) if isinstance(one, np.ndarray) else one
        for name, one in on_cpu.items()
    }
    found = cumla.sparse_kv_lengths(**on_gpu)
    assert isinstance(found, cupy.ndarray)
    expected = cumla.sparse_kv_lengths(**on_cpu)
    assert (driver.numpy(found) == expected).all()
    assert found.dtype == np.int32
    assert (driver.waits, driver.uploads) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "argument"),
    [
        ({"topk_length": np.zeros(2, np.int64)}, "topk_length"),
        ({"topk_length": np.zeros(3, np.int32)}, "topk_length"),
        ({"topk_length": np.zeros((2, 0), np.int32)}, "topk_length"),
        ({"extra_topk_length": np.zeros((2, 1, 1), np.int32)}, "extra_topk_length"),
        ({"batch": 0}, "batch"),
        ({"topk": -1}, "topk"),
        ({"extra_topk": "5"}, "extra_topk"),
        ({"block_size": 0}, "block_size"),
    ],
    ids=str,
)
def test_bad_sparse_lengths(driver: StandIn, wrong: dict[str, Any], argument: str) -> None:
    call = {"batch": 2, "topk": 9, "topk_length": np.zeros(2, np.int32)} | wrong
    moved = {
        name: driver.array(one) if isinstance(one, np.ndarray) else one
        for name, one in call.items()
    }
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}: got"):
        cumla.sparse_kv_lengths(**moved)
    assert not driver.launches


def test_streams_are_for_gpus() -> None:
    lengths = np.array([3], np.int32)
    with pytest.raises(ArgumentError, match=r"^stream: "):
        cumla.plan_decode(lengths, num_parts=1, stream=5)
    with pytest.raises(ArgumentError, match=r"^stream: "):
        cumla.sparse_kv_lengths(1, 5, lengths, stream=5)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 2, 9, 7), (128, 1, 128, 264)], ids=str)
def test_a_workspace_holds_just_what_a_call_takes(
    driver: StandIn, sizes: tuple[int, int, int, int]
) -> None:
    b, s_q, h_q, parts = sizes
    need = cumla.decode_workspace_bytes(*sizes)
    assert need % ALIGNMENT == 0
    shapes = [
        ((b + parts, s_q, h_q, 512), np.float32),
        ((b + parts, s_q, h_q), np.float32),
        ((parts, 8), np.int32),
        ((b + 1,), np.int32),
        ((b,), np.int32),
        ((b + 1,), np.int64),
        ((parts + 1, 4), np.int32),
    ]

    def take(call: GpuCall, memory: Any) -> None:
        with call:
            for shape, dtype in shapes:
                call.empty(shape, dtype)

    pretended = cupy.ndarray(need, np.uint8, cupy.empty(1, np.uint8).data)
    device = GpuDevice()
    take(device.call(workspace=pretended), pretended)
    with pytest.raises(ArgumentError, match=r"^workspace: "):
        take(device.call(workspace=pretended[: need - ALIGNMENT]), pretended)


@pytest.mark.parametrize("name", ["b", "s_q", "h_q", "num_parts"])
@pytest.mark.parametrize("wrong", [0, -1, 1.5, None])
def test_bad_workspace_sizes(name: str, wrong: Any) -> None:
    sizes = {"b": 1, "s_q": 1, "h_q": 1, "num_parts": 1} | {name: wrong}
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{name}: got"):
        cumla.decode_workspace_bytes(**sizes)
