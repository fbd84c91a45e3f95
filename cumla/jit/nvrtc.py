"""CUDA C to PTX and cubin with NVRTC. It needs NVRTC's library, but neither a GPU nor a driver.

The library is called through CuPy's bindings, which are imported at the first call. NVRTC works
without Python's lock, so that threads compile at the same time.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from cumla.checks import bad_type, bad_value
from cumla.jit.errors import CompileError

__all__ = ["CompileError", "Compiled", "compile_kernel", "compile_to_ptx", "identity", "version"]

_TARGET = re.compile(r"(?:sm|compute)_(\d+)([af]?)")
_ARCHITECTURE = re.compile(r"(?:--gpu-architecture|-arch)(?:=|$)")
_ENDS = 1 << 16
"""Bytes at the start and at the end of the library that `identity` looks at."""


@dataclass(frozen=True)
class Compiled:
    """What NVRTC made of a kernel."""

    entry: str
    """The kernel's name in the PTX and the cubin."""
    ptx: str
    cubin: bytes | None
    log: str
    """NVRTC's and ptxas' messages."""
    options: tuple[str, ...]
    """All that NVRTC was given."""
    seconds: float


def version() -> tuple[int, int]:
    """NVRTC's version, e.g. (12, 9)."""
    major, minor = _library().getVersion()
    return int(major), int(minor)


@cache
def identity() -> str:
    """NVRTC's version and a hash of what is at both ends of its library, e.g. "12.9 5d41402a".

    Two builds of one version differ there: in the ELF headers, the symbols and the section table.
    CuPy's bindings load what cuda.pathfinder finds. Asking that alone is quicker than they are, and
    all that a process has to do whose kernels are in the cache.
    """
    try:
        from cuda import pathfinder

        file = pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path
        major, minor = ctypes.c_int(), ctypes.c_int()
        library = ctypes.CDLL(file)
        with open(file, "rb") as stream:
            ends = stream.read(_ENDS)
            stream.seek(-_ENDS, 2)
            ends += stream.read()
    except Exception:
        # Many things can be missing or odd; the bindings have further places to look.
        return ".".join(map(str, version()))
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value} {hashlib.sha256(ends).hexdigest()[:8]}"


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
    return _compile(source, name, None, "compute_" + _architecture(target), options).ptx


def compile_kernel(
    source: str,
    name: str,
    expression: str,
    target: str,
    options: Sequence[str] = (),
    *,
    cubin: bool = False,
) -> Compiled:
    """Compile one kernel: to PTX, and to a cubin, too, if that is wanted. The PTX is the same.

    Args:
        expression: the kernel's C++ name with its template arguments, "cumla::decode_dense<...>".
        source, name, target, options: as for `compile_to_ptx`.

    Raises:
        CompileError, ArgumentError: as `compile_to_ptx`.
    """
    kind = "sm_" if cubin else "compute_"
    return _compile(source, name, expression, kind + _architecture(target), options)


def _compile(
    source: str, name: str, expression: str | None, architecture: str, options: Sequence[str]
) -> Compiled:
    nvrtc = _library()
    given = (f"--gpu-architecture={architecture}", *options)
    program = nvrtc.createProgram(source, name, [], [])
    try:
        begin = time.perf_counter()
        try:
            if expression is not None:
                nvrtc.addNameExpression(program, expression)
            nvrtc.compileProgram(program, list(given))
        except nvrtc.NVRTCError as error:
            log = _text(nvrtc.getProgramLog(program)) or str(error)
            raise CompileError(name, source, given, log) from None
        seconds = time.perf_counter() - begin
        return Compiled(
            "" if expression is None else nvrtc.getLoweredName(program, expression),
            _text(nvrtc.getPTX(program)),
            _whole_elf(nvrtc.getCUBIN(program)) if architecture.startswith("sm_") else None,
            _text(nvrtc.getProgramLog(program)),
            given,
            seconds,
        )
    finally:
        nvrtc.destroyProgram(program)


def _library() -> Any:
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc


def _architecture(target: str) -> str:
    """ "90a" for "sm_90a"; raise for a target that this NVRTC has not."""
    known = sorted(int(one) for one in _library().getSupportedArchs())
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
    return match[1] + match[2]


def _whole_elf(cubin: bytes) -> bytes:
    """The cubin with its last byte, which CuPy takes for a string's end and strips.

    A section table ends the file: ELF-64's e_shoff at 40, e_shentsize at 58, e_shnum at 60. So may
    the program headers: e_phoff at 32, e_phentsize at 54, e_phnum at 56.
    """
    programs, sections = struct.unpack_from("<QQ", cubin, 32)
    program_size, programs_n, section_size, sections_n = struct.unpack_from("<4H", cubin, 54)
    end = max(programs + program_size * programs_n, sections + section_size * sections_n)
    return cubin + b"\0" if len(cubin) == end - 1 else cubin


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
