"""What a case of `cumla smoke` is, and what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cumla.cli.cases.storage import Storages
from cumla.cli.comparison import Tolerance, compare

Array = NDArray[Any]
Generator = np.random.Generator
Result = TypeVar("Result")

# DeepSeek V3 and V3.2: per-head width 192, YaRN factor 40 with mscale 1.
V3_SCALE = 192**-0.5 * 1.368888**2
V4_SCALE = 512**-0.5
# Between two ways to compute the same in float64.
FLOAT64 = Tolerance(1e-9, 1e-9, 1e-12)
INT32_MAX = np.iinfo(np.int32).max


@dataclass
class Outcome:
    """What one case saw."""

    out_error: float | None = None
    """The largest absolute error of its results, lse aside."""
    lse_error: float | None = None
    ms: float | None = None
    misses: list[str] = field(default_factory=list)
    """One line for each comparison that failed."""
    storage_error: float | None = None
    """How far FP8 storage alone moved the exact out: RMS of the change over RMS of out."""

    def timed(self, call: Callable[[], Result]) -> Result:
        """Run `call` once and keep how long it took."""
        start = time.perf_counter()
        result = call()
        self.ms = (time.perf_counter() - start) * 1e3
        return result

    def judge(
        self, name: str, result: Array, reference: Array, tolerance: Tolerance, dtype: DTypeLike
    ) -> None:
        """Compare a result; "lse" and "max_logits" count as lse errors, all others as out's."""
        found = compare(name, result, reference, tolerance, dtype=dtype)
        if not found.passed:
            self.misses.append(found.message)
        # NaN at the same places passes as equal, but no case stores one in a token it selects.
        elif np.isnan(reference).any():
            self.misses.append(f"{name}: the reference is NaN: unselected memory reached it")
        if tolerance == FLOAT64:  # about the reference; the errors told are those of results
            return
        if name.startswith(("lse", "max_logits")):
            self.lse_error = float(np.maximum(self.lse_error or 0.0, found.max_abs_error))
        else:
            self.out_error = float(np.maximum(self.out_error or 0.0, found.max_abs_error))

    def judge_reference(self, name: str, reference: Array, plain: Array) -> None:
        """Compare some of the oracle's numbers with `plain_attention`'s."""
        self.judge(f"float64 {name}", np.asarray(reference), plain, FLOAT64, np.float64)


def plain_attention(
    q: Array, k: Array, v: Array, scale: float, attn_sink: Array | None = None
) -> tuple[Array, Array]:
    """Attention of q [rows, d_qk] over all of k [n, d_qk] and v [n, d_v], in float64, in one go.

    The oracle shares code with the float32 backend. A few rows of each case are computed here too,
    the shortest way there is, so that what the two get wrong alike is seen as well.
    """
    if not len(k):
        return np.zeros((len(q), v.shape[1])), np.full(len(q), np.inf)
    logits = scale * (q.astype(np.float64) @ k.astype(np.float64).T)
    lse = np.logaddexp.reduce(logits, axis=1)
    total = lse if attn_sink is None else np.logaddexp(lse, attn_sink)
    return np.exp(logits - total[:, None]) @ v.astype(np.float64), lse


class Case(Protocol):
    """One check of one op; the first three are its columns in the report."""

    @property
    def op(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def shape(self) -> str: ...
    def run(self, storages: Storages, rng: Generator) -> Outcome: ...


def normal(rng: Generator, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return rng.standard_normal(shape, np.float32).astype(dtype)
