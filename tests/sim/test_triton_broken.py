"""Triton's kernels with one instruction taken out: what the checks are for, they must notice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cumla.sim import Deadlock, KernelError, RaceError
from sim.triton_kernels import descriptor_matmul, integers, pointer_matmul, product, tiles
from sim.triton_kit import DELIVERIES, DTYPES, Compiled, Descriptor, described

tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


def through_pointers() -> Compiled:
    """Two warpgroups that share the second factor: what one knows of its wgmma is not enough."""
    return Compiled(
        pointer_matmul,
        {**dict.fromkeys("ab", "*bf16"), "c": "*fp32", **dict.fromkeys("MNK", "i32")},
        tiles(128, 64, 32, ACC=tl.float32, EDGES=False),
        multiples="MNK",
        num_warps=8,
        num_stages=4,
    )


def through_tensor_maps(specialised: bool = False) -> Compiled:
    return Compiled(
        descriptor_matmul,
        {
            "a": described("bf16", 64, 64),
            "b": described("bf16", 64, 64),
            "c": described("bf16", 64, 64),
            "K": "i32",
        },
        tiles(64, 64, 64, ACC=tl.float32, TRANSPOSED=True, SPECIALISED=specialised),
        num_warps=4,
        num_stages=3,
    )


def run(kernel: Compiled, delivery: str, **how: Any) -> None:
    """One tile of a matmul; AssertionError if it is wrong."""
    maps = len(kernel.metadata.tensordesc_meta) > 0
    m, n, k = (64, 64, 320) if maps else (128, 64, 192)
    a, b = integers(0, (m, k), "bf16"), integers(1, (k, n), "bf16")
    upload = kernel.device.upload
    c = kernel.device.alloc((m, n), DTYPES["bf16" if maps else "fp32"])
    if maps:
        right = upload(np.ascontiguousarray(b.T))
        kernel(
            1, Descriptor(upload(a)), Descriptor(right), Descriptor(c), k, delivery=delivery, **how
        )
    else:
        kernel(1, upload(a), upload(b), c, m, n, k, delivery=delivery, **how)
    assert np.array_equal(c.get(), product(a, b, "bf16" if maps else "fp32"))


@pytest.mark.parametrize("delivery", ["eager", "late"])
@pytest.mark.parametrize(
    ("instruction", "which", "error"),
    [
        # The loop: tiles that have come, wgmma, and the room of the tile before taken again.
        ("cp.async.wait_group", 0, KernelError),
        ("bar.sync", 0, RaceError),
        ("fence.proxy.async.shared::cta", 0, RaceError),
        ("wgmma.wait_group.sync.aligned", 0, RaceError),
        ("bar.sync", 1, RaceError),
        # Behind it: the accumulators are read, and the result goes through shared memory.
        ("wgmma.wait_group.sync.aligned", 1, KernelError),
        ("cp.async.wait_group", 1, RaceError),
        ("bar.sync", 3, RaceError),
    ],
)
def test_pointers(instruction: str, which: int, error: type[KernelError], delivery: str) -> None:
    kernel = through_pointers()
    with pytest.raises(error):
        run(kernel.without(instruction, which), delivery)


@pytest.mark.parametrize("delivery", ["eager", "late"])
@pytest.mark.parametrize(
    ("instruction", "which", "error"),
    [
        ("mbarrier.init.shared::cta.b64", 0, KernelError),
        ("mbarrier.arrive.expect_tx.shared::cta.b64", 0, Deadlock),
        # A tile's room taken again, and the result in the room of tiles.
        ("wgmma.wait_group.sync.aligned", 0, RaceError),
        ("wgmma.wait_group.sync.aligned", 1, KernelError),
        ("fence.proxy.async.shared::cta", 0, RaceError),
        ("bar.sync", -2, RaceError),
    ],
)
def test_tensor_maps(instruction: str, which: int, error: type[KernelError], delivery: str) -> None:
    kernel = through_tensor_maps()
    with pytest.raises(error):
        run(kernel.without(instruction, which), delivery)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_tile_that_is_not_waited_for(delivery: str) -> None:
    kernel = through_tensor_maps().without("mbarrier.try_wait.parity.shared::cta.b64")
    with pytest.raises(KernelError):
        run(kernel.without("bra.uni"), delivery)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_consumers_that_both_write_the_result(delivery: str) -> None:
    # Of a tile with 64 rows Triton gives both consumers the whole: they write the same twice.
    kernel = through_tensor_maps(specialised=True).with_single_stores()
    run(kernel, delivery, checks=("memory",))
    with pytest.raises(RaceError, match="global memory race") as caught:
        run(kernel, delivery)
    assert not any("shared memory race" in race for race in caught.value.races)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_accumulators_that_triton_reads_too_early(delivery: str) -> None:
    # With f16 accumulators Triton unpacks D while wgmma is under way. ptxas sees it and puts a
    # wgmma.wait_group before (its note C7517); the PTX itself is wrong.
    kernel = Compiled(
        pointer_matmul,
        {**dict.fromkeys("abc", "*fp16"), **dict.fromkeys("MNK", "i32")},
        tiles(128, 64, 32, ACC=tl.float16, EDGES=False),
        multiples="MNK",
        num_warps=4,
        num_stages=4,
    )
    a, b = integers(0, (128, 192), "fp16"), integers(1, (192, 64), "fp16")
    upload, c = kernel.device.upload, kernel.device.alloc((128, 64), np.float16)
    with pytest.raises(RaceError, match="wgmma.wait_group is missing"):
        kernel(1, upload(a), upload(b), c, 128, 64, 192, delivery=delivery)


def test_worker_that_does_not_arrive() -> None:
    kernel = through_tensor_maps(specialised=True).without("mbarrier.arrive.shared::cta.b64")
    with pytest.raises(Deadlock):
        run(kernel, "eager", checks=("memory",))


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_whole(delivery: str) -> None:
    for kernel in (through_pointers(), through_tensor_maps()):
        run(kernel, delivery)
