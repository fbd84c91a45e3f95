"""Write cumla's kernel report.

    python -m tools.kernel_report [--write PART]... [--results FILE]

PART is budgets (the heads of kernel files and what of kernels_cu/README.md needs no compiler:
a second) or all (counters and code, too: ten minutes). Without it, what would change is told, and
the exit status says whether anything would.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from . import budget, page
from .results import collect


@click.command(help=__doc__)
@click.option("--write", type=click.Choice(["budgets", "all"]), help="What to write.")
@click.option(
    "--results",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A JSON file that keeps what has been counted, to go on from.",
)
def main(write: str | None, results: Path | None) -> None:
    stale = []
    for one in budget.budgets():
        if one.put_into(one.read()) != one.read():
            stale.append(one.path)
            if write:
                one.write()
    before = text = page.PAGE.read_text(encoding="utf-8")
    for name in page.FORMULAS:
        text = page.replaced(text, name, page.formulas(name))
    if write == "all":
        found = collect(results, lambda line: click.echo(line, err=True))
        for name in page.MEASURED:
            text = page.replaced(text, name, page.measured(name, found))
    if text != before:
        stale.append(page.PAGE.name)
        if write:
            page.PAGE.write_text(text, encoding="utf-8")
    for one in stale:
        click.echo(f"{'written' if write else 'would change'}: kernels_cu/{one}")
    sys.exit(bool(stale) and not write)


if __name__ == "__main__":
    main()
