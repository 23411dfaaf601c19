"""The decoder: its size and its laws; tests/parity has its logits beside those of transformers' Llama."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meap_jax import config as config_lib
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.model.layers import RMSNorm
from meap_jax.model.visibility import causal
from tiny_models import mesh_of, numbers

B, T = 2, 12
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 64, (B, T)).astype(np.int32)
ONES = np.ones((B, T), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward(definition, params, tokens, segment_ids):
    return definition.apply(params, tokens, causal(tokens, segment_ids))


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradients(definition, params, tokens):
    def loss(params):
        logits = definition.apply(params, tokens, causal(tokens))
        return jnp.square(logits.astype(jnp.float32)).mean(), logits

    gradients, logits = jax.grad(loss, has_aux=True)(params)
    return logits, gradients


@pytest.fixture(scope="module")
def definition(tiny):
    return define(tiny)


@pytest.fixture(scope="module")
def params(definition):
    return numbers(definition)


@pytest.fixture(scope="module")
def logits(definition, params):
    return forward(definition, params, TOKENS, ONES)


# ----------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("size, millions", [("100m", 122), ("300m", 324), ("500m", 481), ("1b", 1176)])
def test_the_papers_sizes_have_their_parameters(size, millions):
    model = ModelConfig.of(config_lib.paper(size, "meap").model)
    assert (model.num_kv_heads, model.vocab_size) == (2, 32_064)
    assert round(model.num_parameters / 1e6) == millions
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(define(model).shapes())) == model.num_parameters


def test_every_parameter_has_a_name_for_each_of_its_axes_and_layers_are_stacked(definition):
    axes = definition.axes()
    size = dict(layers=2, vocab=64, embed=32, norm=32, heads=4, kv_heads=2, head_dim=8, mlp=48)
    leaves = functools.partial(jax.tree.leaves, is_leaf=lambda x: isinstance(x, tuple))
    sizes = [tuple(size[name] for name in names) for names in leaves(axes)]
    assert [p.shape for p in jax.tree.leaves(definition.shapes())] == sizes
    assert [names[0] for names in leaves(axes.pop("layers"))] == ["layers"] * 9
    assert len(leaves(axes)) == 3 and all("layers" not in names for names in leaves(axes))


@functools.cache
def draw(seed, init, tiny):
    definition = define(dataclasses.replace(tiny, init=init))
    return jax.jit(definition.init)(jax.random.key(seed))


@pytest.mark.parametrize(
    "init, reads, writes",
    [
        ("official", math.sqrt(2 / (5 * 32)), 1 / math.sqrt(32) / 2),  # Variance 2 / (5 D); 1 / sqrt(D) / layers.
        ("normal", 0.02, 0.02 / math.sqrt(2 * 2)),
    ],
)
def test_initial_weights_have_the_declared_spread(tiny, init, reads, writes):
    for path, p in jax.tree_util.tree_leaves_with_path(draw(0, init, tiny)):
        name = jax.tree_util.keystr(path)
        assert p.dtype == jnp.float32
        if "norm" in name:
            np.testing.assert_array_equal(p, np.ones(p.shape))
            continue
        std = writes if "o_proj" in name or "down_proj" in name else reads
        assert abs(p.mean()) < 4.5 * std / math.sqrt(p.size), name
        assert abs(p.std() / std - 1) < 4.5 / math.sqrt(2 * p.size), name


def test_layers_are_drawn_apart_and_the_key_alone_decides(tiny):
    params, other = draw(0, "official", tiny), draw(1, "official", tiny)
    first, second = params["layers"]["attn"]["q_proj"].reshape(2, -1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / math.sqrt(first.size)
    jax.tree.map(np.testing.assert_array_equal, params, draw.__wrapped__(0, "official", tiny))
    assert (params["embedding"] != other["embedding"]).any()


# ---------------------------------------------------------------------------------------------------------- the forward


def test_a_token_changes_no_logit_before_it(definition, params, logits):
    for t in (0, 5, T - 1):
        changed = TOKENS.copy()
        changed[:, t] = (TOKENS[:, t] + 1) % 64
        after = forward(definition, params, changed, ONES)
        np.testing.assert_array_equal(after[:, :t], logits[:, :t])
        assert (np.abs(after[:, t:] - logits[:, t:]).max(axis=(0, 2)) > 1e-4).all()


def test_documents_side_by_side_give_the_logits_that_each_gives_alone(definition, params):
    together = forward(definition, params, TOKENS, np.int32([[1] * 5 + [2] * 7] * B))
    first, second = (forward(definition, params, np.roll(TOKENS, -start, axis=1), ONES) for start in (0, 5))
    np.testing.assert_allclose(together[:, :5], first[:, :5], atol=1e-4)
    np.testing.assert_allclose(together[:, 5:], second[:, :7], atol=1e-4)


def test_a_dropped_embedding_is_a_zero_in_its_place(definition, params):
    tokens = jnp.maximum(TOKENS, 1)
    keep = jnp.broadcast_to(jnp.arange(T) != 4, (B, T))
    dropped = definition.apply(params, tokens, causal(tokens), keep)
    zero_for_token_0 = params | {"embedding": params["embedding"].at[0].set(0)}
    in_its_place = forward(definition, zero_for_token_0, jnp.where(keep, tokens, 0), ONES)
    np.testing.assert_allclose(dropped, in_its_place, atol=1e-4)


@pytest.mark.parametrize("magnitude", [1e-5, 1e-3, 1.0])
def test_rms_norm_adds_its_eps_to_the_mean_square(tiny, magnitude):
    norm, rng = RMSNorm(tiny), np.random.default_rng(0)
    x, scale = magnitude * rng.normal(size=(B, T, 32)), rng.normal(size=32)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    expected = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "change", [dict(unroll=5), dict(remat="dots"), dict(remat="full"), dict(attention="plain")], ids=str
)
def test_unroll_and_remat_change_the_program_but_not_the_state_or_the_result(tiny, definition, params, change):
    changed = define(dataclasses.replace(tiny, **change))
    assert changed.shapes() == definition.shapes() and changed.axes() == definition.axes()
    plain, other = (logits_and_gradients(which, params, TOKENS) for which in (definition, changed))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), other, plain)


def test_remat_keeps_less_for_the_backward_pass_the_more_it_computes_again(tiny):
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def temporaries(remat):
        definition = define(dataclasses.replace(tiny, num_layers=8, remat=remat))

        def loss(params, tokens):
            return jnp.square(definition.apply(params, tokens, causal(tokens))).mean()

        return jax.jit(jax.grad(loss)).lower(definition.shapes(), tokens).compile().memory_analysis().temp_size_in_bytes

    none, dots, full = (temporaries(remat) for remat in ("none", "dots", "full"))
    assert full < dots < none


def test_bfloat16_computes_close_logits_from_float32_parameters(tiny, params, logits):
    half = define(dataclasses.replace(tiny, dtype="bfloat16"))
    assert {p.dtype for p in jax.tree.leaves(half.shapes())} == {jnp.dtype(jnp.float32)}
    close, gradients = logits_and_gradients(half, params, TOKENS)
    assert close.dtype == jnp.bfloat16
    error = np.asarray(close, np.float32) - np.asarray(logits)
    assert np.isfinite(error).all()
    assert 0 < np.sqrt(np.square(error).mean()) < 0.03 * np.std(logits)
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(gradients))


# ------------------------------------------------------------------------------------ some positions, options of models


@pytest.mark.parametrize("mesh", [{}, dict(tensor=2), dict(data=2, tensor=2, context=2)], ids=str)
def test_logits_of_chosen_positions_are_those_of_all_in_these_places(definition, params, mesh):
    tokens, at = jnp.asarray(TOKENS), jnp.int32([[11, 0, 3], [7, 7, 6]])
    with jax.set_mesh(mesh_of(**mesh)):
        chosen = jax.jit(definition.apply)(params, tokens, causal(tokens), at_BN=at)
    expected = jax.jit(definition.apply)(params, tokens, causal(tokens))[jnp.arange(B)[:, None], at]
    np.testing.assert_allclose(chosen, expected, atol=1e-5, rtol=1e-5)


def test_no_logits_of_other_positions_are_computed(definition):
    asked = functools.partial(definition.apply, at_BN=jnp.zeros((B, 3), jnp.int32))
    program = str(jax.make_jaxpr(asked)(definition.shapes(), TOKENS, causal(jnp.asarray(TOKENS))))
    assert f"f32[{B * 3},64]" in program and f"f32[{B * T},64]" not in program


@pytest.mark.parametrize("layers, reaches", [("all", 2 * 3), ("1", T), ("0", T)])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_a_window_ends_what_a_layer_sees(tiny, params, layers, reaches, remat):
    # A window of 4 lets each layer look back 3 positions; a layer without one lets the first token through to the last.
    windowed = define(dataclasses.replace(tiny, window=4, window_layers=layers, remat=remat))
    first_changed = TOKENS.copy()
    first_changed[:, 0] = (TOKENS[:, 0] + 1) % 64
    a, gradients = logits_and_gradients(windowed, params, TOKENS)
    b, _ = logits_and_gradients(windowed, params, first_changed)
    changed = np.abs(np.asarray(a - b)).max(axis=(0, 2)) > 1e-6
    assert changed.nonzero()[0].max() == min(reaches, T - 1)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_tied_embeddings_are_the_head_and_biases_add_to_queries_keys_and_values(tiny, params):
    tied = define(dataclasses.replace(tiny, tie_embeddings=True, qkv_bias=True))
    attn = {
        **params["layers"]["attn"],
        **{f"{x}_bias": jnp.ones(tied.shapes()["layers"]["attn"][f"{x}_bias"].shape) for x in "qkv"},
    }
    biased = {**params, "layers": {**params["layers"], "attn": attn}}
    without_head = {name: x for name, x in biased.items() if name != "head"}
    untied = define(dataclasses.replace(tiny, qkv_bias=True))
    expected = forward(untied, biased | {"head": params["embedding"].T}, TOKENS, ONES)
    assert jax.tree.structure(tied.shapes()) == jax.tree.structure(without_head)
    np.testing.assert_allclose(forward(tied, without_head, TOKENS, ONES), expected, atol=1e-5, rtol=1e-5)
    # A bias of the values is one of what attention puts out, whose weights come to 1.
    no_keys = {**attn, "q_bias": attn["q_bias"] * 0, "k_bias": attn["k_bias"] * 0}
    shifted = forward(untied, {**params, "layers": {**params["layers"], "attn": no_keys}}, TOKENS, ONES)
    assert np.abs(np.asarray(shifted - forward(define(tiny), params, TOKENS, ONES))).max() > 0.1


def test_padding_of_the_vocabulary_takes_no_probability(tiny, params):
    padded = define(dataclasses.replace(tiny, num_tokens=50))
    cut = define(dataclasses.replace(tiny, vocab_size=50))
    fewer = params | {"embedding": params["embedding"][:50], "head": params["head"][:, :50]}
    tokens, weights = jnp.asarray(TOKENS % 50), jnp.ones((B, T))

    def loss(definition):
        return lambda p: definition.decoder(p).loss(tokens, causal(tokens), tokens, weights)

    (a, grad_a), (b, grad_b) = (jax.jit(jax.value_and_grad(loss(d)))(p) for d, p in ((padded, params), (cut, fewer)))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(grad_a["head"][:, :50], grad_b["head"], atol=1e-4, rtol=1e-4)
    assert not grad_a["head"][:, 50:].any() and not grad_a["embedding"][50:].any()
    losses = [jax.jit(lambda p, d=d: d.decoder(p).token_losses(tokens, causal(tokens), tokens))(p)
              for d, p in ((padded, params), (cut, fewer))]  # fmt: skip
    np.testing.assert_allclose(*losses, rtol=1e-5)
