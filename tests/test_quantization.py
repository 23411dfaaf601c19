"""Frozen weights in 4 bits: how near they are, how small, and that a step on them is one on what they stand for."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meap_jax import config as config_lib
from meap_jax import partition, sharding, train
from meap_jax.errors import ConfigError
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.quantization import KINDS, dequantize, is_quantized, quantize
from test_train import initial, on_mesh, random_batch
from tiny_runs import tiny_config

leaves = functools.partial(jax.tree.leaves, is_leaf=is_quantized)


def test_without_qwix_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match="frozen_dtype is int4 or nf4, which needs .* -r requirements-qlora.txt"):
        quantize(jnp.ones((1, 64, 2)), "nf4", 0)


# ------------------------------------------------------------------------------------------------------------ the codes


@pytest.mark.parametrize("kind, most, rms", [("int4", 1 / 15, 0.13), ("nf4", (1 - 0.6962) / 2, 0.11)])
@pytest.mark.parametrize(
    "shape, axis, tile", [((2, 128, 6), 0, 64), ((2, 3, 32, 5), 1, 32), ((1, 96, 4), 0, 32)], ids=str
)
def test_no_number_moves_further_than_half_the_widest_gap_between_codes(kind, most, rms, shape, axis, tile):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    quantized = jax.jit(quantize, static_argnums=(1, 2))(w, kind, axis)
    assert quantized.codes.shape == shape and quantized.codes.dtype == jnp.int4
    tiles = np.moveaxis(w, axis + 1, -1).reshape(-1, tile)
    found = np.moveaxis(np.asarray(dequantize(quantized)), axis + 1, -1).reshape(-1, tile)
    largest = np.abs(tiles).max(axis=1, keepdims=True)
    assert (np.abs(found - tiles) <= largest * most * (1 + 1e-4)).all()
    assert np.sqrt(np.square(found - tiles).mean()) < rms
    assert all(len(np.unique(row)) <= 16 for row in found)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_take_four_bits_and_a_scale_for_each_tile(kind):
    w = jnp.ones((2, 128, 4, 8))
    quantized = jax.jit(quantize, static_argnums=(1, 2))(w, kind, 0)
    # As XLA holds them; `nbytes` counts a byte for each int4.
    memory = jax.jit(dequantize).lower(quantized).compile().memory_analysis()
    assert 8 * memory.argument_size_in_bytes / w.size == 4 + 32 / 64


# ------------------------------------------------------------------------------------------------------------- the step


def adapting(kind, **changes):
    config = tiny_config(frozen_dtype=kind, **changes)
    config_lib.train_adapters(config, rank=4, alpha=8.0)
    return config


def step(config, state, devices=1):
    """One step from a state, on a mesh; the state is kept."""
    definition, mesh = define(ModelConfig.of(config.model)), sharding.make_mesh(config.mesh, jax.devices()[:devices])
    placed = jax.device_put(state, train.state_shardings(config, definition, mesh))
    with jax.set_mesh(mesh):
        return train.compile_step(config, definition, mesh)(placed, on_mesh(mesh, random_batch()))


@pytest.mark.parametrize(
    "kind, devices, mesh",
    [("int4", 1, {}), ("nf4", 8, {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "grad_accum_steps": 2})],
    ids=str,
)
def test_a_step_moves_adapters_as_on_the_weights_that_codes_stand_for(kind, devices, mesh):
    config = adapting(kind, **mesh)
    _, state = initial(config)
    state = jax.device_get(state)
    assert sum(map(is_quantized, leaves(state.params))) == 7
    after, metrics = step(config, state, devices)
    gate = after.params["layers"]["mlp"]["gate_proj"].codes
    assert gate.sharding.shard_shape(gate.shape) == ((2, 32, 48) if devices == 1 else (2, 32 // 4, 48 // 2))
    (trained, frozen), (_, before) = (partition.split(tree.params, "*lora*") for tree in (after, state))
    jax.tree.map(np.testing.assert_array_equal, frozen, before)

    plain = state._replace(params=jax.device_get(jax.jit(lambda p: partition.cast(p, "float32"))(state.params)))
    expected, plain_metrics = step(adapting("float32"), plain)
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], plain_metrics["grad_norm"], rtol=1e-4)
    bs = (partition.split(tree, "*_lora_b")[0] for tree in (trained, expected.params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4), *bs)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_copy_of_the_weights_of_all_layers_is_ever_made(remat):
    config = adapting("nf4", **{"model.remat": remat})
    definition, state = initial(config)
    program = str(jax.make_jaxpr(train.step_function(config, definition))(state, random_batch()))
    assert "i4[2,32,48]" in program and "f32[32,48]" in program  # Codes of both layers, numbers of one.
    assert "f32[2,32,48]" not in program
