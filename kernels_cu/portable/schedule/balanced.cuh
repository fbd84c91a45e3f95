// The balanced plan of a decode step: all parts of the GPU get the same budget.
//
// One block makes the plan. What costs time is the walk over the parts: where one begins depends on
// where the last one ended. So all that a part does not need of its predecessor is done before the
// walk (a prefix sum of costs) or behind it (rows, num_splits) by all threads, and the walk itself
// is a warp that looks at 32 requests at a time. Parts that lie in one request are an arithmetic
// sequence: 32 of them are one step.
#pragma once

#include "portable/schedule/plan.cuh"

namespace cumla {

// Where a part begins, which is where the one before it ended.
struct alignas(16) PlanCursor {
    u32 request, block;
    u32 fragment;  // pieces of the request before this one
    u32 cuts;      // how many of the cursors up to this one are inside a request
};

struct BalancedShared {
    i64 warp_sums[32];
    u32 used;  // parts that have work
};

// The largest r in [request, batch] with costs[r] <= reach, for costs that ascend and
// costs[request] <= reach. All lanes of a warp ask the same and get the same.
//
// A part takes few requests, so the search starts with the next 32 and widens its step from there.
// Steps are powers of 33: a lane each for the 32 places between two of the next wider step, and, as
// they are odd, no two lanes in one bank of shared memory.
inline u32 find_request(const i64* costs, u32 request, u32 batch, i64 reach) {
    u64 place = request;
    u64 step = 1;
    while (true) {
        u64 mine = place + (threadIdx.x % 32 + 1) * step;
        bool within = mine <= batch && costs[mine] <= reach;
        u32 count = __popc(__ballot_sync(FULL_WARP, within));
        place += count * step;
        if (count == 32)
            step *= 33;
        else if (step == 1)
            return place;
        else
            step /= 33;
    }
}

// Find where each part begins; one warp. Returns how many parts have work. The rules, and why these
// are num_parts at most: cumla/schedule.py, `_balanced`.
//
// Places are in units of cost from the start of the batch. The chain from one part to the next is
// short: add the budget, see how many of the costs in the lanes' registers that pays for, fetch the
// last of those.
inline u32 walk_parts(const i64* costs, PlanCursor* cursors, u32 batch, u32 num_parts, i64 total,
                      u32 overhead) {
    constexpr i64 NEVER = 0x7FFFFFFFFFFFFFFF;
    u32 lane = threadIdx.x % 32;
    i64 step = (total + num_parts - 1) / num_parts;  // what a part does inside a request
    i64 payload = step + overhead;
    u32 window = 0;  // a lane's request is window + lane
    auto load = [&]() { return window + lane <= batch ? costs[window + lane] : NEVER; };
    i64 mine = load();
    PlanCursor at = {0, 0, 0, 0};
    if (lane == 0) cursors[0] = at;
    i64 place = 0;
    u32 part = 0;
    while (at.request < batch) {
        i64 reach = place + payload;
        u32 count = __popc(__ballot_sync(FULL_WARP, mine <= reach));
        if (count == 32) {
            window = find_request(costs, window + 31, batch, reach);
            mine = load();
            count = 1;
        }
        // What is left behind the last request that is paid for pays for the head of the next one,
        // its overhead first.
        u32 request = window + count - 1;
        i64 begin = __shfl_sync(FULL_WARP, mine, count - 1);
        bool cut = request < batch && reach - overhead > begin;
        place = cut ? reach - overhead : begin;
        bool stays = request == at.request;
        at = {request, static_cast<u32>(place - begin), (stays ? at.fragment : 0) + cut,
              at.cuts + cut};
        part++;
        if (lane == 0) cursors[part] = at;
        if (!stays) continue;
        // This part ended where it began, inside the request. Which of the next 32 do?
        i64 end = __shfl_sync(FULL_WARP, mine, count);
        i64 ahead = (lane + 1) * step;
        bool within = reach + ahead < end;
        u32 more = __popc(__ballot_sync(FULL_WARP, within));
        if (within)
            cursors[part + 1 + lane] = {request, static_cast<u32>(at.block + ahead),
                                        at.fragment + 1 + lane, at.cuts + 1 + lane};
        part += more;
        place += more * step;
        at = {request, static_cast<u32>(place - begin), at.fragment + more, at.cuts + more};
    }
    return part;
}

// IN_SHARED: b + 1 numbers of 8 bytes fit in shared memory behind BalancedShared.
template <bool IN_SHARED>
__global__ void __launch_bounds__(1024) plan_balanced(
    const i32* lengths,        // [b, tokens], keys of each query; may be null: `limit` for all
    i64 by_request, i64 by_token, u32 tokens, u32 limit,
    const i32* extra_lengths,  // [b, extra_tokens], likewise
    i64 extra_by_request, i64 extra_by_token, u32 extra_tokens,
    u32 extra_limit,           // 0: no extra pool
    u32 least, u32 batch, u32 num_parts, u32 block_size, u32 overhead,
    i64* costs_in_global,      // [b + 1] scratch; may be null if IN_SHARED
    PlanCursor* cursors,       // [num_parts + 1] scratch
    i32* kv_lens,              // [b], the requests' lengths; may be null
    PlanRow* metadata,         // [num_parts]
    i32* num_splits) {         // [b + 1]
    extern __shared__ BalancedShared shared_memory[];
    BalancedShared& shared = *shared_memory;
    i64* costs = IN_SHARED ? reinterpret_cast<i64*>(shared_memory + 1) : costs_in_global;
    RequestLengths request_lengths = {
        {lengths, by_request, by_token, tokens, limit},
        {extra_lengths, extra_by_request, extra_by_token, extra_tokens, extra_limit},
        least,
        block_size};

    // costs[i]: what the requests before i cost, in blocks.
    i64 total = 0;
    if (threadIdx.x == 0) costs[0] = 0;
    for (u32 first = 0; first < batch; first += blockDim.x) {
        u32 request = first + threadIdx.x;
        i64 cost = 0;
        if (request < batch) {
            u32 length = request_lengths.of(request);
            if (kv_lens != nullptr) kv_lens[request] = length;
            cost = static_cast<i64>(max_of(ceil_div(length, block_size), 1u)) + overhead;
        }
        BlockScan scan(cost, shared.warp_sums);
        if (request < batch) costs[request + 1] = total + scan.sum;
        total += scan.total;
    }
    __syncthreads();

    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp == 0) {
        u32 parts = walk_parts(costs, cursors, batch, num_parts, total, overhead);
        if (lane == 0) shared.used = parts;
    }
    __syncthreads();

    // A request has one piece more than it has cuts, so those before request r have r pieces and
    // the cuts of all cursors before it. A warp for the requests that end in each part.
    u32 used = shared.used;
    if (threadIdx.x == 0) num_splits[0] = 0;
    for (u32 part = warp; part < used; part += blockDim.x / 32) {
        PlanCursor begin = cursors[part];
        u32 end = cursors[part + 1].request;
        for (u32 request = begin.request + 1 + lane; request <= end; request += 32)
            num_splits[request] = request + begin.cuts;
    }
    for (u32 part = threadIdx.x; part < num_parts; part += blockDim.x) {
        PlanRow row = {batch, 0, 0, 0, 0, 0, 0, 0};
        if (part < used) {
            PlanCursor begin = cursors[part], end = cursors[part + 1];
            bool first_split = begin.block > 0, last_split = end.block > 0;
            u32 end_req = last_split ? end.request : end.request - 1;
            u32 end_block = last_split ? end.block : request_lengths.blocks_of(end_req);
            if (begin.request == end_req) first_split = last_split = first_split || last_split;
            row = {begin.request,  end_req,     begin.block, end_block,
                   begin.fragment, first_split, last_split,  0};
        }
        metadata[part] = row;
    }
}

}  // namespace cumla
