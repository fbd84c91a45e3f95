"""The barrier of each cluster of a wave. PTX ISA "barrier.cluster".

A thread arrives and later waits; the barrier completes when all threads of the cluster that have
not exited have arrived. So blocks may return between their arrival and the others' wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort
from cumla.sim.errors import KernelTrap
from cumla.sim.ptx.syntax import Instruction

if TYPE_CHECKING:
    from cumla.sim.wave import Wave

Array = NDArray[Any]
# Names for the race detector: below those of the blocks' named barriers.
_FIRST_KEY = -(1 << 60)


class ClusterBarriers:
    """State of the cluster barriers of a wave.

    Attributes:
        completed: [clusters] how often each has completed.
        arrivals, waits: [lanes] how often each lane has arrived, and waited to the end.
    """

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.lanes = wave.lanes_per_block * wave.cluster_size
        self.completed = np.zeros(wave.slots // wave.cluster_size, np.int64)
        self.arrivals = np.zeros(wave.live.shape[0], np.int64)
        self.waits = np.zeros(wave.live.shape[0], np.int64)
        self.used = False

    def arrive(self, ins: Instruction, c: Cohort, releases: bool) -> None:
        """The lanes arrive."""
        again = self.arrivals[c.gids] > self.waits[c.gids]
        if again.any():
            raise self._trap(
                ins, c, again, "arrives again without barrier.cluster.wait after its last arrival"
            )
        self.used = True
        if self.wave.race is not None:
            keys = self._keys(c.gids, self.arrivals[c.gids])
            if releases:
                self.wave.race.release(c.gids, keys)
            else:
                self.wave.race.release_fenced(c.gids, keys)
        self.arrivals[c.gids] += 1
        self._settle(np.unique(c.gids // self.lanes))

    def ready(self, ins: Instruction, c: Cohort) -> Any:
        """Which lanes may go on from their wait."""
        early = self.arrivals[c.gids] <= self.waits[c.gids]
        if early.any():
            raise self._trap(ins, c, early, "waits without barrier.cluster.arrive before it")
        done: Array = self.completed[c.gids // self.lanes] >= self.arrivals[c.gids]
        return True if done.all() else done

    def wait(self, c: Cohort) -> None:
        """The lanes go on."""
        if self.wave.race is not None:
            self.wave.race.acquire(c.gids, self._keys(c.gids, self.waits[c.gids]))
        self.waits[c.gids] += 1

    def lanes_exited(self) -> None:
        """Nobody waits for lanes that have exited."""
        if self.used:
            self._settle(np.arange(self.completed.shape[0]))

    def describe(self, c: Cohort) -> str:
        """What the first lane of c waits for."""
        cluster = int(c.gids[0]) // self.lanes
        live, arrived = self._of(cluster)
        here = int(np.count_nonzero(live & arrived))
        return (
            f"the cluster barrier: {here} of {np.count_nonzero(live)} threads of the cluster have "
            "arrived"
        )

    def _of(self, cluster: int) -> tuple[Array, Array]:
        """[lanes of a cluster] who has not exited, and who has arrived for the current use."""
        lanes = slice(cluster * self.lanes, (cluster + 1) * self.lanes)
        return self.wave.live[lanes], self.arrivals[lanes] > self.completed[cluster]

    def _settle(self, clusters: Array) -> None:
        for cluster in clusters.tolist():
            live, arrived = self._of(cluster)
            if arrived.any() and arrived[live].all():
                self.completed[cluster] += 1
                self.wave.version += 1
                if self.wave.race is not None:
                    # Who waits now names this use; all have waited for the one before.
                    self.wave.race.forget(self._key(cluster, int(self.completed[cluster]) - 2))

    def _keys(self, gids: Array, times: Array) -> Array:
        """The race detector's names of uses of the barriers."""
        keys: Array = self._key(gids // self.lanes, times)
        return keys

    def _key(self, cluster: Any, times: Any) -> Any:
        return _FIRST_KEY + (cluster << 32) + times

    def _trap(self, ins: Instruction, c: Cohort, bad: Array, what: str) -> KernelTrap:
        gid = int(c.gids[np.argmax(bad)])
        return KernelTrap(f"{ins.name}: the thread {what}", self.wave.where(ins, gid))
