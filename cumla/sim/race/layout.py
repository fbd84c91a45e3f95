"""How the state of a memory cell is packed in an int64: who touched it, when, and how."""

from __future__ import annotations

import numpy as np

from cumla.sim.cohort import WARP
from cumla.sim.errors import LaunchError

SPECIAL = 1 << 62  # a state that no barrier alone can make harmless
SPLIT = SPECIAL | 1 << 61  # the cell is divided: its halves hold the states
# Threads added to each block that stand for asynchronous copies; as many as a warp has lanes. The
# first stand for what the asynchronous proxy does, the others for st.async and cp.async.
COPY_AGENTS = 32
PROXY_AGENTS = 24


class Layout:
    """The fields of a state, from the lowest bit.

    thread, strength (2 bits), write, many, wide, cross, pending, stamp. So states compare like
    their stamps, and `state < (stamp + 1) << stamp_shift` asks whether something is that old. A
    stamp is the number of the access among all accesses of the launch.

    A thread is `block << local_bits | local`: the linear number of its block in the grid and of
    the thread in its block. Locals from `lanes` on are asynchronous copies (see COPY_AGENTS).

    Attributes:
        threads: mask of the thread.
        strength_shift, strengths: the strength, and its mask in place. 0: weak; 1: strong in its
            block; 2: strong in the whole device.
        write: the access wrote.
        many: other threads' accesses, which are in the level's log, count as well; the thread and
            stamp are the last one's, the strength is the least of them all.
        wide: the many are of more than one warp.
        cross: the many are of more than one block.
        pending: an asynchronous copy that has not landed.
        generic: locals from here on, and those of lanes, access memory through the generic proxy.
        not_own, warp_alone, block_alone: what must be zero in `state ^ thread` for the state to
            be of the thread alone, or of threads of its warp, or of its block.
    """

    def __init__(self, blocks: int, lanes: int) -> None:
        self.lanes = lanes
        self.generic = lanes + PROXY_AGENTS
        self.local_bits = (lanes + COPY_AGENTS - 1).bit_length()
        bits = self.local_bits + max(blocks - 1, 1).bit_length()
        self.threads = (1 << bits) - 1
        self.locals = (1 << self.local_bits) - 1
        self.strength_shift = bits
        self.strengths = 3 << bits
        self.write = 4 << bits
        self.many = 8 << bits
        self.wide = 16 << bits
        self.cross = 32 << bits
        self.pending = 64 << bits
        self.stamp_shift = bits + 7
        # Scalars as arrays, which NumPy takes faster than numbers.
        self.not_own = np.array(self.threads | self.many | self.pending)
        self.warps = np.array(self.threads & -WARP)
        self.blocks = np.array(self.threads & ~self.locals)
        self.warp_alone = np.array(self.warps | self.wide | self.cross | self.pending)
        self.block_alone = np.array(self.blocks | self.cross)
        self.many_flag = np.array(self.many)
        self.wide_flag = np.array(self.wide)
        self.cross_flag = np.array(self.cross)
        self.all_wide = np.array(self.many | self.wide)
        self.all_cross = np.array(self.many | self.wide | self.cross)
        # Clocks hold stamps in 32 bits.
        self.last_stamp = min((1 << max(61 - self.stamp_shift, 0)) - 1, (1 << 31) - 1)
        self.stamps = ((1 << (61 - self.stamp_shift)) - 1) << self.stamp_shift
        if self.last_stamp < 1 << 24:
            raise LaunchError(
                f"{blocks} blocks of {lanes} threads are too many for race checks: "
                "launch a smaller grid, or without them"
            )
