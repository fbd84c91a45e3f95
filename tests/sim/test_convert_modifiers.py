"""Modifiers of cvt, packed pairs, cvt.pack, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from cumla.sim.isa.rounding import LARGE
from cumla.sim.isa.table import DTYPES, Unsupported
from sim.ieee import as_double, assert_same, ends, rounded
from sim.ops import op, run


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def test_sat_and_relu() -> None:
    values = np.array([-np.inf, -0.25, -0.0, 0.0, 0.3, 1.0, 1.5, np.inf, np.nan, -np.nan])
    expected = np.array([0, 0, 0, 0, 0.3, 1, 1, 1, 0, 0])
    for source in ("f16", "f32", "f64"):
        given = values.astype(DTYPES[source])
        kept = expected.astype(DTYPES[source])
        for to in ("f16", "f32", "f64"):
            mode = ".rz" if DTYPES[to].itemsize < DTYPES[source].itemsize else ""
            want = [rounded(value, to, "rz") for value in kept.astype(np.float64).tolist()]
            assert_same(as_double(run(f"cvt{mode}.sat.{to}.{source}", given), to), want)
    assert (
        run("cvt.rzi.sat.f32.f32", values.astype(np.float32)).tolist()
        == [0] * 5 + [1] * 3 + [0] * 2
    )
    given = values.astype(np.float32)
    for mode in ("rn", "rz"):
        assert run(f"cvt.{mode}.relu.bf16.f32", given[:4]).tolist() == [0] * 4
        assert run(f"cvt.{mode}.relu.f16.f32", given[:4]).view(np.uint16).tolist() == [0] * 4
        assert run(f"cvt.{mode}.relu.tf32.f32", given[:4]).tolist() == [0] * 4
        got = run(f"cvt.{mode}.relu.f16x2.f32", given[1], given[5:])
        assert got.tolist() == [0x3C00, 0x3E00, 0x7C00, 0x7FFF, 0x7FFF]
        got = run(f"cvt.{mode}.relu.bf16x2.f32", given[5:], given[1])
        assert [v >> 16 for v in got.tolist()] == [0x3F80, 0x3FC0, 0x7F80, 0x7FFF, 0x7FFF]
        assert not (got & 0xFFFF).any()


def test_satfinite() -> None:
    values = np.array([np.inf, 3.4028234e38, 1e30, 65520, 65504, np.nan], np.float32)
    assert run("cvt.rn.satfinite.f16.f32", values).view(np.uint16).tolist() == [0x7BFF] * 5 + [
        0x7FFF
    ]
    assert run("cvt.rn.satfinite.f16.f32", -values[:5]).view(np.uint16).tolist() == [0xFBFF] * 5
    got = run("cvt.rn.satfinite.f16x2.f32", values[:3], -values[:3])
    assert got.tolist() == [0x7BFFFBFF] * 3
    assert run("cvt.rn.satfinite.bf16.f32", values[[0, 1, 5]]).tolist() == [0x7F7F, 0x7F7F, 0x7FFF]
    got = run("cvt.rn.satfinite.bf16x2.f32", -values[:2], values[:2])
    assert got.tolist() == [0xFF7F7F7F] * 2
    for mode in ("rn", "rna", "rz"):
        got = run(f"cvt.{mode}.satfinite.tf32.f32", values[[0, 1, 5]])
        assert got.tolist() == [0x7F7FE000, 0x7F7FE000, 0x7FFFE000]
    assert run("cvt.rn.relu.satfinite.f16.f32", [-np.inf, np.inf]).view(np.uint16).tolist() == [
        0,
        0x7BFF,
    ]


def test_ftz() -> None:
    tiny = np.array([2.0**-127, -(2.0**-130), 2.0**-126, -(2.0**-126), -0.0, np.inf], np.float32)
    flushed = np.array([0.0, -0.0, 2.0**-126, -(2.0**-126), -0.0, np.inf])
    assert_same(run("cvt.ftz.f32.f32", tiny).astype(np.float64), flushed)
    assert_same(run("cvt.ftz.f64.f32", tiny), flushed)
    assert_same(as_double(run("cvt.rn.ftz.bf16.f32", tiny), "bf16"), flushed)
    assert_same(run("cvt.rn.ftz.f32.f64", tiny.astype(np.float64)).astype(np.float64), flushed)
    bits = (tiny.view(np.uint32) >> 16).astype(np.uint16)
    assert_same(run("cvt.ftz.f32.bf16", bits).astype(np.float64), flushed)
    # A subnormal f16 is a normal f32.
    assert run("cvt.ftz.f32.f16", np.float16(6e-8)).tolist() == [2.0**-24]
    assert run("cvt.rp.f16.f32", tiny[:2]).view(np.uint16).tolist() == [1, 0x8000]
    assert run("cvt.rp.ftz.f16.f32", tiny[:2]).view(np.uint16).tolist() == [0, 0x8000]
    assert run("cvt.rn.ftz.f16.f32", tiny[:2]).view(np.uint16).tolist() == [0, 0x8000]
    assert math.isnan(run("cvt.ftz.f32.f32", np.nan)[0])


# Pairs


def test_the_first_operand_is_the_upper_half() -> None:
    assert run("cvt.rn.bf16x2.f32", 1.0, -2.0).tolist() == [0x3F80C000]
    assert run("cvt.rn.f16x2.f32", 1.0, -2.0).tolist() == [0x3C00C000]
    many = np.full(LARGE, -2.0, np.float32)
    assert run("cvt.rn.f16x2.f32", 1.0, many).tolist() == [0x3C00C000] * LARGE
    assert run("cvt.rn.bf16x2.f32", many, 1.0).tolist() == [0xC0003F80] * LARGE


def test_stochastic_rounding_carries_from_the_random_bits() -> None:
    """PTX ISA cvt, .rs: away from zero if discarded bits plus random bits carry out."""
    random = np.random.default_rng(19)
    bits = random.integers(0, 1 << 32, 2000, np.uint32)
    a = bits.view(np.float32)
    a = np.where(np.isnan(a), np.float32(1.5), a)
    r = random.integers(0, 1 << 32, 2000, np.uint32)
    r[:500] = (0x10000 - (a[:500].view(np.uint32) & 0xFFFF)) & 0xFFFF  # just carries
    r[500:1000] = 0xFFFF - (a[500:1000].view(np.uint32) & 0xFFFF)  # just does not
    expected = []
    for x, y in zip(a.view(np.uint32).tolist(), r.tolist(), strict=True):
        expected.append((x >> 16) + ((x & 0xFFFF) + (y & 0xFFFF) >> 16))
    one = np.float32(1)
    assert run("cvt.rs.bf16x2.f32", one, a, r).tolist() == [0x3F800000 | v for v in expected]
    assert run("cvt.rs.bf16x2.f32", a, one, r << 16).tolist() == [
        0x3F80 | v << 16 for v in expected
    ]

    half = random.integers(0x0400, 0x7BFF, 2000).astype(np.uint16)
    below = random.integers(0, 1 << 13, 2000, np.uint32)
    sign = random.integers(0, 2, 2000).astype(np.uint16) << 15
    a = half.view(np.float16).astype(np.float32)
    a = (a.view(np.uint32) | below | sign.astype(np.uint32) << 16).view(np.float32)
    r = (random.integers(0, 8, 2000, np.uint32) << 13) | ((1 << 13) - below) & 0x1FFF
    r[::2] -= (r[::2] & 0x1FFF > 0).astype(np.uint32)
    carries = (r & 0x1FFF) + below >> 13
    expected = (half + carries).astype(np.uint32) | sign
    assert 500 < carries.sum() < 1500
    assert run("cvt.rs.f16x2.f32", one, a, r).tolist() == (0x3C000000 | expected).tolist()
    assert run("cvt.rs.f16x2.f32", a, one, r << 16).tolist() == (expected << 16 | 0x3C00).tolist()
    # Between two subnormal numbers the random bits weigh as a fraction of their distance.
    tiny = np.full(4, 3.25 * 2.0**-24, np.float32)
    got = run("cvt.rs.f16x2.f32", 0.0, tiny, np.array([0, 0x17FF, 0x1800, 0x1FFF]))
    assert got.tolist() == [3, 3, 4, 4]
    assert run("cvt.rs.f16x2.f32", np.nan, np.inf, 0x1FFF1FFF).tolist() == [0x7FFF7C00]
    assert run("cvt.rs.satfinite.f16x2.f32", np.inf, -1e9, 0x1FFF1FFF).tolist() == [0x7BFFFBFF]
    assert run("cvt.rs.relu.bf16x2.f32", np.nan, -1.0, 0).tolist() == [0x7FFF0000]


@pytest.mark.parametrize("kind", ["u2", "s2", "u4", "s4", "u8", "s8", "u16", "s16"])
def test_pack(kind: str) -> None:
    random = np.random.default_rng(23)
    edges = [-(2**31), -32769, -32768, -129, -128, -9, -8, -3, -2, -1, 0, 1, 2, 3, 4, 7, 8, 15, 16]
    edges += [127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1]
    a, b = (grid.reshape(-1) for grid in np.meshgrid(np.array(edges, np.int32), edges))
    c = random.integers(0, 1 << 32, a.size, np.uint32)
    size = int(kind[1:])
    low, high = ends(kind)
    name = f"cvt.pack.sat.{kind}.s32" + (".b32" if size < 16 else "")
    got = run(name, a, b, c) if size < 16 else run(name, a, b)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        x, y = (min(max(v, low), high) % 2**size for v in (x, y))
        rest = z * 4**size % 2**32 if size < 16 else 0
        assert result == rest + x * 2**size + y


@pytest.mark.parametrize(
    "name",
    [
        "cvt.f32.s32",
        "cvt.s32.f32",
        "cvt.rn.s32.f32",
        "cvt.rni.f32.s32",
        "cvt.rn.u32.s32",
        "cvt.f16.f32",
        "cvt.rni.f16.f32",
        "cvt.rna.f16.f32",
        "cvt.rs.bf16.f32",
        "cvt.rm.f16x2.f32",
        "cvt.rm.tf32.f32",
        "cvt.tf32.f32",
        "cvt.rn.f32.tf32",
        "cvt.rna.relu.tf32.f32",
        "cvt.rn.relu.f16.f64",
        "cvt.rn.satfinite.f16.s32",
        "cvt.rm.satfinite.f16.f32",
        "cvt.rn.sat.bf16.f32",
        "cvt.rn.ftz.f16.f64",
        "cvt.ftz.s32.u32",
        "cvt.rn.rz.f16.f32",
        "cvt.rn.noftz.f16.f32",
        "cvt.rn.f16.b16",
        "cvt.u32",
        "cvt.rz.relu.f32.f64",
        "cvt.pack.u8.s32.b32",
        "cvt.pack.sat.u8.s32",
        "cvt.pack.sat.u32.s32",
        "cvt.pack.sat.u16.s32.b32",
    ],
)
def test_what_is_not_a_conversion_is_refused(name: str) -> None:
    with pytest.raises(Unsupported):
        op(name)


def test_a_single_value_stays_single() -> None:
    for name in (
        "cvt.rn.f32.u32",
        "cvt.rzi.s32.f32",
        "cvt.f32.f16",
        "cvt.rn.bf16.f32",
        "cvt.u64.u32",
    ):
        assert run(name, 3).shape == (1,)
