"""Tensor copies that depend on the device."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from sim.boxes import ATOMS, expected_load, place_in_line, units
from sim.tensor_kit import REGION, Runner


@pytest.mark.parametrize("swizzle", ATOMS)
def test_larger_atoms_of_sm_100(swizzle):
    rng = np.random.default_rng(4)
    memory = rng.integers(0, 256, 1 << 12, np.uint8)
    runner = Runner(memory, "sm_100a")
    m = sim.tensor_map(
        runner.base, data_type="uint8", global_dim=[128, 30], global_strides=[128],
        box_dim=[128, 9], swizzle=swizzle, target="sm_100a",
    )  # fmt: skip
    data = rng.integers(0, 256, REGION, np.uint8)
    found = runner.load(m, (-16, 4), 384, data)
    assert np.array_equal(found, expected_load(m, (-16, 4), 384, memory, runner.base, data))
    if "FLIP" in swizzle:
        with pytest.raises(sim.KernelTrap, match="which is for loads"):
            runner.run("store_box", m, (0, 4), 384, data.view(np.uint32))
        return
    runner.run("store_box", m, (0, 4), 384, data.view(np.uint32))
    wanted = memory.copy()
    for _, to, source, _ in units(m, (0, 4), 384):
        wanted[to - runner.base] = data[place_in_line(swizzle, source)]
    assert np.array_equal(runner.array.get(), wanted)
