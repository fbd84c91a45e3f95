"""ld, st, cvta, isspacep and the cache instructions, as instructions."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from cumla.sim.errors import MemoryFault
from cumla.sim.isa.table import DTYPES, Op, Unsupported
from cumla.sim.memory import DeviceMemory
from cumla.sim.memory.spaces import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from cumla.sim.ptx.syntax import Register
from sim.lanes import addresses, lanes
from sim.ops import op
from sim.waves import Recorder

A = Register("%r0")
DATA = np.random.default_rng(5).integers(0, 256, 256, np.uint8)
TYPES = [k + str(w) for k in "bus" for w in (8, 16, 32, 64)] + ["f32", "f64"]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_ld_and_st_move_every_type(kind: str, count: int) -> None:
    vector = "" if count == 1 else f".v{count}"
    name = f"global{vector}.{kind}"
    size = int(kind[1:]) // 8 * count
    if size > 32:
        for opcode in ("ld", "st"):
            with pytest.raises(Unsupported, match="32 bytes"):
                op(f"{opcode}.{name}")
        return
    load, store = op(f"ld.{name}"), op(f"st.{name}")
    assert (load.sources, load.results) == (("addr",), (kind,) * count)
    assert (store.sources, store.results) == (("addr", *(kind,) * count), ())
    assert load.cohort
    assert store.cohort
    memory = DeviceMemory(1 << 20)
    x, y = memory.upload(DATA), memory.alloc(256)
    n = 256 // size
    c = lanes(n, 1, memory=memory)
    at = np.arange(n) * size
    values = load.run(c, x.address + at)
    values = (values,) if count == 1 else values
    assert all(v.dtype == DTYPES[kind] for v in values)
    wanted = DATA.view(DTYPES[kind]).reshape(n, count)
    for k, value in enumerate(values):
        assert value.tobytes() == wanted[:, k].tobytes()
    assert store.run(c, y.address + at, *values) is None
    assert y.get().tobytes() == DATA.tobytes()


LOADS = [
    "ld.const.f32",
    "ld.weak.global.ca.L2::cache_hint.v2.b32",
    "ld.global.nc.L1::no_allocate.L2::256B.v4.f32",
    "ld.global.ca.nc.L2::64B.u8",
    "ld.global.L1::evict_last.L2::evict_first.L2::128B.v8.b32",
    "ld.global.cs.nc.f64",
    "ld.local.lu.b32",
    "ld.volatile.global.v2.u64",
    "ld.relaxed.gpu.global.u32",
    "ld.acquire.sys.b64",
    "ld.relaxed.cluster.shared::cluster.b32",
    "ld.acquire.cta.shared::cta.b32",
    "ld.mmio.relaxed.sys.global.b32",
    "ld.global.unified.b32",
    "ldu.global.v4.f32",
    "ldu.b32",
]
STORES = [
    "st.wt.b32",
    "st.global.cg.v4.f32",
    "st.weak.shared::cta.v2.u8",
    "st.volatile.shared.b32",
    "st.relaxed.gpu.global.L1::no_allocate.L2::cache_hint.b64",
    "st.release.sys.global.u32",
    "st.mmio.relaxed.sys.global.u8",
    "st.local.v4.b32",
]


@pytest.mark.parametrize("name", LOADS + STORES)
def test_forms_that_are_known(name: str) -> None:
    made = op(name)
    hinted = "cache_hint" in name
    vector = [int(w[1]) for w in name.split(".") if w in ("v2", "v4", "v8")] or [1]
    kind = name.split(".")[-1]
    policy = ("b64",) if hinted else ()
    if name.startswith("ld"):
        assert (made.sources, made.results) == (("addr", *policy), (kind,) * vector[0])
    else:
        assert (made.sources, made.results) == (("addr", *(kind,) * vector[0], *policy), ())


@pytest.mark.parametrize(
    "name",
    [
        "ld.global",
        "ld.global.b128",
        "ld.global.f16",
        "ld.global.v3.f32",
        "ld.global.v2.v4.f32",
        "ld.global.shared.f32",
        "ld.global.f32.f64",
        "ld.wb.global.f32",
        "ld.release.gpu.global.f32",
        "ld.relaxed.global.f32",
        "ld.acquire.global.f32",
        "ld.volatile.gpu.global.f32",
        "ld.weak.gpu.global.f32",
        "ld.weak.volatile.global.f32",
        "ld.mmio.global.f32",
        "ld.mmio.relaxed.gpu.global.f32",
        "ld.something.f32",
        "st.global.nc.f32",
        "st.ca.global.f32",
        "st.const.f32",
        "st.param.f32",
        "st.param::entry.f32",
        "st.acquire.gpu.global.f32",
        "st.release.global.f32",
        "st.async.shared.b32",
    ],
)
def test_forms_that_are_not(name: str) -> None:
    with pytest.raises(Unsupported):
        op(name)


def test_hints_change_nothing_and_policies_are_ignored() -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.upload(DATA)
    c = lanes(32, 1, memory=memory)
    at = x.address + 8 * np.arange(32)
    policy = np.ones(1, np.uint64)
    load = op("ld.global.L1::evict_first.L2::cache_hint.L2::128B.v2.b32")
    a, b = load.run(c, at, policy)
    assert (a.tobytes(), b.tobytes()) == tuple(
        DATA.view(np.uint32).reshape(-1, 2)[:, k].tobytes() for k in (0, 1)
    )
    y = memory.alloc(256)
    op("st.global.wt.L2::cache_hint.v2.b32").run(c, y.address - x.address + at, a, b, policy)
    assert y.get().tobytes() == DATA.tobytes()


@pytest.mark.parametrize(
    ("name", "order", "scope"),
    [
        ("ld.global.b32", "weak", "cta"),
        ("ld.weak.global.b32", "weak", "cta"),
        ("ld.volatile.b32", "volatile", "sys"),
        ("ld.relaxed.cluster.global.b32", "relaxed", "cluster"),
        ("ld.acquire.gpu.b32", "acquire", "gpu"),
        ("ld.mmio.relaxed.sys.global.b32", "relaxed", "sys"),
        ("st.global.b32", "weak", "cta"),
        ("st.volatile.global.b32", "volatile", "sys"),
        ("st.relaxed.cta.global.b32", "relaxed", "cta"),
        ("st.release.sys.b32", "release", "sys"),
    ],
)
def test_the_race_detector_is_told_order_and_scope(name: str, order: str, scope: str) -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.upload(DATA)
    c = lanes(32, 1, memory=memory)
    c.wave.race = race = Recorder()
    made = op(name, check_race=True)
    values = () if name.startswith("ld") else (np.zeros(1, np.uint32),)
    made.run(c, addresses(x.address), *values)
    ((_, _, space, _, nbytes, kind, *rest),) = race.named("access")
    assert (space, nbytes, kind) == ("global", 4, "read" if not values else "write")
    assert rest == [order, scope]


def test_parameters() -> None:
    c = lanes(32, 1, params=DATA[:64].tobytes())
    for name in ("ld.param.u16", "ld.param::entry.u16"):
        (value,) = op(name).run(c, addresses(6))
        assert int(value) == int.from_bytes(DATA[6:8].tobytes(), "little")
    pair = op("ld.param.v2.s32").run(c, addresses(8))
    assert [v.tobytes() for v in pair] == [DATA[8:12].tobytes(), DATA[12:16].tobytes()]


def test_cvta_and_isspacep_agree_with_the_windows() -> None:
    memory = DeviceMemory(1 << 20)
    x, k = memory.upload(DATA), memory.upload(DATA, read_only=True)
    c = lanes(32, 1, memory=memory, params=bytes(8))
    inside = {
        "shared": 100,
        "local": 12,
        "param": 4,
        "global": x.address + 7,
        "const": k.address + 9,
    }
    generic: dict[str, int] = {}
    for space, address in inside.items():
        (value,) = op(f"cvta.{space}.u64").run(np.array([address], np.uint64))
        (back,) = op(f"cvta.to.{space}.u64").run(np.array([value], np.uint64))
        assert (value.dtype, back) == (np.uint64, address)
        generic[space] = int(value)
    assert generic == {
        "shared": SHARED_WINDOW + 100,
        "local": LOCAL_WINDOW + 12,
        "param": PARAM_WINDOW + 4,
        "global": x.address + 7,
        "const": k.address + 9,
    }
    # Also at the ends of the windows, and for null.
    some = [0, 1 << 46, (1 << 64) - 8]
    for window in (SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW):
        some += [window - 1, window, window + (1 << 24) - 1, window + (1 << 24)]
    some += [SHARED_WINDOW + (1 << 32) - 1, SHARED_WINDOW + (1 << 32)]
    asked = np.array([*generic.values(), *some], np.uint64)
    answers = {
        space: op(f"isspacep.{space}").run(c, asked).tolist()
        for space in ("shared", "shared::cluster", "local", "param", "global", "const")
    }
    for i, address in enumerate(asked.tolist()):
        owners = ["global"]
        for space, window in (("local", LOCAL_WINDOW), ("param", PARAM_WINDOW)):
            if window <= address < window + (1 << 24):
                owners = [space]
        if SHARED_WINDOW <= address < SHARED_WINDOW + (1 << 32):
            # The first of it is the block's own, the rest that of other ranks.
            owners = ["shared"] if address < SHARED_WINDOW + (1 << 24) else []
            owners.append("shared::cluster")
        if k.address <= address < k.address + 256:
            owners = ["const"]
        assert [s for s in answers if answers[s][i]] == owners, hex(address)
    assert op("isspacep.shared::cta").run(c, asked).tolist() == answers["shared"]
    assert op("isspacep.param::entry").run(c, asked).tolist() == answers["param"]
    assert op("cvta.to.shared::cta.u64").run(asked[:1]).tolist() == [100]
    for name in ("cvta.shared.u32", "cvta.to.tex.u64", "cvta.u64", "isspacep.u64", "isspacep"):
        with pytest.raises(Unsupported):
            op(name)


def test_generic_accesses_reach_what_cvta_names() -> None:
    c = lanes(32, 2)
    for space, kind in product(("shared", "local"), ("b32", "b64")):
        generic = op(f"cvta.{space}.u64").run(np.array([16], np.uint64)).view(np.int64)
        value = np.arange(64, dtype=DTYPES[kind])
        op(f"st.{kind}").run(c, generic, value)
        got = op(f"ld.{space}.{kind}").run(c, addresses(16))
        # All lanes of a block write one place of its shared memory.
        last = {"shared": [31] * 32 + [63] * 32, "local": list(range(64))}[space]
        assert got.tolist() == last


def nothing(made: Op, *values: Any) -> None:
    """It runs on any address, and leaves no trace."""
    c = lanes(32, 1)
    version = c.wave.version
    assert made.run(c, *values) is None
    assert (made.results, c.wave.version) == ((), version)


def test_cache_instructions_do_nothing() -> None:
    wild = addresses(12345)
    for name in (
        "prefetch.global.L1",
        "prefetch.local.L2",
        "prefetch.L2",
        "prefetch.global.L2::evict_last",
        "prefetch.global.L2::evict_normal",
        "prefetch.param.tensormap",
        "prefetch.const.tensormap",
        "prefetch.tensormap",
        "prefetchu.L1",
    ):
        assert op(name, A).sources == ("addr",)
        nothing(op(name, A), wild)
    for name in ("applypriority.global.L2::evict_normal", "applypriority.L2::evict_normal"):
        assert op(name).sources == ("addr", "u32")
        nothing(op(name), wild, np.uint32([128]))
    for name in ("prefetch.L3", "prefetch.global", "prefetchu.L2", "prefetch.shared.L1"):
        with pytest.raises(Unsupported):
            op(name)
    for name in ("applypriority.global.L2::evict_last", "discard.L1", "discard.global"):
        with pytest.raises(Unsupported):
            op(name)


@pytest.mark.parametrize("name", ["discard.global.L2", "discard.L2"])
def test_discarded_lines_count_as_unwritten(name: str) -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.upload(np.zeros(128, np.uint32))
    c = lanes(1, 1, memory=memory)
    size = np.uint32([128])
    op(name).run(c, addresses(x.address + 128), size)
    read = op("ld.global.b32", check_memory=True)
    op(name, check_memory=True).run(c, addresses(x.address + 256), size)
    bad = []
    for at in range(0, 512, 4):
        try:
            read.run(c, addresses(x.address + at))
        except MemoryFault as error:
            bad.append((at, error.kind))
    assert bad == [(at, "read of unwritten memory") for at in range(256, 384, 4)]
    op("st.global.b32", check_memory=True).run(c, addresses(x.address + 260), size)
    read.run(c, addresses(x.address + 260))
    for address, kind in ((x.address + 64, "misaligned"), (x.address + 512, "out of bounds")):
        with pytest.raises(MemoryFault, match=kind):
            op(name, check_memory=True).run(c, addresses(address), size)
    locked = memory.upload(np.zeros(64, np.uint32), read_only=True)
    with pytest.raises(MemoryFault, match="read-only"):
        op(name, check_memory=True).run(c, addresses(locked.address), size)


def test_createpolicy_gives_an_opaque_value() -> None:
    one = np.zeros(1, np.float32)
    count = np.zeros(1, np.uint32)
    for name, operands, values in (
        ("createpolicy.fractional.L2::evict_last.b64", 2, (one,)),
        ("createpolicy.fractional.L2::evict_first.b64", 1, ()),
        ("createpolicy.fractional.L2::evict_last.L2::evict_unchanged.b64", 2, (one,)),
        ("createpolicy.range.global.L2::evict_last.b64", 4, (addresses(8), count, count)),
        ("createpolicy.range.L2::evict_last.L2::evict_first.b64", 4, (addresses(8), count, count)),
        ("createpolicy.cvt.L2.b64", 2, (np.zeros(1, np.uint64),)),
    ):
        made = op(name, *(A,) * operands)
        assert (made.results, len(made.sources)) == (("b64",), len(values))
        assert made.run(*values).dtype == np.uint64
    for name in (
        "createpolicy.fractional.b64",
        "createpolicy.L2::evict_last.b64",
        "createpolicy.fractional.L2::evict_last.u64",
        "createpolicy.fractional.L1::evict_last.b64",
        "createpolicy.cvt.b64",
    ):
        with pytest.raises(Unsupported):
            op(name)
