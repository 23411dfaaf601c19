"""Fields of a config and the conditions that their values must meet, from which `meap_jax.fields` is made."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Values = Mapping[str, Any]  # All fields beside the one that is checked: of the config, or of one source.


class Check(NamedTuple):
    """One condition that the value of a field must meet."""

    is_valid: Callable[[Any, Values], bool]
    expected: Callable[[Values], str]  # The end of the sentence "FIELD is VALUE, but must be ...".
    wrong: tuple[Any, ...]  # Values that break the rule, for tests, ...
    given: Mapping[str, Any] = MappingProxyType({})  # ... in a config of defaults with these fields.


class Field:
    """One field of a config.

    Its type is that of its default. Its checks run in their order, after that of the type. A check that reads other
    fields must run after theirs, so its field comes below them in the table.
    """

    def __init__(self, default: Any, doc: str, *checks: Check, below: int = 2**31):
        """`default` is a type where the field is None until it is set; None is not checked.

        Whole numbers must be `below` a bound: devices count in int32.
        """
        self.default, self.doc, self.checks, self.below = default, doc, checks, below
        self.type: type = default if isinstance(default, type) else type(default)


def rule(is_valid: Callable[[Any], bool], expected: str, *wrong: Any) -> Check:
    """Makes a check that needs no other field; `wrong` are values that break it, for tests."""
    return Check(lambda value, _: is_valid(value), lambda _: expected, wrong)


def at_least(low: int) -> Check:
    """Makes a check for a finite number of `low` or more."""
    return rule(lambda v: low <= v < math.inf, f"at least {low}" if low else "0 or more", low - 1)


def at_most(*others: str) -> Check:
    """Makes a check for a value no greater than any of these fields."""
    return Check(
        lambda value, of: value <= min(of[other] for other in others),
        lambda of: f"at most {' and '.join(f'{other} ({of[other]})' for other in others)}",
        wrong=(2**30,),
    )


def one_of(*words: str) -> Check:
    """Makes a check for one of these words."""
    return rule(words.__contains__, f"one of {', '.join(words)}", "unheard-of")


def above(other: str) -> Check:
    """Makes a check for a value greater than another field."""
    return Check(lambda value, of: value > of[other], lambda of: f"above {other} ({of[other]})", wrong=(1e-9,))


def divides(other: str) -> Check:
    """Makes a check for a divisor of another field."""
    return Check(lambda value, of: of[other] % value == 0, lambda of: f"a divisor of {other} ({of[other]})", wrong=(3,))


POSITIVE = rule(lambda v: 0 < v < math.inf, "positive", 0.0, -1.0, math.inf)
SHARE = rule(lambda v: 0 <= v <= 1, "in [0, 1]", -0.1, 1.5)
DECAY_RATE = rule(lambda v: 0 <= v < 1, "in [0, 1)", -0.5, 1.0)
ANY = 2**63  # The bound of whole numbers that no device counts.
SEED = rule(lambda v: 0 <= v < 2**32, "in [0, 2^32)", -1, 2**32)
