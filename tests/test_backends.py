"""Which backend runs, the oracle, and the threads under the numpy backend."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from naive import same_bits
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

import cumla
from cumla import ArgumentError, ArgumentTypeError, BackendUnavailable
from cumla.backends import availability, load_backend, oracle
from cumla.backends.numpy.parallel import num_threads, run_ordered

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUMLA_BACKEND", raising=False)
    monkeypatch.delenv("CUMLA_NUM_THREADS", raising=False)


def dense(length: int = 65) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((1, 2, 4, 576)).astype(BF16),
        "kv_cache": rng.standard_normal((length, 1, 1, 576)).astype(BF16),
        "block_table": np.arange(length, dtype=np.int32)[None],
        "cache_seqlens": np.array([length], np.int32),
    }


def run_python(code: str, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter, where a warning is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------ which backend


def test_numpy_is_the_default() -> None:
    assert cumla.get_backend() == "numpy"
    assert load_backend() is load_backend("numpy")
    assert load_backend().name == "numpy"


def test_the_environment_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "cupy", "sim"):
        monkeypatch.setenv("CUMLA_BACKEND", name)
        assert cumla.get_backend() == name
    monkeypatch.setenv("CUMLA_BACKEND", "")
    assert cumla.get_backend() == "numpy"


@pytest.mark.parametrize("name", ["torch", "NumPy", "numpy ", "numpy-float64", "oracle", "0"])
def test_a_name_of_no_backend_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"^name: .*numpy.*cupy.*sim"), cumla.use_backend(name):
        pass
    with pytest.raises(ArgumentError, match=r"^backend: "):
        load_backend(name)
    monkeypatch.setenv("CUMLA_BACKEND", name)
    out = np.full((1, 2, 4, 512), 7, BF16)
    for call in (cumla.get_backend, lambda: cumla.dense_decode(**dense(), out=out)):
        with pytest.raises(ArgumentError, match=r"^CUMLA_BACKEND: "):
            call()
    assert (out == 7).all()
    with cumla.use_backend("numpy"):  # the inner one rules
        assert cumla.get_backend() == "numpy"


@pytest.mark.parametrize("name", [None, 1, b"numpy", np.array("numpy"), ["numpy"]], ids=repr)
def test_a_name_is_a_string(name: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^name: "), cumla.use_backend(name):
        pass


@pytest.mark.parametrize("name", ["cupy", "sim"])
def test_no_silent_fallback(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot run here says so; it does not turn into numpy."""
    if availability()[name] is None:
        pytest.skip(f"{name} can run here")
    with pytest.raises(BackendUnavailable, match=name), cumla.use_backend(name):
        raise AssertionError("inside")
    assert cumla.get_backend() == "numpy"
    monkeypatch.setenv("CUMLA_BACKEND", name)
    out = np.full((1, 2, 4, 512), 7, BF16)
    with pytest.raises(BackendUnavailable, match=name):
        cumla.dense_decode(**dense(), out=out)
    assert (out == 7).all()


def test_availability_names_all_and_tells_why_not() -> None:
    found = availability()
    assert list(found) == ["numpy", "cupy", "sim"]
    assert found["numpy"] is None
    assert all(reason is None or name in reason for name, reason in found.items())


def test_use_backend_ends_with_its_block() -> None:
    with oracle():
        with cumla.use_backend("numpy"):
            assert cumla.get_backend() == "numpy"
            assert cumla.dense_decode(**dense())[0].dtype == BF16
        assert cumla.dense_decode(**dense())[0].dtype == np.float64
    assert cumla.dense_decode(**dense())[0].dtype == BF16
    with pytest.raises(KeyError), oracle():
        raise KeyError
    assert cumla.get_backend() == "numpy"


def test_use_backend_is_for_its_thread_only() -> None:
    seen: list[str] = []
    with oracle():
        thread = threading.Thread(target=lambda: seen.append(cumla.get_backend()))
        thread.start()
        thread.join()
    assert seen == ["numpy"]


def test_the_oracle_is_float64_and_unrounded() -> None:
    given = dense()
    rounded = cumla.dense_decode(**given)
    with oracle():
        exact = cumla.dense_decode(**given)
    assert [one.dtype for one in exact] == [np.float64, np.float64]
    # Not the float32 results in wider boxes, and within their rounding.
    assert not np.array_equal(exact[1], exact[1].astype(np.float32))
    np.testing.assert_allclose(rounded[1], exact[1], rtol=1e-5)
    np.testing.assert_allclose(rounded[0].astype(np.float64), exact[0], rtol=2**-8, atol=1e-6)
    out = np.full(exact[0].shape, np.nan)
    with oracle():
        got, _ = cumla.dense_decode(**given, out=out)
    assert got is out
    assert same_bits(out, exact[0])
    with oracle(), pytest.raises(ArgumentTypeError, match=r"^out: .*float64"):
        cumla.dense_decode(**given, out=out.astype(BF16))


# ------------------------------------------------------------------------------------ threads


def test_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = num_threads()
    assert 1 <= usual <= (os.cpu_count() or 1)
    for text, number in (("1", 1), ("3", 3), ("0004", 4), ("", usual)):
        monkeypatch.setenv("CUMLA_NUM_THREADS", text)
        assert num_threads() == number


BAD_NUMBERS = ["0", "-1", "two", "1.5", "2 threads", "0x2", "²", "9" * 5000]


@pytest.mark.parametrize("text", BAD_NUMBERS, ids=lambda text: text[:9])
def test_a_bad_number_of_threads_is_refused_before_anything_is_written(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dims = {"dq": 3, "dk": 3, "dv": 2}
    results: dict[str, Any] = {name: np.full((5, 2, d), 7, BF16) for name, d in dims.items()}
    bounds = np.array([0, 5], np.int32)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((5, 2, d)).astype(BF16) for d in (3, 3, 2))
    out, lse = cumla.mha_varlen(q, k, v, bounds, bounds)
    buffer = np.full((1, 2, 4, 512), 7, BF16)
    monkeypatch.setenv("CUMLA_NUM_THREADS", text)
    with pytest.raises(ArgumentError, match=r"^CUMLA_NUM_THREADS: "):
        cumla.dense_decode(**dense(), out=buffer)
    assert (buffer == 7).all()
    with pytest.raises(ArgumentError, match=r"^CUMLA_NUM_THREADS: "):
        cumla.mha_varlen_backward(v, q, k, v, out, lse, bounds, bounds, **results)
    for name, one in results.items():
        assert (one == 7).all(), f"{name} was written to"


@pytest.fixture(params=["1", "2", "5"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("CUMLA_NUM_THREADS", request.param)
    return int(request.param)


def test_results_are_consumed_in_order_by_the_caller(threads: int) -> None:
    """Though the last items are done first."""
    caller, workers, seen = threading.get_ident(), set(), []

    def work(item: int) -> int:
        workers.add(threading.get_ident())
        time.sleep(0.004 if item % 5 == 0 else 0)
        return item * item

    def consume(item: int, result: int) -> None:
        assert threading.get_ident() == caller
        seen.append((item, result))

    run_ordered(work, range(40), consume)
    assert seen == [(item, item * item) for item in range(40)]
    assert len(workers) <= threads
    assert (caller in workers) == (threads == 1)
    run_ordered(work, [], consume)
    assert len(seen) == 40


def test_items_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three items that wait for each other end only if three threads run them."""
    monkeypatch.setenv("CUMLA_NUM_THREADS", "3")
    barrier = threading.Barrier(3, timeout=30)
    run_ordered(lambda _: barrier.wait(), range(3), lambda item, result: None)


def test_few_results_wait(threads: int) -> None:
    """However slow the consumer: 2 a thread and those in work."""
    lock, alive, most = threading.Lock(), 0, 0

    def work(item: int) -> int:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        return item

    def consume(item: int, result: int) -> None:
        nonlocal alive
        time.sleep(0.001)
        with lock:
            alive -= 1

    run_ordered(work, range(100), consume)
    assert alive == 0
    assert most <= 2 * threads + 1


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["function", "consume"])
def test_an_error_comes_out_and_nothing_runs_on(threads: int, where: str) -> None:
    running, seen, lock = 0, [], threading.Lock()

    def work(item: int) -> int:
        nonlocal running
        with lock:
            running += 1
        time.sleep(0.002)
        with lock:
            running -= 1
        if where == "function" and item == 7:
            raise Broken(item)
        return item

    def consume(item: int, result: int) -> None:
        if where == "consume" and item == 7:
            raise Broken(item)
        seen.append(item)

    with pytest.raises(Broken, match=r"^7$"):
        run_ordered(work, range(1000), consume)
    assert running == 0, "a thread still works on arrays that the caller may now change"
    assert seen == list(range(7))
    run_ordered(work, [1, 2, 3], consume)
    assert seen[-3:] == [1, 2, 3]


def blas_threads() -> set[int]:
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


def fails(item: int) -> int:
    raise Broken(item)


def test_blas_gets_its_threads_back(threads: int) -> None:
    before = blas_threads()
    inside: list[set[int]] = []
    run_ordered(lambda _: blas_threads(), range(4), lambda _, found: inside.append(found))
    assert inside == [{1}] * 4
    assert blas_threads() == before
    with pytest.raises(Broken):
        run_ordered(fails, range(4), lambda item, result: None)
    assert blas_threads() == before


BLAS = """
import threading
from threadpoolctl import threadpool_info
from cumla.backends.numpy.parallel import run_ordered

def blas():
    found = {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}
    return found.pop() if len(found) == 1 else found

def call(function=blas, consume=lambda item, result: None):
    run_ordered(lambda item: function(), [0], consume)

def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    return thread

found = []
def note(item, result):
    found.append(result)

if blas() != 2:
    print("skip")
    raise SystemExit
"""


def blas_tale(code: str) -> list[int]:
    """What `code` has put in `found`, in a fresh process whose BLAS begins with two threads."""
    told = run_python(BLAS + code + "\nprint(*found)", OPENBLAS_NUM_THREADS="2")
    if told == "skip":
        pytest.skip("this BLAS does not run on two threads here")
    return [int(one) for one in told.split()]


def test_blas_is_limited_whichever_thread_calls() -> None:
    """Some BLAS libraries' limits belong to the first thread that sets one."""
    code = """
call(consume=note)
in_a_thread(lambda: call(consume=note)).join()
call(consume=note)
found.append(blas())
"""
    assert blas_tale(code) == [1, 1, 1, 2]


def test_blas_is_limited_within_a_limit_of_the_callers_own() -> None:
    code = """
from threadpoolctl import threadpool_limits
with threadpool_limits(2, user_api="blas"):
    call(consume=note)
    found.append(blas())
found.append(blas())
"""
    assert blas_tale(code) == [1, 2, 2]


def test_after_a_call_others_may_limit_blas_as_ever() -> None:
    """Other libraries in the process use threadpoolctl too."""
    code = """
from threadpoolctl import threadpool_limits
def limited():
    with threadpool_limits(1, user_api="blas"):
        found.append(blas())
call()
limited()
in_a_thread(call).join()
limited()
in_a_thread(limited).join()
found.append(blas())
"""
    assert blas_tale(code) == [1, 1, 1, 2]


def test_blas_gets_its_threads_back_when_the_last_of_two_calls_ends() -> None:
    """Which began last, and while the thread of the other is still alive."""
    code = """
first_is_in, second_is_in, first_is_out, end = (threading.Event() for _ in range(4))

def first():
    def work():
        first_is_in.set()
        second_is_in.wait(20)
    call(work)
    first_is_out.set()
    end.wait(20)

def second():
    def work():
        second_is_in.set()
        first_is_out.wait(20)
        return blas()
    first_is_in.wait(20)
    call(work, note)

threads = [in_a_thread(first), in_a_thread(second)]
threads[1].join()
found.append(blas())
end.set()
threads[0].join()
found.append(blas())
"""
    assert blas_tale(code) == [1, 2, 2]


def test_calls_from_many_threads_at_once() -> None:
    """They share the pool, and none changes another's result."""
    given = dense(1500)
    want = cumla.dense_decode(**given)
    results: list[tuple[Array, Array]] = []

    def call() -> None:
        for _ in range(3):
            results.append(cumla.dense_decode(**given))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(results) == 12
    for out, lse in results:
        assert same_bits(out, want[0])
        assert same_bits(lse, want[1])


def test_numpys_error_settings_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflow and NaN on the way are ours to deal with, in every thread."""
    given = dense(1500)
    given["kv_cache"][3] = np.nan
    given["kv_cache"][4] = 3e38
    for threads in ("1", "2"):
        monkeypatch.setenv("CUMLA_NUM_THREADS", threads)
        with np.errstate(all="raise"):
            out, lse = cumla.dense_decode(**given, softmax_scale=1e30)
        assert np.isnan(out.astype(np.float32)).all()
        assert (lse == np.inf).all()


def test_a_long_request_is_not_decoded_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch memory of a decode does not grow with the request."""
    monkeypatch.setenv("CUMLA_NUM_THREADS", "1")

    def most_memory(length: int) -> int:
        given = dense(64)
        given["block_table"] = np.zeros((1, length), np.int32)
        given["cache_seqlens"] = np.array([length], np.int32)
        tracemalloc.start()
        cumla.dense_decode(**given)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    most_memory(64)  # imports
    # Decoded at once, the keys alone would take 66 MiB.
    assert most_memory(30_000) < 4 << 20


# ------------------------------------------------------------------------------ the process


def test_import_loads_neither_cupy_nor_click() -> None:
    heavy = ("cupy", "cupy_backends", "click", "torch", "jax", "matplotlib", "pytest")
    code = f"import sys, cumla; print([one for one in {heavy!r} if one in sys.modules])"
    assert run_python(code) == "[]"


def test_import_starts_no_thread_and_reads_no_setting() -> None:
    code = "import threading, cumla; print(threading.active_count(), cumla.__version__)"
    found = run_python(code, CUMLA_BACKEND="nonsense", CUMLA_NUM_THREADS="nonsense")
    assert found == f"1 {cumla.__version__}"


FORK = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, about threads and fork
import numpy as np, ml_dtypes, cumla
from threadpoolctl import threadpool_info

def call():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 1, 4, 576)).astype(ml_dtypes.bfloat16)
    kv = rng.standard_normal((50, 64, 1, 576)).astype(ml_dtypes.bfloat16)
    table = np.arange(50, dtype=np.int32)[None]
    out, lse = cumla.dense_decode(q, kv, table, np.array([3200], np.int32))
    return out.tobytes() + lse.tobytes()

def blas():
    return [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]

BEFORE
child = os.fork()
if child == 0:
    import signal
    signal.alarm(30)  # a child that waits for its parent's threads ends here
    good = call() == want and call() == want and AFTER
    os._exit(0 if good else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), call() == want)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own() -> None:
    code = FORK.replace("BEFORE", "want = call()").replace("AFTER", "True")
    assert run_python(code, CUMLA_NUM_THREADS="2") == "0 True"


WHILE_ANOTHER_THREAD_COMPUTES = """
import threading, time
from cumla.backends.numpy.parallel import run_ordered
def inside():
    found = []
    run_ordered(lambda _: blas(), [0], lambda item, result: found.extend(result))
    return found
want = call()
normal = blas()
entered, leave = threading.Event(), threading.Event()
def wait(_):
    entered.set()
    leave.wait(60)
thread = threading.Thread(target=run_ordered, args=(wait, [0], lambda item, result: leave.wait(0)))
thread.start()
entered.wait(30)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_in_the_middle_of_a_call_works_too() -> None:
    code = FORK.replace("BEFORE", WHILE_ANOTHER_THREAD_COMPUTES)
    code = code.replace("AFTER", "blas() == normal and inside() == [1]")
    code += "leave.set()\nthread.join()\nprint(blas() == normal)\n"
    assert run_python(code, CUMLA_NUM_THREADS="2").split() == ["0", "True", "True"]


@pytest.mark.parametrize("call", [cumla.get_backend, availability], ids=lambda one: one.__name__)
def test_asking_is_cheap_and_changes_nothing(call: Callable[[], object]) -> None:
    assert call() == call()
    assert cumla.get_backend() == "numpy"
