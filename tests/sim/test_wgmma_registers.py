"""Registers that a wgmma under way still reads or writes: who may touch them, and what they hold.

The compiler gives the operands of inline assembly other names as it likes.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from sim.kernel_files import DELIVERIES
from sim.wgmma_programs import fragments, launch, marked, message, products

GOOD = {
    "one group": """
    fence();
    for (int i = 0; i < steps; i++) mma(d, a + i * 128, b + i * 16);
    commit();
    wait<0>();
""",
    "one behind in a loop": """
    for (int i = 0; i < steps; i++) {
        fence();
        mma(d, a + i * 128, b + i * 16, i > 0);
        commit();
        wait<1>();
    }
    wait<0>();
""",
    "two accumulators that change places": """
    float e[4] = {};
    for (int i = 0; i < steps; i++) {
        fence();
        mma(d, a + i * 128, b + i * 16);
        commit();
        wait<1>();
        for (int j = 0; j < 4; j++) { float t = d[j]; d[j] = e[j]; e[j] = t; }
    }
    wait<0>();
    for (int j = 0; j < 4; j++) d[j] += e[j];
""",
    "kept by another name under a branch": """
    float e[4] = {};
    #pragma unroll 1
    for (int i = 0; i < steps; i++) {
        fence();
        mma(d, a + i * 128, b + i * 16);
        commit();
        if (i == 2 && steps > 3) {
            wait<0>();
            for (int j = 0; j < 4; j++) { e[j] = d[j]; d[j] = 0; }
        }
    }
    wait<0>();
    for (int j = 0; j < 4; j++) d[j] += e[j];
""",
    "fragments of A": """
    #pragma unroll 1
    for (int i = 0; i < steps; i++) {
        // Row r, columns c and c + 1 lie at 256 (r / 8) + 128 (c / 8) + 16 (r % 8) + 2 (c % 8).
        unsigned f[4], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        for (int j = 0; j < 4; j++)
            f[j] = *(unsigned*)&dyn[2048 * i + 256 * (2 * warp + j % 2) + 128 * (j / 2)
                                    + 16 * (lane / 4) + 4 * (lane % 4)];
        fence();
        mma_registers(d, f, b + i * 16);
        commit();
        wait<0>();
    }
""",
}


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("name", GOOD)
def test_legal_uses_give_the_sum_and_no_report(name, delivery):
    want = fragments(products().sum(axis=0))
    for checks in (("memory", "race"), ()):
        got = launch(GOOD[name], delivery=delivery, checks=checks)
        np.testing.assert_array_equal(got, want)


# What must be reported: (program, part of the message). Lines are marked with "//@".
READ = """
    fence();
    mma(d, a, b);  //mma
    commit();
    d[0] += 1;  //@
    wait<0>();
"""
BAD = {
    "a read": (READ, "reads"),
    "a store": (
        """
    fence();
    mma(d, a, b);  //mma
    commit();
    out[threadIdx.x] = d[2];  //@
    wait<0>();
""",
        "reads",
    ),
    "a wait for too few": (
        """
    fence();
    mma(d, a, b);  //mma
    commit();
    wait<1>();
    d[3] *= 2;  //@
    wait<0>();
""",
        "reads",
    ),
    "not committed": (
        """
    fence();
    mma(d, a, b);  //mma
    wait<0>();
    d[3] *= 2;  //@
    commit();
""",
        "reads",
    ),
    "one loop late": (
        """
    #pragma unroll 1
    for (int i = 0; i < steps; i++) {
        if (i > 0) d[1] *= 0.5f;  //@
        fence();
        mma(d, a, b);  //mma
        commit();
    }
    wait<0>();
""",
        "reads",
    ),
    "A changed": (
        """
    unsigned f[4] = {image[0], image[1], image[2], image[3]};
    fence();
    mma_registers(d, f, b);  //mma
    commit();
    asm volatile("add.u32 %0, %0, 1;" : "+r"(f[1]));  //@
    wait<0>();
    d[0] += __uint_as_float(f[1]);
""",
        "overwrites",
    ),
}


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("name", BAD)
def test_a_register_in_flight_is_reported(name, delivery):
    body, how = BAD[name]
    text = message(body, delivery=delivery)
    assert text.startswith("kernel k, ")
    assert f"{marked(body, '//@')}, block (0, 0, 0), thread (0, 0, 0): `" in text
    assert how in text
    way = r"of the wgmma.mma_async at \S*k.cu:\d+( \(inlined at \S*\))? that is still under way"
    assert re.search(way, text)
    assert "a wgmma.wait_group is missing" in text


def test_without_the_check_late_delivery_leaves_the_old_value():
    want = fragments(products()[0])
    eager = launch(READ, checks=(), delivery="eager")
    late = launch(READ, checks=(), delivery="late")
    np.testing.assert_array_equal(eager[:, 0], want[:, 0] + 1)
    np.testing.assert_array_equal(late[:, 0], np.ones(128))
    np.testing.assert_array_equal(late[:, 1:], want[:, 1:])
    launch(READ, checks=("memory",))


def test_another_shape_must_not_take_up_accumulators_in_flight():
    body = """
    float w[8] = {};
    fence();
    mma(d, a, b);
    commit();
    for (int i = 0; i < 4; i++) w[i] = d[i];
    mma_wide(w, a, b);  //@
    commit();
    wait<0>();
    for (int i = 0; i < 4; i++) d[i] = w[i];
"""
    text = message(body)
    assert "in another shape" in text
    assert "wait_group is missing" in text


def test_an_accumulator_that_is_lost_is_reported():
    body = """
    fence();
    mma(d, a, b);
    commit();
    asm volatile("mov.f32 %0, 0f3f800000;" : "+f"(d[0]));  //@
    wait<0>();
"""
    text = message(body)
    assert "overwrites" in text
    assert marked(body, "//@") in text


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("mma(d, a, b); commit(); wait<0>();", "none was executed before"),
        (
            """
    fence();
    mma(d, a, b);
    commit();
    wait<0>();
    asm volatile("mul.f32 %0, %0, 0f40000000;" : "+f"(d[1]));  //@
    mma(d, a, b);
    commit();
    wait<0>();
""",
            "wrote",
        ),
    ],
)
def test_a_missing_fence_is_reported(body, part):
    text = message(body)
    assert part in text
    assert "needs a wgmma.fence" in text
    if "//@" in body:
        assert f"{marked(body, '//@')} wrote" in text


def test_one_wait_covers_only_older_groups():
    # Three groups; after wait<2> the first has landed, the others still hold what they were.
    body = """
    float e[4] = {}, f[4] = {};
    fence();
    mma(d, a, b);
    commit();
    mma(e, a + 128, b + 16);
    commit();
    mma(f, a + 256, b + 32);
    commit();
    wait<2>();
    float first = d[0] + 8;
    asm volatile("" : "+f"(first));
    float stale = e[0] + f[0];
    asm volatile("" : "+f"(stale));
    wait<0>();
    d[0] = first; d[1] = stale; d[2] = e[2]; d[3] = f[3];
"""
    late = launch(body, checks=(), delivery="late")
    each = [fragments(p) for p in products()]
    np.testing.assert_array_equal(late[:, 0], each[0][:, 0] + 8)
    np.testing.assert_array_equal(late[:, 1], 0)
    np.testing.assert_array_equal(late[:, 2], each[1][:, 2])
    np.testing.assert_array_equal(late[:, 3], each[2][:, 3])
    assert "reads" in message(body)


def test_a_register_of_a_fragment_may_get_another_name():
    """`mov` to the register is what compilers do with what comes next; others change it."""
    body = """
    unsigned f[4] = {image[0], image[1], image[2], image[3]};
    fence();
    mma_registers(d, f, b);
    commit();
    asm volatile("mov.b32 %0, 7;" : "+r"(f[1]));
    wait<0>();
    d[0] = __uint_as_float(f[1]);
"""
    assert (launch(body)[:, 0].view(np.uint32) == 7).all()
