// Encoding of FP8 tiles: bit by bit what cumla/fp8.py's encode_tiles does. (Decoding: e4m3.cuh.)
#pragma once

#include "include/types.cuh"

namespace cumla {

// By what rule a tile gets its scale; NONE is of rows without scales.
enum class ScaleRule { NONE, FLASHMLA, V4, RAW };

// The least power of two >= a positive, normal number.
inline float ceil_power_of_two(float value) {
    return float_of((bits_of(value) + 0x7FFFFFu) & 0x7F800000u);
}

// The scale of a tile whose largest magnitude is `amax`, a finite number. Divisions are rounded to
// nearest, as NumPy's are: bits of the result depend on it.
template <ScaleRule RULE>
float tile_scale(float amax) {
    constexpr float E4M3_MAX = 448.0f;
    if constexpr (RULE == ScaleRule::FLASHMLA)
        return ceil_power_of_two(fmaxf(__fdiv_rn(amax, E4M3_MAX), 1e-4f));
    else if constexpr (RULE == ScaleRule::V4)
        return ceil_power_of_two(__fdiv_rn(fmaxf(amax, 1e-4f), E4M3_MAX));
    else
        return fmaxf(__fdiv_rn(amax, E4M3_MAX), 1.17549435e-38f);
}

// value / scale. `inverse` is inverse_scale(scale).
template <ScaleRule RULE>
float unscale(float value, float scale, float inverse) {
    if constexpr (RULE == ScaleRule::RAW)
        return __fdiv_rn(value, scale);
    else
        return value * inverse;  // a power of two: the same number, rounded the same way
}

// 1 / scale for a power of two: 254 - e is the exponent field, and scales are 2**-22 to 2**119.
template <ScaleRule RULE>
float inverse_scale(float scale) {
    return RULE == ScaleRule::RAW ? 0 : float_of(0x7F000000u - bits_of(scale));
}

// The UE8M0 code of a scale that is a normal power of two: its exponent field.
inline u8 ue8m0_of(float scale) { return static_cast<u8>(bits_of(scale) >> 23); }

// The e4m3 code of a number, by bit arithmetic: to nearest, ties to even; what is too large, an
// infinity too, becomes +-448, NaN 0x7F.
inline u32 encode_e4m3(float value) {
    float magnitude = fminf(fabsf(value), 448.0f);
    // A float with 20 more in its exponent has as its last place what e4m3 has: adding it rounds
    // the magnitude to that. Below exponent 121 = 127 - 6 e4m3 is subnormal, and its last place
    // stays 2**-9. The sum's low bits count last places; a carry runs on into the exponent.
    u32 exponent = max_of(bits_of(magnitude) >> 23, 121u);
    u32 places = bits_of(magnitude + float_of((exponent + 20) << 23)) & 0x1Fu;
    u32 code = ((exponent - 121) << 3) + places;
    return value != value ? 0x7Fu : code | (bits_of(value) >> 24 & 0x80u);
}

// The codes of four numbers, the first in the lowest byte.
inline u32 encode_e4m3x4(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
    u32 codes;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}"
        : "=r"(codes)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return codes;
#else
    return encode_e4m3(a) | encode_e4m3(b) << 8 | encode_e4m3(c) << 16 | encode_e4m3(d) << 24;
#endif
}

}  // namespace cumla
