"""mov and prmt against their semantics in PTX ISA "Data Movement and Conversion Instructions"."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from cumla.sim.isa.table import Unsupported
from cumla.sim.ptx.syntax import Immediate, Register, Sink, Vector
from sim.ints import check, run_op, samples
from sim.ops import op

D, A, B, C, E = (Register(f"%r{i}") for i in range(5))
SCALARS = ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"]


@pytest.mark.parametrize("kind", ["pred", *SCALARS])
def test_mov(kind: str) -> None:
    check(f"mov.{kind}", [kind], lambda a: a, (D, A))


@pytest.mark.parametrize(("kind", "bits"), [("f32", np.uint32), ("f64", np.uint64)])
def test_mov_keeps_every_bit_of_a_float(kind: str, bits: type) -> None:
    width = np.dtype(bits).itemsize * 8
    exponent = 0x7F800000 if width == 32 else 0x7FF0 << 48
    values = np.array([0, 1, exponent, exponent + 1, exponent | 1 << (width - 1) | 3], bits)
    source = values.view(np.float32 if width == 32 else np.float64)
    (result,) = run_op(op(f"mov.{kind}", D, A), source)
    np.testing.assert_array_equal(result.view(bits), values)


FORMS = [("b16", 2, 8), ("b32", 2, 16), ("b32", 4, 8), ("b64", 2, 32), ("b64", 4, 16)]


@pytest.mark.parametrize(("kind", "count", "part"), FORMS)
def test_pack_and_unpack(kind: str, count: int, part: int) -> None:
    edges = [0, 1, (1 << part) - 1, 1 << (part - 1), 0x12345678 % (1 << part)]
    rows = list(product(edges, repeat=count))
    registers = Vector((A, B, C, E)[:count])

    def joined(*values: int) -> int:
        return sum(value << part * i for i, value in enumerate(values))

    def split(value: int) -> tuple[int, ...]:
        return tuple(value >> part * i for i in range(count))

    check(f"mov.{kind}", [f"b{part}"] * count, joined, (D, registers), rows)
    check(f"mov.{kind}", [kind], split, (registers, D), [(joined(*row),) for row in rows])


def test_unpack_to_a_sink_still_gives_all_parts() -> None:
    made = op("mov.b64", Vector((A, Sink())), B)
    assert made.results == ("b32", "b32")


def test_parts_do_not_share_memory_with_the_whole() -> None:
    whole = np.arange(4, dtype=np.uint64)
    for result in op("mov.b64", Vector((A, B)), D).run(whole):
        assert not np.shares_memory(result, whole)


# PTX ISA "prmt": the tables of bytes d.b3 d.b2 d.b1 d.b0 for c[1:0] = 0, 1, 2, 3.
MODES = {
    "f4e": ["3210", "4321", "5432", "6543"],
    "b4e": ["5670", "6701", "7012", "0123"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["3210", "3211", "3222", "3333"],
    "ecr": ["0000", "1110", "2210", "3210"],
    "rc16": ["1010", "3232", "1010", "3232"],
}


def permuted(a: int, b: int, choices: list[int]) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    result = []
    for choice in choices:
        byte = source[choice & 7]
        result.append((255 if byte & 128 else 0) if choice & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def by_nibbles(a: int, b: int, c: int) -> int:
    return permuted(a, b, [c >> at & 15 for at in (0, 4, 8, 12)])


# Every byte differs from the others, in its sign from the next.
REGISTERS = [(0x83027F80, 0x067785A4), (0x7C81FE03, 0xF90855E6), (0, 0xFFFFFFFF)]


def test_every_selector_in_a_register() -> None:
    a, b = REGISTERS[0]
    check("prmt.b32", ["b32"] * 3, by_nibbles, rows=[(a, b, c) for c in range(2**16)])
    rows = [(*pair, c) for pair in REGISTERS for c in (*samples("u32"), 0x5410, 0x7632, 0xBA98)]
    check("prmt.b32", ["b32"] * 3, by_nibbles, rows=rows)


def test_many_constant_selectors() -> None:
    known = [0x5410, 0x7632, 0x3210, 0x7654, 0x0123, 0x4567, 0x1032, 0x2103, 0x0321, 0x6420]
    known += [
        0x7531,
        0x0000,
        0x7777,
        0x8888,
        0xBBBB,
        0xBB99,
        0x1010,
        0x3232,
        0x4440,
        0x0400,
        0x7770,
    ]
    rng = np.random.default_rng(4)
    random = rng.integers(0, 2**16, 400).tolist()
    same_high_bits = [0x12345410, 0xFFFF7632]
    for selector in [*known, *random, *same_high_bits]:
        rows = [(*pair, selector) for pair in REGISTERS]
        check("prmt.b32", ["b32"] * 3, by_nibbles, (D, A, B, Immediate(selector)), rows)


def test_constant_selectors_of_a_literal_zero() -> None:
    zero = Immediate(0)
    for selector in (0x7770, 0x4440, 0xBB99, 0x0123, 0x4567, 0x5410, 0x7654, 0xFEDC):
        literal = Immediate(selector)
        with_b = [(a, 0, selector) for a, _ in REGISTERS]
        check("prmt.b32", ["b32"] * 3, by_nibbles, (D, A, zero, literal), with_b)
        with_a = [(0, b, selector) for _, b in REGISTERS]
        check("prmt.b32", ["b32"] * 3, by_nibbles, (D, zero, B, literal), with_a)


@pytest.mark.parametrize("mode", list(MODES))
def test_modes_of_prmt(mode: str) -> None:
    def reference(a: int, b: int, c: int) -> int:
        return permuted(a, b, [int(digit) for digit in reversed(MODES[mode][c & 3])])

    for name in (f"prmt.b32.{mode}", f"prmt.{mode}.b32"):
        rows = [(*pair, c) for pair in REGISTERS for c in (0, 1, 2, 3, 4, 7, 0x8889, 2**32 - 2)]
        check(name, ["b32"] * 3, reference, rows=rows)
        for c in (0, 1, 2, 3, 5, 0x8888):
            rows = [(*pair, c) for pair in REGISTERS]
            check(name, ["b32"] * 3, reference, (D, A, B, Immediate(c)), rows)


@pytest.mark.parametrize(
    ("name", "operands"),
    [
        ("mov.b128", (D, A)),
        ("mov.v4.u32", (D, A)),
        ("mov.u64", (D, Vector((A, B)))),
        ("mov.b16", (D, Vector((A, B, C, E)))),
        ("mov.b64", (D, Vector((A, B, C)))),
        ("mov", (D, A)),
        ("prmt.u32", (D, A, B, C)),
        ("prmt.b32.f8e", (D, A, B, C)),
        ("prmt.b32.f4e.b4e", (D, A, B, C)),
    ],
)
def test_unknown_forms(name: str, operands: tuple) -> None:
    with pytest.raises(Unsupported):
        op(name, *operands)
