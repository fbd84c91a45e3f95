"""The PTX parser on hand-written text: every form, and text that is not PTX.

Bytes of initialisers and values of constant expressions that are written as hexadecimal text here
are what ptxas 13.0 makes of the same declarations.
"""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumla.sim.errors import PTXSyntaxError
from cumla.sim.isa.special import SPECIAL
from cumla.sim.ptx import parse
from cumla.sim.ptx.syntax import (
    Address,
    Function,
    Guard,
    Immediate,
    Module,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    Symbol,
    Variable,
    Vector,
)

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n"
REGISTERS = """
.reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<8>; .reg .b64 %rd<8>;
.reg .f32 %f<8>; .reg .f64 %fd<4>; .reg .v4 .f32 v4; .reg .v2 .b32 v2;
"""


def module(text: str) -> Module:
    return parse(HEADER + text)


def kernel(body: str, before: str = "") -> Function:
    """The kernel `k` with some registers and this body."""
    made = module(f"{before}\n.visible .entry k(.param .u64 a)\n{{{REGISTERS}{body}\n}}")
    return made.functions["k"]


def operands(text: str) -> tuple[Operand, ...]:
    """Operands of an instruction that may name `arr`, `dyn` and the registers above."""
    before = ".global .u32 arr[4]; .extern .shared .align 16 .b8 dyn[];"
    (ins,) = kernel(text, before).instructions
    return ins.operands


def variable(text: str) -> Variable:
    """The last variable of the text."""
    return list(module(text).variables.values())[-1]


def R(name: str) -> Register:
    return Register(name)


# The module's own directives


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100f", "sm_120a"])
@pytest.mark.parametrize("words", ["", ", debug", ", texmode_independent , debug"])
def test_header(target: str, words: str) -> None:
    made = parse(f"// a comment\n.version 7.8 .target {target}{words}\n.address_size 64")
    assert (made.version, made.target, made.address_size) == ((7, 8), target, 64)
    assert made.functions == {}
    assert made.variables == {}
    assert parse(".version 9.0\n.target sm_121\n").address_size == 64
    assert parse(".version 9.0\n.target sm_80\n.address_size 32").address_size == 32


def test_comments_and_strings() -> None:
    text = """
    .pragma "no // comment; here"; // .entry x
    .file 1 "http://a/*b*/c.cu" /* two
    lines; } */
    .entry k() { /* } */ .pragma "a;b"; .loc 1 7 0 // x
    ret; /**/ }
    """
    made = module(text)
    assert made.files == {1: "http://a/*b*/c.cu"}
    (ins,) = made.functions["k"].instructions
    assert (ins.line, str(ins.source)) == (9, "http://a/*b*/c.cu:7")


# Operands

FORMS: list[tuple[str, tuple[Operand, ...]]] = [
    ("add.s32 %r1, %r2, -7;", (R("%r1"), R("%r2"), Immediate(-7))),
    ("mov.u32 %r1, %tid.x;", (R("%r1"), R("%tid.x"))),
    ("mov.u64%rd1,%clock64;", (R("%rd1"), R("%clock64"))),
    ("mov.u32 %r1, WARP_SZ;", (R("%r1"), Immediate(32))),
    ("mov.u32 %r1, WARP_SZ-1;", (R("%r1"), Immediate(31))),
    ("mov.u64 %rd1, arr;", (R("%rd1"), Symbol("arr"))),
    ("mov.u64 %rd1, arr+8;", (R("%rd1"), Symbol("arr", 8))),
    ("mov.u64 %rd1, dyn + (1<<4) ;", (R("%rd1"), Symbol("dyn", 16))),
    ("ld.global.u32 %r1, [%rd1];", (R("%r1"), Address(R("%rd1")))),
    ("ld.global.u32 %r1, [ %rd1 + 8 ];", (R("%r1"), Address(R("%rd1"), 8))),
    ("ld.global.u32 %r1, [%rd1+-8];", (R("%r1"), Address(R("%rd1"), -8))),
    ("ld.global.u32 %r1, [%rd1-8];", (R("%r1"), Address(R("%rd1"), -8))),
    ("ld.global.u32 %r1, [%rd1+0x10];", (R("%r1"), Address(R("%rd1"), 16))),
    ("ld.global.u32 %r1, [arr+4];", (R("%r1"), Address(Symbol("arr"), 4))),
    ("ld.global.u32 %r1, [arr+(2*4)];", (R("%r1"), Address(Symbol("arr"), 8))),
    ("ld.local.u32 %r1, [4096];", (R("%r1"), Address(None, 4096))),
    ("st.shared.b32 [%r1], 0f3F800000;", (Address(R("%r1")), Immediate(1.0, 0x3F800000))),
    ("mov.b64 %rd1, {%r1,%r2};", (R("%rd1"), Vector((R("%r1"), R("%r2"))))),
    ("mov.b64 {_, %r2}, %rd1;", (Vector((Sink(), R("%r2"))), R("%rd1"))),
    ("mov.b64 %rd1, { %r1 , 3 };", (R("%rd1"), Vector((R("%r1"), Immediate(3))))),
    (
        "setp.lt.and.s32 %p1|%p2, %r1, %r2, !%p3;",
        (Pair(R("%p1"), R("%p2")), R("%r1"), R("%r2"), Negated(R("%p3"))),
    ),
    ("elect.sync _|%p1, -1;", (Pair(Sink(), R("%p1")), Immediate(-1))),
    ("setp.eq.s32 %p1 | _, %r1, 0;", (Pair(R("%p1"), Sink()), R("%r1"), Immediate(0))),
    ("mov.u32 %r1, 1|6;", (R("%r1"), Immediate(7))),
    ("mbarrier.arrive.shared.b64 _, [%r1];", (Sink(), Address(R("%r1")))),
    (
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [dyn+128], [%rd1, {%r1, 0}], [%r3];",
        (
            Address(Symbol("dyn"), 128),
            Address(R("%rd1")),
            Vector((R("%r1"), Immediate(0))),
            Address(R("%r3")),
        ),
    ),
    ("vadd.s32.u32.s32 %r1, %r2.b0, %r3.h1;", (R("%r1"), R("%r2.b0"), R("%r3.h1"))),
    ("mov.f32 %f1, v4.w;", (R("%f1"), R("v4.w"))),
    ("add.f32 %f1, v4.r, v4.b;", (R("%f1"), R("v4.x"), R("v4.z"))),
    ("mov.b64 %rd1, v2;", (R("%rd1"), Vector((R("v2.x"), R("v2.y"))))),
    ("barrier.cluster.wait;", ()),
    ("mad.lo.s32\n%r1,\n%r2, %r3,\n\t4;", (R("%r1"), R("%r2"), R("%r3"), Immediate(4))),
]


@pytest.mark.parametrize(("text", "expected"), FORMS, ids=[t for t, _ in FORMS])
def test_operands(text: str, expected: tuple[Operand, ...]) -> None:
    assert operands(text) == expected


def test_instruction_words() -> None:
    text = (
        "  @!%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%r1],\n [%rd1], 16, [%r2],\t%rd2;\n@ ! %p2 mov .u32 %r1 , 1;\n@%p3 ret;\nbar.sync 0;"
    )
    body = kernel(text).instructions
    first, second, third, fourth = body
    assert [ins.index for ins in body] == [0, 1, 2, 3]
    assert first.opcode == "cp"
    assert first.modifiers == (
        "async", "bulk", "shared::cluster", "global", "mbarrier::complete_tx::bytes",
        "L2::cache_hint",
    )  # fmt: skip
    assert first.guard == Guard("%p1", True)
    assert first.text == (
        "@!%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%r1], [%rd1], 16, [%r2], %rd2;"
    )
    assert second.name == "mov.u32"
    assert second.guard == Guard("%p2", True)
    assert third.guard == Guard("%p3", False)
    assert third.operands == ()
    assert third.text == "@%p3 ret;"
    assert fourth.guard is None
    # The header has 3 lines; the kernel begins on the 5th, its registers end on the 8th.
    assert [ins.line for ins in body] == [9, 11, 12, 13]
    assert first.where == "PTX line 9"


def test_all_special_registers_are_known() -> None:
    for name in SPECIAL:
        assert operands(f"mov.u32 %r1, {name};")[1] == R(name)


# Literals and constant expressions


def immediate(text: str) -> Immediate:
    value = operands(f"mov.b64 %rd1, {text};")[1]
    assert isinstance(value, Immediate)
    return value


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


# Calls, branches


CALLED = """
.func (.reg .u32 rv) f(.reg .u32 a, .param .b32 b);
.func g(.param .b32 a);
.func h();
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("call h;", (Symbol("h"), Vector(()), Vector(()))),
        ("call.uni h, ();", (Symbol("h"), Vector(()), Vector(()))),
        ("call.uni g,\n(\nx\n);", (Symbol("g"), Vector(()), Vector((Symbol("x"),)))),
        (
            "call (%r1), f, (%r2, x);",
            (Symbol("f"), Vector((R("%r1"),)), Vector((R("%r2"), Symbol("x")))),
        ),
        ("call (%r1), f;", (Symbol("f"), Vector((R("%r1"),)), Vector(()))),
        (
            "call (%r1), %rd1, (3, x), pr;",
            (R("%rd1"), Vector((R("%r1"),)), Vector((Immediate(3), Symbol("x"))), Symbol("pr")),
        ),
        ("call %rd1, (x)\n, ct;", (R("%rd1"), Vector(()), Vector((Symbol("x"),)), Symbol("ct"))),
    ],
)
def test_calls(text: str, expected: tuple[Operand, ...]) -> None:
    tables = """.param .b32 x; ct: .calltargets f, g;
    pr : .callprototype (.param .b32 _) _ (.param .b32 _, .param .align 8 .b8 _[24]) .noreturn;"""
    (ins,) = kernel(tables + text, CALLED).instructions
    assert ins.operands == expected
    assert ins.opcode == "call"


def test_branch_targets() -> None:
    made = kernel("""
    @%p1 bra done;
    ts: .branchtargets loop, done,
        loop;
    loop: add.u32 %r1, %r1, 1;
    brx.idx.uni %r1, ts;
    { ts: .branchtargets done; brx.idx %r2, ts; }
    done:""")
    assert made.labels == {"loop": 1, "done": 4}
    assert made.branch_targets == {"ts": ["loop", "done", "loop"], "ts#1": ["done"]}
    bra, _, outer, inner = made.instructions
    assert bra.operands == (Symbol("done"),)
    assert outer.operands == (R("%r1"), Symbol("ts"))
    assert inner.operands == (R("%r2"), Symbol("ts#1"))


# Scopes


def test_shadowed_names_become_unique() -> None:
    made = kernel("""
    .reg .b32 x; .reg .pred q; .shared .b32 s[2];
    mov.b32 x, 1;
    {
        mov.b32 x, 2;          // still the outer x
        .reg .b64 x, y;
        .shared .align 8 .b64 s;
        mov.b64 x, s;
        { .reg .b16 x; mov.b16 x, 3; }
        @q mov.b64 y, x;
    }
    { .reg .b16 x, y; .reg .pred q; @q mov.b16 y, x; }
    mov.b32 x, s;
    """)
    wrote = [ins.operands[0] for ins in made.instructions]
    assert wrote == [R("x"), R("x"), R("x#1"), R("x#2"), R("y"), R("y#1"), R("x")]
    read = [ins.operands[1] for ins in made.instructions]
    assert read[2] == Symbol("s#1")
    assert read[4:] == [R("x#1"), R("x#3"), Symbol("s")]
    assert [ins.guard for ins in made.instructions[4:6]] == [Guard("q", False), Guard("q#1", False)]
    own = {n: k for n, k in made.registers.items() if n[0] in "xyq"}
    assert own == {
        "x": "b32", "q": "pred", "x#1": "b64", "y": "b64", "x#2": "b16", "x#3": "b16", "y#1": "b16",
        "q#1": "pred",
    }  # fmt: skip
    assert [(v.name, v.size, v.align) for v in made.variables] == [("s", 8, 4), ("s#1", 8, 8)]


def test_labels_of_blocks() -> None:
    made = kernel("""
    { L: add.u32 %r1, %r1, 1; bra L; }
    { bra L; add.u32 %r2, %r2, 1; L: }
    bra L;
    { bra L; { bra L; L: } }
    L: ret;
    """)
    assert made.labels == {"L": 0, "L#1": 4, "L#2": 7, "L#3": 7}
    assert [i.operands[0] for i in made.instructions if i.opcode == "bra"] == [
        Symbol("L"), Symbol("L#1"), Symbol("L#3"), Symbol("L#3"), Symbol("L#2"),
    ]  # fmt: skip


def test_names_of_a_function_hide_those_of_the_module() -> None:
    made = kernel(
        "mov.u64 %rd1, v; { .reg .b64 v; mov.u64 v, k; } { .shared .b8 v; mov.u64 %rd1, v; }",
        ".global .b32 v;",
    )
    assert [i.operands for i in made.instructions] == [
        (R("%rd1"), Symbol("v")),
        (R("v#1"), Symbol("k")),
        (R("%rd1"), Symbol("v#2")),
    ]


def test_call_sequences() -> None:
    call = "{ .reg .b32 t; .param .b32 param0; st.param.b32 [param0+0], %r1; call g, (param0); }"
    made = kernel(call * 2, CALLED)
    assert [(v.name, v.space, v.size) for v in made.variables] == [
        ("param0", "param", 4),
        ("param0#1", "param", 4),
    ]
    assert made.instructions[2].operands[0] == Address(Symbol("param0#1"))
    assert made.instructions[3].operands[2] == Vector((Symbol("param0#1"),))


def test_registers() -> None:
    made = module(
        ".entry k() { .reg .pred p, %q<3>; .reg .b32 %r<0>, %s<2>; .reg .v2 .f32 v<2>; ret; }"
    ).functions["k"]
    assert made.registers == {
        "p": "pred", "%q0": "pred", "%q1": "pred", "%q2": "pred", "%s0": "b32", "%s1": "b32",
        "v0.x": "f32", "v0.y": "f32", "v1.x": "f32", "v1.y": "f32",
    }  # fmt: skip


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


# Functions


def test_parameters() -> None:
    made = module("""
    .visible .entry k(
        .param .u64 .ptr .global .align 16 a, .param .u64 .ptr b, .param .u64 .ptr .align 1 c,
        .param .align 64 .b8 m[128],
        .param .f32 f, .param .b8 s[(1<<2)]
    )
    { ld.param.u32 %envreg3, [m+124]; ret; }
    """).functions["k"]
    assert made.entry
    assert made.body
    assert made.linkage == "visible"
    assert [(v.name, v.type, v.align, v.size, v.pointer) for v in made.parameters] == [
        ("a", "u64", 8, 8, ("global", 16)),
        ("b", "u64", 8, 8, ("generic", 4)),
        ("c", "u64", 8, 8, ("generic", 1)),
        ("m", "b8", 64, 128, None),
        ("f", "f32", 4, 4, None),
        ("s", "b8", 1, 4, None),
    ]
    assert {v.space for v in made.parameters} == {"param"}
    assert made.instructions[0].operands[1] == Address(Symbol("m"), 124)


def test_register_parameters() -> None:
    made = module("""
    .weak .func (.reg .u32 out) f (.reg .u32 in, .reg .pred p, .param .align 8 .b8 s[24])
    { @p add.u32 out, in, 1; ret; }""").functions["f"]
    assert [(v.name, v.space, v.type, v.size) for v in made.returns] == [("out", "reg", "u32", 4)]
    assert [v.space for v in made.parameters] == ["reg", "reg", "param"]
    assert made.registers == {"out": "u32", "in": "u32", "p": "pred"}
    assert made.instructions[0].operands[:2] == (R("out"), R("in"))
    assert not made.entry


def test_prototypes_and_aliases() -> None:
    made = module("""
    .extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b) ;
    .func f (.param .b32 _) .noreturn;
    .func f (.param .b32 x) .noreturn { trap; }
    .func f (.param .b32 _) .noreturn;
    .func .attribute(.unified(1, 2)) (.param .b32 r) u ();
    .func g;
    .alias g, f;
    .entry k { call g; ret; }
    """)
    f, g, outside = (made.functions[n] for n in ("f", "g", "vprintf"))
    assert list(made.functions) == ["vprintf", "f", "u", "g", "k"]
    assert (f.body, f.directives, f.parameters[0].name) == (True, {"noreturn": ()}, "x")
    assert (g.name, g.body, g.instructions) == ("g", True, f.instructions)
    assert (outside.body, outside.linkage) == (False, "extern")
    assert [len(p) for p in (outside.returns, outside.parameters)] == [1, 2]
    assert len(made.functions["u"].returns) == 1


def test_performance_directives() -> None:
    made = module("""
    .entry k() .maxntid 256, 1, 1 .minnctapersm 2
    .reqntid 128 .maxnreg 64 .pragma "nounroll"; .reqnctapercluster 2,1,1 .explicitcluster
    .maxclusterrank 8 .blocksareclusters { ret; }""").functions["k"]
    assert made.directives == {
        "maxntid": (256, 1, 1),
        "minnctapersm": (2,),
        "reqntid": (128,),
        "maxnreg": (64,),
        "reqnctapercluster": (2, 1, 1),
        "explicitcluster": (),
        "maxclusterrank": (8,),
        "blocksareclusters": (),
    }


# Source lines


def test_source_lines() -> None:
    made = module(r"""
    .entry k() {
    membar.cta;
    .loc 2 5 3
    membar.cta;
    .loc 1 9 7, function_name $L__info0, inlined_at 2 5 3
    membar.gl;
    .loc 1 0 1
    membar.gl;
    .loc	1 20 8, function_name .debug_str+3, inlined_at 1 9 7
    membar.sys;
    .loc 1 20 8, function_name $L__other, inlined_at 2 6 1
    membar.sys;
    .loc 2 7 0 // only a line
    ret;
    }
    .file 1 "/a/inner.cuh"
    .file 2 "/a/k.cu", 123456, 789
    .section .debug_abbrev { .b8 1 // x
    .b32 $L__info0 }
    .section .debug_str
    {
    $L__info0:
    .b8 95,90
    .b8 0
    $L__info1: .b8 102,111,111,0 // foo
    }
    """)
    assert made.files == {1: "/a/inner.cuh", 2: "/a/k.cu"}
    none, plain, once, still, twice, other, last = (
        ins.source for ins in made.functions["k"].instructions
    )
    assert none is None
    assert plain is not None
    assert (str(plain), plain.column, plain.function, plain.inlined_at) == (
        "/a/k.cu:5",
        3,
        None,
        None,
    )
    assert once is not None
    assert (str(once), once.function, once.inlined_at) == ("/a/inner.cuh:9", "_Z", plain)
    assert still is once  # line 0 is no line
    assert twice is not None
    assert (str(twice), twice.function, twice.inlined_at) == ("/a/inner.cuh:20", "foo", once)
    assert other is not None
    assert (other.function, str(other.inlined_at)) == (None, "/a/k.cu:6")
    assert str(last) == "/a/k.cu:7"


# Text that is not PTX

K = ".entry k()\n{\n.reg .b32 %r<4>; .reg .pred %p<2>; .reg .b64 %rd1;\n"  # lines 4 to 6
WRONG: list[tuple[str, int, str]] = [
    (".global .u32 x", 4, "';' at the end of this .global variable"),
    (".global .q32 x;", 4, "a type instead of .q32"),
    (".global x;", 4, "a type such as .b32"),
    (".global .u32;", 4, "an operand"),
    (".global .u32 3x;", 4, "a variable name instead of '3x'"),
    (".global .align 3 .b8 x;", 4, "a power of two after .align"),
    (".global .pred x;", 4, "memory can hold"),
    (".global .u32 x[2][];", 4, "a size for every dimension but the first"),
    (".global .u32 x[-1];", 4, "a size that is not negative"),
    (".global .u32 x[2] = {1,2,3};", 4, "at most 2 values instead of 3"),
    (".global .u32 x[2] = {{1},{2}};", 4, "a value instead of '{'"),
    (".global .u32 x[2][2] = {1,2};", 4, "'{' before '1'"),
    (".global .u32 x[2] = 5;", 4, "'{' before '5'"),
    (".global .u32 x = {5};", 4, "a value instead of '{'"),
    (".global .u32 x[2] = {5,};", 4, "a constant"),
    (".global .v2 .f32 x[1] = {{1.0}};", 4, "2 values for a vector instead of 1"),
    (".global .f32 x = 1;", 4, "a floating-point number instead of '1'"),
    (".global .u32 x = 0f3f800000;", 4, "an integer instead of"),
    (".global .b16 x = 1.5;", 4, "an integer instead of"),
    (".global .f16 x = 1.5;", 4, "no initial value for a variable of type .f16"),
    (".shared .u32 x = 1;", 4, "only .global and .const variables"),
    (".global .u64 x = y;", 4, "a declared name instead of 'y'"),
    (".global .u32 y;\n.global .f32 x = y;", 5, "a variable of type .u32 or .u64"),
    (".global .u32 y;\n.global .u8 x[2] = {0xFF00(y)};", 5, "the address of y in order"),
    (".global .u32 y;\n.global .u32 x = 0xFF(y);", 5, "a .b8 variable"),
    (".global .u32 y;\n.global .u8 x[2] = {0xFF(y), 0xFF0000(y)};", 5, "in order"),
    (".global .u32 x;\n.global .u32 x;", 5, "x is declared already"),
    (".func f(); .global .u32 f;", 4, "f is declared already"),
    (".globl .u32 x;", 4, "instead of '.globl'"),
    ("foo", 4, "a directive"),
    (".visible foo", 4, "a directive after the linkage"),
    (".alias f, g;", 4, "two names"),
    (".entry k( {}", 4, "'{' before the body of k, or ';'"),
    (".entry 3() {}", 4, "the name of a function"),
    (".entry k(.global .u32 x) {}", 4, "'.param' or '.reg' instead of"),
    (".entry k(.param .u32 x, .param .u32 x) {}", 4, "x is declared already"),
    (".entry k() .maxtid 3 {}", 4, "instead of '.maxtid'"),
    (".entry k()", 4, "the body of k, or ';'"),
    (".entry k() {}\n.entry k() {}", 5, "it has one already"),
    (".func k();\n.entry k() {}", 5, "k is declared already"),
    (K + "ret;", 5, "'}' to close this block"),
    (K + "{ ret;\n}", 5, "'}' to close this block"),
    (K + "add.s32 %r1, %r2, %r3\nadd.s32 %r1, %r2, %r3;\n}", 7, "';' at the end of this line"),
    (K + "ret\n}", 7, "';' after this instruction"),
    (K + "ret\n}\n.entry j() { ret; }", 7, "';' at the end of this line"),
    (K + "\nmov.u32 %r1, %r9;\n}", 8, "a declared name instead of '%r9'"),
    (K + "mov.u32 %r1, foo; }", 7, "a declared name instead of 'foo'"),
    (K + "mov.u32 %r1, foo.x; }", 7, "a declared name instead of 'foo'"),
    (K + "mov.u32 %r1, %tidx; }", 7, "a declared name instead of '%tidx'"),
    (K + "bra L; }", 7, "a declared name instead of 'L'"),
    (K + "{ L: } bra L; }", 7, "a declared name instead of 'L'"),
    (K + "bra %rd1; }", 7, "a label"),
    (K + "bra k; }", 7, "a label"),
    (K + "bra; }", 7, "a label"),
    (K + "L: brx.idx %r1, L; }", 7, "a name of .branchtargets"),
    (K + "t: .branchtargets k; brx.idx %r1, t; }", 7, "a label instead of 'k'"),
    (K + "call; }", 7, "an operand"),
    (K + "call (%r1); }", 7, "the function to call"),
    (K + "call 3; }", 7, "a function or a register"),
    (K + "call k, (%r1), k, k; }", 7, "';' instead of 'k'"),
    (K + "L: L: ret; }", 7, "L is declared already in this block"),
    (K + ".reg .b32 %r3; ret; }", 7, "%r3 is declared already in this block"),
    (K + ".reg .b32 x<2000000>; ret; }", 7, "at most 1048576 registers"),
    (K + ".reg .b32 3; ret; }", 7, "a register name instead of '3'"),
    (K + ".reg .e5m2 x; ret; }", 7, "a type instead of .e5m2"),
    (K + ".maxntid 3; ret; }", 7, "instead of .maxntid"),
    (K + ".loc 1 2;\nret; }", 7, "instead of .loc"),
    (K + ".loc 3 2 1\nret; }", 7, "the number of a .file instead of 3"),
    (K + "@%r9 ret; }", 7, "a predicate register instead of '%r9'"),
    (K + "@k ret; }", 7, "a predicate register instead of 'k'"),
    (K + "@1 ret; }", 7, "an instruction, a label or a directive"),
    (K + "add.s32 %r1,, %r2; }", 7, "single commas"),
    (K + "add.s32 %r1, %r2,; }", 7, "operand"),
    (K + "ld.global.u32 %r1, [%rd1; }", 7, "']'"),
    (K + "ld.global.u32 %r1, %rd1]; }", 7, "a constant"),
    (K + "ld.global.u32 %r1, [%rd1)]; }", 7, "no ')'"),
    (K + "ld.global.u32 %r1, []; }", 7, "an operand"),
    (K + "ld.global.u32 %r1, [%rd1*4]; }", 7, "a constant"),
    (K + "ld.global.u32 %r1, [%rd1+1.5]; }", 7, "an integer"),
    (K + "mov.b64 {%r1, %r2, %rd1; }", 7, "'}'"),
    (K + "mov.b64 {}, %rd1; }", 7, "an operand"),
    (K + "setp.eq.s32 %p1|k, %r1, 0; }", 7, "two registers in"),
    (K + "mov.u32 %r1, k[2]; }", 7, "an address such as [k+8] instead of 'k[2]'"),
    (K + "mov.u32 %r1, 1;; }", 7, "an instruction, a label or a directive"),
    (K + "/* ret; }", 7, "'*/' to end this comment"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "expected"), WRONG, ids=[w[0] for w in WRONG])
def test_errors_name_the_line_and_what_was_expected(text: str, line: int, expected: str) -> None:
    with pytest.raises(PTXSyntaxError) as caught:
        module(text)
    first, shown = str(caught.value).split("\n")
    assert first.startswith(f"PTX line {line}: expected ")
    assert expected in first
    lines = (HEADER + text).split("\n")
    assert shown == f"    {lines[line - 1].strip()}"


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", 1, "'.version'"),
        ("hello", 1, "'.version'"),
        (".target sm_90\n", 1, "'.version' first"),
        (".version eight\n", 1, "a version such as 8.7"),
        (".version 8.7\n\n", 3, "'.target'"),
        (".version 8.7\n.address_size 64", 2, "'.target' after"),
        (".version 8.7\n.target gfx90", 2, "a target such as sm_90a"),
        (".version 8.7\n.target sm_90b", 2, "a target such as sm_90a"),
    ],
)
def test_errors_in_the_header(text: str, line: int, expected: str) -> None:
    with pytest.raises(PTXSyntaxError) as caught:
        parse(text)
    assert str(caught.value).startswith(f"PTX line {line}: expected {expected}")


def test_damaged_text_never_raises_anything_else() -> None:
    text = (
        HEADER
        + CALLED
        + """
    .global .u32 arr[4] = {1, 0x10, -3}; .global .u64 ptrs[2] = {generic(arr)+4, arr};
    .const .f32 rows[2][2] = {{1.0, 0f40000000}, {.5, 1e3}};
    .global .u8 packed[9] = {7, 0xFF(arr), 0xFF00(arr), 0xFF0000(arr), 0xFF000000(arr)};
    .visible .entry k(.param .u64 .ptr .global .align 16 a) .maxntid 128, 1, 1 .pragma "x;y";
    { .reg .pred p, q<3>; .reg .b32 %r<8>; .reg .v2 .f32 v; .reg .b64 %rd<8>;
    .loc 1 3 4, function_name $S, inlined_at 1 2 1
    ts: .branchtargets L1, L2; @!p brx.idx.uni %r1, ts;
    L1: { .reg .b32 p; L: mov.u32 p, (1<<3)+4; bra L; }
    { .param .b32 s0; call.uni (%r1), f, (%r2, s0); }
    call (%r1), %rd3, (%r2), pr; pr: .callprototype (.reg .u32 _) _ (.reg .u32 _);
    L2: setp.lt.and.s32 p|q0, %r1, -7, !q1; ld.global.v2.f32 v, [%rd1+-8]; mov.f32 v.x, 0f3F800000;
    cp.async.bulk.tensor.2d [arr+128], [%rd1, {%r1, 0}], [%r3]; // done
    ret; } .file 1 "a.cu" .section .debug_str { $S: .b8 95,90,0 }"""
    )
    assert len(parse(text).functions["k"].instructions) == 10
    rng = random.Random(0)
    refused = 0
    for _ in range(1000):
        at, length = rng.randrange(len(text)), rng.choice([1, 1, 2, 5, 30])
        put = rng.choice(
            ["", "", text[at : at + length] * 2, rng.choice(';,{}()[]@:.|!%+-<>0x"/*#=')]
        )
        try:
            parse(text[:at] + put + text[at + length :])
        except PTXSyntaxError:
            refused += 1
    assert 500 < refused < 1000
