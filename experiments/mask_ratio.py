"""Trains every mask ratio with every seed in one compiled program, and compares each ratio with 0.

python -m experiments.mask_ratio --config=configs/quickstart.py --workdir=runs/mask_ratio
    [--ratios=0,.05,.1,.15,.2] [--seeds=3] [--config.field=value ...]

A member of the population is one (ratio, seed), and sees what `meap_jax.main` with them sees. Members of one seed share
initial weights, data order and mask keys, so that ratios are paired within a seed.

Members take turns (`jax.lax.map`), each bit-equal to the same model trained alone with `train_step`. Seconds for 15
members of 2 layers on 2 busy CPU cores with jax 0.12 (November 2026, medians of 5 to 7 interleaved rounds):

| width, rows x tokens, steps a call | lax.map | vmap | Python loop |
| ---------------------------------- | ------- | ---- | ----------- |
| 64, 32 x 128, 2                    | 5.77    | 7.59 | 9.26        |
| 32, 8 x 64, 5                      | 0.84    | 0.93 | 1.04        |
| 16, 2 x 32, 20                     | 0.27    | 0.23 | 0.66        |

vmap wins only at a size that no config has, and its losses are 5e-7 off from the first step on: it is not offered.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure

from meap_jax import cli, sharding
from meap_jax.config import ConfigError, mixture, seed_of
from meap_jax.data.pipeline import global_sequence
from meap_jax.evals import make_evaluators
from meap_jax.evals.statistics import paired_t_interval
from meap_jax.run import Run, imported_params, make_folder, open_run, versions
from meap_jax.train import Batch, Diverged, TrainState, init_state, state_of_params, state_shardings, step_function

MOST_STEPS_A_CALL = 50

_log = logging.getLogger("meap_jax.experiments.mask_ratio")  # Not __name__, which is __main__ here.


class Population(NamedTuple):
    """All members, ratio by ratio; P = ratios x seeds."""

    state: TrainState  # Every array with a leading [P].
    ratio: jax.Array  # [P] float32.
    seed_index: jax.Array  # [P] int32: whose of the S batches of a step are the member's.


def compile_steps(run: Run, population: Population) -> Callable[[Population, Batch], tuple[Population, jax.Array]]:
    """(population, batches [steps, S, B, T + 1]) -> (population, losses [P, steps]), jitted."""
    step_fn = step_function(run.config, run.definition)

    def steps(population: Population, batches: Batch) -> tuple[Population, jax.Array]:
        def train_member(member: Population) -> tuple[TrainState, jax.Array]:
            def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
                state, metrics = step_fn(state, batch, member.ratio)
                return state, metrics["loss"]

            own = jax.tree.map(lambda x: x[:, member.seed_index], batches)
            return jax.lax.scan(step, member.state, own)

        state, losses = jax.lax.map(train_member, population)
        return population._replace(state=state), losses

    lies = jax.tree.map(lambda x: x.sharding, population)
    return jax.jit(steps, out_shardings=(lies, sharding.replicated(run.mesh)), donate_argnums=0)


def seed_configs(config: ml_collections.ConfigDict, num: int) -> list[ml_collections.ConfigDict]:
    """The config of each seed from `config.seed` on; what `seeds.*` sets alone is theirs in common."""
    configs = [ml_collections.ConfigDict(config.to_dict()) for _ in range(num)]
    for i, own in enumerate(configs):
        own.seed = config.seed + i
    return configs


def init_population(run: Run, ratios: Sequence[float], num_seeds: int) -> Population:
    """Step 0 of every member."""
    single = state_shardings(run.config, run.definition, run.mesh)
    configs = seed_configs(run.config, num_seeds)
    if run.config.init_from is None:
        states = [jax.jit(lambda c=c: init_state(c, run.definition), out_shardings=single)() for c in configs]
    else:
        params = imported_params(run)
        states = [jax.jit(lambda p, c=c: state_of_params(c, p), out_shardings=single)(params) for c in configs]
    lies = jax.tree.map(lambda s: NamedSharding(run.mesh, PartitionSpec(None, *s.spec)), single)
    stack = lambda states: jax.tree.map(lambda *x: jnp.stack(x * len(ratios)), *states)  # noqa: E731
    everywhere = sharding.replicated(run.mesh)
    return Population(
        jax.jit(stack, out_shardings=lies)(states),
        sharding.put_whole(everywhere, np.repeat(np.asarray(ratios, np.float32), num_seeds)),
        sharding.put_whole(everywhere, np.tile(np.arange(num_seeds, dtype=np.int32), len(ratios))),
    )


def population_batches(run: Run, num_seeds: int, steps: int) -> Iterator[Batch]:
    """What every seed sees in the next `steps` steps, without end: [steps, S, B, T + 1] int32."""
    sequences = [
        global_sequence(run.prepared, mixture(config), seed_of(config, "data"))
        .batch(config.global_batch_size)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=steps))
        for config in seed_configs(run.config, num_seeds)
    ]
    lies = NamedSharding(run.mesh, PartitionSpec(None, None, *sharding.batch_sharding(run.mesh).spec))
    seeds_of_steps = zip(*sequences, strict=True)
    while True:
        batches = [batch for _ in range(steps) for batch in next(seeds_of_steps)]
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        shape = (steps, num_seeds, *stacked["tokens"].shape[1:])
        yield {name: sharding.put_whole(lies, rows.reshape(shape)) for name, rows in stacked.items()}


def train(run: Run, ratios: Sequence[float], num_seeds: int) -> Population:
    """Trains every member to `config.num_steps`.

    Raises:
      Diverged: naming the first member with a loss that is not finite.
    """
    num_steps = run.config.num_steps
    steps = max(n for n in range(1, MOST_STEPS_A_CALL + 1) if num_steps % n == 0)
    population = init_population(run, ratios, num_seeds)
    batches = population_batches(run, num_seeds, steps)
    _log.info("%d ratios x %d seeds, %d steps each", len(ratios), num_seeds, num_steps)

    began = time.perf_counter()
    with jax.set_mesh(run.mesh):
        program = compile_steps(run, population)
        for done in range(steps, num_steps + 1, steps):
            population, losses = program(population, next(batches))
            losses_PxS = jax.device_get(losses)
            for member in np.flatnonzero(~np.isfinite(losses_PxS).all(axis=1)):
                ratio, seed = ratios[member // num_seeds], run.config.seed + member % num_seeds
                raise Diverged(
                    f"the loss of ratio {ratio:g} with seed {seed} is not finite by step {done}: "
                    "try a lower optimizer.learning_rate or a longer warm-up."
                )
            seconds_left = (time.perf_counter() - began) / done * (num_steps - done)
            low, high = losses_PxS[:, -1].min(), losses_PxS[:, -1].max()
            _log.info("step %d/%d  loss %.4f to %.4f  %.0f s left", done, num_steps, low, high, seconds_left)
    return population


def measure(run: Run, population: Population) -> dict[str, np.ndarray]:
    """Every metric on validation rows, on clean inputs: {"validation_retrieval/loss": [P], ...}."""
    evaluators = make_evaluators(run.config, run.definition, run.prepared, run.mesh, "validation")
    values: dict[str, list[float]] = {}
    with jax.set_mesh(run.mesh):
        for i in range(len(population.ratio)):
            params = jax.tree.map(lambda x, i=i: x[i], population.state.params)
            for name, evaluator in evaluators.items():
                for key, value in evaluator.run(params):
                    if key != "masked_loss":
                        values.setdefault(f"{name}/{key}", []).append(value)
    return {name: np.array(of_members) for name, of_members in values.items()}


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


def parse_ratios(text: str) -> tuple[float, ...]:
    """Reads "0,.05,.1"; all others are compared with ratio 0.

    Raises:
      ConfigError: for anything but distinct shares with 0 among them.
    """
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        ratios = ()
    if 0 not in ratios or not all(0 <= r <= 1 for r in ratios) or len(set(ratios)) < len(ratios):
        raise ConfigError(f"--ratios is {text!r}, but must be distinct numbers in [0, 1], 0 among them: 0,.1,.2.")
    return ratios


def command(argv: list[str]) -> None:
    """The door."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ratios", nargs="?", const="", default="0,.05,.1,.15,.2")
    parser.add_argument("--seeds", nargs="?", const="", default="3")
    args, rest = parser.parse_known_args(argv[1:])
    ratios = parse_ratios(args.ratios)
    if not args.seeds.isdecimal() or int(args.seeds) < 2:
        raise ConfigError(f"--seeds is {args.seeds!r}, but must be a number from 2 on: one seed has no spread.")
    config, workdir = cli.parse_config([argv[0], "--workdir=runs/mask_ratio", *rest])

    make_folder("workdir", workdir)
    run = open_run(config, workdir)
    measured = measure(run, train(run, ratios, int(args.seeds)))
    metrics = {name: summarize(values, ratios) for name, values in measured.items()}
    setting = {"config": config.to_dict(), "fingerprint": run.prepared.fingerprint, "versions": versions()}
    (workdir / "mask_ratio.json").write_text(json.dumps({"metrics": metrics, "setting": setting}, indent=1))
    plot(workdir / "mask_ratio.png", metrics)
    print("\n\n".join(table(name, rows) for name, rows in metrics.items()))


if __name__ == "__main__":
    cli.run_command(command)
