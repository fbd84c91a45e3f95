"""The PTX parser on what NVRTC makes of CUDA C, for several targets."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cumla.sim.ptx import parse
from cumla.sim.ptx.syntax import (
    Address,
    Function,
    Guard,
    Immediate,
    Instruction,
    Module,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    SourceLine,
    Symbol,
    Vector,
)
from sim.cuda import TARGETS, line_of, ptx

SOURCE = r"""
struct S { int a; double b; int* p; };
struct Three { char c[3]; };
struct __attribute__((packed)) Packed { char c; const int* p; short s; };

__constant__ float table[4] = {1.5f, -2.0f, 3.25f, 1e-30f};
__device__ int g = -5;
__device__ int array[10];
__device__ int* inside = &array[3];
__device__ double grid[2][3] = {{1, 2, 3}, {4, 5, 6}};
__constant__ const char* names[2] = {"ab", "cde"};
__device__ Packed packed = {1, &array[3], 0x0203};

template <int N> __device__ __noinline__ float helper(float x, S s) {
    return x * N + s.a + (float)s.b;  // helper's line
}
__device__ __forceinline__ int deepest(int x) {
    return __popc(x);  // deepest's line
}
__device__ __forceinline__ int inlined(int x) {
    return deepest(x) * 77;  // inlined's line
}
typedef int (*Pointer)(int);
__device__ __noinline__ int add1(int a) { return a + 1; }
__device__ __noinline__ int times3(int a) { return a * 3; }
__device__ Pointer pointers[2] = {add1, times3};

template <typename T, int N> __global__ void __launch_bounds__(256, 2)
templated(T* x, S s, Three t) {
    extern __shared__ T dynamic[];
    __shared__ __align__(16) float tile[32][33];
    int i = threadIdx.x + blockIdx.x * blockDim.x;
    tile[i & 31][i >> 5] = helper<N>((float)x[i], s) + t.c[1];  // calls helper
    dynamic[threadIdx.x] = x[i];
    __syncthreads();  // barrier
    x[i] = tile[i >> 5][i & 31] + table[i & 3] + g + *inside + grid[i & 1][i % 3] + dynamic[0];
}
template __global__ void templated<float, 3>(float*, S, Three);

extern "C" __global__ void prints(float* x, int n) {
    if (n == 3) printf("%d %f %s\n", n, (double)x[n], names[n & 1]);  // printf
}

extern "C" __global__ void switches(int* x, int n) {
    int i = threadIdx.x, v = x[i];
    switch (n) {
        case 0: v = __shfl_xor_sync(~0u, v, 1); break;  // shuffle
        case 1: v = v * v; break;
        case 2: v = inlined(v); break;  // calls inlined
        case 3: v = __clz(v); break;
        case 4: v = atomicAdd(x, v); break;  // atomic
        case 5: v = pointers[v & 1](v); break;  // through a pointer
    }
    x[i] = v + packed.s + *packed.p;
}

__device__ __forceinline__ int spin(int v) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 ".reg .b32 t<2>;\n"
                 "mov.b32 t1, %0;\n"
                 "AGAIN: sub.s32 t1, t1, 1; // count; down\n"
                 "{ .reg .b32 p; mov.b32 p, 7; }\n"
                 "setp.ne.s32 p, t1, 0;\n"
                 "@p bra AGAIN;\n"
                 "@!p mov.b32 %0, t1; }\n" : "+r"(v));
    return v;
}
extern "C" __global__ void assembly(int* x) {
    x[0] = spin(x[0]) + spin(x[1]);
    unsigned a = 0;
    asm volatile("mov.b64 {%0, _}, %1;" : "=r"(a) : "l"(x));
    x[2] = a;
    asm volatile("ld.global.v4.u32 {%0, %0, %0, %0}, [%1+-16];" : "=r"(a) : "l"(x));
}

extern "C" __global__ void floats(float* f, double* d) {
    f[0] = f[1] * 0.1f + __int_as_float(0x7fc00001);
    d[0] = d[1] * 0.1 - 1e300;
    reinterpret_cast<float4*>(f)[1] = make_float4(f[0], 1.0f, -0.0f, f[2]);
}
"""
KERNELS = ["_Z9templatedIfLi3EEvPT_1S5Three", "prints", "switches", "assembly", "floats"]
DEVICE_FUNCTIONS = ["_Z4add1i", "_Z6times3i", "_Z6helperILi3EEff1S"]


@pytest.fixture(params=TARGETS, scope="module")
def module(request: pytest.FixtureRequest) -> Module:
    return parse(ptx(SOURCE, request.param))


def named(function: Function, name: str) -> list[Instruction]:
    return [ins for ins in function.instructions if ins.name.startswith(name)]


# What an instruction is, written as PTX again


def written(operand: Operand) -> str:
    match operand:
        case Register(name):
            return name
        case Immediate(value, single, double):
            if single is not None:
                return f"0f{single:08X}"
            return f"0d{double:016X}" if double is not None else str(value)
        case Symbol(name, offset):
            return name + (f"+{offset}" if offset else "")
        case Address(base, offset):
            text = str(offset) if base is None else written(base)
            return f"[{text}+{offset}]" if base is not None and offset else f"[{text}]"
        case Vector(items):
            return "{" + ",".join(map(written, items)) + "}"
        case Pair(first, second):
            return f"{written(first)}|{written(second)}"
        case Negated(register):
            return f"!{written(register)}"
        case Sink():
            return "_"
    raise AssertionError(operand)


def written_instruction(ins: Instruction) -> str:
    guard = "" if ins.guard is None else f"@{'!' * ins.guard.negated}{ins.guard.register}"
    parts = [written(o) for o in ins.operands]
    if ins.opcode == "call":
        function, returns, arguments, *prototype = parts
        lists = [f"({p[1:-1]})" for p in (returns, arguments)]
        parts = [*([lists[0]] if returns != "{}" else []), function]
        parts += [*([lists[1]] if arguments != "{}" else []), *prototype]
    return f"{guard}{ins.name}{','.join(parts)};"


def squeezed(text: str) -> str:
    """Without white space, and without what has more than one spelling."""
    return re.sub(r"\s|\+0(?=\])|#\d+", "", text).replace(",()", "")


def test_every_instruction_can_be_written_again(module: Module) -> None:
    for function in module.functions.values():
        for ins in function.instructions:
            assert squeezed(written_instruction(ins)) == squeezed(ins.text)


def statements(text: str) -> dict[str, int]:
    """How many instructions each function has, counted by semicolons."""
    bare = re.sub(r"//.*", "", text)
    counts = {}
    for name, body in re.findall(
        r"\.(?:entry|func)[^{;]*?(\w+)\s*\([^{;]*\n\{\n(.*?)\n\}\n", bare, re.S
    ):
        pieces = re.sub(r"\.loc\s.*", "", body).split(";")[:-1]
        heads = [re.sub(r"^(\s|[{}]|[$\w]+\s*:)*", "", piece) for piece in pieces]
        counts[name] = sum(not head.startswith(".") for head in heads)
    return counts


@pytest.mark.parametrize("target", TARGETS)
def test_counts_of_instructions(target: str) -> None:
    text = ptx(SOURCE, target)
    made = parse(text)
    counted = {f.name: len(f.instructions) for f in made.functions.values() if f.body}
    assert counted == statements(text)
    assert set(counted) == {*KERNELS, *DEVICE_FUNCTIONS}
    assert made.target == target
    # The text of an instruction stands on its line.
    lines = text.splitlines()
    for function in made.functions.values():
        for ins in function.instructions:
            words = ".".join((ins.opcode, *ins.modifiers))
            assert words in lines[ins.line - 1]


def test_functions(module: Module) -> None:
    functions = module.functions
    assert {f.name for f in functions.values() if f.entry} == set(KERNELS)
    outside = [f.name for f in functions.values() if not f.body]
    assert outside == ["vprintf"]
    assert functions["vprintf"].linkage == "extern"
    templated = functions[KERNELS[0]]
    assert templated.linkage == "weak"
    assert templated.directives == {"maxntid": (256, 1, 1), "minnctapersm": (2,)} or (
        templated.directives == {"maxntid": (256,), "minnctapersm": (2,)}
    )
    assert [(p.type, p.align, p.size) for p in templated.parameters] == [
        ("u64", 8, 8),
        ("b8", 8, 24),
        ("b8", 1, 3),
    ]
    helper = functions["_Z6helperILi3EEff1S"]
    assert [(p.type, p.size) for p in helper.parameters] == [("b32", 4), ("b8", 24)]
    assert [(p.name, p.size) for p in helper.returns] == [("func_retval0", 4)]
    assert functions["switches"].linkage == "visible"


def test_variables(module: Module) -> None:
    variables = module.variables
    expected = {
        "table": ("const", np.float32([1.5, -2.0, 3.25, 1e-30])),
        "g": ("global", np.int32([-5])),
        "grid": ("global", np.float64([1, 2, 3, 4, 5, 6])),
    }
    for name, (space, values) in expected.items():
        made = variables[name]
        assert made.space == space
        assert made.initial == values.tobytes()
        assert made.size == values.nbytes
    assert (variables["array"].size, variables["array"].initial) == (40, None)
    assert variables["inside"].addresses == ((0, 8, "array", 12, True),)
    assert [a[0::3] for a in variables["pointers"].addresses] == [(0, 0), (8, 0)]
    assert [a[2] for a in variables["pointers"].addresses] == ["_Z4add1i", "_Z6times3i"]
    # A pointer that is not aligned is written byte by byte.
    packed = variables["packed"]
    assert packed.addresses == ((1, 8, "array", 12, True),)
    assert packed.initial == b"\1" + bytes(8) + b"\3\2"
    strings = [a[2] for a in variables["names"].addresses]
    text = [variables[s].initial.ljust(variables[s].size, b"\0") for s in strings]  # type: ignore[union-attr]
    assert text == [b"ab\0", b"cde\0"]
    (dynamic,) = [v for v in variables.values() if v.linkage == "extern"]
    assert (dynamic.space, dynamic.size) == ("shared", 0)
    templated = module.functions[KERNELS[0]]
    (tile,) = [v for v in templated.variables if v.space == "shared"]
    assert (tile.size, tile.align) == (32 * 33 * 4, 16)


def test_calls(module: Module) -> None:
    templated = module.functions[KERNELS[0]]
    (call,) = named(templated, "call")
    function, returns, arguments = call.operands
    assert function == Symbol("_Z6helperILi3EEff1S")
    assert isinstance(returns, Vector)
    assert isinstance(arguments, Vector)
    sizes = {v.name: v.size for v in templated.variables}
    assert [sizes[a.name] for a in arguments.items if isinstance(a, Symbol)] == [4, 24]
    assert [sizes[r.name] for r in returns.items if isinstance(r, Symbol)] == [4]
    (printed,) = named(module.functions["prints"], "call")
    assert printed.operands[0] == Symbol("vprintf")
    (indirect,) = named(module.functions["switches"], "call")
    assert isinstance(indirect.operands[0], Register)
    assert isinstance(indirect.operands[3], Symbol)


def test_inline_assembly(module: Module) -> None:
    made = module.functions["assembly"]
    branches = named(made, "bra")
    assert len(branches) == 2
    used = []
    for branch in branches:
        (target,) = branch.operands
        assert isinstance(target, Symbol)
        start = made.labels[target.name]
        loop = made.instructions[start : branch.index + 1]
        assert [ins.opcode for ins in loop] == ["sub", "mov", "setp", "bra"]
        assert branch.guard is not None
        predicate = branch.guard.register
        assert branch.guard == Guard(predicate, False)
        assert made.instructions[branch.index + 1].guard == Guard(predicate, True)
        assert loop[2].operands[0] == Register(predicate)
        assert made.registers[predicate] == "pred"
        counter = loop[0].operands[0]
        assert loop[2].operands[1] == counter
        used += [target.name, predicate, counter]
    assert used[:3] == ["AGAIN", "p", Register("t1")]
    assert len(set(used)) == 6
    inner = [ins.operands[0] for ins in made.instructions if ins.operands[1:] == (Immediate(7),)]
    assert len(set(inner)) == 2
    assert {made.registers[r.name] for r in inner if isinstance(r, Register)} == {"b32"}
    (split,) = [
        ins for ins in made.instructions
        if ins.operands and isinstance(first := ins.operands[0], Vector) and Sink() in first.items
    ]  # fmt: skip
    assert split.name == "mov.b64"
    (load,) = named(made, "ld.global.v4.u32")
    assert isinstance(load.operands[1], Address)
    assert load.operands[1].offset == -16


def test_float_literals(module: Module) -> None:
    found = [
        o for ins in module.functions["floats"].instructions for o in ins.operands
        if isinstance(o, Immediate)
    ]  # fmt: skip
    singles = {o.single_bits for o in found}
    doubles = {o.double_bits for o in found}
    assert int(np.float32(0.1).view(np.uint32)) in singles
    assert int(np.float64(0.1).view(np.uint64)) in doubles
    vectors = named(module.functions["floats"], "st.global.v4")
    assert len(vectors) == 1


def lines_of(instructions: list[Instruction]) -> set[int]:
    return {ins.source.line for ins in instructions if ins.source is not None}


def test_source_lines(module: Module) -> None:
    at = {mark: line_of(SOURCE, f"// {mark}") for mark in (
        "helper's line", "deepest's line", "inlined's line", "calls helper", "barrier", "printf",
        "shuffle", "calls inlined", "atomic", "through a pointer",
    )}  # fmt: skip
    templated, switches = module.functions[KERNELS[0]], module.functions["switches"]
    assert lines_of(named(templated, "bar")) == {at["barrier"]}
    assert lines_of(named(templated, "call")) == {at["calls helper"]}
    assert at["helper's line"] in lines_of(module.functions["_Z6helperILi3EEff1S"].instructions)
    assert lines_of(named(module.functions["prints"], "call")) == {at["printf"]}
    every = [ins for f in module.functions.values() for ins in f.instructions]
    assert all(ins.source is not None and ins.source.line > 0 for ins in every)
    assert {ins.source.file.rsplit("/", 1)[-1] for ins in every if ins.source} == {"k.cu"}
    assert module.files.keys() == {1}
    # Inlined twice: the source line, and the chain of places that it was inlined at.
    (popc,) = named(switches, "popc")
    chain: list[tuple[int, str | None]] = []
    line: SourceLine | None = popc.source
    while line is not None:
        chain.append((line.line, line.function))
        line = line.inlined_at
    assert chain == [
        (at["deepest's line"], "_Z7deepesti"),
        (at["inlined's line"], "_Z7inlinedi"),
        (at["calls inlined"], None),
    ]


def test_without_line_information() -> None:
    from cumla.jit import nvrtc

    made = parse(nvrtc.compile_to_ptx(SOURCE, "k.cu", "sm_90a"))
    every = [ins for f in made.functions.values() for ins in f.instructions]
    assert every
    assert all(ins.source is None for ins in every)
    assert every[0].where == f"PTX line {every[0].line}"


def test_debug_code_is_read() -> None:
    text = ptx(SOURCE, "sm_90a", "--device-debug")
    assert ".debug_info" in text
    made = parse(text)
    assert {f.name for f in made.functions.values() if f.entry} == set(KERNELS)
    assert lines_of(named(made.functions[KERNELS[0]], "call")) >= {
        line_of(SOURCE, "// calls helper")
    }
