"""atom and red against a plain loop over the lanes, with sums rounded from exact fractions."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from cumla.sim.errors import MemoryFault
from cumla.sim.isa.table import DTYPES, Unsupported
from cumla.sim.memory import DeviceMemory
from cumla.sim.memory.device import BASE
from sim.lanes import WINDOWS, addresses, lanes
from sim.ops import op
from sim.sequential import FORMATS, apply, decode
from sim.waves import Recorder


def unsigned(kind: str) -> Any:
    return np.dtype(f"u{int(kind.strip('bfus')) // 8}")


INTEGER_FORMS = [
    *((o, k) for o in ("and", "or", "xor", "exch", "cas") for k in ("b32", "b64")),
    *((o, k) for o in ("add", "min", "max") for k in ("u32", "s32", "u64", "s64")),
    ("cas", "b16"),
    ("inc", "u32"),
    ("dec", "u32"),
]
FLOAT_FORMS = [("add", k) for k in ("f32", "f64", "f16", "bf16")]
# Which element each lane updates.
PATTERNS = ("one", "uniform", "own", "few", "any", "backwards")


def elements(pattern: str, n: int, rng: np.random.Generator) -> Any:
    return {
        "one": np.full(n, 3),
        "uniform": np.array([3]),
        "own": np.arange(n),
        "few": rng.integers(0, 5, n),
        "any": rng.integers(0, n, n),
        "backwards": np.arange(n)[::-1] // 2,
    }[pattern]


def bits_of(kind: str, n: int, rng: np.random.Generator, style: str) -> Any:
    """Random operands: of all bits, or small, or with edge values."""
    dtype = unsigned(kind)
    everything = rng.integers(0, 1 << (8 * dtype.itemsize), n, np.uint64, endpoint=False)
    if style == "small":
        everything = rng.integers(0, 4, n, np.uint64)
    elif style == "edges":
        top = 1 << (8 * dtype.itemsize - 1)
        edges = np.array([0, 1, 2, top - 1, top, top + 1, 2 * top - 1], np.uint64)
        everything = edges[rng.integers(0, 7, n)]
    return everything.astype(dtype)


def float_bits(kind: str, n: int, rng: np.random.Generator, style: str) -> Any:
    fraction_bits, exponent_bits = FORMATS[kind]
    dtype = unsigned(kind)
    if style == "all":
        return bits_of(kind, n, rng, "all")
    bias = (1 << (exponent_bits - 1)) - 1
    low, high = {"near": (bias - 2, bias + 3), "tiny": (0, 3)}[style]
    sign = rng.integers(0, 2, n, np.uint64) << np.uint64(fraction_bits + exponent_bits)
    exponent = rng.integers(low, high, n, np.uint64) << np.uint64(fraction_bits)
    fraction = rng.integers(0, 1 << fraction_bits, n, np.uint64)
    fraction[rng.random(n) < 0.2] = 0
    return (sign | exponent | fraction).astype(dtype)


def check(
    op_name: str, kind: str, space: str, pattern: str, style: str, wanted: bool, n: int = 64
) -> None:
    """Run one instruction on all lanes, and the same lane by lane."""
    rng = np.random.default_rng([n, wanted, *f"{op_name}{kind}{space}{pattern}{style}".encode()])
    dtype = unsigned(kind)
    make = float_bits if kind in FORMATS else bits_of
    start = make(kind, n, rng, style)
    b, third = make(kind, n, rng, style), make(kind, n, rng, style)
    if pattern == "uniform" and op_name != "cas":
        b = b[:1]
    memory = DeviceMemory(1 << 20)
    x = memory.upload(start)
    c = lanes(n, 1, memory=memory, shared=1024)
    index = elements(pattern, n, rng)
    where, plain = space.split() if " " in space else (space, space)
    if plain == "shared":
        op(f"st.shared.b{8 * dtype.itemsize}", check_memory=True).run(
            c, np.arange(n) * dtype.itemsize, start
        )
    origin = x.address
    if plain == "shared":
        origin = WINDOWS["shared"] if where == "generic" else 0
    at = origin + index * dtype.itemsize
    modifier = "" if where == "generic" else f".{where}"
    noftz = ".noftz" if kind in ("f16", "bf16") else ""
    opcode = "atom" if wanted else "red"
    made = op(f"{opcode}{modifier}.{op_name}{noftz}.{kind}", check_memory=True)
    operands = [b, third][: len(made.sources) - 1]
    version = c.wave.version
    with np.errstate(all="ignore"):
        result = made.run(c, at, *(v.view(DTYPES[kind]) for v in operands))

    flush = kind == "f32" and plain == "global"
    model = start.tolist()
    found = []
    index = np.broadcast_to(index, n)
    for lane in range(n):
        b_lane = int(b[lane % b.shape[0]])
        old = model[index[lane]]
        found.append(old)
        model[index[lane]] = apply(op_name, kind, old, b_lane, int(third[lane]), flush)
    if plain == "shared":
        with np.errstate(all="ignore"):
            load = op(f"ld.shared.b{8 * dtype.itemsize}")
            left = load.run(c, np.arange(n) * dtype.itemsize).tolist()
    else:
        left = x.get().tolist()
    compare(kind, left, model)
    if wanted:
        assert result.dtype == DTYPES[kind]
        assert result.shape == (n,)
        compare(kind, result.view(dtype).tolist(), found)
    else:
        assert result is None
    assert (c.wave.version > version) or left == start.tolist()


def compare(kind: str, got: list[int], wanted: list[int]) -> None:
    if kind == "f64":  # which NaN a double operation gives is not defined
        got = [g if decode(g, kind) == decode(g, kind) else -1 for g in got]
        wanted = [w if w == -1 or decode(w, kind) == decode(w, kind) else -1 for w in wanted]
    assert got == wanted


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("op_name", "kind"), INTEGER_FORMS)
def test_integer_atomics(op_name: str, kind: str, pattern: str) -> None:
    for space in ("global", "shared", "generic global", "generic shared"):
        for style in ("all", "small", "edges"):
            check(op_name, kind, space, pattern, style, True)
            if op_name not in ("exch", "cas"):
                check(op_name, kind, space, pattern, style, False)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("op_name", "kind"), FLOAT_FORMS)
def test_float_atomics_round_every_addition(op_name: str, kind: str, pattern: str) -> None:
    for space in ("global", "shared", "generic global", "generic shared"):
        for style in ("near", "tiny", "all"):
            for wanted in (True, False):
                check(op_name, kind, space, pattern, style, wanted)


def test_f32_additions_flush_in_global_memory_only() -> None:
    smallest = np.float32(2.0**-126)
    half = np.float32(2.0**-127)
    for space, wanted in (("global", 0.0), ("shared", 2.0**-127)):
        memory = DeviceMemory(1 << 20)
        x = memory.upload(np.array([1.5 * smallest, half, -half], np.float32))
        c = lanes(3, 1, memory=memory)
        op("st.shared.f32").run(c, np.arange(3) * 4, x.get())
        start = x.address if space == "global" else 0
        add = op(f"atom.{space}.add.f32")
        add.run(c, start + np.arange(3) * 4, np.array([-smallest, 0, -0.0], np.float32))
        if space == "shared":
            x.set(op("ld.shared.f32").run(c, np.arange(3) * 4))
        assert x.get().tolist() == [wanted, wanted, -wanted]
        assert np.signbit(x.get()).tolist() == [False, False, True]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op_name", ["add", "min", "max"])
@pytest.mark.parametrize("form", ["v2", "v4", "v8", "x2", "v2x2", "v4x2"])
@pytest.mark.parametrize("pattern", ["one", "own", "few"])
def test_packed_and_vector_atomics_update_each_element(
    kind: str, op_name: str, form: str, pattern: str
) -> None:
    if form == "x2" and op_name != "add":
        with pytest.raises(Unsupported):
            op(f"red.global.{op_name}.noftz.{kind}x2")
        return
    count = int(form[1]) if form[0] == "v" else 1
    packed = 2 if form.endswith("x2") else 1
    width = count * packed
    n = 16
    rng = np.random.default_rng(width)
    for style in ("near", "tiny", "all"):
        start = float_bits(kind, n * width, rng, style)
        values = float_bits(kind, n * width, rng, style).reshape(n, width)
        row = elements(pattern, n, rng)
        vector = f".v{count}" if count > 1 else ""
        name = f"global.{op_name}.noftz{vector}.{kind}{'x2' if packed == 2 else ''}"
        model = start.reshape(n, width).tolist()
        found = []
        for lane in range(n):
            found.append(list(model[row[lane]]))
            for k in range(width):
                model[row[lane]][k] = apply(
                    op_name, kind, model[row[lane]][k], int(values[lane, k]), 0, False
                )
        element = np.uint32 if packed == 2 else DTYPES[kind]
        columns = [values.view(element)[:, k].copy() for k in range(count)]
        for opcode in ("atom", "red"):
            memory = DeviceMemory(1 << 20)
            x = memory.upload(start)
            c = lanes(n, 1, memory=memory)
            with np.errstate(all="ignore"):
                result = op(f"{opcode}.{name}").run(c, x.address + row * width * 2, *columns)
            assert x.get().reshape(n, width).tolist() == model
            if opcode == "red":
                assert result is None
                continue
            columns_back = (result,) if count == 1 else result
            assert all(v.dtype == element for v in columns_back)
            back = np.stack(columns_back, axis=1).view(np.uint16)
            assert back.tolist() == found


@pytest.mark.parametrize("count", [2, 4])
def test_vectors_of_f32(count: int) -> None:
    n = 32
    rng = np.random.default_rng(count)
    values = rng.standard_normal((n, count)).astype(np.float32)
    row = rng.integers(0, 3, n)
    wanted = np.zeros((3, count), np.float32)
    found = []
    for lane in range(n):
        found.append(wanted[row[lane]].tolist())
        wanted[row[lane]] += values[lane]
    for name in (f"atom.global.add.v{count}.f32", f"red.relaxed.gpu.global.add.v{count}.f32"):
        memory = DeviceMemory(1 << 20)
        x = memory.upload(np.zeros((3, count), np.float32))
        c = lanes(n, 1, memory=memory)
        columns = tuple(np.ascontiguousarray(values.T))
        result = op(name).run(c, x.address + row * count * 4, *columns)
        assert x.get().tobytes() == wanted.tobytes()
        if name.startswith("atom"):
            assert np.stack(result, axis=1).tolist() == found


def test_a_chain_of_compare_and_swap() -> None:
    n = 64
    memory = DeviceMemory(1 << 20)
    lane = np.arange(n, dtype=np.uint32)
    for first, compare_with, value, left, seen in (
        # Each lane matches what the one before it left.
        (0, lane, lane + 1, n, lane),
        # One wins.
        (0, lane * 0, lane + 1, 1, np.minimum(lane, 1)),
        # Reading by compare and swap of equal values changes nothing.
        (5, lane * 0 + 5, lane * 0 + 5, 5, lane * 0 + 5),
        # One in the middle wins, and nobody matches what it leaves.
        (9, lane, lane + 100, 109, np.where(lane <= 9, 9, 109)),
    ):
        x = memory.upload(np.array([first], np.uint32))
        c = lanes(n, 1, memory=memory)
        old = op("atom.global.cas.b32").run(c, addresses(x.address), compare_with, value)
        assert (x.get().tolist(), old.tolist()) == ([left], seen.tolist())
        assert c.wave.version == (1 if left != first else 0)


def test_the_version_grows_only_when_something_changed() -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.upload(np.array([8, 8], np.uint32))
    c = lanes(32, 1, memory=memory)
    for name, value, grows in (
        ("atom.global.add.u32", 0, 0),
        ("red.global.add.u32", 0, 0),
        ("red.global.add.u32", 1, 1),
        ("atom.global.max.u32", 5, 0),
        ("red.global.or.b32", 8, 0),
        ("atom.global.exch.b32", 40, 0),
        ("atom.global.exch.b32", 7, 1),
        ("atom.global.exch.b32", 0x3F800000, 1),
        ("red.global.add.f32", 0, 0),
        ("atom.global.add.f32", 0, 0),
        ("atom.global.add.f32", 2.0**-30, 0),
        ("red.global.add.f32", 2.0**-10, 1),
    ):
        version = c.wave.version
        operand = np.array([value]).astype(DTYPES[name.split(".")[-1]])
        op(name).run(c, addresses(x.address), operand)
        assert c.wave.version - version == grows, name


def test_lanes_in_global_and_shared_memory_at_once() -> None:
    n = 64
    memory = DeviceMemory(1 << 20)
    x = memory.upload(np.array([100], np.uint32))
    c = lanes(32, 2, memory=memory)
    op("st.shared.b32", check_memory=True).run(c, addresses(8), np.uint32([200]))
    where = np.where(np.arange(n) % 2 == 0, x.address, WINDOWS["shared"] + 8)
    old = op("atom.add.u32", check_memory=True).run(c, where, np.uint32([1]))
    # Both blocks share the global counter, and have a counter each in shared memory.
    wanted = [100 + i // 2 if i % 2 == 0 else 200 + i % 32 // 2 for i in range(n)]
    assert old.tolist() == wanted
    assert op("red.add.u32").run(c, where, np.uint32([1])) is None
    assert x.get().tolist() == [164]
    assert op("ld.shared.b32").run(c, addresses(8)).tolist() == [232] * 64


@pytest.mark.parametrize(
    "name",
    [
        "atom.add.f16",
        "atom.add.noftz.u32",
        "atom.global.add.b32",
        "atom.global.min.f32",
        "atom.global.inc.u64",
        "atom.global.cas.b128",
        "atom.global.cas.u32",
        "atom.local.add.u32",
        "atom.shared.add.v2.f32",
        "atom.global.add.v8.f32",
        "atom.global.add.noftz.v8.f16x2",
        "atom.global.min.noftz.f16",
        "atom.global.exch.v2.b32",
        "atom.global.u32",
        "atom.global.mul.u32",
        "atom.global.add",
        "atom.weak.add.u32",
        "red.global.cas.b32",
        "red.global.exch.b32",
        "red.async.add.u32",
        "atom",
    ],
)
def test_forms_that_are_not(name: str) -> None:
    with pytest.raises(Unsupported):
        op(name)


@pytest.mark.parametrize(
    ("name", "sources", "results"),
    [
        ("atom.acq_rel.gpu.global.add.L2::cache_hint.u32", ("addr", "u32", "b64"), ("u32",)),
        ("atom.cas.b64", ("addr", "b64", "b64"), ("b64",)),
        ("red.release.sys.shared::cta.add.f64", ("addr", "f64"), ()),
        ("red.global.add.noftz.L2::cache_hint.v4.bf16x2", ("addr", *["bf16x2"] * 4, "b64"), ()),
        ("atom.relaxed.cluster.shared::cluster.xor.b32", ("addr", "b32"), ("b32",)),
    ],
)
def test_operands(name: str, sources: tuple[str, ...], results: tuple[str, ...]) -> None:
    made = op(name)
    assert (made.sources, made.results, made.cohort) == (sources, results, True)


def test_cache_policies_are_ignored() -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.upload(np.zeros(8, np.uint32))
    c = lanes(32, 1, memory=memory)
    policy = np.uint64([7])
    op("red.global.add.L2::cache_hint.u32").run(c, addresses(x.address), np.uint32([2]), policy)
    made = op("red.global.add.noftz.L2::cache_hint.v2.f16x2")
    made.run(c, addresses(x.address + 8), np.uint32([0x3C00]), np.uint32([0x3C000000]), policy)
    assert x.get()[:4].tolist() == [64, 0, 0x5000, 0x50000000]


@pytest.mark.parametrize(
    ("name", "order", "scope"),
    [
        ("atom.global.add.u32", "relaxed", "gpu"),
        ("red.add.u32", "relaxed", "gpu"),
        ("atom.acquire.cta.global.add.u32", "acquire", "cta"),
        ("atom.acq_rel.sys.add.u32", "acq_rel", "sys"),
        ("red.release.cluster.global.add.u32", "release", "cluster"),
    ],
)
def test_hooks(name: str, order: str, scope: str) -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.upload(np.zeros(8, np.uint32))
    c = lanes(32, 1, memory=memory)
    c.wave.race, c.wave.counters = race, counters = Recorder(), Recorder()
    made = op(name, check_race=True, count=True)
    made.run(c, addresses(x.address + 4), np.uint32([2]))
    ((_, _, space, offset, nbytes, kind, *rest),) = race.named("access")
    assert (space, nbytes, kind, rest) == ("global", 4, "atomic", [order, scope])
    assert offset.tolist() == [x.address + 4 - BASE] * 32
    ((_, _, space, address, nbytes, kind),) = counters.named("access")
    assert (space, nbytes, kind) == ("global", 4, "atomic")
    assert address.tolist() == [x.address + 4] * 32


def test_atomics_are_checked() -> None:
    memory = DeviceMemory(1 << 20)
    x = memory.alloc(8, np.uint32)
    k = memory.upload(np.zeros(8, np.uint32), read_only=True)
    c = lanes(32, 1, memory=memory)
    for name in ("atom.global.add.u32", "red.add.u32"):
        made = op(name, check_memory=True)
        for address, kind in (
            (x.address, "read of unwritten memory"),
            (x.address + 32, "out of bounds"),
            (x.address + 2, "misaligned"),
            (k.address, "write to read-only memory"),
        ):
            with pytest.raises(MemoryFault) as caught:
                made.run(c, addresses(address), np.uint32([1]))
            assert caught.value.kind == kind
    with pytest.raises(MemoryFault, match="out of bounds"):
        op("atom.add.u32", check_memory=True).run(c, addresses(WINDOWS["local"]), np.uint32([1]))
    made = op("atom.shared.add.u32", check_memory=True)
    with pytest.raises(MemoryFault, match="unwritten"):
        made.run(c, addresses(0), np.uint32([1]))


@pytest.mark.parametrize("kind", ["u32", "f32", "f16", "b32"])
def test_many_lanes_at_one_address_take_no_seconds(kind: str) -> None:
    n = 1024 * 32
    memory = DeviceMemory(1 << 24)
    x = memory.upload(np.zeros(4, np.uint32))
    c = lanes(1024, 32, memory=memory)
    rng = np.random.default_rng(0)
    value = rng.integers(1, 50, n).astype(DTYPES[kind])
    name, operands = {
        "u32": ("atom.global.inc.u32", (value,)),
        "f32": ("atom.global.add.f32", (value * np.float32(1e-38),)),
        "f16": ("red.global.add.noftz.f16", (value,)),
        # The longest chain: each lane swaps what the one before it has left.
        "b32": ("atom.global.cas.b32", (np.arange(n, dtype="u4"), np.arange(1, n + 1, dtype="u4"))),
    }[kind]
    made = op(name)
    start = time.perf_counter()
    with np.errstate(all="ignore"):
        made.run(c, addresses(x.address), *operands)
    assert time.perf_counter() - start < 1
    assert x.get()[0]
