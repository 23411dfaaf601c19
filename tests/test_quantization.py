"""Frozen weights in 4 bits: how near they are, how small, and that a step on them is one on what they stand for."""

import functools
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from hub_folders import read_tensors
from meap_jax import config as config_lib
from meap_jax import main, partition, sharding, train
from meap_jax.convert import export_model
from meap_jax.decoding import decoding_params
from meap_jax.errors import ConfigError
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.models import open_model
from meap_jax.quantization import KINDS, dequantize, is_quantized, quantize
from test_train import initial, on_mesh, random_batch
from tiny_runs import flags, losses, tiny_config

leaves = functools.partial(jax.tree.leaves, is_leaf=is_quantized)


def test_without_qwix_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match="frozen_dtype is int4 or nf4, which needs .* -r requirements-qlora.txt"):
        quantize(jnp.ones((1, 64, 2)), "nf4", 0)


@pytest.fixture(autouse=True)
def needs_qwix(request):
    if "without_qwix" not in request.node.name:
        pytest.importorskip("qwix", reason="needs qwix: pip install -r requirements-qlora.txt")


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


# -------------------------------------------------------------------------------------------------------------- in runs


def run_training(workdir, folder, **changes):
    fields = {"eval__tasks": "", "num_steps": 4, "data__prepared": folder / "data", **changes}
    main.command(["main", *flags(workdir, **fields)])


QLORA = dict(model__lora__rank=4, trainable="*lora*", frozen_dtype="nf4", optimizer__learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the run `base`, and the run `adapted`, which trains adapters on it in 4 bits."""
    pytest.importorskip("qwix", reason="needs qwix: pip install -r requirements-qlora.txt")
    folder = tmp_path_factory.mktemp("quantized")
    run_training(folder / "base", folder, num_steps=2)
    run_training(folder / "adapted", folder, init_from=folder / "base", **QLORA)
    return folder


def test_a_run_keeps_the_base_in_4_bits_and_opens_as_what_they_stand_for(folder):
    base, opened = (open_model(epath.Path(folder / name)) for name in ("base", "adapted"))
    expected = jax.jit(lambda p: partition.cast(partition.cast(p, "nf4"), "float32"))(base.params)
    jax.tree.map(np.testing.assert_array_equal, partition.split(opened.params, "*lora*")[1], expected)
    assert all(x.any() for x in leaves(partition.split(opened.params, "*lora*")[0]))


def test_a_run_in_4_bits_goes_on_bit_for_bit_and_starts_another(folder, tmp_path):
    shutil.copytree(folder / "adapted", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    run_training(tmp_path / "again", folder, init_from=folder / "base", **QLORA)
    assert losses(tmp_path / "again") == losses(folder / "adapted")
    changes = QLORA | dict(optimizer__learning_rate=1e-30, frozen_dtype="float32", num_steps=1)
    run_training(tmp_path / "whole", folder, init_from=folder / "adapted", **changes)
    params = (open_model(epath.Path(name)).params for name in (tmp_path / "whole", folder / "adapted"))
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_a_run_in_4_bits_goes_out_merged_and_is_what_generation_reads(folder, tmp_path):
    opened = open_model(epath.Path(folder / "adapted"))
    export_model(epath.Path(folder / "adapted"), epath.Path(tmp_path / "out"))
    found = read_tensors(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"]
    mlp = jax.device_get(opened.params["layers"]["mlp"])
    product = mlp["down_proj_lora_a"][0] @ mlp["down_proj_lora_b"][0]
    np.testing.assert_allclose(found.T, mlp["down_proj"][0] + 16 / 4 * product, atol=1e-6)
    # Training's own parameters, which evaluations of a run are handed.
    config = opened.model.config
    kept = jax.jit(lambda p: partition.stored(p, config))(opened.params)
    read = [decoding_params(params, opened.model.definition.config) for params in (kept, opened.params)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2), *read)
