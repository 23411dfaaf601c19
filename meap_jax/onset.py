"""When in training an ability begins, over several seeds of two groups of runs.

Accuracy at looking things up stays near chance for long and then rises within a few evaluations. What two ways of
training differ in is then less the accuracy at some step than how many tokens it took. A run whose training ends before
that says only that it would have taken longer: its onset is *censored*. It must not be left out, which would make its
group look fast, and must not count as an onset at its last evaluation, which would too; survival analysis knows how.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from meap_jax.statistics import mean_interval

MAX_ASSIGNMENTS = 200_000  # That an exact test goes through: all of 10 runs against 10.
# Statistics that are equal but for rounding count as equal. They are sums of some tens of numbers near 1.
_TOLERANCE = 1e-10


class Onset(NamedTuple):
    """When a run's ability began, or that it had not."""

    tokens: float  # Trained on until then; of a censored run, until its last evaluation.
    is_censored: bool  # It had not begun by then.


class Factor(NamedTuple):
    """How many times as many tokens a group needs."""

    estimate: float
    low: float | None  # The ends of its 95 % interval; None for one pair, and for a lower bound.
    high: float | None
    is_lower_bound: bool  # Some runs had not begun: with more training the estimate would be at least this.


def onset(tokens: Sequence[float] | np.ndarray, accuracies: Sequence[float] | np.ndarray, chance: float) -> Onset:
    """Finds when accuracy first reached half of its possible range, (chance + 1) / 2.

    Between the evaluation that reached it and the one before, it is interpolated linearly in tokens. If the first
    evaluation reached it, that one is the onset, and the true one may be earlier: evaluate sooner.

    Args:
      tokens: [E], trained on until each evaluation; ascending.
      accuracies: [E] in [0, 1].
      chance: the accuracy of guessing, in [0, 1).

    Raises:
      ValueError: there is no evaluation, lengths differ, tokens do not ascend from 0 or more, or an accuracy or chance
        is out of its range.
    """
    at, values = _evaluations(tokens, accuracies)
    if not 0 <= chance < 1:
        raise ValueError(f"chance must be in [0, 1), got {chance}")
    threshold = (chance + 1) / 2
    reached = np.flatnonzero(values >= threshold)
    if not len(reached):
        return Onset(float(at[-1]), True)
    last = int(reached[0])
    if not last:
        return Onset(float(at[0]), False)
    both = slice(last - 1, last + 1)
    return Onset(float(np.interp(threshold, values[both], at[both])), False)


def settled_accuracy(tokens: Sequence[float] | np.ndarray, accuracies: Sequence[float] | np.ndarray) -> float:
    """The mean accuracy over the last fifth of a run, in tokens: accuracy swings from one evaluation to the next.

    Args:
      tokens: [E], trained on until each evaluation; ascending. The run is taken to end with the last one, which counts
        in any case.
      accuracies: [E] in [0, 1].

    Raises:
      ValueError: as `onset`.
    """
    at, values = _evaluations(tokens, accuracies)
    return float(values[5 * at >= 4 * at[-1]].mean())


def log_rank(a: Sequence[Onset], b: Sequence[Onset]) -> float:
    """The two-sided p value of the log-rank test, that runs of both groups begin at the same rate all along.

    N. Mantel, Evaluation of survival data (1966): at every onset, the runs of `a` that begin against those expected,
    with the variance of the hypergeometric distribution. A run that is censored at an onset still waited then. The p
    value is that of a normal distribution, which a few runs only come near: `permutation_p` is exact.

    Returns:
      1 where nothing can be compared, as when no run began.

    Raises:
      ValueError: a group has no run.
    """
    tokens, began = _pooled(a, b)
    times = np.unique(tokens[began])
    begin = (tokens == times[:, None]) & began  # [onsets, runs]
    waiting = tokens >= times[:, None]
    num_began, num_waiting = begin.sum(axis=1), waiting.sum(axis=1)
    share = waiting[:, : len(a)].sum(axis=1) / num_waiting
    surplus = float((begin[:, : len(a)].sum(axis=1) - num_began * share).sum())
    # Where one run is left, its share is 0 or 1, and so is the variance 0.
    spread = num_began * share * (1 - share) * (num_waiting - num_began) / np.maximum(num_waiting - 1, 1)
    variance = float(spread.sum())
    return math.erfc(abs(surplus) / math.sqrt(2 * variance)) if variance > 0 else 1.0


def permutation_p(a: Sequence[Onset], b: Sequence[Onset]) -> float:
    """The exact two-sided p value that it makes no difference to a run's onset which group it is in.

    The share of all assignments of these runs to the groups whose log-rank statistic is at least as far from 0; ties
    count. The statistic is the numerator of `log_rank`: the sum over a group of a score that each run has in any
    assignment (R. Peto and J. Peto, Asymptotically efficient rank invariant test procedures, 1972).

    Args:
      a, b: onsets of each group. Both must have been trained for as long: where one group is censored sooner, that is a
        difference which is found, too. That runs of two groups share a seed is not used: five against five have
        p = 2 / 252 at best, where five pairs that change places would have 2 / 32.

    Raises:
      ValueError: a group has no run, or there are more than MAX_ASSIGNMENTS.
    """
    tokens, began = _pooled(a, b)
    num_assignments = math.comb(len(tokens), len(a))
    if num_assignments > MAX_ASSIGNMENTS:
        raise ValueError(
            f"{len(a)} against {len(b)} runs have {num_assignments:,} assignments, more than the {MAX_ASSIGNMENTS:,} "
            "that the exact test goes through: use log_rank"
        )
    scores = _scores(tokens, began)
    groups = itertools.chain.from_iterable(itertools.combinations(range(len(tokens)), len(a)))
    chosen = np.fromiter(groups, np.intp, num_assignments * len(a)).reshape(num_assignments, len(a))
    distances = np.abs(scores[chosen].sum(axis=1))
    return float(np.mean(distances >= distances[0] - _TOLERANCE))  # The first assignment is the one that was observed.


def factor(a: Sequence[Onset], b: Sequence[Onset]) -> Factor:
    """How many times as many tokens `b` needs as `a`: the geometric mean of the ratios of pairs, b / a.

    The interval is Student's, of the mean of log-ratios. Runs of `b` that had not begun count as if they had at their
    last evaluation. The mean is then too small, and so a lower bound, for which there is no interval.

    Args:
      a, b: [S], run i of both of the same seed; `b` is the group that begins later, if one has runs that did not.

    Raises:
      ValueError: there is no pair, groups differ in size, an onset is at 0 tokens, or a run of `a` is censored, where
        there is no such bound.
    """
    tokens, began = _pooled(a, b)
    if len(a) != len(b):
        raise ValueError(f"pairs need groups of one size, got {len(a)} and {len(b)} runs")
    if not all(began[: len(a)]):
        raise ValueError("some runs of the first group had not begun: how much later others begin has no lower bound")
    if not all(tokens > 0):
        raise ValueError("an onset at 0 tokens has no ratio to others")
    estimate, *ends = mean_interval(np.log(tokens[len(a) :]) - np.log(tokens[: len(a)]))
    if not all(began):
        return Factor(math.exp(estimate), None, None, True)
    low, high = (None if end is None else math.exp(end) for end in ends)
    return Factor(math.exp(estimate), low, high, False)


def _evaluations(
    tokens: Sequence[float] | np.ndarray, accuracies: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays [E], checked."""
    at, values = np.asarray(tokens, float), np.asarray(accuracies, float)
    if at.ndim != 1 or at.shape != values.shape or not len(at):
        raise ValueError(f"tokens and accuracies must be as many, and at least 1, got {at.shape} and {values.shape}")
    if not (at[0] >= 0 and np.isfinite(at).all() and (np.diff(at) > 0).all()):
        raise ValueError(f"tokens must ascend from 0 or more, got {at.tolist()}")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"accuracies must be in [0, 1], got {values.tolist()}")
    return at, values


def _pooled(a: Sequence[Onset], b: Sequence[Onset]) -> tuple[np.ndarray, np.ndarray]:
    """The runs of `a`, then those of `b`: tokens [N] and whether each began [N]."""
    if not a or not b:
        raise ValueError(f"each group needs at least 1 run, got {len(a)} and {len(b)}")
    runs = [*a, *b]
    return np.array([run.tokens for run in runs], float), ~np.array([run.is_censored for run in runs], bool)


def _scores(tokens: np.ndarray, began: np.ndarray) -> np.ndarray:
    """The log-rank score of each run, [N]: its onset, 0 or 1, less the onsets to expect of it until then.

    Over a group they sum to the onsets less those expected, and over all runs to 0.
    """
    times, counts = np.unique(tokens[began], return_counts=True)
    waiting = (tokens >= times[:, None]).sum(axis=1)
    expected = np.concatenate([[0.0], np.cumsum(counts / waiting)])
    return began - expected[np.searchsorted(times, tokens, side="right")]
