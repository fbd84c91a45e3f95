"""`cumla compile`: compile every kernel ahead of time, and tell what each takes of a GPU."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass

import click

from cumla.checks import ArgumentError
from cumla.jit.build import build
from cumla.jit.cache import CacheUnusable, location
from cumla.jit.nvrtc import CompileError
from cumla.jit.occupancy import TARGETS, blocks_per_sm, limits
from cumla.kernels.catalogue import Instance, programs

# Column -> its width. The kernel comes last: its name has all template arguments.
_COLUMNS = {
    "target": 7,
    "regs": 4,
    "spills": 6,
    "local": 5,
    "static": 6,
    "dynamic": 7,
    "blocks/SM": 9,
    "code": 7,
    "seconds": 7,
    "": 6,
}


@dataclass(frozen=True)
class Row:
    """One compiled kernel, or why it is none."""

    kernel: str
    target: str
    threads: int
    dynamic_shared_bytes: int
    registers: int | None = None
    spill_bytes: int | None = None
    local_bytes: int | None = None
    static_shared_bytes: int | None = None
    blocks_per_sm: int | None = None
    code_bytes: int | None = None
    seconds: float | None = None
    cached: bool = False
    error: str | None = None


@click.command("compile", short_help="Compile all kernels ahead of time.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("all",),
    show_default=True,
    help=f"GPU to compile for; repeatable. One of {', '.join(TARGETS)}, or all of these.",
)
@click.option("--kernel", "wanted", default="", help="Only kernels whose name has this in it.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=len(os.sched_getaffinity(0)),
    help="Kernels compiled at a time.  [default: the CPUs this process may use]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(targets: tuple[str, ...], wanted: str, jobs: int, as_json: bool) -> None:
    """Compile all kernels into the cache, and tell what each takes of a GPU. Needs no GPU.

    Registers are of a thread; spills and local memory are bytes of a thread and should be 0. Shared
    memory is bytes of a block, static and dynamic; code is bytes, seconds those of the compilation,
    whenever it was. blocks/SM is how many blocks registers and shared memory leave room for; * is
    behind it if the kernel was made for more.

    Example:  cumla compile --target sm_80 --target sm_90a
    """
    begin = time.perf_counter()
    work = [
        (target, one)
        for target in _targets(targets)
        for one in programs(target)
        if wanted in one.program.expression
    ]
    if not work:
        raise click.ClickException(f"No kernel has {wanted!r} in its name.")
    rows = []
    # NVRTC works without Python's lock.
    with ThreadPoolExecutor(jobs) as pool:
        if not as_json:
            click.echo(_line(_COLUMNS) + "  kernel")
        for row, (_, instance) in zip(
            pool.map(lambda one: _compile(*one), work), work, strict=True
        ):
            rows.append(row)
            if not as_json:
                click.echo(_text(row, instance.min_blocks))
    failed = sum(row.error is not None for row in rows)
    if as_json:
        click.echo(json.dumps({"kernels": [asdict(row) for row in rows]}, indent=2))
    else:
        _sum_up(rows, time.perf_counter() - begin)
    if failed:
        raise click.ClickException(f"{failed} of {len(rows)} kernels did not compile.")


def _targets(given: Iterable[str]) -> list[str]:
    names = [name for one in given for name in (TARGETS if one == "all" else (one,))]
    for name in names:
        try:
            limits(name)
        except ArgumentError as error:
            raise click.BadParameter(str(error), param_hint="'--target'") from error
    return list(dict.fromkeys(names))


def _compile(target: str, instance: Instance) -> Row:
    program = instance.program
    row = Row(program.expression, target, instance.threads, instance.shared_bytes)
    made = build(program.path, program.expression, target)
    try:
        # Asking for the file puts it into the cache even if this process has it already.
        _ = made.cubin
        facts = made.facts
    except (CompileError, ArgumentError, ImportError, OSError, RuntimeError) as error:
        return Row(**{**asdict(row), "error": str(error)})
    if facts is None:
        return Row(**{**asdict(row), "seconds": made.seconds, "cached": made.cached})
    shared = facts.shared_bytes + instance.shared_bytes
    return Row(
        program.expression,
        target,
        instance.threads,
        instance.shared_bytes,
        registers=facts.registers,
        spill_bytes=facts.spill_bytes,
        local_bytes=facts.local_bytes,
        static_shared_bytes=facts.shared_bytes,
        blocks_per_sm=blocks_per_sm(target, instance.threads, facts.registers, shared),
        code_bytes=facts.code_bytes,
        seconds=made.seconds,
        cached=made.cached,
    )


def _line(values: Iterable[object]) -> str:
    """A line of the table: the first and the last column to the left, numbers to the right."""
    first, *rest = zip(values, _COLUMNS.values(), strict=True)
    numbers = [f"{'?' if value is None else value!s:>{width}}" for value, width in rest[:-1]]
    last, width = rest[-1]
    return " ".join([f"{first[0]!s:<{first[1]}}", *numbers, f"{last!s:<{width}}"])


def _text(row: Row, min_blocks: int) -> str:
    name = row.kernel.replace("cumla::", "")
    if row.error is not None:
        return f"{row.target:<{_COLUMNS['target']}} FAILED  {name}\n{row.error}"
    blocks = row.blocks_per_sm
    values = (
        row.target,
        row.registers,
        row.spill_bytes,
        row.local_bytes,
        row.static_shared_bytes,
        row.dynamic_shared_bytes,
        f"{blocks}*" if blocks is not None and blocks < min_blocks else blocks,
        row.code_bytes,
        None if row.seconds is None else f"{row.seconds:.2f}",
        "cached" if row.cached else "",
    )
    return f"{_line(values)}  {name}"


def _sum_up(rows: list[Row], seconds: float) -> None:
    targets = len({row.target for row in rows})
    cached = sum(row.cached for row in rows)
    spilled = sum(bool(row.spill_bytes or row.local_bytes) for row in rows)
    line = (
        f"{len(rows)} kernel{'s' * (len(rows) > 1)} for {targets} target{'s' * (targets > 1)} "
        f"in {seconds:.1f} s; {cached} {'was' if cached == 1 else 'were'} cached, "
        f"{spilled} {'uses' if spilled == 1 else 'use'} local memory."
    )
    with suppress(CacheUnusable):
        line += f"\nThe cache is {location()}"
    click.echo(line)
