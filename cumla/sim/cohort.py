"""A cohort: lanes, of any number of warps and blocks, that stand at the same instruction."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cumla.sim.wave import Wave

WARP = 32
RANK_SHIFT = 24  # bits of a shared address below the rank of its block in the cluster
_FIRST_WINDOW = np.zeros(1, np.int64)
Array = NDArray[Any]


class Cohort:
    """Lanes that step together, and their registers.

    A lane's number in its wave is `slot * lanes_per_block + linear thread index`, where a block's
    lanes are padded to whole warps; so `gid >> 5` is a warp and `gid & 31` the lane in it.

    Attributes:
        wave: the blocks that run at the same time, with their memory.
        gids: [n] int64, ascending: the lanes.
        regs: one array for each register of the kernel, [n] or [1] (one value for all lanes).
        whole: every warp in it is there with all of its 32 lanes.
    """

    def __init__(self, wave: Wave, gids: Array, regs: list[Any], whole: bool | None = None):
        self.wave = wave
        self.gids = gids
        self.regs = regs
        self.n: int = gids.shape[0]
        if whole is None:
            whole = self.n % WARP == 0 and bool(
                np.array_equal(gids[::WARP] + (WARP - 1), gids[WARP - 1 :: WARP])
                and not (gids[::WARP] & (WARP - 1)).any()
            )
        self.whole = whole

    def subset(self, mask: Array) -> Cohort:
        """The lanes where mask is true, without registers: for a predicated instruction."""
        return Cohort(self.wave, self.gids[mask], [])

    def full(self, values: Array) -> Array:
        """Values with one element for each lane: [1] is spread to [n]."""
        return values if values.shape[0] == self.n else np.repeat(values, self.n)

    @cached_property
    def slots(self) -> Array:
        """[n] which block of the wave each lane is of."""
        return self.gids // self.wave.lanes_per_block

    @cached_property
    def shared_window(self) -> Array:
        """[n] or [1] int64: where each lane's own shared memory begins among its addresses."""
        if self.wave.cluster_size == 1:
            return _FIRST_WINDOW
        return (self.slots % self.wave.cluster_size) << RANK_SHIFT

    @cached_property
    def lanes(self) -> Array:
        """[n] uint32: each lane's number in its warp."""
        return (self.gids & (WARP - 1)).astype(np.uint32)

    @cached_property
    def shared_base(self) -> Array:
        """[n] int64: where in the wave's shared memory each lane's block has its address 0."""
        return self.slots * self.wave.shared_stride

    @cached_property
    def warps(self) -> Array:
        """[w] int64, ascending: the warps that have a lane here, as numbers in the wave."""
        if self.whole:
            return self.gids[::WARP] >> 5
        return np.unique(self.gids >> 5)

    @cached_property
    def _places(self) -> Array:
        """[n] where each lane stands in a [w * 32] array of whole warps."""
        return np.searchsorted(self.warps, self.gids >> 5) * WARP + (self.gids & (WARP - 1))

    @cached_property
    def active(self) -> Array:
        """[w, 32] bool: which lanes of each warp are here."""
        active = np.zeros(self.warps.shape[0] * WARP, np.bool_)
        active[slice(None) if self.whole else self._places] = True
        return active.reshape(-1, WARP)

    def to_warps(self, values: Array) -> Array:
        """[n] or [1] values as [w, 32]; absent lanes hold 0."""
        if self.whole:
            return self.full(values).reshape(-1, WARP)
        padded = np.zeros(self.warps.shape[0] * WARP, values.dtype)
        padded[self._places] = values
        return padded.reshape(-1, WARP)

    def from_warps(self, values: Array) -> Array:
        """The opposite of `to_warps`: [w, 32] to [n]."""
        flat = values.reshape(-1)
        return flat if self.whole else flat[self._places]
