"""cp.reduce.async.bulk: every operation and type, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from sim.bulk_kit import DELIVERIES, launch
from sim.reductions import DTYPES, reduced, values

GLOBAL = [
    *(("add", kind) for kind in ("u32", "s32", "u64", "f32", "f64", "f16", "bf16")),
    *((op, kind) for op in ("min", "max") for kind in ("u32", "s32", "u64", "s64", "f16", "bf16")),
    ("inc", "u32"), ("dec", "u32"),
    *((op, kind) for op in ("and", "or", "xor") for kind in ("b32", "b64")),
]  # fmt: skip
SHARED = [
    ("add", "u32"), ("add", "s32"), ("add", "u64"), ("min", "u32"), ("max", "s32"), ("inc", "u32"),
    ("dec", "u32"), ("and", "b32"), ("or", "b32"), ("xor", "b32"),
]  # fmt: skip


TO_GLOBAL = r"""
extern "C" __global__ void k(unsigned char* to, const u32* from) {
    __shared__ __align__(16) u32 buffer[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) buffer[i] = from[i];
    proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.FORM [%0], [%1], 1024;"
                     :: "l"(to), "r"(shared_address(buffer)) : "memory");
        commit();
        wait_group<0>();
    }
}
"""

TO_SHARED = r"""
extern "C" __global__ void k(u32* to, const u32* from) {
    __shared__ __align__(16) u32 source[256], target[256];
    __shared__ u64 bar;
    for (int i = threadIdx.x; i < 256; i += blockDim.x) { source[i] = from[i]; target[i] = to[i]; }
    if (threadIdx.x == 0) init(&bar, 1);
    proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        expect(&bar, 1024);
        asm volatile("cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
                     ".FORM [%0], [%1], 1024, [%2];"
                     :: "r"(shared_address(target)), "r"(shared_address(source)),
                        "r"(shared_address(&bar)) : "memory");
    }
    wait(&bar, 0);
    for (int i = threadIdx.x; i < 256; i += blockDim.x) to[i] = target[i];
}
"""


@pytest.mark.parametrize(
    ("source", "op", "kind"),
    [(TO_GLOBAL, *form) for form in GLOBAL] + [(TO_SHARED, *form) for form in SHARED],
)
def test_every_reduction(source, op, kind):
    rng = np.random.default_rng(3)
    n = 1024 // np.dtype(DTYPES[kind]).itemsize
    old, new = values(rng, kind, n), values(rng, kind, n)
    noftz = "noftz." if op == "add" and kind in ("f16", "bf16") else ""
    text = source.replace("FORM", f"{op}.{noftz}{kind}")
    wanted = reduced(op, kind, old, new)
    assert (wanted != old).any()
    if kind == "f32":
        assert ((wanted != 0) & (abs(wanted) < 2.0**-126)).any()  # subnormals are kept
    for delivery in DELIVERIES:
        to, _ = launch(
            text, 1, 64, old.view(np.uint8), new.view(np.uint8).view(np.uint32), delivery=delivery
        )
        assert to.tobytes() == wanted.tobytes()


def test_blocks_add_up():
    text = TO_GLOBAL.replace("FORM", "add.u32")
    ones = np.arange(256, dtype=np.uint32)
    for delivery in DELIVERIES:
        to, _ = launch(text, 7, 64, 0 * ones.view(np.uint8), ones, delivery=delivery)
        assert np.array_equal(to.view(np.uint32), 7 * ones)
