"""The kernels' FP8 numbers against cumla/fp8.py: every code under every scale, every rounding."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cumla import fp8, sim
from cumla.fp8 import BF16, SCALE_RULES
from cumla.jit import sources
from cumla.jit.nvrtc import compile_to_ptx

Array = NDArray[Any]

# sm_80 has neither e4m3 conversions nor bf16x2 products; what it does works on all others.
TARGETS = ("sm_80", "sm_90a")

KERNELS = r"""
#include "include/e4m3.cuh"
#include "include/fp8.cuh"

using namespace cumla;

// A thread decodes `groups` times 16 codes under one scale of its own.
extern "C" __global__ void decode(const Vec16* codes, u32 groups, const u16* scales, Vec16* out) {
    u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
    u32 scale = scales[thread] * 0x10001u;
    for (u32 i = 0; i < groups; i++)
        decode_e4m3x16(codes[i], scale, out[(thread * groups + i) * 2],
                       out[(thread * groups + i) * 2 + 1]);
}

extern "C" __global__ void scales(const float* floats, const u8* codes, u32* of_floats,
                                  u32* of_codes) {
    u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
    of_floats[thread] = scale_of_float(floats[thread]);
    of_codes[thread] = scale_of_ue8m0(codes[thread]);
}

extern "C" __global__ void encode(const float4* values, u32* codes) {
    u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
    float4 four = values[thread];
    codes[thread] = encode_e4m3x4(four.x, four.y, four.z, four.w);
}

template <ScaleRule RULE>
__device__ void encode_under(float amax, float value, float& scale, float& unscaled) {
    scale = tile_scale<RULE>(amax);
    unscaled = unscale<RULE>(value, scale, inverse_scale<RULE>(scale));
}

// For each rule the scale, its UE8M0 code and value / scale.
extern "C" __global__ void tile_scales(const float* amax, const float* values, float (*scale)[3],
                                       u8 (*codes)[3], float (*unscaled)[3]) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    encode_under<ScaleRule::FLASHMLA>(amax[i], values[i], scale[i][0], unscaled[i][0]);
    encode_under<ScaleRule::V4>(amax[i], values[i], scale[i][1], unscaled[i][1]);
    encode_under<ScaleRule::RAW>(amax[i], values[i], scale[i][2], unscaled[i][2]);
    for (int rule = 0; rule < 3; rule++) codes[i][rule] = ue8m0_of(scale[i][rule]);
}
"""


@cache
def module(target: str) -> tuple[sim.Device, Any]:
    device = sim.Device(target)
    name = "fp8_codes.cu"
    source = sources.flatten(name, lambda path: KERNELS if path == name else sources.read(path))
    ptx = compile_to_ptx(source, name, target, ["-std=c++17", "-default-device"])
    return device, device.load(ptx)


def run(target: str, kernel: str, threads: int, inputs: list[Any], outputs: list[Array]) -> None:
    """Launch for `threads` threads, a multiple of 128, and fetch the outputs."""
    device, loaded = module(target)
    given = [device.upload(one) if isinstance(one, np.ndarray) else one for one in inputs]
    results = [device.alloc(one.size, one.dtype) for one in outputs]
    loaded.kernel(kernel).launch(threads // 128, 128, [*given, *results], checks={"memory"})
    for one, result in zip(outputs, results, strict=True):
        one[...] = result.get().reshape(one.shape)
    for one in [*given, *results]:
        if isinstance(one, sim.DeviceArray):
            one.free()


def assert_same_bits(result: Array, reference: Array, inputs: Array) -> None:
    """bf16 or float32 numbers: the same bits, or both NaN."""
    kind = np.uint16 if result.itemsize == 2 else np.uint32
    with np.errstate(invalid="ignore"):
        equal = (result.view(kind) == reference.view(kind)) | (
            np.isnan(result) & np.isnan(reference)
        )
    where = np.argwhere(~equal)
    assert not len(where), (
        f"{len(where)} differ, first at {where[0]}: input {inputs[tuple(where[0])]}, "
        f"got {result[tuple(where[0])]}, wanted {reference[tuple(where[0])]}"
    )


# The 256 codes in order, where half of the groups of 16 have a NaN among them or not; then those
# next to NaN, the largest, without it.
CODES = np.concatenate(
    [
        np.arange(256, dtype=np.uint8),
        np.append(np.arange(0x70, 0x7F, dtype=np.uint8), np.uint8(0)),
        np.append(np.arange(0xF0, 0xFF, dtype=np.uint8), np.uint8(0x80)),
    ]
)


@pytest.mark.parametrize("target", TARGETS)
def test_every_code_decodes_under_every_scale(target: str) -> None:
    chunk = 1 << 14
    for first in range(0, 1 << 16, chunk):
        scales = np.arange(first, first + chunk).astype(np.uint16)
        result = np.empty((chunk, len(CODES)), BF16)
        run(target, "decode", chunk, [CODES, np.uint32(len(CODES) // 16), scales], [result])
        reference = np.empty(result.shape, np.float32)
        with np.errstate(invalid="ignore"):
            wide = scales.view(BF16).astype(np.float32)
        fp8.decode_tiles(np.broadcast_to(CODES, result.shape), wide, reference)
        # All are bf16 numbers in float32; their upper halves are their bits.
        bits = np.ascontiguousarray((reference.view(np.uint32) >> 16).astype(np.uint16))
        assert_same_bits(result, bits.view(BF16), np.broadcast_to(CODES, result.shape))


@pytest.mark.parametrize("place", range(16))
def test_a_nan_code_is_found_wherever_it_is(place: int) -> None:
    """Its neighbours keep their values, be they what adding 1 carries into or from."""
    rng = np.random.default_rng(place)
    groups = rng.choice(np.array([0x7E, 0xFE, 0x80, 0xFF, 0x00, 0x01], np.uint8), (64, 16))
    groups[groups == 0xFF] = 0xFD
    groups[:, place] = np.where(np.arange(64) % 2, 0x7F, 0xFF)
    scales = np.full(128, 0x3F80, np.uint16)
    result = np.empty((128, *groups.shape), BF16)
    run("sm_90a", "decode", 128, [groups, np.uint32(64), scales], [result])
    reference = fp8.decode_e4m3(groups).astype(BF16)
    assert np.isnan(reference[:, place]).all()
    for one in result[[0, 127]]:
        assert_same_bits(one, reference, groups)


@pytest.mark.parametrize("target", TARGETS)
def test_scales_become_bf16(target: str) -> None:
    # Every bf16 with what follows it: nothing, just below, on and just above the midpoint, all.
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    floats = (upper[:, None] | lower).reshape(-1).view(np.float32)
    codes = np.resize(np.arange(256, dtype=np.uint8), floats.shape)
    results = [np.empty(floats.shape, np.uint32) for _ in range(2)]
    run(target, "scales", floats.size, [floats, codes], results)
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = floats.astype(BF16), fp8.decode_ue8m0(codes).astype(BF16)
    for result, reference, inputs in zip(results, wanted, (floats, codes), strict=True):
        for half in (result >> 16, result & 0xFFFF):
            assert_same_bits(half.astype(np.uint16).view(BF16), reference, inputs)


@pytest.mark.parametrize("target", TARGETS)
def test_every_rounding_to_e4m3(target: str) -> None:
    # Midpoints of e4m3 numbers, down to 2**-10, are all among the bf16 numbers.
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x8000, 0xFFFF], np.uint32)
    values = np.ascontiguousarray((upper[:, None] | lower).T.reshape(-1)).view(np.float32)
    result = np.empty(values.shape, np.uint8)
    run(target, "encode", values.size // 4, [values], [result.view(np.uint32)])
    reference = fp8.encode_e4m3(values)
    where = np.flatnonzero(result != reference)
    assert not len(where), (len(where), values[where[0]], result[where[0]], reference[where[0]])


@pytest.mark.parametrize("target", TARGETS)
def test_every_scale_of_every_rule(target: str) -> None:
    # All finite amax, and a number that is not above it: divided, by "raw" too, as NumPy divides.
    bits = np.arange(0x7F80, dtype=np.uint16)
    amax = bits.view(BF16).astype(np.float32)
    rng = np.random.default_rng(1)
    lower = np.maximum(bits.astype(np.int64) - rng.integers(0, 1500, bits.shape), 0)
    values = lower.astype(np.uint16).view(BF16).astype(np.float32)
    shape = (len(bits), 3)
    scales, codes = np.empty(shape, np.float32), np.empty(shape, np.uint8)
    unscaled = np.empty(shape, np.float32)
    run(target, "tile_scales", len(bits), [amax, values], [scales, codes, unscaled])
    for i, rule in enumerate(SCALE_RULES):
        wanted = fp8.tile_scale(amax, rule)
        assert_same_bits(scales[:, i].copy(), wanted, amax)
        assert_same_bits(unscaled[:, i].copy(), values / wanted, values)
        if rule != "raw":
            np.testing.assert_array_equal(codes[:, i], fp8.encode_ue8m0(wanted))
