"""The `cumla` command: what it prints, what it exits with, and that a smoke check can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

import cumla
from cumla.backends.numpy import NumpyBackend
from cumla.cli import SUMMARIES, bench, main, smoke
from cumla.cli.cases import Case, Outcome, Storages, all_cases
from cumla.cli.comparison import DENSE_OUT
from cumla.layouts import LAYOUTS, V4_FP8

OPS = {
    "dense-decode": "--batch 2 --s-q 2 --h-q 4 --h-kv 2 --seq-len 70 --page-size 16 --causal",
    "sparse-decode": "--batch 2 --h-q 3 --seq-len 50 --topk 70 --page-size 8 --layout V4_FP8",
    "sparse-prefill": "--s-q 3 --h-q 4 --seq-len 40 --topk 70 --d-qk 512 --dtype fp16",
    "mha-varlen": "--batch 2 --h-q 4 --h-kv 2 --seq-len 30 --d-qk 24 --d-v 16 --no-causal",
    "mha-varlen-backward": "--batch 2 --h-q 2 --h-kv 2 --seq-len 30 --d-qk 24 --d-v 16",
    "pack-kv": "--batch 2 --seq-len 40 --page-size 16 --scale-rule raw",
    "unpack-kv": "--batch 2 --seq-len 40 --page-size 16 --layout FP16",
}
ALL_COMMANDS = ["", "info", "smoke", "bench", *(f"bench {op}" for op in OPS)]


def run(arguments: str) -> Result:
    return CliRunner().invoke(main, arguments.split())


@pytest.mark.parametrize("arguments", ALL_COMMANDS)
def test_help_has_an_example_that_parses(arguments: str) -> None:
    result = run(f"{arguments} --help")
    assert result.exit_code == 0
    examples = [line for line in result.output.splitlines() if "Example:" in line]
    assert len(examples) == 1
    words = examples[0].split()[1:]
    assert words[0] == "cumla"
    # --help after the example's own options shows that they exist, and runs nothing.
    shown = run(" ".join([*words[1:], "--help"]))
    assert shown.exit_code == 0
    assert shown.output.startswith("Usage: ")


def test_main_help_imports_no_command_and_tells_all() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from cumla.cli import main;"
        "r = CliRunner().invoke(main, ['--help']); print(r.output);"
        "print([n for n in sys.modules if n.startswith('cumla.cli.') or n == 'cupy'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    for name, summary in SUMMARIES.items():
        assert f"{name} " in done.stdout
        assert summary in done.stdout


@pytest.mark.parametrize("name", SUMMARIES)
def test_summaries_are_the_commands_own(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.short_help == SUMMARIES[name]


def test_version_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cumla", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"cumla, version {cumla.__version__}\n"


def test_unknown_command_is_a_usage_error() -> None:
    result = run("smok")
    assert result.exit_code == 2
    assert "smok" in result.output


def fake_cupy(count: int) -> SimpleNamespace:
    properties = {
        "name": b"NVIDIA Test GPU",
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 132,
        "totalGlobalMem": 80 * 2**30,
    }
    runtime = SimpleNamespace(
        getDeviceCount=lambda: count, getDeviceProperties=lambda index: properties
    )
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))


def test_info_without_cupy_or_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cupy", "cuda.pathfinder", "cupy_backends.cuda.libs"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run("info")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert f"cumla           {cumla.__version__}" in lines
    assert any(line.startswith("GPU             none found: ") for line in lines)
    assert any(line.startswith("NVRTC           not usable: ") for line in lines)
    assert "backend numpy   usable" in lines
    # A path may be longer than a line; it is not broken.
    assert all(len(line) <= 100 or " " not in line[16:].strip() for line in lines)


def test_info_json_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(2))
    # The backend that it makes usable is for this test only.
    monkeypatch.setattr(cumla.backends, "_loaded", {})
    monkeypatch.setenv("CUMLA_NUM_THREADS", "3")
    result = run("info --json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["cumla"] == cumla.__version__
    assert facts["numpy"] == np.__version__
    assert facts["gpu"]["found"] == [
        f"{i}: NVIDIA Test GPU, sm_90, 132 SMs, 80.0 GiB" for i in range(2)
    ]
    assert facts["threads"] == 3
    assert facts["backends"]["numpy"] is None
    assert set(facts["backends"]) == {"numpy", "cupy", "sim"}
    assert facts["default_backend"] == "numpy"
    assert facts["kernel_sources"] is not None
    assert "kernel_cache" in facts


def test_info_shows_a_backend_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUMLA_BACKEND", "torch")
    assert "CUMLA_BACKEND: got 'torch'" in run("info").output


def test_info_says_why_when_the_driver_lists_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(0))
    assert "none found: the driver lists no device" in run("info").output


def test_smoke_quick_passes() -> None:
    result = run("smoke --quick")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    rows = [line for line in lines if line.endswith("  ok")]
    assert f"All {len(rows)} checks passed (a sample of {len(all_cases())}) in " in lines[-1]
    assert {row.split()[0] for row in rows} == {case.op for case in all_cases()}
    assert max(map(len, lines)) <= 100
    assert result.stderr == ""  # no progress bar without a terminal


def test_smoke_covers_every_op_in_every_format() -> None:
    seen = {(case.op, case.format) for case in all_cases()}
    names = {layout.name for layout in LAYOUTS}
    for op in ("pack/unpack_kv", "PagedKVCache", "sparse_decode"):
        assert {name for one, name in seen if one == op} == names
    for op in ("dense_decode", "sparse_prefill", "mha_varlen", "mha_varlen_backward"):
        assert {name for one, name in seen if one == op} == {"BF16", "FP16"}
    assert "merge_attention" in {op for op, _ in seen}
    cases = [(case.op, case.format, case.shape) for case in all_cases()]
    assert len(set(cases)) == len(cases)


def test_quick_sample_is_seeded_and_has_every_op() -> None:
    cases = all_cases()
    samples = [smoke._sample(cases, seed) for seed in range(20)]
    assert samples == [smoke._sample(cases, seed) for seed in range(20)]
    assert len({tuple(one) for one in samples}) > 1
    for one in samples:
        assert len(set(one)) == len(one) < len(cases) / 2
        assert {cases[i].op for i in one} == {case.op for case in cases}


def last_case(op: str, name: str | None = None) -> Case:
    return [one for one in all_cases() if one.op == op and name in (None, one.format)][-1]


@pytest.fixture(scope="module")
def storages() -> Storages:
    return Storages(0)


def outcome_of(case: Case, storages: Storages) -> Outcome:
    return case.run(storages, np.random.default_rng(5))


# An op, and which of its results is spoiled.
BROKEN_OPS = [
    ("dense_decode", "out"),
    ("dense_decode", "lse"),
    ("sparse_decode", "out"),
    ("sparse_decode", "lse"),
    ("sparse_prefill", "out"),
    ("sparse_prefill", "max_logits"),
    ("sparse_prefill", "lse"),
    ("mha_varlen", "out"),
    ("mha_varlen", "lse"),
    ("mha_varlen_backward", "dq"),
    ("mha_varlen_backward", "dk"),
    ("mha_varlen_backward", "dv"),
    ("merge_attention", "out"),
    ("merge_attention", "lse"),
]


@pytest.mark.parametrize(("op", "spoiled"), BROKEN_OPS)
def test_a_result_off_by_one_percent_is_a_miss(
    op: str, spoiled: str, storages: Storages, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = last_case(op)
    right = getattr(NumpyBackend, op)

    def wrong(self: NumpyBackend, problem: Any) -> None:
        right(self, problem)
        if self.dtype == np.float32:
            array = getattr(problem, spoiled)
            array[...] = (array.astype(np.float64) * 1.01).astype(array.dtype)

    monkeypatch.setattr(NumpyBackend, op, wrong)
    misses = outcome_of(case, storages).misses
    assert misses
    assert all(line.startswith(spoiled) for line in misses)


# merge_attention's results have no oracle but sparse_decode's.
@pytest.mark.parametrize(
    ("op", "spoiled"),
    [one for one in BROKEN_OPS if one[0] != "merge_attention" and one[1] != "max_logits"],
)
def test_a_definition_wrong_in_float64_too_is_a_miss(
    op: str, spoiled: str, storages: Storages, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = last_case(op)
    right = getattr(NumpyBackend, op)

    def wrong(self: NumpyBackend, problem: Any) -> None:
        right(self, problem)
        array = getattr(problem, spoiled)
        array[...] = (array.astype(np.float64) * 1.01).astype(array.dtype)

    monkeypatch.setattr(NumpyBackend, op, wrong)
    misses = outcome_of(case, storages).misses
    assert any(line.startswith(f"float64 {spoiled}: NOT close") for line in misses)


def test_a_skipped_copy_on_write_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    case = last_case("PagedKVCache", "V32_FP8")
    assert not outcome_of(case, Storages(0)).misses
    monkeypatch.setattr(NumpyBackend, "copy_page", lambda *arguments: None)
    assert "not those that were appended" in outcome_of(case, Storages(0)).misses[0]


@pytest.mark.parametrize("layout", [one.name for one in LAYOUTS])
def test_a_decoded_value_a_step_off_is_a_miss(
    layout: str, storages: Storages, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = last_case("pack/unpack_kv", layout)
    unpack = cumla.unpack_kv

    def wrong(*arguments: Any) -> Any:
        kv = unpack(*arguments)
        kv[3, 5, 0, 7] *= np.asarray(1.25, kv.dtype)
        return kv

    monkeypatch.setattr(cumla, "unpack_kv", wrong)
    outcome = outcome_of(case, storages)
    assert outcome.misses
    assert "1 of" in outcome.misses[0]
    assert f"row {3 * 64 + 5}, value 7" in outcome.misses[0]


def test_nan_in_the_reference_too_is_a_miss() -> None:
    outcome = Outcome()
    outcome.judge("out", np.full(3, np.nan, np.float32), np.full(3, np.nan), DENSE_OUT, np.float32)
    assert outcome.misses


def small_smoke(monkeypatch: pytest.MonkeyPatch) -> Result:
    cases = [last_case("mha_varlen"), last_case("dense_decode")]
    monkeypatch.setattr(smoke, "all_cases", lambda: cases)
    return run("smoke")


def test_smoke_with_a_wrong_backend_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: NumpyBackend, problem: Any) -> None:
        problem.out[...] = 0 if self.dtype == np.float32 else 1
        problem.lse[...] = 0

    monkeypatch.setattr(NumpyBackend, "dense_decode", wrong)
    result = small_smoke(monkeypatch)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    rows = {line.split()[0]: line.split()[-1] for line in lines[1:3]}
    assert rows == {"mha_varlen": "ok", "dense_decode": "MISS"}
    assert any(line.startswith("MISS dense_decode FP16 ") for line in lines)
    assert "NOT close" in result.output
    assert lines[-1].startswith("1 of 2 checks MISSED in ")
    assert max(map(len, lines)) <= 100


def test_smoke_with_a_crashing_backend_still_runs_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: NumpyBackend, problem: Any) -> None:
        raise RuntimeError("out of magic")

    monkeypatch.setattr(NumpyBackend, "mha_varlen", broken)
    result = small_smoke(monkeypatch)
    assert result.exit_code == 1
    assert "raised RuntimeError: out of magic (test_cli.py:" in " ".join(result.output.split())
    assert "1 of 2 checks MISSED" in result.output


def test_smoke_with_an_unusable_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUMLA_BACKEND", "nonsense")
    result = run("smoke --quick")
    assert result.exit_code == 1
    assert "CUMLA_BACKEND" in result.output


def test_smoke_bad_seed() -> None:
    result = run("smoke --seed -1")
    assert result.exit_code == 2
    assert "--seed" in result.output


def bench_json(op: str, more: str = "") -> dict[str, Any]:
    result = run(f"bench {op} {OPS[op]} --repeats 3 --seed 4 {more} --json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


@pytest.mark.parametrize("op", OPS)
def test_bench_json(op: str) -> None:
    found = bench_json(op)
    assert found["op"] == op
    words = OPS[op].split()
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        if flag.startswith("--") and value and not value.startswith("--"):
            assert str(found[flag[2:].replace("-", "_")]) == value
    assert (found["repeats"], found["seed"]) == (3, 4)
    times = found["times_ms"]
    assert len(times) == 3
    assert all(one > 0 for one in times)
    low, median, high = sorted(times)
    assert (found["min_ms"], found["median_ms"], found["max_ms"]) == (low, median, high)
    assert found["gb_per_s"] == pytest.approx(found["bytes"] / median / 1e6)
    if op in ("pack-kv", "unpack-kv"):
        assert found["flop"] is found["gflop_per_s"] is None
        assert found["threads"] == 1
    else:
        assert found["gflop_per_s"] == pytest.approx(found["flop"] / median / 1e6)


# Worked out by hand from OPS' sizes.
FLOP = {
    "dense-decode": 2 * (2 * 2 * 4) * (576 + 512) * 70,
    "sparse-decode": 2 * (2 * 1 * 3) * (512 + 512) * 70,
    "sparse-prefill": 2 * (3 * 4) * (512 + 512) * 70,
    "mha-varlen": 2 * (2 * 4) * (30 * 30) * (24 + 16),
    "mha-varlen-backward": 2 * (2 * 2) * (30 * 31 // 2) * (3 * 24 + 2 * 16),
}
BYTES = {
    "dense-decode": 2 * (2 * 2 * 4) * (576 + 512) + (2 * 70 * 2) * 1152,
    "mha-varlen": 2 * 60 * (4 * 24 + 2 * 24 + 2 * 16 + 4 * 16),
    "mha-varlen-backward": 2 * 60 * 2 * (2 * 24 + 2 * 24 + 2 * 16) + 2 * 2 * 60 * 2 * 16,
    "pack-kv": 2 * 40 * 576 * 2,
    "unpack-kv": 2 * 40 * 576 * 2,
}


@pytest.mark.parametrize("op", OPS)
def test_bench_counts(op: str) -> None:
    found = bench_json(op)
    assert found["flop"] == FLOP.get(op)
    if op in BYTES:
        assert found["bytes"] == BYTES[op]
    elif op == "sparse-decode":
        moved = (found["bytes"] - 2 * 2 * 3 * (512 + 512)) / 584
        assert moved == int(moved)
        # 140 draws from 100 tokens: some twice, and not all of them.
        assert 50 < moved <= 100


def test_bench_for_a_person() -> None:
    result = run(f"bench sparse-decode {OPS['sparse-decode']} --repeats 1")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    labels = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert labels == ["op", "with", "on", "ms", "GFLOP/s", "GB/s"]
    assert "h-q 3" in result.output
    assert max(map(len, lines)) <= 100
    assert "MB/s" in run(f"bench pack-kv {OPS['pack-kv']}").output


def test_bench_sees_the_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUMLA_NUM_THREADS", "1")
    assert bench_json("mha-varlen")["threads"] == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("bench dense-decode --batch 0", "--batch"),
        ("bench dense-decode --h-q 7 --h-kv 2", "--h-q"),
        ("bench mha-varlen --h-q 7 --h-kv 2", "--h-q"),
        ("bench dense-decode --layout V32_FP8", "--layout"),
        ("bench dense-decode --topk 4", "--topk"),
        ("bench sparse-decode --layout NOPE", "--layout"),
        (f"bench sparse-decode --scale-rule raw --layout {V4_FP8.name}", "--scale-rule"),
        ("bench pack-kv --scale-rule v4 --layout BF16", "--scale-rule"),
        ("bench unpack-kv --page-size x", "--page-size"),
        ("bench pack-kv --repeats 0", "--repeats"),
        ("bench nope", "nope"),
        ("info --yaml", "--yaml"),
    ],
)
def test_bad_options_exit_2_and_are_named(arguments: str, named: str) -> None:
    result = run(arguments + (" --batch 1 --seq-len 8" if "-rule" in arguments else ""))
    assert result.exit_code == 2
    assert named in result.output
    assert "Traceback" not in result.output


def test_what_cumla_refuses_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUMLA_NUM_THREADS", "many")
    result = run("bench pack-kv --batch 1 --seq-len 8")
    assert result.exit_code == 2
    assert "CUMLA_NUM_THREADS" in result.output
    assert isinstance(result.exception, SystemExit)


def test_bench_on_an_unusable_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable(name: str | None = None) -> None:
        raise cumla.BackendUnavailable("backend 'sim': no")

    monkeypatch.setattr(bench, "load_backend", unusable)
    result = run("bench pack-kv")
    assert result.exit_code == 1
    assert "backend 'sim': no" in result.output
