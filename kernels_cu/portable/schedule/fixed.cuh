// The plan of a decode step with fixed splits: every request is cut each `split_blocks` blocks,
// whatever else is in the batch.
#pragma once

#include "portable/schedule/plan.cuh"

namespace cumla {

// A part for each piece, by one block. Pieces for which the metadata has no row are left out, of
// num_splits too, so that nobody looks for their results.
__global__ void __launch_bounds__(1024) plan_fixed(
    const i32* lengths,        // [b, tokens], keys of each query; may be null: `limit` for all
    i64 by_request, i64 by_token, u32 tokens, u32 limit,
    const i32* extra_lengths,  // [b, extra_tokens], likewise
    i64 extra_by_request, i64 extra_by_token, u32 extra_tokens,
    u32 extra_limit,           // 0: no extra pool
    u32 least, u32 batch, u32 num_parts, u32 block_size, u32 split_blocks,
    i32* kv_lens,              // [b], the requests' lengths; may be null
    PlanRow* metadata,         // [num_parts]
    i32* num_splits) {         // [b + 1]
    __shared__ i64 warp_sums[32];
    RequestLengths request_lengths = {
        {lengths, by_request, by_token, tokens, limit},
        {extra_lengths, extra_by_request, extra_by_token, extra_tokens, extra_limit},
        least,
        block_size};

    i64 total = 0;
    if (threadIdx.x == 0) num_splits[0] = 0;
    for (u32 first = 0; first < batch; first += blockDim.x) {
        u32 request = first + threadIdx.x;
        u32 pieces = 0;
        if (request < batch) {
            u32 length = request_lengths.of(request);
            if (kv_lens != nullptr) kv_lens[request] = length;
            pieces = max_of(ceil_div(ceil_div(length, block_size), split_blocks), 1u);
        }
        BlockScan scan(pieces, warp_sums);
        if (request < batch)
            num_splits[request + 1] = min_of(total + scan.sum, static_cast<i64>(num_parts));
        total += scan.total;
    }
    __syncthreads();

    for (u32 part = threadIdx.x; part < num_parts; part += blockDim.x) {
        PlanRow row = {batch, 0, 0, 0, 0, 0, 0, 0};
        if (part < total) {
            // Its request is the last that has no more pieces before it than this one.
            u32 request = 0, beyond = batch;
            while (beyond - request > 1) {
                u32 middle = request + (beyond - request) / 2;
                if (static_cast<u32>(num_splits[middle]) <= part)
                    request = middle;
                else
                    beyond = middle;
            }
            u32 fragment = part - num_splits[request];
            u32 blocks = request_lengths.blocks_of(request);
            u32 begin = fragment * split_blocks;
            u32 end = begin + min_of(split_blocks, blocks - begin);
            u32 split = blocks > split_blocks;
            row = {request, request, begin, end, fragment, split, split, 0};
        }
        metadata[part] = row;
    }
}

}  // namespace cumla
