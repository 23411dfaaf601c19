"""What runs of an experiment came to: one record a run, and the runs of one arm beside each other."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments.members import Member
from experiments.population import Evaluation
from meap_jax.evals.facts import FactSet, cells
from meap_jax.onset import MAX_ASSIGNMENTS, Onset, factor, log_rank, onset, permutation_p, settled_accuracy
from meap_jax.statistics import paired_t_interval

DEPTH_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # 0: the first fact of a document, 1: the last.
DISTANCE_STEP = 40  # Tokens.


def outcome(member: Member, found: Evaluation, asked: Mapping[str, FactSet], setting: str = "") -> dict[str, Any]:
    """The record of one run, ready for JSON.

    Args:
      member: that is trained, and was asked `asked` on the way.
      found: of the evaluators, `facts` among them.
      asked: the sets "trained" and "longer".
      setting: what it shares with other arms, if an experiment has several.
    """
    config, facts = member.config, found.examples["facts"]
    most = max(example["num_facts"] for example in facts)
    longest = [example for example in facts if example["num_facts"] == most]
    farthest = max(example["distance"] for example in longest)
    return {
        "setting": setting,
        "arm": member.arm.name,
        "label": member.arm.label,
        "seed": member.seed,
        "tokens_per_step": config.global_batch_size * config.seq_len,
        "chance": {name: of_set.chance for name, of_set in asked.items()},
        "records": member.records,
        "metrics": {name: interval.estimate for name, interval in found.metrics.items()},
        "cells": cells(facts),
        # Of documents with most facts.
        "depth": _grouped(longest, "depth", DEPTH_EDGES),
        "distance": _grouped(longest, "distance", range(0, farthest + DISTANCE_STEP, DISTANCE_STEP)),
    }


def _grouped(examples: Sequence[Mapping[str, Any]], key: str, edges: Sequence[float]) -> list[dict[str, float]]:
    """Counts of the examples in each group [low, high) that has some; the last one is closed."""
    groups = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        own = [e["correct"] for e in examples if low <= e[key] < high or e[key] == high == edges[-1]]
        if own:
            groups.append({"low": low, "high": high, "correct": sum(own), "asked": len(own)})
    return groups


def write_whole(file: epath.Path, content: Any) -> None:
    """Writes JSON into a file that is there whole or not at all."""
    partial = file.parent / f"{file.name}.part"
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(file)


class Outcomes(NamedTuple):
    """The runs of one arm in one setting, by seed."""

    name: str
    label: str
    runs: dict[int, dict[str, Any]]

    @property
    def seeds(self) -> list[int]:
        """Ascending."""
        return sorted(self.runs)

    def curve(self, seed: int, documents: str) -> tuple[list[float], list[float]]:
        """Tokens trained on until each time that it was asked about such documents, and its accuracy."""
        run = self.runs[seed]
        tokens = [record["step"] * run["tokens_per_step"] for record in run["records"]]
        return tokens, [record[f"{documents}/accuracy"] for record in run["records"]]

    def onsets(self, seeds: Iterable[int], documents: str = "trained") -> list[Onset]:
        """When each run began to look facts up."""
        return [onset(*self.curve(seed, documents), self.runs[seed]["chance"][documents]) for seed in seeds]

    def settled(self, documents: str, seeds: Iterable[int]) -> np.ndarray:
        """Accuracy in % over the last fifth of each run."""
        return np.array([100 * settled_accuracy(*self.curve(seed, documents)) for seed in seeds])

    def metric(self, ending: str, seeds: Iterable[int]) -> np.ndarray:
        """A metric of each run, the first one whose name ends so."""
        names = [name for name in self.runs[self.seeds[0]]["metrics"] if name.endswith(ending)]
        return np.array([self.runs[seed]["metrics"][names[0]] for seed in seeds])

    def in_cells(self, seeds: Iterable[int], **wanted: Iterable[int]) -> np.ndarray:
        """Accuracy in % at the end, in the cells that have these numbers of facts or of fillers."""
        of_runs = [
            [c for c in self.runs[seed]["cells"] if all(c[key] in of for key, of in wanted.items())] for seed in seeds
        ]
        return np.array([_share(cells_of_run) for cells_of_run in of_runs])

    def in_group(self, seeds: Iterable[int], by: str, low: float) -> np.ndarray:
        """Accuracy in % at the end, in the group of "depth" or "distance" that begins with `low`."""
        return np.array([_share([g for g in self.runs[seed][by] if g["low"] == low]) for seed in seeds])


def _share(groups: Sequence[Mapping[str, float]]) -> float:
    return 100 * sum(group["correct"] for group in groups) / sum(group["asked"] for group in groups)


def by_arm(outcomes: Iterable[Mapping[str, Any]]) -> dict[str, Outcomes]:
    """The records of one setting by arm, in their order."""
    arms: dict[str, Outcomes] = {}
    for run in outcomes:
        arms.setdefault(run["arm"], Outcomes(run["arm"], run["label"], {})).runs[run["seed"]] = dict(run)
    return arms


# ---------------------------------------------------------------------------------------------------------------- words


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation over seeds."""
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def difference(differences: np.ndarray, digits: int = 1) -> str:
    """The mean of paired differences with its 95 % t interval over seeds."""
    of = paired_t_interval(differences)
    return f"{of.estimate:+.{digits}f} [{of.low:+.{digits}f}, {of.high:+.{digits}f}]"


def begun(onsets: Sequence[Onset]) -> str:
    """The median onset in thousands of tokens, and how many runs have one."""
    num = sum(not o.is_censored for o in onsets)
    median = f"{np.median([o.tokens for o in onsets]) / 1000:,.0f}" if 2 * num > len(onsets) else "not begun"
    return f"{median} ({num} of {len(onsets)})"


def p_value(theirs: Sequence[Onset], own: Sequence[Onset]) -> str:
    """That two groups begin alike: by the exact permutation test, or by the log-rank test where runs are too many."""
    is_exact = math.comb(len(theirs) + len(own), len(own)) <= MAX_ASSIGNMENTS
    return f"{permutation_p(theirs, own) if is_exact else log_rank(theirs, own):.3f}"


def times_as_many(theirs: Sequence[Onset], own: Sequence[Onset]) -> str:
    """How many times as many tokens the second group needs, with its interval; empty where that is not known."""
    if any(o.is_censored for o in theirs):
        return ""
    times = factor(theirs, own)
    if times.low is None or times.high is None:
        return f"at least {times.estimate:.1f}"
    return f"{times.estimate:.2f} [{times.low:.2f}, {times.high:.2f}]"
