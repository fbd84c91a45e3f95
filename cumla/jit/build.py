"""A kernel's source and template arguments to PTX and cubin for one target."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from cumla.jit import sources
from cumla.jit.nvrtc import _architecture, _library, _text

OPTIONS = ("-std=c++17", "-lineinfo", "-default-device")


@dataclass(frozen=True)
class Build:
    """One kernel for one target."""

    ptx: str
    entry: str
    """The kernel's name in the PTX and the cubin."""


@cache
def build(path: str, expression: str, target: str) -> Build:
    """Compile the instantiation `expression` of the kernel file `path` for `target`."""
    nvrtc = _library()
    program = nvrtc.createProgram(sources.whole(path), path, [], [])
    try:
        nvrtc.addNameExpression(program, expression)
        options = [f"--gpu-architecture={_architecture(nvrtc, target)}", *OPTIONS]
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            raise RuntimeError(_text(nvrtc.getProgramLog(program))) from None
        return Build(_text(nvrtc.getPTX(program)), nvrtc.getLoweredName(program, expression))
    finally:
        nvrtc.destroyProgram(program)
