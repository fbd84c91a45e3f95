// Sparse MLA decoding: the tokens that each query selects, of one or two pools, in one softmax.
//
// A tile is heads of one query token, as every token has its own selection. Positions count the
// main pool's indices first, rounded up to blocks of the plan and at least one, then the extra
// pool's. An index that is negative or beyond its pool selects nothing and is not followed.
//
// Budget: cycles of an SM for 64 KV tokens, by what it spends them on. The largest, *, binds.
// Rows are h_q; DRAM is the SM's share of it, and keys that several tiles read come
// from there once. Written by `python -m tools.kernel_report --write budgets`.
//
//   keys        GPU       rows  tiles   tensor   shared    issue     DRAM
//   16-bit rows A100        16   1x16     1088     2048      738    *5525
//   16-bit rows A100        64   1x64     4352     3952     2301    *5525
//   16-bit rows A100       128   2x64    *8704     7904     4602     5525
//   16-bit rows RTX 4090    16   1x16     4352     2048      738   *23675
//   16-bit rows RTX 4090    64   2x32    17408     5120     2672   *23675
//   16-bit rows RTX 4090   128   4x32   *34816    10240     5344    23675
//   16-bit rows H100        16   1x16      877     2048      738    *5335
//   16-bit rows H100        64   1x64     3510     3952     2301    *5335
//   16-bit rows H100       128   2x64     7019    *7904     4602     5335
//   V32_FP8     A100        16   1x16     1088     2816     2128    *3231
//   V32_FP8     A100        64   1x64     4352    *4720     3768     3231
//   V32_FP8     A100       128   2x64     8704    *9440     7536     3231
//   V32_FP8     RTX 4090    16   1x16     4352     2816     2128   *13844
//   V32_FP8     RTX 4090    64   2x32   *17408     6656     5626    13844
//   V32_FP8     RTX 4090   128   4x32   *34816    13312    11251    13844
//   V32_FP8     H100        16   1x16      877     2816     2128    *3120
//   V32_FP8     H100        64   1x64     3510    *4720     3768     3120
//   V32_FP8     H100       128   2x64     7019    *9440     7536     3120
//   V4_FP8      A100        16   1x16     1024     2696     2200    *2925
//   V4_FP8      A100        64   1x64     4096    *4544     3893     2925
//   V4_FP8      A100       128   2x64     8192    *9088     7786     2925
//   V4_FP8      RTX 4090    16   1x16     4096     2696     2200   *12534
//   V4_FP8      RTX 4090    64   2x32   *16384     6432     5914    12534
//   V4_FP8      RTX 4090   128   4x32   *32768    12864    11827    12534
//   V4_FP8      H100        16   1x16      826     2696     2200    *2824
//   V4_FP8      H100        64   1x64     3303    *4544     3893     2824
//   V4_FP8      H100       128   2x64     6606    *9088     7786     2824
#pragma once

#include "portable/decode/attend.cuh"

namespace cumla {

// A pool and what all queries select of it.
struct Selections {
    Pool pool;
    const i32* indices;  // [b, s_q, topk]
    i64 indices_batch, indices_token;
    const i32* topk_length;  // [b, s_q]; may be null: all count
    i64 length_batch, length_token;
    u32 topk;

    __forceinline__ u32 count(i32 request, u32 token) const {
        if (topk_length == nullptr) return topk;
        i32 length = topk_length[request * length_batch + token * length_token];
        return min_of(static_cast<u32>(max_of(length, 0)), topk);
    }
    __forceinline__ const i32* of(i32 request, u32 token) const {
        return indices + request * indices_batch + token * indices_token;
    }
    template <class Rows>
    __forceinline__ Location locate(u32 slot) const {
        if (slot >= pool.num_pages * pool.page_size.divisor) return {nullptr, nullptr};
        u32 page = pool.page_size.divide(slot);
        return cumla::locate<Rows>(pool, page, slot - page * pool.page_size.divisor);
    }
};

// What one query selects. It lies in shared memory: only some lanes need it, once for each tile,
// and the registers that it would take are those of Q and O.
struct Selected {
    const i32* indices[2];  // of the main and the extra pool
    u32 count[2];           // how many of them count
    u32 extra_begin;        // position of the extra pool's first
    u32 end;                // of the work
};

template <bool HAS_EXTRA>
struct SparseSource {
    const Selections& main;
    const Selections& extra;
    const Selected& selected;

    __forceinline__ const u8* anywhere() const { return main.pool.pages; }
    __forceinline__ i32 id(u32 position) const {
        if (position >= selected.end) return -1;
        bool in_extra = HAS_EXTRA && position >= selected.extra_begin;
        u32 place = in_extra ? position - selected.extra_begin : position;
        return place < selected.count[in_extra] ? selected.indices[in_extra][place] : -1;
    }
    template <class Rows>
    __forceinline__ Location locate(i32 slot, u32 position) const {
        if constexpr (HAS_EXTRA)
            if (position >= selected.extra_begin) return extra.locate<Rows>(slot);
        return main.locate<Rows>(slot);
    }
};

struct HeadIndex {
    u32 first, heads;  // of the tile; of all tiles
    u32 token;

    __forceinline__ bool exists(u32 row) const { return first + row < heads; }
    __forceinline__ RowIndex of(u32 row) const { return {token, first + row}; }
};

template <class Tile, bool HAS_EXTRA, int MIN_BLOCKS>
__global__ void __launch_bounds__(Tile::THREADS, MIN_BLOCKS) decode_sparse(
    const typename Tile::T* q,  // [b, s_q, h_q, d_qk]
    i64 q_batch, i64 q_token, i64 q_head,
    typename Tile::T* out,  // [b, s_q, h_q, d_v]
    i64 out_batch, i64 out_token, i64 out_head,
    float* lse,  // [b, h_q, s_q]
    i64 lse_batch, i64 lse_head, i64 lse_token,
    float* o_accum,          // [slots, s_q, h_q, d_v]; may be null if no request is split
    float* lse_accum,        // [slots, s_q, h_q]; likewise
    const float* attn_sink,  // [h_q]; may be null
    i64 sink_stride, u32 batch, u32 s_q, u32 h_q, u32 tiles,
    u32 aligned,  // bit 0: rows of q begin at multiples of 16 bytes; bit 1: of out, of 8
    const u8* kv_cache,  // [pages, page_size, 1, row]
    i64 page_stride, i64 row_stride,  // bytes
    u32 num_pages, u32 page_size, u32 page_multiplier, u32 page_shift,
    const i32* indices,  // [b, s_q, topk]
    i64 indices_batch, i64 indices_token,
    const i32* topk_length,  // [b, s_q]; may be null: all count
    i64 length_batch, i64 length_token, u32 topk,
    const u8* extra_kv_cache,  // the extra pool likewise; not looked at unless HAS_EXTRA
    i64 extra_page_stride, i64 extra_row_stride,
    u32 extra_num_pages, u32 extra_page_size, u32 extra_page_multiplier, u32 extra_page_shift,
    const i32* extra_indices,  // [b, s_q, extra_topk]
    i64 extra_indices_batch, i64 extra_indices_token,
    const i32* extra_topk_length,  // [b, s_q]; may be null
    i64 extra_length_batch, i64 extra_length_token, u32 extra_topk,
    const i32* kv_lens,          // [b]: positions of each request
    const PartOfPlan* metadata,  // [parts]
    const i32* num_splits,       // [b + 1]
    u32 block_size, float scale_log2) {
    extern __shared__ __align__(128) u8 memory[];  // [Tile::SHARED_BYTES]
    using T = typename Tile::T;

    __shared__ Selected selected;

    u32 tile = blockIdx.x % tiles, token = blockIdx.x / tiles % s_q;
    const PartOfPlan& part = metadata[blockIdx.x / tiles / s_q];
    if (part.begin_req >= batch) return;

    RowArrays<T> arrays{q, q_batch, q_token, q_head, out, out_batch, out_token, out_head,
                        lse, lse_batch, lse_head, lse_token, o_accum, lse_accum,
                        attn_sink, sink_stride, s_q, h_q, (aligned & 1) != 0, (aligned & 2) != 0};
    HeadIndex index{tile * Tile::ROWS, h_q, token};
    Selections main{{kv_cache, page_stride, row_stride, num_pages,
                     {page_size, page_multiplier, page_shift}},
                    indices, indices_batch, indices_token,
                    topk_length, length_batch, length_token, topk};
    Selections extra{{extra_kv_cache, extra_page_stride, extra_row_stride, extra_num_pages,
                      {extra_page_size, extra_page_multiplier, extra_page_shift}},
                     extra_indices, extra_indices_batch, extra_indices_token,
                     extra_topk_length, extra_length_batch, extra_length_token, extra_topk};
    SparseSource<HAS_EXTRA> source{main, extra, selected};

    Attention<Tile, SparseSource<HAS_EXTRA>> attention(
        shared_address(memory), min_of(h_q - index.first, static_cast<u32>(Tile::ROWS)));
    for (i32 request = part.begin_req; request <= part.end_req; request++) {
        Work work(part, request, block_size, kv_lens[request]);
        if (threadIdx.x == 0) {
            selected.indices[0] = main.of(request, token);
            selected.count[0] = main.count(request, token);
            selected.end = work.end;
            if constexpr (HAS_EXTRA) {
                // All queries of a request follow one schedule: the longest selection decides.
                u32 longest = 1;
                for (u32 s = 0; s < s_q; s++) longest = max_of(longest, main.count(request, s));
                selected.extra_begin = ceil_div(longest, block_size) * block_size;
                selected.indices[1] = extra.of(request, token);
                selected.count[1] = extra.count(request, token);
            }
        }
        TileRows<T, HeadIndex> tile_rows{arrays, index, request};
        attention.load_queries(tile_rows);  // with barriers: `selected` is there
        attention.run(source, work.begin, work.end, work.end, scale_log2);
        attention.store(tile_rows, Destination(part, request, num_splits));
    }
}

}  // namespace cumla
