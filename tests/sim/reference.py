"""IEEE 754 arithmetic by its definition, with fractions: the exact value, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

# precision and least exponent of a normal number; dtype of values and of bits
FORMATS: dict[str, tuple[int, int, Any, Any]] = {
    "f16": (11, -14, np.float16, np.uint16),
    "bf16": (8, -126, ml_dtypes.bfloat16, np.uint16),
    "f32": (24, -126, np.float32, np.uint32),
    "f64": (53, -1022, np.float64, np.uint64),
}
MODES = ("rn", "rz", "rm", "rp")
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}


def largest(kind: str) -> float:
    """The largest finite number."""
    precision, least, _, _ = FORMATS[kind]
    return (2 - 2.0 ** (1 - precision)) * 2.0 ** (1 - least)


def rounded(x: Fraction, kind: str, mode: str) -> float:
    """x, not zero, rounded to a format, with subnormal numbers and overflow."""
    precision, least, _, _ = FORMATS[kind]
    sign = -1 if x < 0 else 1
    numerator, denominator = abs(x.numerator), x.denominator
    exponent = numerator.bit_length() - denominator.bit_length()
    if numerator << max(-exponent, 0) < denominator << max(exponent, 0):
        exponent -= 1
    place = max(exponent, least) - precision + 1
    below, rest = divmod(numerator << max(-place, 0), denominator << max(place, 0))
    unit = denominator << max(place, 0)
    away = {
        "rn": 2 * rest > unit or (2 * rest == unit and below % 2 == 1),
        "rz": False,
        "rm": rest > 0 and x < 0,
        "rp": rest > 0 and x > 0,
    }[mode]
    count = below + away
    if count.bit_length() + place > 2 - least:  # 2**128 or more in f32
        stays = {"rn": False, "rz": True, "rm": x > 0, "rp": x < 0}[mode]
        return sign * (largest(kind) if stays else math.inf)
    return sign * math.ldexp(count, place)


def fma(a: float, b: float, c: float, kind: str, mode: str) -> float:
    """a * b + c."""
    if math.isnan(a) or math.isnan(b) or math.isnan(c):
        return math.nan
    if math.isinf(a) or math.isinf(b):
        if a == 0 or b == 0:
            return math.nan
        product = math.copysign(math.inf, a) * math.copysign(1, b)
        return math.nan if c == -product else product
    if math.isinf(c):
        return c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact:
        return rounded(exact, kind, mode)
    minus = math.copysign(1, a) * math.copysign(1, b) < 0
    if (a == 0 or b == 0) and c == 0 and minus == (math.copysign(1, c) < 0):
        return c
    return -0.0 if mode == "rm" else 0.0


def add(a: float, b: float, kind: str, mode: str) -> float:
    """a + b."""
    return fma(a, 1.0, b, kind, mode)


def sub(a: float, b: float, kind: str, mode: str) -> float:
    """a - b."""
    return fma(a, 1.0, -b, kind, mode)


def mul(a: float, b: float, kind: str, mode: str) -> float:
    """a * b."""
    product_is_minus = math.copysign(1, a) != math.copysign(1, b)
    return fma(a, b, -0.0 if product_is_minus else 0.0, kind, mode)


def div(a: float, b: float, kind: str, mode: str) -> float:
    """a / b."""
    if math.isnan(a) or math.isnan(b) or (a == 0 == b) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    sign = math.copysign(1, a) * math.copysign(1, b)
    if math.isinf(a) or b == 0:
        return sign * math.inf
    if math.isinf(b) or a == 0:
        return sign * 0.0
    return rounded(Fraction(a) / Fraction(b), kind, mode)


def rcp(a: float, kind: str, mode: str) -> float:
    """1 / a."""
    return div(1.0, a, kind, mode)


def sqrt(a: float, kind: str, mode: str) -> float:
    """The square root."""
    if math.isnan(a) or a < 0:
        return math.nan
    if a in (0, math.inf):
        return a
    square = Fraction(a) * 4**700
    root = math.isqrt(square.numerator // square.denominator)
    exact = root * root == square
    return rounded(Fraction(2 * root + (not exact), 2) / 2**700, kind, mode)


FUNCTIONS: dict[str, Callable[..., float]] = {
    f.__name__: f for f in (fma, add, sub, mul, div, rcp, sqrt)
}


def values(bits: Any, kind: str) -> list[float]:
    """Bits of a format as Python floats, exactly."""
    _, _, dtype, integer = FORMATS[kind]
    with np.errstate(all="ignore"):  # NumPy warns of signalling NaN
        return [float(x) for x in np.asarray(bits, integer).view(dtype).astype(np.float64)]


def bits_of(numbers: Iterable[float], kind: str) -> Any:
    """Floats, numbers of the format, as bits; NaN is canonical."""
    _, _, dtype, integer = FORMATS[kind]
    array = np.array(list(numbers), np.float64)
    with np.errstate(all="ignore"):
        bits = array.astype(dtype).view(integer)
    if kind in NAN:
        bits[np.isnan(array)] = NAN[kind]
    return bits


def expected(name: str, kind: str, mode: str, *operands: Any) -> Any:
    """Bits of the results of an operation on arrays of bits."""
    lanes = zip(*(values(x, kind) for x in operands), strict=True)
    return bits_of((FUNCTIONS[name](*x, kind, mode) for x in lanes), kind)


def edges(kind: str) -> list[int]:
    """Bits that are worth a try: of both signs, zero, subnormal, one, largest, infinite, NaN."""
    precision, least, _, integer = FORMATS[kind]
    sign = 1 << (np.iinfo(integer).bits - 1)
    fraction = 1 << (precision - 1)  # also the smallest normal number
    infinity = sign - fraction
    one = (1 - least) * fraction
    positive = [0, 1, 2, fraction // 2, fraction - 1, fraction, fraction + 1]
    positive += [one - 1, one, one + 1, one + fraction, infinity - 1, infinity, infinity + 1]
    positive += [sign - 1]
    return positive + [x | sign for x in positive]


def random_bits(kind: str, count: int, seed: int) -> Any:
    """Bits: a third any, a third near one, a third with few bits set, so that ties are many."""
    precision, least, _, integer = FORMATS[kind]
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, np.iinfo(integer).max, count, integer, endpoint=True)
    part = rng.integers(0, 3, count)
    fraction = 1 << (precision - 1)
    spread = min(30, -least)
    exponents = rng.integers(1 - least - spread, 1 - least + spread, count).astype(integer)
    low = bits & integer(fraction - 1)
    few = low & integer(fraction - fraction // 16)
    near = bits & integer(1 << (np.iinfo(integer).bits - 1)) | exponents * integer(fraction)
    bits = np.where(part == 1, near | low, bits)
    return np.where(part == 2, near | few, bits)


def pairs(kind: str, count: int, seed: int) -> tuple[Any, Any]:
    """All pairs of edges, then random ones."""
    _, _, _, integer = FORMATS[kind]
    special = np.array(edges(kind), integer)
    a = np.repeat(special, special.size)
    b = np.tile(special, special.size)
    return (
        np.concatenate([a, random_bits(kind, count, seed)]),
        np.concatenate([b, random_bits(kind, count, seed + 1)]),
    )


def triples(kind: str, count: int, seed: int) -> tuple[Any, Any, Any]:
    """Random choices of edges, random numbers, and sums that cancel or tie."""
    _, _, dtype, integer = FORMATS[kind]
    rng = np.random.default_rng(seed)
    special = np.array(edges(kind), integer)
    parts = [tuple(rng.choice(special, count) for _ in range(3))]
    parts.append(tuple(random_bits(kind, count, seed + i) for i in range(3)))
    a, b = (random_bits(kind, count, seed + 3 + i) for i in range(2))
    with np.errstate(all="ignore"):
        product = a.view(dtype).astype(np.float64) * b.view(dtype).astype(np.float64)
        c = (-product).astype(dtype).view(integer)
        parts.append((a, b, c))  # what is left is the product's rounding error
        shift = np.exp2(rng.integers(-60, 60, count).astype(np.float64))
        c = (product * shift).astype(dtype).view(integer)
        parts.append((a, b, c))
    return tuple(np.concatenate(x) for x in zip(*parts, strict=True))  # type: ignore[return-value]


# The sum c + p of ties() must lose what p has beyond a power of two, of which p has 2**...
_LOST = {"f16": 21 - 13, "f32": 47 - 30, "f64": 105 - 53}


def ties(kind: str, count: int, seed: int) -> tuple[Any, Any, Any]:
    """Factors and addends whose exact sum is so close to a tie that a wider sum rounds to one.

    First sums of c and a product that is half of c's last place times 1 + d, with a tiny d of
    either sign; then a tiny c, of either sign, and a product that is a tie itself.
    """
    precision, _, dtype, integer = FORMATS[kind]
    rng = np.random.default_rng(seed)
    half = 1 << (precision - 1)
    target = 1 << (2 * precision - 1)
    found: list[tuple[float, float, float]] = []
    while kind in _LOST and len(found) < count:
        a = int(rng.integers(half, 2 * half))
        b = (target + a // 2) // a
        if b < 2 * half and 0 < abs(a * b - target) < 1 << _LOST[kind]:
            c = int(rng.integers(half, 2 * half)) * 2.0
            found.append((a * 2.0 ** (1 - 2 * precision), float(b), c))
    scale, tiny = (8.0, 2.0**-24) if kind == "f16" else (1.0, 2.0**-100)
    for a in rng.integers(half, 4 * half // 3, count):
        found.append(((int(a) | 1) * scale, 3.0, tiny))
    a, b, c = (np.array(x) * rng.choice([-1.0, 1.0], len(x)) for x in zip(*found, strict=True))
    return tuple(x.astype(dtype).view(integer) for x in (a, b, c))  # type: ignore[return-value]
