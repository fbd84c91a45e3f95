"""FlashMLA's functions: the signatures are its own, the results are the ops', bit for bit."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from comparison import LSE_DECODE, SPARSE_OUT, assert_close
from numpy.typing import NDArray
from poison import ABSURD_ID, poison

import cumla
from cumla import ArgumentError, ArgumentTypeError, flash_mla
from cumla.flash_mla import (
    FlashMLASchedMeta,
    decode,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from cumla.flash_mla.decode import SchedConfig
from cumla.layouts import BF16, FP16, V4_FP8, V32_FP8, KVLayout, pack_kv

Array = NDArray[Any]
bf16 = ml_dtypes.bfloat16
REQUIRED = inspect.Parameter.empty


def normal(seed: int, *shape: int, dtype: Any = bf16) -> Array:
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32) / 4
    return numbers.astype(dtype)


def ints(*values: Any) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def pages_of(layout: KVLayout, num_pages: int, page_size: int, h_kv: int = 1) -> Array:
    kv = normal(7, num_pages, page_size, h_kv, layout.d_qk, dtype=layout.compute_dtype)
    return pack_kv(kv, layout, page_size)


def assert_same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, np.ndarray)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def dense_call(
    *,
    batch: int = 2,
    s_q: int = 2,
    h_q: int = 6,
    h_kv: int = 1,
    page_size: int = 16,
    lens: tuple[int, ...] | None = None,
    layout: KVLayout = BF16,
    **more: Any,
) -> dict[str, Any]:
    """The arguments of a legal dense call, holder aside."""
    cache = pages_of(layout, 4 * batch, page_size, h_kv)
    return {
        "q": normal(1, batch, s_q, h_q, 576, dtype=layout.compute_dtype),
        "k_cache": cache,
        "block_table": np.arange(4 * batch, dtype=np.int32)[::-1].reshape(batch, 4).copy(),
        "cache_seqlens": ints(*(lens or [3 * page_size - 5 * i for i in range(batch)])),
        "head_dim_v": 512,
        **more,
    }


def sparse_call(
    *,
    layout: KVLayout = V4_FP8,
    batch: int = 2,
    s_q: int = 2,
    h_q: int = 3,
    page_size: int = 8,
    topk: int = 20,
    extra: tuple[int, int] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The arguments of a legal sparse call, holder aside; extra: (its page size, its topk)."""
    rng = np.random.default_rng(5)
    tokens = 6 * page_size
    call = {
        "q": normal(2, batch, s_q, h_q, layout.d_qk, dtype=layout.compute_dtype),
        "k_cache": pages_of(layout, 6, page_size),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "is_fp8_kvcache": layout.is_fp8,
        "indices": rng.integers(-1, tokens, (batch, s_q, topk), np.int32),
    }
    if extra:
        size, extra_topk = extra
        call["extra_k_cache"] = pages_of(layout, 5, size)
        call["extra_indices_in_kvcache"] = rng.integers(
            -1, 5 * size, (batch, s_q, extra_topk), np.int32
        )
    return call | more


def run(call: dict[str, Any], holder: FlashMLASchedMeta | None = None) -> tuple[Any, Any]:
    holder = holder or FlashMLASchedMeta()
    return flash_mla_with_kvcache(**call, tile_scheduler_metadata=holder)


def op_result(call: dict[str, Any]) -> tuple[Any, Any]:
    """What the op gives for a call."""
    scale = call.get("softmax_scale")
    if call.get("indices") is None:
        names = ("q", "k_cache", "block_table", "cache_seqlens")
        return cumla.dense_decode(
            *(call[name] for name in names),
            softmax_scale=scale,
            causal=call.get("causal", False),
        )
    return cumla.sparse_decode(
        call["q"],
        call["k_cache"],
        call["indices"],
        topk_length=call.get("topk_length"),
        attn_sink=call.get("attn_sink"),
        extra_kv_cache=call.get("extra_k_cache"),
        extra_indices=call.get("extra_indices_in_kvcache"),
        extra_topk_length=call.get("extra_topk_length"),
        softmax_scale=scale,
    )


# Signatures.

_MHA_OPTIONS = [
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("deterministic", False),
    ("is_varlen", True),
]
SIGNATURES: dict[str, list[tuple[str, Any]]] = {
    "flash_mla_with_kvcache": [
        ("q", REQUIRED),
        ("k_cache", REQUIRED),
        ("block_table", REQUIRED),
        ("cache_seqlens", REQUIRED),
        ("head_dim_v", REQUIRED),
        ("tile_scheduler_metadata", REQUIRED),
        ("num_splits", None),
        ("softmax_scale", None),
        ("causal", False),
        ("is_fp8_kvcache", False),
        ("indices", None),
        ("attn_sink", None),
        ("extra_k_cache", None),
        ("extra_indices_in_kvcache", None),
        ("topk_length", None),
        ("extra_topk_length", None),
        ("out", None),
    ],
    "flash_mla_sparse_fwd": [
        ("q", REQUIRED),
        ("kv", REQUIRED),
        ("indices", REQUIRED),
        ("sm_scale", REQUIRED),
        ("d_v", 512),
        ("attn_sink", None),
        ("topk_length", None),
        ("out", None),
    ],
    "flash_attn_varlen_func": [
        ("q", REQUIRED),
        ("k", REQUIRED),
        ("v", REQUIRED),
        ("cu_seqlens_qo", REQUIRED),
        ("cu_seqlens_kv", REQUIRED),
        ("max_seqlen_qo", REQUIRED),
        ("max_seqlen_kv", REQUIRED),
        *_MHA_OPTIONS,
    ],
    "flash_attn_varlen_qkvpacked_func": [
        ("qkv", REQUIRED),
        ("cu_seqlens", REQUIRED),
        ("max_seqlen", REQUIRED),
        ("head_dim_qk", REQUIRED),
        *_MHA_OPTIONS,
    ],
    "flash_attn_varlen_kvpacked_func": [
        ("q", REQUIRED),
        ("kv", REQUIRED),
        ("cu_seqlens_qo", REQUIRED),
        ("cu_seqlens_kv", REQUIRED),
        ("max_seqlen_qo", REQUIRED),
        ("max_seqlen_kv", REQUIRED),
        ("head_dim_qk", REQUIRED),
        *_MHA_OPTIONS,
    ],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(flash_mla, name)).parameters.values()
    assert [(one.name, one.default) for one in parameters] == SIGNATURES[name]
    assert {one.kind for one in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_exports() -> None:
    assert set(flash_mla.__all__) == {*SIGNATURES, "get_mla_metadata", "FlashMLASchedMeta"}


def test_metadata_takes_what_older_callers_pass() -> None:
    old = (ints(5, 7), 128, 1)
    for found in (get_mla_metadata(), get_mla_metadata(*old, h_q=128, is_fp8=True, topk=2048)):
        holder, splits = found
        assert isinstance(found, tuple)
        assert splits is None
        assert isinstance(holder, FlashMLASchedMeta)
        assert not holder.have_initialized
        assert holder.config is None
        assert holder.tile_scheduler_metadata is None
        assert holder.num_splits is None
    assert get_mla_metadata()[0] is not get_mla_metadata()[0]


# Decoding.

DENSE_CALLS = [
    {},
    {"causal": True},
    {"causal": True, "h_kv": 3, "s_q": 3, "softmax_scale": 0.1},
    {"layout": FP16, "page_size": 5, "batch": 3},
    {"page_size": 400, "lens": (1100, 1030)},
    {"lens": (0, 9)},
]


@pytest.mark.parametrize("case", DENSE_CALLS)
def test_dense_decode_is_the_op(case: dict[str, Any]) -> None:
    call = dense_call(**case)
    assert_same(run(call), op_result(call))


SPARSE_CALLS = [
    {},
    {"layout": V32_FP8, "softmax_scale": 0.05},
    {"layout": BF16, "topk_length": ints(0, 13)},
    {"layout": FP16, "topk_length": ints([4, 20], [1, 0])},
    {"topk": 1300, "h_q": 1},
    {
        "attn_sink": np.array([0.5, np.inf, -np.inf], np.float32),
        "topk_length": ints(20, 3),
        "extra": (3, 7),
        "extra_topk_length": ints([7, 0], [2, 5]),
    },
]


@pytest.mark.parametrize("case", SPARSE_CALLS)
def test_sparse_decode_is_the_op(case: dict[str, Any]) -> None:
    call = sparse_call(**case)
    assert_same(run(call), op_result(call))


def test_positional_call() -> None:
    call = dense_call(causal=True)
    holder, splits = get_mla_metadata()
    names = ("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v")
    arguments: list[Any] = [call[name] for name in names]
    arguments += [holder, splits, 0.07, True, False]
    found = flash_mla_with_kvcache(*arguments)
    assert_same(found, op_result(call | {"softmax_scale": 0.07}))


def test_sparse_decode_ignores_table_and_lengths() -> None:
    call = sparse_call()
    ignored = {"block_table": "no array", "cache_seqlens": np.zeros((3, 3))}
    assert_same(run(call | ignored), op_result(call))


@pytest.mark.parametrize("make", [dense_call, sparse_call])
def test_decode_writes_to_out(make: Callable[..., dict[str, Any]]) -> None:
    call = make()
    expected = op_result(call)
    out = poison(np.empty(expected[0].shape, bf16))
    found = run(call | {"out": out})
    assert found[0] is out
    assert_same(found, expected)


def test_empty_rows_of_decode() -> None:
    out, lse = run(dense_call(lens=(0, 1), causal=True))
    assert lse.shape == (2, 6, 2)
    assert np.isposinf(lse[0]).all()
    assert np.isposinf(lse[1, :, 0]).all()  # one token, and it is the second query's
    assert np.isfinite(lse[1, :, 1]).all()
    assert not out[0].any()
    assert not out[1, 0].any()
    assert out[1, 1].any()
    sink = np.array([np.inf, 0, -np.inf], np.float32)
    call = sparse_call(attn_sink=sink, topk_length=ints([20, 0], [20, 20]))
    call["indices"][1, 0] = ABSURD_ID
    out, lse = run(call)
    for empty in ((0, 1), (1, 0)):
        assert np.isposinf(lse[empty[0], :, empty[1]]).all()
        assert not out[empty].any()
    assert np.isfinite(lse[0, :, 0]).all()
    assert not out[0, 0, 0].any()  # +inf takes the whole softmax
    assert out[0, 0, 1:].any()


# The holder.


def test_holder_is_filled_once_and_reused() -> None:
    call = dense_call(page_size=400, lens=(1100, 3), s_q=2, h_kv=3)
    holder, _ = get_mla_metadata()
    first = run(call, holder)
    assert holder.have_initialized
    assert holder.config == SchedConfig(2, 2, 6, 400, 3, False, False, None, None, None)
    plan = cumla.plan_decode(call["cache_seqlens"], split_blocks=16)
    assert holder.tile_scheduler_metadata is not None
    assert holder.num_splits is not None
    assert holder.tile_scheduler_metadata.dtype == holder.num_splits.dtype == np.int32
    assert holder.tile_scheduler_metadata.tolist() == plan.tile_scheduler_metadata.tolist()
    assert holder.num_splits.tolist() == plan.num_splits.tolist() == [0, 2, 3]
    kept = holder.plan
    # Another layer: other numbers and another scale, the same lengths.
    call |= {"q": normal(30, 2, 2, 6, 576), "softmax_scale": 0.3}
    second = run(call, holder)
    assert holder.plan is kept
    assert_same(second, op_result(call))
    assert first[0].tobytes() != second[0].tobytes()


def test_holder_follows_the_sparse_lengths() -> None:
    call = sparse_call(extra=(3, 70), topk_length=ints(0, 20), extra_topk_length=ints(70, 1))
    holder, _ = get_mla_metadata()
    run(call, holder)
    assert holder.config == SchedConfig(2, 2, 3, 8, 1, False, True, 20, 3, 70)
    assert holder.plan is not None
    assert holder.plan.kv_lens.tolist() == [64 + 70, 64 + 1]


def test_the_holders_plan_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for make, op in ((dense_call, "dense_decode"), (sparse_call, "sparse_decode")):
        plans: list[Any] = []
        original = getattr(decode, op)

        def spy(*args: Any, original: Any = original, plans: Any = plans, **how: Any) -> Any:
            plans.append(how["plan"])
            return original(*args, **how)

        monkeypatch.setattr(decode, op, spy)
        holder, _ = get_mla_metadata()
        run(make(), holder)
        run(make(), holder)
        assert plans == [None, holder.plan]


@pytest.mark.parametrize(
    ("make", "field", "change"),
    [
        (dense_call, "b", {"batch": 3}),
        (dense_call, "s_q", {"s_q": 1}),
        (dense_call, "h_q", {"h_q": 9}),
        (dense_call, "page_block_size", {"page_size": 17, "lens": (48, 43)}),
        (dense_call, "h_k", {"h_kv": 2}),
        (dense_call, "causal", {"causal": True}),
        (sparse_call, "b", {"batch": 1}),
        (sparse_call, "is_fp8_kvcache", {"layout": BF16}),
        (sparse_call, "topk", {"topk": 21}),
        (sparse_call, "extra_page_block_size", {"extra": (4, 7)}),
        (sparse_call, "extra_topk", {"extra": (3, 8)}),
    ],
)
def test_holder_of_another_kind_of_call(
    make: Callable[..., dict[str, Any]], field: str, change: dict[str, Any]
) -> None:
    base = {} if make is dense_call else {"layout": V32_FP8, "extra": (3, 7)}
    holder, _ = get_mla_metadata()
    run(make(**base), holder)
    before = (holder.config, holder.plan)
    call = make(**(base | change))
    out = np.full((*call["q"].shape[:3], 512), 3, bf16)
    with pytest.raises(ArgumentError, match=rf"^tile_scheduler_metadata: .*with {field} = "):
        run(call | {"out": out}, holder)
    assert (out == 3).all()
    assert (holder.config, holder.plan) == before
    run(call)
    run(make(**base), holder)


def test_config_fields_are_all_compared() -> None:
    """A holder of a dense call says topk first when it meets a sparse one of its shapes."""
    holder, _ = get_mla_metadata()
    run(dense_call(h_q=3, page_size=8), holder)
    with pytest.raises(ArgumentError, match="filled with topk = None; this call has topk = 20"):
        run(sparse_call(layout=BF16), holder)
    holder, _ = get_mla_metadata()
    run(sparse_call(), holder)
    with pytest.raises(ArgumentError, match="extra_page_block_size = None"):
        run(sparse_call(extra=(3, 7)), holder)


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (dense_call, {"lens": (40, 7)}, {"lens": (40, 8)}),
        (sparse_call, {"topk_length": ints(9, 20)}, {"topk_length": ints(10, 20)}),
        (sparse_call, {"topk_length": ints(9, 20)}, {}),
        (sparse_call, {"topk_length": ints([9, 1], [2, 3])}, {"topk_length": ints([9, 1], [4, 3])}),
        (
            sparse_call,
            {"extra": (3, 7), "extra_topk_length": ints(7, 2)},
            {"extra": (3, 7), "extra_topk_length": ints(7, 3)},
        ),
    ],
)
def test_stale_holder(
    make: Callable[..., dict[str, Any]], first: dict[str, Any], second: dict[str, Any]
) -> None:
    holder, _ = get_mla_metadata()
    run(make(**first), holder)
    before = holder.plan
    call = make(**second)
    out = np.full((*call["q"].shape[:3], 512), 3, bf16)
    with pytest.raises(ArgumentError, match=r"^tile_scheduler_metadata: .*get_mla_metadata\(\)"):
        run(call | {"out": out}, holder)
    assert (out == 3).all()
    assert holder.plan is before
    assert_same(run(make(**first), holder), op_result(make(**first)))
    assert_same(run(call), op_result(call))


def test_lengths_that_plan_alike_share_a_holder() -> None:
    holder, _ = get_mla_metadata()
    for lengths in (None, ints(20, 20), ints([20, 3], [0, 20])):
        call = sparse_call(topk_length=lengths)
        assert_same(run(call, holder), op_result(call))


def test_failed_first_call_leaves_the_holder_empty() -> None:
    holder, _ = get_mla_metadata()
    wrong = dense_call()
    wrong["cache_seqlens"] = ints(5, 1000)
    with pytest.raises(ArgumentError, match=r"^cache_seqlens: "):
        run(wrong, holder)
    with pytest.raises(ArgumentError, match=r"^softmax_scale: "):
        run(sparse_call(softmax_scale=-1.0), holder)
    assert not holder.have_initialized
    assert holder.config is None
    run(dense_call(), holder)


# Prefill.


def test_sparse_prefill_is_the_op() -> None:
    rng = np.random.default_rng(1)
    for d_qk, how in itertools.product(
        (576, 512),
        (
            {},
            {"attn_sink": np.array([1, np.inf, 0], np.float32), "topk_length": ints(0, 9, 4, 9)},
        ),
    ):
        q, kv = normal(1, 4, 3, d_qk), normal(2, 10, 1, d_qk)
        indices = rng.integers(-3, 13, (4, 1, 9), np.int32)
        indices[2] = -1
        found = flash_mla_sparse_fwd(q, kv, indices, 0.07, **how)
        assert_same(found, cumla.sparse_prefill(q, kv, indices, 0.07, **how))
        out, max_logits, lse = found
        assert not out[2].any()
        assert np.isneginf(max_logits[2]).all()
        assert np.isposinf(lse[2]).all()
        target = poison(np.empty(out.shape, bf16))
        again = flash_mla_sparse_fwd(q, kv, indices, 0.07, 512, out=target, **how)
        assert again[0] is target
        assert_same(again, found)


# Multi-head attention.

BOUNDS_Q, BOUNDS_K = ints(0, 5, 5, 9, 12), ints(0, 2, 6, 6, 17)


def mha_inputs(h_kv: int = 2) -> tuple[Array, Array, Array]:
    return normal(1, 12, 4, 24), normal(2, 17, h_kv, 24), normal(3, 17, h_kv, 16)


def rows_without_key(causal: bool) -> list[int]:
    """By walking the sequences of BOUNDS_Q and BOUNDS_K."""
    rows = []
    for i in range(4):
        s_q, s_k = BOUNDS_Q[i + 1] - BOUNDS_Q[i], BOUNDS_K[i + 1] - BOUNDS_K[i]
        for t in range(s_q):
            last = s_k - (s_q - 1 - t) if causal else s_k
            if not any(j < last for j in range(s_k)):
                rows.append(int(BOUNDS_Q[i]) + t)
    return rows


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("h_kv", [1, 4])
def test_mha_is_the_op_but_for_empty_rows(causal: bool, h_kv: int) -> None:
    q, k, v = mha_inputs(h_kv)
    out, lse = cumla.mha_varlen(q, k, v, BOUNDS_Q, BOUNDS_K, softmax_scale=0.3, causal=causal)
    empty = rows_without_key(causal)
    assert empty == ([0, 1, 2, 5, 6, 7, 8] if causal else [5, 6, 7, 8])
    assert np.isposinf(lse[empty]).all()
    lse[empty] = -np.inf
    found = flash_attn_varlen_func(
        q, k, v, BOUNDS_Q, BOUNDS_K, 5, 11, softmax_scale=0.3, causal=causal
    )
    assert_same(found, (out, lse))
    assert not found[0][empty].any()
    kv = np.concatenate([k, v], axis=2)
    packed = flash_attn_varlen_kvpacked_func(
        q, kv, BOUNDS_Q, BOUNDS_K, 5, 11, 24, softmax_scale=0.3, causal=causal
    )
    assert_same(packed, found)


@pytest.mark.parametrize("causal", [False, True])
def test_qkvpacked(causal: bool) -> None:
    q, (_, k, v) = normal(1, 17, 4, 24), mha_inputs(4)
    qkv = np.concatenate([q, k, v], axis=2)
    expected = flash_attn_varlen_func(q, k, v, BOUNDS_K, BOUNDS_K, 11, 11, causal=causal)
    found = flash_attn_varlen_qkvpacked_func(qkv, BOUNDS_K, 11, 24, causal=causal)
    assert_same(found, expected)
    assert np.isfinite(found[1]).all()
    # All positional, in FlashMLA's order.
    found = flash_attn_varlen_qkvpacked_func(
        qkv, BOUNDS_K, 11, 24, 0.0, 24**-0.5, causal, True, True
    )
    assert_same(found, expected)


def test_infinite_lse_of_rows_with_keys_keeps_its_sign() -> None:
    q, k, v = mha_inputs()
    k[16] = np.nan
    _, lse = flash_attn_varlen_func(q, k, v, BOUNDS_Q, BOUNDS_K, 5, 11)
    _, expected = cumla.mha_varlen(q, k, v, BOUNDS_Q, BOUNDS_K)
    assert np.isposinf(expected[9:]).all()
    assert lse[9:].tobytes() == expected[9:].tobytes()


def test_equal_lengths_without_varlen() -> None:
    q, k, v = normal(1, 12, 4, 24), normal(2, 9, 2, 24), normal(3, 9, 2, 16)
    equal = (ints(0, 4, 8, 12), ints(0, 3, 6, 9))
    expected = flash_attn_varlen_func(q, k, v, *equal, 4, 3, causal=True)
    # Of the bounds only their number counts.
    found = flash_attn_varlen_func(
        q, k, v, ints(9, 9, 9, 9), ints(0, 0, 0, 0), 4, 3, causal=True, is_varlen=False
    )
    assert_same(found, expected)
    with pytest.raises(ArgumentError, match=r"^cu_seqlens_kv: .*is_varlen=False the 9 rows"):
        flash_attn_varlen_func(q, k, v, ints(0, 6, 12), ints(0, 4, 9), 6, 5, is_varlen=False)
    with pytest.raises(ArgumentError, match=r"^max_seqlen_kv: got 2; the longest sequence has 3"):
        flash_attn_varlen_func(q, k, v, *equal, 4, 2, is_varlen=False)


def test_results_go_into_the_backward_pass() -> None:
    q, k, v = mha_inputs()
    results = flash_attn_varlen_func(q, k, v, BOUNDS_Q, BOUNDS_K, 5, 11, causal=True)
    plain = cumla.mha_varlen(q, k, v, BOUNDS_Q, BOUNDS_K, causal=True)
    dout = normal(9, *results[0].shape)
    found, expected = (
        cumla.mha_varlen_backward(dout, q, k, v, *one, BOUNDS_Q, BOUNDS_K, causal=True)
        for one in (results, plain)
    )
    assert_same(found, expected)
    assert all(np.isfinite(one.astype(np.float32)).all() for one in found)


@pytest.mark.parametrize("longest", [None, 11, np.int32(11), np.array(12), 1 << 40])
def test_max_seqlen_that_is_long_enough(longest: Any) -> None:
    q, k, v = mha_inputs()
    expected = flash_attn_varlen_func(q, k, v, BOUNDS_Q, BOUNDS_K, 5, 11)
    assert_same(flash_attn_varlen_func(q, k, v, BOUNDS_Q, BOUNDS_K, 5, longest), expected)
    assert_same(flash_attn_varlen_func(q, k, v, BOUNDS_Q, BOUNDS_K, longest, 11), expected)


# As the engines call them.


def test_v32_calls_of_an_engine() -> None:
    """All tokens of a mixed batch in one request, heads padded with zeros; dummy table."""
    q = normal(1, 1, 5, 64, 576)
    q[:, :, 16:] = 0
    cache = pages_of(V32_FP8, 4, 64)
    indices = np.random.default_rng(3).integers(0, 256, (1, 5, 2048), np.int32)
    indices[0, 0, 1:] = -1
    holder, splits = get_mla_metadata(
        cache_seqlens=ints(4096), num_q_tokens_per_head_k=320, topk=2048, num_heads_q=64,
        num_heads_k=1, is_fp8_kvcache=True,
    )  # fmt: skip
    out, lse = flash_mla_with_kvcache(
        q=q,
        k_cache=cache.view(ml_dtypes.float8_e4m3fn),
        block_table=np.zeros((1, 1), np.int32),
        cache_seqlens=ints(4096),
        head_dim_v=512,
        tile_scheduler_metadata=holder,
        num_splits=splits,
        is_fp8_kvcache=True,
        indices=indices,
        softmax_scale=0.1352,
    )
    expected = cumla.sparse_decode(q[:, :, :16], cache, indices, softmax_scale=0.1352)
    # A BLAS may add in another order for 64 rows than for 16.
    assert_close("out", out[:, :, :16], expected[0], SPARSE_OUT, dtype=expected[0].dtype)
    assert_close("lse", lse[:, :16], expected[1], LSE_DECODE, dtype=np.float32)
    assert holder.num_splits is not None
    assert holder.num_splits.tolist() == [0, 2]
    # Prefill over a BF16 workspace, with the counts of valid indices.
    counts = ints(7, 0, 3)
    chosen = np.full((3, 1, 128), -1, np.int32)
    for row, count in zip(chosen[:, 0], counts, strict=True):
        row[:count] = np.arange(count)
    kv = normal(4, 32, 1, 576)
    found = flash_mla_sparse_fwd(q[0, :3], kv, chosen, 0.1352, topk_length=counts)
    assert_same(found, flash_mla_sparse_fwd(q[0, :3], kv, chosen, 0.1352))


@pytest.mark.parametrize("extra", [None, (64, 512), (2, 128)], ids=["swa", "c4a", "c128a"])
def test_v4_calls_of_an_engine(extra: tuple[int, int] | None) -> None:
    """One token a request, the window as main pool, out= given, two layers on one holder."""
    rng = np.random.default_rng(4)
    tokens, heads = 3, 64
    window_lens = ints(128, 5, 0)  # the last is padding of the batch
    sink = np.zeros(heads, np.float32)
    sink[32:] = -np.inf
    call: dict[str, Any] = {
        "k_cache": pages_of(V4_FP8, 3, 64),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "softmax_scale": 512**-0.5,
        "is_fp8_kvcache": True,
        "indices": rng.integers(0, 192, (tokens, 1, 128), np.int32),
        "topk_length": window_lens,
        "attn_sink": sink,
    }
    if extra:
        call["extra_k_cache"] = pages_of(V4_FP8, 4, extra[0])
        call["extra_indices_in_kvcache"] = rng.integers(
            0, 4 * extra[0], (tokens, 1, extra[1]), np.int32
        )
        call["extra_topk_length"] = ints(extra[1], 3, 0)
    for i in range(tokens):
        call["indices"][i, 0, window_lens[i] :] = ABSURD_ID
    holder = FlashMLASchedMeta()
    for layer in range(2):
        call["q"] = normal(layer, tokens, 1, heads, 512)
        out = poison(np.empty((tokens, 1, heads, 512), bf16))
        found = run(call | {"out": out}, holder)
        assert found[0] is out
        assert_same(found, op_result(call))
        assert not out[2].any()
        assert np.isposinf(found[1][2]).all()
        # The op must have seen the sink, and where it is.
        bare, _ = run(call | {"attn_sink": None})
        assert (out[:2, :, 32:] == bare[:2, :, 32:]).all()
        assert (out[1, :, :32] != bare[1, :, :32]).any()


# Bad inputs.

BAD_DECODE: list[tuple[Callable[..., dict[str, Any]], dict[str, Any], str, type[Exception]]] = [
    (dense_call, {"num_splits": ints(0, 1, 2)}, "num_splits", ArgumentError),
    (dense_call, {"head_dim_v": 576}, "head_dim_v", ArgumentError),
    (dense_call, {"head_dim_v": None}, "head_dim_v", ArgumentTypeError),
    (dense_call, {"causal": 1}, "causal", ArgumentTypeError),
    (dense_call, {"is_fp8_kvcache": None}, "is_fp8_kvcache", ArgumentTypeError),
    (dense_call, {"is_fp8_kvcache": True}, "is_fp8_kvcache", ArgumentError),
    (dense_call, {"q": None}, "q", ArgumentTypeError),
    (dense_call, {"q": [1.0]}, "q", ArgumentTypeError),
    (dense_call, {"q": normal(1, 4, 6, 576)}, "q", ArgumentError),
    (dense_call, {"q": normal(1, 2, 2, 6, 512)}, "q", ArgumentError),
    (dense_call, {"q": normal(1, 2, 2, 6, 576, dtype=np.float32)}, "q", ArgumentTypeError),
    (dense_call, {"k_cache": None}, "k_cache", ArgumentTypeError),
    (dense_call, {"k_cache": normal(1, 8, 16, 576)}, "k_cache", ArgumentError),
    (dense_call, {"k_cache": pages_of(V32_FP8, 8, 16)}, "k_cache", ArgumentError),
    (
        dense_call,
        {"k_cache": pages_of(V32_FP8, 8, 16), "is_fp8_kvcache": True},
        "k_cache",
        ArgumentError,
    ),
    (dense_call, {"block_table": None}, "block_table", ArgumentTypeError),
    (dense_call, {"cache_seqlens": None}, "cache_seqlens", ArgumentTypeError),
    (dense_call, {"cache_seqlens": ints(1, 2, 3)}, "cache_seqlens", ArgumentError),
    (dense_call, {"cache_seqlens": np.array([1, 2])}, "cache_seqlens", ArgumentTypeError),
    (dense_call, {"attn_sink": np.zeros(6, np.float32)}, "attn_sink", ArgumentError),
    (dense_call, {"extra_k_cache": pages_of(BF16, 1, 1)}, "extra_k_cache", ArgumentError),
    (
        dense_call,
        {"extra_indices_in_kvcache": np.zeros((2, 2, 1), np.int32)},
        "extra_indices_in_kvcache",
        ArgumentError,
    ),
    (dense_call, {"topk_length": ints(1, 1)}, "topk_length", ArgumentError),
    (dense_call, {"extra_topk_length": ints(1, 1)}, "extra_topk_length", ArgumentError),
    (sparse_call, {"causal": True}, "causal", ArgumentError),
    (sparse_call, {"is_fp8_kvcache": False}, "is_fp8_kvcache", ArgumentError),
    (
        sparse_call,
        {"layout": BF16, "is_fp8_kvcache": True},
        "is_fp8_kvcache",
        ArgumentError,
    ),
    (sparse_call, {"indices": np.zeros((2, 20), np.int32)}, "indices", ArgumentError),
    (sparse_call, {"indices": np.zeros((2, 2, 20), np.int64)}, "indices", ArgumentTypeError),
    (sparse_call, {"topk_length": ints(21, 1)}, "topk_length", ArgumentError),
    (sparse_call, {"topk_length": ints(1, 1, 1)}, "topk_length", ArgumentError),
    (sparse_call, {"attn_sink": np.zeros(4, np.float32)}, "attn_sink", ArgumentError),
    (
        sparse_call,
        {"extra": (3, 7), "extra_k_cache": None},
        "extra_k_cache",
        ArgumentError,
    ),
    (
        sparse_call,
        {"extra": (3, 7), "extra_indices_in_kvcache": None},
        "extra_indices_in_kvcache",
        ArgumentError,
    ),
    (
        sparse_call,
        {"extra": (3, 7), "extra_indices_in_kvcache": np.zeros((2, 7), np.int32)},
        "extra_indices_in_kvcache",
        ArgumentError,
    ),
    (
        sparse_call,
        {"extra": (3, 7), "extra_k_cache": np.zeros((2, 584), np.uint8)},
        "extra_k_cache",
        ArgumentError,
    ),
    (sparse_call, {"extra_topk_length": ints(0, 0)}, "extra_k_cache", ArgumentError),
    (sparse_call, {"softmax_scale": 0.0}, "softmax_scale", ArgumentError),
    (sparse_call, {"out": np.zeros((2, 2, 3, 512), np.float32)}, "out", ArgumentTypeError),
]


@pytest.mark.parametrize(("make", "change", "name", "error"), BAD_DECODE)
@pytest.mark.parametrize("reused", [False, True])
def test_bad_decode_arguments(
    make: Callable[..., dict[str, Any]],
    change: dict[str, Any],
    name: str,
    error: type[Exception],
    reused: bool,
) -> None:
    call = make(**change)
    holder, _ = get_mla_metadata()
    if reused:
        run(make(**{one: change[one] for one in ("extra", "layout") if one in change}), holder)
    before = holder.plan
    out = np.full((*make()["q"].shape[:3], 512), 3, bf16)
    with pytest.raises(error) as caught:
        run({"out": out} | call, holder)
    message = str(caught.value)
    if reused and message.startswith("tile_scheduler_metadata: "):
        # The change also changed what the holder goes by.
        assert error is ArgumentError
        assert {"extra_k_cache", "extra_indices_in_kvcache"} & set(change)
    else:
        assert message.startswith(f"{name}: "), message
    # The op's own names of these arguments are nobody's here.
    for foreign in ("extra_kv_cache", "extra_indices ", " kv_cache"):
        assert foreign not in message
    assert (out == 3).all()
    assert holder.plan is before


@pytest.mark.parametrize("holder", [None, (FlashMLASchedMeta(), None), np.zeros((4, 8), np.int32)])
def test_holder_must_be_a_holder(holder: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^tile_scheduler_metadata: "):
        flash_mla_with_kvcache(**dense_call(), tile_scheduler_metadata=holder)


def test_errors_of_the_ops_use_these_names() -> None:
    call = sparse_call(extra=(3, 7))
    torn = np.zeros((5, 4, 1, 584), np.uint8)[:, ::2]
    for name in ("k_cache", "extra_k_cache"):
        with pytest.raises(ArgumentError, match=f"^{name}: got a token stride of 1168"):
            run(call | {name: torn})
    call = sparse_call(layout=V32_FP8, extra=(3, 7), extra_k_cache=np.zeros((2, 4, 1, 576), bf16))
    with pytest.raises(ArgumentError, match=r"^extra_k_cache: "):
        run(call)
    call["extra_k_cache"] = None
    with pytest.raises(ArgumentError, match=r"Pass extra_k_cache and extra_indices_in_kvcache to"):
        run(call)


MHA_BAD: list[tuple[dict[str, Any], str, type[Exception]]] = [
    ({"q": None}, "q", ArgumentTypeError),
    ({"v": None}, "v", ArgumentTypeError),
    ({"q": normal(1, 12, 96)}, "q", ArgumentError),
    ({"k": normal(1, 17, 48)}, "k", ArgumentError),
    ({"k": normal(1, 17, 2, 25)}, "k", ArgumentError),
    ({"k": normal(1, 17, 3, 24), "v": normal(1, 17, 3, 16)}, "q", ArgumentError),
    ({"v": normal(1, 16, 2, 16)}, "v", ArgumentError),
    ({"cu_seqlens_qo": None}, "cu_seqlens_qo", ArgumentTypeError),
    ({"cu_seqlens_qo": [0, 12]}, "cu_seqlens_qo", ArgumentTypeError),
    ({"cu_seqlens_qo": BOUNDS_Q.astype(np.int64)}, "cu_seqlens_qo", ArgumentTypeError),
    ({"cu_seqlens_qo": ints(0, 12), "max_seqlen_qo": None}, "cu_seqlens_kv", ArgumentError),
    ({"cu_seqlens_kv": ints(0, 2, 6, 5, 16)}, "cu_seqlens_kv", ArgumentError),
    ({"cu_seqlens_kv": ints([0, 2])}, "cu_seqlens_kv", ArgumentError),
    ({"max_seqlen_qo": 4}, "max_seqlen_qo", ArgumentError),
    ({"max_seqlen_kv": 10}, "max_seqlen_kv", ArgumentError),
    ({"max_seqlen_kv": -1}, "max_seqlen_kv", ArgumentError),
    ({"max_seqlen_kv": 11.0}, "max_seqlen_kv", ArgumentTypeError),
    ({"dropout_p": 0.1}, "dropout_p", ArgumentError),
    ({"dropout_p": None}, "dropout_p", ArgumentTypeError),
    ({"causal": None}, "causal", ArgumentTypeError),
    ({"deterministic": 0}, "deterministic", ArgumentTypeError),
    ({"is_varlen": "no"}, "is_varlen", ArgumentTypeError),
    ({"softmax_scale": float("nan")}, "softmax_scale", ArgumentError),
]


@pytest.mark.parametrize(("change", "name", "error"), MHA_BAD)
def test_bad_mha_arguments(change: dict[str, Any], name: str, error: type[Exception]) -> None:
    q, k, v = mha_inputs()
    call: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_qo": BOUNDS_Q,
        "cu_seqlens_kv": BOUNDS_K,
        "max_seqlen_qo": 5,
        "max_seqlen_kv": 11,
    }
    flash_attn_varlen_func(**call)
    with pytest.raises(error, match=f"^{name}: "):
        flash_attn_varlen_func(**(call | change))


def test_bad_packed_arguments() -> None:
    q, k, v = mha_inputs()
    kv = np.concatenate([k, v], axis=2)
    bounds = (BOUNDS_Q, BOUNDS_K, 5, 11)
    for d_qk in (23, 25, 0):
        with pytest.raises(ArgumentError, match=r"^head_dim_qk: "):
            flash_attn_varlen_kvpacked_func(q, kv, *bounds, d_qk)
    with pytest.raises(ArgumentTypeError, match=r"^head_dim_qk: "):
        flash_attn_varlen_kvpacked_func(q, kv, *bounds, None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^kv: "):
        flash_attn_varlen_kvpacked_func(q, k, *bounds, 24)
    with pytest.raises(ArgumentTypeError, match=r"^kv: "):
        flash_attn_varlen_kvpacked_func(q, kv.astype(np.float16), *bounds, 24)
    qkv = normal(1, 17, 4, 64)
    for d_qk in (0, 32, 64):
        with pytest.raises(ArgumentError, match=r"^head_dim_qk: "):
            flash_attn_varlen_qkvpacked_func(qkv, BOUNDS_K, 11, d_qk)
    with pytest.raises(ArgumentTypeError, match=r"^qkv: "):
        flash_attn_varlen_qkvpacked_func(qkv.astype(np.float32), BOUNDS_K, 11, 24)
    with pytest.raises(ArgumentError, match=r"^qkv: "):
        flash_attn_varlen_qkvpacked_func(qkv[0], BOUNDS_K, 11, 24)
    with pytest.raises(ArgumentError, match=r"^cu_seqlens: "):
        flash_attn_varlen_qkvpacked_func(qkv, BOUNDS_Q, 11, 24)
    with pytest.raises(ArgumentError, match=r"^max_seqlen: "):
        flash_attn_varlen_qkvpacked_func(qkv, BOUNDS_K, 10, 24)


def test_bad_sparse_prefill_arguments() -> None:
    q, kv, indices = normal(1, 4, 3, 576), normal(2, 10, 1, 576), np.zeros((4, 1, 2), np.int32)
    for name in ("q", "kv", "indices"):
        call: dict[str, Any] = {"q": q, "kv": kv, "indices": indices, "sm_scale": 0.1, name: None}
        with pytest.raises(ArgumentTypeError, match=f"^{name}: "):
            flash_mla_sparse_fwd(**call)
    with pytest.raises(ArgumentError, match=r"^d_v: "):
        flash_mla_sparse_fwd(q, kv, indices, 0.1, 576)
    with pytest.raises(ArgumentError, match=r"^indices: "):
        flash_mla_sparse_fwd(q, kv, indices[:2], 0.1)
