"""Evaluates a model.

python -m meap_jax.evaluate --workdir=DIR [--step=N] [--tasks=validation,retrieval] [--split=test] [--mesh=data=-1]

Prints every metric with its interval as JSON, and writes them with a record for each example to
DIR/evaluation_SPLIT.json.
"""

import argparse
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from meap_jax import cli
from meap_jax.data.prepared import Prepared
from meap_jax.errors import ConfigError
from meap_jax.evals import Setting, make_evaluators
from meap_jax.models import open_model
from meap_jax.paths import absolute
from meap_jax.run import check_data, open_data


def evaluate(
    workdir: epath.Path,
    split: str = "test",
    *,
    tasks: str | None = None,
    step: int | None = None,
    mesh: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Runs evaluators on a checkpoint of a run.

    Args:
      workdir: absolute, of the run.
      split: "validation" or "test".
      tasks: names of evaluators, "validation,retrieval"; default: `eval.tasks` of the run's config.
      step: of the checkpoint; default: the newest.
      mesh: sizes of its axes, in place of the config's.

    Returns:
      {"step": of the checkpoint, "metrics": {evaluator/metric: interval}, "examples": {evaluator: [records]}}.

    Raises:
      ConfigError, DataError: if the model or its data cannot be read.
    """
    opened = open_model(workdir, step, mesh)
    config = opened.model.config

    def data() -> Prepared:
        if "imported" in opened.meta:
            raise ConfigError(
                f"{workdir} holds an imported model, which has no data to be evaluated on: evaluate a run that started "
                "from it (init_from)."
            )
        prepared = open_data(config, workdir)
        check_data(prepared, opened.meta, workdir)
        return prepared

    evaluators = make_evaluators(Setting(opened.model, split, data), config.eval.tasks if tasks is None else tasks)
    report: dict[str, Any] = {"step": opened.step, "metrics": {}, "examples": {}}
    with jax.set_mesh(opened.model.mesh):
        for name, evaluator in evaluators.items():
            metrics, report["examples"][name] = evaluator.run(opened.params)
            report["metrics"] |= {f"{name}/{key}": interval._asdict() for key, interval in metrics.items()}
    return report


def command(argv: list[str]) -> None:
    """Evaluates the run that the command line names, prints its metrics and writes its JSON."""
    parser = argparse.ArgumentParser(prog="python -m meap_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a run that has saved a checkpoint")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--tasks", help="names of evaluators; default: eval.tasks of the run's config")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--mesh", default="", help="axis=size,...: in place of those axes of the config's mesh")
    args = parser.parse_args(argv[1:])
    workdir = absolute(epath.Path(args.workdir))
    mesh = cli.parse_mesh(args.mesh)
    results = evaluate(workdir, args.split, tasks=args.tasks, step=args.step, mesh=mesh)
    if jax.process_index() == 0:
        (workdir / f"evaluation_{args.split}.json").write_text(json.dumps(results))
        print(json.dumps({name: value for name, value in results.items() if name != "examples"}, indent=2))


if __name__ == "__main__":
    cli.run_command(command, joins_hosts=True)
