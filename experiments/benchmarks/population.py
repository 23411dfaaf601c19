"""What it saves to train small models side by side, a core each, and with their layers unrolled.

python -m experiments.benchmarks.population [--repeats=N] [--quick] [--json=FILE]

As many models as there are cores take a turn of 25 steps of `experiments.population`: each on a core of its own at the
same time, or one after the other with all cores each. The model is the quickstart's, and so are its batches.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from configs import quickstart
from experiments.benchmarks import harness
from experiments.benchmarks.timing import interleave, timed
from experiments.benchmarks.workload import random_tokens
from experiments.population import Treatment, compile_turn, population_mesh, use_all_cores
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.rows import Row
from meap_jax.train import init_state

STEPS = 25


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The table of this benchmark."""
    use_all_cores()
    config = quickstart.get_config()
    if args.quick:
        config.global_batch_size, config.seq_len, config.model.vocab_size = 2, 32, 64
    steps = 2 if args.quick else STEPS
    num = min(len(jax.devices()), 2 if args.quick else 64)
    turns = {
        "side by side": _turns(config, num, 1, steps),
        "one after the other": _turns(config, 1, num, steps),
        "scanned": _turns(_scanned(config), num, 1, steps),
    }
    timings = interleave({name: timed(turn) for name, turn in turns.items()}, rounds=args.repeats)
    row = {
        "models": num,
        "side by side / one after the other": timings.ratio("side by side", "one after the other"),
        "unrolled / scanned": timings.ratio("side by side", "scanned"),
        "a step of a model, ms": 1e3 * timings.median("side by side") / steps / num,
    }
    return [harness.Table("A turn of small models, seconds", [row])]


def _scanned(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    scanned = ml_collections.ConfigDict(config.to_dict())
    scanned.model.unroll = 1
    return scanned


def _turns(config: ml_collections.ConfigDict, num_devices: int, calls: int, steps: int) -> Callable[[], Any]:
    """What trains a model on each of so many devices, so many times, each time with the states of the time before."""
    definition = define(ModelConfig.of(config.model, "cpu"))
    mesh = population_mesh(num_devices, jax.devices())
    turn = compile_turn(config, definition, mesh)
    tokens = random_tokens(config)
    row = Row(tokens, np.ones_like(tokens))

    def of_models(x: Any) -> np.ndarray:
        return np.stack([np.asarray(x)] * num_devices)

    batches = jax.tree.map(lambda x: of_models(np.stack([x] * steps)), row)
    treatments = Treatment(of_models(np.zeros(steps, np.float32)), of_models(np.int32(0)))
    states = jax.tree.map(of_models, jax.device_get(init_state(config, definition)))

    def call() -> Any:
        nonlocal states
        for _ in range(calls):
            states, measured, _ = turn(states, treatments, batches, {})
        return measured

    return call


command = harness.main("population", __doc__, measure, repeats=15)

if __name__ == "__main__":
    harness.run(command)
