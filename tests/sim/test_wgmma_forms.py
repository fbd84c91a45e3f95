"""Forms of wgmma that do not exist, or that are not known."""

from __future__ import annotations

import re

import pytest

from cumla import sim
from cumla.sim.isa.table import Env, Unsupported
from cumla.sim.isa.wgmma_operands import parse
from cumla.sim.ptx import parse as parse_ptx
from sim import wgmma_kit as kit
from sim.wgmma_kit import Case


def refusal(name, operands, registers=""):
    text = f"""
.version 8.7
.target sm_90a
.address_size 64
.visible .entry k()
{{
.reg .pred %p<2>; .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %rd<4>; {registers}
{name} {operands};
}}
"""
    (ins,) = parse_ptx(text).functions["k"].instructions
    with pytest.raises(Unsupported) as caught:
        parse(ins, Env(90, registers=parse_ptx(text).functions["k"].registers))
    return str(caught.value)


D = "{%f0, %f1, %f2, %f3}"
MMA = "wgmma.mma_async.sync.aligned"


@pytest.mark.parametrize(
    ("name", "operands", "part"),
    [
        (".m64n8k16.f32.f16.bf16", f"{D}, %rd0, %rd1, %p0, 1, 1, 0, 0", "f16 and .bf16"),
        (".m64n8k16.f16.bf16.bf16", f"{D}, %rd0, %rd1, %p0, 1, 1, 0, 0", "accumulators .f16"),
        (".m64n8k8.f32.f16.f16", f"{D}, %rd0, %rd1, %p0, 1, 1, 0, 0", "m64nNk16"),
        (".m64n12k16.f32.f16.f16", f"{D}, %rd0, %rd1, %p0, 1, 1, 0, 0", "N = 12"),
        (".m64n264k16.f32.f16.f16", f"{D}, %rd0, %rd1, %p0, 1, 1, 0, 0", "N = 264"),
        (".m64n40k32.s32.s8.s8", f"{D}, %rd0, %rd1, %p0", "N = 40"),
        (".m64n8k16.f32.f16.f16", f"{D}, %rd0, %rd1, %p0, 1, 1", "6 operands"),
        (".m64n8k8.f32.tf32.tf32", f"{D}, %rd0, %rd1, %p0, 1, 1, 0, 0", "8 operands"),
        (".m64n8k32.s32.s8.s8", f"{D}, %rd0, %rd1, %p0, 1, 1", "6 operands"),
        (".m64n8k16.f32.f16.f16", f"{D}, %rd0, %rd1, %p0, 2, 1, 0, 0", "imm-scale 2"),
        (".m64n8k16.f32.f16.f16", f"{D}, %rd0, %rd1, %p0, 1, 1, 0, 2", "imm-trans 2"),
        (".m64n8k16.f32.f16.f16", "{%f0, %f1}, %rd0, %rd1, %p0, 1, 1, 0, 0", "D of 2 registers"),
        (".m64n8k16.f32.f16.f16", f"{D}, {{%r0, %r1}}, %rd1, %p0, 1, 1, 0", "A of 2 registers"),
        (".m64n8k16.f32.f16.f16", f"{D}, %r0, %rd1, %p0, 1, 1, 0, 0", "a-desc"),
        (".m64n8k16.f32.f16.f16", f"{D}, %rd0, %r1, %p0, 1, 1, 0, 0", "b-desc"),
        (".m64n8k256.s32.b1.b1.xor.popc", f"{D}, %rd0, %rd1, %p0", "form"),
        (".m64n8k256.s32.b1.b1", f"{D}, %rd0, %rd1, %p0", "b1"),
        (".satfinite.m64n8k16.f32.f16.f16", f"{D}, %rd0, %rd1, %p0, 1, 1, 0, 0", "satfinite"),
    ],
)
def test_forms_that_do_not_exist(name, operands, part):
    assert part in refusal(MMA + name, operands)


def test_sparse_forms_are_refused_by_name():
    operands = f"{D}, %rd0, %rd1, %r0, 0, %p0, 1, 1, 0, 0"
    name = "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16"
    assert "sparse" in refusal(name, operands)


@pytest.mark.parametrize(
    "text",
    ["wgmma.wait_group.sync.aligned %r0", "wgmma.fence.aligned", "wgmma.commit.sync.aligned"],
)
def test_other_forms_that_do_not_exist(text):
    source = f"""
.version 8.7
.target sm_90a
.address_size 64
.visible .entry k() {{ .reg .b32 %r<2>; {text}; ret; }}
"""
    with pytest.raises(sim.UnsupportedPTX, match="wgmma"):
        sim.Device("sm_90a").load(source)


@pytest.mark.parametrize(
    ("target", "found"), [("sm_100a", "sm_100a"), ("sm_90", "sm_90 without a suffix")]
)
def test_only_sm_90a_has_it(target, found):
    text = kit.text(Case(8, "f32", "f16", "f16"), target)
    with pytest.raises(sim.UnsupportedPTX) as caught:
        sim.Device(target).load(text)
    for name in ("fence", "mma_async", "commit_group", "wait_group"):
        assert re.search(rf"wgmma.{name}\S* needs .target sm_90a, not {found}", str(caught.value))
