"""All ops on a real GPU; skipped, with the reason, where there is none.

`pytest -m gpu` runs these alone. What they check runs without a GPU too, on a sample of the cases,
over a stand-in for the driver: test_on_stand_in.
"""

from __future__ import annotations

import inspect
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import test_dense_decode as dense
import test_sparse_decode as sparse
from comparison import DENSE_OUT, KV_SIZE, LSE_DECODE, SPARSE_OUT, assert_close
from naive import same_bits

import cumla
from gpu import op_checks
from gpu.machine import RealGpu, cupy, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

MODULES = {"dense": dense, "sparse": sparse}
both_ops = pytest.mark.parametrize("op", MODULES)


@pytest.fixture(scope="module")
def machine() -> RealGpu:
    return RealGpu()


@pytest.mark.parametrize("case", dense.CASES + dense.HARD, ids=str)
def test_dense(machine: RealGpu, case: dense.Case) -> None:
    op_checks.decode_case(machine, dense, case)


@pytest.mark.parametrize("case", sparse.CASES + sparse.HARD, ids=str)
def test_sparse(machine: RealGpu, case: sparse.Case) -> None:
    op_checks.decode_case(machine, sparse, case)


@pytest.mark.parametrize("how", dense.PLANS, ids=str)
@pytest.mark.parametrize("case", dense.HARD[:3], ids=str)
def test_dense_plans(machine: RealGpu, case: dense.Case, how: dict[str, int]) -> None:
    op_checks.plans(machine, dense, case, how)


@pytest.mark.parametrize("how", sparse.PLANS, ids=str)
@pytest.mark.parametrize("case", sparse.HARD[:3], ids=lambda case: str(case.seed))
def test_sparse_plans(machine: RealGpu, case: sparse.Case, how: dict[str, int]) -> None:
    op_checks.plans(machine, sparse, case, how)


def test_a_fixed_plan_keeps_a_requests_bits(machine: RealGpu) -> None:
    op_checks.a_fixed_plan_keeps_a_requests_bits(machine)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_merging(machine: RealGpu, dtype: type) -> None:
    op_checks.merging(machine, dtype)


@pytest.mark.parametrize("layout", cumla.layouts.LAYOUTS, ids=str)
def test_paged_cache(machine: RealGpu, layout: cumla.layouts.KVLayout) -> None:
    op_checks.paged_cache(machine, layout)


@both_ops
def test_nothing_is_hidden(machine: RealGpu, op: str) -> None:
    op_checks.nothing_is_hidden(machine, MODULES[op])


@both_ops
def test_graphs(machine: RealGpu, op: str) -> None:
    op_checks.graphs(machine, MODULES[op])


@both_ops
def test_user_streams(machine: RealGpu, op: str) -> None:
    op_checks.user_streams(machine, MODULES[op])


def test_the_last_gpu(machine: RealGpu) -> None:
    """Work goes where the arrays are, and the caller's device stays current."""
    last = cupy.cuda.runtime.getDeviceCount() - 1
    if last == 0:
        pytest.skip("there is one GPU only")
    inputs = dense.make(dense.Case(9, (700, 3), s_q=2, h_q=16, causal=True))
    want = op_checks.here(machine, cumla.dense_decode(**op_checks.there(machine, vars(inputs))))
    with cupy.cuda.Device(last):
        call = op_checks.there(machine, vars(inputs))
    found = cumla.dense_decode(**call)
    assert {one.device.id for one in found} == {last}
    assert cupy.cuda.runtime.getDevice() == 0
    with cupy.cuda.Device(last):
        for one, other in zip(op_checks.here(machine, found), want, strict=True):
            assert same_bits(one, other)


# ------------------------------------------------------------------------------ larger than CPU's


@pytest.mark.parametrize("h_q", [16, 128])
def test_a_large_dense_batch(machine: RealGpu, h_q: int) -> None:
    """Against the numpy backend in float32."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4097, 16).astype(np.int32)
    q = np.clip(rng.standard_normal((16, 2, h_q, 576), np.float32), -1, 1)
    cache = np.clip(rng.standard_normal((16 * 64, 64, 1, 576), np.float32) * KV_SIZE, -1, 1)
    arguments = {
        "q": q.astype(ml_dtypes.bfloat16),
        "kv_cache": cache.astype(ml_dtypes.bfloat16),
        "block_table": rng.permutation(16 * 64).astype(np.int32).reshape(16, 64),
        "cache_seqlens": lengths,
        "causal": True,
    }
    want = cumla.dense_decode(**arguments)
    found = cumla.dense_decode(**op_checks.there(machine, arguments))
    out, lse = op_checks.here(machine, found)
    assert_close("lse", lse, want[1], LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want[0], DENSE_OUT, dtype=ml_dtypes.bfloat16)


@pytest.mark.parametrize("layout", cumla.layouts.LAYOUTS, ids=str)
def test_a_large_sparse_batch(machine: RealGpu, layout: cumla.layouts.KVLayout) -> None:
    """Against the numpy backend in float32."""
    rng = np.random.default_rng(0)
    half = layout.compute_dtype
    kv = np.clip(rng.standard_normal((300, 64, 1, layout.d_qk), np.float32) * KV_SIZE, -1, 1)
    q = np.clip(rng.standard_normal((16, 2, 64, layout.d_qk), np.float32), -1, 1)
    arguments = {
        "q": q.astype(half),
        "kv_cache": cumla.pack_kv(kv.astype(half), layout, 64),
        "indices": rng.integers(-1, 300 * 64, (16, 2, 2048), np.int32),
        "topk_length": rng.integers(0, 2049, (16, 2)).astype(np.int32),
        "attn_sink": rng.standard_normal(64).astype(np.float32),
    }
    want = cumla.sparse_decode(**arguments)
    found = cumla.sparse_decode(**op_checks.there(machine, arguments))
    out, lse = op_checks.here(machine, found)
    assert_close("lse", lse, want[1], LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want[0], SPARSE_OUT, dtype=half)


# -------------------------------------------------------------------------------- other libraries


def test_torch_tensors(machine: RealGpu) -> None:
    """In and out without a copy, on torch's stream."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    inputs = dense.make(dense.Case(9, (700, 3), s_q=2, h_q=16, causal=True))
    want = inputs.run()

    def tensor(array: np.ndarray) -> object:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(array).cuda()

    call = {n: tensor(x) if isinstance(x, np.ndarray) else x for n, x in vars(inputs).items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    out = torch.empty((2, 2, 16, 512), dtype=torch.bfloat16, device="cuda")
    ways: list[dict[str, Any]] = [{}, {"stream": stream}]
    if "max_version" in inspect.signature(torch.Tensor.__dlpack__).parameters:
        # An older torch's capsules cannot say that they may be written to.
        ways.append({"out": out})
    for how in ways:
        found = cumla.dense_decode(**call, **how)
        assert found[0].dtype == torch.bfloat16
        assert found[0].is_cuda
        assert "out" not in how or found[0] is out
        host = [found[0].view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)]
        host.append(found[1].cpu().numpy())
        assert_close("lse", host[1], want[1], LSE_DECODE, dtype=np.float32)
        assert_close("out", host[0], want[0], DENSE_OUT, dtype=ml_dtypes.bfloat16)


def test_jax_arrays(machine: RealGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """In and out without a copy, in JAX's own array type."""
    # Else JAX takes three quarters of the memory when it is first used.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    inputs = dense.make(dense.Case(9, (700, 3), s_q=2, h_q=16, causal=True))
    want = inputs.run()
    call = {
        name: jax.device_put(one) if isinstance(one, np.ndarray) else one
        for name, one in vars(inputs).items()
    }
    out, lse = cumla.dense_decode(**call)
    assert isinstance(out, jax.Array)
    assert_close("lse", np.asarray(lse), want[1], LSE_DECODE, dtype=np.float32)
    assert_close("out", np.asarray(out), want[0], DENSE_OUT, dtype=ml_dtypes.bfloat16)
