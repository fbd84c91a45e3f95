"""cvt: conversions among integers, floating-point formats and packed pairs (PTX ISA cvt, 9.0).

Two decisions that PTX ISA leaves open: `.sat` and `.relu` turn -0 into +0, as ptxas folds
`.sat` does and max(-0, +0) is; a NaN becomes the canonical NaN of its type, but f64 <-> f32 and
conversions that change nothing keep its payload, as ptxas folds them.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.sim.isa import narrow
from cumla.sim.isa.rounding import (
    DOT,
    HIGH_HALF,
    LOW_HALF,
    NAN_BITS,
    SIXTEEN,
    U32,
    any_nan,
    bf16_to_single,
    constant,
    double_to_odd_single,
    double_to_single,
    flush,
    half_bits,
    half_to_single,
    integer_to_odd_double,
    look_up,
    random_half_bits,
    round_off,
    single_to_bf16,
    single_to_bf16_pair,
    single_to_half,
    wide_to_double,
)
from cumla.sim.isa.table import DTYPES, Env, Op, Unsupported, instruction
from cumla.sim.ptx.syntax import Instruction

Array = NDArray[Any]
Stage = Callable[[Array], Array]

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
FLOATS = ("bf16", "f16", "f32", "f64")
TO_INTEGRAL: dict[str, Stage] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
ROUNDINGS = ("rn", "rna", "rz", "rm", "rp", "rs", *TO_INTEGRAL)
FLAGS = ("ftz", "sat", "relu", "satfinite")
PACKED_INTEGERS = ("u2", "s2", "u4", "s4", "u8", "s8")
PLACES = {"bf16": 8, "f16": 11, "tf32": 11, "f32": 24, "f64": 53}
LARGEST = {"f16": 65504.0, "bf16": 2.0**128 - 2.0**120, "tf32": 2.0**128 - 2.0**117}

_ZERO = constant(0.0, np.float32)
_TF32_BITS = constant(0xFFFFE000, U32)


@instruction("cvt")
def cvt(ins: Instruction, env: Env) -> Op:
    """cvt and cvt.pack."""
    if ins.modifiers[:1] == ("pack",):
        return _pack(ins)
    if len(ins.modifiers) < 2:
        raise Unsupported("cvt without two types")
    *flags, to, source = ins.modifiers
    rounding = [flag for flag in flags if flag in ROUNDINGS]
    modes = [flag for flag in flags if flag in FLAGS]
    unknown = [flag for flag in flags if flag not in ROUNDINGS and flag not in FLAGS]
    if unknown:
        raise Unsupported(f"modifier .{unknown[0]} of cvt")
    if len(rounding) > 1:
        raise Unsupported(f"cvt with two roundings, .{rounding[0]} and .{rounding[1]}")
    mode = rounding[0] if rounding else ""
    for flag in modes:
        _check_flag(flag, mode, to, source)
    if to in INTEGERS and source in INTEGERS and not mode:
        return Op(_integer_to_integer(to, source, "sat" in modes), (source,), (to,))
    if to in INTEGERS and source in FLOATS:
        return Op(_float_to_integer(to, source, mode, "ftz" in modes), (source,), (to,))
    if to in FLOATS and source in INTEGERS:
        return Op(_integer_to_float(to, source, mode, "sat" in modes), (source,), (to,))
    if (to in FLOATS and source in FLOATS) or (to, source) == ("tf32", "f32"):
        return Op(_float_to_float(to, source, mode, modes), (source,), (to,))
    return _packed(to, source, mode, modes)


def _check_flag(flag: str, mode: str, to: str, source: str) -> None:
    f32 = "f32" in (to, source)
    allowed = {
        "ftz": f32 and to in (*FLOATS, *INTEGERS),
        "sat": to in INTEGERS or to in ("f16", "f32", "f64"),
        "relu": to not in ("f32", "f64", "ue8m0x2", *INTEGERS) and mode != "rna",
        "satfinite": to in LARGEST or to.endswith("x2"),
    }[flag]
    if flag in ("relu", "satfinite") and to in LARGEST:
        allowed = allowed and source == "f32" and mode in ("rn", "rz", "rna")
    if not allowed:
        raise Unsupported(f"modifier .{flag} of cvt.{to}.{source}")


# Integers


def _integer_to_integer(to: str, source: str, saturate: bool) -> Stage:
    target = DTYPES[to]
    change = methodcaller(
        "view" if target.itemsize == DTYPES[source].itemsize else "astype", target
    )
    if not saturate:
        return change
    ends, own = np.iinfo(target), np.iinfo(DTYPES[source])
    low, high = max(ends.min, own.min), min(ends.max, own.max)

    def saturated(x: Array) -> Array:
        return change(np.clip(x, low, high))

    return saturated


def _integer_to_float(to: str, source: str, mode: str, saturate: bool) -> Stage:
    if mode not in ("rn", "rz", "rm", "rp"):
        raise Unsupported(f"cvt.{to}.{source} without .rn, .rz, .rm or .rp")
    convert = _integer_converter(to, DTYPES[source].itemsize, mode)
    if not saturate:
        return convert

    def saturated(x: Array) -> Array:
        return convert(np.clip(x, 0, 1))

    return saturated


def _integer_converter(to: str, size: int, mode: str) -> Stage:
    if to == "f64":
        if size < 8 or mode == "rn":
            return methodcaller("astype", np.float64)
        return lambda x: wide_to_double(x, mode)
    if to == "f32":
        if size < 4 or mode == "rn":
            return methodcaller("astype", np.float32)
        return lambda x: double_to_single(integer_to_odd_double(x), mode)
    if to == "f16":
        if size < 4:
            return lambda x: single_to_half(x.astype(np.float32), mode)
        # f16 ends at 65504: what lies beyond 65536 rounds as 65537 does, and that fits f32.
        return lambda x: single_to_half(_within(x, 65537).astype(np.float32), mode)
    if size < 4:
        return lambda x: single_to_bf16(x.astype(np.float32), mode)
    return lambda x: single_to_bf16(double_to_odd_single(integer_to_odd_double(x)), mode)


def _within(x: Array, bound: int) -> Array:
    return np.clip(x, -bound if x.dtype.kind == "i" else 0, bound)


# Floats to integers


def _float_to_integer(to: str, source: str, mode: str, ftz: bool) -> Stage:
    if mode not in TO_INTEGRAL:
        raise Unsupported(f"cvt.{to}.{source} without .rni, .rzi, .rmi or .rpi")
    target = DTYPES[to]
    ends = np.iinfo(target)
    # PTX ISA cvt, Integer Notes: what a NaN becomes.
    nan = 0
    if source == "f64" or target.itemsize == 8:
        nan = ends.min if to[0] == "s" else 1 << ends.bits - 1
    low, beyond = float(ends.min), float(ends.max + 1)
    round_ = TO_INTEGRAL[mode]

    def clamped(x: Array) -> Array:
        whole = round_(x)
        inside = (whole >= low) & (whole < beyond)
        result = np.where(inside, whole, 0).astype(target)
        result[whole < low] = ends.min
        result[whole >= beyond] = ends.max
        result[np.isnan(x)] = nan
        return result

    squared = min(beyond, float(1 << 63)) ** 2
    signed = to[0] == "s"

    def fits(whole: Array) -> bool:
        """True only if all values are in range; no comparison is true of a NaN."""
        if whole.size <= DOT and float(whole.dot(whole)) < squared:
            return signed or float(np.minimum.reduce(whole)) >= 0.0
        least, greatest = float(np.minimum.reduce(whole)), float(np.maximum.reduce(whole))
        return low <= least and greatest < beyond

    def convert(x: Array) -> Array:
        whole = x if mode == "rzi" else round_(x)  # astype truncates
        return whole.astype(target) if fits(whole) else clamped(x)

    widened = _widen(source)
    if ftz and mode in ("rmi", "rpi"):  # the other modes make zero of a subnormal number
        widened.append(flush)
    return _chain([*widened, convert])


# Floats to floats


def _chain(stages: list[Stage]) -> Stage:
    """One function for several, the first applied first."""
    if not stages:
        return lambda x: x
    if len(stages) == 1:
        return stages[0]
    *others, last = stages
    first = _chain(others)
    return lambda x: last(first(x))


def _widen(source: str) -> list[Stage]:
    """To f32, or f64 for f64."""
    if source == "f16":
        return [half_to_single]
    return [bf16_to_single] if source == "bf16" else []


def _float_to_float(to: str, source: str, mode: str, modes: list[str]) -> Stage:
    if mode in TO_INTEGRAL:
        if to != source:
            raise Unsupported(f"modifier .{mode} of cvt.{to}.{source}")
    elif PLACES[to] < PLACES[source] and not mode and (to, source) != ("bf16", "f16"):
        # ptxas asks for no rounding between the two 16-bit types, and takes rn.
        raise Unsupported(f"cvt.{to}.{source} without a rounding modifier")
    elif mode not in (("rn", "rz", "rna") if to == "tf32" else ("rn", "rz", "rm", "rp", "")):
        raise Unsupported(f"modifier .{mode} of cvt.{to}.{source}")
    if to == source and not mode and not modes:
        return _chain([])
    stages = _widen(source)
    # To f16 the rounding modes rn and rz themselves make zeros of an f32's subnormal numbers.
    if "ftz" in modes and source in ("f32", "bf16") and not (to == "f16" and mode in ("rn", "rz")):
        stages.append(flush)
    stages += _clamps(to, modes)
    if mode in TO_INTEGRAL:
        stages.append(TO_INTEGRAL[mode])
        mode = "rn"
        if to == "f32":
            stages.append(_canonical)
    stages += _narrowing(to, source == "f64", mode or "rn")
    if "ftz" in modes and source == "f64":
        stages.append(flush)
    return _chain(stages)


def _clamps(to: str, modes: list[str]) -> list[Stage]:
    """`.sat`, `.relu` and `.satfinite`, carried out before the rounding.

    All bounds are numbers of the type rounded to, so the result is the same as afterwards.
    """
    stages: list[Stage] = []
    if "sat" in modes:
        stages.append(lambda x: np.fmin(np.fmax(x, 0.0), 1.0) + 0.0)
    if "relu" in modes:
        stages.append(lambda x: np.maximum(x, _ZERO) + _ZERO)
    if "satfinite" in modes:
        bound = LARGEST[to.removesuffix("x2")]
        least, largest = constant(-bound, np.float32), constant(bound, np.float32)
        stages.append(lambda x: np.minimum(np.maximum(x, least), largest))
    return stages


def _canonical(x: Array) -> Array:
    if any_nan(x):
        return np.where(np.isnan(x), NAN_BITS, x.view(U32)).view(np.float32)
    return x


def _narrowing(to: str, double: bool, mode: str) -> list[Stage]:
    """From f32, or from f64 if double."""
    if to == "f64":
        return [] if double else [methodcaller("astype", np.float64)]
    if to == "f32":
        return [lambda x: double_to_single(x, mode)] if double else []
    last: Stage
    if to == "f16":

        def last(x: Array) -> Array:
            return single_to_half(x, mode)

    elif to == "bf16":

        def last(x: Array) -> Array:
            return single_to_bf16(x, mode)

    else:

        def last(x: Array) -> Array:
            return np.bitwise_and(round_off(x, 13, mode), _TF32_BITS)

    return [double_to_odd_single, last] if double else [last]


# Packed formats


def _packed(to: str, source: str, mode: str, modes: list[str]) -> Op:
    target, origin = to.removesuffix("x2"), source.removesuffix("x2")
    if to in ("f16x2", "bf16x2") and source == "f32" and mode in ("rn", "rz", "rs"):
        return _singles_to_halves(to, mode, _chain(_clamps(to, modes)))
    if to == f"{target}x2" and target in narrow.FORMATS and "satfinite" in modes and mode == "rn":
        bits = narrow.FORMATS[target].bits
        relu = "relu" in modes
        if source == "f16x2":
            return _halves_to_codes(narrow.from_half(target, relu), bits)
        if source == "bf16x2":
            return _halves_to_codes(narrow.from_upper_half(target, relu), bits)
        if source == "f32":
            return _singles_to_codes(narrow.from_upper_half(target, relu), bits)
    if to == "ue8m0x2" and mode in ("rz", "rp"):
        table = narrow.scale_from_upper_half(mode, "satfinite" in modes)
        if source == "f32":
            return _singles_to_codes(table, 8)
        if source == "bf16x2":
            return _halves_to_codes(table, 8)
    if mode == "rn" and "satfinite" not in modes:
        if to == "f16x2" and source == f"{origin}x2" and origin in narrow.FORMATS:
            table = narrow.pair_to_half_pair(origin, "relu" in modes)
            kind = "b8" if origin == "e2m1" else "b16"
            return Op(lambda x: look_up(table, x), (kind,), (to,))
        if (to, source) == ("bf16x2", "ue8m0x2") and not modes:
            table = narrow.scale_pair_to_bf16_pair()
            return Op(lambda x: look_up(table, x), ("b16",), (to,))
    name = ".".join(part for part in ("cvt", mode, *modes, to, source) if part)
    raise Unsupported(f"conversion {name}")


def _singles_to_codes(table: Array, bits: int) -> Op:
    result = "b8" if bits == 4 else "b16"
    return Op(narrow.singles_to_pair(table, bits), ("f32", "f32"), (result,))


def _halves_to_codes(table: Array, bits: int) -> Op:
    return Op(narrow.halves_to_pair(table, bits), ("b32",), ("b8" if bits == 4 else "b16",))


def _singles_to_halves(to: str, mode: str, clamp: Stage) -> Op:
    if mode == "rs":
        return Op(_random_pair(to, clamp), ("f32", "f32", "b32"), (to,))

    def to_bf16(a: Array, b: Array) -> Array:
        return single_to_bf16_pair(clamp(a), clamp(b), mode)

    def to_f16(a: Array, b: Array) -> Array:
        high = half_bits(clamp(a), mode)
        return np.bitwise_or(np.left_shift(high, SIXTEEN, high), half_bits(clamp(b), mode))

    return Op(to_bf16 if to == "bf16x2" else to_f16, ("f32", "f32"), (to,))


def _random_pair(to: str, clamp: Stage) -> Callable[[Array, Array, Array], Array]:
    """PTX ISA cvt, rbits: 16 bits for each operand in bf16x2, the lower 13 of them in f16x2."""
    if to == "bf16x2":

        def to_bf16(a: Array, b: Array, rbits: Array) -> Array:
            upper = round_off(clamp(a), 16, "rs", rbits >> 16) & HIGH_HALF
            return upper | round_off(clamp(b), 16, "rs", rbits & LOW_HALF) >> 16

        return to_bf16

    def to_f16(a: Array, b: Array, rbits: Array) -> Array:
        upper = random_half_bits(clamp(a), rbits >> 16 & 0x1FFF) << 16
        return upper | random_half_bits(clamp(b), rbits & 0x1FFF)

    return to_f16


def _pack(ins: Instruction) -> Op:
    """cvt.pack: two integers, saturated, below the lower bits of a third operand."""
    form = ins.modifiers[1:]
    if form in (("sat", "u16", "s32"), ("sat", "s16", "s32")):
        sources: tuple[str, ...] = ("s32", "s32")
    elif form[:1] == ("sat",) and form[2:] == ("s32", "b32") and form[1] in PACKED_INTEGERS:
        sources = ("s32", "s32", "b32")
    else:
        raise Unsupported(f"conversion {ins.name}")
    size = int(form[1][1:])
    mask = (1 << size) - 1
    low = 0 if form[1][0] == "u" else -(1 << size - 1)
    high = low + mask

    def run(a: Array, b: Array, c: Array | None = None) -> Array:
        upper = np.clip(a, low, high).view(U32) & mask
        result = upper << size | np.clip(b, low, high).view(U32) & mask
        return result if c is None else result | c << 2 * size

    return Op(run, sources, ("u32",))
