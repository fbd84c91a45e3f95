"""Every format of a KV cache row and page: the one place that knows a byte offset.

A cache is an array of pages, `[pages, page_size, h_kv, row]`, whose rows are tokens:

BF16, FP16  row = 576 numbers (512 NoPE, 64 RoPE), 1152 bytes.
V32_FP8     row = 656 bytes: 512 e4m3 NoPE | 4 little-endian float32 scales, one per 128 values |
            64 bf16 RoPE. DeepSeek V3.2, as vLLM, SGLang and FlashMLA store it.
V4_FP8      584 bytes a token, but split inside the page: page_size data rows of 576 bytes
            (448 e4m3 NoPE | 64 bf16 RoPE), then page_size scale groups of 8 bytes (7 UE8M0, one
            per 64 values | 1 padding byte, written 0, read as anything), then padding up to a
            page stride that is a multiple of 576. The array's last dimension of 584 is nominal.

An index or slot names a token of the whole pool: page * page_size + offset in the page.
FP8 rows decode to bf16 numbers: bf16(e4m3 * bf16(scale)), rounded once (see `fp8.decode_tiles`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from cumla import fp8
from cumla.checks import (
    bad_type,
    bad_value,
    check_array,
    check_dtype,
    check_int,
    check_last_stride,
    check_shape,
)
from cumla.fp8 import Bytes, ScaleRule
from cumla.scratch import scratch

Array = NDArray[Any]

# Rows encoded or decoded at a time, so that the temporaries stay in a core's L2 cache.
_CHUNK_ROWS = 128
# Kernels read rows in 16-byte pieces, so every stride above the last is a multiple of it.
_STRIDE_ALIGNMENT = 16


@dataclass(frozen=True)
class KVLayout:
    """One format of KV rows and pages. Use the four instances below rather than making one."""

    name: str
    dtype: np.dtype[Any]
    """Of the page array's elements; uint8 for the FP8 formats."""
    compute_dtype: np.dtype[Any]
    """Of a decoded row, and of the queries that go with it."""
    d_qk: int
    d_v: int
    d_nope: int
    """The leading dims of a row that are FP8-encoded in the FP8 formats."""
    row_elements: int
    """Size of the page array's last dimension."""
    tile: int = 0
    """Values that share one scale; 0 where nothing is scaled."""
    scale_bytes: int = 0
    """Bytes of one token's scales, padding included; 0 where nothing is scaled."""
    scales_at_page_end: bool = False
    page_multiple: int = 1
    """The byte stride of a page that we allocate is a multiple of this."""
    default_scale_rule: ScaleRule | None = None

    @property
    def is_fp8(self) -> bool:
        return self.tile > 0

    @property
    def d_rope(self) -> int:
        return self.d_qk - self.d_nope

    @property
    def num_scales(self) -> int:
        return self.d_nope // self.tile if self.tile else 0

    @property
    def row_bytes(self) -> int:
        """Bytes a token takes, page padding aside."""
        return self.row_elements * self.dtype.itemsize

    @property
    def data_row_bytes(self) -> int:
        """Distance in bytes between the data of neighbouring tokens of a page."""
        return self.row_bytes - (self.scale_bytes if self.scales_at_page_end else 0)

    @property
    def rope_offset(self) -> int:
        """Where the RoPE bytes of an FP8 data row begin."""
        return self.d_nope + (0 if self.scales_at_page_end else self.scale_bytes)

    def page_stride(self, page_size: int, h_kv: int = 1) -> int:
        """Bytes from one page to the next in a pool that `empty_pages` makes."""
        payload = page_size * h_kv * self.row_bytes
        return -(-payload // self.page_multiple) * self.page_multiple

    def empty_pages(self, num_pages: int, page_size: int, h_kv: int = 1) -> Array:
        """A zeroed pool [num_pages, page_size, h_kv, row_elements] with this format's stride."""
        check_int("num_pages", num_pages, low=0)
        check_int("page_size", page_size, low=1)
        check_int("h_kv", h_kv, low=1, high=1 if self.is_fp8 else None)
        stride = self.page_stride(page_size, h_kv)
        buffer = np.zeros((num_pages, stride), np.uint8)
        return as_strided(
            buffer.view(self.dtype),
            (num_pages, page_size, h_kv, self.row_elements),
            (stride, h_kv * self.row_bytes, self.row_bytes, self.dtype.itemsize),
        )

    def __str__(self) -> str:
        return self.name


_BF16 = fp8.BF16
_FP16 = np.dtype(np.float16)
_U8 = np.dtype(np.uint8)

BF16 = KVLayout("BF16", _BF16, _BF16, d_qk=576, d_v=512, d_nope=512, row_elements=576)
FP16 = KVLayout("FP16", _FP16, _FP16, d_qk=576, d_v=512, d_nope=512, row_elements=576)
# fmt: off
V32_FP8 = KVLayout(
    "V32_FP8", _U8, _BF16, d_qk=576, d_v=512, d_nope=512, row_elements=656,
    tile=128, scale_bytes=16, default_scale_rule="flashmla",
)
V4_FP8 = KVLayout(
    "V4_FP8", _U8, _BF16, d_qk=512, d_v=512, d_nope=448, row_elements=584,
    tile=64, scale_bytes=8, scales_at_page_end=True, page_multiple=576, default_scale_rule="v4",
)
# fmt: on
LAYOUTS: tuple[KVLayout, ...] = (BF16, FP16, V32_FP8, V4_FP8)


def layout_of(argument: str, pages: Array) -> KVLayout:
    """The layout whose dtype and row size `pages` [pages, page_size, h_kv, row] has, else raise."""
    element = np.dtype(np.uint8) if _holds_bytes(pages.dtype) else pages.dtype
    for layout in LAYOUTS:
        if element == layout.dtype and pages.ndim == 4 and pages.shape[-1] == layout.row_elements:
            return layout
    known = ", ".join(f"{one.name} {one.dtype.name}[..., {one.row_elements}]" for one in LAYOUTS)
    raise bad_value(
        argument,
        f"{pages.dtype.name}{list(pages.shape)}",
        f"it must be [pages, page_size, h_kv, row] of a known layout: {known}",
        "Build it with cumla.PagedKVCache or cumla.pack_kv.",
    )


def _holds_bytes(dtype: np.dtype[Any]) -> bool:
    return dtype.itemsize == 1 and dtype.name in ("uint8", "int8", "float8_e4m3fn")


def check_layout(argument: str, value: Any) -> KVLayout:
    """Return `value` if it is a KVLayout, else raise."""
    if not isinstance(value, KVLayout):
        names = ", ".join(f"cumla.layouts.{one.name}" for one in LAYOUTS)
        raise bad_type(argument, repr(value), "it must be a KVLayout", f"Pass one of {names}.")
    return value


def check_scale_rule(layout: KVLayout, rule: Any) -> ScaleRule | None:
    """Return the scale rule to encode `layout` with (its default for None), else raise.

    None comes back for a layout without scales, which takes no rule.
    """
    if rule is None:
        return layout.default_scale_rule
    if not layout.is_fp8:
        raise bad_value(
            "scale_rule", repr(rule), f"layout {layout} has no scales", "Leave scale_rule out."
        )
    if not isinstance(rule, str):
        raise bad_type("scale_rule", repr(rule), "it must be a string", "Pass 'flashmla'.")
    allowed = [one for one in fp8.SCALE_RULES if one != "raw" or not layout.scales_at_page_end]
    if rule not in allowed:
        raise bad_value(
            "scale_rule",
            repr(rule),
            f"layout {layout} takes one of {', '.join(allowed)}",
            f"The default is {layout.default_scale_rule!r}.",
        )
    chosen: ScaleRule = rule
    return chosen


def check_pages(
    argument: str, pages: Any, layout: KVLayout, page_size: int | None = None, h_kv: int = 1
) -> Array:
    """Return the page pool `pages` with `layout`'s dtype (a view); raise if it is not legal for it.

    Legal: [pages, page_size, h_kv, row_elements], the layout's dtype (any one-byte view for FP8),
    contiguous rows, strides of at least a row that are multiples of 16 bytes. The tokens of an FP8
    page follow each other without a gap; padding of any such size may follow the page. Where the
    scales of a V4_FP8 page lie depends on its page size, so such a pool cannot be sliced along it.
    """
    if layout.is_fp8 and _holds_bytes(pages.dtype):
        # A view of the same bytes; int8 and float8 arrays hold nothing else.
        pages = pages.view(np.uint8)
    check_dtype(argument, pages, [layout.dtype])
    check_shape(
        argument,
        pages,
        ["pages", page_size if page_size else "page_size", h_kv, layout.row_elements],
    )
    check_last_stride(argument, pages)
    if 0 in pages.shape:
        raise bad_value(
            argument, f"shape {pages.shape}", "a pool needs a page and a token", "Allocate pages."
        )
    token_bytes = h_kv * layout.row_bytes
    if layout.is_fp8 and pages.shape[1] > 1 and pages.strides[1] != token_bytes:
        raise bad_value(
            argument,
            f"a token stride of {pages.strides[1]} bytes",
            f"the tokens of a {layout} page must follow each other every {token_bytes} bytes",
            "Copy the pages into layout.empty_pages(...).",
        )
    # Rows must not overlap; how pages of BF16 and FP16 rows are nested is free.
    for axis, name in ((0, "page"), (1, "token"), (2, "head")):
        stride = pages.strides[axis]
        # A dimension of size 1 is never stepped along, whatever stride it carries.
        if pages.shape[axis] == 1 or (layout.is_fp8 and axis > 0):
            continue
        least = pages.shape[1] * token_bytes if layout.is_fp8 else layout.row_bytes
        if stride < least or stride % _STRIDE_ALIGNMENT:
            raise bad_value(
                argument,
                f"a {name} stride of {stride} bytes",
                f"for {layout} pages of {pages.shape[1]} tokens it must be >= {least} and a "
                f"multiple of {_STRIDE_ALIGNMENT}",
                "Copy the pages into layout.empty_pages(...), whose page stride is "
                f"{layout.page_stride(pages.shape[1], h_kv)}.",
            )
    return pages


def _field(pages: Array, layout: KVLayout, offset: int, pitch: int, size: int) -> Bytes:
    """Bytes [offset, offset + size) of a checked FP8 page, and so each `pitch` bytes on: a view.

    [pages, page_size, size], with the field of one token in the last dimension.
    """
    num_pages, page_size = pages.shape[:2]
    # numpy cannot start a strided view at an offset beyond a row, so step over whole bytes of the
    # first page: it is contiguous for page_size * row_bytes.
    first_page = as_strided(pages, (page_size * layout.row_bytes,), (1,))
    shape, strides = (num_pages, page_size, size), (pages.strides[0], pitch, 1)
    return as_strided(first_page[offset:], shape, strides)


def _scale_field(pages: Array, layout: KVLayout) -> Array:
    """The scales of a checked FP8 pool, a view: UE8M0 groups of bytes, or float32."""
    size = layout.scale_bytes
    if layout.scales_at_page_end:
        return _field(pages, layout, pages.shape[1] * layout.data_row_bytes, size, size)
    field = _field(pages, layout, layout.d_nope, layout.data_row_bytes, size)
    return field.view(np.dtype("<f4"))


def as_rows(kv: Array, layout: KVLayout) -> Array:
    """`kv` rounded to the layout's compute dtype; what is too large becomes an infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        return kv.astype(layout.compute_dtype, copy=False)


def write_rows(
    pages: Array, layout: KVLayout, slots: NDArray[Any], rows: Array, rule: ScaleRule | None
) -> None:
    """Store `rows` [n, h_kv, d_qk] (the layout's compute dtype) at `slots` [n] of checked `pages`.

    FP8 rows (h_kv 1) are encoded on the way by `rule`. Slots must be distinct and in range.
    """
    page, offset = np.divmod(slots, pages.shape[1])
    if not layout.is_fp8:
        pages[page, offset] = rows
        return
    assert rule is not None
    pitch, rope_bytes = layout.data_row_bytes, layout.d_rope * _BF16.itemsize
    nope_field = _field(pages, layout, 0, pitch, layout.d_nope)
    rope_field = _field(pages, layout, layout.rope_offset, pitch, rope_bytes).view(_BF16)
    scale_field = _scale_field(pages, layout)
    for first in range(0, len(slots), _CHUNK_ROWS):
        part = slice(first, first + _CHUNK_ROWS)
        at, chunk = (page[part], offset[part]), rows[part, 0]
        tiles = np.ascontiguousarray(chunk[:, : layout.d_nope])
        codes, scales = fp8.encode_tiles(tiles.reshape(-1, layout.num_scales, layout.tile), rule)
        nope_field[at] = codes.reshape(-1, layout.d_nope)
        rope_field[at] = chunk[:, layout.d_nope :]
        if layout.scales_at_page_end:
            padded = np.zeros((len(scales), layout.scale_bytes), np.uint8)
            padded[:, : layout.num_scales] = fp8.encode_ue8m0(scales)
            scale_field[at] = padded
        else:
            scale_field[at] = scales


def _gather(pages: Array, layout: KVLayout, page: Array, offset: Array, head: int) -> Bytes:
    """The bytes of the data rows at (page, offset) [n]: uint8 [n, bytes], maybe scratch memory."""
    num_pages, page_size = pages.shape[:2]
    page_stride = pages.strides[0] if num_pages > 1 else 0
    pitch = layout.data_row_bytes if layout.is_fp8 else pages.strides[1]
    first = pages[0, 0, head].view(np.uint8)
    if pitch == layout.data_row_bytes and page_stride % pitch == 0:
        # All rows of the pool, and what may lie between pages, as one array: np.take copies its
        # rows straight to their place, which fancy indexing cannot.
        rows_a_page = page_stride // pitch
        rows = as_strided(first, ((num_pages - 1) * rows_a_page + page_size, pitch), (pitch, 1))
        target = scratch("layouts.gather", (len(page), pitch), np.uint8)
        return np.take(rows, page * rows_a_page + offset, axis=0, out=target, mode="clip")
    shape = (num_pages, page_size, layout.data_row_bytes)
    return as_strided(first, shape, (page_stride, pitch, 1))[page, offset]


def decode_rows(
    pages: Array, layout: KVLayout, slots: NDArray[Any], out: Array, head: int = 0
) -> None:
    """Decode the tokens at `slots` [n] of checked `pages` into `out` [n, d_qk].

    `out` is float32, or float64 for BF16 and FP16. Every value is one of the layout's compute
    dtype. Slots must be in range.
    """
    page, offset = np.divmod(slots, pages.shape[1])
    rows = _gather(pages, layout, page, offset, head)
    if not layout.is_fp8:
        np.copyto(out, rows.view(layout.dtype))
        return
    if layout.scales_at_page_end:
        scales = _scale_field(pages, layout)[page, offset][:, : layout.num_scales]
        scales = fp8.decode_ue8m0(scales)
    else:
        scales = rows[:, layout.d_nope : layout.rope_offset].view(np.dtype("<f4"))
    codes = rows[:, : layout.d_nope].reshape(-1, layout.num_scales, layout.tile)
    fp8.decode_tiles(codes, scales, out[:, : layout.d_nope].reshape(codes.shape))
    np.copyto(out[:, layout.d_nope :], rows[:, layout.rope_offset :].view(_BF16))


def read_rows(pages: Array, layout: KVLayout, slots: NDArray[Any]) -> Array:
    """The decoded tokens at `slots` [n] of checked `pages`: [n, d_qk] in the compute dtype."""
    rows = np.empty((len(slots), layout.d_qk), layout.compute_dtype)
    chunk = np.empty((min(_CHUNK_ROWS, len(slots)), layout.d_qk), np.float32)
    for first in range(0, len(slots), _CHUNK_ROWS):
        part = slots[first : first + _CHUNK_ROWS]
        decode_rows(pages, layout, part, chunk[: len(part)])
        with np.errstate(invalid="ignore"):  # signalling NaN
            rows[first : first + len(part)] = chunk[: len(part)]
    return rows


def pack_kv(
    kv: Array, layout: KVLayout, page_size: int, *, scale_rule: ScaleRule | None = None
) -> Array:
    """Encode `kv` into a fresh page pool of `layout`.

    Args:
        kv: [pages, page_size, h_kv, d_qk], bfloat16, float16 or float32; rounded to the layout's
            compute dtype first. h_kv is 1 for the FP8 layouts.
        layout: one of `cumla.layouts`.
        page_size: tokens a page; must equal kv's second dimension.
        scale_rule: "flashmla", "v4" or "raw" (V32_FP8 only), see `cumla.fp8.tile_scale`; by
            default "flashmla" for V32_FP8 and "v4" for V4_FP8. vLLM and SGLang write V32 as
            "raw". Not for BF16 and FP16.

    Returns:
        [pages, page_size, h_kv, row_elements] in the layout's dtype (uint8 for FP8), with a page
        stride of `layout.page_stride(page_size)` bytes; padding bytes are 0.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
    """
    check_layout("layout", layout)
    check_int("page_size", page_size, low=1)
    check_array("kv", kv)
    check_dtype("kv", kv, [_BF16, _FP16, np.float32])
    heads: int | str = 1 if layout.is_fp8 else "h_kv"
    check_shape("kv", kv, ["pages", page_size, heads, layout.d_qk])
    if 0 in kv.shape:
        raise bad_value(
            "kv", f"shape {kv.shape}", "a pool needs a page and a token", "Pass at least one page."
        )
    rule = check_scale_rule(layout, scale_rule)
    num_pages, _, h_kv, _ = kv.shape
    pages = layout.empty_pages(num_pages, page_size, h_kv)
    rows = as_rows(kv, layout).reshape(-1, h_kv, layout.d_qk)
    write_rows(pages, layout, np.arange(len(rows)), rows, rule)
    return pages


def unpack_kv(pages: Array, layout: KVLayout, page_size: int) -> Array:
    """Decode a whole page pool.

    Args:
        pages: [pages, page_size, h_kv, row_elements] in the layout's dtype (int8 and float8_e4m3fn
            views of FP8 bytes are taken too), with any legal page stride (see `check_pages`).
        layout: one of `cumla.layouts`.
        page_size: tokens a page; must equal pages' second dimension.

    Returns:
        [pages, page_size, h_kv, d_qk], bfloat16 (float16 for FP16). NaN codes stay NaN.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
    """
    check_layout("layout", layout)
    check_int("page_size", page_size, low=1)
    check_array("pages", pages)
    h_kv = 1 if layout.is_fp8 or pages.ndim != 4 else pages.shape[2]
    pages = check_pages("pages", pages, layout, page_size, h_kv)
    if not layout.is_fp8:
        return pages.copy()
    kv = read_rows(pages, layout, np.arange(pages.shape[0] * page_size))
    return kv.reshape(pages.shape[0], page_size, 1, layout.d_qk)
