"""The instructions, in files by family; `load_families` fills the table with all of them."""

from __future__ import annotations

from functools import cache
from importlib import import_module

FAMILIES = (
    "integer",
    "carry",
    "bits",
    "logic",
    "compare",
    "move",
    "float32",
    "float64",
    "half",
    "approx",
    "convert",
    "memory",
    "atomic",
    "warp",
    "matrix",
    "mma",
    "wgmma",
    "async_copy",
    "async_store",
    "tensormap",
    "mbarrier",
    "cluster",
    "barrier",
    "fence",
    "video",
    "grid_dependency",
    "setmaxnreg",
    "misc",
    "system",
)


@cache
def load_families() -> None:
    """Import every family file, which registers its instructions."""
    for family in FAMILIES:
        import_module(f"cumla.sim.isa.{family}")
