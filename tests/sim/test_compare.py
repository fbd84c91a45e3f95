"""Comparisons and selections. PTX ISA "Comparison and Selection Instructions".

Floating-point values are compared as Python's own numbers: f16, bf16 and f32 are exact in them.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cumla.sim.isa.table import DTYPES, Unsupported
from cumla.sim.ptx.syntax import Immediate, Pair, Register, Sink
from sim.ints import array, check, run_op, samples, width_of
from sim.ops import op

P, Q, A, B, C = (Register(f"%r{i}") for i in range(5))
PAIR = (Pair(P, Q), A, B, C)

ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
BOOLEAN = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def float_test(name: str, a: float, b: float) -> bool:
    """What a comparison of numbers gives, by the table in PTX ISA "Floating Point Comparisons"."""
    unordered = math.isnan(a) or math.isnan(b)
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if name in ORDERED:
        return not unordered and ORDERED[name](a, b)
    return unordered or ORDERED[name.removesuffix("u")](a, b)


FLOAT_TESTS = [*ORDERED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]


def comparisons(kind: str) -> dict[str, Callable[[Any, Any], bool]]:
    if kind[0] == "b":
        return {name: ORDERED[name] for name in ("eq", "ne")}
    return {**ORDERED, **UNSIGNED} if kind[0] == "u" else ORDERED


@pytest.mark.parametrize("kind", [letter + w for letter in "bus" for w in ("16", "32", "64")])
def test_setp_of_integers(kind: str) -> None:
    for name, test in comparisons(kind).items():
        check(f"setp.{name}.{kind}", [kind] * 2, test)


def test_setp_of_every_16_bit_number() -> None:
    for kind, first in (("u16", 0), ("s16", -(2**15))):
        every = np.arange(first, first + 2**16)
        for name, test in comparisons(kind).items():
            for other in (0, 1, 0x7FFF):
                made = op(f"setp.{name}.{kind}")
                dtype = DTYPES[made.sources[0]]
                b = np.full(every.shape, other)
                (result,) = run_op(made, every.astype(dtype), b.astype(dtype))
                np.testing.assert_array_equal(result, test(every, b))


@pytest.mark.parametrize("joint", list(BOOLEAN))
def test_setp_with_a_predicate_and_a_pair(joint: str) -> None:
    join = BOOLEAN[joint]
    kinds = ["s32", "s32", "pred"]
    name = f"setp.lt.{joint}.s32"
    check(name, kinds, lambda a, b, c: join(a < b, bool(c)), (P, A, B, C))
    check(name, kinds, lambda a, b, c: (join(a < b, bool(c)), join(a >= b, bool(c))), PAIR)


def test_setp_with_a_pair() -> None:
    check("setp.gt.u32", ["u32"] * 2, lambda a, b: (a > b, a <= b), PAIR[:3])
    check("setp.eq.b64", ["b64"] * 2, lambda a, b: a == b, (Sink(), A, B))


def bits_to_float(kind: str, bits: int) -> float:
    if kind == "f64":
        return struct.unpack("<d", struct.pack("<Q", bits))[0]
    if kind == "bf16":
        return float(np.uint16(bits).view(ml_dtypes.bfloat16))
    code = {"f16": "e", "f32": "f"}[kind]
    return struct.unpack("<" + code, struct.pack("<" + {"e": "H", "f": "I"}[code], bits))[0]


MANTISSA = {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}
WIDTH = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def float_samples(kind: str) -> list[int]:
    """Bits of numbers: zeros, subnormal, smallest normal, ordinary, infinite and NaN, signed."""
    width, mantissa = WIDTH[kind], MANTISSA[kind]
    one = 1 << mantissa
    infinity = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    ordinary = (infinity >> 1) & -one
    values = [0, 1, one - 1, one, one + 1, ordinary, ordinary + 1, infinity - 1, infinity]
    values += [infinity + 1, infinity | one >> 1]
    return [sign << (width - 1) | value for value in values for sign in (0, 1)]


def flushed(kind: str, bits: int) -> int:
    exponent = (bits_of_infinity(kind)) & bits
    return bits if exponent else bits & 1 << (WIDTH[kind] - 1)


def bits_of_infinity(kind: str) -> int:
    return ((1 << (WIDTH[kind] - 1 - MANTISSA[kind])) - 1) << MANTISSA[kind]


def float_columns(kind: str, rows: list[tuple[int, ...]]) -> list[Any]:
    bits = np.dtype(f"u{WIDTH[kind] // 8}")
    columns = [np.array(column, bits) for column in zip(*rows, strict=True)]
    real = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
    return [c if kind == "bf16" else c.view(real[kind]) for c in columns]


def compare_floats(
    name: str, kind: str, test: str, ftz: bool, operands: tuple = (), second: int | None = None
) -> None:
    """Run a setp of floats on all pairs of samples, or with one second operand."""
    others = float_samples(kind) if second is None else [second]
    rows = list(product(float_samples(kind), others))
    made = op(name, *operands)
    columns = float_columns(kind, rows)
    if made.sources[0] != kind:
        columns = [c.view(np.dtype(f"u{c.dtype.itemsize}")) for c in columns]
    (result,) = run_op(made, *columns)
    for row, got in zip(rows, result.tolist(), strict=True):
        a, b = (bits_to_float(kind, flushed(kind, v) if ftz else v) for v in row)
        assert got == float_test(test, a, b), (name, [hex(v) for v in row])


@pytest.mark.parametrize("test", FLOAT_TESTS)
def test_setp_of_floats(test: str) -> None:
    for kind in ("f16", "bf16", "f32", "f64"):
        compare_floats(f"setp.{test}.{kind}", kind, test, False)
    for kind in ("f16", "f32"):
        compare_floats(f"setp.{test}.ftz.{kind}", kind, test, True)


@pytest.mark.parametrize("test", FLOAT_TESTS)
def test_setp_with_a_float_literal(test: str) -> None:
    for bits in float_samples("f32"):
        literal = Immediate(bits_to_float("f32", bits), single_bits=bits)
        for ftz in (False, True):
            name = f"setp.{test}.ftz.f32" if ftz else f"setp.{test}.f32"
            compare_floats(name, "f32", test, ftz, (P, A, literal), bits)
        # The literal first: rows stay (register, literal).
        made = op(f"setp.{test}.ftz.f32", P, literal, A)
        rows = [(value, bits) for value in float_samples("f32")]
        register, constant = float_columns("f32", rows)
        (result,) = run_op(made, constant, register)
        for (value, _), got in zip(rows, result.tolist(), strict=True):
            a, b = (bits_to_float("f32", flushed("f32", v)) for v in (bits, value))
            assert got == float_test(test, a, b), (hex(bits), hex(value))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_setp_of_every_half(kind: str) -> None:
    every = np.arange(2**16).astype(np.uint16)
    dtype = np.float16 if kind == "f16" else ml_dtypes.bfloat16
    with np.errstate(invalid="ignore"):  # the cast of signalling NaNs
        exact = every.view(dtype).astype(np.float64)
    for other in (0x0000, 0x3C00, 0x7FFF, 0x8001):
        value = exact[other]
        b = np.full(every.shape, other, np.uint16)
        sources = [s.view(np.float16) if kind == "f16" else s for s in (every, b)]
        for test in ("lt", "ge", "neu", "leu", "nan"):
            (result,) = run_op(op(f"setp.{test}.{kind}"), *sources)
            unordered = np.isnan(exact) | np.isnan(value)
            with np.errstate(invalid="ignore"):
                expected = {
                    "lt": exact < value,
                    "ge": exact >= value,
                    "neu": unordered | (exact != value),
                    "leu": unordered | (exact <= value),
                    "nan": unordered,
                }[test]
            np.testing.assert_array_equal(result, expected)


def test_setp_nan_of_one_register() -> None:
    for test in ("num", "nan"):
        for name in (f"setp.{test}.f32", f"setp.{test}.ftz.f32"):
            made = op(name, P, A, A)
            values = float_samples("f32")
            (column,) = float_columns("f32", [(v,) for v in values])
            (result,) = run_op(made, column, column)
            expected = [float_test(test, v, v) for v in map(float, column.tolist())]
            assert result.tolist() == expected


@pytest.mark.parametrize("test", FLOAT_TESTS)
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_setp_of_two_halves(kind: str, test: str) -> None:
    some = float_samples(kind)
    rng = np.random.default_rng(5)
    low, high = rng.choice(some, (2, 2, 400))
    a, b = (low[i] | high[i] << 16 for i in range(2))

    def single(x: int, y: int, ftz: bool) -> bool:
        x, y = (flushed(kind, int(v)) if ftz else int(v) for v in (x, y))
        return float_test(test, bits_to_float(kind, x), bits_to_float(kind, y))

    for ftz in (False, True) if kind == "f16" else (False,):
        name = f"setp.{test}{'.ftz' if ftz else ''}.{kind}x2"
        p, q = run_op(op(name, *PAIR[:3]), a.astype(np.uint32), b.astype(np.uint32))
        assert p.tolist() == [single(*pair, ftz) for pair in zip(low[0], low[1], strict=True)]
        assert q.tolist() == [single(*pair, ftz) for pair in zip(high[0], high[1], strict=True)]
        (alone,) = run_op(op(name, P, A, B), a.astype(np.uint32), b.astype(np.uint32))
        np.testing.assert_array_equal(alone, p)
        c = rng.integers(0, 2, 400).astype(np.bool_)
        for joint, join in BOOLEAN.items():
            joined = name.replace(f".{test}", f".{test}.{joint}")
            made = op(joined, *PAIR)
            got = run_op(made, a.astype(np.uint32), b.astype(np.uint32), c)
            np.testing.assert_array_equal(got[0], join(p, c))
            np.testing.assert_array_equal(got[1], join(q, c))


def test_order_of_ftz_and_the_boolean_operator() -> None:
    for name in ("setp.lt.and.ftz.f32", "setp.lt.ftz.and.f32"):
        p, q = run_op(
            op(name, *PAIR),
            np.array([-1e-40, -1.0, -1.0], np.float32),
            np.zeros(3, np.float32),
            np.array([True, True, False]),
        )
        assert p.tolist() == [False, True, False]
        assert q.tolist() == [True, False, False]


SET_TRUE = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}


@pytest.mark.parametrize("result", ["u32", "s32", "f32", "f16", "bf16"])
def test_set_of_integers(result: str) -> None:
    true = SET_TRUE.get(result, -1)
    for kind in ("b16", "b32", "b64", "u16", "s32", "u64", "s64"):
        for name, test in comparisons(kind).items():
            form = f"set.{name}.{result}.{kind}"
            check(form, [kind] * 2, lambda a, b, test=test: true * test(a, b))


def test_set_with_a_predicate() -> None:
    for joint, join in BOOLEAN.items():
        check(
            f"set.ge.{joint}.u32.s32",
            ["s32", "s32", "pred"],
            lambda a, b, c, join=join: -1 * join(a >= b, bool(c)),
        )


@pytest.mark.parametrize("test", ["lt", "neu", "equ", "nan"])
def test_set_of_floats(test: str) -> None:
    results = {
        "f32": ["u32", "s32", "f32", "f16", "bf16"],
        "f64": ["u32", "s32", "f32", "f16", "bf16"],
        "f16": ["u16", "s16", "u32", "s32", "f16", "bf16"],
        "bf16": ["u16", "s16", "u32", "s32", "bf16"],
    }
    for kind, names in results.items():
        rows = list(product(float_samples(kind), repeat=2))
        for ftz, result in product((False, True), names):
            if ftz and kind not in ("f16", "f32"):
                continue
            made = op(f"set.{test}{'.ftz' if ftz else ''}.{result}.{kind}")
            columns = float_columns(kind, rows)
            if made.sources[0] != kind:
                columns = [c.view(np.uint16) for c in columns]
            (got,) = run_op(made, *columns)
            true = SET_TRUE.get(result, (1 << width_of(result)) - 1)
            for row, value in zip(rows, got.tolist(), strict=True):
                a, b = (bits_to_float(kind, flushed(kind, v) if ftz else v) for v in row)
                assert value == (true if float_test(test, a, b) else 0)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_set_of_two_halves(kind: str) -> None:
    rng = np.random.default_rng(6)
    low, high = rng.choice(float_samples(kind), (2, 2, 300))
    a, b = ((low[i] | high[i] << 16).astype(np.uint32) for i in range(2))
    c = rng.integers(0, 2, 300).astype(np.bool_)
    for test, result in product(FLOAT_TESTS, (f"{kind}x2", "u32", "s32")):
        p, q = run_op(op(f"setp.{test}.{kind}x2", *PAIR[:3]), a, b)
        true = SET_TRUE.get(result.removesuffix("x2"), 0xFFFF)
        (got,) = run_op(op(f"set.{test}.{result}.{kind}x2"), a, b)
        np.testing.assert_array_equal(got, p * true + q * (true << 16))
        (got,) = run_op(op(f"set.{test}.xor.{result}.{kind}x2"), a, b, c)
        np.testing.assert_array_equal(got, (p ^ c) * true + (q ^ c) * (true << 16))


SELECTED = ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"]


@pytest.mark.parametrize("kind", SELECTED)
def test_selp_slct(kind: str) -> None:
    check(f"selp.{kind}", [kind, kind, "pred"], lambda a, b, c: a if c else b)
    rows = list(product(samples(kind, 1)[::3], samples(kind, 1)[::3], samples("s32", 1)))
    check(f"slct.{kind}.s32", [kind, kind, "s32"], lambda a, b, c: a if c >= 0 else b, rows=rows)


@pytest.mark.parametrize("count", [5, 8192, 20000])
def test_selp_of_many_lanes(count: int) -> None:
    """Many lanes are chosen from in another way; NaNs keep their bits in both."""
    rng = np.random.default_rng(7)
    chosen = rng.integers(0, 2, count).astype(np.bool_)
    for kind, bits in (
        ("b16", np.uint16),
        ("f32", np.uint32),
        ("b64", np.uint64),
        ("f64", np.uint64),
    ):
        a, b = rng.integers(0, 2**63, (2, count), np.uint64).astype(bits)
        a[:3] = np.array([0x7FA00001, 0xFFC12345, 1]).astype(bits)
        made = op(f"selp.{kind}")
        dtype = {"f32": np.float32, "f64": np.float64}.get(kind, bits)
        (result,) = run_op(made, a.view(dtype), b.view(dtype), chosen)
        expected = [x if c else y for x, y, c in zip(a, b, chosen, strict=True)]
        np.testing.assert_array_equal(result.view(bits), np.array(expected, bits))


def test_slct_by_a_float() -> None:
    signs = np.array([0.0, -0.0, 1e-40, -1e-40, -(2.0**-126), 5, -5, np.inf, -np.inf, np.nan])
    a, b = np.arange(10, 20).astype(np.uint32), np.arange(20, 30).astype(np.uint32)
    c = signs.astype(np.float32)
    for name, first in (
        ("slct.u32.f32", [True, True, True, False, False, True, False, True, False, False]),
        ("slct.ftz.u32.f32", [True, True, True, True, False, True, False, True, False, False]),
    ):
        (result,) = run_op(op(name), a, b, c)
        expected = [x if f else y for x, y, f in zip(a, b, first, strict=True)]
        assert result.tolist() == expected
    (wide,) = run_op(op("slct.f64.f32"), a.astype(np.float64), b.astype(np.float64), c)
    assert wide.tolist()[3] == 23.0


def test_uniform_predicate_of_selp() -> None:
    a, b = array([1, 2, 3], "u32"), array([4, 5, 6], "u32")
    made = op("selp.u32")
    assert made.run(a, b, np.array([True])).tolist() == [1, 2, 3]
    assert made.run(a, b, np.array([False])).tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    "name",
    [
        *("setp.lt.b32", "setp.lo.s32", "setp.hi.b16", "setp.equ.u32", "setp.num.s64"),
        *("setp.lo.f32", "setp.eq.pred", "setp.eq.ftz.f64", "setp.eq.ftz.bf16", "setp.eq.ftz.u32"),
        *("setp.eq.and.or.s32", "setp.eq.nand.s32", "setp.s32", "setp.eq.ftz.ftz.f32", "setp"),
        *("set.eq.b32.u32", "set.eq.f32.f16", "set.eq.f16.bf16", "set.eq.u16.f32", "set.eq.u32"),
        *("set.eq.u64.s32", "set.eq.u16.f16x2", "set.eq.bf16x2.f16x2", "set.lt.u32.b32"),
        *("set.eq.ftz.u32.bf16", "set.eq.ftz.u32.s32", "selp.f16", "selp.pred", "selp.b8", "selp"),
        *("slct.b32.u32", "slct.ftz.b32.s32", "slct.b32", "slct.f16.f32", "slct"),
    ],
)
def test_unknown_forms(name: str) -> None:
    with pytest.raises(Unsupported):
        op(name)
