"""CUDA C to PTX with NVRTC. It needs NVRTC's library, but neither a GPU nor a driver.

The library is called through CuPy's bindings, which are imported at the first call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from cumla.checks import bad_type, bad_value

_TARGET = re.compile(r"(?:sm|compute)_(\d+)([af]?)")
_ARCHITECTURE = re.compile(r"(?:--gpu-architecture|-arch)(?:=|$)")
# "k.cu(12): error: ...", also "catastrophic error" and "error #20-D".
_ERROR = re.compile(r"^(.+)\((\d+)\): (?:catastrophic |internal )?error\b", re.MULTILINE)
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

    def __reduce__(self) -> tuple[Any, ...]:
        return CompileError, (self.name, self.source, self.options, self.log)


def version() -> tuple[int, int]:
    """NVRTC's version, e.g. (12, 9)."""
    major, minor = _library().getVersion()
    return int(major), int(minor)


def compile_to_ptx(source: str, name: str, target: str, options: Sequence[str] = ()) -> str:
    """Compile CUDA C source to PTX.

    Args:
        source: CUDA C++ text.
        name: what it is called in messages and in line information, e.g. "kernel.cu".
        target: architecture, "sm_90a" or "compute_90a", one that this NVRTC knows.
        options: further options for NVRTC, as they are.

    Raises:
        CompileError: the source has errors, or an option is unknown.
        ArgumentError, ArgumentTypeError: a bad target or argument, named in the text.
    """
    for argument, value in (("source", source), ("name", name), ("target", target)):
        if not isinstance(value, str):
            raise bad_type(argument, type(value).__name__, "it must be a str", "Pass text.")
        if "\0" in value:
            raise bad_value(argument, "a NUL character", "NVRTC takes C strings", "Remove it.")
    if isinstance(options, str) or not all(isinstance(one, str) for one in options):
        raise bad_type("options", repr(options), "it must be a sequence of str", "Pass a list.")
    if any(_ARCHITECTURE.match(one) for one in options):
        raise bad_value(
            "options", list(options), "`target` sets the architecture", "Pass it as `target` only."
        )
    nvrtc = _library()
    given = [f"--gpu-architecture={_architecture(nvrtc, target)}", *options]
    program = nvrtc.createProgram(source, name, [], [])
    try:
        try:
            nvrtc.compileProgram(program, given)
        except nvrtc.NVRTCError as error:
            log = _text(nvrtc.getProgramLog(program)) or str(error)
            raise CompileError(name, source, given, log) from None
        return _text(nvrtc.getPTX(program))
    finally:
        nvrtc.destroyProgram(program)


def _library() -> Any:
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc


def _architecture(nvrtc: Any, target: str) -> str:
    """ "compute_90a" for "sm_90a"; raise for a target that this NVRTC has not."""
    known = sorted(int(one) for one in nvrtc.getSupportedArchs())
    match = _TARGET.fullmatch(target)
    # PTX ISA "PTX Module Directives: .target": features of one architecture (a) came with sm_90,
    # those of a family (f) with sm_100.
    since = {"": 0, "a": 90, "f": 100}
    if match is None or int(match[1]) not in known or int(match[1]) < since[match[2]]:
        raise bad_value(
            "target",
            repr(target),
            f"NVRTC {'.'.join(map(str, version()))} has {', '.join(f'sm_{n}' for n in known)}",
            "Pass one of these; from sm_90 on with a suffix 'a' too, from sm_100 on with 'f'.",
        )
    return f"compute_{match[1]}{match[2]}"


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _listing(name: str, source: str, log: str) -> Iterator[str]:
    """The numbered source lines around each error, those with an error marked."""
    lines = source.split("\n")
    bad = {int(m[2]) for m in _ERROR.finditer(log) if m[1] == name and int(m[2]) <= len(lines)}
    shown = {n for b in bad for n in range(b - CONTEXT, b + CONTEXT + 1) if 1 <= n <= len(lines)}
    width = len(str(max(shown, default=0)))
    for number in sorted(shown):
        if number - 1 not in shown and number != min(shown):
            yield "  ..."
        mark = ">" if number in bad else " "
        yield f"{mark} {number:{width}} | {lines[number - 1].rstrip()}".rstrip()
