from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cumla.sim.isa.table import Unsupported
from sim import ops
from sim.reference import expected, pairs, random_bits, ties, triples, values

KINDS = ("f16", "bf16")
DTYPE = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}
NORMAL = {"f16": 0x0400, "bf16": 0x0080}
INFINITY = {"f16": 0x7C00, "bf16": 0x7F80}
ONE = {"f16": 0x3C00, "bf16": 0x3F80}
ALL = np.arange(1 << 16, dtype=np.uint16)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def run(name: str, *bits: Any) -> Any:
    """Result bits of an instruction on operand bits: uint16, or uint32 for pairs."""
    op = ops.op(name)
    kind = name.split(".")[-1]
    assert op.sources == (kind,) * len(bits)
    assert op.results == (kind,)
    dtype = {"f16": np.float16, "bf16": np.uint16}.get(kind, np.uint32)
    sources = [np.atleast_1d(x).view(dtype) for x in bits]
    kept = [x.tobytes() for x in sources]
    result = op.run(*sources)
    assert [x.tobytes() for x in sources] == kept  # registers share arrays
    assert result.dtype == dtype
    return result.view(np.uint16) if dtype == np.float16 else result


def same(got: Any, want: Any, *operands: Any) -> None:
    assert got.shape == want.shape
    wrong = np.flatnonzero(got != want)
    if wrong.size:
        i = wrong[0]
        shown = [f"{int(x[i]):#x}" for x in operands]
        pytest.fail(f"{wrong.size} wrong, {shown} gives {got[i]:#x}, not {want[i]:#x}")


def flushed(bits: Any, kind: str = "f16") -> Any:
    return np.where(bits & 0x7FFF < NORMAL[kind], bits & 0x8000, bits).astype(np.uint16)


def is_nan(bits: Any, kind: str) -> Any:
    return bits & 0x7FFF > INFINITY[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_two_operands(name: str, kind: str) -> None:
    a, b = pairs(kind, 4000, 1)
    want = expected(name, kind, "rn", a, b)
    same(run(f"{name}.{kind}", a, b), want, a, b)
    same(run(f"{name}.rn.{kind}", a, b), want, a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_every_first_operand(name: str, kind: str) -> None:
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    for second in (1, 0x8001, NORMAL[kind] - 1, ONE[kind] + 1, INFINITY[kind] - 1, 0x3555):
        b = np.array([second], np.uint16)
        want = function(ALL.view(DTYPE[kind]), b.view(DTYPE[kind])).view(np.uint16)
        want = np.where(is_nan(want, kind), 0x7FFF, want)
        same(run(f"{name}.{kind}", ALL, b), want, ALL)
        few = slice(0x3C00, 0x3C40)  # a short array may take another way
        same(run(f"{name}.{kind}", ALL[few], b), want[few], ALL[few])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [40, 3000])
def test_fma(kind: str, count: int) -> None:
    operands = triples(kind, count, 2)
    same(run(f"fma.rn.{kind}", *operands), expected("fma", kind, "rn", *operands), *operands)


@pytest.mark.parametrize("kind", KINDS)
def test_fma_near_ties(kind: str) -> None:
    operands = ties(kind, 600, 3)
    want = expected("fma", kind, "rn", *operands)
    a, b, c = (x.view(DTYPE[kind]).astype(np.float32) for x in operands)
    twice = (a * b + c).astype(DTYPE[kind]).view(np.uint16)
    assert np.count_nonzero(twice != want) > 100  # the data tells
    same(run(f"fma.rn.{kind}", *operands), want, *operands)
    for i in range(3):  # one element for all lanes
        parts = [x[:1] if j == i else x for j, x in enumerate(operands)]
        full = [np.repeat(x, len(want)) if len(x) == 1 else x for x in parts]
        same(run(f"fma.rn.{kind}", *parts), expected("fma", kind, "rn", *full), *full)


def test_fma_bf16_beyond_the_range_of_f32() -> None:
    """Products that are no f32, and sums that come back into the range."""
    rng = np.random.default_rng(4)
    for exponents in (2, 90, 105, 121, 128, 254, 381, 382, 383):  # biased, of both factors
        a, b = (random_bits("bf16", 300, 5 + i) for i in range(2))
        exponent = rng.integers(max(1, exponents - 254), min(255, exponents), 300)
        other = exponents - exponent
        a = (a & 0x807F | exponent << 7).astype(np.uint16)
        b = (b & 0x807F | other << 7).astype(np.uint16)
        product = -np.array(values(a, "bf16")) * np.array(values(b, "bf16"))
        shift = np.exp2(rng.integers(-12, 13, 300))
        c = (product * shift).astype(ml_dtypes.bfloat16).view(np.uint16)
        same(run("fma.rn.bf16", a, b, c), expected("fma", "bf16", "rn", a, b, c), a, b, c)
    # 2**128 + (-2**127) is 2**127.
    a, b, c = (np.array([x], np.uint16) for x in (0x5F80, 0x5F80, 0xFF00))
    assert run("fma.rn.bf16", a, b, c) == 0x7F00


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_ftz(name: str) -> None:
    count = 3 if name == "fma" else 2
    operands = triples("f16", 1500, 7)[:count]
    rounding = ".rn" if name == "fma" else ""
    inputs = [flushed(x) for x in operands]
    want = expected(name, "f16", "rn", *inputs)
    # What is subnormal before it is rounded counts, also if it is rounded up to 2**-14.
    tiny = expected(name, "f16", "rz", *inputs) & 0x7FFF < 0x0400
    want = np.where(tiny, want & 0x8000, want)
    same(run(f"{name}{rounding}.ftz.f16", *operands), want, *operands)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_sat(name: str) -> None:
    count = 3 if name == "fma" else 2
    operands = triples("f16", 1000, 8)[:count]
    plain = expected(name, "f16", "rn", *operands).view(np.float16)
    want = np.array([0.0 if not x > 0 else min(float(x), 1.0) for x in plain], np.float16)
    rounding = ".rn" if name == "fma" else ""
    same(run(f"{name}{rounding}.sat.f16", *operands), want.view(np.uint16), *operands)


@pytest.mark.parametrize("kind", KINDS)
def test_relu(kind: str) -> None:
    operands = triples(kind, 1000, 9)
    plain = expected("fma", kind, "rn", *operands)
    want = np.where(is_nan(plain, kind), 0x7FFF, np.where(plain & 0x8000, 0, plain))
    same(run(f"fma.rn.relu.{kind}", *operands), want.astype(np.uint16), *operands)


@pytest.mark.parametrize("kind", KINDS)
def test_sign_bits(kind: str) -> None:
    same(run(f"abs.{kind}", ALL), ALL & 0x7FFF)
    same(run(f"neg.{kind}", ALL), ALL ^ 0x8000)
    if kind == "f16":
        same(run("abs.ftz.f16", ALL), flushed(ALL & 0x7FFF))
        same(run("neg.ftz.f16", ALL), flushed(ALL ^ 0x8000))


def extreme(name: str, kind: str, nan: bool, a: int, b: int) -> int:
    """PTX ISA's max_num and max_nan, min_num and min_nan."""
    x, y = values([a], kind)[0], values([b], kind)[0]
    if (x != x and y != y) or (nan and (x != x or y != y)):
        return 0x7FFF
    if x != x:
        return b
    if y != y:
        return a
    below = (x, -(a >> 15)) < (y, -(b >> 15))
    return a if below == (name == "min") else b


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", ["", "NaN", "xorsign.abs", "NaN.xorsign.abs", "ftz", "ftz.NaN"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_min_max(name: str, flags: str, kind: str) -> None:
    whole = ".".join(filter(None, (name, flags, kind)))
    if kind == "bf16" and "ftz" in flags:
        with pytest.raises(Unsupported):
            ops.op(whole)
        return
    a, b = pairs(kind, 300, 10)
    x, y = (flushed(v) if "ftz" in flags else v for v in (a, b))
    want = []
    for p, q in zip(x.tolist(), y.tolist(), strict=True):
        if "abs" in flags:
            got = extreme(name, kind, "NaN" in flags, p & 0x7FFF, q & 0x7FFF)
            want.append(got if got > INFINITY[kind] else got | (p ^ q) & 0x8000)
        else:
            want.append(extreme(name, kind, "NaN" in flags, p, q))
    same(run(whole, a, b), np.array(want, np.uint16), a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma.rn", "min", "max.NaN", "abs", "neg"])
def test_pairs(name: str, kind: str) -> None:
    count = {"fma.rn": 3, "abs": 1, "neg": 1}.get(name, 2)
    low, high = triples(kind, 100, 11)[:count], triples(kind, 100, 12)[:count]
    joined = [
        x.astype(np.uint32) | y.astype(np.uint32) << 16 for x, y in zip(low, high, strict=True)
    ]
    want = [run(f"{name}.{kind}", *x).astype(np.uint32) for x in (low, high)]
    same(run(f"{name}.{kind}x2", *joined), want[0] | want[1] << 16, *joined)
    if count > 1:  # one element for all lanes
        joined[0] = joined[0][:1]
        parts = ((x[0][:1], *x[1:]) for x in (low, high))
        want = [run(f"{name}.{kind}", *x).astype(np.uint32) for x in parts]
        same(run(f"{name}.{kind}x2", *joined), want[0] | want[1] << 16)


def test_pairs_from_a_column() -> None:
    """Registers need not be contiguous: a vector load may hand out columns."""
    a = np.arange(64, dtype=np.uint32).reshape(32, 2)
    got = run("neg.f16x2", a[:, 1])
    assert (got == (a[:, 1] ^ np.uint32(0x80008000))).all()


@pytest.mark.parametrize(
    "name",
    [
        "add.rz.f16",
        "add.sat.bf16",
        "fma.f16",
        "fma.rn.sat.relu.f16",
        "fma.rn.ftz.bf16",
        "fma.rn.oob.f16",
        "abs.ftz.bf16x2",
        "max.abs.f16",
        "mul.relu.f16",
    ],
)
def test_forms_that_are_not_there(name: str) -> None:
    with pytest.raises(Unsupported):
        ops.op(name)
