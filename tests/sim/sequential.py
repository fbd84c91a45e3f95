"""One atomic operation on bit patterns, with sums rounded from exact fractions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

# Formats of floating-point numbers: bits of the fraction and of the exponent.
FORMATS = {"f16": (10, 5), "bf16": (7, 8), "f32": (23, 8), "f64": (52, 11)}
CANONICAL = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}


def decode(bits: int, kind: str) -> Fraction | float:
    """The value of a bit pattern: a fraction, or an infinity or NaN as a float."""
    fraction_bits, exponent_bits = FORMATS[kind]
    sign = -1 if bits >> (fraction_bits + exponent_bits) else 1
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    fraction = bits & (1 << fraction_bits) - 1
    if exponent == (1 << exponent_bits) - 1:
        return float("nan") if fraction else sign * float("inf")
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == 0:
        return sign * Fraction(fraction) * Fraction(2) ** (1 - bias - fraction_bits)
    mantissa = Fraction(fraction + (1 << fraction_bits))
    return sign * mantissa * Fraction(2) ** (exponent - bias - fraction_bits)


def encode(value: Fraction, kind: str, zero: int) -> int:
    """The nearest bit pattern, ties to even; `zero` is the one for an exact 0."""
    if value == 0:
        return zero
    fraction_bits, exponent_bits = FORMATS[kind]
    bias = (1 << (exponent_bits - 1)) - 1
    sign = (value < 0) << (fraction_bits + exponent_bits)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    while Fraction(2) ** exponent > size:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    exponent = max(exponent, 1 - bias)
    units = round(size / Fraction(2) ** (exponent - fraction_bits))  # round() ties to even
    # A subnormal has exponent field 0; a carry out of the fraction steps the exponent.
    bits = units + ((exponent + bias - 1) << fraction_bits)
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    return sign | min(bits, infinity)


def flushed(bits: int, kind: str) -> int:
    fraction_bits, exponent_bits = FORMATS[kind]
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    return (
        bits
        if exponent
        else bits >> (fraction_bits + exponent_bits) << (fraction_bits + exponent_bits)
    )


def float_add(a: int, b: int, kind: str, flush: bool = False) -> int:
    if flush:
        a, b = flushed(a, kind), flushed(b, kind)
    x, y = decode(a, kind), decode(b, kind)
    if isinstance(x, float) or isinstance(y, float):
        total = float(x) + float(y) if isinstance(x, float) and isinstance(y, float) else None
        if total is None:
            total = x if isinstance(x, float) else float(y)
        if total != total:
            return CANONICAL.get(kind, -1)
        fraction_bits, exponent_bits = FORMATS[kind]
        sign = (total < 0) << (fraction_bits + exponent_bits)
        return sign | ((1 << exponent_bits) - 1) << fraction_bits
    result = encode(x + y, kind, a & b if x == y == 0 else 0)
    return flushed(result, kind) if flush else result


def half_extreme(op_name: str, a: int, b: int, kind: str) -> int:
    x, y = decode(a, kind), decode(b, kind)
    if x != x or y != y:
        return CANONICAL[kind] if x != x and y != y else (b if x != x else a)
    if x == y == 0:
        return a | b if op_name == "min" else a & b
    return a if (x <= y) == (op_name == "min") else b


def signed(bits: int, kind: str) -> int:
    width = int(kind[1:])
    return bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits


def apply(op_name: str, kind: str, old: int, b: int, c: int, flush: bool) -> int:
    """One atomic operation on bit patterns. PTX ISA "atom", Semantics."""
    if op_name == "add" and kind in FORMATS:
        return float_add(old, b, kind, flush)
    if kind in FORMATS:
        return half_extreme(op_name, old, b, kind)
    width = int(kind[1:])
    x, y = signed(old, kind), signed(b, kind)
    table: dict[str, Callable[[], int]] = {
        "add": lambda: x + y,
        "min": lambda: min(x, y),
        "max": lambda: max(x, y),
        "and": lambda: old & b,
        "or": lambda: old | b,
        "xor": lambda: old ^ b,
        "exch": lambda: b,
        "cas": lambda: c if old == b else old,
        "inc": lambda: 0 if old >= b else old + 1,
        "dec": lambda: b if old == 0 or old > b else old - 1,
    }
    return table[op_name]() % (1 << width)
