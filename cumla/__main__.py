"""`python -m cumla`: the command line of `cumla.cli`."""

from cumla.cli import main

main(prog_name="cumla")
