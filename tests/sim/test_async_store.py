"""st.async and red.async, from CUDA C: every form, what their mbarriers count, their races."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cumla import sim
from cumla.sim.isa.table import Env, Unsupported
from sim import cuda
from sim.kernel_files import DELIVERIES, Empty, run
from sim.waves import Bound

SOURCE = r"""
typedef unsigned int u32;
typedef unsigned long long u64;
__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u32 peer(const void* p) { return address(p) ^ 1 << 24; }
__device__ __forceinline__ u64 generic(u32 at) {
    u64 p;
    asm("cvta.shared::cluster.u64 %0, %1;" : "=l"(p) : "l"((u64)at));
    return p;
}
__device__ __forceinline__ void meet() {
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait(const void* barrier, u32 parity) {
    asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 "
                 "p, [%0], %1; @!p bra again; }" :: "r"(address(barrier)), "r"(parity) : "memory");
}
#ifndef EXPECTED
#define EXPECTED (32 * BYTES)
#endif
#ifndef BYTES
#define BYTES 4
#endif

// Each lane stores what it read into the other block, whose lanes wait for it.
extern "C" __global__ void store(const u32* in, u32* out) {
    __shared__ __align__(16) u32 x[32 * BYTES / 4];
    __shared__ u64 full;
    u32 t = threadIdx.x;
    constexpr int N = BYTES / 4;
    if (t == 0) {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(address(&full)) : "memory"); // INIT
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                     :: "r"(address(&full)), "r"(EXPECTED) : "memory");
    }
    meet();
    in += (blockIdx.x * 32 + t) * N;
    u32 to = peer(x + t * N), bar = peer(&full);
    STORE                                                          // STORE
#ifndef EARLY
    wait(&full, 0);
#endif
    for (int i = 0; i < N; ++i) out[(blockIdx.x * 32 + t) * N + i] = x[t * N + i];  // LOAD
    meet();
}

// All lanes of both blocks reduce into one word of the first.
extern "C" __global__ void reduce(const u32* in, u32* out, u32 start) {
    __shared__ u32 x;
    __shared__ u64 full;
    u32 t = threadIdx.x;
    if (t == 0) {
        x = start;
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(address(&full)) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 256;"
                     :: "r"(address(&full)) : "memory");
    }
    meet();
    asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes." KIND
                 " [%0], %1, [%2];" :: "r"(address(&x) & 0xFFFFFF), "r"(in[blockIdx.x * 32 + t]),
                 "r"(address(&full) & 0xFFFFFF) : "memory");
    if (blockIdx.x == 0) {
        wait(&full, 0);
        if (t == 0) *out = x;
    }
    meet();
}
"""
# By form: bytes of a lane, and the statement.
STORES = {
    "b32": (4, '"r"(in[0])', "%1"),
    "f32": (4, '"f"(__uint_as_float(in[0]))', "%1"),
    "b64": (8, '"l"(*(const u64*)in)', "%1"),
    "v2.u32": (8, '"r"(in[0]), "r"(in[1])', "{%1, %2}"),
    "v2.s64": (16, '"l"(((const u64*)in)[0]), "l"(((const u64*)in)[1])', "{%1, %2}"),
    "v4.b32": (16, '"r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])', "{%1, %2, %3, %4}"),
}


def stored_source(form: str) -> str:
    _, operands, registers = STORES[form]
    last = 1 + registers.count("%")
    statement = (
        'asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.'
        f'{form} [%0], {registers}, [%{last}];" :: "r"(to), {operands}, "r"(bar) : "memory");'
    )
    return SOURCE.replace("STORE ", statement, 1)


def compiled(source: str, form: str, *more: str) -> sim.LoadedModule:
    return cuda.load(source, f"-DBYTES={STORES[form][0]}", '-DKIND="add.u32"', *more)


def stored(form: str, *more: str, **how: Any) -> tuple[Any, Any]:
    """What each block got, and what the other gave it."""
    x = np.random.default_rng(0).integers(0, 2**31, (4, 32, STORES[form][0] // 4)).astype(np.uint32)
    loaded = compiled(stored_source(form), form, *more)
    _, out = run(loaded, "store", 4, 32, x, Empty(x.shape, np.uint32), cluster=2, **how)
    return out, x[[1, 0, 3, 2]]


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("form", STORES)
def test_stores(form: str, delivery: str) -> None:
    got, expected = stored(form, delivery=delivery, counters=True)
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize(
    ("kind", "ufunc"),
    [
        ("add.u32", np.add),
        ("min.s32", np.minimum),
        ("max.u32", np.maximum),
        ("and.b32", np.bitwise_and),
        ("or.b32", np.bitwise_or),
        ("xor.b32", np.bitwise_xor),
    ],
)
def test_reductions(kind: str, ufunc: Any, delivery: str) -> None:
    loaded = cuda.load(SOURCE.replace("STORE ", ""), f'-DKIND="{kind}"')
    dtype = np.int32 if "s32" in kind else np.uint32
    x = np.random.default_rng(1).integers(-(2**31) * ("s32" in kind), 2**31, 64).astype(dtype)
    start = dtype(12345)
    _, out = run(loaded, "reduce", 2, 32, x, Empty(1, dtype), start, cluster=2, delivery=delivery)
    assert out[0] == ufunc.reduce(x, initial=start, dtype=dtype)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_reading_before_the_wait(delivery: str) -> None:
    with pytest.raises(sim.RaceError, match="the asynchronous copy was not waited for") as caught:
        stored("b32", "-DEARLY", delivery=delivery, checks={"race"})
    text = str(caught.value)
    assert f"k.cu:{cuda.line_of(SOURCE, '// STORE')}" in text
    assert f"k.cu:{cuda.line_of(SOURCE, '// LOAD')}" in text


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_bytes_that_nobody_stores(delivery: str) -> None:
    with pytest.raises(sim.Deadlock, match="64 bytes missing"):
        stored("b32", "-DEXPECTED=192", delivery=delivery)


def test_what_must_not_be() -> None:
    words = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"
    for text in (
        f"{words}.b16",
        f"{words}.v4.b64",
        f"{words}.v8.b32",
        words.replace("cluster", "cta", 1) + ".b32",
        "st.async.b32",
        "red.async.relaxed.cluster.mbarrier::complete_tx::bytes.add.f32",
        "red.async.relaxed.gpu.mbarrier::complete_tx::bytes.add.u32",
    ):
        with pytest.raises(Unsupported):
            Bound(text, "[%r1]", "%r2", "[%r3]")
    with pytest.raises(Unsupported, match="sm_90"):
        Bound(f"{words}.b32", "[%r1]", "%r2", "[%r3]", env=Env(89))


@pytest.mark.parametrize("form", ["b32", "v4.b32"])
def test_generic_addresses(form: str) -> None:
    """Without .shared::cluster the operands are generic addresses."""
    x = np.arange(2 * 32 * STORES[form][0] // 4, dtype=np.uint32).reshape(2, 32, -1)
    source = stored_source(form).replace("complete_tx::bytes." + form, "X." + form, 1)
    source = source.replace(".shared::cluster.mbarrier::X.", ".mbarrier::complete_tx::bytes.")
    source = source.replace('"r"(to)', '"l"(generic(to))').replace('"r"(bar)', '"l"(generic(bar))')
    _, out = run(compiled(source, form), "store", 2, 32, x, Empty(x.shape, np.uint32), cluster=2)
    assert np.array_equal(out, x[::-1])


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_the_cluster_must_meet_after_the_barriers_were_made(delivery: str) -> None:
    source = stored_source("b32").replace(
        "    meet();\n    in +=", "    __syncthreads();\n    in +="
    )
    x = np.zeros((2, 32, 1), np.uint32)
    with pytest.raises(sim.RaceError, match="write by .* then asynchronous arrival") as caught:
        run(compiled(source, "b32"), "store", 2, 32, x, Empty(x.shape, np.uint32), cluster=2,
            checks={"race"}, delivery=delivery)  # fmt: skip
    assert f"k.cu:{cuda.line_of(SOURCE, '// INIT')}" in str(caught.value)


def test_barrier_of_another_block() -> None:
    source = stored_source("b32").replace("bar = peer(&full)", "bar = address(&full)")
    x = np.zeros((2, 32, 1), np.uint32)
    with pytest.raises(sim.KernelTrap, match="the mbarrier must be of the block that the data"):
        run(compiled(source, "b32"), "store", 2, 32, x, Empty(x.shape, np.uint32), cluster=2)


@pytest.mark.parametrize("cluster", [1, 2])
def test_generic_addresses_outside_shared_memory(cluster: int) -> None:
    source = stored_source("b32").replace("complete_tx::bytes.b32", "X.b32", 1)
    source = source.replace(".shared::cluster.mbarrier::X.", ".mbarrier::complete_tx::bytes.")
    source = source.replace('"r"(to)', '"l"(out)').replace('"r"(bar)', '"l"(generic(bar))')
    x = np.zeros((2, 32, 1), np.uint32)
    with pytest.raises(sim.MemoryFault, match="out of bounds: write of 4 bytes"):
        run(compiled(source, "b32"), "store", 2, 32, x, Empty(x.shape, np.uint32), cluster=cluster)
