"""Logic and shifts against Python's integers. PTX ISA "Logic and Shift Instructions"."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from cumla.sim.isa.table import Unsupported
from cumla.sim.ptx.syntax import Immediate, Pair, Register, Sink
from sim.ints import bit, check, run_op, samples, width_of, wrap
from sim.ops import op

D, A, B, C, P, Q = (Register(f"%r{i}") for i in range(6))
FULL = 0xFFFFFFFF


@pytest.mark.parametrize("kind", ["pred", "b16", "b32", "b64"])
def test_bitwise(kind: str) -> None:
    check(f"and.{kind}", [kind] * 2, lambda a, b: a & b)
    check(f"or.{kind}", [kind] * 2, lambda a, b: a | b)
    check(f"xor.{kind}", [kind] * 2, lambda a, b: a ^ b)
    check(f"not.{kind}", [kind], lambda a: ~a)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_cnot(kind: str) -> None:
    check(f"cnot.{kind}", [kind], lambda a: int(a == 0))


def test_every_16_bit_number() -> None:
    every = [(a,) for a in range(2**16)]
    check("not.b16", ["b16"], lambda a: ~a, rows=every)
    check("cnot.b16", ["b16"], lambda a: int(a == 0), rows=every)


def looked_up(a: int, b: int, c: int, table: int) -> int:
    places = (4 * bit(a, i) + 2 * bit(b, i) + bit(c, i) for i in range(32))
    return sum(bit(table, place) << i for i, place in enumerate(places))


# Each of the eight combinations of bits in many places.
LOP3_ROWS = [
    (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA),
    (0x0F0F0F0F, 0x33333333, 0x55555555),
    (0x12345678, 0x9ABCDEF0, 0x0F1E2D3C),
]


@pytest.mark.parametrize("table", range(256))
def test_lop3(table: int) -> None:
    operands = (D, A, B, C, Immediate(table))
    check(
        "lop3.b32",
        ["b32", "b32", "b32", "u32"],
        looked_up,
        operands,
        [(*row, table) for row in LOP3_ROWS],
    )


@pytest.mark.parametrize("joint", ["or", "and"])
@pytest.mark.parametrize("name", ["lop3.{}.b32", "lop3.b32.{}"])
def test_lop3_with_predicate(joint: str, name: str) -> None:
    for table, to in product((0x80, 0xFE, 0x00, 0x96), (D, Sink())):
        operands = (Pair(to, P), A, B, C, Immediate(table), Q)

        def reference(a: int, b: int, c: int, lut: int, q: int) -> tuple[int, bool]:
            d = looked_up(a, b, c, lut)
            return d, (d != 0 or q == 1) if joint == "or" else (d != 0 and q == 1)

        values = [(0, 0, 0), (1, 2, 4), (FULL, FULL, FULL), *LOP3_ROWS]
        rows = [(*row, table, q) for row in values for q in (0, 1)]
        check(name.format(joint), ["b32"] * 3 + ["u32", "pred"], reference, operands, rows)


AMOUNTS = [*range(67), 127, 128, 255, 256, 2**16, 2**16 + 1, 2**31, 2**31 + 1, 2**32 - 1]


@pytest.mark.parametrize("direction", ["l", "r"])
@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_shf(direction: str, mode: str) -> None:
    def reference(a: int, b: int, c: int) -> int:
        n = min(c, 32) if mode == "clamp" else c & 31
        both = b << 32 | a
        return both << n >> 32 if direction == "l" else both >> n

    values = [0, FULL, 0x80000001, 0x12345678]
    name = f"shf.{direction}.{mode}.b32"
    rows = list(product(values, values, AMOUNTS))
    check(name, ["b32", "b32", "u32"], reference, rows=rows)
    for amount in AMOUNTS:
        rows = [(a, b, amount) for a, b in product(values, repeat=2)]
        check(name, ["b32", "b32", "u32"], reference, (D, A, B, Immediate(amount)), rows)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_shl_shr(width: int) -> None:
    for kind in (f"b{width}", f"u{width}", f"s{width}"):
        names = ["shr"] if kind[0] != "b" else ["shl", "shr"]
        for name in names:

            def reference(a: int, n: int, name: str = name, kind: str = kind) -> int:
                n = min(n, width_of(kind))
                return a << n if name == "shl" else a >> n  # Python's >> keeps the sign

            rows = list(product(samples(kind, 3), AMOUNTS))
            check(f"{name}.{kind}", [kind, "u32"], reference, rows=rows)
            for amount in AMOUNTS:
                rows = [(a, amount) for a in samples(kind, 0)]
                operands = (D, A, Immediate(amount))
                check(f"{name}.{kind}", [kind, "u32"], reference, operands, rows)


def test_shifts_of_every_16_bit_number() -> None:
    every = np.arange(2**16)
    for amount in (1, 7, 15, 16, 300):
        by = np.full(every.shape, amount, np.uint32)
        n = min(amount, 16)
        for name, dtype, expected in (
            ("shl.b16", np.uint16, every << n),
            ("shr.u16", np.uint16, every >> n),
            ("shr.s16", np.int16, every.astype(np.int16).astype(np.int64) >> n),
        ):
            (result,) = run_op(op(name), every.astype(dtype), by)
            np.testing.assert_array_equal(result, expected.astype(dtype))


def test_a_literal_amount_may_be_negative() -> None:
    """It is read as an .u32, so it is a large one."""
    made = op("shr.s32", D, A, Immediate(-1))
    assert made.sources == ("s32", "s32")
    (result,) = run_op(made, np.array([-8, 8], np.int32), np.array([-1, -1], np.int32))
    assert result.tolist() == [wrap(-1, "s32"), 0]


@pytest.mark.parametrize(
    "name",
    [
        *("and.u32", "or.f32", "xor.b8", "not.u32", "not", "cnot.pred", "shl.u32", "shl.s32"),
        *("shr.pred", "shf.l.b32", "shf.l.wrap.u32", "shf.x.wrap.b32", "shf.l.clamp.wrap.b32"),
    ],
)
def test_unknown_forms(name: str) -> None:
    with pytest.raises(Unsupported):
        op(name)


def test_unknown_forms_of_lop3() -> None:
    lut = Immediate(0xE8)
    for name, operands in (
        ("lop3.xor.b32", (Pair(D, P), A, B, C, lut, Q)),
        ("lop3.b32", (D, A, B, C, Register("%r9"))),
        ("lop3.and.b32", (D, A, B, C, lut, Q)),
        ("lop3.b32", (Pair(D, P), A, B, C, lut)),
        ("lop3.u32", (D, A, B, C, lut)),
    ):
        with pytest.raises(Unsupported):
            op(name, *operands)
