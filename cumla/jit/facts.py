"""What ptxas tells of the code that it made."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_FUNCTION = re.compile(
    r"Function properties for (\S+)\n"
    r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_USED = re.compile(r"Used (\d+) registers.*")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Facts:
    """What a kernel takes of a GPU."""

    registers: int
    """Of a thread."""
    spill_bytes: int
    """Stored to local memory for want of registers, and loaded again; of a thread."""
    local_bytes: int
    """The stack frame of a thread, spills included."""
    shared_bytes: int
    """Static shared memory of a block; what a launch asks for comes on top."""
    code_bytes: int


def facts_of(log: str, cubin: bytes, entry: str) -> Facts:
    """The facts of a kernel, from what ptxas says with -v.

    There may be other kernels in the log. Functions that are not inlined count for all of them.

    Raises:
        ValueError: the log or the cubin is not as this function knows them.
    """
    # The texts between the names of entries, each behind its name.
    _, *reports = _ENTRY.split(log)
    own = dict(zip(reports[::2], reports[1::2], strict=True))
    used = _USED.search(own.get(entry, ""))
    functions = [
        [*map(int, numbers)]
        for name, *numbers in _FUNCTION.findall(log)
        if name == entry or name not in own
    ]
    if used is None or not functions:
        raise ValueError(f"ptxas' report is not understood:\n{log}")
    shared = _SHARED.search(used[0])
    return Facts(
        registers=int(used[1]),
        spill_bytes=sum(stores + loads for _, stores, loads in functions),
        local_bytes=sum(stack for stack, _, _ in functions),
        shared_bytes=0 if shared is None else int(shared[1]),
        code_bytes=section_bytes(cubin, f".text.{entry}"),
    )


def section_bytes(elf: bytes, name: str) -> int:
    """The size of a section of a 64-bit ELF file.

    Raises:
        ValueError: it has no such section.
    """
    try:
        (table,) = struct.unpack_from("<Q", elf, 40)
        size, count, names = struct.unpack_from("<HHH", elf, 58)
        headers = [struct.unpack_from("<IIQQQQ", elf, table + size * i) for i in range(count)]
        start = headers[names][4]
        for label, _, _, _, _, length in headers:
            if elf[start + label :].startswith(name.encode() + b"\0"):
                return int(length)
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"no ELF file: {error}") from error
    raise ValueError(f"the ELF file has no section {name}")
