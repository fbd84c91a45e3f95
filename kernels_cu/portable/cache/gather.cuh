// Rows of a page pool, decoded to 16-bit numbers, side by side.
//
// A warp takes a row; of FP8 rows a lane decodes 16 codes: one 16-byte load, two 16-byte stores.
//
// Budget: cycles of an SM for 64 rows of bf16 numbers, by what it spends them on. The
// largest, *, binds; DRAM is the SM's share of it. Rows of FP16 pools cost the same as BF16's.
// Written by `python -m tools.kernel_report --write budgets`.
//
//   rows       GPU         issue     DRAM
//   BF16       A100         1536   *11051
//   BF16       RTX 4090     1536   *47350
//   BF16       H100         1536   *10670
//   V32_FP8    A100         3024    *8680
//   V32_FP8    RTX 4090     3024   *37192
//   V32_FP8    H100         3024    *8381
//   V4_FP8     A100         3472    *7724
//   V4_FP8     RTX 4090     3472   *33096
//   V4_FP8     H100         3472    *7458
#pragma once

#include "include/e4m3.cuh"
#include "portable/cache/pool.cuh"

namespace cumla {

template <class Rows>
__forceinline__ void zero_row(u16* out, u32 lane) {
    for (u32 chunk = lane; chunk < Rows::D_QK / 8; chunk += 32) store_halves(out + 8 * chunk, {});
}

template <class Rows>
__forceinline__ void decode_row(const Place& from, u16* out, u32 lane) {
    if constexpr (!Rows::IS_FP8) {
        constexpr u32 CHUNKS = Rows::D_QK / 8;
        Vec16 chunks[ceil_div(CHUNKS, 32u)];
#pragma unroll
        for (u32 i = 0; i * 32 < CHUNKS; i++)
            if (i * 32 + lane < CHUNKS)
                chunks[i] = load_16(from.row + 16 * (i * 32 + lane));
#pragma unroll
        for (u32 i = 0; i * 32 < CHUNKS; i++)
            if (i * 32 + lane < CHUNKS) store_halves(out + 8 * (i * 32 + lane), chunks[i]);
    } else {
        constexpr u32 CODE_LANES = Rows::D_NOPE / 16;
        constexpr u32 ROPE_CHUNKS = Rows::D_ROPE / 8;
        static_assert(CODE_LANES <= 32 && CODE_LANES % 2 == 0 && ROPE_CHUNKS <= 32, "lanes");
        Vec16 rope;
        if (lane < ROPE_CHUNKS) rope = load_16(from.row + Rows::ROPE_OFFSET + 16 * lane);
        Vec16 low = {}, high = {};
        if (lane < CODE_LANES) {
            Vec16 codes = load_16(from.row + 16 * lane);
            u32 tile = lane * 16 / Rows::TILE, scale;
            if constexpr (Rows::SCALES_AT_PAGE_END)
                scale = scale_of_ue8m0(from.scales[tile]);
            else
                scale = scale_of_float(
                    reinterpret_cast<const float*>(from.row + Rows::D_NOPE)[tile]);
            decode_e4m3x16(codes, scale, low, high);
        }
        swap_middle(low, high, lane);
        if (lane < CODE_LANES) {
            store_halves(out + 8 * first_of_pair(lane), low);
            store_halves(out + 8 * first_of_pair(lane) + 16, high);
        }
        if (lane < ROPE_CHUNKS) store_halves(out + Rows::D_NOPE + 8 * lane, rope);
    }
}

// Row i is the token at slots[i]; zeros, if that is no slot of the pool.
template <class Rows>
__global__ void __launch_bounds__(CACHE_WARPS * 32) gather_rows(
    u8* pages,  // [num_pages, page_size, row] at multiples of 16 bytes
    i64 page_stride, i64 token_stride,  // bytes
    u32 page_size,
    u32 num_slots,      // num_pages * page_size
    const void* slots,  // [n], int64 if `wide`, else int32
    i64 slots_step, u32 wide,
    u16* out,  // [n, D_QK] of Rows::T
    i64 out_step, u32 n) {
    u32 lane = threadIdx.x % 32;
    u32 number = blockIdx.x * CACHE_WARPS + threadIdx.x / 32;
    if (number >= n) return;
    u16* row = out + number * out_step;
    i64 slot = load_integer(slots, number * slots_step, wide);
    if (slot < 0 || slot >= num_slots) {
        zero_row<Rows>(row, lane);
        return;
    }
    u32 page = static_cast<u32>(slot) / page_size, offset = static_cast<u32>(slot) % page_size;
    decode_row<Rows>(
        place_of<Rows>(pages, page_stride, token_stride, page_size, page, offset), row, lane);
}

// How many of the ascending `values` are <= `bound`: a warp's search in 32 pieces.
inline u32 count_at_most(const i32* values, i64 step, u32 count, i64 bound, u32 lane) {
    u32 first = 0, left = count;  // the answer is in [first, first + left]
    while (left > 0) {
        u32 piece = ceil_div(left, 32u);
        u32 last = (lane + 1) * piece - 1;  // of the lane's piece
        bool within = last < left && values[(first + last) * step] <= bound;
        u32 whole = __popc(__ballot_sync(FULL_WARP, within)) * piece;
        first += whole;
        left = min_of(left - whole, piece - 1);
    }
    return first;
}

// Row t is token t - cu_seqlens[i] + seq_starts[i] of the request i with cu_seqlens[i] <= t <
// cu_seqlens[i + 1]. Zeros, if its place in the table, or the page there, does not exist. Rows of
// no request stay as they are.
template <class Rows>
__global__ void __launch_bounds__(CACHE_WARPS * 32) gather_sequences(
    u8* pages,  // [num_pages, page_size, row] at multiples of 16 bytes
    i64 page_stride, i64 token_stride,  // bytes
    u32 page_size, u32 num_pages,
    const i32* block_table,  // [b, max_blocks]
    i64 table_row_step, i64 table_step, u32 batch,
    u32 room,  // max_blocks * page_size, at most 2**31 - 1
    const i32* cu_seqlens,  // [b + 1], ascending
    i64 cu_step,
    const i32* seq_starts,  // [b]; may be null: 0
    i64 starts_step,
    u16* out,  // [n, D_QK] of Rows::T
    i64 out_step, u32 n) {
    u32 lane = threadIdx.x % 32;
    u32 number = blockIdx.x * CACHE_WARPS + threadIdx.x / 32;
    if (number >= n) return;
    u32 request = count_at_most(cu_seqlens, cu_step, batch + 1, number, lane) - 1;
    if (request >= batch) return;  // before the first (then it has wrapped) or behind the last
    i64 token = static_cast<i64>(number) - cu_seqlens[request * cu_step];
    if (seq_starts != nullptr) token += seq_starts[request * starts_step];
    u16* row = out + number * out_step;
    u32 page = num_pages;  // none
    if (token >= 0 && token < room)
        page = static_cast<u32>(
            block_table[request * table_row_step + static_cast<u32>(token) / page_size *
                        table_step]);
    if (page >= num_pages) {
        zero_row<Rows>(row, lane);
        return;
    }
    u32 offset = static_cast<u32>(token) % page_size;
    decode_row<Rows>(
        place_of<Rows>(pages, page_stride, token_stride, page_size, page, offset), row, lane);
}

}  // namespace cumla
