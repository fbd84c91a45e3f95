"""Tensor copies that depend on the device or on the type of the elements."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from sim.boxes import ATOMS, expected_load, place_in_line, units
from sim.tensor_kit import REGION, Runner

TINY = np.float32(2.0**-140)


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


@pytest.mark.parametrize(("kind", "left"), [("float32", 2 * TINY), ("float32_ftz", 0)])
def test_subnormals_of_reductions(kind, left):
    runner = Runner(np.full(64, TINY, np.float32))
    m = sim.tensor_map(runner.array, data_type=kind, box_dim=[64])
    runner.run("add_box", m, (0,), 0, np.full(REGION // 4, TINY, np.float32).view(np.uint32))
    assert runner.array.get().tolist() == [left] * 64


def test_float64_adds_up():
    """As on an H200, where only normal numbers were tried; .f64 never flushes subnormals."""
    rng = np.random.default_rng(8)
    memory = rng.standard_normal(64)
    memory[:2] = np.inf, 5e-324
    runner = Runner(memory)
    m = sim.tensor_map(runner.array, box_dim=[64])
    data = rng.standard_normal(REGION // 8)
    data[:2] = 1.0, 5e-324
    runner.run("add_box", m, (0,), 0, data.view(np.uint32))
    assert runner.array.get().tobytes() == (memory + data[:64]).tobytes()


def test_reductions_of_types_that_have_none():
    runner = Runner(np.zeros(64, np.float32))
    m = sim.tensor_map(runner.array, data_type="tfloat32", box_dim=[64])
    with pytest.raises(sim.KernelTrap, match=r"reduction \.add of a tensor of tfloat32"):
        runner.run("add_box", m, (0,), 0, np.zeros(REGION // 4, np.uint32))
