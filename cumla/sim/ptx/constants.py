"""Literals and constant expressions. PTX ISA "Constants", "Constant Expressions".

A value is a Python int with its signedness (all integers have 64 bits), or a float. Integers wrap.
Where the manual and ptxas differ, this is what ptxas does: shift counts are taken modulo 64, `%`
is unsigned, and `?:` leaves the type of the value that it selects.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from cumla.sim.ptx.lexer import Expected
from cumla.sim.ptx.syntax import Immediate

WARP_SIZE = 32

_INTEGER = r"0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|[0-9]+U?"
_FLOAT = r"(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+"
_BITS = r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}"
_TOKEN = re.compile(
    rf"\s*(?:(?P<bits>(?:{_BITS})(?!\w))|(?P<float>(?:{_FLOAT})(?![\w.]))"
    rf"|(?P<int>(?:{_INTEGER})(?![\w.]))|(?P<cast>\(\s*\.[su]64\s*\))|(?P<word>WARP_SZ\b)"
    r"|(?P<operator><<|>>|<=|>=|==|!=|&&|\|\||[-+!~*/%&|^<>?:()]))"
)
_PLAIN = re.compile(r"\+?\s*(-?(?:[1-9]\d{0,17}|0))")
_LITERAL = re.compile(rf"({_BITS})|(-?)(?:({_FLOAT})|({_INTEGER}))")
_LEVELS = (
    ("||",),
    ("&&",),
    ("|",),
    ("^",),
    ("&",),
    ("==", "!="),
    ("<", "<=", ">", ">="),
    ("<<", ">>"),
    ("+", "-"),
    ("*", "/", "%"),
)
_WORD = 1 << 64


@dataclass(frozen=True, slots=True)
class Value:
    """The value of a constant expression; `unsigned` is about integers only."""

    number: int | float
    unsigned: bool = False


def immediate(text: str) -> Immediate:
    """The literal or constant expression as an operand, or Expected."""
    match = _LITERAL.fullmatch(text)
    if match is None:
        return Immediate(evaluate(text).number)
    bits, minus, decimal, whole = match.groups()
    if bits:
        return _from_bits(bits)
    if decimal:
        return Immediate(-float(decimal) if minus else float(decimal))
    value = _integer(whole)
    return Immediate(_wrap(-value.number, value.unsigned).number if minus else value.number)


def evaluate(text: str) -> Value:
    """The value of a constant expression, or Expected."""
    try:
        return _Evaluator(text).result()
    except RecursionError:
        raise Expected("a constant expression with fewer parentheses") from None


def integer(text: str) -> int:
    """The value of a constant expression that has to be an integer, or Expected."""
    if (plain := _PLAIN.fullmatch(text)) is not None:
        return int(plain[1])
    number = evaluate(text).number
    if isinstance(number, float):
        raise Expected(f"an integer instead of {text.strip()!r}")
    return number


def _from_bits(text: str) -> Immediate:
    """0f and 0d literals."""
    bits = int(text[2:], 16)
    if text[1] in "fF":
        single: float = struct.unpack("<f", struct.pack("<I", bits))[0]
        return Immediate(single, single_bits=bits)
    double: float = struct.unpack("<d", struct.pack("<Q", bits))[0]
    return Immediate(double, double_bits=bits)


def _integer(text: str) -> Value:
    digits = text.rstrip("U")
    if digits[0] == "0" and digits.isdigit():
        if "8" in digits or "9" in digits:
            raise Expected(f"octal digits in {text!r}")
        number = int(digits, 8)
    else:
        number = int(digits, 0)
    if number >= _WORD:
        raise Expected(f"an integer of at most 64 bits instead of {text!r}")
    return Value(number, text[-1] == "U" or number >= _WORD >> 1)


def _wrap(number: int | float, unsigned: bool) -> Value:
    assert isinstance(number, int)
    number %= _WORD
    return Value(number - _WORD if not unsigned and number >= _WORD >> 1 else number, unsigned)


class _Evaluator:
    """Recursive descent, one level of operators at a time."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str]] = []
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None or match.lastgroup is None:
                raise Expected(f"a constant at {text[position:].strip()!r}")
            self.tokens.append((match.lastgroup, match[match.lastgroup]))
            position = match.end()
        self.at = 0

    def result(self) -> Value:
        value = self.conditional()
        if self.at < len(self.tokens):
            raise Expected(f"an operator before {self.tokens[self.at][1]!r} in {self.text!r}")
        return value

    def accept(self, *operators: str) -> str | None:
        if self.at < len(self.tokens):
            kind, token = self.tokens[self.at]
            if kind == "operator" and token in operators:
                self.at += 1
                return token
        return None

    def require(self, operator: str) -> None:
        if self.accept(operator) is None:
            raise Expected(f"{operator!r} in {self.text!r}")

    def conditional(self) -> Value:
        condition = self.binary(0)
        if self.accept("?") is None:
            return condition
        if isinstance(condition.number, float):
            raise Expected("an integer before '?'")
        yes = self.conditional()
        self.require(":")
        no = self.conditional()
        return yes if condition.number else no

    def binary(self, level: int) -> Value:
        if level == len(_LEVELS):
            return self.unary()
        left = self.binary(level + 1)
        while (operator := self.accept(*_LEVELS[level])) is not None:
            left = _apply(operator, left, self.binary(level + 1))
        return left

    def unary(self) -> Value:
        if self.at == len(self.tokens):
            raise Expected(f"a constant after {self.text!r}" if self.tokens else "a constant")
        kind, token = self.tokens[self.at]
        self.at += 1
        if kind == "int":
            return _integer(token)
        if kind == "float":
            return Value(float(token))
        if kind == "bits":
            return Value(_from_bits(token).value)
        if kind == "word":
            return Value(WARP_SIZE)
        if kind == "cast":
            return _wrap(_whole(self.unary(), token), "u" in token)
        if token == "(":
            inner = self.conditional()
            self.require(")")
            return inner
        if token not in "+-!~":
            raise Expected(f"a constant before {token!r} in {self.text!r}")
        value = self.unary()
        if token == "!":
            return Value(int(not _whole(value, "!")))
        if token == "~":
            return _wrap(~_whole(value, "~"), True)
        if token == "+":
            return value
        if isinstance(value.number, float):
            return Value(-value.number)
        return _wrap(-value.number, value.unsigned)


def _whole(value: Value, operator: str) -> int:
    if isinstance(value.number, float):
        raise Expected(f"an integer for {operator!r}")
    return value.number


def _usual(a: Value, b: Value) -> tuple[Value, Value]:
    """Both as floats if one is; else both unsigned if one is."""
    if isinstance(a.number, float) or isinstance(b.number, float):
        return Value(float(a.number)), Value(float(b.number))
    unsigned = a.unsigned or b.unsigned
    return _wrap(a.number, unsigned), _wrap(b.number, unsigned)


def _apply(operator: str, left: Value, right: Value) -> Value:
    if operator in ("&&", "||"):
        a, b = bool(_whole(left, operator)), bool(_whole(right, operator))
        return Value(int(a and b if operator == "&&" else a or b))
    if operator in ("<<", ">>"):
        count = _whole(right, operator) % 64
        number = _whole(left, operator)
        return _wrap(number << count if operator == "<<" else number >> count, left.unsigned)
    if operator == "%":
        dividend, divisor = (_whole(v, operator) % _WORD for v in (left, right))
        if divisor == 0:
            raise Expected("a divisor that is not 0")
        return _wrap(dividend % divisor, True)
    left, right = _usual(left, right)
    x, y = left.number, right.number
    compared = {
        "==": x == y,
        "!=": x != y,
        "<": x < y,
        "<=": x <= y,
        ">": x > y,
        ">=": x >= y,
    }
    if operator in compared:
        return Value(int(compared[operator]))
    if operator == "/" and y == 0:
        raise Expected("a divisor that is not 0")
    if isinstance(x, float) or isinstance(y, float):
        if operator in "&|^":
            raise Expected(f"integers for {operator!r}")
        return Value({"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else 0.0}[operator])
    if operator == "/":
        quotient = abs(x) // abs(y)  # towards zero
        return _wrap(quotient if (x < 0) == (y < 0) else -quotient, left.unsigned)
    table = {"+": x + y, "-": x - y, "*": x * y, "&": x & y, "|": x | y, "^": x ^ y}
    return _wrap(table[operator], left.unsigned)
