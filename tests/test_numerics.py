"""Numbers that can't be right: steps that are skipped, steps that come out otherwise, copies that differ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meap_jax import sharding, train
from meap_jax.errors import Diverged
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.numerics import Monitor, NotDeterministic, check_replicas, taken_twice
from meap_jax.rows import Row
from tiny_models import mesh_of
from tiny_runs import tiny_config


@functools.cache
def programs(**overrides):
    """(step function, a function that makes its first state, mesh) of a tiny config on one device."""
    config = tiny_config(**{"optimizer.warmup_fraction": 0.0} | overrides)
    definition = define(ModelConfig.of(config.model))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    return train.compile_step(config, definition, mesh), jax.jit(lambda: train.init_state(config, definition)), mesh


def begun(**overrides):
    """(step function, state, batch) of a tiny config on one device."""
    step, init, mesh = programs(**overrides)
    tokens = np.random.default_rng(0).integers(4, 64, (8, 17)).astype(np.int32)
    batch = sharding.put_whole(sharding.batch_sharding(mesh), tokens)
    return step, init(), Row(batch, jnp.ones_like(batch))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("overrides", [{}, {"grad_accum_steps": 2}], ids=str)
def test_a_step_whose_loss_is_not_finite_changes_nothing_but_its_number(overrides):
    step, state, batch = begun(**overrides)
    broken = state._replace(params={**state.params, "head": state.params["head"].at[0, 0].set(jnp.nan)})
    before = bits((broken.params, broken.opt_state, broken.keys))
    after, metrics = step(broken, batch)
    assert np.isnan(metrics["loss"]) and metrics["update_norm"] == 0
    assert int(after.step) == 1 and bits((after.params, after.opt_state, after.keys)) == before


def test_a_step_whose_gradient_alone_is_not_finite_changes_nothing_but_its_number():
    step, state, batch = begun(**{"loss.z_loss": 1e38})
    before = bits((state.params, state.opt_state))
    after, metrics = step(state, batch)
    assert not np.isfinite(metrics["grad_norm"])
    assert bits((after.params, after.opt_state)) == before


def test_a_finite_step_is_taken_in_full():
    step, state, batch = begun()
    before = bits(state.params)
    after, metrics = step(state, batch)
    assert metrics["update_norm"] > 0 and bits(after.params) != before


def test_what_a_monitor_remembers_lets_another_judge_alike():
    settings = tiny_config(**{"numerics.spike": 8.0, "numerics.max_rewinds": 2}).numerics
    losses = np.r_[np.linspace(3, 2, 30), 9, np.linspace(2, 1.9, 10), 8]
    whole, halves, seen = Monitor(settings), Monitor(settings), ([], [])
    for i, loss in enumerate(losses):
        halves = Monitor(settings, halves.get_state())
        for monitor, judged in zip((whole, halves), seen, strict=True):
            judged.append(monitor.judge(i + 1, {"loss": loss, "grad_norm": 1.0}, lambda: "rows"))
    assert seen[0] == seen[1] and [i for i, is_spike in enumerate(seen[0]) if is_spike] == [30, 41]


def test_a_step_that_comes_out_alike_is_taken_once():
    step, state, batch = begun()
    expected = bits(step(jax.tree.map(jnp.copy, state), batch))
    assert bits(taken_twice(step)(state, batch)) == expected


def test_a_step_that_comes_out_otherwise_is_found_and_named():
    step, state, batch = begun()
    calls = []

    def fickle(state, batch):
        calls.append(1)
        state, metrics = step(state, batch)
        if len(calls) == 4:  # The second time of the second step.
            head = state.params["head"]
            state = state._replace(params=state.params | {"head": head.at[3, 5].set(jnp.nextafter(head[3, 5], 9))})
        return state, metrics

    state, _ = taken_twice(fickle)(state, batch)
    with pytest.raises(NotDeterministic, match="step 2 came out otherwise when it was repeated: state"):
        taken_twice(fickle)(state, batch)


def test_copies_of_parameters_that_differ_stop_the_run_with_device_and_host():
    mesh = mesh_of(data=8)
    everywhere = NamedSharding(mesh, PartitionSpec())
    good = jax.device_put(jnp.ones((4, 4)), everywhere)
    check_replicas(7, {"w": good}, mesh)
    ones = [jnp.ones((4, 4)).at[0, 0].add(1e-6 * (i == 3)) for i in range(8)]
    copies = [jax.device_put(x, device) for x, device in zip(ones, mesh.devices.flat, strict=True)]
    bad = jax.make_array_from_single_device_arrays((4, 4), everywhere, copies)
    device = list(mesh.devices.flat)[3].id
    with pytest.raises(Diverged, match=rf"after step 8 the copies of w differ .* \(device {device} of host 0\)"):
        check_replicas(8, {"w": bad, "v": good}, mesh)
