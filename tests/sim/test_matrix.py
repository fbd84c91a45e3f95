"""ldmatrix, stmatrix and movmatrix against PTX ISA, one element at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cumla.sim.cohort import Cohort
from cumla.sim.errors import MemoryFault
from cumla.sim.isa.table import Op, Unsupported
from cumla.sim.memory.spaces import SHARED_WINDOW
from cumla.sim.ptx.syntax import Address, Register, Vector
from sim.ops import op
from sim.waves import Recorder, cohort, make_wave

SHARED = 8192
# gids of the lanes that run, in two blocks of two warps
LANES: dict[str, Any] = {
    "whole warps": range(128),
    "one warp": range(64, 96),
    "exited": [*range(32), *range(34, 64), *range(96, 110)],
}


def made(name: str, registers: int, **env: Any) -> Op:
    r = Vector(tuple(Register(f"%r{i}") for i in range(registers)))
    p = Address(Register("%p"))
    return op(name, *((p, r) if name.startswith("st") else (r, p)), **env)


@pytest.fixture(params=list(LANES))
def lanes(request: pytest.FixtureRequest) -> Cohort:
    wave = make_wave((64, 1, 1), (2, 1, 1), shared=SHARED)
    rng = np.random.default_rng(1)
    data = wave.memory.shared.data
    data[:] = rng.integers(0, 256, data.size)
    gone = np.setdiff1d(np.arange(128), LANES["exited"])
    if request.param == "exited":
        wave.exit(gone)
    return cohort(wave, LANES[request.param])


def row_addresses(c: Cohort, seed: int = 2) -> Any:
    """For each lane a row of 16 bytes; no two lanes of a block have the same."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(SHARED // 16)[:64] * 16 for _ in range(2)])[c.gids]


def memory_of(c: Cohort, gid: int) -> Any:
    """The shared memory of a lane's block, from its first byte."""
    return c.wave.memory.shared.data[gid // 64 * c.wave.shared_stride :]


def rows_of(c: Cohort, address: Any) -> dict[int, Any]:
    """The 16 bytes that each lane's address means; those of lanes that are not there are 0."""
    rows = {}
    at = dict(zip(c.gids.tolist(), address.tolist(), strict=True))
    for gid in range(128):
        bytes_ = memory_of(c, gid)[at[gid] :][:16].copy() if gid in at else np.zeros(16, np.uint8)
        rows[gid] = bytes_
    return rows


def run(made: Op, c: Cohort, address: Any, *registers: Any) -> list[Any]:
    assert made.cohort
    results = made.run(c, np.asarray(address, np.int64), *registers)
    if results is None:
        return []
    results = results if isinstance(results, tuple) else (results,)
    assert len(results) == len(made.results)
    for r in results:
        assert r.shape == (c.n,)
        assert r.dtype == np.uint32
    return list(results)


def eights(count: int, trans: bool) -> Iterator[tuple[int, int, int, int, int, int]]:
    """PTX ISA "ldmatrix", m8n8: (register, lane, half of it, matrix, row, column)."""
    for matrix in range(count):
        for lane in range(32):
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                if trans:
                    row, column = column, row
                yield matrix, lane, half, matrix, row, column


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("space", [".shared", ".shared::cta", ""])
def test_ldmatrix(count: int, trans: bool, space: str, lanes: Cohort) -> None:
    name = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' * trans}{space}.b16"
    address = row_addresses(lanes)
    rows = rows_of(lanes, address)
    got = run(made(name, count), lanes, address + (0 if space else SHARED_WINDOW))
    position = {g: i for i, g in enumerate(lanes.gids.tolist())}
    for register, lane, half, matrix, row, column in eights(count, trans):
        for warp in range(4):
            if (gid := warp * 32 + lane) in position:
                found = int(got[register][position[gid]]) >> 16 * half & 0xFFFF
                halves = rows[warp * 32 + 8 * matrix + row].view(np.uint16)
                assert found == int(halves[column])


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("space", [".shared", ""])
def test_stmatrix(count: int, trans: bool, space: str, lanes: Cohort) -> None:
    name = f"stmatrix.sync.aligned.m8n8.x{count}{'.trans' * trans}{space}.b16"
    address = row_addresses(lanes)
    rng = np.random.default_rng(3)
    registers = [rng.integers(0, 1 << 32, lanes.n, dtype=np.uint32) for _ in range(count)]
    want = lanes.wave.memory.shared.data.copy()
    position = {g: i for i, g in enumerate(lanes.gids.tolist())}
    for register, lane, half, matrix, row, column in eights(count, trans):
        for warp in range(4):
            gid, giver = warp * 32 + lane, warp * 32 + 8 * matrix + row
            if giver in position:
                value = int(registers[register][position[gid]]) if gid in position else 0
                start = giver // 64 * lanes.wave.shared_stride + address[position[giver]]
                want[start + 2 * column :][:2] = [
                    value >> 16 * half & 0xFF,
                    value >> 16 * half + 8 & 0xFF,
                ]
    version = lanes.wave.version
    assert (
        run(made(name, count), lanes, address + (0 if space else SHARED_WINDOW), *registers) == []
    )
    assert np.array_equal(lanes.wave.memory.shared.data, want)
    assert lanes.wave.version > version


@pytest.mark.parametrize("count", [1, 2])
def test_ldmatrix_of_bytes(count: int, lanes: Cohort) -> None:
    """m16n16: register 2i + r of lane 4b + a has rows 4a to 4a + 3 of column b + 8r of matrix i."""
    address = row_addresses(lanes)
    rows = rows_of(lanes, address)
    name = f"ldmatrix.sync.aligned.m16n16.x{count}.trans.shared.b8"
    got = run(made(name, 2 * count, target=120), lanes, address)
    for i, gid in enumerate(lanes.gids.tolist()):
        a, b = gid % 4, gid % 32 // 4
        for matrix in range(count):
            for r in range(2):
                of_matrix = [rows[gid // 32 * 32 + matrix * 16 + k] for k in range(16)]
                want = [int(of_matrix[4 * a + k][b + 8 * r]) for k in range(4)]
                assert int(got[2 * matrix + r][i]).to_bytes(4, "little") == bytes(want)


def unpacked(row: Any, bits: int) -> list[int]:
    """16 elements of a row of 4 or 6-bit elements, low bits first."""
    whole = int.from_bytes(row.tobytes(), "little")
    return [whole >> bits * i & (1 << bits) - 1 for i in range(16)]


@pytest.mark.parametrize(("bits", "format_"), [(4, "b4x16_p64"), (6, "b6x16_p32")])
@pytest.mark.parametrize("shape", ["m8n16.x1", "m8n16.x2", "m8n16.x4", "m16n16.x1", "m16n16.x2"])
def test_ldmatrix_that_widens(bits: int, format_: str, shape: str, lanes: Cohort) -> None:
    address = row_addresses(lanes)
    rows = {gid: unpacked(row, bits) for gid, row in rows_of(lanes, address).items()}
    wide, count = shape.startswith("m16"), int(shape[-1])
    name = f"ldmatrix.sync.aligned.{shape}{'.trans' * wide}.shared.b8x16.{format_}"
    got = run(made(name, count * (1 + wide), target=120), lanes, address)
    for i, gid in enumerate(lanes.gids.tolist()):
        a, b, warp = gid % 4, gid % 32 // 4, gid // 32 * 32
        for register, value in enumerate(got):
            if wide:
                of_matrix = [rows[warp + register // 2 * 16 + k] for k in range(16)]
                want = [of_matrix[4 * a + k][b + register % 2 * 8] for k in range(4)]
            else:
                want = rows[warp + register * 8 + b][4 * a : 4 * a + 4]
            assert int(value[i]).to_bytes(4, "little") == bytes(want)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_of_bytes(count: int, lanes: Cohort) -> None:
    """m16n8: lane 4b + a has columns 2a, 2a + 1 of row b, then of row b + 8; columns are stored."""
    address = row_addresses(lanes)
    rng = np.random.default_rng(4)
    registers = [rng.integers(0, 1 << 32, lanes.n, dtype=np.uint32) for _ in range(count)]
    want = lanes.wave.memory.shared.data.copy()
    position = {g: i for i, g in enumerate(lanes.gids.tolist())}
    for giver, at in position.items():
        matrix, column = giver % 32 // 8, giver % 8
        if matrix < count:
            for row in range(16):
                gid = giver // 32 * 32 + row % 8 * 4 + column // 2
                value = int(registers[matrix][position[gid]]) if gid in position else 0
                byte = value >> 8 * (column % 2 + row // 8 * 2) & 0xFF
                start = giver // 64 * lanes.wave.shared_stride + address[at]
                want[start + row] = byte
    name = f"stmatrix.sync.aligned.m16n8.x{count}.trans.shared.b8"
    run(made(name, count, target=120), lanes, address, *registers)
    assert np.array_equal(lanes.wave.memory.shared.data, want)


def test_movmatrix(lanes: Cohort) -> None:
    a = np.random.default_rng(5).integers(0, 1 << 32, lanes.n, dtype=np.uint32)
    got = op("movmatrix.sync.aligned.m8n8.trans.b16").run(lanes, a)
    position = {g: i for i, g in enumerate(lanes.gids.tolist())}
    for gid, i in position.items():
        for half in range(2):
            row, column = gid % 4 * 2 + half, gid % 32 // 4
            source = position.get(gid // 32 * 32 + row * 4 + column // 2)
            want = 0 if source is None else int(a[source]) >> 16 * (column % 2) & 0xFFFF
            assert int(got[i]) >> 16 * half & 0xFFFF == want


@pytest.mark.parametrize("count", [1, 4])
def test_one_address_for_all(count: int) -> None:
    c = cohort(make_wave((64, 1, 1), (2, 1, 1), shared=SHARED))
    c.wave.memory.shared.data[:] = np.random.default_rng(6).integers(
        0, 256, c.wave.memory.shared.size
    )
    got = run(made(f"ldmatrix.sync.aligned.m8n8.x{count}.shared.b16", count), c, [48])
    for i, gid in enumerate(c.gids.tolist()):
        words = memory_of(c, gid)[48:64].view(np.uint32)
        assert {int(r[i]) for r in got} == {int(words[gid % 4])}
    made(f"stmatrix.sync.aligned.m8n8.x{count}.shared.b16", count).run(
        c, np.array([64]), *[c.gids.astype(np.uint32)] * count
    )
    # The highest row wins: that of lanes 28 to 31 of the block's last warp.
    assert memory_of(c, 64)[64:80].view(np.uint32).tolist() == [124, 125, 126, 127]


def test_registers_that_are_one_value() -> None:
    c = cohort(make_wave((64, 1, 1), (2, 1, 1), shared=SHARED))
    address = row_addresses(c)
    made("stmatrix.sync.aligned.m8n8.x2.shared.b16", 2).run(
        c, address, np.array([7], np.uint32), c.gids.astype(np.uint32)
    )
    for gid in range(128):
        words = memory_of(c, gid)[address[gid] :][:16].view(np.uint32).tolist()
        if gid % 32 < 8:
            assert words == [7] * 4
        elif gid % 32 < 16:
            first = gid // 32 * 32 + gid % 8 * 4
            assert words == [first, first + 1, first + 2, first + 3]


def test_who_is_blamed() -> None:
    """Only lanes that give addresses access memory, each 16 bytes; the others' are ignored."""
    wave = make_wave((64, 1, 1), shared=SHARED)
    wave.race = Recorder()
    c = cohort(wave)
    address = row_addresses(c)
    address[(c.gids & 31) >= 8] = 1 << 40
    run(made("ldmatrix.sync.aligned.m8n8.x1.shared.b16", 1, check_race=True), c, address)
    stores = made("stmatrix.sync.aligned.m8n8.x1.shared.b16", 1, check_race=True)
    run(stores, c, address, c.gids.astype(np.uint32))
    for call, kind in zip(wave.race.named("access"), ("read", "write"), strict=True):
        _, who, space, offset, nbytes, did, *_ = call
        assert who.gids.tolist() == [*range(8), *range(32, 40)]
        assert offset.tolist() == address[who.gids].tolist()
        assert (space, nbytes, did) == ("shared", 16, kind)


def test_bad_rows() -> None:
    c = cohort(make_wave((32, 1, 1), shared=SHARED))
    loads = made("ldmatrix.sync.aligned.m8n8.x4.shared.b16", 4, check_memory=True)
    address = np.arange(32) * 16
    with pytest.raises(MemoryFault, match="unwritten"):
        loads.run(c, address)
    address[5] += 8
    for name in ("m8n8.x1.shared.b16", "m8n16.x1.shared.b8x16.b4x16_p64"):
        with pytest.raises(MemoryFault, match="misaligned") as caught:
            made(f"ldmatrix.sync.aligned.{name}", 1, target=120).run(c, address)
        assert caught.value.where is not None
        assert caught.value.where.thread == (5, 0, 0)
    # What is behind 4-bit elements is not read.
    options = {"target": 120, "check_memory": True}
    bits4 = made("ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b4x16_p64", 1, **options)
    bits6 = made("ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b6x16_p32", 1, **options)
    store = op("st.shared.u32", Address(Register("%p")), Register("%r"), check_memory=True)
    for at in (0, 4):
        store.run(c, np.arange(32) * 16 + at, np.zeros(32, np.uint32))
    bits4.run(c, np.arange(32) * 16)
    with pytest.raises(MemoryFault):
        bits6.run(c, np.arange(32) * 16)
    store.run(c, np.arange(32) * 16 + 8, np.zeros(32, np.uint32))
    bits6.run(c, np.arange(32) * 16)


def test_it_waits_for_whole_warps() -> None:
    wave = make_wave((64, 1, 1))
    for name in (
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16",
        "movmatrix.sync.aligned.m8n8.trans.b16",
    ):
        loads = op(name) if name.startswith("mov") else made(name, 1)
        assert loads.warp_gate
        assert loads.ready is not None
        assert loads.waits_for is not None
        c = cohort(wave, [*range(32), 40])
        assert loads.ready(c, np.zeros(1)).tolist() == [True] * 32 + [False]
        text = loads.waits_for(cohort(wave, [40]), np.zeros(1))
        assert text == f"lanes 0xfffffeff of its warp at {name.split('.')[0]}.sync"


@pytest.mark.parametrize(
    "name",
    [
        "ldmatrix.sync.aligned.m8n8.x3.shared.b16",
        "ldmatrix.sync.aligned.m8n8.shared.b16",
        "ldmatrix.sync.m8n8.x1.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x1.global.b16",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b8",
        "ldmatrix.sync.aligned.m8n8.x1.shared.shared.b16",
        "ldmatrix.sync.aligned.m16n16.x1.shared.b8",
        "ldmatrix.sync.aligned.m16n16.x4.trans.shared.b8",
        "ldmatrix.sync.aligned.m8n16.x1.trans.shared.b8x16.b4x16_p64",
        "ldmatrix.sync.aligned.m8n16.x1.shared.b8",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b8x16.b4x16_p64",
        "stmatrix.sync.aligned.m16n8.x1.shared.b8",
        "stmatrix.sync.aligned.m8n8.x1.shared.b8",
        "movmatrix.sync.aligned.m8n8.b16",
    ],
)
def test_forms_that_are_refused(name: str) -> None:
    with pytest.raises(Unsupported):
        made(name, int(name.split(".x")[1][0]) if ".x" in name else 1, target=120)


def test_registers_are_counted() -> None:
    with pytest.raises(Unsupported, match="2 registers, 4 expected"):
        made("ldmatrix.sync.aligned.m8n8.x4.shared.b16", 2)
    with pytest.raises(Unsupported, match="4 registers, 1 expected"):
        made("stmatrix.sync.aligned.m8n8.x1.shared.b16", 4)
    assert made("ldmatrix.sync.aligned.m8n8.x4.shared.b16", 4).results == ("b32",) * 4
