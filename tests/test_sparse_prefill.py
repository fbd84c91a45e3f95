"""sparse_prefill against the naive definition: results, bits, masks, maximum logits."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import naive
import numpy as np
import pytest
from comparison import LSE_PREFILL, PREFILL_OUT, assert_close
from naive import TIGHT, same_bits
from numpy.typing import NDArray
from poison import poison, scattered

import cumla
from cumla.backends import oracle

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
D_V = 512
# FlashMLA's tests fill with these; "s_kv" is the first value beyond the tokens.
FILLERS: tuple[int | str, ...] = (
    -2147483648,
    -123456,
    -1,
    "s_kv",
    114514,
    1919810,
    2147480000,
    2147483647,
)


@dataclass(frozen=True)
class Case:
    seed: int
    s_q: int
    s_kv: int
    topk: int
    h_q: int = 16
    d_qk: int = 576
    lengths: bool = False
    sink: bool = False
    half: str = "bfloat16"
    scale: float = 0.05
    strided: bool = False

    @property
    def rows(self) -> int:
        return self.s_q * self.h_q * self.topk


@dataclass(frozen=True)
class Inputs:
    q: Array
    kv: Array
    indices: Array
    sm_scale: float
    attn_sink: Array | None
    topk_length: Array | None

    def only(self, queries: list[int]) -> Inputs:
        lengths = None if self.topk_length is None else self.topk_length[queries]
        return replace(self, q=self.q[queries], indices=self.indices[queries], topk_length=lengths)

    def run(self, **how: Any) -> tuple[Array, Array, Array]:
        return cumla.sparse_prefill(**vars(self), **how)

    def reference(self) -> tuple[Array, Array, Array]:
        return naive.sparse_prefill(**vars(self))


def filler(value: int | str, s_kv: int) -> int:
    return s_kv if isinstance(value, str) else value


def make(case: Case) -> Inputs:
    """Tokens that no index in use names are NaN; indices out of use name those."""
    rng = np.random.default_rng(case.seed)
    half = np.dtype(case.half)
    names = rng.permutation(case.s_kv).astype(np.int32)
    good, bad = np.split(names, [max(case.s_kv // 2, 1)])
    shape = (case.s_q, 1, case.topk)
    fillers = np.array([filler(one, case.s_kv) for one in FILLERS], np.int32)
    share = rng.choice([0.0, 0.1, 0.7, 1.0], (case.s_q, 1, 1))
    indices = np.where(
        rng.random(shape) < share, rng.choice(fillers, shape), rng.choice(good, shape)
    )
    lengths = None
    if case.lengths:
        lengths = rng.integers(0, case.topk + 1, case.s_q).astype(np.int32)
        beyond = rng.choice(np.concatenate([bad, fillers]), shape)
        indices = np.where(np.arange(case.topk) >= lengths[:, None, None], beyond, indices)
    kv = np.full((case.s_kv, 1, case.d_qk), np.nan)
    kv[good] = np.clip(rng.standard_normal((len(good), 1, case.d_qk)) * 0.3, -1, 1)
    q = np.clip(rng.standard_normal((case.s_q, case.h_q, case.d_qk)), -1, 1).astype(half)
    sink = None
    if case.sink:
        sink = rng.choice(np.array([np.inf, -np.inf, -1, 0, 2.5], np.float32), case.h_q)
    kv, indices = kv.astype(half), indices.astype(np.int32)
    if case.strided:
        q, kv, indices = scattered(q), scattered(kv), scattered(indices, 8)
    return Inputs(q, kv, indices, case.scale, sink, lengths)


AXES: dict[str, tuple[Any, ...]] = {
    "s_q": (1, 2, 17, 62),
    "s_kv": (1, 32, 95, 592, 1840),
    "topk": (1, 7, 64, 130, 1100),
    "h_q": (1, 3, 8, 16, 63, 128),
    "d_qk": (576, 512),
    "lengths": (False, True),
    "sink": (False, True),
    "half": ("bfloat16", "float16"),
    "scale": (0.02, 0.05, 0.5),
    "strided": (False, True),
}
TOTAL = 4 * 5 * 5 * 6 * 2 * 2 * 2 * 2 * 3 * 2


def sample(count: int) -> list[Case]:
    rng = random.Random(3)
    cases: list[Case] = []
    while len(cases) < count:
        case = Case(seed=len(cases), **{name: rng.choice(values) for name, values in AXES.items()})
        if case.rows < 100_000:
            cases.append(case)
    return cases


CASES = [*sample(36), Case(100, s_q=9, s_kv=1840, topk=1100, h_q=3, lengths=True, sink=True)]


def test_the_sample_covers_every_value() -> None:
    print(f"{len(CASES)} of {TOTAL} cases")
    for name, values in AXES.items():
        assert {getattr(case, name) for case in CASES} >= set(values), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(case)
    results = given.run()
    # The same bits: again, with other numbers of threads, in another order, alone.
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("CUMLA_NUM_THREADS", threads)
        for again, result in zip(given.run(), results, strict=True):
            assert same_bits(again, result)
    monkeypatch.delenv("CUMLA_NUM_THREADS")
    order = np.random.default_rng(case.seed).permutation(case.s_q).tolist()
    for queries in (order, [order[0]]):
        for part, result in zip(given.only(queries).run(), results, strict=True):
            assert same_bits(part, result[queries])

    with oracle():
        exact = given.run()
    want = given.reference()
    out, max_logits, lse = results
    assert_close("max_logits", max_logits, want[1], LSE_PREFILL, dtype=np.float32)
    assert_close("lse", lse, want[2], LSE_PREFILL, dtype=np.float32)
    assert_close("out", out, want[0], PREFILL_OUT, dtype=case.half)
    for name, got, wanted in zip(("out", "max_logits", "lse"), exact, want, strict=True):
        assert_close(f"oracle's {name}", got, wanted, TIGHT, dtype=np.float64)
    empty = np.isposinf(want[2])
    assert same_bits(np.isneginf(max_logits), empty)
    assert (out[empty] == 0).all()


def test_the_cases_hold_rows_without_a_key() -> None:
    empty = [np.isposinf(make(case).run()[2]).all(axis=1) for case in CASES]
    assert any(one.any() and not one.all() for one in empty)


@pytest.mark.parametrize("value", FILLERS, ids=str)
def test_an_invalid_index_selects_nothing(value: int | str) -> None:
    rng = np.random.default_rng(1)
    kv = (rng.standard_normal((95, 1, 512)) * 0.3).astype(BF16)
    q = rng.standard_normal((2, 3, 512)).astype(BF16)
    indices = rng.integers(0, 95, (2, 1, 7)).astype(np.int32)
    given = Inputs(q, kv, indices, 0.05, None, None)
    want = given.run()
    for place in range(8):
        longer = np.insert(indices, place, filler(value, 95), axis=2)
        for got, wanted in zip(replace(given, indices=longer).run(), want, strict=True):
            assert same_bits(got, wanted)
    nothing = replace(given, indices=np.full_like(indices, filler(value, 95)))
    for sink in (None, np.array([0, np.inf, -np.inf], np.float32)):
        out, max_logits, lse = replace(nothing, attn_sink=sink).run()
        assert (out == 0).all()
        assert (max_logits == -np.inf).all()
        assert (lse == np.inf).all()


def test_the_last_token_counts_and_the_next_does_not() -> None:
    kv = np.zeros((5, 1, 512), BF16)
    kv[4] = np.nan
    q = np.ones((1, 1, 512), BF16)
    for index, is_nan in ((4, True), (5, False)):
        indices = np.array([[[0, index]]], np.int32)
        out, max_logits, lse = Inputs(q, kv, indices, 1.0, None, None).run()
        assert np.isnan(out.astype(np.float32)).all() == is_nan
        assert np.isnan(max_logits).all() == is_nan
        assert (lse == np.inf).all() == is_nan


def test_no_tokens_at_all() -> None:
    q = np.ones((2, 3, 576), BF16)
    kv = np.empty((0, 1, 576), BF16)
    out, max_logits, lse = Inputs(q, kv, np.zeros((2, 1, 4), np.int32), 1.0, None, None).run()
    assert (out == 0).all()
    assert (max_logits == -np.inf).all()
    assert (lse == np.inf).all()


def test_a_token_named_twice_counts_twice() -> None:
    given = make(Case(50, s_q=2, s_kv=95, topk=7, h_q=3))
    good = np.flatnonzero(np.isfinite(given.kv[:, 0, 0].astype(np.float32)))[:7].astype(np.int32)
    once = replace(given, indices=np.broadcast_to(good, (2, 1, 7)))
    twice = replace(given, indices=np.broadcast_to(np.repeat(good, 2), (2, 1, 14)))
    (out, max_logits, lse), again = once.run(), twice.run()
    assert_close("out", again[0], out.astype(np.float64), PREFILL_OUT, dtype=BF16)
    assert_close("max_logits", again[1], max_logits, LSE_PREFILL, dtype=np.float32)
    assert_close("lse", again[2], lse + np.log(2), LSE_PREFILL, dtype=np.float32)


def test_the_sink_leaves_max_logits_and_lse_alone() -> None:
    given = make(Case(51, s_q=17, s_kv=95, topk=64, h_q=3))
    out, max_logits, lse = given.run()
    sink = np.array([1, np.inf, -np.inf], np.float32)
    with_sink = replace(given, attn_sink=sink).run()
    assert same_bits(with_sink[1], max_logits)
    assert same_bits(with_sink[2], lse)
    assert (with_sink[0][:, 1] == 0).all()
    assert same_bits(with_sink[0][:, 2], out[:, 2])
    assert not same_bits(with_sink[0][:, 0], out[:, 0])


def test_max_logits_may_all_be_negative() -> None:
    kv = np.full((3, 1, 512), -1, BF16)
    kv[1] = -0.5
    q = np.ones((1, 2, 512), BF16)
    indices = np.array([[[2, 1, 0, -1]]], np.int32)
    _, max_logits, lse = Inputs(q, kv, indices, 0.25, None, None).run()
    assert (max_logits == -64).all()
    assert_close("lse", lse, np.full((1, 2), -64.0), LSE_PREFILL, dtype=np.float32)


def test_results_go_into_the_buffers_that_are_passed() -> None:
    case = CASES[-1]
    given = make(case)
    want = given.run()
    out = scattered(np.empty((case.s_q, case.h_q, D_V), BF16))
    max_logits = poison(np.empty((case.h_q, case.s_q), np.float32)).T
    lse = poison(np.empty((case.s_q, 2 * case.h_q), np.float32))[:, ::2]
    buffers = (poison(out), max_logits, lse)
    got = given.run(out=out, max_logits=max_logits, lse=lse)
    for result, buffer, wanted in zip(got, buffers, want, strict=True):
        assert result is buffer
        assert same_bits(buffer, wanted)


def test_inputs_are_left_alone() -> None:
    given = make(replace(CASES[-1], strided=True))
    arrays = [one for one in vars(given).values() if isinstance(one, np.ndarray)]
    before = [one.copy() for one in arrays]
    for one in arrays:
        one.flags.writeable = False
    given.run()
    assert all(same_bits(one, copy) for one, copy in zip(arrays, before, strict=True))
