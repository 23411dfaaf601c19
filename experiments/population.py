"""Many small models, each with its own mask ratio and seed, trained by one compiled program over all devices.

A member of the population is one (ratio, seed), and sees what `meap_jax.main` with them sees on one device. Members of
one seed share initial weights, data order and mask keys, so that ratios are paired within a seed.

Every array has a leading [P] that is sharded over the one axis of the mesh, `population`: a member is whole on its
device, and devices exchange nothing. Members of one device take turns (`jax.lax.map`). Each comes out bit-equal to the
same model trained alone with `train_step` on one device, as tests show on CPU; XLA promises it for no backend, since it
compiles a program for several devices by other passes than one for one.

Seconds for 15 members of 2 layers on one device, 2 busy CPU cores with jax 0.12, and in brackets the median of the
ratio to lax.map (24 November 2026, 5 to 7 interleaved rounds):

| width, rows x tokens, steps a call | lax.map | vmap        | Python loop |
| ---------------------------------- | ------- | ----------- | ----------- |
| 64, 8 x 240, 1 (the quickstart)    | 0.60    | 0.79 (1.21) | 0.63 (0.99) |
| 32, 8 x 64, 5                      | 0.50    | 0.64 (1.28) | 0.52 (0.96) |
| 16, 2 x 32, 20                     | 0.24    | 0.21 (0.85) | 0.34 (1.43) |

vmap wins only at a size that no config has, and its losses are 1e-6 off from the first step on: it is not offered.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from meap_jax import sharding
from meap_jax.config import mixture, seed_of
from meap_jax.data.pipeline import global_sequence
from meap_jax.errors import ConfigError
from meap_jax.rows import Row, stacked
from meap_jax.run import Run
from meap_jax.start import imported_params
from meap_jax.train import Diverged, TrainState, init_state, state_of_params, step_function

AXIS = "population"
MOST_STEPS_A_CALL = 50

_log = logging.getLogger("meap_jax.experiments.population")


class Population(NamedTuple):
    """All members, ratio by ratio; P = ratios x seeds, and more where the mesh does not divide that."""

    state: TrainState  # Every array with a leading [P].
    ratio: jax.Array  # [P] float32.
    seed_index: jax.Array  # [P] int32: whose of the S batches of a step are the member's.


def check_mesh(config: ml_collections.ConfigDict) -> None:
    """Stops a config that would split a model: the population takes all devices.

    Raises:
      ConfigError: naming the axis of the mesh.
    """
    for axis, size in config.mesh.items():
        if size not in (1, -1):
            raise ConfigError(
                f"mesh.{axis} is {size}, but must be 1 or -1: the members of a population share out the devices, and "
                "each is whole on one."
            )


def population_mesh(num_members: int, devices: Sequence[jax.Device]) -> Mesh:
    """The fewest devices on which the members need no more turns than on all of them, along the axis `population`."""
    turns = math.ceil(num_members / len(devices))
    used = math.ceil(num_members / turns)
    return Mesh(np.array(devices[:used]), (AXIS,), axis_types=(AxisType.Auto,))


def compile_steps(run: Run, mesh: Mesh) -> Callable[[Population, Row], tuple[Population, jax.Array]]:
    """(population, batches [steps, S, B, T + 1]) -> (population, losses [P, steps]), jitted for `population_mesh`."""
    step_fn = step_function(run.config, run.definition)

    def on_device(population: Population, batches: Row) -> tuple[Population, jax.Array]:
        def train_member(member: Population) -> tuple[TrainState, jax.Array]:
            def step(state: TrainState, batch: Row) -> tuple[TrainState, jax.Array]:
                state, metrics = step_fn(state, batch, member.ratio)
                return state, metrics["loss"]

            own = jax.tree.map(lambda x: x[:, member.seed_index], batches)
            return jax.lax.scan(step, member.state, own)

        state, losses = jax.lax.map(train_member, population)
        return population._replace(state=state), losses

    members, everywhere = PartitionSpec(AXIS), PartitionSpec()
    # The model finds no axis in this mesh that it knows, so attention and loss take the path of a single device.
    sharded = jax.shard_map(
        on_device, mesh=mesh, in_specs=(members, everywhere), out_specs=(members, members), check_vma=False
    )
    return jax.jit(sharded, donate_argnums=0)


def seed_configs(config: ml_collections.ConfigDict, num: int) -> list[ml_collections.ConfigDict]:
    """The config of each seed from `config.seed` on; what `seeds.*` sets alone is theirs in common."""
    configs = [ml_collections.ConfigDict(config.to_dict()) for _ in range(num)]
    for i, own in enumerate(configs):
        own.seed = config.seed + i
    return configs


def init_population(run: Run, ratios: Sequence[float], num_seeds: int, mesh: Mesh) -> Population:
    """Step 0 of every member, and of copies of the last one where the mesh does not divide their number."""
    ratio = np.repeat(np.asarray(ratios, np.float32), num_seeds)
    seed_index = np.tile(np.arange(num_seeds, dtype=np.int32), len(ratios))
    copies = (0, -len(ratio) % mesh.size)
    ratio, seed_index = np.pad(ratio, copies, mode="edge"), np.pad(seed_index, copies, mode="edge")

    configs = seed_configs(run.config, num_seeds)
    if run.config.init_from is None:
        states = [jax.jit(lambda c=c: init_state(c, run.definition))() for c in configs]
    else:
        params, _ = imported_params(run)
        states = [jax.jit(lambda p, c=c: state_of_params(c, p))(params) for c in configs]

    over_members = NamedSharding(mesh, PartitionSpec(AXIS))

    def of_members(*of_seeds: np.ndarray) -> jax.Array:
        shape = (len(seed_index), *of_seeds[0].shape)
        return sharding.put(over_members, shape, lambda index: np.stack([of_seeds[i] for i in seed_index[index[0]]]))

    state = jax.tree.map(of_members, *jax.device_get(states))
    return Population(state, sharding.put_whole(over_members, ratio), sharding.put_whole(over_members, seed_index))


def population_batches(run: Run, num_seeds: int, steps: int, mesh: Mesh) -> Iterator[Row]:
    """What every seed sees in the next `steps` steps, on every device, without end: [steps, S, B, T + 1] int32."""
    sequences = [
        global_sequence(run.prepared, mixture(config), seed_of(config, "data"))
        .batch(config.global_batch_size)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=steps))
        for config in seed_configs(run.config, num_seeds)
    ]
    seeds_of_steps = zip(*sequences, strict=True)
    while True:
        batches = [batch for _ in range(steps) for batch in next(seeds_of_steps)]
        shape = (steps, num_seeds, *batches[0].tokens.shape)
        yield jax.tree.map(
            lambda x, shape=shape: sharding.put_whole(sharding.replicated(mesh), x.reshape(shape)), stacked(batches)
        )


def train(run: Run, ratios: Sequence[float], num_seeds: int) -> TrainState:
    """Trains every member to `config.num_steps`.

    Returns:
      The last state of all members as host arrays, with a leading [ratios x seeds], ratio by ratio.

    Raises:
      Diverged: naming the first member with a loss that is not finite.
    """
    num_steps, num_members = run.config.num_steps, len(ratios) * num_seeds
    steps = max(n for n in range(1, MOST_STEPS_A_CALL + 1) if num_steps % n == 0)
    mesh = population_mesh(num_members, jax.devices())
    population = init_population(run, ratios, num_seeds, mesh)
    batches = population_batches(run, num_seeds, steps, mesh)
    program = compile_steps(run, mesh)
    _log.info("%d ratios x %d seeds, %d steps each, on %d devices", len(ratios), num_seeds, num_steps, mesh.size)

    began = time.perf_counter()
    for done in range(steps, num_steps + 1, steps):
        population, losses = program(population, next(batches))
        losses_PxS = jax.device_get(losses)[:num_members]
        for member in np.flatnonzero(~np.isfinite(losses_PxS).all(axis=1)):
            ratio, seed = ratios[member // num_seeds], run.config.seed + member % num_seeds
            raise Diverged(
                f"the loss of ratio {ratio:g} with seed {seed} is not finite by step {done}: "
                "try a lower optimizer.learning_rate or a longer warm-up."
            )
        seconds_left = (time.perf_counter() - began) / done * (num_steps - done)
        low, high = losses_PxS[:, -1].min(), losses_PxS[:, -1].max()
        _log.info("step %d/%d  loss %.4f to %.4f  %.0f s left", done, num_steps, low, high, seconds_left)
    return jax.tree.map(lambda x: x[:num_members], jax.device_get(population.state))
