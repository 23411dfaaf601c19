"""Intervals: within a run over its examples, and over seeds between two objectives."""

# scipy.stats is imported where it is used: it takes a second, which no run should wait for before its first step.

import numpy as np

from meap_jax.results import Interval


def binomial_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share.

    Trials are taken as independent; answers of one document are not quite, so it is a lower bound of the spread.

    Raises:
      ValueError: if there are no trials.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    from scipy import stats

    result = stats.binomtest(int(successes), int(trials)).proportion_ci(confidence, method="wilson")
    return Interval(successes / trials, float(result.low), float(result.high))


def ratio_interval(totals: np.ndarray, counts: np.ndarray, confidence: float = 0.95) -> Interval:
    """An interval for the ratio of two sums, such as nats over tokens, where rows are the independent units.

    The ratio estimator of survey sampling (Cochran, Sampling Techniques, section 2.11) with Student's t.

    Args:
      totals, counts: [R] of each row; rows with a count of 0 are left out.
      confidence: share of such intervals that hold the true ratio.

    Returns:
      Without ends if one row is left.

    Raises:
      ValueError: if none is.
    """
    totals, counts = (np.asarray(x, float)[np.asarray(counts) > 0] for x in (totals, counts))
    num = len(counts)
    if not num:
        raise ValueError("a ratio needs at least 1 row with a count above 0, got none")
    ratio = float(totals.sum() / counts.sum())
    if num == 1:
        return Interval(ratio, None, None)
    residuals = totals - ratio * counts
    standard_error = float((num / (num - 1) * np.square(residuals).sum()) ** 0.5 / counts.sum())
    from scipy import stats

    half = float(stats.t.ppf((1 + confidence) / 2, num - 1)) * standard_error
    return Interval(ratio, ratio - half, ratio + half)


def paired_t_interval(differences: np.ndarray, confidence: float = 0.95) -> Interval:
    """Student's interval for the mean of paired differences, one a seed.

    Args:
      differences: [S] float, S at least 2.
      confidence: share of such intervals that hold the true mean.

    Raises:
      ValueError: for fewer than two pairs, which have no spread.
    """
    if np.size(differences) < 2:
        raise ValueError(f"a paired interval needs at least 2 seeds, got {np.size(differences)}")
    return ratio_interval(differences, np.ones(np.size(differences)), confidence)
