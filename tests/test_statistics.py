"""Intervals and tests against scipy, values from tables and values worked out by hand."""

import numpy as np
import pytest
import scipy.stats

from meap_jax.statistics import (
    binomial_interval,
    clustered_interval,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_t_interval,
    ratio_interval,
    t_test,
)


def test_wilson_interval_of_8_in_10():
    # (p + z^2 / 2n ± z sqrt(p q / n + z^2 / 4n^2)) / (1 + z^2 / n) with z = 1.959964.
    z, p, n = 1.959963984540054, 0.8, 10
    centre, half = (p + z * z / (2 * n)), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = binomial_interval(8, 10)
    assert interval.estimate == 0.8
    assert interval.low == pytest.approx((centre - half) / (1 + z * z / n))
    assert interval.high == pytest.approx((centre + half) / (1 + z * z / n))


@pytest.mark.parametrize("hits", [0, 20])
def test_all_or_nothing_keeps_a_width(hits):
    interval = binomial_interval(hits, 20)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.high - interval.low > 0.1


def test_paired_interval_of_three_seeds():
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3); t of 2 degrees of freedom, 97.5 %: 4.302653 (any table).
    interval = paired_t_interval(np.array([1.0, 2.0, 3.0]))
    assert interval.estimate == pytest.approx(2)
    assert interval.high - 2 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert 2 - interval.low == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)


def test_the_interval_of_a_ratio_weighs_rows_by_their_counts():
    # Totals 2, 6, 4 over counts 1, 2, 1: ratio 3, residuals -1, 0, 1; standard error sqrt(3 / 2 * 2) / 4; t as above.
    interval = ratio_interval(np.array([2.0, 6.0, 0.0, 4.0]), np.array([1, 2, 0, 1]))
    half = 4.302653 * np.sqrt(3) / 4
    assert interval == pytest.approx((3, 3 - half, 3 + half), rel=1e-6)
    assert ratio_interval(np.array([6.0]), np.array([2])) == (3.0, None, None)  # One row has no spread.


def test_mean_and_t_test_are_those_of_scipy():
    values = np.random.default_rng(0).normal(0.3, 1, 17)
    expected = scipy.stats.ttest_1samp(values, 0)
    low, high = expected.confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((values.mean(), low, high))
    assert t_test(values) == pytest.approx((expected.statistic, expected.pvalue))
    assert t_test(np.zeros(3)) == (0.0, 1.0) and t_test(np.ones(3)) == (np.inf, 0.0)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 12), (12, 3), (40, 41)])
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    expected = scipy.stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected)


def test_holm_on_the_example_of_r():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_bootstrap_is_near_that_of_scipy():
    differences = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], 200, p=[0.1, 0.6, 0.3])
    expected = scipy.stats.bootstrap((differences,), np.mean, method="percentile", rng=np.random.default_rng(2))
    found = paired_bootstrap(differences)
    assert found.estimate == differences.mean()
    assert found[1:] == pytest.approx(tuple(expected.confidence_interval), abs=0.012)
    assert paired_bootstrap(differences) == found  # The same draws.
    assert paired_bootstrap(np.array([0.5])) == (0.5, 0.5, 0.5)


def test_clusters_of_equal_scores_count_once_and_independent_scores_each():
    rng = np.random.default_rng(0)
    of_clusters = rng.integers(0, 2, 200).astype(float)
    once = clustered_interval(of_clusters, range(200))
    tenfold = clustered_interval(np.repeat(of_clusters, 10), np.repeat(np.arange(200), 10))
    wilson = binomial_interval(of_clusters.sum(), 200)
    assert tenfold == pytest.approx(once)
    assert once == pytest.approx(wilson, abs=0.003)
    independent = clustered_interval(rng.integers(0, 2, 2000).astype(float), np.repeat(np.arange(200), 10))
    assert independent.high - independent.low < 0.45 * (tenfold.high - tenfold.low)
    # All right in 5 clusters of 88 cells: five trials, not 440.
    assert clustered_interval(np.ones(440), np.repeat(np.arange(5), 88)) == binomial_interval(5, 5)
    assert clustered_interval(np.array([1.0, 0.0]), ["one", "one"]) == (0.5, None, None)


def test_clustered_intervals_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(3), []
    for _ in range(400):
        shares = rng.beta(4, 2, 20)  # Of each cluster; their mean is 2 / 3.
        interval = clustered_interval(rng.binomial(1, np.repeat(shares, 10)), np.repeat(np.arange(20), 10))
        held.append(interval.low <= 2 / 3 <= interval.high)
    assert 0.92 <= np.mean(held) <= 0.985


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: t_test(np.array([1.0])), "at least 2 values, got 1"),
        (lambda: paired_bootstrap(np.array([])), "at least 1 example, got none"),
        (lambda: ratio_interval(np.array([1.0]), np.array([0])), "a ratio needs at least 1 row"),
        (lambda: binomial_interval(0, 0), "trials must be at least 1, got 0"),
        (lambda: paired_t_interval(np.array([1.0])), "needs at least 2 seeds, got 1"),
    ],
)
def test_too_little_data_is_said(call, text):
    with pytest.raises(ValueError, match=text):
        call()
