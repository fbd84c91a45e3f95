"""wgmma against its slow definition: forms, descriptors, fragments, and wrong runs."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from cumla.sim.isa.wgmma_operands import Descriptor, chunk_addresses
from sim import wgmma_kit as kit
from sim.wgmma_kit import Case, descriptor

SIZE = 1 << 16
FLOATS = (
    ("f32", "f16", "f16"),
    ("f16", "f16", "f16"),
    ("f32", "bf16", "bf16"),
    ("f32", "tf32", "tf32"),
    ("f32", "e4m3", "e4m3"),
    ("f32", "e4m3", "e5m2"),
    ("f16", "e5m2", "e4m3"),
    ("f32", "e5m2", "e5m2"),
)
INTEGERS = tuple(("s32", a, b) for a in ("s8", "u8") for b in ("s8", "u8"))
INTEGER_N = (8, 16, 24, 32, *range(48, 257, 16))


def accumulators(case, rng):
    shape = (128, case.d_registers)
    if case.d == "f32":
        return rng.integers(-50, 50, shape).astype(np.float32).view(np.uint32)
    if case.d == "f16":
        halves = rng.integers(-50, 50, (128, 2 * case.d_registers)).astype(np.float16)
        return halves.view(np.uint32)
    return rng.integers(-(1 << 31), 1 << 31, shape).astype(np.int32).view(np.uint32)


def check(case, a_desc, b_desc, *, seed=0, scale=1, image=None, **how):
    """Run the case and compare it with the definition."""
    rng = np.random.default_rng(seed)
    image = kit.tame(case, rng, SIZE) if image is None else image
    c = accumulators(case, rng)
    fragment = kit.tame(case, rng, 128 * 16).view(np.uint32).reshape(128, 4)
    got = kit.run(case, image, a_desc, b_desc, c, scale, fragment, **how)
    a = kit.matrix(image, case.a, 64, a_desc, case.a_mn)
    if case.a_registers:
        a = kit.fragment_matrix(case, fragment)
    b = kit.matrix(image, case.b, case.n, b_desc, case.b_mn)
    want = kit.expected(case, a, b, c, scale)
    assert np.count_nonzero(want) > want.size // 2
    np.testing.assert_array_equal(got, want)


A = descriptor(1024, 0, 1024, 1)
B = descriptor(16384, 0, 1024, 1)


@pytest.mark.parametrize("types", FLOATS, ids=".".join)
@pytest.mark.parametrize("in_registers", [False, True])
def test_types(types, in_registers):
    check(Case(24, *types, a_registers=in_registers), A, B)


@pytest.mark.parametrize("types", INTEGERS, ids=".".join)
@pytest.mark.parametrize("satfinite", [False, True])
def test_integers(types, satfinite):
    case = Case(16, *types, satfinite=satfinite, a_registers=satfinite)
    image = np.random.default_rng(3).integers(0, 256, SIZE).astype(np.uint8)
    check(case, A, B, image=image)


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_every_n(n):
    check(Case(n, "f32", "f16", "f16"), A, B)
    if n in INTEGER_N:
        check(Case(n, "s32", "u8", "u8"), A, B)


@pytest.mark.parametrize("scale_a", [1, -1])
@pytest.mark.parametrize("scale_b", [1, -1])
@pytest.mark.parametrize("kind", ["bf16", "tf32"])
def test_negated_operands(scale_a, scale_b, kind):
    check(Case(8, "f32", kind, kind, scale_a=scale_a, scale_b=scale_b), A, B)


@pytest.mark.parametrize("case", [Case(16, "f32", "f16", "f16"), Case(16, "f16", "f16", "f16")])
@pytest.mark.parametrize("delivery", ["eager", "late", "random"])
def test_without_the_accumulators(case, delivery):
    check(case, A, B, scale=0, delivery=delivery)


# Layouts: (swizzle, base offset, start, leading, stride); what they do not use is odd on purpose.
LAYOUTS = [
    (0, 0, 0, 128, 256),
    (0, 0, 16 * 37, 16 * 77, 16 * 9),
    (0, 5, 1024, 4096, 128),
    (1, 0, 1024, 16, 1024),
    (1, 0, 1024 + 32, 16 * 513, 1024),
    (1, 0, 2048 + 96, 2048, 16 * 75),
    (1, 3, 1024 + 3 * 128, 4096, 1024),
    (1, 6, 1024 + 5 * 128 + 16, 2064, 2064),
    (2, 0, 512, 512, 512),
    (2, 0, 512 + 32, 1024, 16 * 33),
    (2, 1, 512 + 128, 1024, 528),
    (2, 7, 512 + 3 * 128 + 48, 1040, 1024),
    (3, 0, 256, 256, 256),
    (3, 1, 256 + 128, 512, 16 * 21),
    (3, 2, 16 * 43, 16 * 43, 16 * 31),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("a_mn", "b_mn"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_layouts(layout, a_mn, b_mn):
    swizzle, base, start, leading, stride = layout
    bits = descriptor(start, leading, stride, swizzle, base)
    other = descriptor(start + 4096, leading, stride, swizzle, base)
    check(Case(40, "f32", "f16", "f16", a_mn, b_mn), bits, other)
    if not a_mn and not b_mn:
        check(Case(16, "f32", "tf32", "tf32"), bits, other)
        check(Case(24, "f32", "e4m3", "e5m2"), bits, other)


@pytest.mark.parametrize("mn_major", [0, 1])
def test_every_chunk_lies_where_its_elements_do(mn_major):
    rng = np.random.default_rng(11)
    for _ in range(60):
        swizzle, base = int(rng.integers(4)), int(rng.integers(8))
        start, leading, stride = (int(x) * 16 for x in rng.integers(0, 1 << 14, 3))
        bits = descriptor(start, leading, stride, swizzle, base)
        found = chunk_addresses(bits, 32, bool(mn_major)).addresses
        for _ in range(20):
            row, k = int(rng.integers(32)), int(rng.integers(16))
            at = start + kit.element_byte(row, k, 2, leading, stride, swizzle, mn_major)
            at = kit.swizzled(at, swizzle, base)
            chunk = (
                found[k, row // 8] + 2 * (row % 8) if mn_major else found[row, k // 8] + k % 8 * 2
            )
            assert chunk == at


def test_a_descriptor_keeps_its_fields():
    fields = Descriptor(0x3FFF0, 0x12340, 0x20010, 5, 2)
    assert Descriptor.of(fields.bits) == fields
    assert fields.bits == descriptor(0x3FFF0, 0x12340, 0x20010, 2, 5)
    assert "start 0x3fff0" in str(fields)
    assert "64-byte swizzle" in str(fields)


def test_bits_are_counted():
    # b1 with and.popc: the bits that are set in both.
    text = kit.text(Case(8, "s32", "u8", "u8")).replace(
        "m64n8k32.s32.u8.u8", "m64n8k256.s32.b1.b1.and.popc"
    )
    device = sim.Device("sm_90a", memory_bytes=1 << 20)
    image = np.random.default_rng(5).integers(0, 256, 8192).astype(np.uint8)
    c = np.arange(512, dtype=np.int32).reshape(128, 4)
    out = device.alloc((128, 4), np.int32)
    nothing = device.upload(np.zeros((128, 4), np.uint32))
    given = [device.upload(image), image.nbytes, nothing, descriptor(0, 128, 256, 0)]
    given += [descriptor(4096, 128, 256, 0), 1, device.upload(c), out]
    device.load(text).kernel("k").launch(1, 128, given, shared_bytes=image.nbytes)

    def rows(start, count):
        data = image[start : start + count * 32].reshape(count // 8, 2, 8, 16).transpose(0, 2, 1, 3)
        return np.unpackbits(data.reshape(count, 32), axis=1).astype(int)

    product = rows(0, 64) @ rows(4096, 8).T
    lane = np.arange(128)
    row, column = 16 * (lane // 32) + lane % 32 // 4, 2 * (lane % 4)
    want = np.stack([product[row + 8 * (i // 2), column + i % 2] for i in range(4)], axis=1)
    np.testing.assert_array_equal(out.get(), c + want)


def test_special_values():
    """Infinities, NaN, and the low bits of tf32, which are not part of the number."""
    case = Case(8, "f32", "tf32", "tf32")
    image = np.zeros(SIZE // 4, np.uint32)
    image.view(np.float32)[: 64 * 8] = 1.0
    image[: 64 * 8] |= 0x1FFF
    image.view(np.float32)[0] = np.inf
    image.view(np.float32)[64] = np.nan  # row 8
    start = 4096 // 4
    image.view(np.float32)[start : start + 64] = 2.0
    zero = np.full((128, 4), 0x80000000, np.uint32)
    a, b = descriptor(0, 128, 256, 0), descriptor(4096, 128, 256, 0)
    got = kit.run(case, image.view(np.uint8), a, b, zero).view(np.float32)
    assert np.isposinf(got[0, :2]).all()
    assert (got[0, 2:].view(np.uint32) == 0x7FFFFFFF).all()
    assert (got[127] == 16.0).all()
    nan = kit.run(case, image.view(np.uint8), a, b, np.full((128, 4), 0x7F800001, np.uint32))
    assert (nan == 0x7FFFFFFF).all()
    # A sum of zeros is +0.0.
    empty = np.zeros(SIZE, np.uint8)
    assert not kit.run(case, empty, a, b, zero).any()


# What is wrong with a run


def failing(error, a_desc=A, b_desc=B, *, size=SIZE, image=None, case=None, **how):
    case = case or Case(16, "f32", "f16", "f16")
    data = np.zeros(size, np.uint8) if image is None else image
    with pytest.raises(error) as caught:
        kit.run(case, data, a_desc, b_desc, np.zeros((128, case.d_registers), np.uint32), **how)
    return caught.value


@pytest.mark.parametrize("checks", [("memory",), ("memory", "race"), ()])
@pytest.mark.parametrize("name", ["A", "B"])
def test_operands_outside_shared_memory(name, checks):
    outside = descriptor(SIZE - 512, 0, 1024, 1)
    # Without the check only what is far outside is caught.
    far = descriptor(SIZE - 512, 0, 1 << 17, 1)
    bad = outside if checks else far
    error = failing(sim.MemoryFault, *((bad, B) if name == "A" else (A, bad)), checks=checks)
    assert error.kind == "out of bounds"
    assert f"reads {name} at shared address" in str(error)
    assert "128-byte swizzle" in str(error)
    assert f"stride byte offset {1024 if checks else 1 << 17}" in str(error)
    assert error.where.thread == (0, 0, 0)


def test_operands_that_nobody_has_written():
    case = Case(16, "f32", "f16", "f16")
    loaded = kit.module(case)
    device = loaded.device
    fragments = device.upload(np.zeros((128, 4), np.uint32))
    c = device.upload(np.zeros((128, 8), np.uint32))
    image = device.upload(np.zeros(16384, np.uint8))
    out = device.alloc((128, 8), np.uint32)
    given = [image, 16384, fragments, A, B, 1, c, out]
    with pytest.raises(sim.MemoryFault) as caught:
        loaded.kernel("k").launch(1, 128, given, shared_bytes=SIZE)
    assert caught.value.kind == "read of unwritten memory"
    assert "reads B" in str(caught.value)
    assert caught.value.address == 1024 + 16384
    loaded.kernel("k").launch(1, 128, given, shared_bytes=SIZE, checks=())


def test_a_warpgroup_must_be_whole():
    case = Case(8, "f32", "f16", "f16")
    loaded = kit.module(case)
    device = loaded.device
    rows = [device.upload(np.zeros((256, 4), np.uint32)) for _ in range(3)]
    image = device.upload(np.zeros(SIZE, np.uint8))
    for threads in (32, 96, 160):
        given = [image, SIZE, rows[0], A, B, 1, rows[1], rows[2]]
        with pytest.raises(sim.KernelTrap, match="threads of a warpgroup") as caught:
            loaded.kernel("k").launch(1, threads, given, shared_bytes=SIZE)
        assert caught.value.where.thread == (0 if threads < 128 else 128, 0, 0)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("add.u64 %rd5, %rd5, %rd4;", "a-desc"),
        ("add.u64 %rd6, %rd6, %rd4;", "b-desc"),
        ("setp.ne.u32 %p2, %r8, 0;", "scale-d"),
    ],
)
def test_operands_must_be_the_same_in_a_warpgroup(line, name):
    changed = {
        "a-desc": line + "\ncvt.u64.u32 %rd12, %r1;\nshr.u64 %rd12, %rd12, 6;\n"
        "add.u64 %rd5, %rd5, %rd12;",
        "b-desc": line + "\ncvt.u64.u32 %rd12, %r1;\nshr.u64 %rd12, %rd12, 6;\n"
        "add.u64 %rd6, %rd6, %rd12;",
        "scale-d": "setp.lt.u32 %p2, %r1, 64;",
    }
    text = kit.text(Case(8, "f32", "f16", "f16"))
    assert line in text
    device = sim.Device("sm_90a", memory_bytes=1 << 20)
    rows = [device.upload(np.zeros((128, 4), np.uint32)) for _ in range(3)]
    image = device.upload(np.zeros(SIZE, np.uint8))
    given = [image, SIZE, rows[0], A, B, 1, rows[1], rows[2]]
    loaded = device.load(text.replace(line, changed[name]))
    with pytest.raises(sim.KernelTrap, match=f"{name} of wgmma") as caught:
        loaded.kernel("k").launch(1, 128, given, shared_bytes=SIZE)
    assert caught.value.where.thread == (64, 0, 0)


def test_counters():
    case = Case(64, "f32", "f16", "f16")
    loaded = kit.module(case)
    device = loaded.device
    rows = [device.upload(np.zeros((256, 32), np.uint32)) for _ in range(3)]
    image = device.upload(np.zeros(SIZE, np.uint8))
    given = [image, SIZE, rows[0], A, B, 1, rows[1], rows[2]]
    launch = loaded.kernel("k").launch(3, 256, given, shared_bytes=SIZE, counters=True)
    total = launch.counters.total()
    assert total.tensor_flops == 3 * 2 * 2 * 64 * 64 * 16
    # mma_async, fence, commit_group and wait_group.
    assert total.by_class["tensor"] == 3 * 8 * 4


def test_many_blocks_and_warpgroups():
    """Each block has an image of its own, from a grid of which some blocks wait for others."""
    case = Case(16, "f32", "f16", "f16")
    rng = np.random.default_rng(2)
    blocks = 5
    text = (
        kit.text(case)
        .replace(
            "ld.param.u64 %rd1, [image];",
            f"ld.param.u64 %rd1, [image];\nmov.u32 %r9, %ctaid.x;\n"
            f"mul.wide.u32 %rd13, %r9, {SIZE};\nadd.u64 %rd1, %rd1, %rd13;",
        )
        .replace(
            "ld.param.u64 %rd11, [out];",
            f"ld.param.u64 %rd11, [out];\nmul.wide.u32 %rd14, %r9, {256 * 4 * case.d_registers};\n"
            "add.u64 %rd11, %rd11, %rd14;",
        )
    )
    device = sim.Device("sm_90a", memory_bytes=1 << 22)
    images = kit.tame(case, rng, SIZE * blocks).reshape(blocks, SIZE)
    c = accumulators(case, rng)
    out = device.alloc((blocks, 256, case.d_registers), np.uint32)
    given = [device.upload(images), SIZE, device.upload(np.zeros((256, 4), np.uint32)), A, B, 1]
    given += [device.upload(np.concatenate([c, c])), out]
    loaded = device.load(text)
    for wave_blocks in (2, 5):
        loaded.kernel("k").launch(
            blocks, 256, given, shared_bytes=SIZE, wave_blocks=wave_blocks, delivery="random"
        )
        for i in range(blocks):
            a = kit.matrix(images[i], "f16", 64, A, 0)
            b = kit.matrix(images[i], "f16", 16, B, 0)
            want = kit.expected(case, a, b, c, 1)
            np.testing.assert_array_equal(out.get()[i], np.concatenate([want, want]))
