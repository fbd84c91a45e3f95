"""Compiling CUDA C to PTX: targets, options, errors."""

from __future__ import annotations

import ctypes
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cumla.checks import ArgumentError, ArgumentTypeError
from cumla.jit import nvrtc

EMPTY = 'extern "C" __global__ void k() {}\n'


def target_line(ptx: str) -> str:
    (line,) = [line for line in ptx.splitlines() if line.startswith(".target")]
    return line


def test_version_is_that_of_the_library() -> None:
    major, minor = nvrtc.version()
    assert f"release {major}.{minor}, V{major}.{minor}." in nvrtc.compile_to_ptx(
        EMPTY, "k.cu", "sm_90"
    )


@pytest.mark.parametrize("number", ["80", "86", "89", "90", "90a", "100a", "100f", "120", "121a"])
@pytest.mark.parametrize("prefix", ["sm", "compute"])
def test_targets(prefix: str, number: str) -> None:
    ptx = nvrtc.compile_to_ptx(EMPTY, "k.cu", f"{prefix}_{number}")
    assert target_line(ptx) == f".target sm_{number}"
    assert ".visible .entry k(" in ptx
    assert not ptx.endswith("\0")


@pytest.mark.parametrize(
    "target",
    ["sm_20", "sm_89a", "sm_90f", "sm_90b", "90", "compute_", "lto_90", "sm_90a ", "SM_90", ""],
)
def test_unknown_targets(target: str) -> None:
    with pytest.raises(ArgumentError, match="^target: ") as caught:
        nvrtc.compile_to_ptx(EMPTY, "k.cu", target)
    assert repr(target) in str(caught.value)
    assert "sm_90, " in str(caught.value)


def test_options_arrive_as_they_are() -> None:
    source = 'extern "C" __global__ void k(int* x) {\n#if SEEN == 7\n*x = 77;\n#endif\n}'
    plain = nvrtc.compile_to_ptx(source, "k.cu", "sm_90")
    assert "77" not in plain.split(".entry")[1]
    assert ".loc" not in plain
    made = nvrtc.compile_to_ptx(source, "k.cu", "sm_90", ("-DSEEN=7", "-lineinfo"))
    assert "77" in made.split(".entry")[1]
    assert ".loc\t1 3 " in made
    assert '/k.cu"' in made
    # No standard is chosen behind the caller's back.
    standard = "#if __cplusplus != 202002L\n#error standard\n#endif\n" + EMPTY
    nvrtc.compile_to_ptx(standard, "k.cu", "sm_90", ["--std=c++20"])
    with pytest.raises(nvrtc.CompileError, match="standard"):
        nvrtc.compile_to_ptx(standard, "k.cu", "sm_90", ["--std=c++14"])


@pytest.mark.parametrize("option", ["-arch=sm_80", "--gpu-architecture=compute_90", "-arch"])
def test_options_do_not_set_the_architecture(option: str) -> None:
    with pytest.raises(ArgumentError, match="^options: .*`target`"):
        nvrtc.compile_to_ptx(EMPTY, "k.cu", "sm_90", ["-lineinfo", option])


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("source", (b"text", "k.cu", "sm_90")),
        ("name", (EMPTY, None, "sm_90")),
        ("target", (EMPTY, "k.cu", 90)),
        ("options", (EMPTY, "k.cu", "sm_90", "-lineinfo")),
        ("options", (EMPTY, "k.cu", "sm_90", ["-G", 3])),
    ],
)
def test_wrong_types(argument: str, values: tuple[object, ...]) -> None:
    with pytest.raises(ArgumentTypeError, match=f"^{argument}: "):
        nvrtc.compile_to_ptx(*values)  # type: ignore[arg-type]


def test_text_that_c_strings_cannot_hold() -> None:
    with pytest.raises(ArgumentError, match="^source: .*NUL"):
        nvrtc.compile_to_ptx(EMPTY + "\0", "k.cu", "sm_90")
    assert "k(" in nvrtc.compile_to_ptx(EMPTY + "// π ≈ 3\n", "k.cu", "sm_90")


def test_errors_show_the_source_around_them() -> None:
    lines = [f"// line {n}" for n in range(1, 31)]
    lines[2] = "__device__ int a = missing_one;"  # line 3
    lines[4] = "__device__ int b = missing_two;"  # line 5
    lines[24] = '\fstatic_assert(sizeof(int) == 5, "five");'  # line 25
    source = "\n".join(lines)
    with pytest.raises(nvrtc.CompileError) as caught:
        nvrtc.compile_to_ptx(source, "dir (1)/k.cu", "sm_89", ["-DX=1"])
    error = caught.value
    assert (error.name, error.source) == ("dir (1)/k.cu", source)
    assert error.options == ("--gpu-architecture=compute_89", "-DX=1")
    assert 'identifier "missing_one" is undefined' in error.log
    text = str(error)
    head, log, listing = text.partition(error.log.strip())
    assert head == "dir (1)/k.cu does not compile with --gpu-architecture=compute_89 -DX=1\n"
    assert log
    assert listing.strip("\n").split("\n") == [
        "   1 | // line 1",
        "   2 | // line 2",
        ">  3 | __device__ int a = missing_one;",
        "   4 | // line 4",
        ">  5 | __device__ int b = missing_two;",
        "   6 | // line 6",
        "   7 | // line 7",
        "  ...",
        "  23 | // line 23",
        "  24 | // line 24",
        '> 25 | \fstatic_assert(sizeof(int) == 5, "five");',
        "  26 | // line 26",
        "  27 | // line 27",
    ]


@pytest.mark.parametrize(
    ("source", "listing"),
    [
        ("#include <nowhere.h>\n", ["> 1 | #include <nowhere.h>", "  2 |"]),
        ("enum {};\r\n#error stop\r\n", ["  1 | enum {};", "> 2 | #error stop", "  3 |"]),
        # What `#line` says is followed.
        ("#line 300\nerror here;\n", ["> 300 | error here;", "  301 |"]),
        (
            '#line 8 "b.cu"\nenum B {};\n#error b\n',
            ["b.cu:", "   8 | enum B {};", ">  9 | #error b", "  10 |"],
        ),
        (
            '#line 8 "b.cu"\nbad b;\n#line 5 "k.cu"\nenum C {};\nbad c;',
            ["b.cu:", "> 8 | bad b;", "k.cu:", "  5 | enum C {};", "> 6 | bad c;"],
        ),
        # This `#line` is none. No line is better than a wrong one.
        ('#line 3 "k.cu"\n#define x \\\n#line 7\nerror', []),
    ],
)
def test_listings(source: str, listing: list[str]) -> None:
    with pytest.raises(nvrtc.CompileError) as caught:
        nvrtc.compile_to_ptx(source, "k.cu", "sm_90")
    shown = str(caught.value).split(caught.value.log.strip())[1].strip("\n")
    assert shown.split("\n") == (listing or [""])


KERNEL = """
template <int N> __global__ void k(int* x) {
    __shared__ int held[N];
    held[threadIdx.x] = *x;
    __syncthreads();
    *x = held[0];
}
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "compute_90a", "sm_100a", "sm_120"])
def test_a_kernel_by_its_expression(target: str) -> None:
    options = ["-lineinfo", "-default-device"]
    alone = nvrtc.compile_kernel(KERNEL, "/k.cu", "k<9>", target, options)
    both = nvrtc.compile_kernel(KERNEL, "/k.cu", "k<9>", target, options, cubin=True)
    assert alone.entry == both.entry == "_Z1kILi9EEvPi"
    assert alone.ptx == both.ptx
    assert f".entry {alone.entry}(" in alone.ptx
    assert alone.cubin is None
    assert both.cubin is not None
    assert both.cubin.startswith(b"\x7fELF")
    number = target.split("_")[1]
    assert both.options == (f"--gpu-architecture=sm_{number}", *options)
    assert alone.options == (f"--gpu-architecture=compute_{number}", *options)
    assert min(alone.seconds, both.seconds) > 0


def test_identity_tells_builds_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda import pathfinder

    real = nvrtc.identity()
    assert re.fullmatch(r"{}\.{} [0-9a-f]{{8}}".format(*nvrtc.version()), real)
    found = pathfinder.load_nvidia_dynamic_lib("nvrtc")
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda name, load=ctypes.CDLL: load(found.abs_path))
    seen = {real}
    for content in (b"a" * 200_000, b"a" * 199_999 + b"b", b"b" + b"a" * 199_999):
        (tmp_path / "libnvrtc.so").write_bytes(content)
        other = SimpleNamespace(abs_path=str(tmp_path / "libnvrtc.so"))
        monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", lambda name, it=other: it)
        nvrtc.identity.cache_clear()
        seen.add(nvrtc.identity())
    assert len(seen) == 4
    # Where pathfinder finds nothing, CuPy's bindings may.
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    nvrtc.identity.cache_clear()
    assert nvrtc.identity() == "{}.{}".format(*nvrtc.version())
    nvrtc.identity.cache_clear()


def test_unknown_option_is_a_compile_error() -> None:
    with pytest.raises(nvrtc.CompileError, match="--nonsense") as caught:
        nvrtc.compile_to_ptx(EMPTY, "k.cu", "sm_90", ["--nonsense"])
    assert "unrecognized option" in caught.value.log


def test_warnings_are_no_errors() -> None:
    source = "#warning careful\n" + EMPTY
    assert "k(" in nvrtc.compile_to_ptx(source, "k.cu", "sm_90")


def test_errors_travel_between_processes() -> None:
    error = nvrtc.CompileError("k.cu", "x", ["-G"], "k.cu(1): error: no\n")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.name, again.source, again.options, again.log) == (
        error.name, error.source, error.options, error.log,
    )  # fmt: skip
    assert "> 1 | x" in str(error)


def test_cupy_is_imported_at_the_first_call_only() -> None:
    program = "import sys, cumla.jit.nvrtc\nprint([m for m in sys.modules if m.startswith('cupy')])"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "[]\n"


def test_a_cubin_is_a_whole_elf_file() -> None:
    """Its headers say where the last of its tables ends; CuPy's binding strips one byte."""
    source = "template <int N> __global__ void fill(float* x) { x[threadIdx.x] = N; }"
    built = nvrtc.compile_kernel(source, "fill.cu", "fill<3>", "sm_90a", [], cubin=True)
    cubin = built.cubin
    assert cubin is not None
    assert cubin[:4] == b"\x7fELF"
    programs, sections = struct.unpack_from("<QQ", cubin, 32)
    program_size, programs_n, section_size, sections_n = struct.unpack_from("<4H", cubin, 54)
    ends = (programs + program_size * programs_n, sections + section_size * sections_n)
    assert max(ends) == len(cubin)
