"""Lanes of a wave with all kinds of memory, for tests of instructions that access it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from cumla.sim.cohort import Cohort
from cumla.sim.memory import DeviceMemory
from cumla.sim.memory.spaces import LOCAL_WINDOW, SHARED_WINDOW
from cumla.sim.wave import Geometry, Wave

WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}


def lanes(
    threads: int = 64,
    blocks: int = 2,
    *,
    memory: DeviceMemory | None = None,
    shared: int = 1024,
    variables: list[tuple[str, int, int]] | None = None,
    local: int = 64,
    local_params: list[tuple[int, int]] | None = None,
    params: bytes = b"",
    gids: Any = None,
) -> Cohort:
    """All lanes of these blocks, or some of them, without registers."""
    memory = DeviceMemory(1 << 24) if memory is None else memory
    geometry = Geometry(
        kernel="k",
        grid=(blocks, 1, 1),
        block=(threads, 1, 1),
        shared_size=shared,
        dynamic_shared=0,
        shared_variables=variables or [],
        local_size=local,
        local_params=local_params or [],
        params=params,
    )
    device: Any = SimpleNamespace(memory=memory, num_sms=4, capability=90, launches=0)
    rng = np.random.default_rng(0)
    wave = Wave(device, geometry, np.arange(blocks), delivery="eager", rng=rng)
    chosen = np.flatnonzero(wave.live) if gids is None else np.array(gids, np.int64)
    return Cohort(wave, chosen, [])


def addresses(*values: Any) -> Any:
    return np.array(values, np.int64).reshape(-1)
