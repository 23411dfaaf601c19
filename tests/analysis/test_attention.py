"""The streamed statistics are those of whole matrices of weights, on any mesh, and hold no such matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meap_jax.analysis.attention import QUANTITIES, masked_key_statistics
from meap_jax.analysis.segments import VIEWS, segment_statistics
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.model.rope import rope
from meap_jax.model.visibility import causal
from tiny_models import mesh_of, numbers
from tiny_runs import tiny_config

B, T = 8, 40
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(4, 64, (B, T)).astype(np.int32)
IS_MASKED = RNG.random((B, T)) < 0.2
IS_MASKED[:, 0], IS_MASKED[:, 1], IS_MASKED[:, -1] = False, True, False
LENGTHS = RNG.integers(25, T + 1, B)  # Of rows in five segments; what is behind is padding.
SEGMENTS = np.full((B, T), -1, np.int32)
for _row, _length in enumerate(LENGTHS):
    SEGMENTS[_row, :_length] = np.sort(np.concatenate([np.arange(5), RNG.integers(0, 5, _length - 5)]))


def decoder(**changes):
    """A tiny decoder (4 query heads, 2 kv heads, 2 layers) and weights that make its attention uneven."""
    definition = define(ModelConfig.of(tiny_config(**changes).model, "cpu"))
    return definition, jax.tree.map(lambda x: 0.5 * x, numbers(definition))


def whole_weights(definition, params, tokens):
    """[B, L, H, T, T], from the projections of each layer by NumPy in float64."""
    c, found = definition.config, []

    def look(layer, x_BTD, has_window):
        normed_BTD, of = layer.attn_norm(x_BTD), {}
        for name in ("q", "k"):
            x_BTNd = jnp.einsum("BTD,DNd->BTNd", normed_BTD, getattr(layer.attn, f"{name}_proj")[...])
            bias = getattr(layer.attn, f"{name}_bias")[...] if c.qkv_bias else 0
            of[name] = rope(x_BTNd + bias, causal(tokens).positions, c.rope_base, c.rope_scaling)
        return of["q"], of["k"], jnp.asarray(has_window)

    q_LBTHd, k_LBTKd, windows = definition.decoder(params).observe(tokens, causal(tokens), look)
    distance = np.arange(T)[:, None] - np.arange(T)
    for q_BTHd, k_BTKd, has_window in zip(*(np.asarray(x, float) for x in (q_LBTHd, k_LBTKd, windows)), strict=True):
        k_BTHd = np.repeat(k_BTKd, c.num_heads // c.num_kv_heads, axis=2)
        scores = np.einsum("BqHd,BTHd->BHqT", q_BTHd, k_BTHd) / np.sqrt(c.head_dim)
        sees = (distance >= 0) & ((distance < c.window) | (not has_window))
        weights = np.where(sees, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
        found.append(weights / weights.sum(axis=-1, keepdims=True))
    return np.stack(found, axis=1)


def without_first(weights):
    """The first key dropped and each query's other weights divided by their sum; the definition, word for word."""
    rest = weights[..., 1:] / np.maximum(weights[..., 1:].sum(axis=-1, keepdims=True), 1e-300)
    return np.concatenate([np.zeros_like(weights[..., :1]), rest], axis=-1)


def by_definition(weights, sees, is_masked):
    """`QUANTITIES` of one head from its matrix [T, T], one key and one query after the other."""
    seen = [key for key in range(T) if sees[:, key].any()]
    attention = {key: weights[sees[:, key], key].mean() for key in seen}
    masked, unmasked = ([key for key in seen if is_masked[key] == value] for value in (True, False))
    pairs = {value: weights[sees & (is_masked[None] == value)] for value in (True, False)}
    within = [weights[q, sees[q] & ~is_masked] for q in range(T)]
    return {
        "masked_per_key": np.mean([attention[key] for key in masked]),
        "masked_pooled": pairs[True].mean(),
        "unmasked_per_key": np.mean([attention[key] for key in unmasked]),
        "unmasked_pooled": pairs[False].mean(),
        "variance_between_keys": np.var([attention[key] for key in unmasked]),
        "variance_pooled": pairs[False].var(),
        "variance_within_query": np.mean([row.var() for row in within if len(row) > 1]),
        "first_token": attention.get(0, 0.0),
    }


WINDOWED = {"model.window": 7, "model.window_layers": "1"}  # One layer of two.
ROPE = {"model.rope_scaling.kind": "yarn", "model.rope_scaling.factor": 4.0, "model.rope_scaling.original_seq_len": 16}


@pytest.mark.parametrize("block", [16, 128])  # 40 = 16 + 16 + 8: the last block shares queries with the one before.
@pytest.mark.parametrize(
    "changes",
    [{}, WINDOWED, {"model.window": 7, "model.num_kv_heads": 1, "model.qkv_bias": True, **ROPE}],
    ids=["grouped", "one windowed layer", "all windowed, biases, yarn"],
)
def test_numbers_of_every_layer_and_head_are_those_of_the_whole_matrices(changes, block):
    definition, params = decoder(**changes)
    found = jax.device_get(masked_key_statistics(params, TOKENS, IS_MASKED, definition=definition, block=block))
    weights = whole_weights(definition, params, jnp.asarray(TOKENS))
    assert set(found) == set(QUANTITIES) and found["masked_pooled"].shape == (2, B, 4, 2)
    for row, layer, head in np.ndindex(3, 2, 4):
        for case, matrix in enumerate((weights[row, layer, head], without_first(weights[row, layer, head]))):
            # Exactly the weights that the window and causality allow are above 0.
            expected = by_definition(matrix, matrix > 0, IS_MASKED[row])
            for name, value in expected.items():
                np.testing.assert_allclose(found[name][layer, row, head, case], value, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("block", [16, 128])
def test_sums_of_segments_are_those_of_the_whole_matrices(block):
    definition, params = decoder(**WINDOWED)
    found = np.asarray(segment_statistics(params, TOKENS, SEGMENTS, definition=definition, block=block))
    assert found.shape == (2, B, 4, 2, len(VIEWS), 5)
    weights = whole_weights(definition, params, jnp.asarray(TOKENS))
    for row, layer, head in np.ndindex(B, 2, 4):
        of, length = SEGMENTS[row], LENGTHS[row]
        for case, matrix in enumerate((weights[row, layer, head], without_first(weights[row, layer, head]))):
            sees = matrix[:length, :length] > 0
            mean = np.where(sees, matrix[:length, :length], 0).sum(axis=0) / np.maximum(sees.sum(axis=0), 1)
            keys = {"eos": matrix[length - 1], "query": matrix[np.flatnonzero(of == 3)[-1]], "all": mean}
            for view, name in enumerate(VIEWS):
                sums = [keys[name][:length][of[:length] == segment].sum() for segment in range(5)]
                np.testing.assert_allclose(found[layer, row, head, case, view], sums, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    "sizes", [dict(data=4, fsdp=2), dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, tensor=4)], ids=str
)
def test_a_mesh_of_eight_devices_gives_the_numbers_of_one(sizes):
    definition, params = decoder(**WINDOWED)
    expected = masked_key_statistics(params, TOKENS, IS_MASKED, definition=definition, block=16)
    shares = segment_statistics(params, TOKENS, SEGMENTS, definition=definition, block=16)
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, definition.shardings(mesh))
        found = masked_key_statistics(placed, TOKENS, IS_MASKED, definition=definition, block=16)
        found_shares = segment_statistics(placed, TOKENS, SEGMENTS, definition=definition, block=16)
    assert all(x.is_fully_replicated for x in found.values())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found_shares, shares, rtol=1e-4, atol=1e-6)


def test_what_is_held_grows_with_the_length_and_not_with_its_square():
    definition, _ = decoder(**{"model.num_layers": 4})

    def temporaries(length):
        row = jnp.zeros((1, length), jnp.int32), jnp.zeros((1, length), bool)
        program = masked_key_statistics.lower(definition.shapes(), *row, definition=definition)
        return program.compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1_024), temporaries(4_096)
    assert long < 6 * short  # The square would be 16 times as much.
    assert long < definition.config.num_heads * 4_096**2 * 4 / 2  # Half the weights of one layer of the four.
