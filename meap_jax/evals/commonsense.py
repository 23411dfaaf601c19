"""Commonsense (the paper's Tables 1, 5, 6, 13, 14 and 15): tasks of lm-evaluation-harness, zero-shot.

Any task of the harness works, and one's own task files. The package is optional: requirements-lm-eval.txt.
"""

import importlib.metadata
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from meap_jax.errors import ConfigError, DataError
from meap_jax.evals.predictions import Predictions
from meap_jax.evals.setting import Setting
from meap_jax.model.decoder import Params
from meap_jax.results import Interval, Result
from meap_jax.statistics import binomial_interval, mean_interval

_log = logging.getLogger(__name__)
SCORES = ("acc", "acc_norm", "exact_match", "word_perplexity", "byte_perplexity", "bits_per_byte")


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

    def run(self, params: Params) -> Result:
        """Runs the tasks; metrics are TASK/SCORE, with the harness' standard errors beside them as TASK/SCORE_stderr.

        Raises:
          ConfigError: a task is not known to the harness.
          DataError: its data can't be read.
        """
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from meap_jax.evals.harness_model import HarnessModel

        setting, options = self._setting, self._setting.config.eval.commonsense
        names = [name.strip() for name in options.tasks.split(",") if name.strip()]
        manager = TaskManager(include_path=options.include_path)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if unknown:
            raise ConfigError(
                f"eval.commonsense.tasks names {', '.join(unknown)}, which lm-eval {_version()} does not know; task "
                "files of your own are looked for in eval.commonsense.include_path."
            )
        is_first = jax.process_index() == 0
        file = setting.folder / "commonsense.jsonl" if setting.folder is not None and is_first else None
        model = HarnessModel(setting, params, Predictions(file, "commonsense", setting.fingerprint))
        try:
            found = simple_evaluate(
                model=model, tasks=names, num_fewshot=0, limit=options.limit or None, task_manager=manager,
                bootstrap_iters=1_000, log_samples=True,
            )  # fmt: skip
        except (OSError, ConnectionError) as error:
            raise DataError(f"data of eval.commonsense.tasks ({options.tasks}) can't be read: {error}") from error
        assert found is not None  # It is for ranks other than 0 of the harness' own kind of processes.
        examples = examples_of(found["samples"], model.skipped)
        metrics = metrics_of(found["results"], examples)
        metrics |= {name: Interval(float(count), None, None) for name, count in model.counts.items()}
        metrics["begins_with_bos"] = Interval(float(model.adds_bos), None, None)
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        _log.info("lm-eval %s; versions of tasks: %s; begin of a document: %s", _version(), versions, model.adds_bos)
        return Result(metrics, examples)


def examples_of(samples: Mapping[str, Sequence[dict]], skipped: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """A record for each document: its task, its number, and what it scored; none where a request was skipped."""
    records = []
    for task, of_task in samples.items():
        for sample in of_task:
            record = {"task": task, "doc_id": sample["doc_id"]}
            if any(tuple(map(str, arguments[:2])) in skipped for arguments in _arguments(sample)):
                record["skipped"] = True
            else:
                record |= {name: float(sample[name]) for name in SCORES if isinstance(sample.get(name), int | float)}
            records.append(record)
    return records


def _arguments(sample: dict[str, Any]) -> list[tuple]:
    """The texts of a sample's requests, which the harness hands back as lists or as dicts of numbered arguments."""
    found = sample["arguments"]
    values = found.values() if isinstance(found, dict) else found
    return [tuple(value.values()) if isinstance(value, dict) else tuple(value) for value in values]


def metrics_of(results: Mapping[str, Mapping[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, Interval]:
    """Metrics of all tasks, and the mean of each accuracy over them.

    A share has Wilson's interval over the documents that were scored; other metrics have the harness' value and 1.96 of
    its standard errors on either side.
    """
    found: dict[str, Interval] = {}
    for task, values in results.items():
        own = [record for record in examples if record["task"] == task]
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, int | float) or name in ("alias", "sample_len"):
                continue
            error = values.get(f"{name}_stderr,{kind}")
            error = float(error) if isinstance(error, int | float) else None
            scored = [record[name] for record in own if name in record]
            if scored and set(scored) <= {0.0, 1.0}:
                found[f"{task}/{name}"] = binomial_interval(sum(scored), len(scored))
            elif scored and name in ("acc", "acc_norm", "exact_match"):
                found[f"{task}/{name}"] = mean_interval(scored)
            else:
                ends = (None, None) if error is None else (value - 1.96 * error, value + 1.96 * error)
                found[f"{task}/{name}"] = Interval(float(value), *ends)
            if error is not None:
                found[f"{task}/{name}_stderr"] = Interval(error, None, None)
    for name in ("acc", "acc_norm"):
        of_tasks = [interval.estimate for key, interval in found.items() if key.endswith(f"/{name}")]
        if of_tasks:
            found[f"mean/{name}"] = Interval(sum(of_tasks) / len(of_tasks), None, None)
    return found


def _version() -> str:
    return importlib.metadata.version("lm_eval")
