"""Control flow of a kernel: its basic blocks, the order in which they should run, live registers.

The order matters because the scheduler always runs the lanes that stand at the lowest block. Blocks
are numbered so that every loop is a contiguous range and everything else comes in topological
order (a weak topological order, after Bourdoncle): then lanes that took the longer way, or that go
round a loop once more, run before those that wait where the ways meet, and they meet there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cumla.sim.program.inline import FlatKernel
from cumla.sim.ptx.syntax import Instruction, Symbol

EXIT = -1


@dataclass(slots=True)
class Block:
    """A basic block: instructions first..last-1 of the flat kernel.

    Attributes:
        successors: numbers of the blocks that may follow; `EXIT` for the end of the kernel.
        taken: for a branch at the end, its target; for brx.idx, `targets` has them all.
        falls: the block after it in the text, or EXIT.
    """

    first: int
    last: int
    successors: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    falls: int = EXIT


def is_terminator(ins: Instruction) -> bool:
    return ins.opcode in ("bra", "brx", "ret", "exit")


def basic_blocks(kernel: FlatKernel) -> list[Block]:
    """The blocks, numbered in running order; block 0 is the entry."""
    instructions = kernel.instructions
    # Compilers leave labels that nobody jumps to; those begin no block.
    targets = {
        o.name
        for ins in instructions
        if ins.opcode == "bra"
        for o in ins.operands
        if isinstance(o, Symbol)
    }
    targets.update(*kernel.branch_targets.values())
    starts = {0, *(kernel.labels[label] for label in targets)}
    starts |= {ins.index + 1 for ins in instructions if is_terminator(ins)}
    bounds = sorted(s for s in starts if s < len(instructions))
    blocks = [
        Block(first, last)
        for first, last in zip(bounds, [*bounds[1:], len(instructions)], strict=True)
    ]
    at = {block.first: number for number, block in enumerate(blocks)}

    def block_of(label: str) -> int:
        return at.get(kernel.labels[label], EXIT)

    for number, block in enumerate(blocks):
        end = instructions[block.last - 1]
        block.falls = number + 1 if number + 1 < len(blocks) else EXIT
        if end.opcode == "bra":
            target = end.operands[0]
            assert isinstance(target, Symbol)
            block.targets = [block_of(target.name)]
        elif end.opcode == "brx":
            table = end.operands[1]
            assert isinstance(table, Symbol)
            block.targets = [block_of(label) for label in kernel.branch_targets[table.name]]
        elif end.opcode in ("ret", "exit"):
            block.targets = [EXIT]
        falls = [block.falls] if not is_terminator(end) or end.guard is not None else []
        block.successors = list(dict.fromkeys([*falls, *block.targets]))
    return _renumber(blocks)


def _renumber(blocks: list[Block]) -> list[Block]:
    order = _loop_order([[s for s in b.successors if s != EXIT] for b in blocks])
    new = {old: number for number, old in enumerate(order)}
    new[EXIT] = EXIT
    for old in order:
        block = blocks[old]
        block.successors = [new[s] for s in block.successors]
        block.targets = [new[t] for t in block.targets]
        block.falls = new.get(block.falls, EXIT)
    return [blocks[old] for old in order]


def _loop_order(successors: list[list[int]]) -> list[int]:
    """Reachable nodes in a weak topological order that starts with node 0."""
    result: list[int] = []
    # Work items are (nodes of a region, its entry); loops are opened by removing their header.
    work: list[tuple[set[int], int] | int] = [(_reachable(successors, 0), 0)]
    while work:
        item = work.pop()
        if isinstance(item, int):
            result.append(item)
            continue
        nodes, entry = item
        parts = _components(successors, nodes, entry)  # successors before predecessors
        for part in parts:
            if len(part) == 1:
                work.append(part[0])
                continue
            # The first node that the search met is the loop's header; what remains is searched
            # from the header's successors, as it may be in several pieces.
            header = part[0]
            rest = set(part) - {header}
            work.extend(_pieces(successors, rest, header))
            work.append(header)
    return result


def _pieces(
    successors: list[list[int]], nodes: set[int], header: int
) -> list[tuple[set[int], int] | int]:
    """A loop's body without its header, as regions to be ordered; last to run comes first."""
    order: list[tuple[set[int], int] | int] = []
    for part in _components(successors, nodes, *[s for s in successors[header] if s in nodes]):
        order.append(part[0] if len(part) == 1 else (set(part), part[0]))
    return order


def _reachable(successors: list[list[int]], entry: int) -> set[int]:
    seen = {entry}
    stack = [entry]
    while stack:
        for s in successors[stack.pop()]:
            if s not in seen:
                seen.add(s)
                stack.append(s)
    return seen


def _components(successors: list[list[int]], nodes: set[int], *entries: int) -> list[list[int]]:
    """Strongly connected components within `nodes` (Tarjan), successors first.

    The first node of each component is the one that the search entered it by.
    """
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    on_stack: set[int] = set()
    stack: list[int] = []
    found: list[list[int]] = []
    for root in [*entries, *sorted(nodes)]:
        if root in index:
            continue
        calls: list[tuple[int, int]] = [(root, 0)]
        while calls:
            node, position = calls.pop()
            if position == 0:
                index[node] = low[node] = len(index)
                stack.append(node)
                on_stack.add(node)
            following = [s for s in successors[node] if s in nodes]
            if position:
                low[node] = min(low[node], low[following[position - 1]])
            while position < len(following):
                s = following[position]
                position += 1
                if s not in index:
                    calls.append((node, position))
                    calls.append((s, 0))
                    break
                if s in on_stack:
                    low[node] = min(low[node], index[s])
            else:
                if low[node] == index[node]:
                    at = stack.index(node)
                    part = stack[at:]
                    del stack[at:]
                    on_stack.difference_update(part)
                    found.append(part)
    return found


def live_registers(
    blocks: list[Block], reads: list[set[int]], writes: list[set[int]]
) -> list[set[int]]:
    """For each block, the registers that are live where it begins.

    Args:
        reads: for each block, registers read before they are written in it.
        writes: for each block, registers that it surely writes.
    """
    live: list[set[int]] = [set(r) for r in reads]
    users: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for s in block.successors:
            if s != EXIT:
                users[s].append(number)
    work = list(range(len(blocks)))
    while work:
        number = work.pop()
        out: set[int] = set()
        for s in blocks[number].successors:
            if s != EXIT:
                out |= live[s]
        new = reads[number] | (out - writes[number])
        if new != live[number]:
            live[number] = new
            work.extend(users[number])
    return live
