// Pages of a pool over others, byte for byte.
#pragma once

#include "portable/cache/pool.cuh"

namespace cumla {

constexpr u32 COPY_THREADS = 256;
constexpr u32 COPY_CHUNKS = 4;  // of 16 bytes, a thread

// Page sources[i] over page targets[i]; skipped if either is not in the pool. A page's content is
// `runs` runs of `run_bytes` bytes (a multiple of 8); padding stays as it is.
__global__ void __launch_bounds__(COPY_THREADS) copy_pages(
    u8* pages,  // [num_pages, runs, run_bytes] at multiples of 16 bytes
    i64 page_stride, i64 run_stride,  // bytes
    u32 num_pages, u32 runs, u32 run_bytes,
    const void* sources, const void* targets,  // [n], int64 if `wide`, else int32; may be null:
    i64 sources_step, i64 targets_step, u32 wide_sources, u32 wide_targets,
    i64 source, i64 target,  // then these, and n = 1
    u32 blocks) {            // for each page
    u32 number = blockIdx.x / blocks;
    if (sources != nullptr) {
        source = load_integer(sources, number * sources_step, wide_sources);
        target = load_integer(targets, number * targets_step, wide_targets);
    }
    if (source < 0 || source >= num_pages || target < 0 || target >= num_pages) return;
    const u8* from = pages + source * page_stride;
    u8* to = pages + target * page_stride;
    u32 run_chunks = ceil_div(run_bytes, 16u), chunks = runs * run_chunks;
    u32 first = blockIdx.x % blocks * (COPY_THREADS * COPY_CHUNKS) + threadIdx.x;
    Vec16 values[COPY_CHUNKS];
    i64 offsets[COPY_CHUNKS];
    bool halves[COPY_CHUNKS];  // a run's last 8 bytes
#pragma unroll
    for (u32 i = 0; i < COPY_CHUNKS; i++) {
        u32 chunk = first + COPY_THREADS * i;
        if (chunk >= chunks) break;
        u32 run = chunk / run_chunks, at = chunk % run_chunks * 16;
        offsets[i] = run * run_stride + at;
        halves[i] = at + 16 > run_bytes;
        if (halves[i]) {
            u64 word = *reinterpret_cast<const u64*>(from + offsets[i]);
            values[i].x = static_cast<u32>(word), values[i].y = static_cast<u32>(word >> 32);
        } else {
            values[i] = load_16(from + offsets[i]);
        }
    }
#pragma unroll
    for (u32 i = 0; i < COPY_CHUNKS; i++) {
        if (first + COPY_THREADS * i >= chunks) break;
        if (halves[i]) {
            u64 word = static_cast<u64>(values[i].y) << 32 | values[i].x;
            *reinterpret_cast<u64*>(to + offsets[i]) = word;
        } else {
            *reinterpret_cast<Vec16*>(to + offsets[i]) = values[i];
        }
    }
}

}  // namespace cumla
