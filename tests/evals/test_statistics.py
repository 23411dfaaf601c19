"""Intervals against values from tables and worked out by hand."""

import numpy as np
import pytest

from meap_jax.evals.statistics import binomial_interval, paired_t_interval, ratio_interval


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


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ratio_interval(np.array([1.0]), np.array([0])), "a ratio needs at least 1 row"),
        (lambda: binomial_interval(0, 0), "trials must be at least 1, got 0"),
        (lambda: paired_t_interval(np.array([1.0])), "needs at least 2 seeds, got 1"),
    ],
)
def test_too_little_data_is_said(call, text):
    with pytest.raises(ValueError, match=text):
        call()
