"""`cumla smoke`: run every op in every format and check the results. See `cumla.cli.cases`."""

from __future__ import annotations

import math
import random
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import click
import numpy as np

from cumla.backends import BackendUnavailable, get_backend, use_backend
from cumla.backends.numpy.parallel import num_threads
from cumla.checks import ArgumentError
from cumla.cli.cases import Case, Outcome, Storages, all_cases

_WIDTH = 100
# Ops that only the numpy backend has so far.
_WITHOUT_KERNELS = ("sparse_prefill", "mha_varlen", "mha_varlen_backward", "pack/unpack_kv")
# Of each op's cases, `--quick` runs one in this many, and at least one.
_QUICK_SHARE = 4


@click.command("smoke", short_help="Run every op in every format and check the results.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all random data."
)
@click.option("--quick", is_flag=True, help="Run a seeded sample of the checks.")
@click.option(
    "--backend",
    type=click.Choice(["numpy", "sim"]),
    help="Where to run; by default what CUMLA_BACKEND says, else numpy.",
)
def command(seed: int, quick: bool, backend: str | None) -> None:
    """Run every op in every format and check the results.

    Each result is held against the op's definition in float64, within the tolerances of FlashMLA's
    own tests. The errors are the largest absolute ones (for pack/unpack_kv: the part of half an
    e4m3 step that was used, at most 1). ms is the time of one run, for PagedKVCache of reading
    all sequences back; it is not a benchmark. Exits with 1 if a check fails.

    --backend sim runs the GPU kernels in the simulator, with memory and race checks, on the ops
    that have kernels.

    Example:  cumla smoke --quick
    """
    try:
        with use_backend(backend or get_backend()):
            _smoke(seed, quick)
    except (ArgumentError, BackendUnavailable) as error:
        raise click.ClickException(str(error)) from error


def _smoke(seed: int, quick: bool) -> None:
    threads = num_threads()
    cases = all_cases()
    left_out: list[str] = []
    if get_backend() == "sim":
        left_out = sorted({case.op for case in cases if case.op in _WITHOUT_KERNELS})
        cases = [case for case in cases if case.op not in _WITHOUT_KERNELS]
    chosen = _sample(cases, seed) if quick else list(range(len(cases)))
    start = time.perf_counter()
    outcomes = _run(cases, chosen, seed)
    seconds = time.perf_counter() - start
    _print_report([cases[i] for i in chosen], outcomes)
    missed = sum(bool(one.misses) for one in outcomes)
    sampled = f" (a sample of {len(cases)})" if quick else ""
    verdict = f"{missed} of {len(chosen)} checks MISSED"
    if not missed:
        verdict = f"All {len(chosen)} checks passed"
    click.echo()
    if left_out:
        click.echo(f"Without kernels, not run: {', '.join(left_out)}.")
    where = f"{threads} thread{'s' if threads > 1 else ''}"
    if get_backend() == "sim":
        where = "memory and race checks on"
    click.secho(
        f"{verdict}{sampled} in {seconds:.1f} s: {get_backend()} backend, {where}, seed {seed}.",
        fg="red" if missed else "green",
        bold=True,
    )
    if missed:
        raise SystemExit(1)


def _sample(cases: Sequence[Case], seed: int) -> list[int]:
    """The places of a seeded sample of the cases with something of every op."""
    chooser = random.Random(seed)
    chosen: list[int] = []
    for _, group in groupby(range(len(cases)), key=lambda i: cases[i].op):
        places = list(group)
        chosen += sorted(chooser.sample(places, -(-len(places) // _QUICK_SHARE)))
    return chosen


def _run(cases: Sequence[Case], chosen: Sequence[int], seed: int) -> list[Outcome]:
    storages = Storages(seed)
    outcomes = []
    with _progress([f"{cases[i].op} {cases[i].format}" for i in chosen]) as steps:
        for i, _ in zip(chosen, steps, strict=True):
            # A case's data does not depend on which others run.
            rng = np.random.default_rng([seed, 1000 + i])
            try:
                outcome = cases[i].run(storages, rng)
            except Exception as error:  # one broken op must not hide what the others do
                outcome = Outcome(misses=[_where(error)])
            outcomes.append(outcome)
    return outcomes


def _where(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    at = ""
    if trace is not None:
        at = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"
    return f"raised {type(error).__name__}: {error}{at}"


@contextmanager
def _progress(names: Sequence[str]) -> Iterator[Iterator[str]]:
    """Iterate over the steps' names behind a progress bar; without a terminal, silently."""
    if not sys.stderr.isatty():
        yield iter(names)
        return
    with click.progressbar(
        names, file=sys.stderr, item_show_func=lambda name: name or "", show_eta=False, width=30
    ) as bar:
        yield iter(bar)


def _print_report(cases: Sequence[Case], outcomes: Sequence[Outcome]) -> None:
    rows = [("op", "format", "shape", "out err", "lse err", "ms", "verdict")]
    for case, outcome in zip(cases, outcomes, strict=True):
        verdict = "MISS" if outcome.misses else "ok"
        ms = "-" if outcome.ms is None else f"{outcome.ms:.1f}"
        errors = (_error(outcome.out_error), _error(outcome.lse_error))
        rows.append((case.op, case.format, case.shape, *errors, ms, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        text = [f"{cell:<{width}}" for cell, width in zip(row[:3], widths[:3], strict=True)]
        text += [f"{cell:>{width}}" for cell, width in zip(row[3:6], widths[3:6], strict=True)]
        colour = None if number == 0 else "red" if row[-1] == "MISS" else "green"
        click.echo("  ".join([*text, click.style(row[-1], fg=colour)]))
    for case, outcome in zip(cases, outcomes, strict=True):
        for message in outcome.misses:
            click.echo()
            line = f"MISS {case.op} {case.format} {case.shape}: {message}"
            click.echo(textwrap.fill(line, _WIDTH, subsequent_indent="  "))
    _print_storage_errors(cases, outcomes)


def _error(error: float | None) -> str:
    """An error for the table; a result of a wrong shape or dtype has none that can be told."""
    if error is None or math.isnan(error):
        return "-"
    return f"{error:.1e}" if error else "0"


def _print_storage_errors(cases: Sequence[Case], outcomes: Sequence[Outcome]) -> None:
    """What storing rows in FP8 costs, for information: no verdict depends on it."""
    worst: dict[str, float] = {}
    for case, outcome in zip(cases, outcomes, strict=True):
        if outcome.storage_error is not None:
            worst[case.format] = max(worst.get(case.format, 0.0), outcome.storage_error)
    if worst:
        click.echo()
        told = ", ".join(f"{name} {error:.1%}" for name, error in worst.items())
        click.echo(f"Storing the KV in FP8 changes out by (RMS; not part of the verdict): {told}.")
