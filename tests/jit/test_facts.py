"""What is told of the code: ptxas' report, the size of the code, blocks of an SM."""

from __future__ import annotations

import pytest

from cumla.checks import ArgumentError
from cumla.jit import nvrtc
from cumla.jit.facts import Facts, facts_of, section_bytes
from cumla.jit.occupancy import TARGETS, blocks_per_sm, limits
from cumla.sim import device as simulated

OPTIONS = ["-default-device", "--ptxas-options=-v"]
# Far more values than a thread has registers, and a frame; then a kernel without.
TWO = """
__global__ void __launch_bounds__(1024, 2) greedy(int* y, int z) {
    __shared__ int shared[77];
    float f[48];
    int frame[100];
    for (int i = 0; i < 100; i++) frame[i] = y[i * z];
    shared[threadIdx.x] = frame[z];
    __syncthreads();
    for (int i = 0; i < 48; i++) f[i] = y[i + z * 8];
    for (int i = 0; i < 48; i++)
        for (int j = 0; j < 48; j++) f[i] = f[i] * f[j] + shared[j];
    for (int i = 0; i < 48; i++) y[i] = f[i] + frame[i];
}
__global__ void modest(int* y) { y[threadIdx.x] = 1; }
"""
CALLING = """
__noinline__ int pick(const int* y, int at) {
    int held[40];
    for (int i = 0; i < 40; i++) held[i] = y[i];
    return held[at & 31] + held[at & 7];
}
__global__ void calling(int* y) { *y = pick(y, *y); }
"""


def facts(expression: str, target: str) -> Facts:
    source = CALLING if expression == "calling" else TWO  # of two, NVRTC compiles both
    made = nvrtc.compile_kernel(source, "k.cu", expression, target, OPTIONS, cubin=True)
    assert made.cubin is not None
    return facts_of(made.log, made.cubin, made.entry)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_120"])
def test_facts(target: str) -> None:
    greedy, modest = facts("greedy", target), facts("modest", target)
    # Of 65,536 for two blocks of 1,024 threads, if an SM has room for so many threads.
    assert greedy.registers == (32 if limits(target).warps == 64 else 64)
    assert greedy.shared_bytes == 308
    assert greedy.local_bytes >= 400
    assert greedy.spill_bytes > 0
    assert (modest.spill_bytes, modest.local_bytes, modest.shared_bytes) == (0, 0, 0)
    assert 4 <= modest.registers <= 16
    assert 0 < modest.code_bytes < 2048 < greedy.code_bytes
    assert modest.code_bytes % 128 == 0
    assert facts("calling", target).local_bytes >= 160


def test_reports_that_are_not_understood() -> None:
    made = nvrtc.compile_kernel(TWO, "k.cu", "modest", "sm_80", OPTIONS, cubin=True)
    assert made.cubin is not None
    with pytest.raises(ValueError, match="not understood"):
        facts_of("ptxas says something else", made.cubin, made.entry)
    with pytest.raises(ValueError, match=r"no section \.text\.other"):
        section_bytes(made.cubin, ".text.other")
    for broken in (b"", made.cubin[:70], b"\xff" * 200):
        with pytest.raises(ValueError, match="no ELF file"):
            section_bytes(broken, ".text")


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "blocks"),
    [
        ("sm_80", 256, 32, 0, 8),  # all 64 warps
        ("sm_80", 256, 33, 0, 6),  # 40 registers: 12 warps in each quarter, 48 in all
        ("sm_80", 32, 80, 0, 24),  # six warps in each quarter
        ("sm_80", 32, 16, 0, 32),  # most blocks
        ("sm_86", 32, 16, 0, 16),
        ("sm_89", 32, 16, 0, 24),
        ("sm_89", 256, 32, 0, 6),  # 48 warps
        ("sm_90a", 128, 255, 0, 2),  # two warps in each quarter
        ("sm_90a", 256, 255, 0, 1),
        ("sm_90a", 384, 168, 0, 1),
        ("sm_90a", 512, 255, 0, 0),
        ("sm_90a", 128, 64, 232_448, 1),
        ("sm_90a", 128, 64, 232_449, 0),
        ("sm_90a", 128, 64, 115_712, 2),  # 113 KiB, and 1 KiB of the driver
        ("sm_90a", 128, 64, 115_713, 1),
        ("sm_80", 128, 64, 166_912, 1),
        ("sm_120", 128, 64, 101_376, 1),
        ("sm_100", 1, 0, 0, 32),
        ("sm_90", 1024, 64, 0, 1),
        ("sm_90", 1024, 65, 0, 0),
    ],
)
def test_blocks_per_sm(target: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert blocks_per_sm(target, threads, registers, shared) == blocks


def test_limits_are_the_simulators() -> None:
    for capability, shared in simulated.SHARED_PER_BLOCK.items():
        one = limits(f"sm_{capability}")
        assert one.shared_bytes_per_block == shared
        assert one.blocks == simulated.BLOCKS_PER_SM[capability]
        assert one.warps * 32 == simulated.THREADS_PER_SM.get(capability, 1536)
    assert {limits(target) for target in TARGETS} <= {
        limits(f"sm_{one}") for one in simulated.SHARED_PER_BLOCK
    }


@pytest.mark.parametrize("target", ["sm_75", "sm_900", "90", "", "sm_90b"])
def test_unknown_targets(target: str) -> None:
    with pytest.raises(ArgumentError, match="^target: got .*known are sm_80, "):
        limits(target)
