"""How long a run takes to its first step, and how long a checkpoint holds it up.

python -m experiments.benchmarks.startup [--repeats=N] [--quick] [--json=FILE]

Start-up: `python -m meap_jax.main` in a fresh process, from its start until the record of step 1 is in
metrics.jsonl, on data that was prepared before; cold with an empty JAX_COMPILATION_CACHE_DIR, warm with the one that
the cold start of that round filled. "imports" is a process that imports meap_jax.main and ends.

Checkpoints: `Checkpointer.save` copies the state and writes it in the background. Timed are the call alone, for which
the loop waits, and the steps of the second after it, against as many steps of a second without a save.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from configs import quickstart
from experiments.benchmarks import harness
from experiments.benchmarks.timing import Ratio, interleave
from experiments.benchmarks.workload import Workload, config_of
from meap_jax.checkpoint import Checkpointer, Keep
from meap_jax.config import flatten
from meap_jax.errors import ConfigError
from meap_jax.metrics import METRICS_FILE
from meap_jax.run import open_data

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart.py"  # All of whose fields are then set on the command line.
POLL_SECONDS = 0.005
LONGEST_START = 600.0  # Seconds.
SECONDS_OF_STEPS = 1.0  # After a save: its files are being written meanwhile.
SAVE_EVERY = 1_000  # Steps; as the paper's configs do.


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The tables of this benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        starts = [_start_row(name, config, root / name, args.repeats) for name, config in runs(args.quick).items()]
        sizes = (("tiny", 32, 2),) if args.quick else (("1M", 512, 8), ("10M", 512, 8))
        saves = [_save_row(*size, root / f"save-{size[0]}", args.repeats) for size in sizes]
    return [
        harness.Table("From process start to the first step", starts),
        harness.Table("How long a checkpoint holds up the loop", saves),
    ]


# ------------------------------------------------------------------------------------------------------------- start-up


def runs(quick: bool) -> dict[str, ml_collections.ConfigDict]:
    """The runs that are started: the quickstart's, and the 10M decoder's in rows so short that steps hardly count."""
    small = quickstart.get_config()
    small.data.retrieval.num_documents, small.data.retrieval.num_eval_documents = 200, 10
    if quick:
        return {"quickstart": small}
    large = config_of("10M", seq_len=128, batch_size=1)
    large.objective.name, large.data.mixture = "meap", "stdlib=1"
    return {"quickstart": small, "10M": large}


def _start_row(name: str, config: ml_collections.ConfigDict, folder: pathlib.Path, repeats: int) -> dict[str, Any]:
    folder.mkdir()
    config.num_steps, config.eval.every, config.checkpoint.every = 1_000, 1_000, 1_000
    config.data.prepared = str(folder / "data")
    open_data(config, epath.Path(folder))
    found = []
    for i in range(repeats):
        cache = folder / f"cache-{i}"
        cold = seconds_to_first_step(config, folder / f"cold-{i}", cache)  # Fills the cache.
        warm = seconds_to_first_step(config, folder / f"warm-{i}", cache)
        imports = _seconds([sys.executable, "-c", "import meap_jax.main"])
        found.append({"cold": cold, "warm": warm, "imports": imports})
    seconds = {key: np.array([row[key] for row in found]) for key in found[0]}
    return {
        "run": name,
        "warm / cold": Ratio.of(seconds["warm"] / seconds["cold"]),
        "imports / warm": Ratio.of(seconds["imports"] / seconds["warm"]),
        "cold, seconds": float(np.median(seconds["cold"])),
        "warm, seconds": float(np.median(seconds["warm"])),
    }


def seconds_to_first_step(config: ml_collections.ConfigDict, workdir: pathlib.Path, cache: pathlib.Path) -> float:
    """Starts the real command and ends it when its first record is there.

    Raises:
      ConfigError: if it ends before.
    """
    fields = [f"--config.{name}={value}" for name, value in flatten(config).items() if value is not None]
    command = [sys.executable, "-m", "meap_jax.main", f"--config={CONFIG}", f"--workdir={workdir}", *fields]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    log = workdir.with_suffix(".log")
    with log.open("w") as out:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            while not _has_a_line(workdir / METRICS_FILE):
                if process.poll() is not None or time.perf_counter() - began > LONGEST_START:
                    raise ConfigError(f"a run came to no first step: {log.read_text().strip().splitlines()[-1]}")
                time.sleep(POLL_SECONDS)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()


def _has_a_line(file: pathlib.Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _save_row(size: str, seq_len: int, batch_size: int, folder: pathlib.Path, repeats: int) -> dict[str, Any]:
    workload = Workload(config_of(size, seq_len=seq_len, batch_size=batch_size))
    calls: list[float] = []

    def steps(num: int) -> None:
        for _ in range(num):
            metrics = workload.step()
        jax.block_until_ready((metrics, workload.state))

    steps(1)
    began = time.perf_counter()
    steps(3)
    num = max(1, round(SECONDS_OF_STEPS / ((time.perf_counter() - began) / 3)))

    def plain() -> float:
        began = time.perf_counter()
        steps(num)
        return time.perf_counter() - began

    def with_save() -> float:
        checkpointer = Checkpointer(epath.Path(folder), Keep(1))
        began = time.perf_counter()
        checkpointer.save(int(workload.state.step), workload.state, {"config": workload.config.to_dict()})
        calls.append(time.perf_counter() - began)
        took = plain()
        checkpointer.close()  # Waits for the files.
        shutil.rmtree(folder)
        return took

    timings = interleave({"plain": plain, "save": with_save}, rounds=repeats)
    step = timings.seconds["plain"] / num
    in_steps = np.array(calls[-repeats:]) / step
    return {
        "decoder": size,
        "T": seq_len,
        "B": batch_size,
        "the call, in steps": Ratio.of(in_steps),
        f"share of a run that saves every {SAVE_EVERY:,} steps": float(np.median(in_steps)) / SAVE_EVERY,
        "steps after it / steps": timings.ratio("save", "plain"),
        "step, ms": 1e3 * float(np.median(step)),
    }


command = harness.main("startup", __doc__, measure, repeats=3)

if __name__ == "__main__":
    harness.run(command)
