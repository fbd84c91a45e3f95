"""The attention kernels of a decode step, dense and sparse: kernels_cu/portable/decode.

`tile_for` is the table of tiles; the sum of their shared memory is `shared_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.kernels.device import Call, DeviceArray, Program
from cumla.kernels.formats import row_type
from cumla.layouts import LAYOUTS, KVLayout

Array = NDArray[Any]

_LOG2_E = 1.4426950408889634
TOKENS = 32
"""Keys in a tile."""
_SLICES = 4  # of d_qk, among the warps


@dataclass(frozen=True)
class Tile:
    """What one block works on at a time; the template arguments of kernels_cu's `Tile`."""

    layout: KVLayout
    rows: int
    """Query rows: 16, 32 or 64."""
    warps: int
    stages: int
    """Tiles of keys under way from global memory."""
    blocks_per_sm: int
    """Blocks that an SM holds at a time, by registers and shared memory."""

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def type(self) -> str:
        """Its C++ type."""
        return f"cumla::Tile<{row_type(self.layout)}, {self.rows}, {self.warps}, {self.stages}>"

    @property
    def shared_bytes(self) -> int:
        """kernels_cu's `Tile::SHARED_BYTES`: what it holds, each at its alignment."""
        layout, fp8 = self.layout, self.layout.is_fp8
        raw_stages = self.stages if fp8 else 0
        beside = layout.scale_bytes if layout.scales_at_page_end else 0
        sizes = [
            (128, (1 if fp8 else self.stages) * TOKENS * layout.d_qk * 2),  # keys
            (128, raw_stages * TOKENS * layout.data_row_bytes),  # FP8 rows
            (16, raw_stages * TOKENS * beside),  # their scales, if beside
            (128, _SLICES * self.rows * TOKENS * 4),  # scores
            (128, self.rows * TOKENS * 2),  # weights
            (16, (self.stages + 1) * TOKENS),  # flags
            (16, self.rows * 4),  # factors
        ]
        end = 0
        for alignment, size in sizes:
            end = -(-end // alignment) * alignment + size
        return end


# (rows, warps, stages, blocks an SM), for 16-bit rows and for FP8 rows, by shared memory of a block.
# 99 KB: sm_86, sm_89, sm_120; 163 KB: sm_80; 227 KB: sm_90, sm_100.
_TILES: dict[int, tuple[dict[int, tuple[int, int, int]], dict[int, tuple[int, int, int]]]] = {
    101_376: ({16: (4, 2, 1), 32: (8, 2, 1)}, {16: (4, 2, 1), 32: (8, 2, 1)}),
    166_912: (
        {16: (4, 4, 1), 32: (8, 3, 1), 64: (8, 3, 1)},
        {16: (4, 4, 1), 32: (8, 4, 1), 64: (8, 4, 1)},
    ),
    232_448: (
        {16: (4, 2, 2), 32: (8, 5, 1), 64: (8, 4, 1)},
        {16: (4, 2, 2), 32: (8, 6, 1), 64: (8, 6, 1)},
    ),
}


def tile_for(layout: KVLayout, rows: int, shared_bytes: int) -> Tile:
    """The tile for so many query rows that share their keys, on a GPU with so much shared memory.

    The smallest that holds them all, else the largest: keys are then read once for each tile, from
    L2 after the first time.
    """
    table = _TILES[max(size for size in _TILES if size <= shared_bytes)][layout.is_fp8]
    height = min((one for one in table if one >= rows), default=max(table))
    return Tile(layout, height, *table[height])


def dense_num_parts(call: Call, layout: KVLayout, s_q: int, h_q: int, h_kv: int) -> int:
    """The parts of a plan that fill the GPU once with the blocks of a dense decode."""
    rows = s_q * (h_q // h_kv)
    return _num_parts(call, tile_for(layout, rows, call.shared_bytes), rows, h_kv)


def sparse_num_parts(call: Call, layout: KVLayout, s_q: int, h_q: int) -> int:
    """The parts of a plan that fill the GPU once with the blocks of a sparse decode."""
    return _num_parts(call, tile_for(layout, h_q, call.shared_bytes), h_q, s_q)


def _num_parts(call: Call, tile: Tile, rows: int, columns: int) -> int:
    blocks = call.num_sms * tile.blocks_per_sm
    return max(blocks // (columns * -(-rows // tile.rows)), 1)


@dataclass(frozen=True)
class Selection:
    """A page pool and the tokens of it that each query selects."""

    pages: Array
    """[pages, page_size, 1, row]."""
    indices: Array
    """int32 [b, s_q, topk]."""
    topk_length: Array | None
    """int32 [b] or [b, s_q]; None: all count."""


def _divisor(value: int) -> tuple[np.uint32, np.uint32, np.uint32]:
    """(value, m, s) so that n // value == n * m >> s for all 0 <= n < 2**31.

    m = ceil(2**s / value) with s = 31 + ceil(log2(value)): then m < 2**32 + 1, and n times what was
    rounded up is below 2**s.
    """
    shift = 31 + (value - 1).bit_length()
    return np.uint32(value), np.uint32(-(-(1 << shift) // value)), np.uint32(shift)


def _steps(array: DeviceArray) -> list[np.int64]:
    """The strides of all dimensions but the last, in elements."""
    size = array.dtype.itemsize
    return [np.int64(step // size) for step in array.strides[:-1]]


def _lse_steps(lse: DeviceArray) -> list[np.int64]:
    return [np.int64(step // 4) for step in lse.strides]


def _aligned(array: Array, alignment: int) -> bool:
    """Whether the rows (last dimension) of `array` all begin at a multiple of `alignment` bytes."""
    steps = [s for s, n in zip(array.strides[:-1], array.shape[:-1], strict=True) if n > 1]
    return all(one % alignment == 0 for one in [_address(array), *steps])


def _address(array: Any) -> int:
    if isinstance(array, np.ndarray):
        return int(array.__array_interface__["data"][0])
    return int(array.data.ptr)


def dense_decode(
    call: Call,
    *,
    q: Array,
    kv_cache: Array,
    layout: KVLayout,
    block_table: Array,
    cache_seqlens: Array,
    softmax_scale: float,
    causal: bool,
    block_size: int,
    metadata: DeviceArray,
    num_splits: DeviceArray,
    o_accum: DeviceArray | None,
    lse_accum: DeviceArray | None,
    out: DeviceArray,
    lse: DeviceArray,
    aligned: int,
) -> None:
    """Launch the dense kernel.

    Args:
        q, kv_cache, block_table, cache_seqlens, softmax_scale, causal: as `cumla.dense_decode`.
        block_size, metadata, num_splits: of the plan.
        o_accum, lse_accum: float32 [slots, s_q, h_q, d_v] and [slots, s_q, h_q], where pieces of
            requests that are split go (lse in log2 units); None if none is.
        out, lse: where results of whole requests go.
        aligned: `alignment` of q and out.
    """
    batch, s_q, h_q, _ = q.shape
    num_pages, page_size, h_kv, _ = kv_cache.shape
    group = h_q // h_kv
    tile = tile_for(layout, s_q * group, call.shared_bytes)
    tiles = -(-s_q * group // tile.rows)
    room = min(block_table.shape[1] * page_size, np.iinfo(np.int32).max)
    q, table, lens = call.read(q), call.read(block_table), call.read(cache_seqlens)
    call.launch(
        _dense_program(tile),
        grid=metadata.shape[0] * tiles * h_kv,
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        args=[
            *(q, *_steps(q), out, *_steps(out), lse, *_lse_steps(lse), o_accum, lse_accum),
            *map(np.uint32, (batch, s_q, h_q, h_kv, tiles)),
            *_divisor(group)[1:],
            np.uint32(aligned),
            call.read(kv_cache),
            *map(np.int64, kv_cache.strides[:3]),
            np.uint32(num_pages),
            *_divisor(page_size),
            *(table, *_steps(table), lens, *_lse_steps(lens), np.uint32(room)),
            *(metadata, num_splits),
            *(np.uint32(block_size), np.uint32(causal), np.float32(softmax_scale * _LOG2_E)),
        ],
    )


def alignment(q: Array, out: Array) -> int:
    """Bit 0: rows of q begin at multiples of 16 bytes; bit 1: rows of out begin at 8."""
    return _aligned(q, 16) | _aligned(out, 8) << 1


def _dense_program(tile: Tile) -> Program:
    expression = f"cumla::decode_dense<{tile.type}, {tile.blocks_per_sm}>"
    return Program("portable/decode/dense.cuh", expression)


def _sparse_program(tile: Tile, has_extra: bool) -> Program:
    extra = str(has_extra).lower()
    expression = f"cumla::decode_sparse<{tile.type}, {extra}, {tile.blocks_per_sm}>"
    return Program("portable/decode/sparse.cuh", expression)


def sparse_decode(
    call: Call,
    *,
    q: Array,
    main: Selection,
    extra: Selection | None,
    layout: KVLayout,
    attn_sink: DeviceArray | None,
    softmax_scale: float,
    block_size: int,
    kv_lens: DeviceArray,
    metadata: DeviceArray,
    num_splits: DeviceArray,
    o_accum: DeviceArray | None,
    lse_accum: DeviceArray | None,
    out: DeviceArray,
    lse: DeviceArray,
    aligned: int,
) -> None:
    """Launch the sparse kernel.

    Args:
        q, main, extra, attn_sink, softmax_scale: as `cumla.sparse_decode`; both pools of `layout`.
        kv_lens: int32 [b], of `cumla.sparse_kv_lengths`; contiguous.
        The others: as for `dense_decode`.
    """
    batch, s_q, h_q, _ = q.shape
    tile = tile_for(layout, h_q, call.shared_bytes)
    tiles = -(-h_q // tile.rows)
    q = call.read(q)
    call.launch(
        _sparse_program(tile, extra is not None),
        grid=metadata.shape[0] * tiles * s_q,
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        args=[
            *(q, *_steps(q), out, *_steps(out), lse, *_lse_steps(lse), o_accum, lse_accum),
            *(attn_sink, np.int64(attn_sink.strides[0] // 4 if attn_sink is not None else 0)),
            *map(np.uint32, (batch, s_q, h_q, tiles, aligned)),
            *_selection(call, main, layout),
            *_selection(call, extra or main, layout),
            *(kv_lens, metadata, num_splits),
            *(np.uint32(block_size), np.float32(softmax_scale * _LOG2_E)),
        ],
    )


def _selection(call: Call, one: Selection, layout: KVLayout) -> list[Any]:
    num_pages, page_size = one.pages.shape[:2]
    pages, indices = call.read(one.pages), call.read(one.indices)
    row_stride = layout.data_row_bytes if layout.is_fp8 else pages.strides[1]
    length: list[Any] = [None, np.int64(0), np.int64(0)]
    if one.topk_length is not None:
        given = call.read(one.topk_length)
        by_batch, *by_token = (np.int64(step // 4) for step in given.strides)
        length = [given, by_batch, *(by_token or [np.int64(0)])]
    return [
        *(pages, np.int64(pages.strides[0]), np.int64(row_stride)),
        *(np.uint32(num_pages), *_divisor(page_size)),
        *(indices, *_steps(indices), *length, np.uint32(indices.shape[2])),
    ]


def instances(target_shared_bytes: int) -> Iterator[tuple[Program, Tile]]:
    """All instantiations for a GPU whose blocks can have so much shared memory."""
    for layout in LAYOUTS:
        for rows in (16, 32, 64):
            tile = tile_for(layout, rows, target_shared_bytes)
            if tile.rows != rows:
                continue
            if not layout.is_fp8:
                yield _dense_program(tile), tile
            for has_extra in (False, True):
                yield _sparse_program(tile, has_extra), tile
