"""Commonsense (the paper's Tables 1, 5, 6, 13, 14 and 15): tasks of lm-evaluation-harness, zero-shot.

Any task of the harness works, and one's own task files. The package is optional: requirements-lm-eval.txt.
"""

import importlib.metadata
import importlib.util
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from meap_jax.errors import ConfigError, DataError
from meap_jax.evals.predictions import Predictions
from meap_jax.evals.setting import Setting
from meap_jax.model.decoder import Params
from meap_jax.results import Interval, Result
from meap_jax.statistics import binomial_interval, mean_interval

_BOOTSTRAP_DRAWS = 1_000  # For standard errors of what is no mean.
_MEANS = ("acc", "acc_norm", "exact_match")  # Metrics that are means over documents, whatever their scores.


def make(setting: Setting) -> dict[str, "Commonsense"]:
    """Makes the evaluator of `eval.commonsense.tasks`.

    Raises:
      ConfigError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "the task commonsense needs lm-eval, which is optional: pip install -r requirements-lm-eval.txt"
        )
    return {"commonsense": Commonsense(setting)}


class Commonsense:
    """Scores of the harness' tasks; an example is a document of a task."""

    def __init__(self, setting: Setting):
        self._setting = setting
        self._scorer: Any = None

    def run(self, params: Params) -> Result:
        """Runs the tasks; metrics are TASK/SCORE, with the harness' standard errors beside them as TASK/SCORE_stderr.

        Raises:
          ConfigError: a task is not known to the harness.
          DataError: its data can't be read.
        """
        from lm_eval import evaluate

        from meap_jax.evals.harness_model import HarnessModel, make_scorer

        setting, options = self._setting, self._setting.config.eval.commonsense
        loaded = _load(options.tasks, options.include_path)
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
        is_first = jax.process_index() == 0
        file = setting.folder / "commonsense.jsonl" if setting.folder is not None and is_first else None
        self._scorer = self._scorer or make_scorer(setting)
        predictions = Predictions(file, "commonsense", setting.fingerprint)
        model = HarnessModel(setting, params, predictions, self._scorer)
        found = evaluate(model, loaded, limit=options.limit or None, bootstrap_iters=_BOOTSTRAP_DRAWS, log_samples=True)
        assert found is not None  # It is for ranks other than 0 of the harness' own kind of processes.
        bos = "with" if model.adds_bos else "without"
        versions = {task: f"{version}, lm-eval {_version()}, {bos} bos" for task, version in found["versions"].items()}
        examples = examples_of(found["samples"], model.skipped, versions)
        metrics = metrics_of(found["results"], examples)
        metrics |= {name: Interval(float(count), None, None) for name, count in model.counts.items()}
        return Result(metrics | {"begins_with_bos": Interval(float(model.adds_bos), None, None)}, examples)


def _load(tasks: str, include_path: str | None) -> dict[str, Any]:
    """The tasks of a list of names as `lm_eval.evaluate` takes them; a name can be a group, or a pattern as arc_*."""
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    matched = {name: manager.match_tasks([name]) for name in (part.strip() for part in tasks.split(",")) if name}
    unknown = [name for name, found in matched.items() if not found]
    if unknown or not matched:
        what = ", ".join(unknown) or "nothing"
        raise ConfigError(
            f"eval.commonsense.tasks names {what}, which lm-eval {_version()} does not know: task files of "
            "your own are looked for in eval.commonsense.include_path."
        )
    try:
        return manager.load([name for found in matched.values() for name in found])
    except (OSError, DatasetsError) as error:
        reason = error.__cause__ or error
        raise DataError(f"data of eval.commonsense.tasks ({tasks}) can't be read: {reason}") from error


def examples_of(
    samples: Mapping[str, Sequence[dict]], skipped: set[tuple[str, str]], versions: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A record for each document of a task, and for each filter of answers where a task has several.

    Args:
      samples: {task: what the harness says of each document}.
      skipped: texts of requests that were not scored; a document with one of them has `skipped` and no scores.
      versions: {task: what decides its scores besides the model}.
    """
    records = []
    for task, of_task in samples.items():
        for sample in of_task:
            record = {"task": task, "doc_id": sample["doc_id"], "version": versions[task]}
            if sample["filter"] != "none":
                record["filter"] = sample["filter"]
            if _texts(sample) & skipped:
                record["skipped"] = True
            else:
                scores = {name: sample[name] for name in sample["metrics"]}
                record |= {name: float(score) for name, score in scores.items() if isinstance(score, int | float)}
            records.append(record)
    return records


def _texts(sample: dict[str, Any]) -> set[tuple[str, str]]:
    """Context and continuation of each request of a document that is scored, and not continued."""
    pairs = (tuple(arguments[:2]) for arguments in sample["arguments"])
    return {pair for pair in pairs if len(pair) == 2 and isinstance(pair[1], str)}


def metrics_of(results: Mapping[str, Mapping[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, Interval]:
    """Metrics of all tasks, and the means of accuracies over them.

    A share has Wilson's interval over the documents that were scored, a mean Student's; other metrics have the harness'
    value and 1.96 of its standard errors on either side. `mean/acc_norm` takes `acc` of a task without `acc_norm`.

    Args:
      results: {task or group: {"METRIC,FILTER": value}}, of the harness.
      examples: of `examples_of`.
    """
    found: dict[str, Interval] = {}
    for task, values in results.items():
        own = [record for record in examples if record["task"] == task]
        has_skipped = any("skipped" in record for record in own)
        for key, value in values.items():
            name, _, chosen = key.partition(",")
            if not chosen or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = f"{task}/{name}" if chosen == "none" else f"{task}/{name}_{chosen}"
            scored = [record[name] for record in own if name in record and record.get("filter", "none") == chosen]
            error = values.get(f"{name}_stderr,{chosen}")
            if scored and set(scored) <= {0.0, 1.0}:
                found[label] = binomial_interval(sum(scored), len(scored))
            elif scored and name in _MEANS:
                found[label] = mean_interval(scored)
            elif has_skipped:
                continue  # The harness counts what was not scored.
            else:
                ends = (value - 1.96 * error, value + 1.96 * error) if isinstance(error, float) else (None, None)
                found[label] = Interval(float(value), *ends)
            if isinstance(error, float) and not has_skipped:
                found[f"{label}_stderr"] = Interval(error, None, None)
    for name in ("acc", "acc_norm"):
        if mean := _mean_over_tasks(name, examples):
            found[f"mean/{name}"] = mean
    return found


def _mean_over_tasks(name: str, examples: Sequence[dict[str, Any]]) -> Interval | None:
    """The mean of the tasks' means, with a normal interval: tasks are fixed, and documents drawn in each of them."""
    scores = defaultdict(list)
    for record in examples:
        score = record.get(name, record.get("acc"))
        if score is not None:
            scores[record["task"]].append(score)
    if not scores:
        return None
    mean = float(np.mean([np.mean(own) for own in scores.values()]))
    if min(map(len, scores.values())) < 2:
        return Interval(mean, None, None)
    half = 1.96 * sum(np.var(own, ddof=1) / len(own) for own in scores.values()) ** 0.5 / len(scores)
    return Interval(mean, float(mean - half), float(mean + half))


def _version() -> str:
    return importlib.metadata.version("lm_eval")
