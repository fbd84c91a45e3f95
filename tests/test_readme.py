"""What the README says is true: its example runs, its tables agree with the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cumla
from cumla import backends, layouts
from cumla.layouts import LAYOUTS

README = Path(__file__).parent.parent / "README.md"
SOURCE = Path(cumla.__file__).parent


def table_rows(heading: str) -> list[list[str]]:
    """The body rows of the first table under a heading, cells stripped of back-ticks."""
    section = README.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_numpy_example_runs_as_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    block = README.read_text().split("## With NumPy\n")[1].split("```python\n")[1].split("```")[0]
    exec(compile(block, "README.md", "exec"), {})
    promised = block.split("# ")[-1].strip()
    assert capsys.readouterr().out.strip() == promised


def test_the_simulator_examples_run_as_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    chapter = README.read_text().split("## Debugging a kernel on the CPU\n")[1].split("\n## ")[0]
    blocks = [part.split("```")[0] for part in chapter.split("```python\n")[1:]]
    promises = [part.split("```\n")[1].splitlines() for part in chapter.split("prints\n")[1:]]
    names: dict[str, Any] = {}
    for block, promised, lines in zip(
        blocks,
        promises,
        (("reverse.cu:4", "reverse.cu:6"), ("twice.cu:4", "twice.cu:11")),
        strict=True,
    ):
        exec(compile(block, "README.md", "exec"), names)
        first, second = capsys.readouterr().out.strip().splitlines()
        assert first == promised[0]
        assert second.startswith(promised[1].partition(" at offset")[0])
        assert all(line in second for line in lines)
    said = chapter.split("and then `")[1].split("`")[0].replace("\n", " ")
    assert said.partition(" at twice.cu:11")[2] in second


def test_environment_variables_are_those_of_the_code() -> None:
    told = {re.sub("`", "", row[0]) for row in table_rows("Settings")}
    read = set()
    for file in SOURCE.rglob("*.py"):
        read |= set(re.findall(r"\bCUMLA_[A-Z_]+\b", file.read_text()))
    assert told == read
    assert len(told) <= 10


def bf16(*shape: int, dtype: Any = ml_dtypes.bfloat16) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def int32(*values: Any) -> Any:
    return np.array(values, np.int32)


def run_dense(layout: layouts.KVLayout) -> None:
    kv = cumla.pack_kv(bf16(1, 4, 1, layout.d_qk), layout, 4)
    q = bf16(1, 1, 2, layout.d_qk, dtype=layout.compute_dtype)
    cumla.dense_decode(q, kv, int32([0]), int32(3))


def run_sparse(layout: layouts.KVLayout) -> None:
    kv = cumla.pack_kv(bf16(1, 4, 1, layout.d_qk), layout, 4)
    q = bf16(1, 1, 2, layout.d_qk, dtype=layout.compute_dtype)
    cumla.sparse_decode(q, kv, int32([[2, -1]]))


def run_codec(layout: layouts.KVLayout) -> None:
    cumla.unpack_kv(cumla.pack_kv(bf16(1, 4, 1, layout.d_qk), layout, 4), layout, 4)


def run_cache(layout: layouts.KVLayout) -> None:
    cache = cumla.PagedKVCache(layout, 2, 4)
    cache.append([cache.allocate()], bf16(5, layout.d_qk), [5])


def run_prefill(dtype: Any) -> None:
    for d_qk in (576, 512):
        cumla.sparse_prefill(
            bf16(1, 2, d_qk, dtype=dtype), bf16(4, 1, d_qk, dtype=dtype), int32([[0, 3]]), 0.1
        )


def run_mha(dtype: Any) -> None:
    q, k, v = (bf16(3, 2, n, dtype=dtype) for n in (192, 192, 128))
    bounds = int32(0, 3)
    out, lse = cumla.mha_varlen(q, k, v, bounds, bounds, causal=True)
    cumla.mha_varlen_backward(out, q, k, v, out, lse, bounds, bounds, causal=True)


def run_plan(_: Any) -> None:
    lengths = cumla.sparse_kv_lengths(2, 64)
    plan = cumla.plan_decode(lengths, num_parts=3)
    cumla.decode_workspace_bytes(2, 1, 16, plan.num_parts)


def run_merge(_: Any) -> None:
    cumla.merge_attention([bf16(1, 2, 4)], [np.zeros((1, 2), np.float32)])


RUNNERS = {
    "dense_decode": run_dense,
    "sparse_decode": run_sparse,
    "sparse_prefill": run_prefill,
    "mha_varlen": run_mha,
    "merge_attention": run_merge,
    "pack_kv": run_codec,
    "plan_decode": run_plan,
    "PagedKVCache": run_cache,
}


def formats_of(cell: str) -> list[Any]:
    if cell == "all four":
        return list(LAYOUTS)
    if cell == "flat bf16, fp16":
        return [ml_dtypes.bfloat16, np.float16]
    if cell == "-":
        return [None]
    by_name = {layout.name: layout for layout in LAYOUTS}
    return [by_name[name] for name in cell.split(", ")]


@pytest.mark.parametrize("row", table_rows("What runs where"), ids=lambda row: " ".join(row[:2]))
def test_every_row_of_the_support_table_is_true(row: list[str]) -> None:
    op = re.findall(r"\w+", row[0])[0]
    for kind in formats_of(row[1]):
        for backend, cell in zip(backends.BACKEND_NAMES, row[2:], strict=True):
            assert cell in ("yes", "not yet", "NumPy's")
            if cell != "not yet":
                if backend == "cupy" and backends.availability()[backend] is not None:
                    continue  # tests/gpu has the kernels on that side
                with cumla.use_backend(backend):
                    RUNNERS[op](kind)
            else:
                refusals = (cumla.ArgumentError, cumla.BackendUnavailable)
                with pytest.raises(refusals), cumla.use_backend(backend):
                    RUNNERS[op](kind)


def test_the_support_table_names_every_op() -> None:
    told = {name for row in table_rows("What runs where") for name in re.findall(r"\w+", row[0])}
    assert set(cumla.attention.__all__) <= told
