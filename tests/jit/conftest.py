"""Kernels of a folder made for the test, a cache of its own, and a count of compilations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cumla.jit import build as jit
from cumla.jit import nvrtc, sources
from cumla.jit.build import Build
from cumla.jit.cache import ENVIRONMENT_VARIABLE

PATH = "portable/example/scale.cuh"
EXPRESSION = "cumla::scale<float, 3>"
SCALE = """\
#pragma once
#include "include/scalars.cuh"

namespace cumla {
template <class T, int N>
__global__ void scale(T* x) {
    __shared__ T held[64];
    held[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = times<N>(held[63 - threadIdx.x]);
}
}  // namespace cumla
"""
SCALARS = """\
#pragma once
template <int N, class T>
inline T times(T x) {
    return x * T(N);
}
"""


@dataclass
class Workplace:
    """What a test of the JIT has."""

    kernels: Path
    cache: Path
    compiled: list[tuple[str, str, bool]] = field(default_factory=list)
    """(expression, target, with cubin) of each compilation since the test began."""

    def fresh(self, target: str = "sm_90a", expression: str = EXPRESSION) -> Build:
        """A build as a new process would have it."""
        sources.whole.cache_clear()
        return Build(PATH, expression, target)

    @property
    def folder(self) -> Path:
        """The only entry of the cache."""
        (folder,) = (one for one in self.cache.iterdir() if not one.name.startswith("."))
        return folder

    def leftovers(self) -> list[str]:
        """What there is beside entries."""
        return [one.name for one in self.cache.iterdir() if one.name.startswith(".")]


def write_kernels(folder: Path) -> None:
    for path, text in ((PATH, SCALE), ("include/scalars.cuh", SCALARS)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    place = Workplace(tmp_path / "kernels", tmp_path / "new" / "cache")
    write_kernels(place.kernels)
    monkeypatch.setattr(sources, "root", lambda: place.kernels)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(place.cache))
    really = nvrtc.compile_kernel

    def counted(*args: Any, **how: Any) -> Any:
        _, _, expression, target, _ = args
        place.compiled.append((expression, target, how["cubin"]))
        return really(*args, **how)

    monkeypatch.setattr(nvrtc, "compile_kernel", counted)
    jit.forget()
    yield place
    jit.forget()
