"""Source lines of instructions: `.file`, `.loc` and the names in `.debug_str`.

PTX ISA "Debugging Directives".
"""

from __future__ import annotations

import re

from cumla.sim.ptx.lexer import FILE, LABEL, SECTION, Text
from cumla.sim.ptx.syntax import SourceLine

_BYTES = re.compile(r"\s*\.b8\s+(\d+(?:\s*,\s*\d+)*)")


class Sources:
    """Files and function names of a module, and one `SourceLine` for each place.

    Attributes:
        files: number -> path. A module lists them at its end, so they are read ahead.
    """

    def __init__(self, text: Text) -> None:
        self.text = text
        self.files = {int(m[1]): m[2][1:-1] for m in _all(FILE, ".file", text.clean)}
        self.strings = b""
        self.string_labels: dict[str, int] = {}
        for section in _all(SECTION, ".section", text.clean):
            if section[1] == ".debug_str":
                self._read_strings(section[2])
        self.made: dict[tuple[object, ...], SourceLine] = {}
        self.newest: dict[tuple[str, str, str], SourceLine] = {}  # by file, line, column

    def _read_strings(self, body: str) -> None:
        data = bytearray()
        at = 0
        while at < len(body):
            if (label := LABEL.match(body, at)) is not None:
                self.string_labels[label[1]] = len(data)
                at = label.end()
            elif (row := _BYTES.match(body, at)) is not None:
                data += bytes(int(n) & 0xFF for n in row[1].split(","))
                at = row.end()
            else:
                break
        self.strings = bytes(data)

    def locate(self, match: re.Match[str]) -> SourceLine:
        """The line that a `.loc` names."""
        file, line, column, name, offset, *at = match.groups()
        inlined_at = None
        if name is not None:
            # The place it was inlined at may be inlined itself: then the .loc before said so.
            inlined_at = self.newest.get((at[0], at[1], at[2]))
            if inlined_at is None:
                inlined_at = self._line(match, at[0], at[1], at[2])
        key = (file, line, column, name, offset, inlined_at)
        made = self.made.get(key)
        if made is None:
            made = self._line(match, file, line, column, self._function(name, offset), inlined_at)
            self.made[key] = made
        self.newest[file, line, column] = made
        return made

    def _line(
        self,
        match: re.Match[str],
        file: str,
        line: str,
        column: str,
        function: str | None = None,
        inlined_at: SourceLine | None = None,
    ) -> SourceLine:
        path = self.files.get(int(file))
        if path is None:
            raise self.text.error(match.start(1), f"the number of a .file instead of {file}")
        return SourceLine(path, int(line), int(column), function, inlined_at)

    def _function(self, label: str | None, offset: str | None) -> str | None:
        if label is None or not self.strings:
            return None
        start = 0 if label == ".debug_str" else self.string_labels.get(label)
        if start is None:
            return None
        start += int(offset or 0)
        return self.strings[start:].split(b"\0", 1)[0].decode(errors="replace")


def _all(pattern: re.Pattern[str], word: str, text: str) -> list[re.Match[str]]:
    """Matches of a directive's pattern, tried only where its word stands."""
    found = []
    at = text.find(word)
    while at >= 0:
        match = pattern.match(text, at)
        if match is not None:
            found.append(match)
        at = text.find(word, at + 1 if match is None else match.end())
    return found
