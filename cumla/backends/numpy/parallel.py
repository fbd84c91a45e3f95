"""Threads: independent pieces of an op run side by side, each with a single-threaded BLAS.

A piece is some gathering, decoding and softmax around two matrix products. A BLAS that splits
each product over the cores leaves them idle in between, so each thread takes whole pieces instead.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

from threadpoolctl import ThreadpoolController

from cumla.checks import bad_value

Item = TypeVar("Item")
Result = TypeVar("Result")

ENVIRONMENT_VARIABLE = "CUMLA_NUM_THREADS"


def num_threads() -> int:
    """How many threads an op uses: CUMLA_NUM_THREADS, else the CPUs this process may run on."""
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not text:
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if not text.isdigit() or int(text) < 1:
        raise bad_value(
            ENVIRONMENT_VARIABLE, repr(text), "it must be an integer >= 1", "Unset it or set 2."
        )
    return int(text)


@cache
def _executor(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="cumla")


@cache
def _blas() -> ThreadpoolController:
    # Looking for the loaded BLAS libraries takes milliseconds, so it is done once.
    return ThreadpoolController().select(user_api="blas")


if hasattr(os, "register_at_fork"):
    # A forked child has none of its parent's threads, so it must not inherit their pool.
    os.register_at_fork(after_in_child=_executor.cache_clear)

_blas_lock = threading.Lock()
_blas_users = 0
_blas_limit: list[object] = []


@contextmanager
def _single_threaded_blas() -> Iterator[None]:
    """BLAS runs in the calling thread alone until the last concurrent user of this leaves."""
    global _blas_users
    with _blas_lock:
        _blas_users += 1
        if _blas_users == 1:
            _blas_limit.append(_blas().limit(limits=1))
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if _blas_users == 0:
                _blas_limit.pop().restore_original_limits()  # type: ignore[attr-defined]


def run_ordered(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    consume: Callable[[Item, Result], None],
) -> None:
    """Call `function` on every item, in parallel, and `consume` on each result in item order.

    `consume` runs in the calling thread, so it needs no lock, and what it adds up does not depend
    on the number of threads. At most two results a thread wait for it: memory stays bounded.
    """
    threads = min(num_threads(), len(items))
    with _single_threaded_blas():
        if threads <= 1:
            for item in items:
                consume(item, function(item))
            return
        executor = _executor(num_threads())
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                if len(waiting) == 2 * threads:
                    done, future = waiting.popleft()
                    consume(done, future.result())
                waiting.append((item, executor.submit(function, item)))
            while waiting:
                done, future = waiting.popleft()
                consume(done, future.result())
        finally:
            # Only after an error is anything left; let it end before the inputs may change.
            for _, future in waiting:
                if not future.cancel():
                    future.exception()
