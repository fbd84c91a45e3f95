"""FlashMLA's decode call and the holder of its schedule."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.attention import dense_decode, plan_decode, sparse_decode, sparse_kv_lengths
from cumla.attention.arguments import check_flag
from cumla.backends.arrays import Arrays
from cumla.checks import bad_type, bad_value, check_int, check_shape
from cumla.flash_mla.names import check_absent, check_given, speaking_of
from cumla.layouts import KVLayout, layout_of
from cumla.schedule import DecodePlan, plan_for_cpu

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
        """int32 [P, 8], see `cumla.DecodePlan`. None before the first call."""
        return self.plan.tile_scheduler_metadata if self.plan else None

    @property
    def num_splits(self) -> Int32 | None:
        """int32 [b + 1], see `cumla.DecodePlan`. None before the first call."""
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
            another kind of call or, on the CPU, of other lengths is one. The holder is then as it
            was. On a GPU nobody looks at the lengths: a stale holder gives wrong results.
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
    check_absent("the holder carries them", num_splits=num_splits)
    check_int("head_dim_v", head_dim_v, low=512, high=512)
    check_flag("causal", causal)
    check_flag("is_fp8_kvcache", is_fp8_kvcache)
    check_given(q=q, k_cache=k_cache)
    sparse_only = {
        "attn_sink": attn_sink,
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "topk_length": topk_length,
        "extra_topk_length": extra_topk_length,
    }
    if indices is None:
        check_absent("it goes with indices only", **sparse_only)
        check_given(block_table=block_table, cache_seqlens=cache_seqlens)
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
        if not arrays.on_gpu:  # where looking at the lengths would wait for the GPU
            source = "cache_seqlens" if indices is None else "topk_length or extra_topk_length"
            _check_lengths(holder.plan, source, _kv_lengths(arrays, config))
    run = _dense if indices is None else _sparse
    found, lse = run(arrays, softmax_scale, bool(causal), holder.plan)
    if holder.plan is None:
        # Only now that the op has taken all arguments, and just as it planned for itself.
        holder.plan = _plan(arrays, layout, config)
        holder.config = config
    with arrays.place():
        return arrays.give_back("out", found), arrays.give_back("lse", lse)


def _dense(
    arrays: Arrays, softmax_scale: float | None, causal: bool, plan: DecodePlan | None
) -> tuple[Array, Array]:
    with speaking_of({"kv_cache": "k_cache"}):
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
    with speaking_of(names):
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


def _plan(arrays: Arrays, layout: KVLayout, config: SchedConfig) -> DecodePlan:
    """The plan that the op makes for itself if it is given none."""
    lengths = _kv_lengths(arrays, config)
    if not arrays.on_gpu:
        return plan_for_cpu(lengths)
    backend: Any = arrays.backend  # on a GPU there is no other than KernelBackend
    with arrays.place():
        if config.topk is None:
            parts = backend.dense_num_parts(layout, config.s_q, config.h_q, config.h_k)
        else:
            parts = backend.sparse_num_parts(layout, config.s_q, config.h_q)
        return plan_decode(lengths, num_parts=parts)


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
