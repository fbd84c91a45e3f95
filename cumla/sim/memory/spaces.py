"""The generic address space: where each state space lies in it.

PTX ISA "Generic Addressing": const, param, local and shared memory are windows; every other generic
address is a global address. Constant variables lie in device memory here, so their generic address
is the address that `ld.const` uses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.memory.device import BASE, DeviceMemory

WINDOW_BITS = 24
WINDOW_SIZE = 1 << WINDOW_BITS
SHARED_WINDOW = 0x7E00_0000_0000
LOCAL_WINDOW = 0x7D00_0000_0000
PARAM_WINDOW = 0x7C00_0000_0000
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}


def plain_space(space: str) -> str:
    """A space without its sub-qualifier: "shared::cta" and "param::entry" are windows of one."""
    return space.partition("::")[0]


def in_window(address: NDArray[np.int64], space: str) -> NDArray[np.bool_]:
    """Which generic addresses lie in the window of shared, local or param memory."""
    inside: NDArray[np.bool_] = (address >> WINDOW_BITS) == WINDOWS[space] >> WINDOW_BITS
    return inside


def in_space(address: NDArray[np.int64], space: str, memory: DeviceMemory) -> Any:
    """Which generic addresses belong to a state space."""
    if space in WINDOWS:
        return in_window(address, space)
    const = memory.is_read_only(address - BASE)
    if space == "const":
        return const
    outside = const
    for window in WINDOWS:
        outside = outside | in_window(address, window)
    return ~outside


def parts(address: NDArray[np.int64]) -> list[tuple[str, NDArray[np.bool_]]]:
    """The spaces that generic addresses are in, each with its lanes; "global" is all the rest."""
    found: list[tuple[str, NDArray[np.bool_]]] = []
    rest = np.ones(address.shape[0], np.bool_)
    for space in WINDOWS:
        inside = in_window(address, space)
        if inside.any():
            found.append((space, inside))
            rest &= ~inside
    if rest.any():
        found.append(("global", rest))
    return found
