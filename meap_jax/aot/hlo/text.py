"""The text of a compiled program as instructions: shapes, operands, attributes."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {
    "pred": 8, "token": 0, "opaque": 0,
    "c64": 64, "c128": 128, "bf16": 16,
}  # fmt: skip
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_END = re.compile(r'\}(, execution_thread="[^"]*")?$')  # A thread, where it is not the chip's main core that runs it.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (?=[(a-z])")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: its type, its dimensions and the number of the memory that holds it (0 is the main one)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Without padding; types below a byte are packed."""
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits.group(1)) if digits else 0
        return math.ceil(math.prod(self.dims) * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shapes opcode(operands), attributes`."""

    name: str
    shapes: tuple[Shape, ...]  # Of a tuple all arrays, flattened.
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # What stands between the parentheses: of a constant its value, of a parameter its number.
    attributes: str

    def called(self, attribute: str) -> str:
        """The computation that an attribute names; "" if there is none."""
        return self._first(rf"\b{attribute}=%?([\w.\-]+)")

    def branches(self) -> list[str]:
        """The computations of a conditional."""
        if match := re.search(r"branch_computations=\{([^}]*)\}", self.attributes):
            return [name.strip().lstrip("%") for name in match.group(1).split(",")]
        return [self.called("true_computation"), self.called("false_computation")]

    def numbers(self, attribute: str) -> list[int]:
        """`attribute={0,2}` or `attribute=1` as integers; [] if it isn't there."""
        return [int(n) for n in re.findall(r"\d+", self._first(rf"\b{attribute}=(\{{[\d,]*\}}|\d+)"))]

    def target(self) -> str:
        """Of a custom call, the function it calls."""
        return self._first(r'custom_call_target="([^"]*)"')

    def _first(self, pattern: str) -> str:
        """What the group of a pattern matches in the attributes; "" if nothing does."""
        match = re.search(pattern, self.attributes)
        return match.group(1) if match else ""

    def integer(self) -> int | None:
        """The value of a constant, if it is an integer."""
        return int(self.arguments) if re.fullmatch(r"-?\d+", self.arguments) else None

    def parameter_number(self) -> int:
        """Of a parameter; -1 for anything else."""
        return int(self.arguments) if self.opcode == "parameter" else -1


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction]
    root_name: str

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __contains__(self, name: str) -> bool:
        return name in self.instructions

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return self.instructions[self.root_name]


@dataclasses.dataclass(frozen=True)
class Module:
    """All computations of a program."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: if the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    lines: list[tuple[str, bool, int, str]] = []  # name, is root, where its shape begins, text.

    for line in text.splitlines():
        if not name:
            if header := _HEADER.match(line):
                name, root, lines = header.group(2), "", []
                entry = name if header.group(1) else entry
        elif _END.match(line):
            instructions = {i.name: i for i in (_instruction(i_name, i_text[at:]) for i_name, _, at, i_text in lines)}
            root = next((i_name for i_name, is_root, _, _ in lines if is_root), lines[-1][0])
            computations[name] = Computation(name, instructions, root)
            name = ""
        elif start := _INSTRUCTION.match(line):
            lines.append((start.group(2), bool(start.group(1)), start.end(), line))
        elif lines:  # An attribute that goes on in the next line.
            i_name, is_root, at, i_text = lines[-1]
            lines[-1] = (i_name, is_root, at, i_text + line)
    if not entry:
        raise ValueError(f"no ENTRY computation in a text of {len(text)} characters that begins {text[:80]!r}")
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    """From what stands after the equals sign."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    arguments = rest[len(opcode) + 1 : close]
    return Instruction(
        name=name,
        shapes=tuple(_shape(*match) for match in _SHAPE.findall(shapes)),
        opcode=opcode,
        operands=() if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[close + 1 :],
    )


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(d) for d in re.findall(r"\d+", dims))
    return Shape(dtype, sizes, int(space.group(1)) if space else 0)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[:120]!r}")
