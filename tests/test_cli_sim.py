"""`cumla sim`: the example of its help as pasted, arguments, profiles and errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cumla.cli import main

SCALE = """extern "C" __global__ void scale(float* x, float by, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= by;
}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scale.cu"
    path.write_text(SCALE)
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["sim", *(str(a) for a in arguments)])


def run_scale(file: Path, *more: object) -> Result:
    launch = ["--kernel", "scale", "--grid", 5, "--block", 256]
    return call("run", file, *launch, "--arg", "f32[1024]=arange", "--arg", "f32:2", "--arg", 1024,
                *more)  # fmt: skip


def test_the_example_of_the_help_finds_the_bug(tmp_path: Path) -> None:
    text = call("run", "--help").output.split("Example:\n")[1]
    script = re.sub(r"^    ", "", text, flags=re.MULTILINE)
    script = script.replace("cumla sim", f"{sys.executable} -m cumla sim")
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert "scale.cu:3, block (4, 0, 0), thread (0, 0, 0): out of bounds" in done.stderr
    assert "0 bytes past the end of 'arg 0' of 4096 bytes" in done.stderr


def test_a_clean_run_prints_what_changed(file: Path) -> None:
    result = run_scale(file)
    assert result.exit_code == 0, result.output
    assert "arg 0 f32[1024]=arange: changed: 0.0 2.0 4.0" in result.output
    assert "no errors found (checks: memory, race)" in result.output


def test_clusters(tmp_path: Path) -> None:
    path = tmp_path / "cluster.cu"
    path.write_text("""extern "C" __global__ void k(unsigned* x) {
        asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(x[blockIdx.x]));
    }""")
    arguments = ("--grid", 4, "--block", 1, "--cluster", "2,1", "--arg", "u32[4]=unwritten")
    result = call("run", path, "--kernel", "k", *arguments)
    assert result.exit_code == 0, result.output
    assert "changed: 2 2 2 2" in result.output


def test_counters_json_and_profile(file: Path, tmp_path: Path) -> None:
    counts, first, second = (tmp_path / n for n in ("c.json", "a.html", "b.html"))
    result = run_scale(file, "--counters", "--json", counts, "--profile", first)
    assert result.exit_code == 0, result.output
    assert json.loads(counts.read_text())["total"]["global_sectors"] == 256
    assert "global sectors" in result.output
    result = call("profile", counts, "--source", file, "-o", second)
    assert result.exit_code == 0, result.output
    assert first.read_text() == second.read_text()
    assert "x[i] *= by;" in first.read_text()
    (tmp_path / "bad.json").write_text("[]")
    result = call("profile", tmp_path / "bad.json")
    assert result.exit_code == 1
    assert "not counts of" in result.output


def test_arguments_of_all_kinds(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.arange(4, dtype=np.float64))
    file = tmp_path / "k.cu"
    file.write_text("""extern "C" __global__ void k(double* a, unsigned char* b, int* c, float* d,
                                                   unsigned long long e, short f) {
    a[threadIdx.x] += e + f; b[threadIdx.x] = 7; c[0] = 1; d[0] = 0;
}""")
    args = [f"{tmp_path}/data.npy", "u8[4]=unwritten", "s32[2,3]=9", "f32[2x2]", "u64:0x10", "-3"]
    result = call("run", file, "--kernel", "k", "--block", 4, "--check", "memory",
                  *(x for a in args for x in ("--arg", a)))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "changed: 13.0 14.0 15.0 16.0" in result.output
    assert "u8[4]=unwritten: changed: 7 7 7 7" in result.output
    assert "changed: 1 9 9 9 9 9" in result.output


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--arg", "q7[4]"), "type 'q7'"),
        (("--arg", "f32[4]=lots"), "fill with a number"),
        (("--arg", "five"), "give f32"),
        (("--arg", "7"), "got 4 values; scale has 3 parameters"),
        (("--grid", "a"), "one to three numbers"),
        (("--cluster", "2"), "the grid (5, 1, 1) must be multiples"),
        (("--check", "speed"), "checks: got"),
        (("--kernel", "other"), "kernel: got 'other'; the module has scale"),
        (("--target", "sm_12"), "target"),
        (("-D", "scale=2"), "error"),
    ],
)
def test_bad_input(file: Path, more: tuple[str, ...], says: str) -> None:
    result = run_scale(file, *more)
    assert result.exit_code in (1, 2)
    assert says in result.output


def test_ptx_files(file: Path, tmp_path: Path) -> None:
    from cumla.jit import nvrtc

    ptx = tmp_path / "scale.ptx"
    ptx.write_text(nvrtc.compile_to_ptx(SCALE, "scale.cu", "sm_80", ["-lineinfo"]))
    assert run_scale(ptx, "--target", "sm_80").exit_code == 0
