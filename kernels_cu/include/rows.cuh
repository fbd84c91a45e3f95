// The formats of a KV row. The numbers come from cumla/layouts.py, the one place that knows them,
// as template arguments (cumla/kernels/formats.py spells them).
#pragma once

#include "include/types.cuh"

namespace cumla {

// BF16 and FP16 rows: D_QK numbers of type T.
template <class T_, int D_QK_, int D_V_>
struct HalfRows {
    using T = T_;  // of a decoded row
    static constexpr bool IS_FP8 = false;
    static constexpr int D_QK = D_QK_;
    static constexpr int D_V = D_V_;
    static constexpr int ROW_BYTES = D_QK * 2;
};

// FP8 rows: D_NOPE e4m3 codes, a scale for each TILE of them, then bf16 numbers at ROPE_OFFSET.
// Scales are float32 behind the codes, or UE8M0 bytes in a group of SCALE_BYTES for each token
// behind the page's last row.
template <int D_QK_, int D_V_, int D_NOPE_, int TILE_, int ROW_BYTES_, int ROPE_OFFSET_,
          int SCALE_BYTES_, bool SCALES_AT_PAGE_END_>
struct Fp8Rows {
    using T = bf16;
    static constexpr bool IS_FP8 = true;
    static constexpr int D_QK = D_QK_;
    static constexpr int D_V = D_V_;
    static constexpr int D_NOPE = D_NOPE_;
    static constexpr int D_ROPE = D_QK - D_NOPE;
    static constexpr int TILE = TILE_;
    static constexpr int ROW_BYTES = ROW_BYTES_;  // from one row of a page to the next
    static constexpr int ROPE_OFFSET = ROPE_OFFSET_;
    static constexpr int SCALE_BYTES = SCALE_BYTES_;
    static constexpr bool SCALES_AT_PAGE_END = SCALES_AT_PAGE_END_;
};

}  // namespace cumla
