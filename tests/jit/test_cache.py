"""The cache on disk: bad entries heal, foreign ones are refused, a bad disk costs only time."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cumla.jit import cache, entry, nvrtc
from cumla.jit.cache import Cache, CacheUnusable

from .conftest import Workplace

NOBODY = 65534
FILES = {"source.cu", "kernel.ptx", "kernel.cubin", "metadata.json"}


def test_what_a_person_finds(work: Workplace) -> None:
    made = work.fresh()
    assert made.cubin == work.folder / "kernel.cubin"
    assert work.folder.name.startswith("scale.")
    assert {one.name for one in work.folder.iterdir()} == FILES
    facts = json.loads((work.folder / "metadata.json").read_text())
    assert work.folder.name == f"scale.{facts['key'][:16]}"
    assert (facts["expression"], facts["target"]) == ("cumla::scale<float, 3>", "sm_90a")
    assert (work.folder / "kernel.ptx").read_text() == made.ptx
    assert "times<N>(held[63" in (work.folder / "source.cu").read_text()
    assert facts["facts"]["shared_bytes"] == 256
    assert facts["facts"]["registers"] > 0
    assert facts["seconds"] > 0


def test_all_is_the_users_alone(work: Workplace) -> None:
    os.umask(before := os.umask(0))
    try:
        os.umask(0)
        _ = work.fresh().cubin
    finally:
        os.umask(before)
    for folder in (work.cache.parent, work.cache, work.folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in work.folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


# --------------------------------------------------------------------------------------- bad ones


@dataclass(frozen=True)
class Damage:
    """Something that happens to an entry, and what is said of it."""

    name: str
    do: Callable[[Path], None]
    told: str


def truncate(name: str, size: int = -2) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return do


def flip(name: str, place: float) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(place * (len(data) - 1))] ^= 4
        (folder / name).write_bytes(data)

    return do


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rewrite(**changes: Any) -> Callable[[Path], None]:
    """Other metadata, with a checksum that is right."""

    def do(folder: Path) -> None:
        data = json.loads((folder / "metadata.json").read_text())
        del data["sha256_of_the_above"]
        data.update(changes)
        data = {name: value for name, value in data.items() if value is not ...}
        data["sha256_of_the_above"] = entry._checksum(data)
        (folder / "metadata.json").write_text(json.dumps(data))

    return do


def link_file(name: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / name).rename(folder.parent / "aside")
        (folder / name).symlink_to(folder.parent / "aside")

    return do


def link_folder(folder: Path) -> None:
    folder.rename(folder.parent.parent / "aside")
    folder.symlink_to(folder.parent.parent / "aside")


def into_file(folder: Path) -> None:
    for one in folder.iterdir():
        one.unlink()
    folder.rmdir()
    folder.write_text("no folder")


def into_folder(name: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name / "inside").mkdir(parents=True)
        (folder / name / "inside" / "file").write_text("x")

    return do


def fifo(name: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name, 0o600)

    return do


def mode(name: str, bits: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).chmod(bits)


def owner(name: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        if os.geteuid():
            pytest.skip("only root can give files away")
        os.chown(folder / name, NOBODY, -1)

    return do


DAMAGES = [
    *(Damage(f"truncated {one}", truncate(one), one) for one in sorted(FILES)),
    *(Damage(f"empty {one}", truncate(one, 0), one) for one in sorted(FILES)),
    *(Damage(f"bit flip in {one} at {p}", flip(one, p), one) for one in FILES for p in (0, 0.5, 1)),
    *(Damage(f"bit flip in metadata at {p}", flip("metadata.json", p), "") for p in (0.1, 0.7)),
    *(Damage(f"no {one}", remove(one), f"{one} is missing") for one in sorted(FILES)),
    Damage("another version", rewrite(key="0" * 64), "another version of cumla"),
    Damage("no entry", rewrite(entry=...), "KeyError"),
    Damage("facts of another form", rewrite(facts={"registers": 1}), "TypeError"),
    Damage("no checksums", rewrite(sha256=...), "KeyError"),
    Damage("checksums of nothing", rewrite(sha256={}), "lacks checksums"),
    Damage(
        "metadata of another kind", lambda f: (f / "metadata.json").write_text("[]") and None, ""
    ),
    Damage("other facts", replace("metadata.json", '"registers": ', '"registers": 1'), "changed"),
    Damage("linked file", link_file("kernel.cubin"), "kernel.cubin is a link"),
    Damage("linked folder", link_folder, "is a link or no folder"),
    Damage("a file in its place", into_file, "is a link or no folder"),
    Damage("a folder as a file", into_folder("kernel.cubin"), "kernel.cubin"),
    Damage("a pipe as a file", fifo("kernel.ptx"), "kernel.ptx is not a file"),
    Damage("a file for the group", mode("kernel.cubin", 0o620), "others can write to it"),
    Damage("a file for all", mode("metadata.json", 0o602), "others can write to it"),
    Damage("a folder for the group", mode("", 0o770), "others can write to it"),
    Damage("a folder for all", mode("", 0o707), "others can write to it"),
    Damage("a foreign cubin", owner("kernel.cubin"), "it belongs to user 65534"),
    Damage("foreign metadata", owner("metadata.json"), "it belongs to user 65534"),
    Damage("a foreign folder", owner(""), "it belongs to user 65534"),
]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """The artefact of the test kernel, so that it is compiled once for all damages."""
    return {}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda one: one.name)
def test_bad_entries_are_told_and_heal(
    damage: Damage,
    work: Workplace,
    compiled: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counted = nvrtc.compile_kernel
    if compiled:
        monkeypatch.setattr(
            nvrtc, "compile_kernel", lambda *a, **how: work.compiled.append(a) or compiled["it"]
        )
    else:
        monkeypatch.setattr(
            nvrtc, "compile_kernel", lambda *a, **how: compiled.setdefault("it", counted(*a, **how))
        )
    content = work.fresh().cubin.read_bytes()
    folder = work.folder
    damage.do(folder)
    assert capsys.readouterr().err == ""

    healed = work.fresh()
    assert healed.cubin.read_bytes() == content
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cumla: {folder} is not used: ")
    assert line.endswith(". It is made anew.")
    assert damage.told in line
    assert len(work.compiled) == 2
    assert {one.name for one in folder.iterdir()} == FILES
    assert not folder.is_symlink()
    assert work.leftovers() == []

    again = work.fresh()
    assert again.cubin.read_bytes() == content
    assert again.cached
    assert len(work.compiled) == 2
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------- refused as a whole


def link_cache(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to(path.with_name("real"))


REFUSED = [
    Damage("for the group", lambda path: path.chmod(0o720), "others can write to it (mode 720)"),
    Damage("for all", lambda path: path.chmod(0o707), "others can write to it (mode 707)"),
    Damage("a link", link_cache, "it is a symbolic link"),
    Damage("foreign", lambda path: owner(".")(path), "it belongs to user 65534"),
    Damage("a file", into_file, "Not a directory"),
]


@pytest.mark.parametrize("damage", REFUSED, ids=lambda one: one.name)
def test_a_cache_that_others_can_write_is_not_used(
    damage: Damage, work: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    work.cache.mkdir(parents=True, mode=0o700)
    if damage.name != "a file":
        planted = work.fresh()
        _ = planted.cubin
        work.compiled.clear()
    damage.do(work.cache)
    before = sorted(work.cache.rglob("*"))
    for target in ("sm_90a", "sm_80"):
        made = work.fresh(target)
        assert ".entry" in made.ptx
        assert made.cubin.read_bytes().startswith(b"\x7fELF")
        assert work.cache not in made.cubin.parents
        assert not made.cached
    assert sorted(work.cache.rglob("*")) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cumla: The kernel cache {work.cache} is not used: {damage.told}")
    assert line.endswith("set CUMLA_CACHE_DIR to a folder of your own.")


def test_another_user_is_told_by_number(
    work: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _ = work.fresh().ptx
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert not work.fresh().cached or len(work.compiled) == 1
    _ = work.fresh().ptx
    assert len(work.compiled) == 2
    assert f"it belongs to user {me}, and this process runs as {me + 1}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ bad disks


def fail_on(monkeypatch: pytest.MonkeyPatch, name: str, number: int, when: Any = None) -> None:
    really = getattr(os, name)

    def failing(*args: Any, **how: Any) -> Any:
        if when is None or when(*args):
            raise OSError(number, os.strerror(number))
        return really(*args, **how)

    monkeypatch.setattr(os, name, failing)


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mkdir", "unlink", "rename", "rmdir"):
        fail_on(monkeypatch, name, errno.EROFS)
    fail_on(monkeypatch, "open", errno.EROFS, lambda path, flags, *_: flags & os.O_CREAT)


def test_a_read_only_disk(
    work: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _ = work.fresh().cubin
    with monkeypatch.context() as patch:
        read_only(patch)
        # What is there is used.
        assert work.fresh().cubin == work.folder / "kernel.cubin"
        assert len(work.compiled) == 1
        assert capsys.readouterr().err == ""
        made = work.fresh("sm_80")
        assert ".target sm_80" in made.ptx
        assert made.cubin.read_bytes().startswith(b"\x7fELF")
        assert made.cubin == made.cubin
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{work.cache} is not used: Read-only file system." in line
    assert work.leftovers() == []


def test_a_place_where_nothing_can_be(
    monkeypatch: pytest.MonkeyPatch, work: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUMLA_CACHE_DIR", "/proc/self/nowhere")
    for target in ("sm_90a", "sm_80"):
        made = work.fresh(target)
        content = made.cubin.read_bytes()
        assert content.startswith(b"\x7fELF")
        assert Path(str(made.cubin)).read_bytes() == content
        assert made.cubin == made.cubin
    assert len(work.compiled) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cumla: The kernel cache /proc/self/nowhere is not used: No such file")


def test_a_full_disk(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = work.fresh()
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        text = made.ptx
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ".entry" in text
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{work.cache} is not used: File too large." in line
    assert list(work.cache.iterdir()) == []
    # There is room again.
    assert made.cubin == work.folder / "kernel.cubin"


def test_a_write_that_fails_midway_leaves_nothing(
    work: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        fail_on(patch, "open", errno.ENOSPC, lambda path, flags, *_: path == "metadata.json")
        assert ".entry" in work.fresh().ptx
    assert "No space left on device" in capsys.readouterr().err
    assert list(work.cache.iterdir()) == []


def test_what_killed_processes_left_is_removed(work: Workplace) -> None:
    work.cache.mkdir(parents=True, mode=0o700)
    for name, age in ((".new-old", 5000), (".old-old", 5000), (".new-young", 5)):
        (work.cache / name / "sub").mkdir(parents=True)
        (work.cache / name / "kernel.ptx").write_text("half")
        then = (work.cache / name).stat().st_mtime - age
        os.utime(work.cache / name, (then, then))
    _ = work.fresh().ptx
    assert work.leftovers() == [".new-young"]


def test_a_better_entry_replaces_a_lesser_one_only(work: Workplace) -> None:
    lesser, better = work.fresh(), work.fresh()
    disk = Cache(work.cache)
    recipe = lesser.recipe
    poor = lesser._artefact(cubin=False)
    rich = better._artefact(cubin=True)
    disk.publish(recipe, poor)
    found = disk.load(recipe)
    assert found == rich
    assert poor.cubin is None
    disk.publish(recipe, rich)
    assert disk.load(recipe) == rich
    assert work.leftovers() == []


# ------------------------------------------------------------------------------------ where it is


@dataclass(frozen=True)
class Where:
    given: str | None
    xdg: str | None
    wanted: str


@pytest.mark.parametrize(
    "case",
    [
        Where(None, None, "/home/x/.cache/cumla"),
        Where(None, "/var/x", "/var/x/cumla"),
        Where(None, "relative", "/home/x/.cache/cumla"),
        Where("", "", "/home/x/.cache/cumla"),
        Where("/data/k", "/var/x", "/data/k"),
        Where("~/k", None, "/home/x/k"),
        Where("k", None, "{cwd}/k"),
    ],
    ids=str,
)
def test_location(case: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    for name, value in (("CUMLA_CACHE_DIR", case.given), ("XDG_CACHE_HOME", case.xdg)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert str(cache.location()) == case.wanted.format(cwd=Path.cwd())


def test_a_user_without_a_home(
    work: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("CUMLA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(CacheUnusable, match="no home folder"):
        cache.location()
    assert ".entry" in work.fresh().ptx
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cumla: The kernel cache is not used: no home folder")


def test_size_and_problem(work: Workplace) -> None:
    disk = Cache(work.cache)
    assert (disk.size(), disk.problem()) == ((0, 0), None)
    for target in ("sm_90a", "sm_80"):
        _ = work.fresh(target).ptx
    bytes_there = sum(one.stat().st_size for one in work.cache.rglob("*") if one.is_file())
    assert (disk.size(), disk.problem()) == ((2, bytes_there), None)
    work.cache.chmod(0o777)
    assert disk.problem() == "others can write to it (mode 777)"
