// One block's work in a decode step: its part of the plan, for one tile of query rows.
//
// A tile of keys goes through four steps with a barrier between them:
//   1 the copies of the tile have landed (FP8: are decoded), those of a later one are begun;
//   2 partial scores of all warps;
//   3 softmax: the rows' threads add the partial scores and turn them into weights;
//   4 output.
// The running maximum of a row moves only when it grows by more than LAZY (in log2): weights are
// then at most 2**LAZY, which floats hold as well as 1, and O is hardly ever rescaled.
#pragma once

#include "portable/decode/stages.cuh"

namespace cumla {

constexpr float LAZY = 8;

// What the plan's rows are (cumla/schedule.py: METADATA_FIELDS).
struct PartOfPlan {
    i32 begin_req, end_req, begin_block, end_block, begin_fragment, first_split, last_split, pad;
};

// What a part does of one request: positions [begin, end).
struct Work {
    u32 begin, end;

    __forceinline__ Work(const PartOfPlan& part, i32 request, u32 block_size, u32 kv_len) {
        begin = request == part.begin_req ? part.begin_block * block_size : 0;
        end = request == part.end_req ? min_of(part.end_block * block_size, kv_len) : kv_len;
    }
};

// Where the result goes: to the outputs if the part does the whole request, else to the slot of its
// piece. Found out when it is needed: during the main loop every register counts.
struct Destination {
    bool whole;
    i64 slot;

    __forceinline__ Destination(const PartOfPlan& part, i32 request, const i32* num_splits) {
        bool first = request == part.begin_req, last = request == part.end_req;
        whole = !(first ? part.first_split : last ? part.last_split : 0);
        slot = num_splits[request] + (first ? part.begin_fragment : 0);
    }
};

// The arrays of rows, by request, query token and head.
template <class T>
struct RowArrays {
    const T* q;                          // [b, s_q, h_q, d_qk]
    i64 q_batch, q_token, q_head;        // strides, in numbers
    T* out;                              // [b, s_q, h_q, d_v]
    i64 out_batch, out_token, out_head;
    float* lse;                          // [b, h_q, s_q]
    i64 lse_batch, lse_head, lse_token;
    float* o_accum;                      // [slots, s_q, h_q, d_v]; may be null if nothing is split
    float* lse_accum;                    // [slots, s_q, h_q]; likewise
    const float* attn_sink;              // [h_q]; may be null
    i64 sink_stride;
    u32 s_q, h_q;
    bool q_aligned, out_aligned;         // rows begin at multiples of 16 and 8 bytes
};

// Softmax state of a row, in each of its threads.
struct RowState {
    float peak;   // what scores are compared with, in log2 units; -inf before the first key
    float total;  // this thread's share of the sum of weights
};

template <class Tile, class Source>
struct Attention {
    using T = typename Tile::T;
    Place<Tile> at;
    Queries<Tile> queries;
    Output<Tile> output;
    RowState state;
    u32 subs;      // 16-row matrices that hold rows

    // `rows` of the tile's rows exist.
    __forceinline__ Attention(u32 shared, u32 rows) : at(shared), subs(ceil_div(rows, 16u)) {}

    // Bring the tile's q to registers, as many rows at a time as the buffer of keys takes.
    template <class Rows>
    __forceinline__ void load_queries(const Rows& rows) {
        constexpr int AT_ONCE = min_of(Tile::ROWS, Tile::K_BUFFERS * Tile::TOKENS);
        constexpr int CHUNKS = Tile::D_QK / 8;
        u32 buffer = at.shared + Tile::KEYS;
#pragma unroll 1
        for (int first = 0; first < Tile::ROWS; first += AT_ONCE) {
            __syncthreads();  // the buffer is free
#pragma unroll 1
            for (int r = at.warp; r < AT_ONCE; r += Tile::WARPS) {
                bool exists = rows.exists(first + r);
                const T* q = exists ? rows.query(first + r) : nullptr;
#pragma unroll 1
                for (int chunk = at.lane; chunk < CHUNKS; chunk += 32) {
                    u32 place = buffer + Tile::key_offset(r, chunk);
                    if (!exists)
                        store_shared(place, Vec16{0, 0, 0, 0});
                    else if (rows.arrays.q_aligned)
                        copy_async_16<0>(place, q + chunk * 8, 16);
                    else
                        store_shared(place, gather_16(q + chunk * 8));
                }
            }
            copy_async_commit();
            copy_async_wait<0>();
            __syncthreads();
            queries.load(at, buffer, first, AT_ONCE);
        }
        __syncthreads();
    }

    static __forceinline__ Vec16 gather_16(const T* q) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            words[i] = q[2 * i].bits | static_cast<u32>(q[2 * i + 1].bits) << 16;
        return {words[0], words[1], words[2], words[3]};
    }

    template <int SUBS>
    __forceinline__ void multiply(u32 keys) {
        int mine = static_cast<int>(subs) - static_cast<int>(at.row_group) * Tile::GROUP_SUBS;
        if (mine >= SUBS) {
            multiply_keys<Tile, SUBS>(at, queries, keys);
        } else {
            if constexpr (SUBS > 1) multiply<SUBS - 1>(keys);
        }
    }

    template <int SUBS>
    __forceinline__ void accumulate(u32 keys) {
        if (subs >= SUBS) {
            output.template add<SUBS>(at, keys);
        } else {
            if constexpr (SUBS > 1) accumulate<SUBS - 1>(keys);
        }
    }

    // The thread's share of a row: scores to weights. True if O must be rescaled before it grows.
    __forceinline__ bool softmax(u32 slot, u32 position, u32 limit, float scale_log2) {
        float z[Tile::QUADS][4];
        float peak = -infinity();
        repeat<Tile::QUADS>([&](auto quad_) {
            constexpr int quad = quad_;
            // Groups of 8 tokens move by XOR.
            u32 token = (quad * Tile::ROW_THREADS + at.sub) * 4;
            u32 place = at.scores_in ^ quad * Tile::ROW_THREADS * 16;
            load_shared_floats<0>(z[quad], place);
            repeat<Tile::SLICES - 1>([&](auto slice) {
                float more[4];
                load_shared_floats<(slice + 1) * 4 * Tile::ROWS * Tile::TOKENS>(
                    more, place);
                repeat<4>([&](auto i) { z[quad][i] += more[i]; });
            });
            u32 valid = load_shared_word<Tile::VALID>(at.shared + slot * Tile::TOKENS + token);
            repeat<4>([&](auto i) { z[quad][i] *= scale_log2; });
            u32 last = position + token + 3;
            if (valid != 0x01010101u || last >= limit) {
                repeat<4>([&](auto i) {
                    if (!(valid >> 8 * i & 1) || last - 3 + i >= limit) z[quad][i] = -infinity();
                });
            }
            repeat<4>([&](auto i) { peak = fmaxf(peak, z[quad][i]); });
        });
#pragma unroll
        for (int step = Tile::ROW_THREADS / 2; step > 0; step /= 2)
            peak = fmaxf(peak, __shfl_xor_sync(FULL_WARP, peak, step));

        float before = state.peak;
        bool grows = peak > before + LAZY;  // before the first key, before is -inf
        if (grows) state.peak = peak;
        // A row that has seen nothing keeps its peak of -inf: compared with 0, its weights are 0.
        float shift = state.peak == -infinity() ? 0 : state.peak;
        float total = 0;
        repeat<Tile::QUADS>([&](auto quad_) {
            constexpr int quad = quad_;
            repeat<4>([&](auto i) {
                z[quad][i] = exp2_approx(z[quad][i] - shift);
                total += z[quad][i];
            });
            store_shared(
                at.weights_out ^ quad * Tile::ROW_THREADS * 8,
                pack<T>(z[quad][0], z[quad][1]), pack<T>(z[quad][2], z[quad][3]));
        });
        bool rescale = grows && before != -infinity();
        float factor = rescale ? exp2_approx(before - shift) : 1;
        state.total = state.total * factor + total;
        if (at.sub == 0) store_shared<Tile::FACTOR>(at.shared + 4 * at.row, factor);
        return rescale;
    }

    // Attend to positions [begin, end) of the source.
    // The thread's row sees those below `limit`.
    __forceinline__ void run(const Source& source, u32 begin, u32 end, u32 limit,
                             float scale_log2) {
        output.clear();
        state = {-infinity(), 0};
        // Rows that do not exist have no softmax, but a factor is read for them, too.
        if (at.sub == 0) store_shared<Tile::FACTOR>(at.shared + 4 * at.row, 1.0f);
        Stages<Tile, Source> stages(source, at, begin);
        // A stage of 16-bit rows is free again one barrier after the tile's last step, one of FP8
        // rows when they are decoded.
        constexpr u32 AHEAD = Tile::STAGES - (Tile::Rows::IS_FP8 ? 0 : 1);
        constexpr u32 BEHIND = Tile::FLAG_SLOTS - AHEAD;
#pragma unroll 1
        for (u32 i = 0; i < AHEAD; i++) stages.fetch(begin + i * Tile::TOKENS, i, i);
        u32 stage = 0, slot = 0;  // of the tile at hand; where its flags are
#pragma unroll 1
        for (u32 position = begin; position < end; position += Tile::TOKENS) {
            u32 next = position + AHEAD * Tile::TOKENS;
            u32 next_slot = slot < BEHIND ? slot + AHEAD : slot - BEHIND;
            copy_async_wait<AHEAD - 1>();
            if constexpr (Tile::Rows::IS_FP8) {
                __syncthreads();  // nobody reads the keys of the last tile any more
                decode_rows<Tile>(at, stage);
                __syncwarp();
                stages.fetch(next, stage, next_slot);
                __syncthreads();
            } else {
                __syncthreads();
                stages.fetch(next, stage == 0 ? AHEAD : stage - 1, next_slot);
            }
            u32 keys = at.shared + Tile::KEYS;
            if constexpr (!Tile::Rows::IS_FP8) keys += stage * (Tile::TOKENS * Tile::PITCH);
            multiply<Tile::GROUP_SUBS>(keys);
            __syncthreads();
            // Nobody has computed scores for 16-row matrices without rows.
            bool rescale = false;
            if (at.row < 16 * subs) rescale = softmax(slot, position, limit, scale_log2);
            if (__syncthreads_or(rescale)) output.scale(at);
            accumulate<Tile::SUBS>(keys);
            stage = stage + 1 == Tile::STAGES ? 0 : stage + 1;
            slot = slot + 1 == Tile::FLAG_SLOTS ? 0 : slot + 1;
        }
        copy_async_wait<0>();
    }

    // Divide O by the rows' sums and store it with the rows' lse: the result of a request that is
    // whole (with the sink), or of a piece (in log2 units, without).
    template <class Rows>
    __forceinline__ void store(const Rows& rows, const Destination& to) {
        bool whole = to.whole;
        __syncthreads();  // the last tile's factors may still be read
        float total = state.total;
#pragma unroll
        for (int step = Tile::ROW_THREADS / 2; step > 0; step /= 2)
            total += __shfl_xor_sync(FULL_WARP, total, step);
        bool empty = total == 0;
        float lse = log2_approx(total) + state.peak;  // NaN if the total is
        float factor = empty ? 0 : 1 / total;
        if (whole && !empty) factor *= rows.sink_share(at.row, lse);
        if (at.sub == 0 && rows.exists(at.row)) {
            if (whole)
                *rows.lse(at.row) = total > 0 ? lse * LN_2 : infinity();
            else
                *rows.lse_piece(at.row, to.slot) = empty ? -infinity() : lse;
        }
        if (at.sub == 0) store_shared<Tile::FACTOR>(at.shared + 4 * at.row, factor);
        __syncthreads();
        output.scale(at);
        u32 column = at.warp * Tile::COLUMNS;
#pragma unroll
        for (int sub16 = 0; sub16 < Tile::SUBS; sub16++) {
#pragma unroll
            for (int high = 0; high < 2; high++) {
                u32 r = sub16 * 16 + high * 8 + at.lane / 4;
                if (whole)
                    store_row(rows.exists(r) ? rows.out(r) + column : nullptr, sub16, high,
                              rows.arrays.out_aligned);
                else
                    store_piece(rows.exists(r) ? rows.out_piece(r, to.slot) + column : nullptr, sub16,
                                high);
            }
        }
    }

    // 8 columns of a row lie in 4 lanes. Neighbours exchange a pair, so that each lane has four
    // columns of one of two matrices: 8-byte stores that fill 32-byte sectors.
    __forceinline__ void store_row(T* out, int sub16, int high, bool aligned) {
        bool odd = at.lane % 2;
#pragma unroll
        for (int pair = 0; pair < Output<Tile>::PAIRS; pair++) {
            const float* first = &output.part[sub16][2 * pair][2 * high];
            const float* second = &output.part[sub16][2 * pair + 1][2 * high];
            u32 a = pack<T>(first[0], first[1]), b = pack<T>(second[0], second[1]);
            u32 other = __shfl_xor_sync(FULL_WARP, odd ? a : b, 1);
            u32 x = odd ? other : a, y = odd ? b : other;
            u32 place = pair * 16 + odd * 8 + at.lane % 4 / 2 * 4;
            if (out == nullptr) continue;
            if (aligned) {
                asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(out + place), "r"(x), "r"(y)
                             : "memory");
            } else {
                out[place].bits = x;
                out[place + 1].bits = x >> 16;
                out[place + 2].bits = y;
                out[place + 3].bits = y >> 16;
            }
        }
    }

    __forceinline__ void store_piece(float* out, int sub16, int high) {
        if (out == nullptr) return;
#pragma unroll
        for (int n = 0; n < 2 * Output<Tile>::PAIRS; n++) {
            const float* part = &output.part[sub16][n][2 * high];
            asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(out + n * 8 + at.lane % 4 * 2),
                         "f"(part[0]), "f"(part[1])
                         : "memory");
        }
    }

    static constexpr float LN_2 = 0.693147180559945f;
};

// The rows of one tile, of one request. `Index` tells which query token and head a row is.
template <class T, class Index>
struct TileRows {
    const RowArrays<T>& arrays;
    Index index;
    i64 request;

    __forceinline__ bool exists(u32 row) const { return index.exists(row); }
    __forceinline__ const T* query(u32 row) const {
        auto [token, head] = index.of(row);
        return arrays.q + request * arrays.q_batch + token * arrays.q_token + head * arrays.q_head;
    }
    __forceinline__ T* out(u32 row) const {
        auto [token, head] = index.of(row);
        return arrays.out + request * arrays.out_batch + token * arrays.out_token +
               head * arrays.out_head;
    }
    __forceinline__ float* lse(u32 row) const {
        auto [token, head] = index.of(row);
        return arrays.lse + request * arrays.lse_batch + head * arrays.lse_head +
               token * arrays.lse_token;
    }
    __forceinline__ i64 piece(u32 row, i64 slot) const {
        auto [token, head] = index.of(row);
        return (slot * arrays.s_q + token) * arrays.h_q + head;
    }
    __forceinline__ float* out_piece(u32 row, i64 slot) const {
        return arrays.o_accum + piece(row, slot) * D_V;
    }
    __forceinline__ float* lse_piece(u32 row, i64 slot) const {
        return arrays.lse_accum + piece(row, slot);
    }
    // What the attention sink leaves of a row whose lse is `lse`, in log2 units.
    __forceinline__ float sink_share(u32 row, float lse) const {
        if (arrays.attn_sink == nullptr || !exists(row)) return 1;
        auto [token, head] = index.of(row);
        return 1 / (1 + exp2_approx(arrays.attn_sink[head * arrays.sink_stride] * LOG2_E - lse));
    }
    static constexpr int D_V = 512;
    static constexpr float LOG2_E = 1.44269504088896f;
};

// A row's query token and head.
struct RowIndex {
    i64 token, head;
};

}  // namespace cumla
