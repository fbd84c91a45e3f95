"""Special registers against plain divisions of a lane's number."""

from __future__ import annotations

import numpy as np
import pytest

from cumla.sim.isa.special import SPECIAL
from cumla.sim.isa.table import DTYPES
from sim.waves import cohort, make_wave


def value(c, name):
    """The register as one Python int for each lane; its dtype must be that of its type."""
    kind, read = SPECIAL[name]
    array = read(c)
    assert array.dtype == DTYPES[kind], name
    assert array.shape in ((1,), (c.n,)), name
    return [int(v) for v in c.full(array)]


SHAPES = [
    ((64, 1, 1), (3, 1, 1), [0, 1, 2]),
    ((40, 1, 1), (5, 1, 1), [4, 2]),
    ((5, 7, 1), (2, 3, 1), [5, 0, 3]),
    ((3, 4, 5), (2, 3, 4), [23, 7, 11, 0]),
    ((1, 33, 1), (1, 1, 7), [6, 1]),
    ((1, 1, 64), (1, 4, 1), [2]),
]


@pytest.mark.parametrize(("block", "grid", "ids"), SHAPES)
def test_places_in_block_and_grid(block, grid, ids):
    wave = make_wave(block, grid, ids, num_sms=3)
    lanes = -(-block[0] * block[1] * block[2] // 32) * 32
    everyone = cohort(wave)
    some = cohort(wave, everyone.gids[::3])
    one = cohort(wave, everyone.gids[-1:])
    for c in (everyone, some, one):
        expected = {name: [] for name in SPECIAL}
        for gid in c.gids.tolist():
            slot, linear = divmod(gid, lanes)
            number = ids[slot]
            tid = [linear % block[0], linear // block[0] % block[1], linear // block[0] // block[1]]
            ctaid = [number % grid[0], number // grid[0] % grid[1], number // grid[0] // grid[1]]
            for i, axis in enumerate("xyz"):
                expected[f"%tid.{axis}"].append(tid[i])
                expected[f"%ctaid.{axis}"].append(ctaid[i])
                expected[f"%clusterid.{axis}"].append(ctaid[i])
                expected[f"%ntid.{axis}"].append(block[i])
                expected[f"%nctaid.{axis}"].append(grid[i])
                expected[f"%nclusterid.{axis}"].append(grid[i])
                expected[f"%cluster_ctaid.{axis}"].append(0)
                expected[f"%cluster_nctaid.{axis}"].append(1)
            lane = linear % 32
            expected["%laneid"].append(lane)
            expected["%warpid"].append(linear // 32)
            expected["%smid"].append(number % 3)
            expected["%nsmid"].append(3)
            bits = {"eq": [lane], "le": range(lane + 1), "lt": range(lane)}
            bits |= {"ge": range(lane, 32), "gt": range(lane + 1, 32)}
            for name, ones in bits.items():
                expected[f"%lanemask_{name}"].append(sum(1 << b for b in ones))
        checked = {name: values for name, values in expected.items() if values}
        assert len(checked) == 33
        for name, values in checked.items():
            assert value(c, name) == values, name
            assert value(c, name) == values, name  # the second time from what was kept


def test_values_that_all_lanes_share_are_one_element():
    wave = make_wave((64, 1, 1), (3, 1, 1))
    c = cohort(wave)
    for name in ("%ntid.x", "%nctaid.x", "%tid.y", "%ctaid.z", "%nsmid", "%envreg5", "%clock"):
        assert SPECIAL[name][1](c).shape == (1,), name
    assert SPECIAL["%ctaid.x"][1](cohort(wave, range(64))).shape == (1,)
    assert SPECIAL["%ctaid.x"][1](c).shape == (192,)


def test_a_cohort_computes_its_places_once():
    c = cohort(make_wave())
    assert SPECIAL["%tid.x"][1](c) is SPECIAL["%tid.x"][1](c)


def test_clocks_go_on_with_every_reading():
    wave = make_wave()
    c = cohort(wave)
    wave.clock = (5 << 32) + 0xFFFFFFFE
    assert value(c, "%clock") == [0xFFFFFFFF] * 64
    assert value(c, "%clock_hi") == [6] * 64
    assert value(c, "%clock") == [1] * 64
    assert value(c, "%clock64") == [(6 << 32) + 2] * 64
    assert value(c, "%globaltimer") == [(6 << 32) + 3] * 64
    assert value(c, "%globaltimer_lo") == [4] * 64
    assert value(c, "%globaltimer_hi") == [6] * 64
    wave.clock += 100
    assert value(c, "%clock") == [106] * 64


def test_shared_memory_sizes():
    wave = make_wave(shared=1000)
    wave.geometry.dynamic_shared = 488
    c = cohort(wave)
    assert value(c, "%dynamic_smem_size")[0] == 488
    # In units of 128 bytes.
    assert value(c, "%total_smem_size")[0] == 1024
    assert value(c, "%aggr_smem_size")[0] == 1024
    begin, end = (value(c, f"%reserved_smem_offset_{n}")[0] for n in ("begin", "end"))
    assert begin == end >= 1000
    # On targets where the system's part comes first, as an H200 has it.
    c = cohort(make_wave(shared=1000, shared_start=0x400))
    names = [f"%reserved_smem_offset_{n}" for n in ("begin", "end", "cap", "0", "1")]
    assert [value(c, name)[0] for name in names] == [0, 0x120, 0x400, 0, 0]
    assert value(c, "%total_smem_size")[0] == 1024
    assert value(c, "%aggr_smem_size")[0] == 2048


def test_the_rest():
    c = cohort(make_wave())
    zeros = ["%is_explicit_cluster", "%cluster_ctarank", "%current_graph_exec"]
    zeros += [f"%envreg{i}" for i in range(32)]
    zeros += [f"%pm{i}" for i in range(8)] + [f"%pm{i}_64" for i in range(8)]
    for name in zeros:
        assert value(c, name) == [0] * 64, name
    assert value(c, "%cluster_nctarank") == [1] * 64
    assert value(c, "%gridid") == [3] * 64
    assert value(c, "%nwarpid") == [64] * 64


def test_every_register_has_its_type():
    c = cohort(make_wave())
    wide = {"%clock64", "%globaltimer", "%gridid", "%current_graph_exec"}
    wide |= {f"%pm{i}_64" for i in range(8)}
    for name in SPECIAL:
        value(c, name)
        bits = 64 if name in wide else 8 if name == "%is_explicit_cluster" else 32
        assert DTYPES[SPECIAL[name][0]].itemsize * 8 == bits, name
    assert np.dtype(np.bool_) == DTYPES[SPECIAL["%is_explicit_cluster"][0]]
