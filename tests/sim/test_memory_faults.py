"""Accesses that a kernel must not make, and what is said of them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from cumla.sim.errors import MemoryFault
from cumla.sim.isa.table import Env
from cumla.sim.memory import DeviceMemory
from cumla.sim.memory.access import reader, writer
from cumla.sim.memory.device import BASE
from cumla.sim.memory.spaces import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from cumla.sim.ptx.syntax import Instruction, SourceLine
from sim.lanes import addresses, lanes

INS = Instruction("ld", (), (), None, 9, SourceLine("k.cu", 5), "ld", 0)
UNCHECKED = Env(90)
CHECKED = Env(90, check_memory=True)
ENVS = [UNCHECKED, CHECKED]


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
    assert "test_memory_faults.py:" in str(error)
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
        r"8 bytes into 'x' of 128 bytes .*, freed at .*test_memory_faults\.py:\d+", str(error)
    )


def test_read_only_memory_can_be_read_and_not_written() -> None:
    memory = DeviceMemory(1 << 20)
    fixed = memory.alloc(4, np.float64, read_only=True, written=True)
    fixed.memory.arena.views[np.dtype("f8")][(fixed.address - BASE) // 8 :][:4] = 1
    kept = memory.upload(np.ones(4))
    kept.protect()
    for x in (fixed, memory.upload(np.ones(4), read_only=True), kept):
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
                if at >= size:
                    assert f"{at - size} bytes past the end of the" in str(error)
                if at < 0:
                    assert f"{-at} bytes before the start of the" in str(error)
                if at == 152:
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
