"""Instructions on integers against definitions in Python's own numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np

from cumla.sim.isa.table import DTYPES, Op
from cumla.sim.ptx.syntax import Operand
from sim.ops import op


def width_of(kind: str) -> int:
    return DTYPES[kind].itemsize * 8


def wrap(value: int, kind: str) -> int:
    """The value that the low bits of a number mean in a type."""
    width = width_of(kind)
    value &= (1 << width) - 1
    return value - (1 << width) if kind[0] == "s" and value >> (width - 1) else value


def bit(value: int, place: int) -> int:
    return value >> place & 1


def samples(kind: str, count: int = 6) -> list[int]:
    """Values of a type at the edges of everything, and a few more."""
    width = width_of(kind)
    rng = random.Random(f"{kind}")
    edges = [0, 1, 2, 3, 7, width - 1, width, width + 1, 255, 256, 0x5555555555555555]
    edges += [(1 << at) + off for at in (width - 1, width // 2) for off in (-1, 0, 1)]
    edges += [-1, -2, -3, -(1 << (width // 2))]
    edges += [rng.getrandbits(width) for _ in range(count)]
    edges += [rng.getrandbits(rng.randrange(1, width)) for _ in range(count)]
    return sorted({wrap(value, kind) for value in edges})


def array(values: Sequence[int], kind: str) -> Any:
    """Numbers as an array of a type, taken modulo its range."""
    if kind in ("pred", "cc"):
        return np.array(values, np.bool_)
    bits = np.dtype(f"u{DTYPES[kind].itemsize}")
    mask = (1 << width_of(kind)) - 1
    return np.array([value & mask for value in values], bits).view(DTYPES[kind])


def run_op(made: Op, *sources: Any) -> tuple[Any, ...]:
    """The results of a lane-wise Op, after checks that hold for every one.

    The sources stay as they were, each result has the dtype it should, and the first lane alone,
    with every other source or with all of them as one value for all lanes, gives the same.
    """
    assert not made.cohort
    before = [s.copy() for s in sources]
    with np.errstate(all="ignore"):
        results = _tuple(made.run(*sources))
        alone = _tuple(made.run(*(s[:1] for s in sources)))
        every_other = [s if i % 2 else s[:1] for i, s in enumerate(sources)]
        mixed = _tuple(made.run(*every_other))
        expanded = _tuple(made.run(*np.broadcast_arrays(*every_other)))
    for source, old in zip(sources, before, strict=True):
        np.testing.assert_array_equal(source.view(_bits(source)), old.view(_bits(old)))
    kinds = ["pred" if kind == "cc" else kind for kind in made.results]
    for result, one, some, same, kind in zip(results, alone, mixed, expanded, kinds, strict=True):
        assert result.dtype == one.dtype == some.dtype == DTYPES[kind]
        assert result.shape == sources[0].shape
        assert one.shape == (1,)
        bits = _bits(result)
        assert one.view(bits) == result[:1].view(bits)
        np.testing.assert_array_equal(
            np.broadcast_to(some.view(bits), same.shape), np.ascontiguousarray(same).view(bits)
        )
    return results


def _tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _bits(values: Any) -> Any:
    return np.dtype(f"u{values.dtype.itemsize}")


def check(
    name: str,
    kinds: Sequence[str],
    reference: Callable[..., Any],
    operands: tuple[Operand, ...] = (),
    rows: Sequence[Sequence[int]] | None = None,
) -> Op:
    """Compare an instruction with a function of Python numbers.

    Args:
        kinds: the PTX types of its sources, which its values are of.
        reference: gives the result, or a tuple of them; only their low bits count.
        operands: of the instruction, where it matters what they are.
        rows: the inputs to try; all combinations of `samples` if None.
    """
    made = op(name, *operands)
    assert len(made.sources) == len(kinds), made.sources
    if rows is None:
        rows = list(product(*(samples(k) if k not in ("pred", "cc") else [0, 1] for k in kinds)))
    columns = list(map(array, zip(*rows, strict=True), made.sources))
    results = run_op(made, *columns)
    for i, row in enumerate(rows):
        expected = _tuple(reference(*row))
        for result, want in zip(results, expected, strict=True):
            mask = (1 << result.dtype.itemsize * 8) - 1 if result.dtype != np.bool_ else 1
            got = int(result[i]) & mask
            assert got == int(want) & mask, f"{name} {row}: {got:#x}, not {int(want) & mask:#x}"
    return made
