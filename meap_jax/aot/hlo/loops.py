"""How often a loop of a compiled program runs."""

import dataclasses
import math
import re

from meap_jax.aot.hlo.text import Computation, Instruction

_SAME_VALUE = ("copy", "bitcast", "convert", "copy-start", "copy-done")


def trip_count(computations: dict[str, Computation], caller: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body: as XLA says, else by the constants of its comparison.

    Args:
      computations: of the program.
      caller: where the loop stands.
      loop: the instruction.

    Returns:
      None if it is not constants that decide.
    """
    if match := re.search(r'"known_trip_count":\s*\{"n":\s*"(\d+)"\}', loop.attributes):
        return int(match.group(1))
    condition, body = computations[loop.called("condition")], computations[loop.called("body")]
    if condition.root.opcode == "fusion":
        condition = _inlined(condition, condition.root, computations[condition.root.called("calls")])
    compare, initial = condition.root, caller[loop.operands[0]]
    if compare.opcode != "compare" or initial.opcode != "tuple" or body.root.opcode != "tuple":
        return None

    def course(name: str) -> tuple[int, int] | None:
        """The value of a side of the comparison before the first trip, and what a trip adds to it."""
        if (value := _constant(condition, name)) is not None:
            return value, 0
        side = condition[_source(condition, name)]
        if side.opcode != "get-tuple-element":
            return None
        (index,) = side.numbers("index")
        start = _constant(caller, initial.operands[index])
        step = _step(computations, body, body.root.operands[index], index)
        return None if start is None or step is None else (start, step)

    left, right = (course(name) for name in compare.operands)
    if left is None or right is None:
        return None
    (a, step_a), (b, step_b) = left, right
    direction = compare.called("direction")
    if direction in ("GT", "GE"):
        (a, step_a), (b, step_b) = (b, step_b), (a, step_a)
    if step_a <= step_b:
        return None
    return max(0, math.ceil((b - a + (direction in ("LE", "GE"))) / (step_a - step_b)))


def _source(computation: Computation, name: str) -> str:
    """What copies, views and conversions take their value from."""
    while computation[name].opcode in _SAME_VALUE:
        name = computation[name].operands[0]
    return name


def _constant(computation: Computation, name: str) -> int | None:
    source = computation[_source(computation, name)]
    return source.integer() if source.opcode == "constant" else None


def _step(computations: dict[str, Computation], body: Computation, name: str, index: int) -> int | None:
    """What a body adds to the element `index` of its state, if that is constant; `name` is the element's new value."""
    i = body[_source(body, name)]
    if i.opcode == "get-tuple-element" and body[i.operands[0]].opcode == "parameter":
        return 0 if i.numbers("index") == [index] else None
    if i.opcode == "add":
        for one, other in (i.operands, i.operands[::-1]):
            constant, before = _constant(body, one), _step(computations, body, other, index)
            if constant is not None and before is not None:
                return before + constant
    if i.opcode == "fusion":
        fused = computations[i.called("calls")]
        return _step(computations, _inlined(body, i, fused), f"{i.name}/{fused.root_name}", index)
    return None


def _inlined(computation: Computation, fusion: Instruction, fused: Computation) -> Computation:
    """A computation with the instructions of one of its fusions beside its own."""
    names = {
        i.name: fusion.operands[i.parameter_number()] if i.opcode == "parameter" else f"{fusion.name}/{i.name}"
        for i in fused
    }
    copies = [
        dataclasses.replace(i, name=names[i.name], operands=tuple(names[n] for n in i.operands))
        for i in fused
        if i.opcode != "parameter"
    ]
    root = names[fused.root_name] if fusion.name == computation.root_name else computation.root_name
    return Computation(computation.name, {i.name: i for i in [*computation, *copies]}, root)
