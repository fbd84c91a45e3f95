"""All that decides what code a kernel becomes, and the key that it makes."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

FORMAT = 1
"""Of the entries in the cache; a change of what they hold makes it another."""


@dataclass(frozen=True)
class Recipe:
    """What a kernel is made from. None of it is a path of this machine."""

    expression: str
    """The kernel's C++ name with its template arguments."""
    source: str
    """Flattened: the kernel's file with all that it includes."""
    options: tuple[str, ...]
    """Without the architecture."""
    nvrtc: str
    """`nvrtc.identity()`."""
    target: str

    def fields(self) -> dict[str, Any]:
        """The ingredients of the key, as JSON would have them."""
        return {**asdict(self), "options": list(self.options), "format": FORMAT}

    @cached_property
    def key(self) -> str:
        """SHA-256 of all of it, in hexadecimal."""
        text = json.dumps(self.fields(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folder(self) -> str:
        """What its entry in the cache is called: "attend.0123456789abcdef"."""
        name = re.findall(r"\w+", self.expression.split("<")[0])
        return f"{name[-1] if name else 'kernel'}.{self.key[:16]}"
