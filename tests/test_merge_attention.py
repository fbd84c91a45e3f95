"""merge_attention: the pieces of one attention join to the whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import naive
import numpy as np
import pytest
from comparison import DENSE_OUT, LSE_DECODE, PREFILL_OUT, assert_close
from naive import TIGHT, same_bits
from numpy.typing import DTypeLike, NDArray
from poison import poison, scattered

import cumla
from cumla.backends import oracle

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)


def merged(outs: list[Array], lses: list[Array]) -> tuple[Array, Array]:
    """The definition, row by row: outs [n][rows, d], lses [n][rows], float64; inf: no key."""
    rows, d = outs[0].shape
    out, lse = np.zeros((rows, d)), np.full(rows, np.inf)
    for row in range(rows):
        parts = [(o[row], s[row]) for o, s in zip(outs, lses, strict=True) if abs(s[row]) < np.inf]
        if parts:
            largest = max(s for _, s in parts)
            total = sum(np.exp(s - largest) for _, s in parts)
            lse[row] = largest + np.log(total)
            out[row] = sum(o * (np.exp(s - largest) / total) for o, s in parts)
    return out, lse


def random_parts(n: int, rows: int, d: int, dtype: DTypeLike) -> tuple[list[Array], list[Array]]:
    """n results of `rows` rows; a good part of the rows have no key, some in all of them."""
    rng = np.random.default_rng(n)
    outs, lses = [], []
    for _ in range(n):
        out = (rng.standard_normal((rows, d)) * 0.3).astype(dtype)
        lse = (rng.standard_normal(rows) * 5).astype(np.float32)
        empty = rng.random(rows) < 0.3
        empty[0] = True
        lse[empty] = rng.choice(np.array([np.inf, -np.inf], np.float32), empty.sum())
        out[empty] = 1e4  # does not count, nor does NaN beside -inf
        out[np.isneginf(lse)] = np.nan
        outs.append(out)
        lses.append(lse)
    return outs, lses


@pytest.mark.parametrize(
    "dtype", [BF16, np.float16, np.float32], ids=lambda one: np.dtype(one).name
)
@pytest.mark.parametrize("n", [1, 2, 3, 9])
@pytest.mark.parametrize("shape", [(5, 3, 24), (2, 3, 5, 24), (1, 1, 1, 512), (6, 1, 1)], ids=str)
def test_random_parts(shape: tuple[int, ...], n: int, dtype: DTypeLike) -> None:
    *rows, d = shape
    flat_outs, flat_lses = random_parts(n, int(np.prod(rows)), d, dtype)
    outs = [one.reshape(shape) for one in flat_outs]
    lses = [one.reshape(rows) for one in flat_lses]
    if len(shape) == 4:  # the decode ops' lse is [b, h_q, s_q], their out [b, s_q, h_q, d]
        lses = [one.swapaxes(1, 2) for one in lses]
    out, lse = cumla.merge_attention(outs, lses)
    with oracle():
        exact_out, exact_lse = cumla.merge_attention(outs, lses)
    want_out, want_lse = merged(
        [one.astype(np.float64) for one in flat_outs], [one.astype(np.float64) for one in flat_lses]
    )
    want_out, want_lse = want_out.reshape(shape), want_lse.reshape(rows)
    if len(shape) == 4:
        want_lse = want_lse.swapaxes(1, 2)
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want_out, DENSE_OUT, dtype=dtype)
    assert_close("oracle's lse", exact_lse, want_lse, TIGHT, dtype=np.float64)
    assert_close("oracle's out", exact_out, want_out, TIGHT, dtype=np.float64)
    again = cumla.merge_attention(tuple(outs), tuple(lses))
    assert same_bits(again[0], out)
    assert same_bits(again[1], lse)


def test_float32_parts_lose_nothing() -> None:
    outs, lses = random_parts(5, 61, 24, np.float32)
    outs = [one.reshape(61, 1, 24) for one in outs]
    lses = [one.reshape(61, 1) for one in lses]
    out, lse = cumla.merge_attention(outs, lses)
    want = merged([one[:, 0].astype(np.float64) for one in outs], [one[:, 0] for one in lses])
    np.testing.assert_allclose(out[:, 0], want[0], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(lse[:, 0], want[1], rtol=2e-6)


def test_the_splits_of_a_dense_decode_join_to_the_whole() -> None:
    """Cut at pages, some pieces empty for some requests, so that empty rows are merged too."""
    rng = np.random.default_rng(1)
    lengths = np.array([700, 0, 53, 126], np.int32)
    cache = (rng.standard_normal((20, 53, 2, 576)) * 0.3).astype(BF16)
    table = np.stack([rng.permutation(20)[:14] for _ in range(4)]).astype(np.int32)
    q = rng.standard_normal((4, 2, 6, 576)).astype(BF16)
    with oracle():
        whole = cumla.dense_decode(q, cache, table, lengths)
    for cuts in ([0, 14], [0, 1, 14], [0, 2, 5, 9, 14]):
        parts = []
        for begin, end in pairwise(cuts):
            part = np.clip(lengths - begin * 53, 0, (end - begin) * 53).astype(np.int32)
            parts.append((table[:, begin:end], part))
        results = [cumla.dense_decode(q, cache, *one) for one in parts]
        out, lse = cumla.merge_attention([one[0] for one in results], [one[1] for one in results])
        assert_close("lse", lse, whole[1], LSE_DECODE, dtype=np.float32)
        # Rounded to bf16 before and after the merge: prefill's bound has room for both.
        assert_close("out", out, whole[0], PREFILL_OUT, dtype=BF16)
        with oracle():
            results = [cumla.dense_decode(q, cache, *one) for one in parts]
            out, lse = cumla.merge_attention(
                [one[0] for one in results], [one[1] for one in results]
            )
        assert_close("oracle's lse", lse, whole[1], TIGHT, dtype=np.float64)
        assert_close("oracle's out", out, whole[0], TIGHT, dtype=np.float64)


def test_shared_keys_of_mha_are_merged_in_three_dimensions() -> None:
    """A prefix that all queries see, and each sequence's own keys: two calls, one result."""
    rng = np.random.default_rng(2)
    q, k, v = (
        rng.standard_normal((n, 4, d)).astype(BF16) for n, d in ((7, 40), (12, 40), (12, 24))
    )
    bounds = [np.array(one, np.int32) for one in ([0, 7], [0, 5], [0, 7], [0, 12])]
    with oracle():  # unrounded parts, so that the merge is all that is judged
        prefix = cumla.mha_varlen(q, k[:5], v[:5], bounds[0], bounds[1])
        own = cumla.mha_varlen(q, k[5:], v[5:], bounds[0], bounds[2], causal=True)
        out, lse = cumla.merge_attention([prefix[0], own[0]], [prefix[1], own[1]])
    # Together that is one causal attention: own queries and keys end at the same token.
    want = naive.mha_varlen(q, k, v, bounds[0], bounds[3], causal=True)
    assert_close("lse", lse, want[1], TIGHT, dtype=np.float64)
    assert_close("out", out, want[0], TIGHT, dtype=np.float64)


def test_one_result_is_itself_and_minus_infinity_becomes_plus() -> None:
    out = np.full((2, 1, 3), 0.5, np.float32)
    for mark in (np.inf, -np.inf):
        lse = np.array([[1.5], [mark]], np.float32)
        got, got_lse = cumla.merge_attention([out], [lse])
        assert got.tolist() == [[[0.5] * 3], [[0.0] * 3]]
        assert got_lse.tolist() == [[1.5], [np.inf]]


def test_lses_far_apart() -> None:
    outs = [np.full((1, 1, 2), value, np.float32) for value in (1, 2, 3)]
    lses = [np.full((1, 1), value, np.float32) for value in (-3e4, 3e4, -1e4)]
    out, lse = cumla.merge_attention(outs, lses)
    assert out.tolist() == [[[2, 2]]]
    assert lse.tolist() == [[3e4]]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_row_that_met_nan_stays_so(n: int) -> None:
    """The ops return NaN and +inf for it, which is not the 0 and +inf of a row without a key."""
    outs = [np.zeros((2, 1, 3), np.float32) for _ in range(n)]
    lses = [np.full((2, 1), -1, np.float32) for _ in range(n)]
    for place in range(n):
        outs[place][1], lses[place][1] = np.nan, np.inf
        for merge in (cumla.merge_attention, in_float64):
            out, lse = merge(outs, lses)
            assert np.isnan(out[1]).all()
            assert lse[1] == np.inf
            assert (out[0] == 0).all()
            assert np.isfinite(lse[0]).all()
        outs[place][1], lses[place][1] = 0, -1


def in_float64(outs: list[Array], lses: list[Array]) -> tuple[Array, Array]:
    with oracle():
        return cumla.merge_attention(outs, lses)


def test_nan_in_a_row_with_keys_propagates() -> None:
    outs = [np.zeros((2, 1, 2), np.float32), np.zeros((2, 1, 2), np.float32)]
    outs[1][1, 0, 1] = np.nan
    out, lse = cumla.merge_attention(outs, [np.zeros((2, 1), np.float32)] * 2)
    assert np.isnan(out).tolist() == [[[False, False]], [[False, True]]]
    assert np.isfinite(lse).all()


def test_results_go_into_the_buffers_that_are_passed() -> None:
    flat_outs, flat_lses = random_parts(3, 30, 24, BF16)
    outs = [scattered(one.reshape(2, 5, 3, 24)) for one in flat_outs]
    lses = [one.reshape(2, 5, 3).swapaxes(1, 2) for one in flat_lses]
    want = cumla.merge_attention(outs, lses)
    out = poison(scattered(np.empty((2, 5, 3, 24), BF16)))
    for lse in (np.empty((2, 3, 5), np.float32), np.empty((2, 5, 3), np.float32).swapaxes(1, 2)):
        got = cumla.merge_attention(outs, lses, out=out, lse=poison(lse))
        assert got[0] is out
        assert got[1] is lse
        assert same_bits(out, want[0])
        assert same_bits(lse, want[1])
