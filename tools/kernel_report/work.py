"""What kernels ask of a GPU, by closed formulas: decode for a KV token, combine for a row.

tests/test_kernel_report.py holds them against the simulator's counters.
"""

from __future__ import annotations

from dataclasses import dataclass

from cumla.kernels.decode import TOKENS, Tile, tile_for
from cumla.layouts import LAYOUTS, KVLayout

_SLICES = 4  # of d_qk, among the warps
_WAVEFRONT = 128  # bytes
_SECTOR = 32
_INDEX = 4  # bytes of an index or of a block table's entry

INSTRUCTIONS = {
    ("dense", "BF16"): {16: 47.8, 32: 85.8, 64: 143.3},
    ("sparse", "BF16"): {16: 46.1, 32: 83.5, 64: 143.8},
    ("sparse", "V32_FP8"): {16: 133.0, 32: 175.8, 64: 235.5},
    ("sparse", "V4_FP8"): {16: 137.5, 32: 184.8, 64: 243.3},
}
"""Warp instructions of PTX for a KV token in a full tile, by its rows: counted, not computed."""
INSTRUCTIONS_OF_MATRIX = 20.3
"""What a token costs less for every 16 rows that a tile lacks; 8.5 of them are MMAs."""


@dataclass(frozen=True)
class Work:
    """What all blocks together do for one KV token, or one row."""

    flops: float
    """Of MMAs."""
    wavefronts: float
    """Passes over shared memory."""
    instructions: float
    """Of warps."""
    sectors: float
    """Of 32 bytes, asked of L2."""
    dram_bytes: float
    """What several blocks read comes from there once; for the others it is in L2."""


def decode_work(
    kernel: str, layout: KVLayout, rows: int, shared_per_block: int, page_size: int = 64
) -> Work:
    """The work for `rows` query rows that share their keys: full tiles, the last of any height."""
    tile = tile_for(layout, rows, shared_per_block)
    heights = [min(tile.rows, rows - first) for first in range(0, rows, tile.rows)]
    full = INSTRUCTIONS[kernel, layout.name if layout.is_fp8 else "BF16"]
    return Work(
        flops=sum(2 * 16 * _matrices(h) * (layout.d_qk + layout.d_v) for h in heights),
        wavefronts=sum(_wavefronts(kernel, tile, _matrices(h)) for h in heights),
        instructions=sum(
            full[tile.rows] - INSTRUCTIONS_OF_MATRIX * (tile.rows // 16 - _matrices(h))
            for h in heights
        ),
        sectors=len(heights) * (_row_sectors(layout) + tile.warps / TOKENS),
        dram_bytes=_dram_bytes(layout) + (_INDEX if kernel == "sparse" else _INDEX / page_size),
    )


def _matrices(rows: int) -> int:
    """Of 16 rows: what tensor cores multiply."""
    return -(-rows // 16)


def _wavefronts(kernel: str, tile: Tile, matrices: int) -> float:
    """Passes over shared memory for a token, in a tile of which so many matrices have rows."""
    layout, warps = tile.layout, tile.warps
    row_groups = 2 if tile.rows == 64 else 1
    active_groups = -(-matrices // (tile.rows // 16 // row_groups))
    rows = 16 * matrices
    softmax_warps = rows * tile.threads // tile.rows / 32
    quads = TOKENS * tile.rows // (4 * tile.threads)  # of tokens, for each thread of softmax
    key = layout.d_qk * 2 / _WAVEFRONT

    scores = _SLICES * rows * TOKENS * 4 / _WAVEFRONT  # written once, read once
    weights = rows * TOKENS * 2 / _WAVEFRONT  # written once, read by every warp
    step = TOKENS * (active_groups * key + layout.d_v * 2 / _WAVEFRONT)  # both products
    step += 2 * scores + weights + warps * weights
    step += softmax_warps * (quads + 1)  # flags of tokens, factors of rows
    step += warps  # flags, written
    if kernel == "sparse":
        step += 3 * warps  # which indices: `Selected`
    if not layout.is_fp8:
        return step / TOKENS + key

    # A group of 16 lanes copies a row as it is, 256 bytes at a time; 8 lanes are a wavefront.
    raw = sum(-(-min(256, left) // _WAVEFRONT) for left in range(layout.data_row_bytes, 0, -256))
    # A lane decodes 16 codes: two loads of 8 bytes, two stores of 16.
    lanes = layout.d_nope // 16
    decoded = 2 * -(-lanes // 16) + 2 * -(-lanes // 8) + 1  # and its scale
    rope = 2 * layout.d_rope * 2 / _WAVEFRONT  # read and written
    beside = warps / TOKENS if layout.scales_at_page_end else 0
    return step / TOKENS + raw + decoded + rope + beside


def _row_sectors(layout: KVLayout) -> float:
    """Sectors that the copies of a row ask for: 16 lanes of FP8 rows, 256 bytes, at a time.

    Where rows are an odd number of 16 bytes, every other begins in the middle of a sector.
    """
    if not layout.is_fp8:
        return layout.row_bytes / _SECTOR
    size = layout.data_row_bytes
    starts = (0, size % _SECTOR)
    asked = sum(
        _sectors(start + done, min(256, size - done))
        for start in starts
        for done in range(0, size, 256)
    )
    return asked / len(starts) + layout.scales_at_page_end


def _dram_bytes(layout: KVLayout) -> float:
    """Bytes of the sectors of a row whose neighbours nobody reads."""
    starts = (0, layout.data_row_bytes % _SECTOR)
    touched = sum(_sectors(start, layout.data_row_bytes) for start in starts) / len(starts)
    return _SECTOR * (touched + layout.scales_at_page_end)


def _sectors(start: int, size: int) -> int:
    return -(-(start + size) // _SECTOR) - start // _SECTOR


STREAM_INSTRUCTIONS = {
    ("append", "BF16"): (126.4, 126.4),
    ("append", "V32_FP8"): (608.4, 280.4),
    ("append", "V4_FP8"): (612.4, 280.4),
    ("gather", "BF16"): (96.0, 96.0),
    ("gather", "V32_FP8"): (189.0, 189.0),
    ("gather", "V4_FP8"): (217.0, 217.0),
    ("combine", "2 pieces"): (373.0, 373.0),
    ("combine", "8 pieces"): (739.0, 739.0),
    ("merge", "2 results"): (402.0, 402.0),
    ("merge", "8 results"): (917.0, 917.0),
}
"""Warp instructions of PTX for a row of bf16 numbers, before sm_89 and from it on (it converts to
e4m3 by an instruction): counted, not computed."""


def stream_work(kernel: str, of: str, target: str, d_v: int = 512) -> Work:
    """The work for one row in a kernel that reads rows and writes rows; sectors are the least."""
    if kernel in ("append", "gather"):
        [layout] = [one for one in LAYOUTS if one.name == of]
        size = layout.row_bytes + 2 * layout.d_qk + 8  # its slot is an int64
    elif kernel == "combine":
        size = int(of.split()[0]) * 4 * (d_v + 1) + 2 * d_v + 4
    else:
        size = (int(of.split()[0]) + 1) * (2 * d_v + 4)
    instructions = STREAM_INSTRUCTIONS[kernel, of][target not in ("sm_80", "sm_86")]
    return Work(0, 0, instructions, size / _SECTOR, size)
