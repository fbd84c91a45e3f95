"""The PTX parser on hand-written text: operands, calls, scopes, functions, source lines."""

from __future__ import annotations

import pytest

from cumla.sim.isa.special import SPECIAL
from cumla.sim.ptx import parse
from cumla.sim.ptx.syntax import (
    Address,
    Guard,
    Immediate,
    Negated,
    Operand,
    Pair,
    Sink,
    Symbol,
    Vector,
)
from sim.ptx_text import CALLED, R, kernel, module, operands

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


# Calls, branches


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
    assert plain.trace == "/a/k.cu:5"
    assert once.trace == "/a/inner.cuh:9 (inlined at /a/k.cu:5)"
    assert twice.trace == "/a/inner.cuh:20 (inlined at /a/inner.cuh:9, at /a/k.cu:5)"


def test_inlining_is_told_function_by_function() -> None:
    body = """{
    .loc 1 2 1, function_name $a, inlined_at 1 9 1
    membar.cta;
    .loc 1 1 1, function_name $a, inlined_at 1 2 1
    ret; }
    """
    second = body.replace("    .loc 1 2 1, function_name $a, inlined_at 1 9 1\n", "")
    made = module(f'.entry k() {body}\n.entry j() {second}\n.file 1 "k.cu"')
    first, last = (made.functions[name].instructions[1].source for name in "kj")
    for line, depth in ((first, 2), (last, 1)):
        places = []
        while line is not None:
            places.append(line.line)
            line = line.inlined_at
        assert places == [1, 2, 9][: depth + 1]
