"""Bulk and tensor copies in clusters: multicast, copies to other blocks' shared memory."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from sim import cuda
from sim.bulk_kit import DELIVERIES, HEAD, launch

BOTH = ("memory", "race")

CLUSTER = r"""
struct alignas(64) Map { u64 words[16]; };
__device__ u32 rank() { u32 r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ u32 far(u32 at, u32 to) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(at), "r"(to));
    return r;
}
__device__ void meet() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
"""

# Each block of a cluster sends one part of 32 words to the blocks of its mask.
MULTICAST = (
    CLUSTER
    + r"""
extern "C" __global__ void k(const u32* in, u32* out, const u32* masks, u32 bytes) {
    __shared__ __align__(128) u32 buffer[4][32];
    __shared__ u64 bar;
    u32 r = rank();
    for (int k = 0; k < 4; ++k) buffer[k][threadIdx.x] = 7;
    if (threadIdx.x == 0) init(&bar, 1);
    proxy_fence();
    meet();
    if (threadIdx.x == 0) {
        u32 mine = 0;
        for (int k = 0; k < 4; ++k) mine += masks[k] >> r & 1;
        expect(&bar, bytes * mine);
        unsigned short mask = masks[r];
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".multicast::cluster [%0], [%1], %2, [%3], %4;"
                     :: "r"(shared_address(buffer[r])), "l"(in + 32 * r), "r"(bytes),
                        "r"(shared_address(&bar)), "h"(mask) : "memory");
    }
    wait(&bar, 0);
    out += blockIdx.x * 128 + threadIdx.x;
    for (int k = 0; k < 4; ++k) out[k * 32] = buffer[k][threadIdx.x];
    meet();
}
"""
)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("masks", [(15, 15, 15, 15), (1, 2, 4, 8), (8, 15, 3, 6), (0, 0, 1, 15)])
def test_multicast(delivery, masks):
    x = np.arange(128, dtype=np.uint32) + 100
    _, out, _ = launch(
        MULTICAST, 8, 32, x, np.zeros(8 * 128, np.uint32), np.array(masks, np.uint32), 128,
        cluster=4, delivery=delivery, checks=BOTH,
    )  # fmt: skip
    out = out.reshape(2, 4, 4, 32)
    for part, mask in enumerate(masks):
        for block in range(4):
            wanted = x.reshape(4, 32)[part] if mask >> block & 1 else np.full(32, 7)
            assert (out[:, block, part] == wanted).all()


def test_who_got_a_multicast_knows_that_it_was_read():
    """Any of the blocks may change the source afterwards, once it has waited."""
    source = MULTICAST.replace("    meet();\n}", "    if (r == 2) ((u32*)in)[threadIdx.x] = 1;\n"
                               "    meet();\n}")  # fmt: skip
    x = np.zeros(128, np.uint32)
    args = (x, np.zeros(512, np.uint32), np.array([15, 0, 0, 0], np.uint32), 128)
    launch(source, 4, 32, *args, cluster=4, checks=BOTH)
    with pytest.raises(sim.RaceError, match="asynchronous read"):
        launch(source.replace("wait(&bar, 0);", "if (r != 2) wait(&bar, 0);"), 4, 32, *args,
               cluster=4, checks=BOTH)  # fmt: skip


def test_multicast_beyond_the_cluster():
    x = np.zeros(128, np.uint32)
    with pytest.raises(sim.KernelTrap, match="blocks 0x0010 of a cluster of 4"):
        launch(MULTICAST, 4, 32, x, np.zeros(512, np.uint32), np.array([16, 1, 1, 1], np.uint32),
               128, cluster=4)  # fmt: skip


def test_multicast_to_a_block_that_has_ended():
    source = MULTICAST.replace("    if (threadIdx.x == 0) {\n        u32 mine", """
    if (r == 2) return;
    meet();
    if (threadIdx.x == 0) {
        u32 mine""").replace("    meet();\n}", "}")  # fmt: skip
    x = np.zeros(128, np.uint32)
    with pytest.raises(sim.KernelTrap, match="block of rank 2, which has exited"):
        launch(source, 4, 32, x, np.zeros(512, np.uint32), np.array([15, 1, 1, 1], np.uint32), 128,
               cluster=4)  # fmt: skip


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_multicast_wants_a_barrier_in_every_block(delivery):
    """It says so at issue, whether or not anybody waits."""
    source = MULTICAST.replace("if (threadIdx.x == 0) init", "if (threadIdx.x == 0 && r != 2) init")
    source = source.replace("expect(&bar, bytes * mine)", "if (r == 0) expect(&bar, bytes * mine)")
    source = source.replace("wait(&bar, 0);", "meet();")
    x = np.zeros(128, np.uint32)
    with pytest.raises(sim.KernelTrap, match="no mbarrier at shared 0x2000"):
        launch(source, 4, 32, x, np.zeros(512, np.uint32), np.array([15, 0, 0, 0], np.uint32), 128,
               cluster=4, delivery=delivery)  # fmt: skip


def test_a_multicast_lands_where_somebody_waits():
    """Though another block that it goes to has ended, which the race detector would find."""
    source = MULTICAST.replace("wait(&bar, 0);", "if (r == 1) return; wait(&bar, 0);")
    source = source.replace("    meet();\n}", "}")
    x = np.arange(128, dtype=np.uint32)
    for delivery in DELIVERIES:
        *_, out, _ = launch(source, 4, 32, x, np.zeros(512, np.uint32),
                            np.array([15, 0, 0, 0], np.uint32), 128,
                            cluster=4, delivery=delivery)  # fmt: skip
        found = out.reshape(4, 4, 32)[:, 0]
        assert found.tolist() == [x[:32].tolist() if r != 1 else [0] * 32 for r in range(4)]


def test_a_block_that_got_too_little_waits_for_ever():
    x = np.zeros(128, np.uint32)
    with pytest.raises(sim.Deadlock, match="bytes missing"):
        launch(MULTICAST.replace("bytes * mine", "bytes * mine + 16 * r"), 4, 32, x,
               np.zeros(512, np.uint32), np.array([15, 15, 15, 15], np.uint32), 128,
               cluster=4)  # fmt: skip


TENSOR = (
    CLUSTER
    + r"""
extern "C" __global__ void k(const __grid_constant__ Map map, u32* out) {
    __shared__ __align__(1024) u32 buffer[256];
    __shared__ u64 bar;
    if (threadIdx.x == 0) init(&bar, 1);
    meet();
    if (threadIdx.x == 0) {
        expect(&bar, 1024);
        // Each block sends half of a box to both.
        u32 r = rank();
        unsigned short mask = 3;
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
                     :: "r"(shared_address(buffer + 128 * r)), "l"(&map), "r"(shared_address(&bar)),
                        "r"(8), "r"(4 * (int)r), "h"(mask) : "memory");
    }
    wait(&bar, 0);
    for (int i = threadIdx.x; i < 256; i += 32) out[blockIdx.x * 256 + i] = buffer[i];
    meet();
}
"""
)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_tensor_multicast(delivery):
    x = np.arange(16 * 64, dtype=np.uint32).reshape(16, 64)
    device = sim.Device("sm_90a", memory_bytes=1 << 22)
    array = device.upload(x)
    m = sim.tensor_map(array, box_dim=[32, 4])
    (out,) = launch(TENSOR, 2, 32, m, np.zeros(512, np.uint32), cluster=2, device=device,
                    delivery=delivery, checks=BOTH)  # fmt: skip
    assert np.array_equal(out.reshape(2, 8, 32), np.stack([x[:8, 8:40]] * 2))


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_copy_lands_though_a_neighbour_has_ended(delivery):
    source = TENSOR.replace("mask = 3", "mask = 1 << r").replace("(&bar, 1024)", "(&bar, 512)")
    source = source.replace("wait(&bar, 0);", "if (rank() == 0) return; wait(&bar, 0);")
    source = source.replace("    meet();\n}", "}")
    x = np.arange(16 * 64, dtype=np.uint32).reshape(16, 64)
    device = sim.Device("sm_90a", memory_bytes=1 << 22)
    m = sim.tensor_map(device.upload(x), box_dim=[32, 4])
    (out,) = launch(source, 2, 32, m, np.zeros(512, np.uint32), cluster=2, device=device,
                    delivery=delivery, checks=())  # fmt: skip
    assert np.array_equal(out[384:].reshape(4, 32), x[4:8, 8:40])


def test_counters_of_multicast():
    x = np.arange(16 * 64, dtype=np.uint32).reshape(16, 64)
    device = sim.Device("sm_90a", memory_bytes=1 << 22)
    array = device.upload(x)
    m = sim.tensor_map(array, box_dim=[32, 4])
    kernel = device.load(cuda.ptx(HEAD + TENSOR)).kernel("k")
    out = device.upload(np.zeros(512, np.uint32))
    total = kernel.launch(2, 32, [m, out], cluster=2, counters=True).counters.total()
    assert total.bulk_bytes == 2 * 2 * 512
    assert total.bulk_sectors == 2 * 512 // 32
    assert total.multicast_bytes_saved == 2 * 512


# Block 0 sends its shared memory to the others, or adds it to theirs.
SEND = (
    CLUSTER
    + r"""
extern "C" __global__ void k(const u32* in, u32* out) {
    __shared__ __align__(128) u32 source[64], target[64];
    __shared__ u64 bar;
    int t = threadIdx.x;
    source[t] = in[t];
    target[t] = 1000 + t;
    if (t == 0) { init(&bar, 1); expect(&bar, 256); }
    proxy_fence();
    meet();
    if (t == 0) {
        u32 to = (rank() + 1) % 3;
        asm volatile("cp.OP" :: "r"(far(shared_address(target), to)), "r"(shared_address(source)),
                     "r"(256), "r"(far(shared_address(&bar), to)) : "memory");
    }
    wait(&bar, 0);
    out[blockIdx.x * 64 + t] = target[t] + 10000 * rank();
    meet();
}
"""
)
COPY = "async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
ADD = (
    "reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u32"
    " [%0], [%1], %2, [%3];"
)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("op", [COPY, ADD])
def test_copies_to_other_blocks(delivery, op):
    x = np.arange(64, dtype=np.uint32)
    _, out = launch(SEND.replace("OP", op), 3, 64, x, np.zeros(192, np.uint32), cluster=3,
                    delivery=delivery, checks=BOTH)  # fmt: skip
    base = x if op is COPY else 1000 + 2 * x
    assert np.array_equal(out.reshape(3, 64), base + 10000 * np.arange(3, dtype=np.uint32)[:, None])


def test_copies_beyond_the_cluster():
    x = np.arange(64, dtype=np.uint32)
    source = SEND.replace("OP", COPY).replace(
        "far(shared_address(target), to)", "(5u << 24 | 0x400)"
    )
    with pytest.raises(sim.MemoryFault, match="rank 5 of a cluster of 3"):
        launch(source, 3, 64, x, np.zeros(192, np.uint32), cluster=3)


def test_a_peer_that_leaves_early():
    """A block that exits while a copy to it is under way: its shared memory is gone."""
    source = SEND.replace("OP", COPY).replace("wait(&bar, 0);", "if (rank() == 1) return;"
                                              " wait(&bar, 0);")  # fmt: skip
    source = source.replace("    meet();\n}", "}")
    x = np.arange(64, dtype=np.uint32)
    with pytest.raises(sim.RaceError, match="exit"):
        launch(source, 3, 64, x, np.zeros(192, np.uint32), cluster=3, checks=BOTH)


# No block writes its buffer before, so only the barrier tells that the blocks have not met.
UNMET = (
    CLUSTER
    + r"""
extern "C" __global__ void k(const u32* in, u32* out) {
    __shared__ __align__(128) u32 buffer[32];
    __shared__ u64 bar;
    if (threadIdx.x == 0) {
        init(&bar, 1);  // INIT
        expect(&bar, 128);
    }
    MEET;
    if (threadIdx.x == LANE && rank() == 0)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".multicast::cluster [%0], [%1], 128, [%2], %3;"
                     :: "r"(shared_address(buffer)), "l"(in), "r"(shared_address(&bar)),
                        "h"((unsigned short)3) : "memory");
    wait(&bar, 0);
    out[blockIdx.x * 32 + threadIdx.x] = buffer[threadIdx.x];
    meet();
}
"""
)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize(
    ("met", "lane", "races"), [("meet()", 5, False), ("__syncthreads()", 0, True), ("", 1, True)]
)
def test_barriers_must_have_been_made_before(
    met: str, lane: int, races: bool, delivery: str
) -> None:
    source = UNMET.replace("MEET", met).replace("LANE", str(lane))
    x = np.arange(32, dtype=np.uint32)
    how = {"cluster": 2, "checks": BOTH, "delivery": delivery}
    if not races:
        _, out = launch(source, 2, 32, x, np.zeros(64, np.uint32), **how)
        assert np.array_equal(out, np.tile(x, 2))
        return
    with pytest.raises(sim.RaceError, match="asynchronous arrival") as caught:
        launch(source, 2, 32, x, np.zeros(64, np.uint32), **how)
    assert f"k.cu:{cuda.line_of(HEAD + source, '// INIT')})" in str(caught.value)
