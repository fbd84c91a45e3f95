"""merge_attention: join the results of attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.attention.arguments import HALF_DTYPES, result_array
from cumla.backends.arrays import Arrays
from cumla.backends.problems import MergeAttention
from cumla.checks import bad_type, bad_value, check_dtype, check_shape

Array = NDArray[Any]


def merge_attention(
    outs: Sequence[Any],
    lses: Sequence[Any],
    *,
    out: Any = None,
    lse: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Attention over the union of disjoint key sets, from the results over each of them.

    out = sum_i exp(lse_i - lse) out_i, with lse = ln sum_i exp(lse_i). Apply an attention sink
    after the merge, not before.

    Args:
        outs: n >= 1 results, bfloat16, float16 or float32, all of one dtype and shape, either
            [b, s_q, h_q, d_v] as the decode ops return or [total_q, h_q, d_v] as the others do.
        lses: their n lses, float32, natural log, as the same op returned them: [b, h_q, s_q] for
            outs of four dimensions, [total_q, h_q] for three. An lse of +inf or -inf marks a row
            without a key; its out does not count. (With +inf and an out of NaN, as the ops return
            for a row that met a NaN, the merged row is NaN.)
        out, lse: where to put the results, of their shapes and dtypes.
        stream: a CUDA stream, for arrays on a GPU.

    Returns:
        out and lse, shaped and typed as each of outs and lses. A row that has no key in any of
        them gives 0 and +inf.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the arrays are on a GPU that cannot be used.
    """
    for name, value in (("outs", outs), ("lses", lses)):
        if not isinstance(value, (list, tuple)):
            raise bad_type(
                name, type(value).__name__, "it must be a list of arrays", "Wrap it in a list."
            )
    if not outs or len(outs) != len(lses):
        raise bad_value(
            "lses",
            f"{len(lses)} lses for {len(outs)} outs",
            "there must be as many as outs, and at least one",
            "Pass the lse of every result.",
        )
    given = {f"outs[{i}]": one for i, one in enumerate(outs)}
    given |= {f"lses[{i}]": one for i, one in enumerate(lses)}
    for name, value in given.items():
        if value is None:
            raise bad_type(name, "None", "it must be an array", "Leave missing results out.")
    arrays = Arrays(**given, out=out, lse=lse, stream=stream)
    backend = arrays.backend
    first = arrays["outs[0]"]
    check_dtype("outs[0]", first, [*HALF_DTYPES, np.float32, backend.result_dtype(np.float32)])
    if first.ndim not in (3, 4):
        raise bad_value(
            "outs[0]",
            f"shape {first.shape}",
            "it must be [b, s_q, h_q, d_v] or [total_q, h_q, d_v]",
            "Pass results as the ops return them.",
        )
    heads_first = first.ndim == 4
    rows = first.shape[:-1]
    lse_shape = (rows[0], rows[2], rows[1]) if heads_first else rows
    for i in range(len(outs)):
        check_dtype(f"outs[{i}]", arrays[f"outs[{i}]"], [first.dtype])
        check_shape(f"outs[{i}]", arrays[f"outs[{i}]"], first.shape)
        check_dtype(
            f"lses[{i}]", arrays[f"lses[{i}]"], [np.float32, backend.result_dtype(np.float32)]
        )
        check_shape(f"lses[{i}]", arrays[f"lses[{i}]"], lse_shape)

    def by_row(array: Array) -> Array:
        return array.swapaxes(1, 2) if heads_first else array

    with arrays.place():
        merged_lse = result_array(arrays, "lse", lse_shape, np.float32)
        problem = MergeAttention(
            outs=tuple(arrays[f"outs[{i}]"] for i in range(len(outs))),
            lses=tuple(by_row(arrays[f"lses[{i}]"]) for i in range(len(lses))),
            out=result_array(arrays, "out", first.shape, first.dtype),
            lse=by_row(merged_lse),
            stream=stream,
        )
        backend.merge_attention(problem)
        return arrays.give_back("out", problem.out), arrays.give_back("lse", merged_lse)
