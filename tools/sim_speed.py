"""How fast the simulator runs: an elementwise kernel, an mma.sync GEMM, a warp-specialised GEMM.

    python tools/sim_speed.py [--checks memory,race] [--repeats N]

Prints millions of lane-instructions a second (the threads of every instruction that ran), and the
seconds that a launch takes. Results are compared with NumPy first. The warp-specialised GEMM, of
TMA, mbarriers and wgmma, is that of tests/sim/kernels/hopper_gemm.cu.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click
import ml_dtypes
import numpy as np

from cumla import sim
from cumla.jit import nvrtc

ELEMENTWISE = r"""
extern "C" __global__ void elementwise(const float* x, float* y, int n, int rounds) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        float a = x[i];
        float b = a;
        for (int r = 0; r < rounds; ++r) {
            a = a * 0.7f + 1.3f;
            b = fmaxf(b * 0.9f, a - 0.3f * b);
            b = ((i >> (r & 7)) & 1) ? b + 1.0f : b;
        }
        y[i] = a + b;
    }
}
"""

GEMM = r"""
// C[M][N] = A[M][K] @ B[N][K]^T, bf16 in, float out; 64x64 tiles of C, 64 of K a stage, 3 stages,
// 4 warps of 32x32. A row of a tile is 128 bytes; its 16-byte chunks are XOR-swizzled by the row.
typedef unsigned int u32;
__device__ __forceinline__ u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void ldmatrix4(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},"
        "{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
constexpr int T = 64, STAGES = 3, ROW = 128, TILE = T * ROW;

extern "C" __global__ void __launch_bounds__(128)
gemm(const char* A, const char* B, float* C, int M, int N, int K) {
    extern __shared__ __align__(128) char buffer[];
    const u32 base = smem(buffer);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int row0 = blockIdx.y * T, col0 = blockIdx.x * T;
    const int wm = (warp >> 1) * 32, wn = (warp & 1) * 32;
    const int steps = K / T;
    float acc[2][4][4] = {};
    auto load = [&](int step) {
        u32 a = base + (step % STAGES) * 2 * TILE, b = a + TILE;
        for (int i = 0; i < 4; ++i) {
            int chunk = tid + i * 128, r = chunk >> 3, c = chunk & 7;
            u32 at = r * ROW + ((c ^ (r & 7)) << 4);
            copy16(a + at, A + (long long)(row0 + r) * K * 2 + step * ROW + c * 16);
            copy16(b + at, B + (long long)(col0 + r) * K * 2 + step * ROW + c * 16);
        }
    };
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < steps) load(s);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    for (int step = 0; step < steps; ++step) {
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
        __syncthreads();
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        asm volatile("cp.async.commit_group;" ::: "memory");
        u32 a = base + (step % STAGES) * 2 * TILE, b = a + TILE;
        for (int k = 0; k < 4; ++k) {
            u32 fa[2][4], fb[2][4];
            for (int i = 0; i < 2; ++i) {
                int r = wm + i * 16 + (lane & 15), c = k * 2 + (lane >> 4);
                ldmatrix4(fa[i], a + r * ROW + ((c ^ (r & 7)) << 4));
                int rb = wn + i * 16 + (lane & 7) + ((lane >> 4) << 3);
                int cb = k * 2 + ((lane >> 3) & 1);
                ldmatrix4(fb[i], b + rb * ROW + ((cb ^ (rb & 7)) << 4));
            }
            for (int i = 0; i < 2; ++i)
                for (int j = 0; j < 4; ++j)
                    mma(acc[i][j], fa[i], fb[j >> 1][(j & 1) * 2], fb[j >> 1][(j & 1) * 2 + 1]);
        }
    }
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j) {
            int r = row0 + wm + i * 16 + (lane >> 2), c = col0 + wn + j * 8 + (lane & 3) * 2;
            *(float2*)(C + (long long)r * N + c) = make_float2(acc[i][j][0], acc[i][j][1]);
            *(float2*)(C + (long long)(r + 8) * N + c) = make_float2(acc[i][j][2], acc[i][j][3]);
        }
}
"""
GEMM_SHARED = 3 * 2 * 64 * 128
HOPPER = Path(__file__).resolve().parents[1] / "tests" / "sim" / "kernels"
HOPPER_STAGES = 4
HOPPER_SHARED = HOPPER_STAGES * 2 * 128 * 128 + 128 * 128 * 4 + 1024


def elementwise(device: sim.Device, warps: int, rounds: int) -> Callable[..., sim.Launch]:
    """A launch of `warps` warps that each compute one element a lane."""
    ptx = nvrtc.compile_to_ptx(ELEMENTWISE, "elementwise.cu", device.target, ["-lineinfo"])
    kernel = device.load(ptx).kernel("elementwise")
    n = warps * 32
    x = device.upload(np.linspace(-1, 1, n, dtype=np.float32))
    y = device.alloc(n, np.float32)

    def launch(**options: object) -> sim.Launch:
        return kernel.launch(-(-warps // 8), 256, [x, y, n, rounds], **options)

    return launch


def gemm(device: sim.Device, m: int, n: int, k: int) -> Callable[..., sim.Launch]:
    """A checked launch of a GEMM of these sizes, multiples of 64."""
    ptx = nvrtc.compile_to_ptx(GEMM, "gemm.cu", device.target, ["-lineinfo"])
    kernel = device.load(ptx).kernel("gemm")
    random = np.random.default_rng(0)
    a = random.standard_normal((m, k)).astype(ml_dtypes.bfloat16)
    b = random.standard_normal((n, k)).astype(ml_dtypes.bfloat16)
    on_device = [device.upload(x.view(np.uint8)) for x in (a, b)]
    c = device.alloc((m, n), np.float32)

    def launch(**options: object) -> sim.Launch:
        return kernel.launch(
            (n // 64, m // 64), 128, [*on_device, c, m, n, k], shared_bytes=GEMM_SHARED, **options
        )

    launch(checks=())
    expected = a.astype(np.float32) @ b.astype(np.float32).T
    np.testing.assert_allclose(c.get(), expected, rtol=1e-4, atol=1e-3)
    return launch


def hopper_gemm(device: sim.Device, size: int) -> Callable[..., sim.Launch]:
    """A checked launch of the warp-specialised GEMM, size^3."""
    source = (HOPPER / "hopper_gemm.cu").read_text()
    options = ["-lineinfo", "--std=c++17", f"-DSTAGES={HOPPER_STAGES}", f"-I{HOPPER}"]
    ptx = nvrtc.compile_to_ptx(source, "hopper_gemm.cu", "sm_90a", options)
    kernel = device.load(ptx).kernel("gemm_f32")
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((size, size)).astype(ml_dtypes.bfloat16) for _ in range(2))
    on_device = [device.upload(x.view(np.uint16)) for x in (a, b)]
    c = device.alloc((size, size), np.float32)
    maps = [
        sim.tensor_map(x, box_dim=(64, 128), data_type="bfloat16", swizzle="128B")
        for x in on_device
    ]
    maps.append(sim.tensor_map(c, box_dim=(32, 64), data_type="float32", swizzle="128B"))

    def launch(**options: object) -> sim.Launch:
        # The arrays live as long as this function: a map does not keep its array.
        assert len([*on_device, c]) == len(maps)
        return kernel.launch(
            (size // 128, size // 128),
            384,
            [*maps, size // 64],
            shared_bytes=HOPPER_SHARED,
            **options,
        )

    launch(checks=())
    expected = a.astype(np.float32) @ b.astype(np.float32).T
    np.testing.assert_allclose(c.get(), expected, rtol=1e-4, atol=1e-3)
    return launch


def measure(launch: Callable[..., sim.Launch], checks: tuple[str, ...], repeats: int) -> float:
    """The best seconds of a launch."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        launch(checks=checks)
        best = min(best, time.perf_counter() - start)
    return best


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--checks", default="", help="checks to have on, e.g. memory,race")
@click.option("--repeats", default=3, show_default=True)
@click.option("--target", default="sm_90a", show_default=True)
def main(checks: str, repeats: int, target: str) -> None:
    on = tuple(c for c in checks.split(",") if c)
    device = sim.Device(target)
    print(f"checks: {', '.join(on) or 'off'}")
    cases = [
        ("elementwise, 8 warps", elementwise(device, 8, 200)),
        ("elementwise, 1024 warps", elementwise(device, 1024, 50)),
        ("mma.sync GEMM, 8 warps (64x128x2048)", gemm(device, 64, 128, 2048)),
        ("mma.sync GEMM, 1024 warps (1024x1024x256)", gemm(device, 1024, 1024, 256)),
        ("mma.sync GEMM, 512^3", gemm(device, 512, 512, 512)),
    ]
    if device.target == "sm_90a":
        cases.append(("warp-specialised wgmma GEMM, 512^3", hopper_gemm(device, 512)))
    for name, launch in cases:
        counted = launch(checks=(), counters=True).counters
        assert counted is not None
        lanes = counted.total().thread_instructions
        seconds = measure(launch, on, repeats)
        print(f"{name:44s} {lanes / seconds / 1e6:8.1f} M lane-instructions/s  {seconds:7.3f} s")


if __name__ == "__main__":
    main()
