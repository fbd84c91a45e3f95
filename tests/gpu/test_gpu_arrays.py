"""The ops on CuPy arrays, down to the backend: what is checked, where results go, what is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from naive import same_bits

import cumla
from cumla import ArgumentError, ArgumentTypeError, BackendUnavailable, backends
from cumla.backends.arrays import Arrays
from gpu.calls import CALLS, DECODES, ints
from gpu.numpy_there import NumpyThere, moved
from gpu.stand_in import StandIn, cupy

every_call = pytest.mark.parametrize("name", CALLS)
every_decode = pytest.mark.parametrize("name", DECODES)


@pytest.fixture
def driver() -> Iterator[StandIn]:
    made = StandIn(targets=("sm_80", "sm_90"))
    with made.in_place():
        yield made


@pytest.fixture
def backend(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> NumpyThere:
    made = NumpyThere(driver)
    monkeypatch.setitem(backends._loaded, "cupy", made)
    return made


@every_call
def test_results_are_cupys(name: str, driver: StandIn, backend: NumpyThere) -> None:
    op, arguments, results = CALLS[name]()
    found = op(**moved(driver, arguments))
    for one, want, (shape, dtype) in zip(found, op(**arguments), results.values(), strict=True):
        assert isinstance(one, cupy.ndarray)
        assert (one.shape, one.dtype) == (shape, dtype)
        assert same_bits(driver.numpy(one), want)
    # Nobody waited, nothing was copied, and only results were allocated.
    assert (driver.waits, driver.uploads) == (0, 0)
    assert len(driver.allocations) == len(results)


@every_call
def test_results_go_where_the_caller_says(name: str, driver: StandIn, backend: NumpyThere) -> None:
    op, arguments, results = CALLS[name]()
    given = {}
    for one, (shape, dtype) in results.items():
        wide = cupy.empty((*shape[:-1], shape[-1] + 8), dtype)
        given[one] = wide[..., 8:]
    if name == "mha_backward":
        # Interleaved halves of one array share no memory.
        both = cupy.empty((7, 2, 40), np.dtype("u2")).view(results["dk"][1])
        given |= {"dk": both[..., :24], "dv": both[..., 24:]}
    before = len(driver.allocations)
    found = op(**moved(driver, arguments), **given)
    assert all(one is given[other] for one, other in zip(found, results, strict=True))
    for one, want in zip(found, op(**arguments), strict=True):
        assert same_bits(driver.numpy(one), want)
    assert len(driver.allocations) == before
    assert driver.waits == 0


@every_call
def test_stream_and_device_are_the_calls(name: str, driver: StandIn, backend: NumpyThere) -> None:
    op, arguments, _ = CALLS[name]()
    found = op(**moved(driver, arguments, device=1), stream=77)
    ((_, stream, device),) = backend.asked
    assert (stream, device) == (77, 1)
    assert all(one.data.device_id == 1 for one in found)
    assert (driver.device, [one.ptr for one in driver.streams]) == (0, [0])
    with pytest.raises(ArgumentTypeError, match=r"^stream: got 's'"):
        op(**moved(driver, arguments), stream="s")
    assert len(backend.asked) == 1


def test_the_arrays_decide_the_backend(driver: StandIn, backend: NumpyThere) -> None:
    on_gpu = cupy.empty(3, np.float32)
    for name in ("numpy", "cupy"):
        with cumla.use_backend(name):
            assert Arrays(x=on_gpu).backend is backend
            assert Arrays(x=np.zeros(3)).backend is backends.load_backend(name)
    with backends.oracle():
        assert Arrays(x=on_gpu).backend is backend


@every_call
def test_a_gpu_that_cannot_be_used(
    name: str, driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No silent fallback to the CPU, and the message says what is missing and what to do."""
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    op, arguments, results = CALLS[name]()
    first = next(iter(results))
    out = driver.array(np.full(results[first][0], 7, results[first][1]))
    with pytest.raises(BackendUnavailable, match=r": it is on a GPU, .*CUDA_VISIBLE_DEVICES.*cpu"):
        op(**moved(driver, arguments), **{first: out})
    assert (driver.numpy(out) == 7).all()


# --------------------------------------------------------------------- what is not looked at


def test_values_on_a_gpu_are_not_looked_at(driver: StandIn, backend: NumpyThere) -> None:
    """To look would wait for the GPU; the same calls are refused for NumPy arrays."""
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("dense_bf16", {"cache_seqlens": ints(17, 1000)}),
        ("dense_bf16", {"cache_seqlens": ints(-1, 48)}),
        ("dense_bf16", {"block_table": ints([0, 77, 1], [2, 1, 5])}),
        ("sparse_v4", {"topk_length": ints(-3, 71)}),
        ("sparse_v4", {"extra_topk_length": ints(8, 7)}),
        ("prefill", {"topk_length": ints(0, 7, 3, 6)}),
        ("mha", {"cu_seqlens_q": ints(0, 5, 4)}),
        ("mha_backward", {"cu_seqlens_k": ints(1, 7, 7)}),
    ]
    backend._run = lambda op, problem: None  # type: ignore[method-assign]
    for name, change in wrong:
        op, arguments, _ = CALLS[name]()
        with pytest.raises(ArgumentError, match=f"^{next(iter(change))}: got"):
            op(**arguments | change)
        op(**moved(driver, arguments | change))
    assert driver.waits == 0


SHAPES: list[tuple[str, str, Any]] = [
    ("dense_bf16", "q", np.zeros((2, 2, 4, 575), np.float16)),
    ("dense_bf16", "q", np.zeros((2, 2, 3, 576), DECODES["dense_bf16"]()[1]["q"].dtype)),
    ("dense_bf16", "kv_cache", np.zeros((6, 16, 2, 577), np.float16)),
    ("dense_bf16", "block_table", ints([0, 3, 1])),
    ("dense_bf16", "block_table", np.zeros((2, 3), np.int64)),
    ("dense_bf16", "block_table", np.zeros((2, 6), np.int32)[:, ::2]),
    ("dense_bf16", "cache_seqlens", ints(1, 2, 3)),
    ("dense_bf16", "causal", 1),
    ("dense_bf16", "softmax_scale", -1.0),
    ("dense_bf16", "plan", "plan"),
    ("sparse_v4", "kv_cache", np.zeros((4, 8, 1, 600), np.uint8)),
    ("sparse_v4", "kv_cache", np.zeros((4, 8, 1, 592), np.uint8)[..., :584]),
    ("sparse_v4", "indices", np.zeros((2, 2, 70), np.int32)),
    ("sparse_v4", "indices", np.zeros((2, 1, 0), np.int32)),
    ("sparse_v4", "topk_length", ints(3, 4, 5)),
    ("sparse_v4", "attn_sink", np.zeros(4, np.float32)),
    ("sparse_v4", "extra_kv_cache", np.zeros((2, 5, 1, 656), np.uint8)),
    ("prefill", "kv", np.zeros((9, 2, 576), np.float16)),
    ("mha", "cu_seqlens_k", ints(0, 7)),
    ("mha_backward", "lse", np.zeros((9, 3), np.float32)),
    ("merge", "outs", [np.zeros((2, 1, 3, 512), np.float32), np.zeros((2, 1, 3, 511), np.float32)]),
]


@pytest.mark.parametrize(("name", "argument", "wrong"), SHAPES)
def test_shapes_dtypes_and_strides_are_checked(
    name: str, argument: str, wrong: Any, driver: StandIn, backend: NumpyThere
) -> None:
    op, arguments, _ = CALLS[name]()
    with pytest.raises((ArgumentError, ArgumentTypeError)) as on_cpu:
        op(**arguments | {argument: wrong})
    with pytest.raises(type(on_cpu.value)) as on_gpu:
        op(**moved(driver, arguments | {argument: wrong}))
    assert str(on_gpu.value) == str(on_cpu.value)
    assert not backend.asked


@every_call
def test_bad_results(name: str, driver: StandIn, backend: NumpyThere) -> None:
    op, arguments, results = CALLS[name]()
    on_gpu = moved(driver, arguments)
    argument, (shape, dtype) = next(iter(results.items()))
    first = on_gpu.get("q", on_gpu.get("outs", [None])[0])
    wrong: list[tuple[Any, str]] = [
        (cupy.empty(shape, np.float64), "got dtype float64"),
        (cupy.empty((*shape, 1), dtype), "dimensions"),
        (cupy.empty((*shape[:-1], shape[-1] + 1), dtype), "got shape"),
        (cupy.ndarray(shape, dtype, cupy.empty(shape, dtype).data, (0,) * len(shape)), "strides"),
        (cupy.ndarray(shape, dtype, first.data), "shares memory"),
        (np.empty(shape, dtype), "on the CPU"),
    ]
    for value, match in wrong:
        with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}: .*{match}"):
            op(**on_gpu, **{argument: value})
    assert not backend.asked


def test_memory_that_is_shared_or_only_close(driver: StandIn, backend: NumpyThere) -> None:
    """Ranges that overlap need not share an element; negative strides go down from the pointer."""
    op, arguments, results = CALLS["dense_bf16"]()
    on_gpu = moved(driver, arguments)
    shape, dtype = results["out"]
    size = int(np.prod(shape))
    memory = cupy.empty(2 * size, dtype)
    q = on_gpu["q"]
    in_q = cupy.ndarray(q.shape, q.dtype, memory.data)
    assert q.size > size
    begin = q.size * 2
    backend._run = lambda op, problem: None  # type: ignore[method-assign]

    def out_at(offset: int) -> Any:
        return cupy.ndarray(shape, dtype, memory.data + offset)

    op(**on_gpu | {"q": in_q}, out=cupy.empty(shape, dtype))
    op(**on_gpu | {"q": in_q[::-1]}, out=out_at(begin))
    for offset in (0, begin - 2):
        with pytest.raises(ArgumentError, match=r"^out: .*shares memory with q"):
            op(**on_gpu | {"q": in_q[::-1]}, out=out_at(offset))
    # A small one, before the address of q's first element and after its last byte.
    lse = cupy.ndarray(results["lse"][0], np.float32, memory.data)
    with pytest.raises(ArgumentError, match=r"^lse: .*shares memory with q"):
        op(**on_gpu | {"q": in_q[::-1]}, lse=lse)
    op(**on_gpu | {"q": in_q[:0:-1, :, ::-1]} | _first_request(on_gpu), lse=lse[:1])
    # In turn: bytes of the one, bytes of the other.
    both = cupy.empty((*shape[:-1], 576 + 512), dtype)
    op(**on_gpu | {"q": both[..., :576]}, out=both[..., 576:])
    with pytest.raises(ArgumentError, match=r"^out: .*shares memory with q"):
        op(**on_gpu | {"q": both[..., :576]}, out=both[..., 575:-1])


def _first_request(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name][:1] for name in ("block_table", "cache_seqlens")}


@every_decode
def test_pages_begin_where_16_bytes_can_be_read(
    name: str, driver: StandIn, backend: NumpyThere
) -> None:
    op, arguments, _ = DECODES[name]()
    on_gpu = moved(driver, arguments)
    for pool in ("kv_cache", "extra_kv_cache"):
        if pool in on_gpu:
            pages = on_gpu[pool]
            memory = cupy.empty(len(pages) * pages.strides[0] + 16, np.uint8)
            for offset, fits in ((16, True), (8, False), (2, False)):
                there = memory.data + offset
                changed = cupy.ndarray(pages.shape, pages.dtype, there, pages.strides)
                if fits:
                    driver.write(changed, driver.numpy(pages))
                    op(**on_gpu | {pool: changed})
                    continue
                with pytest.raises(ArgumentError, match=rf"^{pool}: .*multiple of 16"):
                    op(**on_gpu | {pool: changed})


@every_call
def test_all_arrays_are_on_one_gpu(name: str, driver: StandIn, backend: NumpyThere) -> None:
    op, arguments, results = CALLS[name]()
    on_gpu = moved(driver, arguments)
    argument, (shape, dtype) = next(iter(results.items()))
    other = driver.array(np.zeros(shape, dtype), device=1)
    with pytest.raises(ArgumentError, match=rf"^{argument}: got an array on GPU 1; .* on GPU 0"):
        op(**on_gpu, **{argument: other})
    assert not backend.asked


# ---------------------------------------------------------------------- plans and workspaces


@every_decode
def test_plans_on_the_gpu_and_the_host(name: str, driver: StandIn, backend: NumpyThere) -> None:
    op, arguments, _ = DECODES[name]()
    on_gpu = moved(driver, arguments)
    backend._run = lambda op, problem: seen.append(problem)  # type: ignore[method-assign]
    seen: list[Any] = []
    for lengths in (ints(1, 2), driver.array(ints(1, 2))):
        plan = cumla.plan_decode(lengths, num_parts=3)
        op(**on_gpu, plan=plan)
        assert seen[-1].plan is plan
    three = cumla.plan_decode(driver.array(ints(1, 2, 3)), num_parts=3)
    with pytest.raises(ArgumentError, match=r"got a batch of 2; .* for a batch of 3"):
        op(**on_gpu, plan=three)
    assert driver.waits == 0
    with pytest.raises(ArgumentError, match=r"^plan: got a plan on a GPU; .*CPU"):
        op(**arguments, plan=plan)


@every_decode
def test_workspaces(name: str, driver: StandIn, backend: NumpyThere) -> None:
    op, arguments, _ = DECODES[name]()
    on_gpu = moved(driver, arguments)
    b, s_q, h_q, _ = arguments["q"].shape
    plan = cumla.plan_decode(driver.array(ints(1, 2)), num_parts=5)
    need = cumla.decode_workspace_bytes(b, s_q, h_q, 5)
    enough = cupy.empty(need, np.uint8)
    op(**on_gpu, workspace=enough, plan=plan)
    assert backend.asked[-1][0].workspace is enough
    op(**on_gpu, workspace=enough[:256])  # nobody knows yet what it needs
    wrong: list[tuple[Any, type[Exception], str]] = [
        (enough[1:], ArgumentError, f"got {need - 1} bytes; .*{need}"),
        (cupy.empty(need // 4, np.float32), ArgumentTypeError, "uint8"),
        (cupy.empty(2 * need, np.uint8)[::2], ArgumentError, "contiguous"),
        (np.empty(need, np.uint8), ArgumentError, "on the CPU"),
    ]
    for workspace, error, match in wrong:
        with pytest.raises(error, match=f"^workspace: .*{match}"):
            op(**on_gpu, workspace=workspace, plan=plan)
    assert len(backend.asked) == 2
