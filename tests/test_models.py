"""A model opens with its tokenizer and without its data, whole or as parameters alone, or says what is missing."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from meap_jax import models, tokenizers
from meap_jax.checkpoint import Checkpointer, Keep, save_params
from meap_jax.errors import ConfigError
from meap_jax.train import abstract_inputs, init_state
from tiny_runs import tiny_config

WORDS = {"model.vocab_size": 32_064, "objective.mask_id": 32_000, "data.tokenizer": "mistral", "data.mixture": "text=1"}


@pytest.fixture
def folder(tmp_path):
    """A model that was written here, with parameters of two steps; its data is nowhere."""
    folder, config = epath.Path(tmp_path), tiny_config(**WORDS)
    fresh = models.fresh_model(config)
    models.write_config(folder, config)
    models.save_tokenizer(folder, tokenizers.make("tekken"))  # Of a run that came to no checkpoint.
    meta = {"config": config.to_dict(), "tokenizer": models.save_tokenizer(folder, fresh.tokenizer)}
    save_params(folder, fresh.params, meta)
    save_params(folder, jax.tree.map(lambda x: x + 1, fresh.params), meta, step=7)
    return folder


@pytest.mark.parametrize(("step", "added"), [(None, 1), (7, 1), (0, 0)])
def test_parameters_and_tokenizer_come_back_as_they_were_saved(folder, step, added):
    opened, fresh = models.open_model(folder, step), models.fresh_model(tiny_config(**WORDS))
    assert opened.step == (7 if step is None else step)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + added), opened.params, fresh.params)
    assert opened.tokenizer.files() == tokenizers.make("mistral").files()


def test_a_model_opens_on_another_mesh_than_it_was_made_on(folder):
    opened = models.open_model(folder, mesh={"data": 1, "fsdp": 4, "tensor": 2})
    assert opened.params["head"].sharding.shard_shape((32, 32_064)) == (8, 16_032)


def test_a_fresh_model_has_the_parameters_that_a_run_of_its_config_begins_with():
    fresh = models.fresh_model(tiny_config())
    state = jax.jit(lambda: init_state(fresh.model.config, fresh.model.definition))()
    jax.tree.map(np.testing.assert_array_equal, fresh.params, state.params)
    assert fresh.tokenizer is None  # It is trained on the data.


@pytest.mark.parametrize(
    ("change", "arguments", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), {}, "holds no config.json: name the workdir of a run"),
        (lambda folder: (folder / "config.json").write_text("{"), {}, "config.json is damaged"),
        (lambda folder: (folder / "tokenizer").rmtree(), {}, "no tokenizer/: a version before this one trained it"),
        (lambda folder: (folder / "tokenizer/more.json").touch(), {}, "another tokenizer .* than the model was"),
        (lambda _: None, {"step": 3}, "the step is 3, but .* holds 0, 7"),
        (lambda _: None, {"mesh": {"data": 3}}, "mesh is data=3 .* there are 8 devices"),
    ],
)
def test_what_keeps_a_model_from_opening_is_said_in_a_sentence(folder, change, arguments, sentence):
    change(folder)
    with pytest.raises(ConfigError, match=sentence):
        models.open_model(folder, **arguments)


def test_a_config_of_a_version_before_gets_defaults_and_one_of_a_version_after_is_refused(folder):
    config = tiny_config(**WORDS).to_dict()
    (folder / "config.json").write_text(json.dumps(config | {"eval": {}, "loss": {}}))
    assert models.read_config(folder).to_dict() == config
    (folder / "config.json").write_text(json.dumps(config | {"model": {"new_field": 1}}))
    with pytest.raises(ConfigError, match="was written by a version that has model.new_field: use that version"):
        models.read_config(folder)


def test_no_run_goes_on_from_parameters_alone(folder):
    model = models.open_model(folder).model
    checkpointer = Checkpointer(folder, Keep(2))
    with pytest.raises(ConfigError, match="holds parameters alone, from which no run can go on: set init_from to"):
        checkpointer.restore(abstract_inputs(*model[::2], model.mesh)[0])
    checkpointer.close()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"objective.name": "mlm"}, "objective.name is 'mlm', but must be one of ntp, meap"),
        ({"trainable": "head,heads"}, "trainable is 'head,heads', but 'heads' matches no parameter"),
        ({"model.num_heads": 3, "model.num_kv_heads": 3, "mesh.tensor": 2}, "the axis 'heads' of size 3 can't"),
    ],
)
def test_a_config_that_fits_no_model_is_refused_before_anything_is_compiled(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        models.define_model(tiny_config(**overrides))
