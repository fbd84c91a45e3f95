"""Streams: launches one after the other, and such as may overlap with the one before them."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cumla.sim.dependency import Dependency
from cumla.sim.errors import LaunchError
from cumla.sim.grid import Grid, Launch, deadlock, race_error
from cumla.sim.race.overlap import races_between

if TYPE_CHECKING:
    from cumla.sim.device import Device
    from cumla.sim.module import Kernel

STARTS = ("early", "ordinary", None)


class Stream:
    """Launches that are collected, and run by `synchronize`.

    ```python
    with device.stream() as stream:
        stream.launch(produce, 132, 256, [x])
        stream.launch(consume, 132, 256, [x, y], programmatic=True)
    ```

    Args:
        start: when programmatic launches start: "early", as early as hardware may start them, so
            that what misses a griddepcontrol.wait sees memory as it was; or "ordinary", when the
            grid before has completed. None: "ordinary" for launches with the race check, which
            finds a missing wait in any order and tells more of it; "early" for the others.
    """

    def __init__(self, device: Device, start: str | None = None) -> None:
        if start not in STARTS:
            raise LaunchError(f"start: got {start!r}; choose one of {STARTS}")
        self.device = device
        self.start = start
        self._queue: list[tuple[Grid, bool]] = []

    def launch(
        self,
        kernel: Kernel,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any] = (),
        *,
        programmatic: bool = False,
        **options: Any,
    ) -> None:
        """Add a launch of a kernel, with arguments and options as for `Kernel.launch`.

        Args:
            programmatic: it may start before the launch that precedes it in the stream has
                completed, and waits for that with griddepcontrol.wait
                (cudaLaunchAttributeProgrammaticStreamSerialization).

        Raises:
            LaunchError: for arguments that cannot be, as for `Kernel.launch`.
        """
        if kernel.owner.device is not self.device:
            raise LaunchError(
                f"kernel: {kernel.name} is loaded on another device than the stream's"
            )
        if programmatic and self.device.capability < 90:
            raise LaunchError(
                f"programmatic: {self.device.target} has no programmatic dependent launch; "
                "sm_90 and later have"
            )
        self._queue.append((kernel.configure(grid, block, args, **options), programmatic))

    def synchronize(self) -> list[Launch]:
        """Run what was launched, in order; what each launch left behind.

        Raises:
            RaceError: also for races between grids, once they have ended.
            MemoryFault, Deadlock, KernelTrap, KernelAssert: what a kernel did; launches behind it
                are dropped.
        """
        queue, self._queue = self._queue, []
        chains: list[list[Grid]] = []
        for grid, programmatic in queue:
            if programmatic and chains:
                chains[-1].append(grid)
            else:
                chains.append([grid])
        return [launch for chain in chains for launch in self._run(chain)]

    def _run(self, grids: list[Grid]) -> list[Launch]:
        """Run grids of which each but the first may overlap with the one before."""
        if len(grids) == 1:
            return [grids[0].run()]
        chain: list[Dependency] = []
        for grid in grids:
            early = not grid.env.check_race if self.start is None else self.start == "early"
            chain.append(Dependency(grid, chain[-1] if chain else None, early))
        try:
            self._finish(chain)
        finally:
            for grid in grids:
                grid.write_printed()
        races = [r for grid in grids for r in grid.races()]
        overlaps = [d.overlap for d in chain if d.overlap is not None]
        if len(overlaps) == len(chain):
            races += races_between(self.device.memory, overlaps, [d.signalled for d in chain])
        if races:
            raise race_error(f"kernels {', '.join(g.name for g in grids)}", tuple(races))
        return [grid.result() for grid in grids]

    def _finish(self, chain: list[Dependency]) -> None:
        grids = [d.grid for d in chain]
        while True:
            before = [grid.progress for grid in grids]
            for dependency in chain:
                if dependency.started and not dependency.grid.done:
                    dependency.grid.advance()
            if all(grid.done for grid in grids):
                return
            if before == [grid.progress for grid in grids]:
                raise deadlock(grids)
            # What one wrote another may be waiting for, in a loop.
            for grid in grids:
                if grid.wave is not None:
                    grid.wave.version += 1

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.synchronize()
        else:
            self._queue.clear()
