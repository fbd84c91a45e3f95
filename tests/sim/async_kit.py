"""The instructions of asynchronous copies and mbarriers, ready to be run with numbers."""

from __future__ import annotations

import numpy as np

from sim.waves import Bound

MODES = ("eager", "late", "random")


def copy_op(size, *rest, cache="ca", extra="", **options):
    return Bound(
        f"cp.async.{cache}.shared.global{extra}", "[%r1]", "[%rd1]", size, *rest, **options
    )


class Groups:
    """The instructions that end and wait for groups."""

    def __init__(self, **options):
        self.commit = Bound("cp.async.commit_group", **options)
        self.wait_all = Bound("cp.async.wait_all", **options)
        self.options = options

    def wait(self, c, newest):
        Bound("cp.async.wait_group", newest, **self.options)(c, newest)


def shared_of(wave, slot):
    start = slot * wave.shared_stride
    return wave.memory.shared.data[start : start + wave.shared_size]


def barrier_kit(**options):
    return (
        Bound("mbarrier.init.shared.b64", "[%r1]", "%r2", **options),
        Bound("mbarrier.arrive.shared.b64", "_", "[%r1]", **options),
        Bound("mbarrier.test_wait.parity.shared.b64", "%p1", "[%r1]", "%r2", **options),
        Bound("mbarrier.try_wait.parity.shared.b64", "%p1", "[%r1]", "%r2", **options),
    )


def arrive_op(noinc=False, **options):
    word = ".noinc" if noinc else ""
    return Bound(f"cp.async.mbarrier.arrive{word}.shared.b64", "[%r1]", **options)


def bound(text, *operands, **options):
    return Bound(f"mbarrier.{text}", *operands, **options)


class Kit:
    """The instructions that most tests need."""

    def __init__(self, **options):
        self.init = bound("init.shared.b64", "[%r1]", "%r2", **options)
        self.inval = bound("inval.shared.b64", "[%r1]", **options)
        self.arrive = bound("arrive.shared.b64", "%rd1", "[%r1]", **options)
        self.arrive_n = bound("arrive.shared::cta.b64", "%rd1", "[%r1]", "%r2", **options)
        self.sink = bound("arrive.release.cta.shared::cta.b64", "_", "[%r1]", **options)
        self.drop = bound("arrive_drop.shared.b64", "%rd1", "[%r1]", "%r2", **options)
        self.hold = bound("arrive.noComplete.shared.b64", "%rd1", "[%r1]", "%r2", **options)
        self.arrive_tx = bound("arrive.expect_tx.shared.b64", "%rd1", "[%r1]", "%r2", **options)
        self.drop_tx = bound("arrive_drop.expect_tx.shared.b64", "%rd1", "[%r1]", "%r2", **options)
        self.expect = bound("expect_tx.relaxed.cta.shared::cta.b64", "[%r1]", "%r2", **options)
        self.finish = bound("complete_tx.relaxed.cta.shared::cta.b64", "[%r1]", "%r2", **options)
        self.test = bound("test_wait.shared.b64", "%p1", "[%r1]", "%rd1", **options)
        self.test_parity = bound("test_wait.parity.shared.b64", "%p1", "[%r1]", "%r2", **options)
        self.wait = bound("try_wait.shared.b64", "%p1", "[%r1]", "%rd1", **options)
        self.wait_parity = bound(
            "try_wait.parity.acquire.cta.shared::cta.b64", "%p1", "[%r1]", "%r2", "%r3", **options
        )
        self.count = bound("pending_count.b64", "%r1", "%rd1", **options)

    def pending(self, state):
        return int(self.count.op.run(np.atleast_1d(state))[0])


def flag(c, result):
    """A predicate as one bool for each lane."""
    assert result.dtype == np.bool_
    return c.full(result).tolist()
