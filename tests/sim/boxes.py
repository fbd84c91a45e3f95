"""Boxes of tensors element by element: what a tensor copy must do, said slowly."""

from __future__ import annotations

from itertools import product

import numpy as np

from cumla import sim

SPANS = {"none": 0, "32B": 32, "64B": 64}
INTERLEAVES = {"none": 0, "16B": 16, "32B": 32}
PLAIN = ("none", "32B", "64B", "128B")
ATOMS = ("128B_ATOM_32B", "128B_ATOM_32B_FLIP_8B", "128B_ATOM_64B")
# For each swizzle, PTX ISA's picture of its first lines: where the 16 bytes of each column come
# from. Lines after these repeat.
PICTURES = {
    "32B": ("01234567", "10325476"),
    "64B": ("01234567", "10325476", "23016745", "32107654"),
    "128B": (
        "01234567", "10325476", "23016745", "32107654",
        "45670123", "54761032", "67452301", "76543210",
    ),
    "128B_ATOM_32B": ("01234567", "23016745", "45670123", "67452301"),
    "128B_ATOM_64B": ("01234567", "45670123"),
}  # fmt: skip
PICTURES["128B_ATOM_32B_FLIP_8B"] = PICTURES["128B_ATOM_32B"]


def place_in_line(swizzle: str, address: int) -> int:
    """Where a byte lies that without swizzle would lie at a shared address."""
    if swizzle == "none":
        return address
    line, column, byte = address // 128, address % 128 // 16, address % 16
    picture = PICTURES[swizzle][line % len(PICTURES[swizzle])]
    if "FLIP" in swizzle and line % 2:
        byte = (byte + 8) % 16
    return line * 128 + picture.index(str(column)) * 16 + byte


def units(m: sim.TensorMap, start: tuple[int, ...], shared: int):
    """(coordinates, global address or None, shared address, bytes) of every unit of a box.

    Without interleave a unit is an element; with it, a slice of channels.
    """
    sliced = INTERLEAVES[m.interleave]
    size = sliced or m.itemsize
    steps = list(m.element_strides)
    if not sliced:
        steps[0] = 1
    axes = [range(0, n, step) for n, step in zip(m.box_dim, steps, strict=True)]
    if sliced:
        axes[-2] = range(1)
    pitch = len(axes[0]) * size
    if m.swizzle != "none" and not sliced:
        pitch = max(pitch, SPANS.get(m.swizzle, 128))
    strides = (size, *m.global_strides)
    for row, outer in enumerate(product(*axes[:0:-1])):
        for k, inner in enumerate(axes[0]):
            at = tuple(c + d for c, d in zip(start, (inner, *outer[::-1]), strict=True))
            inside = all(0 <= c < n for c, n in zip(at, m.global_dim, strict=True))
            address = m.global_address + sum(c * s for c, s in zip(at, strides, strict=True))
            yield at, address if inside else None, shared + row * pitch + k * size, size


def expected_load(m, start, shared, memory, base, before):
    """Shared memory after a load, as bytes from address 0; `memory` lies at global `base`."""
    after = before.copy()
    fill = np.zeros(64, np.uint8)
    if m.oob_fill != "none":
        fill = np.frombuffer(b"\xf7\x7f" * 32, np.uint8)
    for _, source, target, size in units(m, start, shared):
        data = fill[:size] if source is None else memory[source - base : source - base + size]
        for k in range(size):
            after[place_in_line(m.swizzle, target + k)] = data[k]
    return after


def random_map(rng, base, memory_bytes, *, rank=None, swizzles=PLAIN, types=None):
    """A legal map of a tensor that lies in memory_bytes bytes at an address, with a small box."""
    while True:
        kind = rng.choice(types or ["uint8", "uint16", "int32", "uint64", "bfloat16", "float64"])
        r = int(rank or rng.integers(1, 6))
        interleave = "none" if r < 3 else str(rng.choice(["none", "none", "16B", "32B"]))
        swizzle = str(rng.choice(swizzles))
        itemsize = sim.tensor_map(1 << 20, data_type=kind, global_dim=[64], box_dim=[16]).itemsize
        sliced = INTERLEAVES[interleave]
        unit = 32 if sliced == 32 else 16
        dims = [int(n) for n in rng.integers(1, [64, 12, 8, 6, 4][:r])]
        box = [int(n) for n in rng.integers(1, [20, 6, 5, 4, 3][:r])]
        box[0] = -(-box[0] * itemsize // 16) * 16 // itemsize
        if not sliced:
            limit = {"none": 96, "32B": 32, "64B": 64}.get(swizzle, 128)
            box[0] = int(rng.integers(1, limit // 16 + 1)) * 16 // itemsize
        steps = [int(n) for n in np.where(rng.random(r) < 0.6, 1, rng.integers(1, 9, r))]
        strides, size = [], dims[0] * (sliced or itemsize)
        for n in dims[1:]:
            size = -(-size // unit) * unit + unit * int(rng.integers(0, 2))
            strides.append(size)
            size *= n
        floats = "float" in kind
        if size <= memory_bytes:
            return sim.tensor_map(
                base,
                data_type=str(kind),
                global_dim=dims,
                global_strides=strides,
                box_dim=box,
                element_strides=steps,
                interleave=interleave,
                swizzle=swizzle,
                oob_fill="nan_request_zero_fma" if floats and rng.random() < 0.5 else "none",
                target="sm_100a",
            )


def random_start(rng, m):
    """Legal coordinates from wholly before the tensor to wholly behind it."""
    if rng.random() < 0.3:
        return tuple(0 for _ in m.global_dim)
    start = [int(rng.integers(-b - 1, n + 2)) for b, n in zip(m.box_dim, m.global_dim, strict=True)]
    if m.interleave == "none":
        # A multiple of 16 bytes from the tensor's origin.
        step = 16 // m.itemsize
        start[0] = start[0] // step * step
    return tuple(start)
