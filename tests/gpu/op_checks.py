"""What the ops must do on CuPy arrays, for a real GPU and for the stand-in alike.

Each check takes the machine: `RealGpu`, or a `StandIn` that is in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import test_dense_decode as dense
import test_sparse_decode as sparse
from comparison import DENSE_OUT, KV_SIZE, LSE_DECODE, SPARSE_OUT, assert_close
from naive import same_bits
from numpy.typing import NDArray
from poison import poison

import cumla
from cumla import layouts
from cumla.backends import oracle
from gpu.calls import ints

Array = NDArray[Any]
Machine = Any


def there(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """NumPy arrays as CuPy's, with their strides and what is between; all else as it is."""
    return {
        name: machine.array(one) if isinstance(one, np.ndarray) else one
        for name, one in arguments.items()
    }


def here(machine: Machine, results: tuple[Any, ...]) -> list[Array]:
    return [machine.numpy(one) for one in results]


def decode_case(machine: Machine, tests: Any, case: Any) -> None:
    """A case of the CPU's tests: as the naive definition has it, twice the same bits."""
    inputs = tests.make(case)
    op = cumla.dense_decode if tests is dense else cumla.sparse_decode
    on_gpu = there(machine, vars(inputs))
    out, lse = here(machine, op(**on_gpu))
    tests.check(case, out, lse)
    for one, first in zip(here(machine, op(**on_gpu)), (out, lse), strict=True):
        assert same_bits(one, first)
    # Rows without a key are exact, not merely close.
    empty = np.isposinf(tests.reference(case)[1]).swapaxes(1, 2)
    assert (out[empty] == 0).all()


def plans(machine: Machine, tests: Any, case: Any, how: dict[str, int]) -> None:
    """Any cut, made on the GPU or the host, gives the result; both plans the same bits."""
    inputs = tests.make(case)
    op = cumla.dense_decode if tests is dense else cumla.sparse_decode
    size = how.get("block_size", 64)
    lengths = inputs.cache_seqlens if tests is dense else inputs.kv_lens(size)
    on_host = cumla.plan_decode(lengths, **how)
    on_gpu = cumla.plan_decode(machine.array(lengths), **{"num_parts": on_host.num_parts} | how)
    for name in ("kv_lens", "num_splits", "tile_scheduler_metadata"):
        assert (machine.numpy(getattr(on_gpu, name)) == getattr(on_host, name)).all(), name
    call = there(machine, vars(inputs))
    results = [here(machine, op(**call, plan=plan)) for plan in (on_host, on_gpu)]
    tests.check(case, *results[0])
    assert all(same_bits(one, other) for one, other in zip(*results, strict=True))


def a_fixed_plan_keeps_a_requests_bits(machine: Machine) -> None:
    """Alone, in another order, between other requests."""
    case = dense.Case(7, (0, 700, 129, 1500, 64), s_q=2, h_q=16, page_size=53, causal=True)
    inputs = dense.make(case)

    def run(requests: list[int]) -> list[Array]:
        part = inputs.only(requests)
        plan = cumla.plan_decode(part.cache_seqlens.copy(), split_blocks=3)
        return here(machine, cumla.dense_decode(**there(machine, vars(part)), plan=plan))

    out, lse = run([0, 1, 2, 3, 4])
    for requests in ([3], [4, 3, 2, 1, 0], [1, 1, 3]):
        part_out, part_lse = run(requests)
        assert same_bits(part_out, out[requests])
        assert same_bits(part_lse, lse[requests])


def merging(machine: Machine, dtype: Any) -> None:
    """Rows with a key in none, one or both parts; NaN beside -inf does not count."""
    rng = np.random.default_rng(3)
    shape = (3, 2, 5, 512)
    outs = [(rng.standard_normal(shape) * 0.3).astype(dtype) for _ in range(3)]
    lses = [(rng.standard_normal((3, 5, 2)) * 5).astype(np.float32) for _ in range(3)]
    for out, lse in zip(outs, lses, strict=True):
        empty = rng.random(lse.shape) < 0.4
        lse[empty] = -np.inf
        out[empty.swapaxes(1, 2)] = np.nan
    with oracle():
        want = cumla.merge_attention(outs, lses)
    given = [[machine.array(one) for one in part] for part in (outs, lses)]
    out, lse = here(machine, cumla.merge_attention(*given))
    assert_close("lse", lse, want[1], LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want[0], DENSE_OUT, dtype=dtype)


def paged_cache(machine: Machine, layout: layouts.KVLayout) -> None:
    """Appends, a fork, a copy on write: pages, rows and indices are a CPU's to the bit."""
    rng = np.random.default_rng(2)
    lengths = [70, 0, 33]
    kv = (rng.standard_normal((sum(lengths), layout.d_qk)) * KV_SIZE).astype(layout.compute_dtype)
    more = (rng.standard_normal((5, layout.d_qk)) * KV_SIZE).astype(layout.compute_dtype)
    positions = rng.integers(-1, 33, (2, 2, 9)).astype(np.int32)
    found = []
    for backend in ("numpy", "cupy"):
        moved = machine.array if backend == "cupy" else np.asarray
        back = machine.numpy if backend == "cupy" else np.asarray
        cache = cumla.PagedKVCache(layout, 12, 16, backend=backend)
        sequences = [cache.allocate() for _ in lengths]
        cache.append(sequences, moved(kv), lengths)
        cache.append([sequences[0]], moved(more[:3]), [3])
        fork = cache.fork(sequences[2])
        cache.append([fork, sequences[2]], moved(more), [1, 4])
        chosen = [sequences[0], fork]
        q = (np.arange(2 * 2 * 3 * layout.d_qk) % 7 - 3.0).reshape(2, 2, 3, layout.d_qk) / 9
        indices = cache.token_indices(chosen, moved(positions))
        out, lse = cumla.sparse_decode(moved(q.astype(layout.compute_dtype)), cache.pages, indices)
        rows = [back(cache.read(one)) for one in (*sequences, fork)]
        found.append((_bytes_of(machine, cache.pages), *rows, back(indices), back(out), back(lse)))
    *exact, want_out, want_lse = found[0]
    *same, out, lse = found[1]
    for number, (one, other) in enumerate(zip(same, exact, strict=True)):
        assert same_bits(one, other), number
    assert_close("lse", lse, want_lse, LSE_DECODE, dtype=np.float32)
    assert_close("out", out, want_out, SPARSE_OUT, dtype=layout.compute_dtype)


def _bytes_of(machine: Machine, pages: Any) -> Array:
    """All bytes of a pool, what lies between its pages included."""
    if isinstance(pages, np.ndarray):
        shape, strides = (len(pages), pages.strides[0]), (pages.strides[0], 1)
        return np.lib.stride_tricks.as_strided(pages.view(np.uint8), shape, strides).copy()
    memory = type(pages)((len(pages), pages.strides[0]), np.uint8, pages.data)
    found: Array = machine.numpy(memory)
    return found


def _serving_call(
    machine: Machine, tests: Any
) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
    """An op; its inputs; results and workspace, full of poison."""
    if tests is dense:
        case = dense.Case(5, (17, 700, 0), s_q=2, h_q=16, causal=True)
        op: Callable[..., Any] = cumla.dense_decode
    else:
        pool = sparse.Pool(900, 64, 130, "b")
        case = sparse.Case(5, "V32_FP8", pool, b=3, s_q=2, h_q=16, sink=True)
        op = cumla.sparse_decode
    inputs = vars(tests.make(case))
    out, lse = op(**inputs)
    size = cumla.decode_workspace_bytes(*inputs["q"].shape[:3], 8)
    given = {
        "out": machine.array(poison(np.empty_like(out))),
        "lse": machine.array(poison(np.empty_like(lse))),
        "workspace": machine.array(poison(np.empty(size, np.uint8))),
    }
    return op, there(machine, inputs), given


def _kv_lens(call: dict[str, Any]) -> Any:
    if "cache_seqlens" in call:
        return call["cache_seqlens"]
    return cumla.sparse_kv_lengths(*call["indices"].shape[::2], call["topk_length"])


def nothing_is_hidden(machine: Machine, tests: Any) -> None:
    """With results, workspace and a plan given: no allocation, no waiting, the same bits."""
    op, call, given = _serving_call(machine, tests)
    stream = machine.stream()
    want = here(machine, op(**call))
    with stream:
        plan = cumla.plan_decode(_kv_lens(call), num_parts=8)
        op(**call, **given, plan=plan)  # compiles
        stream.synchronize()
        for _ in range(2):
            with machine.nothing_hidden():
                op(**call, **given, plan=plan)
    results = here(machine, (given["out"], given["lse"]))
    assert_close("lse", results[1], want[1], LSE_DECODE, dtype=want[1].dtype)
    assert_close("out", results[0], want[0], DENSE_OUT, dtype=want[0].dtype)


def graphs(machine: Machine, tests: Any) -> None:
    """Plan and op in one CUDA graph: whenever it runs it takes the lengths of that moment."""
    op, call, given = _serving_call(machine, tests)
    lengths = call["cache_seqlens" if tests is dense else "topk_length"]
    stream = machine.stream()
    parts = 8
    # Once outside: a kernel that is loaded while a graph is captured would end the capture.
    with stream:
        op(**call, **given, plan=cumla.plan_decode(_kv_lens(call), num_parts=parts))
        stream.synchronize()
    with machine.capture(stream) as graph:
        plan = cumla.plan_decode(_kv_lens(call), num_parts=parts)
        op(**call, **given, plan=plan)
    for values in ([17, 700, 0], [0, 0, 0], [701, 1, 64]):
        if tests is sparse:
            values = [one % 131 for one in values]
        machine.write(lengths, ints(*values))
        machine.write(given["out"], poison(np.empty(given["out"].shape, given["out"].dtype)))
        graph.launch()
        found = here(machine, (given["out"], given["lse"]))
        again = cumla.plan_decode(_kv_lens(call), num_parts=parts)
        want = here(machine, op(**call, plan=again))
        assert all(same_bits(one, other) for one, other in zip(found, want, strict=True)), values


def user_streams(machine: Machine, tests: Any) -> None:
    """On the current stream, on one that is passed, in every form that one has."""
    op, call, given = _serving_call(machine, tests)
    want = here(machine, op(**call))
    stream = machine.stream()

    class Protocol:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, stream.ptr

    for form in (stream, stream.ptr, Protocol()):
        found = here(machine, op(**call, stream=form))
        assert all(same_bits(one, other) for one, other in zip(found, want, strict=True))
    with stream:
        op(**call, out=given["out"], lse=given["lse"])
    found = here(machine, (given["out"], given["lse"]))
    assert all(same_bits(one, other) for one, other in zip(found, want, strict=True))
