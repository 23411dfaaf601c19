"""Dropout of hidden states: how many, which, and where in the decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meap_jax import sharding
from meap_jax.model.decoder import define
from meap_jax.model.dropout import Dropout
from meap_jax.model.visibility import causal
from tiny_models import mesh_of, numbers

B, T, D = 4, 8, 128
POSITIONS = np.arange(T)
RATES = np.float32([[0.0], [0.25], [0.5], [1.0]])
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (B, T)), jnp.int32)


def dropout(rates=RATES, seeds=(1, 2, 3, 4)):
    return Dropout(jnp.uint32(seeds)[:, None], jnp.asarray(rates))


@functools.partial(jax.jit, static_argnums=1)
def drop(which, place=0, positions=POSITIONS):
    return which.drop(jnp.ones((B, T, D)), place, jnp.asarray(positions))


def test_a_share_of_the_rate_is_0_and_the_rest_is_scaled_so_that_the_mean_stays():
    dropped = np.asarray(drop(dropout()))
    np.testing.assert_array_equal(dropped[0], 1)
    for row, rate in ((1, 0.25), (2, 0.5)):
        assert set(np.unique(dropped[row])) == {0, np.float32(1 / (1 - rate))}
        deviation = np.sqrt(rate * (1 - rate) / (T * D))
        assert abs((dropped[row] == 0).mean() - rate) < 4.5 * deviation
        assert abs(dropped[row].mean() - 1) < 4.5 * deviation / (1 - rate)
    np.testing.assert_array_equal(dropped[3], 0)


def test_rate_1_has_no_gradient_and_no_nan():
    gradient = jax.grad(lambda x: dropout().drop(x, 0, jnp.arange(T)).sum())(jnp.ones((B, T, D)))
    np.testing.assert_array_equal(gradient, drop(dropout()))


def test_rows_places_and_positions_have_draws_of_their_own_which_their_numbers_alone_decide():
    half = np.full((B, 1), 0.5, np.float32)
    first = np.asarray(drop(dropout(half)))
    assert len({first[b, t].tobytes() for b in range(B) for t in range(T)}) == B * T
    assert (drop(dropout(half), 1) != first).any(axis=(1, 2)).all()
    np.testing.assert_array_equal(drop(dropout(half), 0, np.arange(T)[::-1].copy()), first[:, ::-1])
    np.testing.assert_array_equal(drop(dropout(half, (4, 3, 2, 1))), first[::-1])


@functools.partial(jax.jit, static_argnums=0)
def hidden(definition, params, which):
    return definition.decoder(params).hidden(TOKENS, causal(TOKENS), None, which)


@pytest.fixture(scope="module")
def params(tiny):
    return numbers(define(tiny))


def test_the_embedding_and_what_attention_and_mlp_add_are_dropped_in_every_layer(tiny, params):
    """As the layers one after the other, each addition dropped by hand."""

    @jax.jit
    def by_hand(params, which):
        decoder, visibility = define(tiny).decoder(params), causal(TOKENS)
        x = which.drop(decoder.embedding[...][TOKENS], 0, jnp.arange(T))
        for layer in range(2):
            block = jax.tree.map(lambda p, layer=layer: p[layer], decoder.layers)
            attended, _ = block.attn(block.attn_norm(x), visibility.positions, visibility, False)
            x = x + which.drop(attended, 1 + 2 * layer, jnp.arange(T))
            x = x + which.drop(block.mlp(block.mlp_norm(x)), 2 + 2 * layer, jnp.arange(T))
        return decoder.final_norm(x)

    np.testing.assert_allclose(hidden(define(tiny), params, dropout()), by_hand(params, dropout()), atol=1e-5)


def test_rate_0_is_the_decoder_without_dropout(tiny, params):
    nothing = hidden(define(tiny), params, dropout(0 * RATES))
    np.testing.assert_allclose(nothing, hidden(define(tiny), params, None), atol=1e-6)


def test_remat_and_meshes_drop_the_same(tiny, params):
    expected = hidden(define(tiny), params, dropout())
    again = hidden(define(dataclasses.replace(tiny, remat="full", unroll=2)), params, dropout())
    np.testing.assert_allclose(again, expected, atol=1e-5)
    with jax.set_mesh(mesh_of(data=2, tensor=2, context=2)):
        on_mesh = sharding.unzigzag(hidden(define(tiny), params, dropout()), 2)
    np.testing.assert_allclose(on_mesh, expected, atol=1e-5)
