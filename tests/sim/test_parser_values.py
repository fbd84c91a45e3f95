"""The PTX parser: literals, constant expressions, variables and their initial values.

What is written in hexadecimal here is what ptxas 13.0 makes of the same declarations.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumla.sim.errors import PTXSyntaxError
from cumla.sim.ptx.syntax import (
    Immediate,
    Symbol,
)
from sim.ptx_text import immediate, module, variable

# Literals and constant expressions


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_float_literals_keep_their_bits(single: int, double: int) -> None:
    first, second = immediate(f"0f{single:08X}"), immediate(f"0D{double:016x}")
    assert (first.single_bits, first.double_bits) == (single, None)
    assert (second.single_bits, second.double_bits) == (None, double)
    for made, layout, bits in ((first, "<f", single), (second, "<d", double)):
        if made.value == made.value:  # a NaN's payload is in the bits only
            assert struct.pack(layout, made.value) == bits.to_bytes(
                len(struct.pack(layout, 0)), "little"
            )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False))
def test_number_literals(number: int, real: float) -> None:
    forms = (f"{number}", f"0x{number:x}", f"0X{number:X}", f"0b{number:b}", f"0{number:o}")
    for text in forms:
        assert immediate(text) == Immediate(number)
        assert immediate(f"{text}U") == Immediate(number)
        assert immediate(f"-{text}") == Immediate(-number)
    text = f"{real:.17e}"
    assert immediate(text) == Immediate(real)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.", 1.0),
        (".5", 0.5),
        ("-0.5", -0.5),
        ("1e5", 1e5),
        ("1.5E-3", 1.5e-3),
        ("1.0+2.5", 3.5),
        ("2.0*1.0/4.0", 0.5),
        ("1?2.0:3.0", 2.0),
        ("0xFFFFFFFFFFFFFFFF", 2**64 - 1),
        ("0x8000000000000000", 2**63),
        ("-1", -1),
        ("- 1", -1),
        ("-1U", 2**64 - 1),
        ("((((((1))))))+((2)*(3+(4)))", 15),
    ],
)
def test_values(text: str, value: float) -> None:
    assert immediate(text) == Immediate(value)


EXPRESSIONS = """
(1<<3)+4 = c; 7-2-1 = 4; 2+3*4 = e; (2+3)*4 = 14; -7/2 = fffffffffffffffd;
7/-2 = fffffffffffffffd; -1U/2 = 7fffffffffffffff; (.s64)-1U/2 = 0; -1>>60 = ffffffffffffffff;
(.u64)-1>>60 = f; 1<<64 = 1; 3<<65 = 6; -8>>65 = fffffffffffffffc; ~3 = fffffffffffffffc;
~0>>63 = 1; !0 = 1; !5 = 0; 1?2:3 = 2; 0?2:3 = 3; 0?2:3?4:5 = 4;
(0 ? 1U : -8)/2 = fffffffffffffffc; 1&3|4^6 = 3; 6&3==3 = 0; 1|2&&0 = 0; 1||0&&0 = 1; 5>3 = 1;
-1>1U = 1; -1>1 = 0; 3>=3 = 1; 2<=1 = 0; 2!=1 = 1; 0777 = 1ff; 0b1011 = b;
0x8000000000000000>>1 = 4000000000000000; -0x8000000000000000>>1 = 4000000000000000;
0x7fffffffffffffff+1 = 8000000000000000; WARP_SZ*2 = 40; -(-42) = 2a;
(.s64)(0xffffffffffffffff)<0 = 1; 12345678901*12345678901 = 4331a738d433a2f9;
1-(2-(3-4)) = fffffffffffffffe; 1.5<2.5 = 1; 1.0==1.0 = 1; 2.0*3.0>5.5 = 1; 3U-5U>0 = 1;
-7 % 4 = 1; ((0777 * 12345678901)) > -(3 % 0xffffffffffffffff) = 0;
((0xffffffffffffffff % (0xffffffffffffffff / WARP_SZ)) - (2 - 1 + 100 >> 65)) = ffffffffffffffed;
100 && ((3 ? 100 : 0x8000000000000000) < 0x7fffffffffffffff << 7) = 0;
((.u64)(5U << 0xffffffff) | (3 >> 63 * (5U > 0xffffffff))) = 8000000000000003;
0x7fffffffffffffff ^ (0 - 3) >> (65 - (0x8000000000000000 && 5U)) = 8000000000000002
"""


@pytest.mark.parametrize("row", EXPRESSIONS.split(";"), ids=str.strip)
def test_constant_expressions_as_ptxas(row: str) -> None:
    text, expected = row.rsplit(" = ", 1)
    value = immediate(text.strip()).value
    assert isinstance(value, int)
    assert value % 2**64 == int(expected, 16)
    assert variable(f".global .u64 v = {text};").initial == (value % 2**64).to_bytes(8, "little")


@pytest.mark.parametrize(
    "text",
    ["089", "3u", "0x", "0f3F80", "1+", "(1", "1)", "1 2", "1/0", "5%0", "1.0%2.0", "~1.0",
     "1.5<<2", "1.0&2.0", "!2.0", "1.0?2:3", "1?2", "0x10000000000000000", "1.0/0.0", "", "*3",
     "-" * 3000 + "1"],
)  # fmt: skip
def test_bad_constants(text: str) -> None:
    with pytest.raises(PTXSyntaxError, match="PTX line 9: expected "):
        immediate(text)


# Variables

INITIAL = """
.b32 v = 1.5 -> 0000c03f
.b64 v = 0f3f800000 -> 0000803f00000000
.b64 v = 1.5 -> 000000000000f83f
.b32 v = 0d3ff8000000000000 -> 0000c03f
.u8 v = 300 -> 2c
.s8 v = -1 -> ff
.u16 v = 0x1fffe -> feff
.u32 v = 0x1ffffffff -> ffffffff
.s64 v = -2 -> feffffffffffffff
.u32 v[2][3] = {{1,2},{3}} -> 010000000200000003000000000000000000000000000000
.u16 v[2][2][2] = {{{1,2},{3,4}},{{5,6},{7,8}}} -> 01000200030004000500060007000800
.u32 v[] = {5,(1<<3)+1} -> 0500000009000000
.u32 v[][2] = {{5,6},{7}} -> 05000000060000000700000000000000
.v4 .f32 v = {1.0,2.0,3.0,4.0} -> 0000803f000000400000404000008040
.v2 .u16 v[2] = {{1,2},{3,4}} -> 0100020003000400
.f64 v = 0f3f8ccccd -> cdcc8c3f00000000
.f64 v = 1.1 -> 9a9999999999f13f
.f64 v = 0d7ff0000000000001 -> 010000000000f07f
.f32 v = 0d3ff1999999999999 -> cdcc8c3f
.f32 v = -1e300 -> 000080ff
.f32 v = 1.1 -> cdcc8c3f
.f32 v = 16777217.0 -> 0000804b
.f32 v = 0fffc00001 -> 0100c0ff
.u8 v[] = {0xFF(1000 + 546), 0xFF00(131187)} -> 0a00
.u32 v[] = {0xFF(1000 + 546), 0xFF0000(131187)} -> 0a00000002000000
.u32 v[2] = {} -> 0000000000000000
.f32 v[3] = {1.0+2.5, 1.0/3.0, 2.} -> 00006040abaaaa3e00000040
.b8 v[4] = {-1, 255, 256, 010} -> ffff0008
.b16 v[3] = {0x3C00, 1} -> 003c01000000
.u32 v = WARP_SZ -> 20000000
"""


@pytest.mark.parametrize("row", INITIAL.strip().split("\n"))
@pytest.mark.parametrize("space", ["global", "const"])
def test_initial_values_as_ptxas(row: str, space: str) -> None:
    text, expected = row.split(" -> ")
    made = variable(f".{space} {text};")
    assert made.initial is not None
    assert made.initial.ljust(made.size, b"\0").hex() == expected
    assert made.addresses == ()


def test_addresses_in_initial_values() -> None:
    before = ".global .u32 x[4]; .func f(); "
    made = variable(before + ".global .u64 v[4] = {x, generic(x)+4, f, x+(1<<3)};")
    assert made.initial == bytes(32)
    assert made.addresses == (
        (0, 8, "x", 0, False),
        (8, 8, "x", 4, True),
        (16, 8, "f", 0, False),
        (24, 8, "x", 8, False),
    )
    assert variable(before + ".global .u32 v = x;").addresses == ((0, 4, "x", 0, False),)
    masks = ", ".join(f"0xFF{'00' * i}(generic(x)+4)" for i in range(8))
    made = variable(before + f".global .align 8 .b8 v[12] = {{7, 8, {masks}, 0xff(f)}};")
    assert made.initial == bytes([7, 8]) + bytes(9)
    assert made.addresses == ((2, 8, "x", 4, True), (10, 1, "f", 0, False))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (".shared .align 16 .b8 v[4224];", ("shared", "b8", 16, 4224, "")),
        (".extern .shared .align 128 .b8 v[];", ("shared", "b8", 128, 0, "extern")),
        (".shared .f32 v[2][3][4];", ("shared", "f32", 4, 96, "")),
        (".const .v4 .f32 v[3];", ("const", "f32", 16, 48, "")),
        (".visible .global .f64 v;", ("global", "f64", 8, 8, "visible")),
        (".weak .global .align 2 .b16 v[(1<<2)+1];", ("global", "b16", 2, 10, "weak")),
        (".common .global .b128 v;", ("global", "b128", 16, 16, "common")),
        (
            ".extern .global .attribute(.managed) .align 4 .b8 v[8];",
            ("global", "b8", 4, 8, "extern"),
        ),
        (".global .attribute(.unified(19, 95)) .f16x2 v;", ("global", "f16x2", 4, 4, "")),
        (".global .texref v;", ("global", "texref", 8, 8, "")),
        (".global .samplerref v = { addr_mode_0 = wrap };", ("global", "samplerref", 8, 8, "")),
    ],
)
def test_variables(text: str, expected: tuple[object, ...]) -> None:
    made = variable(text)
    assert (made.space, made.type, made.align, made.size, made.linkage) == expected
    assert made.name == "v"
    assert made.initial is None


def test_several_variables_and_redeclarations() -> None:
    made = module("""
    .extern .global .u32 x; .extern .global .u32 x;
    .global .u32 x = 3, y[2] = {1, 2}, z;
    .extern .global .u32 x;
    """)
    assert [(v.name, v.initial, v.linkage) for v in made.variables.values()] == [
        ("x", b"\3\0\0\0", ""),
        ("y", b"\1\0\0\0\2\0\0\0", ""),
        ("z", None, ""),
    ]


def test_variables_of_functions() -> None:
    made = module(
        """
    .global .u32 c;
    .entry k() { .local .align 8 .b8 depot[24]; .const .u32 c = 7; { .shared .b32 s, t[3]; }
        mov.u64 %rd, c; .param .b32 p; ret; }
    """.replace("%rd", "%clock64")
    )
    own = made.functions["k"].variables
    assert [(v.name, v.space, v.align, v.size) for v in own] == [
        ("depot", "local", 8, 24),
        ("s", "shared", 4, 4),
        ("t", "shared", 4, 12),
        ("p", "param", 4, 4),
    ]
    assert made.variables["c#1"].initial == b"\7\0\0\0"
    assert made.functions["k"].instructions[0].operands[1] == Symbol("c#1")
