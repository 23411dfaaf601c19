"""Onsets worked out by hand; tests of groups against scipy, their definitions, and the laws that they obey."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from meap_jax.onset import MAX_ASSIGNMENTS, Factor, Onset, factor, log_rank, onset, permutation_p, settled_accuracy
from meap_jax.statistics import paired_t_interval

# Few different times, so that many are tied.
RUNS = st.lists(st.builds(Onset, st.integers(1, 8).map(float), st.booleans()), min_size=1, max_size=5)
SHARES = st.floats(0, 1, allow_subnormal=False)
CURVES = st.lists(st.tuples(st.integers(1, 1000), SHARES), min_size=1, max_size=8).map(
    lambda steps: (np.cumsum([step for step, _ in steps]).tolist(), [share for _, share in steps])
)


def began(*tokens):
    return [Onset(float(t), False) for t in tokens]


def censored(*tokens):
    return [Onset(float(t), True) for t in tokens]


# --------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.2, 0.3, 0.9, 0.9], (250, False)),  # Half of the range from 0.2 to 1 is 0.6, half way from 0.3 to 0.9.
        ([0.2, 0.6, 0.1, 0.9], (200, False)),  # Reached exactly; that it fell again does not matter.
        ([0.7, 0.2, 0.9, 0.9], (100, False)),  # Nothing is known from before the first evaluation.
        ([0.2, 0.3, 0.5, 0.59], (400, True)),
    ],
)
def test_onset_is_where_accuracy_first_reaches_half_of_its_range(accuracies, expected):
    assert onset([100, 200, 300, 400], accuracies, 0.2) == (pytest.approx(expected[0]), expected[1])


@given(CURVES, st.floats(0, 0.99))
def test_onset_is_censored_exactly_if_no_accuracy_reaches_it_and_lies_between_two_evaluations(curve, chance):
    tokens, accuracies = curve
    found, is_reached = onset(tokens, accuracies, chance), np.array(accuracies) >= (chance + 1) / 2
    assert found.is_censored == (not is_reached.any())
    if found.is_censored:
        assert found.tokens == tokens[-1]
    else:
        first = int(is_reached.argmax())
        assert tokens[max(first - 1, 0)] <= found.tokens <= tokens[first]


@given(CURVES, st.floats(0, 0.99), st.floats(1e-3, 1e6))
def test_onset_scales_with_tokens(curve, chance, scale):
    tokens, accuracies = curve
    before, scaled = onset(tokens, accuracies, chance), onset(np.multiply(tokens, scale), accuracies, chance)
    assert scaled == (pytest.approx(scale * before.tokens), before.is_censored)


def test_settled_accuracy_is_the_mean_over_the_last_fifth_in_tokens():
    values = np.linspace(0, 1, 10)
    assert settled_accuracy(range(10, 110, 10), values) == pytest.approx(values[7:].mean())  # At 80, 90 and 100.
    assert settled_accuracy([10, 20, 100], [0.1, 0.2, 0.7]) == 0.7  # One evaluation at least.
    assert settled_accuracy([0], [0.3]) == 0.3


@pytest.mark.parametrize(
    ("tokens", "accuracies", "chance", "text"),
    [
        ([], [], 0, "at least 1"),
        ([1, 2], [0.5], 0, "must be as many"),
        ([2, 1], [0.5, 0.6], 0, "must ascend"),
        ([1, 1], [0.5, 0.6], 0, "must ascend"),
        ([-1, 1], [0.5, 0.6], 0, "must ascend"),
        ([1, math.nan], [0.5, 0.6], 0, "must ascend"),
        ([1, 2], [0.5, math.nan], 0, r"in \[0, 1\]"),
        ([1, 2], [0.5, 60], 0, r"in \[0, 1\]"),
        ([1, 2], [0.5, 0.6], 1, r"chance must be in \[0, 1\), got 1"),
    ],
)
def test_what_is_no_curve_is_refused(tokens, accuracies, chance, text):
    with pytest.raises(ValueError, match=text):
        onset(tokens, accuracies, chance)
    if chance == 0:
        with pytest.raises(ValueError, match=text):
            settled_accuracy(tokens, accuracies)


# ---------------------------------------------------------------------------------------------------------- two groups


def scipys(runs):
    times, ends = ([run.tokens for run in runs if run.is_censored == is_end] for is_end in (False, True))
    return scipy.stats.CensoredData(uncensored=times, right=ends)


def statistic(a, b):
    """Onsets of `a` less those expected, onset by onset, as the textbook has it."""
    total = 0.0
    for time in {run.tokens for run in [*a, *b] if not run.is_censored}:
        begin, own = ([r for r in of if r == Onset(time, False)] for of in ([*a, *b], a))
        waiting, own_waiting = ([r for r in of if r.tokens >= time] for of in ([*a, *b], a))
        total += len(own) - len(begin) * len(own_waiting) / len(waiting)
    return total


@pytest.mark.parametrize("num_times", [3, 10, 10**6])
def test_log_rank_is_that_of_scipy_with_censoring_and_ties(num_times):
    rng, num_compared = np.random.default_rng(num_times), 0
    for _ in range(60):
        groups = [
            [Onset(float(t), rng.random() < 0.3) for t in rng.integers(1, num_times + 1, n)]
            for n in rng.integers(1, 12, 2)
        ]
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = scipy.stats.logrank(*map(scipys, groups)).pvalue
        if not math.isnan(expected):
            num_compared += 1
            assert log_rank(*groups) == pytest.approx(expected, abs=1e-9)
    assert num_compared > 50


@settings(max_examples=60)
@given(RUNS, RUNS)
def test_exact_p_is_the_share_of_assignments_whose_statistic_is_as_large(a, b):
    pool, observed = [*a, *b], abs(statistic(a, b))
    found = []
    for chosen in itertools.combinations(range(len(pool)), len(a)):
        of_a = [pool[i] for i in chosen]
        found.append(abs(statistic(of_a, [run for i, run in enumerate(pool) if i not in chosen])))
    assert permutation_p(a, b) == np.mean(np.array(found) >= observed - 1e-10)


@given(RUNS, RUNS)
def test_p_values_know_the_order_of_times_alone_and_no_order_of_groups(a, b):
    later = [[Onset(math.exp(run.tokens) - 5, run.is_censored) for run in of] for of in (a, b)]
    for test in (log_rank, permutation_p):
        assert test(*later) == test(a, b)
        assert test(b, a) == pytest.approx(test(a, b))
        assert 0 < test(a, b) <= 1


@given(RUNS)
def test_equal_groups_have_p_1(runs):
    assert log_rank(runs, runs) == pytest.approx(1)
    assert permutation_p(runs, runs) == 1


@pytest.mark.parametrize("last", [began(6, 7, 8, 9, 10), censored(6, 6, 6, 6, 6), began(6, 7) + censored(8, 9, 10)])
def test_five_against_five_that_are_apart_have_the_smallest_p(last):
    first = began(1, 2, 3, 4, 5)
    assert permutation_p(first, last) == permutation_p(last, first) == 2 / 252


def test_runs_that_never_begin_say_nothing():
    assert log_rank(censored(1, 2), censored(2, 3)) == permutation_p(censored(1, 2), censored(2, 3)) == 1


def test_exact_p_of_no_difference_is_below_5_percent_in_at_most_5_percent():
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        times = rng.exponential(1, 10)
        runs = [Onset(min(t, 1.5), t > 1.5) for t in times.tolist()]
        found.append(permutation_p(runs[:5], runs[5:]))
    assert 0.01 < np.mean(np.array(found) <= 0.05) <= 0.07  # 0.05 and two standard errors.


# -------------------------------------------------------------------------------------------------------------- factor


def test_factor_is_the_geometric_mean_of_ratios_with_a_t_interval_of_their_logarithms():
    found = factor(began(1, 2, 4), began(2, 4, 16))  # Ratios 2, 2, 4.
    interval = paired_t_interval(np.log([2, 2, 4]))
    assert found == (pytest.approx(16 ** (1 / 3)), *map(pytest.approx, np.exp(interval[1:])), False)
    assert factor(began(2), began(6)) == Factor(pytest.approx(3), None, None, False)


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(1, 1e9)), min_size=2, max_size=5), st.floats(1e-3, 1e3))
def test_factor_of_swapped_groups_is_its_inverse_and_needs_no_unit(pairs, scale):
    a, b = (began(*times) for times in zip(*pairs, strict=True))
    found, swapped = factor(a, b), factor(b, a)
    assert swapped[:3] == pytest.approx((1 / found.estimate, 1 / found.high, 1 / found.low))
    assert found.low <= found.estimate <= found.high
    of_other_unit = factor(*([Onset(scale * run.tokens, False) for run in of] for of in (a, b)))
    assert of_other_unit[:3] == pytest.approx(found[:3], rel=1e-4)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5))
def test_factor_of_runs_that_had_not_begun_is_a_lower_bound(runs):
    a = began(*(x for x, _, _ in runs))
    b = began(*(y for _, y, _ in runs))
    cut = [Onset(float(min(y, end)), y > end) for _, y, end in runs]
    found = factor(a, cut)
    assert found.is_lower_bound == any(run.is_censored for run in cut)
    assert found.estimate <= factor(a, b).estimate * (1 + 1e-12)
    assert not found.is_lower_bound or found.low is found.high is None


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: log_rank([], began(1)), "each group needs at least 1 run, got 0 and 1"),
        (lambda: permutation_p(began(1), []), "each group needs at least 1 run, got 1 and 0"),
        (lambda: permutation_p(began(*range(11)), began(*range(11))), "705,432 assignments, more than the 200,000"),
        (lambda: factor(began(1), began(1, 2)), "groups of one size, got 1 and 2 runs"),
        (lambda: factor(censored(1), began(2)), "the first group had not begun"),
        (lambda: factor(began(0), began(2)), "an onset at 0 tokens"),
    ],
)
def test_groups_that_cannot_be_compared_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_ten_against_ten_are_still_exact():
    assert math.comb(20, 10) <= MAX_ASSIGNMENTS
    assert permutation_p(began(*range(10)), began(*range(10, 20))) == 2 / math.comb(20, 10)
