"""CUDA C of bulk and tensor copies for tests, and how to launch it."""

from __future__ import annotations

from typing import Any

import numpy as np

from cumla import sim
from sim import cuda

DELIVERIES = ("eager", "late", "random")

HEAD = r"""
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ void init(u64* bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 :: "r"(shared_address(bar)), "r"(count) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ void expect(u64* bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(bar)), "r"(bytes) : "memory");
}

__device__ void wait(u64* bar, u32 parity) {
    asm volatile("{ .reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;"
                 " @!p bra W; }" :: "r"(shared_address(bar)), "r"(parity) : "memory");
}

__device__ void proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ void load(void* to, const void* from, u32 bytes, u64* bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(to)), "l"(from),
                    "r"(bytes), "r"(shared_address(bar)) // BULK LOAD
                 : "memory");
}

__device__ void store(void* to, const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 :: "l"(to), "r"(shared_address(from)),
                    "r"(bytes) : "memory"); // BULK STORE
}

__device__ void commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

template <int N> __device__ void wait_group() {
    asm volatile("cp.async.bulk.wait_group %0;" :: "n"(N) : "memory");
}

template <int N> __device__ void wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(N) : "memory");
}
"""


def launch(
    source: str,
    grid: Any,
    block: Any,
    *args: Any,
    kernel: str = "k",
    device: sim.Device | None = None,
    options: tuple[str, ...] = (),
    **how: Any,
) -> list[np.ndarray]:
    """Run HEAD + source; what the array arguments hold afterwards.

    Arrays are uploaded; device arrays, tensor maps and numbers are passed on.
    """
    ptx = cuda.ptx(HEAD + source, "sm_90a", *options)
    device = device or sim.Device("sm_90a", memory_bytes=1 << 26)
    given = [device.upload(a) if isinstance(a, np.ndarray) else a for a in args]
    device.load(ptx).kernel(kernel).launch(grid, block, given, **how)
    return [g.get() for g in given if isinstance(g, sim.DeviceArray)]


def alone(text: str) -> str:
    """PTX of a kernel of one instruction, or a few, that may name some registers."""
    return (
        ".version 8.6\n.target sm_90a\n.address_size 64\n.visible .entry k() {\n"
        ".reg .b16 %h<2>; .reg .b32 %r<4>; .reg .b64 %rd<3>;\n" + text + "\nret;\n}"
    )
