"""Control flow, calls, barriers, printf and launches, by CUDA C kernels and NumPy."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from cumla import sim
from sim import cuda

ALL = {"memory", "race"}


def run(
    source: str,
    *arrays: Any,
    grid: Any = 1,
    block: Any = 64,
    target: str = "sm_90a",
    extra: tuple[Any, ...] = (),
    **options: Any,
) -> list[Any]:
    """Launch kernel `k` on copies of arrays; what they hold afterwards."""
    module = cuda.load(source, target=target)
    on_device = [module.device.upload(a) for a in arrays]
    options = {"checks": ALL, **options}
    module.kernel("k").launch(grid, block, [*on_device, *extra], **options)
    return [a.get() for a in on_device]


@pytest.mark.parametrize("target", cuda.TARGETS)
def test_lanes_with_different_trip_counts_meet_again(target: str) -> None:
    source = """
extern "C" __global__ void k(int* out, int* meet) {
    int t = blockIdx.x * blockDim.x + threadIdx.x, sum = 0;
    for (int i = 0; i < t % 7; ++i)
        for (int j = 0; j < (t * 5 + i) % 4; ++j) {
            if ((i + j) & 1) continue;
            sum += i * 10 + j;
            if (sum > 60) break;
        }
    meet[t] = __popc(__activemask());
    out[t] = sum;
}"""
    out, meet = run(source, *(np.zeros(192, np.int32) for _ in range(2)), grid=3, target=target)
    expected = []
    for t in range(192):
        total = 0
        for i in range(t % 7):
            for j in range((t * 5 + i) % 4):
                if (i + j) & 1:
                    continue
                total += i * 10 + j
                if total > 60:
                    break
        expected.append(total)
    assert np.array_equal(out, expected)
    assert (meet == 32).all()


def test_early_exits_and_partial_warps() -> None:
    source = """
extern "C" __global__ void k(int* out, int n) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= n) return;
    if (t % 3 == 0) { out[t] = -t; return; }
    __syncthreads();
    out[t] = __reduce_add_sync(__activemask(), t);
}"""
    (out,) = run(source, np.zeros(100, np.int32), grid=3, block=37, extra=(100,))
    for t in range(100):
        warp = (t // 37, t % 37 // 32)
        if t % 3 == 0:
            assert out[t] == -t
        else:
            mates = [u for u in range(100) if (u // 37, u % 37 // 32) == warp and u % 3]
            assert out[t] == sum(mates)


def test_switch_becomes_an_indexed_branch() -> None:
    cases = "".join(f"case {i}: x = x * {i + 2} + in[{i}]; break;" for i in range(12))
    source = (
        'extern "C" __global__ void k(int* out, const int* in) { int x = threadIdx.x;'
        f"switch (in[threadIdx.x]) {{ {cases} default: x = -1; }} out[threadIdx.x] = x; }}"
    )
    which = (np.arange(64, dtype=np.int32) * 7) % 15
    out, _ = run(source, np.zeros(64, np.int32), which)
    expected = [t * (w + 2) + which[w] if w < 12 else -1 for t, w in enumerate(which)]
    assert np.array_equal(out, expected)


def test_calls_with_structs_and_nested_calls() -> None:
    source = """
struct Pair { int a; float b; short c; };
__device__ __noinline__ int square(int x) { return x * x; }
__device__ __noinline__ Pair make(Pair p, int k) {
    Pair q; q.a = square(p.a) + k; q.b = p.b * 0.5f; q.c = p.c - 1; return q;
}
__device__ __noinline__ void twice(int* x) { *x *= 2; }
extern "C" __global__ void k(int* out, Pair given) {
    int t = threadIdx.x;
    given.a += t;
    Pair q = t & 1 ? make(given, 7) : make(make(given, 1), 2);
    int v = q.a + (int)q.b + q.c;
    twice(&v);
    out[t] = v;
}"""
    given = np.zeros((), np.dtype([("a", "i4"), ("b", "f4"), ("c", "i2")], align=True))
    given["a"], given["b"], given["c"] = 3, 40.0, 9
    (out,) = run(source, np.zeros(64, np.int32), extra=(given.tobytes(),))

    def make(p: tuple[int, float, int], k: int) -> tuple[int, float, int]:
        return p[0] ** 2 + k, p[1] * 0.5, p[2] - 1

    for t in range(64):
        p = (3 + t, 40.0, 9)
        q = make(p, 7) if t & 1 else make(make(p, 1), 2)
        value = 2 * (q[0] + int(q[1]) + q[2])
        assert out[t] == (value + 2**31) % 2**32 - 2**31


def test_struct_parameters_indexed_by_registers_and_grid_constants() -> None:
    source = """
struct Table { int v[10]; };
__device__ __noinline__ int look(const Table* t, int i) { return t->v[i]; }
extern "C" __global__ void k(int* out, const __grid_constant__ Table t, int scale) {
    out[threadIdx.x] = t.v[threadIdx.x % 10] * scale + look(&t, threadIdx.x % 3);
}"""
    table = np.arange(10, dtype=np.int32) * 11
    (out,) = run(source, np.zeros(64, np.int32), extra=(table.tobytes(), 3))
    t = np.arange(64)
    assert np.array_equal(out, table[t % 10] * 3 + table[t % 3])


def test_constant_and_global_variables() -> None:
    source = """
__constant__ float weights[4] = {1.5f, -2.0f, 0.25f, 8.0f};
__device__ int counter = 5;
__device__ int* link = &counter;
extern "C" __global__ void k(float* out) {
    out[threadIdx.x] = weights[threadIdx.x & 3];
    if (threadIdx.x == 0) *link += 37;
}"""
    module = cuda.load(source)
    out = module.device.alloc(64, np.float32)
    for _ in range(2):
        module.kernel("k").launch(1, 64, [out], checks=ALL)
    assert np.array_equal(out.get(), np.tile(np.float32([1.5, -2, 0.25, 8]), 16))
    assert module.variable("counter").view(np.int32).get() == 5 + 2 * 37


def test_thread_and_block_indices() -> None:
    source = """
extern "C" __global__ void k(int* out) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    int* o = out + (block * 30 + thread) * 6;
    o[0] = threadIdx.x; o[1] = threadIdx.y; o[2] = threadIdx.z;
    o[3] = blockIdx.x; o[4] = blockIdx.y; o[5] = blockIdx.z;
}"""
    (out,) = run(source, np.zeros((24, 30, 6), np.int32), grid=(4, 3, 2), block=(5, 3, 2), seed=9)
    for block in range(24):
        for thread in range(30):
            expected = [thread % 5, thread // 5 % 3, thread // 15]
            expected += [block % 4, block // 4 % 3, block // 12]
            assert out[block, thread].tolist() == expected


def test_named_barriers_between_producers_and_consumers() -> None:
    source = """
extern "C" __global__ void k(int* out) {
    __shared__ int s[32];
    int t = threadIdx.x;
    for (int i = 0; i < 4; ++i) {
        if (t < 32) {
            if (i) asm volatile("bar.sync 2, 96;" ::: "memory");
            s[t] = i * 100 + t;
            asm volatile("bar.arrive 1, 96;" ::: "memory");
        } else {
            asm volatile("bar.sync 1, 96;" ::: "memory");
            out[i * 64 + t - 32] = s[31 - t % 32];
            if (i < 3) asm volatile("bar.arrive 2, 96;" ::: "memory");
        }
    }
}"""
    (out,) = run(source, np.zeros((4, 64), np.int32), block=96)
    t = np.arange(64)
    assert np.array_equal(out, np.arange(4)[:, None] * 100 + 31 - t % 32)


def test_barrier_reductions() -> None:
    source = """
extern "C" __global__ void k(int* out) {
    int t = threadIdx.x;
    out[t] = __syncthreads_count(t % 3 == 0) * 100 + (__syncthreads_and(t < 95) != 0) * 10
        + (__syncthreads_or(t == 70 + 100 * blockIdx.x) != 0);
}"""
    (out,) = run(source, np.zeros(96, np.int32), block=96)
    assert (out == 32 * 100 + 1).all()


def test_printf(capsys: pytest.CaptureFixture[str]) -> None:
    source = r"""
#define N 3
extern "C" __global__ void k(int* out) {
    if (threadIdx.x < 2)
        printf("[%d|%5.2f|%-4s|%c|%x|%llu|%%]\n", -(int)threadIdx.x, 1.5 * threadIdx.x, "ab", 'z',
               255u, 1ull << 40);
    out[threadIdx.x] = 1;
}"""
    run(source, np.zeros(64, np.int32))
    assert capsys.readouterr().out == (
        "[0| 0.00|ab  |z|ff|1099511627776|%]\n[-1| 1.50|ab  |z|ff|1099511627776|%]\n"
    )


def test_assert_and_trap() -> None:
    source = """
extern "C" __device__ void __assertfail(const char*, const char*, unsigned, const char*, size_t);
extern "C" __global__ void k(int* out) {
    if (threadIdx.x == 9)
        __assertfail("n < 9", "some.cu", 77, "k", 1); // ASSERT
    out[threadIdx.x] = 1;
}
extern "C" __global__ void t(int* out) {
    if (threadIdx.x == 33) __trap(); // TRAP
    out[threadIdx.x] = 1;
}"""
    module = cuda.load(source)
    out = module.device.alloc(64, np.int32)
    with pytest.raises(sim.KernelAssert, match=r"n < 9.*some.cu:77") as caught:
        module.kernel("k").launch(1, 64, [out])
    assert caught.value.where is not None
    assert caught.value.where.thread == (9, 0, 0)
    with pytest.raises(sim.KernelTrap, match=f"k.cu:{cuda.line_of(source, 'TRAP')}"):
        module.kernel("t").launch(1, 64, [out])


SPIN_LOCK = """
extern "C" __global__ void k(int* data, int* lock) {
    bool done = false;
    while (!done) {
        if (atomicCAS(lock, 0, 1) == 0) {
            __threadfence();
            data[0] += 1;
            data[1] = data[0] * 2;
            __threadfence();
            atomicExch(lock, 0);
            done = true;
        }
    }
}"""
WAITING_LOCK = """
extern "C" __global__ void k(int* data, int* lock) {
    while (atomicCAS(lock, 0, 1) != 0) {}
    __threadfence();
    data[0] += 1;
    data[1] = data[0] * 2;
    __threadfence();
    atomicExch(lock, 0);
}"""


@pytest.mark.parametrize("source", [SPIN_LOCK, WAITING_LOCK])
@pytest.mark.parametrize("seed", [0, 1])
def test_spin_locks(source: str, seed: int) -> None:
    data, lock = run(
        source, np.zeros(2, np.int32), np.zeros(1, np.int32), grid=4, block=40, seed=seed
    )
    assert data.tolist() == [160, 320]
    assert lock[0] == 0


def test_a_flag_from_another_block() -> None:
    source = """
extern "C" __global__ void k(int* out, int* flag) {
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0) { while (atomicAdd(flag, 0) == 0) {} __threadfence(); }
        __syncthreads();
        out[threadIdx.x] += 1;
    } else {
        out[threadIdx.x] = 10 * threadIdx.x;
        __syncthreads();
        if (threadIdx.x == 0) { __threadfence(); atomicExch(flag, 1); }
    }
}"""
    for seed in range(3):
        out, _ = run(source, np.zeros(64, np.int32), np.zeros(1, np.int32), grid=2, seed=seed)
        assert np.array_equal(out, 10 * np.arange(64) + 1)


def test_deadlocks_name_every_waiting_warp() -> None:
    source = """
extern "C" __global__ void k(int* out) {
    if (threadIdx.x < 32) { while (*(volatile int*)out == 0) {} } // SPIN
    else asm volatile("bar.sync 3, 96;" ::: "memory"); // BAR
    out[1] = 5;
}"""
    with pytest.raises(sim.Deadlock) as caught:
        run(source, np.zeros(2, np.int32), grid=2, block=96)
    text = str(caught.value)
    for block in (0, 1):
        assert re.search(rf"SPIN|memory to change.*block \({block}, 0, 0\) warp 0", text)
        assert re.search(rf"barrier 3: 64 of 96.*block \({block}, 0, 0\) warp 1, warp 2", text)
    for mark in ("SPIN", "BAR"):
        assert f"k.cu:{cuda.line_of(source, mark)}" in text


@pytest.mark.parametrize("space", ["shared", "global"])
def test_lanes_of_a_warp_may_store_the_same_value_in_one_place(space: str) -> None:
    source = """
extern "C" __global__ void k(int* out) {
    __shared__ int s[2];
    int* p = SPACE == 0 ? s : out;
    p[threadIdx.x >> 5] = VALUE; // STORE
    __syncthreads();
    out[2 + threadIdx.x] = p[1 - (threadIdx.x >> 5)];
}"""
    source = source.replace("SPACE", str(int(space == "global")))
    (out,) = run(source.replace("VALUE", "7"), np.zeros(66, np.int32))
    assert (out[2:] == 7).all()
    with pytest.raises(sim.RaceError, match=f"{space}.*one instruction"):
        run(source.replace("VALUE", "threadIdx.x & 1"), np.zeros(66, np.int32))


def test_a_deadlock_tells_of_races_before_it() -> None:
    source = """
extern "C" __global__ void k(int* out) {
    out[0] = threadIdx.x; // RACE
    asm volatile("bar.sync 1, 96;" ::: "memory");
}"""
    with pytest.raises(sim.Deadlock, match="races found before") as caught:
        run(source, np.zeros(2, np.int32))
    assert f"k.cu:{cuda.line_of(source, 'RACE')}" in str(caught.value)


def test_predicated_instructions_leave_the_other_lanes_alone() -> None:
    source = """
extern "C" __global__ void k(int* out, const int* in) {
    int t = threadIdx.x, v = -1, w = -2;
    asm volatile("{.reg .pred p; setp.lt.s32 p, %2, 20; @p ld.global.s32 %0, [%3];"
                 "@!p add.s32 %1, %1, %2;}"
                 : "+r"(v), "+r"(w) : "r"(t), "l"(in + (t < 20 ? t : 1000)));
    out[t] = v * 1000 + w;
}"""
    data = np.arange(64, dtype=np.int32) + 5
    out, _ = run(source, np.zeros(64, np.int32), data)
    t = np.arange(64)
    assert np.array_equal(out, np.where(t < 20, data * 1000 - 2, -1000 + t - 2))


def test_equal_stores_into_local_arrays_are_not_one() -> None:
    source = """
__device__ __noinline__ void fill(int* p, int i) { p[i] = 3; p[i + 1] = 4; }
extern "C" __global__ void k(int* out, int i) {
    int a[8];
    for (int j = 0; j < 8; ++j) a[j] = 0;
    fill(a, i);
    out[threadIdx.x] = a[i] * 10 + a[i + 1] + a[(threadIdx.x + i) & 7];
}"""
    (out,) = run(source, np.zeros(64, np.int32), extra=(2,))
    a = np.array([0, 0, 3, 4, 0, 0, 0, 0])
    assert np.array_equal(out, 34 + a[(np.arange(64) + 2) & 7])


def test_named_barriers_count_lanes_that_have_exited_as_gone() -> None:
    source = """
extern "C" __global__ void k(int* out) {
    int t = threadIdx.x;
    if (t % 4 == 3) return;
    if (t < 64) asm volatile("bar.sync 1, 64;" ::: "memory");
    else asm volatile("bar.sync 2, 32;" ::: "memory");
    out[t] = 1;
}"""
    (out,) = run(source, np.zeros(96, np.int32), block=96)
    assert np.array_equal(out, np.arange(96) % 4 != 3)


def test_a_syncwarp_mask_must_name_the_lane_itself() -> None:
    source = """
extern "C" __global__ void k(int* out) {
    __syncwarp(threadIdx.x == 40 ? 0xfffffeffu : 0xffffffffu); // MASK
    out[threadIdx.x] = 1;
}"""
    with pytest.raises(sim.KernelTrap, match="does not name the lane itself") as caught:
        run(source, np.zeros(64, np.int32))
    assert f"k.cu:{cuda.line_of(source, 'MASK')}" in str(caught.value)


def test_a_long_counting_loop_is_no_deadlock() -> None:
    source = """
extern "C" __global__ void k(int* out, int n) {
    unsigned x = threadIdx.x;
    for (int i = 0; i < n; ++i) x = x * 1664525u + 1013904223u;
    out[threadIdx.x] = x;
}"""
    (out,) = run(source, np.zeros(32, np.uint32), block=32, extra=(3000,), checks=())
    x = np.arange(32, dtype=np.uint32)
    for _ in range(3000):
        x = x * np.uint32(1664525) + np.uint32(1013904223)
    assert np.array_equal(out, x)


def test_dynamic_shared_memory_behind_static() -> None:
    source = """
extern __shared__ float dynamic[];
extern "C" __global__ void k(float* out) {
    __shared__ float fixed[64];
    fixed[threadIdx.x] = threadIdx.x;
    dynamic[threadIdx.x] = 100 + threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = fixed[63 - threadIdx.x] + dynamic[63 - threadIdx.x];
}"""
    (out,) = run(source, np.zeros(64, np.float32), shared_bytes=256)
    assert np.array_equal(out, 100 + 2 * (63 - np.arange(64)))
    with pytest.raises(sim.MemoryFault, match="out of bounds"):
        run(source, np.zeros(64, np.float32), shared_bytes=252)


EMPTY = 'extern "C" __global__ void k(int* p, float x, short n) {}'


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"grid": 0}, "grid: got 0"),
        ({"grid": (1, 70000)}, "grid: got"),
        ({"block": 1025}, "block: got"),
        ({"block": (1, 1, 65)}, "block: got"),
        ({"block": (1, 2, 3, 4)}, "block: got"),
        ({"args": []}, "args: got 0 values; k has 3 parameters"),
        ({"args": [np.zeros(3), 1.0, 2]}, r"args\[0\]: got a ndarray"),
        ({"args": [0, "a", 2]}, r"args\[1\]: got a str"),
        ({"args": [0, 1.0, 1 << 16]}, r"args\[2\]: got 65536; the parameter has 2 bytes"),
        ({"args": [0, np.float64(1), 2]}, r"args\[1\]: .*8 bytes; the parameter has 4"),
        ({"args": [b"123", 1.0, 2]}, r"args\[0\]: .*3 bytes; the parameter has 8"),
        ({"shared_bytes": -1}, "shared_bytes: got -1"),
        ({"shared_bytes": 300000}, "shared_bytes: got 300000"),
        ({"checks": {"memory", "speed"}}, "checks: got"),
        ({"delivery": "soon"}, "delivery: got 'soon'"),
        ({"wave_blocks": 0}, "wave_blocks: got 0"),
    ],
)
def test_launches_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    kernel = cuda.load(EMPTY).kernel("k")
    good: dict[str, Any] = {"grid": 1, "block": 32, "args": [0, 1.0, -2]}
    kernel.launch(**good)
    with pytest.raises(sim.LaunchError, match=says):
        kernel.launch(**{**good, **changes})


def test_unknown_kernel_target_and_launch_bounds() -> None:
    module = cuda.load('extern "C" __global__ void __launch_bounds__(64) k() {}')
    with pytest.raises(sim.LaunchError, match="kernel: got 'nope'; the module has k"):
        module.kernel("nope")
    with pytest.raises(sim.LaunchError, match="maxntid"):
        module.kernel("k").launch(1, 65)
    with pytest.raises(sim.LaunchError, match="target: got 'sm_70'"):
        sim.Device("sm_70")
    with pytest.raises(sim.LaunchError, match="num_sms: got 0"):
        sim.Device(num_sms=0)


def test_unsupported_instructions_are_listed_when_the_module_is_loaded() -> None:
    text = cuda.ptx("""extern "C" __global__ void k(int* p) { *p = 1; }
extern "C" __global__ void l(int* p) { *p = 2; }""")
    bad = text.replace("ret;", "frob.s32 %r1, %r1;\n add.q7 %r1, %r1, %r1;\n ret;")
    with pytest.raises(sim.UnsupportedPTX) as caught:
        sim.load(bad)
    assert "frob.s32" in str(caught.value)
    assert "add.q7" in str(caught.value)
    for line in (1, 2):
        assert str(caught.value).count(f"k.cu:{line} ") == 2


def test_recursion_is_refused() -> None:
    source = """
__device__ __noinline__ int f(int n) { return n < 2 ? n : f(n - 1) + f(n - 2); }
extern "C" __global__ void k(int* out) { out[threadIdx.x] = f(threadIdx.x); }"""
    with pytest.raises(sim.UnsupportedPTX, match="recursion"):
        cuda.load(source)


def test_results_do_not_depend_on_waves_or_order() -> None:
    source = """
extern "C" __global__ void k(float* out) {
    float x = 0;
    for (int i = 0; i < blockIdx.x % 5 + threadIdx.x % 3; ++i) x += 1.0f / (i + blockIdx.x + 1);
    out[blockIdx.x * 32 + threadIdx.x] = x;
}"""
    results = [
        run(source, np.zeros(32 * 40, np.float32), grid=40, block=32, **options)[0]
        for options in ({}, {"wave_blocks": 1}, {"wave_blocks": 7, "seed": 3}, {"checks": ()})
    ]
    for other in results[1:]:
        assert np.array_equal(results[0], other)
