"""sparse_decode against the naive definition: results, bits, plans, masks, the extra pool."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import ml_dtypes
import naive
import numpy as np
import pytest
from comparison import KV_SIZE, LSE_DECODE, SPARSE_OUT, assert_close
from naive import TIGHT, same_bits
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from poison import ABSURD_ID, poison, scattered, with_page_stride

import cumla
from cumla import layouts
from cumla.backends import oracle

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
D_V = 512
LAYOUTS = {one.name: one for one in layouts.LAYOUTS}


@dataclass(frozen=True)
class Pool:
    """Of the selected tokens: where they are and how many each query names."""

    tokens: int
    page_size: int
    topk: int
    lengths: str = "none"
    """"none", one for each request ("b"), or one for each query ("bs")."""


@dataclass(frozen=True)
class Case:
    seed: int
    layout: str
    main: Pool
    b: int = 2
    s_q: int = 1
    h_q: int = 16
    extra: Pool | None = None
    sink: bool = False
    scale: float | None = None
    view: str = "uint8"
    """How the bytes of an FP8 pool are typed."""
    strided: bool = False
    kv_size: float = KV_SIZE

    @property
    def rows(self) -> int:
        return self.b * self.s_q * self.h_q * (self.main.topk + (self.extra or self.main).topk)


@dataclass(frozen=True)
class Inputs:
    q: Array
    kv_cache: Array
    indices: Array
    topk_length: Array | None
    attn_sink: Array | None
    extra_kv_cache: Array | None
    extra_indices: Array | None
    extra_topk_length: Array | None
    softmax_scale: float | None

    def only(self, requests: list[int]) -> Inputs:
        """The batch of just these requests, in this order."""
        names = ("q", "indices", "topk_length", "extra_indices", "extra_topk_length")
        fields = {name: getattr(self, name) for name in names}
        part: dict[str, Any] = {
            name: one[requests] for name, one in fields.items() if one is not None
        }
        return replace(self, **part)

    def without_extra(self) -> Inputs:
        nothing: dict[str, Any] = dict.fromkeys(
            ("extra_kv_cache", "extra_indices", "extra_topk_length")
        )
        return replace(self, **nothing)

    def kv_lens(self, block_size: int) -> Array:
        return cumla.sparse_kv_lengths(
            len(self.q),
            self.indices.shape[2],
            self.topk_length,
            0 if self.extra_indices is None else self.extra_indices.shape[2],
            self.extra_topk_length,
            block_size=block_size,
        )

    def run(self, **how: Any) -> tuple[Array, Array]:
        return cumla.sparse_decode(**{**vars(self), **how})

    def reference(self) -> tuple[Array, Array]:
        extra = self.extra_kv_cache
        return naive.sparse_decode(
            self.q,
            decoded(self.kv_cache),
            self.indices,
            topk_length=self.topk_length,
            attn_sink=self.attn_sink,
            extra_kv=None if extra is None else decoded(extra),
            extra_indices=self.extra_indices,
            extra_topk_length=self.extra_topk_length,
            softmax_scale=self.softmax_scale,
        )


def decoded(pages: Array) -> Array:
    return cumla.unpack_kv(pages, layouts.layout_of("pages", pages), pages.shape[1])


def is_nan(array: Array) -> NDArray[np.bool_]:
    return np.isnan(array.astype(np.float32))


def make_pool(
    rng: np.random.Generator, case: Case, pool: Pool
) -> tuple[Array, Array, Array | None]:
    """Pages, indices and lengths, with a NaN in every token that no index in use names.

    A third of the tokens of the pool are good. Indices in use name those, in any order, some more
    than once, with invalid values in between; some rows have none but invalid values. Indices out
    of use are absurd, or name tokens that are NaN.
    """
    layout = LAYOUTS[case.layout]
    num_pages = -(-pool.tokens // pool.page_size)
    tokens = num_pages * pool.page_size
    names = rng.permutation(tokens).astype(np.int32)
    good, bad = np.split(names, [max(tokens // 3, 1)])
    shape = (case.b, case.s_q, pool.topk)
    invalid = rng.choice(
        np.array([-1, -2, tokens, tokens + 1, ABSURD_ID, INT_MIN, INT_MAX], np.int32), shape
    )
    indices = rng.choice(good, shape)
    share = rng.choice([0.0, 0.1, 0.6, 1.0], (case.b, case.s_q, 1))
    indices = np.where(rng.random(shape) < share, invalid, indices)
    lengths = None
    if pool.lengths != "none":
        size = (case.b, case.s_q) if pool.lengths == "bs" else (case.b, 1)
        count = rng.integers(0, pool.topk + 1, size).astype(np.int32)
        count.flat[0] = 0 if case.seed % 3 == 0 else count.flat[0]
        unused = np.arange(pool.topk) >= count[..., None]
        beyond = rng.choice(np.append(bad, np.int32(ABSURD_ID)), shape)
        indices = np.where(unused, beyond, indices)
        lengths = count if pool.lengths == "bs" else count[:, 0]
    kv = np.full((tokens, layout.d_qk), np.nan, np.float32)
    kv[good] = np.clip(rng.standard_normal((len(good), layout.d_qk)) * case.kv_size, -1, 1)
    shaped = kv.reshape(num_pages, pool.page_size, 1, layout.d_qk)
    pages = cumla.pack_kv(shaped, layout, pool.page_size)
    if layout.is_fp8:
        pages = with_page_stride(pages, pool.page_size * layout.row_bytes, padded(pool, layout))
        pages = pages.view(case.view)
    poisoned = np.flatnonzero(is_nan(decoded(pages)).reshape(tokens, -1).all(axis=-1))
    assert poisoned.tolist() == sorted(bad)
    return pages, indices.astype(np.int32), lengths


def padded(pool: Pool, layout: layouts.KVLayout) -> int:
    """A page stride larger than needed, by an amount that only multiples of 16 allow."""
    return layout.page_stride(pool.page_size) // 16 * 16 + 48


def make(case: Case) -> Inputs:
    rng = np.random.default_rng(case.seed)
    layout = LAYOUTS[case.layout]
    pages, indices, lengths = make_pool(rng, case, case.main)
    more: tuple[Array | None, Array | None, Array | None] = (None, None, None)
    if case.extra:
        more = make_pool(rng, case, case.extra)
    q = np.clip(rng.standard_normal((case.b, case.s_q, case.h_q, layout.d_qk)), -1, 1)
    q = q.astype(layout.compute_dtype)
    sink = None
    if case.sink:
        sink = rng.standard_normal(case.h_q).astype(np.float32)
        sink = np.where(rng.random(case.h_q) < 0.2, np.inf, sink)
        sink = np.where(rng.random(case.h_q) < 0.2, -np.inf, sink).astype(np.float32)
    if case.strided:
        q, indices = scattered(q), scattered(indices, 8)
        if not layout.is_fp8:
            pages = scattered(pages)
        if sink is not None:
            sink = np.repeat(sink, 2)[::2]
        if lengths is not None:
            lengths = np.repeat(lengths, 2, axis=0)[::2]
    return Inputs(q, pages, indices, lengths, sink, *more, case.scale)


@cache
def reference(case: Case) -> tuple[Array, Array]:
    return make(case).reference()


def check(case: Case, out: Array, lse: Array) -> None:
    """Compare with the naive result, made here and not before."""
    want_out, want_lse = reference(case)
    half = LAYOUTS[case.layout].compute_dtype
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want_out, SPARSE_OUT, dtype=half)


TOPK = (1, 7, 64, 130, 1100)
PAGE_SIZES = (1, 2, 53, 61, 64)
AXES: dict[str, tuple[Any, ...]] = {
    "layout": tuple(LAYOUTS),
    "b": (1, 2, 5),
    "s_q": (1, 2, 3),
    "h_q": (1, 3, 8, 16, 63, 128),
    "sink": (False, True),
    "view": ("uint8", "int8", "float8_e4m3fn"),
    "strided": (False, True),
}
# A pool may be smaller than a page and than topk.
POOL_AXES: dict[str, tuple[Any, ...]] = {
    "tokens": (1, 65, 500, 1600),
    "page_size": PAGE_SIZES,
    "topk": TOPK,
    "lengths": ("none", "b", "bs"),
}
TOTAL = 4 * 3 * 3 * 6 * 2 * 3 * 2 * (4 * 5 * 5 * 3) * (1 + 4 * 5 * 5 * 3)


def sample(count: int) -> list[Case]:
    """A seeded sample of everything, of a size that the naive definition can bear."""
    rng = random.Random(2)
    cases: list[Case] = []
    while len(cases) < count:
        pick = {name: rng.choice(values) for name, values in AXES.items()}
        pools = [
            Pool(**{name: rng.choice(values) for name, values in POOL_AXES.items()})
            for _ in range(2)
        ]
        case = Case(
            seed=len(cases),
            main=pools[0],
            extra=rng.choice([None, pools[1]]),
            scale=rng.choice((None, 192**-0.5, 0.5)),
            **pick,
        )
        if case.rows < 200_000:
            cases.append(case)
    return cases


CASES = sample(44)
HARD = [
    # Pieces of 1024 and chunks of 512 tokens, with the second pool beginning inside of both.
    Case(
        101,
        "V32_FP8",
        Pool(1600, 61, 1100, "bs"),
        b=2,
        s_q=2,
        h_q=3,
        extra=Pool(700, 53, 1100, "bs"),
        sink=True,
    ),
    Case(
        102,
        "V4_FP8",
        Pool(1600, 64, 130, "b"),
        b=5,
        s_q=3,
        h_q=8,
        extra=Pool(900, 2, 1100, "b"),
        sink=True,
    ),
    Case(103, "V4_FP8", Pool(500, 53, 1100), b=2, s_q=1, h_q=63, extra=Pool(65, 1, 7, "bs")),
    Case(104, "BF16", Pool(1600, 1, 1100, "bs"), b=5, s_q=2, h_q=8),
]


def large(cases: list[Case]) -> list[Case]:
    """For the numpy backend, whose weights are float32: numbers that the kernels' are not for."""
    return [replace(one, kv_size=3 * KV_SIZE) for one in cases]


def test_the_sample_covers_every_value() -> None:
    print(f"{len(CASES)} of {TOTAL} cases")
    for name, values in AXES.items():
        assert {getattr(case, name) for case in CASES} == set(values), name
    for which in ("main", "extra"):
        pools = [getattr(case, which) for case in CASES if getattr(case, which)]
        assert len(pools) > len(CASES) / 3
        for name, values in POOL_AXES.items():
            assert {getattr(pool, name) for pool in pools} == set(values), (which, name)
    lses = [make(case).reference()[1] for case in CASES[:10]]
    assert any(np.isposinf(one).any() for one in lses)
    assert any(np.isfinite(one).all() for one in lses)


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
    # The edges are exact, not merely close; and no row has a key for some heads only.
    empty = np.isposinf(want_lse).swapaxes(1, 2)
    assert same_bits(np.isposinf(lse).swapaxes(1, 2), empty)
    assert (out[empty] == 0).all()


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
@pytest.mark.parametrize("case", large(HARD), ids=lambda case: str(case.seed))
def test_any_plan_gives_the_same_result(case: Case, how: dict[str, int]) -> None:
    given = make(case)
    plan = cumla.plan_decode(given.kv_lens(how.get("block_size", 64)), **how)
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
    given = make(HARD[3])
    out, lse = given.run()
    cut = given.run(plan=cumla.plan_decode(given.kv_lens(16), split_blocks=1, block_size=16))
    assert not same_bits(cut[0], out) or not same_bits(cut[1], lse)


@pytest.mark.parametrize("how", [{"num_parts": 3}, {"split_blocks": 2}], ids=str)
def test_a_stale_plan_is_refused(how: dict[str, int]) -> None:
    given = make(replace(HARD[1], sink=False))
    lengths = given.kv_lens(64)
    plan = cumla.plan_decode(lengths, **how)
    given.run(plan=plan)
    assert given.topk_length is not None
    longer = given.topk_length.copy()
    longer[1] = 130 if longer[1] <= 64 else 1
    # One length changed, the batch changed, the extra pool gone, another block size.
    for other, stale in (
        (replace(given, topk_length=longer), plan),
        (given.only([0, 1]), plan),
        (given.without_extra(), plan),
        (given, cumla.plan_decode(lengths, block_size=16, **how)),
    ):
        with pytest.raises(cumla.ArgumentError, match=r"^topk_length: .*plan"):
            other.run(plan=stale)


# --------------------------------------------------------------------- what selects nothing


def simple(layout: str = "V4_FP8", **fields: Any) -> Inputs:
    """Two requests of two queries over 130 good tokens in pages of 61, all indices valid."""
    case = Case(200, layout, Pool(400, 61, 7), s_q=2, h_q=3, **fields)
    given = make(case)
    good = np.flatnonzero(~is_nan(decoded(given.kv_cache)).any(axis=-1))[:56]
    rng = np.random.default_rng(5)
    return replace(given, indices=rng.permutation(good).astype(np.int32)[:28].reshape(2, 2, 7))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [-1, -2, -61, 0, 1, ABSURD_ID, INT_MIN, INT_MAX], ids=str)
def test_an_invalid_index_selects_nothing(layout: str, value: int) -> None:
    """Wherever it stands; 0 and 1 mean the first two beyond the pool."""
    given = simple(layout)
    tokens = given.kv_cache.shape[0] * 61
    value = tokens + value if value in (0, 1) else value
    want = given.run()
    for place in range(8):
        longer = np.insert(given.indices, place, value, axis=2)
        out, lse = replace(given, indices=longer).run()
        assert same_bits(out, want[0])
        assert same_bits(lse, want[1])
    nothing = replace(given, indices=np.full_like(given.indices, value))
    sink = np.array([0, np.inf, -np.inf], np.float32)
    for empty in (nothing, replace(nothing, attn_sink=sink)):
        out, lse = empty.run()
        assert (out == 0).all()
        assert (lse == np.inf).all()


def test_the_last_token_of_the_pool_counts() -> None:
    given = simple()
    tokens = given.kv_cache.shape[0] * 61
    last = replace(given, indices=np.full((2, 2, 1), tokens - 1, np.int32))
    beyond = replace(given, indices=np.full((2, 2, 1), tokens, np.int32))
    assert is_nan(decoded(given.kv_cache))[-1, -1].all()
    assert is_nan(last.run()[0]).all()
    assert not is_nan(beyond.run()[0]).any()


def test_a_token_named_twice_counts_twice() -> None:
    given = simple()
    twice = replace(given, indices=np.repeat(given.indices, 2, axis=2))
    (out, lse), (out_twice, lse_twice) = given.run(), twice.run()
    assert_close("lse", lse_twice, lse + np.log(2), LSE_DECODE, dtype=np.float32)
    assert_close("out", out_twice, out, SPARSE_OUT, dtype=BF16)
    uneven = np.concatenate([given.indices, given.indices[..., :1]], axis=2)
    uneven_inputs = replace(given, indices=uneven)
    assert_close(
        "out", uneven_inputs.run()[0], uneven_inputs.reference()[0], SPARSE_OUT, dtype=BF16
    )
    assert not same_bits(uneven_inputs.run()[1], lse)


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=str)
def test_what_stands_beyond_topk_length_is_not_looked_at(shape: tuple[int, ...]) -> None:
    given = simple()
    bad = np.flatnonzero(is_nan(decoded(given.kv_cache)).any(axis=-1))[:7]
    for count in range(8):
        lengths = np.full(shape, 7, np.int32)
        lengths.flat[0] = count
        unused = (0, slice(None) if shape == (2,) else 0, slice(count, None))
        results = []
        for filler in (np.full(7, -1), bad, np.full(7, ABSURD_ID), given.indices[0, 0]):
            indices = given.indices.copy()
            indices[unused] = filler[count:]
            results.append(replace(given, indices=indices, topk_length=lengths).run())
        for out, lse in results:
            assert same_bits(out, results[0][0])
            assert same_bits(lse, results[0][1])
        masked = given.indices.copy()
        masked[unused] = -1
        want = replace(given, indices=masked).reference()
        assert_close("out", results[0][0], want[0], SPARSE_OUT, dtype=BF16)
        assert_close("lse", results[0][1], want[1], LSE_DECODE, dtype=np.float32)


def test_topk_length_of_a_request_is_that_of_all_its_queries() -> None:
    given = simple()
    by_request = np.array([3, 5], np.int32)
    out, lse = replace(given, topk_length=by_request).run()
    by_query = np.repeat(by_request[:, None], 2, axis=1)
    again = replace(given, topk_length=by_query).run()
    assert same_bits(again[0], out)
    assert same_bits(again[1], lse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_in_a_selected_token_propagates(layout: str) -> None:
    given = simple(layout)
    bad = np.flatnonzero(is_nan(decoded(given.kv_cache)).any(axis=-1))
    indices = given.indices.copy()
    indices[1, 0, 6] = bad[0]
    out, lse = replace(given, indices=indices).run()
    want = given.run()
    assert is_nan(out[1, 0]).all()
    assert (lse[1, :, 0] == np.inf).all()
    for i, s in ((0, 0), (0, 1), (1, 1)):
        assert same_bits(out[i, s], want[0][i, s])
        assert same_bits(lse[i, :, s], want[1][i, :, s])


# ------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("layout", ["V32_FP8", "V4_FP8"])
def test_views_and_strides_of_the_pages_change_no_bit(layout: str) -> None:
    given = simple(layout)
    want = given.run()
    pages = given.kv_cache
    payload = 61 * LAYOUTS[layout].row_bytes
    least = -(-payload // 16) * 16
    for stride in (least, least + 16, LAYOUTS[layout].page_stride(61) + 576 * 16):
        moved = with_page_stride(pages, payload, stride)
        for dtype in (np.uint8, np.int8, FP8):
            out, lse = replace(given, kv_cache=moved.view(dtype)).run()
            assert same_bits(out, want[0])
            assert same_bits(lse, want[1])


def test_the_padding_byte_of_v4_scales_may_be_anything() -> None:
    given = simple("V4_FP8")
    want = given.run()
    stride = LAYOUTS["V4_FP8"].page_stride(61)
    pages = with_page_stride(given.kv_cache, 61 * 584, stride)
    whole_pages = as_strided(pages, (len(pages), 61 * 584), (stride, 1))
    scales = whole_pages[:, 61 * 576 :]
    for value in (0, 1, 255):
        scales[:, 7::8] = value
        out, lse = replace(given, kv_cache=pages).run()
        assert same_bits(out, want[0])
        assert same_bits(lse, want[1])
    scales[:, 6::8] = 255
    assert is_nan(replace(given, kv_cache=pages).run()[0]).all(), "these are the scales"


# -------------------------------------------------------------------------------------- sink


def test_the_sink_weighs_out_and_leaves_lse_alone() -> None:
    given = simple()
    out, lse = (one.astype(np.float64) for one in given.run())
    with oracle():
        out, lse = given.run()
    sink = np.array([-0.5, 3, 0], np.float32)
    with oracle():
        out_sunk, lse_sunk = replace(given, attn_sink=sink).run()
    assert same_bits(lse_sunk, lse)
    per_row = lse.swapaxes(1, 2)[..., None]
    share = np.exp(per_row) / (np.exp(per_row) + np.exp(sink.astype(np.float64))[:, None])
    assert_close("out", out_sunk, out * share, TIGHT, dtype=np.float64)
    assert same_bits(replace(given, attn_sink=sink).run()[1], given.run()[1])


def test_a_sink_of_infinity_takes_all_and_of_minus_infinity_nothing() -> None:
    given = simple()
    out, lse = given.run()
    sink = np.array([np.inf, -np.inf, -np.inf], np.float32)
    out_sunk, lse_sunk = replace(given, attn_sink=sink).run()
    assert (out_sunk[:, :, 0] == 0).all()
    assert same_bits(out_sunk[:, :, 1:], out[:, :, 1:])
    assert same_bits(lse_sunk, lse)
    huge = replace(given, attn_sink=np.array([3e38, -3e38, 1e4], np.float32)).run()[0]
    assert (huge[:, :, [0, 2]] == 0).all()
    assert same_bits(huge[:, :, 1], out[:, :, 1])


def test_the_sink_counts_once_however_the_work_is_cut() -> None:
    given = make(HARD[0])
    want = given.run()[0]
    assert given.attn_sink is not None
    none = replace(given, attn_sink=None).run()[0]
    assert not same_bits(none, want)
    cut = given.run(plan=cumla.plan_decode(given.kv_lens(64), split_blocks=1))[0]
    assert_close("out", cut, want.astype(np.float64), SPARSE_OUT, dtype=BF16)


# -------------------------------------------------------------------------------- extra pool


@pytest.mark.parametrize("case", HARD[:3], ids=lambda case: str(case.seed))
def test_two_pools_are_one_softmax(case: Case) -> None:
    given = replace(make(case), attn_sink=None)
    main = given.without_extra()
    assert given.extra_kv_cache is not None
    assert given.extra_indices is not None
    extra = replace(
        main,
        kv_cache=given.extra_kv_cache,
        indices=given.extra_indices,
        topk_length=given.extra_topk_length,
    )
    parts = [main.run(), extra.run()]
    out, lse = cumla.merge_attention([one[0] for one in parts], [one[1] for one in parts])
    both_out, both_lse = given.run()
    # Twice rounded to bf16, so compared with the error of two roundings and not with one's.
    assert_close("merged", out, both_out.astype(np.float64), SPARSE_OUT, dtype=BF16)
    assert_close("merged lse", lse, both_lse, LSE_DECODE, dtype=np.float32)
    with oracle():
        parts = [main.run(), extra.run()]
        out, lse = cumla.merge_attention([one[0] for one in parts], [one[1] for one in parts])
        both_out, both_lse = given.run()
    assert_close("merged", out, both_out, TIGHT, dtype=np.float64)
    assert_close("merged lse", lse, both_lse, TIGHT, dtype=np.float64)


def test_an_extra_pool_that_selects_nothing_changes_nothing() -> None:
    given = simple()
    want = given.run()
    pages, indices = given.kv_cache, np.full((2, 2, 3), -1, np.int32)
    bad = np.flatnonzero(is_nan(decoded(pages)).any(axis=-1))[:3].astype(np.int32)
    zero = np.zeros(2, np.int32)
    for extra in (
        replace(given, extra_kv_cache=pages, extra_indices=indices),
        replace(
            given,
            extra_kv_cache=pages,
            extra_indices=np.broadcast_to(bad, (2, 2, 3)),
            extra_topk_length=zero,
        ),
    ):
        out, lse = extra.run()
        assert same_bits(out, want[0])
        assert same_bits(lse, want[1])


def test_the_extra_pool_alone() -> None:
    given = simple()
    want = given.run()
    for topk_length, indices in (
        (np.zeros(2, np.int32), given.indices),
        (None, np.full_like(given.indices, -1)),
    ):
        out, lse = replace(
            given,
            indices=indices,
            topk_length=topk_length,
            extra_kv_cache=given.kv_cache,
            extra_indices=given.indices,
        ).run()
        assert_close("out", out, want[0].astype(np.float64), SPARSE_OUT, dtype=BF16)
        assert_close("lse", lse, want[1], LSE_DECODE, dtype=np.float32)


def test_the_pools_have_their_own_bounds() -> None:
    """An index that only the larger pool has is invalid in the smaller one, and no NaN is met."""
    given = simple()
    small = given.kv_cache[:1].copy()
    good = np.flatnonzero(~is_nan(decoded(small)).any(axis=-1))[:7].astype(np.int32)
    beyond = np.array([61, 62, 121], np.int32)
    main = replace(given, indices=np.broadcast_to(good, (2, 2, 7)), kv_cache=small)
    both = replace(main, extra_kv_cache=given.kv_cache, extra_indices=given.indices, attn_sink=None)
    swapped = replace(
        given,
        extra_kv_cache=small,
        extra_indices=np.broadcast_to(np.append(good, beyond), (2, 2, 10)),
    )
    for one in (both, swapped):
        out, lse = one.run()
        assert_close("out", out, one.reference()[0], SPARSE_OUT, dtype=BF16)
        assert_close("lse", lse, one.reference()[1], LSE_DECODE, dtype=np.float32)


# ----------------------------------------------------------------------------------- buffers


def test_results_go_into_the_buffers_that_are_passed() -> None:
    case = HARD[1]
    given = make(case)
    want = given.run()
    lse = poison(np.empty((case.b, case.s_q, case.h_q), np.float32)).swapaxes(1, 2)
    out = poison(np.empty((case.b, case.s_q, case.h_q, D_V), BF16))
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
    assert is_nan(around.base).all(), "written outside of out"


def test_inputs_are_left_alone() -> None:
    given = make(replace(HARD[0], strided=True))
    arrays = [one for one in vars(given).values() if isinstance(one, np.ndarray)]
    before = [one.copy() for one in arrays]
    for one in arrays:
        one.flags.writeable = False
    given.run()
    assert all(same_bits(one, copy) for one, copy in zip(arrays, before, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_default_scale_is_that_of_the_dims(layout: str) -> None:
    given = simple(layout)
    scale = LAYOUTS[layout].d_qk ** -0.5
    assert same_bits(given.run()[1], replace(given, softmax_scale=scale).run()[1])
    assert not same_bits(given.run()[1], replace(given, softmax_scale=scale / 2).run()[1])


def test_sparse_over_all_tokens_is_dense() -> None:
    """The same keys in the same order through the two ops, each with its own gathering."""
    rng = np.random.default_rng(6)
    kv = (rng.standard_normal((3, 53, 1, 576)) * 0.3).astype(BF16)
    q = rng.standard_normal((1, 2, 5, 576)).astype(BF16)
    table = np.array([[2, 0, 1]], np.int32)
    dense = cumla.dense_decode(q, kv, table, np.array([126], np.int32))
    slots = (table[0, :, None] * 53 + np.arange(53)).reshape(-1)[:126].astype(np.int32)
    sparse = cumla.sparse_decode(q, kv, np.broadcast_to(slots, (1, 2, 126)))
    assert_close("out", sparse[0], dense[0].astype(np.float64), SPARSE_OUT, dtype=BF16)
    assert_close("lse", sparse[1], dense[1], LSE_DECODE, dtype=np.float32)
