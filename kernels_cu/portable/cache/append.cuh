// Rows of numbers into the slots of a page pool, rounded or FP8-encoded on the way.
//
// A warp takes a row. For FP8 a lane encodes 16 neighbouring numbers: two 16-byte loads, one
// 16-byte store, and few shuffles to find the largest magnitude of a tile.
//
// Budget: cycles of an SM for 64 rows of bf16 numbers, by what it spends them on. The
// largest, *, binds; DRAM is the SM's share of it. Rows of FP16 pools cost the same as BF16's.
// Written by `python -m tools.kernel_report --write budgets`.
//
//   rows       GPU         issue     DRAM
//   BF16       A100         2022   *11051
//   BF16       RTX 4090     2022   *47350
//   BF16       H100         2022   *10670
//   V32_FP8    A100        *9734     8680
//   V32_FP8    RTX 4090     4486   *37192
//   V32_FP8    H100         4486    *8381
//   V4_FP8     A100        *9798     7724
//   V4_FP8     RTX 4090     4486   *33096
//   V4_FP8     H100         4486    *7458
#pragma once

#include "include/fp8.cuh"
#include "portable/cache/owners.cuh"
#include "portable/cache/pool.cuh"

namespace cumla {

// Chunk `chunk` (eight numbers) of a row that is stored as it is.
template <class Rows, class Source>
__forceinline__ void store_half_row(const Place& to, const Source* row, u32 lane) {
    using T = typename Rows::T;
    constexpr u32 CHUNKS = Rows::D_QK / 8;
#pragma unroll
    for (u32 first = 0; first < CHUNKS; first += 32) {
        u32 chunk = first + lane;
        if (first + 32 <= CHUNKS || chunk < CHUNKS)
            reinterpret_cast<Vec16*>(to.row)[chunk] = load_rounded<T>(row + 8 * chunk);
    }
}

// The 16 numbers of a lane as e4m3 codes, and the scale of their tile.
template <class Rows, ScaleRule RULE>
__forceinline__ Vec16 encode_16(const Vec16& first, const Vec16& second, float& scale) {
    const u32 pairs[8] = {first.x, first.y, first.z, first.w,
                          second.x, second.y, second.z, second.w};
    float values[16];
    float amax = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        values[2 * i] = float_of(pairs[i] << 16);
        values[2 * i + 1] = float_of(pairs[i] & 0xFFFF0000u);
        // The maximum of a NaN and a number is the number: a NaN does not count.
        amax = fmaxf(amax, fmaxf(fabsf(values[2 * i]), fabsf(values[2 * i + 1])));
    }
#pragma unroll
    for (int step = Rows::TILE / 32; step > 0; step /= 2)
        amax = fmaxf(amax, __shfl_xor_sync(FULL_WARP, amax, step));
    // An infinity counts as the largest finite bf16.
    scale = tile_scale<RULE>(fminf(amax, float_of(0x7F7F0000u)));
    float inverse = inverse_scale<RULE>(scale);
    u32 codes[4];
#pragma unroll
    for (int i = 0; i < 16; i++) values[i] = unscale<RULE>(values[i], scale, inverse);
#pragma unroll
    for (int i = 0; i < 4; i++)
        codes[i] = encode_e4m3x4(values[4 * i], values[4 * i + 1], values[4 * i + 2],
                                 values[4 * i + 3]);
    return {codes[0], codes[1], codes[2], codes[3]};
}

template <class Rows, ScaleRule RULE, class Source>
__forceinline__ void store_fp8_row(const Place& to, const Source* row, u32 lane) {
    constexpr u32 CODE_LANES = Rows::D_NOPE / 16;  // lanes that encode
    constexpr u32 TILE_LANES = Rows::TILE / 16;
    constexpr u32 REST = Rows::D_QK / 8 - 64;  // chunks beyond those of two a lane
    static_assert(CODE_LANES <= 32 && Rows::D_QK >= 512 && REST <= 32, "of a warp and its lanes");
    u32 chunk = first_of_pair(lane);
    Vec16 first = load_rounded<bf16>(row + 8 * chunk);
    Vec16 second = load_rounded<bf16>(row + 8 * chunk + 16);
    swap_middle(first, second, lane);
    u8* rope = to.row + Rows::ROPE_OFFSET;
    if (lane < REST)
        reinterpret_cast<Vec16*>(rope + (512 - Rows::D_NOPE) * 2)[lane] =
            load_rounded<bf16>(row + 512 + 8 * lane);
    float scale;
    Vec16 codes = encode_16<Rows, RULE>(first, second, scale);
    if (lane < CODE_LANES) reinterpret_cast<Vec16*>(to.row)[lane] = codes;
    if constexpr (CODE_LANES < 32) {
        static_assert(CODE_LANES % 2 == 0, "lanes swap in pairs");
        swap_middle(first, second, lane);
        if (lane >= CODE_LANES) {
            Vec16* target = reinterpret_cast<Vec16*>(rope) + (chunk - CODE_LANES * 2);
            target[0] = first;
            target[2] = second;
        }
    }
    if (lane % TILE_LANES == 0) {
        u32 tile = lane / TILE_LANES;
        if constexpr (Rows::SCALES_AT_PAGE_END) {
            static_assert(Rows::SCALE_BYTES == 32 / TILE_LANES, "a byte for each group of lanes");
            to.scales[tile] = lane < CODE_LANES ? ue8m0_of(scale) : 0;  // and the padding
        } else {
            reinterpret_cast<float*>(to.row + Rows::D_NOPE)[tile] = scale;
        }
    }
}

// Row i goes to slots[i]; nowhere, if that is no slot of the pool. Of several rows with one slot
// the lowest goes there.
template <class Rows, class Source, ScaleRule RULE>
__global__ void __launch_bounds__(CACHE_WARPS * 32) append_rows(
    u8* pages,  // [num_pages, page_size, row] at multiples of 16 bytes
    i64 page_stride, i64 token_stride,  // bytes
    u32 page_size,
    u32 num_slots,      // num_pages * page_size
    const void* slots,  // [n], int64 if `wide`, else int32
    i64 slots_step, u32 wide,
    const Source* rows,  // [n, D_QK]
    i64 row_step, u32 n,
    const u64* owners,  // [2 ** table_bits], of claim_slots; may be null: look for twins
    u32 table_bits) {
    u32 lane = threadIdx.x % 32;
    u32 number = blockIdx.x * CACHE_WARPS + threadIdx.x / 32;
    if (number >= n) return;
    i64 slot = load_integer(slots, number * slots_step, wide);
    if (slot < 0 || slot >= num_slots) return;
    if (owners == nullptr) {
        if (has_lower_twin(slots, slots_step, wide, number, slot, lane)) return;
    } else if (owner_of(owners, table_bits, static_cast<u32>(slot)) != number) {
        return;
    }
    u32 page = static_cast<u32>(slot) / page_size, offset = static_cast<u32>(slot) % page_size;
    Place to = place_of<Rows>(pages, page_stride, token_stride, page_size, page, offset);
    const Source* row = rows + number * row_step;
    if constexpr (Rows::IS_FP8)
        store_fp8_row<Rows, RULE>(to, row, lane);
    else
        store_half_row<Rows>(to, row, lane);
}

}  // namespace cumla
