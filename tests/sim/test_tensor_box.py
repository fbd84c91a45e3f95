"""Where the bytes of boxes lie, against their definition element by element."""

from __future__ import annotations

import numpy as np
import pytest

from cumla import sim
from cumla.sim import tensor_box
from sim.boxes import ATOMS, PICTURES, PLAIN, place_in_line, random_map, random_start, units

BASE = 0x7F00_0000_0100


@pytest.mark.parametrize("swizzle", [*PLAIN, *ATOMS])
def test_swizzles_are_the_pictures_of_the_isa(swizzle):
    addresses = np.arange(4096)
    found = tensor_box.swizzled(addresses, swizzle)
    assert found.tolist() == [place_in_line(swizzle, a) for a in addresses.tolist()]
    assert sorted(found.tolist()) == addresses.tolist()
    assert (swizzle == "none") == (found == addresses).all()
    lines = len(PICTURES.get(swizzle, "-"))
    assert lines <= 8


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(30))
def test_random_boxes(rank, seed):
    rng = np.random.default_rng([rank, seed])
    m = random_map(rng, BASE, 1 << 16, rank=rank, swizzles=PLAIN + ATOMS)
    start = random_start(rng, m)
    shared = int(rng.integers(8, 40)) * 128
    wanted = list(units(m, start, shared))
    size = tensor_box.unit_bytes(m)
    assert tensor_box.box_bytes(m) == sum(n for *_, n in wanted)
    assert tensor_box.counts(m)[0] * size == tensor_box.row_bytes(m)

    # Global memory: the address of each byte of the box, or -1.
    at = tensor_box.place(m, start)
    assert size % at.width == 0 or m.interleave == "none"
    addresses = at.row_address[:, None] + at.column_offset
    addresses = np.where(at.rows[:, None] & at.columns, addresses, -1).reshape(-1)
    spread = np.where(addresses < 0, -1, 0)[:, None] * np.arange(at.width)
    each = addresses[:, None] + np.arange(at.width) + spread
    expected = [
        -1 if address is None else address + k for _, address, _, n in wanted for k in range(n)
    ]
    assert each.reshape(-1).tolist() == expected
    inside = addresses[addresses >= 0]
    assert sorted(at.addresses.reshape(-1).tolist()) == sorted(inside.tolist())

    # Shared memory: where each byte of the box goes.
    piece = tensor_box.piece_bytes(m)
    offsets = tensor_box.shared_offsets(m, shared)
    each = shared + offsets[:, None] + np.arange(piece)
    expected = [place_in_line(m.swizzle, to + k) for _, _, to, n in wanted for k in range(n)]
    assert each.reshape(-1).tolist() == expected


@pytest.mark.parametrize("first", range(-10, 9))
def test_slices_with_a_stride_at_either_end(first):
    """A box of every third slice of 8; from before the tensor it may miss the first."""
    m = sim.tensor_map(
        BASE, data_type="uint8", global_dim=[8, 2, 1], global_strides=[128, 256],
        box_dim=[16, 1, 1], element_strides=[3, 1, 1], interleave="16B",
    )  # fmt: skip
    at = tensor_box.place(m, (first, 1, 0))
    found = dict(zip(range(0, 6 * 16, at.width), at.columns.tolist(), strict=True))
    inside = [0 <= first + 3 * k < 8 for k in range(6)]
    assert found == {k * at.width: inside[k * at.width // 16] for k in range(len(found))}
    wanted = [BASE + 128 + 16 * (first + 3 * k) for k in range(6) if inside[k]]
    assert [a for a in at.addresses.reshape(-1).tolist() if a % 16 == 0] == wanted


def test_coordinates_of_a_byte():
    rng = np.random.default_rng(5)
    for _ in range(50):
        m = random_map(rng, BASE, 1 << 14)
        start = random_start(rng, m)
        size, inner = tensor_box.unit_bytes(m), tensor_box.row_bytes(m)
        for k, (at, *_) in enumerate(units(m, start, 0)):
            row, offset = divmod(k * size, inner)
            assert tensor_box.where_in_tensor(m, start, row, offset) == at


def test_words_are_as_wide_as_they_can_be():
    for size, width in ((64, 16), (60, 8), (62, 4), (61, 2)):
        m = sim.tensor_map(BASE, data_type="bfloat16", global_dim=[size, 4], global_strides=[128],
                           box_dim=[48, 4])  # fmt: skip
        assert tensor_box.place(m, (16, 0)).width == width  # the tensor ends in the box
        assert tensor_box.place(m, (-8, 0)).width == 16
        assert tensor_box.place(m, (8, 0)).width == 16
        assert tensor_box.place(m, (8, 0), widest=4).width == 4


def test_nan_fill_and_tf32():
    m = sim.tensor_map(BASE, data_type="tfloat32", global_dim=[8], box_dim=[8],
                       oob_fill="nan_request_zero_fma")  # fmt: skip
    fill = tensor_box.filled(m, 1)
    assert fill.view(np.uint32).tolist() == [[0x7FF77FF7] * 8]
    assert np.isnan(fill.view(np.float32)).all()
    # Ties go to even; infinities stay, NaN is canonical, -0 and subnormals are rounded alike.
    given = np.array(
        [0x3F801000, 0x3F803000, 0x3F801001, 0x7F800000, 0x7F800001, 0x80000000, 0x1FFF,
         0x7F7FFFFF],
        np.uint32,
    )  # fmt: skip
    rounded = [0x3F800000, 0x3F804000, 0x3F802000, 0x7F800000, 0x7FFFE000, 0x80000000, 0x2000,
               0x7F800000]  # fmt: skip
    assert tensor_box.converted(m, given).tolist() == rounded
    plain = sim.tensor_map(BASE, data_type="float32", global_dim=[8], box_dim=[8])
    assert tensor_box.converted(plain, given).tolist() == given.tolist()
    assert not tensor_box.filled(plain, 2).any()
