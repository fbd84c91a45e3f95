"""How many blocks of a kernel one multiprocessor (SM) holds at a time.

CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and for what a
resource is handed out in, the calculation of Nsight Compute's occupancy table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cumla.checks import bad_value

_REGISTERS = 65_536
_REGISTER_UNIT = 256
"""A warp gets a multiple of so many registers."""
_QUARTERS = 4
"""Each has its own quarter of the registers and of the warps."""
_SHARED_UNIT = 128
_SHARED_OF_SYSTEM = 1024
"""Bytes of shared memory of each block that are the driver's."""
_KIB = 1024


@dataclass(frozen=True)
class Limits:
    """What one SM of an architecture has."""

    warps: int
    blocks: int
    shared_bytes: int

    @property
    def shared_bytes_per_block(self) -> int:
        """The most shared memory a block can have, static and dynamic together."""
        return self.shared_bytes - _SHARED_OF_SYSTEM


_LARGE = Limits(64, 32, 228 * _KIB)
_SMALL = Limits(48, 24, 100 * _KIB)
_LIMITS = {
    80: Limits(64, 32, 164 * _KIB),
    86: Limits(48, 16, 100 * _KIB),
    87: Limits(48, 16, 164 * _KIB),
    89: _SMALL,
    90: _LARGE,
    100: _LARGE,
    103: _LARGE,
    120: _SMALL,
    121: _SMALL,
}
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_103", "sm_120", "sm_121")
"""The GPUs that the kernels are for."""


def limits(target: str) -> Limits:
    """The limits of an SM of `target`, such as "sm_90a".

    Raises:
        ArgumentError: the kernels are not for that target.
    """
    match = re.fullmatch(r"(?:sm|compute)_(\d+)[af]?", target)
    if match is None or int(match[1]) not in _LIMITS:
        known = ", ".join(f"sm_{one}" for one in _LIMITS)
        raise bad_value("target", repr(target), f"known are {known}", "Pass one of these.")
    return _LIMITS[int(match[1])]


def blocks_per_sm(target: str, threads: int, registers: int, shared_bytes: int) -> int:
    """The blocks of a kernel that an SM of `target` holds at a time; 0: not even one fits.

    Args:
        threads: of a block.
        registers: of a thread.
        shared_bytes: of a block, static and dynamic.
    """
    have = limits(target)
    warps = _ceil(threads, 32)
    shared = _ceil(shared_bytes + _SHARED_OF_SYSTEM, _SHARED_UNIT) * _SHARED_UNIT
    by_shared = have.shared_bytes // shared
    by_warps = have.warps // warps
    by_registers = have.blocks
    if registers:
        warp_registers = _ceil(registers * 32, _REGISTER_UNIT) * _REGISTER_UNIT
        by_registers = _REGISTERS // _QUARTERS // warp_registers * _QUARTERS // warps
    return min(have.blocks, by_warps, by_registers, by_shared)


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
