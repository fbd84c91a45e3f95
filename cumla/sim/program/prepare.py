"""A kernel made ready to run: instructions looked up, memory laid out, code generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cumla.sim.errors import UnsupportedPTX
from cumla.sim.isa import load_families
from cumla.sim.isa.special import SPECIAL
from cumla.sim.isa.table import Env, Op, Unsupported, lookup
from cumla.sim.program.codegen import Code, generate
from cumla.sim.program.emit import CONDITION, split_operands
from cumla.sim.program.flow import basic_blocks, is_terminator
from cumla.sim.program.inline import FlatKernel, flatten, registers_of
from cumla.sim.ptx.syntax import (
    Address,
    Function,
    Instruction,
    Module,
    Pair,
    Symbol,
    Variable,
    Vector,
)

# From sm_90 on the first KiB of a block's shared memory is the system's, and the block's own
# addresses begin behind it.
RESERVED_SHARED = 0x400
FIRST_RESERVED = 90


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the variables of a kernel lie.

    Attributes:
        symbols: name -> address in its space (parameters: offset in the parameter block).
        shared: (name, address, size) of the variables in shared memory; size 0 is dynamic memory.
        shared_start: address of the first byte of shared memory that a block owns.
        shared_size: bytes of static shared memory.
        local_size: bytes of local memory of a lane.
        local_params: (offset, size) in local memory of the parameters of calls.
        param_size: bytes of the parameter block.
    """

    symbols: dict[str, int]
    shared: list[tuple[str, int, int]]
    shared_start: int
    shared_size: int
    local_size: int
    local_params: list[tuple[int, int]]
    param_size: int


def _place(variables: list[Variable], start: int = 0) -> tuple[dict[str, int], int]:
    at: dict[str, int] = {}
    for variable in variables:
        start = -(-start // variable.align) * variable.align
        at[variable.name] = start
        start += variable.size
    return at, start


def lay_out(
    module: Module, kernel: FlatKernel, globals_at: Mapping[str, int], target: int
) -> Layout:
    """Give every variable that a kernel can name its address on a device of this capability."""
    symbols = dict(globals_at)
    params, param_size = _place(kernel.parameters)
    own = kernel.variables
    # Module-scope shared variables take room in the kernels that mention them.
    mentioned = {name for ins in kernel.instructions for name in _symbols(ins)}
    shared = [v for v in own if v.space == "shared"]
    shared += [v for v in module.variables.values() if v.space == "shared" and v.name in mentioned]
    static = [v for v in shared if v.size]
    dynamic = [v for v in shared if not v.size]
    shared_start = RESERVED_SHARED if target >= FIRST_RESERVED else 0
    shared_at, shared_end = _place(static, shared_start)
    # All unsized variables share the dynamic memory, which begins behind the static variables.
    align = max([v.align for v in dynamic], default=16)
    start = -(-shared_end // align) * align
    shared_at.update({v.name: start for v in dynamic})
    local_at, local_size = _place([v for v in own if v.space == "local"])
    symbols.update(params)
    symbols.update(shared_at)
    symbols.update(local_at)
    rows = [(v.name, shared_at[v.name], v.size) for v in shared]
    if dynamic:
        shared_end = start
    passed = [(local_at[v.name], v.size) for v in own if v.name in kernel.call_parameters]
    return Layout(
        symbols,
        rows,
        shared_start,
        shared_end - shared_start,
        -(-local_size // 16) * 16,
        passed,
        param_size,
    )


def _symbols(ins: Instruction) -> set[str]:
    found: set[str] = set()
    work = list(ins.operands)
    while work:
        operand = work.pop()
        if isinstance(operand, Symbol):
            found.add(operand.name)
        elif isinstance(operand, Address) and isinstance(operand.base, Symbol):
            found.add(operand.base.name)
        elif isinstance(operand, Vector):
            work.extend(operand.items)
        elif isinstance(operand, Pair):
            work.extend((operand.first, operand.second))
    return found


@dataclass(frozen=True, slots=True)
class Prepared:
    """A kernel, its layout and its code for one set of options."""

    kernel: FlatKernel
    layout: Layout
    code: Code


def look_up(kernel: FlatKernel, env: Env) -> tuple[dict[int, Op], list[tuple[Instruction, str]]]:
    """The Op of every instruction, and what is not supported, with the reason."""
    load_families()
    env = replace(env, registers=kernel.registers)
    ops: dict[int, Op] = {}
    problems = list(kernel.problems)
    for ins in kernel.instructions:
        unknown = [
            r
            for operand in ins.operands
            for r in registers_of(operand)
            if r not in kernel.registers and r not in SPECIAL
        ]
        if unknown:
            problems.append((ins, f"unknown register {unknown[0]}"))
            continue
        if any(kernel.registers.get(r) == "b128" for o in ins.operands for r in registers_of(o)):
            problems.append((ins, "128-bit registers are not supported"))
            continue
        if is_terminator(ins):
            continue
        try:
            op = lookup(ins)(ins, env)
        except Unsupported as reason:
            problems.append((ins, str(reason)))
            continue
        _, sources = split_operands(ins, op)
        wanted = len(op.sources) - (op.sources[-1:] == (CONDITION,))
        if len(sources) != wanted:
            problems.append((ins, f"{len(sources)} source operands, {wanted} expected"))
            continue
        ops[ins.index] = op
    return ops, problems


def refuse(problems: Mapping[str, Sequence[tuple[Instruction, str]]]) -> UnsupportedPTX:
    """The error that lists, kernel by kernel, all instructions that cannot be run, with reasons."""
    text = ""
    for kernel, found in problems.items():
        if found:
            text += f"\nkernel {kernel} has {len(found)} that the simulator does not know:"
        for ins, why in found:
            text += f"\n  {ins.where} (PTX line {ins.line}): {ins.text}  -- {why}"
    return UnsupportedPTX(f"instructions that cannot be run{text}")


def prepare(module: Module, entry: Function, env: Env, globals_at: Mapping[str, int]) -> Prepared:
    """Make a kernel ready to run, or raise UnsupportedPTX with a list of what it cannot."""
    kernel = flatten(module, entry)
    ops, problems = look_up(kernel, env)
    if problems:
        raise refuse({kernel.name: problems})
    layout = lay_out(module, kernel, globals_at, env.target)
    blocks = basic_blocks(kernel)
    ranked = frozenset(name for name, _, _ in layout.shared) if env.cluster else frozenset()
    return Prepared(kernel, layout, generate(kernel, blocks, ops, layout.symbols, ranked, env))
