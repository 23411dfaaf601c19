"""Trains NTP and MEAP on the same blocks from the same weights, evaluates both and writes the report.

python -m experiments.compare --config=configs/quickstart.py --workdir=DIR [--seeds=3] [--config.field=value ...]

Runs that are finished are kept, and interrupted ones go on where they were: the same command again picks up the rest.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import tqdm
from etils import epath

from experiments import report
from meap_jax import cli
from meap_jax.errors import ConfigError
from meap_jax.evaluate import evaluate
from meap_jax.metrics import METRICS_FILE, read_metrics
from meap_jax.run import make_folder, open_data, versions

OBJECTIVES = ("ntp", "meap")
POLL_SECONDS = 1.0


class Job(NamedTuple):
    """One training run of the comparison."""

    objective: str
    seed: int
    workdir: epath.Path

    @property
    def name(self) -> str:
        """As in the tables: "ntp seed 0"."""
        return f"{self.objective} seed {self.seed}"


def train_all(jobs: list[Job], config_flags: list[str], data: str, num_steps: int) -> None:
    """Runs `meap_jax.main` for every job, on the CPU one at a time on each core, else one after the other.

    A small model on one core wastes none of it on waiting for other threads: two runs side by side finish sooner than
    one after the other with both cores each.

    Raises:
      ConfigError: if a run fails; names its log.
    """
    on_cpu = jax.default_backend() == "cpu"
    cores = sorted(os.sched_getaffinity(0)) if on_cpu and hasattr(os, "sched_getaffinity") else [None]
    waiting = list(jobs)
    running: dict[int | None, tuple[Job, subprocess.Popen]] = {}  # By core.
    with tqdm.tqdm(total=len(jobs) * num_steps, unit="step", disable=not sys.stderr.isatty()) as bar:
        try:
            while waiting or running:
                for core in [core for core in cores if core not in running][: len(waiting)]:
                    job = waiting.pop(0)
                    running[core] = (job, _launch(job, config_flags, data, core))
                    bar.write(f"started {job.name}: log in {job.workdir / 'log.txt'}", file=sys.stderr)
                time.sleep(POLL_SECONDS)
                bar.update(sum(_last_step(job.workdir) for job in jobs) - bar.n)
                for core, (job, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    if process.returncode:
                        last_line = (job.workdir / "log.txt").read_text().strip().split("\n")[-1]
                        said = last_line.removeprefix("error: ")
                        raise ConfigError(f"{job.name} failed: {said} (log: {job.workdir / 'log.txt'})")
                    del running[core]
                    bar.write(f"finished {job.name}", file=sys.stderr)
        finally:
            for _, process in running.values():
                process.terminate()
                process.wait()


def _launch(job: Job, config_flags: list[str], data: str, core: int | None) -> subprocess.Popen:
    job.workdir.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "meap_jax.main", f"--workdir={job.workdir}", *config_flags),
        f"--config.objective.name={job.objective}",
        f"--config.seed={job.seed}",
        f"--config.data.prepared={data}",
    ]
    with (job.workdir / "log.txt").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    if core is not None:
        os.sched_setaffinity(process.pid, {core})  # Before it starts threads, which inherit this.
    return process


def _last_step(workdir: epath.Path) -> int:
    """The last step on record; a line that is being written counts next time."""
    file = workdir / METRICS_FILE
    lines = file.read_text().splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except json.JSONDecodeError:
            continue
    return 0


def collect(jobs: list[Job]) -> Iterator[report.RunResult]:
    """Evaluates every run on the test split."""
    for job in tqdm.tqdm(jobs, desc="evaluating", disable=not sys.stderr.isatty()):
        yield report.RunResult(job.objective, job.seed, read_metrics(job.workdir), evaluate(job.workdir, "test"))


def compare(
    config: ml_collections.ConfigDict, workdir: epath.Path, num_seeds: int, config_flags: list[str]
) -> dict[str, Any]:
    """Prepares the data, trains, evaluates and writes the report; returns the content of results.json."""
    began = time.perf_counter()
    jobs = [
        Job(objective, config.seed + i, workdir / f"{objective}-seed{config.seed + i}")
        for i in range(num_seeds)
        for objective in OBJECTIVES
    ]
    is_fresh = not any(_last_step(job.workdir) for job in jobs)
    data = open_data(config, workdir)  # Once, before runs that share it start side by side.
    train_all(jobs, config_flags, str(data.folder), config.num_steps)
    return report.write(
        workdir,
        list(collect(jobs)),
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
