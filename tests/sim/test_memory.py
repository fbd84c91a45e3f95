"""Device memory, and reads and writes of every space against plain byte strings."""

from __future__ import annotations

import gc
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumla.sim.errors import MemoryFault
from cumla.sim.isa.table import Env
from cumla.sim.memory import DeviceArray, DeviceMemory
from cumla.sim.memory.access import reader, writer
from cumla.sim.memory.arena import WIDEST, Arena
from cumla.sim.memory.device import ALIGN, BASE, GUARD, OutOfMemory
from cumla.sim.memory.heap import REMEMBERED, Heap
from cumla.sim.memory.spaces import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from cumla.sim.ptx.syntax import Instruction, SourceLine
from sim.lanes import addresses, lanes
from sim.waves import Recorder

INS = Instruction("ld", (), (), None, 9, SourceLine("k.cu", 5), "ld", 0)
UNCHECKED = Env(90)
CHECKED = Env(90, check_memory=True)
ENVS = [UNCHECKED, CHECKED]
FORMS = [
    (dtype, count)
    for dtype in ("u1", "u2", "u4", "u8", "f4", "f8", "i1", "i2")
    for count in (1, 2, 4, 8)
    if np.dtype(dtype).itemsize * count <= 32
]


# Addresses


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


# Arrays


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
        with pytest.raises(ValueError, match=r"freed .*test_memory\.py"):
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


# Reads and writes against byte strings

SPACES = ("global", "shared", "local", "generic shared", "generic local", "generic global")


class Model:
    """Every lane's memory as a bytearray of its own owner, and the addresses that name it."""

    def __init__(self, space: str, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.memory = DeviceMemory(1 << 20)
        gids = np.sort(self.rng.choice(128, 90, replace=False))
        self.c = lanes(64, 2, memory=self.memory, shared=512, local=512, gids=gids)
        self.space = space.split()[0]
        kind = space.split()[-1]
        self.array = self.memory.alloc(512, name="x")
        starts = {"global": self.array.address, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
        plain = self.space == "generic" or kind == "global"
        self.start = starts[kind] if plain else 0
        owners = {"global": gids * 0, "shared": gids // 64, "local": gids}
        self.owner = owners[kind].tolist()
        self.bytes = {o: bytearray(512) for o in self.owner}

    def fill(self, env: Env) -> None:
        """Write all that can be read, byte by byte, as the lanes would."""
        write = writer(INS, env, self.space, np.dtype("u1"))
        for at in range(512):
            value = self.rng.integers(0, 256, self.c.n, np.uint8)
            write(self.c, addresses(self.start + at), (value,))
            for owner, v in zip(self.owner, value.tolist(), strict=True):
                self.bytes[owner][at] = v

    def random(self, width: int) -> tuple[Any, list[int]]:
        at = self.rng.integers(0, 512 // width, self.c.n) * width
        return at + self.start, at.tolist()

    def read(self, at: list[int], dtype: Any, count: int) -> list[bytes]:
        """What each element of each lane's row holds: element k of lane i at [k * n + i]."""
        size = np.dtype(dtype).itemsize
        rows = [
            bytes(self.bytes[owner][a : a + size * count])
            for owner, a in zip(self.owner, at, strict=True)
        ]
        return [row[k * size : k * size + size] for k in range(count) for row in rows]


@pytest.mark.parametrize("env", ENVS, ids=["unchecked", "checked"])
@pytest.mark.parametrize("space", SPACES)
def test_reads_give_the_bytes_at_each_lanes_address(space: str, env: Env) -> None:
    model = Model(space)
    model.fill(env)
    for dtype, count in FORMS:
        read = reader(INS, env, model.space, np.dtype(dtype), count)
        address, at = model.random(np.dtype(dtype).itemsize * count)
        values = read(model.c, address)
        assert len(values) == count
        assert all(v.dtype == np.dtype(dtype) and v.flags.c_contiguous for v in values)
        assert [v.tobytes() for v in np.concatenate(values)] == model.read(at, dtype, count)


@pytest.mark.parametrize("env", ENVS, ids=["unchecked", "checked"])
@pytest.mark.parametrize("space", SPACES)
def test_of_writes_to_one_address_the_highest_lane_wins(space: str, env: Env) -> None:
    model = Model(space)
    model.fill(env)
    c = model.c
    for dtype, count in FORMS:
        size = np.dtype(dtype).itemsize
        write = writer(INS, env, model.space, np.dtype(dtype), count)
        # Few addresses, so that many lanes meet.
        at = (model.rng.integers(0, 9, c.n) * size * count).tolist()
        raw = model.rng.integers(0, 256, (count, c.n, size), np.uint8)
        values = tuple(np.ascontiguousarray(r).view(dtype)[:, 0] for r in raw)
        version = c.wave.version
        write(c, addresses(at) + model.start, values)
        assert c.wave.version == version + 1
        for lane, owner in enumerate(model.owner):
            row = b"".join(v[lane].tobytes() for v in values)
            model.bytes[owner][at[lane] : at[lane] + size * count] = row
        read = reader(INS, env, model.space, np.dtype("u1"))
        for byte in range(9 * size * count):
            (got,) = read(c, addresses(model.start + byte))
            assert c.full(got).tolist() == [model.bytes[o][byte] for o in model.owner]


@pytest.mark.parametrize("env", ENVS, ids=["unchecked", "checked"])
def test_generic_lanes_may_each_be_in_another_space(env: Env) -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.upload(np.arange(100, 140, dtype=np.uint32))
    c = lanes(40, 1, memory=memory, shared=512, params=np.arange(7, 9, dtype=np.uint32).tobytes())
    n = np.arange(40)
    starts = np.array([x.address, SHARED_WINDOW, LOCAL_WINDOW])
    own = starts[n % 3] + 4 * n * (n % 3 != 2)
    value = n.astype(np.uint32) * 3
    version = c.wave.version
    writer(INS, env, "generic", np.uint32)(c, own, (value,))
    assert c.wave.version > version
    read = reader(INS, env, "generic", np.uint32)
    assert read(c, own)[0].tolist() == (3 * n).tolist()
    assert x.get().tolist() == [3 * i if i % 3 == 0 else 100 + i for i in range(40)]
    assert read(c, np.where(n < 39, own, PARAM_WINDOW + 4))[0].tolist() == [*(3 * n[:39]), 8]
    two = reader(INS, env, "generic", np.uint16, 2)(c, own)
    assert two[0].tolist() == (3 * n).tolist()
    # All lanes in one window, and one value for all of them.
    assert c.full(read(c, addresses(PARAM_WINDOW))[0]).tolist() == [7] * 40
    assert read(c, addresses(x.address))[0].tolist() == [0]


def test_uniform_addresses_give_uniform_values_where_memory_is_shared() -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.upload(np.arange(8, dtype=np.float32))
    c = lanes(32, 2, memory=memory)
    one = lanes(32, 1, memory=memory)
    assert reader(INS, UNCHECKED, "global", np.float32)(c, addresses(x.address + 8))[0] == [2]
    for cohort, length in ((c, 64), (one, 1)):
        writer(INS, UNCHECKED, "shared", np.float32)(cohort, addresses(4), (np.float32([5]),))
        (got,) = reader(INS, UNCHECKED, "shared", np.float32)(cohort, addresses(4))
        assert got.tolist() == [5] * length


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_uniform_address_takes_the_highest_lanes_values(count: int) -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.alloc(8, np.uint32)
    c = lanes(32, 1, memory=memory)
    values = tuple(np.arange(32, dtype=np.uint32) + 100 * k for k in range(count))
    writer(INS, CHECKED, "global", np.uint32, count)(c, addresses(x.address), values)
    assert x.get()[:count].tolist() == [31 + 100 * k for k in range(count)]


def test_values_that_were_read_do_not_change_when_memory_does() -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.upload(np.arange(8, dtype=np.float32))
    c = lanes(1, 1, memory=memory)
    for count in (1, 4, 8):
        values = reader(INS, UNCHECKED, "global", np.float32, count)(c, addresses(x.address))
        x.set(9)
        assert [v.tolist() for v in values] == [[k] for k in range(count)]
        x.set(np.arange(8))


def test_nan_payloads_survive() -> None:
    memory = DeviceMemory(1 << 20)
    bits = np.array([0x7F800001, 0xFFC12345] * 4, np.uint32)
    x, y = memory.upload(bits), memory.alloc(8, np.uint32)
    c = lanes(1, 1, memory=memory)
    for count in (1, 2, 4, 8):
        read = reader(INS, UNCHECKED, "global", np.float32, count)
        write = writer(INS, UNCHECKED, "global", np.float32, count)
        for at in range(0, 32, 4 * count):
            write(c, addresses(y.address + at), read(c, addresses(x.address + at)))
        assert y.get().tolist() == bits.tolist()


def test_parameters_are_read_at_their_offsets() -> None:
    params = bytes(range(1, 45))
    c = lanes(40, 1, params=params)
    for width in (1, 2, 4, 8):
        read = reader(INS, CHECKED, "param::entry", np.dtype(f"u{width}"))
        for at in range(0, 44 // width * width, width):
            for _ in range(2):
                (value,) = read(c, addresses(at))
                assert value.tolist() == [int.from_bytes(params[at : at + width], "little")]
    (bytes_,) = reader(INS, UNCHECKED, "param", np.uint8)(c, np.arange(40))
    assert bytes_.tolist() == list(range(1, 41))
    other = lanes(1, 1, params=bytes(44))
    assert reader(INS, UNCHECKED, "param", np.uint8)(other, addresses(3))[0].tolist() == [0]
    with pytest.raises(ValueError, match="parameters"):
        writer(INS, UNCHECKED, "param", np.uint8)


def test_shared_memory_starts_poisoned_and_blocks_do_not_share_it() -> None:
    c = lanes(32, 3, shared=100)
    read = reader(INS, UNCHECKED, "shared", np.float32)
    assert np.isnan(read(c, addresses(96))[0]).all()
    write = writer(INS, UNCHECKED, "shared", np.uint32)
    write(c, addresses(8), (c.slots.astype(np.uint32) * 7,))
    (value,) = reader(INS, UNCHECKED, "shared", np.uint32)(c, addresses(8))
    assert value.tolist() == [0] * 32 + [7] * 32 + [14] * 32


def test_release_gives_the_waves_memory_back() -> None:
    c = lanes(32, 1)
    c.wave.memory.release()
    assert c.wave.memory.shared.size == c.wave.memory.local.size == 0


# Faults


def fault(call: Any, *arguments: Any) -> MemoryFault:
    with pytest.raises(MemoryFault) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.parametrize("env", ENVS, ids=["unchecked", "checked"])
@pytest.mark.parametrize("space", ["global", "shared", "local", "generic", "param"])
@pytest.mark.parametrize("width", [2, 4, 8, 16, 32])
def test_misaligned_addresses_always_fault(space: str, width: int, env: Env) -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.upload(np.zeros(4096, np.uint8), name="x")
    c = lanes(32, 2, memory=memory, params=bytes(128))
    start = x.address if space in ("global", "generic") else 0
    dtype, count = (np.uint8, width) if width <= 8 else (np.uint32, width // 4)
    good = np.full(64, start, np.int64)
    if space in ("shared", "local"):
        for byte in range(64):
            writer(INS, env, space, np.uint8)(c, good + byte, (np.zeros(1, np.uint8),))
    for wrong in (1, width // 2, width - 1):
        bad = good.copy()
        bad[37] += wrong
        for make in (reader, writer) if space != "param" else (reader,):
            call = make(INS, env, space, np.dtype(dtype), count)
            values = () if make is reader else ((np.zeros(1, dtype),) * count,)
            if make is writer or env is UNCHECKED or start:
                call(c, good, *values)
            error = fault(call, c, bad, *values)
            assert error.kind == "misaligned"
            assert error.address == start + wrong
            assert error.where is not None
            assert (error.where.block, error.where.thread) == ((1, 0, 0), (5, 0, 0))
            assert f"no multiple of {width}" in str(error)
            assert "k.cu:5" in str(error)


@pytest.mark.parametrize("env", ENVS, ids=["unchecked", "checked"])
@pytest.mark.parametrize("width", [1, 4, 16])
@pytest.mark.parametrize(
    "address", [0, 64, -64, 1 << 62, -(1 << 63), BASE - 64, BASE + (1 << 20), BASE + (3 << 40)]
)
def test_addresses_outside_device_memory_always_fault(address: int, width: int, env: Env) -> None:
    c = lanes(memory=DeviceMemory(1 << 20))
    x = c.wave.memory.device.upload(np.zeros(64))
    at = np.full(128, x.address, np.int64)
    at[100:] = address
    for space in ("global", "generic"):
        dtype, count = (np.uint8, width) if width <= 8 else (np.uint32, width // 4)
        error = fault(reader(INS, env, space, np.dtype(dtype), count), c, at)
        assert (error.kind, error.address) == ("out of bounds", address)
        assert "28 lanes" in str(error)
        null = "a null pointer" in str(error)
        assert null == (0 <= address < 65536)


CHECKS = [
    # (address in x of 40 bytes, width, what is said)
    (40, 4, "0 bytes past the end of 'x' of 40 bytes"),
    (52, 4, "12 bytes past the end of 'x' of 40 bytes"),
    (32, 16, "8 bytes of it past the end of 'x'"),
    (-4, 4, "4 bytes before the start of 'x'"),
    (-127, 1, "127 bytes before the start of 'x'"),
]


@pytest.mark.parametrize(("offset", "width", "says"), CHECKS)
@pytest.mark.parametrize("make", [reader, writer])
def test_out_of_bounds_names_the_nearest_allocation(
    offset: int, width: int, says: str, make: Any
) -> None:
    memory = DeviceMemory(1 << 20)
    other = memory.alloc(256, written=True)
    x = memory.alloc(40, name="x", written=True)
    last = memory.alloc(256, written=True)
    c = lanes(memory=memory)
    dtype, count = (np.uint8, width) if width <= 8 else (np.uint32, width // 4)
    at = np.full(128, other.address, np.int64)
    at[66] = x.address + offset
    values = () if make is reader else ((np.zeros(1, dtype),) * count,)
    error = fault(make(INS, CHECKED, "global", np.dtype(dtype), count), c, at, *values)
    assert error.kind == "out of bounds"
    assert says in str(error)
    assert "test_memory.py:" in str(error)
    assert error.where is not None
    assert (error.where.block, error.where.thread) == ((1, 0, 0), (2, 0, 0))
    assert last.address > x.address > other.address
    # Without the check the arena itself is the limit.
    make(INS, UNCHECKED, "global", np.dtype(dtype), count)(c, at, *values)


def test_every_byte_of_an_access_must_be_owned() -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.alloc(37, written=True)
    c = lanes(1, 1, memory=memory)
    for width in (1, 2, 4, 8):
        read = reader(INS, CHECKED, "global", np.dtype(f"u{width}"))
        for at in range(0, 64, width):
            if at + width <= 37:
                read(c, addresses(x.address + at))
            else:
                assert fault(read, c, addresses(x.address + at)).kind == "out of bounds"


def test_use_after_free_tells_who_freed_it() -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.upload(np.zeros(16), name="x")
    c = lanes(memory=memory)
    x.free()
    error = fault(reader(INS, CHECKED, "global", np.float64), c, addresses(x.address + 8))
    assert error.kind == "use after free"
    assert re.search(
        r"8 bytes into 'x' of 128 bytes .*, freed at .*test_memory\.py:\d+", str(error)
    )


def test_read_only_memory_can_be_read_and_not_written() -> None:
    memory = DeviceMemory(1 << 20)
    for x in (memory.upload(np.ones(4), read_only=True), memory.upload(np.ones(4))):
        x.protect()
        c = lanes(memory=memory)
        (value,) = reader(INS, CHECKED, "const", np.float64)(c, addresses(x.address))
        assert value.tolist() == [1]
        write = writer(INS, CHECKED, "generic", np.float64)
        error = fault(write, c, addresses(x.address + 8), (np.zeros(1),))
        assert error.kind == "write to read-only memory"
        assert x.get().tolist() == [1] * 4
        x.set(2)  # the host may
        assert fault(write, c, addresses(x.address), (np.zeros(1),)).kind.startswith("write to")


def test_reads_of_unwritten_device_memory() -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.alloc(16, np.uint32, name="x")
    c = lanes(1, 1, memory=memory)
    read4 = reader(INS, CHECKED, "global", np.uint32)
    read16 = reader(INS, CHECKED, "global", np.uint32, 4)
    write = writer(INS, CHECKED, "global", np.uint8)
    assert fault(read4, c, addresses(x.address)).kind == "read of unwritten memory"
    for byte in range(3):
        write(c, addresses(x.address + byte), (np.ones(1, np.uint8),))
        assert fault(read4, c, addresses(x.address)).kind == "read of unwritten memory"
    write(c, addresses(x.address + 3), (np.ones(1, np.uint8),))
    assert read4(c, addresses(x.address))[0].tolist() == [0x01010101]
    assert fault(read16, c, addresses(x.address)).kind == "read of unwritten memory"
    writer(INS, CHECKED, "global", np.uint64)(c, addresses(x.address + 8), (np.zeros(1, "u8"),))
    assert fault(read16, c, addresses(x.address)).kind == "read of unwritten memory"
    writer(INS, CHECKED, "global", np.uint32)(c, addresses(x.address + 4), (np.zeros(1, "u4"),))
    read16(c, addresses(x.address))
    wide = tuple(np.zeros(1, np.uint32) for _ in range(8))
    writer(INS, CHECKED, "global", np.uint32, 8)(c, addresses(x.address + 32), wide)
    reader(INS, CHECKED, "global", np.uint32, 8)(c, addresses(x.address + 32))
    y = memory.alloc(16, np.uint32)
    y.numpy()
    read16(c, addresses(y.address))
    z = memory.alloc(16, np.uint32)
    z.set(1)
    read16(c, addresses(z.address + 48))


@pytest.mark.parametrize("space", ["shared", "local"])
def test_reads_of_unwritten_memory_of_blocks_and_threads(space: str) -> None:
    c = lanes(32, 2, shared=64, local=64, variables=[("a", 0, 16), ("tile", 16, 32)])
    read = reader(INS, CHECKED, space, np.uint32)
    write = writer(INS, CHECKED, space, np.uint32)
    some = c.subset(np.arange(64) < 32)
    write(some, addresses(20), (np.ones(1, np.uint32),))
    read(some, addresses(20))
    error = fault(read, c, addresses(20))
    assert error.kind == "read of unwritten memory"
    assert error.where is not None
    assert (error.where.block, error.where.thread) == ((1, 0, 0), (0, 0, 0))
    assert ("4 bytes into 'tile'" in str(error)) == (space == "shared")
    generic = reader(INS, CHECKED, "generic", np.uint32)
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}[space]
    error = fault(generic, c, addresses(window + 20))
    assert error.address == window + 20
    assert f"(generic {window + 20:#x})" in str(error)


@pytest.mark.parametrize("space", ["shared", "local"])
@pytest.mark.parametrize("size", [64, 100])
@pytest.mark.parametrize("make", [reader, writer])
def test_bounds_of_blocks_and_threads_are_exact(space: str, size: int, make: Any) -> None:
    c = lanes(32, 2, shared=size, local=size, variables=[("a", 0, 16), ("tile", 16, 32)])
    for width in (1, 2, 4, 8):
        dtype = np.dtype(f"u{width}")
        call = make(INS, CHECKED, space, dtype)
        write = writer(INS, CHECKED, space, dtype)
        values = () if make is reader else ((np.zeros(1, dtype),),)
        for at in [*range(0, 160, width), 1024, 2048, 4096, -width, 1 << 30, -(1 << 40)]:
            everywhere = np.zeros(64, np.int64)
            everywhere[45] = at
            if 0 <= at <= size - width:
                write(c, everywhere, (np.zeros(1, dtype),))
                call(c, everywhere, *values)
            else:
                write(c, addresses(0), (np.zeros(1, dtype),))
                error = fault(call, c, everywhere, *values)
                assert (error.kind, error.address) == ("out of bounds", at)
                assert error.where is not None
                assert error.where.thread == (13, 0, 0)
                if at == 152:
                    assert f"{152 - size} bytes past the end of" in str(error)
                    assert ("104 bytes past the end of 'tile'" in str(error)) == (space == "shared")


@pytest.mark.parametrize("space", ["shared", "local"])
def test_wild_addresses_fault_without_the_check_too(space: str) -> None:
    c = lanes(32, 2)
    for at in (1 << 14, -4, 1 << 40, -(1 << 40)):
        everywhere = np.zeros(64, np.int64)
        everywhere[63] = at
        assert fault(reader(INS, UNCHECKED, space, np.uint32), c, everywhere).address == at


def test_parameters_have_bounds() -> None:
    c = lanes(32, 1, params=bytes(12))
    read = reader(INS, UNCHECKED, "param", np.uint32)
    for at in (12, 16, 1 << 20, -4):
        error = fault(read, c, addresses(at))
        assert error.kind == "out of bounds"
        assert "12 bytes of kernel parameters" in str(error)


def test_parameters_cannot_be_written_through_generic_addresses() -> None:
    c = lanes(32, 1, params=bytes(12))
    at = np.full(32, PARAM_WINDOW)
    at[:5] = LOCAL_WINDOW
    error = fault(writer(INS, CHECKED, "generic", np.uint32), c, at, (np.zeros(1, np.uint32),))
    assert error.address == PARAM_WINDOW
    assert "generic address of param memory" in str(error)


def test_parameters_of_calls_count_as_written() -> None:
    c = lanes(32, 2, local=64, local_params=[(8, 6), (32, 4)])
    read = reader(INS, CHECKED, "local", np.uint8)
    good = []
    for at in range(64):
        try:
            read(c, addresses(at))
        except MemoryFault:
            continue
        good.append(at)
    assert good == [*range(8, 14), *range(32, 36)]


def test_a_shared_address_in_a_global_access_is_told() -> None:
    error = fault(reader(INS, CHECKED, "global", np.uint32), lanes(), addresses(SHARED_WINDOW + 4))
    assert "generic address of shared memory" in str(error)


def test_an_access_that_faults_does_nothing() -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.alloc(16, np.uint32)
    c = lanes(memory=memory)
    at = np.full(128, x.address)
    at[77] += 64
    version = c.wave.version
    fault(writer(INS, CHECKED, "global", np.uint32), c, at, (np.ones(1, np.uint32),))
    assert not x.get().any()
    assert c.wave.version == version
    read = reader(INS, CHECKED, "global", np.uint32)
    assert fault(read, c, addresses(x.address)).kind == "read of unwritten memory"


def test_what_an_unchecked_launch_may_have_written_counts_as_written() -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.alloc(16, np.uint32)
    c = lanes(memory=memory)
    writer(INS, UNCHECKED, "global", np.uint32)(c, addresses(x.address), (np.ones(1, np.uint32),))
    y = memory.alloc(16, np.uint32)
    read = reader(INS, CHECKED, "global", np.uint32)
    assert read(c, addresses(x.address))[0].tolist() == [1]
    assert fault(read, c, addresses(y.address)).kind == "read of unwritten memory"
    assert fault(read, c, addresses(x.address + 64)).kind == "out of bounds"
    # Reading alone writes nothing.
    reader(INS, UNCHECKED, "global", np.uint32)(c, addresses(y.address))
    assert fault(read, c, addresses(y.address)).kind == "read of unwritten memory"


# Hooks


@pytest.mark.parametrize("generic", [False, True])
def test_hooks_are_told_every_access(generic: bool) -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.upload(np.zeros(64, np.uint32))
    c = lanes(32, 2, memory=memory, params=bytes(8))
    race, counters = Recorder(), Recorder()
    c.wave.race, c.wave.counters = race, counters
    env = Env(90, check_race=True, count=True)
    value = (np.zeros(1, np.uint32),)
    s_global, s_shared, s_local = ("generic",) * 3 if generic else ("global", "shared", "local")
    start_s, start_l = (SHARED_WINDOW, LOCAL_WINDOW) if generic else (0, 0)
    lane = np.arange(64) * 4
    stride = c.wave.shared_stride

    reader(INS, env, s_global, np.uint32, 1, "acquire", "gpu")(c, addresses(x.address + 4))
    writer(INS, env, s_shared, np.uint32, 1, "volatile", "sys")(c, start_s + lane, value)
    writer(INS, env, s_local, np.uint32)(c, addresses(start_l), value)
    reader(INS, env, "const", np.uint32)(c, addresses(x.address))
    reader(INS, env, "param", np.uint32)(c, addresses(0))
    writer(INS, env, s_global, np.uint32, hooks=False)(c, addresses(x.address), value)

    first, second = race.named("access")
    assert first[:3] == (INS, c, "global")
    assert first[3].tolist() == [x.address + 4 - BASE] * 64
    assert first[4:] == (4, "read", "acquire", "gpu")
    assert second[:3] == (INS, c, "shared")
    assert second[3].tolist() == [4 * i + (i // 32) * stride for i in range(64)]
    assert second[4:] == (4, "write", "volatile", "sys")
    told = [(a[2], a[3].tolist(), a[4], a[5]) for a in counters.named("access")]
    assert told == [
        ("global", [x.address + 4] * 64, 4, "read"),
        ("shared", lane.tolist(), 4, "write"),
        ("local", [0] * 64, 4, "write"),
        ("const", [x.address] * 64, 4, "read"),
    ]


def test_device_arrays_are_printed_with_their_address() -> None:
    array: DeviceArray = DeviceMemory(1 << 16).alloc((2, 3), np.float32, name="w")
    assert repr(array) == f"DeviceArray({array.address:#x}, shape=(2, 3), dtype=float32)"
    assert array.name == "w"
