"""A compiled kernel as the files of a folder that a person can read, and back.

source.cu      the flattened source; with the options of metadata.json it compiles alone
kernel.ptx     what the simulator runs
kernel.cubin   what a GPU runs; only where that was asked for
metadata.json  the recipe, the entry's name, facts about the code, and checksums of the rest
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cumla.jit.facts import Facts
from cumla.jit.recipe import Recipe

SOURCE, PTX, CUBIN, METADATA = "source.cu", "kernel.ptx", "kernel.cubin", "metadata.json"
FILES = (SOURCE, PTX, CUBIN, METADATA)


class BadEntry(Exception):
    """An entry of the cache is not what was once put there; the text says what is wrong."""


@dataclass(frozen=True)
class Artefact:
    """A compiled kernel."""

    entry: str
    """The kernel's name in the PTX and the cubin."""
    ptx: str
    cubin: bytes | None
    facts: Facts | None
    """None without a cubin, or if ptxas' report is of a form that is not known yet."""
    options: tuple[str, ...]
    """All that NVRTC was given."""
    seconds: float
    """That it took to compile."""


def to_files(recipe: Recipe, made: Artefact) -> dict[str, bytes]:
    """The files of an entry."""
    files = {SOURCE: recipe.source.encode(), PTX: made.ptx.encode()}
    if made.cubin is not None:
        files[CUBIN] = made.cubin
    fields = recipe.fields()
    del fields["source"]
    metadata = {
        "key": recipe.key,
        "entry": made.entry,
        **fields,
        "options": list(made.options),
        "facts": None if made.facts is None else asdict(made.facts),
        "seconds": made.seconds,
        "sha256": {name: _sha256(data) for name, data in files.items()},
    }
    text = json.dumps({**metadata, "sha256_of_the_above": _checksum(metadata)}, indent=2)
    return {**files, METADATA: text.encode() + b"\n"}


def from_files(recipe: Recipe, files: Mapping[str, bytes]) -> Artefact:
    """The compiled kernel in the files of an entry.

    Raises:
        BadEntry: they are not, to the bit, what `to_files` once made for `recipe`.
    """
    if METADATA not in files:
        raise BadEntry(f"{METADATA} is missing")
    try:
        metadata: dict[str, Any] = json.loads(files[METADATA])
        checksum = metadata.pop("sha256_of_the_above")
        if checksum != _checksum(metadata):
            raise BadEntry(f"{METADATA} has been changed")
        if metadata["key"] != recipe.key:
            raise BadEntry("it belongs to another kernel or another version of cumla")
        checksums = metadata["sha256"]
        if not {SOURCE, PTX} <= checksums.keys():
            raise BadEntry(f"{METADATA} lacks checksums")
        for name, wanted in checksums.items():
            if name not in files:
                raise BadEntry(f"{name} is missing")
            if _sha256(files[name]) != wanted:
                raise BadEntry(f"{name} has been changed")
        facts = metadata["facts"]
        return Artefact(
            entry=metadata["entry"],
            ptx=files[PTX].decode(),
            cubin=files[CUBIN] if CUBIN in checksums else None,
            facts=None if facts is None else Facts(**facts),
            options=tuple(metadata["options"]),
            seconds=metadata["seconds"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadEntry(f"{METADATA} cannot be read: {type(error).__name__}: {error}") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checksum(metadata: dict[str, Any]) -> str:
    return _sha256(json.dumps(metadata, sort_keys=True).encode())
