"""cp.reduce.async.bulk.tensor: every operation and type, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from cumla.sim.tensormap import DATA_TYPES
from sim.boxes import place_in_line, random_map, random_start, units
from sim.bulk_kit import DELIVERIES
from sim.reductions import DTYPES, reduced, values
from sim.tensor_kit import REGION, Runner

TINY = np.float32(2.0**-140)
INTEGERS = {"uint32": "u32", "int32": "s32", "uint64": "u64", "int64": "s64"}
HALVES = {"float16": "f16", "bfloat16": "bf16"}
BITS = {"uint32": "b32", "int32": "b32", "uint64": "b64", "int64": "b64"}
# The types that each operation takes, and what it takes their elements for. That float64 is one
# is known from an H200, where only normal numbers were tried; .f64 never flushes subnormals.
TAKEN = {
    "add": {
        "uint32": "u32", "int32": "s32", "uint64": "u64", **HALVES, "float32": "f32",
        "float64": "f64",
    },
    "min": INTEGERS | HALVES, "max": INTEGERS | HALVES,
    "inc": {"uint32": "u32"}, "dec": {"uint32": "u32"},
    "and": BITS, "or": BITS, "xor": BITS,
}  # fmt: skip


@pytest.mark.parametrize(("op", "kind"), [(op, k) for op, kinds in TAKEN.items() for k in kinds])
def test_every_reduction(op, kind):
    rng = np.random.default_rng(3)
    as_kind = TAKEN[op][kind]
    dtype = np.dtype(DTYPES[as_kind])
    old, new = (
        values(rng, as_kind, 512 // dtype.itemsize),
        values(rng, as_kind, REGION // dtype.itemsize),
    )
    if op in ("min", "max") and kind.startswith("int"):
        old[::2] *= -1
        new[::3] *= -1
    runner = Runner(old)
    n = 128 // dtype.itemsize
    m = sim.tensor_map(
        runner.base, data_type=kind, global_dim=[n, 4], global_strides=[128], box_dim=[n, 3]
    )
    runner.run("reduce_box", m, (0, 2), 256, new.view(np.uint32), op=op)
    wanted = old.copy()
    # The box's last row is out of bounds.
    wanted[2 * n :] = reduced(op, as_kind, old[2 * n :], new[2 * n : 4 * n])
    assert (wanted != old).any()
    assert runner.array.get().tobytes() == wanted.tobytes()


@pytest.mark.parametrize("op", TAKEN)
def test_types_that_have_no_such_reduction(op):
    for kind in DATA_TYPES:
        if kind in TAKEN[op] or (op, kind) == ("add", "float32_ftz"):
            continue
        runner = Runner(np.zeros(128, np.uint8))
        m = sim.tensor_map(runner.base, data_type=kind, global_dim=[16], box_dim=[16])
        with pytest.raises(sim.KernelTrap, match=rf"reduction \.{op} of a tensor of {kind}$"):
            runner.run("reduce_box", m, (0,), 0, np.zeros(REGION // 4, np.uint32), op=op)


@pytest.mark.parametrize("seed", range(6))
def test_reductions(seed):
    rng = np.random.default_rng(seed)
    memory = rng.integers(0, 1 << 31, 1 << 12, np.int32)
    runner = Runner(memory)
    data = rng.integers(-(1 << 31), 1 << 31, REGION // 4, np.int64).astype(np.int32)
    m = random_map(rng, runner.base, memory.nbytes, types=["int32"])
    while m.interleave != "none":
        m = random_map(rng, runner.base, memory.nbytes, types=["int32"])
    start = tuple(max(x, 0) for x in random_start(rng, m))
    runner.run("reduce_box", m, start, 128, data.view(np.uint32), delivery=DELIVERIES[seed % 3])
    wanted = memory.copy()
    for _, to, source, _ in units(m, start, 128):
        if to is not None:
            with np.errstate(over="ignore"):
                wanted[(to - runner.base) // 4] += data[place_in_line(m.swizzle, source) // 4]
    assert np.array_equal(runner.array.get(), wanted)


@pytest.mark.parametrize(("kind", "left"), [("float32", 2 * TINY), ("float32_ftz", 0)])
def test_subnormals_of_reductions(kind, left):
    runner = Runner(np.full(64, TINY, np.float32))
    m = sim.tensor_map(runner.array, data_type=kind, box_dim=[64])
    runner.run("reduce_box", m, (0,), 0, np.full(REGION // 4, TINY, np.float32).view(np.uint32))
    assert runner.array.get().tolist() == [left] * 64


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_blocks_add_up_without_a_race(delivery):
    runner = Runner(np.arange(64, dtype=np.uint32))
    m = sim.tensor_map(runner.array, box_dim=[64])
    data = np.arange(REGION // 4, dtype=np.uint32)
    runner.run("reduce_box", m, (0,), 0, data, blocks=5, delivery=delivery,
               checks=("memory", "race"))  # fmt: skip
    assert runner.array.get().tolist() == [6 * k for k in range(64)]
