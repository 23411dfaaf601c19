"""Evaluators by name, each of which gives a `Result` of a model; `eval.tasks` of a config says which are run.

An evaluator has `run(params) -> Result`. Under each name is a function that makes evaluators for a `Setting`:
{prefix of their metrics: evaluator}, empty where the setting has no data for them.
"""

from collections.abc import Callable, Mapping

from meap_jax.errors import ConfigError
from meap_jax.evals import commonsense, facts, kv, mdqa, mneedle, niah, retrieval, ruler, summaries, validation
from meap_jax.evals.setting import Setting
from meap_jax.loop import Evaluator

__all__ = ["EVALUATORS", "Setting", "check_tasks", "make_evaluators"]

EVALUATORS: dict[str, Callable[[Setting], Mapping[str, Evaluator]]] = {
    "validation": validation.make,
    "retrieval": retrieval.make,
    "facts": facts.make,
    "niah": niah.make,
    "ruler": ruler.make,
    "mdqa": mdqa.make,
    "kv": kv.make,
    "mneedle": mneedle.make,
    "commonsense": commonsense.make,
    "summaries": summaries.make,
}


def make_evaluators(setting: Setting, tasks: str) -> dict[str, Evaluator]:
    """Makes the evaluators that `tasks` names, in that order: {prefix of their metrics: evaluator}.

    Raises:
      ConfigError: as `check_tasks`.
    """
    return {name: evaluator for task in check_tasks(tasks) for name, evaluator in EVALUATORS[task](setting).items()}


def check_tasks(tasks: str) -> list[str]:
    """Reads a list of names such as "validation,retrieval".

    Raises:
      ConfigError: one of them is not registered.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    for name in names:
        if name not in EVALUATORS:
            raise ConfigError(f"eval.tasks is {tasks!r}, but {name!r} is not one of {', '.join(EVALUATORS)}.")
    return names
