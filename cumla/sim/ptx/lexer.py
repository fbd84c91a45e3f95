"""PTX text without comments, its statements, and errors that show the line.

Nearly everything in PTX is a statement that one regular expression can cut out, so there is no
stream of tokens: the parser matches whole statements and looks inside them where it must.
"""

from __future__ import annotations

import re
from bisect import bisect_right

from cumla.sim.errors import PTXSyntaxError

# PTX ISA "Identifiers".
NAME = r"(?:[A-Za-z][\w$]*|[_$%][\w$]+)"
QUOTED = r'"[^"\n]*"'

_COMMENT = re.compile(rf"{QUOTED}|//[^\n]*|/\*.*?(?:\*/|(?P<open>\Z))", re.DOTALL)
_NOT_NEWLINE = re.compile(r"[^\n]")

# [@p] opcode.modifiers operands; -- an opcode without operands ends at once. A `:` after the first
# word makes it a label.
INSTRUCTION = re.compile(
    rf"\s*(?:@\s*(!?)\s*({NAME})\s+)?"
    r"([a-z]\w*)((?:\s*\.\w+(?:::\w+)*)*)(?=[\s;\[{(%])\s*([^;:\s][^;]*)?;"
)
LABEL = re.compile(rf"\s*({NAME})\s*:(?!:)")
BRACE = re.compile(r"\s*([{}])")
DIRECTIVE = re.compile(r"\s*(\.[a-z_]\w*)")
# To the semicolon; a string may hold one.
REST = re.compile(rf"((?:{QUOTED}|[^;\"])*);")
LOC = re.compile(
    r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)"
    rf"(?:\s*,\s*function_name\s+(\.?{NAME})(?:\s*\+\s*(\d+))?"
    r"\s*,\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?[ \t]*;?"
)
FILE = re.compile(rf"\s*\.file\s+(\d+)\s+({QUOTED})(?:\s*,\s*\d+)*[ \t]*;?")
SECTION = re.compile(r"\s*\.section\s+(\.?[\w$.]+)\s*(?:,[^{]*)?\{([^}]*)\}")
SPACE = re.compile(r"\s*")

ONE_OR_MORE = "an operand, or several with single commas between them"
# A piece of an operand list: brackets of all kinds keep their commas.
_PIECE = re.compile(r"(?:[^,\[\]{}()]|\[[^\[\]]*\]|\{[^{}]*\}|\((?:[^()]|\([^()]*\))*\))+")
_CLOSING = {"[": "]", "{": "}", "(": ")"}


class Text:
    """The text of a module.

    Attributes:
        clean: the text with comments blanked out; positions are those of the original.
    """

    def __init__(self, text: str) -> None:
        self.original = text
        self.line_starts = [0, *(m.end() for m in re.finditer("\n", text))]
        self.clean = text
        if "//" in text or "/*" in text:
            self.clean = _COMMENT.sub(self._blank, text)

    def _blank(self, match: re.Match[str]) -> str:
        if match.group("open") is not None:
            raise self.error(match.start(), "'*/' to end this comment")
        found = match.group()
        return found if found[0] == '"' else _NOT_NEWLINE.sub(" ", found)

    def line(self, position: int) -> int:
        """The number, from 1, of the line that a position is on."""
        return bisect_right(self.line_starts, position)

    def skip_space(self, position: int) -> int:
        """The position of the next character that is not white space."""
        match = SPACE.match(self.clean, position)
        return position if match is None else match.end()

    def error(self, position: int, expected: str) -> PTXSyntaxError:
        """The error that says what was expected, for the caller to raise."""
        number = self.line(min(position, len(self.original)))
        shown = self.original.split("\n")[number - 1].strip() or "(end of the text)"
        return PTXSyntaxError(f"PTX line {number}: expected {expected}\n    {shown}")


class Expected(Exception):
    """Something inside a statement is wrong; the argument says what was expected there."""


def split(text: str) -> list[str]:
    """The parts of a list that is separated by commas, outside brackets; Expected if unbalanced."""
    parts = _PIECE.findall(text)
    # Brackets that do not close, or nest deeper than the expression follows, are left out.
    if ",".join(parts) != text:
        parts = _split_slowly(text)
    stripped = [part.strip() for part in parts]
    if not stripped or "" in stripped:
        raise Expected(ONE_OR_MORE)
    return stripped


def _split_slowly(text: str) -> list[str]:
    parts, start = [], 0
    closers: list[str] = []
    for i, c in enumerate(text):
        if c in _CLOSING:
            closers.append(_CLOSING[c])
        elif c in "]})":
            if not closers or closers.pop() != c:
                raise Expected(f"no {c!r}")
        elif c == "," and not closers:
            parts.append(text[start:i])
            start = i + 1
    if closers:
        raise Expected(f"{closers[-1]!r}")
    return [*parts, text[start:]]
