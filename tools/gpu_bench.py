"""How fast decode runs on this GPU: checked against the CPU first, then timed with a cold L2.

    python tools/gpu_bench.py [--out FOLDER] [--quick] [--check-only] [--only TEXT] [--no-pool]

Needs cumla's own packages and nothing else; run it in a checkout with PYTHONPATH set to it.

A timed call has its results, workspace and plan given. Before each, a buffer larger than L2 is
overwritten, which also keeps the GPU busy until the call is queued; CUDA events stand before and
behind the call's kernels, and the median counts. FLOP and bytes are counted as FlashMLA counts
them: dense 2 * (576 + 512) a query row and token, with causal masks ignored; sparse every selected
token, and every distinct one read once. The roofline is the GPU's data sheet.

--out writes gpu_bench.json and gpu_bench.md. Exits with 1 if a check fails, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_cases import (
    CHECKS,
    QUICK,
    Case,
    Dense,
    dense_cases,
    distinct_bytes,
    from_gpu,
    large_pool,
    make,
    needed_bytes,
    on_gpu,
    op_of,
    pool_tokens,
    sparse_cases,
)

import cumla
from cumla.backends import BackendUnavailable, load_backend
from cumla.cli.comparison import DENSE_OUT, LSE_DECODE, SPARSE_OUT, compare
from cumla.jit import nvrtc
from cumla.kernels import decode

# Bytes a second and dense bf16 FLOP a second: NVIDIA's data sheets. The first name that occurs in
# the GPU's is taken.
ROOFLINES = {
    "B200": (8.0e12, 2250e12),
    "GB200": (8.0e12, 2500e12),
    "H200": (4.8e12, 989e12),
    "GH200": (4.0e12, 989e12),
    "H100 PCIe": (2.0e12, 756e12),
    "H100": (3.35e12, 989e12),
    "H800": (3.35e12, 989e12),
    "H20": (4.0e12, 148e12),
    "A100-SXM4-80GB": (2.039e12, 312e12),
    "A100 80GB PCIe": (1.935e12, 312e12),
    "A100": (1.555e12, 312e12),
    "L40S": (0.864e12, 362e12),
    "L40": (0.864e12, 181e12),
    "L4": (0.3e12, 121e12),
    "RTX 5090": (1.792e12, 209e12),
    "RTX 4090": (1.008e12, 165e12),
    "RTX 3090": (0.936e12, 71e12),
}
FLUSH_BYTES = 512 << 20
WARM_RUNS, TIMED_RUNS = 3, 20
# --------------------------------------------------------------------------------------- check


def check(case: Case) -> str | None:
    """None if the GPU's results are the CPU's, twice with the same bits; else what is wrong."""
    import cupy

    arguments = make(case, whole=True)
    want_out, want_lse = op_of(case)(**arguments)
    there = {
        name: one
        if not isinstance(one, np.ndarray)
        else large_pool(one, _tokens(one))
        if "kv_cache" in name
        else on_gpu(one)
        for name, one in arguments.items()
    }
    runs = []
    for _ in range(2):
        results = op_of(case)(**there)
        runs.append([from_gpu(one) for one in results])
    out, lse = runs[0]
    tolerance = DENSE_OUT if isinstance(case, Dense) else SPARSE_OUT
    for name, found, want, close in (
        ("out", out, want_out, tolerance),
        ("lse", lse, want_lse, LSE_DECODE),
    ):
        judged = compare(name, found, want, close, dtype=want.dtype)
        if not judged.passed:
            return judged.message
    if any(one.tobytes() != other.tobytes() for one, other in zip(*runs, strict=True)):
        return "a second run gave other bits"
    cupy.get_default_memory_pool().free_all_blocks()
    return None


def moved(arguments: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    """The arguments on the GPU, with pools of so many tokens."""
    there = dict(arguments)
    for name, one in arguments.items():
        if name in tokens:
            there[name] = large_pool(one, tokens[name])
        elif isinstance(one, np.ndarray):
            there[name] = on_gpu(one)
    return there


def _tokens(pages: Any) -> int:
    return int(pages.shape[0] * pages.shape[1])


# ---------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Result:
    """What was measured of a case."""

    name: str
    us: float
    """Of the call's kernels, median."""
    us_best: float
    host_us: float
    """Of the call on the CPU, median: checks and launches."""
    bytes: int
    flop: int
    gb_per_s: float
    tflops: float
    roofline_us: float | None
    roofline_share: float | None


def roofline(gpu: str) -> tuple[float, float] | None:
    return next((one for name, one in ROOFLINES.items() if name in gpu), None)


def plan_for(case: Case) -> cumla.DecodePlan:
    """The plan that the backend would make for itself."""
    backend: Any = load_backend("cupy")
    with backend.device.call() as call:
        if isinstance(case, Dense):
            parts = decode.dense_num_parts(call, case.layout, case.s_q, case.h_q, case.h_kv)
            lengths = np.full(case.b, case.length, np.int32)
        else:
            parts = decode.sparse_num_parts(call, case.layout, case.s_q, case.h_q)
            lengths = cumla.sparse_kv_lengths(case.b, case.topk, None, case.extra_topk)
    return cumla.plan_decode(on_gpu(lengths), num_parts=parts)


def measure(case: Case, flush: Any, peak: tuple[float, float] | None) -> Result:
    import cupy

    arguments = make(case, whole=False)
    size = case.bytes if isinstance(case, Dense) else distinct_bytes(case, arguments)
    there = moved(arguments, pool_tokens(case))
    there["plan"] = plan_for(case)
    there["out"], there["lse"] = op_of(case)(**there)
    workspace = cumla.decode_workspace_bytes(case.b, case.s_q, case.h_q, there["plan"].num_parts)
    there["workspace"] = cupy.empty(workspace, np.uint8)
    stream = cupy.cuda.get_current_stream()
    device, host = [], []
    for number in range(WARM_RUNS + TIMED_RUNS):
        cupy.cuda.runtime.memsetAsync(flush.data.ptr, number & 1, flush.nbytes, stream.ptr)
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        started = time.perf_counter()
        op_of(case)(**there)
        took = time.perf_counter() - started
        end.record()
        end.synchronize()
        if number >= WARM_RUNS:
            device.append(1000 * cupy.cuda.get_elapsed_time(begin, end))
            host.append(1e6 * took)
    us = statistics.median(device)
    bound = None if peak is None else 1e6 * max(size / peak[0], case.flop / peak[1])
    return Result(
        name=case.name,
        us=us,
        us_best=min(device),
        host_us=statistics.median(host),
        bytes=size,
        flop=case.flop,
        gb_per_s=size / us / 1e3,
        tflops=case.flop / us / 1e6,
        roofline_us=bound,
        roofline_share=None if bound is None else bound / us,
    )


def copy_bandwidth(flush: Any) -> float:
    """Bytes a second, read and written, of a copy within the GPU's memory."""
    import cupy

    half = flush.nbytes // 2
    best = 0.0
    for _ in range(8):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        flush.data.copy_from_device_async(flush.data + half, half)
        end.record()
        end.synchronize()
        best = max(best, 2 * half / cupy.cuda.get_elapsed_time(begin, end) * 1e3)
    return best


# --------------------------------------------------------------------------------------- report


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    name = properties["name"]
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "gpu": name.decode() if isinstance(name, bytes) else name,
        "sms": properties["multiProcessorCount"],
        "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
        "l2_mib": round(properties["l2CacheSize"] / 2**20, 1),
        "driver": runtime.driverGetVersion(),
        "cuda": runtime.runtimeGetVersion(),
        "nvrtc": ".".join(map(str, nvrtc.version())),
        "cupy": cupy.__version__,
        "python": sys.version.split()[0],
        "cumla": cumla.__version__,
        "commit": commit,
    }


def markdown(facts: dict[str, Any], results: list[Result], left_out: list[str]) -> str:
    lines = ["# Decode on " + str(facts["gpu"]), ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        "",
        "Kernel time, median, cold L2. host: CPU time of a call.",
        "",
        "| case | us | GB/s | TFLOPS | roofline | host us |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in results:
        share = "-" if one.roofline_share is None else f"{one.roofline_share:.0%}"
        lines.append(
            f"| {one.name} | {one.us:.1f} | {one.gb_per_s:.0f} | {one.tflops:.1f} | {share} | "
            f"{one.host_us:.0f} |"
        )
    lines += [f"\nLeft out: {one}" for one in left_out]
    return "\n".join(lines) + "\n"


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for gpu_bench.json and gpu_bench.md")
    parser.add_argument("--quick", action="store_true", help="few cases")
    parser.add_argument("--check-only", action="store_true", help="check results, time nothing")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--seconds", type=float, default=300, help="begin no case after so many")
    parser.add_argument(
        "--no-pool", action="store_true", help="each array by cudaMalloc, for compute-sanitizer"
    )
    options = parser.parse_args(given)
    try:
        load_backend("cupy")
    except BackendUnavailable as error:
        print(f"no GPU to measure: {error}", file=sys.stderr)
        return 2
    import cupy

    if options.no_pool:
        cupy.cuda.set_allocator(None)
    facts = machine()
    for name, value in facts.items():
        print(f"{name:12} {value}")
    began = time.perf_counter()
    bad = 0
    for case in CHECKS[::3] if options.quick and options.check_only else CHECKS:
        wrong = check(case)
        bad += wrong is not None
        print(f"{'ok' if wrong is None else 'WRONG':6} {case.name}{'' if wrong is None else wrong}")
    if bad or options.check_only:
        return 1 if bad else 0

    flush = cupy.empty(FLUSH_BYTES, np.uint8)
    facts["copy_gb_per_s"] = round(copy_bandwidth(flush) / 1e9)
    peak = roofline(facts["gpu"])
    facts["roofline"] = (
        "unknown"
        if peak is None
        else f"{peak[0] / 1e9:.0f} GB/s, " + (f"{peak[1] / 1e12:.0f} TFLOPS")
    )
    results: list[Result] = []
    left_out: list[str] = []
    cases: list[Case] = [*QUICK] if options.quick else [*dense_cases(), *sparse_cases()]
    print(f"\n{'us':>9} {'GB/s':>6} {'TFLOPS':>7} {'roof':>5} {'host us':>8}")
    for case in cases:
        if options.only not in case.name:
            continue
        free, _ = cupy.cuda.runtime.memGetInfo()
        free += cupy.get_default_memory_pool().free_bytes()
        if needed_bytes(case) > 0.8 * free:
            left_out.append(f"{case.name}: needs {needed_bytes(case) / 2**30:.1f} GiB")
            continue
        if time.perf_counter() - began > options.seconds:
            left_out.append(f"{case.name}: time was up")
            continue
        one = measure(case, flush, peak)
        results.append(one)
        share = "-" if one.roofline_share is None else f"{one.roofline_share:.0%}"
        print(
            f"{one.us:9.1f} {one.gb_per_s:6.0f} {one.tflops:7.1f} {share:>5} {one.host_us:8.0f}  "
            f"{one.name}",
            flush=True,
        )
        cupy.get_default_memory_pool().free_all_blocks()
    for name in left_out:
        print(f"left out: {name}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"machine": facts, "results": [asdict(one) for one in results]}
        text = json.dumps(report | {"left_out": left_out}, indent=2)
        (options.out / "gpu_bench.json").write_text(text + "\n")
        (options.out / "gpu_bench.md").write_text(markdown(facts, results, left_out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
