"""The cache kernels in the simulator, byte for byte against cumla/layouts.py and cumla/fp8.py.

What is compared is the memory of the pool with all that lies between its pages and tokens: poison,
which must neither be read into a result nor be written over.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray
from poison import ABSURD_ID, poison, scattered, with_page_stride

from cumla import fp8, layouts
from cumla.backends.simulated import SimulatedDevice
from cumla.fp8 import BF16
from cumla.jit.build import build
from cumla.kernels import cache
from cumla.kernels.device import Call
from cumla.layouts import LAYOUTS, V4_FP8, V32_FP8, KVLayout

Array = NDArray[Any]
FP16, FP32 = np.dtype(np.float16), np.dtype(np.float32)
INSTANCES = {program for program, _, _ in cache.instances(0)}
# The first has no FP8 conversions, the last two have.
TARGETS = ("sm_80", "sm_89", "sm_90a")


def memory_of(array: Array) -> Array:
    """All bytes from the first to the last of `array`, a view."""
    low, high = byte_bounds(array)
    return np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))


def run(
    launch: Callable[[Call], None],
    written: Array,
    target: str = "sm_90a",
    seed: int = 0,
    counters: bool = False,
) -> tuple[Array, SimulatedDevice]:
    """Launch; returns what the memory of `written` then is on the device. `written` stays."""
    device = SimulatedDevice(target, 4, seed=seed, counters=counters)
    memory = memory_of(written)
    before = memory.copy()
    with device.call() as call:
        launch(call)
        there = call.read(written)
        begin = there.offset - (written.__array_interface__["data"][0] - byte_bounds(written)[0])
        after = there.memory.get().view(np.uint8)[begin : begin + len(before)].copy()
    memory[...] = before
    assert {program for program, _ in device.launches} <= INSTANCES
    return after, device


def slot_count(pages: Array) -> int:
    return pages.shape[0] * pages.shape[1]


def pool(layout: KVLayout, num_pages: int, page_size: int, seed: int) -> Array:
    """A pool of random bytes, with poison between its pages, and between tokens if they may."""
    rng = np.random.default_rng(seed)
    shape = (num_pages, page_size, 1, layout.row_bytes)
    content = rng.integers(0, 256, shape, np.uint8).view(layout.dtype)
    if layout.is_fp8:
        page_bytes = page_size * layout.row_bytes
        return with_page_stride(content, page_bytes, (page_bytes // 16 + 1 + seed % 3) * 16)
    return scattered(content)


def rows_of(n: int, d_qk: int, dtype: np.dtype[Any], seed: int) -> Array:
    """Rows of all sizes: tiles of zeros, of subnormal and of huge numbers, infinities and NaN."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        sizes = 2.0 ** rng.integers(-30, 12, (n, d_qk // 64, 1))
        rare = rng.random(sizes.shape)
        sizes = np.where(rare < 0.04, 0, np.where(rare < 0.08, 2.0**-133, sizes))
        sizes = np.where(rare > 0.97, 2.0**120, sizes)
        values = rng.standard_normal((n, d_qk // 64, 64)) * sizes
        # Numbers with few bits, so that quotients fall on midpoints.
        values = np.where(rng.random(sizes.shape) < 0.5, np.round(values * 4) / 4, values)
        few = rng.random(values.shape) < 0.003
        strange = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0])
        values = np.where(few, rng.choice(strange, values.shape), values).reshape(n, d_qk)
        rows = np.asarray(values, np.float32).astype(dtype)
    if n > 2:
        rows[2, :128] = np.nan
    if dtype != FP32:
        # NaN with every bit that a NaN can have, signalling ones too.
        bits, quiet = rows.view(np.uint16), np.uint16(0x7F80 if dtype == BF16 else 0x7C00)
        odd = rng.random(rows.shape) < 0.002
        bits[odd] = rng.integers(1, 0x40, odd.sum()).astype(np.uint16) | quiet
        bits[odd] |= rng.integers(0, 2, odd.sum()).astype(np.uint16) << 15
    else:
        odd = rng.random(rows.shape) < 0.002
        bits32 = rows.view(np.uint32)
        # Quiet ones: what a signalling one becomes as a half depends on the CPU.
        bits32[odd] = rng.integers(0x7FC00000, 0x80000000, odd.sum()).astype(np.uint32)
        bits32[odd] |= rng.integers(0, 2, odd.sum()).astype(np.uint32) << 31
    return rows


def beside_pages(table: Array) -> Array:
    """A block table as part of a larger array, where page 0 stands in all other entries."""
    larger = np.zeros((len(table) + 2, table.shape[1] + 3), np.int32)
    view = larger[1:-1, 1:-2]
    view[...] = table
    return view


def slots_for(n: int, available: int, dtype: Any, seed: int) -> Array:
    """Slots in any order, many of them twice, some that are none; not contiguous."""
    rng = np.random.default_rng(seed)
    slots = rng.integers(0, available, n)
    outside = np.array([-1, -2, available, available + 1, ABSURD_ID, -(2**31)])
    slots = np.where(rng.random(n) < 0.2, rng.choice(outside, n), slots).astype(dtype)
    if dtype == np.int64 and n > 5:
        # As int32 these would be slots of the pool.
        slots[[1, 3, 5]] = [1 << 32, -(1 << 33), (1 << 40) + 1]
    apart = poison(np.empty((n, 3), dtype))
    apart[:, 1] = slots
    return apart[:, 1]


def owners(slots: Array, available: int) -> Array:
    """The rows that are stored: the first of every slot of the pool."""
    first: dict[int, int] = {}
    for row, slot in enumerate(slots.tolist()):
        if 0 <= slot < available:
            first.setdefault(slot, row)
    return np.array(sorted(first.values()), np.int64)


# ---------------------------------------------------------------------------------------- append


@dataclass(frozen=True)
class Append:
    layout: KVLayout
    rule: Any
    dtype: np.dtype[Any]
    n: int
    num_pages: int
    page_size: int
    target: str
    slots: Any = np.int64
    misaligned: bool = False
    scan_rows: int = 1024
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.layout}-{self.rule}-{self.dtype}-{self.n}-{self.num_pages}x{self.page_size}-"
            f"{self.target}-{np.dtype(self.slots)}-{self.misaligned}-{self.scan_rows}"
        )


def appends() -> list[Append]:
    cases = []
    shapes = [(53, 7, 5), (61, 3, 64), (1, 2, 1), (126, 40, 3), (2, 1, 9)]
    for layout in LAYOUTS:
        for rule in cache._scale_rules(layout):
            for dtype in (BF16, FP16, FP32):
                i = len(cases)
                n, num_pages, page_size = shapes[i % 2] if i % 4 else shapes[2 + i // 4 % 3]
                cases.append(
                    Append(
                        layout,
                        rule,
                        dtype,
                        *(n, num_pages, page_size, TARGETS[i % 3]),
                        slots=(np.int64, np.int32)[i // 3 % 2],
                        misaligned=i % 5 in (1, 2),
                        scan_rows=(1024, 4)[i // 2 % 2],
                        seed=i,
                    )
                )
    # Each rule of each layout once more, where all rows count and conversions are arithmetic.
    for layout in (V32_FP8, V4_FP8):
        for rule in cache._scale_rules(layout):
            for target in ("sm_80", "sm_90a"):
                cases.append(Append(layout, rule, BF16, 64, 70, 64, target, seed=len(cases)))
    # More rows than a warp looks through at once, and than look for their twins at all.
    cases.append(Append(layouts.BF16, None, BF16, 300, 2, 70, "sm_90a", np.int32, seed=90))
    cases.append(Append(layouts.FP16, None, FP16, 1025, 9, 64, "sm_90a", seed=91))
    return cases


def expected(case: Append, pages: Array, slots: Array, rows: Array) -> Array:
    """The memory of the pool after the append; `pages` is changed."""
    kept = owners(slots, slot_count(pages))
    chosen = layouts.as_rows(np.ascontiguousarray(rows[kept]), case.layout)
    layouts.write_rows(pages, case.layout, slots[kept], chosen[:, None], case.rule)
    return memory_of(pages)


@pytest.mark.parametrize("case", appends(), ids=str)
def test_append(case: Append, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SCAN_ROWS", case.scan_rows)
    pages = pool(case.layout, case.num_pages, case.page_size, case.seed)
    slots = slots_for(case.n, slot_count(pages), case.slots, case.seed)
    if case.num_pages == 70:
        slots = np.random.default_rng(1).permutation(slot_count(pages))[: case.n]
    rows = rows_of(case.n, case.layout.d_qk, case.dtype, case.seed)
    # In memory a row is either at multiples of 16 bytes or at odd multiples of a number's.
    rows = scattered(rows, 2 if case.misaligned else 128)

    def launch(call: Call) -> None:
        cache.append_rows(call, pages, case.layout, slots, rows, case.rule)

    result, device = run(launch, pages, case.target, case.seed)
    assert len(device.launches) == (1 if case.n <= case.scan_rows else 3)
    reference = expected(case, pages, slots, rows)
    where = np.flatnonzero(result != reference)
    assert not len(where), (len(where), where[:8], result[where[:8]], reference[where[:8]])


@pytest.mark.parametrize("scan_rows", [1024, 8])
def test_the_lowest_row_wins_whatever_the_order(
    scan_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SCAN_ROWS", scan_rows)
    pages = layouts.BF16.empty_pages(2, 8)
    rows = np.repeat(np.arange(200, dtype=np.float32), 576).reshape(200, 576)
    slots = np.array([5] * 90 + [11, 5, 0, 11] * 27 + [15, 0], np.int64)[:200]
    wanted = np.zeros(16)
    for row in owners(slots, 16)[::-1]:
        wanted[slots[row]] = row
    for seed in range(4):
        pages[...] = 0
        device = SimulatedDevice("sm_90a", 1 + seed, seed=seed)
        with device.call() as call:
            cache.append_rows(call, pages, layouts.BF16, slots, rows, None)
        np.testing.assert_array_equal(pages.reshape(16, 576)[:, [0, 575]].T, [wanted] * 2)


def test_all_rows_begin_at_the_last_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their common path goes on from there to the first entry."""
    monkeypatch.setattr(cache, "_SCAN_ROWS", 8)
    # With 32 entries the hash is the upper five bits: these all begin at the last entry.
    slots = [one for one in range(4096) if (one * 0x9E3779B1 & 0xFFFFFFFF) >> 27 == 31][:14]
    pages = layouts.FP16.empty_pages(64, 64)
    rows = np.zeros((15, 576), np.float16)
    rows[:, 0] = np.arange(15) + 1
    with SimulatedDevice().call() as call:
        cache.append_rows(call, pages, layouts.FP16, np.array([*slots, slots[0]]), rows, None)
    flat = pages.reshape(4096, 576)[:, 0]
    np.testing.assert_array_equal(flat[slots], np.arange(14) + 1)
    assert np.count_nonzero(flat) == 14


def test_rows_may_be_one_row_many_times() -> None:
    pages = layouts.V32_FP8.empty_pages(2, 4)
    row = rows_of(1, 576, BF16, 3)
    rows = np.broadcast_to(row, (5, 576))
    with SimulatedDevice().call() as call:
        cache.append_rows(call, pages, V32_FP8, np.arange(5), rows, "raw")
    wanted = layouts.V32_FP8.empty_pages(2, 4)
    layouts.write_rows(wanted, V32_FP8, np.arange(5), np.ascontiguousarray(rows)[:, None], "raw")
    np.testing.assert_array_equal(pages, wanted)


def test_views_of_fp8_bytes() -> None:
    rows = rows_of(6, 512, BF16, 4)
    wanted = layouts.V4_FP8.empty_pages(2, 4)
    layouts.write_rows(wanted, V4_FP8, np.arange(6), rows[:, None], "v4")
    for dtype in (np.int8, ml_dtypes.float8_e4m3fn):
        pages = layouts.V4_FP8.empty_pages(2, 4)
        with SimulatedDevice().call() as call:
            cache.append_rows(call, pages.view(dtype), V4_FP8, np.arange(6), rows, "v4")
        np.testing.assert_array_equal(pages, wanted)


def test_nothing_to_do_launches_nothing() -> None:
    pages = layouts.V4_FP8.empty_pages(2, 4)
    none, rows = np.empty(0, np.int64), np.empty((0, 512), BF16)
    table, ids = np.empty((0, 3), np.int32), np.empty((2, 0, 4), np.int32)
    device = SimulatedDevice()
    with device.call() as call:
        cache.append_rows(call, pages, V4_FP8, none, rows, "v4")
        cache.gather_rows(call, pages, V4_FP8, none, rows)
        cache.gather_sequences(call, pages, V4_FP8, table, np.zeros(1, np.int32), rows)
        cache.token_slots(call, ids, np.empty((2, 3), np.int32), 2, 4, ids)
        cache.copy_pages(call, pages, V4_FP8, none, none)
    assert not device.launches


def at_64_bytes(array: Array) -> Array:
    """A copy that begins at a multiple of 64 bytes."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    begin = -buffer.ctypes.data % 64
    copy = buffer[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_least_sectors_are_touched(layout: KVLayout) -> None:
    """Every access of a warp asks for the 32-byte sectors that its bytes fill, and no more."""
    n = 32
    # In pages of 72 tokens without padding. Every other row of 656 bytes begins with a sector.
    shape = (2, 72, 1, layout.row_elements)
    pages = at_64_bytes(np.zeros(shape, layout.dtype))
    rows = at_64_bytes(np.ones((n, layout.d_qk), layout.compute_dtype))
    slots = at_64_bytes(2 * np.arange(n))

    def append(call: Call) -> None:
        cache.append_rows(call, pages, layout, slots, rows, layout.default_scale_rule)

    def gather(call: Call) -> None:
        cache.gather_rows(call, pages, layout, slots, rows)

    def copy(call: Call) -> None:
        cache.copy_page(call, pages, layout, 0, 1)

    for launch in (append, gather, copy):
        _, device = run(launch, pages, counters=True)
        counters = device.launches[-1][1].counters
        assert counters is not None
        total = counters.total()
        # The RoPE bytes of V32_FP8 begin in the middle of a sector.
        more = n if layout is V32_FP8 and launch is not copy else 0
        assert total.global_sectors == total.global_sectors_least + more, launch.__name__


# ---------------------------------------------------------------------------------------- gather


@dataclass(frozen=True)
class Gather:
    layout: KVLayout
    n: int
    num_pages: int
    page_size: int
    target: str
    slots: Any = np.int64
    misaligned: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.layout}-{self.n}-{self.num_pages}x{self.page_size}-{self.target}-"
            f"{np.dtype(self.slots)}-{self.misaligned}"
        )


def gathers() -> list[Gather]:
    shapes = [(53, 7, 5), (61, 3, 64), (1, 2, 1)]
    return [
        Gather(
            layout,
            *(*shape, TARGETS[i % 3]),
            slots=(np.int64, np.int32)[i % 2],
            misaligned=(i + j) % 3 == 1,
            seed=i * 3 + j,
        )
        for i, layout in enumerate(LAYOUTS)
        for j, shape in enumerate(shapes)
    ]


def output(n: int, layout: KVLayout, misaligned: bool) -> Array:
    return scattered(
        poison(np.empty((n, layout.d_qk), layout.compute_dtype)), 2 if misaligned else 128
    )


def assert_rows(result: Array, out: Array, rows: Array, kept: Array | None = None) -> None:
    """The memory `result` of `out` holds `rows`, NaN for NaN, and its poison, also in rows `kept`.

    Which NaN comes out of an FP8 tile is not the kernels' to decide.
    """
    wanted = out.copy() if kept is not None else rows
    if kept is not None:
        wanted[~kept] = rows[~kept]
    given = np.ndarray(out.shape, out.dtype, result.tobytes(), strides=out.strides)
    with np.errstate(invalid="ignore"):  # signalling NaN
        nan = np.isnan(given) & np.isnan(wanted)
    bits = given.view(np.uint16) == wanted.view(np.uint16)
    where = np.argwhere(~(nan | bits))
    assert not len(where), (len(where), where[0], given[tuple(where[0])], wanted[tuple(where[0])])
    between = np.ones(len(result), bool)
    covered = np.lib.stride_tricks.as_strided(
        between, (*out.shape, 2), (*out.strides, 1), writeable=True
    )
    covered[...] = False
    np.testing.assert_array_equal(result[between], memory_of(out)[between])


@pytest.mark.parametrize("case", gathers(), ids=str)
def test_gather(case: Gather) -> None:
    pages = pool(case.layout, case.num_pages, case.page_size, case.seed)
    slots = slots_for(case.n, slot_count(pages), case.slots, case.seed)
    out = output(case.n, case.layout, case.misaligned)

    def launch(call: Call) -> None:
        cache.gather_rows(call, pages, case.layout, slots, out)

    result, _ = run(launch, out, case.target, case.seed)
    rows = np.zeros((case.n, case.layout.d_qk), case.layout.compute_dtype)
    exists = (slots >= 0) & (slots < slot_count(pages))
    rows[exists] = layouts.read_rows(pages, case.layout, slots[exists])
    assert_rows(result, out, rows)


def test_what_is_appended_is_gathered() -> None:
    for layout in LAYOUTS:
        pages = layout.empty_pages(3, 7)
        rows = np.random.default_rng(5).standard_normal((20, layout.d_qk)).astype(BF16)
        slots = np.random.default_rng(6).permutation(21)[:20]
        out = np.empty((20, layout.d_qk), layout.compute_dtype)
        with SimulatedDevice("sm_80").call() as call:
            cache.append_rows(call, pages, layout, slots, rows, layout.default_scale_rule)
            cache.gather_rows(call, pages, layout, slots, out)
        error = np.abs(out.astype(np.float64) - rows.astype(np.float64))
        # e4m3 has three bits behind the first: a rounding error of a 16th at most.
        assert (error <= np.abs(rows.astype(np.float64)) / 16 + 2.0**-16).all()


@dataclass(frozen=True)
class Sequences:
    layout: KVLayout
    lengths: tuple[int, ...]
    page_size: int
    starts: bool
    first: int = 0
    rest: int = 3
    max_blocks: int = 4
    misaligned: bool = False


SEQUENCES = [
    Sequences(layouts.BF16, (5, 0, 17, 1), 5, False),
    Sequences(layouts.FP16, (0, 0, 9), 4, True, first=2, rest=0),
    Sequences(V32_FP8, (30, 0, 0, 11, 0), 8, True, first=1),
    Sequences(V4_FP8, (13, 20), 7, False, misaligned=True),
    Sequences(V4_FP8, (3,) * 40, 2, True, first=7, rest=1),
    # The search needs more than one, more than two rounds of 32.
    Sequences(layouts.BF16, (1, 0, 2) * 12, 1, False),
    Sequences(layouts.BF16, (0,) * 1000 + (1, 2) + (0,) * 90 + (1,), 3, False, first=1),
]


@pytest.mark.parametrize("case", SEQUENCES, ids=str)
def test_gather_sequences(case: Sequences) -> None:
    rng = np.random.default_rng(len(case.lengths))
    num_pages, batch = 9, len(case.lengths)
    pages = pool(case.layout, num_pages, case.page_size, 2)
    # Sequences may be longer than their tables, and tables hold what is no page.
    table = rng.integers(0, num_pages, (batch, case.max_blocks)).astype(np.int32)
    bad = np.array([-1, num_pages, ABSURD_ID, -(2**31)], np.int32)
    table = np.where(rng.random(table.shape) < 0.15, rng.choice(bad, table.shape), table)
    table = beside_pages(table)
    bounds = case.first + np.cumsum([0, *case.lengths])
    cu_seqlens = scattered(bounds.astype(np.int32)[:, None], 2)[:, 0]
    starts = rng.integers(-2, case.page_size * 2, batch).astype(np.int32) if case.starts else None
    total = int(bounds[-1]) + case.rest
    out = output(total, case.layout, case.misaligned)

    def launch(call: Call) -> None:
        cache.gather_sequences(call, pages, case.layout, table, cu_seqlens, out, starts)

    result, _ = run(launch, out, TARGETS[batch % 3], batch)
    rows = np.zeros((total, case.layout.d_qk), case.layout.compute_dtype)
    kept = np.ones(total, bool)
    for i in range(batch):
        for t in range(int(bounds[i]), int(bounds[i + 1])):
            kept[t] = False
            token = t - int(bounds[i]) + (int(starts[i]) if starts is not None else 0)
            block = token // case.page_size
            if 0 <= block < case.max_blocks and 0 <= table[i, block] < num_pages:
                slot = int(table[i, block]) * case.page_size + token % case.page_size
                rows[t] = layouts.read_rows(pages, case.layout, np.array([slot]))[0]
    assert_rows(result, out, rows, kept)


# ----------------------------------------------------------------------------------------- slots


@dataclass(frozen=True)
class Positions:
    shape: tuple[int, int, int]
    page_size: int
    max_blocks: int
    misaligned: bool = False
    in_place: bool = False
    transposed: bool = False


POSITIONS = [
    Positions((2, 3, 64), 64, 5),
    Positions((1, 1, 1), 1, 1),
    Positions((3, 2, 61), 61, 7, in_place=True),
    Positions((3, 1, 128), 16, 40, misaligned=True),
    Positions((2, 2, 130), 7, 3, transposed=True),
    Positions((5, 1, 4), 3, 9, in_place=True),
]


@pytest.mark.parametrize("case", POSITIONS, ids=str)
def test_token_slots(case: Positions) -> None:
    rng = np.random.default_rng(case.page_size)
    num_pages, room = 11, case.page_size * case.max_blocks
    positions = rng.integers(0, room, case.shape).astype(np.int32)
    odd = np.array([-1, -2, room, room + 1, ABSURD_ID, 2**31 - 1, -(2**31)], np.int32)
    strange = rng.random(case.shape) < 0.3
    positions = np.where(strange, rng.choice(odd, case.shape), positions)
    table = rng.integers(-2, num_pages + 2, (case.shape[0], case.max_blocks)).astype(np.int32)
    table = beside_pages(table)
    given = scattered(positions, 2 if case.misaligned else 128)
    if case.transposed:
        given = scattered(positions.transpose(2, 0, 1)).transpose(1, 2, 0)
    slots = given
    if not case.in_place:
        slots = scattered(poison(np.empty(case.shape, np.int32)), 6 if case.misaligned else 128)
        if case.transposed:
            slots = scattered(poison(np.empty(case.shape[::-1], np.int32)).T[...].copy()[:, ::1])

    def launch(call: Call) -> None:
        cache.token_slots(call, given, table, num_pages, case.page_size, slots)

    result, _ = run(launch, slots)
    wanted = np.full(case.shape, -1, np.int32)
    for at, position in np.ndenumerate(positions):
        block, offset = divmod(int(position), case.page_size)
        if 0 <= block < case.max_blocks and 0 <= table[at[0], block] < num_pages:
            wanted[at] = table[at[0], block] * case.page_size + offset
    assert (wanted >= 0).any() or case.shape == (1, 1, 1)
    got = np.ndarray(slots.shape, slots.dtype, result.tobytes(), strides=slots.strides)
    np.testing.assert_array_equal(got, wanted)
    inside = np.zeros(len(result), bool)
    np.lib.stride_tricks.as_strided(inside, (*slots.shape, 4), (*slots.strides, 1))[...] = True
    np.testing.assert_array_equal(result[~inside], memory_of(slots)[~inside])


def test_a_negative_position_is_no_large_one() -> None:
    """-1 as an unsigned number is a token of block 3."""
    positions = np.array([[[-1, 5, -(2**31), (1 << 30) + 1]]], np.int32)
    table = np.array([[0, 0, 0, 0, 0]], np.int32)
    slots = np.empty_like(positions)
    with SimulatedDevice().call() as call:
        cache.token_slots(call, positions, table, 1, 1 << 30, slots)
    np.testing.assert_array_equal(slots, [[[-1, 5, -1, 1]]])


# ------------------------------------------------------------------------------------------ copy


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_copy(layout: KVLayout, page_size: int) -> None:
    pages = pool(layout, 7, page_size, page_size)

    def one(call: Call) -> None:
        cache.copy_page(call, pages, layout, 5, 2)

    def many(call: Call) -> None:
        sources = np.array([0, 9, 1, 9, 7, -1, 0, 0, 0], np.int64)[::2]
        targets = np.array([4, 6, 2, 1 << 30, -(2**31)], np.int32)
        cache.copy_pages(call, pages, layout, sources, targets)

    for launch, copies in ((one, [(5, 2)]), (many, [(0, 4), (1, 6)])):
        result, _ = run(launch, pages, seed=page_size)
        for source, target in copies:
            pages[target] = pages[source]
        np.testing.assert_array_equal(result, memory_of(pages))


def test_a_page_outside_is_not_copied() -> None:
    pages = layouts.V4_FP8.empty_pages(3, 2)
    pages[...] = 7
    device = SimulatedDevice()
    with device.call() as call:
        for source, target in ((3, 0), (0, 3), (-1, 1), (1, -1), (1 << 32, 0)):
            cache.copy_page(call, pages, V4_FP8, source, target)
    assert (pages == 7).all()


# ---------------------------------------------------------------------------------- what there is


def test_a_pool_of_too_many_tokens_is_refused() -> None:
    pages = np.lib.stride_tricks.as_strided(
        np.zeros(576, BF16), (1 << 20, 1 << 12, 1, 576), (0,) * 3 + (2,)
    )
    device = SimulatedDevice()
    with pytest.raises(ValueError, match=r"^pages: got 1048576 pages of 4096 tokens; .*2\*\*32"):
        cache._num_slots(pages)
    assert not device.launches


def test_instances_are_all_there_is() -> None:
    programs = [program for program, threads, shared in cache.instances(101_376)]
    assert len(programs) == len(set(programs)) == 4 + 2 * 4 + 3 * (1 + 1 + 3 + 2)
    assert set(fp8.SCALE_RULES) == {"flashmla", "v4", "raw"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_no_kernel_uses_local_memory(target: str) -> None:
    for program in INSTANCES:
        assert ".local" not in build(program.path, program.expression, target).ptx, program
