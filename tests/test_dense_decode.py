"""dense_decode against the naive definition: results, bits, plans, poison, edges."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import ml_dtypes
import naive
import numpy as np
import pytest
from comparison import DENSE_OUT, KV_SIZE, LSE_DECODE, assert_close
from naive import TIGHT, same_bits
from numpy.typing import NDArray
from poison import ABSURD_ID, poison, scattered

import cumla
from cumla.backends import oracle

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
FP16 = np.dtype(np.float16)
D_QK, D_V = 576, 512


@dataclass(frozen=True)
class Case:
    """All that a dense decode's inputs are made from."""

    seed: int
    lengths: tuple[int, ...]
    s_q: int = 1
    h_q: int = 16
    h_kv: int = 1
    page_size: int = 64
    causal: bool = False
    half: str = "bfloat16"
    scale: float | None = None
    strided: bool = False
    kv_size: float = KV_SIZE

    @property
    def b(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> int:
        return sum(self.lengths) * self.s_q * self.h_q


@dataclass(frozen=True)
class Inputs:
    q: Array
    kv_cache: Array
    block_table: Array
    cache_seqlens: Array
    softmax_scale: float | None
    causal: bool

    def only(self, requests: list[int]) -> Inputs:
        """The batch of just these requests, in this order."""
        return replace(
            self,
            q=self.q[requests],
            block_table=self.block_table[requests],
            cache_seqlens=self.cache_seqlens[requests],
        )

    def run(self, **how: Any) -> tuple[Array, Array]:
        return cumla.dense_decode(**vars(self), **how)

    def reference(self) -> tuple[Array, Array]:
        return naive.dense_decode(**vars(self))


def make(case: Case) -> Inputs:
    """Inputs with poison in every table entry, page and token that no length reaches."""
    rng = np.random.default_rng(case.seed)
    half = np.dtype(case.half)

    def numbers(*shape: int, size: float) -> Array:
        return np.clip(rng.standard_normal(shape) * size, -1, 1).astype(half)

    blocks = [-(-length // case.page_size) for length in case.lengths]
    num_pages = sum(blocks) + 2
    pages = rng.permutation(num_pages).astype(np.int32)
    cache = poison(np.empty((num_pages, case.page_size, case.h_kv, D_QK), half))
    table = poison(np.empty((case.b, max(blocks) + 1), np.int32))
    table[:, 1::2] = -7
    used = 0
    for i, length in enumerate(case.lengths):
        table[i, : blocks[i]] = pages[used : used + blocks[i]]
        used += blocks[i]
        for block in range(blocks[i]):
            count = min(length - block * case.page_size, case.page_size)
            rows = numbers(count, case.h_kv, D_QK, size=case.kv_size)
            cache[table[i, block], :count] = rows
    q = numbers(case.b, case.s_q, case.h_q, D_QK, size=1)
    lengths = np.array(case.lengths, np.int32)
    if case.strided:
        q, cache, table = scattered(q), scattered(cache), scattered(table, 8)
        lengths = np.repeat(lengths, 2)[::2]
        assert not q.flags.c_contiguous
        assert not cache.flags.c_contiguous
        assert case.b == 1 or not table.flags.c_contiguous
    return Inputs(q, cache, table, lengths, case.scale, case.causal)


@cache
def reference(case: Case) -> tuple[Array, Array]:
    return make(case).reference()


def check(case: Case, out: Array, lse: Array) -> None:
    """Compare with the naive result, made here and not before."""
    want_out, want_lse = reference(case)
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want_out, DENSE_OUT, dtype=case.half)


LENGTHS = (0, 1, 63, 64, 65, 126, 1500)
AXES: dict[str, tuple[Any, ...]] = {
    "b": (1, 2, 5),
    "s_q": (1, 2, 3),
    "h_q": (1, 3, 8, 16, 63, 128),
    "h_kv": (1, 2, 3),
    "page_size": (1, 2, 53, 61, 64),
    "causal": (False, True),
    "half": ("bfloat16", "float16"),
    "strided": (False, True),
}
TOTAL = 3 * 3 * 10 * 5 * 2 * 2 * 2  # without the lengths
"""10 of the 18 pairs of head counts divide."""


def sample(count: int) -> list[Case]:
    """A seeded sample of everything, of a size that the naive definition can bear."""
    rng = random.Random(1)
    cases: list[Case] = []
    while len(cases) < count:
        pick = {name: rng.choice(values) for name, values in AXES.items()}
        b = pick.pop("b")
        lengths = tuple(rng.choice(LENGTHS) for _ in range(b))
        scale = rng.choice((None, 192**-0.5, 0.5))
        case = Case(seed=len(cases), lengths=lengths, scale=scale, **pick)
        if case.h_q % case.h_kv == 0 and case.rows < 200_000:
            cases.append(case)
    return cases


CASES = sample(32)
# Chunks, pieces and the causal edge meet here: several pieces, several chunks in each, rows whose
# limits lie in different chunks and pieces, a row without a key.
HARD = [
    Case(100, (1500, 1025, 513, 2, 1), s_q=3, h_q=6, h_kv=3, page_size=53, causal=True),
    Case(101, (1024, 1025, 0, 2050), s_q=2, h_q=8, page_size=64, causal=True, half="float16"),
    Case(102, (1, 0, 64, 65, 1500), h_q=63, h_kv=3, page_size=1),
    Case(103, (0, 0), s_q=2, h_q=3),
    Case(104, (0,), h_q=1, causal=True),
]


def large(cases: list[Case]) -> list[Case]:
    """For the numpy backend, whose weights are float32: numbers that the kernels' are not for."""
    return [replace(one, kv_size=3 * KV_SIZE) for one in cases]


def test_the_sample_covers_every_value() -> None:
    print(f"{len(CASES)} of {TOTAL} cases, times the lengths")
    for name, values in AXES.items():
        assert {getattr(case, name) for case in CASES} == set(values), name
    assert {length for case in CASES for length in case.lengths} == set(LENGTHS)


@pytest.mark.parametrize("case", large(CASES + HARD), ids=str)
def test_case(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(case)
    out, lse = given.run()
    assert out.shape == (case.b, case.s_q, case.h_q, D_V)
    assert lse.shape == (case.b, case.h_q, case.s_q)

    # The same bits: again, with other numbers of threads, in another order, alone.
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("CUMLA_NUM_THREADS", threads)
        again = given.run()
        assert same_bits(again[0], out)
        assert same_bits(again[1], lse)
    monkeypatch.delenv("CUMLA_NUM_THREADS")
    order = np.random.default_rng(case.seed).permutation(case.b).tolist()
    for requests in (order, [order[0]], order[1:] * 2):
        if requests:
            part = given.only(requests).run()
            assert same_bits(part[0], out[requests])
            assert same_bits(part[1], lse[requests])

    with oracle():
        exact_out, exact_lse = given.run()
    check(case, out, lse)
    want_out, want_lse = reference(case)
    assert_close("oracle's lse", exact_lse, want_lse, TIGHT, dtype=np.float64)
    assert_close("oracle's out", exact_out, want_out, TIGHT, dtype=np.float64)
    # The edges are exact, not merely close.
    for i, length in enumerate(case.lengths):
        for s in range(case.s_q):
            sees = length - (case.s_q - 1 - s if case.causal else 0)
            assert (lse[i, :, s] == np.inf).all() == (sees <= 0)
            assert (out[i, s] == 0).all() == (sees <= 0)


# ------------------------------------------------------------------------------------- plans

PLANS: list[dict[str, int]] = [
    {"num_parts": 1},
    {"num_parts": 3},
    {"num_parts": 7, "overhead": 0},
    {"num_parts": 132},
    {"num_parts": 7, "block_size": 16},
    {"split_blocks": 1},
    {"split_blocks": 1, "block_size": 16},
    {"split_blocks": 5},
    {"split_blocks": 9, "block_size": 61},
]


@pytest.mark.parametrize("how", PLANS, ids=str)
@pytest.mark.parametrize("case", large(HARD[:4]), ids=str)
def test_any_plan_gives_the_same_result(case: Case, how: dict[str, int]) -> None:
    given = make(case)
    plan = cumla.plan_decode(given.cache_seqlens, **how)
    out, lse = given.run(plan=plan)
    again = given.run(plan=plan)
    assert same_bits(again[0], out)
    assert same_bits(again[1], lse)
    check(case, out, lse)
    with oracle():
        exact_out, exact_lse = given.run(plan=plan)
    assert_close("oracle's lse", exact_lse, reference(case)[1], TIGHT, dtype=np.float64)
    assert_close("oracle's out", exact_out, reference(case)[0], TIGHT, dtype=np.float64)


def test_the_plan_is_what_cuts_the_work() -> None:
    """Other cuts round otherwise; were the plan ignored, the tests above would prove nothing."""
    given = make(HARD[0])
    out, lse = given.run()
    cut = given.run(plan=cumla.plan_decode(given.cache_seqlens, split_blocks=1, block_size=16))
    assert not same_bits(cut[0], out) or not same_bits(cut[1], lse)


@pytest.mark.parametrize("how", PLANS[:1] + PLANS[-1:], ids=str)
def test_a_stale_plan_is_refused(how: dict[str, int]) -> None:
    given = make(Case(1, (65, 126)))
    stale = cumla.plan_decode(np.array([65, 127], np.int32), **how)
    other_batch = cumla.plan_decode(np.array([65, 126, 1], np.int32), **how)
    for plan in (stale, other_batch):
        with pytest.raises(cumla.ArgumentError, match=r"^cache_seqlens: .*plan"):
            given.run(plan=plan)


# ------------------------------------------------------------------------------------ poison


@pytest.mark.parametrize("half", [BF16, FP16], ids=str)
def test_a_token_that_only_the_last_query_sees_may_be_nan(half: np.dtype[Any]) -> None:
    for length in (3, 65, 600, 1025, 1500):
        case = Case(7, (length, 64), s_q=3, h_q=4, h_kv=2, causal=True, half=half.name)
        clean = make(case)
        page, offset = clean.block_table[0, (length - 1) // 64], (length - 1) % 64
        cache = clean.kv_cache.copy()
        cache[page, offset] = np.nan
        out, lse = replace(clean, kv_cache=cache).run()
        want_out, want_lse = (one.copy() for one in reference(case))
        want_out[0, -1], want_lse[0, :, -1] = np.nan, np.inf
        assert_close("out", out, want_out, DENSE_OUT, dtype=half)
        assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)


def test_an_infinite_value_stays_with_the_rows_that_see_it() -> None:
    """An infinity times the weight 0 would be NaN, as NaN itself."""
    case = Case(8, (65,), s_q=2, h_q=2, causal=True)
    clean = make(case)
    cache = clean.kv_cache.copy()
    cache[clean.block_table[0, 1], 0, 0, 3] = np.inf
    broken = replace(clean, kv_cache=cache)
    out, lse = broken.run()
    want_out, want_lse = reference(case)
    assert_close("out", out[:, :1], want_out[:, :1], DENSE_OUT, dtype=BF16)
    assert_close("lse", lse[:, :, :1], want_lse[:, :, :1], LSE_DECODE, dtype=np.float32)
    assert not np.isfinite(out[:, 1].astype(np.float32)).all()


@pytest.mark.parametrize("token", [0, 511, 512, 1023, 1024, 1499])
def test_nan_in_a_visible_token_propagates(token: int) -> None:
    case = Case(9, (1500, 65), h_q=3)
    given = make(case)
    cache = given.kv_cache.copy()
    # One number, of the rotary part, which meets q alone.
    cache[given.block_table[0, token // 64], token % 64, 0, 570] = np.nan
    broken = replace(given, kv_cache=cache)
    plan = cumla.plan_decode(given.cache_seqlens, num_parts=7)
    for out, lse in (broken.run(), broken.run(plan=plan)):
        assert np.isnan(out[0].astype(np.float32)).all()
        assert (lse[0] == np.inf).all()
        assert_close("out", out[1], reference(case)[0][1], DENSE_OUT, dtype=BF16)
        assert_close("lse", lse[1], reference(case)[1][1], LSE_DECODE, dtype=np.float32)


def test_nan_in_q_stays_in_its_row() -> None:
    case = Case(10, (65, 126), s_q=2, h_q=4, h_kv=2, causal=True)
    given = make(case)
    q = given.q.copy()
    q[0, 1, 2, 5] = np.nan
    out, lse = replace(given, q=q).run()
    want_out, want_lse = (one.copy() for one in reference(case))
    want_out[0, 1, 2], want_lse[0, 2, 1] = np.nan, np.inf
    assert_close("out", out, want_out, DENSE_OUT, dtype=BF16)
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)


def test_results_go_into_the_buffers_that_are_passed() -> None:
    case = HARD[0]
    given = make(case)
    want = given.run()
    out = poison(np.empty((case.b, case.s_q, case.h_q, D_V), BF16))
    # FlashMLA hands its lse out as such a view, so it must be good to pass in.
    lse = poison(np.empty((case.b, case.s_q, case.h_q), np.float32)).swapaxes(1, 2)
    for target in (out, scattered(out)):
        got = given.run(out=target, lse=lse)
        assert got[0] is target
        assert got[1] is lse
        assert same_bits(target, want[0])
        assert same_bits(lse, want[1])
    around = scattered(out)
    assert around.base is not None
    given.run(out=around)
    around[...] = np.nan
    assert np.isnan(around.base.astype(np.float32)).all(), "written outside of out"


def test_inputs_are_left_alone() -> None:
    given = make(replace(HARD[1], strided=True))
    arrays = [given.q, given.kv_cache, given.block_table, given.cache_seqlens]
    before = [one.copy() for one in arrays]
    for one in arrays:
        one.flags.writeable = False
    given.run()
    assert all(same_bits(one, copy) for one, copy in zip(arrays, before, strict=True))


# ------------------------------------------------------------------------------------- edges


def test_logits_far_apart() -> None:
    """Thousands apart, in an order that raises the maximum again and again, over pieces too."""
    length, h_q = 1500, 2
    table = np.arange(-(-length // 64), dtype=np.int32)[None]
    cache = np.zeros((table.size, 64, 1, D_QK), BF16)
    rng = np.random.default_rng(11)
    flat = cache.reshape(-1, D_QK)
    flat[:, :D_V] = rng.standard_normal((len(flat), D_V)).astype(BF16)
    flat[:length, 575] = np.linspace(-3000, 3000, length).astype(BF16)
    q = np.zeros((1, 1, h_q, D_QK), BF16)
    q[..., 0, 575], q[..., 1, 575] = 1, -1
    given = Inputs(q, cache, table, np.array([length], np.int32), 4.0, False)
    out, lse = given.run()
    want_out, want_lse = given.reference()
    assert abs(want_lse).min() > 10_000
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want_out, DENSE_OUT, dtype=BF16)


def test_pages_may_be_shared_between_requests_and_blocks() -> None:
    given = make(Case(12, (126, 126, 126), h_q=4, page_size=61, s_q=2, causal=True))
    table = given.block_table.copy()
    table[1] = table[0]
    table[2, :3] = table[0, 0]
    shared = replace(given, block_table=table)
    out, lse = shared.run()
    assert_close("out", out, shared.reference()[0], DENSE_OUT, dtype=BF16)
    assert_close("lse", lse, shared.reference()[1], LSE_DECODE, dtype=np.float32)
    only = given.only([0]).run()[0]
    assert same_bits(shared.only([0]).run()[0], only)


def test_the_default_scale_is_that_of_576_dims() -> None:
    given = make(Case(13, (65,), h_q=4))
    explicit = replace(given, softmax_scale=576**-0.5).run()
    assert same_bits(given.run()[0], explicit[0])
    assert same_bits(given.run()[1], explicit[1])
    assert not same_bits(replace(given, softmax_scale=192**-0.5).run()[1], explicit[1])


def test_causal_changes_nothing_for_one_query() -> None:
    given = make(Case(14, (65, 0, 1), h_q=4))
    for one, other in zip(given.run(), replace(given, causal=True).run(), strict=True):
        assert same_bits(one, other)


def test_absurd_entries_were_there() -> None:
    """The poison that the tests above rely on."""
    given = make(Case(15, (65, 0, 1), page_size=53))
    assert given.block_table.tolist()[1] == [ABSURD_ID, -7, ABSURD_ID]
    used = np.isfinite(given.kv_cache.astype(np.float32)).all(axis=-1)
    assert used.sum() == 66
