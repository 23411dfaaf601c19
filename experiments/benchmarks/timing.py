"""Times things in turns, so that what slows the machine slows all of them, and compares them round by round."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Ratio(NamedTuple):
    """A ratio taken in every round: the median, and the quartiles that half of the rounds lie between."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: np.ndarray) -> "Ratio":
        """From one ratio a round, [rounds]."""
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high))


class Timings(NamedTuple):
    """Seconds of every competitor in every round."""

    seconds: dict[str, np.ndarray]  # float64 [rounds] each, in the order of rounds.

    def median(self, name: str) -> float:
        """Seconds."""
        return float(np.median(self.seconds[name]))

    def ratio(self, a: str, b: str) -> Ratio:
        """Seconds of `a` over seconds of `b`, round by round."""
        return Ratio.of(self.seconds[a] / self.seconds[b])


def interleave(turns: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1) -> Timings:
    """Gives every competitor a turn in every round, each round starting with the next of them.

    Args:
      turns: name -> a function that takes its turn and returns its seconds.
      rounds: that count, at least 1.
      warmup: rounds before them that don't: compilation, caches, pages that the system hands out.

    Raises:
      ValueError: for no competitor or no round.
    """
    if not turns or rounds < 1:
        raise ValueError(f"nothing to time: {len(turns)} competitors, {rounds} rounds")
    names = list(turns)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warmup, rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            took = turns[name]()
            if i >= 0:
                seconds[name].append(took)
    return Timings({name: np.array(values) for name, values in seconds.items()})


def timed(function: Callable[[], Any], calls: int = 1) -> Callable[[], float]:
    """A turn of `calls` calls in a row, until what the last one returned is there; its seconds are those of one call.

    Args:
      function: returns arrays (a pytree), or None.
      calls: more than one where a call is so short that starting the clock would count.
    """

    def turn() -> float:
        began = time.perf_counter()
        for _ in range(calls):
            result = function()
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / calls

    return turn


def exponents(sizes: list[float], values: list[float]) -> list[float | None]:
    """How fast values grow between neighbours: p in value ~ size^p; None for the first."""
    pairs = zip(sizes, sizes[1:], values, values[1:], strict=False)
    return [None, *(float(np.log(b / a) / np.log(n / m)) for m, n, a, b in pairs)]
