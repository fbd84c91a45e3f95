"""Cases of the codecs and of the paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

import cumla
from cumla.cli.cases.base import Generator, Outcome, normal
from cumla.cli.cases.storage import MAIN, Storages
from cumla.fp8 import ScaleRule
from cumla.layouts import KVLayout

Array = NDArray[Any]


@dataclass(frozen=True)
class CacheCase:
    """Append, fork, truncate, free: does every sequence hold its rows, bit for bit?"""

    op: ClassVar[str] = "PagedKVCache"
    layout: KVLayout

    @property
    def format(self) -> str:
        return self.layout.name

    @property
    def shape(self) -> str:
        return f"append, fork, truncate page={MAIN[self.format].page_size}"

    def run(self, storages: Storages, rng: Generator) -> Outcome:
        outcome = Outcome(out_error=0.0)
        stored = storages[MAIN[self.layout.name]]
        ids = stored.sequences
        read = outcome.timed(lambda: [stored.cache.read(one) for one in ids])
        for i, rows in enumerate(read):
            wanted = stored.flat_decoded[stored.first_slots[i] :][: stored.lengths[i]]
            if not np.array_equal(rows, wanted):
                outcome.misses.append(f"sequence {i}: its rows are not those that were appended")
            if rows.shape == wanted.shape and rows.size:
                error = np.abs(rows.astype(np.float64) - wanted.astype(np.float64)).max()
                outcome.out_error = float(np.maximum(outcome.out_error or 0.0, error))
        return outcome


@dataclass(frozen=True)
class CodecCase:
    """Is every decoded value within half an e4m3 step of what was encoded?"""

    op: ClassVar[str] = "pack/unpack_kv"
    layout: KVLayout
    rule: ScaleRule | None

    @property
    def format(self) -> str:
        return self.layout.name

    @property
    def shape(self) -> str:
        return f"1024 rows page=64 rule={self.rule or 'none'}"

    def run(self, storages: Storages, rng: Generator) -> Outcome:
        outcome = Outcome()
        layout = self.layout
        rows = normal(rng, (16, 64, 1, layout.d_qk), np.float32)
        # Rows from tiny to huge, and one of zeros.
        rows *= np.exp2(rng.integers(-16, 3, (16, 64, 1, 1))).astype(np.float32)
        rows[0, 0] = 0
        rows = rows.astype(layout.compute_dtype)
        back = outcome.timed(
            lambda: cumla.unpack_kv(
                cumla.pack_kv(rows, layout, 64, scale_rule=self.rule), layout, 64
            )
        )
        exact = rows.reshape(-1, layout.d_qk).astype(np.float64)
        got = back.reshape(-1, layout.d_qk).astype(np.float64)
        error = np.abs(got - exact)
        allowed = np.zeros_like(exact)
        if layout.is_fp8:
            tiles = exact[:, : layout.d_nope].reshape(len(exact), -1, layout.tile)
            allowed[:, : layout.d_nope] = _half_step(tiles, self.rule).reshape(len(exact), -1)
        used = np.divide(error, allowed, out=np.zeros_like(error), where=allowed > 0)
        outcome.out_error = float(used.max())
        wrong = ~(error <= allowed)
        if wrong.any():
            row, at = (int(one) for one in np.argwhere(wrong)[0])
            outcome.misses.append(
                f"{wrong.sum()} of {wrong.size} values are too far off, first at row {row}, "
                f"value {at}: {exact[row, at]:.9g} came back as {got[row, at]:.9g}, "
                f"allowed error {allowed[row, at]:.3g}"
            )
        return outcome


def _half_step(tiles: Array, rule: ScaleRule | None) -> Array:
    """Half an e4m3 last place, under the tile's scale, for float64 `tiles` [..., tile]."""
    amax = np.abs(tiles).max(axis=-1, keepdims=True)
    if rule == "flashmla":
        scale = np.exp2(np.ceil(np.log2(np.maximum(amax / 448, 1e-4))))
    elif rule == "v4":
        scale = np.exp2(np.ceil(np.log2(np.maximum(amax, 1e-4) / 448)))
    else:
        scale = np.maximum(amax / 448, 2.0**-126)
    # frexp's exponent is one above that of 1.m; e4m3 is subnormal below 2**-6.
    exponent = np.maximum(np.frexp(tiles / scale)[1] - 1, -6)
    allowed = scale * np.exp2(exponent - 4)
    if rule == "raw":
        # A scale that is no power of two is rounded to bf16, and so is its product with the code:
        # twice a relative 2**-8. The quotient in float32 is inexact too, hence the last factor.
        allowed += (np.abs(tiles) + allowed) * ((1 + 2.0**-8) ** 2 - 1)
        allowed *= 1 + 1e-6
    return np.asarray(allowed)
