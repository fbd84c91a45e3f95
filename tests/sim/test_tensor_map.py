"""Arguments of tensor maps: what the driver refuses, and the 128 bytes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cumla import sim
from cumla.sim.tensormap import DATA_TYPES, FILLS, MAP_BYTES, NotATensorMap, decode
from sim.boxes import ATOMS, PLAIN, random_map

ADDRESS = 0x7F00_0000_0200


def encode(**changes):
    given = {
        "data_type": "float16", "global_dim": [64, 32, 8], "global_strides": [256, 8192],
        "box_dim": [64, 16, 2], "element_strides": [1, 1, 1], "swizzle": "128B",
        **changes,
    }  # fmt: skip
    return sim.tensor_map(given.pop("address", ADDRESS), **given)


REFUSED = [
    ({"address": ADDRESS + 8}, "array", "0x7f0000000208"),
    ({"address": -16}, "array", "-0x10"),
    ({"global_dim": []}, "global_dim", "()"),
    ({"global_dim": [8] * 6}, "global_dim", "(8, 8, 8, 8, 8, 8)"),
    ({"global_dim": [64, 0, 8]}, "global_dim[1]", "0"),
    ({"global_dim": [(1 << 32) + 1, 2, 8]}, "global_dim[0]", str((1 << 32) + 1)),
    ({"global_strides": [256]}, "global_strides", "(256,)"),
    ({"global_strides": [256, 8200]}, "global_strides[1]", "8200"),
    ({"global_strides": [256, 1 << 40]}, "global_strides[1]", str(1 << 40)),
    ({"global_strides": [-256, 8192]}, "global_strides[0]", "-256"),
    ({"box_dim": [64, 16]}, "box_dim", "(64, 16)"),
    ({"box_dim": [64, 0, 2]}, "box_dim[1]", "0"),
    ({"box_dim": [64, 257, 2]}, "box_dim[1]", "257"),
    ({"box_dim": [60, 16, 2]}, "box_dim[0]", "120 bytes"),
    ({"box_dim": [72, 16, 2]}, "box_dim[0]", "144 bytes"),
    ({"box_dim": [64, 16, 2], "swizzle": "64B"}, "box_dim[0]", "128 bytes"),
    ({"box_dim": [32, 16, 2], "swizzle": "32B"}, "box_dim[0]", "64 bytes"),
    ({"element_strides": [1, 1]}, "element_strides", "(1, 1)"),
    ({"element_strides": [1, 0, 1]}, "element_strides[1]", "0"),
    ({"element_strides": [1, 1, 9]}, "element_strides[2]", "9"),
    ({"interleave": "16B", "element_strides": [9, 1, 1]}, "element_strides[0]", "9"),
    ({"element_strides": [0, 1, 1]}, "element_strides[0]", "0"),
    ({"interleave": "16B", "box_dim": [12, 16, 2]}, "box_dim[0]", "24 bytes"),
    ({"swizzle": "128B_ATOM_32B"}, "swizzle", "128B_ATOM_32B"),
    ({"interleave": "32B", "swizzle": "32B", "address": ADDRESS + 16}, "array", "0x7f0000000210"),
    ({"interleave": "32B", "swizzle": "32B", "global_strides": [272, 8192]},
     "global_strides[0]", "272"),
    ({"interleave": "16B", "global_dim": [64, 32], "global_strides": [256], "box_dim": [8, 8],
      "element_strides": [1, 1]}, "interleave", "2 dimensions"),
    ({"data_type": "uint16", "oob_fill": "nan_request_zero_fma"}, "oob_fill", "uint16"),
    ({"data_type": "float8"}, "data_type", "float8"),
    ({"data_type": "16U4_ALIGN8B"}, "data_type", "16U4_ALIGN8B"),
    ({"data_type": np.bool_}, "data_type", "bool"),
    ({"data_type": None}, "data_type", "nothing"),
    ({"global_dim": None}, "global_dim", "nothing"),
    ({"swizzle": "96B"}, "swizzle", "96B"),
    ({"interleave": "64B"}, "interleave", "64B"),
    ({"l2_promotion": "512B"}, "l2_promotion", "512B"),
    ({"oob_fill": "ones"}, "oob_fill", "ones"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "argument", "value"), REFUSED)
def test_what_the_driver_refuses(changes, argument, value):
    with pytest.raises(sim.TensorMapError) as caught:
        encode(**changes)
    assert isinstance(caught.value, sim.LaunchError)
    assert caught.value.argument == argument
    text = str(caught.value)
    assert text.startswith(f"{argument}: got ")
    assert "CUDA_ERROR_INVALID_VALUE" in text
    assert value in text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"global_dim": [1 << 32, 1 << 32, 1]},
        {"global_strides": [0, (1 << 40) - 16]},
        {"box_dim": [64, 256, 256]},
        {"element_strides": [8, 8, 8]},
        {"swizzle": "128B_ATOM_64B", "target": "sm_100a"},
        {"interleave": "16B", "box_dim": [8, 16, 2]},
        {"interleave": "16B", "box_dim": [256, 16, 2], "swizzle": "32B"},
        {"interleave": "32B", "swizzle": "32B"},
        {"interleave": "32B", "swizzle": "128B"},
        {"oob_fill": "NAN_REQUEST_ZERO_FMA"},
        {"swizzle": "none", "box_dim": [256, 16, 2]},
    ],
)
def test_what_the_driver_takes(changes):
    m = encode(**changes)
    assert decode(bytes(m)) == m


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16"), (np.int8, "uint8"),
        (ml_dtypes.float8_e4m3fn, "uint8"), (np.int16, "uint16"), (np.uint32, "uint32"),
        (np.int64, "int64"), (np.float64, "float64"), ("CU_TENSOR_MAP_DATA_TYPE_TFLOAT32",
         "tfloat32"), ("FLOAT32_FTZ", "float32_ftz"),
    ],
)  # fmt: skip
def test_data_types(given, name):
    m = encode(data_type=given, box_dim=[16, 8, 2], swizzle="128B")
    assert m.data_type == name
    assert m.itemsize == DATA_TYPES[name]


def test_an_array_tells_its_shape():
    device = sim.Device("sm_90a", memory_bytes=1 << 22)
    array = device.upload(np.zeros((3, 8, 16), np.float32))
    m = sim.tensor_map(array, box_dim=[16, 4, 1], swizzle="64B")
    assert m == sim.TensorMap(
        "float32", array.address, (16, 8, 3), (64, 512), (16, 4, 1), (1, 1, 1), swizzle="64B"
    )
    narrow = device.upload(np.zeros((8, 3), np.float32))
    with pytest.raises(sim.TensorMapError, match=r"global_strides\[0\]: got 12"):
        sim.tensor_map(narrow, box_dim=[4, 4])


def test_bytes_hold_everything():
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(200):
        m = random_map(rng, ADDRESS, 1 << 20, swizzles=PLAIN + ATOMS, types=list(DATA_TYPES))
        data = bytes(m)
        assert len(data) == MAP_BYTES
        assert data.startswith(b"CUMLTMAP")
        assert decode(data) == m
        seen.add((m.rank, m.interleave, m.oob_fill))
    assert {fill for *_, fill in seen} == set(FILLS)
    assert len(seen) > 15


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, 0, "no tensor map"),
        (109, 5, "rank less one is 5"),
        (108, 13, "data type is number 13"),
        (110, 3, "interleave is number 3"),
        (111, 7, "swizzle is number 7"),
        (112, 4, "L2 promotion is number 4"),
        (113, 2, "fill is number 2"),
        (8, 1, "array: got address"),
    ],
)
def test_bytes_that_are_no_map(at, value, reason):
    data = bytearray(bytes(encode()))
    data[at] = value
    with pytest.raises(NotATensorMap, match=reason):
        decode(bytes(data))
