"""Trains every mask ratio with every seed in one compiled program, and compares each ratio with 0.

python -m experiments.mask_ratio --config=configs/quickstart.py --workdir=runs/mask_ratio
    [--ratios=0,.05,.1,.15,.2] [--seeds=3] [--config.field=value ...]

`experiments.population` trains them, on all devices, each model whole on one: `mesh.*` must be 1 or -1.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from experiments import population
from experiments.arms import Arm, check_num_seeds, seeds_of
from experiments.members import Member
from meap_jax import cli
from meap_jax.errors import ConfigError
from meap_jax.evals import Setting, make_evaluators
from meap_jax.loop import Evaluator
from meap_jax.run import Run, make_folder, open_run, versions
from meap_jax.statistics import paired_t_interval

MOST_STEPS_A_TURN = 50


def measure(run: Run, members: Sequence[Member], evaluators: Mapping[str, Evaluator]) -> dict[str, np.ndarray]:
    """Every result on validation rows, on clean inputs: {"validation_retrieval/loss": [P], ...}."""
    results = population.evaluate(run, members, evaluators)
    names = [name for name in results[0].metrics if not name.endswith(("/masked_loss", "/chance"))]
    return {name: np.array([result.metrics[name].estimate for result in results]) for name in names}


def summarize(values: np.ndarray, ratios: Sequence[float]) -> list[dict[str, Any]]:
    """One metric [P] as a row a ratio: mean and spread over seeds, and the difference to ratio 0, paired by seed."""
    by_ratio = dict(zip(ratios, values.reshape(len(ratios), -1), strict=True))
    return [
        {
            "ratio": ratio,
            "values": own.tolist(),
            "mean": float(own.mean()),
            "sd": float(own.std(ddof=1)),
            "difference": paired_t_interval(own - by_ratio[0])._asdict(),
        }
        for ratio, own in by_ratio.items()
    ]


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """One metric as Markdown."""
    lines = [f"| ratio | {name} | minus ratio 0, 95 % t interval |", "| --- | --- | --- |"]
    for row in rows:
        difference = "{estimate:+.4f} [{low:+.4f}, {high:+.4f}]".format(**row["difference"]) if row["ratio"] else ""
        lines.append("| {ratio:g} | {mean:.4f} ± {sd:.4f} |".format(**row) + f" {difference} |")
    return "\n".join(lines)


def plot(file: epath.Path, metrics: dict[str, list[dict[str, Any]]]) -> None:
    """A panel a metric, a dot a seed; the line goes through the means."""
    figure = Figure(figsize=(4.5 * len(metrics), 3.5), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, (name, rows) in zip(panels, metrics.items(), strict=True):
        ratios = [row["ratio"] for row in rows]
        axes.plot(ratios, [row["mean"] for row in rows], color="0.6")
        axes.plot(ratios, [row["values"] for row in rows], "o", color="#d95f02", alpha=0.7)
        axes.set(title=name, xlabel="mask ratio", xticks=ratios)
    with file.open("wb") as out:
        figure.savefig(out, format="png", dpi=150)


def train(run: Run, ratios: Sequence[float], num_seeds: int) -> list[Member]:
    """Trains a model with each ratio and seed; returns them ratio by ratio."""
    config = run.config
    name = "meap" if config.objective.name == "ntp" else config.objective.name  # NTP would ignore the ratio.
    arms = [Arm(f"ratio{r!r}", f"{r:g}", {"objective.name": name, "objective.mask_ratio": r}) for r in ratios]
    seeds = seeds_of(config, num_seeds)
    every = max(n for n in range(1, MOST_STEPS_A_TURN + 1) if config.num_steps % n == 0)
    members = {(m.arm.name, m.seed): m for m in population.train(run, arms, seeds, every=every)}
    return [members[arm.name, seed] for arm in arms for seed in seeds]


def parse_ratios(text: str) -> tuple[float, ...]:
    """Reads "0,.05,.1"; all others are compared with ratio 0.

    Raises:
      ConfigError: for anything but distinct shares with 0 among them.
    """
    try:
        ratios = tuple(float(ratio) for ratio in text.split(","))
    except ValueError:
        ratios = ()
    if 0 not in ratios or not all(0 <= r <= 1 for r in ratios) or len(set(ratios)) < len(ratios):
        raise ConfigError(f"--ratios is {text!r}, but must be distinct numbers in [0, 1], 0 among them: 0,.1,.2.")
    return ratios


def command(argv: list[str]) -> None:
    """Runs the sweep, and writes its table, JSON and plot."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ratios", nargs="?", const="", default="0,.05,.1,.15,.2")
    parser.add_argument("--seeds", nargs="?", const="", default="3")
    args, rest = parser.parse_known_args(argv[1:])
    ratios = parse_ratios(args.ratios)
    num_seeds = check_num_seeds(args.seeds)
    config, workdir = cli.parse_config([argv[0], "--workdir=runs/mask_ratio", *rest])
    population.check_mesh(config)

    make_folder("workdir", workdir)
    population.use_all_cores()
    run = open_run(config, workdir, population.evaluation_mesh(config, jax.devices()))
    evaluators = make_evaluators(Setting.of(run, "validation"), config.eval.tasks)
    measured = measure(run, train(run, ratios, num_seeds), evaluators)
    metrics = {name: summarize(values, ratios) for name, values in measured.items()}
    setting = {"config": config.to_dict(), "fingerprint": run.prepared.fingerprint, "versions": versions()}
    (workdir / "mask_ratio.json").write_text(json.dumps({"metrics": metrics, "setting": setting}, indent=1))
    plot(workdir / "mask_ratio.png", metrics)
    print("\n\n".join(table(name, rows) for name, rows in metrics.items()))


if __name__ == "__main__":
    cli.run_command(command)
