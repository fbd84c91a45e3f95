"""Warps of a warpgroup that do not execute the same wgmma instructions, which are .aligned."""

from __future__ import annotations

import numpy as np
import pytest

from sim.kernel_files import DELIVERIES
from sim.wgmma_programs import fragments, launch, marked, message, products

APART = {
    "another fence": (
        "fence();\nif (threadIdx.x / 32 == 1) fence();  //@\n mma(d, a, b);",
        "went on to `wgmma.mma",
    ),
    "a wait": (
        "fence(); mma(d, a, b); commit(); if (threadIdx.x < 32) wait<0>();  //@\n return;",
        "exited without it",
    ),
    "a commit": (
        "fence(); mma(d, a, b);\n if (threadIdx.x > 95) commit();  //@\n return;",
        "exited without it",
    ),
    "a commit before the others' wait": (
        """
    fence();
    mma(d, a, b);
    if (threadIdx.x > 95) commit();  //@
    wait<0>();
    return;
""",
        "instead",
    ),
    "waits for other groups": (
        """
    fence();
    mma(d, a, b);
    commit();
    if (threadIdx.x > 95) wait<0>(); else wait<1>();  //@
    return;
""",
        "instead",
    ),
}


@pytest.mark.parametrize("threads", [128, 256])
@pytest.mark.parametrize("name", APART)
def test_warps_of_a_warpgroup_that_execute_other_instructions(name, threads):
    body, how = APART[name]
    text = message(body, threads=threads)
    assert how in text
    assert "all four must execute it, or none" in text
    assert marked(body, "//@") in text


def test_a_fence_of_one_warp_is_none_of_the_others():
    text = message("if (threadIdx.x / 32 == 1) fence(); mma(d, a, b); commit(); wait<0>();")
    assert "thread (0, 0, 0): `wgmma.mma_async" in text
    assert "none was executed before" in text


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_warps_may_execute_the_same_apart(delivery):
    """One warp after the other; and the warpgroups each for themselves."""
    body = """
    for (int i = 0; i < 1 + (int)(threadIdx.x / 128); i++) {
        if (threadIdx.x / 32 % 4 == 2) {
            __nanosleep(10);
            fence();
        } else {
            fence();
        }
        mma(d, a + i * 128, b + i * 16);
        if (threadIdx.x / 32 % 4 == 1) {
            commit();
            __nanosleep(10);
            wait<0>();
        } else {
            commit();
            wait<0>();
        }
    }
"""
    each = products()
    want = np.concatenate([fragments(each[0]), fragments(each[0] + each[1])])
    np.testing.assert_array_equal(launch(body, threads=256, delivery=delivery), want)
