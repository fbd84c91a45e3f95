"""Programs in CUDA C around small wgmma, with inline assembly as it is commonly written.

A program's body is put between HEAD and TAIL: `d` are its accumulators, `a` and `b` descriptors of
the operands of step 0; those of step i lie 128 i and 16 i further.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from cumla import sim
from sim import cuda

HEAD = r"""
typedef unsigned long long u64;
extern __shared__ __align__(1024) unsigned char dyn[];
__device__ __forceinline__ u64 at(unsigned offset) {
    unsigned start = (unsigned)__cvta_generic_to_shared(dyn) + offset;
    // No swizzle: the two chunks of a row 128 bytes apart, eights of rows 256.
    return (u64)((start & 0x3ffff) >> 4) | (u64)(128 >> 4) << 16 | (u64)(256 >> 4) << 32;
}
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void mma(float (&d)[4], u64 a, u64 b, int takes = 1) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;"
        "\n}\n" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b), "r"(takes));
}
__device__ __forceinline__ void mma_wide(float (&d)[8], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, "
        "%8, %9, 1, 1, 1, 0, 0;\n" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]),
        "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "l"(a), "l"(b));
}
__device__ __forceinline__ void mma_registers(float (&d)[4], const unsigned (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, "
        "1, 1, 1, 0;\n" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// All of the image: A of step i at 2048 i, its B behind all A.
__device__ __forceinline__ void fill(const unsigned* image, int words) {
    for (int i = threadIdx.x; i < words; i += blockDim.x) ((unsigned*)dyn)[i] = image[i];
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncthreads();
}
extern "C" __global__ void k(const unsigned* image, int words, int steps, float* out) {
    fill(image, words);
    u64 a = at(0), b = at(2048 * steps);
    float d[4] = {};
"""
TAIL = r"""
    for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = d[i];
}
"""
STEPS = 5


def image():
    rng = np.random.default_rng(7)
    return rng.integers(-3, 4, (STEPS * 2048 + STEPS * 256) // 2).astype(np.float16)


def products():
    """[steps, 64, 8]: A * B of each step."""
    data = image()

    def operand(start, rows):
        part = data[start // 2 : start // 2 + rows * 16].astype(np.float32)
        return part.reshape(rows // 8, 2, 8, 8).transpose(0, 2, 1, 3).reshape(rows, 16)

    b_start = 2048 * STEPS
    return np.stack([operand(2048 * i, 64) @ operand(b_start + 256 * i, 8).T for i in range(STEPS)])


def fragments(matrix):
    """[64, 8] as [128, 4], by PTX ISA's table of D."""
    lane = np.arange(128)
    row = 16 * (lane // 32) + lane % 32 // 4
    column = 2 * (lane % 4)
    return np.stack([matrix[row + 8 * (i // 2), column + i % 2] for i in range(4)], axis=1)


@cache
def module(body: str) -> sim.LoadedModule:
    return cuda.load(HEAD + body + TAIL)


def launch(body, threads=128, **how):
    loaded = module(body)
    device = loaded.device
    data = image()
    out = device.alloc((threads, 4), np.float32)
    given = [device.upload(data), data.nbytes // 4, STEPS, out]
    options = {"checks": ("memory", "race"), "shared_bytes": data.nbytes, **how}
    loaded.kernel("k").launch(1, threads, given, **options)
    return out.get()


def marked(body, mark):
    """Where a line of the body stands, as messages give it."""
    return f"k.cu:{cuda.line_of(HEAD + body + TAIL, mark)}"


def message(body, **how):
    with pytest.raises(sim.RaceError) as caught:
        launch(body, **how)
    assert caught.value.races == (str(caught.value),)
    return str(caught.value)
