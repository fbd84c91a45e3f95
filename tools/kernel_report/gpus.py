"""The GPUs that budgets are made for, and what each SM of them can do in a clock cycle."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Figures of one GPU, as its maker publishes them."""

    name: str
    target: str
    shared_per_block: int
    """Bytes; decides the tile."""
    sms: int
    clock: float
    """Hz, at which the tensor figure is stated."""
    dram: float
    """Bytes a second."""
    tensor: float
    """Floating point operations of mma.sync a cycle and SM: 16-bit inputs, float sums."""
    source: str

    shared: float = 1.0
    """Wavefronts (128 bytes) a cycle and SM."""
    issue: float = 4.0
    """Warp instructions a cycle and SM."""

    @property
    def dram_per_cycle(self) -> float:
        """An SM's share of DRAM, bytes a cycle."""
        return self.dram / self.sms / self.clock


GPUS = (
    GPU(
        "A100",
        "sm_80",
        166_912,
        sms=108,
        clock=1.41e9,
        dram=2039e9,
        tensor=2048,
        source="SXM, 80 GB. NVIDIA A100 datasheet and Ampere architecture whitepaper: 108 SMs, "
        "1410 MHz, 312 TFLOPS, 2039 GB/s",
    ),
    GPU(
        "RTX 4090",
        "sm_89",
        101_376,
        sms=128,
        clock=2.52e9,
        dram=1008e9,
        tensor=512,
        source="NVIDIA Ada architecture whitepaper, appendix A: 128 SMs, 2520 MHz, 165.2 TFLOPS "
        "with float sums, 1008 GB/s",
    ),
    GPU(
        "H100",
        "sm_90a",
        232_448,
        sms=132,
        clock=1.83e9,
        dram=3350e9,
        tensor=0.62 * 4096,
        source="SXM. NVIDIA H100 datasheet and Hopper architecture whitepaper: 132 SMs, "
        "989.4 TFLOPS, that is 4096 a cycle and SM at 1830 MHz, 3350 GB/s. mma.sync reaches about "
        "62 % of that, wgmma all (arXiv:2402.13499)",
    ),
)
