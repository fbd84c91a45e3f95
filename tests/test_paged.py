"""The page pool against a model in plain Python, and by example.

Every token carries a stamp of its own in all of its dims, in digits that each format holds
exactly, so a row that is lost, shared by mistake or read from elsewhere shows.
"""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from poison import poison, scattered

import cumla.backends
from cumla.backends import load_backend
from cumla.checks import ArgumentError, ArgumentTypeError
from cumla.layouts import BF16, FP16, LAYOUTS, V4_FP8, V32_FP8, KVLayout, pack_kv
from cumla.paged import OutOfPages, PagedKVCache

Array = NDArray[Any]

_DIGIT_SHIFTS = np.array([0, 4, 8, 12])


def rows_of(stamps: Sequence[int], layout: KVLayout) -> Array:
    """bf16 [n, d_qk]: the four hex digits of each stamp, over and over.

    Four significant bits are what e4m3 has, and every tile has a digit > 0 for a stamp > 0, so
    each layout holds these rows exactly under a power-of-two scale.
    """
    digits = (np.asarray(stamps, np.int64)[:, None] >> _DIGIT_SHIFTS) & 15
    return np.tile(digits, layout.d_qk // 4).astype(ml_dtypes.bfloat16)


def stamps_of(rows: Array) -> list[int]:
    """The stamps of `rows`, which must be stamped through all dims."""
    digits = rows.astype(np.float64).reshape(len(rows), rows.shape[1] // 4, 4)
    assert (digits == digits[:, :1]).all(), "a row is torn"
    stamps: list[int] = (digits[:, 0] @ 2.0**_DIGIT_SHIFTS).astype(np.int64).tolist()
    return stamps


def page_bytes(pages: Array, layout: KVLayout) -> Array:
    """A pool as bytes [num_pages, stride], the padding of the pages included; a view."""
    stride = layout.page_stride(pages.shape[1])
    assert pages.strides[0] == stride
    return as_strided(pages.view(np.uint8), (len(pages), stride), (stride, 1))


def snapshot(cache: PagedKVCache) -> tuple[Any, ...]:
    """All that can be seen of a cache, and its free stack."""
    ids = cache.sequences
    return (
        page_bytes(cache.pages, cache.layout).tobytes(),
        ids,
        cache.block_table(ids).tolist(),
        cache.cache_seqlens(ids).tolist(),
        cache.num_free_pages,
        cache._free[: cache.num_free_pages].tolist(),
        cache._owners.tolist(),
    )


def add(cache: PagedKVCache, sequence: int, stamps: Sequence[int]) -> Array:
    return cache.append([sequence], rows_of(stamps, cache.layout), [len(stamps)])


def read(cache: PagedKVCache, sequence: int) -> list[int]:
    return stamps_of(cache.read(sequence))


def poison_free_pages(cache: PagedKVCache) -> None:
    for page in cache._free[: cache.num_free_pages]:
        poison(cache.pages[page])


class Model:
    """What a cache must do: lists of stamps, and tables of model pages that are never reused."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.tokens: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}
        self._names = itertools.count()

    @property
    def num_used(self) -> int:
        return len({page for table in self.tables.values() for page in table})

    def sharers(self, page: int) -> int:
        return sum(page in table for table in self.tables.values())

    def blocks(self, length: int) -> int:
        return (length + self.page_size - 1) // self.page_size

    def pages_needed(self, counts: dict[int, int]) -> int:
        """New blocks; and of r sharers of a page of which k append into it, min(k, r - 1) copy."""
        needed = 0
        writers: Counter[int] = Counter()
        for sequence, count in counts.items():
            old = len(self.tokens[sequence])
            needed += self.blocks(old + count) - self.blocks(old)
            if count and old % self.page_size:
                writers[self.tables[sequence][-1]] += 1
        return needed + sum(min(k, self.sharers(page) - 1) for page, k in writers.items())

    def append(self, sequence: int, stamps: list[int]) -> None:
        tokens, table = self.tokens[sequence], self.tables[sequence]
        if stamps and len(tokens) % self.page_size and self.sharers(table[-1]) > 1:
            table[-1] = next(self._names)
        tokens += stamps
        while len(table) < self.blocks(len(tokens)):
            table.append(next(self._names))


class PagedMachine(RuleBasedStateMachine):
    layout: KVLayout
    page_size: int
    most_sequences = 6

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedKVCache(self.layout, 7, self.page_size, backend="numpy")
        self.model = Model(7, self.page_size)
        self.next_stamp = 1

    def any_live(self) -> bool:
        return bool(self.model.tokens)

    def has_room(self) -> bool:
        return len(self.model.tokens) < self.most_sequences

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(list(self.model.tokens)))

    @precondition(has_room)
    @rule()
    def allocate(self) -> None:
        sequence = self.cache.allocate()
        assert sequence not in self.model.tokens
        self.model.tokens[sequence], self.model.tables[sequence] = [], []

    @precondition(lambda self: self.any_live() and self.has_room())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = self.pick(data)
        child = self.cache.fork(parent)
        assert child not in self.model.tokens
        self.model.tokens[child] = list(self.model.tokens[parent])
        self.model.tables[child] = list(self.model.tables[parent])

    @precondition(any_live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        self.cache.free(sequence)
        del self.model.tokens[sequence], self.model.tables[sequence]

    @precondition(any_live)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        length = data.draw(st.integers(0, len(self.model.tokens[sequence])))
        self.cache.truncate(sequence, length)
        del self.model.tokens[sequence][length:]
        del self.model.tables[sequence][self.model.blocks(length) :]

    # Twice as likely as the others: a pool that nobody fills is never short of pages.
    @precondition(any_live)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        self.append_to_some(data, most_rows=2 * self.page_size + 1)

    @precondition(any_live)
    @rule(data=st.data())
    def append_a_little(self, data: st.DataObject) -> None:
        self.append_to_some(data, most_rows=1)

    def append_to_some(self, data: st.DataObject, most_rows: int) -> None:
        live = st.sampled_from(list(self.model.tokens))
        chosen = data.draw(st.lists(live, min_size=1, unique=True))
        counts = {one: data.draw(st.integers(0, most_rows)) for one in chosen}
        stamps = iter(range(self.next_stamp, self.next_stamp + sum(counts.values())))
        new = {one: list(itertools.islice(stamps, count)) for one, count in counts.items()}
        flat = list(itertools.chain.from_iterable(new.values()))
        kv = rows_of(flat, self.layout)

        free = self.model.num_pages - self.model.num_used
        needed = self.model.pages_needed(counts)
        if needed > free:
            before = snapshot(self.cache)
            with pytest.raises(OutOfPages) as caught:
                self.cache.append(chosen, kv, list(counts.values()))
            error = caught.value
            assert (error.missing, error.needed, error.free) == (needed - free, needed, free)
            assert snapshot(self.cache) == before
            return
        slots = self.cache.append(chosen, kv, list(counts.values()))
        self.next_stamp += len(flat)
        assert slots.dtype == np.int64
        expected = []
        for one, added in new.items():
            old = len(self.model.tokens[one])
            self.model.append(one, added)
            expected += self.cache.slot_ids(one, np.arange(old, old + len(added))).tolist()
        assert slots.tolist() == expected
        assert len(set(expected)) == len(expected)

    @invariant()
    def all_agree(self) -> None:
        poison_free_pages(self.cache)
        self.tables_share_what_the_model_shares()
        self.every_token_reads_back()
        self.indices_agree_with_slots()

    def tables_share_what_the_model_shares(self) -> None:
        cache, model = self.cache, self.model
        ids = list(model.tokens)
        assert cache.sequences == tuple(ids)
        assert cache.cache_seqlens(ids).tolist() == [len(model.tokens[one]) for one in ids]
        pairs, owners = set(), Counter[int]()
        for one, row in zip(ids, cache.block_table(ids).tolist(), strict=True):
            used = len(model.tables[one])
            pairs |= set(zip(row[:used], model.tables[one], strict=True))
            owners.update(row[:used])
            assert set(row[used:]) <= {-1}
        pages, names = {page for page, _ in pairs}, {name for _, name in pairs}
        assert len(pages) == len(names) == len(pairs), "pages are shared other than by fork"
        assert pages <= set(range(cache.num_pages))
        assert cache._owners.tolist() == [owners[page] for page in range(cache.num_pages)]
        free = cache._free[: cache.num_free_pages].tolist()
        assert sorted([*free, *pages]) == list(range(cache.num_pages)), "a page leaked"
        assert cache.num_free_pages + cache.num_used_pages == cache.num_pages
        assert cache.num_used_pages == len(pages)

    def every_token_reads_back(self) -> None:
        for sequence, tokens in self.model.tokens.items():
            rows = self.cache.read(sequence)
            assert rows.dtype == self.layout.compute_dtype
            assert rows.shape == (len(tokens), self.layout.d_qk)
            assert stamps_of(rows) == tokens

    def indices_agree_with_slots(self) -> None:
        ids = list(self.model.tokens)
        lengths = [len(self.model.tokens[one]) for one in ids]
        topk = max([1, *lengths])
        # Backwards, so that the negative entries come in between and at the end.
        positions = np.array([np.arange(topk) - (topk - n) for n in lengths], np.int32)
        positions = positions.reshape(len(ids), 1, topk)[..., ::-1]
        indices = self.cache.token_indices(ids, positions)
        assert indices.dtype == np.int32
        for one, at, found in zip(ids, positions[:, 0], indices[:, 0], strict=True):
            chosen = at >= 0
            slots = self.cache.slot_ids(one, at[chosen])
            assert found[chosen].tolist() == slots.tolist()
            assert set(found[~chosen].tolist()) <= {-1}


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
@pytest.mark.parametrize("layout", [BF16, V4_FP8], ids=str)
def test_the_cache_does_what_the_model_does(layout: KVLayout, page_size: int) -> None:
    machine = type("Machine", (PagedMachine,), {"layout": layout, "page_size": page_size})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            # To explain a failure takes longer than to shrink it, and says no more.
            phases=set(Phase) - {Phase.explain},
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- what is stored ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize(
    ("layout", "scale_rule"),
    [
        *((one, None) for one in LAYOUTS),
        *((V32_FP8, one) for one in ("flashmla", "v4", "raw")),
        *((V4_FP8, one) for one in ("flashmla", "v4")),
    ],
    ids=str,
)
def test_append_stores_the_bytes_of_pack_kv(layout: KVLayout, scale_rule: Any, dtype: Any) -> None:
    kv = np.random.default_rng(3).standard_normal((3, 5, 1, layout.d_qk)).astype(dtype)
    cache = PagedKVCache(layout, 3, 5)
    a = cache.allocate()
    rows = scattered(kv.reshape(15, layout.d_qk))
    first = cache.append([a], rows[:7], [7], scale_rule=scale_rule)
    rest = cache.append(np.array([a]), rows[7:], np.array([8]), scale_rule=scale_rule)

    assert [*first, *rest] == list(range(15)), "a fresh pool hands its pages out in order"
    packed = pack_kv(kv, layout, 5, scale_rule=scale_rule)
    stored, expected = page_bytes(cache.pages, layout), page_bytes(packed, layout)
    assert stored.tobytes() == expected.tobytes()


def test_a_pool_is_made_by_its_backend() -> None:
    cache = PagedKVCache(V32_FP8, num_pages=6, page_size=4)
    assert cache.backend is load_backend("numpy")
    assert cache.pages.shape == (6, 4, 1, 656)
    assert cache.pages.dtype == np.uint8
    assert not page_bytes(cache.pages, cache.layout).any()
    assert (cache.layout, cache.num_pages, cache.page_size) == (V32_FP8, 6, 4)
    a = cache.allocate()
    add(cache, a, [1, 2, 3, 4, 5])
    assert repr(cache) == (
        "PagedKVCache(V32_FP8, num_pages=6, page_size=4, backend='numpy'): 1 sequences, "
        "2 pages used, 4 free"
    )


class RecordingBackend:
    """Runs the numpy backend, notes what it is asked for, and can fail on demand."""

    name = "recording"

    def __init__(self) -> None:
        self.inner = load_backend("numpy")
        self.calls: list[str] = []
        self.rows: list[Array] = []
        self.fail_at: str | None = None

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fail_at:
            raise MemoryError(call)

    def as_array(self, array: Array) -> Array:
        return array

    def empty_pages(self, layout: KVLayout, num_pages: int, page_size: int) -> Array:
        return self.inner.empty_pages(layout, num_pages, page_size)

    def write_rows(self, pages: Array, layout: KVLayout, slots: Array, rows: Array, r: Any) -> None:
        self._note("write_rows")
        self.rows.append(rows)
        self.inner.write_rows(pages, layout, slots, rows, r)

    def read_rows(self, pages: Array, layout: KVLayout, slots: Array) -> Array:
        return self.inner.read_rows(pages, layout, slots)

    def copy_page(self, pages: Array, layout: KVLayout, source: int, target: int) -> None:
        self._note("copy_page")
        self.inner.copy_page(pages, layout, source, target)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> RecordingBackend:
    backend = RecordingBackend()
    monkeypatch.setitem(cumla.backends._loaded, "sim", backend)
    return backend


def test_one_append_is_one_write(recording: RecordingBackend) -> None:
    cache = PagedKVCache(FP16, 8, 4, backend="sim")
    a = cache.allocate()
    add(cache, a, [1, 2])
    b, c = cache.fork(a), cache.fork(a)
    recording.calls.clear()

    kv = scattered(rows_of([3, 4, 5], FP16).astype(np.float16))
    cache.append([a, b, c], kv, [1, 1, 1])

    assert recording.calls == ["copy_page", "copy_page", "write_rows"]
    assert recording.rows[-1] is kv
    recording.calls.clear()
    assert cache.append([a, b], kv[:0], [0, 0]).shape == (0,)
    assert recording.calls == [], "nothing to write, and no page to copy for it"


@pytest.mark.parametrize("fail_at", ["copy_page", "write_rows"])
def test_a_failing_backend_leaves_the_sequences_as_they_were(
    recording: RecordingBackend, fail_at: str
) -> None:
    cache = PagedKVCache(V4_FP8, 8, 4, backend="sim")
    a, other = cache.allocate(), cache.allocate()
    add(cache, a, [1, 2])
    b = cache.fork(a)
    before = snapshot(cache)[1:]  # bytes that no sequence sees may have changed

    recording.fail_at = fail_at
    with pytest.raises(MemoryError):
        cache.append([a, b, other], rows_of(range(3, 18), V4_FP8), [5, 5, 5])

    assert snapshot(cache)[1:] == before
    assert read(cache, a) == read(cache, b) == [1, 2]
    assert read(cache, other) == []
    recording.fail_at = None
    cache.append([a, b, other], rows_of(range(3, 18), V4_FP8), [5, 5, 5])
    assert read(cache, a) == [1, 2, 3, 4, 5, 6, 7]
    assert read(cache, b) == [1, 2, 8, 9, 10, 11, 12]


def test_what_is_too_large_for_fp16_becomes_an_infinity() -> None:
    cache = PagedKVCache(FP16, 2, 4)
    a = cache.allocate()
    cache.append([a], np.full((1, 576), -1e6, np.float32), [1])
    assert np.isneginf(cache.read(a)).all()


# --- sharing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("first", ["parent", "child"])
def test_copy_on_write_keeps_parent_and_child_apart(layout: KVLayout, first: str) -> None:
    cache = PagedKVCache(layout, 8, 4)
    parent = cache.allocate()
    add(cache, parent, [1, 2, 3, 4, 5, 6])
    child = cache.fork(parent)
    assert cache.num_used_pages == 2
    table = cache.block_table([parent, child])
    assert table[0].tolist() == table[1].tolist()

    one, two = (parent, child) if first == "parent" else (child, parent)
    add(cache, one, [7])
    assert cache.num_used_pages == 3, "only the partly filled page is copied"
    add(cache, two, [8])
    assert cache.num_used_pages == 3, "the last sharer writes in place"

    assert read(cache, one) == [1, 2, 3, 4, 5, 6, 7]
    assert read(cache, two) == [1, 2, 3, 4, 5, 6, 8]
    after = cache.block_table([one, two])
    assert after[0, 0] == after[1, 0] == table[0, 0]
    assert after[1, 1] == table[0, 1]
    assert after[0, 1] != table[0, 1]


@pytest.mark.parametrize(
    ("sharers", "writers", "copies"), [(2, 1, 1), (2, 2, 1), (3, 2, 2), (3, 3, 2), (5, 3, 3)]
)
def test_copies_when_several_sharers_append_at_once(
    sharers: int, writers: int, copies: int
) -> None:
    cache = PagedKVCache(V32_FP8, 1 + copies, 4)
    a = cache.allocate()
    add(cache, a, [1, 2])
    page = int(cache.block_table([a])[0, 0])
    ids = [a, *(cache.fork(a) for _ in range(sharers - 1))]
    chosen = ids[:writers][::-1]

    cache.append(chosen, rows_of(range(3, 3 + writers), V32_FP8), [1] * writers)

    assert cache.num_used_pages == 1 + copies
    for i, one in enumerate(chosen):
        assert read(cache, one) == [1, 2, 3 + i]
    for one in ids[writers:]:
        assert read(cache, one) == [1, 2]
    kept = [one for one in ids if cache.block_table([one])[0, 0] == page]
    assert kept == (chosen[-1:] if writers == sharers else ids[writers:])


def test_sharers_of_a_page_may_have_different_lengths_in_it() -> None:
    cache = PagedKVCache(V4_FP8, 4, 8)
    a = cache.allocate()
    add(cache, a, [1, 2, 3, 4, 5, 6])
    b = cache.fork(a)
    cache.truncate(b, 2)
    # b would write over tokens that a still reads, so one of them must copy first.
    cache.append([a, b], rows_of([7, 8, 9], V4_FP8), [1, 2])
    assert read(cache, a) == [1, 2, 3, 4, 5, 6, 7]
    assert read(cache, b) == [1, 2, 8, 9]


def test_a_full_page_is_shared_for_good() -> None:
    cache = PagedKVCache(BF16, 4, 2)
    a = cache.allocate()
    add(cache, a, [1, 2])
    b = cache.fork(a)
    cache.append([a, b], rows_of([3, 4], BF16), [1, 1])
    table = cache.block_table([a, b])
    assert table[0, 0] == table[1, 0]
    assert cache.num_used_pages == 3
    cache.free(a)
    assert read(cache, b) == [1, 2, 4]
    assert cache.num_used_pages == 2


def test_truncate_then_append() -> None:
    cache = PagedKVCache(V4_FP8, 4, 4)
    a = cache.allocate()
    add(cache, a, range(1, 15))
    assert cache.num_used_pages == 4
    cache.truncate(a, 9)
    assert (cache.length(a), cache.num_used_pages) == (9, 3)
    cache.truncate(a, 6)
    assert (cache.length(a), cache.num_used_pages) == (6, 2)
    poison_free_pages(cache)
    slots = add(cache, a, [20, 21, 22])
    assert read(cache, a) == [1, 2, 3, 4, 5, 6, 20, 21, 22]
    assert slots.tolist() == cache.slot_ids(a, np.array([6, 7, 8])).tolist()
    cache.truncate(a, 9)
    assert cache.length(a) == 9
    cache.truncate(a, 0)
    assert cache.num_used_pages == 0
    assert read(cache, a) == []
    add(cache, a, [30])
    assert read(cache, a) == [30]


def test_truncating_a_fork_into_a_shared_page_spares_the_parent() -> None:
    cache = PagedKVCache(V32_FP8, 4, 4)
    a = cache.allocate()
    add(cache, a, range(1, 9))
    b = cache.fork(a)
    cache.truncate(b, 3)  # inside the parent's first page, which is full
    assert cache.num_used_pages == 2
    add(cache, b, [20])
    assert read(cache, a) == list(range(1, 9))
    assert read(cache, b) == [1, 2, 3, 20]
    assert cache.num_used_pages == 3


def test_a_sequence_that_grows_token_by_token() -> None:
    cache = PagedKVCache(BF16, 40, 1)
    ids = [cache.allocate(), cache.allocate()]
    for step in range(20):
        cache.append(ids, rows_of([step + 1, step + 101], BF16), [1, 1])
    assert read(cache, ids[0]) == list(range(1, 21))
    assert read(cache, ids[1]) == list(range(101, 121))
    assert cache.num_free_pages == 0


# --- pages and memory -------------------------------------------------------------------------


def test_the_page_freed_last_is_taken_first() -> None:
    cache = PagedKVCache(BF16, 6, 1)
    a, b = cache.allocate(), cache.allocate()
    cache.append([a, b], rows_of([1, 2, 3, 4], BF16), [3, 1])
    assert cache.block_table([a, b]).tolist() == [[0, 1, 2], [3, -1, -1]]
    cache.free(a)
    add(cache, b, [5, 6, 7, 8])
    assert cache.block_table([b]).tolist() == [[3, 0, 1, 2, 4]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bytes_of_freed_pages_do_not_matter(layout: KVLayout) -> None:
    cache = PagedKVCache(layout, 4, 3)
    a = cache.allocate()
    add(cache, a, range(1, 13))
    before = page_bytes(cache.pages, cache.layout).tobytes()
    cache.free(a)
    assert page_bytes(cache.pages, cache.layout).tobytes() == before, "freeing writes nothing"
    poison_free_pages(cache)
    b = cache.allocate()
    add(cache, b, [20, 21, 22, 23])
    c = cache.fork(b)
    add(cache, c, [24])
    assert read(cache, b) == [20, 21, 22, 23]
    assert read(cache, c) == [20, 21, 22, 23, 24]


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
def test_v4_padding_stays_intact(page_size: int) -> None:
    cache = PagedKVCache(V4_FP8, 5, page_size)
    padding = page_bytes(cache.pages, cache.layout)[:, page_size * 584 :]
    assert padding.shape[1] > 0
    padding[:] = 0xA5
    a = cache.allocate()
    add(cache, a, range(1, 2 * page_size + 2))
    b = cache.fork(a)
    cache.append([a, b], rows_of(range(50, 52), V4_FP8), [1, 1])
    cache.truncate(b, page_size)
    cache.free(a)
    assert (padding == 0xA5).all()
    assert read(cache, b) == list(range(1, page_size + 1))


def test_out_of_pages_tells_what_is_missing() -> None:
    cache = PagedKVCache(V4_FP8, 4, 4)
    a, b = cache.allocate(), cache.allocate()
    add(cache, a, [1, 2])
    c = cache.fork(a)
    before = snapshot(cache)
    # One copy, one new page for a, and two for b: four, and three are free.
    with pytest.raises(OutOfPages, match=r"needs 4 pages and 3 are free: 1 missing\. Free or") as e:
        cache.append([a, b], rows_of(range(3, 12), V4_FP8), [4, 5])
    assert (e.value.needed, e.value.free, e.value.missing) == (4, 3, 1)
    assert isinstance(e.value, RuntimeError)
    copy = pickle.loads(pickle.dumps(e.value))
    assert (str(copy), copy.missing) == (str(e.value), 1)
    assert snapshot(cache) == before

    cache.append([a, b], rows_of(range(3, 11), V4_FP8), [4, 4])
    assert cache.num_free_pages == 0
    assert read(cache, a) == [1, 2, 3, 4, 5, 6]
    assert read(cache, b) == [7, 8, 9, 10]
    assert read(cache, c) == [1, 2]
    cache.append([b], rows_of([], V4_FP8), [0])
    add(cache, c, [11])  # alone with its page by now


# --- tables -----------------------------------------------------------------------------------


def test_tables_slots_and_indices_tell_one_story() -> None:
    cache = PagedKVCache(V32_FP8, 9, 4)
    a, b, empty = (cache.allocate() for _ in range(3))
    slots = cache.append([b, empty, a], rows_of(range(1, 16), V32_FP8), [5, 0, 10])
    ids = [a, empty, b, a]

    table, lengths = cache.block_table(ids), cache.cache_seqlens(ids)
    assert table.dtype == lengths.dtype == np.int32
    assert lengths.tolist() == [10, 0, 5, 10]
    assert table.shape == (4, 3)
    assert (table < 0).sum(axis=1).tolist() == [0, 3, 1, 0]
    assert slots[:5].tolist() == cache.slot_ids(b, np.arange(5, dtype=np.int32)).tolist()
    by_hand = [int(table[0, i // 4]) * 4 + i % 4 for i in range(10)]
    assert slots[5:].tolist() == by_hand
    grid = cache.slot_ids(a, np.array([[9, 0], [3, 4]]))
    assert grid.dtype == np.int64
    assert grid.tolist() == [[by_hand[9], by_hand[0]], [by_hand[3], by_hand[4]]]
    scalar = cache.slot_ids(a, np.array(9))
    assert isinstance(scalar, np.ndarray)
    assert (scalar.shape, int(scalar)) == ((), by_hand[9])

    positions = np.array([[[9, -1, 0], [-7, 3, 3]], [[-1, -1, -1], [-2, -3, -1]]])
    indices = cache.token_indices([a, empty], positions)
    assert indices.dtype == np.int32
    assert indices.tolist() == [
        [[by_hand[9], -1, by_hand[0]], [-1, by_hand[3], by_hand[3]]],
        [[-1] * 3, [-1] * 3],
    ]


def test_nothing_asked_for_is_nothing_given() -> None:
    cache = PagedKVCache(BF16, 2, 2)
    assert cache.sequences == ()
    assert cache.block_table([]).shape == (0, 1)
    assert cache.cache_seqlens([]).shape == (0,)
    assert cache.token_indices([], np.empty((0, 2, 5), np.int32)).shape == (0, 2, 5)
    assert cache.append([], np.empty((0, 576), np.float32), []).dtype == np.int64
    a = cache.allocate()
    assert cache.block_table([a]).tolist() == [[-1]]
    assert cache.token_indices([a], np.empty((1, 0, 5), np.int64)).shape == (1, 0, 5)
    assert cache.slot_ids(a, np.empty((3, 0), np.int64)).shape == (3, 0)
    assert cache.read(a).shape == (0, 576)
    assert cache.read(a).dtype == BF16.compute_dtype
    assert cache.read(cache.fork(a)).shape == (0, 576)


def test_ids_are_never_used_again() -> None:
    cache = PagedKVCache(BF16, 2, 2)
    a = cache.allocate()
    b = cache.fork(a)
    cache.free(b)
    cache.free(a)
    c = cache.allocate()
    assert len({a, b, c}) == 3
    assert cache.sequences == (c,)
    assert cache.length(np.int64(c)) == 0


def test_changing_a_returned_table_changes_nothing() -> None:
    cache = PagedKVCache(BF16, 2, 2)
    a = cache.allocate()
    slots = add(cache, a, [1, 2, 3])
    for result in (slots, cache.block_table([a]), cache.slot_ids(a, np.arange(3))):
        poison(result)
    assert read(cache, a) == [1, 2, 3]


# --- bad input --------------------------------------------------------------------------------

ROWS = rows_of([1, 2, 3], V4_FP8)
ONES = np.ones((2, 1, 1), np.int64)
FREED, NEVER = 3, 99


Call = Callable[[Any], object]
VALUE, TYPE = ArgumentError, ArgumentTypeError
WAS_FREED, NEVER_GIVEN = "3; that sequence was freed", "99; this cache never gave out that id"

# What a cache with the live sequences 0 (3 tokens), 1 (3 tokens, forked) and 2 (empty) refuses.
REFUSALS: list[tuple[Call, type[Exception], str]] = [
    (lambda c: c.append([0, FREED], ROWS, [1, 2]), VALUE, rf"sequences\[1\]: got {WAS_FREED}"),
    (lambda c: c.append([NEVER], ROWS, [3]), VALUE, rf"sequences\[0\]: got {NEVER_GIVEN}"),
    (lambda c: c.append([-1], ROWS, [3]), VALUE, r"sequences\[0\]: got -1"),
    (lambda c: c.append(["a"], ROWS, [3]), TYPE, r"sequences\[0\]: got 'a'"),
    (lambda c: c.append(0, ROWS, [3]), TYPE, "sequences: got 0; it must be a list"),
    (lambda c: c.append({0}, ROWS, [3]), TYPE, r"sequences: got \{0\}; it must be a list"),
    (lambda c: c.append(ONES, ROWS, [3]), VALUE, "sequences: got 3 dimensions"),
    (lambda c: c.append([0, 2, 0], ROWS, [1] * 3), VALUE, r"got \[0, 2, 0\]; .*different"),
    (lambda c: c.append([2, 2], ROWS, [3, 0]), VALUE, r"got \[2, 2\]; .*different"),
    (lambda c: c.append([0, 2], ROWS, [3]), VALUE, "lengths: got 1 entries; .* 2 seq"),
    (lambda c: c.append([0], ROWS, [3, 0]), VALUE, "lengths: got 2 entries; .* 1 seq"),
    (lambda c: c.append([0, 2], ROWS, [4, -1]), VALUE, r"lengths\[1\]: got -1"),
    (lambda c: c.append([0], ROWS, [3.0]), TYPE, r"lengths\[0\]: got 3\.0"),
    (lambda c: c.append([0], ROWS[:1], [True]), TYPE, r"lengths\[0\]: got True"),
    (lambda c: c.append([0], ROWS, np.ones(1)), TYPE, r"lengths\[0\]: got .*1\.0"),
    (lambda c: c.append([0], ROWS, 3), TYPE, "lengths: got 3; it must be a list"),
    (lambda c: c.append([0], ROWS, np.array([[3]])), VALUE, "lengths: got 2 dimensions"),
    (lambda c: c.append([0], ROWS, [2**70]), VALUE, f"kv: .*{2**70}"),
    (lambda c: c.append([0], ROWS.tolist(), [3]), TYPE, "kv: got list"),
    (lambda c: c.append([0], ROWS.astype(float), [3]), TYPE, "kv: got dtype float64"),
    (lambda c: c.append([0], ROWS, [2]), VALUE, r"kv: .*\[2, 512\]"),
    (lambda c: c.append([0, 2], ROWS, [2, 2]), VALUE, r"kv: .*\[4, 512\]"),
    (lambda c: c.append([0], ROWS[:, 1:], [3]), VALUE, r"kv: .*\[3, 512\]"),
    (lambda c: c.append([0], ROWS[:, None], [3]), VALUE, "kv: got 3 dimensions"),
    (lambda c: c.append([0], ROWS, [3], scale_rule="e8"), VALUE, "scale_rule: got 'e8'"),
    (lambda c: c.append([0], ROWS, [3], scale_rule="raw"), VALUE, "scale_rule: got 'raw'"),
    (lambda c: c.fork(FREED), VALUE, f"sequence: got {WAS_FREED}"),
    (lambda c: c.fork(NEVER), VALUE, f"sequence: got {NEVER_GIVEN}"),
    (lambda c: c.fork("a"), TYPE, "sequence: got 'a'"),
    (lambda c: c.free(FREED), VALUE, f"sequence: got {WAS_FREED}"),
    (lambda c: c.free(True), TYPE, "sequence: got True"),
    (lambda c: c.truncate(FREED, 0), VALUE, f"sequence: got {WAS_FREED}"),
    (lambda c: c.truncate(0, 4), VALUE, r"new_length: got 4; it must be in \[0, 3\]"),
    (lambda c: c.truncate(0, -1), VALUE, "new_length: got -1"),
    (lambda c: c.truncate(0, 2.0), TYPE, r"new_length: got 2\.0"),
    (lambda c: c.length(FREED), VALUE, f"sequence: got {WAS_FREED}"),
    (lambda c: c.read(FREED), VALUE, f"sequence: got {WAS_FREED}"),
    (lambda c: c.block_table([0, FREED]), VALUE, rf"sequences\[1\]: got {WAS_FREED}"),
    (lambda c: c.block_table(0), TYPE, "sequences: got 0"),
    (lambda c: c.cache_seqlens([FREED]), VALUE, rf"sequences\[0\]: got {WAS_FREED}"),
    (lambda c: c.slot_ids(FREED, ONES), VALUE, f"sequence: got {WAS_FREED}"),
    (lambda c: c.slot_ids(0, ONES * 3), VALUE, "positions: got 3; sequence 0 holds 3"),
    (lambda c: c.slot_ids(0, -ONES), VALUE, "positions: got -1; sequence 0 holds 3"),
    (lambda c: c.slot_ids(2, ONES * 0), VALUE, "positions: got 0; sequence 2 holds 0"),
    (lambda c: c.slot_ids(0, [0]), TYPE, "positions: got list"),
    (lambda c: c.slot_ids(0, ONES * 1.0), TYPE, "positions: got dtype float64"),
    (lambda c: c.token_indices([0, FREED], ONES), VALUE, rf"sequences\[1\]: got {WAS_FREED}"),
    (lambda c: c.token_indices([1, 0], ONES * [[[3]], [[1]]]), VALUE, "got 3; sequence 1 holds 3"),
    (lambda c: c.token_indices([0, 2], ONES * 0), VALUE, "got 0; sequence 2 holds 0"),
    (lambda c: c.token_indices([0], ONES), VALUE, r"positions: .*\[1, s_q, topk\]"),
    (lambda c: c.token_indices([0, 1], ONES[0]), VALUE, "positions: got 2 dimensions"),
    (lambda c: c.token_indices([0, 1], ONES > 0), TYPE, "positions: got dtype bool"),
    (lambda c: c.token_indices([0, 1], [[[0]]]), TYPE, "positions: got list"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS)
def test_bad_input_is_refused_and_changes_nothing(
    call: Call, error: type[Exception], message: str
) -> None:
    cache = PagedKVCache(V4_FP8, 8, 2)
    ids = [cache.allocate()]
    add(cache, ids[0], [1, 2, 3])
    ids += [cache.fork(ids[0]), cache.allocate(), cache.allocate()]
    assert ids == [0, 1, 2, FREED]
    cache.free(FREED)
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        call(cache)
    assert snapshot(cache) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("BF16", 4, 4), ArgumentTypeError, "layout: got 'BF16'"),
        ((BF16, 0, 4), ArgumentError, "num_pages: got 0"),
        ((BF16, 4.0, 4), ArgumentTypeError, r"num_pages: got 4\.0"),
        ((BF16, 4, 0), ArgumentError, "page_size: got 0"),
        ((BF16, 4, None), ArgumentTypeError, "page_size: got None"),
        ((BF16, 2**25, 64), ArgumentError, r"num_pages: .*2147483647.*<= 33554431"),
        ((BF16, 1, 2**31), ArgumentError, "num_pages: .*2147483647"),
        ((BF16, 4, 4, "tpu"), ArgumentError, "backend: got 'tpu'"),
    ],
    ids=str,
)
def test_a_pool_that_cannot_be_is_refused(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PagedKVCache(*arguments[:3], backend=arguments[3] if arguments[3:] else None)


def test_the_largest_pool_fits_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = RecordingBackend()
    monkeypatch.setattr(backend, "empty_pages", lambda *_: np.empty(0))
    monkeypatch.setitem(cumla.backends._loaded, "sim", backend)
    assert PagedKVCache(BF16, 1, 2**31 - 1, backend="sim").num_free_pages == 1
