"""Triton's matmuls and attention for Hopper: wgmma, TMA, warp specialisation.

Nobody here wrote these instruction sequences, so they prove what tests of single instructions
cannot. Factors are small integers: products and sums are exact in every accumulator, and the
result of a matmul must equal NumPy's to the bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from sim.triton_kernels import (
    descriptor_attention,
    descriptor_matmul,
    integers,
    own_descriptors,
    persistent_matmul,
    pointer_attention,
    pointer_matmul,
    product,
    tiles,
)
from sim.triton_kit import CHECKS, DELIVERIES, DTYPES, Compiled, Descriptor, described

tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
WGMMA = "wgmma.mma_async.sync.aligned"
TMA_LOAD = "shared::cta.global.mbarrier::complete_tx::bytes"
TMA_STORE = "global.shared::cta.bulk_group"


def checks(specialised: bool) -> tuple[str, ...]:
    """Triton gives both consumers of a specialised kernel the whole tile if it has 64 rows: they
    write the same bytes twice, by the letter a race; test_triton_broken.py has it.
    """
    return ("memory",) if specialised else CHECKS


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize(
    ("kind", "step"), [("bf16", 64), ("fp16", 64), ("fp8e4nv", 128), ("fp8e5", 128), ("fp32", 32)]
)
def test_matmul_through_pointers(kind: str, step: int, delivery: str) -> None:
    kernel = Compiled(
        pointer_matmul,
        {**dict.fromkeys("ab", f"*{kind}"), "c": "*fp32", **dict.fromkeys("MNK", "i32")},
        tiles(64, 64, step, ACC=tl.float32, EDGES=True),
        multiples="NK",
        num_warps=4,
        num_stages=3,
    )
    assert kernel.has(WGMMA, "cp.async.cg.shared.global", "cp.async.wait_group")
    m, n, k = 100, 80, 2 * step + 16
    a, b = integers(1, (m, k), kind), integers(2, (k, n), kind)
    c = kernel.device.alloc((m, n), np.float32)
    upload = kernel.device.upload
    kernel((2, 2), upload(a), upload(b), c, m, n, k, delivery=delivery)
    assert np.array_equal(c.get(), product(a, b, "fp32"))


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize(("kind", "warps"), [("bf16", 4), ("fp16", 8)])
def test_wgmma_in_flight(kind: str, warps: int, delivery: str) -> None:
    kernel = Compiled(
        pointer_matmul,
        {**dict.fromkeys("ab", f"*{kind}"), "c": "*fp32", **dict.fromkeys("MNK", "i32")},
        tiles(128, 64, 32, ACC=tl.float32, EDGES=False),
        multiples="MNK",
        num_warps=warps,
        num_stages=4,
    )
    # A tile's wgmma runs on while the next one is issued.
    assert kernel.has(WGMMA, "wgmma.wait_group.sync.aligned 1", "cp.async.cg.shared.global")
    a, b = integers(3, (128, 192), kind), integers(4, (192, 64), kind)
    c = kernel.device.alloc((128, 64), np.float32)
    upload = kernel.device.upload
    kernel(1, upload(a), upload(b), c, 128, 64, 192, delivery=delivery)
    assert np.array_equal(c.get(), product(a, b, "fp32"))


@pytest.mark.parametrize("kind", ["fp8e4nv", "i8"])
def test_factor_converted_in_registers(kind: str) -> None:
    kernel = Compiled(
        pointer_matmul,
        {"a": f"*{kind}", "b": "*bf16", "c": "*fp32", **dict.fromkeys("MNK", "i32")},
        tiles(64, 64, 64, ACC=tl.float32, EDGES=False),
        multiples="MNK",
    )
    # D and the four registers of A in braces, then one descriptor.
    assert re.search(r"wgmma\.mma_async\S* \{[^}]*\}, ?\{%r\d+(,%r\d+){3}\}, %rd", kernel.ptx)
    a, b = integers(14, (64, 192), kind), integers(15, (192, 64), "bf16")
    c = kernel.device.alloc((64, 64), np.float32)
    kernel(1, kernel.device.upload(a), kernel.device.upload(b), c, 64, 64, 192, delivery="late")
    assert np.array_equal(c.get(), product(a, b, "fp32"))


def test_int8_matmul() -> None:
    kernel = Compiled(
        pointer_matmul,
        {**dict.fromkeys("ab", "*i8"), "c": "*i32", **dict.fromkeys("MNK", "i32")},
        tiles(64, 64, 64, ACC=tl.int32, EDGES=True),
        multiples="NK",
    )
    assert kernel.has("s32.s8.s8")
    random = np.random.default_rng(5)
    a, b = (random.integers(-128, 128, s).astype(np.int8) for s in ((64, 144), (144, 64)))
    c = kernel.device.alloc((64, 64), np.int32)
    kernel(1, kernel.device.upload(a), kernel.device.upload(b), c, 64, 64, 144)
    assert np.array_equal(c.get(), a.astype(np.int32) @ b.astype(np.int32))


@dataclass(frozen=True)
class Tiling:
    """A matmul through tensor maps: kinds of factors and result, tile, and whether B is [N, K]."""

    kind: str
    out: str
    tile: tuple[int, int, int]
    transposed: bool
    warps: int = 4
    ctas: int = 1
    acc: Any = tl.float32
    specialised: bool = False

    def compile(self) -> Compiled:
        m, n, k = self.tile
        b = (n, k) if self.transposed else (k, n)
        return Compiled(
            descriptor_matmul,
            {
                "a": described(self.kind, m, k),
                "b": described(self.kind, *b),
                "c": described(self.out, m, n),
                "K": "i32",
            },
            tiles(m, n, k, ACC=self.acc, TRANSPOSED=self.transposed, SPECIALISED=self.specialised),
            num_warps=self.warps,
            num_ctas=self.ctas,
            num_stages=3,
        )

    def check(self, kernel: Compiled, m: int, n: int, k: int, delivery: str) -> None:
        a, b = integers(6, (m, k), self.kind), integers(7, (k, n), self.kind)
        c = kernel.device.alloc((m, n), DTYPES[self.out])
        upload = kernel.device.upload
        right = upload(np.ascontiguousarray(b.T) if self.transposed else b)
        grid = (-(-m // self.tile[0]), -(-n // self.tile[1]))
        maps = Descriptor(upload(a)), Descriptor(right), Descriptor(c)
        kernel(grid, *maps, k, delivery=delivery, checks=checks(self.specialised))
        assert np.array_equal(c.get(), product(a, b, self.out))


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize(
    "tiling",
    [
        Tiling("bf16", "bf16", (64, 64, 64), transposed=False),
        Tiling("bf16", "bf16", (128, 128, 64), transposed=True, warps=8),
        Tiling("fp16", "fp16", (64, 128, 32), transposed=True),
        Tiling("fp32", "fp32", (64, 64, 32), transposed=True),
        Tiling("fp8e4nv", "bf16", (64, 64, 128), transposed=True),
        Tiling("i8", "i32", (64, 64, 128), transposed=True, acc=tl.int32),
        Tiling("bf16", "bf16", (64, 128, 64), transposed=True, specialised=True),
        Tiling("bf16", "bf16", (128, 128, 64), transposed=True, ctas=2),
    ],
    ids=str,
)
def test_matmul_through_tensor_maps(tiling: Tiling, delivery: str) -> None:
    kernel = tiling.compile()
    assert kernel.has(WGMMA, TMA_LOAD, TMA_STORE)
    assert kernel.has("setmaxnreg.dec") == tiling.specialised
    assert kernel.has("barrier.cluster.arrive") == (tiling.ctas > 1)
    # Boxes that reach over all edges, and one block more than a tile.
    tiling.check(kernel, 136, 80, 2 * tiling.tile[2] + 16, delivery)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("specialised", [False, True])
def test_persistent_matmul(specialised: bool, flat: bool, delivery: str) -> None:
    if specialised and flat:
        pytest.skip("Triton does not specialise flattened loops")
    kernel = Compiled(
        persistent_matmul,
        {
            "a": described("bf16", 64, 64),
            "b": described("bf16", 64, 64),
            "c": described("bf16", 64, 64),
            **dict.fromkeys("MNK", "i32"),
        },
        tiles(64, 64, 64, FLAT=flat, SPECIALISED=specialised),
        num_warps=4,
        num_stages=3,
    )
    assert kernel.has(WGMMA, TMA_LOAD, TMA_STORE)
    assert kernel.has("setmaxnreg.dec") == specialised
    m, n, k = 136, 136, 144
    a, b = integers(8, (m, k), "bf16"), integers(9, (n, k), "bf16")
    c = kernel.device.alloc((m, n), DTYPES["bf16"])
    maps = [Descriptor(x) for x in (kernel.device.upload(a), kernel.device.upload(b), c)]
    # 9 tiles: one block has 5.
    kernel(2, *maps, m, n, k, delivery=delivery, checks=checks(specialised))
    assert np.array_equal(c.get(), product(a, b.T, "bf16"))


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_matmul_that_makes_its_tensor_maps(delivery: str) -> None:
    kernel = Compiled(
        own_descriptors,
        {**dict.fromkeys("abc", "*bf16"), **dict.fromkeys("MNK", "i32")},
        tiles(64, 64, 64),
        multiples="NK",
    )
    assert kernel.has(WGMMA, "tensormap.replace.tile", "tensormap.cp_fenceproxy")
    m, n, k = 100, 80, 144
    a, b = integers(10, (m, k), "bf16"), integers(11, (n, k), "bf16")
    c = kernel.device.alloc((m, n), DTYPES["bf16"])
    upload = kernel.device.upload
    kernel((2, 2), upload(a), upload(b), c, m, n, k, delivery=delivery)
    assert np.array_equal(c.get(), product(a, b.T, "bf16"))


def attention(q: Any, k: Any, v: Any, scale: float, causal: bool) -> tuple[Any, Any]:
    """[h, t, d] float64 attention with powers of two, and with |v| for a bound on its error."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(1, 2) * scale
    if causal:
        scores = np.where(np.tri(scores.shape[1], dtype=bool), scores, -np.inf)
    p = np.exp2(scores - scores.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    return p @ v, p @ np.abs(v)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize(("kind", "digits"), [("bf16", 8), ("fp16", 11)])
def test_attention_through_pointers(kind: str, digits: int, delivery: str) -> None:
    kernel = Compiled(
        pointer_attention,
        {**dict.fromkeys("qkv", f"*{kind}"), "o": "*fp32", "T": "i32", "scale": "fp32"},
        {"BM": 64, "BN": 64, "D": 64},
        multiples="qkv",
        num_stages=3,
    )
    assert kernel.has(WGMMA, "cp.async.cg.shared.global")
    heads, t, d, scale = 2, 150, 64, 0.125
    random = np.random.default_rng(12)
    q, k, v = (random.standard_normal((heads, t, d)).astype(DTYPES[kind]) for _ in range(3))
    o = kernel.device.alloc((heads, t, d), np.float32)
    upload = kernel.device.upload
    kernel((3, heads), upload(q), upload(k), upload(v), o, t, scale, delivery=delivery)
    expected, size = attention(q, k, v, scale, causal=True)
    # Each weight is rounded to so many digits before it meets its value.
    assert (np.abs(o.get() - expected) <= 1.01 * 2.0**-digits * size).all()


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("specialised", [False, True])
def test_attention_through_tensor_maps(specialised: bool, delivery: str) -> None:
    rows, t, d, scale = (64 if specialised else 128), 128, 64, 0.125
    kernel = Compiled(
        descriptor_attention,
        {
            "q": described("bf16", rows, d),
            "k": described("bf16", 64, d),
            "v": described("bf16", 64, d),
            "o": described("fp32", rows, d),
            "T": "i32",
            "scale": "fp32",
        },
        {"BM": rows, "BN": 64, "D": d, "SPECIALISED": specialised},
        num_stages=2,
    )
    assert kernel.has(WGMMA, TMA_LOAD, TMA_STORE)
    assert kernel.has("setmaxnreg.dec") == specialised
    random = np.random.default_rng(13)
    q, k, v = (random.standard_normal((2, t, d)).astype(DTYPES["bf16"]) for _ in range(3))
    o = kernel.device.alloc((2 * t, d), np.float32)
    maps = [Descriptor(kernel.device.upload(x.reshape(2 * t, d))) for x in (q, k, v)]
    given = (*maps, Descriptor(o), t, scale)
    kernel((t // rows, 2), *given, delivery=delivery, checks=checks(specialised))
    expected, size = attention(q, k, v, scale, causal=False)
    assert (np.abs(o.get().reshape(2, t, d) - expected) <= 1.01 * 2.0**-8 * size).all()
