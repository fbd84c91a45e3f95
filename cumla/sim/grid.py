"""A launch while it runs: its blocks in waves, one wave after the other."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cumla.sim.counters import Counters
from cumla.sim.errors import Deadlock, RaceError
from cumla.sim.isa.table import Env
from cumla.sim.program.prepare import Prepared
from cumla.sim.race import RaceDetector
from cumla.sim.scheduler import Scheduler
from cumla.sim.wave import Geometry, Wave

if TYPE_CHECKING:
    from cumla.sim.dependency import Dependency
    from cumla.sim.device import Device


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launch left behind.

    Attributes:
        kernel: its name.
        printed: what it printed.
        counters: the counters, if they were asked for.
    """

    kernel: str
    printed: str
    counters: Counters | None


class Grid:
    """A launch in progress.

    Attributes:
        name: of the kernel.
        number: of the launch on its device, what %gridid shows; set when it starts.
        done: all blocks have ended.
        wave, scheduler: the blocks that run now; None between waves.
        race: the race detector, from the first wave on, if the launch has one.
        dependency: how it hangs together with the grids beside it in a stream, or None.
        keep: what must live until the launch has ended: its kernel and arguments.
    """

    def __init__(
        self,
        device: Device,
        prepared: Prepared,
        geometry: Geometry,
        env: Env,
        order: NDArray[np.int64],
        wave_blocks: int,
        rng: np.random.Generator,
        keep: object = None,
    ) -> None:
        self.device = device
        self.name = geometry.kernel
        self.geometry = geometry
        self.env = env
        self.number = -1
        self.done = False
        self.wave: Wave | None = None
        self.scheduler: Scheduler | None = None
        self.race: RaceDetector | None = None
        self.dependency: Dependency | None = None
        self.keep = keep
        self._code = prepared.code
        self._end = prepared.kernel.instructions[-1]
        self._order = order
        self._wave_blocks = wave_blocks
        self._rng = rng
        self._begun = 0
        self._printed: list[str] = []
        self._counters = Counters(prepared.kernel, geometry) if env.count else None

    def run(self) -> Launch:
        """Run it to its end, alone."""
        try:
            self.advance()
            if not self.done:
                raise deadlock([self])
        finally:
            self.write_printed()
        races = self.races()
        if races:
            raise race_error(f"kernel {self.name}", races)
        return self.result()

    def advance(self) -> None:
        """Go on until all blocks have ended or nobody can move."""
        keep_freed_memory()
        with np.errstate(all="ignore"):
            while not self.done:
                if self.scheduler is None:
                    self._next_wave()
                assert self.wave is not None
                assert self.scheduler is not None
                if not self.scheduler.run():
                    return
                self.wave.memory.release()
                self.wave = self.scheduler = None
                self.done = self._begun >= self.geometry.blocks
            if self.dependency is not None:
                self.dependency.complete()

    def _next_wave(self) -> None:
        if self.number < 0:
            self.number = self.device.launches
            self.device.launches += 1
        blocks = self._order[self._begun : self._begun + self._wave_blocks]
        self._begun += self._wave_blocks
        self.wave = wave = Wave(
            self.device,
            self.geometry,
            blocks,
            delivery=self.env.delivery,
            rng=self._rng,
            counters=self._counters,
            printed=self._printed,
        )
        wave.grid_id = self.number
        if self.env.check_race:
            if self.race is None:
                self.race = RaceDetector(wave, self._end, self.env.target >= 90)
                if self.dependency is not None:
                    self.race.overlap = self.dependency.overlap
            else:
                self.race.next_wave(wave)
            wave.race = self.race
        if self.dependency is not None:
            self.dependency.next_wave(wave)
        self.scheduler = Scheduler(self._code, wave)

    @property
    def progress(self) -> tuple[int, int]:
        """Changes when something happens that others could wait for."""
        return self._begun, -1 if self.wave is None else self.wave.version

    def races(self) -> tuple[str, ...]:
        """The races found so far, in words."""
        return () if self.race is None else tuple(str(r) for r in self.race.races())

    def write_printed(self) -> None:
        """Show on standard output what the kernel printed."""
        sys.stdout.write("".join(self._printed))

    def result(self) -> Launch:
        return Launch(self.name, "".join(self._printed), self._counters)


def deadlock(grids: list[Grid]) -> Deadlock:
    """The error for grids of which none can move; who waits for ever may do so for a race."""
    text = ""
    for grid in grids:
        if grid.scheduler is not None:
            text += f"kernel {grid.name}: deadlock, nobody can move.\n{grid.scheduler.waiting()}\n"
    races = [r for grid in grids for r in grid.races()]
    if races:
        text += "races found before:\n" + listed(races)
    return Deadlock(text.rstrip("\n"))


def race_error(who: str, races: tuple[str, ...]) -> RaceError:
    """The error for these races; `who` names the kernels."""
    number = "a race" if len(races) == 1 else f"{len(races)} races"
    return RaceError(f"{who}: {number}\n{listed(races)}", races)


def listed(races: list[str] | tuple[str, ...]) -> str:
    """Races, a line each."""
    return "\n".join(f"  {r}" for r in races)


@cache
def keep_freed_memory() -> None:
    """Make glibc keep freed arrays of up to 31 MiB instead of handing their pages back.

    It raises its thresholds when a large block is freed; without that every array of 128 KiB is
    mapped and cleared anew, which costs more than most instructions do.
    """
    np.empty(31 << 20, np.uint8)
