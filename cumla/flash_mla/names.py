"""FlashMLA's argument names in our errors, and arguments that must or must not be there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cumla.checks import ArgumentError, ArgumentTypeError, bad_type, bad_value


def check_given(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is None:
            raise bad_type(name, "None", "it is needed", "Pass an array.")


def check_absent(reason: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise bad_value(
                name, f"a {type(value).__name__}", f"{reason}, so it must be None", "Leave it out."
            )


@contextmanager
def speaking_of(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors of an op speak of its arguments (the keys) by FlashMLA's names."""
    try:
        yield
    except (ArgumentError, ArgumentTypeError) as error:
        words = r"\b(" + "|".join(names) + r")\b"
        text = re.sub(words, lambda found: names[found[0]], str(error))
        raise type(error)(text) from None
