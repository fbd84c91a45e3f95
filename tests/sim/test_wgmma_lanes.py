"""Registers of a wgmma under way, where lanes and warpgroups go different ways."""

from __future__ import annotations

import numpy as np
import pytest

from sim.kernel_files import DELIVERIES
from sim.wgmma_programs import fragments, launch, message, products


def test_warpgroups_that_part_and_meet_keep_what_is_in_flight():
    # Both have something under way when the first goes through the branch, where it waits.
    body = """
    fence();
    mma(d, a, b);
    commit();
    float e[4] = {};
    if (threadIdx.x < 128) {
        wait<0>();
        for (int i = 0; i < 4; i++) e[i] = d[i] + 1;
    }
    __syncthreads();
    wait<0>();
    for (int i = 0; i < 4; i++) d[i] += e[i];
"""
    first = fragments(products()[0])
    want = np.concatenate([2 * first + 1, first])
    for delivery in DELIVERIES:
        for checks in (("memory", "race"), ()):
            got = launch(body, threads=256, delivery=delivery, checks=checks)
            np.testing.assert_array_equal(got, want)
    wrong = body.replace("wait<0>();\n        for", "wait<1>();\n        for")
    assert wrong != body
    assert "reads" in message(wrong, threads=256)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_some_lanes_take_a_register_in_flight(delivery):
    body = """
    float e = 5;
    fence();
    mma(d, a, b);
    commit();
    asm volatile("{\\n.reg .pred p;\\nsetp.lt.u32 p, %1, 50;\\n@p mov.f32 %0, %2;\\n}\\n"
                 : "+f"(e) : "r"(threadIdx.x), "f"(d[3]));
    wait<0>();
    d[0] = e;
"""
    want = fragments(products()[0])
    want[:, 0] = np.where(np.arange(128) < 50, want[:, 3], 5)
    for checks in (("memory", "race"), ()):
        np.testing.assert_array_equal(launch(body, delivery=delivery, checks=checks), want)
    early = body.replace("    wait<0>();\n    d[0] = e;", "    d[0] = e + 1;\n    wait<0>();")
    assert early != body
    assert "reads" in message(early, delivery=delivery)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_some_warpgroups_execute_it(delivery):
    """Under a predicate; and what one takes up, another does not."""
    body = """
    fence();
    mma(d, a, b, threadIdx.x / 128);
    asm volatile(
        "{\\n.reg .pred p;\\nsetp.eq.u32 p, %6, 1;\\n"
        "@p wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0,"
        " 0;\\n}\\n" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "l"(a + 128), "l"(b + 16), "r"(threadIdx.x / 128));
    mma(d, a + 256, b + 32, threadIdx.x / 128);
    commit();
    wait<0>();
"""
    each = products()
    want = np.concatenate([fragments(each[2]), fragments(each[:3].sum(axis=0))])
    for checks in (("memory", "race"), ()):
        got = launch(body, threads=256, delivery=delivery, checks=checks)
        np.testing.assert_array_equal(got, want)
