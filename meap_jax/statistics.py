"""Intervals and tests: over the examples of one model, between two models, and over seeds between two objectives.

What the unit is decides what a statement is about. Examples that two models answered say how these two differ; only
pairs of runs, one of each objective from the same seed, say how the objectives do.
"""

# scipy.special is imported where it is used: no run should wait a tenth of a second for it before its first step.
# (scipy.stats would take six.)

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from meap_jax.results import Interval


class TTest(NamedTuple):
    """Student's t and its two-sided p value."""

    t: float
    p: float


def binomial_interval(successes: float, trials: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share.

    Trials are taken as independent; answers of one document are not quite, so it is a lower bound of the spread. For
    the mean of scores between 0 and 1, `successes` being their sum, it is too wide rather than too narrow: no such
    score has a larger variance than one that is 0 or 1.

    Raises:
      ValueError: if there are no trials.
    """
    if not trials > 0:
        raise ValueError(f"trials must be at least 1, got {trials}")
    from scipy import special

    share, z2 = successes / trials, float(special.ndtri((1 + confidence) / 2)) ** 2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = (z2 * (share * (1 - share) + z2 / (4 * trials)) / trials) ** 0.5 / (1 + z2 / trials)
    return Interval(share, max(middle - half, 0.0), min(middle + half, 1.0))


def clustered_interval(scores: Sequence[float] | np.ndarray, clusters: Sequence, confidence: float = 0.95) -> Interval:
    """An interval for the mean of scores between 0 and 1 whose clusters, not the scores, are independent.

    Wilson's interval for the number of independent trials that would give the standard error of the cluster means
    (Korn and Graubard, Survey Methodology 24, 1998). Where scores are all 0 or all 1 that is the number of clusters.

    Args:
      scores: [N] in [0, 1].
      clusters: [N], the name of each score's cluster.
      confidence: share of such intervals that hold the true mean.

    Returns:
      Without ends if there is one cluster.

    Raises:
      ValueError: if there is no score.
    """
    scores = np.asarray(scores, float)
    names = sorted(set(clusters), key=str)
    index = np.array([names.index(name) for name in clusters], int)
    totals, counts = np.bincount(index, scores), np.bincount(index)
    if len(names) < 2:
        return ratio_interval(totals, counts, confidence)
    share = float(scores.mean())
    residuals = totals - share * counts
    variance = len(names) / (len(names) - 1) * float(np.square(residuals).sum()) / len(scores) ** 2
    if variance < 1e-18:
        return binomial_interval(share * len(names), len(names), confidence)
    from scipy import special

    quantile = (1 + confidence) / 2
    widened = float(special.ndtri(quantile) / special.stdtrit(len(names) - 1, quantile)) ** 2
    trials = min(share * (1 - share) / variance * widened, len(scores))
    return binomial_interval(share * trials, trials, confidence)


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


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Interval:
    """Student's interval for the mean of [N] independent values; without ends if there is one."""
    return ratio_interval(np.asarray(values), np.ones(np.size(values)), confidence)


def paired_t_interval(differences: np.ndarray, confidence: float = 0.95) -> Interval:
    """Student's interval for the mean of paired differences, one a seed.

    Args:
      differences: [S] float, S at least 2. With 3 seeds there are 2 degrees of freedom: the interval is wide.
      confidence: share of such intervals that hold the true mean.

    Raises:
      ValueError: for fewer than two pairs, which have no spread.
    """
    if np.size(differences) < 2:
        raise ValueError(f"a paired interval needs at least 2 seeds, got {np.size(differences)}")
    return mean_interval(differences, confidence)


def t_test(values: np.ndarray) -> TTest:
    """Student's t test of whether the mean of [N] values, such as paired differences, is 0.

    Raises:
      ValueError: for fewer than two values.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError(f"a t test needs at least 2 values, got {len(values)}")
    error, mean = float(values.std(ddof=1)) / len(values) ** 0.5, float(values.mean())
    if error == 0:
        return TTest(0.0 if mean == 0 else float(np.copysign(np.inf, mean)), 1.0 if mean == 0 else 0.0)
    from scipy import special

    t = mean / error
    return TTest(t, float(2 * special.stdtr(len(values) - 1, -abs(t))))


def paired_bootstrap(
    differences: np.ndarray, confidence: float = 0.95, num_draws: int = 10_000, seed: int = 0
) -> Interval:
    """A percentile interval for the mean difference of two models on the same [N] examples.

    It speaks of these two models on examples like these, not of the objectives that they were trained with.

    Args:
      differences: of each example, or of each cluster of examples that are not independent.
      confidence: share of such intervals that hold the true mean.
      num_draws: of examples, with replacement.
      seed: of the draws.

    Raises:
      ValueError: if there is none.
    """
    differences = np.asarray(differences, float)
    if not len(differences):
        raise ValueError("a paired bootstrap needs at least 1 example, got none")
    rng = np.random.default_rng(seed)
    # Counts of each value are drawn in place of examples: of a 0/1 score there are three values, not thousands.
    values, counts = np.unique(differences, return_counts=True)
    drawn = rng.multinomial(len(differences), counts / len(differences), size=num_draws)
    means = drawn @ values / len(differences)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(differences.mean()), float(low), float(high))


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p value of McNemar's test, that two models are right equally often.

    Args:
      only_a: examples that the first model alone has right.
      only_b: examples that the second alone has.
    """
    from scipy import special

    fewer, num = min(only_a, only_b), only_a + only_b
    return min(1.0, 2 * float(special.bdtr(fewer, num, 0.5))) if num else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number, so that one in twenty families has one below 0.05 by chance.

    S. Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    order = np.argsort(p_values, kind="stable")
    num, largest, adjusted = len(order), 0.0, [0.0] * len(order)
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (num - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
