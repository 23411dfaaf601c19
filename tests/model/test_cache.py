"""A forward pass through a cache, or at chosen positions, gives the logits of the whole forward pass."""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meap_jax.model.decoder import define
from meap_jax.model.visibility import causal
from tiny_models import mesh_of, numbers

B, T, V, PROMPT = 2, 12, 64, 5
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)
# The first row goes on within a document and starts another one; the second begins with padding.
DOCUMENTS = causal(TOKENS, jnp.int32([[1] * 8 + [2] * 4, [0] * 2 + [1] * 10]))
MESHES = [{}, dict(tensor=2), dict(data=2, tensor=2, context=2)]
assert_close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)


class Places(NamedTuple):
    """One for each token of the text, filled in order."""

    k: jax.Array
    v: jax.Array
    num_filled: jax.Array

    def extend(self, k, v):
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=self.num_filled, axis=1)
        after = Places(put(self.k, k), put(self.v, v), self.num_filled + k.shape[1])
        return after.k, after.v, after


def empty(c):
    junk = jnp.full((c.num_layers, B, T, c.num_kv_heads, c.head_dim), 1e3)  # Shows if a query sees it.
    return Places(junk, junk, jnp.zeros(c.num_layers, jnp.int32))


@pytest.mark.parametrize(
    "change, window, mesh",
    [
        ({}, None, {}),
        (dict(unroll=2, attention="plain"), 3, {}),
        (dict(num_kv_heads=1, remat="dots"), None, dict(tensor=2)),
        (dict(attention="splash"), 3, MESHES[-1]),
    ],
    ids=str,
)
def test_a_prompt_and_then_token_by_token_give_the_logits_of_the_whole_text(tiny, change, window, mesh):
    definition = define(replace(tiny, **change))
    params, visibility = numbers(definition), replace(DOCUMENTS, window=window)

    @functools.partial(jax.jit, static_argnums=2)
    def extend(cache, start, size):
        tokens = jax.lax.dynamic_slice_in_dim(TOKENS, start, size, axis=1)
        return definition.decoder(params).extend(tokens, visibility.slice(start, size), cache, visibility)

    parts, cache = [], empty(definition.config)
    with jax.set_mesh(mesh_of(**mesh)):
        for start, size in [(0, PROMPT), *((t, 1) for t in range(PROMPT, T))]:
            logits, cache = extend(cache, start, size)
            parts.append(logits)
    assert_close(np.concatenate(parts, axis=1), jax.jit(lambda: definition.apply(params, TOKENS, visibility))())


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_logits_of_chosen_positions_are_those_of_all_in_these_places(tiny, mesh):
    definition = define(tiny)
    params, at = numbers(definition), jnp.int32([[11, 0, 3], [7, 7, 6]])
    with jax.set_mesh(mesh_of(**mesh)):
        chosen = jax.jit(definition.apply)(params, TOKENS, DOCUMENTS, at_BN=at)
    assert_close(chosen, jax.jit(definition.apply)(params, TOKENS, DOCUMENTS)[jnp.arange(B)[:, None], at])


def test_no_logits_of_other_positions_are_computed(tiny):
    definition, at = define(tiny), jnp.zeros((B, 3), jnp.int32)

    def cached(params, tokens, visibility):
        return definition.decoder(params).extend(tokens, visibility, empty(tiny), DOCUMENTS, at)

    for asked in (functools.partial(definition.apply, at_BN=at), cached):
        program = str(jax.make_jaxpr(asked)(definition.shapes(), TOKENS, DOCUMENTS))
        assert f"f32[{B * 3},{V}]" in program and f"f32[{B * T},{V}]" not in program
