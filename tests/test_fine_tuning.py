"""Methods of fine-tuning in runs: adapters on a base, and parameters that are kept in bfloat16."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from hub_folders import read_tensors
from meap_jax import cli, main, partition, run, start, train
from meap_jax import config as config_lib
from meap_jax.checkpoint import Checkpointer, Keep
from meap_jax.convert import export_model
from meap_jax.decoding import decoding_params
from meap_jax.errors import ConfigError
from meap_jax.models import open_model
from meap_jax.quantization import is_quantized
from test_train import initial, random_batch, run_steps
from tiny_runs import flags, losses, tiny_config

BF16 = {"optimizer.param_dtype": "bfloat16", "frozen_dtype": "bfloat16", "model.dtype": "bfloat16"}


def adapting(**changes):
    config = tiny_config(**changes)
    config_lib.train_adapters(config, rank=4, alpha=8.0)
    return config


# ------------------------------------------------------------------------------------------------------------- the step


def test_parameters_are_kept_in_the_dtypes_of_the_config_and_moments_in_float32():
    config = adapting(**BF16 | {"frozen_dtype": "float32"})
    _, state = initial(config)
    trained, frozen = partition.split(state.params, config.trainable)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("float32")}
    moments = [x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert moments == [jnp.float32] * 2 * 14


def test_adapters_in_bfloat16_train_alike_on_one_device_and_in_micro_batches_on_a_mesh():
    mesh = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "grad_accum_steps": 2}
    losses, params = run_steps(adapting(**BF16, **mesh))
    on_one_device, of_one_device = run_steps(adapting(**BF16), devices=jax.devices()[:1])
    np.testing.assert_allclose(losses, on_one_device, rtol=2e-3)
    (trained, frozen), (expected, base) = (partition.split(p, "*lora*") for p in (params, of_one_device))
    jax.tree.map(np.testing.assert_array_equal, frozen, base)
    # Three steps of at most 1e-2; rounding may turn that of a number round whose gradient is about 0.
    pairs = zip(*map(jax.tree.leaves, (trained, expected)), strict=True)
    off = np.concatenate([np.abs(np.float32(a) - np.float32(b)).ravel() for a, b in pairs])
    assert np.mean(off) < 5e-4 and np.max(off) < 4e-2


def test_gradients_of_bfloat16_parameters_are_added_up_in_float32():
    config = adapting(**BF16, grad_accum_steps=4)
    definition, state = initial(config)
    program = jax.make_jaxpr(train.step_function(config, definition))(state, random_batch())
    [scan] = [e for e in program.eqns if e.primitive.name == "scan" and e.params["length"] == 4]
    carried = scan.outvars  # It gives nothing else.
    assert [x.aval.dtype for x in carried] == [jnp.float32] * 15 and state.params["head"].dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------------------------------- in runs


def run_training(workdir, **overrides):
    main.command(["main", *flags(workdir, **{"eval__tasks": "", "num_steps": 4, **overrides})])


def params_of(workdir, step=None):
    return jax.device_get(open_model(epath.Path(workdir), step).params)


def begun(workdir, **overrides):
    """The parameters that a run would begin with."""
    config, workdir = cli.parse_config(["main", *flags(workdir, **overrides)])
    checkpointer = Checkpointer(workdir, Keep(1))
    try:
        return jax.device_get(start.start(run.open_run(config, workdir), checkpointer).state.params)
    finally:
        checkpointer.close()


def adapters(folder, **changes):
    """Fields of a run that trains adapters on the run `base`."""
    lora = dict(model__lora__rank=4, model__lora__alpha=8, trainable="*lora*", optimizer__learning_rate=1e-2)
    return {"data__prepared": folder / "data", "init_from": folder / "base", **lora, **changes}


BFLOAT16 = {name.replace(".", "__"): value for name, value in BF16.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `data`, and the run `base`."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    run_training(folder / "base", data__prepared=folder / "data", num_steps=2)
    return folder


@pytest.fixture(scope="module")
def adapted(folder):
    """A run that trains adapters on the base in bfloat16."""
    run_training(folder / "adapted", **adapters(folder, **BFLOAT16))
    return folder / "adapted"


@pytest.fixture(scope="module")
def in_4_bits(folder):
    """A run that trains adapters on the base in 4 bits."""
    run_training(folder / "in_4_bits", **adapters(folder, frozen_dtype="nf4"))
    return folder / "in_4_bits"


def test_a_run_with_adapters_begins_at_the_base_and_trains_nothing_else(folder, adapted):
    base, (trained, frozen) = params_of(folder / "base"), partition.split(params_of(adapted), "*lora*")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float32(b.astype(jnp.bfloat16))), frozen, base)
    assert all(x.any() for x in jax.tree.leaves(trained))  # B, too, is no longer 0.


def test_adapters_are_restored_from_a_run_that_has_the_same(folder, adapted, tmp_path, caplog):
    params = begun(tmp_path, **adapters(folder, init_from=adapted, model__lora__alpha=9))
    jax.tree.map(np.testing.assert_array_equal, params, params_of(adapted))
    assert "computed otherwise: model.lora.alpha was 8.0 and is now 9.0" in caplog.text


@pytest.mark.parametrize("changes", [dict(model__lora__rank=0, trainable="*"), dict(model__lora__rank=3),
                                     dict(model__lora__targets="q_proj")], ids=str)  # fmt: skip
def test_adapters_that_a_config_has_no_place_for_are_refused(folder, adapted, tmp_path, changes):
    with pytest.raises(ConfigError, match="init_from is .*adapted, whose adapters have model.lora.rank=4"):
        begun(tmp_path, **adapters(folder, init_from=adapted, **changes))


def test_a_run_with_rounded_updates_goes_on_bit_for_bit(folder, adapted, tmp_path):
    shutil.copytree(adapted, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    run_training(tmp_path / "again", **adapters(folder, **BFLOAT16))
    assert losses(tmp_path / "again") == losses(adapted)
    jax.tree.map(np.testing.assert_array_equal, *map(params_of, (tmp_path / "again", adapted)))


def test_a_run_keeps_the_base_in_4_bits_and_opens_as_what_they_stand_for(folder, in_4_bits):
    base, opened = params_of(folder / "base"), params_of(in_4_bits)
    expected = jax.jit(lambda p: partition.cast(partition.cast(p, "nf4"), "float32"))(base)
    jax.tree.map(np.testing.assert_array_equal, partition.split(opened, "*lora*")[1], expected)
    assert all(x.any() for x in jax.tree.leaves(partition.split(opened, "*lora*")[0]))


def test_codes_are_restored_as_they_are_or_taken_out_of_4_bits(folder, in_4_bits, tmp_path):
    saved = begun(in_4_bits, **adapters(folder, frozen_dtype="nf4"))
    assert is_quantized(saved["layers"]["mlp"]["up_proj"])
    of_4_bits = functools.partial(adapters, folder, init_from=in_4_bits)
    same, whole = (begun(tmp_path / kind, **of_4_bits(frozen_dtype=kind)) for kind in ("nf4", "float32"))
    jax.tree.map(np.testing.assert_array_equal, same, saved)
    jax.tree.map(np.testing.assert_array_equal, whole, params_of(in_4_bits))


def test_a_run_in_4_bits_goes_out_merged_and_is_what_generation_reads(in_4_bits, tmp_path):
    opened = open_model(epath.Path(in_4_bits))
    export_model(epath.Path(in_4_bits), epath.Path(tmp_path / "out"))
    found = read_tensors(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"]
    mlp = jax.device_get(opened.params["layers"]["mlp"])
    product = mlp["down_proj_lora_a"][0] @ mlp["down_proj_lora_b"][0]
    np.testing.assert_allclose(found.T, mlp["down_proj"][0] + 8 / 4 * product, atol=1e-6)
    # Training's own parameters, which evaluations of a run are handed.
    kept = jax.jit(lambda p: partition.stored(p, opened.model.config))(opened.params)
    read = [decoding_params(params, opened.model.definition.config) for params in (kept, opened.params)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2), *read)
