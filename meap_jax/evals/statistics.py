"""Intervals: within a run over answers, and over seeds between two objectives."""

from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """An estimate and its two-sided confidence interval."""

    estimate: float
    low: float
    high: float


def binomial_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share.

    Trials are taken as independent; answers of one document are not quite, so it is a lower bound of the spread.

    Raises:
      ValueError: if there are no trials.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    result = stats.binomtest(int(successes), int(trials)).proportion_ci(confidence, method="wilson")
    return Interval(successes / trials, float(result.low), float(result.high))


def paired_t_interval(differences: np.ndarray, confidence: float = 0.95) -> Interval:
    """Student's interval for the mean of paired differences, one a seed.

    Args:
      differences: [S] float, S at least 2.
      confidence: share of such intervals that hold the true mean.

    Raises:
      ValueError: for fewer than two pairs, which have no spread.
    """
    differences = np.asarray(differences, float)
    if differences.size < 2:
        raise ValueError(f"a paired interval needs at least 2 seeds, got {differences.size}")
    mean = float(differences.mean())
    standard_error = float(differences.std(ddof=1)) / differences.size**0.5
    half = float(stats.t.ppf((1 + confidence) / 2, differences.size - 1)) * standard_error
    return Interval(mean, mean - half, mean + half)
