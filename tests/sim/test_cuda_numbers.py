"""Integer arithmetic, bits, hashes and C++ of CUDA C against Python's integers: all exact."""

from __future__ import annotations

import hashlib
import math
import zlib
from typing import Any

import numpy as np
import pytest

from cumla import sim
from sim import cuda, kernel_files
from sim.kernel_files import SIZES, Empty, run

targets = pytest.mark.parametrize("target", cuda.TARGETS)
EDGES = [0, 1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
M32, M64 = 2**32 - 1, 2**64 - 1


def load(target: str) -> sim.LoadedModule:
    return kernel_files.module("numbers", target, "--device-int128")


def words(n: int, seed: int, bits: int = 64) -> Any:
    """n random words, the edges among them; every second one short."""
    random = np.random.default_rng(seed)
    x = random.integers(0, 2**64, n, np.uint64) >> (random.integers(0, 2, n) * 40).astype(np.uint64)
    edges = random.permutation(np.array(EDGES, np.uint64))[:n]
    x[: edges.size] = edges
    return (x & np.uint64(2**bits - 1)).astype(f"u{bits // 8}")


def signed(x: int, bits: int) -> int:
    x &= 2**bits - 1
    return x - (x >> (bits - 1) << bits)


@targets
def test_division_by_values_of_all_types(target: str) -> None:
    for kind in ("i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64"):
        bits = int(kind[1:])
        for n in (1, 100):
            a, b = words(n, n, bits), words(n, n + 1, bits)
            b[b == 0] = 3
            dtype = np.dtype(f"{kind[0]}{bits // 8}")
            a, b = a.view(dtype), b.view(dtype)
            if kind[0] == "i":
                b[b == -1] = 5  # the least number / -1 is undefined
            args = (a, b, Empty((4, n), dtype), n)
            _, _, out = run(load(target), f"divide_{kind}", -(-n // 96), 96, *args)
            for x, y, *got in zip(a.tolist(), b.tolist(), *out.tolist(), strict=True):

                def wrap(v: int) -> int:
                    return signed(v, bits) if kind[0] == "i" else v & (2**bits - 1)  # noqa: B023

                def quotient(v: int, by: int) -> int:
                    return abs(v) // abs(by) * (1 if (v < 0) == (by < 0) else -1)

                q, sevens, tens = (quotient(x, by) for by in (y, 7, 10))
                assert got == [q, x - q * y, wrap(x * y), wrap(sevens + x - tens * 10)]


@targets
def test_wide_products_and_shifts(target: str) -> None:
    for n in SIZES[:3]:
        a, b = words(n, n), words(n, n + 9)
        args = (a, b, Empty((10, n), np.uint64), n)
        _, _, out = run(load(target), "wide", -(-n // 96), 96, *args)
        for x, y, *got in zip(a.tolist(), b.tolist(), *out.tolist(), strict=True):
            sx, sy, x32, y32 = signed(x, 64), signed(y, 64), x & M32, y & M32
            i32, j32 = signed(x, 32), signed(y, 32)
            p = x * y + (x ^ y)
            turn = y & 63
            u24 = (x & 0xFFFFFF) * (y & 0xFFFFFF) & M32
            s24 = signed(signed(x, 24) * signed(y, 24), 32)
            assert got == [
                x * y >> 64,
                (sx * sy >> 64) & M64,
                x32 * y32,
                i32 * j32 & M64,
                (x32 * y32 >> 32) << 32 | (i32 * j32 >> 32) & M32,
                (x << turn | x >> (64 - turn)) & M64,
                (sx >> turn) & M64,
                ((p >> 64) ^ p) & M64,
                (s24 + (u24 << 32)) & M64,
                ((abs(x32 - y32) + 7) & M32) << 32 | (abs(i32 - j32) + 9) & M32,
            ]


def parts(x: int, bits: int, sign: bool = False) -> list[int]:
    """The 8- or 16-bit parts of a word, the lowest first."""
    out = [x >> i & (2**bits - 1) for i in range(0, 32, bits)]
    return [signed(v, bits) for v in out] if sign else out


def joined(values: list[int], bits: int) -> int:
    return sum((v & (2**bits - 1)) << (i * bits) for i, v in enumerate(values))


@targets
def test_bits(target: str) -> None:
    for n in SIZES[:3]:
        a, b, c = (words(n, n + i, 32) for i in range(3))
        args = (a, b, c, Empty((n, 22), np.uint32), n)
        *_, out = run(load(target), "bits", -(-n // 96), 96, *args)
        for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), out.tolist(), strict=True):
            reverse = int(f"{x:032b}"[::-1], 2)
            both = parts(x, 8) + parts(y, 8)
            perm = []
            for i in range(4):
                pick = z >> (4 * i) & 15
                byte = both[pick & 7]
                perm.append(255 * (byte >> 7) if pick & 8 else byte)
            long, s, sc = y << 32 | x, z & 31, min(z, 32)
            sx, sy, sz = (signed(v, 32) for v in (x, y, z))
            dot = sum(p * q for p, q in zip(parts(x, 8), parts(y, 8), strict=True))
            sdot = sum(p * q for p, q in zip(parts(x, 8, True), parts(y, 8, True), strict=True))
            hs, bs = parts(x, 16, True), parts(y, 8, True)
            hu, bu = parts(x, 16), parts(y, 8)
            field = (x >> (y & 31)) & ((1 << (z & 31)) - 1)
            at, length = z & 31, y >> 27
            mask = ((1 << length) - 1) << at & M32
            assert got == [
                bin(x).count("1"),
                32 - x.bit_length(),
                (x & -x).bit_length(),
                reverse,
                joined(perm, 8),
                (long << s >> 32) & M32,
                (long >> s) & M32,
                (long << sc >> 32) & M32,
                (long >> sc) & M32,
                (dot + z) & M32,
                (sdot + sz) & M32,
                (hs[0] * bs[0] + hs[1] * bs[1] + sz) & M32,
                (hu[0] * bu[2] + hu[1] * bu[3] + z) & M32,
                (sx + sy >> 1) & M32,
                (sx + sy + 1 >> 1) & M32,
                x + y >> 1,
                (x & y) | (~x & M32 & z),
                x ^ y ^ z,
                joined([both[z >> 4 * i & 7] for i in range(4)], 8),
                field,
                (y & ~mask & M32) | (x << at & mask),
                (1 << x.bit_length()) & M32,
            ]
        d = words(n, n)
        _, out = run(load(target), "bits64", 1, 64, d, Empty((n, 4), np.uint64), n)
        for x, got in zip(d.tolist(), out.tolist(), strict=True):
            reverse = int(f"{x:064b}"[::-1], 2)
            assert got == [bin(x).count("1"), 64 - x.bit_length(), (x & -x).bit_length(), reverse]


@targets
def test_simd_in_a_word(target: str) -> None:
    n = 100
    a, b = words(n, 1, 32), words(n, 2, 32)
    args = (a, b, Empty((n, 8), np.uint32), n)
    *_, out = run(load(target), "simd_in_word", 2, 64, *args)
    for x, y, got in zip(a.tolist(), b.tolist(), out.tolist(), strict=True):
        bytes_ = list(zip(parts(x, 8), parts(y, 8), strict=True))
        shorts = list(zip(parts(x, 16, True), parts(y, 16, True), strict=True))
        assert got == [
            joined([p + q for p, q in bytes_], 8),
            joined([max(p - q, 0) for p, q in bytes_], 8),
            joined([max(p, q) for p, q in shorts], 16),
            joined([abs(p - q) for p, q in bytes_], 8),
            joined([255 * (p > q) for p, q in bytes_], 8),
            joined([p + q + 1 >> 1 for p, q in bytes_], 8),
            sum(abs(p - q) for p, q in shorts),
            joined([min(max(p + q, -(2**15)), 2**15 - 1) for p, q in shorts], 16),
        ]


@targets
def test_big_numbers_by_carry_chains(target: str) -> None:
    n = 40
    a, b = (words(n * 8, s, 32).reshape(n, 8) for s in (3, 4))
    a[0], b[0] = M32, M32
    args = (a, b, Empty((n, 9), np.uint32), Empty((n, 8), np.uint32), n)
    _, _, sums, products = run(load(target), "big", 2, 32, *args)

    def integer(limbs: Any) -> int:
        return int.from_bytes(limbs.tobytes(), "little")

    for x, y, s, p in zip(a, b, sums, products, strict=True):
        assert integer(s) == integer(x) + integer(y)
        assert integer(p) == integer(x) * integer(y) % 2**256


@targets
def test_number_theory(target: str) -> None:
    loaded = load(target)
    for n, modulus in ((1, 1000003), (33, 2**61 - 1), (31, 2**64 - 59)):
        bases, exponents = words(n, n), words(n, n + 1)
        args = (bases, exponents, Empty(n, np.uint64), modulus, n)
        out = run(loaded, "power_mod", -(-n // 32), 32, *args)[2]
        pairs = zip(bases.tolist(), exponents.tolist(), strict=True)
        assert out.tolist() == [pow(x, e, modulus) for x, e in pairs]
    n = 100
    a, b = words(n, 5, 32), words(n, 6, 32)
    args = (a, b, Empty(n, np.uint32), Empty(n, np.uint8), n)
    *_, gcds, primes = run(loaded, "gcd_and_primes", 1, 128, *args)
    assert gcds.tolist() == [math.gcd(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    small = [x & 0xFFFF for x in a.tolist()]
    assert primes.tolist() == [
        p > 1 and all(p % d for d in range(2, math.isqrt(p) + 1)) for p in small
    ]


@targets
def test_hashes(target: str) -> None:
    loaded, random = load(target), np.random.default_rng(0)
    n = 33
    texts, lengths = random.integers(0, 256, (n, 56)).astype(np.uint8), np.arange(n, dtype=np.int32)
    lengths[-1] = 55
    out = run(loaded, "sha256", 2, 32, texts, lengths, Empty((n, 32), np.uint8), n)[2]
    for text, length, digest in zip(texts, lengths, out, strict=True):
        assert digest.tobytes() == hashlib.sha256(text[:length].tobytes()).digest()
    ends = random.integers(0, 9, n).cumsum().astype(np.int32)
    data = random.integers(0, 256, max(int(ends[-1]), 1)).astype(np.uint8)
    out = run(loaded, "crc32", 2, 32, data, ends, Empty(n, np.uint32), n)[2]
    assert out.tolist() == [zlib.crc32(p.tobytes()) for p in np.split(data[: ends[-1]], ends)[:-1]]


@targets
def test_philox(target: str) -> None:
    n, key = 33, np.array([0xA4093822, 0x299F31D0], np.uint32)
    (out,) = run(load(target), "philox", 2, 32, Empty((n, 4), np.uint32), key.tobytes(), n)
    for i, got in enumerate(out.tolist()):
        c, (k0, k1) = [i, 0, 3 * i, 7], key.tolist()
        for _ in range(10):
            p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [q >> 32 ^ c[1] ^ k0, q & M32, p >> 32 ^ c[3] ^ k1, p & M32]
            k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
        assert got == c


@targets
def test_conversions(target: str) -> None:
    edges = [0.5, 1.5, 2.5, -0.5, -1.5, 2**31, -(2**31) - 129]
    edges += [3e9, 5e9, 1e-30, -0.0, np.inf, -np.inf]
    x = np.array([*edges, *np.random.default_rng(0).standard_normal(87) * 1000], np.float32)
    _, out = run(load(target), "convert", 1, 128, x, Empty((100, 12), np.int32), 100)
    rows = out.T

    def clip(v: Any, low: int, high: int) -> list[int]:
        return [int(min(max(e, low), high)) for e in v.tolist()]

    for row, rounded in zip(rows, (np.trunc(x), np.rint(x), np.ceil(x), np.floor(x)), strict=False):
        assert row.tolist() == clip(rounded.astype(np.float64), -(2**31), 2**31 - 1)
    assert rows[4].view(np.uint32).tolist() == clip(np.trunc(x).astype(np.float64), 0, M32)
    longs = [min(max(e, -(2**63)), 2**63 - 1) for e in np.rint(x).astype(np.float64).tolist()]
    assert rows[5].tolist() == [signed(int(v) >> 16, 32) for v in longs]
    away = np.copysign(np.floor(np.abs(x.astype(np.float64)) + 0.5), x)
    for row, rounded in zip(rows[6:11], (np.rint, np.floor, np.ceil, np.trunc, None), strict=True):
        expected = away if rounded is None else rounded(x)
        assert np.array_equal(row, expected.astype(np.float32).view(np.int32))
    shorts = np.array([signed(v, 16) for v in rows[0].tolist()], np.float32)
    # Contracted to a fused multiply-add, which doubles do exactly for these.
    fused = x.astype(np.float64) * float(np.float32(0.1)) + shorts
    assert np.array_equal(rows[11], fused.astype(np.float32).view(np.int32))


@targets
def test_objects_templates_and_lambdas(target: str) -> None:
    loaded = load(target)
    affine = np.dtype(
        [("scale", "i4"), ("shift", "i4"), ("unused", "f8"), ("more", "i2", 3)], align=True
    )
    job = np.dtype(
        [("first", affine), ("second", affine), ("in", "u8"), ("out", "u8"), ("n", "i4"),
         ("kind", "S1")], align=True,
    )  # fmt: skip
    for n, kind in ((1, b"a"), (33, b"b")):
        x = np.random.default_rng(n).integers(-1000, 1000, n).astype(np.int32)
        source, out = loaded.device.upload(x), loaded.device.alloc(n, np.int32)
        given = np.zeros((), job)
        first, second = (3, -4, 0.5, (10, -20, 30)), (-7, 11, 1.5, (1, 2, 3))
        given[()] = (first, second, source.address, out.address, n, kind)
        loaded.kernel("objects").launch(2, 32, [given.tobytes()], checks={"memory", "race"})
        for i, (value, got) in enumerate(zip(x.tolist(), out.get().tolist(), strict=True)):
            v = -7 * ((3 * value - 4) ^ 5) + 11
            y = 1
            for k in range(5):
                y = y * 31 + v + k * k + first[3][i % 3]
            assert got == signed(y + (11 if kind == b"b" else -4), 32)


@targets
def test_interpreter(target: str) -> None:
    # x, then while x > 0: total = total * 3 + x, x = x - 2; total % (x | 1) at the end.
    code = [0, 1, 5, 4, 6, 9, 8, 9, 0] + [0] * 8
    #       push 1, swap, dup, jump if > 0 to 9, pop, return | loop: ...
    code = [0, 1, 5, 4, 6, 8, 8, 9, 4, 0, 2, 2, 5, 8, 5, 0, 3, 3]
    code += [0, 1, 1, 5, 0, 0, 1, 4, 6, 8, 8, 9]
    program = np.array(code, np.uint8)
    x = np.arange(-3, 40, dtype=np.int32)
    args = (program, x, Empty(x.size, np.int32), x.size)
    out = run(load(target), "interpreter", 1, 64, *args)[2]

    def interpret(value: int) -> int:
        stack, pc = [value], 0
        for _ in range(200):
            op = code[pc]
            pc += 1
            if op == 0:
                stack.append(code[pc])
                pc += 1
            elif op in (1, 2, 3):
                b, a = stack.pop(), stack.pop()
                stack.append(signed(a + b if op == 1 else a - b if op == 2 else a * b, 32))
            elif op == 4:
                stack.append(stack[-1])
            elif op == 5:
                stack[-1], stack[-2] = stack[-2], stack[-1]
            elif op == 6:
                pc = code[pc] if stack.pop() > 0 else pc + 1
            elif op == 8:
                stack.pop()
            elif op == 9:
                return stack[-1]
        return -1000

    assert out.tolist() == [interpret(v) for v in x.tolist()]
    assert len(set(out.tolist())) > 5


@targets
def test_tree_walks(target: str) -> None:
    random = np.random.default_rng(0)
    keys = random.permutation(100)
    nodes = np.full((100, 3), -1, np.int32)
    nodes[:, 0] = keys
    for i in range(1, 100):
        at = 0
        while True:
            side = 1 if keys[i] < nodes[at, 0] else 2
            if nodes[at, side] < 0:
                nodes[at, side] = i
                break
            at = nodes[at, side]
    for n in SIZES[:3]:
        ranges = np.sort(random.integers(0, 100, (n, 2)), axis=1).astype(np.int32)
        args = (nodes, ranges, Empty(n, np.int32), Empty(n, np.int32), n)
        _, _, sums, deepest = run(load(target), "tree", -(-n // 32), 32, *args)
        assert sums.tolist() == [sum(range(a, b)) for a, b in ranges.tolist()]
        assert (deepest >= 1).all()


@targets
def test_queens(target: str) -> None:
    for n, ways in ((5, 10), (6, 4), (7, 40)):
        (count,) = run(load(target), "queens", 1, (n, n), n, np.zeros(1, np.int32))
        assert count[0] == ways


@targets
def test_edit_distance(target: str) -> None:
    for na, nb in ((1, 1), (31, 33), (70, 20)):
        a, b = (np.random.default_rng(n).integers(97, 101, n).astype(np.uint8) for n in (na, nb))
        args = (a, na, b, nb, Empty(1, np.int32))
        out = run(load(target), "edit_distance", 1, 64, *args)[2]
        row = list(range(nb + 1))
        for i, x in enumerate(a, 1):
            last, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
        assert out[0] == row[nb]
