"""setmaxnreg: the pool of a block's registers."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from cumla.sim.register_pool import at_start
from tests.sim.cuda import line_of, load

SOURCE = r"""
#define INC(N) asm volatile("setmaxnreg.inc.sync.aligned.u32 " #N ";")
#define DEC(N) asm volatile("setmaxnreg.dec.sync.aligned.u32 " #N ";")

// Warpgroup 0 gives, the others take: 168 * 384 = 40 * 128 + 232 * 256 = 64512 registers.
#define BOUNDS __launch_bounds__(384, 1)
extern "C" __global__ void BOUNDS producer_consumer(int *out) {
    if (threadIdx.x < 128) {
        DEC(40);
        out[threadIdx.x] = 1;
    } else {
        INC(232);
        out[threadIdx.x] = 2;
    }
}

extern "C" __global__ void BOUNDS too_much(int *out) {
    if (threadIdx.x < 128) {
        DEC(40);
    } else {
        INC(240);  // 64 too many
        out[threadIdx.x] = 2;
    }
}

extern "C" __global__ void BOUNDS takes_first(int *out) {
    if (threadIdx.x >= 128) INC(232);
    else if (threadIdx.x < 128) DEC(40);
    out[threadIdx.x] = 1;
}

extern "C" __global__ void BOUNDS gives_later(int *out) {
    if (threadIdx.x >= 128) {
        INC(232);
        __syncthreads();
    } else {
        __syncthreads();  // before it gives
        DEC(40);
    }
}

extern "C" __global__ void BOUNDS back_and_forth(int *out) {
    int group = threadIdx.x / 128;
    for (int i = 0; i < 3; i++) {
        if (group == i) DEC(40);
        __syncthreads();
        if (group == (i + 1) % 3) INC(232);
        __syncthreads();
        if (group == (i + 1) % 3) DEC(168);
        __syncthreads();
        if (group == i) INC(168);
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}

extern "C" __global__ void BOUNDS dec_to_more() { DEC(176); }
extern "C" __global__ void BOUNDS inc_to_fewer() { INC(160); }
extern "C" __global__ void BOUNDS to_the_same() { DEC(168); INC(168); }

extern "C" __global__ void BOUNDS one_warp() {
    if (threadIdx.x < 32) DEC(40);  // only one
}

extern "C" __global__ void BOUNDS one_warp_late() {
    if (threadIdx.x < 32) return;
    DEC(40);  // without warp 0
}

extern "C" __global__ void BOUNDS different() {
    if (threadIdx.x < 32) DEC(40);  // this one
    else if (threadIdx.x < 128) DEC(48);  // that one
    __syncthreads();
}

extern "C" __global__ void BOUNDS part_of_a_warp() {
    if (threadIdx.x % 2) DEC(40);  // odd lanes
    else __syncwarp(0x55555555);
    __syncthreads();
}

extern "C" __global__ void unbounded(int *out) {
    if (threadIdx.x < 128) DEC(40); else INC(240);
    out[threadIdx.x] = 3;
}
"""


@pytest.fixture(scope="module")
def module():
    return load(SOURCE)


def launch(module, name, grid=2, **options):
    out = module.device.alloc(384, np.int32, name="out")
    kernel = module.kernel(name)
    kernel.launch(grid, 384, [out] if kernel.entry.parameters else [], **options)
    return out


def line(mark):
    return f"k.cu:{line_of(SOURCE, mark)}"


@pytest.mark.parametrize("checks", [set(), {"memory"}, {"memory", "race"}])
def test_what_one_gives_another_takes(module, checks):
    out = launch(module, "producer_consumer", grid=1, checks=checks).get()
    np.testing.assert_array_equal(out, np.repeat([1, 2, 2], 128))


@pytest.mark.parametrize("name", ["takes_first", "back_and_forth"])
@pytest.mark.parametrize("grid", [1])
def test_takers_wait_for_givers(module, name, grid):
    assert (launch(module, name, grid=grid).get() == 1).all()


def test_the_same_number_is_allowed(module):
    launch(module, "to_the_same")


def test_too_few_registers_deadlock(module):
    with pytest.raises(sim.Deadlock) as caught:
        launch(module, "too_much", grid=1)
    text = str(caught.value)
    # Warpgroup 0 freed 128 * 128; seven warps took 32 * 72 of them each.
    assert "waits for registers: it wants 2304 more, to have 240 a thread instead of 168" in text
    assert "its block has 256 free" in text
    assert "block (0, 0, 0) warp 11" in text
    assert f"{line('64 too many')}: waits" in text


def test_who_gives_too_late_deadlocks(module):
    with pytest.raises(sim.Deadlock, match="its block has 0 free") as caught:
        launch(module, "gives_later")
    assert "block (1, 0, 0)" in str(caught.value)
    assert "barrier 0: 128 of 384 threads have arrived" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dec_to_more", "setmaxnreg.dec to 176 registers in a warp that has 168 a thread"),
        ("inc_to_fewer", "setmaxnreg.inc to 160 registers in a warp that has 168 a thread"),
        ("one_warp", "has exited without it"),
        ("one_warp_late", "warp 0 has exited without it"),
        ("different", "others the one at .*k.cu:"),
    ],
)
def test_undefined_behaviour_traps(module, name, text):
    with pytest.raises(sim.KernelTrap, match=text) as caught:
        launch(module, name, grid=1)
    assert caught.value.where.kernel == name


def test_lanes_of_a_warp_wait_for_each_other(module):
    """Half a warp waits for the other half, which meets it only at the barrier behind."""
    with pytest.raises(sim.Deadlock, match="waits for the other lanes of its warp at setmaxnreg"):
        launch(module, "part_of_a_warp", grid=1)


def test_without_known_registers_it_has_no_effect(module):
    assert (launch(module, "unbounded", grid=1).get() == 3).all()


@pytest.mark.parametrize(
    ("directives", "registers"),
    [
        # As `ptxas -v` says.
        ({}, None),
        ({"maxntid": (384,)}, None),
        ({"reqntid": (384,)}, None),
        ({"maxntid": (384,), "minnctapersm": (1,)}, 168),
        ({"reqntid": (384,), "minnctapersm": (1,)}, 168),
        ({"maxntid": (128,), "minnctapersm": (1,)}, 255),
        ({"maxntid": (128,), "minnctapersm": (3,)}, 168),
        ({"maxntid": (128,), "minnctapersm": (4,)}, 128),
        ({"maxntid": (100,), "minnctapersm": (5,)}, 96),
        ({"maxntid": (10, 10, 1), "minnctapersm": (5,)}, 96),
        ({"maxntid": (1024,), "minnctapersm": (2,)}, 32),
        ({"maxntid": (32,), "minnctapersm": (64,)}, None),
        ({"maxnreg": (168,)}, 168),
        ({"maxnreg": (170,)}, 170),
        ({"maxnreg": (20,)}, 24),
        ({"maxnreg": (64,), "maxntid": (128,)}, 64),
        ({"maxnreg": (200,), "maxntid": (384,), "minnctapersm": (1,)}, 168),
        ({"maxnreg": (100,), "maxntid": (384,), "minnctapersm": (1,)}, 100),
    ],
)
def test_registers_at_the_start(directives, registers):
    assert at_start(directives) == registers
