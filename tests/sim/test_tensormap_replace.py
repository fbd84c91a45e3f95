"""tensormap.replace and tensormap.cp_fenceproxy: maps that a kernel makes or changes."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from cumla.sim.tensormap import DATA_TYPES, decode
from sim.bulk_kit import DELIVERIES, launch

BOTH = ("memory", "race")

MAKE = r"""
struct alignas(64) Map { u64 words[16]; };

#define FIELD(name, type, constraint, value) \
    asm volatile("tensormap.replace.tile." name ".SPACE.b1024." type " [%0], %1;" \
                 :: ADDRESS(to), constraint(value) : "memory")
#define ORDINAL(name, n, type, constraint, value) \
    asm volatile("tensormap.replace.tile." name ".SPACE.b1024." type " [%0], " #n ", %1;" \
                 :: ADDRESS(to), constraint(value) : "memory")
#define FIXED(name, value) \
    asm volatile("tensormap.replace.tile." name ".SPACE.b1024.b32 [%0], " #value ";" \
                 :: ADDRESS(to) : "memory")

// A map of zeros becomes one of float32 [64, 32], box [4, 8].
__device__ void make(WHERE to, const void* tensor) {
    FIELD("global_address", "b64", "l", tensor);
    FIELD("rank", "b32", "r", 1);
    ORDINAL("box_dim", 0, "b32", "r", 8);
    ORDINAL("box_dim", 1, "b32", "r", 4);
    ORDINAL("global_dim", 0, "b32", "r", 32);
    ORDINAL("global_dim", 1, "b32", "r", 64);
    ORDINAL("global_stride", 0, "b64", "l", 128ull);
    ORDINAL("element_stride", 0, "b32", "r", 1);
    ORDINAL("element_stride", 1, "b32", "r", 2);
    FIXED("elemtype", 7);
    FIXED("interleave_layout", 0);
    FIXED("swizzle_mode", 1);
    FIXED("fill_mode", 1);
}
"""

IN_SHARED = (
    MAKE.replace("SPACE", "shared::cta").replace("ADDRESS(to)", '"r"(to)').replace("WHERE", "u32")
    + r"""
// A map is made in shared memory, published in global memory, and used by every block.
extern "C" __global__ void k(const float* tensor, Map* published, float* out) {
    __shared__ Map map;
    __shared__ __align__(1024) float box[64];
    __shared__ u64 bar;
    int t = threadIdx.x;
    if (t < 16) map.words[t] = 0;
    __syncwarp();
    if (t == 0) make(shared_address(&map), tensor);
    __syncwarp();
    asm volatile("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu"
                 ".sync.aligned [%0], [%1], 128;"
                 :: "l"(published + blockIdx.x), "r"(shared_address(&map)) : "memory");
    if (t == 0) {
        asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;"
                     :: "l"(published + blockIdx.x) : "memory");
        init(&bar, 1);
        expect(&bar, 64);
        asm volatile("cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
                     " [%0], [%1, {%3, %4}], [%2];"
                     :: "r"(shared_address(box)), "l"(published + blockIdx.x),
                        "r"(shared_address(&bar)), "r"(8), "r"(3) : "memory");
        wait(&bar, 0);
        for (int i = 0; i < 16; ++i) out[blockIdx.x * 16 + i] = box[i];
    }
}
"""
)

IN_GLOBAL = (
    MAKE.replace("SPACE", "global").replace("ADDRESS(to)", '"l"(to)').replace("WHERE", "Map*")
    + r"""
extern "C" __global__ void k(const float* tensor, Map* map) {
    make(map, tensor);
}
extern "C" __global__ void change(Map* to) {
    ORDINAL("box_dim", 1, "b32", "r", 3);
    FIXED("elemtype", KIND);
}
"""
)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_map_made_in_shared_memory(delivery):
    x = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    device = sim.Device("sm_90a", memory_bytes=1 << 22)
    array, maps = device.upload(x), device.alloc(256, np.uint8)
    _, given, out = launch(IN_SHARED, 2, 32, array, maps, np.zeros(32, np.float32), device=device,
                           delivery=delivery, checks=BOTH)  # fmt: skip
    wanted = sim.tensor_map(array, box_dim=[8, 4], element_strides=[1, 2], swizzle="32B",
                            oob_fill="nan_request_zero_fma")  # fmt: skip
    assert decode(given[:128].tobytes()) == wanted == decode(given[128:].tobytes())
    # Two rows of 32 bytes in one line: no swizzle.
    assert np.array_equal(out.reshape(2, 2, 8), np.stack([x[3:6:2, 8:16]] * 2))


def test_a_map_made_and_changed_in_global_memory():
    device = sim.Device("sm_90a", memory_bytes=1 << 22)
    array, m = device.upload(np.zeros((64, 32), np.float32)), device.upload(np.zeros(128, np.uint8))
    launch(IN_GLOBAL.replace("KIND", "0"), 1, 1, array, m, device=device)
    made = decode(m.get().tobytes())
    assert made.box_dim == (8, 4)
    assert made.data_type == "float32"
    for number, name in enumerate(DATA_TYPES):
        if DATA_TYPES[name] == 4 and "float" in name:
            source = IN_GLOBAL.replace("KIND", str(number))
            launch(source, 1, 1, m, kernel="change", device=device)
            changed = decode(m.get().tobytes())
            assert changed.box_dim == (8, 3)
            assert changed.data_type == name


def test_only_maps_and_zeros_can_be_changed():
    source = IN_GLOBAL.replace("KIND", "0")
    with pytest.raises(sim.KernelTrap, match="no tensor map at"):
        launch(source, 1, 1, np.ones(128, np.uint8), kernel="change")
    device = sim.Device("sm_90a", memory_bytes=1 << 22)
    blank = device.alloc(128, np.uint8)
    with pytest.raises(sim.MemoryFault, match="unwritten"):
        launch(source, 1, 1, blank, kernel="change", device=device)


REFUSED = [
    ("tensormap.replace.tile.swizzle_atomicity.global.b1024.b32 [%rd1], 1;", "swizzle_atomicity"),
    ("tensormap.replace.tile.swizzle_mode.global.b1024.b32 [%rd1], 4;", "0 to 3"),
    ("tensormap.replace.tile.elemtype.global.b1024.b32 [%rd1], 13;", "0 to 12"),
    ("tensormap.replace.tile.box_dim.global.b1024.b32 [%rd1], 5, %r1;", "0 to 4"),
    ("tensormap.replace.tile.global_stride.global.b1024.b64 [%rd1], 4, %rd1;", "0 to 3"),
    ("tensormap.replace.tile.rank.global.b1024.b64 [%rd1], %rd1;", "form"),
    ("tensormap.replace.tile.rank.local.b1024.b32 [%rd1], %r1;", "form"),
    ("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned"
     " [%rd1], [%r1], 64;", "128 bytes"),
    ("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.acquire.gpu.sync.aligned"
     " [%rd1], [%r1], 128;", "form"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_forms_that_are_refused(text, reason):
    with pytest.raises(sim.UnsupportedPTX) as caught:
        sim.load(
            ".version 8.6\n.target sm_90a\n.address_size 64\n.visible .entry k() {\n"
            f".reg .b32 %r<2>; .reg .b64 %rd<2>;\n{text}\nret;\n}}"
        )
    assert reason in str(caught.value)


def test_generic_addresses():
    sim.load(
        ".version 8.6\n.target sm_90a\n.address_size 64\n.visible .entry k() {\n"
        ".reg .b64 %rd<2>;\n"
        "tensormap.replace.tile.global_address.b1024.b64 [%rd1], %rd1;\nret;\n}"
    )
