"""The checks of test_on_gpu without a GPU: on some of the cases, over a stand-in for the driver."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import pytest
import test_dense_decode as dense
import test_sparse_decode as sparse

from cumla import layouts
from gpu import op_checks
from gpu.stand_in import StandIn

MODULES = {"dense": dense, "sparse": sparse}
both_ops = pytest.mark.parametrize("op", MODULES)


@pytest.fixture(params=["sm_80", "sm_90"])
def machine(request: pytest.FixtureRequest) -> Iterator[StandIn]:
    made = StandIn(targets=(request.param,))
    with made.in_place():
        yield made


@pytest.fixture
def ampere() -> Iterator[StandIn]:
    made = StandIn(targets=("sm_80",))
    with made.in_place():
        yield made


DENSE = [
    dense.Case(1, (65, 0, 130), s_q=2, h_q=3, h_kv=3, page_size=53, causal=True, strided=True),
    dense.Case(2, (200,), h_q=63, page_size=61, half="float16"),
]
SPARSE = [
    sparse.Case(1, "V32_FP8", sparse.Pool(120, 53, 70, "bs"), s_q=2, h_q=3, sink=True),
    sparse.Case(
        2,
        "V4_FP8",
        sparse.Pool(90, 61, 65, "b"),
        b=1,
        h_q=16,
        extra=sparse.Pool(40, 2, 7, "bs"),
        sink=True,
        view="int8",
        strided=True,
    ),
]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense(machine: StandIn, case: dense.Case) -> None:
    op_checks.decode_case(machine, dense, case)


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_sparse(machine: StandIn, case: sparse.Case) -> None:
    op_checks.decode_case(machine, sparse, case)


def test_plans(ampere: StandIn) -> None:
    op_checks.plans(ampere, dense, DENSE[0], {"num_parts": 4, "block_size": 16, "overhead": 0})
    op_checks.plans(ampere, sparse, SPARSE[0], {"split_blocks": 1, "block_size": 16})


def test_a_fixed_plan_keeps_a_requests_bits(
    ampere: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = dense.make
    short = dense.Case(7, (0, 70, 29, 150, 64), s_q=2, h_q=3, page_size=53, causal=True)
    monkeypatch.setattr(dense, "make", lambda case: make(short))
    ampere.checks = ("memory",)
    op_checks.a_fixed_plan_keeps_a_requests_bits(ampere)


def test_merging(ampere: StandIn) -> None:
    op_checks.merging(ampere, ml_dtypes.bfloat16)


@pytest.mark.parametrize("layout", [layouts.FP16, layouts.V4_FP8], ids=str)
def test_paged_cache(ampere: StandIn, layout: layouts.KVLayout) -> None:
    op_checks.paged_cache(ampere, layout)


@both_ops
def test_nothing_is_hidden(ampere: StandIn, op: str) -> None:
    op_checks.nothing_is_hidden(ampere, MODULES[op])


@both_ops
def test_graphs(ampere: StandIn, op: str) -> None:
    ampere.checks = ("memory",)
    op_checks.graphs(ampere, MODULES[op])


@both_ops
def test_user_streams(ampere: StandIn, op: str) -> None:
    ampere.checks = ("memory",)
    op_checks.user_streams(ampere, MODULES[op])
