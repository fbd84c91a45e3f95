"""What goes wrong in a simulated launch, and when a program or a launch is refused.

Every error that a running kernel causes is a `KernelError`: its text names the kernel, the block,
the thread and the CUDA source line, and the same facts are its attributes.
"""

from __future__ import annotations

from dataclasses import dataclass


class SimError(Exception):
    """Base of all errors of the simulator."""


class PTXSyntaxError(SimError):
    """The text is not PTX that the parser understands; the message has the line and its text."""


class UnsupportedPTX(SimError):
    """A module uses instructions that are not implemented; the message lists them all by line."""


class LaunchError(SimError, ValueError):
    """A launch was asked for with a grid, block, argument or option that cannot be."""


@dataclass(frozen=True)
class Where:
    """The place in a running kernel that an error speaks of; parts that are not known are None."""

    kernel: str
    # "file.cu:12", "file.cuh:3 (inlined at file.cu:12)", or without line information "PTX line 40"
    line: str
    block: tuple[int, int, int] | None = None
    thread: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        text = f"kernel {self.kernel}, {self.line}"
        if self.block is not None:
            text += f", block {self.block}"
        if self.thread is not None:
            text += f", thread {self.thread}"
        return text


class KernelError(SimError):
    """A running kernel did what it must not.

    Attributes:
        where: kernel, source line, block and thread.
    """

    def __init__(self, message: str, where: Where | None = None) -> None:
        super().__init__(message if where is None else f"{where}: {message}")
        self.where = where


class MemoryFault(KernelError):
    """A bad access: out of bounds, misaligned, freed, read-only or never written memory.

    Attributes:
        kind: "out of bounds", "misaligned", "use after free", "write to read-only memory"
            or "read of unwritten memory".
        address: the first bad address, as the program computed it.
    """

    def __init__(self, kind: str, message: str, address: int, where: Where | None = None) -> None:
        super().__init__(f"{kind}: {message}", where)
        self.kind = kind
        self.address = address


class RaceError(KernelError):
    """Two accesses to the same bytes, one of them a write, that nothing orders.

    Attributes:
        races: one description for each pair of instructions, with both source lines.
    """

    def __init__(self, message: str, races: tuple[str, ...]) -> None:
        super().__init__(message)
        self.races = races


class Deadlock(KernelError):
    """Nobody in the launch can move; the message names every waiting warp and what it waits for."""


class KernelTrap(KernelError):
    """The kernel executed `trap` or met an instruction whose behaviour is undefined there."""


class KernelAssert(KernelError):
    """A device-side `assert` failed; the message has its expression, file, line and function."""
