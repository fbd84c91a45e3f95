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

    // What shared memory holds, and where: each begins where the one before ends, at a multiple of
    // its alignment. (Offsets, not a struct, as they are immediates of instructions.)
    static constexpr u32 after(u32 end, u32 alignment) {
        return ceil_div(end, alignment) * alignment;
    }
    static constexpr u32 KEYS = 0;  // [K_BUFFERS][TOKENS][D_QK] 16-bit numbers
    static constexpr u32 RAW = after(KEYS + K_BUFFERS * TOKENS * PITCH, 128);
    // [RAW_STAGES][TOKENS][RAW_BYTES]
    static constexpr u32 RAW_SCALE = after(RAW + RAW_STAGES * TOKENS * RAW_BYTES, 16);
    // [RAW_STAGES][TOKENS][RAW_SCALES]
    static constexpr u32 SCORES = after(RAW_SCALE + RAW_STAGES * TOKENS * RAW_SCALES, 128);
    // [SLICES][ROWS][TOKENS] float
    static constexpr u32 WEIGHTS = after(SCORES + SLICES * ROWS * TOKENS * 4, 128);
    // [ROWS][TOKENS] 16-bit numbers
    static constexpr u32 VALID = after(WEIGHTS + ROWS * TOKENS * 2, 16);  // [FLAG_SLOTS][TOKENS] u8
    static constexpr u32 FACTOR = after(VALID + FLAG_SLOTS * TOKENS, 16);
    // [ROWS] float: what O's rows are multiplied by, before a tile or at the end
    static constexpr u32 SHARED_BYTES = FACTOR + ROWS * 4;

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

// A thread's place in both products and in softmax, with the addresses that follow from it.
template <class Tile>
struct Place {
    u32 shared;  // where the block's shared memory begins
    u32 warp, lane;
    u32 slice, row_group;
    u32 row, sub;       // of softmax: the row, and which of its ROW_THREADS threads this is
    u32 k_offset;       // of the rows of K that the lane names, from the keys' begin
    u32 v_offset;       // the same of V
    u32 scores_out;     // where its partial scores go
    u32 scores_in;      // where softmax finds its scores
    u32 weights_out;    // where softmax puts its weights
    u32 weights_in;     // where the lane names rows of P

    __forceinline__ Place(u32 shared) : shared(shared) {
        warp = threadIdx.x / 32;
        lane = threadIdx.x % 32;
        slice = warp % Tile::SLICES;
        row_group = warp / Tile::SLICES % Tile::ROW_GROUPS;
        row = threadIdx.x / Tile::ROW_THREADS;
        sub = threadIdx.x % Tile::ROW_THREADS;
        u32 token = warp / (Tile::SLICES * Tile::ROW_GROUPS) * Tile::GROUP_TOKENS;
        k_offset = Tile::key_offset(token + lane % 8 + lane / 16 * 8, 2 * slice + lane / 8 % 2);
        v_offset = Tile::key_offset(lane % 16, warp * (Tile::COLUMNS / 8) + lane / 16);
        scores_out = shared + Tile::SCORES +
                     4 * (slice * Tile::ROWS * Tile::TOKENS +
                          Tile::score_index(row_group * Tile::GROUP_ROWS + lane / 4,
                                            token + lane % 4 * 2));
        scores_in = shared + Tile::SCORES + 4 * Tile::score_index(row, sub * 4);
        weights_out = shared + Tile::WEIGHTS + Tile::weight_offset(row, sub / 2) + sub % 2 * 8;
        weights_in = shared + Tile::WEIGHTS + Tile::weight_offset(lane % 16, lane / 16);
        if constexpr (Tile::ROWS < 64) {
            // There are registers to keep them; the compiler would compute them for every tile.
            for (u32* one : {&k_offset, &v_offset, &scores_out, &scores_in, &weights_out, &weights_in})
                asm volatile("" : "+r"(*one));
        }
    }
};

// The warp's part of Q: the 16x16 matrices of its rows and its slice of the dims.
template <class Tile>
struct Queries {
    u32 part[Tile::GROUP_SUBS][Tile::STEPS][4];

    // Take what is the warp's of rows [first, first + rows) of the tile, laid out as keys.
    __forceinline__ void load(const Place<Tile>& at, u32 address, int first, int rows) {
        u32 offset = Tile::key_offset(at.lane % 16, 2 * at.slice + at.lane / 16);
        repeat<Tile::GROUP_SUBS>([&](auto sub_) {
            constexpr int sub = sub_;
            int begin = at.row_group * Tile::GROUP_ROWS + sub * 16 - first;
            if (begin >= 0 && begin < rows) {
                repeat<Tile::STEPS>([&](auto step) {
                    load_matrices<step * 128>(part[sub][step],
                                              address + begin * Tile::PITCH + offset);
                });
            }
        });
    }
};

// Partial scores of the warp's rows, slice and tokens, to shared memory. SUBS is how many of its
// 16-row matrices hold rows at all.
template <class Tile, int SUBS>
__forceinline__ void multiply_keys(const Place<Tile>& at, const Queries<Tile>& queries, u32 keys) {
    u32 address = keys + at.k_offset;
    repeat<Tile::GROUP_TOKENS / 16>([&](auto chunk_) {
        constexpr int chunk = chunk_;
        float sum[SUBS][2][4] = {};
        repeat<Tile::STEPS>([&](auto step_) {
            constexpr int step = step_;
            u32 k[4];
            load_matrices<chunk * 16 * Tile::PITCH + step * 128>(k, address);
            repeat<SUBS>([&](auto sub) {
                multiply_add<typename Tile::T>(sum[sub][0], queries.part[sub][step], k[0], k[1]);
                multiply_add<typename Tile::T>(sum[sub][1], queries.part[sub][step], k[2], k[3]);
            });
        });
        repeat<2>([&](auto half_) {
            constexpr int half = half_;
            // Tokens move by XOR; rows 8 and 16 further turn them alike.
            u32 place = at.scores_out ^ (chunk * 2 + half) * 32;
            repeat<SUBS>([&](auto sub) {
                const float(&s)[4] = sum[sub][half];
                constexpr int LOW = 4 * Tile::TOKENS * (sub * 16);
                store_shared<LOW>(place, s[0], s[1]);
                store_shared<LOW + 4 * Tile::TOKENS * 8>(place, s[2], s[3]);
            });
        });
    });
}

// O: the warp's columns of all rows.
template <class Tile>
struct Output {
    static constexpr int PAIRS = Tile::COLUMNS / 16;
    float part[Tile::SUBS][2 * PAIRS][4];

    __forceinline__ void clear() {
        repeat<Tile::SUBS>([&](auto sub) {
            repeat<2 * PAIRS>([&](auto n) {
                for (float& one : part[sub][n]) one = 0;
            });
        });
    }

    // Multiply every row by its factor.
    __forceinline__ void scale(const Place<Tile>& at) {
        u32 row = at.shared + at.lane / 4 * 4;
        repeat<Tile::SUBS>([&](auto sub) {
            float low = load_shared_float<Tile::FACTOR + sub * 64>(row);
            float high = load_shared_float<Tile::FACTOR + sub * 64 + 32>(row);
            repeat<2 * PAIRS>([&](auto n) {
                part[sub][n][0] *= low;
                part[sub][n][1] *= low;
                part[sub][n][2] *= high;
                part[sub][n][3] *= high;
            });
        });
    }

    // Add P V, for the first SUBS matrices of rows.
    template <int SUBS>
    __forceinline__ void add(const Place<Tile>& at, u32 keys) {
        u32 value = keys + at.v_offset;
        repeat<Tile::TOKENS / 16>([&](auto step_) {
            constexpr int step = step_;
            u32 p[SUBS][4];
            repeat<SUBS>([&](auto sub) {
                load_matrices<sub * 16 * Tile::TOKENS * 2>(p[sub], at.weights_in ^ step * 32);
            });
            repeat<PAIRS>([&](auto pair_) {
                constexpr int pair = pair_;
                u32 v[4];
                // Within 128 bytes a chunk's place changes by XOR, beyond by addition.
                load_matrices_transposed<pair / 4 * 128 + step * 16 * Tile::PITCH>(
                    v, value ^ pair % 4 * 32);
                repeat<SUBS>([&](auto sub) {
                    multiply_add<typename Tile::T>(part[sub][2 * pair], p[sub], v[0], v[1]);
                    multiply_add<typename Tile::T>(part[sub][2 * pair + 1], p[sub], v[2], v[3]);
                });
            });
        });
    }
};

}  // namespace cumla
