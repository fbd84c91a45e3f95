"""The arithmetic of wgmma: D = A * B + C on the matrices of many warpgroups at once.

As for mma (mma_panels.py): products are exact, their sum is made in float64, or float32 where that
is exact, and rounded to f32; then C is added and the result rounded to its type. Integers are
exact. Sums of zeros are +0.0, NaN results are 0x7fffffff.

An H200 gives the same bits where sums are exact, and drops bits of the addends elsewhere: f32 sums
of f16, bf16 and tf32 differ by up to 1.2e-7 of the greatest value in D, those of fp8 by up to 4e-4
in f32 and up to 7e-4 in f16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.isa.mma_forms import ELEMENTS, Unpack
from cumla.sim.isa.rounding import NAN_BITS, any_nan, half_bits
from cumla.sim.isa.wgmma_operands import Form, to_fragments

Array = NDArray[Any]
# What a register of D travels as.
KINDS = {"f32": "f32", "f16": "b32", "s32": "s32"}


@cache
def _unpacker(kind: str) -> Unpack:
    return ELEMENTS[kind].unpacker()


def elements(kind: str, words: Array) -> Array:
    """[..., words] uint32 as [..., elements] float32, low elements of a word first."""
    element = ELEMENTS[kind]
    count = 32 // element.room
    planes = np.empty((count, *words.shape), np.uint32)
    values = planes.view(np.float32) if element.exponent else np.empty(planes.shape, np.float32)
    _unpacker(kind)(words, planes, values)
    if count == 1:
        return values[0]
    together = np.moveaxis(values, 0, -1)
    return together.reshape(*words.shape[:-1], words.shape[-1] * count)


def multiply(form: Form, a_words: Array, b_words: Array) -> Array:
    """A * B, negated if the form says so, as fragments: [N / 2, lanes] float32 or int32.

    Args:
        a_words: [warpgroups, 64, 8] uint32; MN-major [warpgroups, 16, 32].
        b_words: [warpgroups, N, 8] uint32; MN-major [warpgroups, 16, N / 2].
    """
    a, b = elements(form.a, a_words), elements(form.b, b_words)
    if form.a_mn_major:
        a = a.swapaxes(1, 2)
    if not form.b_mn_major:
        b = b.swapaxes(1, 2)
    if not form.exact_in_single:
        a, b = a.astype(np.float64), b.astype(np.float64)
    product = np.matmul(a, b)
    if form.negate:
        np.negative(product, product)
    return to_fragments(product.astype(np.int32 if form.d == "s32" else np.float32))


def accumulate(form: Form, product: Array, c: Sequence[Array] | None) -> Array:
    """D as [registers, lanes] from the product's fragments and the registers of C, if any."""
    if c is not None and all(r.shape[0] == 1 and not r.view(np.uint32)[0] for r in c):
        c = None
    if form.d == "s32":
        if c is None:
            return product
        total = gather(c, product.shape, np.int32)
        if form.satfinite:
            wide = total.astype(np.int64) + product
            return np.clip(wide, -(1 << 31), (1 << 31) - 1).astype(np.int32)
        return total + product
    if form.d == "f32":
        if c is None:
            product += np.float32(0)
        else:
            product += gather(c, product.shape, np.float32)
        if any_nan(product.reshape(-1)):
            product.view(np.uint32)[np.isnan(product)] = NAN_BITS
        return product
    # Registers of D in f16 hold the two columns of a row.
    lanes = product.shape[1]
    if c is None:
        product += np.float32(0)
    else:
        halves = gather(c, (form.d_registers, lanes), np.uint32).view(np.float16)
        pairs = halves.reshape(-1, lanes, 2).transpose(0, 2, 1)
        product += pairs.reshape(product.shape).astype(np.float32)
    bits = half_bits(product.reshape(-1), "rn").astype(np.uint32).reshape(-1, 2, lanes)
    packed: Array = bits[:, 0] | bits[:, 1] << np.uint32(16)
    return packed


def gather(registers: Sequence[Array], shape: tuple[int, ...], dtype: Any) -> Array:
    """Registers, [lanes] or [1] each, as one new array."""
    out = np.empty(shape, dtype)
    try:
        np.concatenate(registers, out=out.reshape(-1).view(registers[0].dtype))
    except ValueError:  # some are one value for all lanes
        for row, register in zip(out, registers, strict=True):
            row[:] = register.view(dtype)
    return out
