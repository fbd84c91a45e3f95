"""A simulated GPU: its architecture, its memory and the modules loaded on it."""

from __future__ import annotations

import re
from typing import Any

from numpy.typing import DTypeLike, NDArray

from cumla.sim.errors import LaunchError
from cumla.sim.memory import DeviceArray, DeviceMemory
from cumla.sim.module import LoadedModule
from cumla.sim.ptx import parse
from cumla.sim.stream import Stream

# Shared memory that one block may have, and that an SM has, in bytes; CUDA C Programming Guide,
# "Technical Specifications per Compute Capability".
SHARED_PER_BLOCK = {
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
    121: 101376,
}
THREADS_PER_SM = {80: 2048, 87: 1536, 90: 2048, 100: 2048, 103: 2048}
BLOCKS_PER_SM = {80: 32, 90: 32, 100: 32, 103: 32, 86: 16, 87: 16, 89: 24, 120: 24, 121: 24}


def capability(target: str) -> int:
    """90 for "sm_90a"; LaunchError for a target that the simulator does not know."""
    match = re.fullmatch(r"sm_(\d+)[af]?", target)
    if match is None or int(match[1]) not in SHARED_PER_BLOCK:
        known = ", ".join(f"sm_{c}" for c in SHARED_PER_BLOCK)
        raise LaunchError(f"target: got {target!r}; known are {known}, with a suffix a or f")
    return int(match[1])


class Device:
    """A simulated GPU.

    Args:
        target: its architecture, "sm_80" to "sm_121", as in PTX's `.target`.
        num_sms: its streaming multiprocessors; they bound how many blocks run at a time.
        memory_bytes: size of its global memory; only what is used takes room.
    """

    def __init__(
        self, target: str = "sm_90a", num_sms: int = 132, *, memory_bytes: int = 4 << 30
    ) -> None:
        self.target = target
        self.capability = capability(target)
        if num_sms < 1:
            raise LaunchError(f"num_sms: got {num_sms}; a device has at least one")
        self.num_sms = num_sms
        self.shared_per_block = SHARED_PER_BLOCK[self.capability]
        self.memory = DeviceMemory(memory_bytes)
        self.launches = 0

    def alloc(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = "uint8", *, name: str = ""
    ) -> DeviceArray:
        """An array in global memory whose bytes nobody has written yet; messages call it `name`."""
        return self.memory.alloc(shape, dtype, name=name)

    def upload(self, array: NDArray[Any], *, name: str = "") -> DeviceArray:
        """A copy of a NumPy array in global memory; messages call it `name`."""
        return self.memory.upload(array, name=name)

    def load(self, ptx: str) -> LoadedModule:
        """Load a module; UnsupportedPTX lists every instruction that cannot be run."""
        return LoadedModule(self, parse(ptx))

    def stream(self, start: str | None = None) -> Stream:
        """A stream of launches, which may be programmatic dependent ones: see `Stream`."""
        return Stream(self, start)

    def resident_blocks(self, lanes: int, shared: int) -> int:
        """How many blocks of so many lanes and bytes of shared memory the device runs at a time."""
        threads = THREADS_PER_SM.get(self.capability, 1536)
        per_sm = min(threads // lanes, BLOCKS_PER_SM[self.capability])
        if shared:
            # An SM keeps 1 KiB of shared memory for each block beside the block's own.
            per_sm = min(per_sm, (self.shared_per_block + 1024) // (shared + 1024))
        return max(per_sm, 1) * self.num_sms


def load(ptx: str, device: Device | None = None) -> LoadedModule:
    """Load a PTX module on a device, or on a new device of the module's own target."""
    if device is not None:
        return device.load(ptx)
    module = parse(ptx)
    return LoadedModule(Device(module.target), module)
