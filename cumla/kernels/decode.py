"""The attention kernels of a decode step, dense and sparse: kernels_cu/portable/decode.

`tile_for` is the table of tiles; `Tile.shared_bytes` is what one needs of shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from cumla.kernels.device import Call, DeviceArray, Program, address_of
from cumla.kernels.formats import row_type
from cumla.layouts import LAYOUTS, KVLayout

Shape = tuple[int, ...]
Signature = tuple[Shape, Shape, Shape, tuple[int, Shape]]
_LAYOUTS = {one.name: one for one in LAYOUTS}

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

    @cached_property
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


# rows: (warps, stages, blocks an SM), for 16-bit and for FP8 rows, by shared memory of a block.
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


def dense_room(max_blocks: int, page_size: int) -> int:
    """The most tokens that a request can have: those of a row of its block table, in int32."""
    return min(max_blocks * page_size, int(np.iinfo(np.int32).max))


@dataclass(frozen=True)
class Selection:
    """A page pool and the tokens of it that each query selects."""

    pages: DeviceArray
    """[pages, page_size, 1, row]."""
    indices: DeviceArray
    """int32 [b, s_q, topk]."""
    topk_length: DeviceArray | None
    """int32 [b] or [b, s_q]; None: all count."""

    @property
    def signature(self) -> Signature:
        """Shape and strides of pages, strides of indices, topk, strides of topk_length."""
        indices, length = self.indices, self.topk_length
        strides = () if length is None else length.strides
        return (
            self.pages.shape,
            self.pages.strides,
            indices.strides[:-1],
            (indices.shape[2], strides),
        )


def alignment(q: Any, out: Any) -> int:
    """Bit 0: rows of q begin at multiples of 16 bytes; bit 1: rows of out begin at 8."""
    return _aligned(q, 16) | _aligned(out, 8) << 1


def _aligned(array: Any, alignment: int) -> bool:
    """Whether the rows (last dimension) of `array` all begin at a multiple of `alignment` bytes."""
    bits = address_of(array)
    for size, step in zip(array.shape[:-1], array.strides[:-1], strict=True):
        if size > 1:
            bits |= step
    return not bits % alignment


Scalars = tuple[np.generic, ...]
_ALIGNED = tuple(map(np.uint32, range(4)))


@dataclass(frozen=True)
class _Launch:
    """All of a launch that does not change from step to step: made once for each kind of call."""

    program: Program
    grid: int
    tile: Tile
    scalars: tuple[Scalars, ...]
    """Runs of arguments that are no arrays, in order."""

    def __call__(self, call: Call, arrays: Sequence[Sequence[Any]]) -> None:
        """Launch with `arrays[i]` before `scalars[i]`."""
        args: list[Any] = []
        for some, scalars in zip(arrays, self.scalars, strict=True):
            args += some
            args += scalars
        call.launch(
            self.program,
            grid=self.grid,
            block=self.tile.threads,
            shared_bytes=self.tile.shared_bytes,
            args=args,
        )


def dense_decode(
    call: Call,
    *,
    q: DeviceArray,
    kv_cache: DeviceArray,
    layout: KVLayout,
    block_table: DeviceArray,
    cache_seqlens: DeviceArray,
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
    launch = _dense_launch(
        layout.name,
        call.shared_bytes,
        q.shape,
        (q.strides, out.strides, lse.strides),
        (kv_cache.shape, kv_cache.strides),
        (block_table.shape, block_table.strides, cache_seqlens.strides),
        metadata.shape[0],
        block_size,
        causal,
        softmax_scale,
    )
    launch(
        call,
        (
            (q,),
            (out,),
            (lse,),
            (o_accum, lse_accum),
            (_ALIGNED[aligned], kv_cache),
            (block_table,),
            (cache_seqlens,),
            (metadata, num_splits),
        ),
    )


@lru_cache(maxsize=1024)
def _dense_launch(
    layout_name: str,
    shared_bytes: int,
    q_shape: Shape,
    row_strides: tuple[Shape, ...],
    cache: tuple[Shape, Shape],
    lookup: tuple[Shape, Shape, Shape],
    num_parts: int,
    block_size: int,
    causal: bool,
    softmax_scale: float,
) -> _Launch:
    layout = _LAYOUTS[layout_name]
    batch, s_q, h_q, _ = q_shape
    (num_pages, page_size, h_kv, _), kv_strides = cache
    (_, max_blocks), table_strides, seqlens_strides = lookup
    group = h_q // h_kv
    tile = tile_for(layout, s_q * group, shared_bytes)
    tiles = -(-s_q * group // tile.rows)
    q_steps, out_steps, lse_steps = _row_steps(row_strides)
    counts = (batch, s_q, h_q, h_kv, tiles)
    return _Launch(
        _dense_program(tile),
        num_parts * tiles * h_kv,
        tile,
        (
            q_steps,
            out_steps,
            lse_steps,
            (*map(np.uint32, counts), *_divisor(group)[1:]),
            (*map(np.int64, kv_strides[:3]), np.uint32(num_pages), *_divisor(page_size)),
            (np.int64(table_strides[0] // 4),),
            (np.int64(seqlens_strides[0] // 4), np.uint32(dense_room(max_blocks, page_size))),
            (np.uint32(block_size), np.uint32(causal), np.float32(softmax_scale * _LOG2_E)),
        ),
    )


def sparse_decode(
    call: Call,
    *,
    q: DeviceArray,
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
    other = extra or main
    launch = _sparse_launch(
        layout.name,
        call.shared_bytes,
        q.shape,
        (q.strides, out.strides, lse.strides),
        main.signature,
        other.signature,
        extra is not None,
        0 if attn_sink is None else attn_sink.strides[0] // 4,
        metadata.shape[0],
        block_size,
        softmax_scale,
    )
    launch(
        call,
        (
            (q,),
            (out,),
            (lse,),
            (o_accum, lse_accum, attn_sink),
            (_ALIGNED[aligned], main.pages),
            (main.indices,),
            (main.topk_length,),
            (other.pages,),
            (other.indices,),
            (other.topk_length,),
            (kv_lens, metadata, num_splits),
        ),
    )


@lru_cache(maxsize=1024)
def _sparse_launch(
    layout_name: str,
    shared_bytes: int,
    q_shape: Shape,
    row_strides: tuple[Shape, ...],
    main: Signature,
    extra: Signature,
    has_extra: bool,
    sink_stride: int,
    num_parts: int,
    block_size: int,
    softmax_scale: float,
) -> _Launch:
    layout = _LAYOUTS[layout_name]
    batch, s_q, h_q, _ = q_shape
    tile = tile_for(layout, h_q, shared_bytes)
    tiles = -(-h_q // tile.rows)
    q_steps, out_steps, lse_steps = _row_steps(row_strides)
    return _Launch(
        _sparse_program(tile, has_extra),
        num_parts * tiles * s_q,
        tile,
        (
            q_steps,
            out_steps,
            lse_steps,
            (np.int64(sink_stride), *map(np.uint32, (batch, s_q, h_q, tiles))),
            *_pool_scalars(main, layout),
            *_pool_scalars(extra, layout),
            (np.uint32(block_size), np.float32(softmax_scale * _LOG2_E)),
        ),
    )


def _row_steps(strides: tuple[Shape, ...]) -> tuple[Scalars, Scalars, Scalars]:
    """Strides in elements: of q and out, two bytes each, but for the last; and of lse."""
    q, out, lse = strides
    q_steps = tuple(np.int64(step // 2) for step in q[:-1])
    out_steps = tuple(np.int64(step // 2) for step in out[:-1])
    return q_steps, out_steps, tuple(np.int64(step // 4) for step in lse)


def _pool_scalars(of: Signature, layout: KVLayout) -> tuple[Scalars, Scalars, Scalars]:
    (num_pages, page_size, *_), strides, indices, (topk, length) = of
    row_stride = layout.data_row_bytes if layout.is_fp8 else strides[1]
    by_batch, by_token = (*length, 0, 0)[:2]
    return (
        (np.int64(strides[0]), np.int64(row_stride), np.uint32(num_pages), *_divisor(page_size)),
        tuple(np.int64(step // 4) for step in indices),
        (np.int64(by_batch // 4), np.int64(by_token // 4), np.uint32(topk)),
    )


def _divisor(value: int) -> tuple[np.uint32, np.uint32, np.uint32]:
    """(value, m, s) so that n // value == n * m >> s for all 0 <= n < 2**31.

    m = ceil(2**s / value) with s = 31 + ceil(log2(value)): then m < 2**32 + 1, and n times what was
    rounded up is below 2**s.
    """
    shift = 31 + (value - 1).bit_length()
    return np.uint32(value), np.uint32(-(-(1 << shift) // value)), np.uint32(shift)


def _dense_program(tile: Tile) -> Program:
    expression = f"cumla::decode_dense<{tile.type}, {tile.blocks_per_sm}>"
    return Program("portable/decode/dense.cuh", expression)


def _sparse_program(tile: Tile, has_extra: bool) -> Program:
    extra = str(has_extra).lower()
    expression = f"cumla::decode_sparse<{tile.type}, {extra}, {tile.blocks_per_sm}>"
    return Program("portable/decode/sparse.cuh", expression)


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
