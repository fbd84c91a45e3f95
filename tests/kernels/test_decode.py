"""The decode kernels in the simulator, on the cases of test_dense_decode and test_sparse_decode.

Every launch runs with memory and race checks, and asynchronous copies land early, late or at
random. Poison stands in all that nobody selects: NaN in tokens, pages, outputs and padding, absurd
ids in unused entries.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import test_dense_decode as dense
import test_sparse_decode as sparse
from comparison import DENSE_OUT, LSE_DECODE, SPARSE_OUT, assert_close
from naive import same_bits
from numpy.typing import NDArray
from poison import poison, scattered

import cumla
from cumla import backends
from cumla.backends import oracle
from cumla.backends.kernel_backend import KernelBackend
from cumla.backends.problems import DenseDecode
from cumla.backends.simulated import SimulatedDevice
from cumla.kernels import decode
from cumla.layouts import BF16

Array = NDArray[Any]
TARGETS = ("sm_80", "sm_89", "sm_90a", "sm_120")
DELIVERIES = ("eager", "late", "random")


@contextmanager
def on(device: SimulatedDevice) -> Iterator[None]:
    """Run NumPy arrays on `device` in the block."""
    before = backends._loaded.get("sim")
    backends._loaded["sim"] = KernelBackend("sim", device)
    try:
        with cumla.use_backend("sim"):
            yield
    finally:
        if before is None:
            del backends._loaded["sim"]
        else:
            backends._loaded["sim"] = before


# ------------------------------------------------------------------------------------- the grids


@dataclass(frozen=True)
class Run:
    """A case and the device that it runs on."""

    case: dense.Case | sparse.Case
    target: str
    num_sms: int
    delivery: str
    plan: tuple[tuple[str, int], ...] = ()
    """Of cumla.plan_decode; nothing: made by the kernel."""

    @property
    def device(self) -> SimulatedDevice:
        return SimulatedDevice(
            self.target, self.num_sms, delivery=self.delivery, seed=self.case.seed
        )


PLANS: tuple[tuple[tuple[str, int], ...], ...] = (
    (),
    (("num_parts", 1),),
    (("num_parts", 7),),
    (("split_blocks", 2),),
    (("split_blocks", 1), ("block_size", 16)),
    (("num_parts", 3), ("block_size", 61), ("overhead", 0)),
)


def draw(cases: list[Any], count: int, seed: int, limit: int) -> list[Run]:
    """A seeded sample of cases that the simulator can bear, on every target and delivery."""
    rng = random.Random(seed)
    small = [one for one in cases if one.rows <= limit]
    runs = [
        Run(
            rng.choice(small),
            TARGETS[i % len(TARGETS)],
            rng.choice((2, 8, 40)),
            DELIVERIES[i % len(DELIVERIES)],
            rng.choice(PLANS),
        )
        for i in range(count)
    ]
    return list(dict.fromkeys(runs))


DENSE_RUNS = draw(dense.sample(60) + dense.HARD[2:], 24, 1, 60_000)
SPARSE_RUNS = draw(sparse.sample(90), 36, 2, 60_000)


def outputs(given: Any, heads: int) -> dict[str, Array]:
    """Poisoned arrays for the results, not contiguous."""
    b, s_q, _, _ = given.q.shape
    out = poison(np.empty((b, s_q, heads, 512), given.q.dtype))
    lse = poison(np.empty((b, heads, s_q), np.float32))
    return {"out": scattered(out), "lse": scattered(lse)}


def simulate(run: Run, given: Any, lengths: Array, **how: Any) -> tuple[Array, Array]:
    plan = None
    if run.plan:
        plan = cumla.plan_decode(lengths, **dict(run.plan))
    with on(run.device):
        out, lse = given.run(plan=plan, **how)
    return np.array(out), np.array(lse)


def check_edges(out: Array, lse: Array, want_lse: Array) -> None:
    """What is exact: rows without a key, and only those, have lse +inf and out 0."""
    empty = np.isposinf(want_lse).swapaxes(1, 2)
    assert same_bits(np.isposinf(lse).swapaxes(1, 2), empty)
    assert (out[empty] == 0).all()


@pytest.mark.parametrize("run", DENSE_RUNS, ids=str)
def test_dense(run: Run) -> None:
    assert isinstance(run.case, dense.Case)
    given = dense.make(run.case)
    how = outputs(given, run.case.h_q) if run.case.strided else {}
    out, lse = simulate(run, given, given.cache_seqlens, **how)
    with oracle():
        want_out, want_lse = given.run()
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want_out, DENSE_OUT, dtype=run.case.half)
    check_edges(out, lse, want_lse)


@pytest.mark.parametrize("run", SPARSE_RUNS, ids=str)
def test_sparse(run: Run) -> None:
    assert isinstance(run.case, sparse.Case)
    given = sparse.make(run.case)
    lengths = given.kv_lens(dict(run.plan).get("block_size", 64))
    how = outputs(given, run.case.h_q) if run.case.strided else {}
    out, lse = simulate(run, given, lengths, **how)
    with oracle():
        want_out, want_lse = given.run()
    half = sparse.LAYOUTS[run.case.layout].compute_dtype
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want_out, SPARSE_OUT, dtype=half)
    check_edges(out, lse, want_lse)


def test_the_samples_cover_every_kernel() -> None:
    """All formats, tile heights, targets and deliveries, with an extra pool and without."""
    assert {run.case.half for run in DENSE_RUNS} == {"bfloat16", "float16"}
    assert {run.case.causal for run in DENSE_RUNS} == {False, True}
    heights = {-(-min(run.case.h_q, 64) // 16) for run in SPARSE_RUNS}
    assert heights >= {1, 4}
    formats = {(run.case.layout, run.case.extra is None) for run in SPARSE_RUNS}
    assert formats == {(name, extra) for name in sparse.LAYOUTS for extra in (False, True)}
    for runs in (DENSE_RUNS, SPARSE_RUNS):
        assert {run.target for run in runs} == set(TARGETS)
        assert {run.delivery for run in runs} == set(DELIVERIES)
        assert {run.plan for run in runs} == set(PLANS)


# --------------------------------------------------------------------------------------- bits

FIXED = (("split_blocks", 2),)
BITS: list[tuple[Any, Any]] = [
    (dense, dense.Case(300, (200, 0, 65, 130), s_q=2, h_q=9, page_size=53, causal=True)),
    (dense, dense.Case(301, (150, 90), h_q=64, page_size=61)),
    (
        sparse,
        sparse.Case(302, "V32_FP8", sparse.Pool(500, 61, 130, "bs"), b=3, s_q=1, h_q=16, sink=True),
    ),
    (
        sparse,
        sparse.Case(
            303,
            "V4_FP8",
            sparse.Pool(500, 64, 130, "b"),
            b=3,
            s_q=2,
            h_q=63,
            extra=sparse.Pool(65, 2, 64, "b"),
        ),
    ),
]


@pytest.mark.parametrize(("module", "case"), BITS, ids=lambda one: str(getattr(one, "seed", "")))
def test_bits_depend_on_the_plan_alone(module: Any, case: Any) -> None:
    """Not on a rerun, the delivery of copies, the order of blocks, or the rest of the batch."""
    given = module.make(case)

    def lengths(of: Any) -> Array:
        return of.cache_seqlens if module is dense else of.kv_lens(64)

    first = Run(case, "sm_90a", 8, "eager", FIXED)
    out, lse = simulate(first, given, lengths(given))
    for delivery, seed in (("eager", 1), ("late", 2), ("random", 3)):
        again = replace(first, delivery=delivery, case=replace(case, seed=seed))
        got = simulate(again, given, lengths(given))
        assert same_bits(got[0], out)
        assert same_bits(got[1], lse)
    order = np.random.default_rng(case.seed).permutation(case.b).tolist()
    for requests in (order, [order[0]]):
        part = given.only(requests)
        got = simulate(first, part, lengths(part))
        assert same_bits(got[0], out[requests])
        assert same_bits(got[1], lse[requests])


# ------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("layout", sparse.LAYOUTS)
def test_an_invalid_index_selects_nothing(layout: str) -> None:
    """All kinds of invalid values at once, at the front, among the others and alone."""
    given = sparse.simple(layout)
    tokens = given.kv_cache.shape[0] * 61
    values = [-1, -2, -61, tokens, tokens + 1, sparse.ABSURD_ID, sparse.INT_MIN, sparse.INT_MAX]
    bad = np.tile(np.array(values, np.int32), (*given.indices.shape[:2], 1))
    device = SimulatedDevice("sm_80")
    with on(device):
        want = given.run()
        for place in (0, 4, 7):
            longer = np.insert(given.indices, [place] * len(values), bad, axis=2)
            out, lse = replace(given, indices=longer).run()
            with oracle():
                exact_out, exact_lse = given.run()
            assert_close("lse", lse, exact_lse, LSE_DECODE, dtype=np.float32)
            assert_close("out", out, exact_out, SPARSE_OUT, dtype=want[0].dtype)
        sink = np.array([0, np.inf, -np.inf], np.float32)
        out, lse = replace(given, indices=bad, attn_sink=sink).run()
    assert (out == 0).all()
    assert (lse == np.inf).all()


@pytest.mark.parametrize("layout", sparse.LAYOUTS)
def test_nan_in_a_selected_token_propagates(layout: str) -> None:
    """To the rows that select it, in every number of it, and no further: lse is +inf."""
    given = sparse.simple(layout)
    hidden = np.flatnonzero(sparse.is_nan(sparse.decoded(given.kv_cache)).reshape(-1, 61).all())
    assert not hidden.size
    nan_slot = next(
        slot
        for slot in range(given.kv_cache.shape[0] * 61)
        if sparse.is_nan(sparse.decoded(given.kv_cache)[slot // 61, slot % 61]).all()
    )
    indices = given.indices.copy()
    indices[1, 0, 3] = nan_slot
    given = replace(given, indices=indices)
    with on(SimulatedDevice("sm_90a")):
        out, lse = given.run()
    spoilt = np.zeros((2, 2), bool)
    spoilt[1, 0] = True
    assert sparse.is_nan(out[spoilt]).all()
    assert not sparse.is_nan(out[~spoilt]).any()
    assert (lse[1, :, 0] == np.inf).all()
    assert np.isfinite(lse[0]).all()


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("layout", ["V32_FP8", "V4_FP8"])
def test_one_nan_code_is_one_nan(layout: str, code: int) -> None:
    """In q.k, so in the whole row; 480 times the scale, which its bits would mean, is none."""
    given = sparse.simple(layout)
    slot = int(given.indices[0, 1, 2])
    pages = given.kv_cache
    data = sparse.LAYOUTS[layout].data_row_bytes
    page = pages[slot // 61].reshape(-1).view(np.uint8)
    page[slot % 61 * data + 77] = code
    with on(SimulatedDevice("sm_80")):
        out, lse = given.run()
    assert sparse.is_nan(out[0, 1]).all()
    assert (lse[0, :, 1] == np.inf).all()
    assert not sparse.is_nan(out[1]).any()
    assert np.isfinite(lse[1]).all()


def test_large_scales_take_the_long_way() -> None:
    """Scales of 2**8 and more, tiny ones, and odd ones, as `raw` writers store.

    A column's numbers have one sign: of this size they may not cancel out, see KV_SIZE.
    """
    given = sparse.simple("V32_FP8")
    pages = given.kv_cache.copy()
    codes, scales = np.split(pages.view(np.uint8)[..., :528], [512], axis=-1)
    rng = np.random.default_rng(1)
    codes[...] = codes & 0x7F | rng.choice(np.array([0, 0x80], np.uint8), 512)
    values = np.array([3.0, 300.0, 2.0**9, 2.0**-20, 1.7e-5, 2.0**-126, 0.013, 2.0], np.float32)
    chosen = rng.choice(values, (*pages.shape[:3], 4)) * np.array([1, 1, 1, -1], np.float32)
    scales[...] = chosen.view(np.uint8)
    given = replace(given, kv_cache=pages, softmax_scale=1e-4)
    with on(SimulatedDevice("sm_80")):
        out, lse = given.run()
    with oracle():
        want_out, want_lse = given.run()
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want_out, SPARSE_OUT, dtype=out.dtype)


@pytest.mark.parametrize("layout", ["BF16", "V32_FP8"])
def test_rows_of_q_and_out_may_begin_anywhere(layout: str) -> None:
    """At 2 bytes beside a multiple of 16, in a tile that is not full."""
    given = sparse.make(sparse.Case(5, layout, sparse.Pool(200, 61, 70, "bs"), h_q=9))

    def beside(array: Array) -> Array:
        buffer = np.empty((*array.shape[:-1], array.shape[-1] + 1), array.dtype)
        shifted: Array = poison(buffer)[..., 1:]
        shifted[...] = array
        return shifted

    out = beside(poison(np.empty((*given.q.shape[:3], 512), given.q.dtype)))
    with on(SimulatedDevice("sm_80")):
        _, lse = replace(given, q=beside(given.q)).run(out=out)
    with oracle():
        want_out, want_lse = given.run()
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
    assert_close("out", np.array(out), want_out, SPARSE_OUT, dtype=out.dtype)


@pytest.mark.parametrize("h_q", [16, 33, 65])
def test_logits_far_apart(h_q: int) -> None:
    """The running maximum moves by much, late and more than once: O is rescaled.

    With tiles whose last matrices of rows are missing, too. What moves it is in the rotary part,
    so V is no larger than elsewhere.
    """
    case = dense.Case(310, (200,), h_q=h_q, page_size=64)
    given = dense.make(case)
    cache = given.kv_cache
    for token in (40, 90, 195):  # the last tile is one of them
        page, offset = given.block_table[0, token // 64], token % 64
        rotary = given.q[0, 0, token % 16, 512:].astype(np.float32)
        cache[page, offset, 0, 512:] = rotary * (token / 4)
    given = replace(given, softmax_scale=0.3)
    for target in ("sm_80", "sm_120"):
        with on(SimulatedDevice(target)):
            out, lse = given.run(plan=cumla.plan_decode(given.cache_seqlens, num_parts=1))
        with oracle():
            want_out, want_lse = given.run()
        assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
        assert_close("out", out, want_out, DENSE_OUT, dtype=out.dtype)


# ------------------------------------------------------------------------------------- bounds


def test_divisors_divide() -> None:
    for value in [*range(1, 70), 256, 576, 2**20 - 1, 2**20 + 1, 2**31 - 1]:
        divisor, multiplier, shift = (int(one) for one in decode._divisor(value))
        assert divisor == value
        assert multiplier < 2**32
        for n in (0, 1, value - 1, value, 7 * value - 1, 7 * value, 2**31 - value, 2**31 - 1):
            if 0 <= n < 2**31:
                assert n * multiplier >> shift == n // value, (n, value)


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_out_of_range_count_as_the_nearest(causal: bool) -> None:
    """As nobody looks at them on a GPU: here the checks of `cumla.dense_decode` are gone around."""
    given = dense.make(dense.Case(1, (128, 128, 128), h_q=9, s_q=2, causal=causal))
    table = given.block_table[:, :2].copy()
    out, lse = np.zeros((3, 2, 9, 512), given.q.dtype), np.zeros((3, 9, 2), np.float32)
    problem = DenseDecode(
        q=given.q,
        kv_cache=given.kv_cache,
        block_table=table,
        cache_seqlens=np.array([1000, -5, 2**31 - 1], np.int32),
        layout=BF16,
        softmax_scale=576**-0.5,
        causal=causal,
        plan=None,
        out=out,
        lse=lse,
    )
    KernelBackend("sim", SimulatedDevice("sm_90a")).dense_decode(problem)
    with oracle():
        near = np.array([128, 0, 128], np.int32)
        want_out, want_lse = replace(given, block_table=table, cache_seqlens=near).run()
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want_out, DENSE_OUT, dtype=given.q.dtype)


def test_a_pool_at_an_odd_address_is_refused() -> None:
    given = sparse.simple("BF16")
    buffer = np.empty(given.kv_cache.size + 1, given.kv_cache.dtype)
    begin = 1 if buffer.ctypes.data % 16 == 0 else 0
    pages = buffer[begin : begin + given.kv_cache.size].reshape(given.kv_cache.shape)
    assert pages.ctypes.data % 16
    with (
        on(SimulatedDevice("sm_80")),
        pytest.raises(cumla.ArgumentError, match=r"^kv_cache: .*multiple of 16"),
    ):
        replace(given, kv_cache=pages).run()
