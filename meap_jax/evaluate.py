"""Evaluates a trained run: python -m meap_jax.evaluate --workdir=DIR [--split=test].

Prints one JSON object and writes it to DIR/evaluation_SPLIT.json.
"""

import argparse
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from meap_jax import cli
from meap_jax.evals import make_evaluators
from meap_jax.evals.retrieval import Retrieval
from meap_jax.evals.statistics import binomial_interval
from meap_jax.paths import absolute
from meap_jax.run import check_data, load_params, open_run, read_config


def evaluate(workdir: epath.Path, split: str = "test") -> dict[str, Any]:
    """Every evaluator on the newest checkpoint of a run.

    Args:
      workdir: absolute, of the run.
      split: "validation" or "test".

    Returns:
      {metric: value}; for retrieval also `answers`: for every answer whether it was right, its depth and its distance.

    Raises:
      ConfigError, DataError: if the run or its data cannot be read.
    """
    run = open_run(read_config(workdir), workdir)
    restored = load_params(run, workdir)
    check_data(run, restored.meta)
    params = restored.state
    results: dict[str, Any] = {}
    with jax.set_mesh(run.mesh):
        for name, evaluator in make_evaluators(run.config, run.definition, run.prepared, run.mesh, split).items():
            if isinstance(evaluator, Retrieval):
                answers = evaluator.answers(params)
                hits, trials = int(answers.correct.sum()), len(answers.correct)
                results[f"{name}/accuracy"] = hits / trials
                results[f"{name}/interval"] = binomial_interval(hits, trials)[1:]
                results[f"{name}/answers"] = {
                    "correct": answers.correct.astype(int).tolist(),
                    "depth": np.round(answers.depth, 4).tolist(),
                    "distance": answers.distance.tolist(),
                }
            else:
                results |= {f"{name}/{key}": value for key, value in evaluator.run(params)}
    return results


def command(argv: list[str]) -> None:
    """The door."""
    parser = argparse.ArgumentParser(prog="python -m meap_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a run that has saved a checkpoint")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    args = parser.parse_args(argv[1:])
    workdir = absolute(epath.Path(args.workdir))
    results = evaluate(workdir, args.split)
    if jax.process_index() == 0:
        (workdir / f"evaluation_{args.split}.json").write_text(json.dumps(results))
        print(json.dumps({name: value for name, value in results.items() if not name.endswith("/answers")}, indent=2))


if __name__ == "__main__":
    cli.run_command(command, joins_hosts=True)
