"""How fast the data pipeline is, and how long training waits for it.

python -m experiments.benchmarks.data [--repeats=N] [--quick] [--json=FILE]

The pipeline is `TrainBatches` on one core, with blocks of the paper's length (4096) of the standard library's text in
mistral's 32,000 pieces, prepared on the spot; its tokens/s are compared with those that train steps take, timed in
turns with it. The wait is what real runs record as `data_wait`: the share of their steps' time in which the loop waited
in `next(batches)` and the device had nothing left to do, an upper bound; from the second step on, the first compiles.
"""

import argparse
import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from configs import quickstart
from experiments.benchmarks import harness
from experiments.benchmarks.timing import Ratio, interleave, timed
from experiments.benchmarks.workload import SIZES, Workload, config_of, make_mesh
from meap_jax import config as config_lib
from meap_jax import sharding, train
from meap_jax.config import mixture
from meap_jax.data.pipeline import TrainBatches
from meap_jax.data.prepared import Prepared
from meap_jax.loop import Guards, train_loop
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.numerics import Monitor
from meap_jax.run import open_data
from meap_jax.timing import Clock, Trace
from meap_jax.watchdog import Watchdog

PAPER_SEQ_LEN, PAPER_VOCAB = 4096, 32_064
BATCH_SIZE = 8


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The tables of this benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        small = quickstart_config(args.quick)
        runs = [("quickstart", small, open_data(small, epath.Path(folder) / "quickstart"))]
        if not args.quick:
            text = text_config()
            runs.append(("standard library", text, open_data(text, epath.Path(folder) / "text")))
        rows = [_wait_row(*run, args.repeats) for run in runs]
        _, config, prepared = runs[-1]
        waits = harness.Table("Share of a run's time that it waits for data", rows)
        return [pipeline_table(config, prepared, args), waits]


def text_config() -> ml_collections.ConfigDict:
    """The 1M decoder with the vocabulary of the paper, which makes it 9M, on the standard library's text."""
    config = config_of("1M", seq_len=PAPER_SEQ_LEN, batch_size=1, vocab_size=PAPER_VOCAB)
    config.objective.name, config.objective.mask_id = "meap", 32_000
    config.data.mixture, config.data.tokenizer = "stdlib=1", "mistral"
    config.num_steps = 12
    return config


def quickstart_config(quick: bool) -> ml_collections.ConfigDict:
    """The quickstart's run, whose steps are the shortest of all configs, on fewer documents."""
    config = quickstart.get_config()
    config.data.retrieval.num_documents = 200 if quick else 4_000
    config.data.retrieval.num_eval_documents = 10
    config.num_steps = 4 if quick else 100
    if quick:
        config.model.update({k: v for k, v in SIZES["tiny"].items() if k != "vocab_size"})
    return config


def pipeline_table(config: ml_collections.ConfigDict, prepared: Prepared, args: argparse.Namespace) -> harness.Table:
    """Tokens/s of the pipeline on one core, and what train steps would take."""
    sizes = (("tiny", 32, 2),) if args.quick else (("1M", 512, 8), ("10M", 512, 8))
    workloads = {size: Workload(config_of(size, seq_len=T, batch_size=B)) for size, T, B in sizes}
    with _on_one_core():  # Where the pipeline's reader thread then stays too.
        batches = _batches(config, prepared, BATCH_SIZE)
        next(batches)
    read = timed(lambda: next(batches), 4 if args.quick else 100)  # More than the few that are prefetched.

    def pipeline() -> float:
        with _on_one_core():
            return read()

    turns = {"pipeline": pipeline, **{size: timed(w.step) for size, w in workloads.items()}}
    timings = interleave(turns, rounds=args.repeats)
    block_tokens = BATCH_SIZE * config.seq_len
    rows = [
        {
            "train step": f"{size}, T = {T}, B = {B}",
            "pipeline / train step, tokens/s": Ratio(
                *(r * block_tokens / workloads[size].num_tokens for r in timings.ratio(size, "pipeline"))
            ),
            "pipeline, tokens/s": block_tokens / timings.median("pipeline"),
        }
        for size, T, B in sizes
    ]
    return harness.Table(f"Pipeline on one core, blocks of {config.seq_len} tokens", rows)


@contextlib.contextmanager
def _on_one_core() -> Iterator[None]:
    """Keeps this thread, and those it starts meanwhile for good, to one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _wait_row(name: str, config: ml_collections.ConfigDict, prepared: Prepared, repeats: int) -> dict[str, Any]:
    records = [last_record(config, prepared) for _ in range(repeats)]
    return {
        "run": name,
        "T": config.seq_len,
        "steps": config.num_steps,
        "waiting": Ratio.of(np.array([record["data_wait"] for record in records])),
        "step, ms": 1e3 * float(np.median([record["step_seconds"] for record in records])),
    }


def last_record(config: ml_collections.ConfigDict, prepared: Prepared) -> Mapping[str, float]:
    """What a run records of its steps from the second on, without evaluations and checkpoints on the way."""
    config.log.every = config.eval.every = config.checkpoint.every = config.num_steps
    config_lib.check(config)
    mesh = make_mesh(config)
    definition = define(ModelConfig.of(config.model))
    writer = _LastRecord()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        shardings = train.state_shardings(config, definition, mesh)
        train_loop(
            config,
            jax.jit(lambda: train.init_state(config, definition), out_shardings=shardings)(),
            _batches(config, prepared, config.global_batch_size),
            train.compile_step(config, definition, mesh),
            start=0,
            evaluators={},
            writer=writer,
            saver=_NoSaver(),
            guards=Guards(Monitor(config.numerics), Watchdog(**config.watchdog)),
            clock=Clock(),
            trace=Trace(pathlib.Path(folder), start=1, num_steps=0),
        )
    return writer.values


def _batches(config: ml_collections.ConfigDict, prepared: Prepared, batch_size: int) -> TrainBatches:
    on_mesh = sharding.batch_sharding(make_mesh(config))
    return TrainBatches(prepared, mixture(config), seed=0, batch_size=batch_size, sharding=on_mesh)


class _NoSaver:
    """A saver that saves nothing."""

    def save(self, step: int, state: train.TrainState, loss: float | None = None) -> None:
        """Does nothing."""

    def is_to_save_again(self) -> bool:
        """Never."""
        return False

    def finish(self) -> bool:
        """There is nothing to wait for."""
        return True

    def go_back(self) -> tuple[int, train.TrainState, dict[str, Any]]:
        """Is not asked for: spikes are not looked for."""
        raise AssertionError("the config of this benchmark has numerics.spike = 0")


class _LastRecord:
    """A writer that keeps the last record."""

    def __init__(self) -> None:
        self.values: Mapping[str, float] = {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps the values."""
        self.values = values

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Shows nothing."""

    def rewind(self, step: int) -> None:
        """Has nothing to forget."""

    def flush(self) -> None:
        """Has nothing to write."""


command = harness.main("data", __doc__, measure, repeats=5)

if __name__ == "__main__":
    harness.run(command)
