"""The parts of a PTX module as the parser hands them on.

Names are as in the PTX ISA manual. Scopes are resolved by the parser: every register, variable and
label of a function has a name that is unique in that function, whatever block declared it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A line of the source that the PTX was compiled from (a `.loc` directive)."""

    file: str
    line: int
    column: int = 0
    function: str | None = None  # for an inlined function: its name, if the PTX tells
    inlined_at: SourceLine | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def trace(self) -> str:
        """With the places of the calls, e.g. "a.cuh:3 (inlined at b.cuh:9, at k.cu:2)"."""
        calls = []
        at = self.inlined_at
        while at is not None:
            calls.append(f"at {at}")
            at = at.inlined_at
        return f"{self} (inlined {', '.join(calls)})" if calls else str(self)


@dataclass(frozen=True, slots=True)
class Register:
    """A register operand, special registers (`%tid.x`, `%laneid`, `%clock64`) included."""

    name: str


@dataclass(frozen=True, slots=True)
class Immediate:
    """A literal. `value` is an int, or a float for `0f...`, `0d...` and decimal literals.

    `single_bits` holds the 32 bits of a `0f` literal and `double_bits` the 64 of a `0d` one, so
    that NaN payloads survive.
    """

    value: int | float
    single_bits: int | None = None
    double_bits: int | None = None


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable or function, or a label, plus a constant."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Address:
    """`[base + offset]`; the base is a register, a variable or an absolute address (None)."""

    base: Register | Symbol | None
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """`d|p`: two destinations of one instruction (setp, shfl, match, elect)."""

    first: Operand
    second: Operand


@dataclass(frozen=True, slots=True)
class Negated:
    """`!p`: the opposite of a predicate."""

    operand: Register


@dataclass(frozen=True, slots=True)
class Sink:
    """`_`: a destination that nobody wants, or an operand that is left out."""


Operand = Register | Immediate | Symbol | Address | Vector | Pair | Negated | Sink


@dataclass(frozen=True, slots=True)
class Guard:
    """`@p` or `@!p` before an instruction."""

    register: str
    negated: bool


@dataclass(frozen=True, slots=True, eq=False)
class Instruction:
    """One instruction.

    Attributes:
        opcode: the first word (`ld`, `mma`, `cp`, `mbarrier`).
        modifiers: the words after it, without dots, in order. `ld.global.nc.v4.f32` gives
            ("global", "nc", "v4", "f32"); `.shared::cta` stays one word, "shared::cta".
        operands: destinations first, as written. For `call` they are: the function (Symbol or
            Register), then a Vector of return parameters, then a Vector of arguments, then, for an
            indirect call, the Symbol of the prototype or target table.
        guard: the predicate that it runs under, or None.
        line: line in the PTX text, from 1.
        source: the source line that it comes from, or None.
        text: the instruction as it stands in the PTX, on one line.
        index: its position in its function, from 0.
    """

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Guard | None
    line: int
    source: SourceLine | None
    text: str
    index: int

    @property
    def name(self) -> str:
        """Opcode and modifiers with dots."""
        return ".".join((self.opcode, *self.modifiers))

    @property
    def where(self) -> str:
        """For messages: the source line, and where it was inlined; without them the PTX line."""
        return self.source_line if self.source is None else self.source.trace

    @property
    def source_line(self) -> str:
        """The source line alone; the PTX line where the PTX has no line information."""
        return f"PTX line {self.line}" if self.source is None else str(self.source)


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable of a module, of a function, or a parameter.

    Attributes:
        space: "global", "const", "shared", "local" or "param".
        type: element type ("b8", "f32", ...).
        align: in bytes.
        size: in bytes; 0 for an unsized array (`extern .shared .b8 x[]`).
        initial: the bytes it starts with (shorter than size: zeros follow), or None.
        addresses: (byte offset in `initial`, width in bytes, symbol name, addend, generic) for
            initialisers that hold addresses of other variables; generic is True for
            `generic(name)`.
        linkage: "", "extern", "visible", "weak" or "common".
        pointer: (space, align) of a `.ptr` parameter, or None.
    """

    name: str
    space: str
    type: str
    align: int
    size: int
    initial: bytes | None = None
    addresses: tuple[tuple[int, int, str, int, bool], ...] = ()
    linkage: str = ""
    pointer: tuple[str, int] | None = None


@dataclass(slots=True)
class Function:
    """A `.entry` or `.func`.

    Attributes:
        registers: name -> type ("b32", "f32", "pred", ...) of every register declared in it.
        returns, parameters: their parameters (space "param", or "reg" for register parameters).
        variables: `.shared`, `.local`, `.param` variables declared inside it.
        instructions: in order.
        labels: label -> index of the instruction that follows it (may equal
            len(instructions)).
        branch_targets: `.branchtargets` label -> its list of labels, for brx.idx.
        directives: performance directives, e.g. {"maxntid": (256, 1, 1), "reqntid": (128,),
            "minnctapersm": (2,), "reqnctapercluster": (2, 1, 1), "explicitcluster": (),
            "maxclusterrank": (8,), "maxnreg": (128,), "noreturn": ()}.
        body: False for a declaration (prototype) only.
    """

    name: str
    entry: bool
    linkage: str = ""
    returns: list[Variable] = field(default_factory=list)
    parameters: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    body: bool = False


@dataclass(slots=True)
class Module:
    """A PTX module: `.version` (8, 7), `.target` "sm_90a", address size, and what it holds."""

    version: tuple[int, int]
    target: str
    address_size: int
    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)
