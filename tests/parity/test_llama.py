"""The decoder's logits and gradients beside those of transformers' Llama."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from meap_jax.model.decoder import define
from meap_jax.model.visibility import Visibility
from tiny_models import numbers


def llama(model):
    """transformers' Llama of the same size."""
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.embed_dim,
        intermediate_size=model.mlp_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=model.norm_eps,
        rope_parameters=dict(rope_type="default", rope_theta=model.rope_base),
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config).eval()


def as_theirs(model, params):
    """Our parameters, or their gradients, by transformers' names: matrices are [outputs, inputs], one array a layer."""
    layers = params["layers"]
    state = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["head"].T,
    }
    for i in range(model.num_layers):
        layer = f"model.layers.{i}"
        state[f"{layer}.input_layernorm.weight"] = layers["attn_norm"]["scale"][i]
        state[f"{layer}.post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
        for name, weight in layers["attn"].items():
            shape = (-1, model.embed_dim) if name == "o_proj" else (model.embed_dim, -1)
            state[f"{layer}.self_attn.{name}.weight"] = weight[i].reshape(shape).T
        for name, weight in layers["mlp"].items():
            state[f"{layer}.mlp.{name}.weight"] = weight[i].T
    return {name: torch.tensor(np.asarray(x)) for name, x in state.items()}


@pytest.mark.parametrize("num_kv_heads, rope_base", [(2, 10_000.0), (1, 640_000.0), (4, 500.0)])
def test_logits_and_gradients_are_those_of_transformers_llama(tiny, num_kv_heads, rope_base):
    model = dataclasses.replace(tiny, num_kv_heads=num_kv_heads, rope_base=rope_base)
    ours, theirs = define(model), llama(model)
    params = numbers(ours)
    theirs.load_state_dict(as_theirs(model, params))

    # A row with gaps between its positions, and a row of two documents.
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 12), np.int32)
    positions = np.int32([[0, 1, 2, 7, 8, 9, 30, 31, 32, 33, 90, 91], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    segment_ids = np.int32([[1] * 12, [1] * 5 + [2] * 7])
    sees = (segment_ids[:, :, None] == segment_ids[:, None, :]) & np.tri(12, dtype=bool)
    expected = theirs(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        position_ids=torch.tensor(positions, dtype=torch.long),
        attention_mask=torch.tensor(np.where(sees, 0, np.finfo(np.float32).min)[:, None], dtype=torch.float32),
    ).logits
    expected.square().mean().backward()

    def loss(params, tokens, visibility):
        logits = ours.apply(params, tokens, visibility)
        return jnp.square(logits).mean(), logits

    visibility = Visibility(jnp.asarray(segment_ids), jnp.asarray(positions))
    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params, tokens, visibility)
    assert expected.abs().max() > 1
    np.testing.assert_allclose(logits, expected.detach(), atol=1e-4, rtol=1e-4)
    gradients = as_theirs(model, gradients)
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4, err_msg=name)
