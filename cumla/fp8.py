"""FP8 numbers: e4m3 values, UE8M0 scales and the named rules by which a tile gets its scale.

This is the NumPy definition, vectorised, that kernels are held against byte for byte. Its callers
have checked their arrays: native float32, uint8 codes, bf16 tiles.

e4m3 ("e4m3fn"): 1 sign, 4 exponent (bias 7), 3 mantissa bits, no infinity, NaN = 0x7F and 0xFF,
largest value 448, smallest subnormal 2**-9 (OCP 8-bit Floating Point Specification 1.0).
UE8M0: one byte e for the power of two 2**(e - 127), NaN = 255 (OCP Microscaling Formats 1.0).

bf16 has the exponent range of float32 and its upper 16 bits, which the bit arithmetic below uses.
"""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cumla.checks import bad_value
from cumla.scratch import scratch

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]
ScaleRule = Literal["flashmla", "v4", "raw"]
SCALE_RULES: tuple[ScaleRule, ...] = ("flashmla", "v4", "raw")

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3_MAX = np.float32(448.0)
E4M3_NAN = np.uint8(0x7F)
UE8M0_NAN = np.uint8(0xFF)

# The scale rules' floors: FlashMLA's test quantiser clamps the scale, DeepSeek-V4's clamps amax.
_FLASHMLA_MIN_SCALE = np.float32(1e-4)
_V4_MIN_AMAX = np.float32(1e-4)
# An all-zero tile must not divide 0 by 0: the least normal float32 stands in, as in vLLM's writer.
_RAW_MIN_SCALE = np.finfo(np.float32).tiny

_BF16_ABS = np.uint16(0x7FFF)
_BF16_INF = np.uint16(0x7F80)
_BF16_MAX_FINITE = np.uint16(0x7F7F)


def _ue8m0_table() -> Float32:
    with np.errstate(over="ignore"):
        table = np.exp2(np.arange(256) - 127.0).astype(np.float32)
    table[UE8M0_NAN] = np.nan
    return table


UE8M0_TABLE: Float32 = _ue8m0_table()
"""float32 [256]: the power of two behind every UE8M0 byte."""
UE8M0_TABLE.flags.writeable = False


# Where e4m3's sign, exponent and mantissa sit in a float32 after a shift of the sign-extended byte.
_E4M3_FIELDS = np.uint32(0x87F00000).view(np.int32)
# float32's exponent bias is 127 and e4m3's is 7, so the shifted bits read 2**-120 times the value.
_BIAS_STEP = np.float32(2.0**120)
# Values decoded at a time. 1 MB of float32 is more than the best for a core's L2 cache, but every
# pass takes Python's lock once, and threads that wait for it lose more.
_DECODE_VALUES = 1 << 18


def _shift_codes(codes: Bytes, out: Float32) -> None:
    """Fill `out` with 2**-120 times the values of e4m3 `codes`, exactly; NaN codes give +-480.

    Subnormal codes become subnormal float32 numbers, so no case needs a branch. Two passes of
    integer SIMD cost half of a table lookup.
    """
    bits = out.view(np.int32)
    np.left_shift(codes.view(np.int8), 20, out=bits, dtype=np.int32)
    np.bitwise_and(bits, _E4M3_FIELDS, out=bits)


def _nan_codes(codes: Bytes) -> NDArray[np.bool_]:
    magnitude = np.bitwise_and(codes, 0x7F, out=scratch("fp8.magnitude", codes.shape, np.uint8))
    return np.equal(magnitude, E4M3_NAN, out=scratch("fp8.is_nan", codes.shape, np.bool_))


def decode_e4m3(codes: Bytes) -> Float32:
    """The values of e4m3 `codes` (uint8, any shape) as float32, exactly; NaN codes give NaN."""
    values = np.empty(codes.shape, np.float32)
    _shift_codes(codes, values)
    np.multiply(values, _BIAS_STEP, out=values)
    values[_nan_codes(codes)] = np.nan
    return values


def encode_e4m3(values: Float32) -> Bytes:
    """float32 `values` (any shape) as e4m3 codes.

    Rounds to nearest, ties to even; saturates, infinities included, to +-448; NaN gives 0x7F
    (PTX `cvt.rn.satfinite.e4m3x2.f32`).
    """
    # A signalling NaN raises "invalid" wherever it is computed with; here it is a NaN like others.
    with np.errstate(invalid="ignore"):
        return _encode_e4m3(values)


def _encode_e4m3(values: Float32) -> Bytes:
    magnitude = np.minimum(np.abs(values), E4M3_MAX)
    bits = magnitude.view(np.uint32)
    # A float32 with 20 more in its exponent has 2**(e - 3) as its last place: adding it to the
    # magnitude rounds that to three mantissa bits, ties to even. 121 = 127 - 6 is the exponent
    # below which e4m3 is subnormal and its last place stays 2**-9.
    exponent = np.maximum(bits >> 23, np.uint32(121))
    shifter = (exponent + np.uint32(20)) << 23
    shifter = np.add(magnitude, shifter.view(np.float32)).view(np.uint32)
    # The low bits now count last places: 8..16 for a normal number, 0..8 for a subnormal one. A
    # carry to 16 or 8 runs into the exponent field, as it should.
    code = ((exponent - np.uint32(121)) << 3) + (shifter & np.uint32(0x1F))
    code |= (values.view(np.uint32) >> 24) & np.uint32(0x80)
    result: Bytes = np.asarray(code.astype(np.uint8))
    unordered = np.isnan(magnitude)
    if unordered.any():
        result[unordered] = E4M3_NAN
    return result


def decode_ue8m0(codes: Bytes) -> Float32:
    """The powers of two behind UE8M0 `codes` (uint8, any shape) as float32; 255 gives NaN."""
    return UE8M0_TABLE[codes]


def encode_ue8m0(scales: Float32) -> Bytes:
    """The UE8M0 bytes of float32 `scales`; what is no power of two in range gives NaN (255)."""
    # Both formats have bias 127: the code is the biased exponent. 2**-127 alone is subnormal.
    bits = np.asarray(scales, np.float32).view(np.uint32)
    code = bits >> 23
    valid = (bits & 0x7FFFFF == 0) & (code > 0) & (code < 255)
    code = np.where(valid, code, UE8M0_NAN)
    return np.where(bits == 0x400000, 0, code).astype(np.uint8)


def ceil_power_of_two(values: Float32) -> Float32:
    """The least power of two >= each positive, normal float32 in `values`, by bit arithmetic."""
    bits = values.view(np.uint32)
    exponent = (bits + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)
    return exponent.view(np.float32)


def tile_amax(tiles: NDArray[Any]) -> Float32:
    """max |x| over the last axis of bf16 `tiles`, as float32.

    NaN elements do not count (CUDA's fmaxf), so their neighbours are encoded as if they were not
    there. An infinity counts as the largest finite bf16: it comes back as an infinity or as a
    number near that, and what is small beside it as 0.
    """
    magnitude = tiles.view(np.uint16) & _BF16_ABS
    peak = magnitude.max(axis=-1)
    if (peak >= _BF16_INF).any():
        magnitude[magnitude > _BF16_INF] = 0
        peak = np.minimum(magnitude.max(axis=-1), _BF16_MAX_FINITE)
    return peak.view(BF16).astype(np.float32)


def tile_scale(amax: Float32, rule: ScaleRule) -> Float32:
    """The scale of a tile whose largest magnitude is `amax` (float32, any shape).

    - "flashmla": 2**ceil(log2(max(amax / 448, 1e-4))), so at least 2**-13 (FlashMLA's quantiser);
    - "v4": 2**ceil(log2(max(amax, 1e-4) / 448)), so at least 2**-22 (DeepSeek-V4, vLLM, SGLang);
    - "raw": max(amax / 448, 2**-126), not a power of two (vLLM's V3.2 writer).
    """
    if rule == "flashmla":
        return ceil_power_of_two(np.maximum(amax / E4M3_MAX, _FLASHMLA_MIN_SCALE))
    if rule == "v4":
        return ceil_power_of_two(np.maximum(amax, _V4_MIN_AMAX) / E4M3_MAX)
    if rule == "raw":
        return np.maximum(amax / E4M3_MAX, _RAW_MIN_SCALE)
    raise bad_value(
        "rule", repr(rule), f"it must be one of {', '.join(SCALE_RULES)}", "Pass one of them."
    )


def encode_tiles(tiles: NDArray[Any], rule: ScaleRule) -> tuple[Bytes, Float32]:
    """Encode bf16 `tiles` [..., tile] under one scale each.

    Returns the e4m3 codes (uint8, same shape) of x / scale, and the scales (float32, [...]).
    """
    scales = tile_scale(tile_amax(tiles), rule)
    scaled = tiles.astype(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        scaled /= scales[..., None]
    return encode_e4m3(scaled), scales


def decode_tiles(codes: Bytes, scales: Float32, out: Float32) -> None:
    """Decode e4m3 `codes` [n, ..., tile] under float32 `scales` [n, ...] into `out`, as codes.

    The value is bf16(code * bf16(scale)): the scale is rounded to bf16 and then the product, each
    once and to nearest even, as a kernel does that multiplies in bf16. Each result is a bf16
    number held in float32. `out` may be a strided view.
    """
    # Infinities and NaN come out as IEEE 754 has it, without a word.
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = scales.astype(BF16).astype(np.float32)
        # Scales this small can take the step between the exponents into themselves: a pass less.
        merged = np.abs(rounded).max(initial=0) < 2.0**7
        factors = (rounded * _BIAS_STEP if merged else rounded)[..., None]
        step = max(_DECODE_VALUES * len(codes) // max(codes.size, 1), 1)
        for first in range(0, len(codes), step):
            part = slice(first, first + step)
            values = scratch("fp8.decode_tiles", codes[part].shape, np.float32)
            _shift_codes(codes[part], values)
            if not merged:
                values *= _BIAS_STEP
            np.multiply(values, factors[part], out=out[part])
            is_nan = _nan_codes(codes[part])
            if is_nan.any():
                out[part][is_nan] = np.nan
        if not _keep_bf16(rounded):
            np.copyto(out, out.astype(BF16))


def _keep_bf16(scales: Float32) -> bool:
    """Whether e4m3 values times bf16 `scales` are all bf16 numbers without rounding.

    A product has at most 12 significant bits, so float32 holds it exactly; bf16 does if the scale
    is a power of two in 2**-117..2**118, where no product leaves the normal numbers.
    """
    bits = scales.view(np.uint32) & np.uint32(0x7FFFFFFF)
    exact = ((bits & np.uint32(0x7FFFFF)) == 0) & (bits >= 10 << 23) & (bits < 246 << 23)
    return bool(exact.all())
