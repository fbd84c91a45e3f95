"""plan_decode: split-KV plans for lengths on the CPU and on a GPU, and what a call needs beside."""

from __future__ import annotations

from typing import Any

import numpy as np

from cumla import schedule
from cumla.backends.arrays import Arrays, check_no_stream, is_on_gpu
from cumla.checks import bad_value, check_dtype, check_int, check_shape
from cumla.kernels import schedule as kernel
from cumla.schedule import METADATA_FIELDS, DecodePlan

_INT32_MAX = np.iinfo(np.int32).max
_D_V = 512
_ALIGNMENT = 256


def plan_decode(
    kv_lens: Any,
    *,
    num_parts: int | None = None,
    split_blocks: int | None = None,
    block_size: int = 64,
    overhead: int = 5,
    stream: Any = None,
) -> DecodePlan:
    """Cut the KV of a batch in pieces and deal them out. Give num_parts or split_blocks, not both.

    Lengths on a GPU are planned by a kernel there, and nobody waits for it or looks at them: one
    that is negative counts as 0. The plan's arrays are CuPy arrays. Captured in a CUDA graph, the
    kernel plans again whenever the graph runs.

    Args:
        kv_lens: int32 [b], b >= 1, each >= 0: KV tokens of each request (cache_seqlens in the
            dense op, `sparse_kv_lengths` in the sparse one). Copied.
        num_parts: >= 1; balance the work over this many parts (see `dense_num_parts`). There are
            at most b + num_parts - 1 pieces; parts may stay without work.
        split_blocks: >= 1; cut every request each `split_blocks` blocks, its last piece may be
            shorter, and make each piece a part: num_parts == num_pieces. For lengths on a GPU give
            num_parts too: the room for pieces, at least b and the sum of
            ceil(kv_lens / block_size / split_blocks) over the batch. Pieces beyond it are left out.
        block_size: >= 1; KV tokens in a block.
        overhead: >= 0; what a piece costs beside its blocks, in blocks. For balancing only:
            with split_blocks it changes nothing.
        stream: a CUDA stream, for lengths on a GPU.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the lengths are on a GPU that cannot be used.
    """
    cut: dict[str, Any] = {"block_size": block_size, "overhead": overhead}
    if not is_on_gpu("kv_lens", kv_lens):
        check_no_stream(stream)
        return schedule.plan_decode(kv_lens, num_parts=num_parts, split_blocks=split_blocks, **cut)
    arrays = Arrays(kv_lens=kv_lens, stream=stream)
    lengths = arrays["kv_lens"]
    check_dtype("kv_lens", lengths, [np.int32])
    check_shape("kv_lens", lengths, ["b"])
    batch = len(lengths)
    if batch == 0:
        raise bad_value(
            "kv_lens", "no request", "a plan needs at least one", "Skip the call for empty batches."
        )
    check_int("block_size", block_size, low=1, high=_INT32_MAX)
    check_int("overhead", overhead, low=0, high=_INT32_MAX)
    if split_blocks is not None:
        check_int("split_blocks", split_blocks, low=1, high=_INT32_MAX)
    if num_parts is None:
        raise bad_value(
            "num_parts",
            None,
            "lengths on a GPU are not looked at, so it must be given, with split_blocks too",
            "Pass the number of parts, or with split_blocks how many pieces there may be.",
        )
    low = 1 if split_blocks is None else batch
    num_parts = check_int("num_parts", num_parts, low=low, high=_INT32_MAX - batch + 1)
    backend: Any = arrays.backend  # on a GPU there is no other than KernelBackend
    with arrays.place(), backend.device.call() as call:
        plan = DecodePlan(
            arrays.empty((batch,), np.int32),
            int(block_size),
            arrays.empty((num_parts, len(METADATA_FIELDS)), np.int32),
            arrays.empty((batch + 1,), np.int32),
        )
        kernel.plan_decode(
            call,
            kv_lens=call.read(lengths),
            num_parts=num_parts,
            block_size=plan.block_size,
            overhead=int(overhead),
            split_blocks=None if split_blocks is None else int(split_blocks),
            metadata=call.write(plan.tile_scheduler_metadata),
            num_splits=call.write(plan.num_splits),
            lengths_out=call.write(plan.kv_lens),
        )
    return plan


def sparse_kv_lengths(
    batch: int,
    topk: int,
    topk_length: Any = None,
    extra_topk: int = 0,
    extra_topk_length: Any = None,
    *,
    block_size: int = 64,
    stream: Any = None,
) -> Any:
    """The KV lengths, int32 [b], that a sparse decode of this kind is planned with.

    A request's main tokens come first and fill at least one block. With an extra pool its tokens
    start at a block of their own, so that no block mixes two pools. Where the lengths differ
    between the queries of a request, the longest counts, for each pool by itself: all queries of
    a request follow one schedule.

    Of lengths on a GPU a kernel there makes a CuPy array, and nobody waits for it or looks at them:
    one that is out of range counts as the nearest that is not.

    Args:
        batch: >= 1.
        topk: >= 0; the size of the indices' last dimension.
        topk_length: int32 [b] or [b, s_q], each in [0, topk]: how many of them count; None: all.
        extra_topk: >= 0; the same for the extra pool, 0 without one.
        extra_topk_length: int32 [b] or [b, s_q], each in [0, extra_topk]; None: all.
        block_size: >= 1; selected tokens in a block, the plan's block_size.
        stream: a CUDA stream, for lengths on a GPU.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the lengths are on a GPU that cannot be used.
    """
    given = {"topk_length": topk_length, "extra_topk_length": extra_topk_length}
    if not any(is_on_gpu(name, one) for name, one in given.items()):
        check_no_stream(stream)
        return schedule.sparse_kv_lengths(
            batch, topk, topk_length, extra_topk, extra_topk_length, block_size=block_size
        )
    arrays = Arrays(**given, stream=stream)
    # What does not depend on the lengths, by the same rules; it also takes batch for an int.
    longest = schedule.sparse_kv_lengths(batch, topk, None, extra_topk, block_size=block_size)
    for name, lengths in arrays.items():
        check_dtype(name, lengths, [np.int32])
        if lengths.ndim not in (1, 2) or len(lengths) != len(longest) or lengths.size == 0:
            raise bad_value(
                name,
                f"shape {lengths.shape}",
                f"it must be [b] or [b, s_q] with b = {batch} and s_q >= 1",
                "Pass one length for each request, or one for each of its queries.",
            )
    backend: Any = arrays.backend
    with arrays.place(), backend.device.call() as call:
        result = arrays.empty((len(longest),), np.int32)
        kernel.plan_decode(
            call,
            topk=int(topk),
            extra_topk=int(extra_topk),
            **{name: call.read(one) for name, one in arrays.items()},
            # A plan comes with them, of the least size, that nobody needs.
            num_parts=1,
            block_size=int(block_size),
            overhead=0,
            metadata=call.empty((1, len(METADATA_FIELDS)), np.int32),
            num_splits=call.empty((len(longest) + 1,), np.int32),
            lengths_out=call.write(result),
        )
    return result


def decode_workspace_bytes(b: int, s_q: int, h_q: int, num_parts: int) -> int:
    """The size of a workspace that suffices for any decode call of these sizes on a GPU.

    It holds the partial results of requests that are split, float32 [b + num_parts, s_q, h_q, 512]
    and [b + num_parts, s_q, h_q]; and for a call without a plan the schedule, int32 [num_parts, 8],
    [b + 1] and [b], and what making it needs, int64 [b + 1] and int32 [num_parts + 1, 4]; each on a
    multiple of 256 bytes. It should begin at such a multiple too, as every array of its own in CuPy
    does; if it does not, add 255.

    Args:
        b, s_q, h_q: the shape of q.
        num_parts: of the plan.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument; all must be
            >= 1.
    """
    b = check_int("b", b, low=1)
    s_q = check_int("s_q", s_q, low=1)
    h_q = check_int("h_q", h_q, low=1)
    num_parts = check_int("num_parts", num_parts, low=1)
    rows = (b + num_parts) * s_q * h_q
    plan = (num_parts * len(METADATA_FIELDS), b + 1, b, 2 * (b + 1), 4 * (num_parts + 1))
    return sum(-(-4 * count // _ALIGNMENT) * _ALIGNMENT for count in (rows * _D_V, rows, *plan))
