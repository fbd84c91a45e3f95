"""One wgmma in a kernel of its own, and the slow definition of what it must give."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from cumla import sim

TYPES: dict[str, Any] = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "tf32": np.float32,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "s8": np.int8,
    "u8": np.uint8,
}
WIDTH = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}
# Swizzling mode -> its bytes.
SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}


@dataclass(frozen=True)
class Case:
    """A wgmma; `a_registers`: A is a fragment."""

    n: int
    d: str
    a: str
    b: str
    a_mn: int = 0
    b_mn: int = 0
    scale_a: int = 1
    scale_b: int = 1
    a_registers: bool = False
    satfinite: bool = False

    @property
    def k(self) -> int:
        return 32 // WIDTH[self.a]

    @property
    def name(self) -> str:
        saturates = ".satfinite" if self.satfinite else ""
        types = f"{saturates}.{self.d}.{self.a}.{self.b}"
        return f"wgmma.mma_async.sync.aligned.m64n{self.n}k{self.k}{types}"

    @property
    def d_registers(self) -> int:
        return self.n // 4 if self.d == "f16" else self.n // 2

    @property
    def options(self) -> str:
        """The immediates behind scale-d."""
        words: list[int] = []
        if self.a not in ("s8", "u8"):
            words += [self.scale_a, self.scale_b]
        if self.a in ("f16", "bf16"):
            words += ([] if self.a_registers else [self.a_mn]) + [self.b_mn]
        return "".join(f", {w}" for w in words)


def descriptor(start: int, leading: int, stride: int, swizzle: int, base: int = 0) -> int:
    fields = (start & 0x3FFFF) >> 4, (leading & 0x3FFFF) >> 4, (stride & 0x3FFFF) >> 4
    return fields[0] | fields[1] << 16 | fields[2] << 32 | base << 49 | swizzle << 62


@cache
def text(case: Case, target: str = "sm_90a") -> str:
    """PTX of a kernel that fills shared memory from `image`, runs the case and stores D."""
    count = case.d_registers
    kind = "f32" if case.d == "f32" else "b32"
    d = ", ".join(f"%d{i}" for i in range(count))
    a = "{%a0, %a1, %a2, %a3}" if case.a_registers else "%rd5"
    loads = "\n".join(f"ld.global.{kind} %d{i}, [%rd10+{4 * i}];" for i in range(count))
    stores = "\n".join(f"st.global.{kind} [%rd11+{4 * i}], %d{i};" for i in range(count))
    return f"""
.version 8.7
.target {target}
.address_size 64
.extern .shared .align 1024 .b8 dyn[];
.visible .entry k(.param .u64 image, .param .u32 size, .param .u64 a, .param .u64 a_desc,
    .param .u64 b_desc, .param .u32 scale, .param .u64 c, .param .u64 out)
{{
.reg .pred %p<4>; .reg .b32 %r<10>; .reg .b64 %rd<16>; .reg .{kind} %d<{count}>; .reg .b32 %a<4>;
mov.u32 %r1, %tid.x;
ld.param.u64 %rd1, [image];
ld.param.u32 %r2, [size];
mov.u32 %r3, dyn;
shl.b32 %r4, %r1, 2;
LOOP:
setp.ge.u32 %p1, %r4, %r2;
@%p1 bra DONE;
cvt.u64.u32 %rd2, %r4;
add.u64 %rd3, %rd1, %rd2;
ld.global.b32 %r5, [%rd3];
add.u32 %r6, %r3, %r4;
st.shared.b32 [%r6], %r5;
add.u32 %r4, %r4, 512;
bra LOOP;
DONE:
bar.sync 0;
fence.proxy.async;
shr.u32 %r7, %r3, 4;
cvt.u64.u32 %rd4, %r7;
ld.param.u64 %rd5, [a_desc];
add.u64 %rd5, %rd5, %rd4;
ld.param.u64 %rd6, [b_desc];
add.u64 %rd6, %rd6, %rd4;
ld.param.u32 %r8, [scale];
setp.ne.u32 %p2, %r8, 0;
ld.param.u64 %rd7, [a];
mul.wide.u32 %rd8, %r1, 16;
add.u64 %rd7, %rd7, %rd8;
ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%rd7];
ld.param.u64 %rd10, [c];
ld.param.u64 %rd11, [out];
mul.wide.u32 %rd9, %r1, {4 * count};
add.u64 %rd10, %rd10, %rd9;
add.u64 %rd11, %rd11, %rd9;
{loads}
wgmma.fence.sync.aligned;
{case.name} {{{d}}}, {a}, %rd6, %p2{case.options};
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
{stores}
ret;
}}
"""


@cache
def module(case: Case) -> sim.LoadedModule:
    return sim.Device("sm_90a", memory_bytes=1 << 22).load(text(case))


def run(
    case: Case,
    image: Any,
    a_desc: int,
    b_desc: int,
    c: Any,
    scale: int = 1,
    a: Any = None,
    **how: Any,
) -> Any:
    """D of one warpgroup, [128, registers] uint32; c likewise; a: [128, 4] uint32."""
    loaded = module(case)
    device = loaded.device
    fragments = np.zeros((128, 4), np.uint32) if a is None else a
    arrays = [device.upload(x) for x in (image, fragments, c)]
    out = device.alloc((128, case.d_registers), np.uint32)
    given = [arrays[0], image.nbytes, arrays[1], a_desc, b_desc, scale, arrays[2], out]
    loaded.kernel("k").launch(
        1, 128, given, shared_bytes=image.nbytes, **{"checks": ("memory", "race"), **how}
    )
    return out.get()


# The definition


def element_byte(
    row: int, k: int, width: int, leading: int, stride: int, swizzle: int, mn_major: int
) -> int:
    """Where the first byte of an element lies from the matrix's start, before the swizzle.

    PTX ISA "Canonical Layouts", in units of elements: T of them make 16 bytes.
    """
    t = 16 // width
    lbo, sbo = leading // width, stride // width
    s = SWIZZLE_BYTES[swizzle] // 16
    if mn_major:
        inner, middle, outer = row % t, row // t % s, row // (t * s)
        if swizzle == 0:
            at = inner + outer * sbo + k % 8 * t + k // 8 * lbo
        else:
            at = inner + middle * t + outer * lbo + k % 8 * s * t + k // 8 * sbo
    else:
        at = row % 8 * s * t + row // 8 * sbo + k % t + k // t * (lbo if swizzle == 0 else t)
    return at * width


def swizzled(address: int, swizzle: int, base: int) -> int:
    """The address with its bits [4, 7) xored with bits [7, 10), as many as the mode has."""
    bits = {0: 0, 1: 3, 2: 2, 3: 1}[swizzle]
    row = (address // 128 - base) % (1 << bits)
    return address ^ row * 16


def matrix(
    image: Any, kind: str, rows: int, desc: int, mn_major: int, start: int | None = None
) -> Any:
    """[rows, k] float64: the elements that a descriptor names in an image of shared memory."""
    width = WIDTH[kind]
    fields = [(desc >> low & 0x3FFF) * 16 for low in (0, 16, 32)]
    swizzle, base = desc >> 62, desc >> 49 & 7
    data = image.view(np.uint8)
    out = np.zeros((rows, 32 // width))
    for row in range(rows):
        for k in range(32 // width):
            at = fields[0] + element_byte(row, k, width, fields[1], fields[2], swizzle, mn_major)
            at = swizzled(at, swizzle, base)
            code = data[at : at + width].copy()
            if kind == "tf32":
                code = (code.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.uint8)
            out[row, k] = float(code.view(TYPES[kind])[0])
    return out


def fragment_matrix(case: Case, a: Any) -> Any:
    """[64, k] float64: A from [128, 4] registers."""
    width = WIDTH[case.a]
    each = 4 // width
    out = np.zeros((64, case.k))
    for lane in range(128):
        warp, g, t = lane // 32, lane % 32 // 4, lane % 4
        for register in range(4):
            code = a[lane, register : register + 1].copy()
            if case.a == "tf32":
                code &= np.uint32(0xFFFFE000)
            row = 16 * warp + g + 8 * (register % 2)
            k = each * (t + 4 * (register // 2))
            out[row, k : k + each] = code.view(TYPES[case.a]).astype(np.float64)
    return out


def expected(case: Case, a: Any, b: Any, c: Any, scale: int) -> Any:
    """D as [128, registers] uint32 from A [64, k], B [n, k] and C in registers."""
    product = a @ b.T * (case.scale_a * case.scale_b)
    out = np.zeros((128, case.d_registers), np.uint32)
    for lane in range(128):
        warp, g, t = lane // 32, lane % 32 // 4, lane % 4
        for j in range(case.n // 8):
            for half in range(2):
                row, column = 16 * warp + g + 8 * half, 8 * j + 2 * t
                pair = product[row, column : column + 2]
                at = (
                    2 * j + half
                    if case.d == "f16"
                    else slice(4 * j + 2 * half, 4 * j + 2 * half + 2)
                )
                old = c[lane, at] if scale else np.zeros_like(c[lane, at])
                out[lane, at] = add(case, pair, np.atleast_1d(old))
    return out


def add(case: Case, pair: Any, old: Any) -> Any:
    if case.d == "f16":
        total = pair.astype(np.float32) + old.view(np.float16).astype(np.float32)
        return total.astype(np.float16).view(np.uint32)[0]
    if case.d == "f32":
        return (pair.astype(np.float32) + old.view(np.float32) + np.float32(0)).view(np.uint32)
    exact = pair.astype(np.int64) + old.view(np.int32)
    if case.satfinite:
        exact = np.clip(exact, -(1 << 31), (1 << 31) - 1)
    return exact.astype(np.int32).view(np.uint32)


def tame(case: Case, rng: Any, nbytes: int) -> Any:
    """Bytes that are small numbers as elements of A's and B's types."""
    dtype = TYPES[case.a]
    values = rng.integers(0 if "u8" in (case.a, case.b) else -4, 5, nbytes // WIDTH[case.a])
    return values.astype(np.float32).astype(dtype).view(np.uint8)
