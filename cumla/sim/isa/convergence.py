"""Who of a warp must be there before an instruction with `.sync` or `.aligned` may run.

`.sync` waits for the lanes that its membermask names, `.aligned` for the whole warp. Lanes that
have exited are waited for by nobody: PTX leaves that undefined, and hardware goes on without them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.cohort import WARP, Cohort
from cumla.sim.errors import KernelTrap
from cumla.sim.ptx.syntax import Instruction

Array = NDArray[Any]

FULL = 0xFFFFFFFF
LANES = np.arange(WARP, dtype=np.uint32)
LANE_BITS = np.uint32(1) << LANES


def pack(lanes: Array) -> Array:
    """[..., 32] bool as [...] uint32, lane 0 in the lowest bit."""
    return np.packbits(lanes, axis=-1, bitorder="little").view(np.uint32)[..., 0]


def unpack(bits: Array) -> Array:
    """The opposite of `pack`: [...] uint32 as [..., 32] bool."""
    return (bits[..., None] & LANE_BITS) != 0


def _live(cohort: Cohort) -> Array:
    """[w] which lanes of each warp of the cohort have not exited."""
    return pack(cohort.wave.live.reshape(-1, WARP)[cohort.warps])


def whole_warps(cohort: Cohort, *_: Any) -> Any:
    """`Op.ready` of an `.aligned` instruction: the lanes whose warps are here, all that live."""
    if cohort.whole or cohort.n == cohort.wave.live_count:
        return True
    ready = pack(cohort.active) == _live(cohort)
    return bool(ready.all()) or cohort.from_warps(np.repeat(ready, WARP))


def converged(cohort: Cohort, *operands: Any) -> Any:
    """`Op.ready` of a `.sync` instruction, whose last operand is its membermask.

    A lane is ready when all lanes that it names, and that live, are here with the same mask. One
    that does not name itself need not wait: `members` reports it.
    """
    masks = operands[-1]
    if masks.shape[0] == 1 and masks[0] == FULL:
        return whole_warps(cohort)
    masks = cohort.to_warps(masks)
    missing = masks & _live(cohort)[:, None] & ~_alike(masks, cohort.active)
    ready = (missing == 0) | (masks & LANE_BITS == 0)
    return cohort.from_warps(ready)


def _alike(masks: Array, active: Array) -> Array:
    """[w, 32] for each lane: the lanes of its warp that are here with the same mask as it."""
    same = masks[:, :, None] == masks[:, None, :]
    return pack(same & active[:, None, :])


def members(ins: Instruction, cohort: Cohort, masks: Array) -> Array | None:
    """[w, 32] uint32: with whom each lane executes; None if all warps are whole and named whole.

    Raises:
        KernelTrap: a lane's mask does not name the lane itself, or names one whose mask differs.
    """
    if masks.shape[0] == 1 and masks[0] == FULL:
        if cohort.whole:
            return None
        return np.repeat(pack(cohort.active), WARP).reshape(-1, WARP)
    masks = cohort.to_warps(masks)
    active = cohort.active
    if cohort.whole and (masks == FULL).all():
        return None
    outside = active & (masks & LANE_BITS == 0)
    if outside.any():
        warp, lane = np.argwhere(outside)[0]
        raise _trap(ins, cohort, warp, lane, masks, "does not name the lane itself")
    alike = _alike(masks, active)
    differ = masks & pack(active)[:, None] & ~alike
    if differ.any():
        warp, lane = np.argwhere(differ)[0]
        other = int(differ[warp, lane]).bit_length() - 1
        what = f"names lane {other}, whose membermask is 0x{masks[warp, other]:08x}"
        raise _trap(ins, cohort, warp, lane, masks, what)
    return alike


def _trap(
    ins: Instruction, cohort: Cohort, warp: Any, lane: Any, masks: Array, what: str
) -> KernelTrap:
    gid = int(cohort.warps[warp]) * WARP + int(lane)
    text = f"{_name(ins)}: membermask 0x{masks[warp, lane]:08x} of lane {lane} {what}"
    return KernelTrap(text, cohort.wave.where(ins, gid))


def waits_for_lanes(
    ins: Instruction, cohort: Cohort | None = None, masks: Array | None = None
) -> str:
    """What the lanes of a cohort, of one warp, wait for; without masks all lanes are meant."""
    if cohort is None:
        return f"the other lanes of its warp at {_name(ins)}"
    here = pack(cohort.active)[0]
    named = np.uint32(FULL) if masks is None else np.bitwise_or.reduce(masks)
    return f"lanes 0x{named & _live(cohort)[0] & ~here:08x} of its warp at {_name(ins)}"


def _name(ins: Instruction) -> str:
    """`shfl.sync`: the name up to `sync`, which says what kind of instruction it is."""
    name, sync, _ = f"{ins.name}.".partition(".sync.")
    return name + sync.rstrip(".") if sync else ins.name
