"""The combine kernel against its definition in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from comparison import LSE_DECODE, SPARSE_OUT, assert_close
from naive import same_bits
from numpy.typing import NDArray
from poison import poison, scattered

from cumla.backends.simulated import SimulatedDevice
from cumla.kernels import combine as kernels

from .gaps import assert_gaps_untouched, written_with_gaps

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
D_V = 512
# With one SM even few rows are many: a warp does a whole row. With a thousand, a quarter of one.
WIDE, NARROW = 1, 1000
DEVICES = {
    (target, num_sms): SimulatedDevice(target, num_sms, delivery="random")
    for target in ("sm_80", "sm_90a", "sm_120")
    for num_sms in (WIDE, NARROW)
}


@dataclass(frozen=True)
class Case:
    pieces: tuple[int, ...]
    """Of each request."""
    s_q: int
    h_q: int
    dtype: np.dtype[Any] = BF16
    target: str = "sm_90a"
    num_sms: int = WIDE
    empty: float = 0.2
    """How many pieces have no key for a row."""
    has_sink: bool = False
    spread: float = 5.0
    """Standard deviation of lses."""
    pad: int = 128
    """Elements between the rows of out, half of them before the first."""


@dataclass
class Problem:
    o_accum: Array
    lse_accum: Array
    num_splits: Array
    attn_sink: Array | None

    def __init__(self, case: Case) -> None:
        random = np.random.default_rng(sum(case.pieces))
        self.num_splits = np.cumsum([0, *case.pieces]).astype(np.int32)
        slots = int(self.num_splits[-1]) + 3
        shape = (slots, case.s_q, case.h_q)
        self.lse_accum = (random.standard_normal(shape) * case.spread).astype(np.float32)
        self.o_accum = random.standard_normal((*shape, D_V)).astype(np.float32)
        self.lse_accum[random.random(shape) < case.empty] = -np.inf
        self.o_accum[self.lse_accum == -np.inf] = np.nan
        for i, n in enumerate(case.pieces):
            if n == 1:  # whole requests have no piece in memory
                self.lse_accum[self.num_splits[i]] = np.nan
                self.o_accum[self.num_splits[i]] = np.nan
        poison(self.lse_accum[-3:])
        poison(self.o_accum[-3:])
        self.attn_sink = None
        if case.has_sink:
            sink = (random.standard_normal(case.h_q) * case.spread).astype(np.float32)
            self.attn_sink = scattered(np.stack([sink, sink], -1), 2)[:, 0]

    def run(self, case: Case, *, num_sms: int | None = None) -> tuple[Array, Array]:
        """out and lse; they hold NaN before, and in between."""
        batch = len(case.pieces)
        out = np.empty((batch, case.s_q, case.h_q, D_V), case.dtype)
        out = scattered(poison(out), case.pad)
        lse = scattered(poison(np.empty((batch, case.h_q, case.s_q), np.float32)), 3)
        with DEVICES[case.target, num_sms or case.num_sms].call() as call:
            kernels.combine(
                call,
                o_accum=call.read(self.o_accum),
                lse_accum=call.read(self.lse_accum),
                num_splits=call.read(self.num_splits),
                attn_sink=None if self.attn_sink is None else call.read(self.attn_sink),
                out=written_with_gaps(call, out),
                lse=written_with_gaps(call, lse),
            )
        assert_gaps_untouched(out)
        assert_gaps_untouched(lse)
        return out, lse

    def definition(self, case: Case) -> tuple[Array, Array]:
        """The same in float64; NaN for requests that are whole, as before the launch."""
        out = np.full((len(case.pieces), case.s_q, case.h_q, D_V), np.nan)
        lse = np.full((len(case.pieces), case.h_q, case.s_q), np.nan)
        for request, (begin, end) in enumerate(pairwise(self.num_splits)):
            if end - begin < 2:
                continue
            for token, head in np.ndindex(case.s_q, case.h_q):
                out[request, token, head], lse[request, head, token] = joined(
                    self.o_accum[begin:end, token, head],
                    self.lse_accum[begin:end, token, head],
                    None if self.attn_sink is None else self.attn_sink[head],
                )
        return out, lse

    def check(self, case: Case) -> tuple[Array, Array]:
        out, lse = self.run(case)
        want_out, want_lse = self.definition(case)
        assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
        assert_close("out", out, want_out, SPARSE_OUT, dtype=case.dtype)
        return out, lse


def joined(outs: Array, lses: Array, sink: np.float32 | None) -> tuple[Array, float]:
    """(out, lse) of one row from its pieces' outs [n, d_v] and lses [n] in log2 units."""
    if np.isnan(lses).any():
        return np.full(outs.shape[1], np.nan), np.inf
    has_key = lses > -np.inf
    if not has_key.any():
        return np.zeros(outs.shape[1]), np.inf
    natural = lses[has_key].astype(np.float64) * np.log(2)
    peak = natural.max()
    weights = np.exp(natural - peak)
    lse = peak + np.log(weights.sum())
    out = weights / weights.sum() @ outs[has_key].astype(np.float64)
    if sink is not None:
        out *= np.exp(lse - np.logaddexp(lse, np.float64(sink))) if sink < np.inf else 0
    return out, float(lse)


CASES = [
    Case((2,), 1, 1),
    Case((3, 1, 2), 1, 16, target="sm_80"),
    Case((1, 5, 1, 4), 2, 3, F16, target="sm_120", has_sink=True),
    Case((0, 2, 0, 3), 1, 5, num_sms=NARROW),  # as a plan whose room is too small leaves it
    Case((31, 32, 33), 1, 3, num_sms=NARROW, empty=0.5),
    Case((32, 33, 63), 1, 2, F16, empty=0.5),
    Case((160, 1, 7), 1, 4, has_sink=True, target="sm_80"),
    Case((300,), 1, 1, F16, num_sms=NARROW, target="sm_120"),
    Case((8, 9, 10), 3, 2, num_sms=NARROW, has_sink=True, target="sm_80"),
    Case((2, 3), 1, 128, has_sink=True),
    Case((2, 3), 2, 61, F16, has_sink=True, pad=6),  # rows of out at multiples of 4 bytes
    Case((2, 4), 1, 7, pad=2, num_sms=NARROW),  # of 2 bytes
    Case((2, 4), 1, 7, pad=8),  # of 8 bytes, not 16
    Case((4, 6), 1, 9, spread=200.0, has_sink=True),
    Case((4, 6), 1, 9, F16, spread=1e4),
    Case((40, 70), 1, 6, spread=1e4),
    Case((1, 1, 1), 1, 4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_combine(case: Case) -> None:
    problem = Problem(case)
    out, lse = problem.check(case)
    # The same bits again, whoever does the columns.
    for num_sms in (WIDE, NARROW):
        again = problem.run(case, num_sms=num_sms)
        assert same_bits(again[0], out)
        assert same_bits(again[1], lse)


def test_both_kernels_have_run() -> None:
    used = set()
    for num_sms in (WIDE, NARROW):
        case = Case((2,), 1, 16, num_sms=num_sms)
        Problem(case).run(case)
        used.add(DEVICES["sm_90a", num_sms].launches[-1][0].expression)
    assert used == {f"cumla::combine_pieces<cumla::bf16, 512, {n}>" for n in (128, 512)}


@pytest.mark.parametrize("num_sms", [WIDE, NARROW])
def test_edges(num_sms: int) -> None:
    """Sinks without end, rows without a key, and rows that met a NaN."""
    case = Case((3, 1, 40), 1, 6, num_sms=num_sms, empty=0.0, has_sink=True)
    problem = Problem(case)
    assert problem.attn_sink is not None
    problem.attn_sink[:] = [np.inf, -np.inf, np.inf, 0.5, 1e30, -1e30]
    first, last = slice(0, 3), slice(4, 44)
    for pieces, heads in ((first, slice(1, 3)), (last, slice(2, 4))):
        problem.lse_accum[pieces, 0, heads] = -np.inf  # no key, with sinks of -inf, inf and 0.5
        problem.o_accum[pieces, 0, heads] = np.nan
    problem.lse_accum[43, 0, 5] = np.nan
    problem.o_accum[43, 0, 5] = np.nan
    problem.lse_accum[0, 0, 3] = np.nan
    out, lse = problem.check(case)
    assert not out[0, 0, 0].any()
    assert np.isfinite(lse[0, 0]).all()
    assert out[2, 0, 1].any()
    for request, head in ((0, 1), (0, 2), (2, 2), (2, 3)):
        assert not out[request, 0, head].any()
        assert lse[request, head] == np.inf
    for request, head in ((2, 5), (0, 3)):
        assert np.isnan(out[request, 0, head]).all()
        assert lse[request, head] == np.inf
    assert not out[0, 0, 4].any()
    without = replace(case, has_sink=False)
    problem.attn_sink = None
    whole, same_lse = problem.check(without)
    assert same_bits(same_lse, lse)
    assert same_bits(whole[:, :, 1], out[:, :, 1])
    assert same_bits(whole[0, :, 5], out[0, :, 5])


def test_a_nan_value_of_a_key_reaches_its_column_only() -> None:
    case = Case((3,), 1, 2, empty=0.0)
    problem = Problem(case)
    problem.o_accum[1, 0, 1, 77] = np.nan
    problem.lse_accum[1, 0, 1] = -1e4  # however little it weighs
    problem.lse_accum[0, 0, 1] = 0
    out, _ = problem.check(case)
    assert np.flatnonzero(np.isnan(out[0, 0, 1])).tolist() == [77]


def test_no_rows() -> None:
    device = DEVICES["sm_90a", WIDE]
    before = len(device.launches)
    out = np.empty((0, 1, 4, D_V), BF16)
    with device.call() as call:
        scratch: Any = [call.empty((1, 1, 4), np.float32) for _ in range(3)]
        kernels.combine(
            call,
            o_accum=scratch[0],
            lse_accum=scratch[1],
            num_splits=call.read(np.zeros(1, np.int32)),
            attn_sink=None,
            out=_Empty(out),
            lse=scratch[2],
        )
    assert len(device.launches) == before


class _Empty:
    """A device array of no elements."""

    def __init__(self, array: Array) -> None:
        self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype


def test_instances() -> None:
    known = {program.expression for program, threads, shared in kernels.instances(101_376)}
    assert known == {
        f"cumla::combine_pieces<cumla::{t}, 512, {n}>" for t in ("bf16", "f16") for n in (128, 512)
    }
