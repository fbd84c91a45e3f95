"""The heap, and arrays in device memory."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumla.sim.memory import DeviceArray, DeviceMemory
from cumla.sim.memory.arena import WIDEST, Arena
from cumla.sim.memory.device import ALIGN, BASE, GUARD, OutOfMemory
from cumla.sim.memory.heap import REMEMBERED, Heap


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 900), st.booleans()), max_size=60))
def test_heap_hands_out_stretches_that_do_not_overlap(steps: list[tuple[int, bool]]) -> None:
    heap = Heap(4096)
    taken: list[tuple[int, int]] = []
    remembered: set[tuple[int, int]] = set()
    for size, free_one in steps:
        if free_one and taken:
            start, stop = taken.pop(size % len(taken))
            assert heap.give(start, stop - start) == []
            remembered.add((start, stop))
            continue
        found = heap.take(size, 64)
        if found is None:
            # Full even with all that was freed: no gap between the taken ones is large enough.
            edges = [0, *(e for pair in sorted(taken) for e in pair), 4096]
            gaps = zip(edges[::2], edges[1::2], strict=True)
            assert all(-(-a // 64) * 64 + size > b for a, b in gaps)
            remembered.clear()
            continue
        start, forgotten = found
        assert start % 64 == 0
        assert start + size <= 4096
        assert all(start + size <= a or b <= start for a, b in taken)
        remembered -= set(forgotten)
        assert all(start + size <= a or b <= start for a, b in remembered)
        taken.append((start, start + size))


def test_freed_memory_is_not_reused_while_there_is_other_room() -> None:
    memory = DeviceMemory(1 << 16)
    first = memory.alloc(256)
    seen = {first.address}
    first.free()
    for _ in range((1 << 16) // (256 + GUARD) - 1):
        array = memory.alloc(256)
        assert array.address not in seen
        seen.add(array.address)
        array.free()
    assert memory.alloc(256).address in seen


def test_old_freed_stretches_are_forgotten() -> None:
    heap = Heap(1 << 30)
    taken = [heap.take(64, 64) for _ in range(REMEMBERED + 2)]
    starts = [t[0] for t in taken if t is not None]
    forgotten = [heap.give(start, 64) for start in starts]
    assert forgotten == [[]] * REMEMBERED + [[(0, 64)], [(64, 128)]]
    assert heap.take(128, 64) == (0, [])


def test_allocations_are_aligned_with_guards_between_them() -> None:
    memory = DeviceMemory(1 << 20)
    arrays = [memory.alloc(n) for n in (1, 255, 256, 257, 0, 5000)]
    assert all(a.address % ALIGN == 0 for a in arrays)
    edges = [BASE] + [e for a in arrays for e in (a.address, a.address + a.nbytes)]
    assert all(b - a >= GUARD for a, b in zip(edges[::2], edges[1::2], strict=False))


def test_out_of_memory_names_the_numbers() -> None:
    memory = DeviceMemory(1 << 16)
    kept = memory.alloc(40000)
    with pytest.raises(OutOfMemory, match=r"30000 bytes .* 65536 bytes .* 40000 are in use"):
        memory.alloc(30000)
    kept.free()
    assert memory.alloc(60000).nbytes == 60000
    with pytest.raises(ValueError, match="capacity"):
        DeviceMemory(100)


def test_capacity_need_not_be_a_power_of_two() -> None:
    memory = DeviceMemory(5000)
    assert (memory.limit, memory.arena.size) == (8192, 8192)
    with pytest.raises(OutOfMemory):
        memory.alloc(5000)


@pytest.mark.parametrize("dtype", ["u1", "i2", "f2", "f4", "f8", "c16", [("a", "u4"), ("b", "f4")]])
def test_upload_and_get_are_copies(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    host = rng.integers(0, 256, (3, 5, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]
    array = DeviceMemory(1 << 16).upload(host)
    assert (array.shape, array.dtype, array.nbytes) == (host.shape, host.dtype, host.nbytes)
    assert (array.size, array.ndim, len(array)) == (15, 2, 3)
    before = host.tobytes()
    got = array.get()
    got.view(np.uint8)[:] = 0
    host.view(np.uint8)[:] = 1
    assert array.get().tobytes() == before


def test_set_broadcasts_and_refuses_lossy_casts() -> None:
    array = DeviceMemory(1 << 16).alloc((2, 3), np.float32)
    array.set(np.arange(3))
    assert array.get().tolist() == [[0, 1, 2]] * 2
    with pytest.raises(TypeError):
        array.set(np.ones(3, np.complex64))
    with pytest.raises(ValueError, match="broadcast"):
        array.set(np.ones(4, np.float32))


def test_views_share_memory() -> None:
    array = DeviceMemory(1 << 16).upload(np.arange(6, dtype=np.uint32).reshape(2, 3))
    assert array.view(np.uint16).shape == (2, 6)
    assert array.view(np.int32).shape == (2, 3)
    assert array.reshape(-1).get().tolist() == list(range(6))
    assert array.reshape(3, -1).shape == (3, 2)
    array.reshape(6).numpy()[5] = 77
    assert array.get()[1, 2] == 77
    with pytest.raises(ValueError, match="whole number"):
        array.view(np.uint64)
    for shape in ((4,), (-1, 4), (-1, -1), (-2, 3), (0, -1)):
        with pytest.raises(ValueError, match="does not become"):
            array.reshape(*shape)
    with pytest.raises(ValueError, match="negative"):
        array.memory.alloc((-1, 2))
    with pytest.raises(TypeError):
        len(array.memory.alloc(()))


def test_free_ends_an_array_and_all_that_share_it() -> None:
    array = DeviceMemory(1 << 16).upload(np.arange(4))
    other = array.view(np.uint8)
    array.free()
    for use in (other.get, other.numpy, other.free, lambda: other.set(1)):
        with pytest.raises(ValueError, match=r"freed .*test_device_memory\.py"):
            use()


def test_memory_is_freed_with_its_last_array() -> None:
    memory = DeviceMemory(1 << 16)
    view = memory.alloc(100).view(np.uint16)
    gc.collect()
    assert memory.used == 100
    del view
    gc.collect()
    assert memory.used == 0


def test_discarded_pages_read_as_zero() -> None:
    arena = Arena(1 << 21)
    arena.data[:] = 7
    arena.discard(5000, 20000)
    assert set(np.unique(arena.data)) <= {0, 7}
    assert (arena.data[:5000] == 7).all()
    assert (arena.data[20000:] == 7).all()
    small = Arena(100)
    small.discard(0, 100)
    assert small.size % WIDEST == 0


def test_device_arrays_are_printed_with_their_address() -> None:
    array: DeviceArray = DeviceMemory(1 << 16).alloc((2, 3), np.float32, name="w")
    assert repr(array) == f"DeviceArray({array.address:#x}, shape=(2, 3), dtype=float32)"
    assert array.name == "w"
