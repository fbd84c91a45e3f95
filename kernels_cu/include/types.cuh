// Number types of fixed width, and conversions between them; no CUDA header is needed.
#pragma once

namespace cumla {

using i8 = signed char;
using u8 = unsigned char;
using u16 = unsigned short;
using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

// 16 bytes, the widest access of a thread.
struct alignas(16) Vec16 {
    u32 x, y, z, w;
};

// The bits of a bfloat16 or an IEEE half: what memory holds. Arithmetic is done in float.
struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

inline u32 bits_of(float value) { return __float_as_uint(value); }
inline float float_of(u32 bits) { return __uint_as_float(bits); }

// (a & b) | c, (a | b) & c and a | b | c in one instruction each.
inline u32 and_or(u32 a, u32 b, u32 c) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
inline u32 or_and(u32 a, u32 b, u32 c) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xA8;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
inline u32 or_or(u32 a, u32 b, u32 c) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xFE;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

inline float infinity() { return float_of(0x7F800000u); }

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return float_of(static_cast<u32>(value.bits) << 16); }
inline float to_float(f16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

// Rounded to nearest, ties to even.
template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) { return value; }
template <>
inline bf16 from_float<bf16>(float value) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}
template <>
inline f16 from_float<f16>(float value) {
    f16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

// Two numbers of type T in one register, `low` in its lower half.
template <class T>
u32 pack(float low, float high);
template <>
inline u32 pack<bf16>(float low, float high) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
template <>
inline u32 pack<f16>(float low, float high) {
    u32 result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

template <class T>
constexpr T ceil_div(T value, T divisor) { return (value + divisor - 1) / divisor; }
template <class T>
constexpr T min_of(T a, T b) { return a < b ? a : b; }
template <class T>
constexpr T max_of(T a, T b) { return a < b ? b : a; }

// A loop whose counter is a constant in its body: each(Constant<0>), ... each(Constant<N - 1>).
template <int I>
struct Constant {
    constexpr operator int() const { return I; }
};
template <int N, int I = 0, class Body>
__forceinline__ void repeat(const Body& each) {
    if constexpr (I < N) {
        each(Constant<I>{});
        repeat<N, I + 1>(each);
    }
}

constexpr u32 FULL_WARP = 0xFFFFFFFFu;

}  // namespace cumla
