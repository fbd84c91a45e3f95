"""Registers that a wgmma under way still reads or writes: who may touch them, and what they hold.

The programs are CUDA C with inline assembly, whose operands the compiler renames as it likes.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

from cumla import sim
from sim import cuda
from sim.kernel_files import DELIVERIES
from sim.wgmma_kit import descriptor

HEAD = r"""
typedef unsigned long long u64;
extern __shared__ __align__(1024) unsigned char dyn[];
__device__ __forceinline__ u64 at(unsigned offset) {
    unsigned start = (unsigned)__cvta_generic_to_shared(dyn) + offset;
    // No swizzle: the two chunks of a row 128 bytes apart, eights of rows 256.
    return (u64)((start & 0x3ffff) >> 4) | (u64)(128 >> 4) << 16 | (u64)(256 >> 4) << 32;
}
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void mma(float (&d)[4], u64 a, u64 b, int takes = 1) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;"
        "\n}\n" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b), "r"(takes));
}
__device__ __forceinline__ void mma_wide(float (&d)[8], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, "
        "%8, %9, 1, 1, 1, 0, 0;\n" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]),
        "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "l"(a), "l"(b));
}
__device__ __forceinline__ void mma_registers(float (&d)[4], const unsigned (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, "
        "1, 1, 1, 0;\n" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// All of the image: A of step i at 2048 i, its B behind all A.
__device__ __forceinline__ void fill(const unsigned* image, int words) {
    for (int i = threadIdx.x; i < words; i += blockDim.x) ((unsigned*)dyn)[i] = image[i];
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncthreads();
}
extern "C" __global__ void k(const unsigned* image, int words, int steps, float* out) {
    fill(image, words);
    u64 a = at(0), b = at(2048 * steps);
    float d[4] = {};
"""
TAIL = r"""
    for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = d[i];
}
"""
STEPS = 5
SUM = "the sum of all steps"


def image():
    rng = np.random.default_rng(7)
    return rng.integers(-3, 4, (STEPS * 2048 + STEPS * 256) // 2).astype(np.float16)


def products():
    """[steps, 64, 8]: A * B of each step."""
    data = image()

    def operand(start, rows):
        part = data[start // 2 : start // 2 + rows * 16].astype(np.float32)
        return part.reshape(rows // 8, 2, 8, 8).transpose(0, 2, 1, 3).reshape(rows, 16)

    b_start = 2048 * STEPS
    return np.stack([operand(2048 * i, 64) @ operand(b_start + 256 * i, 8).T for i in range(STEPS)])


def fragments(matrix):
    """[64, 8] as [128, 4], by PTX ISA's table of D."""
    lane = np.arange(128)
    row = 16 * (lane // 32) + lane % 32 // 4
    column = 2 * (lane % 4)
    return np.stack([matrix[row + 8 * (i // 2), column + i % 2] for i in range(4)], axis=1)


@cache
def module(body: str) -> sim.LoadedModule:
    return cuda.load(HEAD + body + TAIL)


def launch(body, threads=128, **how):
    loaded = module(body)
    device = loaded.device
    data = image()
    out = device.alloc((threads, 4), np.float32)
    given = [device.upload(data), data.nbytes // 4, STEPS, out]
    options = {"checks": ("memory", "race"), "shared_bytes": data.nbytes, **how}
    loaded.kernel("k").launch(1, threads, given, **options)
    return out.get()


def marked(body, mark):
    """Where a line of the body stands, as messages give it."""
    return f"k.cu:{cuda.line_of(HEAD + body + TAIL, mark)}"


GOOD = {
    "one group": """
    fence();
    for (int i = 0; i < steps; i++) mma(d, a + i * 128, b + i * 16);
    commit();
    wait<0>();
""",
    "one behind in a loop": """
    for (int i = 0; i < steps; i++) {
        fence();
        mma(d, a + i * 128, b + i * 16, i > 0);
        commit();
        wait<1>();
    }
    wait<0>();
""",
    "two accumulators that change places": """
    float e[4] = {};
    for (int i = 0; i < steps; i++) {
        fence();
        mma(d, a + i * 128, b + i * 16);
        commit();
        wait<1>();
        for (int j = 0; j < 4; j++) { float t = d[j]; d[j] = e[j]; e[j] = t; }
    }
    wait<0>();
    for (int j = 0; j < 4; j++) d[j] += e[j];
""",
    "kept by another name under a branch": """
    float e[4] = {};
    #pragma unroll 1
    for (int i = 0; i < steps; i++) {
        fence();
        mma(d, a + i * 128, b + i * 16);
        commit();
        if (i == 2 && steps > 3) {
            wait<0>();
            for (int j = 0; j < 4; j++) { e[j] = d[j]; d[j] = 0; }
        }
    }
    wait<0>();
    for (int j = 0; j < 4; j++) d[j] += e[j];
""",
    "fragments of A": """
    #pragma unroll 1
    for (int i = 0; i < steps; i++) {
        // Row r, columns c and c + 1 lie at 256 (r / 8) + 128 (c / 8) + 16 (r % 8) + 2 (c % 8).
        unsigned f[4], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        for (int j = 0; j < 4; j++)
            f[j] = *(unsigned*)&dyn[2048 * i + 256 * (2 * warp + j % 2) + 128 * (j / 2)
                                    + 16 * (lane / 4) + 4 * (lane % 4)];
        fence();
        mma_registers(d, f, b + i * 16);
        commit();
        wait<0>();
    }
""",
}


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("name", GOOD)
def test_legal_uses_give_the_sum_and_no_report(name, delivery):
    want = fragments(products().sum(axis=0))
    for checks in (("memory", "race"), ()):
        got = launch(GOOD[name], delivery=delivery, checks=checks)
        np.testing.assert_array_equal(got, want)


# What must be reported: (program, part of the message). Lines are marked with "//@".
READ = """
    fence();
    mma(d, a, b);  //mma
    commit();
    d[0] += 1;  //@
    wait<0>();
"""
BAD = {
    "a read": (READ, "reads"),
    "a store": (
        """
    fence();
    mma(d, a, b);  //mma
    commit();
    out[threadIdx.x] = d[2];  //@
    wait<0>();
""",
        "reads",
    ),
    "a wait for too few": (
        """
    fence();
    mma(d, a, b);  //mma
    commit();
    wait<1>();
    d[3] *= 2;  //@
    wait<0>();
""",
        "reads",
    ),
    "not committed": (
        """
    fence();
    mma(d, a, b);  //mma
    wait<0>();
    d[3] *= 2;  //@
    commit();
""",
        "reads",
    ),
    "one loop late": (
        """
    #pragma unroll 1
    for (int i = 0; i < steps; i++) {
        if (i > 0) d[1] *= 0.5f;  //@
        fence();
        mma(d, a, b);  //mma
        commit();
    }
    wait<0>();
""",
        "reads",
    ),
    "A changed": (
        """
    unsigned f[4] = {image[0], image[1], image[2], image[3]};
    fence();
    mma_registers(d, f, b);  //mma
    commit();
    asm volatile("add.u32 %0, %0, 1;" : "+r"(f[1]));  //@
    wait<0>();
    d[0] += __uint_as_float(f[1]);
""",
        "overwrites",
    ),
}


def message(body, **how):
    with pytest.raises(sim.RaceError) as caught:
        launch(body, **how)
    assert caught.value.races == (str(caught.value),)
    return str(caught.value)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("name", BAD)
def test_a_register_in_flight_is_reported(name, delivery):
    body, how = BAD[name]
    text = message(body, delivery=delivery)
    assert text.startswith("kernel k, ")
    assert f"{marked(body, '//@')}, block (0, 0, 0), thread (0, 0, 0): `" in text
    assert how in text
    # The line of the wgmma is where its function is called, or the function's own.
    assert re.search(r"of the wgmma.mma_async at \S*k.cu:\d+ that is still under way", text)
    assert "a wgmma.wait_group is missing" in text


def test_without_the_check_late_delivery_leaves_the_old_value():
    want = fragments(products()[0])
    eager = launch(READ, checks=(), delivery="eager")
    late = launch(READ, checks=(), delivery="late")
    np.testing.assert_array_equal(eager[:, 0], want[:, 0] + 1)
    np.testing.assert_array_equal(late[:, 0], np.ones(128))
    np.testing.assert_array_equal(late[:, 1:], want[:, 1:])
    launch(READ, checks=("memory",))


def test_another_shape_must_not_take_up_accumulators_in_flight():
    body = """
    float w[8] = {};
    fence();
    mma(d, a, b);
    commit();
    for (int i = 0; i < 4; i++) w[i] = d[i];
    mma_wide(w, a, b);  //@
    commit();
    wait<0>();
    for (int i = 0; i < 4; i++) d[i] = w[i];
"""
    text = message(body)
    assert "in another shape" in text
    assert "wait_group is missing" in text


def test_an_accumulator_that_is_lost_is_reported():
    body = """
    fence();
    mma(d, a, b);
    commit();
    asm volatile("mov.f32 %0, 0f3f800000;" : "+f"(d[0]));  //@
    wait<0>();
"""
    text = message(body)
    assert "overwrites" in text
    assert marked(body, "//@") in text


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("mma(d, a, b); commit(); wait<0>();", "none was executed before"),
        (
            """
    fence();
    mma(d, a, b);
    commit();
    wait<0>();
    asm volatile("mul.f32 %0, %0, 0f40000000;" : "+f"(d[1]));  //@
    mma(d, a, b);
    commit();
    wait<0>();
""",
            "wrote",
        ),
    ],
)
def test_a_missing_fence_is_reported(body, part):
    text = message(body)
    assert part in text
    assert "needs a wgmma.fence" in text
    if "//@" in body:
        assert f"{marked(body, '//@')} wrote" in text


def test_warpgroups_that_part_and_meet_keep_what_is_in_flight():
    # Both have something under way when the first goes through the branch, where it waits.
    body = """
    fence();
    mma(d, a, b);
    commit();
    float e[4] = {};
    if (threadIdx.x < 128) {
        wait<0>();
        for (int i = 0; i < 4; i++) e[i] = d[i] + 1;
    }
    __syncthreads();
    wait<0>();
    for (int i = 0; i < 4; i++) d[i] += e[i];
"""
    first = fragments(products()[0])
    want = np.concatenate([2 * first + 1, first])
    for delivery in DELIVERIES:
        for checks in (("memory", "race"), ()):
            got = launch(body, threads=256, delivery=delivery, checks=checks)
            np.testing.assert_array_equal(got, want)
    wrong = body.replace("wait<0>();\n        for", "wait<1>();\n        for")
    assert wrong != body
    assert "reads" in message(wrong, threads=256)


def test_one_wait_covers_only_older_groups():
    # Three groups; after wait<2> the first has landed, the others still hold what they were.
    body = """
    float e[4] = {}, f[4] = {};
    fence();
    mma(d, a, b);
    commit();
    mma(e, a + 128, b + 16);
    commit();
    mma(f, a + 256, b + 32);
    commit();
    wait<2>();
    float first = d[0] + 8;
    asm volatile("" : "+f"(first));
    float stale = e[0] + f[0];
    asm volatile("" : "+f"(stale));
    wait<0>();
    d[0] = first; d[1] = stale; d[2] = e[2]; d[3] = f[3];
"""
    late = launch(body, checks=(), delivery="late")
    each = [fragments(p) for p in products()]
    np.testing.assert_array_equal(late[:, 0], each[0][:, 0] + 8)
    np.testing.assert_array_equal(late[:, 1], 0)
    np.testing.assert_array_equal(late[:, 2], each[1][:, 2])
    np.testing.assert_array_equal(late[:, 3], each[2][:, 3])
    assert "reads" in message(body)


def test_descriptors_of_this_file_are_without_swizzle():
    assert descriptor(0, 128, 256, 0) == 8 << 16 | 16 << 32


def test_a_register_of_a_fragment_may_get_another_name():
    """`mov` to the register is what compilers do with what comes next; others change it."""
    body = """
    unsigned f[4] = {image[0], image[1], image[2], image[3]};
    fence();
    mma_registers(d, f, b);
    commit();
    asm volatile("mov.b32 %0, 7;" : "+r"(f[1]));
    wait<0>();
    d[0] = __uint_as_float(f[1]);
"""
    assert (launch(body)[:, 0].view(np.uint32) == 7).all()


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_some_lanes_take_a_register_in_flight(delivery):
    body = """
    float e = 5;
    fence();
    mma(d, a, b);
    commit();
    asm volatile("{\\n.reg .pred p;\\nsetp.lt.u32 p, %1, 50;\\n@p mov.f32 %0, %2;\\n}\\n"
                 : "+f"(e) : "r"(threadIdx.x), "f"(d[3]));
    wait<0>();
    d[0] = e;
"""
    want = fragments(products()[0])
    want[:, 0] = np.where(np.arange(128) < 50, want[:, 3], 5)
    for checks in (("memory", "race"), ()):
        np.testing.assert_array_equal(launch(body, delivery=delivery, checks=checks), want)
    early = body.replace("    wait<0>();\n    d[0] = e;", "    d[0] = e + 1;\n    wait<0>();")
    assert early != body
    assert "reads" in message(early, delivery=delivery)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_some_warpgroups_execute_it(delivery):
    """Under a predicate; and what one takes up, another does not."""
    body = """
    fence();
    mma(d, a, b, threadIdx.x / 128);
    asm volatile(
        "{\\n.reg .pred p;\\nsetp.eq.u32 p, %6, 1;\\n"
        "@p wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0,"
        " 0;\\n}\\n" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "l"(a + 128), "l"(b + 16), "r"(threadIdx.x / 128));
    mma(d, a + 256, b + 32, threadIdx.x / 128);
    commit();
    wait<0>();
"""
    each = products()
    want = np.concatenate([fragments(each[2]), fragments(each[:3].sum(axis=0))])
    for checks in (("memory", "race"), ()):
        got = launch(body, threads=256, delivery=delivery, checks=checks)
        np.testing.assert_array_equal(got, want)
