"""Pipelines of cp.async, with groups and with mbarriers, from CUDA C to results."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cumla import sim
from sim import cuda

DELIVERIES = ("eager", "late", "random")

SOURCE = r"""
__device__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ void copy4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(shared_address(to)), "l"(from)
                 : "memory");
}

// Three buffers; groups.
extern "C" __global__ void grouped(const float* in, float* out, int n) {
    __shared__ float buffer[3][128];
    int t = threadIdx.x;
    in += blockIdx.x * n * 128 + t;
    for (int k = 0; k < 2; ++k) {
        if (k < n) copy4(&buffer[k][t], in + k * 128);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    float sum = 0;
    for (int k = 0; k < n; ++k) {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();
        if (k + 2 < n) copy4(&buffer[(k + 2) % 3][t], in + (k + 2) * 128);
        asm volatile("cp.async.commit_group;" ::: "memory");
        sum += buffer[k % 3][(t + 1) % 128];
    }
    out[blockIdx.x * 128 + t] = sum;
}

__device__ void init(unsigned bar, unsigned count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(bar), "r"(count) : "memory");
}

__device__ void wait(unsigned bar, unsigned parity) {
#ifdef POLL
    unsigned done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2;"
                     " selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    } while (!done);
#else
    asm volatile("{ .reg .pred p; L: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;"
                 " @p bra D; bra L; D: }" :: "r"(bar), "r"(parity) : "memory");
#endif
}

#ifndef FULL
#define FULL 32
#endif

// Two buffers; the last warp copies, the others add up.
extern "C" __global__ void barriers(const float* in, float* out, int n) {
    __shared__ float buffer[2][128];
    __shared__ unsigned long long full[2], empty[2];
    int t = threadIdx.x;
    in += blockIdx.x * n * 128;
    if (t == 0) {
        for (int i = 0; i < 2; ++i) {
            init(shared_address(&full[i]), FULL);
            init(shared_address(&empty[i]), 128);
        }
    }
    __syncthreads();
    if (t >= 128) {
        for (int k = 0; k < n; ++k) {
            wait(shared_address(&empty[k & 1]), ((k >> 1) & 1) ^ 1);
            for (int j = t - 128; j < 128; j += 32) copy4(&buffer[k & 1][j], in + k * 128 + j);
            asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];"
                         :: "r"(shared_address(&full[k & 1])) : "memory");
        }
    } else {
        float sum = 0;
        for (int k = 0; k < n; ++k) {
#ifdef EARLY
            sum += buffer[k & 1][(t + 1) % 128];
            wait(shared_address(&full[k & 1]), (k >> 1) & 1);
#else
            wait(shared_address(&full[k & 1]), (k >> 1) & 1);
            sum += buffer[k & 1][(t + 1) % 128];
#endif
            asm volatile("{ .reg .b64 s; mbarrier.arrive.shared.b64 s, [%0]; }"
                         :: "r"(shared_address(&empty[k & 1])) : "memory");
        }
        out[blockIdx.x * 128 + t] = sum;
    }
}
"""


def run(kernel, threads, *options, **launch):
    """The kernel's result on random numbers, and what it must be."""
    module = cuda.load(SOURCE, *options)
    n, blocks = 7, 3
    x = np.random.default_rng(0).integers(0, 100, (blocks, n, 128)).astype(np.float32)
    out = module.device.alloc((blocks, 128), np.float32)
    arguments = [module.device.upload(x), out, np.int32(n)]
    module.kernel(kernel).launch(blocks, threads, arguments, **launch)
    return out.get(), np.roll(x.sum(axis=1), -1, axis=1)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("checks", [(), ("memory", "race")])
@pytest.mark.parametrize(
    ("kernel", "threads", "options"),
    [("grouped", 128, ()), ("barriers", 160, ()), ("barriers", 160, ("-DPOLL",))],
)
def test_pipelines(kernel, threads, options, checks, delivery):
    got, expected = run(kernel, threads, *options, checks=checks, delivery=delivery, counters=True)
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_barrier_that_expects_too_much_is_a_deadlock(delivery):
    with pytest.raises(sim.Deadlock) as caught:
        run("barriers", 160, "-DFULL=33", delivery=delivery)
    assert re.search(
        r"mbarrier at shared 0x\w+ phase 0: 1 of 33 arrivals missing", str(caught.value)
    )


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_reading_before_the_wait_is_a_race(delivery):
    with pytest.raises(sim.RaceError):
        run("barriers", 160, "-DEARLY", checks=("race",), delivery=delivery)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("form", ["SIZE", "IGNORE"])
def test_zeros_in_the_place_of_sources(form, delivery):
    source = r"""
    extern "C" __global__ void k(int4* out, const int4* in, int n) {
        __shared__ int4 a[32];
        int t = threadIdx.x;
        unsigned to = (unsigned)__cvta_generic_to_shared(&a[t]);
#ifdef SIZE
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                     :: "r"(to), "l"(in + t), "r"(t < n ? 16 : t == n ? 12 : 0) : "memory");
#else
        asm volatile("{ .reg .pred ignored; setp.gt.s32 ignored, %2, %3;"
                     " cp.async.cg.shared.global [%0], [%1], 16, ignored; }"
                     :: "r"(to), "l"(in + t), "r"(t), "r"(n) : "memory");
#endif
        asm volatile("cp.async.wait_all;" ::: "memory");
        out[t] = a[t];
    }"""
    module = cuda.load(source, f"-D{form}")
    n = 20
    x = np.random.default_rng(0).integers(1, 2**31, (n + 1, 4)).astype(np.int32)
    out = module.device.alloc((32, 4), np.int32)
    arguments = [out, module.device.upload(x), np.int32(n)]
    module.kernel("k").launch(1, 32, arguments, delivery=delivery, checks=("memory", "race"))
    expected = np.zeros((32, 4), np.int32)
    expected[: n + 1] = x
    if form == "SIZE":
        expected[n, 3] = 0
    assert np.array_equal(out.get(), expected)


def test_a_wait_that_is_not_repeated_is_found_by_random_delivery():
    """try_wait may return before the phase is complete; the kernel must ask again."""
    source = SOURCE.replace("bra L; D:", "D:")
    assert source != SOURCE
    module = cuda.load(source)
    x = module.device.upload(np.zeros((3, 7, 128), np.float32))
    out = module.device.alloc((3, 128), np.float32)

    def launch(**how):
        module.kernel("barriers").launch(3, 160, [x, out, 7], checks=("race",), **how)

    launch()
    found = 0
    for seed in range(5):
        try:
            launch(delivery="random", seed=seed)
        except sim.RaceError:
            found += 1
    assert found >= 3
