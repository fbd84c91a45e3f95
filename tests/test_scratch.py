"""Scratch memory: reused by name within a thread, never shared between names or threads."""

from __future__ import annotations

import threading

import numpy as np

from cumla.scratch import scratch


def test_an_array_is_as_asked_for() -> None:
    array = scratch("test.shape", (3, 5), np.float64)
    assert array.shape == (3, 5)
    assert array.dtype == np.float64
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert scratch("test.empty", (0, 4), np.float32).shape == (0, 4)


def test_a_name_gives_the_same_memory_again() -> None:
    first = scratch("test.again", (4, 8), np.float32)
    assert np.shares_memory(first, scratch("test.again", (8,), np.int64))
    larger = scratch("test.again", (100, 100), np.float32)
    assert not np.shares_memory(first, larger)
    assert np.shares_memory(larger, scratch("test.again", (2,), np.uint8))


def test_names_do_not_share() -> None:
    assert not np.shares_memory(
        scratch("test.one", (9,), np.float32), scratch("test.two", (9,), np.float32)
    )


def test_threads_do_not_share() -> None:
    mine = scratch("test.thread", (64,), np.float32)
    theirs = []
    thread = threading.Thread(target=lambda: theirs.append(scratch("test.thread", (64,), "f4")))
    thread.start()
    thread.join()
    assert not np.shares_memory(mine, theirs[0])


def test_a_large_array_is_not_kept() -> None:
    size = 9 << 20
    first = scratch("test.large", (size,), np.uint8)
    assert not np.shares_memory(first, scratch("test.large", (size,), np.uint8))
