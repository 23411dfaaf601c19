"""Intervals: within a run over its examples, and over seeds between two objectives."""

# scipy.special is imported where it is used: no run should wait a tenth of a second for it before its first step.
# (scipy.stats would take six.)

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
    from scipy import special

    share, z2 = successes / trials, float(special.ndtri((1 + confidence) / 2)) ** 2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = (z2 * (share * (1 - share) + z2 / (4 * trials)) / trials) ** 0.5 / (1 + z2 / trials)
    return Interval(share, max(middle - half, 0.0), min(middle + half, 1.0))


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
    from scipy import special

    half = float(special.stdtrit(num - 1, (1 + confidence) / 2)) * standard_error
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
