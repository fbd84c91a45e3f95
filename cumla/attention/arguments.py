"""What the ops' checks have in common: queries, lengths, sinks, plans, results."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cumla.attention.plan import decode_workspace_bytes
from cumla.backends import Backend
from cumla.backends.arrays import Arrays, is_cupy, shares_memory
from cumla.checks import (
    bad_type,
    bad_value,
    check_dtype,
    check_in_range,
    check_last_stride,
    check_shape,
)
from cumla.fp8 import BF16
from cumla.kernels.device import address_of
from cumla.schedule import DecodePlan

Array = NDArray[Any]
HALF_DTYPES = (BF16, np.dtype(np.float16))
_PAGES_ALIGNMENT = 16


def check_half(
    argument: str,
    array: Array,
    shape: tuple[str | int, ...],
    dtype: DTypeLike | None = None,
    *,
    may_be_empty: bool = False,
) -> None:
    """Raise unless `array` is bf16 or fp16 (or just `dtype`) of that shape.

    No dimension may be 0, but for the first one if `may_be_empty`.
    """
    check_dtype(argument, array, HALF_DTYPES if dtype is None else [dtype])
    check_shape(argument, array, shape)
    if 0 in (array.shape[1:] if may_be_empty else array.shape):
        raise bad_value(
            argument, f"shape {array.shape}", "no dimension may be 0", "Skip the call instead."
        )
    check_last_stride(argument, array)


def check_indices(argument: str, array: Array, shape: tuple[str | int, ...]) -> None:
    """Raise unless `array` is int32 of that shape, with at least one index for each query."""
    check_dtype(argument, array, [np.int32])
    check_shape(argument, array, shape)
    if array.shape[-1] == 0:
        raise bad_value(
            argument,
            f"shape {array.shape}",
            "the last dimension must be at least 1",
            "Pass -1 for a query that selects nothing.",
        )
    check_last_stride(argument, array)


def check_lengths(
    argument: str, lengths: Array, shapes: tuple[tuple[int, ...], ...], high: int, reason: str
) -> None:
    """Raise unless `lengths` is int32 of one of `shapes` and every entry is in [0, high].

    What an array on a GPU holds is not looked at: that would wait for the GPU.
    """
    check_dtype(argument, lengths, [np.int32])
    if lengths.shape not in shapes:
        raise bad_value(
            argument,
            f"shape {lengths.shape}",
            "it must be " + " or ".join(str(list(one)) for one in shapes),
            "Pass one length for each request or query.",
        )
    if not is_cupy(lengths):
        check_in_range(argument, lengths, high, reason)


def check_sink(sink: Array | None, h_q: int) -> None:
    """Raise unless `sink` is None or float32 [h_q]."""
    if sink is not None:
        check_dtype("attn_sink", sink, [np.float32])
        check_shape("attn_sink", sink, [h_q])


def check_heads(h_q: int, h_kv: int) -> None:
    """Raise unless every KV head serves the same number of query heads."""
    if h_q % h_kv:
        raise bad_value(
            "q",
            f"{h_q} query heads for {h_kv} KV heads",
            "h_q must be a multiple of h_kv",
            "Pad the query heads.",
        )


def check_pages_base(argument: str, pages: Array, backend: Backend) -> None:
    """Raise if kernels are to run over pages that begin where they cannot read 16 bytes at once."""
    if backend.name == "numpy" and not is_cupy(pages):
        return
    address = address_of(pages)
    if address % _PAGES_ALIGNMENT:
        raise bad_value(
            argument,
            f"pages at address {address:#x}",
            f"it must be a multiple of {_PAGES_ALIGNMENT}",
            "Slice a buffer at such a multiple, or copy the pages.",
        )


def check_flag(argument: str, value: Any) -> None:
    """Raise unless `value` is a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise bad_type(argument, repr(value), "it must be True or False", "Pass a bool.")


def check_plan(plan: Any, argument: str, kv_lens: NDArray[np.int32]) -> None:
    """Raise unless `plan` is None or a DecodePlan for just the lengths of this call.

    With lengths on a GPU only their number counts: what they are is not looked at.
    """
    check_plan_type(plan)
    if plan is None:
        return
    if is_cupy(kv_lens):
        check_plan_batch(plan, argument, len(kv_lens))
        return
    check_plan_on_cpu(plan)
    plan.check_lengths(argument, kv_lens)


def check_plan_type(plan: Any) -> None:
    """Raise unless `plan` is None or a DecodePlan."""
    if plan is not None and not isinstance(plan, DecodePlan):
        raise bad_type(
            "plan", repr(plan), "it must be a cumla.DecodePlan", "Make it with cumla.plan_decode."
        )


def check_plan_on_cpu(plan: DecodePlan) -> None:
    """Raise if `plan` was made on a GPU."""
    if is_cupy(plan.kv_lens):
        raise bad_value(
            "plan",
            "a plan on a GPU",
            "the arrays are on the CPU",
            "Plan from lengths on the CPU: cumla.plan_decode(cupy.asnumpy(lengths), ...).",
        )


def check_plan_batch(plan: DecodePlan, argument: str, batch: int) -> None:
    """Raise unless `plan` is for so many requests."""
    if plan.batch != batch:
        raise bad_value(
            argument,
            f"a batch of {batch}",
            f"the plan was made for a batch of {plan.batch}",
            "Plan again: call cumla.plan_decode with the lengths of this step.",
        )


def check_workspace(
    workspace: Array | None, plan: DecodePlan | None, rows: tuple[int, int, int]
) -> None:
    """Raise unless `workspace` is None or bytes that a GPU can use, enough of them for `plan`.

    rows: b, s_q and h_q.
    """
    if workspace is None:
        return
    check_dtype("workspace", workspace, [np.uint8])
    if not workspace.flags.c_contiguous:
        raise bad_value(
            "workspace", f"strides {workspace.strides}", "it must be contiguous", "Copy it."
        )
    if plan is None or not is_cupy(workspace):
        return
    need = decode_workspace_bytes(*rows, plan.num_parts)
    if workspace.nbytes < need:
        raise bad_value(
            "workspace",
            f"{workspace.nbytes} bytes",
            f"b, s_q, h_q = {rows} and {plan.num_parts} parts need {need}",
            "Ask cumla.decode_workspace_bytes for the size.",
        )


def result_array(arrays: Arrays, argument: str, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Where a result goes: the array passed as `argument`, checked, or a new one.

    Within `arrays.place`.
    """
    dtype = arrays.backend.result_dtype(dtype)
    given = arrays.optional(argument)
    if given is None:
        return arrays.empty(shape, dtype)
    check_dtype(argument, given, [dtype])
    check_shape(argument, given, shape)
    if arrays.is_read_only(argument):
        raise bad_value(
            argument, "a read-only array", "results are written to it", "Pass a writable one."
        )
    for name, other in arrays.items():
        if name != argument and shares_memory(given, other):
            raise bad_value(
                argument,
                f"an array that shares memory with {name}",
                "what is written to it must not change another argument",
                "Pass memory of its own.",
            )
    if any(step == 0 and size > 1 for step, size in zip(given.strides, given.shape, strict=True)):
        raise bad_value(
            argument,
            f"strides {given.strides}",
            "elements of a result must not share memory",
            "Pass an array that was not broadcast.",
        )
    return given
