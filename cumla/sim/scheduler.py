"""Who runs next: lanes at the lowest place first, so that lanes that parted meet again.

Lanes of all warps and blocks of a wave that stand at the same place step together. Lanes that have
to wait are parked and asked again when nobody else can move. A cohort in a loop that changes
nothing, neither memory nor a register, spins: it is parked until memory changes. If its lanes part
and meet in the loop, what it does may depend on others all the same, so it only lets everybody else
go first. If at last nobody can move, or all that do come back to where they were, the launch is
deadlocked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP, Cohort
from cumla.sim.errors import KernelError, SimError
from cumla.sim.program.codegen import Code
from cumla.sim.program.flow import EXIT
from cumla.sim.wave import Wave

# Rounds of a loop before its state is compared between rounds; compared again at each doubling.
FIRST_SPIN_TEST = 4
# Rounds, or turns, after which a loop lets others run, though its state still changes.
LONG_TURN = 1 << 14
# How often try_wait may give up in vain, with nothing changing, before that is a deadlock.
VAIN_ROUNDS = 4


class _State(NamedTuple):
    """What decides how a cohort goes on from a place, as long as it meets nobody."""

    version: int
    gids: NDArray[np.int64]
    regs: list[Any]


class Scheduler:
    """Runs one wave to its end."""

    def __init__(self, code: Code, wave: Wave) -> None:
        self.code = code
        self.wave = wave
        self.places = code.places
        everybody = Cohort(wave, np.flatnonzero(wave.live), list(code.initial))
        self.runnable: dict[int, list[Cohort]] = {0: [everybody]}
        self.parked: dict[int, list[Cohort]] = {}
        # Spinning cohorts, with the wave's version that they have seen (None: let others go first).
        self.spinning: list[tuple[int, Cohort, int | None]] = []
        # Turns since somebody let others go first, and since memory last changed, at each place for
        # each group of lanes: how many, and the version and registers to compare the next one with.
        self.turns = 0
        self.visits: dict[tuple[int, int, int], tuple[int, _State | None]] = {}
        self.version = 0
        # Where everybody was when spinning lanes last went on.
        self.resumed = 0
        self.standstill: list[tuple[int, _State]] | None = None

    def run(self) -> bool:
        """Whether all lanes have ended: if not, nobody can move.

        It may be called again then: another grid may have changed what lanes wait for.
        """
        wave = self.wave
        expired_at = -1
        vain = 0
        while True:
            while self.runnable:
                self.turn()
            if not self.parked and not self.spinning:
                wave.bulk.finish()
                return True
            if self.wake() or self.resume():
                continue
            if wave.copies.deliver_all_arrivals() and (self.wake() or self.resume()):
                continue
            if self.bulk_lands():
                continue
            vain = vain + 1 if wave.version == expired_at else 0
            expired_at = wave.version
            if vain < VAIN_ROUNDS:
                wave.expired = True
                try:
                    woken = self.wake(run=True)
                finally:
                    wave.expired = False
                if woken:
                    continue
            return False

    def bulk_lands(self) -> bool:
        """Let bulk copies land, one mbarrier of a block after the other, until somebody moves."""
        while self.wave.bulk.deliver_next():
            if self.wake() or self.resume():
                return True
        return False

    def wake(self, run: bool = False) -> bool:
        """Ask all parked lanes again; with `run`, those that may go on make one step at once."""
        found = False
        spinning, self.spinning = self.spinning, []
        for place, cohort, version in spinning:
            if version is None or version == self.wave.version:
                self.spinning.append((place, cohort, version))
            else:
                self.runnable.setdefault(place, []).append(cohort)
                found = True
        parked, self.parked = self.parked, {}
        for place in sorted(parked):
            cohort = self.merge(place, parked[place])
            ready = self.gate(place, cohort)
            if ready is not None:
                found = True
                if run:
                    self.follow(place, ready, once=True)
                else:
                    self.runnable.setdefault(place, []).append(ready)
        return found

    def resume(self) -> bool:
        """Let those go on who let others go first, unless all stand as they once did before."""
        if all(version is not None for _, _, version in self.spinning):
            return False
        now = [(place, cohort) for place, cohort, _ in self.spinning]
        now += [(place, cohort) for place, parked in self.parked.items() for cohort in parked]
        now.sort(key=lambda at: (at[0], int(at[1].gids[0])))
        before = self.standstill
        if before is not None and len(before) == len(now):
            pairs = zip(now, before, strict=True)
            if all(at == old and self.unchanged(at, c, state) for (at, c), (old, state) in pairs):
                return False
        self.resumed += 1
        if self.resumed & (self.resumed - 1) == 0:
            self.standstill = [(place, self.state(cohort)) for place, cohort in now]
        spinning, self.spinning = self.spinning, []
        for place, cohort, version in spinning:
            if version is None:
                self.runnable.setdefault(place, []).append(cohort)
            else:
                self.spinning.append((place, cohort, version))
        self.visits.clear()
        return True

    def turn(self) -> None:
        """Run the lowest cohort until it waits, ends, parts or is no longer the lowest."""
        place = min(self.runnable)
        cohorts = self.runnable.pop(place)
        if place in self.parked:
            cohorts = cohorts + self.parked.pop(place)
        cohort = self.merge(place, cohorts)
        if self.yields(place, cohort):
            self.spinning.append((place, cohort, None))
        else:
            self.follow(place, cohort)

    def yields(self, place: int, cohort: Cohort) -> bool:
        """Whether lanes come here again as they were before, or have had very many turns."""
        self.turns += 1
        if self.turns % LONG_TURN == 0 and (self.runnable or self.parked or self.spinning):
            return True
        if self.version != self.wave.version:
            self.version = self.wave.version
            self.visits.clear()
        key = (place, int(cohort.gids[0]), cohort.n)
        count, seen = self.visits.get(key, (0, None))
        if seen is not None:
            if self.unchanged(place, cohort, seen):
                return True
            seen = None
        count += 1
        if count >= FIRST_SPIN_TEST and count & (count - 1) == 0:
            seen = self.state(cohort)
        self.visits[key] = (count, seen)
        return False

    def follow(self, place: int, cohort: Cohort, once: bool = False) -> None:
        wave = self.wave
        places = self.places
        limit = min(self.runnable) if self.runnable else len(places)
        rounds = 0
        seen: tuple[int, _State] | None = None
        while True:
            here = places[place]
            if here.gate is not None and not (here.warp_gate and cohort.whole):
                ready = self.gate(place, cohort)
                if ready is None:
                    return
                cohort = ready
            try:
                following = (here.run_whole if cohort.whole else here.step)(cohort)
            except SimError:
                raise
            except Exception as error:
                raise self.internal(error) from error
            wave.clock += here.cost
            if following.__class__ is not int:
                for target, mask in following:
                    self.add(target, self.part(target, cohort, mask))
                return
            if following == EXIT:
                wave.exit(cohort.gids)
                return
            if following >= limit or once:
                self.add(following, cohort)
                return
            if following <= place:
                # A loop: is it one that cannot end unless others change memory?
                rounds += 1
                if seen is not None and seen[0] == following:
                    if self.unchanged(following, cohort, seen[1]):
                        self.spinning.append((following, cohort, wave.version))
                        return
                    seen = None
                if rounds >= FIRST_SPIN_TEST and rounds & (rounds - 1) == 0:
                    seen = (following, self.state(cohort))
                if rounds % LONG_TURN == 0 and (self.runnable or self.parked or self.spinning):
                    self.spinning.append((following, cohort, None))
                    return
            place = following

    def add(self, place: int, cohort: Cohort) -> None:
        if place == EXIT:
            self.wave.exit(cohort.gids)
        else:
            self.runnable.setdefault(place, []).append(cohort)

    def gate(self, place: int, cohort: Cohort) -> Cohort | None:
        """The lanes that may go on from here, the others parked; None if there are none."""
        gate = self.places[place].gate
        assert gate is not None
        try:
            answer = gate(cohort)
        except SimError:
            raise
        except Exception as error:
            raise self.internal(error) from error
        if answer is True:
            return cohort
        if answer.shape[0] != cohort.n:
            answer = cohort.full(answer)
        number = np.count_nonzero(answer)
        if number == cohort.n:
            return cohort
        parked = self.parked.setdefault(place, [])
        if number == 0:
            parked.append(cohort)
            return None
        parked.append(self.part(place, cohort, ~answer))
        return self.part(place, cohort, answer)

    def part(self, place: int, cohort: Cohort, mask: NDArray[np.bool_]) -> Cohort:
        """The lanes of a cohort where mask is true, with the registers that are live at a place."""
        regs = list(self.code.initial)
        gids = cohort.gids[mask]
        if place != EXIT:
            in_flight = self.wave.warpgroups if self.wave.warpgroups.under_way else None
            for number in self.places[place].live:
                value = cohort.regs[number]
                regs[number] = value if value.shape[0] == 1 else value[mask]
                if in_flight is not None:
                    in_flight.picked(value, mask, gids, regs[number])
        return Cohort(cohort.wave, gids, regs)

    def merge(self, place: int, cohorts: list[Cohort]) -> Cohort:
        """One cohort of several that stand at the same place."""
        if len(cohorts) == 1:
            return cohorts[0]
        gids = np.concatenate([c.gids for c in cohorts])
        order = np.argsort(gids)
        gids = gids[order]
        in_flight = self.wave.warpgroups if self.wave.warpgroups.under_way else None
        regs = list(self.code.initial)
        for number in self.places[place].live:
            values = [c.regs[number] for c in cohorts]
            first = values[0]
            if all(
                v is first or (v.shape[0] == 1 and v.tobytes() == first.tobytes()) for v in values
            ) and (first.shape[0] == 1):
                regs[number] = first
            else:
                whole = [c.full(v) for c, v in zip(cohorts, values, strict=True)]
                regs[number] = np.concatenate(whole)[order]
                if in_flight is not None:
                    in_flight.joined(whole, order, gids, regs[number])
        return Cohort(self.wave, gids, regs)

    def state(self, cohort: Cohort) -> _State:
        return _State(self.wave.version, cohort.gids, list(cohort.regs))

    def unchanged(self, place: int, cohort: Cohort, before: _State) -> bool:
        """Whether the lanes are at a place as they were before: memory, live registers."""
        if before.version != self.wave.version:
            return False
        if cohort.gids is not before.gids and not np.array_equal(cohort.gids, before.gids):
            return False
        for number in self.places[place].live:
            now, old = cohort.regs[number], before.regs[number]
            if now is not old and now.tobytes() != old.tobytes():
                return False
        return True

    def internal(self, error: Exception) -> SimError:
        """An error of the simulator itself, with the instruction at which it happened."""
        trace = error.__traceback__
        ins = None
        while trace is not None:
            lines = self.code.instructions_of.get(trace.tb_frame.f_code.co_filename)
            if lines is not None:
                ins = lines[trace.tb_lineno - 1]
            trace = trace.tb_next
        if ins is None:
            return KernelError(f"the simulator failed: {error!r}")
        return KernelError(f"the simulator failed at `{ins.text}`: {error!r}", self.wave.where(ins))

    def waiting(self) -> str:
        """Every waiting warp, where it is and what it waits for, a line for each place."""
        waiting: dict[tuple[str, str], list[str]] = {}
        for place, cohorts in sorted(self.parked.items()):
            for cohort in cohorts:
                self.describe(waiting, place, cohort, spins=False)
        for place, cohort, _ in self.spinning:
            self.describe(waiting, place, cohort, spins=True)
        lines = []
        for (source, reason), warps in waiting.items():
            lines.append(f"  {source}: waits for {reason}: {'; '.join(warps)}")
        return "\n".join(lines)

    def describe(
        self, waiting: dict[tuple[str, str], list[str]], place: int, cohort: Cohort, spins: bool
    ) -> None:
        here = self.places[place]
        source = self.code.kernel.instructions[here.first].where
        wave = self.wave
        by_block: dict[tuple[int, int], dict[str, list[str]]] = {}
        for warp in cohort.warps:
            mask = (cohort.gids >> 5) == warp
            one = self.part(place, cohort, mask)
            reason = "memory to change, in a loop that changes nothing"
            if not spins and here.waits_for is not None:
                reason = here.waits_for(one)
            block = int(one.gids[0]) // wave.lanes_per_block
            number = int(warp) - block * (wave.lanes_per_block // WARP)
            name = f"warp {number}"
            if one.n < WARP:
                bits = int(np.bitwise_or.reduce(np.uint32(1) << one.lanes))
                name += f" (lanes 0x{bits:08x})"
            by_block.setdefault((block, 0), {}).setdefault(reason, []).append(name)
        for (block, _), reasons in by_block.items():
            for reason, names in reasons.items():
                text = f"block {wave.block_index(block)} {', '.join(names)}"
                waiting.setdefault((source, reason), []).append(text)
