// Keys on their way from global memory to the buffer that both products read.
//
// A warp fetches its own TOKENS / WARPS tokens of every tile, so that what it waits for is its own.
// One lane a token finds the row's address, an iteration before it is needed (the index comes from
// global memory, too); then groups of lanes copy the rows in 16-byte pieces. Rows that do not
// exist are filled with zeros and their token is flagged: nothing of them can reach a result.
//
// 16-bit rows land where they are used. FP8 rows land as they are and are decoded once, by the warp
// that fetched them, into the one buffer of keys.
#pragma once

#include "include/e4m3.cuh"
#include "portable/decode/tile.cuh"

namespace cumla {

// Division by a number that is the same for the whole launch: n / divisor = n * multiplier >> shift
// for 0 <= n < 2**31 (cumla/kernels/decode.py computes the two).
struct Divisor {
    u32 divisor, multiplier, shift;
    __forceinline__ u32 divide(u32 n) const {
        return static_cast<u32>(static_cast<u64>(n) * multiplier >> shift);
    }
};

// A pool of pages, seen from one KV head.
struct Pool {
    const u8* pages;    // [num_pages, page_size, rows]
    i64 page_stride;    // bytes
    i64 row_stride;     // bytes
    u32 num_pages;
    Divisor page_size;

    // The row of token `offset` of page `page`, which is in the pool.
    __forceinline__ const u8* row(u32 page, u32 offset) const {
        return pages + page * page_stride + offset * row_stride;
    }
};

// Where a token's bytes begin; null for none.
struct Location {
    const u8* row;
    const u8* scales;  // of layouts that keep them at the page's end
};

template <class Rows>
__forceinline__ Location locate(const Pool& pool, u32 page, u32 offset) {
    Location found{pool.row(page, offset), nullptr};
    if constexpr (Rows::IS_FP8) {
        if constexpr (Rows::SCALES_AT_PAGE_END)
            found.scales = pool.pages + page * pool.page_stride +
                           pool.page_size.divisor * pool.row_stride + offset * Rows::SCALE_BYTES;
    }
    return found;
}

template <class Tile, class Source>
struct Stages {
    using Rows = typename Tile::Rows;
    static constexpr int WARP_TOKENS = Tile::TOKENS / Tile::WARPS;
    // Lanes that copy one row: 128 bytes of a 16-bit row at a time; of FP8 rows, which begin at any
    // multiple of 16 bytes, 256, so that fewer 32-byte sectors are touched twice.
    static constexpr int ROW_LANES = Rows::IS_FP8 ? 16 : 8;
    static constexpr int TOKENS_AT_ONCE = 32 / ROW_LANES;
    static constexpr int ROUNDS = WARP_TOKENS / TOKENS_AT_ONCE;
    static constexpr int ROW_BYTES = Rows::IS_FP8 ? Tile::RAW_BYTES : Tile::PITCH;
    static constexpr int CHUNKS = ROW_BYTES / 16;
    static constexpr u32 STAGE_BYTES = Tile::TOKENS * ROW_BYTES;

    const Source& source;
    const Place<Tile>& at;
    i32 id;  // what the source says of the lane's token in the next tile to fetch

    __forceinline__ Stages(const Source& source, const Place<Tile>& at, u32 begin)
        : source(source), at(at), id(id_of(begin)) {}

    // The lane's token in the tile that begins at position `begin`.
    __forceinline__ u32 token_of(u32 begin) const {
        return begin + at.warp * WARP_TOKENS + at.lane;
    }
    __forceinline__ i32 id_of(u32 begin) const {
        return at.lane < WARP_TOKENS ? source.id(token_of(begin)) : -1;
    }

    // Begin to copy the tile that begins at position `begin`, the next after the last call's, to a
    // stage and a slot of flags that are free.
    __forceinline__ void fetch(u32 begin, u32 stage, u32 slot) {
        Location found = source.template locate<Rows>(id, token_of(begin));
        bool exists = found.row != nullptr;
        id = id_of(begin + Tile::TOKENS);
        if (at.lane < WARP_TOKENS) {
            u32 token = at.warp * WARP_TOKENS + at.lane;
            store_shared<Tile::VALID>(at.shared + slot * Tile::TOKENS + token,
                                      static_cast<u8>(exists));
            if constexpr (Tile::RAW_SCALES > 0)
                copy_async_8(at.shared + Tile::RAW_SCALE +
                                 (stage * Tile::TOKENS + token) * Tile::RAW_SCALES,
                             exists ? found.scales : source.anywhere(), exists ? 8 : 0);
        }
        u32 existing = __ballot_sync(FULL_WARP, exists);
        u64 row = reinterpret_cast<u64>(exists ? found.row : source.anywhere());
        u32 low = static_cast<u32>(row), high = static_cast<u32>(row >> 32);
        u32 first = at.lane / ROW_LANES, part = at.lane % ROW_LANES;
        u32 target = at.shared + stage * STAGE_BYTES;
        if constexpr (Rows::IS_FP8)
            target += Tile::RAW + (at.warp * WARP_TOKENS + first) * Tile::RAW_BYTES + part * 16;
        else
            target += Tile::KEYS + Tile::key_offset(at.warp * WARP_TOKENS + first, part);
        repeat<ROUNDS>([&](auto round) {
            u32 from = round * TOKENS_AT_ONCE + first;
            u64 address = static_cast<u64>(__shfl_sync(FULL_WARP, high, from)) << 32 |
                          __shfl_sync(FULL_WARP, low, from);
            const u8* source_part = reinterpret_cast<const u8*>(address) + part * 16;
            u32 bytes = existing >> from << 4 & 16;
            // Four tokens further, 16-bit rows turn their chunks the other way round.
            u32 place = target + round * TOKENS_AT_ONCE * ROW_BYTES;
            if constexpr (!Rows::IS_FP8 && round % 2) place ^= 64;
            repeat<ceil_div(CHUNKS, ROW_LANES)>([&](auto step) {
                constexpr int CHUNK = step * ROW_LANES;
                if (CHUNK + ROW_LANES <= CHUNKS || part < CHUNKS - CHUNK)
                    copy_async_16<CHUNK * 16>(place, source_part, bytes);
            });
        });
        copy_async_commit();
    }
};

// Decode the warp's own FP8 rows of stage `stage` into the buffer of keys.
template <class Tile>
__forceinline__ void decode_rows(const Place<Tile>& at, u32 stage) {
    using Rows = typename Tile::Rows;
    constexpr int WARP_TOKENS = Tile::TOKENS / Tile::WARPS;
    constexpr int PIECES = Rows::D_NOPE / 16;  // of 16 codes
    u32 first = at.warp * WARP_TOKENS;
    u32 raw = at.shared + Tile::RAW + (stage * Tile::TOKENS + first) * Tile::RAW_BYTES;
    u32 keys = at.shared + Tile::KEYS;
    u32 piece = at.lane;
    if (piece < PIECES) {
        u32 tile = piece * 16 / Rows::TILE;
        // 16 codes make two chunks of a key. Every other group of four lanes takes its two halves
        // the other way round, so that neither the loads nor the stores of a warp meet conflicts.
        u32 turn = (piece >> 2 ^ piece >> 3) & 1;
        // One token at a time where O and Q leave few registers.
#pragma unroll(Tile::ROWS == 64 ? 1 : WARP_TOKENS)
        for (u32 t = 0; t < WARP_TOKENS; t++) {
            Vec16 codes;
            u32 row = raw + t * Tile::RAW_BYTES;
            load_shared_8(codes.x, codes.y, row + piece * 16 + turn * 8);
            load_shared_8(codes.z, codes.w, row + piece * 16 + 8 - turn * 8);
            u32 scale;
            if constexpr (Rows::SCALES_AT_PAGE_END)
                scale = scale_of_ue8m0(load_shared_byte<Tile::RAW_SCALE>(
                    at.shared + (stage * Tile::TOKENS + first + t) * Tile::RAW_SCALES + tile));
            else
                scale = scale_of_float(load_shared_float<Rows::D_NOPE>(row + tile * 4));
            Vec16 low, high;
            decode_e4m3x16(codes, scale, low, high);
            u32 target = keys + Tile::key_offset(first + t, 2 * piece + turn);
            store_shared(target, low);
            store_shared(target ^ 16, high);
        }
    }
    // RoPE: 8 chunks of bf16 a token, as they are.
    static_assert(Rows::D_ROPE == 64);
    repeat<WARP_TOKENS / 4>([&](auto t) {
        u32 token = t * 4 + at.lane / 8, part = at.lane % 8;
        Vec16 numbers =
            load_shared_16<Rows::ROPE_OFFSET>(raw + token * Tile::RAW_BYTES + part * 16);
        store_shared(keys + Tile::key_offset(first + token, Rows::D_NOPE / 8 + part), numbers);
    });
}

}  // namespace cumla
