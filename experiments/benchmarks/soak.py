"""Whether a long run stays as it began: memory, open files, threads, the time of a step, the size of its logs.

python -m experiments.benchmarks.soak [--steps=N] [--save_every=N] [--quick] [--workdir=DIR] [--json=FILE]

`python -m meap_jax.main` trains a tiny decoder for 20,000 steps in a process of its own, with a record every 10 steps,
an evaluation every 250 and a checkpoint every 100. Meanwhile its memory, file descriptors, threads and children are
read from /proc. The first quarter counts as warm-up: the slope of the memory is that of a line through all samples
after it.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from configs import quickstart
from experiments.benchmarks import harness
from experiments.benchmarks.startup import CONFIG, ROOT
from meap_jax.config import flatten
from meap_jax.errors import ConfigError
from meap_jax.metrics import METRICS_FILE, TENSORBOARD_FOLDER

SECONDS_BETWEEN_SAMPLES = 0.2
NUM_WINDOWS = 10
LOG_EVERY, EVAL_EVERY, SAVE_EVERY = 10, 250, 100


class Sample(NamedTuple):
    """What the operating system knows of the process, and what it has written."""

    step: int  # Of its last record.
    resident_bytes: int
    allocated_bytes: int  # The part of it that is no page of a file, of which the kernel takes and gives as it likes.
    open_files: int
    threads: int
    children: int
    log_bytes: int
    event_bytes: int


def soak_config(num_steps: int, quick: bool) -> ml_collections.ConfigDict:
    """The quickstart's config with a decoder and documents that are as small as can be."""
    c = quickstart.get_config()
    c.model.update(
        dict(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, embed_dim=16, mlp_dim=24, vocab_size=512)
    )
    c.seq_len, c.global_batch_size, c.num_steps = 80, 8, num_steps
    c.data.retrieval.update(dict(num_facts=3, questions_per_fact=0.7, num_eval_facts=3, max_fillers=1))
    c.data.retrieval.update(dict(num_documents=200, num_eval_documents=16))
    faster = 5 if quick else 1
    c.log.every, c.eval.every, c.checkpoint.every = LOG_EVERY, EVAL_EVERY // faster, SAVE_EVERY // faster
    return c


def watch(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Sample]:
    """Trains in a process of its own and samples it until it ends.

    Raises:
      ConfigError: if it fails.
    """
    fields = [f"--config.{name}={value}" for name, value in flatten(config).items() if value is not None]
    command = [sys.executable, "-m", "meap_jax.main", f"--config={CONFIG}", f"--workdir={workdir}", *fields]
    log = workdir.with_suffix(".log")
    samples = []
    with log.open("w") as out:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=out)
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError, ValueError, LookupError):  # It has just ended, or not yet begun.
                    samples.append(sample(process.pid, workdir))
                time.sleep(SECONDS_BETWEEN_SAMPLES)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise ConfigError(f"the run ended with {process.returncode}: {log.read_text().strip().splitlines()[-1]}")
    return samples


def sample(pid: int, workdir: pathlib.Path) -> Sample:
    """Reads what there is to know of a process now.

    Raises:
      OSError, ValueError, LookupError: it has ended, or has written no record yet.
    """
    proc, metrics = pathlib.Path("/proc") / str(pid), workdir / METRICS_FILE
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    children = sum(len((task / "children").read_text().split()) for task in (proc / "task").iterdir())
    events = (file for file in (workdir / TENSORBOARD_FOLDER).rglob("*") if file.is_file())
    return Sample(
        step=last_step(metrics),
        resident_bytes=int(status["VmRSS"].split()[0]) * 1024,
        allocated_bytes=int(status["RssAnon"].split()[0]) * 1024,
        open_files=len(os.listdir(proc / "fd")),
        threads=int(status["Threads"]),
        children=children,
        log_bytes=metrics.stat().st_size,
        event_bytes=sum(file.stat().st_size for file in events),
    )


def last_step(metrics: pathlib.Path) -> int:
    """The step of the last whole line, which is within the last 8 KB of the file.

    Raises:
      OSError, IndexError: there is none.
    """
    with metrics.open("rb") as file:
        file.seek(max(0, os.path.getsize(metrics) - 8_192))
        lines = file.read().rpartition(b"\n")[0].splitlines()
    return json.loads(lines[-1])["step"]


def slope(samples: list[Sample]) -> float:
    """By how many MB the allocated memory grows in 1,000 steps: of a line by least squares."""
    steps, sizes = np.array([(s.step / 1e3, s.allocated_bytes / 1e6) for s in samples]).T
    return float(np.polyfit(steps, sizes, 1)[0])


def windows(samples: list[Sample], step_times: dict[int, float], num_steps: int) -> list[dict[str, Any]]:
    """A row for each part of the run, of equally many steps.

    Args:
      samples: of the run.
      step_times: seconds, the medians of records, by step.
      num_steps: of the run.
    """
    rows = []
    ends = np.linspace(0, num_steps, NUM_WINDOWS + 1).astype(int)
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        here = [s for s in samples if begin < s.step <= end]
        seconds = [seconds for step, seconds in step_times.items() if begin < step <= end]
        if not here or not seconds:
            continue
        rows.append({
            "steps": f"{begin + 1:,} to {end:,}",
            "resident, MB": float(np.median([s.resident_bytes for s in here])) / 1e6,
            "allocated, MB": float(np.median([s.allocated_bytes for s in here])) / 1e6,
            "open files": max(s.open_files for s in here),
            "threads": max(s.threads for s in here),
            "children": max(s.children for s in here),
            "step p50, ms": 1e3 * float(np.median(seconds)),
            "metrics.jsonl, MB": here[-1].log_bytes / 1e6,
            "events, MB": here[-1].event_bytes / 1e6,
        })  # fmt: skip
    return rows


def verdict(samples: list[Sample], step_times: dict[int, float], num_steps: int) -> dict[str, Any]:
    """What the run comes to: 0, 1, 0 and the like if nothing grows."""
    quarter = num_steps // 4
    first, last = (
        [seconds for step, seconds in step_times.items() if low < step <= low + quarter]
        for low in (LOG_EVERY, num_steps - quarter)  # The first record is of steps that compile.
    )
    later = [s for s in samples if quarter <= s.step < num_steps]  # After the last step, all is being closed.
    return {
        "steps": num_steps,
        "allocated, MB a 1,000 steps": slope(later),
        "step p50, last quarter / first": float(np.median(last) / np.median(first)),
        "open files, most / least": f"{max(s.open_files for s in later)} / {min(s.open_files for s in later)}",
        "threads, most / least": f"{max(s.threads for s in later)} / {min(s.threads for s in later)}",
        "metrics.jsonl, bytes a record": samples[-1].log_bytes / len(step_times),
        "events, bytes a record": samples[-1].event_bytes / len(step_times),
    }


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The tables of this benchmark."""
    num_steps = args.steps or (300 if args.quick else 20_000)
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(args.workdir or folder) / "run"
        workdir.parent.mkdir(parents=True, exist_ok=True)
        config = soak_config(num_steps, args.quick)
        config.checkpoint.every = args.save_every or config.checkpoint.every
        samples = watch(config, workdir)
        records = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    times = {record["step"]: record["step_seconds_p50"] for record in records if "step_seconds_p50" in record}
    return [
        harness.Table("A long run, part by part", windows(samples, times, num_steps)),
        harness.Table("A long run: what grows", [verdict(samples, times, num_steps)]),
    ]


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="of the run (default 20,000; 300 with --quick)")
    parser.add_argument("--save_every", type=int, help=f"steps from one checkpoint to the next (default {SAVE_EVERY})")
    parser.add_argument("--workdir", help="a folder that keeps the run (default: one that is deleted)")


command = harness.main("soak", __doc__, measure, repeats=1, add_flags=_flags)

if __name__ == "__main__":
    harness.run(command)
