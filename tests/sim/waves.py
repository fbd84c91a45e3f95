"""A wave of blocks without an engine, and recorders in the place of the race detector."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from cumla.sim.cohort import Cohort
from cumla.sim.isa import load_families
from cumla.sim.isa.table import DTYPES, Env, Op, lookup
from cumla.sim.memory import DeviceMemory
from cumla.sim.ptx.syntax import Address, Immediate, Instruction, Register, Sink, SourceLine
from cumla.sim.wave import Geometry, Wave

LINE = SourceLine("kernel.cu", 7)


def make_wave(
    block: tuple[int, int, int] = (64, 1, 1),
    grid: tuple[int, int, int] = (1, 1, 1),
    block_ids: list[int] | None = None,
    shared: int = 4096,
    delivery: str = "eager",
    seed: int = 0,
    num_sms: int = 4,
    cluster: tuple[int, int, int] = (1, 1, 1),
    shared_start: int = 0,
) -> Wave:
    """A wave of these blocks, by default of all blocks of the grid."""
    geometry = Geometry(
        kernel="k",
        grid=grid,
        block=block,
        shared_size=shared,
        dynamic_shared=0,
        shared_variables=[],
        local_size=0,
        local_params=[],
        params=b"",
        shared_start=shared_start,
        cluster=cluster,
    )
    device: Any = SimpleNamespace(
        memory=DeviceMemory(1 << 20), num_sms=num_sms, capability=90, launches=3
    )
    ids = np.arange(geometry.blocks) if block_ids is None else np.array(block_ids, np.int64)
    return Wave(device, geometry, ids, delivery=delivery, rng=np.random.default_rng(seed))


def cohort(wave: Wave, gids: Any = None) -> Cohort:
    """These lanes, or all that are alive."""
    chosen = np.flatnonzero(wave.live) if gids is None else np.array(gids, np.int64)
    return Cohort(wave, chosen, [])


class Bound:
    """An instruction, made ready, that is run with plain numbers."""

    def __init__(self, text: str, *operands: Any, env: Env | None = None, **options: Any) -> None:
        load_families()
        opcode, *modifiers = text.split(".")
        parsed = tuple(_operand(o) for o in operands)
        self.ins = Instruction(opcode, tuple(modifiers), parsed, None, 3, LINE, text, 0)
        self.op: Op = lookup(self.ins)(self.ins, env or Env(90, **options))

    def arrays(self, values: tuple[Any, ...]) -> list[Any]:
        assert len(values) == len(self.op.sources), self.op.sources
        kinds = [np.int64 if k == "addr" else DTYPES[k] for k in self.op.sources]
        return [np.atleast_1d(np.asarray(v)).astype(k) for v, k in zip(values, kinds, strict=True)]

    def __call__(self, c: Cohort, *values: Any) -> Any:
        assert self.op.cohort
        return self.op.run(c, *self.arrays(values))

    def ready(self, c: Cohort, *values: Any) -> Any:
        assert self.op.ready is not None
        return self.op.ready(c, *self.arrays(values))

    def waits_for(self, c: Cohort, *values: Any) -> str:
        assert self.op.waits_for is not None
        return self.op.waits_for(c, *self.arrays(values))


def _operand(value: Any) -> Any:
    """`_` as a sink, "[x]" as an address, numbers as literals, other names as registers."""
    if value == "_":
        return Sink()
    if isinstance(value, int):
        return Immediate(value)
    if value.startswith("["):
        return Address(Register(value[1:-1]))
    return Register(value)


class Recorder:
    """Remembers the calls of its methods: a list of (name, arguments)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def record(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            return len(self.calls) - 1

        return record

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]
