// What both ways to plan a decode step need. The definition, which the kernels equal number for
// number, is cumla/schedule.py.
#pragma once

#include "include/types.cuh"

namespace cumla {

// How many keys the queries of each request have in one pool.
struct PoolLengths {
    const i32* lengths;  // [b, tokens], each brought into [0, limit]; may be null: limit for all
    i64 by_request, by_token;  // strides, in numbers
    u32 tokens, limit;

    // The longest counts.
    u32 of(i64 request) const {
        if (lengths == nullptr) return limit;
        i32 longest = 0;
        for (u32 token = 0; token < tokens; token++)
            longest = max_of(longest, lengths[request * by_request + token * by_token]);
        return min_of(static_cast<u32>(longest), limit);
    }
};

// How many keys each request has: those of the main pool, at least `least`, then in a block of
// their own those of the extra pool, if there is one.
struct RequestLengths {
    PoolLengths main, extra;
    u32 least, block_size;

    u32 of(i64 request) const {
        u32 length = max_of(main.of(request), least);
        if (extra.limit == 0) return length;
        return ceil_div(length, block_size) * block_size + extra.of(request);
    }

    u32 blocks_of(i64 request) const { return ceil_div(of(request), block_size); }
};

// A row of tile_scheduler_metadata: cumla/schedule.py, METADATA_FIELDS.
struct alignas(16) PlanRow {
    u32 begin_req, end_req, begin_block, end_block, begin_fragment, first_split, last_split, pad;
};

// The sum of `value` over the threads up to this one, itself included, and over all of the block.
struct BlockScan {
    i64 sum, total;

    BlockScan(i64 value, i64 (&warp_sums)[32]) {
        u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        sum = scan_warp(value);
        __syncthreads();  // the sums of an earlier scan have been read
        if (lane == 31) warp_sums[warp] = sum;
        __syncthreads();
        i64 warps = scan_warp(lane < blockDim.x / 32 ? warp_sums[lane] : 0);
        i64 before = __shfl_sync(FULL_WARP, warps, (warp + 31) % 32);
        if (warp > 0) sum += before;
        total = __shfl_sync(FULL_WARP, warps, 31);
    }

    static i64 scan_warp(i64 value) {
        u32 lane = threadIdx.x % 32;
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) {
            i64 before = __shfl_up_sync(FULL_WARP, value, step);
            if (lane >= step) value += before;
        }
        return value;
    }
};

}  // namespace cumla
