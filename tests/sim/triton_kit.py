"""Triton and Gluon kernels on a simulated device, launched as Triton's own launcher does it.

Triton makes PTX without a GPU. Where it is not installed, the tests that import this are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cumla import sim

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.experimental.gluon._runtime import GluonASTSource

CHECKS = ("memory", "race")
DELIVERIES = ("eager", "late", "random")
DTYPES: dict[str, Any] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "fp8e4nv": ml_dtypes.float8_e4m3fn,
    "fp8e5": ml_dtypes.float8_e5m2,
    "i8": np.int8,
    "i32": np.int32,
    "u32": np.uint32,
}
# CUtensorMapDataType by the numbers in a kernel's metadata, and CUtensorMapSwizzle.
_ELEMENTS = {0: "uint8", 1: "uint16", 2: "uint32", 3: "int32", 6: "float16", 7: "float32"}
_ELEMENTS[10] = "bfloat16"
_SWIZZLES = ("none", "32B", "64B", "128B")


@dataclass(frozen=True)
class Descriptor:
    """An argument for a `tensordesc` parameter: a tensor map of this contiguous array."""

    array: sim.DeviceArray


def described(kind: str, *block: int, layout: str = "") -> str:
    """The type of a tensor descriptor in a signature; Gluon's needs the text of its layout too."""
    return f"tensordesc<{kind}[{', '.join(map(str, block))}]{layout and ',' + layout}>"


@cache
def _compiled(
    function: Any,
    signature: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    multiples: frozenset[str],
    capability: int,
    options: tuple[tuple[str, Any], ...],
) -> tuple[str, Any]:
    """PTX and metadata."""
    kinds = {**dict(signature), **dict.fromkeys(dict(constants), "constexpr")}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name in multiples or (multiples and kinds[name].startswith("*"))
    }
    source = GluonASTSource if function.is_gluon() else ASTSource
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(Path(folder)))
        made = compile(
            source(function, kinds, dict(constants), attributes),
            target=GPUTarget("cuda", capability, 32),
            options=dict(options),
        )
        return made.asm["ptx"], made.metadata


class Compiled:
    """A kernel as PTX on a device.

    Args:
        function: what `triton.jit` or `gluon.jit` made.
        signature: parameter -> type, such as "*bf16", "i32" or `described(...)`.
        constants: the `constexpr` parameters.
        target: such as "sm_90a".
        multiples: parameters that are multiples of 16; if there are any, so are all pointers.
        options: num_warps, num_stages, num_ctas, ...
    """

    def __init__(
        self,
        function: Any,
        signature: dict[str, str],
        constants: dict[str, Any],
        target: str = "sm_90a",
        *,
        multiples: Collection[str] = (),
        **options: Any,
    ) -> None:
        self.ptx, self.metadata = _compiled(
            function,
            tuple(signature.items()),
            tuple(constants.items()),
            frozenset(multiples),
            int(re.sub(r"\D", "", target)),
            tuple(options.items()),
        )
        self._load(target)

    def _load(self, target: str) -> None:
        self.device = sim.Device(target, memory_bytes=1 << 28)
        self.kernel = self.device.load(self.ptx).kernel(self.metadata.name)

    def without(self, instruction: str, which: int = 0) -> Compiled:
        """The kernel, on a new device, without one of its instructions that begin like this."""
        lines = self.ptx.splitlines()
        found = [
            i
            for i, line in enumerate(lines)
            if re.match(rf"\s*(@!?%?\w+ )?{re.escape(instruction)}\b", line)
        ]
        made = copy(self)
        made.ptx = "\n".join([*lines[: found[which]], "//", *lines[found[which] + 1 :]])
        made._load(self.device.target)
        return made

    def with_single_stores(self) -> Compiled:
        """The kernel, on a new device, with thread 0 alone storing constants to shared memory.

        All threads store what the workers of a specialised kernel are to do: the same bytes, but
        by the letter a race.
        """
        store = r"^\s*(st\.shared\S*\s+\[global_smem\+\d+\], (?:\{[\d, -]+\}|-?\d+);)"
        alone = (
            r"{.reg .pred first; .reg .b32 me; mov.u32 me, %tid.x; setp.eq.u32 first, me, 0; "
            r"@first \1}"
        )
        made = copy(self)
        made.ptx, found = re.subn(store, alone, self.ptx, flags=re.M)
        assert found
        made._load(self.device.target)
        return made

    def __call__(self, grid: int | Sequence[int], *args: Any, **options: Any) -> sim.Launch:
        """Launch with all checks; as in Triton, the grid counts clusters."""
        x, y, z = (*((grid,) if isinstance(grid, int) else grid), 1, 1)[:3]
        meta = self.metadata
        given = [*self._arguments(args), *self._scratch(x * y * z * meta.num_ctas)]
        return self.kernel.launch(
            (x * meta.num_ctas, y, z), meta.num_warps * 32, given, shared_bytes=meta.shared,
            **{"checks": CHECKS, **options},
        )  # fmt: skip

    def _arguments(self, args: Sequence[Any]) -> list[Any]:
        """A descriptor is three arguments: tensor map, shape and strides, both outermost first."""
        given: list[Any] = []
        known = iter(self.metadata.tensordesc_meta or ())
        for arg in args:
            if not isinstance(arg, Descriptor):
                given.append(arg)
                continue
            meta = next(known)
            made = sim.tensor_map(
                arg.array,
                data_type=_ELEMENTS[meta["elem_type"]],
                box_dim=meta["block_size"][::-1],
                swizzle=_SWIZZLES[meta["swizzle"]],
            )
            shape = arg.array.shape
            strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
            given += [made, *shape, *strides]
        return given

    def _scratch(self, blocks: int) -> list[Any]:
        """Pointers to scratch memory of all blocks, and to that of a profiler, here not used."""
        size = self.metadata.global_scratch_size * blocks
        return [self.device.alloc(size, name="scratch") if size else 0, 0]

    def has(self, *instructions: str) -> bool:
        """Whether the PTX has all of these: a test of wgmma tests nothing where there is none."""
        return all(text in self.ptx for text in instructions)
