// What one block works on at a time: ROWS query rows against TOKENS keys, and how the warps share
// the two products.
//
//   scores  S = Q K'    the warps split d_qk in four (by 16 of every 64 dims), then rows and tokens;
//                       Q stays in registers, every key is read from shared memory ROW_GROUPS times.
//                       The four partial sums meet in shared memory, where softmax adds them.
//   output  O += P V    every warp has all rows and its own columns of V = K[:, :d_v]; O stays in
//                       registers, every value is read from shared memory once.
//
// Keys lie in shared memory as rows of D_QK 16-bit numbers in chunks of 16 bytes; chunk c of token t
// lies at c ^ (t % 8), so that the eight rows of a matrix fall in eight different groups of banks.
// Both operands walk the dims 64 at a time, 128 bytes, so every offset but the first is a constant.
#pragma once

#include "include/ptx.cuh"
#include "include/rows.cuh"

namespace cumla {

template <class Rows_, int ROWS_, int WARPS_, int STAGES_>
struct Tile {
    using Rows = Rows_;
    using T = typename Rows::T;
    static constexpr int ROWS = ROWS_;      // query rows: 16, 32 or 64
    static constexpr int WARPS = WARPS_;    // 4 or 8
    static constexpr int STAGES = STAGES_;  // tiles of keys under way from global memory
    static constexpr int THREADS = WARPS * 32;
    static constexpr int TOKENS = 32;

    static constexpr int D_QK = Rows::D_QK;
    static constexpr int D_V = Rows::D_V;
    static constexpr int PITCH = D_QK * 2;  // bytes from one key to the next
    static constexpr int K_BUFFERS = Rows::IS_FP8 ? 1 : STAGES;

    // Warps along d_qk, rows and tokens.
    static constexpr int SLICES = 4;
    static constexpr int ROW_GROUPS = ROWS == 64 ? 2 : 1;
    static constexpr int TOKEN_GROUPS = WARPS / (SLICES * ROW_GROUPS);
    static constexpr int GROUP_ROWS = ROWS / ROW_GROUPS;
    static constexpr int GROUP_TOKENS = TOKENS / TOKEN_GROUPS;
    static constexpr int STEPS = D_QK / (16 * SLICES);  // multiplications of 16 dims for each warp
    static constexpr int COLUMNS = D_V / WARPS;         // of O, for each warp
    static constexpr int SUBS = ROWS / 16;              // matrices of 16 rows
    static constexpr int GROUP_SUBS = GROUP_ROWS / 16;

    // Softmax: threads of one row, and how many groups of 4 tokens each has.
    static constexpr int ROW_THREADS = THREADS / ROWS;
    static constexpr int QUADS = TOKENS / (4 * ROW_THREADS);

    // FP8 rows wait as they are: with their scales inside, or beside.
    static constexpr int RAW_BYTES = [] {
        if constexpr (Rows::IS_FP8) return Rows::ROW_BYTES;
        else return 0;
    }();
    static constexpr int RAW_SCALES = [] {
        if constexpr (Rows::IS_FP8) return Rows::SCALES_AT_PAGE_END ? Rows::SCALE_BYTES : 0;
        else return 0;
    }();
    static constexpr int RAW_STAGES = Rows::IS_FP8 ? STAGES : 0;
    // One more than the stages: the flags of a tile are still read when those of the tile that
    // takes its stage are written.
    static constexpr int FLAG_SLOTS = STAGES + 1;

    static_assert(D_QK % 64 == 0 && COLUMNS % 16 == 0 && QUADS >= 1 && GROUP_TOKENS % 16 == 0);

    struct Shared {
        alignas(128) u8 keys[K_BUFFERS][TOKENS * PITCH];
        alignas(16) u8 raw[RAW_STAGES + !RAW_STAGES][RAW_STAGES ? TOKENS * RAW_BYTES : 16];
        alignas(16) u8 raw_scales[RAW_STAGES + !RAW_STAGES][RAW_SCALES ? TOKENS * RAW_SCALES : 16];
        alignas(16) float scores[SLICES][ROWS * TOKENS];
        alignas(128) u8 weights[ROWS * TOKENS * 2];
        alignas(16) u8 valid[FLAG_SLOTS][TOKENS];
        float factor[ROWS];  // of O's rows: before a tile, or at the end
    };

    // Where scores[row][token] lies, in floats. Tokens are moved in groups of 8, so that the
    // stores (4 rows by 8 tokens) and the loads (1 or 2 rows by 32 or 16 tokens) meet no conflict.
    static __forceinline__ u32 score_index(u32 row, u32 token) {
        u32 turn = (row & 1) << 1 | (row >> 1 & 1);
        return row * TOKENS + ((token >> 3 ^ turn) << 3) + (token & 7);
    }

    // Where weights[row][chunk of 8 tokens] lies, in bytes, for the same reason.
    static __forceinline__ u32 weight_offset(u32 row, u32 chunk) {
        u32 turn = (row >> 1 & 1) << 1 | (row >> 2 & 1);
        return row * (TOKENS * 2) + ((chunk ^ turn) << 4);
    }

    // Where 16-byte chunk `chunk` of the key of token `token` lies, in bytes.
    static __forceinline__ u32 key_offset(u32 token, u32 chunk) {
        return token * PITCH + (chunk >> 3) * 128 + ((chunk & 7 ^ token & 7) << 4);
    }
};

// A warp's place in both products.
template <class Tile>
struct Place {
    u32 warp, lane;
    u32 slice, row_group, token_group;

    __forceinline__ Place() {
        warp = threadIdx.x / 32;
        lane = threadIdx.x % 32;
        slice = warp % Tile::SLICES;
        row_group = warp / Tile::SLICES % Tile::ROW_GROUPS;
        token_group = warp / (Tile::SLICES * Tile::ROW_GROUPS);
    }
};

// The warp's part of Q: the 16x16 matrices of its rows and its slice of the dims.
template <class Tile>
struct Queries {
    u32 part[Tile::GROUP_SUBS][Tile::STEPS][4];

    // Take the rows that lie at `address`, laid out as keys, rows [first, first + rows) of the tile.
    __forceinline__ void load(const Place<Tile>& at, u32 address, int first, int rows) {
        u32 row = at.lane % 16;
        u32 offset = Tile::key_offset(row, 2 * at.slice + at.lane / 16);
#pragma unroll
        for (int sub = 0; sub < Tile::GROUP_SUBS; sub++) {
            int begin = at.row_group * Tile::GROUP_ROWS + sub * 16 - first;
            if (begin >= 0 && begin < rows) {
#pragma unroll
                for (int step = 0; step < Tile::STEPS; step++)
                    load_matrices(part[sub][step],
                                  address + begin * Tile::PITCH + offset + step * 128);
            }
        }
    }
};

// Partial scores of the warp's rows, slice and tokens, to shared memory. `subs` is how many of its
// 16-row matrices hold rows at all.
template <class Tile, int SUBS>
__forceinline__ void multiply_keys(const Place<Tile>& at, const Queries<Tile>& queries, u32 keys,
                                   u32 scores) {
    u32 token = at.token_group * Tile::GROUP_TOKENS + at.lane % 8 + at.lane / 16 * 8;
    u32 address = keys + Tile::key_offset(token, 2 * at.slice + at.lane / 8 % 2);
    u32 row = at.row_group * Tile::GROUP_ROWS + at.lane / 4;
    u32 column = at.token_group * Tile::GROUP_TOKENS + at.lane % 4 * 2;
#pragma unroll
    for (int chunk = 0; chunk < Tile::GROUP_TOKENS / 16; chunk++) {
        float sum[SUBS][2][4] = {};
#pragma unroll
        for (int step = 0; step < Tile::STEPS; step++) {
            u32 k[4];
            load_matrices(k, address + chunk * 16 * Tile::PITCH + step * 128);
#pragma unroll
            for (int sub = 0; sub < SUBS; sub++) {
                multiply_add<typename Tile::T>(sum[sub][0], queries.part[sub][step], k[0], k[1]);
                multiply_add<typename Tile::T>(sum[sub][1], queries.part[sub][step], k[2], k[3]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Rows 8 and 16 further turn their tokens alike.
            u32 place = scores + 4 * (at.slice * Tile::ROWS * Tile::TOKENS +
                                      Tile::score_index(row, column + chunk * 16 + half * 8));
#pragma unroll
            for (int sub = 0; sub < SUBS; sub++) {
                const float(&s)[4] = sum[sub][half];
                store_shared_8(place + 4 * Tile::TOKENS * (sub * 16), s[0], s[1]);
                store_shared_8(place + 4 * Tile::TOKENS * (sub * 16 + 8), s[2], s[3]);
            }
        }
    }
}

// O: the warp's columns of all rows.
template <class Tile>
struct Output {
    static constexpr int PAIRS = Tile::COLUMNS / 16;
    float part[Tile::SUBS][2 * PAIRS][4];

    __forceinline__ void clear() {
#pragma unroll
        for (int sub = 0; sub < Tile::SUBS; sub++)
#pragma unroll
            for (int n = 0; n < 2 * PAIRS; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) part[sub][n][i] = 0;
    }

    // Multiply every row by its factor.
    __forceinline__ void scale(const Place<Tile>& at, const float* factor) {
#pragma unroll
        for (int sub = 0; sub < Tile::SUBS; sub++) {
            float low = factor[sub * 16 + at.lane / 4], high = factor[sub * 16 + at.lane / 4 + 8];
#pragma unroll
            for (int n = 0; n < 2 * PAIRS; n++) {
                part[sub][n][0] *= low;
                part[sub][n][1] *= low;
                part[sub][n][2] *= high;
                part[sub][n][3] *= high;
            }
        }
    }

    // Add P V, for the first SUBS matrices of rows.
    template <int SUBS>
    __forceinline__ void add(const Place<Tile>& at, u32 weights, u32 keys) {
        u32 weight = weights + Tile::weight_offset(at.lane % 16, at.lane / 16);
        u32 token = at.lane % 16;
        u32 value = keys + Tile::key_offset(token, at.warp * (Tile::COLUMNS / 8) + at.lane / 16);
#pragma unroll
        for (int step = 0; step < Tile::TOKENS / 16; step++) {
            u32 p[SUBS][4];
#pragma unroll
            for (int sub = 0; sub < SUBS; sub++)
                load_matrices(p[sub], (weight ^ step * 32) + sub * 16 * Tile::TOKENS * 2);
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                u32 v[4];
                // Within 128 bytes a chunk's place changes by XOR, beyond by addition.
                load_matrices_transposed(v, (value ^ pair % 4 * 32) + pair / 4 * 128 +
                                                step * 16 * Tile::PITCH);
#pragma unroll
                for (int sub = 0; sub < SUBS; sub++) {
                    multiply_add<typename Tile::T>(part[sub][2 * pair], p[sub], v[0], v[1]);
                    multiply_add<typename Tile::T>(part[sub][2 * pair + 1], p[sub], v[2], v[3]);
                }
            }
        }
    }
};

}  // namespace cumla
