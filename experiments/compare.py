"""Trains NTP and MEAP on the same blocks from the same weights, evaluates both and writes the report.

python -m experiments.compare --config=configs/quickstart.py --workdir=DIR [--seeds=3] [--config.field=value ...]

Runs that are finished are kept, and interrupted ones go on where they were: the same command again picks up the rest.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections
import tqdm
from etils import epath

from experiments import report
from experiments.jobs import Job, last_step, train_all
from meap_jax import cli
from meap_jax.errors import ConfigError
from meap_jax.evaluate import evaluate
from meap_jax.metrics import read_metrics
from meap_jax.run import make_folder, open_data, versions

OBJECTIVES = ("ntp", "meap")


class PairRun(NamedTuple):
    """One training run of the comparison."""

    objective: str
    seed: int
    workdir: epath.Path

    def job(self, config_flags: list[str], data: str, num_steps: int) -> Job:
        """Its command; `data` is the prepared data that all runs share."""
        own = {"objective.name": self.objective, "seed": self.seed, "data.prepared": data}
        flags = [*config_flags, *(f"--config.{name}={value}" for name, value in own.items())]
        return Job(f"{self.objective} seed {self.seed}", self.workdir, flags, num_steps)


def collect(runs: list[PairRun]) -> Iterator[report.RunResult]:
    """Evaluates every run on the test split."""
    for run in tqdm.tqdm(runs, desc="evaluating", disable=not sys.stderr.isatty()):
        yield report.RunResult(run.objective, run.seed, read_metrics(run.workdir), evaluate(run.workdir, "test"))


def compare(
    config: ml_collections.ConfigDict, workdir: epath.Path, num_seeds: int, config_flags: list[str]
) -> dict[str, Any]:
    """Prepares the data, trains, evaluates and writes the report; returns the content of results.json."""
    began = time.perf_counter()
    runs = [
        PairRun(objective, config.seed + i, workdir / f"{objective}-seed{config.seed + i}")
        for i in range(num_seeds)
        for objective in OBJECTIVES
    ]
    is_fresh = not any(last_step(run.workdir) for run in runs)
    data = open_data(config, workdir)  # Once, before runs that share it start side by side.
    train_all([run.job(config_flags, str(data.folder), config.num_steps) for run in runs])
    return report.write(
        workdir,
        list(collect(runs)),
        setting={
            "config": config.to_dict(),
            "data": {name: data.plan_manifest(name)["splits"] for name in data.sources},
            "fingerprint": data.fingerprint,
            "versions": versions(),
            "cores": os.cpu_count(),
            "minutes": round((time.perf_counter() - began) / 60, 1) if is_fresh else None,
        },
    )


def command(argv: list[str]) -> None:
    """Compares NTP with MEAP as the command line says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", nargs="?", const="", default="3")
    parser.add_argument("--workdir")
    args, rest = parser.parse_known_args(argv[1:])
    if not args.seeds.isdecimal() or int(args.seeds) < 2:
        raise ConfigError(f"--seeds is {args.seeds!r}, but must be a number from 2 on: one pair has no spread.")
    own = [] if args.workdir is None else [f"--workdir={args.workdir}"]
    config, workdir = cli.parse_config([argv[0], *rest, *own])
    if config.seed + int(args.seeds) > 2**32:
        raise ConfigError(f"--seeds is {args.seeds}, but from seed {config.seed} on there are not so many below 2^32.")
    make_folder("workdir", workdir)
    # A scheduler's SIGTERM ends the runs too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    compare(config, workdir, int(args.seeds), rest)
    print(f"report: {workdir / 'report.md'}")


if __name__ == "__main__":
    cli.run_command(command)
