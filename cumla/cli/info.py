"""`cumla info`: what is installed here and what can run."""

from __future__ import annotations

import json
import platform
import textwrap
from collections.abc import Callable
from importlib import metadata
from typing import Any

import click
import numpy as np
from threadpoolctl import threadpool_info

import cumla
from cumla.backends import availability, get_backend
from cumla.backends.numpy.parallel import num_threads
from cumla.checks import ArgumentError
from cumla.jit import sources
from cumla.jit.cache import Cache, CacheUnusable, location

_WIDTH = 100
_CUPY_DISTRIBUTIONS = ("cupy-cuda12x", "cupy-cuda13x", "cupy")


@click.command("info", short_help="Show versions, GPU, compiler, backends and folders.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Show versions, GPU, compiler, backends and folders.

    Nothing here needs a GPU; what is missing is said with the reason.

    Example:  cumla info --json
    """
    facts = _gather()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    lines = _lines(facts)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        # Paths are longer than a line at times, and of no use when broken.
        text = textwrap.wrap(
            value, _WIDTH - width - 2, break_long_words=False, break_on_hyphens=False
        )
        for label, part in zip([name] + [""] * len(text), text, strict=False):
            click.echo(f"{label:<{width}}  {part}")


def _gather() -> dict[str, Any]:
    """Everything that `cumla info` tells, as JSON would have it."""
    return {
        "cumla": cumla.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "numpy": np.__version__,
        "blas": _blas(),
        "ml_dtypes": metadata.version("ml_dtypes"),
        "cupy": _cupy(),
        "gpu": _gpus(),
        "nvrtc": _nvrtc(),
        "kernel_sources": _kernel_sources(),
        "kernel_cache": _kernel_cache(),
        "threads": _setting(num_threads),
        "default_backend": _setting(get_backend),
        "backends": _backends(),
    }


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """`facts` for a person."""
    blas, cupy, gpu, nvrtc = (facts[name] for name in ("blas", "cupy", "gpu", "nvrtc"))
    lines = [
        ("cumla", facts["cumla"]),
        ("Python", f"{facts['python']}, {facts['platform']}"),
        ("NumPy", facts["numpy"]),
        ("BLAS", ", ".join(str(one) for one in (blas["name"], *blas["loaded"]) if one)),
        ("ml_dtypes", facts["ml_dtypes"]),
        ("CuPy", ", ".join(cupy) if cupy else "not installed"),
        *[("GPU", one) for one in gpu["found"]],
        *([] if gpu["found"] else [("GPU", f"none found: {gpu['reason']}")]),
        ("NVRTC", nvrtc["version"] or f"not usable: {nvrtc['reason']}"),
        *([("", nvrtc["path"])] if nvrtc["path"] else []),
        ("kernel sources", facts["kernel_sources"] or "not found: reinstall cumla"),
        *_cache_lines(facts["kernel_cache"]),
        ("threads", str(facts["threads"])),
        ("NumPy arrays", f"run on backend {facts['default_backend']}"),
    ]
    for name, reason in facts["backends"].items():
        lines.append((f"backend {name}", "usable" if reason is None else f"not usable: {reason}"))
    return lines


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _blas() -> dict[str, Any]:
    """The BLAS that NumPy was built with, and those that are loaded in this process."""
    built: Any = np.show_config(mode="dicts")
    loaded = [
        f"{one['internal_api']} {one['version']} ({one.get('architecture', 'unknown CPU')}, "
        f"{one['num_threads']} threads)"
        for one in threadpool_info()
        if one["user_api"] == "blas"
    ]
    return {
        "name": built.get("Build Dependencies", {}).get("blas", {}).get("name"),
        "loaded": loaded,
    }


def _cupy() -> list[str]:
    """The installed CuPy distributions, found without importing CuPy."""
    found = []
    for name in _CUPY_DISTRIBUTIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def _gpus() -> dict[str, Any]:
    """The GPUs that CuPy sees, or why it sees none."""
    # A missing driver, library or device shows as any of a dozen exceptions.
    try:
        import cupy

        runtime = cupy.cuda.runtime
        found = []
        for index in range(runtime.getDeviceCount()):
            properties = runtime.getDeviceProperties(index)
            name = properties["name"]
            found.append(
                f"{index}: {name.decode() if isinstance(name, bytes) else name}, "
                f"sm_{properties['major']}{properties['minor']}, "
                f"{properties['multiProcessorCount']} SMs, "
                f"{properties['totalGlobalMem'] / 2**30:.1f} GiB"
            )
    except Exception as error:
        return {"found": [], "reason": _one_line(error)}
    return {"found": found, "reason": None if found else "the driver lists no device"}


def _nvrtc() -> dict[str, Any]:
    """Where the CUDA C compiler library is, and its version."""
    facts: dict[str, Any] = {"version": None, "path": None, "reason": None}
    try:
        from cuda import pathfinder

        facts["path"] = pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path
    except Exception as error:
        facts["reason"] = _one_line(error)
    try:
        from cupy_backends.cuda.libs import nvrtc

        facts["version"] = ".".join(str(one) for one in nvrtc.getVersion())
        facts["reason"] = None
    except Exception as error:
        facts["reason"] = facts["reason"] or _one_line(error)
    return facts


def _kernel_sources() -> str | None:
    """The folder of CUDA C: inside the wheel, or beside the package in a checkout."""
    folder = sources.root()
    return str(folder) if any(folder.rglob("*.cuh")) else None


def _kernel_cache() -> dict[str, Any]:
    """Where compiled kernels are kept, how many and how large, or why none can be."""
    facts: dict[str, Any] = {"path": None, "kernels": 0, "bytes": 0, "reason": None}
    try:
        folder = location()
        facts["path"] = str(folder)
        cache = Cache(folder)
        facts["reason"] = cache.problem()
        facts["kernels"], facts["bytes"] = cache.size()
    except CacheUnusable as error:
        facts["reason"] = str(error)
    return facts


def _cache_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if facts["reason"] is not None:
        lines = [f"not usable: {facts['reason']}"]
    else:
        lines = [f"{facts['kernels']} kernels, {facts['bytes'] / 2**20:.1f} MiB"]
    lines += [facts["path"]] if facts["path"] else []
    return list(zip(("kernel cache", ""), lines, strict=False))


def _setting(read: Callable[[], int | str]) -> int | str:
    """What `read` returns, or why the environment variable behind it is wrong."""
    try:
        return read()
    except ArgumentError as error:
        return str(error)


def _backends() -> dict[str, str | None]:
    """For every backend: None if it can run here, else why not, without its own name in front."""
    return {
        name: reason if reason is None else reason.removeprefix(f"backend {name!r}: ")
        for name, reason in availability().items()
    }
