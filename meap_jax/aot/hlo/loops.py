"""Trip counts of the loops of a compiled program."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from meap_jax.aot.hlo.text import Computation, Instruction

_SAME_VALUE = ("copy", "bitcast", "convert", "copy-start", "copy-done")


class _Value(NamedTuple):
    """An integer: a constant, or an element of the state of a loop plus a constant."""

    element: int | None  # The element's index in the state.
    constant: int


def trip_count(computations: Mapping[str, Computation], caller: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body: XLA's own count, else that of the constants in its comparison.

    Args:
      computations: of the program.
      caller: the computation that the loop is in.
      loop: the instruction.

    Returns:
      None if the count depends on data.
    """
    if match := re.search(r'"known_trip_count":\s*\{"n":\s*"(\d+)"\}', loop.attributes):
        return int(match[1])
    condition, body = computations[loop.called("condition")], computations[loop.called("body")]
    compare, initial = condition.root, caller[loop.operands[0]]
    evaluate = functools.partial(_value, computations, condition)
    if compare.opcode == "fusion":
        names, fused = compare.operands, computations[compare.called("calls")]
        evaluate = functools.partial(
            _value, computations, fused, argument=lambda number: _value(computations, condition, names[number])
        )
        compare = fused.root
    if compare.opcode != "compare" or initial.opcode != "tuple" or body.root.opcode != "tuple":
        return None

    def course(name: str) -> tuple[int, int] | None:
        """A side of the comparison: its value before the first trip, and its increment a trip."""
        side = evaluate(name)
        if side is None or side.element is None:
            return side and (side.constant, 0)
        start = _value(computations, caller, initial.operands[side.element])
        after = _value(computations, body, body.root.operands[side.element])
        if start is None or start.element is not None or after is None or after.element != side.element:
            return None
        return start.constant + side.constant, after.constant

    left, right = (course(name) for name in compare.operands)
    if left is None or right is None:
        return None
    direction = compare.called("direction")
    (a, step_a), (b, step_b) = (right, left) if direction in ("GT", "GE") else (left, right)
    if step_a <= step_b:
        return None
    return max(0, math.ceil((b - a + (direction in ("LE", "GE"))) / (step_a - step_b)))


def _value(
    computations: Mapping[str, Computation],
    computation: Computation,
    name: str,
    argument: Callable[[int], _Value | None] = lambda number: None,
) -> _Value | None:
    """What an instruction computes; `argument` gives the computation's parameters, where they aren't a loop's state."""

    def operand(number: int) -> _Value | None:
        return _value(computations, computation, i.operands[number], argument)

    i = computation[name]
    if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.arguments):
        return _Value(None, int(i.arguments))
    if i.opcode == "parameter":
        return argument(int(i.arguments))
    if i.opcode == "get-tuple-element" and computation[i.operands[0]].opcode == "parameter":
        return _Value(i.numbers("index")[0], 0)
    if i.opcode in _SAME_VALUE:
        return operand(0)
    if i.opcode == "fusion":
        fused = computations[i.called("calls")]
        return _value(computations, fused, fused.root.name, operand)
    if i.opcode == "add" and (a := operand(0)) and (b := operand(1)) and None in (a.element, b.element):
        return _Value(b.element if a.element is None else a.element, a.constant + b.constant)
    return None
