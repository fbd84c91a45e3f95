// What the cache kernels share: where tokens and slots are, and rows of other number types.
#pragma once

#include "include/rows.cuh"
#include "include/types.cuh"

namespace cumla {

constexpr u32 CACHE_WARPS = 8;  // a warp works on one row at a time

// Where a token's bytes begin.
struct Place {
    u8* row;
    u8* scales;  // of layouts that keep them at the page's end, else null
};

template <class Rows>
Place place_of(u8* pages, i64 page_stride, i64 token_stride, u32 page_size, u32 page, u32 offset) {
    u8* start = pages + page * page_stride;
    Place found{start + offset * token_stride, nullptr};
    if constexpr (Rows::IS_FP8) {
        if constexpr (Rows::SCALES_AT_PAGE_END)
            found.scales = start + page_size * token_stride +
                           static_cast<i64>(offset) * Rows::SCALE_BYTES;
    }
    return found;
}

// An integer of a list of int32 or int64.
inline i64 load_integer(const void* list, i64 index, bool wide) {
    return wide ? static_cast<const i64*>(list)[index] : static_cast<const i32*>(list)[index];
}

template <class A, class B>
constexpr bool IS_SAME = false;
template <class A>
constexpr bool IS_SAME<A, A> = true;

inline bool is_aligned(const void* pointer) { return (reinterpret_cast<u64>(pointer) & 15) == 0; }

// One load of 16 bytes; the compiler may tear a Vec16 apart where its words are used apart.
inline Vec16 load_16(const void* from) {
    Vec16 value;
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(__cvta_generic_to_global(from)));
    return value;
}

// Eight 16-bit numbers; the pointer may be at any of them.
inline Vec16 load_halves(const u16* from) {
    if (is_aligned(from)) return load_16(from);
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = from[2 * i] | static_cast<u32>(from[2 * i + 1]) << 16;
    return {words[0], words[1], words[2], words[3]};
}

inline void store_halves(u16* to, const Vec16& value) {
    if (is_aligned(to)) {
        *reinterpret_cast<Vec16*>(to) = value;
        return;
    }
    const u32 words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = static_cast<u16>(words[i]);
        to[2 * i + 1] = static_cast<u16>(words[i] >> 16);
    }
}

// Of four neighbouring chunks of 16 bytes two lanes hold two each: 0 1 | 2 3. They swap the middle
// ones, so that both lanes load or store next to each other, whole sectors of 32 bytes: 0 2 | 1 3.
// It is its own inverse.
inline void swap_middle(Vec16& first, Vec16& second, u32 lane) {
    bool odd = lane % 2 != 0;
    // By value, word for word: a reference to one of the two would put both into local memory.
    auto swap = [odd](u32& a, u32& b) {
        u32 theirs = __shfl_xor_sync(FULL_WARP, odd ? a : b, 1);
        a = odd ? theirs : a;
        b = odd ? b : theirs;
    };
    swap(first.x, second.x);
    swap(first.y, second.y);
    swap(first.z, second.z);
    swap(first.w, second.w);
}
inline u32 first_of_pair(u32 lane) { return lane / 2 * 4 + lane % 2; }  // 0 or 1, then 2 or 3

// A NaN as NumPy rounds it: a bf16 keeps the sign, a half also the upper bits.
template <class T>
u32 nan_of(u32 bits);
template <>
inline u32 nan_of<bf16>(u32 bits) { return (bits >> 16 & 0x8000u) | 0x7FC0u; }
template <>
inline u32 nan_of<f16>(u32 bits) {
    return (bits >> 16 & 0x8000u) | 0x7C00u | max_of(bits >> 13 & 0x3FFu, 1u);
}

// Two numbers rounded to T; given as float bits, so that a NaN keeps its own.
template <class T>
u32 round_pair(u32 low, u32 high) {
    float a = float_of(low), b = float_of(high);
    u32 result = pack<T>(a, b);
    if (a != a) result = (result & 0xFFFF0000u) | nan_of<T>(low);
    if (b != b) result = (result & 0xFFFFu) | nan_of<T>(high) << 16;
    return result;
}

// A 16-bit number's bits as a float; a NaN keeps its sign alone, as it does where NumPy rounds it.
template <class T>
u32 float_bits(T value) {
    constexpr u32 INFINITE = IS_SAME<T, bf16> ? 0x7F80u : 0x7C00u;
    u32 bits = bits_of(to_float(value));
    bool nan = (value.bits & 0x7FFFu) > INFINITE;
    return nan ? (value.bits & 0x8000u) << 16 | 0x7FC00000u : bits;
}

// Eight numbers in a row, rounded to T (16 bits); the pointer may be at any number.
template <class T, class Source>
Vec16 load_rounded(const Source* from) {
    u32 words[4];
    if constexpr (IS_SAME<Source, float>) {
        const u32* bits = reinterpret_cast<const u32*>(from);
        Vec16 low, high;
        if (is_aligned(from)) {
            low = load_16(bits);
            high = load_16(bits + 4);
        } else {
            low = {bits[0], bits[1], bits[2], bits[3]};
            high = {bits[4], bits[5], bits[6], bits[7]};
        }
        words[0] = round_pair<T>(low.x, low.y), words[1] = round_pair<T>(low.z, low.w);
        words[2] = round_pair<T>(high.x, high.y), words[3] = round_pair<T>(high.z, high.w);
        return {words[0], words[1], words[2], words[3]};
    } else {
        Vec16 raw = load_halves(reinterpret_cast<const u16*>(from));
        if constexpr (IS_SAME<Source, T>) {
            return raw;
        } else {
            auto convert = [](u32 pair) {
                return round_pair<T>(float_bits(Source{static_cast<u16>(pair)}),
                                     float_bits(Source{static_cast<u16>(pair >> 16)}));
            };
            return {convert(raw.x), convert(raw.y), convert(raw.z), convert(raw.w)};
        }
    }
}

}  // namespace cumla
