// Positions in requests to slots of the pool, each in its place.
#pragma once

#include "portable/cache/pool.cuh"

namespace cumla {

// The slot of a position; -1 if it is negative, beyond the table, or its page is not in the pool.
inline i32 slot_of(i32 position, const i32* table, i64 table_step, u32 max_blocks, u32 page_size,
                   u32 num_pages) {
    u32 block = static_cast<u32>(position) / page_size;
    if (position < 0 || block >= max_blocks) return -1;
    u32 page = static_cast<u32>(table[block * table_step]);
    if (page >= num_pages) return -1;
    return static_cast<i32>(page * page_size + static_cast<u32>(position) % page_size);
}

// A thread converts four neighbouring positions of a query.
__global__ void __launch_bounds__(256) token_slots(
    const i32* positions,  // [b, s_q, topk]; may be `slots`
    i64 positions_batch, i64 positions_query, i64 positions_step,
    const i32* block_table,  // [b, max_blocks]
    i64 table_batch, i64 table_step, u32 max_blocks, u32 page_size,
    u32 num_pages,  // num_pages * page_size < 2**31
    i32* slots,     // [b, s_q, topk]
    i64 slots_batch, i64 slots_query, i64 slots_step, u32 batch, u32 s_q, u32 topk) {
    u32 quads = ceil_div(topk, 4u);
    u64 thread = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    u32 query = static_cast<u32>(thread / quads), first = static_cast<u32>(thread % quads) * 4;
    u32 request = query / s_q;
    if (request >= batch) return;
    query %= s_q;
    const i32* from = positions + request * positions_batch + query * positions_query +
                      first * positions_step;
    i32* to = slots + request * slots_batch + query * slots_query + first * slots_step;
    const i32* table = block_table + request * table_batch;
    auto convert = [&](i32 position) {
        return slot_of(position, table, table_step, max_blocks, page_size, num_pages);
    };
    if (first + 4 <= topk && positions_step == 1 && slots_step == 1 && is_aligned(from) &&
        is_aligned(to)) {
        int4 four = *reinterpret_cast<const int4*>(from);
        *reinterpret_cast<int4*>(to) = {convert(four.x), convert(four.y), convert(four.z),
                                        convert(four.w)};
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        if (first + i < topk) to[i * slots_step] = convert(from[i * positions_step]);
}

}  // namespace cumla
