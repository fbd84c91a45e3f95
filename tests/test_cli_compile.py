"""`cumla compile` and what `cumla info` tells of kernels."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cumla.cli import compile as module
from cumla.cli import info, main
from cumla.jit import build as jit
from cumla.jit import sources
from cumla.kernels.catalogue import Instance
from cumla.kernels.device import Program

GOOD = """
namespace cumla {
template <int N> __global__ void fill(int* x) {
    __shared__ int held[N];
    held[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = held[N - 1 - threadIdx.x];
}
}
"""
SPILLING = """
__global__ void __launch_bounds__(1024, 2) spill(int* y, int z) {
    int frame[100];
    for (int i = 0; i < 100; i++) frame[i] = y[i * z];
    y[0] = frame[z];
}
"""


def instance(name: str, expression: str, **how: int) -> Instance:
    return Instance(Program(f"{name}.cuh", expression), **{"threads": 128, **how})


SETS = {
    "good": [
        instance("good", "cumla::fill<32>", shared_bytes=1000),
        instance("good", "cumla::fill<64>", shared_bytes=90_000, min_blocks=2),
    ],
    "spilling": [instance("spilling", "spill", threads=1024)],
    "bad": [instance("bad", "cumla::bad<1>"), instance("good", "cumla::fill<32>")],
    "none": [instance("none", "none")],
}


@pytest.fixture(autouse=True)
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "good.cuh").write_text(GOOD)
    (folder / "spilling.cuh").write_text(SPILLING)
    (folder / "bad.cuh").write_text(GOOD.replace("fill", "bad").replace("x[threadIdx.x];", "y;"))
    monkeypatch.setattr(sources, "root", lambda: folder)
    monkeypatch.setenv("CUMLA_CACHE_DIR", str(tmp_path / "cache"))
    jit.forget()
    yield folder
    jit.forget()


def run(monkeypatch: pytest.MonkeyPatch, kernels: str, arguments: str) -> Result:
    monkeypatch.setattr(module, "programs", lambda target: SETS[kernels])
    jit.forget()
    return CliRunner().invoke(main, ["compile", *arguments.split()])


def test_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(monkeypatch, "good", "--target sm_90a --target sm_86")
    assert result.exit_code == 0, result.output
    head, *rows, total, where = result.stdout.splitlines()
    names = "target regs spills local static dynamic blocks/SM code seconds kernel"
    assert " ".join(head.split()) == names
    assert [row.split()[0] for row in rows] == ["sm_90a", "sm_90a", "sm_86", "sm_86"]
    assert [row.split()[-1] for row in rows] == ["fill<32>", "fill<64>"] * 2
    # fill<64> has 256 + 90,000 bytes: two of 228 KiB, one of 100 KiB, though made for two.
    static, dynamic, blocks = zip(*(row.split()[4:7] for row in rows), strict=True)
    assert (static, dynamic) == (("128", "256") * 2, ("1000", "90000") * 2)
    assert blocks == ("16", "2", "12", "1*")
    for row in rows:
        registers, spills, local = map(int, row.split()[1:4])
        assert 4 < registers < 40
        assert (spills, local) == (0, 0)
        # The columns are under their names.
        ends = [[word.end() for word in re.finditer(r"\S+", line)] for line in (head, row)]
        assert ends[0][1:9] == ends[1][1:9]
    assert total.startswith("4 kernels for 2 targets in ")
    assert total.endswith("; 0 were cached, 0 use local memory.")
    assert where == f"The cache is {tmp_path / 'cache'}"
    assert len(list((tmp_path / "cache").glob("fill.*/kernel.cubin"))) == 4

    again = run(monkeypatch, "good", "--target sm_90a")
    assert again.exit_code == 0
    assert all(row.split()[-2] == "cached" for row in again.stdout.splitlines()[1:3])
    assert "; 2 were cached," in again.stdout


def test_all_targets_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ("", "--target all --target sm_80"):
        result = run(monkeypatch, "good", f"{arguments} --kernel <32> --jobs 3")
        assert result.exit_code == 0, result.output
        rows = [line.split() for line in result.stdout.splitlines()[1:-2]]
        assert [row[0] for row in rows] == list(module.TARGETS)
        assert {row[-1] for row in rows} == {"fill<32>"}


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "spilling", "--target sm_80 --json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["kernels"]
    assert (row["kernel"], row["target"], row["threads"]) == ("spill", "sm_80", 1024)
    assert row["local_bytes"] >= 400
    assert row["blocks_per_sm"] == 2
    assert (row["error"], row["cached"]) == (None, False)
    text = run(monkeypatch, "spilling", "--target sm_80").stdout
    assert "1 kernels for 1 target" not in text
    assert text.splitlines()[-2].endswith("; 1 was cached, 1 uses local memory.")


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ("bad", 'bad.cuh(5): error: identifier "y" is undefined'),
        ("none", "path: got none.cuh; "),
    ],
)
def test_failures(chosen: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, chosen, "--target sm_90a")
    assert result.exit_code == 1
    name = SETS[chosen][0].program.expression.removeprefix("cumla::")
    assert f"sm_90a  FAILED  {name}\n" in result.stdout
    assert told in result.stdout
    count = len(SETS[chosen])
    assert result.stderr == f"Error: 1 of {count} kernels did not compile.\n"
    # The others are compiled all the same.
    assert ("fill<32>" in result.stdout) == (chosen == "bad")
    as_json = run(monkeypatch, chosen, "--target sm_90a --json")
    assert as_json.exit_code == 1
    assert told in json.loads(as_json.stdout)["kernels"][0]["error"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--target sm_75", "Invalid value for '--target': target: got 'sm_75'; known are sm_80, "),
        ("--target al", "'al'"),
        ("--jobs 0", "'--jobs'"),
    ],
)
def test_usage(arguments: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "good", arguments)
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.split())


def test_no_such_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "good", "--kernel attend")
    assert result.exit_code == 1
    assert result.stderr == "Error: No kernel has 'attend' in its name.\n"


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("libnvrtc.so.12 is not there")

    monkeypatch.setattr("cumla.jit.nvrtc._library", missing)
    result = run(monkeypatch, "good", "--target sm_90a")
    assert result.exit_code == 1
    assert "libnvrtc.so.12 is not there" in result.stdout


def info_facts(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, object], list[str]]:
    """What `cumla info` tells of the cache, as JSON and as lines."""
    monkeypatch.setattr(info, "_backends", dict)
    monkeypatch.setattr(info, "_gpus", lambda: {"found": ["0: one"], "reason": None})
    facts = json.loads(CliRunner().invoke(main, ["info", "--json"]).stdout)
    lines = CliRunner().invoke(main, ["info"]).stdout.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("kernel cache"))
    return facts, [line[16:] for line in lines[start : start + 2]]


def test_info(monkeypatch: pytest.MonkeyPatch, kernels: Path) -> None:
    where = os.environ["CUMLA_CACHE_DIR"]
    facts, lines = info_facts(monkeypatch)
    empty = {"path": where, "kernels": 0, "bytes": 0, "reason": None}
    assert facts["kernel_cache"] == empty
    assert facts["kernel_sources"] == str(kernels)
    assert lines == ["0 kernels, 0.0 MiB", where]
    assert not Path(where).exists()

    run(monkeypatch, "good", "--target sm_90a")
    size = sum(one.stat().st_size for one in Path(where).rglob("*") if one.is_file())
    facts, lines = info_facts(monkeypatch)
    assert facts["kernel_cache"] == {**empty, "kernels": 2, "bytes": size}
    assert lines == [f"2 kernels, {size / 2**20:.1f} MiB", where]


def test_info_of_a_cache_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    where = Path(os.environ["CUMLA_CACHE_DIR"])
    where.mkdir()
    where.chmod(0o777)
    facts, lines = info_facts(monkeypatch)
    reason = "others can write to it (mode 777)"
    assert facts["kernel_cache"] == {
        "path": str(where), "kernels": 0, "bytes": 0, "reason": reason,
    }  # fmt: skip
    assert lines == [f"not usable: {reason}", str(where)]
