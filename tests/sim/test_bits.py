"""Bit fields, counts and searches against the loops that PTX ISA gives as their semantics."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from cumla.sim.isa.table import Unsupported
from cumla.sim.ptx.syntax import Immediate, Register
from sim.ints import bit, check, samples, width_of
from sim.ops import op

NONE = 0xFFFFFFFF
D, A, B, C = (Register(f"%r{i}") for i in range(4))


def bits_of(value: int, width: int) -> str:
    return f"{value & ((1 << width) - 1):0{width}b}"


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_counts(kind: str) -> None:
    width = width_of(kind)
    powers = [(1 << i) + off for i in range(width) for off in (-1, 0, 1)]
    rows = [(v % (1 << width),) for v in [*powers, *samples(kind)]]
    check(f"popc.{kind}", [kind], lambda a: bits_of(a, width).count("1"), rows=rows)
    check(f"clz.{kind}", [kind], lambda a: width - a.bit_length(), rows=rows)
    check(f"brev.{kind}", [kind], lambda a: int(bits_of(a, width)[::-1], 2), rows=rows)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bfind(kind: str) -> None:
    width = width_of(kind)
    half = 1 << (width - 1)
    powers = [(1 << i) + off for i in range(width) for off in (-1, 0, 1)]
    values = [v for v in powers if v < half * (2 if kind[0] == "u" else 1)]
    if kind[0] == "s":
        values += [-v for v in powers if v <= half]

    def found(a: int) -> int:
        return (~a if a < 0 else a).bit_length() - 1

    rows = [(v,) for v in [*values, *samples(kind)]]
    check(f"bfind.{kind}", [kind], lambda a: found(a) % 2**32, rows=rows)
    check(
        f"bfind.shiftamt.{kind}",
        [kind],
        lambda a: NONE if found(a) < 0 else width - 1 - found(a),
        rows=rows,
    )


def nth_set_bit(mask: int, base: int, offset: int) -> int:
    if not offset:
        return base if base < 32 and bit(mask, base) else NONE
    count, at = abs(offset) - 1, base
    while 0 <= at < 32:
        if bit(mask, at):
            if not count:
                return at
            count -= 1
        at += 1 if offset > 0 else -1
    return NONE


def test_fns() -> None:
    masks = [0, 1, 1 << 31, NONE, 0xAAAAAAAA, 0x80000001, 0x00018000, 0x12345678]
    offsets = [0, 1, -1, 2, -2, 3, 16, -16, 31, 32, -32, 33, 2**31 - 1, -(2**31)]
    rows = list(product(masks, [*range(32), 32, 33, 2**32 - 1], offsets))
    check("fns.b32", ["b32", "u32", "s32"], nth_set_bit, rows=rows)


def extracted(a: int, start: int, length: int, kind: str) -> int:
    width = width_of(kind)
    msb, start, length = width - 1, start & 255, length & 255
    sign = 0
    if kind[0] == "s" and length:
        sign = bit(a, min(start + length - 1, msb))
    value = 0
    for i in range(width):
        inside = i < length and start + i <= msb
        value |= (bit(a, start + i) if inside else sign) << i
    return value


def inserted(a: int, b: int, start: int, length: int, kind: str) -> int:
    width, start, length = width_of(kind), start & 255, length & 255
    for i in range(length):
        if start + i < width:
            b = b & ~(1 << start + i) | bit(a, i) << start + i
    return b


PLACES = [0, 1, 5, 8, 31, 32, 33, 63, 64, 65, 255, 256, 257 + 7, 2**32 - 1]


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bfe(kind: str) -> None:
    def reference(a: int, start: int, length: int) -> int:
        return extracted(a, start, length, kind)

    rows = list(product(samples(kind, 3), PLACES, PLACES))
    check(f"bfe.{kind}", [kind, "u32", "u32"], reference, rows=rows)
    for start, length in product(PLACES, repeat=2):
        operands = (D, A, Immediate(start), Immediate(length))
        rows = [(a, start, length) for a in samples(kind, 3)]
        check(f"bfe.{kind}", [kind, "u32", "u32"], reference, operands, rows)
        one_literal = (D, A, Immediate(start), C)
        check(f"bfe.{kind}", [kind, "u32", "u32"], reference, one_literal, rows[:2])


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_bfi(kind: str) -> None:
    def reference(a: int, b: int, start: int, length: int) -> int:
        return inserted(a, b, start, length, kind)

    ones = (1 << width_of(kind)) - 1
    pairs = [(0, ones), (ones, 0), *product(samples(kind, 1)[::4], repeat=2)]
    rows = [(*pair, *place) for pair in pairs for place in product(PLACES, repeat=2)]
    check(f"bfi.{kind}", [kind, kind, "u32", "u32"], reference, rows=rows)
    for start, length in product(PLACES, repeat=2):
        operands = (D, A, B, Immediate(start), Immediate(length))
        rows = [(*pair, start, length) for pair in pairs[:4]]
        check(f"bfi.{kind}", [kind, kind, "u32", "u32"], reference, operands, rows)


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_szext(mode: str) -> None:
    def reference(a: int, n: int, signed: bool) -> int:
        n = min(n, 32) if mode == "clamp" else n & 31
        value = a & ((1 << n) - 1)
        return value - (1 << n) if signed and n and bit(value, n - 1) else value

    counts = [*range(34), 63, 64, 65, 2**31, 2**32 - 1]
    for kind in ("u32", "s32"):
        rows = list(product(samples(kind, 4), counts))
        signed = kind == "s32"
        check(
            f"szext.{mode}.{kind}",
            [kind, "u32"],
            lambda a, n, signed=signed: reference(a, n, signed),
            rows=rows,
        )


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_bmsk(mode: str) -> None:
    def reference(start: int, length: int) -> int:
        if mode == "clamp":
            return ((1 << min(length, 32)) - 1) << start if start < 32 else 0
        return ((1 << (length & 31)) - 1) << (start & 31)

    counts = [*range(34), 63, 64, 65, 2**31, 2**32 - 1]
    check(f"bmsk.{mode}.b32", ["u32", "u32"], reference, rows=list(product(counts, repeat=2)))


def test_counts_of_many_random_numbers() -> None:
    rng = np.random.default_rng(3)
    values = rng.integers(0, 2**64, 3000, np.uint64) >> rng.integers(0, 64, 3000, np.uint64)
    rows = [(int(v),) for v in values]
    check("clz.b64", ["b64"], lambda a: 64 - a.bit_length(), rows=rows)
    check("brev.b64", ["b64"], lambda a: int(f"{a:064b}"[::-1], 2), rows=rows)
    rows = [(int(v) & NONE,) for v in values]
    check("clz.b32", ["b32"], lambda a: 32 - a.bit_length(), rows=rows)


@pytest.mark.parametrize(
    "name",
    [
        *("popc.u32", "popc", "clz.s32", "bfind.b32", "bfind.shiftamt.u16", "bfind", "fns.u32"),
        *("brev.b16", "bfe.b32", "bfi.u32", "szext.s32", "szext.clamp.s64", "bmsk.clamp.u32"),
        *("szext.rz.s32", "bmsk.b32"),
    ],
)
def test_unknown_forms(name: str) -> None:
    with pytest.raises(Unsupported):
        op(name)
