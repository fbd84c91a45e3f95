"""Races by definition: a graph of what each thread did, and reachability in it.

Nodes are what single threads did, in the order in which it was simulated; `before[n]` is the set
of nodes, as bits of an integer, from which a path of ordering edges leads to n. Nothing is shared
with the detector: no stamps, no clocks, no states of memory, every pair of accesses is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field

STRONG = ("volatile", "relaxed", "acquire", "release", "acq_rel")


@dataclass
class Did:
    """An access of one thread to some bytes."""

    node: int
    event: int
    thread: tuple[int, int]  # block in the grid, thread in it
    space: str
    offset: int  # in the arena; shared memory of different blocks is apart
    nbytes: int
    kind: str  # "read", "write", "atomic", "copy" or "exit"
    order: str
    scope: str
    # What is asynchronous counts as done after any of these nodes; None: it is not asynchronous.
    ends: list[int] | None = None
    proxy: bool = False  # whether it goes through the asynchronous proxy


@dataclass
class Look:
    """What a strong read of a place finds: who wrote it, and who released what there."""

    writes: list[tuple[Did, set[int]]] = field(default_factory=list)  # the bytes that are left
    released: list[tuple[int, bool, int]] = field(default_factory=list)  # node, wide, block
    writer: tuple[int, int] | None = None
    by_release: list[tuple[int, bool, int]] = field(default_factory=list)


def strong(did: Did) -> bool:
    return did.kind == "atomic" or did.order in STRONG


def wide(did: Did) -> bool:
    return did.order == "volatile" or did.scope != "cta"


def morally_strong(a: Did, b: Did) -> bool:
    if not (strong(a) and strong(b)):
        return False
    return a.thread[0] == b.thread[0] or (wide(a) and wide(b))


class Program:
    """Everything that happened so far, told in the detector's terms."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.before: list[int] = []
        self.flow: list[int] = []  # the same without synchronisation through memory
        self.last: dict[tuple[int, int], int] = {}
        self.accesses: dict[tuple[str, int], list[Did]] = {}  # by space and group of 8 bytes
        self.looks: dict[tuple[str, int], Look] = {}
        self.observed: dict[tuple[int, int], list[Did]] = {}  # node of a write, byte: lookers
        self.fences: dict[int, bool] = {}  # node: whether wide
        self.proxy_fences: list[tuple[int, str]] = []  # node, the space or ""
        self.seen: dict[tuple[int, int], list[tuple[int, bool]]] = {}
        self.keys: dict[int, list[int]] = {}
        self.told: dict[int, list[int]] = {}  # by key: fences before relaxed arrivals
        # Two accesses and the bytes; those where the second is sure to race, see `access`.
        self.races: list[tuple[Did, Did, set[int], set[int]]] = []

    # The graph

    def node(self, after: list[int], flow: list[int] | None = None) -> int:
        n = len(self.before)
        reach = 0
        for m in after:
            reach |= self.before[m] | 1 << m
        self.before.append(reach)
        reach = 0
        for m in after if flow is None else flow:
            reach |= self.flow[m] | 1 << m
        self.flow.append(reach)
        return n

    def step(self, thread: tuple[int, int], *also: int) -> int:
        """The thread's next node, after its last and after others that memory orders before."""
        mine = [self.last[thread]] if thread in self.last else []
        self.last[thread] = self.node(mine + list(also), mine)
        return self.last[thread]

    def join(self, threads: list[tuple[int, int]], past: list[tuple[int, int]]) -> None:
        """threads meet; those of past, which have exited, are waited for as well."""
        n = self.node([self.last[t] for t in [*threads, *past] if t in self.last])
        for thread in threads:
            self.last[thread] = n

    # Synchronisation

    def barrier(self, threads: list[tuple[int, int]], past: list[tuple[int, int]]) -> None:
        for thread in threads:
            self._acquire(thread, True)
        self.join(threads, past)

    def fence(self, threads: list[tuple[int, int]], scope: str, order: str) -> None:
        for thread in threads:
            if order != "release":
                self._acquire(thread, scope != "cta")
            if order != "acquire":
                self.fences[self.step(thread)] = scope != "cta"

    def proxy_fence(self, threads: list[tuple[int, int]], limit: str) -> None:
        self.proxy_fences += [(self.step(thread), limit) for thread in threads]

    def _acquire(self, thread: tuple[int, int], is_wide: bool) -> None:
        seen = self.seen.get(thread, [])
        now = [node for node, needs in seen if is_wide or not needs]
        self.seen[thread] = [(node, needs) for node, needs in seen if needs and not is_wide]
        if now:
            self.step(thread, *now)

    def release(self, threads: list[tuple[int, int]], key: int) -> None:
        for thread in threads:
            self.keys.setdefault(key, []).append(self.step(thread))

    def release_fenced(self, thread: tuple[int, int], key: int) -> None:
        reach = self.flow[self.step(thread)]
        fences = [node for node, is_wide in self.fences.items() if is_wide and reach >> node & 1]
        self.told.setdefault(key, []).extend(fences)

    def acquire(self, threads: list[tuple[int, int]], key: int) -> None:
        for thread in threads:
            flow = [self.last[thread]] if thread in self.last else []
            flow += self.keys.get(key, [])
            self.last[thread] = self.node(flow + self.told.get(key, []), flow)

    # Accesses

    def known(self, a: Did, did: Did, fenced: bool) -> bool:
        """Whether a, or if it is asynchronous its end, happens before did.

        fenced: if a is of the generic proxy and did is not, a proxy fence of their space, or of
            all, must be between them.
        """
        ends = [a.node] if a.ends is None else a.ends
        reach = self.before[did.node]
        if fenced and did.proxy and not a.proxy:
            return any(
                self.before[fence] >> n & 1
                for fence, limit in self.proxy_fences
                if reach >> fence & 1 and did.space.startswith(limit)
                for n in ends
            )
        return any(reach >> n & 1 for n in ends)

    def ordered(self, a: Did, did: Did) -> bool:
        return self.known(a, did, a.kind != "read")

    def looked(self, a: Did, did: Did, byte: int) -> bool:
        """Whether somebody saw what a wrote in the byte, and that happens before did."""
        lookers = self.observed.get((a.node, byte), [])
        return any(z is did or self.known(z, did, True) for z in lookers)

    def access(self, dids: list[Did]) -> None:
        """What the lanes of one instruction do, lane after lane."""
        for did in dids:
            did.node = self.step(did.thread)
            for old in self._near(did):
                if old.kind != "read" or did.kind != "read":
                    self._compare(old, did)
            for place in self._groups(did):
                self.accesses.setdefault(place, []).append(did)
            self._through_memory(did)

    def end(self, did: Did, threads: list[tuple[int, int]]) -> None:
        """A block of these threads ends, and with it the memory that did has the bytes of.

        What its own threads did in it they know.
        """
        did.node = self.node([self.last[t] for t in threads if t in self.last])
        for old in self._near(did):
            if old.thread[0] != did.thread[0] or old.ends is not None:
                self._compare(old, did)

    def _compare(self, old: Did, did: Did) -> None:
        """Note the bytes of old and did in which they race.

        A write that happens before one that was seen is not ordered with who saw that, so it may
        be reported; but it cannot be seen any more, so it need not be. Neither need what happens
        before an asynchronous access whose end happens before did: that memory orders the three
        of them may be thought, though nothing says so.
        """
        bytes_ = self._overlap(old, did)
        if not bytes_ or morally_strong(old, did) or self.ordered(old, did):
            return
        bytes_ = {at for at in bytes_ if not self.looked(old, did, at)}
        sure = {at for at in bytes_ if not self._replaced(old, did, at)}
        if bytes_:
            self.races.append((old, did, bytes_, sure))

    def _replaced(self, a: Did, did: Did, byte: int) -> bool:
        for b in self._near(a):
            if byte not in self._overlap(a, b) or not a.node < b.node < did.node:
                continue
            if self.ordered(a, b) and self.looked(b, did, byte):
                return True
            if (
                b.ends is not None
                and (self.ordered(a, b) or self.looked(a, b, byte))
                and (self.ordered(b, did) or self._replaced(b, did, byte))
            ):
                return True
        return False

    @staticmethod
    def _groups(did: Did) -> list[tuple[str, int]]:
        first, last = did.offset >> 3, (did.offset + did.nbytes - 1) >> 3
        return [(did.space, at) for at in range(first, last + 1)]

    def _near(self, did: Did) -> list[Did]:
        """Accesses that may overlap, in their order."""
        places = self._groups(did)
        if len(places) == 1:
            return self.accesses.get(places[0], [])
        found = {id(a): a for place in places for a in self.accesses.get(place, [])}
        return sorted(found.values(), key=lambda a: a.node)

    @staticmethod
    def _overlap(a: Did, b: Did) -> set[int]:
        if a.space != b.space:
            return set()
        low, high = max(a.offset, b.offset), min(a.offset + a.nbytes, b.offset + b.nbytes)
        return set(range(low, high))

    def _through_memory(self, did: Did) -> None:
        if not strong(did):
            if did.kind != "read":
                for (space, _), look in self.looks.items():
                    if space == did.space:
                        for _, left in look.writes:
                            left -= set(range(did.offset, did.offset + did.nbytes))
            return
        block = did.thread[0]
        place = (did.space, did.offset)
        bytes_ = set(range(did.offset, did.offset + did.nbytes))
        look = self.looks.get(place, Look())
        if did.kind != "write":
            for write, left in look.writes:
                if morally_strong(write, did):
                    for at in left & bytes_:
                        self.observed.setdefault((write.node, at), []).append(did)
        if did.ends is not None:
            # It is not known what an asynchronous reduction releases, so it is to be nothing.
            look.writes.append((did, bytes_))
            self.looks[place] = look
            return
        if did.kind != "write":
            found = [
                (node, is_wide and b != block)
                for node, is_wide, b in look.released
                if b == block or (is_wide and wide(did))
            ]
            if did.order in ("acquire", "acq_rel"):
                if found:
                    self.step(did.thread, *(node for node, _ in found))
            else:
                self.seen.setdefault(did.thread, []).extend(found)
        if did.kind == "read":
            return
        mine = []
        if did.order in ("release", "acq_rel"):
            mine = [(did.node, wide(did), block)]
        else:
            reach = self.flow[did.node]
            for node, is_wide in self.fences.items():
                if reach >> node & 1:
                    mine.append((node, is_wide and wide(did), block))
        all_of_it = (did, bytes_)
        if did.kind == "write":
            old = look.by_release if look.writer == did.thread else []
            fresh = Look([all_of_it], old + mine, did.thread)
            fresh.by_release = old + mine if did.order == "release" else old
            self.looks[place] = fresh
        else:
            self.looks[place] = Look(
                [*look.writes, all_of_it], look.released + mine, look.writer, look.by_release
            )

    # The ends of asynchronous accesses

    def landed(self, dids: list[Did], thread: tuple[int, int]) -> None:
        """A thread knows that these are done."""
        self._end(dids, self.step(thread))

    def completed(self, dids: list[Did], key: int) -> None:
        """Whoever acquires the key knows that these are done."""
        self.keys.setdefault(key, []).append(self.node([]))
        self._end(dids, self.keys[key][-1])

    @staticmethod
    def _end(dids: list[Did], node: int) -> None:
        for did in dids:
            assert did.ends is not None
            did.ends.append(node)
