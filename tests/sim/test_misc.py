"""Instructions that compute nothing."""

from __future__ import annotations

import pytest

from cumla.sim.errors import KernelTrap
from cumla.sim.isa.table import Unsupported
from sim.waves import Bound, cohort, make_wave


@pytest.mark.parametrize(
    ("durations", "advance"),
    [([42], 42), ([5, 700, 3], 700), ([0], 0), ([1_000_001], 1_000_000), ([0xFFFFFFFF], 1_000_000)],
)
def test_nanosleep_moves_the_clock(durations, advance):
    wave = make_wave()
    wave.clock = 1000
    version = wave.version
    c = cohort(wave, range(len(durations)))
    assert Bound("nanosleep.u32", "%r1")(c, durations) is None
    assert wave.clock == 1000 + advance
    assert wave.version == version


@pytest.mark.parametrize("opcode", ["trap", "brkpt"])
def test_trap_names_its_place(opcode):
    wave = make_wave((8, 4, 2), (3, 2, 1), [4, 1])
    with pytest.raises(KernelTrap, match=rf"kernel k, kernel.cu:7.*executed {opcode}$") as caught:
        Bound(opcode)(cohort(wave, [64 + 42, 64 + 43]))
    assert caught.value.where.block == (1, 0, 0)
    assert caught.value.where.thread == (2, 1, 1)


@pytest.mark.parametrize(
    ("text", "operands"),
    [
        ("pmevent", (1,)),
        ("pmevent.mask", (255,)),
    ],
)
def test_accepted_without_effect(text, operands):
    wave = make_wave()
    before = dict(vars(wave))
    assert Bound(text, *operands)(cohort(wave), *operands) is None
    assert vars(wave) == before


@pytest.mark.parametrize(
    "text",
    [
        "nanosleep.u64",
        "nanosleep",
        "trap.sync",
        "pmevent.all",
    ],
)
def test_refused(text):
    with pytest.raises(Unsupported):
        Bound(text)
