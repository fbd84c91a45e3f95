"""The `cumla` command. Its subcommands are loaded when they are asked for."""

from __future__ import annotations

from importlib import import_module

import click

from cumla import __version__

# Command -> its line in `cumla --help`; `cumla.cli.<command>.command` is the command itself.
SUMMARIES = {
    "info": "Show versions, GPU, compiler, backends and folders.",
    "smoke": "Run every op in every format and check the results.",
    "bench": "Time one op.",
    "compile": "Compile all kernels ahead of time.",
    "sim": "Run CUDA kernels on the CPU, with checks and counters.",
}


class _LazyGroup(click.Group):
    """A group that imports `cumla.cli.<name>` only when that command is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUMMARIES:
            return None
        command: click.Command = import_module(f"cumla.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cumla")
def main() -> None:
    """Multi-head Latent Attention over paged FP8 KV caches, for NumPy and CuPy arrays.

    Example:  cumla smoke --quick
    """
