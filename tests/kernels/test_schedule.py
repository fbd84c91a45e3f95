"""The planner's kernels, number for number against cumla.schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from poison import ABSURD_ID, poison

from cumla.backends.simulated import SimulatedDevice
from cumla.kernels import schedule as kernels
from cumla.schedule import plan_decode, sparse_kv_lengths

Int32 = NDArray[np.int32]
INT32_MAX = 2**31 - 1
TARGETS = ("sm_80", "sm_89", "sm_90a", "sm_120")
DEVICES = {target: SimulatedDevice(target) for target in TARGETS}
SM90 = DEVICES["sm_90a"]


def i32(values: Any) -> Int32:
    return np.array(values, np.int32)


@dataclass
class Planned:
    """What the kernel wrote."""

    kv_lens: Int32
    metadata: Int32
    num_splits: Int32

    def check(self, kv_lens: Int32, **how: Any) -> None:
        """It is the plan of cumla.schedule; rows that it has in excess are idle."""
        want = plan_decode(kv_lens, **how)
        assert self.kv_lens.tolist() == kv_lens.tolist()
        assert self.num_splits.tolist() == want.num_splits.tolist()
        np.testing.assert_array_equal(self.metadata[: want.num_parts], want.tile_scheduler_metadata)
        idle = self.metadata[want.num_parts :]
        assert (idle[:, 0] == want.batch).all()
        assert not idle[:, 1:].any()


def run(
    device: SimulatedDevice,
    batch: int,
    num_parts: int,
    *,
    block_size: int = 64,
    overhead: int = 5,
    split_blocks: int | None = None,
    wants_lengths: bool = True,
    **lengths: Any,
) -> Planned:
    """Launch it. What lies beyond an output is not the kernel's memory at all."""
    metadata = poison(np.empty((num_parts, 8), np.int32))
    num_splits = poison(np.empty(batch + 1, np.int32))
    kv_lens = poison(np.empty(batch, np.int32))
    with device.call() as call:
        kernels.plan_decode(
            call,
            **{k: call.read(v) if isinstance(v, np.ndarray) else v for k, v in lengths.items()},
            num_parts=num_parts,
            block_size=block_size,
            overhead=overhead,
            split_blocks=split_blocks,
            metadata=call.write(metadata),
            num_splits=call.write(num_splits),
            lengths_out=call.write(kv_lens) if wants_lengths else None,
        )
    return Planned(kv_lens, metadata, num_splits)


def check_balanced(
    kv_lens: Int32, num_parts: int, *, device: SimulatedDevice = SM90, **how: int
) -> None:
    got = run(device, len(kv_lens), num_parts, kv_lens=kv_lens, **how)
    got.check(kv_lens, num_parts=num_parts, **how)


# ------------------------------------------------------------------------------- known plans


def test_a_known_plan() -> None:
    got = run(SM90, 5, 4, kv_lens=i32([0, 1, 64, 65, 4096]))
    assert got.num_splits.tolist() == [0, 1, 2, 3, 4, 7]
    assert got.metadata.tolist() == [
        [0, 3, 0, 2, 0, 0, 0, 0],
        [4, 4, 0, 24, 0, 1, 1, 0],
        [4, 4, 24, 48, 1, 1, 1, 0],
        [4, 4, 48, 64, 2, 1, 1, 0],
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_published_plans(target: str) -> None:
    device = DEVICES[target]
    check_balanced(i32([0, 1, 64, 65, 4096]), 4, device=device)
    check_balanced(i32([4096] * 3), 7, device=device)
    check_balanced(i32([20000]), 132, device=device)
    got = run(device, 4, 66, topk=2048)
    got.check(sparse_kv_lengths(4, 2048), num_parts=66)
    assert got.num_splits.tolist() == [0, 11, 22, 33, 44]
    length = i32([0, 1, 64, 128])
    got = run(device, 4, 5, topk=128, topk_length=length, extra_topk=512, overhead=3)
    got.check(sparse_kv_lengths(4, 128, length, 512), num_parts=5, overhead=3)
    assert got.metadata[:, 3].tolist() == [9, 9, 9, 10, 0]


# --------------------------------------------------------------------------------- all others

BLOCK_SIZES = st.sampled_from([1, 2, 16, 64, 128, 100])
NUM_PARTS = st.one_of(st.integers(1, 12), st.integers(1, 200))
OVERHEADS = st.integers(0, 8)
EDGE_LENGTHS = st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129])


def batches(longest: int, max_size: int) -> st.SearchStrategy[list[int]]:
    lengths = st.one_of(EDGE_LENGTHS, st.integers(0, longest))
    return st.lists(lengths, min_size=1, max_size=max_size)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.one_of(batches(600, 20), batches(INT32_MAX, 70)),
    NUM_PARTS,
    BLOCK_SIZES,
    OVERHEADS,
    st.sampled_from(TARGETS),
)
@example([0], 1, 64, 0, "sm_80")
@example([0] * 5, 200, 64, 8, "sm_80")
@example([1, 0, 600, 0], 3, 1, 0, "sm_80")
@example([600, 0], 2, 1, 8, "sm_80")
@example([INT32_MAX] * 40, 7, 1, 8, "sm_80")  # costs of more than 32 bits
@example([INT32_MAX, 0], 2, 1, INT32_MAX, "sm_80")
@example([64 * 33], 33, 64, 0, "sm_80")  # 32 and 33 parts within one request
@example([64 * 34], 34, 64, 0, "sm_80")
def test_balanced(
    kv_lens: list[int], num_parts: int, block_size: int, overhead: int, target: str
) -> None:
    check_balanced(
        i32(kv_lens), num_parts, device=DEVICES[target], block_size=block_size, overhead=overhead
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    batches(3000, 40),
    st.integers(1, 40),
    BLOCK_SIZES,
    st.integers(0, 40),
    st.sampled_from(TARGETS),
)
@example([INT32_MAX, 0, INT32_MAX], 2**24, 64, 0, "sm_80")
@example([INT32_MAX, 1], INT32_MAX, 1, 3, "sm_80")
def test_fixed(
    kv_lens: list[int], split_blocks: int, block_size: int, surplus: int, target: str
) -> None:
    how = {"split_blocks": split_blocks, "block_size": block_size}
    pieces = plan_decode(i32(kv_lens), **how).num_pieces
    got = run(DEVICES[target], len(kv_lens), pieces + surplus, kv_lens=i32(kv_lens), **how)
    got.check(i32(kv_lens), **how)


def random_lengths(batch: int, longest: int = 5000) -> Int32:
    random = np.random.default_rng(batch)
    lengths = random.integers(0, longest, batch, np.int32, endpoint=True)
    lengths[random.random(batch) < 0.1] = 0
    return lengths


@pytest.mark.parametrize(
    ("batch", "num_parts"),
    [
        *((33, 32), (64, 66), (128, 132), (1000, 7), (1024, 132), (1025, 200), (3000, 132)),
        *((32, 1), (33, 1), (1056, 1), (1057, 1), (4000, 1), (4000, 3)),  # long steps of the search
        *((10, 3000), (2, 1025)),  # more parts than threads
    ],
)
def test_large_batches(batch: int, num_parts: int) -> None:
    check_balanced(random_lengths(batch), num_parts)
    lengths = random_lengths(batch, 1000)
    pieces = plan_decode(lengths, split_blocks=3).num_pieces
    got = run(SM90, batch, pieces + 9, kv_lens=lengths, split_blocks=3)
    got.check(lengths, split_blocks=3)


@pytest.mark.parametrize("target", ["sm_89", "sm_90a"])
def test_a_batch_of_20000(target: str) -> None:
    """Its costs fit in the shared memory of the one and not in that of the other."""
    check_balanced(random_lengths(20_000), 132, device=DEVICES[target])


@pytest.mark.parametrize("batch", [12_638, 12_639])
def test_the_last_batch_that_fits_in_shared_memory(batch: int) -> None:
    device = DEVICES["sm_89"]
    check_balanced(random_lengths(batch), 20, device=device)
    expression = device.launches[-1][0].expression
    assert expression == f"cumla::plan_balanced<{'true' if batch == 12_638 else 'false'}>"


def test_more_requests_in_a_part_than_two_steps_of_the_search_take() -> None:
    check_balanced(np.zeros(40_000, np.int32), 1)  # 40,000 > 32 * 33 * 33
    check_balanced(np.zeros(40_000, np.int32), 9, overhead=0)


def test_parts_in_one_request_are_not_walked_one_by_one() -> None:
    device = SimulatedDevice("sm_90a", counters=True)

    def instructions(kv_lens: Int32) -> int:
        check_balanced(kv_lens, 660, device=device)
        counters = device.launches[-1][1].counters
        assert counters is not None
        return counters.total().warp_instructions

    assert 3 * instructions(i32([64 * 2000])) < instructions(i32([64 * 40] * 660))


# ------------------------------------------------------------------------------------ lengths


@dataclass(frozen=True)
class Sparse:
    batch: int
    topk: int
    s_q: int
    """Tokens that have a length each; 0: one length for each request."""
    extra_topk: int = 0
    extra_s_q: int = 0
    main_given: bool = True
    extra_given: bool = True
    block_size: int = 64


SPARSE = [
    Sparse(1, 1, 0),
    Sparse(7, 128, 0),
    Sparse(40, 2048, 3),
    Sparse(40, 100, 1, 512, 0),
    Sparse(9, 100, 2, 61, 4, block_size=16),
    Sparse(9, 100, 0, 61, 0, main_given=False),
    Sparse(9, 100, 2, 61, 0, extra_given=False, block_size=100),
    Sparse(3, 0, 0, main_given=False),
    Sparse(3, 0, 0, 64, 0, main_given=False, extra_given=False),
    Sparse(2000, 300, 2, 100, 2),
]


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_sparse_lengths(case: Sparse) -> None:
    random = np.random.default_rng(1)

    def lengths(s_q: int, topk: int) -> tuple[Int32, Int32]:
        """Of range, and others that count as much; both with gaps, the others with absurd ones."""
        shape = (case.batch, s_q) if s_q else (case.batch,)
        inside = random.integers(0, topk, shape, np.int32, endpoint=True)
        given = poison(np.empty([2 * size + 3 for size in shape], np.int32))
        given = given[(slice(2, 2 + 2 * case.batch, 2), *([slice(1, 1 + 2 * s_q, 2)] * bool(s_q)))]
        given[...] = inside
        given[inside == 0] = -(2**31)
        given[inside == topk] = random.choice(i32([ABSURD_ID, INT32_MAX, topk + 1]))
        return inside, given

    wants: list[Any] = [case.topk, None, case.extra_topk, None]
    arguments: dict[str, Any] = {"topk": case.topk, "extra_topk": case.extra_topk}
    if case.main_given:
        wants[1], arguments["topk_length"] = lengths(case.s_q, case.topk)
    if case.extra_topk and case.extra_given:
        wants[3], arguments["extra_topk_length"] = lengths(case.extra_s_q, case.extra_topk)
    kv_lens = sparse_kv_lengths(case.batch, *wants, block_size=case.block_size)
    for how in ({"num_parts": 13}, {"split_blocks": 2}):
        num_parts = plan_decode(kv_lens, block_size=case.block_size, **how).num_parts
        got = run(
            SM90,
            case.batch,
            num_parts,
            block_size=case.block_size,
            split_blocks=how.get("split_blocks"),
            **arguments,
        )
        got.check(kv_lens, block_size=case.block_size, **how)


@pytest.mark.parametrize("split_blocks", [None, 3])
def test_dense_lengths_out_of_range(split_blocks: int | None) -> None:
    wild = poison(np.empty((6, 2), np.int32))
    wild[:, 0] = [500, -1, 2**31 - 1, 0, -(2**31), 501]
    tame = i32([500, 0, 500, 0, 0, 500])
    how: dict[str, Any] = {"split_blocks": split_blocks} if split_blocks else {"num_parts": 16}
    got = run(
        SM90, 6, 16, kv_lens=wild[:, 0], max_length=500, block_size=50, split_blocks=split_blocks
    )
    got.check(tame, block_size=50, **how)


@pytest.mark.parametrize("split_blocks", [None, 2])
def test_nobody_has_to_want_the_lengths(split_blocks: int | None) -> None:
    lengths = i32([300, 0])
    got = run(SM90, 2, 4, kv_lens=lengths, split_blocks=split_blocks, wants_lengths=False)
    assert (got.kv_lens == ABSURD_ID).all()
    got.kv_lens = lengths
    got.check(lengths, **({"split_blocks": 2} if split_blocks else {"num_parts": 4}))


@pytest.mark.parametrize("room", [1, 2, 3, 5, 6])
def test_pieces_beyond_the_room_are_left_out(room: int) -> None:
    kv_lens = i32([130, 0, 64, 256])
    want = plan_decode(kv_lens, split_blocks=2)
    assert want.num_pieces == 6
    got = run(SM90, 4, room, kv_lens=kv_lens, split_blocks=2)
    assert got.metadata.tolist() == want.tile_scheduler_metadata[:room].tolist()
    assert got.num_splits.tolist() == np.minimum(want.num_splits, room).tolist()


def test_pieces_beyond_all_numbers() -> None:
    lengths = i32([INT32_MAX] * 5)
    got = run(SM90, 5, 40, kv_lens=lengths, split_blocks=1, block_size=1)
    assert got.num_splits.tolist() == [0, *[40] * 5]
    assert got.metadata[:, 0].tolist() == [0] * 40
    assert got.metadata[:, 3].tolist() == list(range(1, 41))


def test_launches_are_among_the_instances() -> None:
    known = {program for program, _, _ in kernels.instances(101_376)}
    device = SimulatedDevice("sm_89")
    check_balanced(i32([1]), 1, device=device)
    check_balanced(random_lengths(12_639), 1, device=device)
    run(device, 1, 1, kv_lens=i32([1]), split_blocks=1)
    assert {program for program, _ in device.launches} == known
