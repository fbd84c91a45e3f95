"""cp.async.bulk.tensor and cp.reduce.async.bulk.tensor in tile mode.

PTX ISA "Data Movement and Conversion Instructions: Tensor copy". A copy reads its tensor map when
it is issued; coordinates and addresses are checked then too. Of what lies outside the tensor, a
load gives the fill of the map and a store writes nothing; either way an mbarrier counts the whole
box.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim import tensor_box
from cumla.sim.bulk import Target, Transfer
from cumla.sim.cohort import Cohort
from cumla.sim.errors import KernelTrap
from cumla.sim.isa.bulk import COMPLETES, GROUP, HINT, MULTICAST, REDUCTIONS
from cumla.sim.isa.bulk_places import Barrier, Place, multicast, tell
from cumla.sim.isa.table import Env, Op, Unsupported, needs
from cumla.sim.isa.tensormap import MapReader
from cumla.sim.memory.arena import WORDS
from cumla.sim.memory.sequence import atomic, element_dtype
from cumla.sim.memory.words import Words, of_global, refuse
from cumla.sim.ptx.syntax import Instruction, Vector
from cumla.sim.tensormap import TensorMap

Array = NDArray[Any]

DIMENSIONS = {f"{n}d": n for n in range(1, 6)}
OTHER_MODES = (
    "im2col", "im2col::w", "im2col::w::128", "im2col_no_offs", "tile::gather4", "tile::scatter4",
)  # fmt: skip
REFUSED = {"cta_group::1", "cta_group::2"}
SHARED_ALIGN = 128
# The PTX type that a reduction of elements of a data type works on, with and, or, xor on bits.
KINDS = {
    "uint32": "u32", "int32": "s32", "uint64": "u64", "int64": "s64", "float16": "f16",
    "bfloat16": "bf16", "float32": "f32", "float32_ftz": "f32", "float64": "f64",
}  # fmt: skip
BITS = {"uint32": "b32", "int32": "b32", "uint64": "b64", "int64": "b64"}


def tensor(ins: Instruction, env: Env) -> Op:
    """cp.async.bulk.tensor and cp.async.bulk.prefetch.tensor.

    .Nd.{shared::cta,shared::cluster}.global{.tile}.mbarrier::complete_tx::bytes
        {.multicast::cluster}{.L2::cache_hint} [dst], [map, {c}], [mbar]{, mask}{, policy};
    .Nd.global.shared::cta{.tile}.bulk_group{.L2::cache_hint} [map, {c}], [src]{, policy};
    .Nd.L2.global{.tile}{.L2::cache_hint} [map, {c}]{, policy}.
    """
    prefetches = ins.modifiers[2] == "prefetch"
    rank, rest = _head(ins, env, list(ins.modifiers[3 + prefetches :]))
    if prefetches:
        return _prefetch(ins, env, rank, rest)
    if rest[:2] == ["global", "shared::cta"] and rest[2:3] == [GROUP]:
        hinted = rest[3:] == [HINT]
        if rest[3:] and not hinted:
            raise Unsupported(f"form {ins.name!r}")
        return _store(ins, env, rank, hinted, None)
    if rest[:1] in (["shared::cta"], ["shared::cluster"]) and rest[1:3] == ["global", COMPLETES]:
        return _load(ins, env, rank, rest[0], rest[3:])
    raise Unsupported(f"form {ins.name!r}")


def reduce_tensor(ins: Instruction, env: Env) -> Op:
    """cp.reduce.async.bulk.tensor.Nd.global.shared::cta.op{.tile}.bulk_group{.L2::cache_hint}
    [map, {c}], [src]{, policy};
    """
    rank, rest = _head(ins, env, list(ins.modifiers[4:]))
    hinted = rest[4:] == [HINT]
    op = rest[2] if len(rest) > 3 else ""
    known = rest[:2] == ["global", "shared::cta"] and rest[3:4] == [GROUP]
    if not known or op not in REDUCTIONS["global"] or (rest[4:] and not hinted):
        raise Unsupported(f"form {ins.name!r}")
    return _store(ins, env, rank, hinted, op)


def _head(ins: Instruction, env: Env, rest: list[str]) -> tuple[int, list[str]]:
    """The rank, and the modifiers behind it without .tile; refuses other modes by name."""
    needs(env, 90, ins)
    for word in rest:
        if word in OTHER_MODES:
            raise Unsupported(f"mode .{word} of tensor copies; .tile is known")
        if word in REFUSED:
            raise Unsupported(f".{word} of tensor copies, of sm_100 and later")
    if not rest or rest[0] not in DIMENSIONS or rest.count("tile") > 1:
        raise Unsupported(f"form {ins.name!r}")
    return DIMENSIONS[rest[0]], [word for word in rest[1:] if word != "tile"]


def _operands(ins: Instruction, number: int, coordinates: int, rank: int) -> None:
    """Refuse any other number of operands, or of coordinates, which are this operand."""
    given = len(ins.operands)
    vector = ins.operands[coordinates] if given == number else None
    if not isinstance(vector, Vector):
        raise Unsupported(f"{ins.name!r} with {given} operands")
    if len(vector.items) != rank:
        raise Unsupported(f"{ins.name!r} with {len(vector.items)} coordinates")


def _prefetch(ins: Instruction, env: Env, rank: int, rest: list[str]) -> Op:
    if rest[:2] != ["L2", "global"] or rest[2:] not in ([], [HINT]):
        raise Unsupported(f"form {ins.name!r}")
    hinted = len(rest) == 3
    _operands(ins, 2 + hinted, 1, rank)
    maps = MapReader(ins, env, rank)

    def run(c: Cohort, address: Array, *coordinates: Array) -> None:
        for k, m in enumerate(maps.read(c, address)):
            _box(ins, env, c, k, m, _corner(ins, c, k, m, coordinates[:rank]), "read")

    return Op(run, ("addr", *("s32",) * rank, *("b64",) * hinted), cohort=True)


def _load(ins: Instruction, env: Env, rank: int, space: str, rest: list[str]) -> Op:
    optional = [*([MULTICAST] if space == "shared::cluster" else []), HINT]
    if rest != [word for word in optional if word in rest]:
        raise Unsupported(f"form {ins.name!r}")
    _operands(ins, 4 + len(rest), 2, rank)
    maps = MapReader(ins, env, rank)
    place, barrier = Place(ins, env, space, "write", SHARED_ALIGN), Barrier(ins, env, space)

    def run(c: Cohort, to: Array, address: Array, *more: Array) -> None:
        coordinates, (mbar, *more_operands) = more[:rank], more[rank:]
        offsets, bars = place.offsets(c, to), barrier.offsets(c, mbar)
        barrier.must_belong(c, offsets, bars)
        masks = c.full(more_operands[0]).tolist() if MULTICAST in rest else [None] * c.n
        to = c.full(to)
        for k, m in enumerate(maps.read(c, address)):
            source, assemble = _source(ins, env, c, k, m, _corner(ins, c, k, m, coordinates))
            pieces = tensor_box.shared_offsets(m, int(to[k]))
            place.room(c, k, int(to[k]), _extent(m, pieces))
            targets = []
            for at, bar in multicast(ins, c, k, int(offsets[k]), int(bars[k]), masks[k]):
                width = tensor_box.piece_bytes(m)
                words = Words(c.wave, "shared", at + pieces, width, env.check_memory)
                write = partial(_write_box, words, assemble)
                targets.append((Target(write, at // c.wave.shared_stride, bar), words))
            if not targets:
                continue
            barrier.must_live(c, k, targets)
            goals = [target for target, _ in targets]
            nbytes = tensor_box.box_bytes(m)
            transfer = Transfer(int(c.gids[k]), barrier.words, source, goals, nbytes)
            tell(ins, env, c, transfer, [words for _, words in targets])
            c.wave.bulk.issue(transfer)

    kinds: tuple[str, ...] = ("addr", "addr", *("s32",) * rank, "addr")
    kinds += (("u16",) if MULTICAST in rest else ()) + (("b64",) if HINT in rest else ())
    return Op(run, kinds, cohort=True)


def _store(ins: Instruction, env: Env, rank: int, hinted: bool, op: str | None) -> Op:
    """A store, or with `op` a reduction."""
    _operands(ins, 3 + hinted, 1, rank)
    maps = MapReader(ins, env, rank)
    taken = Place(ins, env, "shared::cta", "read", SHARED_ALIGN)

    def run(c: Cohort, address: Array, *more: Array) -> None:
        coordinates, start = more[:rank], more[rank]
        offsets, program = taken.offsets(c, start), c.full(start)
        for k, m in enumerate(maps.read(c, address)):
            corner = _corner(ins, c, k, m, coordinates)
            if min(corner) < 0 or "FLIP" in m.swizzle:
                raise _trap(ins, c, k, _no_store(m, corner))
            at, gid = int(program[k]), int(c.gids[k])
            pieces = tensor_box.shared_offsets(m, at)
            taken.room(c, k, at, _extent(m, pieces))
            width = tensor_box.piece_bytes(m)
            source = Words(c.wave, "shared", int(offsets[k]) + pieces, width, env.check_memory)
            bad = source.first_bad("read")
            if bad >= 0:
                raise refuse(ins, gid, source, bad, at + int(pieces[bad]), "read", _of(m, corner))
            target, write = _goal(ins, env, c, k, m, corner, op)
            transfer = Transfer(gid, None, source, [Target(write)], tensor_box.box_bytes(m))
            tell(ins, env, c, transfer, [target], "write" if op is None else "atomic")
            c.wave.bulk.issue(transfer)

    return Op(run, ("addr", *("s32",) * rank, "addr", *("b64",) * hinted), cohort=True)


def _no_store(m: TensorMap, corner: tuple[int, ...]) -> str:
    if min(corner) < 0:
        # CUDA C++ Programming Guide, "Tensor Memory Access", "Negative indices and out of bounds".
        return f"store of {_of(m, corner)[3:]}: only loads may begin at negative coordinates"
    return f"store with swizzle {m.swizzle}, which is for loads"


# Of one lane


def _corner(
    ins: Instruction, c: Cohort, lane: int, m: TensorMap, coordinates: tuple[Array, ...]
) -> tuple[int, ...]:
    """The coordinates of a lane's box, checked.

    The rule of `tensor_box.start_step` is measured for loads and stores; that reductions and
    prefetches follow it, too, is assumed.
    """
    corner = tuple(int(x[lane if x.shape[0] > 1 else 0]) for x in coordinates)
    step = tensor_box.start_step(m)
    if corner[0] % step:
        raise _trap(
            ins,
            c,
            lane,
            f"first coordinate {corner[0]} {_of(m, corner)} is {corner[0] * m.itemsize} bytes from "
            f"the tensor's origin; it must be a multiple of 16 bytes, which is {step} elements",
        )
    return corner


def _trap(ins: Instruction, c: Cohort, lane: int, message: str) -> KernelTrap:
    return KernelTrap(message, c.wave.where(ins, int(c.gids[lane])))


def _of(m: TensorMap, corner: tuple[int, ...]) -> str:
    shape = " x ".join(str(n) for n in m.box_dim)
    return f"of a box of {shape} {m.data_type} at coordinates {corner}"


def _extent(m: TensorMap, pieces: Array) -> int:
    """Bytes of shared memory from the box's address to the end of what it touches."""
    return int(pieces.max()) + tensor_box.piece_bytes(m)


def _box(
    ins: Instruction,
    env: Env,
    c: Cohort,
    lane: int,
    m: TensorMap,
    corner: tuple[int, ...],
    kind: str,
    widest: int = tensor_box.CHUNK,
) -> tuple[Words, tensor_box.Placement]:
    """The words of a box that are in bounds, checked, and how they lie."""
    at = tensor_box.place(m, corner, widest)
    words = of_global(c.wave, at.addresses.reshape(-1), at.width, env.check_memory)
    bad = words.first_bad(kind)
    if bad >= 0:
        rows, columns = np.flatnonzero(at.rows), np.flatnonzero(at.columns)
        row, column = divmod(bad, columns.shape[0])
        byte = int(columns[column]) * at.width
        where = tensor_box.where_in_tensor(m, corner, int(rows[row]), byte)
        detail = f"element {where} {_of(m, corner)}"
        address = int(at.addresses.reshape(-1)[bad])
        raise refuse(ins, int(c.gids[lane]), words, bad, address, kind, detail)
    return words, at


def _source(
    ins: Instruction, env: Env, c: Cohort, lane: int, m: TensorMap, corner: tuple[int, ...]
) -> tuple[Words, Callable[[Array], Array]]:
    """What a load reads, and a function that makes the bytes of the box of it."""
    words, at = _box(ins, env, c, lane, m, corner, "read")

    def assemble(data: Array) -> Array:
        box = tensor_box.filled(m, at.rows.shape[0])
        cells = box.view(WORDS[at.width])
        shape = (np.count_nonzero(at.rows), np.count_nonzero(at.columns))
        inside = tensor_box.converted(m, data).reshape(shape)
        if shape == cells.shape:
            cells[...] = inside
        else:
            cells[np.ix_(at.rows, at.columns)] = inside
        return box

    return words, assemble


def _write_box(words: Words, assemble: Callable[[Array], Array], data: Array) -> None:
    words.write(assemble(data).reshape(-1).view(WORDS[words.width]))


def _goal(
    ins: Instruction,
    env: Env,
    c: Cohort,
    lane: int,
    m: TensorMap,
    corner: tuple[int, ...],
    op: str | None,
) -> tuple[Words, Callable[[Array], None]]:
    """What a store writes, and a function that does so, given the bytes of the box."""
    if op is None:
        words, at = _box(ins, env, c, lane, m, corner, "write")

        def write(data: Array) -> None:
            words.write(_inside(data, at, WORDS[at.width]))

        return words, write
    kind = BITS.get(m.data_type) if op in ("and", "or", "xor") else KINDS.get(m.data_type)
    if kind not in REDUCTIONS["global"][op]:
        raise _trap(ins, c, lane, f"reduction .{op} of a tensor of {m.data_type}")
    assert kind is not None
    words, at = _box(ins, env, c, lane, m, corner, "atomic", m.itemsize)
    elements = element_dtype(kind)
    change = atomic(op, kind, False, m.data_type == "float32_ftz" and op == "add")

    def reduce(data: Array) -> None:
        words.update(change, elements, _inside(data, at, elements))

    return words, reduce


def _inside(data: Array, at: tensor_box.Placement, dtype: Any) -> Array:
    """The words of a box, given whole, that are in bounds."""
    cells = np.ascontiguousarray(data).view(dtype).reshape(at.rows.shape[0], -1)
    return cells[at.rows][:, at.columns].reshape(-1)
