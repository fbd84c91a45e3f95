"""Time cumla's numpy backend against the same ops in eager PyTorch on the CPU.

    pip install . torch==2.13.0
    python tools/compare_with_torch.py

Each side runs in a process of its own (two BLAS thread pools in one slow each other down several
times), on the same data and number of threads, and the two alternate round by round. PyTorch's side
is written both ways a person would write it: the whole batch at once with a mask ("batched"), and
a loop over requests ("looped"). Its results are compared with cumla's before any time is printed.
Without PyTorch, cumla's times stand alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import cumla
from cumla.backends.arrays import in_type_of
from cumla.backends.numpy.parallel import num_threads
from cumla.cli.comparison import DENSE_OUT, SPARSE_OUT, compare
from cumla.layouts import BF16, V4_FP8, V32_FP8, KVLayout

PAGE_SIZE = 64
LAYOUTS = {layout.name: layout for layout in (BF16, V32_FP8, V4_FP8)}
SIDES = ("cumla", "torch batched", "torch looped")


@dataclass(frozen=True)
class Case:
    op: str
    layout: str
    h_q: int
    batch: int = 8
    tokens: int = 4096
    topk: int = 2048
    seed: int = 0

    def __str__(self) -> str:
        selected = f"{self.tokens} tokens" if self.op == "dense" else f"topk {self.topk}"
        return f"{self.op} {self.layout} b {self.batch} h_q {self.h_q} {selected}"


CASES = [Case("dense", "BF16", h_q) for h_q in (16, 128)] + [
    Case("sparse", layout, h_q) for layout in ("V32_FP8", "V4_FP8") for h_q in (16, 128)
]


def make_inputs(case: Case) -> dict[str, Any]:
    """Queries, a filled page pool with shuffled pages, and what each request reads of it."""
    random = np.random.default_rng(case.seed)
    layout: KVLayout = LAYOUTS[case.layout]
    blocks = case.tokens // PAGE_SIZE
    pages = case.batch * blocks
    kv = random.standard_normal((pages, PAGE_SIZE, 1, layout.d_qk), np.float32)
    q = random.standard_normal((case.batch, 1, case.h_q, layout.d_qk), np.float32)
    tokens = random.integers(0, pages * PAGE_SIZE, (case.batch, 1, case.topk))
    return {
        "q": q.astype(layout.compute_dtype),
        "pages": cumla.pack_kv(kv, layout, PAGE_SIZE),
        "block_table": random.permutation(pages).reshape(case.batch, blocks).astype(np.int32),
        "cache_seqlens": np.full(case.batch, case.tokens, np.int32),
        "indices": tokens.astype(np.int32),
        "scale": 0.05,
    }


def cumla_call(case: Case, data: dict[str, Any]) -> Callable[[], np.ndarray[Any, Any]]:
    if case.op == "dense":
        arrays = (data["q"], data["pages"], data["block_table"], data["cache_seqlens"])
        return lambda: cumla.dense_decode(*arrays, softmax_scale=data["scale"])[0]
    arrays = (data["q"], data["pages"], data["indices"])
    return lambda: cumla.sparse_decode(*arrays, softmax_scale=data["scale"])[0]


def torch_call(case: Case, data: dict[str, Any], looped: bool) -> Callable[[], Any]:
    import torch

    def tensor(array: np.ndarray[Any, Any]) -> Any:
        return in_type_of(array, torch.empty(0))

    q, scale = tensor(data["q"]), data["scale"]
    d_v = LAYOUTS[case.layout].d_v

    def softmax_v(q: Any, kv: Any, masked: Any) -> Any:
        """q [n, h, d], kv [n, tokens, d] bf16, masked [n, 1, tokens] -> out [n, 1, h, d_v]."""
        kv = kv.float()
        logits = torch.matmul(q.float(), kv.transpose(1, 2)) * scale
        logits = logits.masked_fill(masked, float("-inf"))
        torch.logsumexp(logits, -1)  # lse is a result too
        weights = torch.softmax(logits, -1)
        return torch.matmul(weights, kv[:, :, :d_v]).to(q.dtype).unsqueeze(1)

    if case.op == "dense":
        pages = tensor(data["pages"])
        table, lengths = tensor(data["block_table"]), tensor(data["cache_seqlens"])

        def dense(part: slice) -> Any:
            kv = pages[table[part].long()].flatten(1, 3)
            position = torch.arange(kv.shape[1])
            return softmax_v(q[part, 0], kv, position >= lengths[part, None, None])

        attend = dense
    else:
        indices = tensor(data["indices"])
        gather = (
            _gather_v4(data["pages"]) if case.layout == "V4_FP8" else _gather_v32(data["pages"])
        )

        def sparse(part: slice) -> Any:
            selected = indices[part, 0]
            return softmax_v(
                q[part, 0], gather(selected.clamp(min=0).long()), selected[:, None] < 0
            )

        attend = sparse
    if not looped:
        return lambda: attend(slice(None))
    return lambda: torch.cat([attend(slice(i, i + 1)) for i in range(case.batch)])


def _gather_v32(pages: np.ndarray[Any, Any]) -> Callable[[Any], Any]:
    import torch

    rows = torch.from_numpy(pages.reshape(-1, V32_FP8.row_elements))

    def gather(indices: Any) -> Any:
        raw = rows[indices]
        nope = raw[..., :512].view(torch.float8_e4m3fn).float().unflatten(-1, (4, 128))
        scales = raw[..., 512:528].contiguous().view(torch.float32)
        rope = raw[..., 528:].contiguous().view(torch.bfloat16)
        return torch.cat([(nope * scales[..., None]).flatten(-2).bfloat16(), rope], -1)

    return gather


def _gather_v4(pages: np.ndarray[Any, Any]) -> Callable[[Any], Any]:
    import torch

    count, stride = len(pages), pages.strides[0]
    raw = np.lib.stride_tricks.as_strided(pages, (count, stride), (stride, 1))
    raw_pages = torch.from_numpy(raw)
    rows = raw_pages[:, : PAGE_SIZE * 576].unflatten(1, (PAGE_SIZE, 576))
    groups = raw_pages[:, PAGE_SIZE * 576 : PAGE_SIZE * 584].unflatten(1, (PAGE_SIZE, 8))

    def gather(indices: Any) -> Any:
        page, offset = indices // PAGE_SIZE, indices % PAGE_SIZE
        row = rows[page, offset]
        scales = groups[page, offset][..., :7].contiguous().view(torch.float8_e8m0fnu).bfloat16()
        nope = row[..., :448].contiguous().view(torch.float8_e4m3fn).bfloat16()
        nope = (nope.unflatten(-1, (7, 64)) * scales[..., None]).flatten(-2)
        return torch.cat([nope, row[..., 448:].contiguous().view(torch.bfloat16)], -1)

    return gather


def measure(side: str, case: Case, threads: int, repeats: int, result_file: Path) -> list[float]:
    """Milliseconds of each repeat, in this process; the result goes to `result_file`."""
    data = make_inputs(case)
    if side == "cumla":
        call: Callable[[], Any] = cumla_call(case, data)
        result = call().astype(np.float32)
    else:
        import torch

        torch.set_num_threads(threads)
        call = torch_call(case, data, looped=side == "torch looped")
        result = call().float().numpy()
    np.save(result_file, result)
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


@click.command()
@click.option("--threads", default=num_threads(), help="Threads of each side.")
@click.option("--rounds", default=3, help="How often the sides alternate.")
@click.option("--repeats", default=7, help="Timed calls of a side in a round.")
@click.option("--worker", nargs=3, hidden=True, help="Side, case number and result file.")
def main(threads: int, rounds: int, repeats: int, worker: tuple[str, str, str] | None) -> None:
    """Print a table: median milliseconds of each side, and how many times faster cumla is."""
    if worker:
        side, number, file = worker
        click.echo(json.dumps(measure(side, CASES[int(number)], threads, repeats, Path(file))))
        return
    have_torch = importlib.util.find_spec("torch") is not None
    sides = SIDES if have_torch else SIDES[:1]
    if not have_torch:
        click.echo("PyTorch is not installed: cumla alone is timed.")
    # Every pool that could be in a worker gets the same number of threads.
    names = ("CUMLA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | {name: str(threads) for name in names}
    click.echo(f"medians of {rounds} x {repeats} calls, {threads} threads, numpy {np.__version__}")
    for number, case in enumerate(CASES):
        times: dict[str, list[float]] = {side: [] for side in sides}
        with tempfile.TemporaryDirectory() as folder:
            files = {side: Path(folder) / f"{i}.npy" for i, side in enumerate(sides)}
            for _ in range(rounds):
                for side in sides:
                    command = [sys.executable, __file__, "--threads", str(threads)]
                    command += ["--repeats", str(repeats)]
                    command += ["--worker", side, str(number), str(files[side])]
                    done = subprocess.run(
                        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
                    )
                    times[side] += json.loads(done.stdout)
            results = {side: np.load(file) for side, file in files.items()}
        tolerance = DENSE_OUT if case.op == "dense" else SPARSE_OUT
        for side in sides[1:]:
            found = compare(side, results["cumla"], results[side], tolerance, dtype=np.float32)
            if not found.passed:
                raise click.ClickException(f"{case}: the sides disagree: {found.message}")
        medians = {side: statistics.median(values) for side, values in times.items()}
        line = f"{case!s:42} cumla {medians['cumla']:7.1f} ms"
        for side in sides[1:]:
            line += f" | {side} {medians[side]:7.1f} ms, {medians[side] / medians['cumla']:.2f}x"
        click.echo(line)


if __name__ == "__main__":
    main()
