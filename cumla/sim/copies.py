"""Asynchronous copies (cp.async) of a wave that its lanes have not waited for.

PTX ISA "Data Movement: Asynchronous copy": a lane's copies belong to the group that it commits
next, and it waits for all groups but its newest N; or an mbarrier tracks them, and the lane's
copies arrive on it when they are complete. Between issue and wait a copy lands at any time, so
`delivery` chooses when: "eager" at issue; "late" when it is waited for; "random" somewhere in
between. Copies that nobody waits for may never land.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort

if TYPE_CHECKING:
    from cumla.sim.wave import Wave

Array = NDArray[Any]
# With the race check, copies that an mbarrier has tracked are kept, for their lanes may still wait
# for their groups, or arrive on another mbarrier, which then tells of them too. A kernel that uses
# mbarriers alone never lets go of any, so only the newest instructions are kept.
TRACKED = 16
# Lands what lanes copied before they arrive on phases, given the cohort and the race detector's
# names of the phases, [n] or [1].
Land = Callable[[Cohort, Array], None]
Arrive = Callable[[Cohort, Array, Land], None]
MANY_SLOTS = -1


def _rows(values: Array, mask: Array) -> Array:
    return values if values.shape[0] == 1 else values[mask]


@dataclass(slots=True)
class _Copy:
    """What some lanes copy with one instruction.

    Attributes:
        gids: [n] ascending.
        groups: [n] the group of each lane that its copy is in, counted from 0.
        move: reads the source and writes the destination, given a cohort and `arguments`.
        arguments: arrays of [n] or [1].
        number: copies and arrivals are numbered in the order of issue.
        landed: the data has been moved.
        tracked: an mbarrier has told others that it landed.
        token: the race detector's name for it, or None.
        rows: [n] which of the token's lanes these are.
        lanes: how many lanes the token has.
    """

    gids: Array
    groups: Array
    move: Callable[..., None]
    arguments: tuple[Array, ...]
    number: int
    landed: bool
    token: Any
    rows: Array
    lanes: int
    tracked: bool = False

    def part(self, mask: Array) -> _Copy:
        """The lanes where mask is true."""
        return replace(
            self,
            gids=self.gids[mask],
            groups=self.groups[mask],
            arguments=tuple(_rows(a, mask) for a in self.arguments),
            rows=self.rows[mask],
        )

    def token_mask(self) -> Array | None:
        """Which of the token's lanes these are; None for all."""
        if self.rows.shape[0] == self.lanes:
            return None
        mask = np.zeros(self.lanes, np.bool_)
        mask[self.rows] = True
        return mask


@dataclass(slots=True)
class _Arrival:
    """Lanes that arrive on mbarriers when their earlier copies have landed.

    Attributes:
        offsets: [n] of the barriers, in the wave's shared memory.
        arrive: lets them arrive, given their cohort, `offsets` and how copies land.
    """

    gids: Array
    offsets: Array
    arrive: Arrive
    number: int


class Copies:
    """The copies that are under way in a wave, and what waits for them."""

    def __init__(self, wave: Wave, delivery: str) -> None:
        self.wave = wave
        self.delivery = delivery
        lanes = wave.live.shape[0]
        self.committed = np.zeros(lanes, np.int32)  # groups that each lane has committed
        self.waited = np.zeros(lanes, np.int32)  # how many of these its last wait was for
        self._member = np.zeros(lanes, np.bool_)  # scratch, false between calls
        # By the slot that all lanes of a copy are in, so that warps on their own stay cheap.
        self._copies: dict[int, list[_Copy]] = {}
        self._arrivals: list[_Arrival] = []
        self._issued = 0

    def issue(
        self, c: Cohort, move: Callable[..., None], arguments: tuple[Array, ...], token: Any
    ) -> None:
        """The lanes have started to copy; with eager delivery the data has been moved already."""
        self._issued += 1
        copy = _Copy(
            c.gids,
            self.committed[c.gids],
            move,
            arguments,
            self._issued,
            self.delivery == "eager",
            token,
            np.arange(c.n),
            c.n,
        )
        slot = int(c.slots[0]) if c.slots[0] == c.slots[-1] else MANY_SLOTS
        bucket = self._copies.setdefault(slot, [])
        bucket += self._some_land(copy, copy.gids) if self.delivery == "random" else [copy]

    def commit(self, c: Cohort) -> None:
        """The lanes' copies since their last commit are a group."""
        self.committed[c.gids] += 1
        if self.delivery == "random":
            self._chance(c.gids)

    def wait(self, c: Cohort, newest: int) -> None:
        """Complete all groups of the lanes but the `newest`."""
        self.waited[c.gids] = self.committed[c.gids] - newest
        for bucket in self._near(c.gids):
            kept = []
            for copy in bucket:
                over = copy.groups < self.waited[copy.gids]
                number = np.count_nonzero(over)
                if number == 0:
                    kept.append(copy)
                    continue
                part = copy if number == over.shape[0] else copy.part(over)
                self._land(part)
                if copy.token is not None:
                    self.wave.race.copy_landed(copy.token, part.token_mask())
                if part is not copy:
                    kept.append(copy.part(~over))
            bucket[:] = kept
        if self.delivery == "random":
            self._chance(c.gids)

    def arrive(
        self,
        c: Cohort,
        offsets: Array,
        arrive: Arrive,
    ) -> None:
        """The lanes arrive on mbarriers, at these offsets, once all that they copied has landed."""
        self._issued += 1
        arrival = _Arrival(c.gids, offsets, arrive, self._issued)
        if self.delivery == "eager" or (self.delivery == "random" and self.wave.rng.random() < 0.5):
            self._complete(arrival)
        else:
            self._arrivals.append(arrival)

    def deliver_all_arrivals(self) -> bool:
        """Let everything land that an mbarrier waits for; whether there was anything."""
        arrivals, self._arrivals = self._arrivals, []
        for arrival in arrivals:
            self._complete(arrival)
        return bool(arrivals)

    def deliver_arrivals(self, offsets: Array) -> None:
        """Likewise for the mbarriers at these offsets: somebody has looked in vain."""
        asked, self._arrivals = self._arrivals, []
        for arrival in asked:
            if np.isin(arrival.offsets, offsets).any():
                self._complete(arrival)
            else:
                self._arrivals.append(arrival)

    def _near(self, gids: Array) -> list[list[_Copy]]:
        """Lists that hold all copies of these lanes, beside others."""
        first = int(gids[0]) // self.wave.lanes_per_block
        last = int(gids[-1]) // self.wave.lanes_per_block
        return [
            bucket
            for slot, bucket in self._copies.items()
            if slot == MANY_SLOTS or first <= slot <= last
        ]

    def _land(self, copy: _Copy) -> None:
        if not copy.landed:
            copy.move(Cohort(self.wave, copy.gids, []), *copy.arguments)
            copy.landed = True

    def _some_land(self, copy: _Copy, gids: Array) -> list[_Copy]:
        """Let the copies of some of the lanes in gids land; the copy in parts that stay known."""
        self._member[gids] = True
        chosen = self._member[copy.gids] & (self.wave.rng.random(copy.gids.shape[0]) < 0.5)
        self._member[gids] = False
        if not chosen.any():
            return [copy]
        landing = copy.part(chosen)
        self._land(landing)
        parts = [] if chosen.all() else [copy.part(~chosen)]
        return parts if copy.token is None else [landing, *parts]

    def _chance(self, gids: Array) -> None:
        """Random delivery: some of what these lanes have under way lands now."""
        for bucket in self._near(gids):
            parts = [[copy] if copy.landed else self._some_land(copy, gids) for copy in bucket]
            bucket[:] = [copy for some in parts for copy in some]

    def _complete(self, arrival: _Arrival) -> None:
        """Land the copies that an arrival tracks, and arrive."""
        land = partial(self._land_before, arrival.number)
        arrival.arrive(Cohort(self.wave, arrival.gids, []), arrival.offsets, land)

    def _land_before(self, number: int, c: Cohort, keys: Array) -> None:
        """Land what the lanes copied before they issued this arrival, on the phases of the keys."""
        keys = c.full(keys)
        self._member[c.gids] = True
        for bucket in self._near(c.gids):
            kept = []
            for copy in bucket:
                mine = self._member[copy.gids]
                count = np.count_nonzero(mine)
                if copy.number > number or count == 0:
                    kept.append(copy)
                    continue
                part = copy if count == mine.shape[0] else copy.part(mine)
                self._land(part)
                if self.wave.race is not None:
                    own = keys[np.searchsorted(c.gids, part.gids)]
                    self.wave.race.copy_released(copy.token, part.token_mask(), own)
                    part.tracked = True
                    kept.append(part)
                if part is not copy:
                    kept.append(copy.part(~mine))
            tracked = [copy.number for copy in kept if copy.tracked]
            if len(tracked) > TRACKED:
                oldest = sorted(tracked)[-TRACKED]
                kept = [copy for copy in kept if not copy.tracked or copy.number >= oldest]
            bucket[:] = kept
        self._member[c.gids] = False
