"""The key of the cache: each ingredient changes it, and nothing of this machine does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cumla.jit import build as jit
from cumla.jit import nvrtc, recipe
from cumla.jit.recipe import Recipe

from .conftest import EXPRESSION, PATH, SCALARS, SCALE, Workplace


@dataclass(frozen=True)
class Flip:
    """One ingredient that becomes another."""

    name: str
    do: Callable[[Workplace, pytest.MonkeyPatch], Any]
    build: tuple[str, str] = ("sm_90a", EXPRESSION)


def source(work: Workplace, patch: pytest.MonkeyPatch) -> None:
    (work.kernels / PATH).write_text(SCALE.replace("63 -", "62 -"))


def header(work: Workplace, patch: pytest.MonkeyPatch) -> None:
    (work.kernels / "include/scalars.cuh").write_text(SCALARS.replace("x * T", "x + T"))


def header_of_a_header(work: Workplace, patch: pytest.MonkeyPatch) -> None:
    text = SCALARS.replace("once\n", 'once\n#include "include/deeper.cuh"\n')
    (work.kernels / "include/scalars.cuh").write_text(text)
    (work.kernels / "include/deeper.cuh").write_text("#pragma once\n// one\n")
    _ = work.fresh().ptx
    work.compiled.pop()
    (work.kernels / "include/deeper.cuh").write_text("#pragma once\n// two\n")


def options(work: Workplace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jit, "OPTIONS", (*jit.OPTIONS, "-DX"))


def order_of_options(work: Workplace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jit, "OPTIONS", jit.OPTIONS[::-1])


def compiler(work: Workplace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nvrtc, "identity", lambda: "13.0 00000000")


def form(work: Workplace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe, "FORMAT", recipe.FORMAT + 1)


def nothing(work: Workplace, patch: pytest.MonkeyPatch) -> None:
    pass


FLIPS = [
    *(Flip(one.__name__, one) for one in (source, header, header_of_a_header)),
    *(Flip(one.__name__, one) for one in (options, order_of_options, compiler, form)),
    Flip("target", nothing, ("sm_80", EXPRESSION)),
    Flip("feature", nothing, ("sm_90", EXPRESSION)),
    Flip("template argument", nothing, ("sm_90a", "cumla::scale<float, 4>")),
    Flip("spelling", nothing, ("sm_90a", "cumla::scale<float,3>")),
]


@pytest.mark.parametrize("flip", FLIPS, ids=lambda one: one.name)
def test_each_ingredient_makes_another_entry(
    flip: Flip, work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ = work.fresh().ptx
    there = set(work.cache.iterdir())
    with monkeypatch.context() as patch:
        flip.do(work, patch)
        other = work.fresh(*flip.build)
        assert other.ptx
        assert not other.cached
        again = work.fresh(*flip.build)
        assert again.ptx == other.ptx
        assert again.cached
    assert len(work.compiled) == 2
    assert there < set(work.cache.iterdir())


def test_the_first_is_found_again(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    first = work.fresh().ptx
    header(work, monkeypatch)
    assert work.fresh().ptx != first
    (work.kernels / "include/scalars.cuh").write_text(SCALARS)
    again = work.fresh()
    assert again.ptx == first
    assert again.cached


def test_names_of_a_target_that_mean_the_same(work: Workplace) -> None:
    _ = work.fresh("sm_90a").ptx
    assert work.fresh("compute_90a").cubin.is_file()
    assert len(list(work.cache.iterdir())) == 1


def test_no_path_of_this_machine_is_in_the_key(
    work: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = work.fresh().recipe
    assert str(tmp_path) not in str(first.fields())
    work.kernels.rename(tmp_path / "moved")
    work.kernels = tmp_path / "moved"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUMLA_CACHE_DIR", str(tmp_path / "other"))
    second = work.fresh().recipe
    assert second == first
    assert second.key == first.key


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        ("cumla::attend<cumla::Tile<float, 3>, 16>", "attend"),
        ("plan", "plan"),
        ("::cumla::plan_2", "plan_2"),
        ("../../evil", "evil"),
        ("", "kernel"),
    ],
)
def test_names_of_folders(expression: str, name: str) -> None:
    one = Recipe(expression, "source", ("-x",), "12.9", "sm_80")
    assert one.folder == f"{name}.{one.key[:16]}"
    assert len(one.key) == 64
