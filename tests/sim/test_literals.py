"""Literals reach arithmetic as scalars: the results are those of arrays of one element."""

from __future__ import annotations

import numpy as np
import pytest

from cumla.sim.isa.table import DTYPES
from cumla.sim.program.emit import TAKE_SCALARS
from sim.ops import op

NAMES = [
    "add.s32",
    "add.s64",
    "add.f32",
    "add.rn.ftz.f32",
    "add.f64",
    "add.rn.f16",
    "sub.s32",
    "sub.f32",
    "sub.rn.bf16",
    "mul.lo.s32",
    "mul.lo.s64",
    "mul.wide.s32",
    "mul.hi.u32",
    "mul.f32",
    "mul.ftz.f32",
    "mad.lo.s32",
    "mad.wide.u32",
    "fma.rn.f32",
    "fma.rn.ftz.f32",
    "fma.rn.f64",
    "and.b32",
    "and.b64",
    "or.b32",
    "xor.b32",
    "shl.b32",
    "shl.b64",
    "shr.u32",
    "shr.s64",
    "setp.eq.s32",
    "setp.lt.u32",
    "setp.gt.s64",
    "setp.gtu.f32",
    "setp.lt.ftz.f32",
    "min.s32",
    "min.f32",
    "max.u64",
    "max.f32",
    "min.f16",
    "add.s16x2",
    "min.u16x2",
]


@pytest.mark.parametrize("name", NAMES)
def test_scalar_sources(name: str) -> None:
    made = op(name)
    assert name.partition(".")[0] in TAKE_SCALARS
    random = np.random.default_rng(0)
    for n in (1, 300, 20_000):
        sources = []
        for kind in made.sources:
            dtype = DTYPES[kind]
            if dtype.kind == "f":
                sources.append(random.standard_normal(n).astype(dtype))
            else:
                sources.append(random.integers(0, 2**31, n).astype(dtype))
        for i in range(len(sources)):
            arrays = [s[:1] if j == i else s for j, s in enumerate(sources)]
            scalars = [s[:1].reshape(()) if j == i else s for j, s in enumerate(sources)]
            with np.errstate(all="ignore"):
                expected, found = made.run(*arrays), made.run(*scalars)
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            assert found.tobytes() == expected.tobytes()


def test_all_of_them_are_tested() -> None:
    assert {name.partition(".")[0] for name in NAMES} == TAKE_SCALARS
