"""Instructions are refused on targets that do not have them, as by ptxas."""

from __future__ import annotations

import pytest

from cumla import sim

REGISTERS = ".reg .pred p; .reg .b32 a, b, x; .reg .b64 y; .reg .f32 f;"
SHARED = ".shared .align 16 .b8 s[1024];"
FROM_90 = [
    "elect.sync b|p, 0xffffffff;",
    "griddepcontrol.wait;",
    "griddepcontrol.launch_dependents;",
    "stmatrix.sync.aligned.m8n8.x1.shared.b16 [x], {a};",
    "stmatrix.sync.aligned.m8n8.x2.trans.shared::cta.b16 [x], {a, b};",
    "stmatrix.sync.aligned.m8n8.x4.b16 [y], {a, b, a, b};",
    "fence.mbarrier_init.release.cluster;",
    "fence.acq_rel.cluster;",
    "fence.acquire.sync_restrict::shared::cluster.cluster;",
    "fence.release.sync_restrict::shared::cta.cluster;",
    "fence.proxy.async;",
    "fence.proxy.async.global;",
    "fence.proxy.async.shared::cta;",
    "fence.proxy.async.shared::cluster;",
    "fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;",
    "fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster;",
    "fence.proxy.tensormap::generic.release.gpu;",
    "fence.proxy.tensormap::generic.acquire.sys [y], 128;",
    "barrier.cluster.arrive;",
    "barrier.cluster.wait.acquire.aligned;",
    "mapa.shared::cluster.u32 a, x, b;",
    "getctarank.shared::cluster.u32 a, x;",
    "mbarrier.try_wait.parity.shared.b64 p, [x], 0;",
    "mbarrier.arrive.expect_tx.shared.b64 y, [x], 16;",
    "mbarrier.expect_tx.relaxed.cta.shared.b64 [x], 16;",
    "mbarrier.complete_tx.relaxed.cta.shared.b64 [x], 16;",
]
FROM_80 = [
    "fence.proxy.alias;",
    "fence.acq_rel.gpu;",
    "fence.sc.sys;",
    "membar.gl;",
    "redux.sync.add.u32 a, b, 0xffffffff;",
    "mbarrier.test_wait.parity.shared.b64 p, [x], 0;",
    "mbarrier.arrive.shared.b64 y, [x];",
]
SPECIFIC = {
    "redux.sync.min.f32 f, f, 0xffffffff;": ("sm_100a", "sm_103a"),
    "stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [x], {a};": ("sm_100a", "sm_103a", "sm_120a"),
    "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {a, b}, [x];": (
        "sm_100a",
        "sm_103a",
        "sm_120a",
    ),
    "setmaxnreg.dec.sync.aligned.u32 24;": ("sm_90a", "sm_100a", "sm_103a", "sm_120a"),
}
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_103a", "sm_120", "sm_120a")


def load(instruction: str, target: str) -> None:
    sim.load(
        f".version 8.8\n.target {target}\n.address_size 64\n.visible .entry k()\n"
        f"{{ {REGISTERS}{SHARED}\n{instruction}\nret; }}"
    )


def has(instruction: str, target: str) -> bool:
    if instruction in SPECIFIC:
        return target in SPECIFIC[instruction]
    return instruction in FROM_80 or int(target[3:].rstrip("a")) >= 90


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("instruction", FROM_80 + FROM_90 + list(SPECIFIC))
def test_who_has_it(instruction: str, target: str) -> None:
    if has(instruction, target):
        load(instruction, target)
        return
    with pytest.raises(sim.UnsupportedPTX, match="needs") as caught:
        load(instruction, target)
    text = str(caught.value)
    assert instruction in text.replace(" ;", ";")
    assert f"not {target.rstrip('a')}" in text
    known = SPECIFIC.get(instruction, ("sm_90 or later",))[0]
    assert known in text or "scope .cluster" in text


@pytest.mark.parametrize("number", [16, 20, 28, 264])
def test_setmaxnreg_takes_multiples_of_8(number: int) -> None:
    with pytest.raises(sim.UnsupportedPTX, match=f"of {number} registers: a multiple of 8 from 24"):
        load(f"setmaxnreg.inc.sync.aligned.u32 {number};", "sm_90a")


@pytest.mark.parametrize(
    "instruction",
    [
        "setmaxnreg.inc.sync.aligned.u32 a;",
        "setmaxnreg.set.sync.aligned.u32 24;",
        "setmaxnreg.dec.sync.u32 24;",
        "griddepcontrol.stop;",
        "fence.proxy.async.local;",
        "fence.proxy.tensormap::generic.acquire.gpu;",
    ],
)
def test_forms_that_do_not_exist(instruction: str) -> None:
    with pytest.raises(sim.UnsupportedPTX):
        load(instruction, "sm_90a")
