from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cumla.sim.isa.table import Unsupported
from cumla.sim.ptx.syntax import Register
from sim import ops
from sim.reference import MODES, edges, expected, pairs, random_bits, ties, triples

SIGN = 1 << 31


def run(name: str, *bits: Any) -> Any:
    """Result bits of an instruction on operand bits, with as many operands as are given."""
    op = ops.op(name, *[Register(f"%f{i}") for i in range(len(bits) + 1)])
    assert len(op.sources) == len(bits)
    dtypes = {"f32": np.float32, "b64": np.uint64, "f16": np.float16, "bf16": np.uint16}
    sources = [np.atleast_1d(x).view(dtypes[t]) for x, t in zip(bits, op.sources, strict=True)]
    kept = [x.copy() for x in sources]
    result = op.run(*sources)
    for x, before in zip(sources, kept, strict=True):
        assert x.tobytes() == before.tobytes()  # registers share arrays
    kind = op.results[0]
    if kind == "pred":
        return result
    assert result.dtype == dtypes[kind]
    return result.view(np.uint64 if kind == "b64" else np.uint32)


def single(*values: float) -> Any:
    return np.array(values, np.float32).view(np.uint32)


def flushed(bits: Any) -> Any:
    return np.where(bits & 0x7F800000 == 0, bits & SIGN, bits)


def same(got: Any, want: Any, *operands: Any) -> None:
    assert got.shape == want.shape
    wrong = np.flatnonzero(got != want)
    if wrong.size:
        i = wrong[0]
        shown = [f"{int(x[i]):#x}" for x in operands]
        pytest.fail(f"{wrong.size} wrong, {shown} gives {got[i]:#x}, not {want[i]:#x}")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_two_operands(name: str, mode: str) -> None:
    a, b = pairs("f32", 1500, 1)
    want = expected(name, "f32", mode, a, b)
    same(run(f"{name}.{mode}.f32", a, b), want, a, b)
    if mode == "rn" and name != "div":
        same(run(f"{name}.f32", a, b), want, a, b)
    flat = expected(name, "f32", mode, flushed(a), flushed(b))
    same(run(f"{name}.{mode}.ftz.f32", a, b), flushed(flat), a, b)


@pytest.mark.parametrize("mode", MODES)
def test_one_operand(mode: str) -> None:
    a = np.concatenate([np.array(edges("f32"), np.uint32), random_bits("f32", 1500, 2)])
    for name in ("rcp", "sqrt"):
        same(run(f"{name}.{mode}.f32", a), expected(name, "f32", mode, a), a)
        flat = flushed(expected(name, "f32", mode, flushed(a)))
        same(run(f"{name}.{mode}.ftz.f32", a), flat, a)


@pytest.mark.parametrize("mode", MODES)
def test_fma(mode: str) -> None:
    operands = triples("f32", 600, 3)
    for names in ("fma", "mad"):
        same(run(f"{names}.{mode}.f32", *operands), expected("fma", "f32", mode, *operands))
    flat = expected("fma", "f32", mode, *map(flushed, operands))
    same(run(f"fma.{mode}.ftz.f32", *operands), flushed(flat), *operands)


def test_fma_near_ties() -> None:
    normal = ties("f32", 300, 4)
    # Sums just below 2**-126, whose last place is 2**-149.
    a, b, c = (x[:300].view(np.float32).astype(np.float64) for x in normal)
    small = np.minimum(np.abs(c) * 2.0**-150, 2.0**-126 - 2.0**-149) * np.sign(c)
    tiny = (a, b * 2.0**-150, small)
    for operands in (normal, tuple(x.astype(np.float32).view(np.uint32) for x in tiny)):
        want = expected("fma", "f32", "rn", *operands)
        a, b, c = (x.view(np.float32).astype(np.float64) for x in operands)
        twice = (a * b + c).astype(np.float32).view(np.uint32)
        assert np.count_nonzero(twice != want) > 50  # the data tells
        same(run("fma.rn.f32", *operands), want, *operands)
        for mode in MODES:
            want = expected("fma", "f32", mode, *operands)
            same(run(f"fma.{mode}.f32", *operands), want, *operands)


def test_one_element_stands_for_all_lanes() -> None:
    a, b, c = ties("f32", 40, 5)
    for uniform in itertools.product([False, True], repeat=3):
        operands = [x[:1] if u else x for x, u in zip((a, b, c), uniform, strict=True)]
        lanes = 1 if all(uniform) else a.size
        full = [np.repeat(x, lanes) if x.size == 1 else x for x in operands]
        for name in ("fma.rn.f32", "fma.rp.f32", "fma.rn.ftz.f32"):
            mode = name.split(".")[1]
            same(run(name, *operands), expected("fma", "f32", mode, *full))


def test_ftz_input_matters_where_the_result_is_normal() -> None:
    a, b = single(2.0**-140, 2.0**-126, 2.0**-100), single(2.0**100, 2.0**-127, 2.0**-126)
    same(run("mul.ftz.f32", a, b), single(0, 0, 0))
    same(run("add.ftz.f32", a, b), single(2.0**100, 2.0**-126, 2.0**-100))
    same(run("add.rp.ftz.f32", single(2.0**-140), single(1.0)), single(1.0))
    same(run("fma.rn.ftz.f32", single(-(2.0**-127)), single(1.0), single(-0.0)), single(-0.0))


def test_ftz_on_arrays_of_one_size() -> None:
    """Few lanes of like size together: what is looked at depends on all lanes of an array."""
    rng = np.random.default_rng(15)
    for sizes in itertools.product([-140, -127, -120, -51, 0, 18, 110], repeat=3):
        exponents = np.array(sizes)[:, None] + rng.integers(-1, 2, (3, 4))
        numbers = np.ldexp(rng.uniform(1, 2, (3, 4)) * rng.choice([-1, 1], (3, 4)), exponents)
        operands = tuple(single(*x) for x in numbers)
        inputs = tuple(map(flushed, operands))
        want = flushed(expected("fma", "f32", "rn", *inputs))
        same(run("fma.rn.ftz.f32", *operands), want, *operands)
        if sizes[2] == 0:
            for name in ("add", "sub", "mul"):
                want = flushed(expected(name, "f32", "rn", *inputs[:2]))
                same(run(f"{name}.ftz.f32", *operands[:2]), want, *operands)
    # A tie, but for an addend that is flushed; and a zero, but for a factor that is.
    a, b, c = single(1 + 3 * 2.0**-23), single(1.5), single(2.0**-127)
    same(run("fma.rn.ftz.f32", a, b, c), expected("fma", "f32", "rn", a, b, single(0)))
    a, b, c = single(2.0**-127), single(2.0**19), single(-(2.0**-108))
    same(run("fma.rn.ftz.f32", a, b, c), c)


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_sat(name: str) -> None:
    a, b = pairs("f32", 500, 6)
    plain = expected(name, "f32", "rn", a, b).view(np.float32)
    want = [0.0 if not x > 0 else min(float(x), 1.0) for x in plain]
    same(run(f"{name}.sat.f32", a, b), single(*want), a, b)
    got = run("fma.rn.sat.f32", single(np.nan, 3, 0.5), single(1, 1, 1), single(1, 1, -0.25))
    same(got, single(0, 1, 0.25))


def extreme(name: str, nan: bool, a: int, b: int) -> int:
    """PTX ISA's max_num and max_nan, min_num and min_nan."""
    x, y = (struct.unpack("f", struct.pack("I", v))[0] for v in (a, b))
    if (x != x and y != y) or (nan and (x != x or y != y)):
        return 0x7FFFFFFF
    if x != x:
        return b
    if y != y:
        return a
    below = (x, -(a >> 31)) < (y, -(b >> 31))
    return a if below == (name == "min") else b


@pytest.mark.parametrize("flags", ["", "NaN", "ftz", "xorsign.abs", "NaN.xorsign.abs", "ftz.NaN"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_min_max(name: str, flags: str) -> None:
    a, b = pairs("f32", 300, 7)
    nan = "NaN" in flags
    x, y = (flushed(v) if "ftz" in flags else v for v in (a, b))
    if "abs" in flags:
        want = []
        for p, q in zip(x.tolist(), y.tolist(), strict=True):
            got = extreme(name, nan, p & ~SIGN, q & ~SIGN)
            is_nan = got > 0x7F800000
            want.append(got if is_nan else got | (p ^ q) & SIGN)
    else:
        want = [extreme(name, nan, *v) for v in zip(x.tolist(), y.tolist(), strict=True)]
    got = run(".".join(filter(None, (name, flags, "f32"))), a, b)
    same(got, np.array(want, np.uint32), a, b)


@pytest.mark.parametrize("flags", ["", "NaN", "abs", "ftz.NaN.abs"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_min_max_of_three(name: str, flags: str) -> None:
    operands = triples("f32", 400, 8)
    change = [flushed] * ("ftz" in flags) + [lambda x: x & ~np.uint32(SIGN)] * ("abs" in flags)
    changed = operands
    for function in change:
        changed = tuple(map(function, changed))
    nan = "NaN" in flags
    want = [
        extreme(name, nan, extreme(name, nan, a, b), c)
        for a, b, c in zip(*(x.tolist() for x in changed), strict=True)
    ]
    got = run(".".join(filter(None, (name, flags, "f32"))), *operands)
    same(got, np.array(want, np.uint32), *operands)


def test_sign_bits() -> None:
    a, b = pairs("f32", 100, 9)
    same(run("abs.f32", a), a & ~np.uint32(SIGN))
    same(run("neg.f32", a), a ^ np.uint32(SIGN))
    same(run("abs.ftz.f32", a), flushed(a & ~np.uint32(SIGN)))
    same(run("neg.ftz.f32", a), flushed(a ^ np.uint32(SIGN)))
    # PTX ISA copysign: "copy sign bit of a into value of b"
    same(run("copysign.f32", a, b), a & np.uint32(SIGN) | b & ~np.uint32(SIGN))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_testp(kind: str) -> None:
    bits = np.array(edges(kind), f"u{4 if kind == 'f32' else 8}")
    size = bits & (bits.dtype.type(np.iinfo(bits.dtype).max >> 1))
    infinity, smallest = (0x7F800000, 1 << 23) if kind == "f32" else (0x7FF << 52, 1 << 52)
    want = {
        "finite": size < infinity,
        "infinite": size == infinity,
        "number": size <= infinity,
        "notanumber": size > infinity,
        "normal": (size == 0) | (size >= smallest) & (size < infinity),
        "subnormal": (size > 0) & (size < smallest),
    }
    for test, answer in want.items():
        op = ops.op(f"testp.{test}.{kind}")
        assert op.results == ("pred",)
        got = op.run(bits.view(np.dtype(f"f{bits.itemsize}")))
        assert got.dtype == np.bool_
        assert got.tolist() == answer.tolist()


def interleave(low: Any, high: Any) -> Any:
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("flags", ["rn", "rz", "rp.ftz"])
def test_pairs_of_f32(name: str, flags: str) -> None:
    count = 3 if name == "fma" else 2
    low, high = triples("f32", 100, 10)[:count], triples("f32", 100, 11)[:count]
    got = run(f"{name}.{flags}.f32x2", *(interleave(*x) for x in zip(low, high, strict=True)))
    want = [run(f"{name}.{flags}.f32", *x) for x in (low, high)]
    same(got, interleave(*want))
    first = [interleave(x[:1], y[:1]) for x, y in zip(low, high, strict=True)]
    rest = [interleave(x, y) for x, y in zip(low[1:], high[1:], strict=True)]
    same(
        run(f"{name}.{flags}.f32x2", first[0], *rest),
        interleave(
            run(f"{name}.{flags}.f32", low[0][:1], *low[1:]),
            run(f"{name}.{flags}.f32", high[0][:1], *high[1:]),
        ),
    )


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_mixed_precision(kind: str, mode: str) -> None:
    a, b, _ = triples(kind, 250, 12)
    c = triples("f32", 250, 13)[2]
    wide = [np.array(_widen(x, kind), np.float32).view(np.uint32) for x in (a, b)]
    for name in ("add", "sub"):
        got = run(f"{name}.{mode}.f32.{kind}", a, c)
        same(got, expected(name, "f32", mode, wide[0], c), a, c)
    got = run(f"fma.{mode}.f32.{kind}", a, b, c)
    want = expected("fma", "f32", mode, *wide, c)
    same(got, want, a, b, c)
    clamped = [0.0 if not x > 0 else min(float(x), 1.0) for x in want.view(np.float32)]
    same(run(f"fma.{mode}.sat.f32.{kind}", a, b, c), single(*clamped), a, b, c)


def _widen(bits: Any, kind: str) -> Any:
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    "name",
    [
        "add.rn.rz.f32",
        "add.rn.rn.f32",
        "add.hi.f32",
        "fma.f32",
        "fma.ftz.f32",
        "div.f32",
        "div.approx.full.f32",
        "div.approx.rn.f32",
        "rcp.f32",
        "sqrt.ftz.f32",
        "fma.rn.sat.f32x2",
        "add.ftz.f32.f16",
        "fma.f32.bf16",
        "max.abs.f32",
        "max.xorsign.f32",
        "abs.rn.f32",
        "copysign.ftz.f32",
        "testp.f32",
        "testp.finite.number.f32",
    ],
)
def test_forms_that_ptx_does_not_have(name: str) -> None:
    with pytest.raises(Unsupported):
        ops.op(name)


def test_large_arrays_are_as_small_ones() -> None:
    a, b, c = triples("f32", 3000, 14)
    for name in ("fma.rn.f32", "add.rn.ftz.f32", "mul.ftz.f32", "max.NaN.f32"):
        operands = (a, b, c)[: 3 if name.startswith("fma") else 2]
        whole = run(name, *operands)
        parts = [run(name, *(x[i : i + 100] for x in operands)) for i in range(0, a.size, 100)]
        same(whole, np.concatenate(parts))
