"""The blocks of a grid that run at the same time, and all that belongs to them while they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.barriers import Barriers
from cumla.sim.bulk import Bulk
from cumla.sim.cluster_barriers import ClusterBarriers
from cumla.sim.cohort import WARP
from cumla.sim.copies import Copies
from cumla.sim.errors import Where
from cumla.sim.memory import WaveMemory
from cumla.sim.ptx.syntax import Instruction
from cumla.sim.warpgroups import Warpgroups

if TYPE_CHECKING:
    from cumla.sim.dependency import Dependency
    from cumla.sim.device import Device
    from cumla.sim.register_pool import RegisterPool

# Between the shared memory of two blocks lie this many bytes that nobody owns.
SHARED_GUARD = 1024


@dataclass(slots=True)
class Geometry:
    """What all waves of a launch share.

    Attributes:
        shared_size: bytes of shared memory a block owns, static and dynamic.
        dynamic_shared: of these, the dynamic ones.
        shared_variables: (name, address, size) of the variables in shared memory.
        local_size: bytes of local memory a lane has.
        local_params: (offset, size) of the parameters of calls in it; compilers copy structs
            whole, so their padding counts as written.
        shared_start: address of the first byte of shared memory that a block owns.
        cluster: blocks of a cluster in each dimension.
        explicit_cluster: the launch or the kernel says how large clusters are.
        registers: of a thread when the kernel starts, if its directives tell.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_size: int
    dynamic_shared: int
    shared_variables: list[tuple[str, int, int]]
    local_size: int
    local_params: list[tuple[int, int]]
    params: bytes
    shared_start: int = 0
    cluster: tuple[int, int, int] = (1, 1, 1)
    explicit_cluster: bool = False
    registers: int | None = None

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def lanes(self) -> int:
        """Threads of a block, padded to whole warps."""
        return -(-self.threads // WARP) * WARP

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def shared_stride(self) -> int:
        """Bytes from a block's shared memory to the next one's.

        A power of two: then an address without the memory check cannot reach a neighbour.
        """
        return 1 << (self.shared_start + self.shared_size + SHARED_GUARD - 1).bit_length()

    @property
    def cluster_size(self) -> int:
        """Blocks of a cluster."""
        return self.cluster[0] * self.cluster[1] * self.cluster[2]

    def cluster_blocks(self, clusters: NDArray[np.int64]) -> NDArray[np.int64]:
        """[c * cluster_size] linear numbers of the blocks of clusters [c], of each by rank."""
        x, y, _ = (n // k for n, k in zip(self.grid, self.cluster, strict=True))
        corner = clusters % x, clusters // x % y, clusters // (x * y)
        rank = np.arange(self.cluster_size)
        kx, ky, _ = self.cluster
        within = rank % kx, rank // kx % ky, rank // (kx * ky)
        bx, by, bz = (
            c[:, None] * k + w for c, k, w in zip(corner, self.cluster, within, strict=True)
        )
        blocks: NDArray[np.int64] = (bx + self.grid[0] * (by + self.grid[1] * bz)).reshape(-1)
        return blocks


class Wave:
    """The blocks that run together.

    Attributes:
        block_ids: [slots] linear number in the grid of the block in each slot; the blocks of a
            cluster are in consecutive slots, by rank.
        live: [slots * lanes_per_block] bool: lanes that have not exited.
        live_count: how many those are.
        version: grows when something changes that a lane in a spin loop could see.
        clock: instructions run so far, what %clock shows.
        expired: True while try_wait may give up waiting.
        mbarriers: the live mbarriers, see `cumla.sim.mbarriers`.
        race, counters: the race detector and the counters, or None.
        grid_id: number of the launch on its device.
        registers: what setmaxnreg keeps, or None before the first one.
        dependency: what the grid has to do with those beside it in a stream, or None.
    """

    def __init__(
        self,
        device: Device,
        geometry: Geometry,
        block_ids: NDArray[np.int64],
        *,
        delivery: str,
        rng: np.random.Generator,
        counters: Any = None,
        printed: list[str] | None = None,
    ) -> None:
        self.device = device
        self.geometry = geometry
        self.grid = geometry.grid
        self.block = geometry.block
        self.block_ids = block_ids
        self.slots = int(block_ids.shape[0])
        self.lanes_per_block = geometry.lanes
        self.threads_per_block = geometry.threads
        self.cluster_size = geometry.cluster_size
        self.shared_start = geometry.shared_start
        self.shared_size = geometry.shared_size
        self.shared_stride = geometry.shared_stride
        self.shared_variables = geometry.shared_variables
        self.rng = rng
        self.printed = [] if printed is None else printed
        self.version = 0
        self.clock = 0
        self.expired = False
        self.race: Any = None
        self.counters = counters
        self.grid_id = device.launches
        self.registers: RegisterPool | None = None
        self.dependency: Dependency | None = None
        self.live = np.zeros(self.slots * self.lanes_per_block, np.bool_)
        self.live.reshape(self.slots, -1)[:, : self.threads_per_block] = True
        self.live_count = self.slots * self.threads_per_block
        self.memory = WaveMemory(
            device.memory,
            slots=self.slots,
            shared_start=self.shared_start,
            shared_size=self.shared_size,
            shared_stride=self.shared_stride,
            local_size=geometry.local_size,
            lanes=self.live.shape[0],
            written=geometry.local_params,
            params=geometry.params,
        )
        self.barriers = Barriers(self)
        self.cluster_barriers = ClusterBarriers(self)
        self.mbarriers: dict[int, int] = {}
        self.copies = Copies(self, delivery)
        self.bulk = Bulk(self, delivery)
        self.warpgroups = Warpgroups(self, delivery)

    def exit(self, gids: NDArray[np.int64]) -> None:
        """These lanes have ended."""
        self.live[gids] = False
        self.live_count -= gids.shape[0]
        if self.race is not None:
            self.race.exited(gids)
        self.barriers.lanes_exited()
        self.cluster_barriers.lanes_exited()
        self.bulk.lanes_exited()
        self.warpgroups.steps.exited()
        if self.registers is not None:
            self.registers.exited(gids)
        if self.dependency is not None:
            self.dependency.exited(gids)

    def slot_alive(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the blocks in these slots have a lane that has not exited."""
        alive: NDArray[np.bool_] = np.logical_or.reduce(self.live.reshape(self.slots, -1), axis=1)
        return alive[slots]

    def block_index(self, slot: int) -> tuple[int, int, int]:
        """(x, y, z) in the grid of the block in a slot."""
        rest, x = divmod(int(self.block_ids[slot]), self.grid[0])
        z, y = divmod(rest, self.grid[1])
        return x, y, z

    def thread_index(self, gid: int) -> tuple[int, int, int]:
        """(x, y, z) in its block of a lane."""
        rest, x = divmod(gid % self.lanes_per_block, self.block[0])
        z, y = divmod(rest, self.block[1])
        return x, y, z

    def where(self, ins: Instruction, gid: int | None = None) -> Where:
        """The place of an instruction, and of a lane that runs it, for errors."""
        if gid is None:
            return Where(self.geometry.kernel, ins.where)
        return Where(
            self.geometry.kernel,
            ins.where,
            self.block_index(int(gid) // self.lanes_per_block),
            self.thread_index(int(gid)),
        )
