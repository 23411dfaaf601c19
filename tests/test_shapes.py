"""Annotated shapes and types are checked in every call that a test makes (see `addopts` in pyproject.toml)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from meap_jax.losses import token_cross_entropy
from meap_jax.model.attention import attention
from meap_jax.model.decoder import define
from meap_jax.model.rope import rope
from meap_jax.model.visibility import Visibility, causal
from meap_jax.objective import clean_inputs
from meap_jax.rows import Row
from meap_jax.train import micro_batches, summed_loss

B, T, H, K, d = 2, 6, 4, 2, 8


def ints(*shape):
    return jnp.ones(shape, jnp.int32)


def floats(*shape):
    return jnp.ones(shape, jnp.float32)


def attend(k=(B, T, K, d), v=(B, T, K, d), segment_ids=(B, T), positions=(B, T), branch_ids=(B, T)):
    visibility = Visibility(ints(*segment_ids), ints(*positions), branch_ids=ints(*branch_ids))
    return attention(floats(B, T, H, d), floats(*k), floats(*v), visibility)


def test_attention_takes_arrays_of_the_annotated_shapes():
    assert attend().shape == (B, T, H, d)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(k=(B, T + 1, K, d)),
        dict(v=(B, T, K + 1, d)),
        dict(segment_ids=(B, T + 1)),
        dict(positions=(B, 1)),  # NumPy's rules would broadcast it.
        dict(branch_ids=(1, T)),
        dict(segment_ids=(B, T + 1), positions=(B, T + 1), branch_ids=(B, T + 1)),
    ],
    ids=str,
)
def test_attention_refuses_an_array_of_another_shape(wrong):
    with pytest.raises(TypeCheckError):
        attend(**wrong)


def test_a_window_is_a_number_and_no_array():
    visibility = replace(causal(ints(B, T)), window=jnp.int32(2))
    with pytest.raises(TypeCheckError, match="window"):
        attention(floats(B, T, H, d), floats(B, T, K, d), floats(B, T, K, d), visibility)


@pytest.mark.parametrize("positions", [ints(B, T + 1), ints(B, 1), floats(B, T)], ids=["longer", "one", "float"])
def test_rope_refuses_positions_that_are_not_one_integer_a_token(positions):
    with pytest.raises(TypeCheckError, match="positions"):
        rope(floats(B, T, H, d), positions, 10_000.0)


@pytest.mark.parametrize(
    "tokens, keep_embedding, name",
    [
        (floats(B, T), None, "tokens"),
        (ints(T), None, "tokens"),
        (ints(B, T), ints(B, T), "keep_embedding"),
        (ints(B, T), jnp.ones((B, 1), bool), "keep_embedding"),
    ],
)
def test_the_decoder_refuses_wrong_tokens_and_embeddings_while_it_is_traced(tiny, tokens, keep_embedding, name):
    definition = define(tiny)
    forward = jax.jit(lambda params, tokens: definition.apply(params, tokens, causal(ints(B, T)), keep_embedding))
    with pytest.raises(TypeCheckError, match=f"parameter '{name}_BT'"):
        forward.eval_shape(definition.shapes(), tokens)


def test_cross_entropy_refuses_logits_and_targets_of_another_kind():
    with pytest.raises(TypeCheckError, match="logits"):
        token_cross_entropy(ints(B, T, 5), ints(B, T))
    with pytest.raises(TypeCheckError, match="targets"):
        token_cross_entropy(floats(B, T, 5), floats(B, T))


def test_micro_batches_are_cut_once(tiny):
    inputs = clean_inputs(Row(ints(4, T + 1), ints(4, T + 1)))
    stacked = micro_batches(inputs, 2)
    with pytest.raises(TypeCheckError):
        micro_batches(stacked, 2)
    with pytest.raises(TypeCheckError, match="tokens"):
        summed_loss(define(tiny), define(tiny).shapes(), stacked)
