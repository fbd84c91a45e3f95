"""Video instructions against Python's integers. PTX ISA "Video Instructions"."""

from __future__ import annotations

import operator
from itertools import product

import pytest

import cumla.sim.isa.video
from cumla.sim.isa.table import Unsupported
from cumla.sim.ptx.syntax import Register
from sim.ints import check, samples, wrap
from sim.ops import op

assert cumla.sim.isa.video is not None
OPERATIONS = {
    "vadd": operator.add,
    "vsub": operator.sub,
    "vabsdiff": lambda a, b: abs(a - b),
    "vmin": min,
    "vmax": max,
    "vavrg": lambda a, b: (a + b + 1) // 2 if a + b >= 0 else (a + b) // 2,
}
COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
TYPES = ["u32", "s32"]
REGISTERS = [0, 0xFFFFFFFF, 0x80808080, 0x7F7F7F7F, 0x80007FFF, 0x7FFF8000, 0x01FE02FD, 0x12345678]


def limited(value: int, width: int, kind: str) -> int:
    low, high = (
        (-(1 << width - 1), (1 << width - 1) - 1) if kind == "s32" else (0, (1 << width) - 1)
    )
    return max(low, min(high, value))


def pieces(value: int, width: int, kind: str) -> list[int]:
    values = [value >> at & ((1 << width) - 1) for at in range(0, 32, width)]
    return [v - (1 << width) if kind == "s32" and v >> (width - 1) else v for v in values]


def joined(values: list[int], width: int) -> int:
    return sum((v & ((1 << width) - 1)) << width * i for i, v in enumerate(values))


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("count", [2, 4])
def test_simd(name: str, count: int) -> None:
    width = 32 // count
    rows = list(product(REGISTERS, REGISTERS, (0, 5, 0xFFFFFFFF)))
    for d, a, b in product(TYPES, repeat=3):

        def parts(x: int, y: int, a: str = a, b: str = b) -> list[int]:
            pairs = zip(pieces(x, width, a), pieces(y, width, b), strict=True)
            return [OPERATIONS[name](p, q) for p, q in pairs]

        form = f"{name}{count}.{d}.{a}.{b}"
        kinds = ["b32"] * 3
        check(form, kinds, lambda x, y, z: joined(parts(x, y), width), rows=rows)
        check(f"{form}.add", kinds, lambda x, y, z: sum(parts(x, y)) + z, rows=rows)
        check(
            f"{form}.sat",
            kinds,
            lambda x, y, z, d=d: joined([limited(v, width, d) for v in parts(x, y)], width),
            rows=rows,
        )


@pytest.mark.parametrize("comparison", list(COMPARISONS))
def test_simd_set(comparison: str) -> None:
    rows = list(product(REGISTERS, REGISTERS, (0, 0xFFFFFFFF)))
    for count, a, b in product((2, 4), TYPES, TYPES):
        width = 32 // count

        def parts(x: int, y: int, width: int = width, a: str = a, b: str = b) -> list[int]:
            pairs = zip(pieces(x, width, a), pieces(y, width, b), strict=True)
            return [int(COMPARISONS[comparison](p, q)) for p, q in pairs]

        form = f"vset{count}.{a}.{b}.{comparison}"
        check(form, ["b32"] * 3, lambda x, y, z, w=width: joined(parts(x, y), w), rows=rows)
        check(f"{form}.add", ["b32"] * 3, lambda x, y, z: sum(parts(x, y)) + z, rows=rows)


SCALARS = [name for name in OPERATIONS if name != "vavrg"]


@pytest.mark.parametrize("name", SCALARS)
def test_scalar(name: str) -> None:
    for d, a, b in product(TYPES, repeat=3):
        form = f"{name}.{d}.{a}.{b}"

        def first(x: int, y: int, d: str = d, saturate: bool = False) -> int:
            value = OPERATIONS[name](x, y)
            return limited(value, 32, d) if saturate else wrap(value, d)

        check(form, [a, b], first)
        check(f"{form}.sat", [a, b], lambda x, y: first(x, y, saturate=True))
        rows = list(product(samples(a, 0)[::2], samples(b, 0)[::3], samples(d, 0)[::3]))
        for second, combine in (("add", operator.add), ("min", min), ("max", max)):
            check(
                f"{form}.{second}",
                [a, b, d],
                lambda x, y, z, combine=combine: combine(first(x, y), z),
                rows=rows,
            )
            check(
                f"{form}.sat.{second}",
                [a, b, d],
                lambda x, y, z, combine=combine: combine(first(x, y, saturate=True), z),
                rows=rows,
            )


def test_scalar_set() -> None:
    for (name, compare), a, b in product(COMPARISONS.items(), TYPES, TYPES):
        check(f"vset.{a}.{b}.{name}", [a, b], compare)
        rows = list(product(samples(a, 0)[::2], samples(b, 0)[::2], (0, 1, 0xFFFFFFFF)))
        check(
            f"vset.{a}.{b}.{name}.max",
            [a, b, "u32"],
            lambda x, y, z, compare=compare: max(compare(x, y), z),
            rows=rows,
        )


@pytest.mark.parametrize(
    "name",
    [
        *("vadd.u32.u32", "vadd.u32.u32.u16", "vadd.u32.u32.u32.add.sat", "vset.u32.u32.lo"),
        *("vset.u32.u32.eq.sat", "vadd4.u32.u32.u32.min", "vset4.u32.u32.eq.sat", "vset2.u32"),
        *(
            "vavrg.u32.u32.u32",
            "vmad.u32.u32.u32",
            "vshl.u32.u32.u32.clamp",
            "vset2.u32.u32.eq.add.add",
        ),
    ],
)
def test_unknown_forms(name: str) -> None:
    with pytest.raises(Unsupported):
        op(name)


def test_selectors_are_unsupported() -> None:
    d, a, b, c = (Register(name) for name in ("%r0", "%r1", "%r2.b10", "%r3"))
    with pytest.raises(Unsupported, match="selector"):
        op("vadd4.u32.u32.u32", d, a, Register("%r2.b3210"), c)
    with pytest.raises(Unsupported, match="selector"):
        op("vadd2.u32.u32.u32", d, a, b, c)
