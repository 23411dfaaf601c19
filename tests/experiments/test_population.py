"""A population in one program over the devices: each member as if alone, one trace for all, no communication."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_runs
from experiments import mask_ratio, population
from meap_jax import cli, sharding, train
from meap_jax.config import mixture
from meap_jax.data.pipeline import TrainBatches
from meap_jax.run import Run, open_run
from tiny_models import mesh_of

RATIOS = (0.0, 0.05, 0.15, 0.5)
NUM_SEEDS = 2
NUM_STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    flags = tiny_runs.flags(tmp_path_factory.mktemp("population"), num_steps=NUM_STEPS)
    config, workdir = cli.parse_config(["mask_ratio", *flags])
    return open_run(config, workdir, mask_ratio.evaluation_mesh(config, jax.devices()))


@pytest.fixture(scope="module")
def alone(run) -> list[train.TrainState]:
    """Every member trained by itself on one device, with the step, start and batches that `meap_jax.main` gives it."""
    mesh = mesh_of()

    def trained(step, config):
        shardings = train.state_shardings(config, run.definition, mesh)
        state = jax.jit(lambda: train.init_state(config, run.definition), out_shardings=shardings)()
        setting = dict(batch_size=config.global_batch_size, sharding=sharding.batch_sharding(mesh))
        batches = TrainBatches(run.prepared, mixture(config), seed=config.seed, **setting)
        for _ in range(NUM_STEPS):
            state, _ = step(state, next(batches))
        return jax.device_get(state)

    states = []
    with jax.set_mesh(mesh):
        for ratio in RATIOS:
            seeds = population.seed_configs(run.config, NUM_SEEDS)
            seeds[0].objective.mask_ratio = ratio
            step = train.compile_step(seeds[0], run.definition, mesh)
            states += [trained(step, config) for config in seeds]
    return states


def use_devices(monkeypatch, num):
    """Lets the population have `num` of the devices; returns the meshes that it makes of them."""
    meshes, real = [], population.population_mesh

    def of_some(num_members, devices):
        meshes.append(real(num_members, devices[:num]))
        return meshes[-1]

    monkeypatch.setattr(population, "population_mesh", of_some)
    return meshes


@pytest.mark.parametrize("num_devices", [1, 3, 8])  # 8 members: 8 turns; 3 turns with a copy; one member a device.
def test_every_member_is_bit_equal_to_the_model_trained_alone_and_all_share_one_trace(
    run, alone, num_devices, monkeypatch
):
    step = mock.Mock(side_effect=train.step_function(run.config, run.definition))
    monkeypatch.setattr(population, "step_function", lambda *_: step)
    monkeypatch.setattr(population, "MOST_STEPS_A_CALL", 2)  # Two calls of two steps.
    meshes = use_devices(monkeypatch, num_devices)
    states = population.train(run, RATIOS, NUM_SEEDS)

    assert [mesh.size for mesh in meshes] == [num_devices]
    jax.tree.map(lambda together, *single: np.testing.assert_array_equal(together, np.stack(single)), states, *alone)
    kernels = jax.tree.leaves(states.params)[0]
    assert len(np.unique(kernels.reshape(len(kernels), -1), axis=0)) == len(RATIOS) * NUM_SEEDS
    assert step.call_count == 1


def test_every_device_holds_its_own_members_and_no_device_sends_anything_to_another(run):
    mesh = population.population_mesh(len(RATIOS) * NUM_SEEDS, jax.devices())
    members = population.init_population(run, RATIOS, NUM_SEEDS, mesh)
    batches = next(population.population_batches(run, NUM_SEEDS, 2, mesh))
    program = population.compile_steps(run, mesh).lower(members, batches).compile()

    text = program.as_text()
    assert "num_partitions=8" in text
    collectives = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    assert not re.findall(rf"({collectives})[-a-z]*\(", text)
    trained, losses = program(members, batches)
    for array in jax.tree.leaves((trained, losses)):
        assert array.sharding.shard_shape(array.shape)[0] == 1


@pytest.mark.parametrize(
    "num_members, num_devices, used, turns", [(15, 8, 8, 2), (9, 8, 5, 2), (6, 8, 6, 1), (15, 1, 1, 15), (16, 8, 8, 2)]
)
def test_no_device_is_used_that_saves_no_turn(num_members, num_devices, used, turns):
    mesh = population.population_mesh(num_members, jax.devices()[:num_devices])
    assert (mesh.size, -(-num_members // mesh.size)) == (used, turns)


def test_members_that_fill_up_the_mesh_are_copies_of_the_last(run):
    mesh = population.population_mesh(8, jax.devices()[:3])
    members = population.init_population(run, RATIOS, NUM_SEEDS, mesh)
    np.testing.assert_array_equal(members.seed_index, [0, 1, 0, 1, 0, 1, 0, 1, 1])
    np.testing.assert_array_equal(members.ratio, np.float32([0, 0, 0.05, 0.05, 0.15, 0.15, 0.5, 0.5, 0.5]))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[7], x[8]), members.state)


def test_a_population_starts_where_init_from_says(run, tmp_path, monkeypatch):
    everywhere = sharding.replicated(run.mesh)  # As restored: committed to the devices of the run.
    shapes = run.definition.shapes()
    params = jax.tree.map(lambda x: sharding.put_whole(everywhere, np.full(x.shape, 0.5, x.dtype)), shapes)
    monkeypatch.setattr(population, "imported_params", lambda run: (params, {}))
    config = population.seed_configs(run.config, 1)[0]
    config.init_from = str(tmp_path)
    mesh = population.population_mesh(8, jax.devices())
    members = population.init_population(run._replace(config=config), RATIOS, NUM_SEEDS, mesh)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.full_like(x, 0.5)), members.state.params)
    keys = np.asarray(members.state.keys["mask"])
    assert (keys[0] == keys[2]).all() and (keys[0] != keys[1]).any()


@pytest.mark.parametrize("num_devices", [3, 8])
def test_a_loss_that_is_not_finite_stops_the_sweep_and_names_the_member(run, num_devices, monkeypatch):
    def diverging(state, batch, ratio):
        loss = jnp.where((ratio > 0.4) & (state.step >= 1), jnp.nan, 1.0)
        return state._replace(step=state.step + 1), {"loss": loss}

    use_devices(monkeypatch, num_devices)
    monkeypatch.setattr(population, "step_function", lambda *_: diverging)
    with pytest.raises(train.Diverged, match="ratio 0.5 with seed 0 is not finite by step 4"):
        population.train(run, RATIOS, NUM_SEEDS)
