// The results of a request's pieces to the result of the request.
//
// With l_i a piece's lse in log2 units and o_i its output, divided by its own sum:
//   out = sum_i 2**(l_i - peak) o_i / total,  total = sum_i 2**(l_i - peak),  peak = max_i l_i.
// Pieces come in slot order, so equal plans give equal bits.
//
// Budget: cycles of an SM for 64 rows of bf16 numbers, by what it spends them on. The
// largest, *, binds; DRAM is the SM's share of it. Pieces may be in L2.
// Written by `python -m tools.kernel_report --write budgets`.
//
//   rows       GPU         issue     DRAM
//   2 pieces   A100         5968   *24530
//   2 pieces   RTX 4090     5968  *105103
//   2 pieces   H100         5968   *23684
//   8 pieces   A100        11824   *83378
//   8 pieces   RTX 4090    11824  *357253
//   8 pieces   H100        11824   *80502
#pragma once

#include "include/ptx.cuh"
#include "include/types.cuh"

namespace cumla {

constexpr u32 COMBINE_WARPS = 8;

// A warp for COLUMNS columns of a row: all of them, or, where rows are too few to fill the GPU, a
// quarter; that changes no bit. A lane has four consecutive columns of each 128.
template <class T, int D_V, int COLUMNS>
__global__ void __launch_bounds__(COMBINE_WARPS * 32) combine_pieces(
    const float* o_accum,                            // [slots, s_q, h_q, D_V]
    const float* lse_accum,                          // [slots, s_q, h_q], -inf: no key
    const i32* num_splits,                           // [b + 1]
    const float* attn_sink, i64 sink_head,           // [h_q]; may be null
    T* out, i64 out_batch, i64 out_token, i64 out_head,      // [b, s_q, h_q, D_V]
    float* lse, i64 lse_batch, i64 lse_head, i64 lse_token,  // [b, h_q, s_q]
    u32 batch, u32 s_q, u32 h_q) {
    static_assert(D_V % COLUMNS == 0 && COLUMNS % 128 == 0, "a lane has four columns of each 128");
    constexpr int CHUNKS = COLUMNS / 128;
    constexpr int AHEAD = 8 / CHUNKS;  // pieces under way: 8 loads of 16 bytes for each lane
    static_assert(32 % AHEAD == 0, "the lses of 32 pieces are loaded at a time");
    constexpr float LOG2_E = 1.44269504088896f, LN_2 = 0.693147180559945f;

    u32 lane = threadIdx.x % 32;
    u32 unit = blockIdx.x * COMBINE_WARPS + threadIdx.x / 32;
    u32 column = unit % (D_V / COLUMNS) * COLUMNS + lane * 4;
    u32 row = unit / (D_V / COLUMNS);
    u32 head = row % h_q, token = row / h_q % s_q, request = row / h_q / s_q;
    if (request >= batch) return;
    i64 slot = num_splits[request];
    int pieces = num_splits[request + 1] - slot;
    if (pieces <= 1) return;  // its result is there already

    i64 step = static_cast<i64>(s_q) * h_q;  // rows of a slot
    i64 first = slot * step + static_cast<i64>(token) * h_q + head;
    lse_accum += first;
    o_accum += first * D_V + column;
    Vec16 loaded[AHEAD][CHUNKS];
    auto load = [&](int piece, Vec16(&to)[CHUNKS]) {
        const float* from = o_accum + piece * step * D_V;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++)
            to[chunk] = *reinterpret_cast<const Vec16*>(from + chunk * 128);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (i < pieces) load(i, loaded[i]);

    // Not of NaN: a NaN makes the total NaN.
    float peak = -infinity();
    for (int i = lane; i < pieces; i += 32) peak = fmaxf(peak, lse_accum[i * step]);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
        peak = fmaxf(peak, __shfl_xor_sync(FULL_WARP, peak, mask));
    // If no piece has a key, all are compared with 0, and weigh 0.
    float shift = peak == -infinity() ? 0 : peak;

    float total = 0;  // the lane's share
    float sum[CHUNKS][4] = {};
    for (int base = 0; base < pieces; base += 32) {
        float mine = -infinity();
        if (base + lane < pieces) mine = lse_accum[(base + lane) * step];
        total += exp2_approx(mine - shift);
        int group = min_of(pieces - base, 32);
#pragma unroll 1
        for (int begin = 0; begin < group; begin += AHEAD) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                float of_piece = __shfl_sync(FULL_WARP, mine, begin + i);
                // Without a key, or behind the last piece, what was loaded does not count.
                if (of_piece != -infinity()) {
                    float weight = exp2_approx(of_piece - shift);
#pragma unroll
                    for (int chunk = 0; chunk < CHUNKS; chunk++) {
                        const Vec16& values = loaded[i][chunk];
                        sum[chunk][0] += weight * float_of(values.x);
                        sum[chunk][1] += weight * float_of(values.y);
                        sum[chunk][2] += weight * float_of(values.z);
                        sum[chunk][3] += weight * float_of(values.w);
                    }
                }
                int next = base + begin + i + AHEAD;
                if (next < pieces) load(next, loaded[i]);
            }
        }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) total += __shfl_xor_sync(FULL_WARP, total, mask);

    float row_lse = log2_approx(total) + shift;
    if (column == 0)
        lse[request * lse_batch + head * lse_head + token * lse_token] =
            total > 0 ? row_lse * LN_2 : infinity();
    // Without a key the row is 0 whatever the sink is. A sink joins as one more key, of value 0.
    float factor = total == 0 ? 0 : 1 / total;
    if (attn_sink != nullptr && total != 0)
        factor *= 1 / (1 + exp2_approx(attn_sink[head * sink_head] * LOG2_E - row_lse));
    out += request * out_batch + token * out_token + head * out_head + column;
    bool aligned = reinterpret_cast<u64>(out) % 8 == 0;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const float(&s)[4] = sum[chunk];
        u32 low = pack<T>(s[0] * factor, s[1] * factor);
        u32 high = pack<T>(s[2] * factor, s[3] * factor);
        T* place = out + chunk * 128;
        if (aligned) {
            *reinterpret_cast<u64*>(place) = low | static_cast<u64>(high) << 32;
        } else {
            place[0].bits = low;
            place[1].bits = low >> 16;
            place[2].bits = high;
            place[3].bits = high >> 16;
        }
    }
}

}  // namespace cumla
