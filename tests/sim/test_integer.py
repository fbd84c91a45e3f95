"""Integer arithmetic against Python's integers. PTX ISA "Integer Arithmetic Instructions"."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from cumla.sim.isa.table import Unsupported
from cumla.sim.ptx.syntax import Immediate, Register
from sim.ints import array, check, run_op, samples, width_of, wrap
from sim.ops import op

INTEGERS = ["u16", "s16", "u32", "s32", "u64", "s64"]
SIGNED = ["s16", "s32", "s64"]
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
D, A, B, C = (Register(f"%r{i}") for i in range(4))


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def saturate(value: int) -> int:
    return clamp(value, -(2**31), 2**31 - 1)


@pytest.mark.parametrize("kind", INTEGERS)
def test_add_sub(kind: str) -> None:
    check(f"add.{kind}", [kind, kind], lambda a, b: a + b)
    check(f"sub.{kind}", [kind, kind], lambda a, b: a - b)


def test_saturating_add_sub() -> None:
    check("add.sat.s32", ["s32", "s32"], lambda a, b: saturate(a + b))
    check("sub.sat.s32", ["s32", "s32"], lambda a, b: saturate(a - b))


def halves(value: int, signed: bool) -> list[int]:
    kind = "s16" if signed else "u16"
    return [wrap(value, kind), wrap(value >> 16, kind)]


def joined(values: list[int]) -> int:
    return values[0] & 0xFFFF | (values[1] & 0xFFFF) << 16


PACKED = [v | w << 16 for v, w in product([0, 1, 5, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF], repeat=2)]
PACKED_PAIRS = list(product(PACKED, repeat=2))


@pytest.mark.parametrize("kind", ["u16x2", "s16x2"])
def test_packed(kind: str) -> None:
    signed = kind[0] == "s"

    def of_halves(function):
        return lambda a, b: joined(
            [function(x, y) for x, y in zip(halves(a, signed), halves(b, signed), strict=True)]
        )

    cases = [(f"add.{kind}", lambda x, y: x + y), (f"min.{kind}", min), (f"max.{kind}", max)]
    if signed:
        cases += [
            ("min.relu.s16x2", lambda x, y: max(min(x, y), 0)),
            ("max.relu.s16x2", lambda x, y: max(x, y, 0)),
            ("min.s16x2.relu", lambda x, y: max(min(x, y), 0)),
            ("max.s16x2.relu", lambda x, y: max(x, y, 0)),
        ]
    for name, function in cases:
        check(name, ["b32", "b32"], of_halves(function), rows=PACKED_PAIRS)


@pytest.mark.parametrize("kind", INTEGERS)
def test_mul_mad(kind: str) -> None:
    width = width_of(kind)
    check(f"mul.lo.{kind}", [kind] * 2, lambda a, b: a * b)
    check(f"mul.hi.{kind}", [kind] * 2, lambda a, b: a * b >> width)
    some = list(product(samples(kind, 3), samples(kind, 3), samples(kind, 0)[::3]))
    check(f"mad.lo.{kind}", [kind] * 3, lambda a, b, c: a * b + c, rows=some)
    check(f"mad.hi.{kind}", [kind] * 3, lambda a, b, c: (a * b >> width) + c, rows=some)


def test_high_product_of_many_random_numbers() -> None:
    rng = np.random.default_rng(1)
    for kind in ("u64", "s64"):
        a, b = (rng.integers(0, 2**64, 4000, np.uint64) for _ in range(2))
        rows = [(wrap(int(x), kind), wrap(int(y), kind)) for x, y in zip(a, b, strict=True)]
        check(f"mul.hi.{kind}", [kind] * 2, lambda x, y: x * y >> 64, rows=rows)


@pytest.mark.parametrize("kind", list(WIDE))
def test_wide(kind: str) -> None:
    wide = WIDE[kind]
    check(f"mul.wide.{kind}", [kind] * 2, lambda a, b: a * b)
    some = list(product(samples(kind, 3), samples(kind, 3), samples(wide, 0)[::3]))
    check(f"mad.wide.{kind}", [kind, kind, wide], lambda a, b, c: a * b + c, rows=some)
    for factor in (4, -858993459, 0x7FFF, -1, 0xFFFFFFFF):
        operands = (D, A, Immediate(factor))
        rows = [(a, wrap(factor, kind)) for a in samples(kind)]
        check(f"mul.wide.{kind}", [kind] * 2, lambda a, b: a * b, operands, rows)


def test_saturating_mad() -> None:
    check("mad.hi.sat.s32", ["s32"] * 3, lambda a, b, c: saturate((a * b >> 32) + c))


def low24(value: int, kind: str) -> int:
    value &= 0xFFFFFF
    return value - (1 << 24) if kind == "s32" and value >> 23 else value


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_24_bits(kind: str) -> None:
    values = [*samples(kind), *(wrap(v, kind) for v in (0x7FFFFF, 0x800000, 0xFFFFFF, 0x1000001))]
    rows = list(product(values, repeat=2))

    def times(a: int, b: int) -> int:
        return low24(a, kind) * low24(b, kind)

    check(f"mul24.lo.{kind}", [kind] * 2, times, rows=rows)
    check(f"mul24.hi.{kind}", [kind] * 2, lambda a, b: times(a, b) >> 16, rows=rows)
    rows = list(product(values[::2], values, samples(kind, 0)[::2]))
    check(f"mad24.lo.{kind}", [kind] * 3, lambda a, b, c: times(a, b) + c, rows=rows)
    check(f"mad24.hi.{kind}", [kind] * 3, lambda a, b, c: (times(a, b) >> 16) + c, rows=rows)
    if kind == "s32":
        check(
            "mad24.hi.sat.s32",
            [kind] * 3,
            lambda a, b, c: saturate((times(a, b) >> 16) + c),
            rows=rows,
        )


@pytest.mark.parametrize("kind", INTEGERS)
def test_sad(kind: str) -> None:
    rows = list(product(samples(kind, 3), samples(kind, 3), samples(kind, 0)[::3]))
    check(f"sad.{kind}", [kind] * 3, lambda a, b, c: abs(a - b) + c, rows=rows)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


@pytest.mark.parametrize("kind", INTEGERS)
def test_div_rem(kind: str) -> None:
    check(f"div.{kind}", [kind] * 2, lambda a, b: truncated(a, b) if b else -1)
    check(f"rem.{kind}", [kind] * 2, lambda a, b: a - truncated(a, b) * b if b else a)
    nonzero = [row for row in product(samples(kind), repeat=2) if row[1]]
    check(f"div.{kind}", [kind] * 2, truncated, rows=nonzero)


def test_16_bit_numbers_divided_by_each_divisor() -> None:
    every = np.arange(-(2**15), 2**15).astype(np.int16)
    for divisor in (-(2**15), -7, -1, 1, 3, 10, 2**15 - 1):
        operand = np.full(every.shape, divisor, np.int16)
        (quotient,) = run_op(op("div.s16"), every, operand)
        (remainder,) = run_op(op("rem.s16"), every, operand)
        exact = np.trunc(every / np.float64(divisor))
        np.testing.assert_array_equal(quotient, exact.astype(np.int64).astype(np.int16))
        np.testing.assert_array_equal(remainder, every - exact * divisor)


@pytest.mark.parametrize("kind", SIGNED)
def test_abs_neg(kind: str) -> None:
    check(f"abs.{kind}", [kind], abs)
    check(f"neg.{kind}", [kind], lambda a: -a)


def test_abs_neg_of_every_16_bit_number() -> None:
    every = [(a,) for a in range(-(2**15), 2**15)]
    check("abs.s16", ["s16"], abs, rows=every)
    check("neg.s16", ["s16"], lambda a: -a, rows=every)


@pytest.mark.parametrize("kind", INTEGERS)
def test_min_max(kind: str) -> None:
    check(f"min.{kind}", [kind] * 2, min)
    check(f"max.{kind}", [kind] * 2, max)


def test_relu() -> None:
    for name in ("min.relu.s32", "min.s32.relu"):
        check(name, ["s32"] * 2, lambda a, b: max(min(a, b), 0))
    for name in ("max.relu.s32", "max.s32.relu"):
        check(name, ["s32"] * 2, lambda a, b: max(a, b, 0))


def pieces(value: int, size: int, kind: str) -> list[int]:
    """A register as numbers of some bits, signed for .s32."""
    mask = (1 << size) - 1
    values = [value >> at & mask for at in range(0, 32, size)]
    return [v - (1 << size) if kind == "s32" and v >> (size - 1) else v for v in values]


BYTES = [0, 0xFFFFFFFF, 0x80808080, 0x7F7F7F7F, 0x80FF017F, 0x01020304, 0xFF80007F, 0x12345678]
SUMS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]


@pytest.mark.parametrize("a_kind", ["u32", "s32"])
@pytest.mark.parametrize("b_kind", ["u32", "s32"])
def test_dot_products(a_kind: str, b_kind: str) -> None:
    rows = list(product(BYTES, BYTES, SUMS))

    def dot4(a: int, b: int, c: int) -> int:
        return c + sum(np.multiply(pieces(a, 8, a_kind), pieces(b, 8, b_kind)).tolist())

    check(f"dp4a.{a_kind}.{b_kind}", ["b32", "b32", "s32"], dot4, rows=rows)
    for mode, first in (("lo", 0), ("hi", 2)):

        def dot2(a: int, b: int, c: int, first: int = first) -> int:
            factors = pieces(b, 8, b_kind)[first : first + 2]
            return c + sum(np.multiply(pieces(a, 16, a_kind), factors).tolist())

        check(f"dp2a.{mode}.{a_kind}.{b_kind}", ["b32", "b32", "s32"], dot2, rows=rows)


CARRY_TYPES = ["u32", "s32", "u64", "s64"]


@pytest.mark.parametrize("kind", CARRY_TYPES)
def test_carry(kind: str) -> None:
    bits = "u" + kind[1:]
    top = 1 << width_of(kind)

    def split(total: int) -> tuple[int, bool]:
        return total, total >= top

    def borrow(total: int) -> tuple[int, bool]:
        return total, total < 0

    check(f"add.cc.{kind}", [bits] * 2, lambda a, b: split(a + b))
    check(f"addc.{kind}", [bits, bits, "cc"], lambda a, b, c: a + b + c)
    check(f"addc.cc.{kind}", [bits, bits, "cc"], lambda a, b, c: split(a + b + c))
    check(f"sub.cc.{kind}", [bits] * 2, lambda a, b: borrow(a - b))
    check(f"subc.{kind}", [bits, bits, "cc"], lambda a, b, c: a - b - c)
    check(f"subc.cc.{kind}", [bits, bits, "cc"], lambda a, b, c: borrow(a - b - c))


@pytest.mark.parametrize("kind", CARRY_TYPES)
def test_mad_with_carry(kind: str) -> None:
    bits = "u" + kind[1:]
    width = width_of(kind)
    top = 1 << width
    some = list(product(samples(kind, 2)[::2], samples(kind, 2)[::2], samples(bits, 0)[::2]))
    with_carry = [(*row, carry) for row in some for carry in (0, 1)]
    for mode, shift in (("lo", 0), ("hi", width)):

        def total(a: int, b: int, c: int, carry: int = 0, shift: int = shift) -> int:
            return (a * b >> shift) % top + c + carry

        def both(*row: int) -> tuple[int, bool]:
            return total(*row), total(*row) >= top

        check(f"mad.{mode}.cc.{kind}", [kind, kind, bits], both, rows=some)
        check(f"madc.{mode}.{kind}", [kind, kind, bits, "cc"], total, rows=with_carry)
        check(f"madc.{mode}.cc.{kind}", [kind, kind, bits, "cc"], both, rows=with_carry)


def test_128_bit_sum_and_difference_by_parts() -> None:
    rng = np.random.default_rng(2)
    parts = [rng.integers(0, 2**32, 200, np.uint64).astype(np.uint32) for _ in range(8)]
    parts[1][:50] = parts[5][:50] = 0xFFFFFFFF
    a, b = parts[:4], parts[4:]
    for first, rest, sign in (("add.cc.u32", "addc.cc.u32", 1), ("sub.cc.u32", "subc.cc.u32", -1)):
        low, carry = run_op(op(first), a[0], b[0])
        total = [int(v) for v in low]
        for i in (1, 2, 3):
            digit, carry = run_op(op(rest), a[i], b[i], carry)
            total = [t | int(d) << 32 * i for t, d in zip(total, digit, strict=True)]
        for lane in range(200):
            x, y = (sum(int(p[lane]) << 32 * i for i, p in enumerate(v)) for v in (a, b))
            assert total[lane] == (x + sign * y) % 2**128


@pytest.mark.parametrize(
    "name",
    [
        *("add.sat.u32", "add.u32.sat", "sub.s16x2", "add.rn.s32", "add.cc.s16", "sub.sat.cc.s32"),
        *("mul.s32", "mul.wide.u64", "mul.hi.sat.s32", "mad.lo.sat.s32", "mad.wide.s64"),
        *("mad.wide.cc.u32", "mad.sat.cc.s32", "mul24.hi.s64", "mul24.s32", "mul24.hi.sat.s32"),
        *("mad24.lo.sat.s32", "mad24.hi.sat.u32", "sad.b32", "div.rn.s32", "rem.sat.u32"),
        *("abs.ftz.s32", "neg.sat.s32", "min.relu.u32", "min.relu.s16", "max.relu.relu.s32"),
        *("max.relu.u16x2", "min.relu", "dp4a.u32", "dp4a.u32.s16", "dp2a.u32.u32"),
        *("dp2a.lo.u32.u16", "addc.cc.u16", "subc.sat.s32", "madc.wide.u32", "madc.lo.sat.s32"),
    ],
)
def test_unknown_forms(name: str) -> None:
    with pytest.raises(Unsupported):
        op(name)


def test_division_does_not_warn() -> None:
    """What the launch switches off are floating-point errors; nothing else may come."""
    for kind in SIGNED:
        low = array([-(1 << (width_of(kind) - 1))], kind)
        assert run_op(op(f"div.{kind}"), low, array([-1], kind))[0] == low
        assert run_op(op(f"rem.{kind}"), low, array([-1], kind))[0] == 0
