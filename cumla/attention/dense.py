"""dense_decode: MLA decoding over every token of a paged BF16 or FP16 cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.attention.arguments import (
    check_flag,
    check_half,
    check_heads,
    check_lengths,
    check_pages_base,
    check_plan,
    check_workspace,
    result_array,
)
from cumla.backends.arrays import Arrays, is_cupy
from cumla.backends.problems import DenseDecode
from cumla.backends.replay import attempt
from cumla.checks import bad_value, check_dtype, check_last_stride, check_scale, check_shape
from cumla.layouts import check_pages, layout_of
from cumla.schedule import DecodePlan

Array = NDArray[Any]


def dense_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    out: Any = None,
    lse: Any = None,
    workspace: Any = None,
    plan: DecodePlan | None = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Attention of new query tokens over all cached tokens of their request.

    What arrays on a GPU hold is not looked at, as that would wait for the GPU: there a length, an
    index or a page that is out of range is no error, and does not lead the kernels out of the
    arrays. With results, workspace and plan given, such a call allocates nothing.

    Args:
        q: [b, s_q, h_q, 576], bfloat16 or float16. Head h belongs to KV head h // (h_q / h_kv).
        kv_cache: [pages, page_size, h_kv, 576], q's dtype; V is the first 512 numbers of a row.
        block_table: int32 [b, max_blocks], the pages of every request; entries past its length
            may hold anything.
        cache_seqlens: int32 [b], visible tokens of every request, the s_q new ones included.
        softmax_scale: > 0; 576**-0.5 by default. DeepSeek V3 wants 192**-0.5 times its YaRN
            factor squared, so pass your model's own.
        causal: query s of s_q sees tokens j < cache_seqlens - (s_q - 1 - s) only.
        out, lse: where to put the results, of their shapes and dtypes.
        workspace: uint8, contiguous, at a multiple of 256 bytes: scratch memory for a GPU, of
            `cumla.decode_workspace_bytes(...)`; without it, CuPy's pool gives some. The CPU needs
            none.
        plan: from `cumla.plan_decode(cache_seqlens, ...)`, to cut the work in your own way. One
            made on the CPU is copied to the GPU once for each stream that uses it.
        stream: for arrays on a GPU; CuPy's current stream by default. A CuPy stream, an object
            with __cuda_stream__, cuda_stream or ptr, or a stream's address.

    Returns:
        out [b, s_q, h_q, 512] in q's dtype and lse [b, h_q, s_q], float32, natural log. A row
        that sees no token gives 0 and +inf.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the arrays are on a GPU that cannot be used.
    """
    inputs = (q, kv_cache, block_table, cache_seqlens, workspace)
    again = attempt("dense", inputs, (out, lse), plan, (softmax_scale, causal), stream)
    if again.results is not None:
        return again.results
    arrays = Arrays(
        q=q,
        kv_cache=kv_cache,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        out=out,
        lse=lse,
        workspace=workspace,
        stream=stream,
    )
    queries, cache = arrays["q"], arrays["kv_cache"]
    layout = layout_of("kv_cache", cache)
    if layout.is_fp8:
        raise bad_value(
            "kv_cache",
            f"layout {layout}",
            "dense_decode takes BF16 and FP16 caches",
            "Use cumla.sparse_decode for FP8 caches, or decode them with cumla.unpack_kv.",
        )
    cache = check_pages("kv_cache", cache, layout, h_kv=cache.shape[2])
    check_pages_base("kv_cache", cache, arrays.backend)
    check_half("q", queries, ("b", "s_q", "h_q", layout.d_qk), layout.compute_dtype)
    batch, s_q, h_q, _ = queries.shape
    check_heads(h_q, cache.shape[2])
    table, seqlens = arrays["block_table"], arrays["cache_seqlens"]
    _check_table(table, seqlens, batch, cache)
    check_flag("causal", causal)
    check_plan(plan, "cache_seqlens", seqlens)
    check_workspace(arrays.optional("workspace"), plan, (batch, s_q, h_q))
    scale = check_scale("softmax_scale", softmax_scale, layout.d_qk**-0.5)
    with arrays.place():
        problem = DenseDecode(
            q=queries,
            kv_cache=cache,
            block_table=table,
            cache_seqlens=seqlens,
            layout=layout,
            softmax_scale=scale,
            causal=bool(causal),
            plan=plan,
            out=result_array(arrays, "out", (batch, s_q, h_q, layout.d_v), queries.dtype),
            lse=result_array(arrays, "lse", (batch, h_q, s_q), np.float32),
            workspace=arrays.optional("workspace"),
            stream=stream,
        )
        with again.recorded((problem.out, problem.lse)):
            arrays.backend.dense_decode(problem)
        return arrays.give_back("out", problem.out), arrays.give_back("lse", problem.lse)


def _check_table(table: Array, seqlens: Array, batch: int, cache: Array) -> None:
    """Raise unless every block that a length reaches is a page of the cache.

    What arrays on a GPU hold is not looked at.
    """
    num_pages, page_size = cache.shape[:2]
    check_dtype("block_table", table, [np.int32])
    check_shape("block_table", table, [batch, "max_blocks"])
    check_last_stride("block_table", table)
    if table.shape[1] == 0:
        raise bad_value(
            "block_table", f"shape {table.shape}", "it needs a column", "Pass [b, 1] of zeros."
        )
    room = min(table.shape[1] * page_size, np.iinfo(np.int32).max)
    check_lengths(
        "cache_seqlens",
        seqlens,
        ((batch,),),
        room,
        f"block_table has room for {table.shape[1]} blocks of {page_size} tokens.",
    )
    if is_cupy(seqlens):
        return
    blocks = -(-seqlens.astype(np.int64) // page_size)
    in_use = np.arange(table.shape[1]) < blocks[:, None]
    wrong = in_use & ((table < 0) | (table >= num_pages))
    if wrong.any():
        request, block = (int(one) for one in np.argwhere(wrong)[0])
        raise bad_value(
            "block_table",
            f"{table[request, block]} at [{request}, {block}]",
            f"cache_seqlens[{request}] = {seqlens[request]} uses that entry, so it must be a page "
            f"in [0, {num_pages})",
            "Take the table from PagedKVCache.block_table, or correct the length.",
        )
