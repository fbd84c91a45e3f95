// Dense MLA decoding: every token of a request, found through its block table.
//
// Rows are packed: row s * (h_q / h_kv) + g is query token s, head g of the KV head's group, so that
// few heads and many tokens fill a tile as well as many heads and one token.
//
// Budget: cycles of an SM for 64 KV tokens, by what it spends them on. The largest, *, binds.
// Rows are h_q / h_kv * s_q; DRAM is the SM's share of it, and keys that several tiles read come
// from there once. Written by `python -m tools.kernel_report --write budgets`.
//
//   keys        GPU       rows  tiles   tensor   shared    issue     DRAM
//   16-bit rows A100        16   1x16     1088     2024      765    *5507
//   16-bit rows A100        64   1x64     4352     3904     2293    *5507
//   16-bit rows A100       128   2x64    *8704     7808     4586     5507
//   16-bit rows RTX 4090    16   1x16     4352     2024      765   *23594
//   16-bit rows RTX 4090    64   2x32    17408     5024     2746   *23594
//   16-bit rows RTX 4090   128   4x32   *34816    10048     5491    23594
//   16-bit rows H100        16   1x16      877     2024      765    *5317
//   16-bit rows H100        64   1x64     3510     3904     2293    *5317
//   16-bit rows H100       128   2x64     7019    *7808     4586     5317
#pragma once

#include "portable/decode/attend.cuh"

namespace cumla {

struct DenseSource {
    Pool pool;
    const i32* table;  // of the request
    u32 end;           // positions below it exist

    __forceinline__ i32 id(u32 position) const {
        return position < end ? table[pool.page_size.divide(position)] : -1;
    }
    __forceinline__ const u8* anywhere() const { return pool.pages; }
    template <class Rows>
    __forceinline__ Location locate(i32 page, u32 position) const {
        if (static_cast<u32>(page) >= pool.num_pages) return {nullptr, nullptr};
        u32 block = pool.page_size.divide(position);
        return cumla::locate<Rows>(pool, page, position - block * pool.page_size.divisor);
    }
};

struct DenseIndex {
    u32 first, rows;   // of the tile; of all tiles
    Divisor group;     // heads of a KV head
    u32 first_head;    // of the KV head

    __forceinline__ bool exists(u32 row) const { return first + row < rows; }
    __forceinline__ RowIndex of(u32 row) const {
        u32 token = group.divide(first + row);
        return {token, first_head + first + row - token * group.divisor};
    }
};

template <class Tile, int MIN_BLOCKS>
__global__ void __launch_bounds__(Tile::THREADS, MIN_BLOCKS) decode_dense(
    const typename Tile::T* q,  // [b, s_q, h_q, d_qk]
    i64 q_batch, i64 q_token, i64 q_head,
    typename Tile::T* out,  // [b, s_q, h_q, d_v]
    i64 out_batch, i64 out_token, i64 out_head,
    float* lse,  // [b, h_q, s_q]
    i64 lse_batch, i64 lse_head, i64 lse_token,
    float* o_accum,    // [slots, s_q, h_q, d_v]; may be null if no request is split
    float* lse_accum,  // [slots, s_q, h_q]; likewise
    u32 batch, u32 s_q, u32 h_q, u32 h_kv, u32 tiles, u32 group_multiplier, u32 group_shift,
    u32 aligned,  // bit 0: rows of q begin at multiples of 16 bytes; bit 1: of out, of 8
    const u8* kv_cache,  // [pages, page_size, h_kv, d_qk]
    i64 page_stride, i64 row_stride, i64 head_stride,  // bytes
    u32 num_pages, u32 page_size, u32 page_multiplier, u32 page_shift,
    const i32* block_table,  // [b, max_blocks]
    i64 table_stride,
    const i32* cache_seqlens,  // [b]
    i64 seqlens_stride,
    u32 room,                             // tokens that a row of block_table has room for
    const PartOfPlan* metadata,           // [parts]
    const i32* num_splits,                // [b + 1]
    u32 block_size, u32 causal, float scale_log2) {
    extern __shared__ __align__(128) u8 memory[];  // [Tile::SHARED_BYTES]
    using T = typename Tile::T;

    u32 tile = blockIdx.x % tiles, kv_head = blockIdx.x / tiles % h_kv;
    const PartOfPlan& part = metadata[blockIdx.x / tiles / h_kv];
    if (part.begin_req >= batch) return;

    RowArrays<T> arrays{q, q_batch, q_token, q_head, out, out_batch, out_token, out_head,
                        lse, lse_batch, lse_head, lse_token, o_accum, lse_accum, nullptr, 0,
                        s_q, h_q, (aligned & 1) != 0, (aligned & 2) != 0};
    u32 group = h_q / h_kv;
    DenseIndex index{tile * Tile::ROWS, s_q * group, {group, group_multiplier, group_shift},
                     kv_head * group};
    Pool pool{kv_cache + kv_head * head_stride, page_stride, row_stride, num_pages,
              {page_size, page_multiplier, page_shift}};
    u32 rows = min_of(index.rows - index.first, static_cast<u32>(Tile::ROWS));

    Attention<Tile, DenseSource> attention(shared_address(memory), rows);
    for (i32 request = part.begin_req; request <= part.end_req; request++) {
        i32 length = cache_seqlens[request * seqlens_stride];
        u32 kv_len = min_of(static_cast<u32>(max_of(length, 0)), room);
        Work work(part, request, block_size, kv_len);
        // Query token s sees positions below kv_len - (s_q - 1 - s); none if that is negative.
        u32 limit = kv_len;
        if (causal) {
            auto sees = [&](u32 row) {
                u32 hidden = s_q - 1 - index.of(row).token;
                return kv_len > hidden ? kv_len - hidden : 0;
            };
            limit = sees(min_of(attention.at.row, rows - 1));
            work.end = min_of(work.end, sees(rows - 1));
        }
        TileRows<T, DenseIndex> tile_rows{arrays, index, request};
        attention.load_queries(tile_rows);
        DenseSource source{pool, block_table + request * table_stride, work.end};
        attention.run(source, work.begin, work.end, limit, scale_log2);
        attention.store(tile_rows, Destination(part, request, num_splits));
    }
}

}  // namespace cumla
