// Which row owns a slot that several rows name: the lowest, whatever order blocks run in.
//
// Few rows: a row's warp looks through the slots of all rows before it. With 1,024 rows these are
// at most 32 a lane, from cache, which costs less than another launch. Many rows would make that
// n**2: then two launches build a hash table of at least 2 n entries, which needs no more memory
// for a larger pool (16 to 32 bytes a row) and whose size follows from n alone. An entry is
// slot << 32 | row. A row claims the first free entry on its slot's path by compare-and-swap, or
// lowers the row of the entry that has its slot by an atomic minimum. Which entry a slot gets
// depends on the order of the blocks; the row in it does not.
#pragma once

#include "portable/cache/pool.cuh"

namespace cumla {

constexpr u64 FREE_ENTRY = ~0ull;  // no slot is 2**32 - 1

// Multiplication by 2**32 / golden ratio spreads runs of neighbouring slots over the table.
inline u32 first_entry(u32 slot, u32 table_bits) { return slot * 0x9E3779B1u >> (32 - table_bits); }

__global__ void __launch_bounds__(256) clear_owners(u64* table,  // [2 ** table_bits]
                                                    u32 table_bits) {
    u32 pair = blockIdx.x * blockDim.x + threadIdx.x;  // 16 bytes
    if (pair < 1u << (table_bits - 1))
        reinterpret_cast<Vec16*>(table)[pair] = {~0u, ~0u, ~0u, ~0u};
}

__global__ void __launch_bounds__(256) claim_slots(
    const void* slots,  // [n], int64 if `wide`, else int32
    i64 slots_step, u32 wide, u32 n, u32 num_slots,
    u64* table,  // [2 ** table_bits], all free
    u32 table_bits) {
    u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= n) return;
    i64 slot = load_integer(slots, row * slots_step, wide);
    if (slot < 0 || slot >= num_slots) return;
    u64 mine = static_cast<u64>(slot) << 32 | row;
    u32 entry = first_entry(static_cast<u32>(slot), table_bits);
    while (true) {
        u64 found = atomicCAS(&table[entry], FREE_ENTRY, mine);
        if (found == FREE_ENTRY) return;
        if (found >> 32 == static_cast<u64>(slot)) {
            if (mine < found) atomicMin(&table[entry], mine);
            return;
        }
        entry = (entry + 1) & ((1u << table_bits) - 1);
    }
}

// The row that owns `slot`; no row if none has claimed it.
inline u32 owner_of(const u64* table, u32 table_bits, u32 slot) {
    u32 entry = first_entry(slot, table_bits);
    while (true) {
        u64 found = table[entry];
        if (found >> 32 == slot || found == FREE_ENTRY) return static_cast<u32>(found);
        entry = (entry + 1) & ((1u << table_bits) - 1);
    }
}

// Whether a row before `row` names the same slot; the same for all lanes of the warp.
inline bool has_lower_twin(const void* slots, i64 slots_step, bool wide, u32 row, i64 slot,
                           u32 lane) {
    constexpr u32 LOADS = 4;  // under way at a time
    for (u32 first = 0; first < row; first += 32 * LOADS) {
        bool found = false;
#pragma unroll
        for (u32 i = 0; i < LOADS; i++) {
            u32 other = first + 32 * i + lane;
            if (other < row) found |= load_integer(slots, other * slots_step, wide) == slot;
        }
        if (__any_sync(FULL_WARP, found)) return true;
    }
    return false;
}

}  // namespace cumla
