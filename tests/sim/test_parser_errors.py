"""What the PTX parser says of text that is not PTX."""

from __future__ import annotations

import random

import pytest

from cumla.sim.errors import PTXSyntaxError
from cumla.sim.ptx import parse
from sim.ptx_text import CALLED, HEADER, module

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
