"""The plan of a decode step, made on the device: kernels_cu/portable/schedule.

The same numbers as `cumla.schedule.plan_decode`, from lengths that nobody on the host has seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cumla.kernels.device import Call, DeviceArray, Program

_BALANCED_IN_SHARED = Program("portable/schedule/balanced.cuh", "cumla::plan_balanced<true>")
_BALANCED = Program("portable/schedule/balanced.cuh", "cumla::plan_balanced<false>")
_FIXED = Program("portable/schedule/fixed.cuh", "cumla::plan_fixed")

_SHARED_BYTES = 264
"""Of kernels_cu's `BalancedShared`; 8 for each cost come behind it."""
_MOST_THREADS = 1024
_INT32_MAX = np.iinfo(np.int32).max


def plan_decode(
    call: Call,
    *,
    kv_lens: DeviceArray | None = None,
    max_length: int = _INT32_MAX,
    topk: int = 0,
    topk_length: DeviceArray | None = None,
    extra_topk: int = 0,
    extra_topk_length: DeviceArray | None = None,
    num_parts: int,
    block_size: int,
    overhead: int,
    split_blocks: int | None = None,
    metadata: DeviceArray,
    num_splits: DeviceArray,
    lengths_out: DeviceArray | None = None,
) -> None:
    """Launch the planner: balanced over `num_parts` parts, or fixed with `split_blocks`.

    Nobody checks lengths on a GPU: one that is out of range counts as the nearest that is not.

    Args:
        kv_lens: int32 [b], the lengths of a dense decode; None: of a sparse one, from topk on.
        max_length: the range of kv_lens is [0, max_length].
        topk, topk_length, extra_topk, extra_topk_length: as `cumla.schedule.sparse_kv_lengths`;
            lengths int32 [b] or [b, s_q], in [0, topk] and [0, extra_topk]. Both pools' topk
            together, in whole blocks, must not pass 2**31 - 1.
        num_parts: the rows of metadata. With split_blocks that is room for so many pieces; what
            is left of it becomes parts without work, and pieces beyond it are left out.
        block_size, overhead, split_blocks: as `cumla.schedule.plan_decode`.
        metadata: int32 [num_parts, 8], contiguous, at a multiple of 16 bytes; written.
        num_splits: int32 [b + 1], contiguous; written.
        lengths_out: int32 [b], contiguous; the requests' lengths are written to it.
    """
    batch = num_splits.shape[0] - 1
    threads = min(-(-max(batch, num_parts) // 32) * 32, _MOST_THREADS)
    if kv_lens is not None:
        pools = [*_pool(kv_lens, max_length), *_pool(None, 0), np.uint32(0)]
    else:
        pools = [*_pool(topk_length, topk), *_pool(extra_topk_length, extra_topk), np.uint32(1)]
    shape = [np.uint32(batch), np.uint32(num_parts), np.uint32(block_size)]
    results = [lengths_out, metadata, num_splits]
    if split_blocks is not None:
        args = [*pools, *shape, np.uint32(split_blocks), *results]
        call.launch(_FIXED, grid=1, block=threads, args=args)
        return
    cost_bytes = 8 * (batch + 1)
    in_shared = _SHARED_BYTES + cost_bytes <= call.shared_bytes
    costs = None if in_shared else call.empty((batch + 1,), np.int64)
    cursors = call.empty((num_parts + 1, 4), np.int32)
    call.launch(
        _BALANCED_IN_SHARED if in_shared else _BALANCED,
        grid=1,
        block=threads,
        shared_bytes=_SHARED_BYTES + (cost_bytes if in_shared else 0),
        args=[*pools, *shape, np.uint32(overhead), costs, cursors, *results],
    )


def _pool(lengths: DeviceArray | None, limit: int) -> list[Any]:
    """The lengths of one pool as the kernels take them."""
    by_request, by_token, tokens = np.int64(0), np.int64(0), 0
    if lengths is not None:
        by_request = np.int64(lengths.strides[0] // 4)
        tokens = 1
        if len(lengths.shape) == 2:
            by_token, tokens = np.int64(lengths.strides[1] // 4), lengths.shape[1]
    return [lengths, by_request, by_token, np.uint32(tokens), np.uint32(limit)]


def instances(target_shared_bytes: int) -> Iterator[tuple[Program, int, int]]:
    """All instantiations, the most threads of a block, and the most dynamic shared memory.

    For a GPU whose blocks can have `target_shared_bytes` of that.
    """
    yield _BALANCED_IN_SHARED, _MOST_THREADS, target_shared_bytes
    yield _BALANCED, _MOST_THREADS, _SHARED_BYTES
    yield _FIXED, _MOST_THREADS, 0
