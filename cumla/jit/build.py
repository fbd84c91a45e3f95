"""A kernel's source and template arguments to PTX and cubin for one target, each made once.

First this process' own memory is asked, then the cache on disk, then NVRTC.
"""

from __future__ import annotations

import os
import sys
import threading
from functools import cached_property
from pathlib import Path

from cumla.jit import nvrtc, sources
from cumla.jit.cache import ENVIRONMENT_VARIABLE, Cache, CacheUnusable, location
from cumla.jit.entry import CUBIN, Artefact, BadEntry
from cumla.jit.facts import Facts, facts_of
from cumla.jit.recipe import Recipe

OPTIONS = ("-std=c++17", "-lineinfo", "-default-device", "--ptxas-options=-v")

_builds: dict[tuple[str, str, str], Build] = {}
_told: set[str] = set()


class Build:
    """One kernel for one target, compiled when it is first looked at.

    Making the cubin takes as long again as making the PTX, and only a GPU wants it. Whoever needs
    both asks for the cubin first.

    Every property may raise CompileError (the source has errors), ArgumentError (an unknown target
    or file) or what CuPy raises where it has no NVRTC.
    """

    def __init__(self, path: str, expression: str, target: str) -> None:
        self.path, self.expression, self.target = path, expression, target
        self._lock = threading.Lock()
        self._made: Artefact | None = None
        self._memory: int | None = None
        self.cached = True
        """False once this process has compiled it."""

    @property
    def ptx(self) -> str:
        return self._artefact(cubin=False).ptx

    @property
    def entry(self) -> str:
        """The kernel's name in the PTX and the cubin."""
        return self._artefact(cubin=False).entry

    @property
    def cubin(self) -> Path:
        """A file with the code for the GPU, for `cupy.RawModule(path=str(...))`.

        It is in the cache; where that cannot be written, in memory, for as long as this process.
        """
        made = self._artefact(cubin=True)
        assert made.cubin is not None
        with self._lock:
            return self._published(made) or self._in_memory(made.cubin)

    @property
    def facts(self) -> Facts | None:
        """What the code takes of a GPU; None if ptxas' report has a form that is not known yet."""
        return self._artefact(cubin=True).facts

    @property
    def seconds(self) -> float:
        """That its last compilation took, here or in the process that put it into the cache."""
        return self._artefact(cubin=False).seconds

    @cached_property
    def recipe(self) -> Recipe:
        """What it is made from, and with that its place in the cache."""
        source = sources.whole(self.path)
        target = self.target.replace("compute_", "sm_")
        return Recipe(self.expression, source, OPTIONS, nvrtc.identity(), target)

    def _artefact(self, *, cubin: bool) -> Artefact:
        made = self._made
        if not _enough(made, cubin):
            with self._lock:
                made = self._made
                if not _enough(made, cubin):
                    made = self._made = self._obtain(cubin)
        assert made is not None
        return made

    def _obtain(self, cubin: bool) -> Artefact:
        """From the cache, else compiled, and then in the cache as far as that can be."""
        cache = _cache()
        if cache is None:
            return self._compile(cubin)
        try:
            found = cache.load(self.recipe)
            if found is not None and _enough(found, cubin):
                return found
        except BadEntry:
            pass  # if it still is when nobody else works on it, it is told
        except CacheUnusable as error:
            _tell_unusable(str(error))
            return self._compile(cubin)
        with cache.lock(self.recipe):
            try:
                found = cache.load(self.recipe)
                if found is not None and _enough(found, cubin):
                    return found
            except BadEntry as bad:
                _tell(f"{cache.root / self.recipe.folder} is not used: {bad}. It is made anew.")
            except CacheUnusable:
                pass  # publishing says so
            made = self._compile(cubin)
            try:
                cache.publish(self.recipe, made)
            except CacheUnusable as error:
                _tell_unusable(str(error))
            return made

    def _compile(self, cubin: bool) -> Artefact:
        recipe = self.recipe
        name = sources.PREFIX + self.path
        try:
            compiled = nvrtc.compile_kernel(
                recipe.source, name, recipe.expression, recipe.target, recipe.options, cubin=cubin
            )
        except nvrtc.CompileError as error:
            raise error.without(sources.PREFIX) from None
        self.cached = False
        facts = None
        if compiled.cubin is not None:
            try:
                facts = facts_of(compiled.log, compiled.cubin, compiled.entry)
            except ValueError as error:
                _tell(f"{recipe.expression}: nothing is known of its code. {error}")
        return Artefact(
            compiled.entry,
            compiled.ptx,
            compiled.cubin,
            facts,
            compiled.options,
            round(compiled.seconds, 3),
        )

    def _published(self, made: Artefact) -> Path | None:
        """The cubin's file in the cache, put there again if it is gone; None: it cannot be."""
        cache = _cache()
        if cache is None:
            return None
        try:
            try:
                found = cache.load(self.recipe)
            except BadEntry:
                found = None
            if found is None or found.cubin != made.cubin:
                cache.publish(self.recipe, made)
        except CacheUnusable as error:
            _tell_unusable(str(error))
            return None
        return cache.root / self.recipe.folder / CUBIN

    def _in_memory(self, cubin: bytes) -> Path:
        """A file that needs no disk."""
        if self._memory is None:
            self._memory = os.memfd_create(self.recipe.folder)
            with open(self._memory, "wb", closefd=False) as file:
                file.write(cubin)
        return Path(f"/proc/self/fd/{self._memory}")


def build(path: str, expression: str, target: str) -> Build:
    """The instantiation `expression` of a kernel, for `target`.

    Args:
        path: the file that defines it, relative to kernels_cu: "portable/decode/sparse.cuh".
        expression: its C++ name with template arguments: "cumla::decode_dense<...>".
        target: the architecture: "sm_90a".
    """
    key = (path, expression, target)
    # setdefault: of two threads that come at the same time, both get the same one.
    return _builds.get(key) or _builds.setdefault(key, Build(*key))


def forget() -> None:
    """Forget all builds and sources, for a program in which kernels are being edited."""
    _builds.clear()
    _told.clear()
    sources.whole.cache_clear()


def _enough(made: Artefact | None, cubin: bool) -> bool:
    return made is not None and (made.cubin is not None or not cubin)


def _cache() -> Cache | None:
    try:
        return Cache(location())
    except CacheUnusable as error:
        _tell_unusable(str(error))
        return None


def _tell_unusable(why: str) -> None:
    """Say once that kernels are not kept."""
    try:
        where = f"The kernel cache {location()}"
    except CacheUnusable:
        where = "The kernel cache"
    line = f"{where} is not used: {why}. Kernels are compiled in memory; set {ENVIRONMENT_VARIABLE}"
    if line not in _told:
        _told.add(line)
        _tell(f"{line} to a folder of your own.")


def _tell(line: str) -> None:
    """Print a line where results do not go."""
    print(f"cumla: {' '.join(line.split())}", file=sys.stderr, flush=True)
