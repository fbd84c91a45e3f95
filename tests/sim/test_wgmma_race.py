"""What the race detector says of the shared memory that a wgmma reads."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from sim.kernel_files import DELIVERIES
from sim.wgmma_programs import fragments, launch, marked, products

STORE = """((unsigned*)dyn)[512 * steps + threadIdx.x % 64] = 0;"""


def races(body, **how):
    with pytest.raises(sim.RaceError) as caught:
        launch(body, **how)
    return caught.value.races


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_buffer_overwritten_before_the_wait(delivery):
    body = f"""
    fence();
    mma(d, a, b);
    commit();
    wait<1>();
    if (threadIdx.x < 64) {STORE}  //@
    wait<0>();
"""
    (race,) = races(body, delivery=delivery)
    assert "asynchronous read" in race
    assert marked(body, "//@") in race


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_buffer_overwritten_after_the_wait(delivery):
    # By the lanes that waited, and after a barrier by others, too.
    for threads, before in ((128, ""), (256, "__syncthreads();")):
        body = f"""
    if (threadIdx.x < 128) {{
        fence();
        mma(d, a, b);
        commit();
        wait<0>();
    }}
    {before}
    if (threadIdx.x / 32 == {threads // 32 - 1} && threadIdx.x % 32 == 0) {STORE}
"""
        got = launch(body, threads=threads, delivery=delivery)
        np.testing.assert_array_equal(got[:128], fragments(products()[0]))


def test_another_warpgroup_that_nobody_told():
    body = f"""
    if (threadIdx.x < 128) {{
        fence();
        mma(d, a, b);
        commit();
        wait<0>();
    }} else if (threadIdx.x == 128) {STORE}  //@
"""
    found = races(body, threads=256)
    assert any("asynchronous read" in race and marked(body, "//@") in race for race in found)


def test_operands_that_were_written_without_a_proxy_fence():
    body = f"""
    if (threadIdx.x < 64) {STORE}  //@
    __syncthreads();
    fence();
    mma(d, a, b);
    commit();
    wait<0>();
"""
    found = races(body)
    assert any(marked(body, "//@") in race and "fence.proxy.async" in race for race in found)
    fenced = body.replace(
        "__syncthreads();", 'asm volatile("fence.proxy.async;" ::: "memory");\n__syncthreads();'
    )
    assert not launch(fenced).any()


def test_operands_that_were_written_without_a_barrier():
    body = f"""
    if (threadIdx.x < 64) {STORE}  //@
    asm volatile("fence.proxy.async;" ::: "memory");
    fence();
    mma(d, a, b);
    commit();
    wait<0>();
"""
    assert any(marked(body, "//@") in race for race in races(body))
