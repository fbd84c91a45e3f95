"""The generic address space: where each state space lies in it.

PTX ISA "Generic Addressing": const, param, local and shared memory are windows; every other generic
address is a global address. Constant variables lie in device memory here, so their generic address
is the address that `ld.const` uses.

Shared memory is addressed as hardware does it. A block of rank r in its cluster has the addresses
from `r << 24` on, in its own space, in the cluster's (`shared::cluster`) and, behind
`SHARED_WINDOW`, in the generic one; programs reach a peer by arithmetic on them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import RANK_SHIFT
from cumla.sim.memory.device import BASE, DeviceMemory

# Local and parameter memory have 24-bit addresses; shared memory has that for each rank.
WINDOW_BITS = 24
WITHIN_BLOCK = (1 << RANK_SHIFT) - 1
CLUSTER_BITS = 32
SHARED_WINDOW = 0x7E00_0000_0000
LOCAL_WINDOW = 0x7D00_0000_0000
PARAM_WINDOW = 0x7C00_0000_0000
# By space: where its window begins, and the bits of an address in it. What is in the window of
# shared memory may be another block's.
CLUSTER = "shared::cluster"
WINDOWS = {CLUSTER: SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
BITS = {CLUSTER: CLUSTER_BITS, "local": WINDOW_BITS, "param": WINDOW_BITS}
SHARED = ("shared", CLUSTER)


def plain_space(space: str) -> str:
    """A space without a sub-qualifier that changes nothing: "shared::cta", "param::entry"."""
    return space if space == CLUSTER else space.partition("::")[0]


def window_of(space: str) -> int:
    """Where the window of a space begins; 0 for one whose addresses are generic already."""
    return WINDOWS.get(CLUSTER if space == "shared" else space, 0)


def in_window(address: NDArray[np.int64], space: str) -> NDArray[np.bool_]:
    """Which generic addresses lie in the window of CLUSTER, "local" or "param"."""
    inside: NDArray[np.bool_] = (address >> BITS[space]) == WINDOWS[space] >> BITS[space]
    return inside


def in_space(address: NDArray[np.int64], space: str, memory: DeviceMemory) -> Any:
    """Which generic addresses belong to a state space other than "shared"."""
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
