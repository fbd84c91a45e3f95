"""mma against the tables of PTX ISA "Matrix Fragments for mma", lane by lane, element by element.

The numbers are compared with exact sums: the sum of products rounded to f32, plus C, rounded to
the type of D.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cumla.sim.cohort import Cohort
from cumla.sim.isa import mma_panels
from cumla.sim.isa.mma_forms import ELEMENTS, parse
from cumla.sim.isa.mma_fusion import fuse
from cumla.sim.isa.table import Env, Op, Unsupported, lookup
from cumla.sim.ptx.syntax import Guard, Immediate, Instruction, Register, Sink, Vector
from sim.ops import instruction, op

Rng = np.random.Generator
# PTX name -> type of ml_dtypes or NumPy, bits of an element, and where they lie in their room.
TYPES: dict[str, tuple[Any, int, int]] = {
    "f16": (np.float16, 16, 0),
    "bf16": (ml_dtypes.bfloat16, 16, 0),
    "e4m3": (ml_dtypes.float8_e4m3fn, 8, 0),
    "e5m2": (ml_dtypes.float8_e5m2, 8, 0),
    "e2m3": (ml_dtypes.float6_e2m3fn, 6, 0),
    "e3m2": (ml_dtypes.float6_e3m2fn, 6, 0),
    "e2m1": (ml_dtypes.float4_e2m1fn, 4, 2),
}
VIEWS: dict[str, Any] = {
    "f32": np.float32,
    "s32": np.int32,
    "f64": np.float64,
    "b32": np.uint32,
}
WIDTHS = {"tf32": 32, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "b1": 1, "f64": 64}


def room(kind: str) -> int:
    return WIDTHS[kind] if kind in WIDTHS else max(8, TYPES[kind][1])


def value_of(kind: str, code: int) -> float | int:
    """What the bits of an element mean."""
    if kind in TYPES:
        dtype, width, pad = TYPES[kind]
        code = code >> pad & (1 << width) - 1
        return float(np.array([code], f"u{max(width, 8) // 8}").view(dtype)[0])
    if kind == "tf32":
        return float(np.array([code & 0xFFFFE000], np.uint32).view(np.float32)[0])
    if kind in VIEWS:
        return np.array([code], "u8" if kind == "f64" else "u4").view(VIEWS[kind])[0].item()
    if kind[0] == "s" and code >> WIDTHS[kind] - 1:
        return code - (1 << WIDTHS[kind])
    return code


# PTX ISA 9.7.14.5, "Matrix Fragments for mma": row and column of element i of a lane, with
# g = lane >> 2 and t = lane % 4. For each shape and number of elements of A: (A, B).
Place = Callable[[int, int, int], tuple[int, int]]


def k8_half_a(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i < 2 else g + 8), t * 2 + (i & 1)


def k8_half_b(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 2 + i, g


def k16_half_a(g: int, t: int, i: int) -> tuple[int, int]:
    row = g if 0 <= i < 2 or 4 <= i < 6 else g + 8
    return row, t * 2 + (i & 1) + (8 if i >= 4 else 0)


def k16_half_b(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 2 + (i & 1) + (8 if i >= 2 else 0), g


def k4_tf32_a(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i == 0 else g + 8), t


def k4_tf32_b(g: int, t: int, i: int) -> tuple[int, int]:
    return t, g


def k8_tf32_a(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i in (0, 2) else g + 8), (t if i in (0, 1) else t + 4)


def k8_tf32_b(g: int, t: int, i: int) -> tuple[int, int]:
    return (t if i == 0 else t + 4), g


def k16_double_a(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i % 2 == 0 else g + 8), i * 2 - i % 2 * 2 + t


def k16_double_b(g: int, t: int, i: int) -> tuple[int, int]:
    return t + i * 4, g


def k16_byte_a(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i < 4 else g + 8), t * 4 + (i & 3)


def k16_byte_b(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 4 + i, g


def k32_byte_a(g: int, t: int, i: int) -> tuple[int, int]:
    row = g if 0 <= i < 4 or 8 <= i < 12 else g + 8
    return row, t * 4 + (i & 3) + (16 if i >= 8 else 0)


def k32_byte_b(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 4 + (i & 3) + (16 if i >= 4 else 0), g


def k32_nibble_a(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i < 8 else g + 8), t * 8 + (i & 7)


def k32_nibble_b(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 8 + i, g


def k64_nibble_a(g: int, t: int, i: int) -> tuple[int, int]:
    row = g if 0 <= i < 8 or 16 <= i < 24 else g + 8
    return row, t * 8 + (i & 7) + (32 if i >= 16 else 0)


def k64_nibble_b(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 8 + (i & 7) + (32 if i >= 8 else 0), g


def k128_bit_a(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i < 32 else g + 8), t * 32 + (i & 31)


def k128_bit_b(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 32 + i, g


def k256_bit_a(g: int, t: int, i: int) -> tuple[int, int]:
    row = g if 0 <= i < 32 or 64 <= i < 96 else g + 8
    return row, t * 32 + (i & 31) + (128 if i >= 64 else 0)


def k256_bit_b(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 32 + (i & 31) + (128 if i >= 32 else 0), g


# The tables for 8 rows are those for 16 rows as far as they have registers.
PLACES: dict[tuple[int, int], tuple[Place, Place]] = {
    (8, 16): (k8_half_a, k8_half_b),
    (16, 16): (k16_half_a, k16_half_b),
    (4, 32): (k4_tf32_a, k4_tf32_b),
    (8, 32): (k8_tf32_a, k8_tf32_b),
    (4, 64): (k4_tf32_a, k4_tf32_b),
    (8, 64): (k8_tf32_a, k8_tf32_b),
    (16, 64): (k16_double_a, k16_double_b),
    (16, 8): (k16_byte_a, k16_byte_b),
    (32, 8): (k32_byte_a, k32_byte_b),
    (32, 4): (k32_nibble_a, k32_nibble_b),
    (64, 4): (k64_nibble_a, k64_nibble_b),
    (128, 1): (k128_bit_a, k128_bit_b),
    (256, 1): (k256_bit_a, k256_bit_b),
}


def c_place(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i < 2 else g + 8), t * 2 + (i & 1)


@dataclass
class Case:
    """One form, and one warp's matrices."""

    name: str

    def __post_init__(self) -> None:
        words = self.name.split(".")
        shape = next(w for w in words if w[0] == "m" and "n8k" in w)
        self.m = int(shape[1 : shape.index("n")])
        self.k = int(shape[shape.index("k") + 1 :])
        types = [w for w in words if w in TYPES or w in WIDTHS or w in ("s32", "f32")]
        self.d, self.a, self.b, self.c = types
        self.satfinite = "satfinite" in words
        self.popc = words[-2] if words[-1] == "popc" else ""

    def elements(self, matrix: str) -> int:
        """How many a lane holds."""
        return {"a": self.m * self.k, "b": 8 * self.k, "c": 8 * self.m}[matrix] // 32

    def place(self, matrix: str) -> Place:
        if matrix == "c":
            return c_place
        return PLACES[self.k, room(self.a)][matrix == "b"]

    def pack(self, codes: list[list[int]], kind: str) -> list[Any]:
        """Codes of each lane's elements as registers, [32] each."""
        bits = room(kind)
        if bits == 64:
            return [np.array([c[i] for c in codes], np.uint64) for i in range(len(codes[0]))]
        each = 32 // bits
        return [
            np.array(
                [sum(c[r * each + e] << e * bits for e in range(each)) for c in codes], np.uint32
            )
            for r in range(len(codes[0]) // each)
        ]


FORMS = [
    *(f"m16n8k{k}.row.col.{d}.f16.f16.{d}" for k in (8, 16) for d in ("f16", "f32")),
    "m16n8k16.row.col.f32.f16.f16.f16",
    *(f"m16n8k{k}.row.col.f32.bf16.bf16.f32" for k in (8, 16)),
    *(f"m16n8k{k}.row.col.f32.tf32.tf32.f32" for k in (4, 8)),
    *(f"m16n8k{k}.row.col.f32.{a}.{b}.f32" for k, a, b in ((16, "e4m3", "e5m2"),)),
    *(f"m16n8k32.row.col.{d}.{a}.e4m3.{d}" for a in ("e4m3", "e5m2") for d in ("f32", "f16")),
    *(
        f"m16n8k32.row.col.kind::f8f6f4.f32.{a}.{b}.f32"
        for a, b in (("e2m1", "e2m1"), ("e3m2", "e2m3"), ("e2m3", "e4m3"), ("e5m2", "e3m2"))
    ),
    "kind::f8f6f4.m16n8k32.row.col.f16.e2m1.e4m3.f16",
    *(f"m{m}n8k16.row.col.s32.{a}.{b}.s32" for m, a, b in ((8, "s8", "u8"), (16, "u8", "s8"))),
    *(f"m16n8k32.row.col{s}.s32.{a}.s8.s32" for a in ("s8", "u8") for s in ("", ".satfinite")),
    "m8n8k32.row.col.s32.s4.u4.s32",
    "m16n8k32.row.col.s32.u4.u4.s32",
    "m16n8k64.row.col.satfinite.s32.s4.s4.s32",
    *(f"m{m}.row.col.s32.b1.b1.s32.xor.popc" for m in ("8n8k128", "16n8k128", "16n8k256")),
    "m16n8k256.row.col.s32.b1.b1.s32.and.popc",
    *(f"m{m}.row.col.f64.f64.f64.f64" for m in ("8n8k4", "16n8k4", "16n8k8", "16n8k16")),
]


def name_of(form: str) -> str:
    return f"mma.sync.aligned.{form}"


def random_codes(kind: str, count: int, rng: Rng) -> list[int]:
    """Codes of numbers of all magnitudes that a sum of a few can hold without losing any."""
    if kind == "f64":
        return [int(x) for x in rng.standard_normal(count).view(np.uint64)]
    if kind in ("f32", "tf32"):
        values = rng.standard_normal(count) * 2.0 ** rng.integers(-6, 6, count)
        return [int(x) for x in values.astype(np.float32).view(np.uint32)]
    if kind == "s32":
        values = rng.choice([0, -1, 1, 1 << 31, (1 << 31) - 1, -(1 << 31) + 5, 12345], count)
        return [int(x) & 0xFFFFFFFF for x in values]
    if kind in ("f16", "bf16"):
        values = rng.standard_normal(count) * 2.0 ** rng.integers(-4, 4, count)
        return [int(x) for x in values.astype(TYPES[kind][0]).view(np.uint16)]
    codes = [int(x) for x in rng.integers(0, 1 << min(room(kind), 32), count)]
    return [c if np.isfinite(value_of(kind, c)) else 0 for c in codes]


def rounded(x: Fraction, dtype: Any) -> Any:
    return dtype(float(x))


def expected(case: Case, a: Any, b: Any, c: Any) -> Any:
    """D, [m][8] of Python numbers, from matrices of Python numbers."""
    d = [[0.0] * 8 for _ in range(case.m)]
    for i in range(case.m):
        for j in range(8):
            pairs = [(a[i][k], b[k][j]) for k in range(case.k)]
            if case.d == "s32":
                if case.popc:
                    total = sum((x ^ y if case.popc == "xor" else x & y) for x, y in pairs)
                else:
                    total = sum(x * y for x, y in pairs)
                total += c[i][j]
                if case.satfinite:
                    total = max(-(1 << 31), min((1 << 31) - 1, total))
                d[i][j] = total & 0xFFFFFFFF
            elif case.d == "f64":
                total = c[i][j]
                for x, y in pairs:
                    total = float(Fraction(x) * Fraction(y) + Fraction(total))
                d[i][j] = total
            else:
                exact = sum((Fraction(x) * Fraction(y) for x, y in pairs), Fraction(0))
                single = rounded(exact, np.float32) + np.float32(c[i][j])
                with np.errstate(over="ignore"):
                    d[i][j] = float(single if case.d == "f32" else np.float16(single))
    return d


def cohort(n: int | Any, lanes: int | None = None) -> Cohort:
    gids = np.arange(n) if isinstance(n, int) else np.asarray(n)
    lanes = lanes or -(-int(gids[-1] + 1) // 32) * 32
    wave = SimpleNamespace(
        lanes_per_block=lanes,
        live=np.ones(lanes, np.bool_),
        live_count=lanes,
        counters=SimpleNamespace(seen=[]),
    )
    wave.counters.flops = lambda ins, c, flops: wave.counters.seen.append((ins, c, flops))
    return Cohort(wave, gids, [])


def call(made: Op, c: Cohort, registers: list[Any]) -> list[Any]:
    """The results as unsigned integers."""
    assert len(registers) == len(made.sources)
    sources = [r.view(VIEWS[kind]) for r, kind in zip(registers, made.sources, strict=True)]
    with np.errstate(all="ignore"):
        results = made.run(c, *sources)
    if len(made.results) == 1:
        results = (results,)
    for result, kind in zip(results, made.results, strict=True):
        assert result.dtype == VIEWS[kind]
        assert result.shape == (c.n,)
    return [r.view(f"u{r.itemsize}") for r in results]


def made_op(form: str, **env: Any) -> Op:
    counts = parse(instruction(name_of(form))).registers()
    it = iter(range(99))
    operands = [Vector(tuple(Register(f"%r{next(it)}") for _ in range(n))) for n in counts]
    return op(name_of(form), *operands, **env)


@pytest.mark.parametrize("form", FORMS)
def test_one_mma(form: str) -> None:
    case = Case(form)
    rng = np.random.default_rng(len(form) * 7 + case.k)
    warps = 2
    registers: list[list[Any]] = []
    matrices = []
    for _ in range(warps):
        one: list[Any] = []
        of_warp = {}
        for matrix, kind in (("a", case.a), ("b", case.b), ("c", case.c)):
            count = case.elements(matrix)
            codes = [random_codes(kind, count, rng) for _ in range(32)]
            if kind[0] == "e" and case.d == "f16":
                codes = [[c & 0xBF for c in row] for row in codes]  # nothing that overflows
            entries: dict[tuple[int, int], float | int] = {}
            for lane in range(32):
                for i in range(count):
                    code = codes[lane][i]
                    value = value_of(kind, code)
                    entries[case.place(matrix)(lane >> 2, lane % 4, i)] = value
            height, width = {"a": (case.m, case.k), "b": (case.k, 8), "c": (case.m, 8)}[matrix]
            assert len(entries) == height * width  # every element is held by one lane
            of_warp[matrix] = [[entries[i, j] for j in range(width)] for i in range(height)]
            if kind in ("f32", "s32"):
                one += [np.array([c[i] for c in codes], np.uint32) for i in range(count)]
            else:
                one += case.pack(codes, kind)
        registers.append(one)
        matrices.append(of_warp)
    joined = [np.concatenate(r) for r in zip(*registers, strict=True)]
    got = call(made_op(form), cohort(32 * warps), joined)
    for warp, of_warp in enumerate(matrices):
        d = expected(case, of_warp["a"], of_warp["b"], of_warp["c"])
        for lane in range(32):
            for i in range(case.elements("c")):
                row, column = c_place(lane >> 2, lane % 4, i)
                if case.d == "f16":
                    code = int(got[i // 2][warp * 32 + lane]) >> 16 * (i % 2) & 0xFFFF
                else:
                    code = int(got[i][warp * 32 + lane])
                value = code if case.d == "s32" else value_of(case.d, code)
                assert value == d[row][column], (warp, lane, i)


@pytest.mark.parametrize("kind", [*TYPES, "tf32", "s8", "u8", "s4", "u4", "b1"])
def test_what_codes_mean(kind: str) -> None:
    """All codes of all types in all places of a register, NaN and infinities too."""
    bits = room(kind)
    if kind == "tf32":
        words = np.random.default_rng(1).integers(0, 1 << 32, 4096, dtype=np.uint32)
        words[:6] = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00002000]
    else:
        codes = np.arange(1 << bits, dtype=np.uint32)
        words = np.concatenate(
            [
                sum(
                    (np.roll(codes, e) if e != place else codes) << np.uint32(e * bits)
                    for e in range(32 // bits)
                )
                for place in range(32 // bits)
            ]
        ).astype(np.uint32)
    planes = np.empty((32 // bits, words.size), np.uint32)
    got = planes.view(np.float32) if ELEMENTS[kind].exponent else planes.astype(np.float32)
    with np.errstate(all="ignore"):
        ELEMENTS[kind].unpacker()(words, planes, got)
    for place, values in enumerate(got):
        codes = (words >> np.uint32(place * bits)).astype(np.uint64) & ((1 << bits) - 1)
        if kind in TYPES:
            dtype, width, pad = TYPES[kind]
            inner = codes >> np.uint64(pad) & np.uint64((1 << width) - 1)
            want = inner.astype(f"u{max(width, 8) // 8}").view(dtype).astype(np.float32)
        else:
            want = np.array([value_of(kind, int(c)) for c in codes], np.float32)
        nan = np.isnan(want)
        assert np.array_equal(np.isnan(values), nan)
        assert np.array_equal(values[~nan].view(np.uint32), want[~nan].view(np.uint32))


def warp_registers(form: str, n: int, rng: Rng) -> list[Any]:
    case = Case(form)
    made = []
    for matrix, kind in (("a", case.a), ("b", case.b), ("c", case.c)):
        count = case.elements(matrix)
        codes = [random_codes(kind, count, rng) for _ in range(n)]
        if kind in ("f32", "s32"):
            made += [np.array([c[i] for c in codes], np.uint32) for i in range(count)]
        else:
            made += case.pack(codes, kind)
    return made


SOME = [
    "m16n8k16.row.col.f32.bf16.bf16.f32",
    "m16n8k16.row.col.f16.f16.f16.f16",
    "m16n8k32.row.col.s32.s8.u8.s32",
    "m16n8k8.row.col.f64.f64.f64.f64",
]


@pytest.mark.parametrize("form", SOME)
def test_lanes_that_are_not_there_are_zero(form: str) -> None:
    gids = np.array([*range(5, 32), *range(64, 80)])
    registers = warp_registers(form, 96, np.random.default_rng(2))
    got = call(made_op(form), cohort(gids, 96), [r[gids] for r in registers])
    padded = [np.where(np.isin(np.arange(96), gids), r, 0).astype(r.dtype) for r in registers]
    whole = call(made_op(form), cohort(96), padded)
    assert all(np.array_equal(x, y[gids]) for x, y in zip(got, whole, strict=True))


@pytest.mark.parametrize("form", SOME)
def test_sources_that_are_one_value(form: str) -> None:
    registers = warp_registers(form, 64, np.random.default_rng(3))
    for uniform in ({0}, {1, 3}, {len(registers) - 1}, set(range(len(registers)))):
        sources = [r[:1] if i in uniform else r for i, r in enumerate(registers)]
        got = call(made_op(form), cohort(64), sources)
        spread = [np.repeat(r, 64) if r.size == 1 else r for r in sources]
        want = call(made_op(form), cohort(64), spread)
        assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("form", SOME[:2])
@pytest.mark.parametrize("one_value", [False, True])
def test_a_sum_of_zeros_is_positive(form: str, one_value: bool) -> None:
    _, a, b, c = parse(instruction(name_of(form))).registers()
    minus = np.full(1 if one_value else 32, 0x80008000 if "f16.f16" in form[-8:] else 1 << 31)
    registers = [np.full(32, 0x80008000)] * a + [np.zeros(32)] * b + [minus] * c
    got = call(made_op(form), cohort(32), [r.astype(np.uint32) for r in registers])
    assert not any(r.any() for r in got)


@pytest.mark.parametrize("form", [f for f in SOME if "f16" in f])
def test_infinity_and_nan(form: str) -> None:
    half = "bf16" not in form
    one, infinity = (0x3C00, 0x7C00) if half else (0x3F80, 0x7F80)
    _, a, b, c = parse(instruction(name_of(form))).registers()
    zero = np.zeros(32, np.uint32)
    registers = [zero.copy() for _ in range(a + b + c)]
    for r in registers[a : a + b]:
        r[:] = one << 16 | one
    registers[a][4:8] = 0  # column 1 of B starts with zeros
    registers[0][0] = infinity  # A[0][0]
    registers[0][4] = infinity | (infinity | 1 << 15) << 16  # A[1][0] and A[1][1], of other sign
    registers[1][0] = infinity + 1  # A[8][0], NaN
    got = call(made_op(form), cohort(32), registers)
    if half:
        # Row 0: infinity where B is 1, NaN where it is 0; row 1: NaN; row 8: NaN.
        assert [hex(x) for x in got[0][[0, 1, 4, 5]].tolist()] == [
            "0x7fff7c00",
            "0x7c007c00",
            "0x7fff7fff",
            "0x7fff7fff",
        ]
        assert got[1][0] == 0x7FFF7FFF
    else:
        assert got[0][0] == 0x7F800000
        assert got[1][0] == 0x7FFFFFFF
        assert got[0][4] == 0x7FFFFFFF
        assert got[2][0] == got[3][3] == 0x7FFFFFFF
        assert got[0][8] == 0


@pytest.mark.parametrize("one_value", [False, True])
@pytest.mark.parametrize("zero", [0, 1 << 31])
def test_what_rounds_to_minus_zero(one_value: bool, zero: int) -> None:
    tiny = float_bits(2.0**-100)
    registers = [np.full(32, tiny | tiny << 16)] * 4 + [np.full(32, tiny | 1 << 15)] * 2
    registers += [np.full(1 if one_value else 32, zero)] * 4
    got = call(made_op(SOME[0]), cohort(32), [r.astype(np.uint32) for r in registers])
    assert all(set(r.tolist()) == {zero} for r in got)


def float_bits(x: float) -> int:
    return int(np.array([x], ml_dtypes.bfloat16).view(np.uint16)[0])


# Fusion


def vector(prefix: str, count: int) -> Vector:
    return Vector(tuple(Register(f"{prefix}.{i}") for i in range(count)))


def mma_of(form: str, d: str, a: str, b: str, c: str) -> Instruction:
    name = name_of(form)
    counts = parse(instruction(name)).registers()
    return instruction(name, *map(vector, (d, a, b, c), counts))


def interpret(program: list[Instruction], values: dict[str, Any], c: Cohort) -> dict[str, Any]:
    """One by one."""
    values = dict(values)
    for ins in program:
        made = lookup(ins)(ins, Env(target=90))
        sources = [values[r.name] for v in ins.operands[1:] for r in v.items]
        results = call(made, c, sources)
        values.update(zip((r.name for r in ins.operands[0].items), results, strict=True))
    return values


def run_fused(
    program: list[Instruction], values: dict[str, Any], c: Cohort, live: set[str] | None
) -> tuple[dict[str, Any], int]:
    values = dict(values)
    groups = fuse(program, Env(target=90), live)
    assert [i for g in groups for i in g.instructions] == program
    for group in groups:
        results = call(group.op, c, [values[o.name] for o in group.sources])
        values.update(zip((r.name for r in group.results), results, strict=True))
    return values, len(groups)


def fill(program: list[Instruction], n: int, rng: Rng) -> dict[str, Any]:
    """Registers for all that a program reads before it writes."""
    form = program[0].name.removeprefix("mma.sync.aligned.")
    values: dict[str, Any] = {}
    written: set[str] = set()
    for ins in program:
        fresh = warp_registers(form, n, rng)
        flat = [r.name for v in ins.operands[1:] for r in v.items]
        for name, value in zip(flat, fresh, strict=True):
            if name not in written and name not in values:
                values[name] = value
        written |= {r.name for r in ins.operands[0].items}
    return values


def same(one: dict[str, Any], other: dict[str, Any], names: set[str]) -> bool:
    return all(np.array_equal(one[n], other[n]) for n in names)


GEMM_FORMS = [*SOME[:3], "m16n8k8.row.col.f32.tf32.tf32.f32", "m16n8k32.row.col.f32.e4m3.e5m2.f32"]


@pytest.mark.parametrize("form", GEMM_FORMS)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_gemm_is_one_operation(form: str, in_place: bool) -> None:
    program = []
    for k in range(3):
        for i in range(2):
            for j in range(3):
                before = f"c{i}{j}" + ("" if in_place or not k else f"_{k - 1}")
                after = f"c{i}{j}" + ("" if in_place else f"_{k}")
                program.append(mma_of(form, after, f"a{i}_{k}", f"b{j}_{k}", before))
    c = cohort(96)
    values = fill(program, 96, np.random.default_rng(4))
    want = interpret(program, values, c)
    got, groups = run_fused(program, values, c, None)
    assert groups == 1
    assert same(got, want, set(want))
    finals = {r.name for ins in program[-6:] for r in ins.operands[0].items}
    made = fuse(program, Env(target=90), finals)[0]
    assert {r.name for r in made.results} == finals
    got, _ = run_fused(program, values, c, finals)
    assert same(got, want, finals)


def test_a_panel_unpacks_each_fragment_once() -> None:
    form = SOME[0]
    program = [
        mma_of(form, f"d{i}{j}", f"a{i}", f"b{j}", "zero") for i in range(4) for j in range(8)
    ]
    made = fuse(program, Env(target=90))
    assert len(made) == 1
    assert len(made[0].sources) == 4 * 4 + 8 * 2 + 4


@pytest.mark.parametrize("form", SOME)
@pytest.mark.parametrize("seed", range(12))
def test_any_program_fused(form: str, seed: int) -> None:
    """Random fragments, chains that branch, results that are read as A, registers used again."""
    rng = np.random.default_rng(seed)
    few = int(rng.integers(2, 5))
    program = []
    for _ in range(12):
        d, c = (f"c{rng.integers(few)}" for _ in range(2))
        if rng.random() < 0.5:
            c = d
        a, b = f"a{rng.integers(few)}", f"b{rng.integers(few)}"
        if form == SOME[1] and rng.random() < 0.2:
            program.append(mixed(form, d, a, b, c))
        else:
            program.append(mma_of(form, d, a, b, c))
    c = cohort(64)
    values = fill(program, 64, rng)
    want = interpret(program, values, c)
    got, groups = run_fused(program, values, c, None)
    assert same(got, want, set(want))
    assert groups < len(program) or "f64" in form
    for live in ({f"c{i}.{j}" for i in range(2) for j in range(4)}, {"c0.1"}, set()):
        got, _ = run_fused(program, values, c, live & set(want))
        assert same(got, want, live & set(want))


def mixed(form: str, d: str, a: str, b: str, c: str) -> Instruction:
    """A that has an accumulator in it."""
    counts = parse(instruction(name_of(form))).registers()
    d_, a_, b_, c_ = map(vector, (d, a, b, c), counts)
    return instruction(name_of(form), d_, Vector((*c_.items, *a_.items[2:])), b_, c_)


ODD = {
    "A has D in it": lambda c, d, a, b: ((*d[:2], *a[2:]), b, c),
    "B has D in it": lambda c, d, a, b: (a, (d[1], *b[1:]), c),
    "C is D in another order": lambda c, d, a, b: (a, b, d[::-1]),
    "C is half of D": lambda c, d, a, b: (a, b, (*d[:1], *c[1:])),
    "C has D at its end": lambda c, d, a, b: (a, b, (*c[:1], *d[1:])),
    "C is D twice": lambda c, d, a, b: (a, b, d),
}


@pytest.mark.parametrize("form", [SOME[0], SOME[1]])
@pytest.mark.parametrize("odd", list(ODD))
def test_what_cannot_be_one_operation(form: str, odd: str) -> None:
    name = name_of(form)
    counts = parse(instruction(name)).registers()
    d, a, b, c = map(vector, "dabc", counts)
    others = ODD[odd](c.items, d.items, a.items, b.items)
    second = [instruction(name, vector(x, counts[0]), *map(Vector, others)) for x in "ef"]
    program = [instruction(name, d, a, b, c), *second]
    lanes = cohort(64)
    values = fill(program, 64, np.random.default_rng(9))
    want = interpret(program, values, lanes)
    got, groups = run_fused(program, values, lanes, None)
    assert same(got, want, set(want))
    assert groups > 1


@pytest.mark.parametrize("form", [SOME[0], SOME[2]])
def test_warps_in_parts(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = [
        mma_of(form, f"c{j}", f"a{k}", f"b{j}{k}", f"c{j}") for k in range(2) for j in range(3)
    ]
    values = fill(program, 32 * 5, np.random.default_rng(6))
    for i in range(4):
        values[f"c1.{i}"] = values[f"c1.{i}"][:1]
    values["a0.1"] = values["a0.1"][:1]
    c = cohort(32 * 5)
    want, _ = run_fused(program, values, c, None)
    for size in (1, 100_000):
        monkeypatch.setattr(mma_panels, "WORKING_SET", size)
        got, _ = run_fused(program, values, c, None)
        assert same(got, want, set(want))


def test_sizes_of_cohorts_are_not_kept_for_ever() -> None:
    made = made_op(SOME[0])
    registers = warp_registers(SOME[0], 32, np.random.default_rng(1))
    want = call(made, cohort(32), registers)
    spaces = weakref.WeakSet[Any]()
    make = mma_panels._Space

    def remembered(*arguments: Any) -> Any:
        space = make(*arguments)
        spaces.add(space)
        return space

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mma_panels, "_Space", remembered)
        for warps in range(1, 40):
            got = call(made, cohort(32 * warps), [np.tile(r, warps) for r in registers])
            assert all(np.array_equal(x[-32:], y) for x, y in zip(got, want, strict=True))
    gc.collect()
    assert 0 < len(spaces) < 20


def test_forms_do_not_mix() -> None:
    one = mma_of(SOME[0], "d", "a", "b", "c")
    other = mma_of("m16n8k8.row.col.f32.bf16.bf16.f32", "e", "x", "y", "z")
    assert [len(g.instructions) for g in fuse([one, one, other, one], Env(target=90))] == [2, 1, 1]
    guarded = Instruction(
        one.opcode, one.modifiers, one.operands, Guard("%p", False), 1, None, "", 0
    )
    assert [len(g.instructions) for g in fuse([guarded, one, guarded], Env(target=90))] == [1, 1, 1]


def test_sinks_and_literals() -> None:
    form = SOME[0]
    name = name_of(form)
    registers = warp_registers(form, 32, np.random.default_rng(7))
    a, b = vector("a", 4), vector("b", 2)
    zero = Vector((Immediate(0.0, single_bits=0),) * 4)
    d = Vector((Register("d0"), Sink(), Register("d2"), Sink()))
    made = fuse([instruction(name, d, a, b, zero)], Env(target=90))[0]
    assert [r.name for r in made.results] == ["d0", "d2"]
    assert len(made.sources) == 7
    named = dict(zip([*a.items, *b.items, zero.items[0]], registers, strict=False))
    named[zero.items[0]] = np.zeros(1, np.uint32)
    got = call(made.op, cohort(32), [named[o] for o in made.sources])
    want = call(made_op(form), cohort(32), [*registers[:6], *[np.zeros(32, np.uint32)] * 4])
    assert np.array_equal(got[0], want[0])
    assert np.array_equal(got[1], want[2])
    nothing = op(name, Sink(), a, b, zero)
    assert len(nothing.results) == 4


@pytest.mark.parametrize("form", [SOME[0], SOME[3]])
def test_operations_are_counted(form: str) -> None:
    c = cohort(64)
    ins = mma_of(form, "d", "a", "b", "c")
    program = [ins, ins]
    for group in fuse(program, Env(target=90, count=True)):
        registers = dict(
            zip(
                [o.name for v in ins.operands[1:] for o in v.items],
                warp_registers(form, 64, np.random.default_rng(0)),
                strict=True,
            )
        )
        call(group.op, c, [registers[o.name] for o in group.sources])
    case = Case(form)
    assert [(f, x is c) for _, x, f in c.wave.counters.seen] == [
        (2 * case.m * 8 * case.k, True)
    ] * 2


def test_it_waits_for_whole_warps() -> None:
    made = made_op(SOME[0])
    c = cohort([0, 1, *range(32, 64)], 64)
    assert made.ready is not None
    assert made.waits_for is not None
    assert made.warp_gate
    assert made.ready(c, *[np.zeros(1)] * 10).tolist() == [False] * 2 + [True] * 32
    text = made.waits_for(cohort([0, 1], 64), *[np.zeros(1)] * 10)
    assert text == "lanes 0xfffffffc of its warp at mma.sync"


@pytest.mark.parametrize(
    "form",
    [
        "m8n8k4.row.col.f32.f16.f16.f32",
        "m16n8k16.col.row.f32.f16.f16.f32",
        "m16n8k32.row.col.f32.f16.f16.f32",
        "m16n8k16.row.col.f16.bf16.bf16.f16",
        "m16n8k16.row.col.f32.f16.bf16.f32",
        "m16n8k32.row.col.f32.e2m1.e2m1.f32",
        "m16n8k32.row.col.kind::f8f6f4.f32.s8.s8.f32",
        "m16n8k64.row.col.kind::mxf4.block_scale.f32.e2m1.e2m1.f32.ue8m0",
        "m16n8k32.row.col.s32.s8.s4.s32",
        "m16n8k32.row.col.rn.s32.s8.s8.s32",
        "m16n8k256.row.col.s32.b1.b1.s32",
        "m16n8k16.row.col.f32.f16.f16.f32.xor.popc",
        "m16n8k16.row.col.satfinite.f32.f16.f16.f32",
        "m16n8k16.row.col.s32.f16.f16.s32",
        "m16n8k32.row.col.f32.fast.e4m3.e4m3.f32",
    ],
)
def test_forms_that_are_refused(form: str) -> None:
    with pytest.raises(Unsupported):
        op(name_of(form), *(vector(x, 4) for x in "dabc"))


def test_operands_that_are_refused() -> None:
    with pytest.raises(Unsupported, match="operands of"):
        op(name_of(SOME[0]), *(vector(x, 4) for x in "dabc"))
    with pytest.raises(Unsupported):
        op("mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32")
    with pytest.raises(Unsupported):
        op("wmma.mma.sync.aligned.row.col.m16n16k16.f32.f32")
