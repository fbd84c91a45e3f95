"""What a failed compilation tells: NVRTC's messages, and the source lines that they speak of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

# "k.cu(12): error: ...", also "catastrophic error" and "error #20-D".
_ERROR = re.compile(r"^(.+)\((\d+)\): (?:catastrophic |internal )?error\b", re.MULTILINE)
_LINE = re.compile(r'[ \t]*#[ \t]*line[ \t]+(\d+)(?:[ \t]+"([^"]*)")?[ \t]*')
# Lines of source shown before and after each error.
CONTEXT = 2


class CompileError(Exception):
    """NVRTC refused the source; the text has its log and the source lines around each error.

    Attributes:
        name: what the source is called in messages.
        source: the source that was compiled.
        options: all options that NVRTC was given.
        log: NVRTC's messages.
    """

    def __init__(self, name: str, source: str, options: Sequence[str], log: str) -> None:
        self.name = name
        self.source = source
        self.options = tuple(options)
        self.log = log
        shown = [*_listing(name, source, log)]
        text = f"{name} does not compile with {' '.join(options)}\n{log.strip()}"
        super().__init__("\n".join([text, *(["", *shown] if shown else [])]))

    def without(self, prefix: str) -> CompileError:
        """The same error, of files whose names do not begin with `prefix`."""
        texts = (one.replace(prefix, "") for one in (self.name, self.source, self.log))
        name, source, log = texts
        return CompileError(name, source, self.options, log)

    def __reduce__(self) -> tuple[Any, ...]:
        return CompileError, (self.name, self.source, self.options, self.log)


def _files(name: str, source: str) -> dict[str, dict[int, str]]:
    """The numbered lines of each file in `source`, where `#line` directives name several."""
    files: dict[str, dict[int, str]] = {name: {}}
    file, number = name, 1
    for line in source.split("\n"):
        match = _LINE.fullmatch(line.rstrip("\r"))
        if match is None:
            files[file][number] = line.rstrip()
            number += 1
        else:
            file, number = match[2] or file, int(match[1])
            files.setdefault(file, {})
    return files


def _listing(name: str, source: str, log: str) -> Iterator[str]:
    """The numbered source lines around each error, those with an error marked."""
    files = _files(name, source)
    errors = [(match[1], int(match[2])) for match in _ERROR.finditer(log)]
    bad = [(file, number) for file, number in errors if number in files.get(file, {})]
    shown = list(dict.fromkeys(file for file, _ in bad))
    for file in shown:
        if shown != [name]:
            yield f"{file}:"
        yield from _around(files[file], {number for one, number in bad if one == file})


def _around(lines: dict[int, str], bad: set[int]) -> Iterator[str]:
    near = {n for b in bad for n in range(b - CONTEXT, b + CONTEXT + 1)}
    shown = sorted(near & lines.keys())
    width = len(str(shown[-1]))
    for number in shown:
        if number - 1 not in near and number != shown[0]:
            yield "  ..."
        mark = ">" if number in bad else " "
        yield f"{mark} {number:{width}} | {lines[number]}".rstrip()
