"""Building a kernel: what is compiled when, what a build tells, and what memory and disk keep."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cumla.checks import ArgumentError
from cumla.jit import build as jit
from cumla.jit import nvrtc
from cumla.jit.build import Build, build
from cumla.jit.cache import Cache
from cumla.jit.nvrtc import CompileError

from .conftest import EXPRESSION, PATH, SCALARS, Workplace

MANGLED = "_ZN5cumla5scaleIfLi3EEEvPT_"


def test_a_simulator_needs_no_cubin(work: Workplace) -> None:
    made = build(PATH, EXPRESSION, "sm_90a")
    assert work.compiled == []
    assert f".entry {MANGLED}(" in made.ptx
    assert made.entry == MANGLED
    assert ".target sm_90a" in made.ptx
    assert "\t.loc\t" in made.ptx
    assert not made.cached
    assert work.compiled == [(EXPRESSION, "sm_90a", False)]


def test_a_gpu_compiles_once(work: Workplace) -> None:
    made = build(PATH, EXPRESSION, "sm_90a")
    elf = made.cubin.read_bytes()
    assert elf.startswith(b"\x7fELF")
    assert f".text.{MANGLED}".encode() in elf
    assert made.entry == MANGLED
    assert made.facts is not None
    assert made.facts.shared_bytes == 256
    assert made.ptx
    assert made.seconds > 0
    assert work.compiled == [(EXPRESSION, "sm_90a", True)]


def test_the_ptx_is_the_cubins(work: Workplace) -> None:
    alone = work.fresh().ptx
    both = work.fresh()
    assert both.cubin.is_file()
    assert both.ptx == alone
    assert [cubin for _, _, cubin in work.compiled] == [False, True]


@pytest.mark.parametrize("first", ["ptx", "cubin"])
@pytest.mark.parametrize("second", ["ptx", "cubin"])
def test_a_second_process_compiles_only_what_is_not_there(
    first: str, second: str, work: Workplace
) -> None:
    one, two = work.fresh(), work.fresh()
    made = getattr(one, first)
    again = getattr(two, second)
    missing = (first, second) == ("ptx", "cubin")
    assert [cubin for _, _, cubin in work.compiled] == [first == "cubin", True][: 1 + missing]
    assert two.cached is not missing
    assert (two.entry, two.ptx) == (one.entry, one.ptx)
    if first == second:
        assert again == made
    # Nobody loses what was there.
    assert (work.folder / "kernel.cubin").exists() == ("cubin" in (first, second))
    assert work.leftovers() == []


def test_one_process_has_one_build(work: Workplace) -> None:
    assert build(PATH, EXPRESSION, "sm_90a") is build(PATH, EXPRESSION, "sm_90a")
    four, sm_80 = build(PATH, "cumla::scale<float, 4>", "sm_90a"), build(PATH, EXPRESSION, "sm_80")
    assert len({build(PATH, EXPRESSION, "sm_90a").ptx, four.ptx, sm_80.ptx}) == 3
    jit.forget()
    assert build(PATH, EXPRESSION, "sm_80") is not sm_80


def test_threads_compile_once(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUMLA_CACHE_DIR", "/proc/self/nowhere")  # no lock on disk helps
    start = threading.Barrier(8)

    def one(_: int) -> Build:
        start.wait()
        made = build(PATH, EXPRESSION, "sm_90a")
        assert MANGLED in made.ptx
        return made

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(one, range(8)))) == 1
    assert len(work.compiled) == 1


CHILD = """
import os, sys, time
from pathlib import Path
from cumla.jit import nvrtc, sources
from cumla.jit.build import build
kernels, path, expression = sys.argv[1:]
sources.root = lambda: Path(kernels)
really = nvrtc.compile_kernel
def slow(*args, **how):
    time.sleep(0.5)
    return really(*args, **how)
nvrtc.compile_kernel = slow
print("ready", flush=True)
sys.stdin.readline()
made = build(path, expression, "sm_90a")
print(len(made.ptx), made.cached, flush=True)
"""


def test_eight_processes_compile_once(work: Workplace) -> None:
    command = [sys.executable, "-c", CHILD, str(work.kernels), PATH, EXPRESSION]
    children: list[Any] = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for one in children:
        assert one.stdout.readline() == "ready\n"
    for one in children:
        one.stdin.write("\n")
        one.stdin.flush()
    told = [one.communicate(timeout=60) for one in children]
    assert [error for _, error in told] == [""] * 8
    lengths = {out.split()[0] for out, _ in told}
    cached = [out.split()[1] for out, _ in told]
    assert len(lengths) == 1
    assert sorted(cached) == ["False"] + ["True"] * 7
    assert work.folder.is_dir()
    assert work.leftovers() == []


def test_without_locks_the_last_drops_its_copy(
    work: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    slow = nvrtc.compile_kernel

    def together(*args: Any, **how: Any) -> Any:
        made = slow(*args, **how)
        start.wait()
        return made

    start = threading.Barrier(4)
    monkeypatch.setattr(nvrtc, "compile_kernel", together)
    builds = [work.fresh() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda one: one.ptx, builds))) == 1
    assert len(work.compiled) == 4
    assert work.fresh().ptx == builds[0].ptx
    assert len(work.compiled) == 4
    assert [one for one in work.leftovers() if not one.endswith(".lock")] == []
    assert capsys.readouterr().err == ""


def test_one_at_a_time_holds_a_lock_though_its_file_goes(work: Workplace) -> None:
    recipe, disk = work.fresh().recipe, Cache(work.cache)
    alone, met = threading.Lock(), []

    def often(_: int) -> None:
        for _ in range(25):
            with disk.lock(recipe):
                free = alone.acquire(blocking=False)
                met.append(free)
                threading.Event().wait(0.001)  # others come in the meantime
                if free:
                    alone.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(often, range(4)))
    assert met == [True] * 100
    assert work.leftovers() == []


def test_a_lock_ends_though_a_child_has_its_descriptor(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, disk = work.fresh().recipe, Cache(work.cache)
    locked = fcntl.flock
    kept, waiting = [], threading.Event()

    def as_after_a_fork(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX:
            kept.append(os.dup(descriptor))
            if len(kept) == 2:
                waiting.set()
        locked(descriptor, operation)

    def second() -> None:
        with disk.lock(recipe):
            pass

    monkeypatch.setattr("fcntl.flock", as_after_a_fork)
    thread = threading.Thread(target=second, daemon=True)
    with disk.lock(recipe):
        thread.start()
        assert waiting.wait(30)
    thread.join(30)
    assert not thread.is_alive()
    for one in kept:
        os.close(one)


def test_a_killed_process_leaves_no_lock(work: Workplace) -> None:
    killed = CHILD.replace("time.sleep(0.5)", "os.kill(os.getpid(), 9)")
    command = [sys.executable, "-c", killed, str(work.kernels), PATH, EXPRESSION]
    ended = subprocess.run(command, input="\n", capture_output=True, text=True)
    assert ended.returncode == -9
    (lock,) = work.leftovers()
    assert lock.endswith(".lock")
    assert work.fresh().cubin.is_file()
    assert work.leftovers() == []


def test_errors_show_lines_of_the_file_they_are_in(work: Workplace) -> None:
    (work.kernels / "include/scalars.cuh").write_text(SCALARS.replace("T(N)", "missing"))
    with pytest.raises(CompileError) as caught:
        _ = build(PATH, EXPRESSION, "sm_90a").ptx
    text = str(caught.value)
    assert 'include/scalars.cuh(4): error: identifier "missing" is undefined' in text
    assert text.startswith(f"{PATH} does not compile with --gpu-architecture=compute_90a -std")
    assert text.split("include/scalars.cuh:\n")[1].split("\n") == [
        "  2 | template <int N, class T>",
        "  3 | inline T times(T x) {",
        "> 4 |     return x * missing;",
        "  5 | }",
    ]
    assert list(work.cache.iterdir()) == []
    # It is not kept, neither here nor on disk.
    (work.kernels / "include/scalars.cuh").write_text(SCALARS)
    jit.forget()
    assert MANGLED in build(PATH, EXPRESSION, "sm_90a").ptx


@pytest.mark.parametrize("path", ["portable/example/none.cuh", "portable/example"])
def test_unknown_files(work: Workplace, path: str) -> None:
    with pytest.raises((ArgumentError, OSError)):
        _ = build(path, EXPRESSION, "sm_90a").ptx


def test_unknown_targets_and_expressions(work: Workplace) -> None:
    with pytest.raises(ArgumentError, match=r"^target: got 'sm_12'"):
        _ = build(PATH, EXPRESSION, "sm_12").ptx
    with pytest.raises(CompileError, match="scale"):
        _ = build(PATH, "cumla::scale<int>", "sm_90a").cubin
    assert work.leftovers() == []


def test_entries_do_not_depend_on_where_they_are_made(
    work: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = work.fresh()
    content = first.cubin.read_bytes()
    folder = work.folder.name
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    work.kernels.rename(tmp_path / "moved")
    work.kernels = tmp_path / "moved"
    monkeypatch.setenv("CUMLA_CACHE_DIR", str(tmp_path / "second"))
    work.cache = tmp_path / "second"
    second = work.fresh()
    assert second.cubin.read_bytes() == content
    assert work.folder.name == folder
    assert second.ptx == first.ptx
    for one in work.folder.iterdir():
        assert str(tmp_path).encode() not in one.read_bytes()
    assert len(work.compiled) == 2


def test_a_warm_start_loads_no_compiler(work: Workplace) -> None:
    _ = work.fresh().cubin
    program = (
        "import sys; from pathlib import Path; from cumla.jit import sources;"
        f"sources.root = lambda: Path({str(work.kernels)!r});"
        "from cumla.jit.build import build;"
        f"made = build({PATH!r}, {EXPRESSION!r}, 'sm_90a');"
        "print(made.cubin, len(made.ptx), [m for m in sys.modules if m.startswith('cupy')])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split()[0] == str(work.folder / "kernel.cubin")
    assert ran.stdout.endswith(" []\n")
    assert ran.stderr == ""


def test_the_file_of_a_cubin_comes_back(work: Workplace) -> None:
    made = build(PATH, EXPRESSION, "sm_90a")
    path = made.cubin
    content = path.read_bytes()
    path.unlink()
    assert made.cubin == path
    assert path.read_bytes() == content
    path.write_bytes(content[:-1])
    assert made.cubin.read_bytes() == content
    for one in path.parent.iterdir():
        one.unlink()
    path.parent.rmdir()
    assert made.cubin.read_bytes() == content
    assert len(work.compiled) == 1


def test_source_alone_compiles_to_the_same(work: Workplace) -> None:
    made = work.fresh()
    content = made.cubin.read_bytes()
    facts = json.loads((work.folder / "metadata.json").read_text())
    architecture, *options = facts["options"]
    assert architecture == "--gpu-architecture=sm_90a"
    again = nvrtc.compile_kernel(
        (work.folder / "source.cu").read_text(),
        "source.cu",
        facts["expression"],
        facts["target"],
        options,
        cubin=True,
    )
    assert again.cubin == content
    assert again.ptx == (work.folder / "kernel.ptx").read_text()
    assert again.entry == facts["entry"] == made.entry


def test_many_instantiations_beside_each_other(work: Workplace) -> None:
    for number in range(3):
        assert f"Li{number}E" in work.fresh(expression=f"cumla::scale<float, {number}>").entry
    assert len(list(work.cache.iterdir())) == 3
    assert all(one.name.startswith("scale.") for one in work.cache.iterdir())
