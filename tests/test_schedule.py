"""The decode schedule: known plans to the number, a slow model that deals out block by block, and
invariants of random plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cumla.checks import ArgumentError, ArgumentTypeError
from cumla.schedule import (
    METADATA_FIELDS,
    DecodePlan,
    Piece,
    dense_num_parts,
    plan_decode,
    sparse_kv_lengths,
    sparse_num_parts,
)

Int32 = NDArray[np.int32]
INT32_MAX = 2**31 - 1


def i32(values: Any) -> Int32:
    return np.array(values, np.int32)


def block_counts(kv_lens: Sequence[int], block_size: int) -> list[int]:
    return [-(-length // block_size) for length in kv_lens]


# ------------------------------------------------------------------------------- known plans


def check_known(plan: DecodePlan, num_splits: list[int], rows: Sequence[tuple[int, ...]]) -> None:
    """The plan's splits and its working rows, given without the pad; the other parts are idle."""
    assert plan.num_splits.tolist() == num_splits
    idle = plan.num_parts - len(rows)
    want = [[*row, 0] for row in rows] + [[plan.batch, 0, 0, 0, 0, 0, 0, 0]] * idle
    assert plan.tile_scheduler_metadata.tolist() == want


def test_short_requests_share_a_part_and_a_long_one_is_cut() -> None:
    plan = plan_decode(i32([0, 1, 64, 65, 4096]), num_parts=4)
    check_known(
        plan,
        [0, 1, 2, 3, 4, 7],
        [
            (0, 3, 0, 2, 0, 0, 0),
            (4, 4, 0, 24, 0, 1, 1),
            (4, 4, 24, 48, 1, 1, 1),
            (4, 4, 48, 64, 2, 1, 1),
        ],
    )
    assert plan.pieces() == [
        Piece(request=0, fragment=0, slot=0, begin_block=0, end_block=0),
        Piece(request=1, fragment=0, slot=1, begin_block=0, end_block=1),
        Piece(request=2, fragment=0, slot=2, begin_block=0, end_block=1),
        Piece(request=3, fragment=0, slot=3, begin_block=0, end_block=2),
        Piece(request=4, fragment=0, slot=4, begin_block=0, end_block=24),
        Piece(request=4, fragment=1, slot=5, begin_block=24, end_block=48),
        Piece(request=4, fragment=2, slot=6, begin_block=48, end_block=64),
    ]


def test_parts_that_begin_and_end_inside_requests() -> None:
    check_known(
        plan_decode(i32([4096] * 3), num_parts=7),
        [0, 3, 6, 9],
        [
            (0, 0, 0, 30, 0, 1, 1),
            (0, 0, 30, 60, 1, 1, 1),
            (0, 1, 60, 21, 2, 1, 1),
            (1, 1, 21, 51, 1, 1, 1),
            (1, 2, 51, 12, 2, 1, 1),
            (2, 2, 12, 42, 1, 1, 1),
            (2, 2, 42, 64, 2, 1, 1),
        ],
    )


def test_one_long_request_on_many_parts() -> None:
    # 313 blocks: 104 parts do three, the next does one, 27 nothing.
    rows = [(0, 0, 3 * i, min(3 * i + 3, 313), i, 1, 1) for i in range(105)]
    check_known(plan_decode(i32([20000]), num_parts=132), [0, 105], rows)


def test_sparse_plan_with_all_indices() -> None:
    rows = [
        (request, request, 3 * i, min(3 * i + 3, 32), i, 1, 1)
        for request in range(4)
        for i in range(11)
    ]
    kv_lens = sparse_kv_lengths(4, 2048)
    check_known(plan_decode(kv_lens, num_parts=66), [0, 11, 22, 33, 44], rows)


def test_sparse_plan_with_lengths_and_an_extra_pool() -> None:
    kv_lens = sparse_kv_lengths(4, 128, i32([0, 1, 64, 128]), extra_topk=512)
    check_known(
        plan_decode(kv_lens, num_parts=5, overhead=3),
        [0, 1, 2, 3, 4],
        [
            (0, 0, 0, 9, 0, 0, 0),
            (1, 1, 0, 9, 0, 0, 0),
            (2, 2, 0, 9, 0, 0, 0),
            (3, 3, 0, 10, 0, 0, 0),
        ],
    )


def test_fixed_splits_cut_each_request_alone() -> None:
    check_known(
        plan_decode(i32([130, 0, 64, 256]), split_blocks=2),
        [0, 2, 3, 4, 6],
        [
            (0, 0, 0, 2, 0, 1, 1),
            (0, 0, 2, 3, 1, 1, 1),
            (1, 1, 0, 0, 0, 0, 0),
            (2, 2, 0, 1, 0, 0, 0),
            (3, 3, 0, 2, 0, 1, 1),
            (3, 3, 2, 4, 1, 1, 1),
        ],
    )


# ---------------------------------------------------------------------- the slow model and fuzz


def dealt_block_by_block(
    kv_lens: Sequence[int], num_parts: int, block_size: int, overhead: int
) -> list[list[int]]:
    """For every block of every request (an empty request has one): the part that does it."""
    blocks = [max(1, count) for count in block_counts(kv_lens, block_size)]
    payload = -(-sum(count + overhead for count in blocks) // num_parts) + overhead
    owner: list[list[int]] = [[] for _ in blocks]
    request = 0
    for part in range(num_parts):
        budget = payload
        while request < len(blocks):
            left = blocks[request] - len(owner[request])
            if budget >= left + overhead:
                budget -= overhead
                for _ in range(left):
                    owner[request].append(part)
                    budget -= 1
                request += 1
                continue
            budget -= overhead
            while budget > 0:
                owner[request].append(part)
                budget -= 1
            break
    assert [len(one) for one in owner] == blocks
    return owner


def model_arrays(
    kv_lens: Sequence[int], num_parts: int, owner: list[list[int]]
) -> tuple[list[list[int]], list[int]]:
    """Metadata and num_splits, from who does which block."""
    rows = []
    for part in range(num_parts):
        mine = [request for request, parts in enumerate(owner) if part in parts]
        if not mine:
            rows.append([len(owner)] + [0] * 7)
            continue
        first, last = mine[0], mine[-1]
        begin_block = owner[first].index(part)
        end_block = len(owner[last]) - owner[last][::-1].index(part) if kv_lens[last] else 0
        fragment = len(set(owner[first][:begin_block]))
        flags = [int(len(set(owner[one])) > 1) for one in (first, last)]
        rows.append([first, last, begin_block, end_block, fragment, *flags, 0])
    num_splits = [0]
    for parts in owner:
        num_splits.append(num_splits[-1] + len(set(parts)))
    return rows, num_splits


BLOCK_SIZES = st.sampled_from([1, 2, 16, 64, 128])
NUM_PARTS = st.one_of(st.integers(1, 12), st.integers(1, 300))
OVERHEADS = st.integers(0, 8)
EDGE_LENGTHS = st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129])


def batches(longest: int, max_size: int) -> st.SearchStrategy[list[int]]:
    lengths = st.one_of(EDGE_LENGTHS, st.integers(0, longest))
    return st.lists(lengths, min_size=1, max_size=max_size)


@settings(max_examples=250, deadline=None)
@given(batches(600, 20), NUM_PARTS, BLOCK_SIZES, OVERHEADS)
@example([0], 1, 64, 0)
@example([0] * 5, 300, 64, 8)
@example([1, 0, 600, 0], 3, 1, 0)
@example([600, 0], 2, 1, 8)
def test_equals_the_block_by_block_model(
    kv_lens: list[int], num_parts: int, block_size: int, overhead: int
) -> None:
    plan = plan_decode(i32(kv_lens), num_parts=num_parts, block_size=block_size, overhead=overhead)
    owner = dealt_block_by_block(kv_lens, num_parts, block_size, overhead)
    rows, num_splits = model_arrays(kv_lens, num_parts, owner)
    assert plan.tile_scheduler_metadata.tolist() == rows
    assert plan.num_splits.tolist() == num_splits


def check_plan(plan: DecodePlan) -> None:
    """What must hold of every plan, whatever made it."""
    batch, num_parts = plan.batch, plan.num_parts
    metadata, num_splits = plan.tile_scheduler_metadata, plan.num_splits
    assert metadata.dtype == num_splits.dtype == plan.kv_lens.dtype == np.int32
    assert metadata.shape == (num_parts, len(METADATA_FIELDS))
    assert metadata.flags.c_contiguous
    assert num_splits.shape == (batch + 1,)

    # Each block of each request once and in order, by pieces that are not empty.
    pieces = plan.pieces()
    ends = block_counts(plan.kv_lens.tolist(), plan.block_size)
    done = [0] * batch
    fragments = [0] * batch
    for slot, piece in enumerate(pieces):
        assert piece.slot == slot
        assert piece.fragment == fragments[piece.request]
        assert piece.begin_block == done[piece.request]
        assert piece.end_block > piece.begin_block or ends[piece.request] == 0
        done[piece.request] = piece.end_block
        fragments[piece.request] += 1
    assert [piece.request for piece in pieces] == sorted(piece.request for piece in pieces)
    assert done == ends
    assert all(fragments[request] == 1 for request in range(batch) if ends[request] == 0)
    assert num_splits.tolist() == np.cumsum([0, *fragments]).tolist()
    assert plan.num_pieces == len(pieces)

    # Rows: idle ones last, flags as the number of pieces says.
    working = metadata[metadata[:, 0] < batch]
    assert np.array_equal(working, metadata[: len(working)])
    assert not metadata[len(working) :, 1:].any()
    assert (metadata[len(working) :, 0] == batch).all()
    several = np.diff(num_splits) > 1
    assert np.array_equal(working[:, 5], several[working[:, 0]])
    assert np.array_equal(working[:, 6], several[working[:, 1]])
    assert not metadata[:, 7].any()


def check_loads(plan: DecodePlan, overhead: int) -> None:
    """No part of a balanced plan does more than its budget; the pieces fit in the workspace."""
    counts = [max(1, one) for one in block_counts(plan.kv_lens.tolist(), plan.block_size)]
    payload = -(-(sum(counts) + overhead * plan.batch) // plan.num_parts) + overhead
    pieces = plan.pieces()
    assert len(pieces) <= plan.batch + plan.num_parts - 1
    taken = iter(pieces)
    for row in plan.tile_scheduler_metadata.tolist():
        if row[0] == plan.batch:
            continue
        mine = [next(taken) for _ in range(row[0], row[1] + 1)]
        assert sum(max(1, one.end_block - one.begin_block) + overhead for one in mine) <= payload
    assert next(taken, None) is None


@settings(max_examples=250, deadline=None)
@given(batches(INT32_MAX, 40), NUM_PARTS, BLOCK_SIZES, OVERHEADS)
@example([INT32_MAX] * 40, 7, 1, 8)
@example([INT32_MAX] * 40, 300, 128, 0)
def test_invariants_of_balanced_plans(
    kv_lens: list[int], num_parts: int, block_size: int, overhead: int
) -> None:
    plan = plan_decode(i32(kv_lens), num_parts=num_parts, block_size=block_size, overhead=overhead)
    assert (plan.num_parts, plan.batch, plan.block_size) == (num_parts, len(kv_lens), block_size)
    check_plan(plan)
    check_loads(plan, overhead)


@settings(max_examples=150, deadline=None)
@given(batches(3000, 12), st.integers(1, 40), BLOCK_SIZES, OVERHEADS)
@example([INT32_MAX, 0, INT32_MAX], 2**24, 64, 5)
@example([INT32_MAX, 1], INT32_MAX, 1, 5)
def test_fixed_splits_do_not_depend_on_the_batch(
    kv_lens: list[int], split_blocks: int, block_size: int, overhead: int
) -> None:
    def plan(lengths: list[int]) -> DecodePlan:
        return plan_decode(
            i32(lengths), split_blocks=split_blocks, block_size=block_size, overhead=overhead
        )

    together = plan(kv_lens)
    check_plan(together)
    assert together.num_parts == together.num_pieces
    pieces = together.pieces()
    for request, length in enumerate(kv_lens):
        alone = plan([length]).pieces()
        mine = [
            dataclasses.replace(one, request=0, slot=one.fragment)
            for one in pieces
            if one.request == request
        ]
        assert mine == alone
        assert all(one.end_block - one.begin_block == split_blocks for one in alone[:-1])
        assert alone[-1].end_block - alone[-1].begin_block <= split_blocks


@pytest.mark.parametrize("how", [{"num_parts": 132}, {"num_parts": 50_000}, {"split_blocks": 64}])
def test_a_batch_far_beyond_one_warp(how: dict[str, int]) -> None:
    kv_lens = np.random.default_rng(7).integers(0, 5000, 100_000).astype(np.int32)
    plan = plan_decode(kv_lens, **how)
    check_plan(plan)
    if "num_parts" in how:
        check_loads(plan, overhead=5)


# ------------------------------------------------------------------------------- the plan object


def test_plan_holds_read_only_copies() -> None:
    kv_lens = i32([100, 200])
    for how in ({"num_parts": 2}, {"split_blocks": 1}):
        plan = plan_decode(kv_lens, **how)
        kv_lens[0] = 300
        assert plan.kv_lens.tolist() == [100, 200]
        kv_lens[0] = 100
        for array in (plan.kv_lens, plan.tile_scheduler_metadata, plan.num_splits):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


def test_pieces_do_not_read_the_other_fields_of_idle_parts() -> None:
    plan = plan_decode(i32([100, 200]), num_parts=5)
    poisoned = plan.tile_scheduler_metadata.copy()
    idle = poisoned[:, 0] == plan.batch
    assert idle.any()
    poisoned[idle, 1:] = 2_147_480_000
    poisoned[idle, 1] = plan.batch
    assert dataclasses.replace(plan, tile_scheduler_metadata=poisoned).pieces() == plan.pieces()


def test_plan_takes_strided_and_numpy_scalar_arguments() -> None:
    spread = i32([64, -1, 640, -1, 0, -1])
    plan = plan_decode(
        spread[::2],
        num_parts=np.int64(3),
        block_size=np.int32(16),
        overhead=np.int64(2),
    )
    assert type(plan.block_size) is int
    same = plan_decode(i32([64, 640, 0]), num_parts=3, block_size=16, overhead=2)
    assert np.array_equal(plan.tile_scheduler_metadata, same.tile_scheduler_metadata)


def test_check_lengths_accepts_equal_lengths() -> None:
    plan = plan_decode(i32([100, 200, 0]), num_parts=2)
    plan.check_lengths("cache_seqlens", i32([100, 200, 0]))


@pytest.mark.parametrize(
    ("kv_lens", "error", "parts"),
    [
        (i32([100, 201, 1]), ArgumentError, ["201 for request 1", "200", "plan_decode"]),
        (i32([100, 200, 1]), ArgumentError, ["1 for request 2", "length 0", "plan_decode"]),
        (i32([100, 200]), ArgumentError, ["batch of 2", "batch of 3", "plan_decode"]),
        (i32([[100, 200, 0]]), ArgumentError, ["[b]"]),
        (np.array([100, 200, 0]), ArgumentTypeError, ["int64", ".astype(int32)"]),
        ([100, 200, 0], ArgumentTypeError, ["list"]),
    ],
)
def test_check_lengths_refuses_others(
    kv_lens: Any, error: type[Exception], parts: list[str]
) -> None:
    plan = plan_decode(i32([100, 200, 0]), num_parts=2)
    with pytest.raises(error) as caught:
        plan.check_lengths("cache_seqlens", kv_lens)
    message = str(caught.value)
    assert message.startswith("cache_seqlens: got ")
    for part in parts:
        assert part in message


# --------------------------------------------------------------------------------- sparse lengths


@pytest.mark.parametrize(
    ("arguments", "options", "want"),
    [
        ((3, 2048), {}, [2048] * 3),
        ((2, 0), {}, [1, 1]),
        ((4, 128, i32([0, 1, 65, 128])), {}, [1, 1, 65, 128]),
        # The longest of a request's queries counts, for each pool by itself.
        ((2, 128, i32([[3, 100, 7], [0, 0, 0]])), {}, [100, 1]),
        ((2, 128, i32([[3, 70], [0, 0]]), 32, i32([[9, 0], [0, 32]])), {}, [137, 96]),
        # Main tokens fill whole blocks, and at least one, before the extra tokens start.
        ((4, 128, i32([0, 1, 65, 128]), 512), {}, [576, 576, 640, 640]),
        ((2, 128, None, 512, i32([0, 5])), {}, [128, 133]),
        ((1, 100, None, 7), {}, [135]),
        ((1, 100, None, 7), {"block_size": 16}, [119]),
        ((1, 100), {"block_size": 16}, [100]),
        ((1, INT32_MAX), {}, [INT32_MAX]),
    ],
)
def test_sparse_kv_lengths(
    arguments: tuple[Any, ...], options: dict[str, Any], want: list[int]
) -> None:
    lengths = sparse_kv_lengths(*arguments, **options)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == want


# ---------------------------------------------------------------------------------- parts per GPU


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ((132, 1, 128, 1), 66),
        ((132, 2, 128, 1), 33),
        ((132, 4, 128, 1), 16),
        ((132, 1, 16, 1), 132),
        ((132, 4, 16, 1), 132),
        ((132, 5, 16, 1), 66),
        ((132, 1, 128, 2), 66),
        ((132, 2, 48, 2), 66),
        ((132, 3, 48, 2), 33),
        ((132, 1, 64, 64), 2),
        ((132, 1, 256, 256), 1),
        ((1, 100, 128, 1), 1),
    ],
)
def test_dense_num_parts(arguments: tuple[int, int, int, int], want: int) -> None:
    assert dense_num_parts(*arguments) == want


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ((132, 1, 128), 66),
        ((132, 2, 128), 33),
        ((132, 3, 128), 22),
        ((132, 2, 64), 66),
        ((132, 4, 16), 33),
        ((132, 1, 65), 66),
        ((132, 1, 1), 132),
        ((148, 5, 64), 29),
        ((132, 200, 64), 1),
    ],
)
def test_sparse_num_parts(arguments: tuple[int, int, int], want: int) -> None:
    assert sparse_num_parts(*arguments) == want


# ---------------------------------------------------------------------------------------- refusals


def planned(kv_lens: Any = None, **options: Any) -> Callable[[], object]:
    lengths = i32([1, 2, 3]) if kv_lens is None else kv_lens
    return lambda: plan_decode(lengths, **options)


def sparse(*arguments: Any, **options: Any) -> Callable[[], object]:
    return lambda: sparse_kv_lengths(*arguments, **options)


BAD: list[tuple[Callable[[], object], type[Exception], str, list[str]]] = [
    (planned([1, 2], num_parts=1), ArgumentTypeError, "kv_lens", ["list", "numpy.asarray"]),
    (planned(np.array([1, 2]), num_parts=1), ArgumentTypeError, "kv_lens", ["int64", ".astype"]),
    (planned(np.ones(2), num_parts=1), ArgumentTypeError, "kv_lens", ["float64", ".astype"]),
    (planned(i32([[1, 2]]), num_parts=1), ArgumentError, "kv_lens", ["2 dimensions", "[b]"]),
    (planned(i32([]), num_parts=1), ArgumentError, "kv_lens", ["at least one"]),
    (planned(i32([4, -1, -2]), num_parts=1), ArgumentError, "kv_lens", ["-1 at [1]", ">= 0"]),
    (planned(), ArgumentError, "num_parts", ["num_parts=None", "exactly one"]),
    (
        planned(num_parts=4, split_blocks=2),
        ArgumentError,
        "num_parts",
        ["num_parts=4", "split_blocks=2", "exactly one"],
    ),
    (planned(num_parts=0), ArgumentError, "num_parts", ["got 0", "[1, "]),
    # Three requests: one slot number more than int32 has.
    (planned(num_parts=2**31 - 2), ArgumentError, "num_parts", [f"[1, {2**31 - 3}]"]),
    (planned(num_parts=2.0), ArgumentTypeError, "num_parts", ["2.0", "integer"]),
    (planned(num_parts=True), ArgumentTypeError, "num_parts", ["True", "integer"]),
    (planned(split_blocks=0), ArgumentError, "split_blocks", ["got 0", "[1, "]),
    (planned(split_blocks=2**31), ArgumentError, "split_blocks", [str(2**31)]),
    (planned(split_blocks="8"), ArgumentTypeError, "split_blocks", ["'8'", "integer"]),
    (
        planned(i32([INT32_MAX, 0]), split_blocks=1, block_size=1),
        ArgumentError,
        "split_blocks",
        [f"{2**31} pieces", str(INT32_MAX), "larger"],
    ),
    (planned(num_parts=1, block_size=0), ArgumentError, "block_size", ["got 0"]),
    (planned(num_parts=1, block_size=2**31), ArgumentError, "block_size", [str(2**31)]),
    (planned(split_blocks=1, block_size=1.5), ArgumentTypeError, "block_size", ["1.5"]),
    (planned(num_parts=1, overhead=-1), ArgumentError, "overhead", ["got -1", "[0, "]),
    (planned(num_parts=1, overhead=2**31), ArgumentError, "overhead", [str(2**31)]),
    (planned(split_blocks=1, overhead=-1), ArgumentError, "overhead", ["got -1"]),
    (planned(num_parts=1, overhead=None), ArgumentTypeError, "overhead", ["None"]),
    (sparse(0, 64), ArgumentError, "batch", ["got 0"]),
    (sparse(2, -1), ArgumentError, "topk", ["got -1"]),
    (sparse(2, 2**31), ArgumentError, "topk", [str(2**31)]),
    (sparse(2, 64, [1, 2]), ArgumentTypeError, "topk_length", ["list"]),
    (sparse(2, 64, np.array([1, 2])), ArgumentTypeError, "topk_length", ["int64", ".astype"]),
    (sparse(2, 64, i32([1, 2, 3])), ArgumentError, "topk_length", ["(3,)", "b = 2"]),
    (sparse(2, 64, i32([[1, 2, 3]])), ArgumentError, "topk_length", ["(1, 3)", "b = 2"]),
    (sparse(2, 64, i32([[], []])), ArgumentError, "topk_length", ["(2, 0)", "s_q >= 1"]),
    (sparse(1, 64, i32([[[1]]])), ArgumentError, "topk_length", ["(1, 1, 1)", "[b, s_q]"]),
    (sparse(1, 64, i32(1)), ArgumentError, "topk_length", ["()", "[b, s_q]"]),
    (sparse(2, 64, i32([64, 65])), ArgumentError, "topk_length", ["65 at [1]", "[0, 64]", "topk"]),
    (sparse(2, 64, i32([[0, 0], [1, -1]])), ArgumentError, "topk_length", ["-1 at [1, 1]"]),
    (sparse(2, 64, None, -1), ArgumentError, "extra_topk", ["got -1"]),
    (sparse(2, 64, None, 2**31), ArgumentError, "extra_topk", [str(2**31)]),
    (
        sparse(2, 64, None, 8, i32([9, 0])),
        ArgumentError,
        "extra_topk_length",
        ["9 at [0]", "[0, 8]", "extra_topk is"],
    ),
    # Lengths without an extra pool.
    (sparse(1, 64, None, 0, i32([1])), ArgumentError, "extra_topk_length", ["[0, 0]"]),
    (sparse(1, 64, None, 8, i32([1, 1])), ArgumentError, "extra_topk_length", ["b = 1"]),
    (sparse(1, 64, block_size=0), ArgumentError, "block_size", ["got 0"]),
    (sparse(1, INT32_MAX, None, 1), ArgumentError, "extra_topk", [str(2**31 + 1), "fewer"]),
    (lambda: dense_num_parts(0, 1, 1, 1), ArgumentError, "num_sms", ["got 0"]),
    (lambda: dense_num_parts(1, 0, 1, 1), ArgumentError, "s_q", ["got 0"]),
    (lambda: dense_num_parts(1, 1, 0, 1), ArgumentError, "h_q", ["got 0"]),
    (lambda: dense_num_parts(1, 1, 1, 0), ArgumentError, "h_kv", ["got 0"]),
    (lambda: dense_num_parts(132, 1, 9, 2), ArgumentError, "h_q", ["got 9", "multiple", "2"]),
    (lambda: sparse_num_parts(0, 1, 1), ArgumentError, "num_sms", ["got 0"]),
    (lambda: sparse_num_parts(1, 0, 1), ArgumentError, "s_q", ["got 0"]),
    (lambda: sparse_num_parts(1, 1, 0), ArgumentError, "h_q", ["got 0"]),
    (
        lambda: sparse_num_parts(1, 1, 1.0),  # type: ignore[arg-type]
        ArgumentTypeError,
        "h_q",
        ["1.0"],
    ),
]


@pytest.mark.parametrize(("call", "error", "argument", "parts"), BAD)
def test_bad_arguments_are_refused(
    call: Callable[[], object], error: type[Exception], argument: str, parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{argument}: got ")
    for part in parts:
        assert part in message
