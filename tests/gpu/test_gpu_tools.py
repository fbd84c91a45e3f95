"""The tools for a machine with a GPU, without one: what they say, and that they run through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cumla.backends import load_backend
from gpu.machine import why_not
from gpu.stand_in import StandIn, cupy

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import gpu_bench  # noqa: E402
import gpu_cases  # noqa: E402

without_gpu = pytest.mark.skipif(why_not() is None, reason="there is a GPU")


def test_the_script_is_shell() -> None:
    subprocess.run(["bash", "-n", TOOLS / "gpu_check.sh"], check=True)
    assert os.access(TOOLS / "gpu_check.sh", os.X_OK)


@without_gpu
def test_the_script_without_a_gpu(tmp_path: Path) -> None:
    found = subprocess.run(
        [TOOLS / "gpu_check.sh", tmp_path / "results"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 2
    assert found.stderr.startswith("nothing to check: backend 'cupy': ")
    assert "Traceback" not in found.stderr
    assert "==" not in found.stdout


@without_gpu
def test_the_benchmark_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bench.main([]) == 2
    assert capsys.readouterr().err.startswith("no GPU to measure: backend 'cupy': ")


class Event:
    """A clock that moves on by a millisecond at every event."""

    now = 0.0

    def record(self, stream: Any = None) -> None:
        Event.now += 1
        self.at = Event.now

    def synchronize(self) -> None:
        pass


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    made = StandIn(targets=("sm_80",), checks=())
    runtime = cupy.cuda.runtime
    properties = {
        "name": b"NVIDIA H100 80GB HBM3",
        "multiProcessorCount": 4,
        "totalGlobalMem": 80 << 30,
        "l2CacheSize": 50 << 20,
    }
    monkeypatch.setattr(runtime, "getDeviceProperties", lambda device: properties)
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: 13000)
    monkeypatch.setattr(runtime, "memGetInfo", lambda: (1 << 21, 1 << 30))
    monkeypatch.setattr(runtime, "memsetAsync", lambda address, value, size, stream: None)
    pool = SimpleNamespace(free_all_blocks=lambda: None, free_bytes=lambda: 0)
    monkeypatch.setattr(cupy, "get_default_memory_pool", lambda: pool)
    monkeypatch.setattr(cupy.cuda, "Event", Event)
    monkeypatch.setattr(cupy.cuda, "get_elapsed_time", lambda begin, end: end.at - begin.at)
    monkeypatch.setattr(gpu_bench, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setattr(gpu_bench, "copy_bandwidth", lambda flush: 3e12)
    monkeypatch.setattr(gpu_bench, "TIMED_RUNS", 2)
    # A pointer to memory, which has no Python class to patch: copies are made through the host.
    monkeypatch.setattr(gpu_bench, "large_pool", lambda block, tokens: _pool(made, block, tokens))
    with made.in_place():
        yield made


def _pool(driver: StandIn, block: Any, tokens: int) -> Any:
    assert tokens <= block.shape[0] * block.shape[1]
    return driver.array(block)


SMALL: tuple[gpu_cases.Case, ...] = (
    gpu_cases.Dense(1, 16, 70, s_q=2, page_size=16),
    gpu_cases.Sparse(
        1,
        3,
        40,
        20,
        gpu_cases.V4_FP8,
        page_size=8,
        extra_tokens=20,
        extra_topk=9,
        extra_page_size=2,
    ),
)


def test_it_checks_times_and_reports(
    driver: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_bench, "CHECKS", SMALL)
    large = gpu_cases.Dense(128, 128, 32768)
    monkeypatch.setattr(gpu_bench, "QUICK", (*SMALL, large))
    assert gpu_bench.main(["--quick", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.count("ok ") == 2
    report = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert report["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert [one["name"] for one in report["results"]] == [one.name for one in SMALL]
    assert report["left_out"] == [f"{large.name}: needs 4.5 GiB"]
    dense, sparse = report["results"]
    assert (dense["us"], dense["us_best"]) == (1000, 1000)
    assert dense["flop"] == 16 * 2 * 2 * 70 * 1088
    assert dense["bytes"] == 2 * (2 * 16 * 1088 + 70 * 576)
    assert dense["tflops"] == pytest.approx(dense["flop"] / 1e9)
    assert dense["roofline_share"] == pytest.approx(dense["bytes"] / 3.35e12 * 1e3)
    assert sparse["flop"] == 2 * 3 * 1024 * 2 * 29
    rows = (sparse["bytes"] - 2 * 2 * 3 * 1024) / 584
    assert 29 <= rows <= 2 * 29
    text = (tmp_path / "gpu_bench.md").read_text()
    assert all(f"| {one.name} | 1000.0 |" in text for one in SMALL)


def test_a_wrong_result_fails_it(
    driver: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_bench, "CHECKS", SMALL[:1])
    read = gpu_bench.from_gpu
    monkeypatch.setattr(gpu_bench, "from_gpu", lambda array: read(array) * array.dtype.type(1.1))
    assert gpu_bench.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


def _name(case: gpu_cases.Case) -> str:
    return case.name


@pytest.mark.parametrize("case", [*gpu_bench.CHECKS[:1], *gpu_bench.CHECKS[3:4]], ids=_name)
def test_inputs_are_what_the_ops_take(case: gpu_cases.Case) -> None:
    arguments = gpu_cases.make(case, whole=True)
    gpu_cases.op_of(case)(**arguments)
    if isinstance(case, gpu_cases.Sparse):
        chosen = arguments["indices"].reshape(-1, case.topk)
        assert all(len(set(row.tolist())) == case.topk for row in chosen)
        assert len(chosen) < gpu_cases.distinct_bytes(case, arguments)


def test_the_cases_are_those_that_flashmla_times() -> None:
    names = [one.name for one in [*gpu_cases.dense_cases(), *gpu_cases.sparse_cases()]]
    assert len(names) == len(set(names))
    for expected in (
        "dense BF16 b 128 s_q 1 h_q 128 h_kv 1 tokens 4096",
        "sparse V32_FP8 b 74 s_q 2 h_q 128 topk 2048",
        "sparse V4_FP8 b 128 s_q 2 h_q 128 topk 128 + 1024 (page 2)",
    ):
        assert expected in names
    largest = max(map(gpu_cases.needed_bytes, gpu_cases.dense_cases()))
    assert 4 << 30 < largest < 6 << 30


def test_host_time_takes_the_short_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import host_time

    monkeypatch.setattr(host_time, "RUNS", 1)
    monkeypatch.setattr(host_time, "REPEATS", 1)
    monkeypatch.setattr(sys, "argv", ["host_time.py"])
    kinds: list[Any] = []
    forget = host_time.forget

    def forget_and_tell() -> None:
        backend: Any = load_backend("cupy")
        kinds.extend(backend.device.recordings.values())
        forget()

    monkeypatch.setattr(host_time, "forget", forget_and_tell)
    monkeypatch.setattr(cupy, "RawModule", cupy.RawModule)  # it is put back
    host_time.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["dense", "sparse"]
    assert kinds
    assert None not in kinds, "its calls are not remembered, so it tells nothing of those that are"
