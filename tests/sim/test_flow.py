"""The order of basic blocks, and which registers are live where."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cumla.sim.program.flow import Block, _loop_order, live_registers


def reaches(successors: list[list[int]], within: set[int]) -> list[set[int]]:
    """For each node, the nodes that a path of at least one edge leads to."""
    found = []
    for node in range(len(successors)):
        seen: set[int] = set()
        work = [node]
        while work:
            for s in successors[work.pop()]:
                if s in within and s not in seen:
                    seen.add(s)
                    work.append(s)
        found.append(seen)
    return found


@st.composite
def graphs(draw: st.DrawFn) -> list[list[int]]:
    size = draw(st.integers(1, 9))
    node = st.integers(0, size - 1)
    return [draw(st.lists(node, max_size=3, unique=True)) for _ in range(size)]


def check_order(successors: list[list[int]], order: list[int], nodes: set[int]) -> None:
    """Each loop is a contiguous range, all else is topological, and so on inside the loops."""
    ranges = [n for n in order if n in nodes]
    at = {n: i for i, n in enumerate(ranges)}
    reach = reaches(successors, nodes)
    loops = {frozenset(m for m in nodes if m in reach[n] and n in reach[m]) for n in nodes}
    for n in nodes:
        for s in successors[n]:
            if s in nodes and n not in reach[s]:
                assert at[n] < at[s]
    for loop in loops - {frozenset()}:
        places = sorted(at[n] for n in loop)
        assert places == list(range(places[0], places[0] + len(loop)))
        if len(loop) > 1:
            check_order(successors, order, set(loop) - {ranges[places[0]]})


@settings(max_examples=300)
@given(graphs())
def test_order_keeps_loops_together(successors: list[list[int]]) -> None:
    order = _loop_order(successors)
    reachable = reaches(successors, set(range(len(successors))))[0] | {0}
    assert sorted(order) == sorted(reachable)
    assert order[0] == 0
    check_order(successors, order, reachable)


def test_order_of_a_loop_with_an_exit_that_comes_first_in_the_text() -> None:
    # 0 -> 2; 2 -> 1 (exit) or 3; 3 -> 2
    assert _loop_order([[2], [], [1, 3], [2]]) == [0, 2, 3, 1]


def test_live_registers_of_a_loop() -> None:
    # block 0 writes a; block 1 reads a, writes b and loops; block 2 reads b
    blocks = [Block(0, 1, [1]), Block(1, 2, [1, 2]), Block(2, 3, [-1])]
    live = live_registers(blocks, [set(), {0}, {1}], [{0}, {1}, set()])
    assert live == [set(), {0}, {1}]
