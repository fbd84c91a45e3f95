"""How an instruction is told to the simulator: a row of the table, `Op`, made by a family file.

A family file registers one small function for an opcode. It is given an instruction and returns
the `Op` that carries it out, or raises `Unsupported` for modifiers that it does not know; it is
called once for each instruction when a kernel is prepared, never while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cumla.sim.ptx.syntax import Instruction

# The dtype in which a value of a PTX type travels. bf16 and the packed types travel as bits.
DTYPES: dict[str, Any] = {
    "pred": np.dtype(np.bool_),
    "b8": np.dtype(np.uint8),
    "u8": np.dtype(np.uint8),
    "s8": np.dtype(np.int8),
    "b16": np.dtype(np.uint16),
    "u16": np.dtype(np.uint16),
    "s16": np.dtype(np.int16),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "b32": np.dtype(np.uint32),
    "u32": np.dtype(np.uint32),
    "s32": np.dtype(np.int32),
    "f32": np.dtype(np.float32),
    "tf32": np.dtype(np.uint32),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "b64": np.dtype(np.uint64),
    "u64": np.dtype(np.uint64),
    "s64": np.dtype(np.int64),
    "f64": np.dtype(np.float64),
}


class Unsupported(Exception):
    """This form of the instruction is not implemented; the argument says which part is not."""


@dataclass(frozen=True, slots=True)
class Env:
    """What is the same for a whole prepared kernel.

    Attributes:
        target: compute capability of the device, e.g. 80, 89, 90, 120.
        check_memory, check_race: which checks are on.
        count: whether counters are kept.
        delivery: "eager", "late" or "random": when asynchronous copies land.
        cluster: clusters are of several blocks, so addresses of shared memory hold a rank.
        specific: the PTX may use what only its very target has: `.target sm_90a`, not sm_90.
        registers: register -> declared type, of the kernel that is being prepared.
    """

    target: int
    check_memory: bool = False
    check_race: bool = False
    count: bool = False
    delivery: str = "eager"
    cluster: bool = False
    specific: bool = True
    registers: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def tracked(self) -> bool:
        """Whether it matters which asynchronous operations have been waited for."""
        return self.delivery != "eager" or self.check_race


def needs(env: Env, least: int, ins: Instruction, only: Collection[int] = (), of: str = "") -> None:
    """Raise Unsupported where the target does not have an instruction.

    Args:
        least: the first compute capability that has it.
        only: if given, those whose architecture-specific targets (sm_90a) have it, and no others.
        of: the part of the instruction that is missing; "" for all of it.
    """
    what = of or ins.name
    if only and (env.target not in only or not env.specific):
        known = ", ".join(f"sm_{c}a" for c in only)
        raise Unsupported(f"{what} needs .target {known}, not sm_{env.target}{_suffix(env)}")
    if env.target < least:
        raise Unsupported(f"{what} needs sm_{least} or later, not sm_{env.target}")


def _suffix(env: Env) -> str:
    return "a" if env.specific else " without a suffix"


@dataclass(frozen=True, slots=True)
class Op:
    """What an instruction does.

    Attributes:
        run: takes one array for each entry of `sources` and returns one array (one result), a
            tuple of arrays (several) or None (no result). An array has one element for each
            active lane, or one element that stands for all (kept as shape (1,)); so a function
            that works lane by lane needs nothing but broadcasting. Arrays are never changed in
            place: registers share them. With `cohort`, run's first argument is the Cohort.
        sources: for each source operand, vectors flattened, its type from DTYPES, or "addr" for
            an address operand or a 32 or 64-bit register used as one: int64, base plus offset.
        results: likewise for the destinations, which come first among the operands.
        cohort: the function needs to know the lanes (memory, warps, barriers).
        ready: for an instruction that may have to wait. Called with the same arguments before
            `run`; returns True when all lanes may go on, or a bool array with one element a lane.
            Lanes that may not go on wait at this instruction and ask again when something
            changed; it must not change anything but what `Cohort.wave` keeps for waiting.
        waits_for: for messages: with the arguments, what a lane that is not ready waits for.
        warp_gate: `ready` only waits for lanes of the same warp, so in a cohort of whole warps it
            need not be asked.
        updates: the destinations are read, too: they come first among the sources.
    """

    run: Callable[..., Any]
    sources: tuple[str, ...]
    results: tuple[str, ...] = ()
    cohort: bool = False
    ready: Callable[..., Any] | None = None
    waits_for: Callable[..., str] | None = None
    warp_gate: bool = False
    updates: bool = False


def nothing(c: Any, *operands: Any) -> None:
    """`Op.run`, with `cohort`, of an instruction that does nothing here."""


Specialise = Callable[[Instruction, Env], Op]
TABLE: dict[str, Specialise] = {}


def instruction(*opcodes: str) -> Callable[[Specialise], Specialise]:
    """Register the function below as the one that knows these: "opcode" or "opcode.type"."""

    def register(function: Specialise) -> Specialise:
        for opcode in opcodes:
            if opcode in TABLE:
                raise ValueError(f"opcode {opcode} is registered twice")
            TABLE[opcode] = function
        return function

    return register


def lookup(ins: Instruction) -> Specialise:
    """The function that knows an instruction, or Unsupported.

    "opcode.type", with the last modifier as the type, is looked for before "opcode": `add.f32` and
    `add.s32` are in different families. So is "opcode.async", of `st` and `red`.
    """
    if ins.modifiers:
        asynchronous = TABLE.get(f"{ins.opcode}.async")
        if asynchronous is not None and ins.modifiers[0] == "async":
            return asynchronous
        typed = TABLE.get(f"{ins.opcode}.{ins.modifiers[-1]}")
        if typed is not None:
            return typed
    found = TABLE.get(ins.opcode)
    if found is None:
        raise Unsupported(f"no instruction {ins.opcode!r} is known")
    return found
