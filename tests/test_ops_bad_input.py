"""Every op refuses what it cannot take: by the argument's name, and before it writes a byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike, NDArray
from poison import ABSURD_ID

import cumla
from cumla import ArgumentError, ArgumentTypeError, BackendUnavailable, layouts

Array = NDArray[Any]
Arguments = dict[str, Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


class OnTheGpu:
    """What a CUDA array looks like from outside; nobody may try to read it."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **how: object) -> object:
        raise AssertionError("read an array that is on a GPU")


class OnAnotherDevice(OnTheGpu):
    """Metal, by DLPack's numbers."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (8, 0)


@dataclass(frozen=True)
class Bad:
    """One wrong call: `change` gives the arguments that differ from those of a good one."""

    argument: str
    why: str
    change: Callable[[Arguments], Arguments] = field(repr=False)
    error: type[Exception] = ArgumentError


def value(argument: str, why: str, change: Callable[[Arguments], Arguments]) -> Bad:
    return Bad(argument, why, change)


def kind(argument: str, why: str, change: Callable[[Arguments], Arguments]) -> Bad:
    return Bad(argument, why, change, ArgumentTypeError)


def passing(name: str, replacement: Any) -> Callable[[Arguments], Arguments]:
    return lambda a: {name: replacement}


def zeros(*shape: int, dtype: DTypeLike = BF16) -> Array:
    return np.zeros(shape, dtype)


def i32(*values: Any) -> Array:
    return np.array(values, np.int32)


def changed(array: Array, at: tuple[int, ...], to: Any) -> Array:
    copy: Array = array.copy()
    copy[at] = to
    return copy


def every_second(array: Array) -> Array:
    """The same values, with twice the stride in the last dimension."""
    wide: Array = np.repeat(array, 2, axis=-1)
    view: Array = wide[..., ::2]
    return view


def one_row(array: Array) -> Array:
    """Writable, and every row of it is the same memory."""
    return as_strided(array.copy(), array.shape, (0, *array.strides[1:]))


def read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


def array_rules(name: str, *, dtypes: tuple[DTypeLike, ...], last_stride: bool = True) -> list[Bad]:
    """What every array argument refuses: no array, dtypes, ranks, strides, other devices."""
    rules = [
        kind(name, "a list", lambda a: {name: a[name].tolist()}),
        kind(name, "a number", lambda a: {name: 3}),
        kind(name, "a string", lambda a: {name: "q"}),
        value(name, "one dimension more", lambda a: {name: a[name][..., None]}),
        value(name, "one dimension less", lambda a: {name: np.asarray(a[name][0])}),
        value(name, "on a device of no backend", lambda a: {name: OnAnotherDevice()}),
    ]
    # The first array says where all must be, so the second is the one that is elsewhere.
    if name != "q":
        rules.append(value(name, "on a GPU, the others not", lambda a: {name: OnTheGpu()}))
    for dtype in dtypes:

        def retyped(a: Arguments, dtype: DTypeLike = dtype) -> Arguments:
            return {name: np.zeros(a[name].shape, dtype)}

        rules.append(kind(name, f"dtype {np.dtype(dtype).name}", retyped))
    if last_stride:
        rules.append(value(name, "a last stride", lambda a: {name: every_second(a[name])}))
    return rules


def result_rules(name: str, other: DTypeLike) -> list[Bad]:
    """What a buffer for a result must not be."""
    return [
        kind(name, "dtype", lambda a: {name: np.zeros(a[name].shape, other)}),
        kind(name, "float64", lambda a: {name: np.zeros(a[name].shape, np.float64)}),
        kind(name, "a list", lambda a: {name: a[name].tolist()}),
        value(name, "one row more", lambda a: {name: np.concatenate([a[name]] * 2)}),
        value(name, "one dimension more", lambda a: {name: a[name][None]}),
        value(name, "one element", lambda a: {name: a[name][..., :1]}),
        value(name, "read-only", lambda a: {name: read_only(a[name].copy())}),
        value(name, "on a GPU", lambda a: {name: OnTheGpu()}),
        value(name, "one row for all", lambda a: {name: one_row(a[name])}),
    ]


def scale_rules(name: str = "softmax_scale") -> list[Bad]:
    wrong = [0, 0.0, -1.0, float("nan"), float("inf"), -float("inf"), np.float32(-0.5), 10**400]
    rules = [value(name, repr(one)[:20], passing(name, one)) for one in wrong]
    types: list[Any] = ["0.1", True, [0.1], 1j, zeros(1)]
    return rules + [kind(name, f"{one!r}", passing(name, one)) for one in types]


def flag_rules(name: str) -> list[Bad]:
    wrong: list[Any] = [None, 1, 0, "True", zeros(1)]
    return [kind(name, f"{one!r}", passing(name, one)) for one in wrong]


def length_rules(name: str, high: Callable[[Arguments], int]) -> list[Bad]:
    """Lengths [b or s_q, ...] of which each must be in [0, high]."""
    return [
        *array_rules(name, dtypes=(np.int64, np.uint32, np.float32), last_stride=False),
        value(name, "another batch", lambda a: {name: np.concatenate([a[name]] * 2)}),
        value(name, "-1", lambda a: {name: changed(a[name], (1,), -1)}),
        value(name, "one too many", lambda a: {name: changed(a[name], (0,), high(a) + 1)}),
        value(name, "absurd", lambda a: {name: changed(a[name], (1,), ABSURD_ID)}),
        value(name, "a single length", lambda a: {name: a[name][:1]}),
    ]


STREAMS: list[Bad] = [value("stream", f"{one!r}", passing("stream", one)) for one in (0, 1, "0")]


def a_plan(a: Arguments) -> cumla.DecodePlan:
    return cumla.plan_decode(a["cache_seqlens"], num_parts=2)


PLAN_TYPES: list[Bad] = [
    kind("plan", type(one).__name__, passing("plan", one))
    for one in (3, "balanced", (1, 2), np.zeros((1, 8), np.int32))
]

# Every required argument left out as None: by name too, not by a KeyError.


def missing(*names: str) -> list[Bad]:
    return [kind(name, "None", passing(name, None)) for name in names]


# --------------------------------------------------------------------------------- dense_decode


def dense() -> Arguments:
    return {
        "q": zeros(2, 3, 4, 576),
        "kv_cache": zeros(5, 16, 2, 576),
        "block_table": i32([0, 1, ABSURD_ID], [4, ABSURD_ID, -1]),
        "cache_seqlens": i32(17, 16),
        "out": np.full((2, 3, 4, 512), 7, BF16),
        "lse": np.full((2, 4, 3), 7, np.float32),
    }


def strided_pool(a: Arguments, axis: int, stride: int) -> Arguments:
    """kv_cache with another stride, in bytes, over memory that is large enough."""
    pool = a["kv_cache"]
    strides = list(pool.strides)
    strides[axis] = stride
    memory = np.zeros(sum(n * abs(s) for n, s in zip(pool.shape, strides, strict=True)), np.uint8)
    return {"kv_cache": as_strided(memory.view(pool.dtype), pool.shape, strides)}


def shared(a: Arguments, one: str, other: str) -> Arguments:
    """Both in the same memory, of which the larger one takes all."""
    memory = np.zeros(max(a[one].nbytes, a[other].nbytes), np.uint8)
    return {
        name: memory[: a[name].nbytes].view(a[name].dtype).reshape(a[name].shape)
        for name in (one, other)
    }


DENSE: list[Bad] = [
    *missing("q", "kv_cache", "block_table", "cache_seqlens"),
    *array_rules("q", dtypes=(np.float32, np.float16, np.float64, np.uint16)),
    value("q", "another head dim", lambda a: {"q": zeros(2, 3, 4, 512)}),
    value("q", "no request", lambda a: {"q": zeros(0, 3, 4, 576)}),
    value("q", "no query", lambda a: {"q": zeros(2, 0, 4, 576)}),
    value("q", "no head", lambda a: {"q": zeros(2, 3, 0, 576)}),
    value("q", "heads that do not divide", lambda a: {"q": zeros(2, 3, 5, 576)}),
    value("q", "fewer heads than KV heads", lambda a: {"q": zeros(2, 3, 1, 576)}),
    *[bad for bad in array_rules("kv_cache", dtypes=()) if bad.why != "a last stride"],
    value("kv_cache", "a last stride", lambda a: {"kv_cache": every_second(a["kv_cache"])}),
    value("kv_cache", "float32", lambda a: {"kv_cache": zeros(5, 16, 2, 576, dtype=np.float32)}),
    value("kv_cache", "FP8 V32", lambda a: {"kv_cache": layouts.V32_FP8.empty_pages(5, 16)}),
    value("kv_cache", "FP8 V4", lambda a: {"kv_cache": layouts.V4_FP8.empty_pages(5, 16)}),
    value(
        "kv_cache",
        "FP8 as float8",
        lambda a: {"kv_cache": layouts.V32_FP8.empty_pages(5, 16).view(FP8)},
    ),
    value("kv_cache", "512 dims", lambda a: {"kv_cache": zeros(5, 16, 2, 512)}),
    value("kv_cache", "no page", lambda a: {"kv_cache": zeros(0, 16, 2, 576)}),
    value("kv_cache", "pages of no token", lambda a: {"kv_cache": zeros(5, 0, 2, 576)}),
    value("kv_cache", "no head", lambda a: {"kv_cache": zeros(5, 16, 0, 576)}),
    value("kv_cache", "page stride off 16", lambda a: strided_pool(a, 0, 36866)),
    value("kv_cache", "token stride off 16", lambda a: strided_pool(a, 1, 2306)),
    value("kv_cache", "overlapping heads", lambda a: strided_pool(a, 2, 1136)),
    value("kv_cache", "one page for all", lambda a: strided_pool(a, 0, 0)),
    kind("q", "the cache is float16", lambda a: {"kv_cache": a["kv_cache"].astype(np.float16)}),
    *array_rules("block_table", dtypes=(np.int64, np.uint32, np.float32)),
    value("block_table", "another batch", lambda a: {"block_table": i32([0, 1], [4, 0], [1, 1])}),
    value("block_table", "no column", lambda a: {"block_table": zeros(2, 0, dtype=np.int32)}),
    value(
        "block_table",
        "a used entry is absurd",
        lambda a: {"block_table": changed(a["block_table"], (0, 1), ABSURD_ID)},
    ),
    value(
        "block_table",
        "a used entry is one too large",
        lambda a: {"block_table": changed(a["block_table"], (1, 0), 5)},
    ),
    value(
        "block_table",
        "a used entry is negative",
        lambda a: {"block_table": changed(a["block_table"], (0, 0), -1)},
    ),
    value("block_table", "a length uses one more", lambda a: {"cache_seqlens": i32(33, 16)}),
    *length_rules("cache_seqlens", lambda a: 48),
    *scale_rules(),
    *flag_rules("causal"),
    *result_rules("out", np.float16),
    *result_rules("lse", np.float16),
    value("out", "one element", lambda a: {"out": zeros(1, 1, 1, 1)}),
    value("lse", "out's order", lambda a: {"lse": np.zeros((2, 3, 4), np.float32)}),
    value("out", "inside of q", lambda a: {"out": a["q"][..., :512]}),
    value("out", "the memory of lse", lambda a: shared(a, "out", "lse")),
    *STREAMS,
    *PLAN_TYPES,
    value(
        "cache_seqlens", "a stale plan", lambda a: {"plan": a_plan(a), "cache_seqlens": i32(9, 9)}
    ),
    value(
        "cache_seqlens",
        "a plan of another batch",
        lambda a: {"plan": cumla.plan_decode(i32(17), num_parts=1)},
    ),
    value("workspace", "on a GPU", lambda a: {"workspace": OnTheGpu()}),
    kind("workspace", "no array", lambda a: {"workspace": 1 << 20}),
]


# -------------------------------------------------------------------------------- sparse_decode


def sparse() -> Arguments:
    return {
        "q": zeros(2, 3, 4, 512),
        "kv_cache": layouts.V4_FP8.empty_pages(5, 16),
        "indices": np.zeros((2, 3, 7), np.int32),
        "topk_length": i32(7, 0),
        "attn_sink": np.zeros(4, np.float32),
        "extra_kv_cache": layouts.V4_FP8.empty_pages(3, 2),
        "extra_indices": np.zeros((2, 3, 9), np.int32),
        "extra_topk_length": i32(9, 0),
        "out": np.full((2, 3, 4, 512), 7, BF16),
        "lse": np.full((2, 4, 3), 7, np.float32),
    }


def none_of(*names: str) -> Callable[[Arguments], Arguments]:
    return lambda a: dict.fromkeys(names)


def pool_rules(prefix: str, page_size: int) -> list[Bad]:
    """What the main and the extra pool refuse alike."""
    cache, indices, lengths = prefix + "kv_cache", prefix + "indices", prefix + "topk_length"
    topk = 9 if prefix else 7

    def stride(to: int) -> Callable[[Arguments], Arguments]:
        return lambda a: {
            cache: as_strided(np.zeros(1 << 17, np.uint8), a[cache].shape, (to, 584, 584, 1))
        }

    payload = page_size * 584
    return [
        *[bad for bad in array_rules(cache, dtypes=()) if bad.why != "a last stride"],
        value(cache, "float32", lambda a: {cache: np.zeros(a[cache].shape, np.float32)}),
        value(cache, "uint16", lambda a: {cache: np.zeros(a[cache].shape, np.uint16)}),
        value(cache, "e5m2", lambda a: {cache: np.zeros(a[cache].shape, ml_dtypes.float8_e5m2)}),
        value(cache, "rows of 583", lambda a: {cache: a[cache][..., :583]}),
        value(cache, "no page", lambda a: {cache: a[cache][:0]}),
        value(cache, "no token", lambda a: {cache: a[cache][:, :0]}),
        value(cache, "two heads", lambda a: {cache: np.concatenate([a[cache]] * 2, axis=2)}),
        value(cache, "pages that overlap", stride(payload - payload % 16 - 16)),
        value(cache, "a page stride off 16", stride(payload + 8 if payload % 16 == 0 else payload)),
        value(cache, "one page for all", stride(0)),
        value(
            cache,
            "a gap between tokens",
            lambda a: {cache: np.zeros((2, 4, 1, 584), np.uint8)[:, ::2]},
        ),
        *array_rules(indices, dtypes=(np.int64, np.uint32, np.float32)),
        value(indices, "another batch", lambda a: {indices: a[indices][:1]}),
        value(indices, "another s_q", lambda a: {indices: a[indices][:, :2]}),
        value(indices, "none at all", lambda a: {indices: a[indices][..., :0]}),
        *length_rules(lengths, lambda a: topk),
        value(lengths, "another s_q", lambda a: {lengths: np.zeros((2, 2), np.int32)}),
        value(
            lengths,
            "one query's too long",
            lambda a: {lengths: changed(np.zeros((2, 3), np.int32), (1, 2), topk + 1)},
        ),
    ]


def without_lengths(rules: list[Bad]) -> list[Bad]:
    """Not those where a dimension more is legal: lengths [b] may be [b, s_q]."""
    return [bad for bad in rules if not ("length" in bad.argument and "dimension" in bad.why)]


SPARSE: list[Bad] = [
    *missing("q", "kv_cache", "indices"),
    *array_rules("q", dtypes=(np.float32, np.float16, np.float64)),
    value("q", "another head dim", lambda a: {"q": zeros(2, 3, 4, 576)}),
    value("q", "no request", lambda a: {"q": zeros(0, 3, 4, 512)}),
    value("q", "no query", lambda a: {"q": zeros(2, 0, 4, 512)}),
    value("q", "no head", lambda a: {"q": zeros(2, 3, 0, 512)}),
    *without_lengths(pool_rules("", 16)),
    value(
        "topk_length", "three dimensions", lambda a: {"topk_length": np.zeros((2, 3, 1), np.int32)}
    ),
    value("topk_length", "no dimension", lambda a: {"topk_length": np.array(3, np.int32)}),
    *without_lengths(pool_rules("extra_", 2)),
    value(
        "extra_kv_cache",
        "another layout",
        lambda a: {"extra_kv_cache": layouts.V32_FP8.empty_pages(3, 2)},
    ),
    value("extra_indices", "missing", none_of("extra_indices")),
    value("extra_kv_cache", "missing", none_of("extra_kv_cache")),
    value("extra_indices", "only the cache", none_of("extra_indices", "extra_topk_length")),
    value("extra_kv_cache", "only indices", none_of("extra_kv_cache", "extra_topk_length")),
    value("extra_kv_cache", "only lengths", none_of("extra_kv_cache", "extra_indices")),
    *array_rules("attn_sink", dtypes=(np.float64, BF16, np.int32), last_stride=False),
    value("attn_sink", "another h_q", lambda a: {"attn_sink": np.zeros(3, np.float32)}),
    value("attn_sink", "one for all", lambda a: {"attn_sink": np.zeros(1, np.float32)}),
    *scale_rules(),
    *result_rules("out", np.float16),
    *result_rules("lse", np.float16),
    *STREAMS,
    *PLAN_TYPES,
    value(
        "topk_length",
        "a stale plan",
        lambda a: {"plan": cumla.plan_decode(i32(7, 1), num_parts=2)},
    ),
    value("workspace", "on a GPU", lambda a: {"workspace": OnTheGpu()}),
]


# ------------------------------------------------------------------------------- sparse_prefill


def prefill() -> Arguments:
    return {
        "q": zeros(3, 4, 576),
        "kv": zeros(9, 1, 576),
        "indices": np.zeros((3, 1, 7), np.int32),
        "sm_scale": 0.5,
        "attn_sink": np.zeros(4, np.float32),
        "topk_length": i32(0, 3, 7),
        "out": np.full((3, 4, 512), 7, BF16),
        "max_logits": np.full((3, 4), 7, np.float32),
        "lse": np.full((3, 4), 7, np.float32),
    }


PREFILL: list[Bad] = [
    *missing("q", "kv", "indices"),
    *array_rules("q", dtypes=(np.float32, np.float64, np.uint8)),
    value("q", "no layout's head dim", lambda a: {"q": zeros(3, 4, 640), "kv": zeros(9, 1, 640)}),
    value("q", "no query", lambda a: {"q": zeros(0, 4, 576)}),
    value("q", "no head", lambda a: {"q": zeros(3, 0, 576)}),
    *array_rules("kv", dtypes=(np.float16, np.float32, np.uint8)),
    value("kv", "q's head dim is another", lambda a: {"kv": zeros(9, 1, 512)}),
    value("kv", "two heads", lambda a: {"kv": zeros(9, 2, 576)}),
    *array_rules("indices", dtypes=(np.int64, np.uint32, np.float32)),
    value("indices", "another s_q", lambda a: {"indices": np.zeros((4, 1, 7), np.int32)}),
    value("indices", "two heads", lambda a: {"indices": np.zeros((3, 2, 7), np.int32)}),
    value("indices", "none at all", lambda a: {"indices": np.zeros((3, 1, 0), np.int32)}),
    *length_rules("topk_length", lambda a: 7),
    *array_rules("attn_sink", dtypes=(np.float64, BF16, np.int32), last_stride=False),
    value("attn_sink", "another h_q", lambda a: {"attn_sink": np.zeros(5, np.float32)}),
    value("sm_scale", "None", lambda a: {"sm_scale": None}),
    *scale_rules("sm_scale"),
    value("d_v", "256", lambda a: {"d_v": 256}),
    value("d_v", "576", lambda a: {"d_v": 576}),
    kind("d_v", "a float", lambda a: {"d_v": 512.0}),
    kind("d_v", "None", lambda a: {"d_v": None}),
    *result_rules("out", np.float16),
    *result_rules("max_logits", np.float16),
    *result_rules("lse", np.float16),
    *STREAMS,
]


# ----------------------------------------------------------------------------------- mha_varlen


def mha() -> Arguments:
    return {
        "q": zeros(5, 4, 40),
        "k": zeros(6, 2, 40),
        "v": zeros(6, 2, 24),
        "cu_seqlens_q": i32(0, 2, 5),
        "cu_seqlens_k": i32(0, 0, 6),
        "out": np.full((5, 4, 24), 7, BF16),
        "lse": np.full((5, 4), 7, np.float32),
    }


def bound_rules(name: str, total: int) -> list[Bad]:
    return [
        *array_rules(name, dtypes=(np.int64, np.uint32, np.float32), last_stride=False),
        value(name, "not from 0", lambda a: {name: i32(1, 2, total)}),
        value(name, "not to the total", lambda a: {name: i32(0, 2, total - 1)}),
        value(name, "beyond the total", lambda a: {name: i32(0, 2, total + 1)}),
        value(name, "a step back", lambda a: {name: i32(0, total + 1, total)}),
        value(name, "a negative one", lambda a: {name: i32(0, -1, total)}),
    ]


MHA_INPUTS: list[Bad] = [
    *missing("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"),
    *array_rules("q", dtypes=(np.float32, np.float64)),
    *array_rules("k", dtypes=(np.float16, np.float32)),
    *array_rules("v", dtypes=(np.float16, np.float32)),
    value("q", "no head", lambda a: {"q": zeros(5, 0, 40)}),
    value("q", "heads that do not divide", lambda a: {"q": zeros(5, 3, 40)}),
    value("k", "another head dim", lambda a: {"k": zeros(6, 2, 24)}),
    value("v", "another total", lambda a: {"v": zeros(5, 2, 24)}),
    value("v", "other heads", lambda a: {"v": zeros(6, 4, 24)}),
    value("v", "no dim", lambda a: {"v": zeros(6, 2, 0)}),
    *bound_rules("cu_seqlens_q", 5),
    *bound_rules("cu_seqlens_k", 6),
    value("cu_seqlens_q", "a single bound", lambda a: {"cu_seqlens_q": i32(0)}),
    value("cu_seqlens_q", "no bound", lambda a: {"cu_seqlens_q": i32()}),
    value("cu_seqlens_k", "another batch", lambda a: {"cu_seqlens_k": i32(0, 6)}),
    *scale_rules(),
    *flag_rules("causal"),
    *STREAMS,
]
MHA: list[Bad] = [*MHA_INPUTS, *result_rules("out", np.float16), *result_rules("lse", np.float16)]


def backward() -> Arguments:
    inputs = {name: one for name, one in mha().items() if name not in ("out", "lse")}
    return {
        "dout": zeros(5, 4, 24),
        **inputs,
        "out": zeros(5, 4, 24),
        "lse": np.zeros((5, 4), np.float32),
        "dq": np.full((5, 4, 40), 7, BF16),
        "dk": np.full((6, 2, 40), 7, BF16),
        "dv": np.full((6, 2, 24), 7, BF16),
    }


def another_total(a: Arguments) -> Arguments:
    """q of six rows, with the bounds that belong to it, but out of five."""
    return {"q": zeros(6, 4, 40), "cu_seqlens_q": i32(0, 2, 6), "dout": zeros(6, 4, 24)}


BACKWARD: list[Bad] = [
    *MHA_INPUTS,
    *missing("dout", "out", "lse"),
    *array_rules("dout", dtypes=(np.float16, np.float32, np.float64)),
    *array_rules("out", dtypes=(np.float16, np.float32, np.float64)),
    *array_rules("lse", dtypes=(np.float16, np.float64, BF16), last_stride=False),
    value("dout", "another shape", lambda a: {"dout": zeros(5, 4, 40)}),
    value("out", "of another call", another_total),
    value("lse", "heads first", lambda a: {"lse": np.zeros((4, 5), np.float32)}),
    *result_rules("dq", np.float32),
    *result_rules("dk", np.float32),
    *result_rules("dv", np.float32),
    value("dq", "q itself", lambda a: {"dq": a["q"]}),
    value("dk", "k itself", lambda a: {"dk": a["k"]}),
    value("dv", "v itself", lambda a: {"dv": a["v"]}),
]


# ------------------------------------------------------------------------------ merge_attention


def merge() -> Arguments:
    return {
        "outs": [zeros(2, 3, 4, 24), zeros(2, 3, 4, 24)],
        "lses": [np.zeros((2, 4, 3), np.float32), np.zeros((2, 4, 3), np.float32)],
        "out": np.full((2, 3, 4, 24), 7, BF16),
        "lse": np.full((2, 4, 3), 7, np.float32),
    }


def second(name: str, replacement: Any) -> Callable[[Arguments], Arguments]:
    return lambda a: {name: [a[name][0], replacement]}


MERGE: list[Bad] = [
    kind("outs", "None", lambda a: {"outs": None}),
    kind("outs", "an array", lambda a: {"outs": zeros(2, 2, 3, 4, 24)}),
    kind("outs", "an iterator", lambda a: {"outs": iter(a["outs"])}),
    kind("lses", "None", lambda a: {"lses": None}),
    kind("lses", "an array", lambda a: {"lses": np.zeros((2, 2, 4, 3), np.float32)}),
    value("lses", "one missing", lambda a: {"lses": a["lses"][:1]}),
    value("lses", "one too many", lambda a: {"lses": a["lses"] * 2}),
    Bad("lses", "nothing to merge", lambda a: {"outs": [], "lses": []}),
    kind("outs[1]", "None", second("outs", None)),
    kind("lses[1]", "None", second("lses", None)),
    kind("outs[1]", "a list", second("outs", [1.0])),
    kind("lses[1]", "a list", second("lses", [1.0])),
    kind("outs[0]", "float64", lambda a: {"outs": [zeros(2, 3, 4, 24, dtype=np.float64)] * 2}),
    kind("outs[0]", "int32", lambda a: {"outs": [zeros(2, 3, 4, 24, dtype=np.int32)] * 2}),
    kind("outs[1]", "two dtypes", second("outs", zeros(2, 3, 4, 24, dtype=np.float16))),
    kind("lses[1]", "float64", second("lses", np.zeros((2, 4, 3)))),
    kind("lses[1]", "bfloat16", second("lses", zeros(2, 4, 3))),
    value("outs[0]", "two dimensions", lambda a: {"outs": [zeros(2, 24)] * 2}),
    value("outs[0]", "five dimensions", lambda a: {"outs": [zeros(1, 2, 3, 4, 24)] * 2}),
    value("outs[1]", "another shape", second("outs", zeros(2, 3, 4, 25))),
    value("outs[1]", "another rank", second("outs", zeros(2, 3, 24))),
    value("lses[1]", "out's order", second("lses", np.zeros((2, 3, 4), np.float32))),
    value("lses[1]", "another rank", second("lses", np.zeros((2, 4), np.float32))),
    value("outs[1]", "on a GPU", second("outs", OnTheGpu())),
    value("lses[1]", "on a GPU", second("lses", OnTheGpu())),
    *result_rules("out", np.float16),
    *result_rules("lse", np.float16),
    value("out", "one of outs", lambda a: {"out": a["outs"][1]}),
    value("lse", "one of lses", lambda a: {"lse": a["lses"][0]}),
    *STREAMS,
]


# ---------------------------------------------------------------------------------------- tests


@dataclass(frozen=True)
class Op:
    call: Callable[..., Any]
    good: Callable[[], Arguments]
    results: tuple[str, ...]
    bad: list[Bad]


OPS = {
    "dense_decode": Op(cumla.dense_decode, dense, ("out", "lse"), DENSE),
    "sparse_decode": Op(cumla.sparse_decode, sparse, ("out", "lse"), SPARSE),
    "sparse_prefill": Op(cumla.sparse_prefill, prefill, ("out", "max_logits", "lse"), PREFILL),
    "mha_varlen": Op(cumla.mha_varlen, mha, ("out", "lse"), MHA),
    "mha_varlen_backward": Op(cumla.mha_varlen_backward, backward, ("dq", "dk", "dv"), BACKWARD),
    "merge_attention": Op(cumla.merge_attention, merge, ("out", "lse"), MERGE),
}


@pytest.mark.parametrize("name", OPS)
def test_the_good_call_is_good(name: str) -> None:
    """Else every bad one would be refused for its neighbour's fault. All results are written."""
    op = OPS[name]
    arguments = op.good()
    op.call(**arguments)
    for result in op.results:
        assert not (arguments[result] == 7).any()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        pytest.param(name, bad, id=f"{name}-{bad.argument}-{bad.why}")
        for name, op in OPS.items()
        for bad in op.bad
    ],
)
def test_bad_input_is_refused(name: str, bad: Bad) -> None:
    op = OPS[name]
    arguments = op.good()
    changes = bad.change(arguments)
    buffers = {one: arguments[one] for one in op.results if one not in changes}
    with pytest.raises(bad.error) as caught:
        op.call(**{**arguments, **changes})
    message = str(caught.value)
    assert type(caught.value) is bad.error
    assert message.startswith(f"{bad.argument}: "), message
    assert len(message) < 600, "values are shown in short"
    for one, buffer in buffers.items():
        assert (buffer == 7).all(), f"{one} was written to"


@pytest.mark.parametrize("name", OPS)
def test_arrays_on_a_gpu_need_its_backend(name: str) -> None:
    op = OPS[name]

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(one) for one in value]
        return OnTheGpu() if isinstance(value, np.ndarray) else value

    arguments = {one: moved(value) for one, value in op.good().items()}
    with pytest.raises(BackendUnavailable, match=r"^(q|outs\[0\]): .*GPU"):
        op.call(**arguments)


def test_a_first_array_on_the_gpu_is_named_with_the_one_that_is_not() -> None:
    with pytest.raises(ArgumentError, match=r"^kv_cache: .*\bq is on the GPU"):
        cumla.dense_decode(**{**dense(), "q": OnTheGpu()})


@pytest.mark.parametrize("name", OPS)
def test_the_errors_are_pythons_own_kinds(name: str) -> None:
    """So that nobody needs to import ours to catch them."""
    op = OPS[name]
    with pytest.raises(ValueError, match=r"^stream: "):
        op.call(**{**op.good(), "stream": 5})
    with pytest.raises(TypeError, match=r"^(out|dq): "):
        op.call(**{**op.good(), op.results[0]: "here"})
