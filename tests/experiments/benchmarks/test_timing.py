"""Turns: their order, what counts, and ratios taken round by round."""

import functools

import numpy as np
import pytest

from experiments.benchmarks.timing import Ratio, Timings, exponents, interleave, timed


def test_every_round_starts_with_the_next_competitor_and_warm_up_does_not_count():
    order, seconds = [], {"a": iter([9, 1, 2, 3]), "b": iter([9, 4, 5, 6]), "c": iter([9, 7, 8, 9])}

    def turn(name):
        order.append(name)
        return float(next(seconds[name]))

    timings = interleave({name: functools.partial(turn, name) for name in seconds}, rounds=3)
    assert order[3:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert sorted(order[:3]) == ["a", "b", "c"]
    assert {name: s.tolist() for name, s in timings.seconds.items()} == {"a": [1, 2, 3], "b": [4, 5, 6], "c": [7, 8, 9]}
    assert timings.median("b") == 5


def test_a_ratio_is_taken_in_every_round_before_the_median():
    # Rounds on a machine that gets ten times slower: the ratio is 2 in each, which medians of sums would blur.
    base = np.array([1.0, 10.0, 1.0, 10.0, 1.0])
    assert Timings({"a": 2 * base, "b": base}).ratio("a", "b") == Ratio(2, 2, 2)
    assert Ratio.of(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == Ratio(3, 2, 4)


def test_a_turn_of_several_calls_has_the_seconds_of_one(monkeypatch):
    clock = iter([100.0, 112.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    calls = []
    assert timed(lambda: calls.append(1), calls=4)() == 3
    assert len(calls) == 4


@pytest.mark.parametrize(("turns", "rounds"), [({}, 1), ({"a": float}, 0)])
def test_nothing_to_time_is_an_error(turns, rounds):
    with pytest.raises(ValueError, match="nothing to time"):
        interleave(turns, rounds=rounds)


def test_exponents_of_a_power_are_its_own():
    sizes = [1.0, 2.0, 8.0, 10.0]
    first, *others = exponents(sizes, [3 * n**1.5 for n in sizes])
    assert first is None
    assert others == pytest.approx([1.5, 1.5, 1.5])
