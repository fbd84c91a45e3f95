"""Where tensor maps may lie, and what a copy or prefetch says of one that is not good."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from sim.bulk_kit import launch

SOURCE = r"""
struct alignas(64) Map { u64 words[16]; };
__constant__ Map constant;

__device__ void prefetch(const void* map, int x, int y) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];"
                 :: "l"(map), "r"(x), "r"(y) : "memory");
}
extern "C" __global__ void by_value(const __grid_constant__ Map map, int x, int y) {
    prefetch(&map, x, y);
}
extern "C" __global__ void by_address(const char* map, int x, int y) { prefetch(map, x, y); }
extern "C" __global__ void in_constant(int x, int y) { prefetch(&constant, x, y); }
extern "C" __global__ void in_shared(int x, int y) {
    __shared__ Map map;
    map.words[0] = 0;
    prefetch(&map, x, y);
}
"""


@pytest.fixture
def tensor():
    device = sim.Device("sm_90a", memory_bytes=1 << 22)
    array = device.upload(np.zeros((8, 16), np.float32), name="tensor")
    return device, array, sim.tensor_map(array, box_dim=[16, 4])


def uploaded(device, m):
    return device.upload(np.frombuffer(bytes(m), np.uint8))


def run(device, kernel, *args):
    launch(SOURCE, 1, 1, *args, kernel=kernel, device=device)


def test_parameters_and_global_memory(tensor):
    device, array, m = tensor
    run(device, "by_value", m, 0, 4)
    run(device, "by_address", uploaded(device, m), -4, 4)
    assert not array.get().any()


@pytest.mark.parametrize("kernel", ["by_value", "by_address"])
def test_prefetches_look_at_their_addresses(tensor, kernel):
    device, array, _ = tensor
    longer = sim.tensor_map(
        array.address, data_type="float32", global_dim=[16, 9], global_strides=[64], box_dim=[16, 4]
    )
    given = longer if kernel == "by_value" else uploaded(device, longer)
    run(device, kernel, given, 0, 4)
    with pytest.raises(sim.MemoryFault, match=r"out of bounds: read .*element \(0, 8\) of a box"):
        run(device, kernel, given, 0, 5)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [("in_constant", "no tensor map"), ("in_shared", "must lie in parameters")],
)
def test_maps_that_are_not_there(tensor, kernel, reason):
    with pytest.raises(sim.KernelTrap, match=reason):
        run(tensor[0], kernel, 0, 0)


def test_maps_are_aligned(tensor):
    device, _, m = tensor
    twice = device.upload(np.frombuffer(bytes(32) + bytes(m), np.uint8))
    with pytest.raises(sim.KernelTrap, match="multiple of 64"):
        run(device, "by_address", np.uint64(twice.address + 32), 0, 0)


def test_other_parameters_do_not_take_maps(tensor):
    device, _, m = tensor
    with pytest.raises(sim.LaunchError, match=r"args\[0\]: .*128 bytes; the parameter has 8 bytes"):
        run(device, "by_address", m, 0, 0)
