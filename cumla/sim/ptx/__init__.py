"""PTX text to its parts: `parse(text)` gives a `Module`."""

from cumla.sim.ptx.parser import parse

__all__ = ["parse"]
