"""The merge kernel against merge_attention's definition in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from comparison import LSE_DECODE, SPARSE_OUT, assert_close
from naive import same_bits
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from poison import poison, scattered

import cumla
from cumla.backends import oracle
from cumla.backends.simulated import SimulatedDevice
from cumla.kernels import merge as kernels

from .gaps import assert_gaps_untouched, written_with_gaps

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
DEVICES = {target: SimulatedDevice(target) for target in ("sm_80", "sm_90a", "sm_120")}
SM90 = DEVICES["sm_90a"]


@dataclass(frozen=True)
class Case:
    n: int
    rows: tuple[int, ...]
    d_v: int
    dtype: np.dtype[Any] = BF16
    target: str = "sm_90a"
    pad: int = 128
    """Elements between rows, half of them before the first."""
    strided: bool = False
    """The last dimension of outs and out is, too."""
    mixed: bool = False
    """Every third result has other strides, and every fourth lse."""
    spread: float = 5.0
    """Standard deviation of lses."""


def laid_out(array: Array, pad: int, strided: bool) -> Array:
    """The same values with gaps that are NaN."""
    if strided:
        *outer, d_v = array.shape
        view = scattered(poison(np.empty([*outer, 2 * d_v], array.dtype)), pad)[..., ::2]
        view[...] = array
        return view
    return scattered(array, pad)


def inputs(case: Case) -> tuple[list[Array], list[Array]]:
    """Results of which a good part of the rows have no key, the first row in none of them."""
    random = np.random.default_rng(case.n)
    outs, lses = [], []
    for i in range(case.n):
        out = (random.standard_normal((*case.rows, case.d_v)) * 0.3).astype(case.dtype)
        lse = (random.standard_normal(case.rows) * case.spread).astype(np.float32)
        empty = random.random(case.rows) < 0.3
        empty.flat[0] = True
        lse[empty] = random.choice(np.array([np.inf, -np.inf], np.float32), empty.sum())
        out[empty] = 1e4  # does not count, nor does NaN beside -inf
        out[np.isneginf(lse)] = np.nan
        pad = case.pad + (16 if case.mixed and i % 3 == 2 else 0)
        outs.append(laid_out(out, pad, case.strided))
        if not (case.mixed and i % 4 == 3):  # as the decode ops return it: heads before tokens
            lse = lse.swapaxes(0, -1).copy().swapaxes(0, -1)
        lses.append(lse)
    return outs, lses


def merged(
    outs: Sequence[Array],
    lses: Sequence[Array],
    device: SimulatedDevice = SM90,
    *,
    pad: int = 0,
    strided: bool = False,
) -> tuple[Array, Array]:
    """Into NaN, with more of it around the results."""
    out = laid_out(poison(np.empty(outs[0].shape, outs[0].dtype)), pad, strided)
    lse = scattered(poison(np.empty(lses[0].shape, np.float32)), 3)
    with device.call() as call:
        call.write = partial(written_with_gaps, call)  # type: ignore[method-assign]
        kernels.merge_attention(call, outs=outs, lses=lses, out=out, lse=lse)
    assert_gaps_untouched(out)
    assert_gaps_untouched(lse)
    return out, lse


def exactly(outs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """In float64. The op wants the lse of four-dimensional outs as [b, h_q, s_q]."""
    four = outs[0].ndim == 4
    with oracle():
        out, lse = cumla.merge_attention(
            list(outs), [one.swapaxes(1, 2) if four else one for one in lses]
        )
    return out, lse.swapaxes(1, 2) if four else lse


CASES = [
    *(
        Case(n, (2, 3, 5), d_v, dtype, target)
        for n, d_v, dtype, target in (
            (1, 24, BF16, "sm_80"),
            (2, 512, BF16, "sm_80"),
            (2, 512, F16, "sm_120"),
            (2, 512, F32, "sm_90a"),
            (3, 24, F16, "sm_80"),
            (8, 24, F32, "sm_120"),
            (9, 24, BF16, "sm_90a"),
            (10, 20, F32, "sm_80"),
            (16, 40, F16, "sm_90a"),
            (17, 24, F16, "sm_120"),
            (40, 16, BF16, "sm_120"),
        )
    ),
    *(Case(n, (6, 2), d_v) for n in (2, 9) for d_v in (1, 7, 8, 255, 257, 264, 520)),
    *(Case(n, (7, 3), 5, F32) for n in (2, 9)),
    Case(2, (1, 1), 512, F16, pad=0),
    Case(2, (5, 1, 3), 128, F32, pad=0),
    Case(3, (5, 1, 3), 40, pad=2),  # rows at multiples of 2, 4 and 8 bytes
    Case(3, (4, 3), 40, F32, pad=2),
    Case(11, (4, 3), 40, F16, pad=8),
    Case(3, (4, 3), 40, strided=True),
    Case(9, (4, 3), 11, F32, strided=True),
    Case(4, (2, 3, 4), 24, mixed=True),
    Case(23, (2, 3, 4), 24, F16, mixed=True),
    Case(2, (300, 3), 8),
    Case(5, (20, 3), 24, F32, spread=100.0),
    Case(12, (20, 3), 24, F32, spread=1e4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge(case: Case) -> None:
    outs, lses = inputs(case)
    layout: dict[str, Any] = {"pad": case.pad, "strided": case.strided}
    out, lse = merged(outs, lses, DEVICES[case.target], **layout)
    want_out, want_lse = exactly(outs, lses)
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want_out, SPARSE_OUT, dtype=case.dtype)
    again = merged(outs, lses, DEVICES[case.target], **layout)
    assert same_bits(again[0], out)
    assert same_bits(again[1], lse)


def test_outputs_that_alone_are_misaligned() -> None:
    outs, lses = inputs(Case(2, (4, 3), 64, pad=0))
    want = merged(outs, lses)
    for pad in (2, 4, 8):
        got = merged(outs, lses, pad=pad)
        assert same_bits(got[0], want[0])
    got = merged(outs, lses, strided=True)
    assert same_bits(got[0], want[0])


def test_negative_and_zero_strides() -> None:
    outs, lses = inputs(Case(3, (4, 3), 24, pad=0))
    backwards = [one[::-1, :, ::-1] for one in outs]
    out, lse = merged(backwards, [one[::-1] for one in lses])
    want_out, want_lse = merged(outs, lses)
    assert same_bits(out, want_out[::-1, :, ::-1])
    assert same_bits(lse, want_lse[::-1])
    same = [np.broadcast_to(one[:1], one.shape) for one in outs]
    same_lses = [np.broadcast_to(one[:, :1], one.shape) for one in lses]
    want_out, want_lse = exactly([one.copy() for one in same], [one.copy() for one in same_lses])
    out, lse = merged(same, same_lses)
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want_out, SPARSE_OUT, dtype=BF16)


@pytest.mark.parametrize("n", [3, 12])
def test_float32_results_lose_nothing(n: int) -> None:
    outs, lses = inputs(Case(n, (61, 1), 24, F32))
    out, lse = merged(outs, lses)
    want = exactly(outs, lses)
    np.testing.assert_allclose(out, want[0], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(lse, want[1], rtol=2e-6)


def test_one_result_is_itself_to_the_bit() -> None:
    random = np.random.default_rng(3)
    for dtype in (BF16, F16, F32):
        out = random.standard_normal((50, 1, 20)).astype(dtype)
        out[3, 0, 7] = np.inf
        lse = (random.standard_normal((50, 1)) * 30).astype(np.float32)
        lse[4] = np.nan  # no op returns that, and the definition leaves it
        got, got_lse = merged([out], [lse])
        assert same_bits(got, out)
        np.testing.assert_array_equal(got_lse, lse)
        lse[5:7, 0] = np.inf, -np.inf
        got, got_lse = merged([out], [lse])
        assert not got[5:7].any()
        assert (got_lse[5:7] == np.inf).all()


def test_how_launches_are_cut() -> None:
    def launches(given: Case | tuple[list[Array], list[Array]]) -> list[str]:
        before = len(SM90.launches)
        merged(*(inputs(given) if isinstance(given, Case) else given))
        return [program.expression[-2:-1] for program, _ in SM90.launches[before:]]

    assert launches(Case(2, (2, 1), 8)) == ["2"]
    assert launches(Case(3, (2, 1), 8)) == ["8"]
    assert launches(Case(8, (2, 1), 8)) == ["8"]
    assert launches(Case(18, (2, 1), 8)) == ["8", "8", "2"]
    assert launches(Case(4, (2, 1), 8, mixed=True)) == ["2", "2", "2"]
    # A stride over one element is no difference.
    outs, lses = inputs(Case(2, (2, 1), 8))
    step = outs[0].strides[0]
    outs[1] = as_strided(outs[1], strides=(step, 2 * step, outs[1].itemsize))
    assert launches((outs, lses)) == ["2"]


def test_lses_far_apart() -> None:
    outs = [np.full((1, 1, 2), value, np.float32) for value in (1, 2, 3)]
    lses = [np.full((1, 1), value, np.float32) for value in (-3e4, 3e4, -1e4)]
    out, lse = merged(outs * 4, [*lses, *([lses[0] - 1, lses[2], lses[2]] * 3)])
    assert out.tolist() == [[[2, 2]]]
    assert lse.tolist() == [[3e4]]
    out, lse = merged(outs[:2], [np.full((1, 1), value, np.float32) for value in (3e38, -3e38)])
    assert out.tolist() == [[[1, 1]]]
    assert lse.tolist() == [[np.float32(3e38)]]


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_a_row_that_met_nan_stays_so(n: int) -> None:
    outs = [np.zeros((3, 1, 40), np.float32) for _ in range(n)]
    lses = [np.full((3, 1), -1, np.float32) for _ in range(n)]
    for place in range(n):
        outs[place][1], lses[place][1] = np.nan, np.inf
        # Without a key in all others. One NaN, wherever it is, tells that the row met one.
        for i in range(n):
            outs[i][2], lses[i][2] = 1, np.inf if i % 2 else -np.inf
        outs[place][2, 0, 39 - place], lses[place][2] = np.nan, np.inf
        out, lse = merged(outs, lses)
        assert np.isnan(out[1:]).all()
        assert (lse[1:] == np.inf).all()
        assert (out[0] == 0).all()
        assert np.isfinite(lse[0]).all()
        outs[place][1], lses[place][1] = 0, -1


@pytest.mark.parametrize("n", [2, 9])
def test_an_lse_that_is_nan(n: int) -> None:
    for place in range(n):
        outs = [np.ones((2, 1, 8), np.float32) for _ in range(n)]
        lses = [np.full((2, 1), -np.inf, np.float32) for _ in range(n)]
        lses[0][1] = 3
        lses[place][:] = np.nan
        out, lse = merged(outs, lses)
        want_out, want_lse = exactly(outs, lses)
        assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
        assert_close("out", out, want_out, SPARSE_OUT, dtype=np.float32)
        assert np.isnan(out).all()


def test_nan_in_a_row_with_keys_propagates() -> None:
    outs = [np.zeros((2, 1, 2), np.float32), np.zeros((2, 1, 2), np.float32)]
    outs[1][1, 0, 1] = np.nan
    out, lse = merged(outs, [np.zeros((2, 1), np.float32), np.full((2, 1), -9e3, np.float32)])
    assert np.isnan(out).tolist() == [[[False, False]], [[False, True]]]
    assert np.isfinite(lse).all()


def test_no_rows() -> None:
    before = len(SM90.launches)
    out, lse = np.empty((0, 2, 8), BF16), np.empty((0, 2), np.float32)
    with SM90.call() as call:
        kernels.merge_attention(call, outs=[out] * 2, lses=[lse] * 2, out=out, lse=lse)
    assert len(SM90.launches) == before


def test_launches_are_among_the_instances() -> None:
    known = {program for program, _, _ in kernels.instances(101_376)}
    assert {program for program, _ in SM90.launches} <= known
    for dtype in (BF16, F16, F32):
        for n in (1, 3):
            merged(*inputs(Case(n, (1, 1), 8, dtype)))
    assert {program for program, _ in SM90.launches} == known
