"""Memory of the blocks that run together: shared, local and parameter memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cumla.sim.memory.arena import WIDEST, WRITTEN, Arena
from cumla.sim.memory.device import DeviceMemory

# What shared memory starts with: NaN in every floating-point format, -1 as an integer.
POISON = 0xFF


class WaveMemory:
    """Shared memory of each slot, local memory of each lane, and the parameters of the launch.

    Attributes:
        device: global and constant memory.
        shared: the shared memory of all slots, one after the other, `shared_stride` apart; a block
            owns `shared_size` bytes from `shared_start` on, which is also their address in it.
        local: likewise of all lanes, `local_stride` apart.
        param: the parameter block.
        shared_limit, local_limit: the powers of two from which on no address can be good.
        seen_params: parameters that were read already, by the reader and address.

    Args:
        written: (offset, size) in local memory of what counts as written from the start.
    """

    def __init__(
        self,
        device: DeviceMemory,
        *,
        slots: int,
        shared_start: int,
        shared_size: int,
        shared_stride: int,
        local_size: int,
        lanes: int,
        params: bytes,
        written: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.device = device
        self.shared_start = shared_start
        self.shared_size = shared_size
        self.shared_stride = shared_stride
        self.shared_limit = _power_above(shared_stride)
        # An address below the limit can lie behind the last slot, but in the arena.
        self.shared = Arena(slots * shared_stride + self.shared_limit)
        rows = self.shared.data[: slots * shared_stride].reshape(slots, shared_stride)
        rows[:, shared_start : shared_start + shared_size] = POISON
        self.local_size = local_size
        self.local_stride = -(-local_size // WIDEST) * WIDEST + WIDEST
        self.local_limit = _power_above(self.local_stride)
        self.local = Arena(lanes * self.local_stride + self.local_limit)
        if written:
            states = self.local.states[np.dtype(np.uint8)][: lanes * self.local_stride]
            for start, size in written:
                states.reshape(lanes, -1)[:, start : start + size] = WRITTEN
        self.param_size = len(params)
        self.param = Arena(len(params) + WIDEST)
        self.param.data[: len(params)] = np.frombuffer(params, np.uint8)
        self.seen_params: dict[Any, Any] = {}

    def release(self) -> None:
        """The wave has ended: give its memory back, whoever still refers to this object."""
        self.shared = self.local = Arena(0)


def _power_above(size: int) -> int:
    """The least power of two that is not below a size, and at least the widest access."""
    return max(WIDEST, 1 << max(size - 1, 0).bit_length())
