"""A wgmma.fence that is missing on the way that was taken, and only there."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from sim.kernel_files import DELIVERIES
from sim.waves import Bound, cohort, make_wave
from sim.wgmma_programs import STEPS, fragments, launch, marked, message, products

# In a place that the compiler does not change.
SCALE = """
        asm volatile("mul.f32 %0, %0, 0f40000000;" : "+f"(d[1]));  //@
"""
LOOP = """
    FIRST
    #pragma unroll 1
    for (int i = 0; i < steps; i++) {
        BEFORE
        mma(d, a + i * 128, b + i * 16);
        commit();
        wait<0>();
        AFTER
    }
"""


def loop(first="", before="", after=""):
    return LOOP.replace("FIRST", first).replace("BEFORE", before).replace("AFTER", after)


def scaled(doubles):
    """The sum of all steps, where column 1 of the fragments is doubled after some of them."""
    total = np.zeros((128, 4), np.float32)
    for i, product in enumerate(products()):
        total += fragments(product)
        if i in doubles:
            total[:, 1] *= 2
    return total


BAD = {
    "a fence before the loop only": loop("fence();", after=SCALE),
    "written in some turns": loop("fence();", after="if (i == 2)" + SCALE),
    "fenced in other turns": loop(before="if (i != 2) fence();", after="if (i == 1)" + SCALE),
    "written by a few lanes": loop("fence();", after="if (threadIdx.x == 77)" + SCALE),
    "written under a predicate": loop(
        "fence();",
        after="""
        asm volatile("{\\n.reg .pred p;\\nsetp.eq.u32 p, %1, 2;\\n"
                     "@p mul.f32 %0, %0, 0f40000000;\\n}" : "+f"(d[1]) : "r"(i));  //@
""",
    ),
    "under another name": loop(
        "fence(); float e[4] = {};",
        after="if (i == 1)"
        + SCALE
        + "if (i == 2) { for (int j = 0; j < 4; j++) { float t = d[j]; d[j] = e[j]; e[j] = t; } }"
        'for (int j = 0; j < 4; j++) asm volatile("" : "+f"(e[j]));',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_write_since_the_last_fence_on_the_way_here_is_reported(name):
    text = message(BAD[name])
    guard = "@p mul" if "predicate" in name else "mul"
    assert f"needs a wgmma.fence before it, and there was none since `{guard}.f32" in text
    assert f"{marked(BAD[name], '//@')} wrote" in text
    assert 'asm volatile("" : "+f"(x)' in text
    thread = 77 if name == "written by a few lanes" else 0
    assert f"thread ({thread}, 0, 0): `wgmma.mma_async" in text


GOOD = {
    "a fence in each turn": (loop(before="fence();", after=SCALE), range(STEPS)),
    "a fence after each write": (
        loop("fence();", before="if (i == 3) fence();", after="if (i == 2)" + SCALE),
        [2],
    ),
    "written last": (loop("fence();", after="if (i == steps - 1)" + SCALE), [STEPS - 1]),
    "fenced in the first turn": (loop(before="if (i == 0) fence();"), []),
    "written nowhere": (loop("fence();"), []),
    "never written in fact": (loop("fence();", after="if (i == steps)" + SCALE), []),
}


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("name", GOOD)
def test_a_fence_on_the_way_that_was_taken_is_enough(name, delivery):
    body, doubles = GOOD[name]
    np.testing.assert_array_equal(launch(body, delivery=delivery), scaled(doubles))


def test_a_fence_that_comes_after_the_first_wgmma():
    text = message(loop(before="if (i > 0) fence();"))
    assert "none was executed before" in text
    assert "asm volatile" not in text


def test_what_is_known_of_each_lane():
    wave = make_wave(block=(64, 1, 1))
    checks, everybody = wave.warpgroups.checks, cohort(wave)
    ins = Bound("wgmma.fence.sync.aligned").ins
    some = np.arange(64) == 40

    def lacking(register):
        try:
            checks.unfenced(ins, ["%x"], [register], everybody, None)
        except sim.RaceError as error:
            return "wrote %x" in str(error)
        return False

    checks.fenced(everybody, None)
    checks.wrote(ins, [1, 2], everybody, some)
    assert [lacking(r) for r in (1, 2, 3)] == [True, True, False]
    checks.copied(3, 1, everybody, np.ones(1, np.bool_))
    checks.cleared([1], everybody, ~some)
    assert [lacking(r) for r in (1, 3)] == [True, True]
    checks.cleared([1], everybody, some)
    assert not lacking(1)
    checks.copied(2, 1, everybody, some)
    assert not lacking(2)
    checks.unfenced(ins, ["%x"], [3], everybody, ~some)
    checks.unfenced(ins, ["%x"], [3], everybody, np.zeros(1, np.bool_))
    checks.fenced(everybody, ~some)
    assert lacking(3)
    checks.fenced(everybody, some)
    assert not lacking(3)
