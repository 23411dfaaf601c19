"""The training step: against a step written out, over meshes, with accumulation, and the loop around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meap_jax import sharding, train
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.model.visibility import causal
from meap_jax.objective import Objective, make_inputs, named_keys
from meap_jax.optimizer import make_optimizer
from meap_jax.rows import Row
from tiny_runs import tiny_config

B, T, V = 8, 16, 64


def random_batch(seed=0, padding=True):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, V, (B, T + 1)).astype(np.int32)
    segment_ids = np.repeat(np.array([[1] * 9 + [2] * 8]), B, axis=0).astype(np.int32)
    if padding:
        segment_ids[::2, -4:] = 0
    return Row(tokens, segment_ids)


def on_mesh(mesh, batch):
    return jax.tree.map(functools.partial(sharding.put_whole, sharding.batch_sharding(mesh)), batch)


def initial(config, shardings=None):
    """A decoder and the state that training starts from."""
    definition = define(ModelConfig.of(config.model))
    return definition, jax.jit(lambda: train.init_state(config, definition), out_shardings=shardings)()


def run_steps(config, num_steps=3, devices=None):
    """Losses and final parameters of a few steps on a mesh."""
    mesh = sharding.make_mesh(config.mesh, devices)
    definition = define(ModelConfig.of(config.model))
    _, state = initial(config, train.state_shardings(config, definition, mesh))
    step, losses = train.compile_step(config, definition, mesh), []
    with jax.set_mesh(mesh):
        for i in range(num_steps):
            old, (state, metrics) = state, step(state, on_mesh(mesh, random_batch(i)))
            losses.append(float(metrics["loss"]))
            # The state was donated, and the new one has its sharding.
            assert old.params["head"].is_deleted()
            assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), old, state))
    return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def on_one_device():
    return run_steps(tiny_config(), devices=jax.devices()[:1])


def test_a_step_is_mask_forward_loss_gradient_update_as_written_out_here():
    config = tiny_config()
    (definition, state), batch = initial(config), random_batch()
    optimizer, objective = make_optimizer(config), Objective.of(config)

    inputs = jax.jit(lambda b: make_inputs(b, objective, named_keys(config), jnp.int32(0)))(batch)

    def mean_loss(params):
        logits = definition.apply(params, inputs.tokens, causal(inputs.tokens, inputs.segment_ids))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), inputs.targets[..., None], -1)[..., 0]
        return -(chosen * inputs.loss_weights).sum() / inputs.loss_weights.sum()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    updates, _ = jax.jit(optimizer.update)(grads, state.opt_state, state.params)
    expected = jax.tree.map(np.add, state.params, jax.device_get(updates))

    new_state, metrics = jax.jit(train.step_function(config, definition))(state, batch)
    assert int(new_state.step) == 1
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert metrics["mask_fraction"] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), new_state.params, expected)


@pytest.mark.parametrize(
    "num_devices, changes",
    [
        (8, {"mesh.data": 8}),
        (8, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}),
        (8, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 4}),  # 2 kv heads on 4 devices: replicated
        (8, {"mesh.data": 2, "mesh.tensor": 2, "mesh.context": 2}),
        (8, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.context": 2}),
        (8, {"mesh.data": 2, "mesh.context": 4}),
        (8, {"mesh.data": 1, "mesh.fsdp": -1}),
        (1, {"grad_accum_steps": 4}),  # Micro-batches differ in their padding.
        (2, {"grad_accum_steps": 4}),
    ],
    ids=str,
)
def test_losses_are_those_of_one_device_on_any_mesh_and_with_accumulation(num_devices, changes, on_one_device):
    losses, params = run_steps(tiny_config(**changes), devices=jax.devices()[:num_devices])
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-5)
    # Adam divides by the root of tiny second moments, so that a rounding difference can grow to some 1e-4 of a step.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-3), params, on_one_device[1])


@pytest.mark.parametrize("name", ["mir", "fcm", "dropout"])
def test_what_an_objective_draws_depends_on_neither_mesh_nor_micro_batches(name):
    mesh = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.context": 2, "grad_accum_steps": 2}
    losses, params = run_steps(tiny_config(**mesh, **{"objective.name": name}))
    expected = run_steps(tiny_config(**{"objective.name": name}), devices=jax.devices()[:1])
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-3), params, expected[1])


def test_two_runs_on_one_mesh_are_bit_equal():
    config = tiny_config(**{"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.context": 2})
    jax.tree.map(np.testing.assert_array_equal, run_steps(config), run_steps(config))


def test_a_traced_ratio_replaces_the_configs_and_compiles_once():
    config = tiny_config()
    (definition, state), batch = initial(config), random_batch(padding=False)
    step = jax.jit(train.step_function(config, definition))
    fractions = [float(step(state, batch, jnp.float32(r))[1]["mask_fraction"]) for r in (0.0, 0.25, 0.5)]
    assert step._cache_size() == 1
    # Segments of 9 and 7 inputs: floor(.25 * 9) + floor(.25 * 7) = 2 + 1 of 16, and 4 + 3 at one half.
    np.testing.assert_allclose(fractions, [0, 3 / 16, 7 / 16], rtol=1e-6)


@pytest.mark.parametrize("fields", [{"objective.mask_ratio": 0.0}, {"objective.masked_weight": 0.0}], ids=str)
def test_mir_that_masks_nothing_or_has_no_weight_takes_the_step_of_ntp_bit_for_bit(fields):
    (definition, state), batch = initial(tiny_config()), random_batch()
    steps = [
        jax.jit(train.step_function(tiny_config(**{"objective.name": name}, **own), definition))
        for name, own in (("ntp", {}), ("mir", fields))
    ]
    jax.tree.map(np.testing.assert_array_equal, *(step(state, batch) for step in steps))


def test_metrics_of_mir_are_about_clean_targets_and_masked_copies():
    (definition, state), batch = initial(tiny_config()), random_batch()
    (_, meap), (_, mir) = (
        jax.jit(train.step_function(tiny_config(**{"objective.name": name}), definition))(state, batch)
        for name in ("meap", "mir")
    )
    for metric in ("mask_fraction", "num_targets"):
        assert float(mir[metric]) == float(meap[metric]) > 0
    assert 1.3 < mir["loss"] / meap["loss"] < 1.5  # A loss of 1 and 0.4, and all are alike at first.


@pytest.mark.parametrize("mesh", [{"mesh.data": 8}, {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}], ids=str)
def test_the_step_holds_no_second_copy_of_the_state(mesh):
    config = tiny_config(**{"model.embed_dim": 64, "model.mlp_dim": 512}, **mesh)
    of_run = config, define(ModelConfig.of(config.model)), sharding.make_mesh(config.mesh)
    state, batch = train.abstract_inputs(*of_run)
    with jax.set_mesh(of_run[-1]):
        memory = train.compile_step(*of_run).lower(state, batch).compile().memory_analysis()
    bytes_of_state = sum(
        x.dtype.itemsize * np.prod(x.sharding.shard_shape(x.shape), dtype=int) for x in jax.tree.leaves(state)
    )
    assert memory.alias_size_in_bytes >= bytes_of_state
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < bytes_of_state / 20  # Metrics, and no more.


def test_moments_kept_in_bfloat16_take_half_the_memory_and_train_alike(on_one_device):
    config = tiny_config(**{"optimizer.moment_dtype": "bfloat16"})
    _, state = initial(config)
    dtypes = [x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert dtypes == [jnp.bfloat16] * 2 * len(jax.tree.leaves(state.params))
    losses, _ = run_steps(config, devices=jax.devices()[:1])
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-3)
    assert losses != on_one_device[0]


def test_the_loss_has_the_z_loss_of_the_config(on_one_device):
    losses, _ = run_steps(tiny_config(**{"loss.z_loss": 0.1}), 1, jax.devices()[:1])
    assert losses[0] > 1.1 * on_one_device[0][0]  # With 64 words log Z is above 3 at first.


def test_rows_of_one_segment_need_no_segment_ids():
    config = tiny_config(**{"data.mixture": "stdlib=1"})
    (definition, state), batch = initial(config), random_batch()
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    assert train.abstract_inputs(config, definition, mesh)[1].segment_ids is None
    step = jax.jit(train.step_function(config, definition))
    with_ids = step(state, batch._replace(segment_ids=np.ones_like(batch.segment_ids)))
    without = step(state, Row(batch.tokens))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), without, with_ids)
