"""Every op as launches of the kernels in kernels_cu, on a GPU or a simulated one.

The device says where arrays are and how kernels run; what is launched is the same for both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cumla.backends import BackendUnavailable
from cumla.backends.problems import (
    DenseDecode,
    MergeAttention,
    MhaVarlen,
    MhaVarlenBackward,
    SparseDecode,
    SparsePrefill,
    TokenPool,
)
from cumla.fp8 import ScaleRule
from cumla.kernels import cache, combine, decode, merge, schedule
from cumla.kernels.device import Call, DeviceArray
from cumla.layouts import KVLayout
from cumla.schedule import METADATA_FIELDS, DecodePlan

Array = NDArray[Any]

# Of the plans that the backend makes: KV tokens in a block, and what a piece costs beside its own.
_BLOCK_SIZE = 64
_OVERHEAD = 5


class Device(Protocol):
    """A GPU, or a simulated one."""

    def call(self, *, stream: Any = None, workspace: Any = None) -> AbstractContextManager[Call]:
        """Start a call of an op on a stream; scratch memory comes from `workspace` if given."""

    def as_array(self, array: Array) -> Array:
        """A NumPy array as callers hold arrays."""

    def empty_pages(self, layout: KVLayout, num_pages: int, page_size: int) -> Array:
        """A zeroed page pool for one KV head, where kernels can write to it."""

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """An array of the kind that callers hold, uninitialised."""


@dataclass(frozen=True)
class _Plan:
    """A plan where the kernels can read it, and room for the pieces of requests that it splits."""

    block_size: int
    kv_lens: DeviceArray
    metadata: DeviceArray
    num_splits: DeviceArray
    o_accum: DeviceArray | None
    lse_accum: DeviceArray | None


class KernelBackend:
    """See `cumla.backends.Backend`."""

    def __init__(self, name: str, device: Device) -> None:
        self.name = name
        self.device = device

    def result_dtype(self, dtype: DTypeLike) -> np.dtype[Any]:
        return np.dtype(dtype)

    def as_array(self, array: Array) -> Array:
        return self.device.as_array(array)

    def empty_pages(self, layout: KVLayout, num_pages: int, page_size: int) -> Array:
        return self.device.empty_pages(layout, num_pages, page_size)

    def write_rows(
        self, pages: Array, layout: KVLayout, slots: Array, rows: Array, rule: ScaleRule | None
    ) -> None:
        with self.device.call() as call:
            cache.append_rows(call, pages, layout, slots, rows, rule)

    def read_rows(self, pages: Array, layout: KVLayout, slots: Array) -> Array:
        rows = self.device.empty((len(slots), layout.d_qk), layout.compute_dtype)
        if len(slots):
            with self.device.call() as call:
                cache.gather_rows(call, pages, layout, slots, rows)
        return rows

    def token_slots(
        self, positions: Array, block_table: Array, num_pages: int, page_size: int
    ) -> Array:
        """The slots, int32 [b, s_q, topk], of positions in requests; see cache.token_slots."""
        slots = self.device.empty(positions.shape, np.int32)
        with self.device.call() as call:
            cache.token_slots(call, positions, block_table, num_pages, page_size, slots)
        return slots

    def copy_page(self, pages: Array, layout: KVLayout, source: int, target: int) -> None:
        with self.device.call() as call:
            cache.copy_page(call, pages, layout, source, target)

    def dense_num_parts(self, layout: KVLayout, s_q: int, h_q: int, h_kv: int) -> int:
        """How many parts `dense_decode` plans for if it is given no plan."""
        with self.device.call() as call:
            return decode.dense_num_parts(call, layout, s_q, h_q, h_kv)

    def sparse_num_parts(self, layout: KVLayout, s_q: int, h_q: int) -> int:
        """How many parts `sparse_decode` plans for if it is given no plan."""
        with self.device.call() as call:
            return decode.sparse_num_parts(call, layout, s_q, h_q)

    def dense_decode(self, problem: DenseDecode) -> None:
        _, s_q, h_q, _ = problem.q.shape
        h_kv = problem.kv_cache.shape[2]
        with self.device.call(stream=problem.stream, workspace=problem.workspace) as call:
            seqlens = call.read(problem.cache_seqlens)
            if problem.plan is None:
                num_parts = decode.dense_num_parts(call, problem.layout, s_q, h_q, h_kv)
                room = decode.dense_room(problem.block_table.shape[1], problem.kv_cache.shape[1])
                lengths = {"kv_lens": seqlens, "max_length": room}
                plan = _new_plan(call, problem.out.shape, num_parts, lengths)
            else:
                plan = _given_plan(call, problem.out.shape, problem.plan)
            out, lse = call.write(problem.out), call.write(problem.lse)
            decode.dense_decode(
                call,
                q=call.read(problem.q),
                kv_cache=call.read(problem.kv_cache),
                layout=problem.layout,
                block_table=call.read(problem.block_table),
                cache_seqlens=seqlens,
                softmax_scale=problem.softmax_scale,
                causal=problem.causal,
                block_size=plan.block_size,
                metadata=plan.metadata,
                num_splits=plan.num_splits,
                o_accum=plan.o_accum,
                lse_accum=plan.lse_accum,
                out=out,
                lse=lse,
                aligned=decode.alignment(problem.q, problem.out),
            )
            _combine(call, plan, None, out, lse)

    def sparse_decode(self, problem: SparseDecode) -> None:
        _, s_q, h_q, _ = problem.q.shape
        layout = problem.main.layout
        with self.device.call(stream=problem.stream, workspace=problem.workspace) as call:
            main = _selection(call, problem.main)
            extra = None if problem.extra is None else _selection(call, problem.extra)
            if problem.plan is None:
                num_parts = decode.sparse_num_parts(call, layout, s_q, h_q)
                lengths = _lengths(main, "") | _lengths(extra, "extra_")
                plan = _new_plan(call, problem.out.shape, num_parts, lengths)
            else:
                plan = _given_plan(call, problem.out.shape, problem.plan)
            out, lse = call.write(problem.out), call.write(problem.lse)
            sink = None if problem.attn_sink is None else call.read(problem.attn_sink)
            decode.sparse_decode(
                call,
                q=call.read(problem.q),
                main=main,
                extra=extra,
                layout=layout,
                attn_sink=sink,
                softmax_scale=problem.softmax_scale,
                block_size=plan.block_size,
                kv_lens=plan.kv_lens,
                metadata=plan.metadata,
                num_splits=plan.num_splits,
                o_accum=plan.o_accum,
                lse_accum=plan.lse_accum,
                out=out,
                lse=lse,
                aligned=decode.alignment(problem.q, problem.out),
            )
            _combine(call, plan, sink, out, lse)

    def sparse_prefill(self, problem: SparsePrefill) -> None:
        self._has_no("sparse_prefill")

    def mha_varlen(self, problem: MhaVarlen) -> None:
        self._has_no("mha_varlen")

    def mha_varlen_backward(self, problem: MhaVarlenBackward) -> None:
        self._has_no("mha_varlen_backward")

    def merge_attention(self, problem: MergeAttention) -> None:
        with self.device.call(stream=problem.stream) as call:
            merge.merge_attention(
                call, outs=problem.outs, lses=problem.lses, out=problem.out, lse=problem.lse
            )

    def _has_no(self, op: str) -> NoReturn:
        raise BackendUnavailable(
            f"{op}: backend {self.name!r} has no kernels for it yet. Pass NumPy arrays, and let "
            "them run on the 'numpy' backend."
        )


def _new_plan(
    call: Call, out_shape: tuple[int, ...], num_parts: int, lengths: dict[str, Any]
) -> _Plan:
    """A plan that a kernel makes for `num_parts` parts.

    Args:
        out_shape: (b, s_q, h_q, d_v).
        lengths: what `schedule.plan_decode` needs to know of the requests' lengths.
    """
    batch = out_shape[0]
    kv_lens = call.empty((batch,), np.int32)
    metadata = call.empty((num_parts, len(METADATA_FIELDS)), np.int32)
    num_splits = call.empty((batch + 1,), np.int32)
    schedule.plan_decode(
        call,
        **lengths,
        num_parts=num_parts,
        block_size=_BLOCK_SIZE,
        overhead=_OVERHEAD,
        metadata=metadata,
        num_splits=num_splits,
        lengths_out=kv_lens,
    )
    room = _room(call, out_shape, batch + num_parts)
    return _Plan(_BLOCK_SIZE, kv_lens, metadata, num_splits, *room)


def _given_plan(call: Call, out_shape: tuple[int, ...], plan: DecodePlan) -> _Plan:
    """The caller's plan."""
    # A plan on a GPU does not tell here how many pieces it has.
    on_host = isinstance(plan.num_splits, np.ndarray)
    split = not on_host or plan.num_pieces > plan.batch
    return _Plan(
        plan.block_size,
        call.read(plan.kv_lens),
        call.read(plan.tile_scheduler_metadata),
        call.read(plan.num_splits),
        *(_room(call, out_shape, plan.batch + plan.num_parts) if split else (None, None)),
    )


def _room(
    call: Call, out_shape: tuple[int, ...], slots: int
) -> tuple[DeviceArray | None, DeviceArray | None]:
    """o_accum and lse_accum for so many pieces."""
    return (
        call.empty((slots, *out_shape[1:]), np.float32),
        call.empty((slots, *out_shape[1:3]), np.float32),
    )


def _combine(
    call: Call, plan: _Plan, attn_sink: DeviceArray | None, out: DeviceArray, lse: DeviceArray
) -> None:
    """Join the pieces of requests that were split, if there can be any."""
    if plan.o_accum is not None and plan.lse_accum is not None:
        combine.combine(
            call,
            o_accum=plan.o_accum,
            lse_accum=plan.lse_accum,
            num_splits=plan.num_splits,
            attn_sink=attn_sink,
            out=out,
            lse=lse,
        )


def _selection(call: Call, pool: TokenPool) -> decode.Selection:
    length = None if pool.topk_length is None else call.read(pool.topk_length)
    return decode.Selection(call.read(pool.pages), call.read(pool.indices), length)


def _lengths(of: decode.Selection | None, prefix: str) -> dict[str, Any]:
    """What the planner needs to know of a pool's selection."""
    if of is None:
        return {}
    return {prefix + "topk": of.indices.shape[2], prefix + "topk_length": of.topk_length}
