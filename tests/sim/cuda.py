"""CUDA C through NVRTC onto a simulated device, for tests."""

from __future__ import annotations

from functools import cache

from cumla import sim
from cumla.jit import nvrtc

TARGETS = ("sm_80", "sm_89", "sm_90a", "sm_120")


@cache
def ptx(source: str, target: str = "sm_90a", *options: str) -> str:
    """The PTX of CUDA C source, called "k.cu" in its line information."""
    return nvrtc.compile_to_ptx(source, "k.cu", target, ["-lineinfo", "--std=c++17", *options])


def load(source: str, *options: str, target: str = "sm_90a") -> sim.LoadedModule:
    """The source's module on a new device."""
    return sim.Device(target, memory_bytes=1 << 28).load(ptx(source, target, *options))


def line_of(source: str, mark: str) -> int:
    """Number of the one line of source that holds a mark."""
    (line,) = [i for i, text in enumerate(source.splitlines(), 1) if mark in text]
    return line
