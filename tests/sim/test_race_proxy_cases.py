"""The race detector on the asynchronous proxy and on clusters: small programs, and what it says."""

from __future__ import annotations

import numpy as np
import pytest

from cumla.sim.race.layout import SPECIAL, Layout
from cumla.sim.race.log import Log
from sim.race_programs import PART, STRIDE, Both

PEER = STRIDE + PART  # the first byte that programs use of the second block's memory
ALL = [0, 1, 32, 33]
NO_FENCE = "fence.proxy.async missing between them"
NO_BARRIER = "__syncthreads or another barrier missing between them"
READ = "the asynchronous read was not waited for"
COPY = "the asynchronous copy was not waited for"
NO_CLUSTER = "barrier.cluster, or an mbarrier of the other block, missing between them"
GONE = "the block may be gone before: barrier.cluster missing before its end"
BETWEEN = (
    "between blocks only a release (__threadfence before an atomic) and an acquire order accesses"
)


def write(gid, at=0, nbytes=4, order="weak", space="shared", kind="write"):
    return "access", [gid], space, [at], nbytes, kind, order, "gpu"


def read(gid, at=0, nbytes=4, order="weak", space="shared"):
    return write(gid, at, nbytes, order, space, "read")


def queue(gid, kind, at=0, name=11, space="shared", nbytes=4, proxy=True):
    return "asynchronous", [(gid, name, [at])], space, kind, nbytes, proxy


def fence(*gids, limit=""):
    return "proxy_fence", list(gids), limit


def waited(gids, event, name=11):
    return "queue_completed", gids, [name] * len(gids), event


def arrival(one, other):
    """A relaxed arrival after a fence."""
    fenced = ("fence", [one], "gpu", "release")
    return [fenced, ("release_fenced", [one], [9]), ("acquire", [other], [9])]


BARRIER = ("barrier", ALL)
FLAG = [
    ("fence", [0], "gpu", "acq_rel"),
    write(0, 512, order="relaxed", space="global"),
    read(32, 512, order="relaxed", space="global"),
    ("fence", [32], "gpu", "acq_rel"),
]

# Programs of two warps, and the hints of the races in them.
CASES = {
    "no fence": ([write(33), BARRIER, queue(0, "read")], {NO_FENCE}),
    "no fence, same thread": ([write(0), queue(0, "read")], {NO_FENCE}),
    "a fence before the write": ([fence(*ALL), write(33), BARRIER, queue(0, "read")], {NO_FENCE}),
    "a fence by others before the barrier": (
        [write(33), fence(0, 32), BARRIER, queue(0, "read")],
        {NO_FENCE},
    ),
    "a fence by others after the barrier": (
        [write(33), BARRIER, fence(1, 32, 33), queue(0, "read")],
        {NO_FENCE},
    ),
    "a fence by the writer": ([write(33), fence(33), BARRIER, queue(0, "read")], set()),
    "a fence by the issuer": ([write(33), BARRIER, fence(0), queue(0, "read")], set()),
    "a fence by somebody on the way": (
        [write(33), BARRIER, fence(1), BARRIER, queue(0, "write")],
        set(),
    ),
    "a fence, but no barrier": ([write(33), fence(33), queue(0, "read")], {NO_BARRIER}),
    "neither": ([write(33), queue(0, "read")], {NO_BARRIER}),
    "a fence of the space": (
        [write(33), fence(33, limit="shared"), BARRIER, queue(0, "read")],
        set(),
    ),
    "a fence of another space": (
        [write(33), fence(*ALL, limit="global"), BARRIER, queue(0, "read")],
        {NO_FENCE},
    ),
    "a fence of the space, too late for some": (
        [
            write(33), fence(33, limit="shared"), write(33, 4), fence(33, limit="global"),
            BARRIER, queue(0, "read"), queue(0, "read", 4),
        ],
        {NO_FENCE},
    ),
    "global memory, a fence of the space": (
        [
            write(33, space="global"), BARRIER, fence(0, limit="global"),
            queue(0, "read", space="global"),
        ],
        set(),
    ),
    "global memory, a fence of another space": (
        [
            write(33, space="global"), BARRIER, fence(0, limit="shared"),
            queue(0, "read", space="global"),
        ],
        {NO_FENCE},
    ),
    "both spaces, a fence of each": (
        [
            write(33), write(33, space="global"), fence(33, limit="shared"), BARRIER,
            fence(0, limit="global"), queue(0, "read"), queue(0, "read", space="global"),
        ],
        set(),
    ),
    "both spaces, one fence": (
        [
            write(33), write(33, space="global"), fence(33), BARRIER, queue(0, "read"),
            queue(0, "read", space="global"),
        ],
        set(),
    ),
    "a read needs no fence": ([read(33), BARRIER, queue(0, "write")], set()),
    "st.async needs no fence": ([write(33), BARRIER, queue(0, "write", proxy=False)], set()),
    "a copy of st.async": (
        [queue(0, "write", proxy=False), waited([0], 1), queue(0, "read", name=12)],
        {NO_FENCE},
    ),
    "a fence goes with a flag": ([write(0), fence(0), *FLAG, queue(32, "read")], set()),
    "a fence of the space goes with a flag": (
        [write(0), fence(0, limit="shared"), *FLAG, queue(32, "read")],
        set(),
    ),
    "a fence of another space goes with a flag": (
        [write(0), fence(0, limit="global"), *FLAG, queue(32, "read")],
        {NO_FENCE},
    ),
    "a fence of the space goes with a relaxed arrival": (
        [write(0), fence(0, limit="shared"), *arrival(0, 32), queue(32, "read")],
        set(),
    ),
    "a fence of another space goes with a relaxed arrival": (
        [write(0), fence(0, limit="global"), *arrival(0, 32), queue(32, "read")],
        {NO_FENCE},
    ),
    "a fence after the fence of the flag": (
        [write(0), FLAG[0], fence(0), *FLAG[1:], queue(32, "read")],
        {NO_FENCE},
    ),
    "a byte long since written": (
        [write(33, 0, 1), BARRIER, BARRIER, read(0), read(1), queue(0, "read")],
        {NO_FENCE},
    ),
    "a write that was seen": (
        [
            write(33, order="relaxed"), fence(33), read(0, order="relaxed"),
            queue(0, "read"),
        ],
        {NO_BARRIER},
    ),
    "a write that was seen before a fence": (
        [write(33, order="relaxed"), read(0, order="relaxed"), fence(0), queue(0, "read")],
        set(),
    ),
    "a read not waited for": ([queue(0, "read"), BARRIER, write(0)], {READ}),
    "a read waited for by another": ([queue(0, "read"), waited([33], 1), write(0)], {READ}),
    "a read waited for": ([queue(0, "read"), waited([33], 1), BARRIER, write(0)], set()),
    "a read of a queue that was waited for before": (
        [queue(0, "read"), queue(0, "read", 4), waited([0], 1), write(0), write(0, 4)],
        {READ},
    ),
    "a copy not waited for": ([queue(0, "write"), BARRIER, read(0)], {COPY}),
    "a copy that a phase tells of": (
        [
            queue(0, "write"), ("queue_completed_to", [7], [0], [11], 1), ("acquire", [33], [7]),
            read(33),
        ],
        set(),
    ),
    "a copy that a phase tells of, to another": (
        [
            queue(0, "write"), ("queue_completed_to", [7], [0], [11], 1), ("acquire", [33], [7]),
            read(0),
        ],
        {COPY},
    ),
    "two copies of one queue": ([queue(0, "write"), queue(0, "write")], {COPY}),
    "a queue reads what it is to write": ([queue(0, "write"), queue(0, "read")], {COPY}),
    "a queue writes what it is to read": ([queue(0, "read"), queue(0, "write")], {READ}),
    "a queue reads what it has written": (
        [queue(0, "write"), waited([0], 1), queue(0, "read")],
        set(),
    ),
    "two reductions": ([queue(0, "atomic"), queue(1, "atomic", name=12)], set()),
    "a reduction that a later one saw": (
        [
            queue(0, "atomic"), queue(1, "atomic", name=12), waited([1], 2, 12),
            write(1),
        ],
        set(),
    ),
    "a read at the end": (
        [queue(0, "read"), ("exit", ALL)],
        {f"{READ} before the block's end"},
    ),
    "a copy at the end": (
        [queue(0, "write"), ("exit", ALL)],
        {f"{COPY} before the block's end"},
    ),
    "a read at the end that one waited for": (
        [queue(0, "read"), waited([33], 1), ("exit", ALL[2:]), ("exit", ALL[:2])],
        set(),
    ),
    "a read of global memory at the end": (
        [queue(0, "read", space="global"), ("exit", ALL)],
        set(),
    ),
}  # fmt: skip


# Programs of a cluster of two blocks: lanes 64, 65, 96 and 97 are of the second.
def meet(one, two):
    """Two lanes tell each other what they know."""
    keys = [("release", [one, two], 9), ("acquire", [one, two], [9, 9])]
    return [*keys, ("acquire", [one], [9])]


OTHERS = [64, 65, 96, 97]
CLUSTER_CASES = {
    "another block's memory": ([write(64), read(0)], {NO_CLUSTER}),
    "another block's memory after a meeting": ([write(64), *meet(0, 64), read(0)], set()),
    "global memory": ([write(64, space="global"), read(0, space="global")], {BETWEEN}),
    "a queue of the other block": (
        [queue(64, "write"), ("barrier", [*ALL, *OTHERS]), read(0)],
        {COPY},
    ),
    "no fence": ([write(64), *meet(0, 64), queue(0, "read")], {NO_FENCE}),
    "a fence on the way": ([write(64), *meet(0, 64), fence(0), queue(0, "read")], set()),
    "a fence before": ([write(64), fence(64), *meet(0, 64), queue(0, "read")], set()),
    "a fence of the space before": (
        [write(64), fence(64, limit="shared"), *meet(0, 64), queue(0, "read")],
        set(),
    ),
    "a fence of another space before": (
        [write(64), fence(64, limit="global"), *meet(0, 64), queue(0, "read")],
        {NO_FENCE},
    ),
    "a fence that the second meeting hands on": (
        [
            write(64), fence(64), ("release", [64], 5), ("acquire", [0], [5]),
            ("release", [0], 6), ("acquire", [33], [6]), queue(33, "read"),
        ],
        set(),
    ),
    "a fence of the other block that a flag hands on": (
        [
            write(64), ("fence", [64], "gpu", "acq_rel"), ("release", [64], 5),
            ("acquire", [0], [5]), *FLAG[1:], read(32),
        ],
        set(),
    ),
    "the block ends": ([read(64), ("exit", ALL)], {GONE}),
    "the block ends after a strong write": ([write(64, order="relaxed"), ("exit", ALL)], {GONE}),
    "the block ends after a meeting": ([read(64), *meet(33, 64), ("exit", ALL)], set()),
    "the block ends when one has seen the write": (
        [write(64, order="relaxed"), read(1, order="relaxed"), ("exit", ALL)],
        set(),
    ),
    "the other block ends": ([read(64), ("exit", OTHERS)], set()),
    "a queue of the other block at the end": (
        [queue(64, "read"), ("exit", ALL)],
        {f"{READ} before the block's end"},
    ),
    "many reads, of which the last is known": (
        [read(65), read(64), *meet(0, 64), ("exit", ALL)],
        {GONE},
    ),
    "a byte at the end": ([write(64, 1, 1), ("exit", ALL)], {GONE}),
}  # fmt: skip


def check(both, events, hints):
    for event, *arguments in events:
        getattr(both, event)(*arguments)
    both.check()
    assert {race.hint for race in both.detector.races()} == hints


@pytest.mark.parametrize("name", CASES)
def test_in_a_block(name):
    check(Both(64, ALL, [[0]], cluster=1, proxied=True), *CASES[name])


@pytest.mark.parametrize("name", CLUSTER_CASES)
def test_in_a_cluster(name):
    check(Both(64, ALL, [[0, 1]], cluster=2, proxied=True), *CLUSTER_CASES[name])


EVERYONE = [*ALL, *OTHERS]
SHORT_LOGS = {
    "two queues, of which one was waited for": (
        1,
        [queue(0, "read"), queue(1, "read", name=12), BARRIER, waited([0], 2, 12), write(0)],
        {READ},
    ),
    "two strong writes, of which one was fenced": (
        1,
        [
            write(0, order="relaxed"), write(33, order="relaxed"), fence(33), BARRIER,
            queue(0, "read"),
        ],
        {NO_FENCE},
    ),
    "reads that another block does not know": (
        2,
        [read(0), read(33), ("barrier", EVERYONE), write(64)],
        {NO_CLUSTER},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT_LOGS)
def test_short_logs_hold_what_others_do_not_know(name, monkeypatch):
    monkeypatch.setattr("cumla.sim.race.detector._LOG_SHORT", 0)
    cluster, events, hints = SHORT_LOGS[name]
    check(Both(64, ALL, [[*range(cluster)]], cluster=cluster, proxied=True), events, hints)


@pytest.mark.parametrize("knowing", [OTHERS, OTHERS[1:]])
def test_logs_forget_what_all_know(knowing, monkeypatch):
    monkeypatch.setattr("cumla.sim.race.detector._LOG_SHORT", -3)
    both = Both(64, ALL, [[0, 1]], cluster=2, proxied=True)
    both.access([0, 33], "shared", [0, 0], 4, "read", "weak", "cta")
    assert both.detector._shared.logged() == 2
    both.barrier(EVERYONE)
    both.release([0, 64], 5)
    both.acquire([*ALL, *knowing], [5] * (4 + len(knowing)))
    assert both.detector._shared.logged() == 2
    both.barrier(ALL)
    assert both.detector._shared.logged() == (0 if knowing == OTHERS else 2)


def test_log_counts_what_it_holds():
    layout = Layout(1, 64)
    log = Log(layout, 1 << 20, 0)
    old, new = 1 << layout.stamp_shift, 2 << layout.stamp_shift
    strong, copy = old | layout.strengths, old | SPECIAL
    log.add(1, np.arange(4), np.array([old, strong, copy, old]))
    log.add(2, np.arange(4), np.array([new]))
    log.drop(1, True)
    assert len(log) == 6
    _, found = log.find(np.arange(4), np.zeros(4, np.int64))  # puts all of it in one place
    assert sorted(found.tolist()) == [strong, *[new] * 4, copy]
    log.drop(1, False)
    assert len(log) == 6  # as some of it is newer
    log.drop(2, False)
    assert len(log) == 1


def test_a_flag_of_an_earlier_wave():
    """It hands on a proxy fence, and so does a barrier after it."""
    both = Both(64, ALL, [[0], [1]], proxied=True)
    events = [write(0, space="global"), fence(0), *FLAG[:2]]
    later = [*FLAG[2:], BARRIER, queue(1, "read", space="global")]
    for event, *arguments in events:
        getattr(both, event)(*arguments)
    both.wave([1])
    check(both, later, set())


def test_threads_of_a_race():
    both = Both(64, ALL, [[0]], cluster=1, proxied=True)
    for event, *arguments in [write(33, 4), BARRIER, queue(1, "read", 4), queue(1, "write", 8)]:
        getattr(both, event)(*arguments)
    both.access([0], "shared", [8], 4, "read", "weak", "cta")
    both.exit(ALL)
    end = "the exit of block (0, 0, 0) at PTX line 1048577"
    texts = [str(race) for race in both.detector.races()]
    assert [text.split(": ", 1)[1].split(", nothing")[0] for text in texts] == [
        "write by thread (33, 0, 0) of block (0, 0, 0) at PTX line 2, "
        "then asynchronous read by thread (1, 0, 0) at PTX line 4",
        "asynchronous copy of block (0, 0, 0) at PTX line 5, "
        "then read by thread (0, 0, 0) at PTX line 6",
        f"asynchronous read of block (0, 0, 0) at PTX line 4, then {end}",
        f"asynchronous copy of block (0, 0, 0) at PTX line 5, then {end}",
    ]
