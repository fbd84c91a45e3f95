"""What moves rows into and out of page pools: kernels_cu/portable/cache.

Arguments have been checked: pages as `cumla.layouts.check_pages` has it (one KV head), at a
multiple of 16 bytes. Slots and page numbers may be anything; what is not in the pool is skipped or
zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.checks import bad_value
from cumla.fp8 import BF16, SCALE_RULES, ScaleRule
from cumla.kernels.device import Call, DeviceArray, Program
from cumla.kernels.formats import number_type, row_type
from cumla.layouts import LAYOUTS, KVLayout

Array = NDArray[Any]

_WARPS = 8
"""kernels_cu's CACHE_WARPS: rows of a block."""
_THREADS = 256
_COPY_CHUNKS = 4 * _THREADS
"""16-byte pieces of a page that a block copies."""
_SCAN_ROWS = 1024
"""Up to so many rows look for their twins themselves; more share a hash table."""


def append_rows(
    call: Call,
    pages: Array,
    layout: KVLayout,
    slots: Array,
    rows: Array,
    rule: ScaleRule | None,
) -> None:
    """Store rows at slots, rounded to the layout's compute dtype, FP8 rows encoded by `rule`.

    The bytes are those of `cumla.layouts.write_rows`. A row whose slot is negative or not in the
    pool is skipped. Of several rows with one slot the lowest is stored.

    Args:
        pages: [num_pages, page_size, 1, row], less than 2**32 - 1 tokens; written.
        slots: int64 or int32 [n], any stride.
        rows: [n, d_qk] bfloat16, float16 or float32, any strides but the last, which is 1.
        rule: as `cumla.layouts.check_scale_rule` returns it.
    """
    n = len(rows)
    if not n:
        return
    given = call.read(slots)
    names = [given, *_integers(given)]
    owners, table_bits = None, 0
    if n > _SCAN_ROWS:
        table_bits = (2 * n - 1).bit_length()
        owners = call.empty((1 << table_bits,), np.uint64)
        table = [owners, np.uint32(table_bits)]
        call.launch(
            _CLEAR_OWNERS,
            grid=-(-(1 << table_bits) // (2 * _THREADS)),
            block=_THREADS,
            args=table,
        )
        call.launch(
            _CLAIM_SLOTS,
            grid=-(-n // _THREADS),
            block=_THREADS,
            args=[*names, np.uint32(n), np.uint32(_num_slots(pages)), *table],
        )
    source = call.read(rows)
    call.launch(
        _append_program(layout, rows.dtype, rule),
        grid=-(-n // _WARPS),
        block=32 * _WARPS,
        args=[
            *_pool(call.write(pages), layout),
            np.uint32(_num_slots(pages)),
            *names,
            *(source, _step(source, 0), np.uint32(n), owners, np.uint32(table_bits)),
        ],
    )


def gather_rows(call: Call, pages: Array, layout: KVLayout, slots: Array, out: Array) -> None:
    """Decode the tokens at slots; where a slot is negative or not in the pool, zeros.

    Args:
        pages: [num_pages, page_size, 1, row].
        slots: int64 or int32 [n], any stride.
        out: [n, d_qk] in the layout's compute dtype, any strides but the last, which is 1; written.
    """
    n = len(out)
    if not n:
        return
    given = call.read(slots)
    call.launch(
        _gather_program("gather_rows", layout),
        grid=-(-n // _WARPS),
        block=32 * _WARPS,
        args=[
            *_pool(call.read(pages), layout),
            *(np.uint32(_num_slots(pages)), given, *_integers(given)),
            *_out(call.write(out)),
        ],
    )


def gather_sequences(
    call: Call,
    pages: Array,
    layout: KVLayout,
    block_table: Array,
    cu_seqlens: Array,
    out: Array,
    seq_starts: Array | None = None,
) -> None:
    """Decode tokens of sequences to rows one after another.

    Row t of `out` is token t - cu_seqlens[i] + seq_starts[i] of the sequence i with
    cu_seqlens[i] <= t < cu_seqlens[i + 1]. It is zeros where the block table or the pool has no
    such token. Rows of no sequence stay as they are, so `out` may be longer than needed.

    Args:
        pages: [num_pages, page_size, 1, row].
        block_table: int32 [b, max_blocks], any strides.
        cu_seqlens: int32 [b + 1], ascending.
        out: [total, d_qk] in the layout's compute dtype, any strides but the last, which is 1;
            written.
        seq_starts: int32 [b], the first token of each sequence to decode; None: 0.
    """
    n = len(out)
    batch, max_blocks = block_table.shape
    if not n or not batch:
        return
    table, bounds = call.read(block_table), call.read(cu_seqlens)
    starts = None if seq_starts is None else call.read(seq_starts)
    room = min(max_blocks * pages.shape[1], np.iinfo(np.int32).max)
    call.launch(
        _gather_program("gather_sequences", layout),
        grid=-(-n // _WARPS),
        block=32 * _WARPS,
        args=[
            *(*_pool(call.read(pages), layout), np.uint32(len(pages))),
            *(table, _step(table, 0), _step(table, 1), np.uint32(batch), np.uint32(room)),
            *(bounds, _step(bounds, 0)),
            *(starts, np.int64(0) if starts is None else _step(starts, 0)),
            *_out(call.write(out)),
        ],
    )


def token_slots(
    call: Call,
    positions: Array,
    block_table: Array,
    num_pages: int,
    page_size: int,
    slots: Array,
) -> None:
    """Turn positions in requests into slots, each in its place.

    A position that is negative, beyond the block table or on a page that is not in [0, num_pages)
    becomes -1.

    Args:
        positions: int32 [b, s_q, topk], any strides.
        block_table: int32 [b, max_blocks], any strides.
        num_pages, page_size: of the pool; their product is at most 2**31 - 1.
        slots: int32 [b, s_q, topk], any strides; written. May be `positions`.
    """
    batch, s_q, topk = positions.shape
    threads = batch * s_q * -(-topk // 4)
    if not threads:
        return
    given, table, result = call.read(positions), call.read(block_table), call.write(slots)
    call.launch(
        _TOKEN_SLOTS,
        grid=-(-threads // _THREADS),
        block=_THREADS,
        args=[
            *(given, *(_step(given, axis) for axis in range(3))),
            *(table, *(_step(table, axis) for axis in range(2))),
            *map(np.uint32, (block_table.shape[1], page_size, num_pages)),
            *(result, *(_step(result, axis) for axis in range(3))),
            *map(np.uint32, (batch, s_q, topk)),
        ],
    )


def copy_page(call: Call, pages: Array, layout: KVLayout, source: int, target: int) -> None:
    """Copy the bytes of page `source` over page `target`, padding aside."""
    nothing = [None, None, *map(np.int64, (0, 0)), *map(np.uint32, (0, 0))]
    _copy(call, pages, layout, 1, [*nothing, np.int64(source), np.int64(target)])


def copy_pages(call: Call, pages: Array, layout: KVLayout, sources: Array, targets: Array) -> None:
    """Copy the bytes of page sources[i] over page targets[i] for all i at once, padding aside.

    A pair with a page that is not in the pool is skipped.

    Args:
        pages: [num_pages, page_size, 1, row]; written.
        sources, targets: int64 or int32 [n], any strides. No target twice, none a source.
    """
    if not len(sources):
        return
    given, wanted = call.read(sources), call.read(targets)
    steps, wide = zip(_integers(given), _integers(wanted), strict=True)
    unused = map(np.int64, (0, 0))
    _copy(call, pages, layout, len(sources), [given, wanted, *steps, *wide, *unused])


def _copy(call: Call, pages: Array, layout: KVLayout, n: int, which: list[Any]) -> None:
    num_pages, page_size = pages.shape[:2]
    # FP8 pages are one run of bytes; other rows may lie apart.
    runs, run_bytes = page_size, layout.row_bytes
    if layout.is_fp8:
        runs, run_bytes = 1, page_size * layout.row_bytes
    blocks = -(-runs * -(-run_bytes // 16) // _COPY_CHUNKS)
    pool = call.write(pages)
    call.launch(
        _COPY_PAGES,
        grid=n * blocks,
        block=_THREADS,
        args=[
            *(pool, *map(np.int64, pool.strides[:2])),
            *map(np.uint32, (num_pages, runs, run_bytes)),
            *(*which, np.uint32(blocks)),
        ],
    )


def _num_slots(pages: Array) -> int:
    count = pages.shape[0] * pages.shape[1]
    if count >= 2**32 - 1:
        raise bad_value(
            "pages",
            f"{pages.shape[0]} pages of {pages.shape[1]} tokens",
            "a pool has less than 2**32 - 1 tokens",
            "Use several pools.",
        )
    return count


def _pool(pages: DeviceArray, layout: KVLayout) -> list[Any]:
    token_stride = layout.data_row_bytes if layout.is_fp8 else pages.strides[1]
    return [
        *(pages, np.int64(pages.strides[0]), np.int64(token_stride)),
        np.uint32(pages.shape[1]),
    ]


def _step(array: DeviceArray, axis: int) -> np.int64:
    """A stride in elements."""
    return np.int64(array.strides[axis] // array.dtype.itemsize)


def _integers(array: DeviceArray) -> tuple[np.int64, np.uint32]:
    """The stride of int32 or int64 [n] in elements, and whether they are the latter."""
    return _step(array, 0), np.uint32(array.dtype.itemsize == 8)


def _out(out: DeviceArray) -> list[Any]:
    return [out, _step(out, 0), np.uint32(out.shape[0])]


_CLEAR_OWNERS = Program("portable/cache/owners.cuh", "cumla::clear_owners")
_CLAIM_SLOTS = Program("portable/cache/owners.cuh", "cumla::claim_slots")
_TOKEN_SLOTS = Program("portable/cache/slots.cuh", "cumla::token_slots")
_COPY_PAGES = Program("portable/cache/copy.cuh", "cumla::copy_pages")


def _append_program(layout: KVLayout, dtype: np.dtype[Any], rule: ScaleRule | None) -> Program:
    scale_rule = f"cumla::ScaleRule::{(rule or 'none').upper()}"
    expression = f"cumla::append_rows<{row_type(layout)}, {number_type(dtype)}, {scale_rule}>"
    return Program("portable/cache/append.cuh", expression)


def _gather_program(name: str, layout: KVLayout) -> Program:
    return Program("portable/cache/gather.cuh", f"cumla::{name}<{row_type(layout)}>")


def instances(target_shared_bytes: int) -> Iterator[tuple[Program, int, int]]:
    """All instantiations, the threads of a block, and its dynamic shared memory."""
    for program in (_CLEAR_OWNERS, _CLAIM_SLOTS, _TOKEN_SLOTS, _COPY_PAGES):
        yield program, _THREADS, 0
    for layout in LAYOUTS:
        yield _gather_program("gather_rows", layout), 32 * _WARPS, 0
        yield _gather_program("gather_sequences", layout), 32 * _WARPS, 0
        for dtype in (BF16, np.dtype(np.float16), np.dtype(np.float32)):
            for rule in _scale_rules(layout):
                yield _append_program(layout, dtype, rule), 32 * _WARPS, 0


def _scale_rules(layout: KVLayout) -> list[ScaleRule | None]:
    if not layout.is_fp8:
        return [None]
    return [one for one in SCALE_RULES if one != "raw" or not layout.scales_at_page_end]
