"""Compile every instantiation for every target, and say what the compiler says of it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cumla.jit import nvrtc, sources
from cumla.jit.build import OPTIONS
from cumla.jit.facts import facts_of
from cumla.jit.occupancy import blocks_per_sm
from cumla.kernels import catalogue

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
SECONDS = 1.5
"""A compilation that takes longer is repeated: other programs may have been in its way."""


@dataclass(frozen=True)
class Code:
    """One instantiation for one target."""

    path: str
    expression: str
    target: str
    registers: int
    spill_bytes: int
    local_bytes: int
    shared_bytes: int
    """Of a block, static and dynamic."""
    threads: int
    blocks: int
    """That an SM holds."""
    code_bytes: int
    seconds: float
    """That NVRTC took to make PTX and cubin, of one core."""

    @property
    def name(self) -> tuple[str, str]:
        """The kernel and its variant: ("decode_dense", "BF16, 16 rows")."""
        return short_name(self.expression)


_ROWS = (
    (r"HalfRows<bf16, [^>]*>", "BF16"),
    (r"HalfRows<f16, [^>]*>", "FP16"),
    (r"Fp8Rows<576, [^>]*>", "V32_FP8"),
    (r"Fp8Rows<512, [^>]*>", "V4_FP8"),
    # Warps, stages and blocks follow from the rows and the target.
    (r"Tile<(\w+), (\d+), \d+, \d+>", r"\1, \2 rows"),
    (r"ScaleRule::(\w+)", lambda match: match[1].lower()),
)


def short_name(expression: str) -> tuple[str, str]:
    """What a table calls the kernel with this C++ name, and the instantiation."""
    text = expression.replace("cumla::", "")
    for pattern, name in _ROWS:
        text = re.sub(pattern, name, text)
    kernel, _, variant = text.removesuffix(">").partition("<")
    if kernel.startswith("decode_"):
        variant, *extra, _ = variant.rsplit(", ", 1 if kernel == "decode_dense" else 2)
        variant += ", an extra pool" * (extra == ["true"])
    return kernel, variant


def compile_all(targets: tuple[str, ...] = TARGETS) -> Iterator[Code]:
    """All kernels of the catalogue."""
    for target in targets:
        for instance in catalogue.programs(target):
            path, expression = instance.program.path, instance.program.expression
            source = sources.whole(path)
            seconds = float("inf")
            for _ in range(3):
                began = time.process_time()
                made = nvrtc.compile_kernel(source, path, expression, target, OPTIONS, cubin=True)
                seconds = min(seconds, time.process_time() - began)
                if seconds <= SECONDS:
                    break
            assert made.cubin is not None
            facts = facts_of(made.log, made.cubin, made.entry)
            shared = facts.shared_bytes + instance.shared_bytes
            depot = 1 if "__local_depot" in made.ptx else 0
            yield Code(
                path,
                expression,
                target,
                facts.registers,
                facts.spill_bytes,
                max(facts.local_bytes, depot),
                shared,
                instance.threads,
                blocks_per_sm(target, instance.threads, facts.registers, shared),
                facts.code_bytes,
                seconds,
            )
