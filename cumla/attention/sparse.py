"""sparse_decode: MLA decoding over tokens that an indexer selected from paged caches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.attention.arguments import (
    check_half,
    check_indices,
    check_lengths,
    check_pages_base,
    check_plan,
    check_plan_batch,
    check_plan_type,
    check_sink,
    check_workspace,
    result_array,
)
from cumla.backends.arrays import Arrays, is_cupy
from cumla.backends.problems import SparseDecode, TokenPool
from cumla.backends.replay import attempt
from cumla.checks import bad_value, check_scale
from cumla.layouts import KVLayout, check_pages, layout_of
from cumla.schedule import DecodePlan, sparse_kv_lengths

Array = NDArray[Any]


def sparse_decode(
    q: Any,
    kv_cache: Any,
    indices: Any,
    *,
    topk_length: Any = None,
    attn_sink: Any = None,
    extra_kv_cache: Any = None,
    extra_indices: Any = None,
    extra_topk_length: Any = None,
    softmax_scale: float | None = None,
    out: Any = None,
    lse: Any = None,
    workspace: Any = None,
    plan: DecodePlan | None = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Attention of new query tokens over the cached tokens that each of them selects.

    What arrays on a GPU hold is not looked at, as that would wait for the GPU: there a length, an
    index or a page that is out of range is no error, and does not lead the kernels out of the
    arrays. With results, workspace and plan given, such a call allocates nothing.

    Args:
        q: [b, s_q, h_q, d_qk], bfloat16 (float16 over an FP16 cache); d_qk is the cache's: 576,
            or 512 for V4_FP8. Any h_q.
        kv_cache: [pages, page_size, 1, row] of any layout in `cumla.layouts`, which its dtype and
            row size tell; V is the first 512 numbers of a decoded row.
        indices: int32 [b, s_q, topk], each page * page_size + offset. One that is negative or
            beyond the pool selects nothing; one that occurs twice counts twice.
        topk_length: int32 [b] or [b, s_q], how many of a query's indices count, from the first;
            all by default. What stands beyond is never looked at.
        attn_sink: float32 [h_q], a logit without a value that joins every row's softmax: out is
            multiplied by exp(lse) / (exp(lse) + exp(attn_sink)); lse is not changed.
        extra_kv_cache, extra_indices, extra_topk_length: a second pool of the same layout with
            its own page size, [b, s_q, extra_topk] indices and lengths, in the same softmax.
        softmax_scale: > 0; d_qk**-0.5 by default. DeepSeek V3.2 wants 192**-0.5 times its YaRN
            factor squared, V4 512**-0.5.
        out, lse: where to put the results, of their shapes and dtypes.
        workspace: uint8, contiguous, at a multiple of 256 bytes: scratch memory for a GPU, of
            `cumla.decode_workspace_bytes(...)`; without it, CuPy's pool gives some. The CPU needs
            none.
        plan: from `cumla.plan_decode(cumla.sparse_kv_lengths(...), ...)`. One made on the CPU is
            copied to the GPU once for each stream that uses it.
        stream: for arrays on a GPU; CuPy's current stream by default. A CuPy stream, an object
            with __cuda_stream__, cuda_stream or ptr, or a stream's address.

    Returns:
        out [b, s_q, h_q, 512] in q's dtype and lse [b, h_q, s_q], float32, natural log. A row
        that selects no valid token gives 0 and +inf.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the arrays are on a GPU that cannot be used.
    """
    inputs = (
        *(q, kv_cache, indices, topk_length, attn_sink),
        *(extra_kv_cache, extra_indices, extra_topk_length, workspace),
    )
    again = attempt("sparse", inputs, (out, lse), plan, (softmax_scale,), stream)
    if again.results is not None:
        return again.results
    arrays = Arrays(
        q=q,
        kv_cache=kv_cache,
        indices=indices,
        topk_length=topk_length,
        attn_sink=attn_sink,
        extra_kv_cache=extra_kv_cache,
        extra_indices=extra_indices,
        extra_topk_length=extra_topk_length,
        out=out,
        lse=lse,
        workspace=workspace,
        stream=stream,
    )
    queries = arrays["q"]
    layout = layout_of("kv_cache", arrays["kv_cache"])
    check_half("q", queries, ("b", "s_q", "h_q", layout.d_qk), layout.compute_dtype)
    batch, s_q, h_q, _ = queries.shape
    main = _pool(arrays, "", layout, batch, s_q)
    extra = _extra_pool(arrays, layout, batch, s_q)
    check_sink(arrays.optional("attn_sink"), h_q)
    _check_plan(plan, main, extra)
    check_workspace(arrays.optional("workspace"), plan, (batch, s_q, h_q))
    scale = check_scale("softmax_scale", softmax_scale, layout.d_qk**-0.5)
    with arrays.place():
        problem = SparseDecode(
            q=queries,
            main=main,
            extra=extra,
            attn_sink=arrays.optional("attn_sink"),
            softmax_scale=scale,
            plan=plan,
            out=result_array(arrays, "out", (batch, s_q, h_q, layout.d_v), queries.dtype),
            lse=result_array(arrays, "lse", (batch, h_q, s_q), np.float32),
            workspace=arrays.optional("workspace"),
            stream=stream,
        )
        with again.recorded((problem.out, problem.lse)):
            arrays.backend.sparse_decode(problem)
        return arrays.give_back("out", problem.out), arrays.give_back("lse", problem.lse)


def _check_plan(plan: Any, main: TokenPool, extra: TokenPool | None) -> None:
    """Raise unless `plan` is None or a DecodePlan for just the lengths of this call.

    With arrays on a GPU only their number counts: what they hold is not looked at.
    """
    check_plan_type(plan)
    batch, _, topk = main.indices.shape
    if is_cupy(main.indices):
        if plan is not None:
            check_plan_batch(plan, "indices", batch)
        return
    # Without a plan too: it refuses what selects too many tokens.
    kv_lens = sparse_kv_lengths(
        batch,
        topk,
        main.topk_length,
        extra.indices.shape[2] if extra else 0,
        extra.topk_length if extra else None,
        block_size=plan.block_size if plan else 64,
    )
    check_plan(plan, "topk_length", kv_lens)


def _pool(arrays: Arrays, prefix: str, layout: KVLayout, batch: int, s_q: int) -> TokenPool:
    """The main pool (prefix "") or the extra one (prefix "extra_"), checked."""
    pages = check_pages(prefix + "kv_cache", arrays[prefix + "kv_cache"], layout)
    check_pages_base(prefix + "kv_cache", pages, arrays.backend)
    indices = arrays[prefix + "indices"]
    check_indices(prefix + "indices", indices, (batch, s_q, prefix + "topk"))
    lengths = arrays.optional(prefix + "topk_length")
    if lengths is not None:
        topk = indices.shape[2]
        check_lengths(
            prefix + "topk_length",
            lengths,
            ((batch,), (batch, s_q)),
            topk,
            f"{prefix}indices has {topk} for each query.",
        )
    return TokenPool(pages, layout, indices, lengths)


def _extra_pool(arrays: Arrays, layout: KVLayout, batch: int, s_q: int) -> TokenPool | None:
    names = ("extra_kv_cache", "extra_indices", "extra_topk_length")
    given = [name for name in names if arrays.optional(name) is not None]
    if not given:
        return None
    for name in names[:2]:
        if name not in given:
            raise bad_value(
                name,
                "None",
                f"{' and '.join(given)} came without it",
                "Pass extra_kv_cache and extra_indices together, or neither.",
            )
    if layout_of("extra_kv_cache", arrays["extra_kv_cache"]) != layout:
        raise bad_value(
            "extra_kv_cache",
            f"layout {layout_of('extra_kv_cache', arrays['extra_kv_cache'])}",
            f"it must have kv_cache's layout, {layout}",
            "Encode both caches in one layout.",
        )
    return _pool(arrays, "extra_", layout, batch, s_q)
