"""The race detector: what it says, CUDA's idioms of synchronisation, and its corners."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from cumla import sim
from cumla.sim.cohort import Cohort
from cumla.sim.errors import LaunchError
from cumla.sim.ptx.syntax import Instruction, SourceLine
from cumla.sim.race import RaceDetector
from cumla.sim.race.clock import Clock, Part, merged
from sim import cuda

ALL = np.array([0xFFFFFFFF], np.uint32)


@cache
def ins(line):
    text = "st.shared.u32 [%r1], %r2;"
    return Instruction("st", (), (), None, line, SourceLine("k.cu", line), text, line)


class Launch:
    """A detector and the wave it watches."""

    def __init__(self, blocks=1, block=(64, 1, 1), grid=None, stride=4096):
        threads = int(np.prod(block))
        lanes = -(-threads // 32) * 32
        self.lanes = lanes
        self.grid = grid or (blocks, 1, 1)
        self.block = block
        self.stride = stride
        self.wave = self.make(np.arange(blocks))
        self.detector = RaceDetector(self.wave)

    def make(self, block_ids):
        threads = int(np.prod(self.block))
        live = np.tile(np.arange(self.lanes) < threads, len(block_ids))
        return SimpleNamespace(
            grid=self.grid,
            block=self.block,
            block_ids=np.asarray(block_ids),
            lanes_per_block=self.lanes,
            threads_per_block=threads,
            live=live,
            cluster_size=1,
            shared_start=0,
            shared_stride=self.stride,
            shared_size=self.stride,
        )

    def next_wave(self, block_ids):
        self.wave = self.make(block_ids)
        self.detector.next_wave(self.wave)

    def cohort(self, gids=None):
        gids = np.flatnonzero(self.wave.live) if gids is None else np.asarray(gids, np.int64)
        return Cohort(self.wave, gids, [])

    def access(self, line, kind, offsets, gids=None, space="shared", nbytes=4, order="weak"):
        cohort = self.cohort(gids)
        offsets = np.broadcast_to(np.asarray(offsets, np.int64), cohort.gids.shape)
        scope = "gpu" if order != "weak" else "cta"
        self.detector.access(ins(line), cohort, space, offsets, nbytes, kind, order, scope)

    def write(self, line, offsets, gids=None, **more):
        self.access(line, "write", offsets, gids, **more)

    def read(self, line, offsets, gids=None, **more):
        self.access(line, "read", offsets, gids, **more)

    def barrier(self, gids=None):
        self.detector.barrier(self.cohort(gids).gids)

    @property
    def races(self):
        return self.detector.races()


# What a race says


def test_text():
    launch = Launch(block=(16, 4, 1))
    launch.write(12, 0x40, [19])
    launch.read(15, 0x40, [36])
    (race,) = launch.races
    assert str(race) == (
        "shared memory race at offset 0x40 (4 bytes): write by thread (3, 1, 0) of block (0, 0, 0) "
        "at k.cu:12, then read by thread (4, 2, 0) at k.cu:15, nothing orders them; "
        "__syncthreads or another barrier missing between them"
    )
    assert (race.space, race.offset, race.nbytes, race.count) == ("shared", 0x40, 4, 1)
    assert (race.first.kind, race.first.thread, race.first.block) == ("write", (3, 1, 0), (0, 0, 0))
    assert (race.second.kind, race.second.thread) == ("read", (4, 2, 0))
    assert (race.first.line, race.second.line) == ("k.cu:12", "k.cu:15")
    assert race.first.text == "st.shared.u32 [%r1], %r2;"


def test_text_names_blocks_and_counts():
    launch = Launch(blocks=6, grid=(2, 3, 1))
    launch.read(7, 0x1000 + 4 * np.arange(4), [0, 1, 2, 3], space="global")
    launch.write(9, 0x1000, [3 * 64 + 5], space="global", nbytes=16)
    launch.write(9, 0x1000, [3 * 64 + 6], space="global", nbytes=16)
    first, second = launch.races
    assert str(first) == (
        "global memory race at offset 0x1000 (4 bytes): read by thread (0, 0, 0) of block "
        "(0, 0, 0) at k.cu:7, then write by thread (5, 0, 0) of block (1, 1, 0) at k.cu:9, "
        "nothing orders them; "
        "between blocks only a release (__threadfence before an atomic) and an acquire order "
        "accesses (4 such conflicts)"
    )
    assert second.nbytes == 16
    assert (second.first.kind, second.second.thread) == ("write", (6, 0, 0))


def test_shared_offset_is_in_the_blocks_own_memory():
    launch = Launch(blocks=3)
    launch.write(1, 2 * 4096 + 8, [130])
    launch.write(2, 2 * 4096 + 8, [170])
    (race,) = launch.races
    assert race.offset == 8
    assert race.first.block == (2, 0, 0)


@pytest.mark.parametrize(
    ("other", "hint"),
    [(1, "__syncwarp"), (40, "__syncthreads or"), (70, "__threadfence")],
)
def test_hint_tells_how_far_apart_the_threads_are(other, hint):
    launch = Launch(blocks=2)
    launch.write(1, 0, [0], space="global")
    launch.write(2, 0, [other], space="global")
    (race,) = launch.races
    assert hint in race.hint


def test_example_is_the_conflict_that_takes_most_to_order():
    launch = Launch()
    launch.write(1, 4 * np.arange(64))
    launch.read(2, 4 * ((np.arange(64) + 1) % 64))
    (race,) = launch.races
    assert race.count == 64
    assert race.first.thread[0] // 32 != race.second.thread[0] // 32
    assert "__syncthreads" in race.hint


def test_example_is_of_two_blocks_before_two_warps():
    launch = Launch(blocks=2)
    launch.write(1, [0, 4], [0, 1], space="global")
    launch.read(2, [0, 4], [40, 70], space="global")
    (race,) = launch.races
    assert (race.offset, race.count, race.second.block) == (4, 2, (1, 0, 0))


def test_two_lanes_of_one_instruction():
    launch = Launch()
    launch.write(3, 8, [2, 5])
    (race,) = launch.races
    assert race.hint == "both threads write in one instruction"
    assert {race.first.thread, race.second.thread} == {(2, 0, 0), (5, 0, 0)}


def test_scope_too_narrow():
    launch = Launch(blocks=2)
    for gid in (0, 64):
        cohort = launch.cohort([gid])
        launch.detector.access(
            ins(4), cohort, "global", np.zeros(1, np.int64), 4, "atomic", "relaxed", "cta"
        )
    (race,) = launch.races
    assert race.hint == "a scope of .cta does not include the other block"


def test_races_are_told_once_for_each_pair_of_instructions():
    launch = Launch()
    for _ in range(3):
        launch.write(1, 0, [0])
        launch.read(2, 0, [1])
    assert [(r.first.line, r.second.line, r.count) for r in launch.races] == [
        ("k.cu:1", "k.cu:2", 3),
        ("k.cu:2", "k.cu:1", 2),
    ]


# CUDA's idioms, silent as they should be written and told without -DFIXED

IDIOMS = {
    "reduction by the last block": """
extern "C" __global__ void k(int* out, int* count) {
    __shared__ bool last;
    __shared__ int s[64];
    out[blockIdx.x * 64 + threadIdx.x + 1] = threadIdx.x;
#ifdef FIXED
    __threadfence();
#endif
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(count, 1) == gridDim.x - 1;
    __syncthreads();
    if (last) {
        int sum = 0;
        for (int i = threadIdx.x; i < gridDim.x * 64; i += 64) sum += out[i + 1];
        s[threadIdx.x] = sum;
        __syncthreads();
        for (int i = 1; i < 64; ++i) sum += s[(threadIdx.x + i) % 64];
        if (threadIdx.x == 0) out[0] = sum, *count = 0;
    }
}""",
    "spin lock": """
extern "C" __global__ void k(int* out, int* count) {
    if (threadIdx.x == 0) {
        while (atomicCAS(count, 0, 1) != 0);
        __threadfence();
        out[0] += 2016;
#ifdef FIXED
        __threadfence();
#endif
        atomicExch(count, 0);
    }
}""",
    "barrier of the grid": """
__device__ void everyone(int* count, int n) {
    __syncthreads();
    if (threadIdx.x == 0) {
#ifdef FIXED
        __threadfence();
#endif
        atomicAdd(count, 1);
        while (*(volatile int*)count < n);
        __threadfence();
    }
    __syncthreads();
}
extern "C" __global__ void k(int* out, int* count) {
    int i = blockIdx.x * 64 + threadIdx.x, n = gridDim.x * 64;
    out[i + 1] = threadIdx.x;
    everyone(count, gridDim.x);
    int x = out[n - i];
    everyone(count, 2 * gridDim.x);
    out[i + 1] = x;
    everyone(count, 3 * gridDim.x);
    if (i == 0) out[0] = out[1] == 63 && out[n] == 0 ? 2016 * gridDim.x : -1;
}""",
    "flag with release and acquire": """
extern "C" __global__ void k(int* out, int* count) {
    if (blockIdx.x == 0) {
        out[threadIdx.x + 1] = threadIdx.x;
        __syncthreads();
        if (threadIdx.x == 0) {
#ifdef FIXED
            asm volatile("st.release.gpu.u32 [%0], 1;" :: "l"(count) : "memory");
#else
            asm volatile("st.relaxed.gpu.u32 [%0], 1;" :: "l"(count) : "memory");
#endif
        }
    } else if (blockIdx.x == 1) {
        int ready;
        do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(ready) : "l"(count) : "memory");
        while (!ready);
        int sum = 0;
        for (int i = 0; i < 64; ++i) sum += out[i + 1];
        if (threadIdx.x == 0) out[0] = sum * gridDim.x;
    }
}""",
}


def run(source, blocks, *options, wave_blocks=None):
    module = cuda.load(source, *options)
    out = module.device.upload(np.zeros(64 * blocks + 1, np.int32))
    count = module.device.upload(np.zeros(1, np.int32))
    module.kernel("k").launch(
        blocks, 64, [out, count], checks={"memory", "race"}, wave_blocks=wave_blocks
    )
    return int(out.get()[0])


@pytest.mark.parametrize("blocks", [2, 66])
@pytest.mark.parametrize("idiom", IDIOMS)
def test_idiom(idiom, blocks):
    assert run(IDIOMS[idiom], blocks, "-DFIXED") == 2016 * blocks
    with pytest.raises(sim.RaceError, match="global memory race"):
        run(IDIOMS[idiom], blocks)


def test_blocks_of_different_waves():
    source = IDIOMS["reduction by the last block"]
    assert run(source, 20, "-DFIXED", wave_blocks=3) == 2016 * 20
    with pytest.raises(sim.RaceError, match="global memory race"):
        run(source, 20, wave_blocks=3)


def test_shared_memory_of_another_wave_is_other_memory():
    launch = Launch(blocks=1, grid=(2, 1, 1))
    launch.write(1, 0, [3])
    launch.write(1, 0, [3], space="global")
    launch.next_wave([1])
    launch.read(2, 0, [4])
    assert not launch.races
    launch.read(2, 0, [4], space="global")
    (race,) = launch.races
    assert (race.first.block, race.second.block) == ((0, 0, 0), (1, 0, 0))


# Asynchronous copies


def issue(launch, gids, offsets, nbytes=16):
    cohort = launch.cohort(gids)
    return launch.detector.copy_issued(ins(5), cohort, np.asarray(offsets, np.int64), nbytes)


@pytest.mark.parametrize("reader", [0, 1])
def test_copy_that_was_not_waited_for(reader):
    launch = Launch()
    issue(launch, [0], [32])
    launch.barrier()
    launch.read(6, 40, [reader])
    (race,) = launch.races
    assert race.first.kind == "asynchronous copy"
    assert race.hint == "the asynchronous copy was not waited for"


def test_copy_waited_for_is_a_write_of_its_thread():
    launch = Launch()
    copy = issue(launch, [0, 1], [32, 48])
    launch.detector.copy_landed(copy, np.array([True, False]))
    launch.read(6, 32, [0])
    assert not launch.races
    launch.read(7, 32, [1])
    launch.barrier()
    launch.read(8, 44, [2])
    launch.read(9, 48, [1])
    assert [r.second.line for r in launch.races] == ["k.cu:7", "k.cu:9"]


@pytest.mark.parametrize("nbytes", [16, np.array([4, 12])])
def test_copy_that_completes_a_phase_is_known_with_the_phase(nbytes):
    launch = Launch()
    copy = issue(launch, [0, 33], [0, 16], nbytes)
    launch.detector.copy_released(copy, None, np.array([7, 8]))
    launch.detector.acquire(np.array([40]), 7)
    launch.barrier([40, 41])
    for gid in (40, 41):
        launch.read(6, 0, [gid])
    assert not launch.races
    launch.read(7, 0, [0])  # not even who started it knows
    launch.read(8, 24, [41])
    launch.detector.acquire(np.array([50]), np.array([8]))
    launch.read(9, 24, [50])
    launch.barrier()
    launch.write(10, 24, [1])  # what one thread knew all know now
    lines = [(r.second.line, r.first.thread) for r in launch.races]
    assert lines == [("k.cu:7", None), ("k.cu:8", None)]
    assert "of block (0, 0, 0) at k.cu:5" in str(launch.races[0])


def test_copy_of_two_phases_and_of_its_thread():
    launch = Launch()
    copy = issue(launch, [0], [0])
    mask = np.array([True])
    launch.detector.copy_released(copy, mask, 7)
    launch.detector.copy_released(copy, mask, np.array([8]))
    launch.detector.acquire(np.array([40]), 8)
    launch.read(6, 0, [40])
    launch.detector.copy_landed(copy, mask)
    launch.read(7, 0, [0])
    assert not launch.races


def test_waiting_for_another_copy_does_not_help():
    launch = Launch()
    for stage in range(4):
        copy = issue(launch, [0], [16 * stage])
        launch.detector.copy_released(copy, None, stage)
    launch.detector.acquire(np.array([40]), 3)
    launch.read(6, 48, [40])
    assert not launch.races
    launch.read(7, 32, [40])
    assert len(launch.races) == 1


def test_bytes_of_a_copy_beside_a_race():
    launch = Launch()
    copy = issue(launch, [0], [0])
    launch.write(6, 5, [1], nbytes=1)
    assert launch.races[0].offset == 5
    launch.detector.copy_landed(copy, None)
    launch.read(7, 8, [0])
    launch.read(8, 4, [0], nbytes=1)
    launch.read(9, 6, [0], nbytes=2)
    assert len(launch.races) == 1


def test_what_one_clock_covers_may_lack_a_copy():
    known = np.zeros(64 + 32, np.int32)
    known[3] = 5
    known[64] = 4
    old = Clock({0: Part(known, 64)}, 64)
    new = Clock({0: Part(np.where(np.arange(96) < 64, 9, 0).astype(np.int32), 64)}, 64)
    for both in (merged(old, new), merged(new, old)):
        assert both.parts[0].row[[3, 64]].tolist() == [9, 4]
    assert merged(new, Clock({0: Part(np.full(96, 0, np.int32), 64)}, 64)) is new


def test_forgotten_key_orders_nothing():
    launch = Launch()
    launch.write(1, 0, [0])
    launch.detector.release(np.array([0]), 5)
    launch.detector.forget(5)
    launch.detector.acquire(np.array([1]), 5)
    launch.read(2, 0, [1])
    assert len(launch.races) == 1


# Corners of the state


@pytest.mark.parametrize("nbytes", [1, 2])
def test_neighbours_in_a_word(nbytes):
    launch = Launch()
    launch.write(1, nbytes * np.arange(64), nbytes=nbytes)
    launch.write(2, nbytes * np.arange(64), nbytes=nbytes)
    assert not launch.races
    launch.read(3, 0, [0])
    (race,) = launch.races
    # The bytes of one pair of threads.
    assert race.nbytes == nbytes
    assert race.offset == nbytes * race.first.thread[0]
    assert race.count == 4 // nbytes - 1


def test_divided_words_are_united():
    launch = Launch()
    launch.write(1, np.arange(64), nbytes=1)
    words = launch.detector._shared.words
    assert words.writes[0] > 1 << 61
    launch.barrier()
    launch.read(2, 16 * (np.arange(64) % 4), nbytes=16)
    assert words.writes[0] == 0
    assert not launch.races
    launch.write(3, np.arange(8), np.arange(8), nbytes=1)
    launch.write(4, 0, [7], nbytes=4)
    assert 0 < words.writes[0] < 1 << 61


def test_scattered_global_memory():
    launch = Launch(blocks=2)
    far = np.arange(64) * 999_983 * 64 // 64 * 4
    launch.write(1, far, np.arange(64), space="global")
    launch.read(2, far[::-1], 64 + np.arange(64), space="global")
    (race,) = launch.races
    assert race.count == 64
    assert race.offset in far
    # States are kept for the pages touched, not for all that lies between.
    assert launch.detector._global.words.writes.nbytes < far.max() // 4


def test_wide_access_across_pages():
    launch = Launch()
    launch.write(1, (1 << 16) + 100, [0], space="global")
    launch.read(2, (1 << 16) - 128, [1], space="global", nbytes=256)
    (race,) = launch.races
    assert (race.offset, race.nbytes) == ((1 << 16) + 100, 4)


@pytest.mark.parametrize("reads", [3, 300])
def test_one_of_many_readers_is_not_ordered(reads):
    launch = Launch(blocks=1)
    for _ in range(reads):
        launch.read(1, 0)
    launch.barrier(np.arange(63))  # all but thread 63
    launch.write(2, 0, [4])
    (race,) = launch.races
    assert race.first.thread == (63, 0, 0)


def test_full_log_hides_but_does_not_invent(monkeypatch):
    monkeypatch.setattr("cumla.sim.race.detector._LOG_LIMIT", 256)
    launch = Launch(blocks=2)
    monkeypatch.undo()
    for _ in range(100):
        launch.read(1, 4 * np.arange(128) % 32, space="global")
    log = launch.detector._global.words.log
    assert len(log) <= 256
    launch.write(2, 0, [3], space="global")
    assert len(launch.races) == 1


def test_rows_are_collected():
    launch = Launch(blocks=4)
    gids = np.arange(256)
    keys = gids // 64
    some = gids[gids % 64 < 48]
    for i in range(300):
        launch.write(1, 4096 * (some // 64) + 4 * (some % 64), some)
        launch.barrier(some)
        launch.read(2, 4096 * (some // 64) + 4 * ((some + i) % 48), some)
        launch.detector.release(some, keys[some])
        launch.detector.acquire(some, keys[some])
    assert not launch.races
    assert launch.detector._clocks.rows.data.shape[0] <= 256


def test_released_rows_outlive_collections():
    launch = Launch()
    launch.write(1, 0, [0])
    launch.detector.release(np.array([0]), 5)
    some = np.arange(10, 20)
    for _ in range(200):
        launch.barrier(some)
        launch.barrier(some[::2])
    launch.detector.acquire(np.array([1]), 5)
    launch.read(2, 0, [1])
    assert not launch.races
    launch.read(3, 0, [2])
    assert len(launch.races) == 1


def test_reads_are_noted_before_the_log_is_searched_for_writes():
    launch = Launch()
    launch.read(1, 0)
    launch.detector.release(np.arange(64), 1)
    launch.detector.acquire(np.array([3]), 1)
    launch.write(2, 0, [3])  # all readers are known
    launch.read(3, 4)
    launch.access(4, "atomic", 8, [0, 1, 3], order="relaxed")
    launch.barrier([0, 1, 3])
    launch.read(5, 8, [3])  # looks for the atomics
    assert not launch.races
    launch.write(6, 4, [3])
    (race,) = launch.races
    assert race.first.line == "k.cu:3"


def test_exited_threads_count_for_barriers():
    launch = Launch()
    launch.write(1, 4 * np.arange(64))
    launch.wave.live[40:] = False
    launch.barrier()
    launch.read(2, 4 * np.arange(24, 64), np.arange(40))
    assert not launch.races


def test_single_warp_blocks_meet_at_syncwarp():
    launch = Launch(blocks=2, block=(32, 1, 1))
    launch.write(1, 4096 * (np.arange(64) // 32) + 4 * (np.arange(64) % 32))
    launch.detector.warp_sync(launch.cohort(), ALL)
    launch.read(2, 4096 * (np.arange(64) // 32) + 4 * (31 - np.arange(64) % 32))
    assert not launch.races


def test_warp_lockstep_is_not_synchronisation():
    launch = Launch(block=(32, 1, 1))
    launch.write(1, 4 * np.arange(32))
    launch.read(2, 4 * (31 - np.arange(32)))
    (race,) = launch.races
    assert race.hint == "__syncwarp missing between them"


def test_too_many_blocks():
    with pytest.raises(LaunchError, match="too many for race checks"):
        Launch(block=(1024, 1, 1), grid=(1 << 30, 1, 1), blocks=1)
