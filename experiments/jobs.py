"""Runs the training commands of an experiment: on the CPU one on each core, elsewhere one after the other."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import tqdm
from etils import epath

from meap_jax.errors import ConfigError
from meap_jax.metrics import METRICS_FILE

POLL_SECONDS = 1.0


class Job(NamedTuple):
    """One run of `meap_jax.main`."""

    name: str  # In messages: "ntp seed 0".
    workdir: epath.Path
    flags: Sequence[str]  # Besides --workdir.
    num_steps: int  # That it takes.


def train_all(jobs: Sequence[Job]) -> None:
    """Runs every job; one that is finished starts and ends at once, and an interrupted one goes on.

    A small model on one core wastes none of it on waiting for other threads: two runs side by side finish sooner than
    one after the other with both cores each.

    Raises:
      ConfigError: if a run fails; names its log.
    """
    on_cpu = jax.default_backend() == "cpu"
    cores = sorted(os.sched_getaffinity(0)) if on_cpu and hasattr(os, "sched_getaffinity") else [None]
    waiting = list(jobs)
    running: dict[int | None, tuple[Job, subprocess.Popen]] = {}  # By core.
    with tqdm.tqdm(total=sum(job.num_steps for job in jobs), unit="step", disable=not sys.stderr.isatty()) as bar:
        try:
            while waiting or running:
                for core in [core for core in cores if core not in running][: len(waiting)]:
                    job = waiting.pop(0)
                    running[core] = (job, _launch(job, core))
                    bar.write(f"started {job.name}: log in {job.workdir / 'log.txt'}", file=sys.stderr)
                time.sleep(POLL_SECONDS)
                bar.update(sum(last_step(job.workdir) for job in jobs) - bar.n)
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


def _launch(job: Job, core: int | None) -> subprocess.Popen:
    job.workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "meap_jax.main", f"--workdir={job.workdir}", *job.flags]
    with (job.workdir / "log.txt").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    if core is not None:
        os.sched_setaffinity(process.pid, {core})  # Before it starts threads, which inherit this.
    return process


def last_step(workdir: epath.Path) -> int:
    """The last step on record; a line that is being written counts next time."""
    file = workdir / METRICS_FILE
    lines = file.read_text().splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except json.JSONDecodeError:
            continue
    return 0
