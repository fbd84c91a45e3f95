"""The CUDA C files of kernels_cu, and how one becomes a single text with all that it includes."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from cumla.checks import bad_value

_INCLUDE = re.compile(r'[ \t]*#[ \t]*include[ \t]+"([^"]+)"[ \t]*(?://.*)?')
PREFIX = "/kernels_cu/"
"""Before the paths of `#line` directives. NVRTC would put the working directory before a relative
path, and the same kernel would become different code in each."""


def root() -> Path:
    """Where the kernels lie: in the wheel beside the modules, in a checkout beside the package."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "kernels_cu"
    return shipped if shipped.is_dir() else package.parent / "kernels_cu"


def read(path: str) -> str:
    """The text of a file, given relative to kernels_cu."""
    return (root() / path).read_text(encoding="utf-8")


@cache
def whole(path: str) -> str:
    """The text of a file of kernels_cu with all it includes, once each, as one source.

    `#line` directives keep messages and line information at the files and lines that people edit.
    """
    return flatten(path, read)


def flatten(path: str, read: Callable[[str], str]) -> str:
    """As `whole`, with another reader of files."""
    done: set[str] = set()

    def expand(name: str) -> list[str]:
        done.add(name)
        lines = [f'#line 1 "{PREFIX}{name}"']
        # Not splitlines: it knows ends of lines that a compiler does not.
        for number, line in enumerate(read(name).removesuffix("\n").split("\n"), start=1):
            match = _INCLUDE.fullmatch(line)
            if match is None:
                lines.append(line)
                continue
            if match[1] not in done:
                lines += expand(match[1])
            lines.append(f'#line {number + 1} "{PREFIX}{name}"')
        return lines

    try:
        return "\n".join(expand(path)) + "\n"
    except FileNotFoundError as error:
        raise bad_value(
            "path", path, f"{error.filename} is not there", "Name a file under kernels_cu."
        ) from error
