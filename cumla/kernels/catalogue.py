"""Every kernel that the launchers can ask for, to compile ahead of time and to report on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from cumla.jit.occupancy import limits
from cumla.kernels.device import Program

LAUNCHERS = ("schedule", "cache", "decode", "combine", "merge")
"""The modules of cumla.kernels that launch kernels. Each has a function

instances(target_shared_bytes: int) -> Iterator[tuple[Program, int, int]]

of the most shared memory a block of the GPU can have, that yields all instantiations, the threads
of a block and its dynamic shared memory; or, for these two, a `Geometry`.
"""


class Geometry(Protocol):
    """The block of an instantiation that is meant to fill an SM."""

    @property
    def threads(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def blocks_per_sm(self) -> int: ...


@dataclass(frozen=True)
class Instance:
    """A kernel as it is launched."""

    program: Program
    threads: int
    """Of a block; the most, if that depends on the call."""
    shared_bytes: int = 0
    """Dynamic shared memory of a block; the most, if that depends on the call."""
    min_blocks: int = 1
    """Blocks that an SM is meant to hold at a time."""


def programs(target: str, launchers: Iterable[str] = LAUNCHERS) -> list[Instance]:
    """All instantiations for `target`, such as "sm_90a", each once.

    Raises:
        ArgumentError: the kernels are not for that target.
    """
    found: dict[Program, Instance] = {}
    shared_bytes = limits(target).shared_bytes_per_block
    for one in _given(launchers, shared_bytes):
        found.setdefault(one.program, one)
    return list(found.values())


def _given(launchers: Iterable[str], shared_bytes: int) -> Iterator[Instance]:
    for name in launchers:
        if find_spec(f"cumla.kernels.{name}") is None:
            continue
        module: Any = import_module(f"cumla.kernels.{name}")
        for program, *block in module.instances(shared_bytes):
            yield _instance(program, *block)


def _instance(program: Program, block: int | Geometry, shared_bytes: int = 0) -> Instance:
    if isinstance(block, int):
        return Instance(program, block, shared_bytes)
    return Instance(program, block.threads, block.shared_bytes, block.blocks_per_sm)
