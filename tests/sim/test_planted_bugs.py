"""Bugs that a GPU often hides: each is reported at its line, and its corrected twin is silent.

Every source is compiled twice, as it is and with -DFIXED; the lines that the report must name are
marked with comments.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cumla import sim
from sim import cuda

CHECKS = ("memory", "race")
DELIVERIES = ("eager", "late", "random")


@dataclass(frozen=True)
class Bug:
    """A kernel `k(int* out, const int* in)` with a bug, and what must be said of it."""

    name: str
    source: str
    error: type[sim.SimError]
    says: tuple[str, ...]
    marks: tuple[str, ...] = ("BUG",)
    grid: int = 1
    block: int = 64
    size: int = 256
    delivery: str = "eager"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


BUGS = [
    Bug(
        "missing syncthreads",
        """
extern "C" __global__ void k(int* out, const int* in) {
    __shared__ int s[64];
    s[threadIdx.x] = in[threadIdx.x]; // WRITE
#ifdef FIXED
    __syncthreads();
#endif
    out[threadIdx.x] = s[63 - threadIdx.x]; // READ
}""",
        sim.SimError,
        ("k.cu",),
        marks=("READ",),
    ),
    Bug(
        "missing syncthreads before reuse",
        """
extern "C" __global__ void k(int* out, const int* in) {
    __shared__ int s[64];
    int sum = 0;
    for (int i = 0; i < 3; ++i) {
        s[threadIdx.x] = in[threadIdx.x + i]; // WRITE
        __syncthreads();
        sum += s[63 - threadIdx.x]; // READ
#ifdef FIXED
        __syncthreads();
#endif
    }
    out[threadIdx.x] = sum;
}""",
        sim.RaceError,
        ("shared",),
        marks=("WRITE", "READ"),
    ),
    Bug(
        "one cp.async group too few waited for",
        """
extern "C" __global__ void k(int* out, const int* in) {
    __shared__ __align__(16) int s[2][256];
    for (int g = 0; g < 2; ++g) {
        unsigned at = (unsigned)__cvta_generic_to_shared(&s[g][threadIdx.x * 4]);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
            :: "r"(at), "l"(in + threadIdx.x * 4) : "memory"); // COPY
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
#ifdef FIXED
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#else
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
    __syncthreads();
    out[threadIdx.x] = s[1][255 - threadIdx.x]; // READ
}""",
        sim.RaceError,
        ("shared", "asynchronous"),
        marks=("COPY", "READ"),
    ),
    Bug(
        "cp.async read before it landed",
        """
extern "C" __global__ void k(int* out, const int* in) {
    __shared__ __align__(16) int s[256];
    unsigned at = (unsigned)__cvta_generic_to_shared(&s[threadIdx.x * 4]);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"
        :: "r"(at), "l"(in + threadIdx.x * 4) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
#ifdef FIXED
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x]; // BUG
}""",
        sim.MemoryFault,
        ("read of unwritten memory",),
        delivery="late",
    ),
    Bug(
        "off by one in global memory",
        """
extern "C" __global__ void k(int* out, const int* in) {
#ifdef FIXED
    int i = threadIdx.x + 192;
#else
    int i = threadIdx.x + 193;
#endif
    out[threadIdx.x] = in[i]; // BUG
}""",
        sim.MemoryFault,
        ("out of bounds", "thread (63, 0, 0)", "0 bytes past"),
    ),
    Bug(
        "off by one in shared memory",
        """
extern "C" __global__ void k(int* out, const int* in) {
    __shared__ int s[64];
    s[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
#ifdef FIXED
    int i = (threadIdx.x + 1) % 64;
#else
    int i = threadIdx.x + 1;
#endif
    out[threadIdx.x] = s[i]; // BUG
}""",
        sim.MemoryFault,
        ("out of bounds", "shared", "thread (63, 0, 0)"),
    ),
    Bug(
        "read of unwritten shared memory",
        """
extern "C" __global__ void k(int* out, const int* in) {
    __shared__ int s[64];
#ifdef FIXED
    s[threadIdx.x] = in[threadIdx.x];
#else
    if (threadIdx.x != 17) s[threadIdx.x] = in[threadIdx.x];
#endif
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x]; // BUG
}""",
        sim.MemoryFault,
        ("read of unwritten memory", "thread (17, 0, 0)"),
    ),
    Bug(
        "misaligned vector load",
        """
extern "C" __global__ void k(int* out, const int* in) {
#ifdef FIXED
    const int* p = in + threadIdx.x * 4 / 4 * 4 % 64;
#else
    const int* p = in + threadIdx.x;
#endif
    int4 v = *(const int4*)p; // BUG
    out[threadIdx.x] = v.x + v.w;
}""",
        sim.MemoryFault,
        ("misaligned", "thread (1, 0, 0)"),
    ),
    Bug(
        "barrier in divergent code",
        """
extern "C" __global__ void k(int* out, const int* in) {
    __shared__ int s[64];
    s[threadIdx.x] = in[threadIdx.x];
#ifdef FIXED
    __syncthreads();
#endif
    if (threadIdx.x < 40) {
#ifndef FIXED
        __syncthreads(); // ONE
#endif
        out[threadIdx.x] = s[39 - threadIdx.x];
    } else {
#ifndef FIXED
        __syncthreads(); // OTHER
#endif
        out[threadIdx.x] = 2 * s[threadIdx.x] + 1;
    }
}""",
        sim.Deadlock,
        ("warp 1 (lanes 0x000000ff)", "warp 1 (lanes 0xffffff00)", "its warp at barrier 0"),
        marks=("ONE", "OTHER"),
    ),
    Bug(
        "wrong barrier count",
        """
extern "C" __global__ void k(int* out, const int* in) {
    __shared__ int s[64];
    s[threadIdx.x] = in[threadIdx.x];
#ifdef FIXED
    asm volatile("bar.sync 1, 64;" ::: "memory");
#else
    asm volatile("bar.sync 1, 96;" ::: "memory"); // BUG
#endif
    out[threadIdx.x] = s[63 - threadIdx.x];
}""",
        sim.Deadlock,
        ("barrier 1: 64 of 96", "warp 0", "warp 1"),
    ),
    Bug(
        "lost mbarrier arrival",
        """
extern "C" __global__ void k(int* out, const int* in) {
    __shared__ __align__(8) unsigned long long ready;
    __shared__ int s[64];
    unsigned bar = (unsigned)__cvta_generic_to_shared(&ready);
    if (threadIdx.x == 0) asm volatile("mbarrier.init.shared.b64 [%0], 64;" :: "r"(bar) : "memory");
    __syncthreads();
    s[threadIdx.x] = in[threadIdx.x];
#ifndef FIXED
    if (threadIdx.x != 5)
#endif
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" :: "r"(bar) : "memory");
    asm volatile("{\\n.reg .pred p;\\nW: mbarrier.try_wait.parity.shared.b64 p, [%0], 0;"
                 "\\n@!p bra W;\\n}" :: "r"(bar) : "memory"); // BUG
    out[threadIdx.x] = s[63 - threadIdx.x];
}""",
        sim.Deadlock,
        ("mbarrier", "1 of 64"),
    ),
    Bug(
        "warp-synchronous code without syncwarp",
        """
extern "C" __global__ void k(int* out, const int* in) {
    __shared__ volatile int s[64];
    int t = threadIdx.x;
    s[t] = in[t]; // WRITE
#ifdef FIXED
    __syncwarp();
#endif
    out[t] = s[t ^ 1]; // READ
}""".replace("volatile ", ""),
        sim.RaceError,
        ("shared", "__syncwarp"),
        marks=("WRITE", "READ"),
    ),
    Bug(
        "write after read across a reused pipeline stage",
        """
extern "C" __global__ void k(int* out, const int* in) {
    __shared__ __align__(16) int s[2][64];
    int t = threadIdx.x, sum = 0;
    unsigned base = (unsigned)__cvta_generic_to_shared(&s[0][t]);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(base), "l"(in + t) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    for (int i = 0; i < 3; ++i) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
#ifdef FIXED
        int next = (i + 1) & 1;
#else
        int next = i & 1;
#endif
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
            :: "r"(base + next * 256), "l"(in + t + i) : "memory"); // COPY
        asm volatile("cp.async.commit_group;" ::: "memory");
        sum += s[i & 1][63 - t]; // READ
    }
    out[t] = sum;
}""",
        sim.RaceError,
        ("shared",),
        marks=("COPY", "READ"),
    ),
    Bug(
        "race between blocks without atomics",
        """
extern "C" __global__ void k(int* out, const int* in) {
#ifdef FIXED
    atomicAdd(out, in[threadIdx.x]);
#else
    *out += in[threadIdx.x]; // BUG
#endif
}""",
        sim.RaceError,
        ("global", "block (0, 0, 0)", "block (1, 0, 0)"),
        grid=2,
        block=1,
    ),
]


def launch(bug: Bug, *options: str, **changes: Any) -> Any:
    module = cuda.load(bug.source, *options)
    data = module.device.upload(np.arange(bug.size, dtype=np.int32))
    out = module.device.upload(np.zeros(bug.size, np.int32))
    arguments: dict[str, Any] = {"checks": CHECKS, "delivery": bug.delivery, **changes}
    module.kernel("k").launch(bug.grid, bug.block, [out, data], **arguments)
    return out.get()


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_reported_at_its_line(bug: Bug) -> None:
    with pytest.raises(bug.error) as caught:
        launch(bug)
    text = str(caught.value)
    for mark in bug.marks:
        assert f"k.cu:{cuda.line_of(bug.source, '// ' + mark)}" in text, text
    for part in bug.says:
        assert part in text, text


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_corrected_twin_is_silent(bug: Bug, delivery: str) -> None:
    first = launch(bug, "-DFIXED", delivery=delivery)
    assert np.array_equal(first, launch(bug, "-DFIXED", checks=()))


def test_use_after_free() -> None:
    source = """
extern "C" __global__ void k(int* out, const int* in) {
    out[threadIdx.x] = in[threadIdx.x]; // BUG
}"""
    module = cuda.load(source)
    data = module.device.upload(np.arange(64, dtype=np.int32))
    out = module.device.upload(np.zeros(64, np.int32))
    kernel = module.kernel("k")
    kernel.launch(1, 64, [out, data])
    data.free()
    with pytest.raises(sim.MemoryFault, match="use after free") as caught:
        kernel.launch(1, 64, [out, data])
    assert f"k.cu:{cuda.line_of(source, 'BUG')}" in str(caught.value)
    assert np.array_equal(out.get(), np.arange(64))


def test_a_bug_in_an_inlined_function_is_named_with_its_call() -> None:
    source = """
__device__ __forceinline__ void put(int* to, int i) { to[i] = i; } // PUT
__device__ __forceinline__ void twice(int* to, int i) {
    put(to, i);
    put(to, i + 1000); // FIRST CALL
}
extern "C" __global__ void k(int* out) {
    twice(out, threadIdx.x); // SECOND CALL
}"""
    module = cuda.load(source)
    with pytest.raises(sim.MemoryFault) as caught:
        module.kernel("k").launch(1, 32, [module.device.alloc(64, np.int32)])
    put, first, second = (
        f"k.cu:{cuda.line_of(source, mark)}" for mark in ("PUT", "FIRST CALL", "SECOND CALL")
    )
    message = re.sub(r"\S*/(?=k\.cu:)", "", str(caught.value))
    assert f"{put} (inlined at {first}, at {second})" in message
