"""Annotated shapes and types are checked in every call that a test makes (see `addopts` in pyproject.toml)."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from meap_jax.losses import token_losses
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


def attend(k=(B, T, K, d), v=(B, T, K, d), segment_ids=(B, T), positions=(B, T), branch_ids=(B, T), window=None):
    visibility = Visibility(ints(*segment_ids), ints(*positions), window, ints(*branch_ids))
    return attention(floats(B, T, H, d), floats(*k), floats(*v), visibility)


def test_attention_takes_arrays_of_the_annotated_shapes():
    assert attend().shape == (B, T, H, d)


@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        ("v", attend, dict(k=(B, T + 1, K, d))),  # Whose shape it must have.
        ("v", attend, dict(v=(B, T, K + 1, d))),
        ("segment_ids", attend, dict(segment_ids=(B, T + 1))),
        ("positions", attend, dict(positions=(B, 1))),  # NumPy's rules would broadcast it.
        ("branch_ids", attend, dict(branch_ids=(1, T))),
        ("segment_ids", attend, dict(segment_ids=(B, T + 1), positions=(B, T + 1), branch_ids=(B, T + 1))),
        ("window", attend, dict(window=jnp.int32(2))),
        ("positions", rope, dict(x=floats(B, T, H, d), positions=ints(B, T + 1), base=1e4)),
        ("positions", rope, dict(x=floats(B, T, H, d), positions=ints(B, 1), base=1e4)),
        ("positions", rope, dict(x=floats(B, T, H, d), positions=floats(B, T), base=1e4)),
        ("x", token_losses, dict(x=ints(B, T, 5), head=floats(5, 9), targets=ints(B, T))),
        ("targets", token_losses, dict(x=floats(B, T, 5), head=floats(5, 9), targets=floats(B, T))),
    ],
)
def test_an_array_of_another_shape_or_type_is_refused_by_its_name(name, function, arguments):
    with pytest.raises(TypeCheckError, match=f"parameter '{name}'"):
        function(**arguments)


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
    with pytest.raises(TypeCheckError, match=f"parameter '{name}_BT'"):
        jax.eval_shape(definition.apply, definition.shapes(), tokens, causal(ints(B, T)), keep_embedding)


def test_micro_batches_are_cut_once(tiny):
    inputs = clean_inputs(Row(ints(4, T + 1), ints(4, T + 1)))
    stacked = micro_batches(inputs, 2)
    with pytest.raises(TypeCheckError):
        micro_batches(stacked, 2)
    with pytest.raises(TypeCheckError, match="tokens"):
        summed_loss(define(tiny), define(tiny).shapes(), stacked)
