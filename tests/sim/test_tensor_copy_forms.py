"""Forms of tensor copies in PTX that are taken, and those that are refused by name."""

from __future__ import annotations

import pytest

from cumla import sim
from sim.bulk_kit import alone

REFUSED = [
    ("cp.async.bulk.tensor.3d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
     " [%r1], [%rd1, {%r2, %r2, %r2}], [%r3], {%h1};", ".im2col"),
    ("cp.async.bulk.tensor.2d.shared::cluster.global.tile::gather4.mbarrier::complete_tx::bytes"
     " [%r1], [%rd1, {%r2, %r2, %r2, %r2, %r2}], [%r3];", ".tile::gather4"),
    ("cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group"
     " [%rd1, {%r2, %r2, %r2, %r2, %r2}], [%r3];", ".tile::scatter4"),
    ("cp.async.bulk.tensor.3d.global.shared::cta.im2col_no_offs.bulk_group"
     " [%rd1, {%r2, %r2, %r2}], [%r3];", ".im2col_no_offs"),
    ("cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes.cta_group::1"
     " [%r1], [%rd1, {%r2, %r2}], [%r3];", ".cta_group::1"),
    ("cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
     " [%r1], [%rd1, {%r2}], [%r3];", "with 1 coordinates"),
    ("cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes.multicast::cluster"
     " [%r1], [%rd1, {%r2, %r2}], [%r3], %h1;", "form"),
    ("cp.reduce.async.bulk.tensor.1d.global.shared::cta.exch.bulk_group [%rd1, {%r2}], [%r3];",
     "form"),
]  # fmt: skip
TAKEN = [
    "cp.async.bulk.prefetch.tensor.2d.L2.global [%rd1, {%r2, %r2}];",
    "cp.async.bulk.prefetch.tensor.3d.L2.global.tile.L2::cache_hint [%rd1, {%r2, %r2, 0}], %rd2;",
    "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes"
    ".multicast::cluster.L2::cache_hint [%r1], [%rd1, {%r2}], [%r3], %h1, %rd2;",
    "cp.async.bulk.tensor.1d.shared::cta.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
    " [%r1], [%rd1, {%r2}], [%r3], %rd2;",
    "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint"
    " [%rd1, {%r2, -4}], [%r3], %rd2;",
    "cp.reduce.async.bulk.tensor.2d.global.shared::cta.xor.bulk_group.L2::cache_hint"
    " [%rd1, {%r2, %r2}], [%r3], %rd2;",
    "prefetch.tensormap [%rd1];", "prefetch.param.tensormap [%rd1];",
    "fence.proxy.tensormap::generic.acquire.gpu [%rd1], 128;",
    "fence.proxy.tensormap::generic.release.cta;",
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_forms_that_are_refused(text, reason):
    with pytest.raises(sim.UnsupportedPTX) as caught:
        sim.load(alone(text))
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", TAKEN)
def test_forms_that_are_taken(text):
    sim.load(alone(text))
