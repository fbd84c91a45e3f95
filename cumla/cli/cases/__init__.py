"""The cases of `cumla smoke`: every op in every format, at the shapes of DeepSeek's models.

A case runs its op on paged caches that were filled in an untidy order, and judges the result by
the op's definition in float64 over the same rows laid out in order (see `storage`), of which some
numbers are computed a second, plain way (see `base.plain_attention`).
"""

from __future__ import annotations

from cumla.cli.cases.base import Case, Outcome
from cumla.cli.cases.cache import CacheCase, CodecCase
from cumla.cli.cases.decode import DenseCase, MergeCase, SparseCase, V4Case
from cumla.cli.cases.prefill import MhaCase, PrefillCase
from cumla.cli.cases.storage import Storages
from cumla.fp8 import ScaleRule
from cumla.layouts import BF16, FP16, LAYOUTS, V4_FP8, V32_FP8, KVLayout

__all__ = ["Case", "Outcome", "Storages", "all_cases"]


def all_cases() -> list[Case]:
    """Every case, in the order of the report."""
    codec: list[tuple[KVLayout, ScaleRule | None]] = [
        (BF16, None),
        (FP16, None),
        (V32_FP8, "flashmla"),
        (V32_FP8, "v4"),
        (V32_FP8, "raw"),
        (V4_FP8, "flashmla"),
        (V4_FP8, "v4"),
    ]
    cases: list[Case] = [CodecCase(layout, rule) for layout, rule in codec]
    cases += [CacheCase(layout) for layout in LAYOUTS]
    cases += [
        DenseCase(layout, h_q, s_q)
        for layout in (BF16, FP16)
        for h_q in (128, 16)
        for s_q in (1, 2)
    ]
    cases += [SparseCase(layout, s_q) for layout in (BF16, FP16, V32_FP8) for s_q in (1, 2)]
    cases += [V4Case(64, "CSA", 512), V4Case(128, "CSA", 1024)]
    cases += [V4Case(64, "HCA", 1024), V4Case(128, "HCA", 1024)]
    cases += [MergeCase()]
    for layout in (BF16, FP16):
        cases += [PrefillCase(layout, 576, 128, 2048), PrefillCase(layout, 512, 64, 640)]
    for backward in (False, True):
        for layout in (BF16, FP16):
            cases += [
                MhaCase(layout, 192, 16, 16, causal=True, backward=backward),
                MhaCase(layout, 128, 16, 4, causal=False, backward=backward),
            ]
    return cases
