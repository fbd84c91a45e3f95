"""The list of all kernels: launchers are asked, every kernel file is in it, every block fits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from cumla.checks import ArgumentError
from cumla.jit import sources
from cumla.jit.occupancy import TARGETS, limits
from cumla.kernels import catalogue
from cumla.kernels.catalogue import Instance
from cumla.kernels.device import Program


@dataclass(frozen=True)
class Tile:
    threads: int
    shared_bytes: int
    blocks_per_sm: int


def test_launchers_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def instances(shared_bytes: int) -> Iterator[Any]:
        asked.append(shared_bytes)
        yield Program("a.cuh", "cumla::a<1>"), 96, 1000
        yield Program("a.cuh", "cumla::a<2>"), Tile(128, 2000, 2)
        yield Program("a.cuh", "cumla::a<1>"), 96, 1000

    launcher: Any = ModuleType("cumla.kernels.stand_in")
    launcher.__spec__ = ModuleSpec(launcher.__name__, None)
    launcher.instances = instances
    monkeypatch.setitem(sys.modules, launcher.__name__, launcher)
    found = catalogue.programs("sm_90a", ["stand_in", "not_written_yet"])
    assert found == [
        Instance(Program("a.cuh", "cumla::a<1>"), 96, 1000, 1),
        Instance(Program("a.cuh", "cumla::a<2>"), 128, 2000, 2),
    ]
    _ = catalogue.programs("sm_120", ["stand_in"])
    assert asked == [232_448, 101_376]


def test_unknown_targets() -> None:
    with pytest.raises(ArgumentError, match="^target: got 'sm_75'"):
        catalogue.programs("sm_75")


@pytest.mark.parametrize("target", TARGETS)
def test_instances_can_be_launched(target: str) -> None:
    found = catalogue.programs(target)
    assert len({one.program for one in found}) == len(found) > 10
    for one in found:
        assert (sources.root() / one.program.path).is_file(), one
        assert 32 <= one.threads <= 1024, one
        assert 0 <= one.shared_bytes <= limits(target).shared_bytes_per_block, one
        assert one.min_blocks >= 1


def test_every_kernel_file_is_in_the_catalogue() -> None:
    root = sources.root()
    kernels = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.cuh")
        if "__global__" in file.read_text()
    }
    assert {one.program.path for one in catalogue.programs("sm_90a")} == kernels
