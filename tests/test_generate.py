"""What generation gives is what the whole forward pass says, in any batch, bucket, chunk and mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meap_jax.generate import Generator
from meap_jax.model import attention_splash
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.model.visibility import causal
from meap_jax.models import Model
from tiny_models import mesh_of, numbers
from tiny_runs import tiny_config
from tokenizer_kinds import kind

V = 640
LENGTHS = (1, 3, 16, 17, 40, 70)
PROMPTS = [np.random.default_rng(n).integers(4, 600, n).tolist() for n in LENGTHS]


def generator(mesh=None, changes=None, **options):
    """A tiny decoder with the vocabulary of the tokenizer bpe, and its parameters."""
    config = tiny_config(**{"model.vocab_size": V, "seq_len": 160, **(changes or {})})
    model = Model(config, mesh_of(**(mesh or {})), define(ModelConfig.of(config.model, "cpu")))
    params = jax.tree.map(lambda x: x * 0.7, numbers(model.definition))
    params = jax.device_put(params, model.definition.shardings(model.mesh))
    return Generator(model, params, kind("bpe"), **options), params


def log_probs_of(definition, params, text):
    """[T, V]: of what follows each token, by the whole forward pass."""
    tokens = jnp.asarray([text], jnp.int32)
    return np.array(jax.nn.log_softmax(jax.jit(definition.apply)(params, tokens, causal(tokens))[0]))


ROPE = {"model.rope_scaling.kind": "yarn", "model.rope_scaling.factor": 4.0, "model.rope_scaling.original_seq_len": 32}


@pytest.mark.parametrize(
    "mesh, changes, options",
    [
        ({}, {}, {}),
        ({}, {"model.attention": "plain", "model.tie_embeddings": True, **ROPE}, dict(chunk=32, batch_size=4)),
        (dict(tensor=2), {"model.num_kv_heads": 1, "model.qkv_bias": True}, dict(chunk=16)),
        (dict(tensor=4), {"model.window": 5}, dict(chunk=32)),
        (dict(data=2, tensor=2, context=2), {"model.window": 20, "model.window_layers": "1"}, dict(chunk=32)),
        (dict(fsdp=2, context=4), {"model.attention": "splash"}, dict(chunk=64)),
    ],
    ids=str,
)
def test_greedy_tokens_and_log_probabilities_are_those_of_the_whole_forward_pass(monkeypatch, mesh, changes, options):
    monkeypatch.setattr(attention_splash, "INTERPRET", True)
    generating, params = generator(mesh, changes, **options)
    found = generating.generate(PROMPTS, max_new_tokens=9, log_probs=True)
    never = [kind("bpe").mask_id, kind("bpe").pad_id, *range(kind("bpe").num_tokens, V)]
    plain, params = define(replace(generating.model.definition.config, attention="plain")), jax.device_get(params)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        text = [*prompt, *completion.tokens]
        every = log_probs_of(plain, params, text + [0] * (-len(text) % 128))[len(prompt) - 1 : len(text) - 1]
        chosen = every[np.arange(len(completion.tokens)), completion.tokens]
        np.testing.assert_allclose(completion.log_probs, chosen, atol=2e-4, rtol=2e-4)
        every[:, never] = -np.inf
        assert (chosen >= every.max(axis=1) - 1e-4).all()
        assert len(completion.tokens) == 9 or completion.tokens[-1] == kind("bpe").eos_id
