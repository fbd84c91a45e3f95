"""Join the results of attention over disjoint key sets: kernels_cu/portable/combine/merge.cuh."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.fp8 import BF16
from cumla.kernels.device import Call, Program
from cumla.kernels.formats import number_type

Array = NDArray[Any]

_WARPS = 8
"""kernels_cu's MERGE_WARPS."""
_INPUTS = (2, 8)
"""Results that a launch joins, of each instantiation."""
_FIRST, _LAST = 1, 2


def merge_attention(
    call: Call, *, outs: Sequence[Array], lses: Sequence[Array], out: Array, lse: Array
) -> None:
    """Launch the kernel, once for each run of up to eight results with the same strides.

    Args:
        outs: n >= 1 results [..., h, d_v] of three or four dimensions; bfloat16, float16 or
            float32, any strides.
        lses: n arrays of outs[i].shape[:-1], float32, any strides. What their infinities mean: as
            in `cumla.merge_attention`.
        out, lse: as each of them, in memory of their own; written.
    """
    *outer, d_v = out.shape
    sizes = [1] * (3 - len(outer)) + outer
    rows = math.prod(outer)
    if not rows:
        return
    most = _INPUTS[-1]
    given = list(zip(outs, lses, strict=True))
    groups: list[list[tuple[Array, Array]]] = []
    for _, same in groupby(given, lambda one: [_steps(one[0], 4), _steps(one[1], 3)]):
        run = list(same)
        groups += [run[i : i + most] for i in range(0, len(run), most)]
    state: list[Any] = [None, None]
    if len(groups) > 1:
        state = [
            call.empty((rows, 2), np.float32),
            call.empty((rows, -(-d_v // 8) * 8), np.float32),
        ]
    results = [call.write(out), *_steps(out, 4), call.write(lse), *_steps(lse, 3)]
    for number, group in enumerate(groups):
        missing = [None] * (most - len(group))
        phase = _FIRST * (number == 0) | _LAST * (number == len(groups) - 1)
        call.launch(
            _program(out.dtype, next(one for one in _INPUTS if one >= len(group))),
            grid=-(-rows // _WARPS),
            block=32 * _WARPS,
            args=[
                *(call.read(one) for one, _ in group),
                *missing,
                *_steps(group[0][0], 4),
                *(call.read(one) for _, one in group),
                *missing,
                *_steps(group[0][1], 3),
                *map(np.uint32, (len(group), rows, *sizes[1:], d_v, phase)),
                *state,
                *results,
            ],
        )


def _program(dtype: np.dtype[Any], inputs: int) -> Program:
    expression = f"cumla::merge_results<{number_type(dtype)}, {inputs}>"
    return Program("portable/combine/merge.cuh", expression)


def _steps(array: Array, dimensions: int) -> list[np.int64]:
    """The strides in elements, of as many dimensions: those in front have size 1.

    A stride over one element does not count, and is 0 so that equal places have equal strides.
    """
    steps = [
        np.int64(step // array.itemsize if size > 1 else 0)
        for step, size in zip(array.strides, array.shape, strict=True)
    ]
    return [np.int64(0)] * (dimensions - len(steps)) + steps


def instances(target_shared_bytes: int) -> Iterator[tuple[Program, int, int]]:
    """All instantiations, the threads of a block, and its dynamic shared memory."""
    for dtype in (BF16, np.dtype(np.float16), np.dtype(np.float32)):
        for inputs in _INPUTS:
            yield _program(dtype, inputs), 32 * _WARPS, 0
