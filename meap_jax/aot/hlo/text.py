"""Parses the text of a compiled program into instructions: shapes, operands, attributes."""

import dataclasses
import math
import re
from collections.abc import Iterable

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
# Its last line names a thread where it is not the chip's main core that runs it.
_COMPUTATION = re.compile(
    r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\n((?:.*\n)*?)\}(?:, execution_thread="[^"]*")?$', re.MULTILINE
)
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (?=[(a-z])", re.MULTILINE)


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
        bits = 8 if self.dtype == "pred" else int(digits[1]) if digits else 0  # Tokens and opaque values have none.
        return math.ceil(math.prod(self.dims) * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shapes opcode(operands), attributes`."""

    name: str
    shapes: tuple[Shape, ...]  # Of a tuple all arrays, flattened.
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # The text between the parentheses: of a constant its value, of a parameter its number.
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
        """`attribute={0,2}` or `attribute=1` as integers; [] if there is none."""
        return [int(n) for n in re.findall(r"\d+", self._first(rf"\b{attribute}=(\{{[\d,]*\}}|\d+)"))]

    def target(self) -> str:
        """Of a custom call, the function it calls."""
        return self._first(r'custom_call_target="([^"]*)"')

    def _first(self, pattern: str) -> str:
        """What the group of a pattern matches in the attributes; "" if nothing does."""
        match = re.search(pattern, self.attributes)
        return match.group(1) if match else ""


class Computation(dict[str, Instruction]):
    """Instructions by name, in the order of the text."""

    def __init__(self, name: str, instructions: Iterable[Instruction], root: str):
        super().__init__((i.name, i) for i in instructions)
        self.name = name
        self.root = self[root]  # What it returns.


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Reads `jax.stages.Compiled.as_text()`.

    Returns:
      All computations of the program by name, and the name of its entry computation.

    Raises:
      ValueError: if the text has no entry computation.
    """
    computations, entry = {}, ""
    for is_entry, name, body in _COMPUTATION.findall(text):
        starts = list(_INSTRUCTION.finditer(body))
        ends = [start.start() for start in starts[1:]] + [len(body)]
        # An attribute may go on in the next lines.
        instructions = [
            _instruction(start[2], body[start.end() : end].replace("\n", ""))
            for start, end in zip(starts, ends, strict=True)
        ]
        root = next((start[2] for start in starts if start[1]), starts[-1][2])
        computations[name] = Computation(name, instructions, root)
        entry = name if is_entry else entry
    if not entry:
        raise ValueError(f"no ENTRY computation in a text of {len(text)} characters that begins {text[:80]!r}")
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    """Parses the text after the equals sign."""
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
    return Shape(dtype, tuple(map(int, re.findall(r"\d+", dims))), int(space[1]) if space else 0)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[:120]!r}")
