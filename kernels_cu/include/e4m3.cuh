// e4m3 codes to bf16 numbers under a scale: bf16(code * scale), rounded once, as cumla/fp8.py's
// decode_tiles has it. The scale is a bf16 number, given twice in a register.
//
// By bit arithmetic on all targets. The hardware's conversion (sm_89 on) gives halves, and from a
// half to a scaled bf16 it is five more instructions a pair, four of them on the slow conversion
// pipe; here it is five in all, and none is slow. A code's bits, moved to where a bf16 has its
// exponent and mantissa, read 2**-120 times its value (exponent bias 7 against 127), subnormal codes
// too; one multiplication by 2**120 * scale does the rest. Two cases take a longer way together:
// codes that are NaN, and scales so large that 2**120 * scale is no number.
#pragma once

#include "include/types.cuh"

namespace cumla {

constexpr u32 TWO_TO_120 = 0x7B807B80u;

// a * b for two bf16 numbers each, rounded to nearest. Adding -0 changes nothing, not even a zero.
__forceinline__ u32 multiply_pair(u32 a, u32 b) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(0x80008000u));
    return result;
}

// A float32 scale, rounded to bf16, twice.
__forceinline__ u32 scale_of_float(float scale) { return pack<bf16>(scale, scale); }

// A UE8M0 scale, 2**(code - 127), twice; 255 is NaN. The code is a bf16's exponent field, but for 0.
__forceinline__ u32 scale_of_ue8m0(u32 code) {
    u32 scale = code * 0x00800080u;
    scale = code == 0 ? 0x00400040u : scale;
    return code == 255 ? 0x7FC07FC0u : scale;
}

// 2**-120 times the values of the codes in bytes FIRST and FIRST + 1 of `codes`.
template <int FIRST>
__forceinline__ u32 shift_codes(u32 codes) {
    u32 high = __byte_perm(codes, 0, FIRST == 0 ? 0x1404 : 0x3424);  // each in its half's upper byte
    return and_or(high, 0x80008000u, high >> 4 & 0x07F007F0u);
}

template <bool RARE>
__forceinline__ Vec16 decode_e4m3x8(u32 first, u32 second, u32 factor) {
    u32 words[4] = {shift_codes<0>(first), shift_codes<2>(first), shift_codes<0>(second),
                    shift_codes<2>(second)};
    for (u32& word : words) {
        if constexpr (RARE) {
            u32 value = multiply_pair(multiply_pair(word, TWO_TO_120), factor);
            if ((word & 0x7FFFu) == 0x07F0u) value = (value & 0xFFFF0000u) | 0x7FC0u;
            if ((word & 0x7FFF0000u) == 0x07F00000u) value = (value & 0xFFFFu) | 0x7FC00000u;
            word = value;
        } else {
            word = multiply_pair(word, factor);
        }
    }
    return {words[0], words[1], words[2], words[3]};
}

// 16 codes under one scale, in order: the first 8 to `low`, the others to `high`.
__forceinline__ void decode_e4m3x16(const Vec16& codes, u32 scale, Vec16& low, Vec16& high) {
    // A byte is NaN if its lower seven bits are all set: then adding 1 carries into the eighth.
    auto carry = [](u32 word) { return (word & 0x7F7F7F7Fu) + 0x01010101u; };
    u32 nan = or_and(or_or(carry(codes.x), carry(codes.y), carry(codes.z)), carry(codes.w),
                     0x80808080u);
    bool large = (scale & 0x7F80u) >= 0x4380u;  // 2**8
    if (nan != 0 || large) {
        low = decode_e4m3x8<true>(codes.x, codes.y, scale);
        high = decode_e4m3x8<true>(codes.z, codes.w, scale);
    } else {
        u32 factor = multiply_pair(scale, TWO_TO_120);
        low = decode_e4m3x8<false>(codes.x, codes.y, factor);
        high = decode_e4m3x8<false>(codes.z, codes.w, factor);
    }
}

}  // namespace cumla
