"""The kernels of kernels/hopper_*.cu as functions of NumPy arrays, and what they must compute."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from cumla import sim
from sim import kernel_files

CHECKS = ("memory", "race")
STAGE_BYTES = 32768  # of A and B, in all GEMMs


def module(name: str, *options: str) -> sim.LoadedModule:
    """The module of kernels/hopper_<name>.cu."""
    return kernel_files.module(
        f"hopper_{name}", "sm_90a", f"-I{kernel_files.FOLDER}", *(f"-D{o}" for o in options)
    )


def integers(seed: int, *shape: int) -> Any:
    """Random bf16 numbers whose sums of products are exact in f32."""
    return np.random.default_rng(seed).integers(-8, 8, shape).astype(ml_dtypes.bfloat16)


def product(a: Any, b: Any) -> Any:
    """A @ B^T, exactly, in f32."""
    return a.astype(np.float32) @ b.astype(np.float32).T


def upload(device: sim.Device, array: Any, name: str) -> sim.DeviceArray:
    """A device array; bf16 as its bits."""
    bits = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
    return device.upload(bits, name=name)


def tensor(array: sim.DeviceArray, *box: int) -> Any:
    """A tensor map with rows swizzled by 128 bytes; 16-bit arrays are bf16.

    It does not keep the array alive.
    """
    kind = {2: "bfloat16", 4: "float32"}[array.dtype.itemsize]
    return sim.tensor_map(array, box_dim=box, data_type=kind, swizzle="128B")


def gemm(a: Any, b: Any, dtype: Any = np.float32, stages: int = 4, *bugs: str, **how: Any) -> Any:
    """hopper_gemm.cu: [M, K] and [N, K] bf16 to [M, N] of f32 or bf16."""
    loaded = module("gemm", f"STAGES={stages}", *bugs)
    device = loaded.device
    (m, k), n = a.shape, b.shape[0]
    item = np.dtype(dtype).itemsize
    c = device.alloc((m, n), np.float32 if item == 4 else np.uint16, name="c")
    a_array, b_array = upload(device, a, "a"), upload(device, b, "b")
    args = [
        tensor(a_array, 64, 128),
        tensor(b_array, 64, 128),
        tensor(c, 128 // item, 64),
        k // 64,
    ]
    loaded.kernel("gemm_f32" if item == 4 else "gemm_bf16").launch(
        (-(-n // 128), -(-m // 128)),
        384,
        args,
        shared_bytes=stages * STAGE_BYTES + 128 * 128 * item + 1024,
        **{"checks": CHECKS, **how},
    )
    return c.get().view(dtype)


def cluster_gemm(a: Any, b: Any, stages: int = 4, *bugs: str, **how: Any) -> Any:
    """hopper_cluster_gemm.cu: [M, K] and [N, K] bf16 to [M, N] f32."""
    loaded = module("cluster_gemm", f"STAGES={stages}", *bugs)
    device = loaded.device
    (m, k), n = a.shape, b.shape[0]
    c = device.alloc((m, n), np.float32, name="c")
    a_array, b_array = upload(device, a, "a"), upload(device, b, "b")
    args = [
        tensor(a_array, 64, 128),
        tensor(b_array, 64, 64),
        tensor(c, 32, 64),
        k // 64,
    ]
    loaded.kernel("cluster_gemm").launch(
        (2 * -(-m // 256), -(-n // 128)),
        384,
        args,
        cluster=(2, 1, 1),
        shared_bytes=stages * STAGE_BYTES + 66560,
        **{"checks": CHECKS, **how},
    )
    return c.get()


def exchange_gemm(a: Any, b: Any, *options: str, **how: Any) -> Any:
    """hopper_exchange.cu: [M, K] and [N, K] bf16 to [M, N] f32."""
    loaded = module("exchange", *options)
    device = loaded.device
    (m, k), n = a.shape, b.shape[0]
    c = device.alloc((m, n), np.float32, name="c")
    loaded.kernel("exchange_gemm").launch(
        (m // 64, n // 64),
        128,
        [upload(device, a, "a"), upload(device, b, "b"), c, n, k],
        cluster=(2, 1, 1),
        **{"checks": CHECKS, **how},
    )
    return c.get()


def attention(q: Any, k: Any, v: Any, causal: bool, *bugs: str, **how: Any) -> tuple[Any, Any]:
    """hopper_attention.cu: q [heads, s_q, D], k, v [heads, s_k, D] bf16 to out (as q) and lse."""
    loaded = module("attention", *bugs)
    device = loaded.device
    heads, s_q, d = q.shape
    s_k = k.shape[1]
    out = device.alloc(q.shape, np.uint16, name="out")
    lse = device.alloc((heads, s_q), np.float32, name="lse")
    arrays = [upload(device, x, name) for x, name in ((q, "q"), (k, "k"), (v, "v"))]
    maps = [tensor(array, 64, 64, 1) for array in (*arrays, out)]
    loaded.kernel(f"attention_{d}").launch(
        (-(-s_q // 128), heads),
        384,
        [*maps, lse, s_q, s_k, int(causal), np.float32(scale_log2(d))],
        shared_bytes=d * 256 + 2 * d * 256 + 1024,
        **{"checks": CHECKS, **how},
    )
    return out.get().view(ml_dtypes.bfloat16), lse.get()


def scale_log2(d: int) -> float:
    """1 / sqrt(d) for scores to base 2."""
    return float(np.float32(np.log2(np.e) / np.sqrt(d)))


def attended(q: Any, k: Any, v: Any, causal: bool) -> tuple[Any, Any, Any]:
    """What `attention` must give, in f64, and how far `out` may be off."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    s = q @ k.transpose(0, 2, 1) * scale_log2(q.shape[2])
    if causal:
        s_q, s_k = s.shape[1:]
        s = np.where(np.arange(s_k) > np.arange(s_q)[:, None] + s_k - s_q, -np.inf, s)
    most = s.max(axis=2, keepdims=True)
    p = np.exp2(s - most)
    total = p.sum(axis=2, keepdims=True)
    out = p @ v / total
    # P is rounded to bf16, and so is O: 2^-9 each; twice that leaves room for f32 and ex2.approx.
    tolerance = 2.0**-8 * (p @ np.abs(v) / total + np.abs(out)) + 1e-6
    return out, (most + np.log2(total))[..., 0], tolerance


def persistent_gemm(x: Any, b: Any, grid: int, stages: int = 4, *bugs: str, **how: Any) -> Any:
    """hopper_persistent.cu: [M, K] f32 and [N, K] bf16 to [M, N] f32; the kernels overlap."""
    loaded = module("persistent", f"STAGES={stages}", *bugs)
    device = loaded.device
    (m, k), n = x.shape, b.shape[0]
    tiles_m, tiles_n = -(-m // 128), -(-n // 128)
    a = device.alloc((m, k), np.uint16, name="a")
    c = device.alloc((m, n), np.float32, name="c")
    # The last rows belong to no row of A: they are copied, never stored.
    scales = device.upload(np.full(tiles_m * 128, np.nan, np.float32), name="scales")
    x_array, b_array = upload(device, x, "x"), upload(device, b, "b")
    args = [
        tensor(a, 64, 128),
        tensor(b_array, 64, 128),
        tensor(c, 32, 64),
        scales,
        tiles_m * tiles_n,
        tiles_n,
        k // 64,
    ]
    options = {"checks": CHECKS, **how}
    stream = device.stream()
    stream.launch(loaded.kernel("normalise"), m // 4, 128, [x_array, a, scales, k], **options)
    stream.launch(
        loaded.kernel("persistent_gemm"),
        grid,
        384,
        args,
        programmatic=True,
        shared_bytes=stages * STAGE_BYTES + 66560,
        **options,
    )
    stream.synchronize()
    return c.get()


def scaled_rows(seed: int, m: int, k: int) -> Any:
    """[M, K] f32 whose rows divided by their largest magnitude are exact in bf16."""
    x = integers(seed, m, k).astype(np.float32)
    x[np.arange(m), np.arange(m) % k] = -8
    return x * 2.0 ** (np.arange(m, dtype=np.float32) % 5)[:, None]
