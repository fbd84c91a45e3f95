"""Threads: independent pieces of an op run side by side, each with a single-threaded BLAS.

A piece is some gathering, decoding and softmax around two matrix products. A BLAS that splits
each product over the cores leaves them idle in between, so each thread takes whole pieces instead.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from cumla.checks import bad_value

Item = TypeVar("Item")
Result = TypeVar("Result")

ENVIRONMENT_VARIABLE = "CUMLA_NUM_THREADS"
_MOST_THREADS = 1024


def num_threads() -> int:
    """How many threads an op uses: CUMLA_NUM_THREADS, else the CPUs this process may run on."""
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not text:
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    # len: int() refuses numbers of thousands of digits in words of its own.
    threads = int(text) if text.isdecimal() and len(text) < 10 else 0
    if not 1 <= threads <= _MOST_THREADS:
        raise bad_value(
            ENVIRONMENT_VARIABLE,
            repr(text),
            f"it must be an integer in [1, {_MOST_THREADS}]",
            "Unset it for as many as there are CPUs.",
        )
    return threads


@cache
def _executor(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="cumla")


class _SingleThreadedBlas:
    """A context, for any number of callers at once, in which every BLAS runs on one thread.

    threadpoolctl lets the first thread that limits an OpenBLAS set more limits, and quietly no
    other while that one lives. So we take that right for every change, whoever has it, and give it
    up at once: the caller may be any thread, and others in the process set limits too.
    """

    def __init__(self) -> None:
        # Looking for the loaded BLAS libraries takes milliseconds, so it is done once.
        self._libraries = ThreadpoolController().select(user_api="blas")
        self._limit: Any = None
        self._start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start_in_child)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._users = 0

    def _start_in_child(self) -> None:
        """A forked child has none of its parent's threads, and none of the calls they are in."""
        self._start()
        if self._limit is not None:
            self._restore()

    def __enter__(self) -> None:
        with self._lock:
            if self._limit is None:
                self._release_control()
                self._limit = self._libraries.limit(limits=1)
                self._release_control()
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._restore()

    def _restore(self) -> None:
        self._release_control()
        self._limit.restore_original_limits()
        self._release_control()
        self._limit = None

    def _release_control(self) -> None:
        for library in self._libraries.lib_controllers:
            # Older versions know no such right, and other libraries than OpenBLAS neither.
            release = getattr(library, "clear_controlling_thread", None)
            if release is not None:
                release(force=True)


_blas = _SingleThreadedBlas()

if hasattr(os, "register_at_fork"):
    # A forked child has none of its parent's threads, so it must not inherit their pool.
    os.register_at_fork(after_in_child=_executor.cache_clear)


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

    def work(item: Item) -> Result:
        # Of the thread that it runs in. What is inf or NaN shows in the results.
        with np.errstate(all="ignore"):
            return function(item)

    with _blas, np.errstate(all="ignore"):
        if threads <= 1:
            for item in items:
                consume(item, work(item))
            return
        executor = _executor(num_threads())
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                if len(waiting) == 2 * threads:
                    done, future = waiting.popleft()
                    consume(done, future.result())
                waiting.append((item, executor.submit(work, item)))
            while waiting:
                done, future = waiting.popleft()
                consume(done, future.result())
        finally:
            # Only after an error is anything left; let it end before the inputs may change.
            for _, future in waiting:
                if not future.cancel():
                    future.exception()
