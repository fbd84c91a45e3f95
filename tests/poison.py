"""Poison: values that no result may ever show, in every byte that an op has no business to read.

NaN for real numbers, an absurd id for integers, and 0x7F or 0xFF for bytes: as e4m3 both are NaN,
as UE8M0 0xFF is NaN and 0x7F the scale 1, as float32 or bf16 0xFFFF... is NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Array = NDArray[Any]

ABSURD_ID = 2147480000
"""As an index, slot, page number or length: far outside anything, and it still fits an int32."""

_BYTES = (0xFF, 0x7F)


def poison(array: Array) -> Array:
    """Overwrite all of `array` (any strides) with the poison of its dtype; return it.

    Real numbers, ml_dtypes' included, become NaN; integers of more than one byte ABSURD_ID; the
    elements of uint8, int8 and float8 arrays, which hold FP8 pages, 0xFF and 0x7F in turn.
    """
    if array.itemsize == 1:
        # Neighbouring elements differ, in whatever direction the array is walked.
        turn = np.indices(array.shape, sparse=True)
        array.view(np.uint8)[...] = np.where(sum(turn, np.zeros((), int)) % 2, _BYTES[1], _BYTES[0])
    elif array.dtype.kind in "iu":
        array[...] = ABSURD_ID
    else:
        array[...] = np.nan
    return array


def scattered(array: Array, pad: int = 128) -> Array:
    """The values of `array` as a view that is not contiguous, with poison all around it.

    Every dimension but the last is one larger in memory, the last `pad` elements larger (half of
    them before, half after), so the last stride is still one element and with the usual pad every
    other stride stays a multiple of 16 bytes, the base too.
    """
    *outer, last = array.shape
    buffer = poison(np.empty([*(size + 1 for size in outer), last + pad], array.dtype))
    inside = [slice(1, None)] * len(outer) + [slice(pad // 2, pad // 2 + last)]
    view: Array = buffer[tuple(inside)]
    view[...] = array
    return view


def with_page_stride(pages: Array, page_bytes: int, stride: int) -> Array:
    """A copy of an FP8 page pool whose pages start every `stride` bytes, with poison in between.

    `pages` is [pages, page_size, 1, row] of one-byte elements; the first `page_bytes` bytes of a
    page are its content. (`scattered` would tear the tokens of an FP8 page apart.)
    """
    num_pages = len(pages)
    # One stride more at the front: poison before the first page too.
    buffer = poison(np.empty((num_pages + 1, stride), np.uint8))[1:]
    content = as_strided(pages.view(np.uint8), (num_pages, page_bytes), (pages.strides[0], 1))
    buffer[:, :page_bytes] = content
    return as_strided(buffer.view(pages.dtype), pages.shape, (stride, *pages.strides[1:]))
