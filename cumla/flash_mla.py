"""FlashMLA's functions under their own names and signatures, on top of cumla's ops.

A program written for FlashMLA changes its import:

    import cumla.flash_mla as flash_mla

Names, order and defaults of the arguments, shapes of the results and what stands in rows without
a key are FlashMLA's. Results come back in the caller's array type, NumPy or any CPU array that
exports through DLPack (a torch tensor, bfloat16 included).

Wider than FlashMLA: any number of query heads, any page size, any topk, float16, BF16 and FP16
rows in the sparse decode, topk_length [b, s_q], any head dims in the MHA functions, any invalid
index, `out=` to write into. Stricter: a holder that was planned for other lengths is refused
instead of giving wrong results, and so is an is_fp8_kvcache that does not say what the cache is.

There is no autograd here: for gradients of the MHA functions call `cumla.mha_varlen_backward`
with their results.
"""

from __future__ import annotations

import numbers
import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.attention import dense_decode, mha_varlen, sparse_decode, sparse_prefill
from cumla.attention.arguments import check_flag, check_half, plan_for
from cumla.backends.arrays import Arrays
from cumla.checks import (
    ArgumentError,
    ArgumentTypeError,
    bad_type,
    bad_value,
    check_dtype,
    check_int,
    check_shape,
)
from cumla.layouts import KVLayout, layout_of
from cumla.schedule import DecodePlan, sparse_kv_lengths

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

Array = NDArray[Any]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class SchedConfig:
    """The kind of decode call that a holder was filled by; all calls that share it agree in it."""

    b: int
    s_q: int
    h_q: int
    page_block_size: int
    h_k: int
    causal: bool
    is_fp8_kvcache: bool
    topk: int | None
    """None without indices."""
    extra_page_block_size: int | None
    extra_topk: int | None


@dataclass(eq=False)
class FlashMLASchedMeta:
    """The holder of a decode schedule: made empty, filled by the first call that it is passed to.

    Later calls reuse the schedule. They must be of the same kind (`config`) and have the same
    lengths; take a fresh holder for every decoding step.
    """

    config: SchedConfig | None = None
    plan: DecodePlan | None = None

    @property
    def have_initialized(self) -> bool:
        return self.plan is not None

    @property
    def tile_scheduler_metadata(self) -> Int32 | None:
        """int32 [P, 8], a NumPy array; see `cumla.DecodePlan`. None before the first call."""
        return self.plan.tile_scheduler_metadata if self.plan else None

    @property
    def num_splits(self) -> Int32 | None:
        """int32 [b + 1], a NumPy array; see `cumla.DecodePlan`. None before the first call."""
        return self.plan.num_splits if self.plan else None


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """An empty holder, and None. Arguments are ignored: older callers pass lengths and heads."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Any = None,
    attn_sink: Any = None,
    extra_k_cache: Any = None,
    extra_indices_in_kvcache: Any = None,
    topk_length: Any = None,
    extra_topk_length: Any = None,
    out: Any = None,
) -> tuple[Any, Any]:
    """MLA decoding over a paged cache: over all tokens, or, with indices, over selected ones.

    Args:
        q: [b, s_q, h_q, d_qk], bfloat16 (float16 over an FP16 cache); d_qk is 576, or 512 over a
            V4 cache.
        k_cache: [pages, page_size, h_kv, row] of any layout in `cumla.layouts`; FP8 only with
            indices, h_kv > 1 only without.
        block_table: int32 [b, max_blocks]. Ignored with indices; may be None then.
        cache_seqlens: int32 [b], visible tokens, the s_q new ones included. Ignored with indices;
            may be None then.
        head_dim_v: 512.
        tile_scheduler_metadata: the holder from `get_mla_metadata()`.
        num_splits: None, the second thing that `get_mla_metadata()` returns.
        softmax_scale: > 0; d_qk**-0.5 by default. DeepSeek V3's is not the default.
        causal: query s of s_q sees tokens j < cache_seqlens - (s_q - 1 - s) only. False with
            indices.
        is_fp8_kvcache: whether the cache has an FP8 layout.
        indices: int32 [b, s_q, topk], each page * page_size + offset; any other value selects
            nothing.
        attn_sink: float32 [h_q]; with indices only, like all that follow.
        extra_k_cache, extra_indices_in_kvcache: a second pool of the same layout with a page size
            of its own, and int32 [b, s_q, extra_topk] indices into it.
        topk_length, extra_topk_length: int32 [b] or [b, s_q], how many of a query's indices count.
        out: where to put the result, [b, s_q, h_q, 512] in q's dtype.

    Returns:
        out [b, s_q, h_q, 512] in q's dtype and lse [b, h_q, s_q], float32, natural log. A row
        without a token gives 0 and +inf.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument. A holder of
            another kind of call or of other lengths is one. The holder is then as it was.
        BackendUnavailable: the arrays are on a GPU that cannot be used.
    """
    holder = tile_scheduler_metadata
    if not isinstance(holder, FlashMLASchedMeta):
        raise bad_type(
            "tile_scheduler_metadata",
            type(holder).__name__,
            "it must be a FlashMLASchedMeta",
            "Pass the first thing that get_mla_metadata() returns.",
        )
    _check_absent("the holder carries them", num_splits=num_splits)
    check_int("head_dim_v", head_dim_v, low=512, high=512)
    check_flag("causal", causal)
    check_flag("is_fp8_kvcache", is_fp8_kvcache)
    _check_given(q=q, k_cache=k_cache)
    sparse_only = {
        "attn_sink": attn_sink,
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "topk_length": topk_length,
        "extra_topk_length": extra_topk_length,
    }
    if indices is None:
        _check_absent("it goes with indices only", **sparse_only)
        _check_given(block_table=block_table, cache_seqlens=cache_seqlens)
        arrays = Arrays(
            q=q, k_cache=k_cache, block_table=block_table, cache_seqlens=cache_seqlens, out=out
        )
    else:
        if causal:
            raise bad_value(
                "causal", causal, "with indices it must be False", "Select visible tokens only."
            )
        arrays = Arrays(q=q, k_cache=k_cache, indices=indices, out=out, **sparse_only)
    layout = _check_cache(arrays, is_fp8_kvcache)
    config = _config(arrays, layout, causal)
    if holder.plan is not None:
        _check_config(holder, config)
        source = "cache_seqlens" if indices is None else "topk_length or extra_topk_length"
        _check_lengths(holder.plan, source, _kv_lengths(arrays, config))
    run = _dense if indices is None else _sparse
    found, lse = run(arrays, softmax_scale, bool(causal), holder.plan)
    if holder.plan is None:
        # Only now that the op has taken all arguments, and just as it planned for itself.
        holder.plan = plan_for(None, "cache_seqlens", _kv_lengths(arrays, config))
        holder.config = config
    return arrays.give_back("out", found), arrays.give_back("lse", lse)


def flash_mla_sparse_fwd(
    q: Any,
    kv: Any,
    indices: Any,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Any = None,
    topk_length: Any = None,
    out: Any = None,
) -> tuple[Any, Any, Any]:
    """Attention of query tokens over the KV tokens that each of them selects. No batch, no pages.

    Args:
        q: [s_q, h_q, d_qk], bfloat16 or float16, d_qk 576 or 512.
        kv: [s_kv, 1, d_qk], q's dtype.
        indices: int32 [s_q, 1, topk]; a value that is negative or >= s_kv selects nothing.
        sm_scale: > 0, multiplies q . k.
        d_v: 512.
        attn_sink: float32 [h_q].
        topk_length: int32 [s_q], how many of a query's indices count.
        out: where to put the result, [s_q, h_q, 512] in q's dtype.

    Returns:
        out [s_q, h_q, 512] in q's dtype; max_logits and lse [s_q, h_q], float32, natural log. A
        row without a token gives 0, -inf and +inf.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the arrays are on a GPU that cannot be used.
    """
    _check_given(q=q, kv=kv, indices=indices)
    return sparse_prefill(
        q, kv, indices, sm_scale, d_v=d_v, attn_sink=attn_sink, topk_length=topk_length, out=out
    )


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_qo: Any,
    cu_seqlens_kv: Any,
    max_seqlen_qo: int | None,
    max_seqlen_kv: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Any, Any]:
    """Multi-head attention within each of b sequences that lie packed one after the other.

    Args:
        q: [total_q, h_q, d_qk], bfloat16 or float16.
        k: [total_k, h_kv, d_qk], q's dtype; h_kv divides h_q.
        v: [total_k, h_kv, d_v], q's dtype.
        cu_seqlens_qo, cu_seqlens_kv: int32 [b + 1], where each sequence begins, from 0 to the
            total.
        max_seqlen_qo, max_seqlen_kv: at least the longest sequence; only checked. None is taken.
        dropout_p: 0.
        softmax_scale: > 0; d_qk**-0.5 by default.
        causal: query token t of s_q sees key tokens j < s_k - (s_q - 1 - t) only.
        deterministic: changes nothing; the results always are.
        is_varlen: False: all b sequences are equally long, and of cu_seqlens only the size counts.

    Returns:
        out [total_q, h_q, d_v] in q's dtype and lse [total_q, h_q], float32, natural log. A row
        without a key gives 0 and -inf: FlashMLA's rule here, and not that of the MLA functions.
        `cumla.mha_varlen_backward` takes both as they are.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the arrays are on a GPU that cannot be used.
    """
    _check_given(q=q, k=k, v=v, cu_seqlens_qo=cu_seqlens_qo, cu_seqlens_kv=cu_seqlens_kv)
    arrays = Arrays(q=q, k=k, v=v, cu_seqlens_qo=cu_seqlens_qo, cu_seqlens_kv=cu_seqlens_kv)
    return _mha(
        arrays,
        (arrays["q"], arrays["k"], arrays["v"]),
        ("cu_seqlens_qo", "cu_seqlens_kv"),
        {"max_seqlen_qo": max_seqlen_qo, "max_seqlen_kv": max_seqlen_kv},
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: int | None,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Any, Any]:
    """`flash_attn_varlen_func` with q, k and v side by side in one array.

    Args:
        qkv: [total, h, 2 * head_dim_qk + d_v]: q, k, v, in this order, in the last dimension.
        cu_seqlens, max_seqlen: of queries and keys alike.
        head_dim_qk: size of q's and of k's part.
        dropout_p, softmax_scale, causal, deterministic, is_varlen: as there.

    Returns, raises: as there.
    """
    _check_given(qkv=qkv, cu_seqlens=cu_seqlens)
    arrays = Arrays(qkv=qkv, cu_seqlens=cu_seqlens)
    packed = arrays["qkv"]
    check_half("qkv", packed, ("total", "h", "2 * head_dim_qk + d_v"), may_be_empty=True)
    d_qk = check_int("head_dim_qk", head_dim_qk, low=1, high=(packed.shape[2] - 1) // 2)
    return _mha(
        arrays,
        (packed[..., :d_qk], packed[..., d_qk : 2 * d_qk], packed[..., 2 * d_qk :]),
        ("cu_seqlens", "cu_seqlens"),
        {"max_seqlen": max_seqlen},
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_qo: Any,
    cu_seqlens_kv: Any,
    max_seqlen_qo: int | None,
    max_seqlen_kv: int | None,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Any, Any]:
    """`flash_attn_varlen_func` with k and v side by side in one array.

    Args:
        q: as there.
        kv: [total_k, h_kv, head_dim_qk + d_v]: k, then v, in the last dimension.
        cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv: as there.
        head_dim_qk: size of k's part: q's last dimension.
        dropout_p, softmax_scale, causal, deterministic, is_varlen: as there.

    Returns, raises: as there.
    """
    _check_given(q=q, kv=kv, cu_seqlens_qo=cu_seqlens_qo, cu_seqlens_kv=cu_seqlens_kv)
    arrays = Arrays(q=q, kv=kv, cu_seqlens_qo=cu_seqlens_qo, cu_seqlens_kv=cu_seqlens_kv)
    queries, packed = arrays["q"], arrays["kv"]
    check_half("q", queries, ("total_q", "h_q", "head_dim_qk"), may_be_empty=True)
    check_half(
        "kv",
        packed,
        ("total_k", "h_kv", "head_dim_qk + d_v"),
        queries.dtype,
        may_be_empty=True,
    )
    d_qk = check_int("head_dim_qk", head_dim_qk, low=queries.shape[2], high=queries.shape[2])
    if packed.shape[2] <= d_qk:
        raise bad_value(
            "kv",
            f"shape {packed.shape}",
            f"after head_dim_qk = {d_qk} numbers of k the last dimension must hold v",
            "Concatenate k and v along the last dimension.",
        )
    return _mha(
        arrays,
        (queries, packed[..., :d_qk], packed[..., d_qk:]),
        ("cu_seqlens_qo", "cu_seqlens_kv"),
        {"max_seqlen_qo": max_seqlen_qo, "max_seqlen_kv": max_seqlen_kv},
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def _dense(
    arrays: Arrays, softmax_scale: float | None, causal: bool, plan: DecodePlan | None
) -> tuple[Array, Array]:
    with _named({"kv_cache": "k_cache"}):
        return dense_decode(
            arrays["q"],
            arrays["k_cache"],
            arrays["block_table"],
            arrays["cache_seqlens"],
            softmax_scale=softmax_scale,
            causal=causal,
            out=arrays.optional("out"),
            plan=plan,
        )


def _sparse(
    arrays: Arrays, softmax_scale: float | None, causal: bool, plan: DecodePlan | None
) -> tuple[Array, Array]:
    names = {
        "kv_cache": "k_cache",
        "extra_kv_cache": "extra_k_cache",
        "extra_indices": "extra_indices_in_kvcache",
    }
    with _named(names):
        return sparse_decode(
            arrays["q"],
            arrays["k_cache"],
            arrays["indices"],
            topk_length=arrays.optional("topk_length"),
            attn_sink=arrays.optional("attn_sink"),
            extra_kv_cache=arrays.optional("extra_k_cache"),
            extra_indices=arrays.optional("extra_indices_in_kvcache"),
            extra_topk_length=arrays.optional("extra_topk_length"),
            softmax_scale=softmax_scale,
            out=arrays.optional("out"),
            plan=plan,
        )


def _check_cache(arrays: Arrays, is_fp8_kvcache: bool) -> KVLayout:
    """The layout of k_cache; raises unless it is what is_fp8_kvcache says and the op can read."""
    layout = layout_of("k_cache", arrays["k_cache"])
    if layout.is_fp8 and arrays.optional("indices") is None:
        raise bad_value(
            "k_cache",
            f"layout {layout}",
            "without indices it must be BF16 or FP16",
            "Pass indices, or decode the cache with cumla.unpack_kv.",
        )
    if bool(is_fp8_kvcache) != layout.is_fp8:
        raise bad_value(
            "is_fp8_kvcache",
            is_fp8_kvcache,
            f"k_cache has layout {layout}, so it must be {layout.is_fp8}",
            "Say what the cache is, or pass the cache that you mean.",
        )
    return layout


def _config(arrays: Arrays, layout: KVLayout, causal: bool) -> SchedConfig:
    """The kind of this call. Checks how many dimensions the arrays have, the op checks the rest."""
    queries, cache = arrays["q"], arrays["k_cache"]
    check_shape("q", queries, ["b", "s_q", "h_q", layout.d_qk])
    batch, s_q, h_q, _ = queries.shape
    selected = arrays.optional("indices")
    if selected is not None:
        check_shape("indices", selected, ["b", "s_q", "topk"])
    extra_cache = arrays.optional("extra_k_cache")
    if extra_cache is not None:
        check_shape("extra_k_cache", extra_cache, ["pages", "page_size", 1, layout.row_elements])
    extra_selected = arrays.optional("extra_indices_in_kvcache")
    if extra_selected is not None:
        check_shape("extra_indices_in_kvcache", extra_selected, ["b", "s_q", "extra_topk"])
    return SchedConfig(
        b=batch,
        s_q=s_q,
        h_q=h_q,
        page_block_size=cache.shape[1],
        h_k=cache.shape[2],
        causal=bool(causal),
        is_fp8_kvcache=layout.is_fp8,
        topk=None if selected is None else selected.shape[2],
        extra_page_block_size=None if extra_cache is None else extra_cache.shape[1],
        extra_topk=None if extra_selected is None else extra_selected.shape[2],
    )


def _kv_lengths(arrays: Arrays, config: SchedConfig) -> Array:
    """The lengths [b] that the schedule of this call depends on."""
    if config.topk is None:
        return arrays["cache_seqlens"]
    return sparse_kv_lengths(
        config.b,
        config.topk,
        arrays.optional("topk_length"),
        config.extra_topk or 0,
        arrays.optional("extra_topk_length"),
    )


_FRESH_HOLDER = "Take a fresh holder from get_mla_metadata(), one for each step and kind of call."


def _check_config(holder: FlashMLASchedMeta, config: SchedConfig) -> None:
    for one in fields(SchedConfig):
        planned, asked = getattr(holder.config, one.name), getattr(config, one.name)
        if planned != asked:
            raise bad_value(
                "tile_scheduler_metadata",
                f"a holder that was filled with {one.name} = {planned}",
                f"this call has {one.name} = {asked}",
                _FRESH_HOLDER,
            )


def _check_lengths(plan: DecodePlan, argument: str, kv_lens: Array) -> None:
    """Raise if the plan is stale. What are no lengths at all is left for the op to refuse."""
    if (kv_lens.shape, kv_lens.dtype) != (plan.kv_lens.shape, plan.kv_lens.dtype):
        return
    differs = kv_lens != plan.kv_lens
    if differs.any():
        request = int(differs.argmax())
        raise bad_value(
            "tile_scheduler_metadata",
            f"a holder that was filled for {plan.kv_lens[request]} KV tokens of request {request}",
            f"{argument} of this call makes it {kv_lens[request]}",
            _FRESH_HOLDER,
        )


def _mha(
    arrays: Arrays,
    qkv: tuple[Array, Array, Array],
    bounds_names: tuple[str, str],
    longest: Mapping[str, Any],
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    is_varlen: bool,
) -> tuple[Any, Any]:
    """mha_varlen of q, k, v between the bounds that `arrays` has by name, FlashMLA's way.

    `longest` are the max_seqlen arguments, by name, for queries and keys (or one for both).
    """
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real):
        raise bad_type("dropout_p", repr(dropout_p), "it must be a number", "Pass 0.0.")
    if dropout_p != 0:
        raise bad_value("dropout_p", dropout_p, "there is no dropout", "Pass 0.0.")
    check_flag("causal", causal)
    check_flag("deterministic", deterministic)
    check_flag("is_varlen", is_varlen)
    q, k, v = qkv
    check_shape("q", q, ["total_q", "h_q", "d_qk"])
    check_shape("k", k, ["total_k", "h_kv", "d_qk"])
    bounds_q, bounds_k = (
        _bounds(name, arrays[name], len(rows), is_varlen)
        for name, rows in zip(bounds_names, (q, k), strict=True)
    )
    for (name, value), bounds in zip(longest.items(), (bounds_q, bounds_k), strict=False):
        _check_longest(name, value, bounds)
    with _named(dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds_names, strict=True))):
        out, lse = mha_varlen(
            q, k, v, bounds_q, bounds_k, softmax_scale=softmax_scale, causal=causal
        )
    lse[_rows_without_key(bounds_q, bounds_k, causal)] = -np.inf
    return arrays.give_back("out", out), arrays.give_back("lse", lse)


def _bounds(argument: str, bounds: Array, total: int, is_varlen: bool) -> Array:
    """`bounds` themselves, or, unless is_varlen, those of as many equally long sequences."""
    check_dtype(argument, bounds, [np.int32])
    check_shape(argument, bounds, ["b + 1"])
    batch = len(bounds) - 1
    if is_varlen or batch < 1:
        return bounds
    if total % batch:
        raise bad_value(
            argument,
            f"a batch of {batch}",
            f"with is_varlen=False the {total} rows must divide into equally long sequences",
            "Pass is_varlen=True.",
        )
    return (np.arange(batch + 1) * (total // batch)).astype(np.int32)


def _check_longest(argument: str, value: Any, bounds: Array) -> None:
    """Raise if max_seqlen `value` is less than the longest sequence; None is not checked."""
    if value is None:
        return
    try:
        promised = operator.index(value)
    except TypeError:
        raise bad_type(
            argument, repr(value), "it must be an integer", "Pass the longest sequence's length."
        ) from None
    longest = int(np.diff(bounds).max(initial=0))
    if promised < longest:
        raise bad_value(
            argument,
            promised,
            f"the longest sequence has {longest} tokens",
            f"Pass {longest} or more.",
        )


def _rows_without_key(bounds_q: Array, bounds_k: Array, causal: bool) -> NDArray[np.bool_]:
    """Which of the query rows [total_q] see no key."""
    lens_q, lens_k = np.diff(bounds_q), np.diff(bounds_k)
    visible = np.repeat(lens_k, lens_q)
    if causal:
        # The last row of a sequence sees all of its keys, the one before it one less.
        visible = visible - (np.repeat(bounds_q[1:], lens_q) - 1 - np.arange(len(visible)))
    empty: NDArray[np.bool_] = visible <= 0
    return empty


def _check_given(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is None:
            raise bad_type(name, "None", "it is needed", "Pass an array.")


def _check_absent(reason: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise bad_value(
                name, f"a {type(value).__name__}", f"{reason}, so it must be None", "Leave it out."
            )


@contextmanager
def _named(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors of an op speak of its arguments (the keys) by FlashMLA's names."""
    try:
        yield
    except (ArgumentError, ArgumentTypeError) as error:
        words = r"\b(" + "|".join(names) + r")\b"
        text = re.sub(words, lambda found: names[found[0]], str(error))
        raise type(error)(text) from None
