"""From a program's addresses of shared memory to the arena that holds all blocks' shared memory."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from cumla.sim.cohort import RANK_SHIFT, Cohort
from cumla.sim.memory.faults import Access, fault
from cumla.sim.memory.spaces import CLUSTER, WITHIN_BLOCK

Array = NDArray[Any]


def offsets(access: Access, c: Cohort, address: Array) -> Array:
    """[n] int64: where in the wave's shared memory (`WaveMemory.shared`) the addresses lie.

    Args:
        access: its space is "shared" (of the lane's own block) or "shared::cluster" (of the block
            whose rank the address has); the address must be a multiple of its `nbytes`.

    Raises:
        MemoryFault: misaligned, or not in a block's shared memory.
    """
    wave = c.wave
    within, base = split(access, c, address)
    bad = (within < wave.shared_start) | (
        within > wave.shared_start + wave.shared_size - access.nbytes
    )
    bad |= (within & (access.nbytes - 1)) != 0
    if bad.any():
        raise fault(access, c, address)
    return c.full(within + base)


def split(access: Access, c: Cohort, address: Array) -> tuple[Array, Array]:
    """Addresses as they are within their blocks, and where in the arena those have address 0.

    Raises:
        MemoryFault: of `shared::cluster`, no such block, or none that still runs. What is not in a
            block is for the caller to find: it is not in [0, 2^24) then, or beyond its bounds.
    """
    wave = c.wave
    if wave.cluster_size == 1:
        return address, c.shared_base
    if access.space != CLUSTER:
        return address - c.shared_window, c.shared_base
    rank = address >> RANK_SHIFT
    if ((rank < 0) | (rank >= wave.cluster_size)).any():
        raise fault(access, c, address)
    slots = c.slots - c.slots % wave.cluster_size + rank
    if access.check and not wave.slot_alive(slots).all():
        raise fault(access, c, address)
    return address & WITHIN_BLOCK, slots * wave.shared_stride


def address_of(c: Cohort, offset: int) -> int:
    """The address, in its cluster, of an offset in the arena: the opposite of `offsets`."""
    slot, within = divmod(offset, c.wave.shared_stride)
    return (slot % c.wave.cluster_size) << RANK_SHIFT | within
