"""fence and membar: which forms there are, and what the race detector is told."""

from __future__ import annotations

import pytest

from cumla.sim.isa.table import Unsupported
from sim.waves import Bound, Recorder, cohort, make_wave

THREAD_FENCES = {
    f"fence.{order}.{scope}": (scope, order)
    for order in ("sc", "acq_rel", "acquire", "release")
    for scope in ("cta", "cluster", "gpu", "sys")
}
THREAD_FENCES |= {
    f"fence.{scope}": (scope, "acq_rel") for scope in ("cta", "cluster", "gpu", "sys")
}
THREAD_FENCES |= {
    "membar.cta": ("cta", "sc"),
    "membar.gl": ("gpu", "sc"),
    "membar.sys": ("sys", "sc"),
    "fence.mbarrier_init.release.cluster": ("cluster", "release"),
    "fence.acquire.sync_restrict::shared::cluster.cluster": ("cluster", "acquire"),
    "fence.release.sync_restrict::shared::cta.cluster": ("cluster", "release"),
}
# The space that the race detector is told of ("": all); None: it is told nothing.
PROXY_FENCES = {
    f"{opcode}.proxy.{kind}": limit
    for opcode in ("fence", "membar")
    for kind, limit in {
        "alias": None,
        "async": "",
        "async.global": "global",
        "async.shared::cta": "shared",
        "async.shared::cluster": "shared",
    }.items()
}
PROXY_FENCES |= {
    "fence.proxy.tensormap::generic.release.gpu": None,
    "fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster": None,
    "fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster": "shared",
}
WRONG = [
    "fence",
    "fence.relaxed.cta",
    "fence.sc.block",
    "fence.cta.sc",
    "fence.sc.cta.gpu",
    "fence.mbarrier_init.acquire.cluster",
    "fence.acquire.sync_restrict::shared::cta.cluster",
    "fence.proxy.texture",
    "fence.proxy",
    "fence.proxy.tensormap::generic.release.block",
    "fence.proxy.tensormap::generic.sc.gpu",
    "membar.gpu",
    "membar",
]


@pytest.mark.parametrize("text", THREAD_FENCES)
def test_the_race_detector_is_told(text):
    wave = make_wave()
    wave.race = Recorder()
    c = cohort(wave, range(5, 40))
    assert Bound(text, check_race=True)(c) is None
    assert wave.race.calls == [("fence", (c, *THREAD_FENCES[text]))]


@pytest.mark.parametrize("text", [*THREAD_FENCES, *PROXY_FENCES])
def test_without_the_race_check_a_fence_does_nothing(text):
    wave = make_wave()
    before = wave.version, wave.clock
    assert Bound(text)(cohort(wave)) is None
    assert (wave.version, wave.clock) == before


@pytest.mark.parametrize("text", PROXY_FENCES)
def test_the_race_detector_is_told_of_fences_of_the_asynchronous_proxy(text):
    wave = make_wave()
    wave.race = Recorder()
    c = cohort(wave)
    Bound(text, check_race=True)(c)
    limit = PROXY_FENCES[text]
    assert wave.race.calls == ([] if limit is None else [("proxy_fence", (c, limit))])


def test_a_tensormap_fence_has_an_address_and_a_size():
    text = "fence.proxy.tensormap::generic.acquire.sys"
    assert Bound(text, "[%rd1]", 128)(cohort(make_wave()), 0x7F00_0000_0100, 128) is None
    with pytest.raises(Unsupported):
        Bound(text)
    with pytest.raises(Unsupported):
        Bound("fence.proxy.tensormap::generic.release.sys", "[%rd1]", 128)


@pytest.mark.parametrize("text", WRONG)
def test_other_forms_are_refused(text):
    with pytest.raises(Unsupported, match=text.split(".")[0]):
        Bound(text)
