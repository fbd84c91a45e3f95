"""Flattening: one text with every file once, whose lines know where they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cumla.checks import ArgumentError
from cumla.jit import nvrtc, sources
from cumla.jit.errors import _files


def reader(files: dict[str, str]) -> Callable[[str], str]:
    def read(path: str) -> str:
        if path not in files:
            raise FileNotFoundError(2, "not there", path)
        return files[path]

    return read


def test_every_line_is_where_it_was() -> None:
    files = {
        "a/k.cuh": '#pragma once\n#include "b.cuh"  // why\n  #  include "c.cuh"\nint k;\n',
        "b.cuh": '#pragma once\nint b;\n#include "c.cuh"\nint b2;',
        "c.cuh": '#include "b.cuh"\nint c;\n\f// form feed\n',
    }
    text = sources.flatten("a/k.cuh", reader(files))
    found = _files("nothing", text)
    assert found.pop("nothing") == {}
    wanted = {
        name: {
            number: line
            for number, line in enumerate(whole.removesuffix("\n").split("\n"), 1)
            if "include" not in line
        }
        for name, whole in files.items()
    }
    # What ends the text counts as an empty line of the last file.
    assert found[f"{sources.PREFIX}a/k.cuh"].pop(5) == ""
    assert found == {sources.PREFIX + name: lines for name, lines in wanted.items()}
    for line in ("int b;", "int b2;", "int c;", "int k;"):
        assert text.count(line) == 1
    assert text.index("int c;") < text.index("int b2;") < text.index("int k;")


def test_lines_of_ptx_are_the_files_own() -> None:
    files = {
        "k.cuh": '#include "f.cuh"\n\n__global__ void k(int* x) {\n    x[f()] = 1;\n}\n',
        "f.cuh": "#pragma once\ninline int f() {\n    return threadIdx.x * 3;\n}\n",
    }
    text = sources.flatten("k.cuh", reader(files))
    made = nvrtc.compile_kernel(text, "k.cuh", "k", "sm_80", ["-lineinfo", "-default-device"])
    numbers = {
        line.split('"')[1]: line.split()[1] for line in made.ptx.splitlines() if ".file" in line
    }
    assert set(numbers) == {"/kernels_cu/k.cuh", "/kernels_cu/f.cuh"}
    assert f".loc\t{numbers['/kernels_cu/f.cuh']} 3 " in made.ptx
    assert f".loc\t{numbers['/kernels_cu/k.cuh']} 4 " in made.ptx


@pytest.mark.parametrize("missing", ["k.cuh", "f.cuh"])
def test_missing_files(missing: str) -> None:
    files = {"k.cuh": '#include "f.cuh"\n', "f.cuh": ""}
    del files[missing]
    with pytest.raises(ArgumentError, match=f"^path: got k.cuh; {missing} is not there"):
        sources.flatten("k.cuh", reader(files))


def test_all_kernels_are_found_and_need_no_header_of_cuda() -> None:
    root = sources.root()
    assert (root / "include" / "types.cuh").is_file()
    for file in root.rglob("*.cuh"):
        path = file.relative_to(root).as_posix()
        text = sources.whole(path)
        assert "#include" not in text, path
        assert str(Path(root)) not in text
