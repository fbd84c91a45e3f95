"""Reads and writes of every space against plain byte strings, and who is told of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cumla.sim.isa.table import Env
from cumla.sim.memory import DeviceMemory
from cumla.sim.memory.access import reader, writer
from cumla.sim.memory.device import BASE
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
