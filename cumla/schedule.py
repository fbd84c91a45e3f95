"""Split-KV decode schedule: which blocks of which request each part of the GPU works on.

This is the NumPy definition that the device's planner is held against, number for number.

A decode step has few query rows and long KV, so the KV of a request is cut in pieces that several
SMs work on; their partial results are combined afterwards. The unit of work is a block of
`block_size` KV tokens. A request of no tokens counts as one block: somebody has to write its
output. Next to its blocks, every piece costs `overhead` blocks: loading q, storing the result.

A *part* is what one SM (or a few: one per query tile) does: a run of requests, in order, of which
the first may start and the last may end in the middle. A *piece* is what a part does of one
request. Pieces are numbered across the batch, by request and then by block: the *slot*.

Two ways to cut:

balanced  All parts get the same budget of blocks and overhead. Fastest, but where a request is cut
          depends on its neighbours, so its rounding does too.
fixed     Every request is cut each `split_blocks` blocks, whatever else is in the batch, so its
          result has the same bits in every batch.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.checks import bad_value, check_array, check_dtype, check_in_range, check_int, check_shape

Array = NDArray[Any]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

METADATA_FIELDS = (
    "begin_req",
    "end_req",
    "begin_block",
    "end_block",
    "begin_fragment",
    "first_split",
    "last_split",
    "pad",
)
"""The columns of `DecodePlan.tile_scheduler_metadata`."""

_INT32_MAX = np.iinfo(np.int32).max
# The default plan on a CPU cuts every request each 1024 tokens: pieces for all threads even when
# the batch is small, and a request's bits do not depend on its batch or on the machine.
_CPU_SPLIT_BLOCKS = 16
# Query rows (heads, and tokens in the dense op) that one CTA handles.
_ROWS_PER_TILE = 64


@dataclass(frozen=True)
class Piece:
    """Blocks [begin_block, end_block) of one request, done by one part."""

    request: int
    fragment: int
    """Which of its request's pieces this is, from 0."""
    slot: int
    """Where its partial result goes: num_splits[request] + fragment."""
    begin_block: int
    end_block: int


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """Who does what in one decode step. Made by `plan_decode`; the arrays must not be changed.

    They are NumPy arrays, read-only, or, from lengths on a GPU, CuPy arrays. Of those `num_pieces`,
    `pieces` and `check_lengths` make copies on the host, which waits for the GPU.

    A row of `tile_scheduler_metadata` is a part (`METADATA_FIELDS`). It works on the requests
    begin_req to end_req, the last included; on the first from begin_block on, on the last up to
    end_block, that block excluded (0 for a request of no tokens), on those between wholly.
    begin_fragment is the number of the first request's pieces that earlier parts do. first_split
    and last_split are 1 if the first or last request has several pieces, so its result is partial;
    those between have one. The pad is 0. A part without work has begin_req == b, all else 0; such
    parts come last.
    """

    kv_lens: Int32
    """[b]: the lengths it was made for."""
    block_size: int
    """KV tokens in a block."""
    tile_scheduler_metadata: Int32
    """[num_parts, 8]."""
    num_splits: Int32
    """[b + 1]: how many pieces all the requests before this one have; the last is the total."""

    @property
    def batch(self) -> int:
        return len(self.kv_lens)

    @property
    def num_parts(self) -> int:
        return len(self.tile_scheduler_metadata)

    @property
    def num_pieces(self) -> int:
        return int(_on_host(self.num_splits)[-1])

    def pieces(self) -> list[Piece]:
        """All pieces in slot order, read from the metadata the way an attention kernel does.

        A request of no tokens has one piece, of no blocks: begin_block == end_block == 0.
        """
        blocks = _ceil_div(_on_host(self.kv_lens), self.block_size).tolist()
        first_slot = _on_host(self.num_splits).tolist()
        found = []
        for row in _on_host(self.tile_scheduler_metadata).tolist():
            begin_req, end_req, begin_block, end_block, begin_fragment = row[:5]
            if begin_req == self.batch:
                continue
            for request in range(begin_req, end_req + 1):
                fragment = begin_fragment if request == begin_req else 0
                begin = begin_block if request == begin_req else 0
                end = end_block if request == end_req else blocks[request]
                slot = first_slot[request] + fragment
                found.append(Piece(request, fragment, slot, begin, end))
        return found

    def check_lengths(self, argument: str, kv_lens: Array) -> None:
        """Raise unless the plan was made for just these lengths.

        A plan for other lengths leaves blocks out or reads blocks that are not there.

        Args:
            argument: what the caller calls the lengths, for the message.
            kv_lens: int32 [b].

        Raises:
            ArgumentError: another batch, or another length (the first such request is named).
            ArgumentTypeError: not an int32 NumPy array.
        """
        kv_lens = check_array(argument, kv_lens)
        check_dtype(argument, kv_lens, [np.int32])
        check_shape(argument, kv_lens, ["b"])
        fix = "Plan again: call cumla.plan_decode with the lengths of this step."
        if len(kv_lens) != self.batch:
            raise bad_value(
                argument,
                f"a batch of {len(kv_lens)}",
                f"the plan was made for a batch of {self.batch}",
                fix,
            )
        planned = _on_host(self.kv_lens)
        differs = kv_lens != planned
        if differs.any():
            request = int(differs.argmax())
            raise bad_value(
                argument,
                f"KV length {kv_lens[request]} for request {request}",
                f"the plan was made for length {planned[request]} there",
                fix,
            )


def plan_decode(
    kv_lens: Array,
    *,
    num_parts: int | None = None,
    split_blocks: int | None = None,
    block_size: int = 64,
    overhead: int = 5,
) -> DecodePlan:
    """Cut the KV of a batch in pieces and deal them out. Give num_parts or split_blocks, not both.

    Args:
        kv_lens: int32 [b], b >= 1, each >= 0: KV tokens of each request (cache_seqlens in the
            dense op, `sparse_kv_lengths` in the sparse one). Copied.
        num_parts: >= 1; balance the work over this many parts (see `dense_num_parts`). There are
            at most b + num_parts - 1 pieces; parts may stay without work.
        split_blocks: >= 1; cut every request each `split_blocks` blocks, its last piece may be
            shorter, and make each piece a part: num_parts == num_pieces.
        block_size: >= 1; KV tokens in a block.
        overhead: >= 0; what a piece costs beside its blocks, in blocks. For balancing only:
            with split_blocks it changes nothing.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
    """
    kv_lens = check_array("kv_lens", kv_lens)
    check_dtype("kv_lens", kv_lens, [np.int32])
    check_shape("kv_lens", kv_lens, ["b"])
    batch = len(kv_lens)
    if batch == 0:
        raise bad_value(
            "kv_lens", "no request", "a plan needs at least one", "Skip the call for empty batches."
        )
    check_in_range("kv_lens", kv_lens, None, "Pass the number of KV tokens of each request.")
    block_size = check_int("block_size", block_size, low=1, high=_INT32_MAX)
    overhead = check_int("overhead", overhead, low=0, high=_INT32_MAX)
    blocks = _ceil_div(kv_lens, block_size)
    if num_parts is not None and split_blocks is None:
        # All slot numbers, at most b + num_parts - 1 of them, must fit in int32.
        num_parts = check_int("num_parts", num_parts, low=1, high=_INT32_MAX - batch + 1)
        metadata, pieces = _balanced(blocks, num_parts, overhead)
    elif split_blocks is not None and num_parts is None:
        split_blocks = check_int("split_blocks", split_blocks, low=1, high=_INT32_MAX)
        metadata, pieces = _fixed(blocks, split_blocks)
    else:
        raise bad_value(
            "num_parts",
            f"num_parts={num_parts!r} and split_blocks={split_blocks!r}",
            "exactly one of the two must be given",
            "Pass num_parts for a balanced plan, split_blocks for one that no neighbour changes.",
        )
    num_splits = np.zeros(batch + 1, np.int32)
    num_splits[1:] = np.cumsum(pieces)
    plan = DecodePlan(kv_lens.copy(), block_size, metadata, num_splits)
    for array in (plan.kv_lens, plan.tile_scheduler_metadata, plan.num_splits):
        array.flags.writeable = False
    return plan


def plan_for_cpu(kv_lens: Array) -> DecodePlan:
    """The plan that the CPU uses for requests of `kv_lens` tokens if it was given none."""
    return plan_decode(kv_lens, split_blocks=_CPU_SPLIT_BLOCKS)


def _balanced(blocks: Int64, num_parts: int, overhead: int) -> tuple[Int32, Int64]:
    """Metadata [num_parts, 8] and pieces per request [b] of the balanced plan."""
    batch = len(blocks)
    # costs[i]: what the requests before i cost if nobody cuts them. Python's integers from here on.
    costs = [0, *np.cumsum(np.maximum(blocks, 1) + overhead).tolist()]
    # A part may lose up to `overhead` of its budget: by a cut, after which the rest of the request
    # costs the overhead once more, or by stopping where less is left than a cut would cost. Hence
    # the second term: every part but the last does at least its share of the total.
    payload = -(-costs[batch] // num_parts) + overhead
    ends = blocks.tolist()
    pieces = [1] * batch
    rows: list[tuple[int, ...]] = []
    request = block = 0
    while request < batch:
        begin_req, begin_block, begin_fragment = request, block, pieces[request] - 1
        # Take whole requests while the budget pays for them: one search instead of a walk.
        reach = costs[request] + block + payload
        request = bisect_right(costs, reach, lo=request) - 1
        # What is left pays for the head of the next one, its overhead first. Where nothing was
        # taken yet that comes out further than `block`, as payload > overhead.
        block = max(reach - costs[request] - overhead, 0) if request < batch else 0
        if block:
            pieces[request] += 1
            end_req, end_block = request, block
        else:
            end_req, end_block = request - 1, ends[request - 1]
        first_split, last_split = begin_block > 0, block > 0
        if begin_req == end_req:
            first_split = last_split = first_split or last_split
        rows.append(
            (begin_req, end_req, begin_block, end_block, begin_fragment, first_split, last_split, 0)
        )
    metadata = np.zeros((num_parts, len(METADATA_FIELDS)), np.int32)
    metadata[: len(rows)] = rows
    metadata[len(rows) :, 0] = batch
    return metadata, np.array(pieces, np.int64)


def _fixed(blocks: Int64, split_blocks: int) -> tuple[Int32, Int64]:
    """Metadata [pieces, 8] and pieces per request [b] of the plan with fixed splits."""
    pieces = np.maximum(_ceil_div(blocks, split_blocks), 1)
    total = int(pieces.sum())
    if total > _INT32_MAX:
        raise bad_value(
            "split_blocks",
            f"{split_blocks}, which makes {total} pieces",
            f"a plan has at most {_INT32_MAX}",
            "Pass larger split_blocks or a larger block_size.",
        )
    request = np.repeat(np.arange(len(blocks)), pieces)
    fragment = np.arange(total) - (np.cumsum(pieces) - pieces)[request]
    begin = fragment * split_blocks
    end = np.minimum(begin + split_blocks, blocks[request])
    split = pieces[request] > 1
    pad = np.zeros(total, np.int64)
    columns = (request, request, begin, end, fragment, split, split, pad)
    metadata = np.stack(columns, axis=1).astype(np.int32)
    return metadata, pieces


def sparse_kv_lengths(
    batch: int,
    topk: int,
    topk_length: Array | None = None,
    extra_topk: int = 0,
    extra_topk_length: Array | None = None,
    *,
    block_size: int = 64,
) -> Int32:
    """The KV lengths, int32 [b], that a sparse decode of this kind is planned with.

    A request's main tokens come first and fill at least one block. With an extra pool its tokens
    start at a block of their own, so that no block mixes two pools. Where the lengths differ
    between the queries of a request, the longest counts, for each pool by itself: all queries of
    a request follow one schedule.

    Args:
        batch: >= 1.
        topk: >= 0; the size of the indices' last dimension.
        topk_length: int32 [b] or [b, s_q], each in [0, topk]: how many of them count; None: all.
        extra_topk: >= 0; the same for the extra pool, 0 without one.
        extra_topk_length: int32 [b] or [b, s_q], each in [0, extra_topk]; None: all.
        block_size: >= 1; selected tokens in a block, the plan's block_size.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
    """
    batch = check_int("batch", batch, low=1)
    topk = check_int("topk", topk, low=0, high=_INT32_MAX)
    extra_topk = check_int("extra_topk", extra_topk, low=0, high=_INT32_MAX)
    block_size = check_int("block_size", block_size, low=1, high=_INT32_MAX)
    lengths = np.maximum(_selected("topk_length", topk_length, batch, "topk", topk), 1)
    extra = _selected("extra_topk_length", extra_topk_length, batch, "extra_topk", extra_topk)
    if extra_topk:
        lengths = _ceil_div(lengths, block_size) * block_size + extra
    longest = int(lengths.max())
    if longest > _INT32_MAX:
        raise bad_value(
            "extra_topk",
            f"{extra_topk}, with topk {topk} and block_size {block_size}",
            f"a request selects {longest} tokens with padding, more than {_INT32_MAX}",
            "Select fewer tokens.",
        )
    return lengths.astype(np.int32)


def _selected(
    argument: str, lengths: Array | None, batch: int, topk_argument: str, topk: int
) -> Int64:
    """Selected tokens of each request [b] in one pool."""
    if lengths is None:
        return np.full(batch, topk, np.int64)
    lengths = check_array(argument, lengths)
    check_dtype(argument, lengths, [np.int32])
    if lengths.ndim not in (1, 2) or len(lengths) != batch or lengths.size == 0:
        raise bad_value(
            argument,
            f"shape {lengths.shape}",
            f"it must be [b] or [b, s_q] with b = {batch} and s_q >= 1",
            "Pass one length for each request, or one for each of its queries.",
        )
    check_in_range(
        argument, lengths, topk, f"{topk_argument} is how many indices there are to count from."
    )
    longest: Int64 = lengths.reshape(batch, -1).max(axis=1).astype(np.int64)
    return longest


def dense_num_parts(num_sms: int, s_q: int, h_q: int, h_kv: int) -> int:
    """The parts that fill `num_sms` SMs once in a dense decode: a CTA each, per query tile.

    A tile holds 64 of the s_q * h_q / h_kv query rows that share a KV head. At least 1.

    Raises:
        ArgumentError, ArgumentTypeError: naming it; all must be >= 1 and h_q a multiple of h_kv.
    """
    num_sms = check_int("num_sms", num_sms, low=1)
    s_q = check_int("s_q", s_q, low=1)
    h_q = check_int("h_q", h_q, low=1)
    h_kv = check_int("h_kv", h_kv, low=1)
    if h_q % h_kv:
        raise bad_value(
            "h_q",
            h_q,
            f"it must be a multiple of h_kv, {h_kv}",
            "Pad the query heads so that each KV head has the same number of them.",
        )
    rows = s_q * (h_q // h_kv)
    return max(num_sms // (h_kv * -(-rows // _ROWS_PER_TILE)), 1)


def sparse_num_parts(num_sms: int, s_q: int, h_q: int) -> int:
    """The parts that fill `num_sms` SMs once in a sparse decode: a CTA each, per query tile.

    Each query token selects its own KV, so a tile holds 64 heads of one token. At least 1.

    Raises:
        ArgumentError, ArgumentTypeError: naming the argument; all must be >= 1.
    """
    num_sms = check_int("num_sms", num_sms, low=1)
    s_q = check_int("s_q", s_q, low=1)
    h_q = check_int("h_q", h_q, low=1)
    return max(num_sms // (s_q * -(-h_q // _ROWS_PER_TILE)), 1)


def _on_host(array: Array) -> Array:
    return array if isinstance(array, np.ndarray) else array.get()


def _ceil_div(values: Array, divisor: int) -> Int64:
    # int64 first: adding the divisor to an int32 length may overflow.
    quotient: Int64 = -(-values.astype(np.int64) // divisor)
    return quotient
