// The PTX instructions that the kernels use, under names that say what they do.
#pragma once

#include "include/types.cuh"

namespace cumla {

// The address of shared memory as PTX's .shared instructions take it.
__forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Offsets are template arguments so that they become immediates of the instruction.

// 16 bytes from global to shared memory, behind the thread's back and past L1. `bytes` is 16, or 0
// to fill with zeros; then nothing is read.
template <int OFFSET>
__forceinline__ void copy_async_16(u32 target, const void* source, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0 + %3], [%1 + %3], 16, %2;" ::"r"(target),
                 "l"(source), "r"(bytes), "n"(OFFSET)
                 : "memory");
}

// The same for 8 bytes; `bytes` is 8 or 0.
__forceinline__ void copy_async_8(u32 target, const void* source, u32 bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target), "l"(source),
                 "r"(bytes)
                 : "memory");
}

__forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until all but the thread's last N committed groups have landed.
template <int N>
__forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
template <int OFFSET>
__forceinline__ void load_matrices(u32 (&result)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address), "n"(OFFSET)
                 : "memory");
}

template <int OFFSET>
__forceinline__ void load_matrices_transposed(u32 (&result)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address), "n"(OFFSET)
                 : "memory");
}

// sum += a b for a 16x16 row-major a, a 16x8 column-major b and a 16x8 float sum.
template <class T>
void multiply_add(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
__forceinline__ void multiply_add<bf16>(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__forceinline__ void multiply_add<f16>(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2**value and log2(value), approximate; subnormals count as 0. exp2(-inf) is 0.
__forceinline__ float exp2_approx(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}
__forceinline__ float log2_approx(float value) {
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

template <int OFFSET = 0>
__forceinline__ void store_shared(u32 address, u8 value) {
    asm volatile("st.shared.u8 [%0 + %2], %1;" ::"r"(address), "r"(static_cast<u32>(value)),
                 "n"(OFFSET)
                 : "memory");
}
template <int OFFSET = 0>
__forceinline__ void store_shared(u32 address, float value) {
    asm volatile("st.shared.f32 [%0 + %2], %1;" ::"r"(address), "f"(value), "n"(OFFSET)
                 : "memory");
}
template <int OFFSET = 0>
__forceinline__ void store_shared(u32 address, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0 + %3], {%1, %2};" ::"r"(address), "f"(x), "f"(y),
                 "n"(OFFSET)
                 : "memory");
}
template <int OFFSET = 0>
__forceinline__ void store_shared(u32 address, u32 x, u32 y) {
    asm volatile("st.shared.v2.b32 [%0 + %3], {%1, %2};" ::"r"(address), "r"(x), "r"(y),
                 "n"(OFFSET)
                 : "memory");
}
template <int OFFSET = 0>
__forceinline__ void store_shared(u32 address, Vec16 value) {
    asm volatile("st.shared.v4.b32 [%0 + %5], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w), "n"(OFFSET)
                 : "memory");
}

template <int OFFSET = 0>
__forceinline__ u32 load_shared_byte(u32 address) {
    u32 value;
    asm volatile("ld.shared.u8 %0, [%1 + %2];" : "=r"(value) : "r"(address), "n"(OFFSET) : "memory");
    return value;
}
template <int OFFSET = 0>
__forceinline__ u32 load_shared_word(u32 address) {
    u32 value;
    asm volatile("ld.shared.b32 %0, [%1 + %2];"
                 : "=r"(value)
                 : "r"(address), "n"(OFFSET)
                 : "memory");
    return value;
}
template <int OFFSET = 0>
__forceinline__ void load_shared_8(u32& x, u32& y, u32 address) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2 + %3];"
                 : "=r"(x), "=r"(y)
                 : "r"(address), "n"(OFFSET)
                 : "memory");
}
template <int OFFSET = 0>
__forceinline__ float load_shared_float(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1 + %2];"
                 : "=f"(value)
                 : "r"(address), "n"(OFFSET)
                 : "memory");
    return value;
}
template <int OFFSET = 0>
__forceinline__ void load_shared_floats(float (&value)[4], u32 address) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=f"(value[0]), "=f"(value[1]), "=f"(value[2]), "=f"(value[3])
                 : "r"(address), "n"(OFFSET)
                 : "memory");
}
template <int OFFSET = 0>
__forceinline__ Vec16 load_shared_16(u32 address) {
    Vec16 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address), "n"(OFFSET)
                 : "memory");
    return value;
}

}  // namespace cumla
