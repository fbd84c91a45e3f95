"""Hopper's kernels: right in every delivery and without a race; their bugs are named by line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cumla import sim
from sim import cuda, hopper_kernels, kernel_files
from sim.hopper_kernels import integers, product

DELIVERIES = ("eager", "late", "random")
# Edges in all directions; more stages of K than there are buffers.
SHAPE = (200, 136, 320)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_gemm(dtype: Any, delivery: str) -> None:
    m, n, k = SHAPE
    a, b = integers(0, m, k), integers(1, n, k)
    c = hopper_kernels.gemm(a, b, dtype, delivery=delivery)
    assert np.array_equal(c, product(a, b).astype(dtype))


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_gemm_with_two_stages_and_random_seeds(delivery: str) -> None:
    a, b = integers(2, 128, 448), integers(3, 128, 448)
    for seed in (1, 2):
        c = hopper_kernels.gemm(a, b, np.float32, 2, delivery=delivery, seed=seed)
        assert np.array_equal(c, product(a, b))


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("shape", [SHAPE, (512, 128, 64)])
def test_cluster_gemm(shape: tuple[int, int, int], delivery: str) -> None:
    m, n, k = shape
    a, b = integers(0, m, k), integers(1, n, k)
    c = hopper_kernels.cluster_gemm(a, b, 2, delivery=delivery)
    assert np.array_equal(c, product(a, b))


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("options", [(), ("PEER_BY_XOR",)], ids=["mapa", "xor"])
def test_exchange(options: tuple[str, ...], delivery: str) -> None:
    a, b = integers(0, 256, 320), integers(1, 128, 320)
    c = hopper_kernels.exchange_gemm(a, b, *options, delivery=delivery)
    assert np.array_equal(c, product(a, b))


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize(
    ("heads", "s_q", "s_k", "d", "causal"),
    [
        (1, 130, 200, 64, False),
        (2, 70, 333, 64, True),
        (1, 129, 140, 128, True),
        (1, 1, 1, 128, False),
    ],
)
def test_attention(heads: int, s_q: int, s_k: int, d: int, causal: bool, delivery: str) -> None:
    random = np.random.default_rng(s_k)
    q, k, v = (
        random.standard_normal((heads, s, d)).astype(ml_dtypes.bfloat16) for s in (s_q, s_k, s_k)
    )
    out, lse = hopper_kernels.attention(q, k, v, causal, delivery=delivery)
    expected, expected_lse, tolerance = hopper_kernels.attended(q, k, v, causal)
    assert (np.abs(out.astype(np.float64) - expected) <= tolerance).all()
    assert np.allclose(lse, expected_lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("grid", [1, 3])
def test_persistent(grid: int, delivery: str) -> None:
    m, n, k = SHAPE
    x, b = hopper_kernels.scaled_rows(0, m, k), integers(1, n, k)
    c = hopper_kernels.persistent_gemm(x, b, grid, delivery=delivery)
    assert np.array_equal(c, x @ b.astype(np.float32).T)


def run_gemm(bug: str, **how: Any) -> None:
    hopper_kernels.gemm(integers(0, 128, 192), integers(1, 128, 192), np.float32, 2, bug, **how)


def run_gemm_bf16(bug: str, **how: Any) -> None:
    a, b = integers(0, 128, 64), integers(1, 128, 64)
    hopper_kernels.gemm(a, b, ml_dtypes.bfloat16, 2, bug, **how)


def run_cluster_gemm(bug: str, **how: Any) -> None:
    hopper_kernels.cluster_gemm(integers(0, 256, 192), integers(1, 128, 192), 2, bug, **how)


def run_exchange(bug: str, **how: Any) -> None:
    hopper_kernels.exchange_gemm(integers(0, 128, 192), integers(1, 64, 192), bug, **how)


def run_attention(bug: str, **how: Any) -> None:
    q, k, v = (integers(s, 1, s, 64) for s in (128, 192, 192))
    hopper_kernels.attention(q, k, v, False, bug, **how)


def run_persistent(bug: str, **how: Any) -> None:
    x, b = hopper_kernels.scaled_rows(0, 128, 192), integers(1, 256, 192)
    hopper_kernels.persistent_gemm(x, b, 1, 2, bug, **how)


@dataclass(frozen=True)
class Bug:
    """A kernel compiled with a macro, and the marks of the lines that the report must name."""

    file: str
    macro: str
    marks: tuple[str, ...]
    run: Callable[..., None]
    errors: tuple[type[sim.SimError], ...] = (sim.RaceError,)

    def __str__(self) -> str:
        return f"{self.file} {self.macro}"


# Bytes that nobody expected may complete a later phase, or spoil it for ever.
EITHER = (sim.RaceError, sim.Deadlock)
HANGS = (sim.Deadlock,)
BUGS = [
    Bug("gemm", "BUG_EXPECT_FEW", ("LOAD B", "MULTIPLY"), run_gemm, EITHER),
    Bug("gemm", "BUG_EXPECT_MANY", ("WAIT FULL",), run_gemm, HANGS),
    Bug("gemm", "BUG_FENCE", ("STAGE C", "STORE C"), run_gemm),
    Bug("gemm", "BUG_FENCE", ("STAGE BF16", "STORE C"), run_gemm_bf16),
    Bug("gemm", "BUG_RELEASE", ("MULTIPLY", "LOAD A"), run_gemm),
    Bug("cluster_gemm", "BUG_EXPECT_FEW", ("LOAD B", "MULTIPLY"), run_cluster_gemm, EITHER),
    Bug("cluster_gemm", "BUG_EXPECT_MANY", ("WAIT FULL",), run_cluster_gemm, HANGS),
    Bug("cluster_gemm", "BUG_FENCE", ("STAGE C", "STORE C"), run_cluster_gemm),
    Bug("cluster_gemm", "BUG_RELEASE", ("MULTIPLY", "LOAD B"), run_cluster_gemm),
    Bug("exchange", "BUG_EXPECT_FEW", ("SEND", "MULTIPLY"), run_exchange, EITHER),
    Bug("exchange", "BUG_EXPECT_MANY", ("WAIT RECEIVED",), run_exchange, HANGS),
    Bug("exchange", "BUG_FENCE", ("WRITE A", "MULTIPLY"), run_exchange),
    Bug("exchange", "BUG_RELEASE", ("SEND", "MULTIPLY"), run_exchange),
    Bug("attention", "BUG_EXPECT_FEW", ("LOAD Q", "SCORES"), run_attention, EITHER),
    Bug("attention", "BUG_EXPECT_MANY", ("WAIT V",), run_attention, HANGS),
    Bug("attention", "BUG_FENCE", ("STAGE O", "STORE O"), run_attention),
    Bug("attention", "BUG_RELEASE", ("VALUES", "LOAD V"), run_attention),
    Bug("persistent", "BUG_EXPECT_FEW", ("LOAD SCALES", "READ SCALES"), run_persistent, EITHER),
    Bug("persistent", "BUG_EXPECT_MANY", ("WAIT FULL",), run_persistent, HANGS),
    Bug("persistent", "BUG_FENCE", ("STAGE C", "STORE C"), run_persistent),
    Bug("persistent", "BUG_RELEASE", ("MULTIPLY", "LOAD A"), run_persistent),
    Bug("persistent", "BUG_REUSE", ("STORE C", "STAGE C"), run_persistent),
    Bug("persistent", "BUG_DEPENDENCE", ("WRITE A", "LOAD A"), run_persistent),
]


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_bugs_are_named_at_their_lines(bug: Bug, delivery: str) -> None:
    source = (kernel_files.FOLDER / f"hopper_{bug.file}.cu").read_text()
    assert bug.macro in source
    with pytest.raises(bug.errors) as caught:
        # Only races: what was never written, or written twice, must be found as a race too.
        bug.run(bug.macro, delivery=delivery, checks=("race",))
    for mark in bug.marks:
        assert f"k.cu:{cuda.line_of(source, f'// {mark}')}" in str(caught.value), mark
