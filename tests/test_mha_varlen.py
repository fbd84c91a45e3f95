"""mha_varlen and its gradients against the naive definition and finite differences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import naive
import numpy as np
import pytest
from comparison import LSE_MHA, MHA_OUT, Tolerance, assert_close
from naive import TIGHT, same_bits
from numpy.typing import NDArray
from poison import poison, scattered

import cumla
from cumla.backends import oracle

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Case:
    seed: int
    s_q: tuple[int, ...]
    s_k: tuple[int, ...]
    h_q: int = 4
    h_kv: int = 4
    d_qk: int = 192
    d_v: int = 128
    causal: bool = False
    half: str = "bfloat16"
    scale: float | None = None
    strided: bool = False


@dataclass(frozen=True)
class Inputs:
    q: Array
    k: Array
    v: Array
    cu_seqlens_q: Array
    cu_seqlens_k: Array
    softmax_scale: float | None
    causal: bool

    def run(self, **how: Any) -> tuple[Array, Array]:
        return cumla.mha_varlen(**vars(self), **how)

    def gradients(self, dout: Array, out: Array, lse: Array, **how: Any) -> tuple[Array, ...]:
        return cumla.mha_varlen_backward(dout, out=out, lse=lse, **vars(self), **how)

    def reference(self) -> tuple[Array, Array]:
        return naive.mha_varlen(**vars(self))

    def reference_gradients(self, dout: Array) -> tuple[Array, ...]:
        return naive.mha_varlen_backward(dout, **vars(self))


def starts(lengths: tuple[int, ...]) -> Array:
    return np.cumsum([0, *lengths]).astype(np.int32)


def make(case: Case) -> tuple[Inputs, Array]:
    """The inputs and a gradient of out."""
    rng = np.random.default_rng(case.seed)
    half = np.dtype(case.half)
    total_q, total_k = sum(case.s_q), sum(case.s_k)
    shapes = (
        (total_q, case.h_q, case.d_qk),
        (total_k, case.h_kv, case.d_qk),
        (total_k, case.h_kv, case.d_v),
        (total_q, case.h_q, case.d_v),
    )
    q, k, v, dout = ((rng.standard_normal(shape) * 0.5).astype(half) for shape in shapes)
    bounds = starts(case.s_q), starts(case.s_k)
    if case.strided:
        q, k, v, dout = (scattered(one) for one in (q, k, v, dout))
        bounds = np.repeat(bounds[0], 2)[::2], np.repeat(bounds[1], 3)[::3]
    return Inputs(q, k, v, *bounds, case.scale, case.causal), dout


CASES = [
    Case(1, (5,), (5,)),
    Case(2, (61, 1, 126), (64, 53, 126), causal=True),
    Case(3, (3, 2), (130, 65), d_qk=128, causal=True, half="float16"),  # s_q < s_k
    Case(4, (130, 65, 3), (3, 64, 1), d_qk=128, causal=True),  # s_q > s_k: rows without a key
    Case(5, (0, 7, 4, 0, 3), (5, 0, 9, 0, 2), h_q=2, h_kv=2),  # empty on either side, and on both
    Case(6, (0, 7, 4, 0, 3), (5, 0, 9, 0, 2), h_q=2, h_kv=2, causal=True),
    Case(7, (53, 2), (61, 70), h_q=8, h_kv=2, d_qk=40, d_v=24),  # 4 query heads for each KV head
    Case(8, (53, 70), (61, 2), h_q=8, h_kv=2, d_qk=40, d_v=24, causal=True, half="float16"),
    # Several tiles of 256 rows and several chunks of 512 keys, with the edge inside of them.
    Case(9, (300, 1), (1100, 513), h_q=1, h_kv=1, d_qk=40, d_v=24, causal=True),
    Case(10, (200,), (1025,), h_q=3, h_kv=1, d_qk=40, d_v=24, causal=True, scale=0.5),
    Case(11, (600,), (530,), h_q=1, h_kv=1, d_qk=40, d_v=24, causal=True, strided=True),
    Case(12, (17, 1), (1, 17), h_q=3, h_kv=3, d_qk=1, d_v=1),
    Case(13, (3, 2), (5, 4), h_q=600, h_kv=2, d_qk=8, d_v=8, strided=True, causal=True),
    Case(14, (1,) * 20, tuple(range(20)), h_q=2, h_kv=1, d_qk=40, d_v=24),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = make(case)
    out, lse = given.run()
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("CUMLA_NUM_THREADS", threads)
        again = given.run()
        assert same_bits(again[0], out)
        assert same_bits(again[1], lse)
    with oracle():
        exact_out, exact_lse = given.run()
    want_out, want_lse = given.reference()
    assert_close("lse", lse, want_lse, LSE_MHA, dtype=np.float32)
    assert_close("out", out, want_out, MHA_OUT, dtype=case.half)
    assert_close("oracle's lse", exact_lse, want_lse, TIGHT, dtype=np.float64)
    assert_close("oracle's out", exact_out, want_out, TIGHT, dtype=np.float64)
    assert (out[np.isposinf(want_lse)] == 0).all()


def test_the_cases_hold_rows_without_a_key() -> None:
    assert sum(np.isposinf(make(case)[0].run()[1]).any() for case in CASES) > 4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    given, dout = make(case)
    out, lse = given.run()
    got = given.gradients(dout, out, lse)
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("CUMLA_NUM_THREADS", threads)
        for again, gradient in zip(given.gradients(dout, out, lse), got, strict=True):
            assert same_bits(again, gradient)
    with oracle():
        exact = given.gradients(dout, *given.run())
    want = given.reference_gradients(dout)
    for name, one, oracles, wanted in zip(("dq", "dk", "dv"), got, exact, want, strict=True):
        assert_close(f"oracle's {name}", oracles, wanted, TIGHT, dtype=np.float64)
        assert_close(name, one, wanted, MHA_OUT, dtype=case.half)
    # FlashMLA and others mark a row without a key by an lse of -inf.
    other = np.where(np.isposinf(lse), -np.inf, lse).astype(np.float32)
    for again, gradient in zip(given.gradients(dout, out, other), got, strict=True):
        assert same_bits(again, gradient)


@pytest.mark.parametrize(("s_q", "s_k"), [((0, 0), (3, 2)), ((3, 2), (0, 0)), ((0,), (0,))])
def test_no_query_or_no_key_in_the_whole_batch(s_q: tuple[int, ...], s_k: tuple[int, ...]) -> None:
    given, dout = make(Case(40, s_q, s_k, d_qk=40, d_v=24))
    out, lse = given.run()
    assert out.shape == dout.shape
    assert (out == 0).all()
    assert (lse == np.inf).all()
    gradients = given.gradients(dout, out, lse)
    for gradient, one in zip(gradients, (given.q, given.k, given.v), strict=True):
        assert gradient.shape == one.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_has_the_same_bits_alone(causal: bool) -> None:
    case = Case(20, (61, 5, 126), (64, 530, 126), h_q=4, h_kv=2, causal=causal)
    given, dout = make(case)
    out, lse = given.run()
    gradients = given.gradients(dout, out, lse)
    for i in range(3):
        queries = slice(given.cu_seqlens_q[i], given.cu_seqlens_q[i + 1])
        keys = slice(given.cu_seqlens_k[i], given.cu_seqlens_k[i + 1])
        alone = Inputs(
            given.q[queries],
            given.k[keys],
            given.v[keys],
            starts((case.s_q[i],)),
            starts((case.s_k[i],)),
            None,
            causal,
        )
        out_alone, lse_alone = alone.run()
        assert same_bits(out_alone, out[queries])
        assert same_bits(lse_alone, lse[queries])
        dq, dk, dv = alone.gradients(dout[queries], out_alone, lse_alone)
        assert same_bits(dq, gradients[0][queries])
        assert same_bits(dk, gradients[1][keys])
        assert same_bits(dv, gradients[2][keys])


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_the_slopes_of_the_result(causal: bool) -> None:
    """Central differences of sum(dout * out), in float64, extrapolated to a step of 0.

    The inputs are multiples of 1/256 in [-1, 1], and so are they a step away: float16 is exact.
    """
    rng = np.random.default_rng(21)

    def grid(*shape: int) -> Array:
        return (rng.integers(-250, 251, shape) / 256).astype(np.float16)

    q, k, v, dout = grid(5, 2, 5), grid(6, 1, 5), grid(6, 1, 3), grid(5, 2, 3)
    given = Inputs(q, k, v, starts((3, 2)), starts((5, 1)), 0.7, causal)

    def loss(which: str, at: tuple[int, ...], step: float) -> float:
        moved = getattr(given, which).copy()
        moved[at] += np.float16(step)
        out, _ = replace(given, **{which: moved}).run()
        return float((out * dout.astype(np.float64)).sum())

    def slope(which: str, at: tuple[int, ...], step: float) -> float:
        return (loss(which, at, step) - loss(which, at, -step)) / (2 * step)

    with oracle():
        gradients = given.gradients(dout, *given.run())
        for which, gradient in zip(("q", "k", "v"), gradients, strict=True):
            slopes = np.zeros(gradient.shape)
            for at in np.ndindex(gradient.shape):
                slopes[at] = (4 * slope(which, at, 2**-8) - slope(which, at, 2**-7)) / 3
            found = f"slope along {which}"
            assert_close(found, gradient, slopes, Tolerance(1e-7, 1e-6, 1e-10), dtype=np.float64)


# ------------------------------------------------------------------------------------ poison


def test_keys_that_only_later_queries_see_may_be_nan() -> None:
    """A window that slides over the chunk and tile borders; keys of other sequences too."""
    for s_q, s_k in ((3, 3), (3, 600), (300, 600), (5, 513)):
        case = Case(30, (s_q, 4), (s_k, 7), h_q=2, h_kv=1, d_qk=40, d_v=24, causal=True)
        given, _ = make(case)
        k, v = given.k.copy(), given.v.copy()
        k[s_k - 1], v[s_k - 1] = np.nan, np.nan
        out, lse = replace(given, k=k, v=v).run()
        want_out, want_lse = given.reference()
        want_out[s_q - 1], want_lse[s_q - 1] = np.nan, np.inf
        assert_close("out", out, want_out, MHA_OUT, dtype=BF16)
        assert_close("lse", lse, want_lse, LSE_MHA, dtype=np.float32)


def test_gradients_of_rows_that_see_no_nan_are_clean() -> None:
    """As in the forward pass: NaN in a key reaches the rows that see it, and no other."""
    case = Case(31, (3, 4), (6, 7), h_q=2, h_kv=1, d_qk=40, d_v=24, causal=True)
    given, dout = make(case)
    want = given.reference_gradients(dout)
    k, v = given.k.copy(), given.v.copy()
    k[5], v[5] = np.nan, np.nan
    broken = replace(given, k=k, v=v)
    dq, dk, dv = broken.gradients(dout, *broken.run())
    assert np.isnan(dq[2].astype(np.float32)).all()
    clean = [0, 1, 3, 4, 5, 6]
    assert_close("dq", dq[clean], want[0][clean], MHA_OUT, dtype=BF16)
    # The other sequence's keys; those of this one are seen by its last query.
    assert_close("dk", dk[6:], want[1][6:], MHA_OUT, dtype=BF16)
    assert_close("dv", dv[6:], want[2][6:], MHA_OUT, dtype=BF16)


def test_nan_in_v_reaches_its_column_only() -> None:
    case = Case(32, (4,), (9,), h_q=2, h_kv=1, d_qk=40, d_v=24)
    given, _ = make(case)
    v = given.v.copy()
    v[8, 0, 5] = np.nan
    out, lse = replace(given, v=v).run()
    want_out, want_lse = given.reference()
    want_out[..., 5] = np.nan
    assert_close("out", out, want_out, MHA_OUT, dtype=BF16)
    assert_close("lse", lse, want_lse, LSE_MHA, dtype=np.float32)


def test_keys_of_no_query_get_no_gradient() -> None:
    """Their dk and dv are 0, whatever the buffers held."""
    case = Case(33, (0, 2, 1), (3, 4, 5), h_q=2, h_kv=2, d_qk=40, d_v=24, causal=True)
    given, dout = make(case)
    dk, dv = poison(np.empty_like(given.k)), poison(np.empty_like(given.v))
    given.gradients(dout, *given.run(), dk=dk, dv=dv)
    assert (dk[:3] == 0).all()
    assert (dv[:3] == 0).all()
    assert np.isfinite(dk.astype(np.float32)).all()
    assert np.isfinite(dv.astype(np.float32)).all()


# ----------------------------------------------------------------------------------- buffers


def test_results_go_into_the_buffers_that_are_passed() -> None:
    given, dout = make(CASES[7])
    want = given.run()
    out = poison(scattered(np.empty_like(want[0])))
    lse = poison(np.empty(want[1].shape[::-1], np.float32)).T  # FlashMLA's: tokens along
    got = given.run(out=out, lse=lse)
    assert got[0] is out
    assert got[1] is lse
    assert same_bits(out, want[0])
    assert same_bits(lse, want[1])
    gradients = given.gradients(dout, *want)
    buffers = [poison(scattered(np.empty_like(one))) for one in gradients]
    names = ("dq", "dk", "dv")
    again = given.gradients(dout, out, lse, **dict(zip(names, buffers, strict=True)))
    for one, buffer, gradient in zip(again, buffers, gradients, strict=True):
        assert one is buffer
        assert same_bits(buffer, gradient)


def test_inputs_are_left_alone() -> None:
    given, dout = make(replace(CASES[7], strided=True))
    out, lse = given.run()
    arrays = [one for one in vars(given).values() if isinstance(one, np.ndarray)]
    arrays += [dout, out, lse]
    before = [one.copy() for one in arrays]
    for one in arrays:
        one.flags.writeable = False
    given.run()
    given.gradients(dout, out, lse)
    assert all(same_bits(one, copy) for one, copy in zip(arrays, before, strict=True))


def test_the_default_scale_is_that_of_the_dims() -> None:
    given, dout = make(CASES[6])
    explicit = replace(given, softmax_scale=40**-0.5)
    out, lse = given.run()
    assert same_bits(out, explicit.run()[0])
    for one, other in zip(
        given.gradients(dout, out, lse), explicit.gradients(dout, out, lse), strict=True
    ):
        assert same_bits(one, other)
    assert not same_bits(replace(given, softmax_scale=0.1).run()[1], lse)
