"""How fast the data pipeline is, and how long training waits for it.

python -m experiments.benchmarks.data [--repeats=N] [--quick] [--json=FILE]

The pipeline is `TrainBatches` on one core, with blocks of the paper's length (4096) of the standard library's text in
mistral's 32,000 pieces, prepared on the spot; its tokens/s stand beside those that train steps take, timed in turns
with it. The wait is measured in real runs: the time that `train_loop` spends in `next(batches)`, as a share of the
run's time after the first step, which compiles.
"""

import argparse
import contextlib
import os
import tempfile
import time
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
from meap_jax.data.prepare import Prepared
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.run import open_data

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
        batches = TrainBatches(
            prepared,
            mixture(config),
            seed=0,
            batch_size=BATCH_SIZE,
            sharding=sharding.batch_sharding(make_mesh(config)),
        )
        next(batches)
    read = timed(lambda: next(batches), 4 if args.quick else 100)  # More than the few that lie ready.

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
    num_steps = config.num_steps
    runs = [waiting(config, prepared) for _ in range(repeats)]
    waits, totals = np.array(runs).T
    return {
        "run": name,
        "T": config.seq_len,
        "steps": num_steps,
        "share": Ratio.of(waits / totals),
        "wait a step, ms": 1e3 * float(np.median(waits)) / (num_steps - 1),
        "step, ms": 1e3 * float(np.median(totals)) / (num_steps - 1),
    }


def waiting(config: ml_collections.ConfigDict, prepared: Prepared) -> tuple[float, float]:
    """(seconds in next(batches), seconds in all) of a run without evaluations and checkpoints, from step 2 on."""
    config_lib.check(config)
    mesh = make_mesh(config)
    definition = define(ModelConfig.of(config.model))
    batches = _Clocked(
        TrainBatches(
            prepared,
            mixture(config),
            seed=0,
            batch_size=config.global_batch_size,
            sharding=sharding.batch_sharding(mesh),
        )
    )
    with jax.set_mesh(mesh):
        shardings = train.state_shardings(config, definition, mesh)
        state = jax.jit(lambda: train.init_state(config, definition), out_shardings=shardings)()
        state = train.train_loop(
            config,
            state,
            batches,
            train.compile_step(config, definition, mesh),
            start=0,
            evaluators={},
            writer=_Silent(),
            save=lambda step, state: None,
        )
        jax.block_until_ready(state)
    return batches.since_second(time.perf_counter())


class _Clocked(Iterator[train.Batch]):
    """Batches, with the time that each took to come."""

    def __init__(self, batches: Iterator[train.Batch]):
        self._batches = batches
        self._calls: list[tuple[float, float]] = []  # When asked for, when there.

    def __next__(self) -> train.Batch:
        asked = time.perf_counter()
        batch = next(self._batches)
        self._calls.append((asked, time.perf_counter()))
        return batch

    def since_second(self, end: float) -> tuple[float, float]:
        """(seconds of waiting, seconds in all) from the call of the second batch to `end`."""
        later = self._calls[1:]
        return sum(there - asked for asked, there in later), end - later[0][0]


class _Silent:
    """A writer that keeps nothing: the loop fetches its metrics all the same."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def flush(self) -> None:
        pass


command = harness.main("data", __doc__, measure, repeats=5)

if __name__ == "__main__":
    harness.run(command)
