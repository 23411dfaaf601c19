"""Settings of evaluators: a tiny decoder with random parameters, the tokenizer bpe, and options of tasks."""

import functools

import pytest

import tiny_models
from meap_jax.evals import Setting
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.models import Model
from tiny_runs import tiny_config
from tokenizer_kinds import kind


def setting(folder=None, fingerprint="f", mesh=None, **options):
    """A setting on one device, or a mesh; options are fields of `eval`, `__` for a dot."""
    config = tiny_config(**{"model.vocab_size": 640, "seq_len": 4_096})
    config.update_from_flattened_dict({f"eval.{name.replace('__', '.')}": value for name, value in options.items()})
    model = Model(config, tiny_models.mesh_of(**(mesh or {})), define(ModelConfig.of(config.model, "cpu")))
    no_data = functools.partial(pytest.fail, "no data is needed")
    return Setting(model, "test", no_data, lambda: kind("bpe"), {}, folder, fingerprint)


def params(of, seed=0):
    """Random parameters of the setting's model."""
    import jax

    found = of.model.definition.init(jax.random.key(seed))
    return jax.device_put(found, of.model.definition.shardings(of.model.mesh))
