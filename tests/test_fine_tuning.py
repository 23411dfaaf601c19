"""Methods of fine-tuning in runs: adapters on a base, and parameters that are kept in bfloat16."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from meap_jax import config as config_lib
from meap_jax import main, partition, train
from meap_jax.errors import ConfigError
from meap_jax.models import open_model
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
    carried = scan.outvars[: scan.params["num_carry"]]
    assert [x.aval.dtype for x in carried] == [jnp.float32] * 15 and state.params["head"].dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------------------------------- in runs


def run_training(workdir, **overrides):
    main.command(["main", *flags(workdir, **{"eval__tasks": "", "num_steps": 4, **overrides})])


def params_of(workdir, step=None):
    return jax.device_get(open_model(epath.Path(workdir), step).params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `data`, the run `base`, and the run `adapted`, which trains adapters on it in bfloat16."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    run_training(folder / "base", data__prepared=folder / "data")
    run_training(folder / "adapted", **adapters(folder))
    return folder


def adapters(folder, **changes):
    fields = {name.replace(".", "__"): value for name, value in BF16.items()}
    lora = dict(model__lora__rank=4, model__lora__alpha=8, trainable="*lora*", optimizer__learning_rate=1e-2)
    return {**fields, **lora, "data__prepared": folder / "data", "init_from": folder / "base", **changes}


def test_a_run_with_adapters_begins_at_the_base_and_trains_nothing_else(folder):
    base, (trained, frozen) = params_of(folder / "base"), partition.split(params_of(folder / "adapted"), "*lora*")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float32(b.astype(jnp.bfloat16))), frozen, base)
    assert all(x.any() for x in jax.tree.leaves(trained))  # B, too, is no longer 0.


def test_adapters_are_restored_from_a_run_that_has_the_same(folder, caplog):
    changes = dict(optimizer__learning_rate=1e-30, optimizer__rounding="nearest", model__lora__alpha=9)
    run_training(folder / "more", **adapters(folder, init_from=folder / "adapted", num_steps=1, **changes))
    jax.tree.map(np.testing.assert_array_equal, params_of(folder / "more"), params_of(folder / "adapted"))
    assert "computed otherwise: model.lora.alpha was 8.0 and is now 9.0" in caplog.text


@pytest.mark.parametrize("changes", [dict(model__lora__rank=0, trainable="*"), dict(model__lora__rank=3),
                                     dict(model__lora__targets="q_proj")], ids=str)  # fmt: skip
def test_adapters_that_a_config_has_no_place_for_are_refused(folder, tmp_path, changes):
    with pytest.raises(ConfigError, match="init_from is .*adapted, whose adapters have model.lora.rank=4"):
        run_training(tmp_path, **adapters(folder, init_from=folder / "adapted", **changes))


def test_a_run_with_rounded_updates_goes_on_bit_for_bit(folder, tmp_path):
    shutil.copytree(folder / "adapted", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    run_training(tmp_path / "again", **adapters(folder))
    assert losses(tmp_path / "again") == losses(folder / "adapted")
    jax.tree.map(np.testing.assert_array_equal, *map(params_of, (tmp_path / "again", folder / "adapted")))
