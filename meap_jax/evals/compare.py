"""Compares two evaluations: every task's scores on the same examples, or of pairs of runs.

With one file a side, examples are the units, and what comes out is about these two models. With several files a side,
each a run of one seed, the pairs of runs are the units, and what comes out is about how they were trained.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from meap_jax.errors import ConfigError, DataError
from meap_jax.evals.published import PUBLISHED
from meap_jax.files import parse_json
from meap_jax.results import Interval
from meap_jax.statistics import holm, mcnemar, paired_bootstrap, paired_t_interval, t_test

_BY = ("length", "depth", "position", "needles")  # Fields by whose values examples are grouped.
_OF_THE_OUTPUT = {"prompt", "golds", "output", "scores", "tokens", "version", "too_long"}
_RECORDED_SINCE = {"num_facts"}  # Evaluations from before a field was recorded pair with those that have it.
_SCORES_BESIDE = ("acc", "acc_norm", "correct", "loss", "masked_loss")  # Of records that have no field `scores`.
# Metrics that are no scores.
_COUNTS = (
    "/too_long", "/not_judged", "/requests", "/truncated", "/skipped", "/begins_with_bos", "/chance", "_stderr",
)  # fmt: skip
_UNITS = ("trial", "question", "doc_id", "row", "document")  # What makes examples depend on each other.


class Row(NamedTuple):
    """One line of a comparison."""

    name: str  # Of the metric, as in the evaluations.
    num_units: int
    a: float
    b: float
    difference: Interval  # B - A.
    p: float | None  # Two-sided; None: one unit has no spread.
    holm: float | None = None  # Corrected for the other groups of the same score; None for the score over all.


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Compares two models on the examples that both have.

    Returns:
      {evaluator: rows}: of each score the row over all examples, then those of its groups.
    """
    tables = {}
    for task in a["examples"]:
        if task not in b["examples"]:
            continue
        of_a, of_b = ({_key(r): _scores(r) for r in x["examples"][task] if _scores(r)} for x in (a, b))
        keys = [key for key in of_a if key in of_b]
        if keys:
            scores = list(dict.fromkeys(name for key in keys for name in of_a[key]))
            has = {s: [k for k in keys if all(x[k].get(s) is not None for x in (of_a, of_b))] for s in scores}
            tables[task] = [row for s in scores if has[s] for row in _rows(task, s, has[s], of_a, of_b)]
    return tables


def compare_runs(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> dict[str, list[Row]]:
    """Compares runs of two kinds, run i of one with run i of the other.

    Returns:
      {evaluator: rows}, a row for each metric that all of them have.
    """
    tables = defaultdict(list)
    for name in a[0]["metrics"]:
        if not all(name in run["metrics"] for run in (*a, *b)) or name.endswith(_COUNTS):
            continue
        of_a, of_b = ([run["metrics"][name]["estimate"] for run in runs] for runs in (a, b))
        differences = np.subtract(of_b, of_a)
        mean_a, mean_b, p = float(np.mean(of_a)), float(np.mean(of_b)), t_test(differences).p
        tables[name.partition("/")[0]].append(Row(name, len(a), mean_a, mean_b, paired_t_interval(differences), p))
    return {task: _with_holm(rows, is_over_all=lambda row: row.name.count("/") == 1) for task, rows in tables.items()}


def _scores(record: Mapping[str, Any]) -> dict[str, Any]:
    return record.get("scores") or {name: record[name] for name in _SCORES_BESIDE if record.get(name) is not None}


def _key(record: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What tells an example from others, whatever a model made of it."""
    left_out = _OF_THE_OUTPUT | _RECORDED_SINCE | set(_SCORES_BESIDE)
    return tuple((k, v) for k, v in record.items() if k not in left_out and not isinstance(v, float | dict | list))


def _rows(task: str, score: str, keys: Sequence[tuple], of_a: Mapping, of_b: Mapping) -> list[Row]:
    """The row over all examples, and those of groups, named as the metrics of the evaluators are."""
    groups = defaultdict(list)
    for key in keys:
        fields = dict(key)
        prefix = f"{task}/{fields['kind']}/{score}" if "kind" in fields else f"{task}/{score}"
        groups[prefix].append(key)
        for field in _BY:
            if field in fields:
                groups[f"{prefix}/{field}_{fields[field]}"].append(key)
        if {"length", "depth"} <= fields.keys():
            groups[f"{prefix}/length_{fields['length']}/depth_{fields['depth']}"].append(key)
        if "task" in fields:
            groups[f"{task}/{fields['task']}/{score}"].append(key)
    rows = [_row(name, [(key, of_a[key][score], of_b[key][score]) for key in own]) for name, own in groups.items()]
    rows.sort(key=lambda row: (row.name.count("/"), *_natural(row.name)))  # The score over all, its groups, then cells.
    return _with_holm(rows, is_over_all=lambda row: row is rows[0])


def _natural(name: str) -> list[tuple[str, int]]:
    """A key that sorts length_900 before length_1000."""
    return [(word, int(digits or 0)) for word, digits in re.findall(r"([^0-9]+)(\d*)", name)]


def _row(name: str, pairs: Sequence[tuple[tuple, Any, Any]]) -> Row:
    """The comparison over examples, of which those of one unit count as one."""
    units = defaultdict(list)
    for key, of_a, of_b in pairs:
        fields = dict(key)
        unit = tuple(fields[name] for name in ("task", "needles", *_UNITS) if name in fields) or key
        units[unit].append(of_b - of_a)
    differences = np.array([np.mean(own) for own in units.values()])
    mean_a, mean_b = (float(np.mean([pair[side] for pair in pairs])) for side in (1, 2))
    p: float | None = None
    if all(len(own) == 1 for own in units.values()) and set(differences.tolist()) <= {-1.0, 0.0, 1.0}:
        p = mcnemar(int((differences < 0).sum()), int((differences > 0).sum()))
    elif len(differences) > 1:
        p = t_test(differences).p
    return Row(name, len(units), mean_a, mean_b, paired_bootstrap(differences)._replace(estimate=mean_b - mean_a), p)


def _with_holm(rows: Sequence[Row], is_over_all: Any) -> list[Row]:
    """The rows with p values corrected over all groups of the table."""
    groups = [i for i, row in enumerate(rows) if not is_over_all(row) and row.p is not None]
    corrected = dict(zip(groups, holm([rows[i].p or 0.0 for i in groups]), strict=True))
    return [row._replace(holm=corrected.get(i)) for i, row in enumerate(rows)]


# ---------------------------------------------------------------------------------------------------------------- files


def read_results(file: Path) -> dict[str, Any]:
    """Reads what an evaluation wrote.

    Raises:
      ConfigError, DataError: it can't be read, or is something else.
    """
    try:
        results = parse_json(file.read_bytes())
    except OSError as error:
        reason = f"can't be read ({error.strerror}): name the JSON that an evaluation wrote"
        raise ConfigError(f"{file} {reason}.") from error
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}).") from error
    if not isinstance(results, dict) or not {"metrics", "examples"} <= results.keys():
        raise DataError(f"{file} is no evaluation: it has no metrics and examples.")
    return results


def markdown(tables: Mapping[str, Sequence[Row]], names: Sequence[str], is_of_runs: bool) -> str:
    """The page of a comparison: a table for each task, and the paper's figures in the rows that it has."""
    a, b = names
    units = "pairs of runs, one of each seed" if is_of_runs else "examples that both models answered"
    about = "how the two kinds of runs differ" if is_of_runs else "these two models alone, not how they were trained"
    lines = [
        f"# {b} against {a}",
        "",
        f"Units are {units}: differences, intervals (95 %) and p values are about {about}.",
    ]
    lines[-1] += " Holm: p values corrected for the groups of a table."
    if is_of_runs and tables:
        num = next(iter(tables.values()))[0].num_units
        lines += ["", f"{num} pairs have {num - 1} degrees of freedom: such intervals are wide."]
    for task, rows in tables.items():
        has_published = any(row.name in PUBLISHED for row in rows)
        columns = ["score", "units", a, b, f"{b} - {a}", "95 % interval", "p", "Holm"]
        columns += ["paper: NTP", "MEAP", "where"] * has_published
        lines += ["", f"## {task}", "", f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
        for row in rows:
            low, high = row.difference.low, row.difference.high
            ends = "" if low is None else f"[{low:+.3f}, {high:+.3f}]"
            cells = [row.name.partition("/")[2], str(row.num_units), f"{row.a:.3f}", f"{row.b:.3f}"]
            cells += [f"{row.difference.estimate:+.3f}", ends, _p(row.p), _p(row.holm)]
            if has_published:
                found = PUBLISHED.get(row.name)
                cells += ["", "", ""] if found is None else [f"{found.ntp:.3f}", f"{found.meap:.3f}", found.where]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
