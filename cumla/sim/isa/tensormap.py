"""Tensor maps in memory: how copies read them, tensormap.replace and tensormap.cp_fenceproxy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import Cohort
from cumla.sim.errors import KernelTrap
from cumla.sim.isa.table import Env
from cumla.sim.memory.access import reader
from cumla.sim.memory.arena import WORDS
from cumla.sim.memory.spaces import in_window
from cumla.sim.ptx.syntax import Instruction
from cumla.sim.tensormap import MAP_ALIGN, MAP_BYTES, NotATensorMap, TensorMap, decode

Array = NDArray[Any]
CHUNK = 16


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
        if in_window(np.array([at]), "shared")[0] or in_window(np.array([at]), "local")[0]:
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
