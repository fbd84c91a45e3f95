// Join the results of attention over disjoint sets of keys, given as (out, lse):
//   out = sum_i exp(lse_i - peak) out_i / total,  total = sum_i exp(lse_i - peak),
//   lse = peak + ln(total),                       peak = max_i lse_i.
// An lse of -inf marks a row without a key, whose out does not count. So does +inf, unless out is
// NaN: that is a row whose sum is NaN, and what it is joined to becomes NaN.
//
// A launch takes eight results, or two: the usual case, which needs fewer registers, so that more
// warps fit. Between launches a float state stands for those taken.
//
// Budget: cycles of an SM for 64 rows of bf16 numbers, by what it spends them on. The
// largest, *, binds; DRAM is the SM's share of it. Results may be in L2.
// Written by `python -m tools.kernel_report --write budgets`.
//
//   rows       GPU         issue     DRAM
//   2 results  A100         6432   *14741
//   2 results  RTX 4090     6432   *63160
//   2 results  H100         6432   *14232
//   8 results  A100        14672   *44222
//   8 results  RTX 4090    14672  *189481
//   8 results  H100        14672   *42697
#pragma once

#include "include/ptx.cuh"
#include "include/types.cuh"

namespace cumla {

constexpr u32 MERGE_WARPS = 8;

// What a launch has to do with the state.
constexpr u32 MERGE_FIRST = 1;  // there is none yet
constexpr u32 MERGE_LAST = 2;   // write the result instead

// 16 bytes of T as floats, and back.
template <class T>
struct Numbers {
    static constexpr int COUNT = 16 / sizeof(T);

    static __forceinline__ void unpack(float (&to)[COUNT], const Vec16& from) {
        const u32 words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (COUNT == 4) {
                to[i] = float_of(words[i]);
            } else {
                to[2 * i] = to_float(T{static_cast<u16>(words[i])});
                to[2 * i + 1] = to_float(T{static_cast<u16>(words[i] >> 16)});
            }
        }
    }

    static __forceinline__ Vec16 packed(const float (&from)[COUNT]) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (COUNT == 4)
                words[i] = bits_of(from[i]);
            else
                words[i] = pack<T>(from[2 * i], from[2 * i + 1]);
        }
        return {words[0], words[1], words[2], words[3]};
    }
};

// A row of all that a launch joins, in each lane of a warp.
template <class T, int INPUTS>
struct MergeRow {
    const T* outs[INPUTS];  // the row's first number
    float weights[INPUTS];
    bool counts[INPUTS];  // has keys
    i64 in_column, out_column;  // strides, in numbers
    T* out;
    float* state;  // of the row: d_v numbers, at a multiple of 16 bytes
    float state_weight, factor;
    bool first, last;

    // Columns [column, column + N); as 16-byte accesses or, for N == 1, as single numbers.
    template <int N>
    __forceinline__ void join(u32 column) const {
        float sum[N];
        load_state(sum, state + column);
        if constexpr (N > 1) {
            Vec16 loaded[INPUTS];  // all on the way before the first is needed
#pragma unroll
            for (int i = 0; i < INPUTS; i++)
                if (counts[i]) loaded[i] = *reinterpret_cast<const Vec16*>(outs[i] + column);
#pragma unroll
            for (int i = 0; i < INPUTS; i++) {
                if (!counts[i]) continue;
                float values[N];
                Numbers<T>::unpack(values, loaded[i]);
#pragma unroll
                for (int n = 0; n < N; n++) sum[n] += weights[i] * values[n];
            }
        } else {
#pragma unroll
            for (int i = 0; i < INPUTS; i++)
                if (counts[i]) sum[0] += weights[i] * to_float(outs[i][column * in_column]);
        }
        if (!last) {
            store_state(state + column, sum);
            return;
        }
#pragma unroll
        for (int n = 0; n < N; n++) sum[n] *= factor;
        if constexpr (N > 1)
            *reinterpret_cast<Vec16*>(out + column) = Numbers<T>::packed(sum);
        else
            out[column * out_column] = from_float<T>(sum[0]);
    }

    template <int N>
    __forceinline__ void load_state(float (&sum)[N], const float* from) const {
#pragma unroll
        for (int n = 0; n < N; n++) sum[n] = 0;
        if (first) return;
        if constexpr (N > 1) {
#pragma unroll
            for (int n = 0; n < N; n += 4) {
                Vec16 loaded = *reinterpret_cast<const Vec16*>(from + n);
                sum[n] = float_of(loaded.x) * state_weight;
                sum[n + 1] = float_of(loaded.y) * state_weight;
                sum[n + 2] = float_of(loaded.z) * state_weight;
                sum[n + 3] = float_of(loaded.w) * state_weight;
            }
        } else {
            sum[0] = *from * state_weight;
        }
    }

    template <int N>
    __forceinline__ void store_state(float* to, const float (&sum)[N]) const {
        if constexpr (N > 1) {
#pragma unroll
            for (int n = 0; n < N; n += 4)
                *reinterpret_cast<Vec16*>(to + n) = {bits_of(sum[n]), bits_of(sum[n + 1]),
                                                     bits_of(sum[n + 2]), bits_of(sum[n + 3])};
        } else {
            *to = sum[0];
        }
    }
};

// A warp for each row, up to INPUTS inputs, which have the same strides.
template <class T, int INPUTS>
__global__ void __launch_bounds__(MERGE_WARPS * 32, INPUTS > 2 ? 2 : 4) merge_results(
    const T* out0, const T* out1, const T* out2, const T* out3,  // [x, y, z, d_v]; those from
    const T* out4, const T* out5, const T* out6, const T* out7,  // `count` on may be null
    i64 in_x, i64 in_y, i64 in_z, i64 in_column,
    const float* lse0, const float* lse1, const float* lse2, const float* lse3,  // [x, y, z]
    const float* lse4, const float* lse5, const float* lse6, const float* lse7,  // likewise
    i64 lses_x, i64 lses_y, i64 lses_z,
    u32 count, u32 rows, u32 y_size, u32 z_size, u32 d_v,
    u32 phase,           // MERGE_FIRST, MERGE_LAST
    float* state_rows,   // [rows, 2]: peak and total; may be null if both first and last
    float* state_sums,   // [rows, d_v rounded up to 8]; likewise
    T* out, i64 out_x, i64 out_y, i64 out_z, i64 out_column,  // [x, y, z, d_v]
    float* lse, i64 lse_x, i64 lse_y, i64 lse_z) {            // [x, y, z]
    constexpr float LOG2_E = 1.44269504088896f, LN_2 = 0.693147180559945f;
    u32 lane = threadIdx.x % 32;
    u32 number = blockIdx.x * MERGE_WARPS + threadIdx.x / 32;
    if (number >= rows) return;
    i64 z = number % z_size, y = number / z_size % y_size, x = number / z_size / y_size;
    i64 in = x * in_x + y * in_y + z * in_z, lses_at = x * lses_x + y * lses_y + z * lses_z;
    const T* all_outs[8] = {out0, out1, out2, out3, out4, out5, out6, out7};
    const float* lses[8] = {lse0, lse1, lse2, lse3, lse4, lse5, lse6, lse7};

    MergeRow<T, INPUTS> row;
    row.first = phase & MERGE_FIRST;
    row.last = phase & MERGE_LAST;
    state_rows += static_cast<i64>(number) * 2;
    float peak = -infinity(), total = 0, peak_before = -infinity();
    if (!row.first) {
        peak = peak_before = state_rows[0];
        total = state_rows[1];
    }
    bool spoilt = false;
#pragma unroll
    for (int i = 0; i < INPUTS; i++) {
        row.outs[i] = all_outs[i] + in;
        float value = -infinity();
        if (i < count) value = lses[i][lses_at];
        if (value == infinity()) {
            bool is_nan = false;
            for (u32 column = lane; column < d_v; column += 32) {
                float one = to_float(row.outs[i][column * in_column]);
                is_nan = is_nan || one != one;
            }
            spoilt = __any_sync(FULL_WARP, is_nan) || spoilt;
            value = -infinity();
        }
        row.counts[i] = value != -infinity();
        row.weights[i] = value;
        peak = fmaxf(peak, value);  // not of NaN: a NaN makes the total NaN
    }
    // If nothing has a key so far, all are compared with 0, and weigh 0.
    float shift = peak == -infinity() ? 0 : peak;
    row.state_weight = exp2_approx((peak_before - shift) * LOG2_E);
    total *= row.state_weight;
#pragma unroll
    for (int i = 0; i < INPUTS; i++) {
        row.weights[i] = exp2_approx((row.weights[i] - shift) * LOG2_E);
        total += row.weights[i];
    }
    if (phase == (MERGE_FIRST | MERGE_LAST) && count == 1 && row.counts[0]) {
        // Nothing to join: the result is what was given, to the bit, whatever its lse.
        shift = lse0[lses_at];
        total = row.weights[0] = 1;
    }
    if (spoilt) total = infinity() - infinity();
    row.factor = total == 0 ? 0 : 1 / total;

    row.in_column = in_column;
    row.out_column = out_column;
    row.out = out + x * out_x + y * out_y + z * out_z;
    row.state = state_sums + static_cast<i64>(number) * ceil_div(d_v, 8u) * 8;
    u64 places = row.last ? reinterpret_cast<u64>(row.out) : 0;
#pragma unroll
    for (int i = 0; i < INPUTS; i++)
        if (row.counts[i]) places |= reinterpret_cast<u64>(row.outs[i]);
    constexpr u32 WIDE = Numbers<T>::COUNT;
    u32 wide = 0;  // columns that are accessed by 16 bytes
    if (places % 16 == 0 && in_column == 1 && (out_column == 1 || !row.last))
        wide = d_v / WIDE * WIDE;
    for (u32 column = lane * WIDE; column < wide; column += 32 * WIDE)
        row.template join<WIDE>(column);
    for (u32 column = wide + lane; column < d_v; column += 32) row.template join<1>(column);

    __syncwarp();  // all lanes have read the row's state
    if (lane == 0 && row.last)
        lse[x * lse_x + y * lse_y + z * lse_z] =
            total > 0 ? shift + log2_approx(total) * LN_2 : infinity();
    if (lane == 0 && !row.last) {
        state_rows[0] = peak;
        state_rows[1] = total;
    }
}

}  // namespace cumla
