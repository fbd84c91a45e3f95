"""KV rows and pages: golden pages byte for byte, legal and illegal pools, poison in what is unread.

The golden pages are put together byte by byte from the format's description, with the number
oracles of `test_fp8`; nothing of `cumla` has a part in them.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from poison import poison, scattered, with_page_stride
from test_fp8 import LARGEST_BF16, e4m3_value, encode_by_search, exact_scale, round_to_bf16

from cumla import layouts
from cumla.checks import ArgumentError, ArgumentTypeError
from cumla.fp8 import ScaleRule
from cumla.layouts import BF16, FP16, V4_FP8, V32_FP8, KVLayout, pack_kv, unpack_kv

Array = NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

FP8_LAYOUTS = pytest.mark.parametrize("layout", [V32_FP8, V4_FP8], ids=str)
# A power-of-two scale is one in bf16 too; "raw" ones are not, and V4 has no byte for them.
POWER_OF_TWO = [(one, rule) for one in (V32_FP8, V4_FP8) for rule in ("flashmla", "v4")]
POWER_OF_TWO_RULES = pytest.mark.parametrize(("layout", "rule"), POWER_OF_TWO, ids=str)
ALL_RULES = pytest.mark.parametrize(("layout", "rule"), [*POWER_OF_TWO, (V32_FP8, "raw")], ids=str)

# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "row_bytes", "data_row_bytes", "d_qk", "d_nope", "num_scales", "elements"),
    [
        (BF16, 1152, 1152, 576, 512, 0, 576),
        (FP16, 1152, 1152, 576, 512, 0, 576),
        (V32_FP8, 656, 656, 576, 512, 4, 656),
        (V4_FP8, 584, 576, 512, 448, 7, 584),
    ],
    ids=str,
)
def test_the_numbers_of_a_layout(
    layout: KVLayout,
    row_bytes: int,
    data_row_bytes: int,
    d_qk: int,
    d_nope: int,
    num_scales: int,
    elements: int,
) -> None:
    assert layout.row_bytes == row_bytes
    assert layout.data_row_bytes == data_row_bytes
    assert (layout.d_qk, layout.d_nope, layout.d_rope, layout.d_v) == (d_qk, d_nope, 64, 512)
    assert layout.num_scales == num_scales
    assert layout.is_fp8 == (num_scales > 0)
    assert layout.row_elements == elements
    assert str(layout) == layout.name
    assert getattr(layouts, layout.name) is layout
    assert layout.compute_dtype == (np.float16 if layout is FP16 else BFLOAT16)
    assert layout.dtype == (np.uint8 if layout.is_fp8 else layout.compute_dtype)


def test_the_layouts_are_these_four() -> None:
    assert layouts.LAYOUTS == (BF16, FP16, V32_FP8, V4_FP8)


@pytest.mark.parametrize(
    ("layout", "page_size", "h_kv", "stride"),
    [
        (V4_FP8, 64, 1, 37440),
        (V4_FP8, 256, 1, 149760),
        (V4_FP8, 128, 1, 74880),
        (V4_FP8, 2, 1, 1728),
        (V4_FP8, 61, 1, 35712),
        (V4_FP8, 69, 1, 40320),
        (V4_FP8, 72, 1, 42048),  # 72 * 584 is 73 * 576: no padding
        (V4_FP8, 576, 1, 336384),
        (V32_FP8, 64, 1, 41984),
        (V32_FP8, 61, 1, 40016),
        (BF16, 64, 1, 73728),
        (FP16, 1, 3, 3456),
    ],
    ids=str,
)
def test_page_stride(layout: KVLayout, page_size: int, h_kv: int, stride: int) -> None:
    assert layout.page_stride(page_size, h_kv) == stride
    pages = layout.empty_pages(2, page_size, h_kv)
    assert pages.dtype == layout.dtype
    assert pages.shape == (2, page_size, h_kv, layout.row_elements)
    assert pages.strides == (
        stride,
        h_kv * layout.row_bytes,
        layout.row_bytes,
        layout.dtype.itemsize,
    )
    memory = memory_of(pages, stride)
    assert not memory.any()
    # All of it is there to be written, the last page's padding too.
    poison(memory)


def memory_of(pages: Array, stride: int | None = None) -> Array:
    """Every byte of a pool as uint8 [pages, stride], the padding after each page included."""
    stride = pages.strides[0] if stride is None else stride
    return as_strided(pages.view(np.uint8), (len(pages), stride), (stride, 1))


# --- golden pages ---------------------------------------------------------------------------------


def golden_tile(tile: Array, rule: ScaleRule) -> tuple[bytes, float]:
    """The codes of a bf16 tile, and its scale."""
    values = tile.astype(np.float64)
    # NaN has no part in the largest magnitude, an infinity that of the largest bf16.
    sizes = [min(abs(one), LARGEST_BF16) for one in values.tolist() if not math.isnan(one)]
    scale = exact_scale(max(sizes, default=0.0), rule)
    # The quotient is a float32 number before it is an e4m3 one.
    quotient = (values / scale).astype(np.float32)
    return encode_by_search(quotient.astype(np.float64)).tobytes(), scale


def golden_v32_page(page: Array, rule: ScaleRule) -> bytes:
    """The 656-byte rows of bf16 page [page_size, 576]."""
    result = b""
    for row in page:
        tiles = [golden_tile(row[at : at + 128], rule) for at in range(0, 512, 128)]
        result += b"".join(codes for codes, _ in tiles)
        result += struct.pack("<4f", *(scale for _, scale in tiles))
        result += struct.pack("<64H", *row[512:].view(np.uint16).tolist())
    assert len(result) == 656 * len(page)
    return result


def golden_v4_page(page: Array, rule: ScaleRule) -> bytes:
    """Data rows, scale groups, zeros up to a multiple of 576, of bf16 page [page_size, 512]."""
    data, groups = b"", b""
    for row in page:
        tiles = [golden_tile(row[at : at + 64], rule) for at in range(0, 448, 64)]
        data += b"".join(codes for codes, _ in tiles)
        data += struct.pack("<64H", *row[448:].view(np.uint16).tolist())
        groups += bytes(int(math.log2(scale)) + 127 for _, scale in tiles) + b"\0"
    assert (len(data), len(groups)) == (576 * len(page), 8 * len(page))
    result = data + groups
    return result + b"\0" * (-len(result) % 576)


def awkward_kv(num_pages: int, page_size: int, layout: KVLayout, seed: int) -> Array:
    """bf16 [pages, page_size, 1, d_qk]: tiles of all sizes, zero tiles, zeros of both signs."""
    rng = np.random.default_rng(seed)
    shape = num_pages, page_size, 1, layout.d_qk
    tile_size = np.exp2(rng.uniform(-30, 12, (*shape[:3], layout.d_qk // 64, 1)))
    kv = (rng.standard_normal((*shape[:3], layout.d_qk // 64, 64)) * tile_size).reshape(shape)
    kv[rng.random(shape) < 0.01] = 0.0
    kv[rng.random(shape) < 0.01] = -0.0
    kv[0, 0, 0, : layout.tile] = 0.0
    kv[-1, -1, 0, 2 * layout.tile : 3 * layout.tile] = -0.0
    return kv.astype(BFLOAT16)


def golden_pool(kv: Array, layout: KVLayout, rule: ScaleRule) -> bytes:
    golden_page = golden_v32_page if layout is V32_FP8 else golden_v4_page
    return b"".join(golden_page(page[:, 0], rule) for page in kv)


@ALL_RULES
@pytest.mark.parametrize(("num_pages", "page_size"), [(2, 3), (1, 1), (3, 2), (1, 131)])
def test_golden_pages(layout: KVLayout, rule: ScaleRule, num_pages: int, page_size: int) -> None:
    kv = awkward_kv(num_pages, page_size, layout, seed=page_size)
    pages = pack_kv(kv, layout, page_size, scale_rule=rule)
    assert pages.dtype == np.uint8
    assert pages.shape == (num_pages, page_size, 1, layout.row_elements)
    assert memory_of(pages, layout.page_stride(page_size)).tobytes() == golden_pool(
        kv, layout, rule
    )


@ALL_RULES
def test_golden_page_of_nan_and_infinity(layout: KVLayout, rule: ScaleRule) -> None:
    kv = awkward_kv(1, 4, layout, seed=20)
    kv[0, 0, 0, 3] = kv[0, 0, 0, layout.d_nope + 1] = np.nan
    kv[0, 1, 0, 200] = np.inf
    kv[0, 2, 0, 300] = -np.inf
    kv[0, 2, 0, layout.d_nope + 2] = np.inf
    kv[0, 3] = np.nan
    pages = pack_kv(kv, layout, 4, scale_rule=rule)
    assert memory_of(pages, layout.page_stride(4)).tobytes() == golden_pool(kv, layout, rule)


@FP8_LAYOUTS
def test_the_usual_rule_is_the_default(layout: KVLayout) -> None:
    kv = awkward_kv(1, 3, layout, seed=21)
    usual: ScaleRule = "flashmla" if layout is V32_FP8 else "v4"
    other: ScaleRule = "v4" if layout is V32_FP8 else "flashmla"
    assert layout.default_scale_rule == usual
    pages = pack_kv(kv, layout, 3)
    np.testing.assert_array_equal(pages, pack_kv(kv, layout, 3, scale_rule=usual))
    assert (pages != pack_kv(kv, layout, 3, scale_rule=other)).any()


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=str)
def test_pack_rounds_to_the_compute_dtype_first(layout: KVLayout, dtype: Any) -> None:
    kv = np.random.default_rng(22).standard_normal((2, 3, 1, layout.d_qk)).astype(dtype)
    expected = pack_kv(kv.astype(layout.compute_dtype), layout, 3)
    for given_kv in (kv, scattered(kv), kv[:, ::-1][:, ::-1]):
        before = given_kv.tobytes()
        pages = pack_kv(given_kv, layout, 3)
        assert given_kv.tobytes() == before
        np.testing.assert_array_equal(memory_of(pages), memory_of(expected))


def test_pack_float32_of_any_bits_without_a_warning() -> None:
    kv = np.zeros((1, 1, 1, 576), np.float32)
    # Two signalling NaNs, an infinity, and the largest float32, which rounds to one in bf16.
    kv.view(np.uint32)[..., :4] = 0x7F800001, 0xFF800001, 0xFF800000, 0x7F7FFFFF
    expected = [math.nan, math.nan, -math.inf, math.inf]
    packed = pack_kv(kv, BF16, 1)[0, 0, 0, :4].astype(np.float32)
    np.testing.assert_array_equal(packed, expected)
    assert pack_kv(kv, V32_FP8, 1)[0, 0, 0, :4].tolist() == [0x7F, 0x7F, 0xFE, 0x7E]
    packed = pack_kv(kv[..., :3].repeat(192, axis=-1), FP16, 1)[0, 0, 0, ::192].astype(np.float32)
    np.testing.assert_array_equal(packed, expected[:3])


# --- reading --------------------------------------------------------------------------------------


def decoded_token(page: bytes, layout: KVLayout, page_size: int, token: int) -> list[float]:
    """One token out of the bytes of its page."""
    if layout is V32_FP8:
        row = page[token * 656 : (token + 1) * 656]
        scales = list(struct.unpack("<4f", row[512:528]))
        nope, rope, tile = row[:512], row[528:], 128
    else:
        row = page[token * 576 : (token + 1) * 576]
        group = page[page_size * 576 + token * 8 :][:7]
        scales = [math.nan if one == 255 else 2.0 ** (one - 127) for one in group]
        nope, rope, tile = row[:448], row[448:], 64
    with np.errstate(invalid="ignore"):
        rounded = round_to_bf16(np.array(scales)).tolist()
        products = [e4m3_value(code) * rounded[at // tile] for at, code in enumerate(nope)]
    # bf16 is the upper half of a float32.
    upper = b"".join(b"\0\0" + rope[at : at + 2] for at in range(0, 128, 2))
    return [*round_to_bf16(np.array(products)).tolist(), *struct.unpack("<64f", upper)]


def decoded_pool(pages: Array, layout: KVLayout) -> Array:
    """float64 [pages, page_size, 1, d_qk] of a pool, by plain loops."""
    page_size = pages.shape[1]
    content = memory_of(pages, pages.strides[0])[:, : page_size * layout.row_bytes]
    return np.array(
        [
            [[decoded_token(page.tobytes(), layout, page_size, at)] for at in range(page_size)]
            for page in content
        ]
    )


def random_bytes(layout: KVLayout, num_pages: int, page_size: int, seed: int) -> Array:
    """A pool whose every byte is random, but for V32 scales: those are random numbers."""
    rng = np.random.default_rng(seed)
    pages = layout.empty_pages(num_pages, page_size)
    memory = memory_of(pages, layout.page_stride(page_size))
    memory[...] = rng.integers(0, 256, memory.shape)
    if layout is V32_FP8:
        scales = np.exp2(rng.uniform(-140, 120, (num_pages, page_size, 4))).astype("<f4")
        scales *= rng.choice([-1, 1], scales.shape)
        pages[..., 0, 512:528] = scales.view(np.uint8)
    return pages


def assert_decodes(pages: Array, layout: KVLayout, expected: Array) -> None:
    kv = unpack_kv(pages, layout, pages.shape[1])
    assert kv.dtype == BFLOAT16
    assert kv.shape == (*pages.shape[:2], 1, layout.d_qk)
    np.testing.assert_array_equal(kv.astype(np.float64), expected)


@FP8_LAYOUTS
@pytest.mark.parametrize(("num_pages", "page_size"), [(3, 2), (1, 1), (2, 67)])
def test_unpack_against_a_plain_loop(layout: KVLayout, num_pages: int, page_size: int) -> None:
    pages = random_bytes(layout, num_pages, page_size, seed=30)
    assert_decodes(pages, layout, decoded_pool(pages, layout))


def test_unpack_takes_every_float32_scale() -> None:
    pages = random_bytes(V32_FP8, 2, 16, seed=31)
    scales = np.random.default_rng(32).integers(0, 2**32, (2, 16, 4), dtype=np.uint32)
    scales[0, 0] = 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0
    scales[0, 1] = 1, 0x80000001, 0x7FC00000, 0x7F800001
    pages[..., 0, 512:528] = scales.astype("<u4").view(np.uint8)
    assert_decodes(pages, V32_FP8, decoded_pool(pages, V32_FP8))


@FP8_LAYOUTS
@pytest.mark.parametrize("dtype", [np.dtype(np.uint8), np.dtype(np.int8), E4M3], ids=str)
def test_unpack_takes_any_byte_dtype_and_legal_page_stride(layout: KVLayout, dtype: Any) -> None:
    for page_size in (2, 5):
        pages = random_bytes(layout, 3, page_size, seed=33)
        expected = decoded_pool(pages, layout)
        payload = page_size * layout.row_bytes
        assert_decodes(pages.view(dtype), layout, expected)
        # Padded by a row and by no page multiple; the least; one that a 4 KiB allocator makes.
        # V4 pages of 5 tokens are 2920 bytes, which is no multiple of 16.
        for stride in (payload + layout.row_bytes, payload, payload + 16, 8192):
            stride = -(-stride // 16) * 16
            moved = with_page_stride(pages, payload, stride).view(dtype)
            assert_decodes(moved, layout, expected)
    # The spec's own example: a spare row after every page.
    pages = random_bytes(V32_FP8, 2, 64, seed=34)
    moved = with_page_stride(pages, 64 * 656, 65 * 656)
    assert moved.strides[0] == 65 * 656
    np.testing.assert_array_equal(
        unpack_kv(moved, V32_FP8, 64).view(np.uint16), unpack_kv(pages, V32_FP8, 64).view(np.uint16)
    )


@FP8_LAYOUTS
def test_a_dimension_of_one_may_carry_any_stride(layout: KVLayout) -> None:
    pages = random_bytes(layout, 3, 4, seed=35)
    expected = decoded_pool(pages, layout)
    for at in range(3):
        assert_decodes(pages[at : at + 1], layout, expected[at : at + 1])
        odd = as_strided(pages[at:], (1, *pages.shape[1:]), (7, *pages.strides[1:]))
        assert_decodes(odd, layout, expected[at : at + 1])
    assert_decodes(pages[::2], layout, expected[::2])
    pages = random_bytes(layout, 3, 1, seed=36)
    odd = as_strided(pages, pages.shape, (pages.strides[0], 7, 7, 1))
    assert_decodes(odd, layout, decoded_pool(pages, layout))


def test_v4_padding_may_hold_anything() -> None:
    kv = awkward_kv(3, 5, V4_FP8, seed=38)
    pages = pack_kv(kv, V4_FP8, 5)
    expected = unpack_kv(pages, V4_FP8, 5)
    memory = memory_of(pages)
    poison(memory[:, 5 * 584 :])
    for token in range(5):
        poison(memory[:, 5 * 576 + 8 * token + 7])
    assert (memory[:, 5 * 576 + 7] != 0).all()
    after = unpack_kv(pages, V4_FP8, 5)
    np.testing.assert_array_equal(after.view(np.uint16), expected.view(np.uint16))


@FP8_LAYOUTS
def test_nan_stays_nan_where_it_stands(layout: KVLayout) -> None:
    kv = np.ones((1, 3, 1, layout.d_qk), BFLOAT16)
    places = [(0, 1, 0, 5), (0, 2, 0, layout.d_nope - 1), (0, 0, 0, layout.d_qk - 1)]
    for place in places:
        kv[place] = np.nan
    back = unpack_kv(pack_kv(kv, layout, 3), layout, 3).astype(np.float32)
    assert sorted(map(tuple, np.argwhere(np.isnan(back)).tolist())) == sorted(places)
    assert (back[~np.isnan(back)] == 1).all()
    # Both NaN codes; a NaN scale takes its tile alone.
    pages = pack_kv(np.ones((1, 3, 1, layout.d_qk), BFLOAT16), layout, 3)
    memory = memory_of(pages)[0]
    memory[0], memory[1] = 0x7F, 0xFF
    if layout is V32_FP8:
        memory[2 * 656 + 516 : 2 * 656 + 520] = 0xFF
    else:
        memory[3 * 576 + 2 * 8 + 1] = 0xFF
    back = unpack_kv(pages, layout, 3).astype(np.float32)
    expected = np.zeros(back.shape, bool)
    expected[0, 0, 0, :2] = True
    expected[0, 2, 0, layout.tile : 2 * layout.tile] = True
    np.testing.assert_array_equal(np.isnan(back), expected)


@pytest.mark.parametrize("h_kv", [1, 2, 8])
@pytest.mark.parametrize("layout", [BF16, FP16], ids=str)
def test_unscaled_pages_hold_the_values(layout: KVLayout, h_kv: int) -> None:
    kv = np.random.default_rng(37).standard_normal((3, 4, h_kv, 576)).astype(layout.compute_dtype)
    kv[0, 1, 0, :3] = np.nan, np.inf, -0.0
    pages = pack_kv(kv, layout, 4)
    assert pages.dtype == layout.dtype
    assert pages.strides == (4 * h_kv * 1152, h_kv * 1152, 1152, 2)
    assert pages.tobytes() == kv.tobytes()
    for pool in (pages, scattered(pages), scattered(pages)[::2]):
        back = unpack_kv(pool, layout, 4)
        assert back.dtype == layout.compute_dtype
        assert back.tobytes() == pool.tobytes()
        assert not np.shares_memory(back, pool)


# --- single rows ----------------------------------------------------------------------------------


def token_bytes(layout: KVLayout, page_size: int, offset: int) -> list[range]:
    """The bytes of its page that belong to the token at `offset`."""
    if layout is V4_FP8:
        group = page_size * 576 + offset * 8
        return [range(offset * 576, (offset + 1) * 576), range(group, group + 8)]
    return [range(offset * layout.row_bytes, (offset + 1) * layout.row_bytes)]


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=str)
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_write_rows_touches_only_its_tokens(layout: KVLayout, index_dtype: Any) -> None:
    num_pages, page_size = 5, 61
    stride = layout.page_stride(page_size) + 16 * 576
    pages = layout.empty_pages(num_pages, page_size)
    if layout.is_fp8:
        pages = with_page_stride(pages, page_size * layout.row_bytes, stride)
    memory = memory_of(pages)
    poison(memory)
    # Enough of them for more than one chunk, in no order, the first and last token among them.
    slots = np.random.default_rng(40).permutation(num_pages * page_size)[:140]
    slots = np.unique([0, num_pages * page_size - 1, *slots])
    slots = np.random.default_rng(41).permutation(slots).astype(index_dtype)
    assert len(slots) > 128
    kv = np.random.default_rng(42).standard_normal((len(slots), 1, 1, layout.d_qk))
    kv = kv.astype(layout.compute_dtype)

    expected = memory.copy()
    alone = memory_of(pack_kv(kv, layout, 1))  # every row in a page of its own
    for at, slot in enumerate(slots.tolist()):
        page, offset = slot // page_size, slot % page_size
        parts = zip(token_bytes(layout, page_size, offset), token_bytes(layout, 1, 0), strict=True)
        for to, source in parts:
            expected[page, to.start : to.stop] = alone[at, source.start : source.stop]

    layouts.write_rows(pages, layout, slots, kv[:, 0], layout.default_scale_rule)
    np.testing.assert_array_equal(memory, expected)


def test_write_rows_of_nothing() -> None:
    pages = V4_FP8.empty_pages(1, 2)
    layouts.write_rows(pages, V4_FP8, np.zeros(0, np.int64), np.zeros((0, 1, 512), BFLOAT16), "v4")
    assert not pages.any()


def test_write_rows_takes_heads_and_strided_rows() -> None:
    pages = poison(BF16.empty_pages(2, 3, 2))
    rows = np.random.default_rng(43).standard_normal((2, 2, 576)).astype(BFLOAT16)
    layouts.write_rows(pages, BF16, np.array([4, 0]), scattered(rows), None)
    np.testing.assert_array_equal(pages[1, 1], rows[0])
    np.testing.assert_array_equal(pages[0, 0], rows[1])
    assert np.isnan(pages.astype(np.float32)).sum() == 4 * 2 * 576
    for layout in (V32_FP8, V4_FP8):
        rows = np.random.default_rng(44).standard_normal((3, 1, layout.d_qk)).astype(BFLOAT16)
        pages, same = layout.empty_pages(2, 3), layout.empty_pages(2, 3)
        slots, rule = np.array([5, 0, 3]), layout.default_scale_rule
        layouts.write_rows(pages, layout, slots, scattered(rows), rule)
        layouts.write_rows(same, layout, slots, rows, rule)
        np.testing.assert_array_equal(pages, same)


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=str)
def test_decode_rows_gathers(layout: KVLayout) -> None:
    kv = np.random.default_rng(45).standard_normal((4, 7, 1, layout.d_qk)).astype(np.float32)
    pages = pack_kv(kv, layout, 7)
    everything = unpack_kv(pages, layout, 7).reshape(-1, layout.d_qk)
    slots = np.array([27, 0, 13, 13, 6, 7], np.int32)
    out = scattered(np.zeros((6, layout.d_qk), np.float32))
    layouts.decode_rows(pages, layout, slots, out)
    np.testing.assert_array_equal(out, everything[slots].astype(np.float32))
    layouts.decode_rows(pages, layout, slots[:0], out[:0])


@pytest.mark.parametrize("layout", [V32_FP8, V4_FP8], ids=str)
def test_decode_rows_reads_nobody_else(layout: KVLayout) -> None:
    pages = pack_kv(awkward_kv(2, 5, layout, seed=46), layout, 5)
    everything = unpack_kv(pages, layout, 5).reshape(-1, layout.d_qk)
    memory = memory_of(pages)
    content = memory.copy()
    poison(memory)
    slots = np.array([3, 9, 5])
    for slot in slots:
        for part in token_bytes(layout, 5, slot % 5):
            kept = slice(part.start, part.stop)
            memory[slot // 5, kept] = content[slot // 5, kept]
    out = np.empty((3, layout.d_qk), np.float32)
    layouts.decode_rows(pages, layout, slots, out)
    np.testing.assert_array_equal(out, everything[slots].astype(np.float32))


# --- packing twice --------------------------------------------------------------------------------

kv_rows = st.tuples(st.integers(0, 2**32 - 1), st.integers(-40, 30), st.integers(0, 30))


def fuzzed_kv(layout: KVLayout, row: tuple[int, int, int]) -> Array:
    """bf16 [1, 2, 1, d_qk] from a seed, the log2 of its size, and the spread of sizes inside it."""
    seed, size, spread = row
    rng = np.random.default_rng(seed)
    shape = 1, 2, 1, layout.d_qk
    return (rng.standard_normal(shape) * np.exp2(size - rng.uniform(0, spread, shape))).astype(
        BFLOAT16
    )


@POWER_OF_TWO_RULES
@settings(max_examples=40, deadline=None)
@given(row=kv_rows)
def test_packing_again_changes_no_value(
    layout: KVLayout, rule: ScaleRule, row: tuple[int, int, int]
) -> None:
    once = pack_kv(fuzzed_kv(layout, row), layout, 2, scale_rule=rule)
    values = unpack_kv(once, layout, 2)
    twice = pack_kv(values, layout, 2, scale_rule=rule)
    np.testing.assert_array_equal(
        unpack_kv(twice, layout, 2).view(np.uint16), values.view(np.uint16)
    )
    # (Not so for "raw", whose scale is rounded in reading, which moves amax and the next scale.)
    # The bytes may differ once: an amax that rounds down to exactly 224 scales asks for half the
    # scale the next time, under which every code means twice as much. From then on they stay.
    thrice = pack_kv(unpack_kv(twice, layout, 2), layout, 2, scale_rule=rule)
    np.testing.assert_array_equal(memory_of(thrice), memory_of(twice))


@FP8_LAYOUTS
def test_a_peak_that_rounds_down_to_224_scales_halves_the_scale(layout: KVLayout) -> None:
    kv = np.full((1, 1, 1, layout.d_qk), 1.0, BFLOAT16)
    kv[0, 0, 0, 0] = 226  # above 448 / 2, so scale 1; the code nearest to it is 224's
    once = pack_kv(kv, layout, 1)
    values = unpack_kv(once, layout, 1)
    assert values[0, 0, 0, 0] == 224
    twice = pack_kv(values, layout, 1)
    codes = once[0, 0, 0, :2].tolist(), twice[0, 0, 0, :2].tolist()
    assert codes == ([0x76, 0x38], [0x7E, 0x40])
    np.testing.assert_array_equal(unpack_kv(twice, layout, 1), values)


# --- what is refused ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A call that must raise `error` with a message that `message` (a pattern) is found in."""

    name: str
    error: type[Exception]
    message: str
    array: Any
    layout: Any
    page_size: Any = 2
    rule: Any = None

    def __str__(self) -> str:
        return self.name


VALUE, TYPE = ArgumentError, ArgumentTypeError


def kv_of(*shape: int, dtype: Any = np.float32) -> Array:
    return np.zeros(shape, dtype)


KV_576, KV_512 = kv_of(1, 2, 1, 576), kv_of(1, 2, 1, 512)

REFUSED_KV = [
    Refusal("layout None", TYPE, "layout: got None", KV_576, None),
    Refusal("layout name", TYPE, "layout: got 'V32_FP8'", KV_576, "V32_FP8"),
    Refusal("page_size 0", VALUE, "page_size: got 0", kv_of(1, 0, 1, 576), BF16, 0),
    Refusal("page_size -1", VALUE, "page_size: got -1", KV_576, BF16, -1),
    Refusal("page_size 2.0", TYPE, "page_size: got 2.0", KV_576, BF16, 2.0),
    Refusal("page_size True", TYPE, "page_size: got True", kv_of(1, 1, 1, 576), BF16, True),
    Refusal("page_size mismatch", VALUE, "kv: got shape .*3, 1, 576", KV_576, V32_FP8, 3),
    Refusal("list", TYPE, "kv: got list", [[0.0]], BF16),
    Refusal("rank 3", VALUE, "kv: got 3 dimensions", kv_of(2, 1, 576), BF16),
    Refusal("rank 5", VALUE, "kv: got 5 dimensions", kv_of(1, 1, 2, 1, 576), BF16),
    Refusal("last dim 512 for V32", VALUE, "kv: got shape .*512.*576", KV_512, V32_FP8),
    Refusal("last dim 576 for V4", VALUE, "kv: got shape .*576.*512", KV_576, V4_FP8),
    Refusal("last dim 656", VALUE, "kv: got shape .*576", kv_of(1, 2, 1, 656), V32_FP8),
    Refusal("float64", TYPE, "kv: got dtype float64", KV_576.astype(np.float64), BF16),
    Refusal("int32", TYPE, "kv: got dtype int32", KV_576.astype(np.int32), BF16),
    Refusal("uint8", TYPE, "kv: got dtype uint8", KV_576.astype(np.uint8), V32_FP8),
    Refusal("big-endian", TYPE, "kv: got dtype", KV_576.astype(">f4"), V32_FP8),
    Refusal("two heads V32", VALUE, "kv: got shape .*2, 2, 576", kv_of(1, 2, 2, 576), V32_FP8),
    Refusal("two heads V4", VALUE, "kv: got shape .*2, 2, 512", kv_of(1, 2, 2, 512), V4_FP8),
    Refusal("no heads", VALUE, "kv: got ", kv_of(1, 2, 0, 576), BF16),
    Refusal("no pages", VALUE, "kv: got ", kv_of(0, 2, 1, 576), BF16),
    Refusal("no pages V4", VALUE, "kv: got ", kv_of(0, 2, 1, 512), V4_FP8),
    Refusal("raw on V4", VALUE, "scale_rule: got 'raw'; layout V4_FP8", KV_512, V4_FP8, rule="raw"),
    Refusal("raw on BF16", VALUE, "scale_rule: got 'raw'; layout BF16", KV_576, BF16, rule="raw"),
    Refusal("v4 on FP16", VALUE, "scale_rule: got 'v4'; layout FP16", KV_576, FP16, rule="v4"),
    Refusal("no such rule", VALUE, "'max'.*flashmla, v4, raw", KV_576, V32_FP8, rule="max"),
    Refusal("rule 1", TYPE, "scale_rule: got 1", KV_576, V32_FP8, rule=1),
]


@pytest.mark.parametrize("case", REFUSED_KV, ids=str)
def test_pack_refuses(case: Refusal) -> None:
    with pytest.raises(case.error, match=case.message):
        pack_kv(case.array, case.layout, case.page_size, scale_rule=case.rule)


def pool(layout: KVLayout, *shape: int, strides: tuple[int, ...]) -> Array:
    """A pool with just these strides (in bytes), inside a buffer large enough for them."""
    buffer = np.zeros(1 << 15, np.uint8).view(layout.dtype)
    return as_strided(buffer, (*shape, layout.row_elements), strides)


V32_POOL, V4_POOL, BF16_POOL = (one.empty_pages(2, 2) for one in (V32_FP8, V4_FP8, BF16))
UNPADDED_V4 = np.zeros((2, 3, 1, 584), np.uint8)
OTHER_BYTES = V4_POOL.view(ml_dtypes.float8_e5m2)
BOOLS = np.zeros((1, 2, 1, 656), bool)
# Strides of (page, token, head, element).
GAPS_V32 = pool(V32_FP8, 2, 2, 1, strides=(2688, 672, 672, 1))
STRIDE_2_V32 = pool(V32_FP8, 2, 2, 1, strides=(2624, 1312, 1312, 2))
OVERLAP_V32 = pool(V32_FP8, 2, 2, 1, strides=(656, 656, 656, 1))
ODD_V32 = pool(V32_FP8, 2, 2, 1, strides=(1320, 656, 656, 1))
ROWS_576_V4 = pool(V4_FP8, 2, 2, 1, strides=(1728, 576, 576, 1))
OVERLAP_V4 = pool(V4_FP8, 2, 2, 1, strides=(1152, 584, 584, 1))
STRIDE_4_BF16 = pool(BF16, 2, 2, 1, strides=(4608, 2304, 2304, 4))
ODD_PAGES_BF16 = pool(BF16, 2, 1, 1, strides=(1160, 1152, 1152, 2))
ODD_TOKENS_BF16 = pool(BF16, 2, 2, 1, strides=(4608, 1160, 1152, 2))
ODD_HEADS_BF16 = pool(BF16, 2, 2, 2, strides=(9216, 4608, 1160, 2))
OVERLAP_BF16 = pool(BF16, 2, 2, 2, strides=(9216, 4608, 576, 2))
SAME_PAGE = np.broadcast_to(V4_FP8.empty_pages(1, 2), (3, 2, 1, 584))
SAME_TOKEN = np.broadcast_to(BF16.empty_pages(2, 1), (2, 2, 1, 576))

REFUSED_POOLS = [
    Refusal("layout None", TYPE, "layout: got None", V32_POOL, None),
    Refusal("layout dtype", TYPE, "layout: got", V32_POOL, np.uint8),
    Refusal("page_size 0", VALUE, "page_size: got 0", V32_POOL, V32_FP8, 0),
    Refusal("page_size None", TYPE, "page_size: got None", V4_POOL, V4_FP8, None),
    Refusal("page_size mismatch", VALUE, "pages: got shape .*64, 1, 656", V32_POOL, V32_FP8, 64),
    Refusal("page_size mismatch V4", VALUE, "pages: got shape .*3, 1, 584", V4_POOL, V4_FP8, 3),
    Refusal("page_size mismatch BF16", VALUE, "pages: got shape .*3, 1, 576", BF16_POOL, BF16, 3),
    Refusal("bytes", TYPE, "pages: got bytes", bytes(656), V32_FP8),
    Refusal("rank 3", VALUE, "pages: got 3 dimensions", V32_POOL[0], V32_FP8),
    Refusal("rank 3 BF16", VALUE, "pages: got 3 dimensions", BF16_POOL[0], BF16),
    Refusal("rank 5", VALUE, "pages: got 5 dimensions", V4_POOL[None], V4_FP8),
    Refusal("last dim 584", VALUE, "pages: got shape .*584.*656", V4_POOL, V32_FP8),
    Refusal("last dim 656", VALUE, "pages: got shape .*656.*584", V32_POOL, V4_FP8),
    Refusal("last dim 512", VALUE, "pages: got shape .*512.*576", BF16_POOL[..., :512], BF16),
    Refusal("float32", TYPE, "dtype float32", BF16_POOL.astype(np.float32), BF16),
    Refusal("FP16 for BF16", TYPE, "dtype float16.*bfloat16", FP16.empty_pages(1, 2), BF16),
    Refusal("BF16 for FP16", TYPE, "dtype bfloat16.*float16", BF16_POOL, FP16),
    Refusal("BF16 for V32", TYPE, "dtype bfloat16.*uint8", BF16_POOL, V32_FP8),
    Refusal("uint8 for BF16", TYPE, "dtype uint8.*bfloat16", V32_POOL, BF16),
    Refusal("e5m2", TYPE, "dtype float8_e5m2.*uint8", OTHER_BYTES, V4_FP8),
    Refusal("bool", TYPE, "dtype bool.*uint8", BOOLS, V32_FP8),
    Refusal("two heads V32", VALUE, "2, 2, 656", np.zeros((1, 2, 2, 656), np.uint8), V32_FP8),
    Refusal("two heads V4", VALUE, "2, 2, 584", np.zeros((1, 2, 2, 584), np.uint8), V4_FP8),
    Refusal("no pages", VALUE, "pages: got shape", V32_FP8.empty_pages(0, 2), V32_FP8),
    Refusal("no pages V4", VALUE, "pages: got shape", V4_FP8.empty_pages(0, 2), V4_FP8),
    Refusal("no pages BF16", VALUE, "pages: got shape", BF16.empty_pages(0, 2), BF16),
    Refusal("no heads", VALUE, "pages: got shape", BF16.empty_pages(1, 2, 1)[:, :, :0], BF16),
    Refusal("V32 last stride 2", VALUE, "last-dimension stride of 2", STRIDE_2_V32, V32_FP8),
    Refusal("BF16 last stride 4", VALUE, "last-dimension stride of 4", STRIDE_4_BF16, BF16),
    Refusal("rows reversed", VALUE, "last-dimension stride of -1", V4_POOL[..., ::-1], V4_FP8),
    Refusal("V32 token gaps", VALUE, "token stride of 672.*656", GAPS_V32, V32_FP8),
    Refusal("V4 tokens of 576", VALUE, "token stride of 576.*584", ROWS_576_V4, V4_FP8),
    Refusal("tokens reversed", VALUE, "token stride of -656", V32_POOL[:, ::-1], V32_FP8),
    Refusal("V32 pages overlap", VALUE, "page stride of 656.*>= 1312", OVERLAP_V32, V32_FP8),
    Refusal("V32 odd pages", VALUE, "page stride of 1320.*multiple of 16", ODD_V32, V32_FP8),
    Refusal("V4 unpadded", VALUE, "page stride of 1752.*2304", UNPADDED_V4, V4_FP8, 3),
    Refusal("V4 pages overlap", VALUE, "page stride of 1152.*>= 1168", OVERLAP_V4, V4_FP8),
    Refusal("V4 pages reversed", VALUE, "page stride of -1728", V4_POOL[::-1], V4_FP8),
    Refusal("V4 same page", VALUE, "page stride of 0", SAME_PAGE, V4_FP8),
    Refusal("BF16 odd pages", VALUE, "page stride of 1160.*of 16", ODD_PAGES_BF16, BF16, 1),
    Refusal("BF16 odd tokens", VALUE, "token stride of 1160.*of 16", ODD_TOKENS_BF16, BF16),
    Refusal("BF16 odd heads", VALUE, "head stride of 1160.*of 16", ODD_HEADS_BF16, BF16),
    Refusal("BF16 heads overlap", VALUE, "head stride of 576.*>= 1152", OVERLAP_BF16, BF16),
    Refusal("BF16 same token", VALUE, "token stride of 0", SAME_TOKEN, BF16),
]


@pytest.mark.parametrize("case", REFUSED_POOLS, ids=str)
def test_unpack_refuses(case: Refusal) -> None:
    with pytest.raises(case.error, match=case.message):
        unpack_kv(case.array, case.layout, case.page_size)


def test_check_pages_names_its_argument_and_leaves_the_page_size_free() -> None:
    pages = V4_FP8.empty_pages(2, 3)
    assert layouts.check_pages("kv_cache", pages, V4_FP8).shape == pages.shape
    view = layouts.check_pages("kv_cache", pages.view(np.int8), V4_FP8)
    assert view.dtype == np.uint8
    assert np.shares_memory(view, pages)
    with pytest.raises(ArgumentError, match=r"^extra_k_cache: got "):
        layouts.check_pages("extra_k_cache", pages, V32_FP8)
    heads = BF16.empty_pages(2, 3, 4)
    assert layouts.check_pages("kv_cache", heads, BF16, h_kv=4) is heads
    with pytest.raises(ArgumentError, match=r"\(2, 3, 4, 576\)"):
        layouts.check_pages("kv_cache", heads, BF16, h_kv=2)


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=str)
def test_layout_of(layout: KVLayout) -> None:
    pages = layout.empty_pages(2, 3)
    assert layouts.layout_of("kv_cache", pages) is layout
    if layout.is_fp8:
        assert layouts.layout_of("kv_cache", pages.view(np.int8)) is layout
        assert layouts.layout_of("kv_cache", pages.view(E4M3)) is layout
    for wrong in (pages[0], pages[..., :-1], pages.astype(np.float32)):
        with pytest.raises(ArgumentError, match=r"kv_cache: got .*V4_FP8"):
            layouts.layout_of("kv_cache", wrong)


def test_check_scale_rule_and_layout() -> None:
    assert layouts.check_layout("layout", BF16) is BF16
    assert layouts.check_scale_rule(BF16, None) is None
    assert layouts.check_scale_rule(V32_FP8, None) == "flashmla"
    assert layouts.check_scale_rule(V4_FP8, None) == "v4"
    assert layouts.check_scale_rule(V32_FP8, "raw") == "raw"
    with pytest.raises(dataclasses.FrozenInstanceError):
        BF16.d_v = 1  # type: ignore[misc]


def test_a_masked_array_and_a_foreign_byte_order_are_refused() -> None:
    kv = np.zeros((1, 4, 1, 576), np.float32)
    with pytest.raises(ArgumentTypeError, match="^kv: .*mask"):
        pack_kv(np.ma.masked_array(kv), V32_FP8, 4)
    with pytest.raises(ArgumentTypeError, match="^kv: .*byte order"):
        pack_kv(kv.astype(kv.dtype.newbyteorder()), V32_FP8, 4)


@pytest.mark.parametrize("rule", [1, ["raw"], np.array(["raw", "v4"])], ids=str)
def test_a_scale_rule_is_a_string(rule: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="^scale_rule: "):
        pack_kv(np.zeros((1, 4, 1, 576), np.float32), V32_FP8, 4, scale_rule=rule)
