"""Tensor maps in memory: how copies read them, and tensormap.replace and tensormap.cp_fenceproxy.

PTX ISA "tensormap.replace", "Parallel Synchronization: tensormap.cp_fenceproxy".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort
from cumla.sim.errors import KernelTrap
from cumla.sim.isa.table import Env, Op, Unsupported, instruction, needs
from cumla.sim.memory.access import reader, writer
from cumla.sim.memory.arena import WORDS
from cumla.sim.memory.spaces import CLUSTER, in_window
from cumla.sim.ptx.syntax import Immediate, Instruction
from cumla.sim.tensormap import (
    DATA_TYPES,
    MAP_ALIGN,
    MAP_BYTES,
    MARK,
    OFFSETS,
    NotATensorMap,
    TensorMap,
    decode,
)

Array = NDArray[Any]
CHUNK = 16
U8, U32, U64 = np.dtype(np.uint8), np.dtype(np.uint32), np.dtype(np.uint64)
SCOPES = ("cta", "cluster", "gpu", "sys")
# Fields with an ordinal, and how many there are.
ORDINALS = {"box_dim": 5, "global_dim": 5, "global_stride": 4, "element_stride": 5}
# Fields whose new value is an immediate below this.
NUMBERED = {
    "elemtype": len(DATA_TYPES), "interleave_layout": 3, "swizzle_mode": 4, "fill_mode": 2,
}  # fmt: skip


class MapReader:
    """The tensor map operand of a copy: a generic address of param, const or global memory."""

    def __init__(self, ins: Instruction, env: Env, rank: int) -> None:
        self.ins = ins
        self.rank = rank
        self.atoms = env.target >= 100
        self._read = reader(ins, replace(env, count=False), "generic", WORDS[CHUNK], hooks=False)

    def read(self, c: Cohort, address: Array) -> list[TensorMap]:
        """[n] the maps at the lanes' addresses."""
        known: dict[int, TensorMap] = {}
        found = []
        for lane, at in enumerate(c.full(address).tolist()):
            if at not in known:
                known[at] = self._map(Cohort(c.wave, c.gids[lane : lane + 1], []), at)
            found.append(known[at])
        return found

    def _map(self, c: Cohort, at: int) -> TensorMap:
        if at % MAP_ALIGN:
            raise self._trap(c, f"tensor map at {at:#x}; its address must be a multiple of 64")
        if in_window(np.array([at]), CLUSTER)[0] or in_window(np.array([at]), "local")[0]:
            raise self._trap(
                c,
                f"tensor map at {at:#x}; it must lie in parameters (a const __grid_constant__ "
                "parameter), in constant or in global memory",
            )
        words = [self._read(c, np.array([at + k]))[0] for k in range(0, MAP_BYTES, CHUNK)]
        try:
            m = decode(np.concatenate(words).tobytes())
        except NotATensorMap as error:
            raise self._trap(c, f"tensor map at {at:#x}: {error}") from None
        if m.rank != self.rank:
            raise self._trap(
                c, f"tensor map at {at:#x}: its tensor has {m.rank} dimensions, not {self.rank}"
            )
        if "ATOM" in m.swizzle and not self.atoms:
            raise self._trap(c, f"tensor map at {at:#x}: swizzle {m.swizzle} needs sm_100 or later")
        return m

    def _trap(self, c: Cohort, message: str) -> KernelTrap:
        return KernelTrap(message, c.wave.where(self.ins, int(c.gids[0])))


@instruction("tensormap")
def tensormap(ins: Instruction, env: Env) -> Op:
    """tensormap.replace and tensormap.cp_fenceproxy."""
    needs(env, 90, ins)
    if ins.modifiers[:2] == ("replace", "tile"):
        return _replace(ins, env, list(ins.modifiers[2:]))
    if ins.modifiers[:1] == ("cp_fenceproxy",):
        return _copy(ins, env)
    raise Unsupported(f"form {ins.name!r}")


def _replace(ins: Instruction, env: Env, words: list[str]) -> Op:
    """tensormap.replace.tile.field{.space}.b1024.type [map], {ordinal,} value.

    The field of a map of zeros may be replaced too: that begins a new map.
    """
    field, *space, size, kind = words if len(words) > 2 else ["", "", ""]
    wide = field in ("global_address", "global_stride")
    if field == "swizzle_atomicity":
        raise Unsupported("field .swizzle_atomicity of tensormap.replace, of sm_100 and later")
    if field not in OFFSETS or size != "b1024" or kind != ("b64" if wide else "b32"):
        raise Unsupported(f"form {ins.name!r}")
    if space not in ([], ["global"], ["shared::cta"]):
        raise Unsupported(f"form {ins.name!r}")
    if len(ins.operands) != 2 + (field in ORDINALS):
        raise Unsupported(f"{ins.name!r} with {len(ins.operands)} operands")
    offset = OFFSETS[field]
    dtype: Any = U64 if wide else U32
    if field in ORDINALS:
        ordinal = ins.operands[1]
        if not isinstance(ordinal, Immediate) or not 0 <= ordinal.value < ORDINALS[field]:
            raise Unsupported(f"{ins.name!r} whose ordinal is not 0 to {ORDINALS[field] - 1}")
        offset += int(ordinal.value) * dtype.itemsize
    elif not wide:
        dtype = U8
    if field in NUMBERED:
        value = ins.operands[1]
        if not isinstance(value, Immediate) or not 0 <= value.value < NUMBERED[field]:
            raise Unsupported(f"{ins.name!r} with a value that is not 0 to {NUMBERED[field] - 1}")
    where = space[0] if space else "generic"
    read = reader(ins, env, where, U64, hooks=False)
    begin = writer(ins, env, where, U64, hooks=False)
    write = writer(ins, env, where, dtype)

    def run(c: Cohort, address: Array, *operands: Array) -> None:
        (mark,) = read(c, address)
        if (bad := (mark != 0) & (mark != MARK)).any():
            lane = int(np.argmax(bad))
            at = int(c.full(address)[lane])
            raise KernelTrap(
                f"there is no tensor map at {at:#x}, nor zeros to make one of",
                c.wave.where(ins, int(c.gids[lane])),
            )
        begin(c, address, (np.array([MARK], U64),))
        write(c, address + offset, (operands[-1].astype(dtype),))

    kinds = ("addr", *("u32",) * (field in ORDINALS), kind)
    return Op(run, kinds, cohort=True)


def _copy(ins: Instruction, env: Env) -> Op:
    """tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.scope.sync.aligned
    [dst], [src], 128; a warp copies one map and releases it.
    """
    known = ("global", "shared::cta", "tensormap::generic", "release")
    words = ins.modifiers[1:]
    if words[:4] != known or words[5:] != ("sync", "aligned") or words[4] not in SCOPES:
        raise Unsupported(f"form {ins.name!r}")
    size = ins.operands[2] if len(ins.operands) == 3 else None
    if not isinstance(size, Immediate) or size.value != MAP_BYTES:
        raise Unsupported(f"{ins.name!r} of anything but {MAP_BYTES} bytes")
    read = reader(ins, env, "shared", WORDS[CHUNK])
    write = writer(ins, env, "global", WORDS[CHUNK])

    def run(c: Cohort, to: Array, source: Array, size: Array) -> None:
        first = np.append(True, c.gids[1:] >> 5 != c.gids[:-1] >> 5)
        one = c.subset(first)
        to, source = c.full(to)[first], c.full(source)[first]
        for k in range(0, MAP_BYTES, CHUNK):
            write(one, to + k, read(one, source + k))
        if env.check_race:
            c.wave.race.fence(c, words[4], "release")

    return Op(run, ("addr", "addr", "u32"), cohort=True)
