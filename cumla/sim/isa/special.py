"""Special registers. PTX ISA "Special Registers".

`SPECIAL` gives the type of each and a function of a cohort: an array with one element for each
lane, or one for all. One clock counts instructions, cycles and nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP, Cohort

Array = NDArray[Any]
Value = Callable[[Cohort], Array]

ZERO = np.zeros(1, np.uint32)
ZERO64 = np.zeros(1, np.uint64)
ALL_LANES = np.uint32(0xFFFFFFFF)
# PTX ISA "%total_smem_size": in multiples of the allocation unit, 128 bytes from sm_80 on.
SHARED_UNIT = 128
RESERVED_IN_USE = 0x120


def _once(name: str, make: Value) -> Value:
    """`make`, called once for each cohort: lanes never change their place in the grid."""

    def get(c: Cohort) -> Array:
        kept: dict[str, Array] = c.__dict__
        value = kept.get(name)
        if value is None:
            value = kept[name] = make(c)
        return value

    return get


def _one(value: int, dtype: Any = np.uint32) -> Array:
    return np.array([value], dtype)


def _constant(value: Array) -> Value:
    return lambda c: value


def _linear(c: Cohort) -> Array:
    """[n] int64: each lane's linear thread index in its block."""
    return c.gids - c.slots * c.wave.lanes_per_block


def _tid(axis: int) -> Value:
    def tid(c: Cohort) -> Array:
        x, y, z = c.wave.block
        if c.wave.block[axis] == 1:
            return ZERO
        index = _linear(c)
        if axis == 0:
            return (index if y == z == 1 else index % x).astype(np.uint32)
        if axis == 1:
            return (index // x if z == 1 else index // x % y).astype(np.uint32)
        return (index // (x * y)).astype(np.uint32)

    return tid


def _block_ids(c: Cohort) -> Array:
    """Linear number in the grid of each lane's block; one element if all lanes are of one block."""
    ids = c.wave.block_ids
    if c.slots[0] == c.slots[-1]:
        slot = int(c.slots[0])
        return ids[slot : slot + 1]
    return ids[c.slots]


def _ctaid(axis: int) -> Value:
    def ctaid(c: Cohort) -> Array:
        x, y, _ = c.wave.grid
        if c.wave.grid[axis] == 1:
            return ZERO
        index = _block_ids(c)
        if axis == 0:
            return (index % x).astype(np.uint32)
        if axis == 1:
            return (index // x % y).astype(np.uint32)
        return (index // (x * y)).astype(np.uint32)

    return ctaid


def _ntid(axis: int) -> Value:
    return lambda c: _one(c.wave.block[axis])


def _nctaid(axis: int) -> Value:
    return lambda c: _one(c.wave.grid[axis])


def _warpid(c: Cohort) -> Array:
    return (_linear(c) // WARP).astype(np.uint32)


def _nwarpid(c: Cohort) -> Array:
    from cumla.sim.device import THREADS_PER_SM  # which imports this file

    return _one(THREADS_PER_SM.get(c.wave.device.capability, 1536) // WARP)


def _smid(c: Cohort) -> Array:
    return (_block_ids(c) % c.wave.device.num_sms).astype(np.uint32)


def _nsmid(c: Cohort) -> Array:
    return _one(c.wave.device.num_sms)


def _gridid(c: Cohort) -> Array:
    return _one(c.wave.grid_id, np.uint64)


def _lane_bit(c: Cohort) -> Array:
    return np.uint32(1) << c.lanes


def _lanes_up_to(c: Cohort) -> Array:
    return ALL_LANES >> (np.uint32(WARP - 1) - c.lanes)


def _tick(c: Cohort) -> int:
    """The clock; no two readings are the same."""
    c.wave.clock += 1
    return int(c.wave.clock)


def _clock_low(c: Cohort) -> Array:
    return _one(_tick(c) & 0xFFFFFFFF)


def _clock_high(c: Cohort) -> Array:
    return _one(_tick(c) >> 32)


def _clock64(c: Cohort) -> Array:
    return _one(_tick(c), np.uint64)


def _total_shared(c: Cohort) -> Array:
    return _one(-(-c.wave.shared_size // SHARED_UNIT) * SHARED_UNIT)


def _with_reserved(c: Cohort) -> Array:
    return _total_shared(c) + np.uint32(c.wave.shared_start)


def _reserved(name: str) -> Value:
    """PTX ISA "%reserved_smem_offset_<name>": bounds of the system's part of shared memory.

    Where there is such a part it comes first; what of it is in use is what an H200 says.
    """

    def get(c: Cohort) -> Array:
        if not c.wave.shared_start:
            return _total_shared(c)
        return _one({"end": RESERVED_IN_USE, "cap": c.wave.shared_start}.get(name, 0))

    return get


def _rank(c: Cohort) -> Array:
    if c.wave.cluster_size == 1:
        return ZERO
    return (c.slots % c.wave.cluster_size).astype(np.uint32)


def _clusterid(axis: int) -> Value:
    own = _ctaid(axis)
    return lambda c: own(c) // np.uint32(c.wave.geometry.cluster[axis])


def _nclusterid(axis: int) -> Value:
    return lambda c: _one(c.wave.grid[axis] // c.wave.geometry.cluster[axis])


def _cluster_ctaid(axis: int) -> Value:
    own = _ctaid(axis)
    return lambda c: own(c) % np.uint32(c.wave.geometry.cluster[axis])


def _cluster_nctaid(axis: int) -> Value:
    return lambda c: _one(c.wave.geometry.cluster[axis])


SPECIAL: dict[str, tuple[str, Value]] = {
    "%laneid": ("u32", lambda c: c.lanes),
    "%warpid": ("u32", _once("%warpid", _warpid)),
    "%nwarpid": ("u32", _nwarpid),
    "%smid": ("u32", _once("%smid", _smid)),
    "%nsmid": ("u32", _nsmid),
    "%gridid": ("u64", _gridid),
    "%lanemask_eq": ("u32", _once("%lanemask_eq", _lane_bit)),
    "%lanemask_le": ("u32", _once("%lanemask_le", _lanes_up_to)),
    "%lanemask_lt": ("u32", _once("%lanemask_lt", lambda c: _lane_bit(c) - np.uint32(1))),
    "%lanemask_ge": ("u32", _once("%lanemask_ge", lambda c: ALL_LANES << c.lanes)),
    "%lanemask_gt": ("u32", _once("%lanemask_gt", lambda c: ~_lanes_up_to(c))),
    "%clock": ("u32", _clock_low),
    "%clock_hi": ("u32", _clock_high),
    "%clock64": ("u64", _clock64),
    "%globaltimer": ("u64", _clock64),
    "%globaltimer_lo": ("u32", _clock_low),
    "%globaltimer_hi": ("u32", _clock_high),
    "%dynamic_smem_size": ("u32", lambda c: _one(c.wave.geometry.dynamic_shared)),
    "%total_smem_size": ("u32", _total_shared),
    "%aggr_smem_size": ("u32", _with_reserved),
    "%is_explicit_cluster": ("pred", lambda c: _one(c.wave.geometry.explicit_cluster, np.bool_)),
    "%cluster_ctarank": ("u32", _once("%cluster_ctarank", _rank)),
    "%cluster_nctarank": ("u32", lambda c: _one(c.wave.cluster_size)),
    "%current_graph_exec": ("u64", _constant(ZERO64)),
}
for _axis, _letter in enumerate("xyz"):
    SPECIAL[f"%tid.{_letter}"] = ("u32", _once(f"%tid.{_letter}", _tid(_axis)))
    SPECIAL[f"%ntid.{_letter}"] = ("u32", _ntid(_axis))
    SPECIAL[f"%ctaid.{_letter}"] = ("u32", _once(f"%ctaid.{_letter}", _ctaid(_axis)))
    SPECIAL[f"%nctaid.{_letter}"] = ("u32", _nctaid(_axis))
    SPECIAL[f"%clusterid.{_letter}"] = ("u32", _once(f"%clusterid.{_letter}", _clusterid(_axis)))
    SPECIAL[f"%nclusterid.{_letter}"] = ("u32", _nclusterid(_axis))
    SPECIAL[f"%cluster_ctaid.{_letter}"] = (
        "u32",
        _once(f"%cluster_ctaid.{_letter}", _cluster_ctaid(_axis)),
    )
    SPECIAL[f"%cluster_nctaid.{_letter}"] = ("u32", _cluster_nctaid(_axis))
for _name in ("begin", "end", "cap", "0", "1"):
    SPECIAL[f"%reserved_smem_offset_{_name}"] = ("u32", _reserved(_name))
for _index in range(32):
    SPECIAL[f"%envreg{_index}"] = ("b32", _constant(ZERO))
for _index in range(8):
    SPECIAL[f"%pm{_index}"] = ("u32", _constant(ZERO))
    SPECIAL[f"%pm{_index}_64"] = ("u64", _constant(ZERO64))
