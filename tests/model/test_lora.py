"""Low-rank adapters: what they add, what they leave as it was, and where they are."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meap_jax import partition
from meap_jax.decoding import decoding_params
from meap_jax.model.config import Lora, ModelConfig
from meap_jax.model.decoder import define
from meap_jax.model.visibility import causal
from tiny_models import numbers
from tiny_runs import tiny_config

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)
ADAPTERS = Lora(rank=4, alpha=24.0, targets="*_proj")


def with_adapters(tiny, **changes):
    return define(dataclasses.replace(tiny, lora=dataclasses.replace(ADAPTERS, **changes)))


def logits(definition, params):
    return jax.jit(lambda p: definition.apply(p, TOKENS, causal(TOKENS)))(params)


def test_fresh_adapters_leave_all_other_parameters_and_every_logit_as_they_are(tiny):
    plain, definition = define(tiny), with_adapters(tiny)
    base, drawn = (jax.jit(d.init)(jax.random.key(5)) for d in (plain, definition))
    adapters, rest = partition.split(drawn, "*lora*")
    jax.tree.map(np.testing.assert_array_equal, rest, base)
    np.testing.assert_array_equal(logits(definition, drawn), logits(plain, base))
    for name, x in partition.split(adapters, "*_lora_a")[0]["layers"]["attn"].items():
        inputs = x.size // (2 * 4)  # Two layers of rank 4.
        bound = 1 / math.sqrt(inputs)  # Of o_proj, too: it reads all heads.
        assert inputs == 32 and 0.9 * bound < np.abs(x).max() <= bound, name
        assert abs(float(x.std()) / (bound / math.sqrt(3)) - 1) < 4.5 / math.sqrt(2 * x.size), name
        first, second = x.reshape(2, -1)
        assert (first != second).any()
    a = adapters["layers"]["attn"]
    assert not np.array_equal(a["k_proj_lora_a"], a["v_proj_lora_a"])
    assert not any(x.any() for x in jax.tree.leaves(partition.split(adapters, "*_lora_b")[0]))


def merged(params, scale):
    """Parameters without adapters, W + scale A B in place of W, by NumPy in float64."""
    layers = {}
    for module, weights in params["layers"].items():
        layers[module] = {name: np.asarray(w) for name, w in weights.items() if "_lora_" not in name}
        for name in layers[module]:
            if f"{name}_lora_a" in weights:
                a, b = (np.asarray(weights[f"{name}_lora_{x}"], np.float64) for x in "ab")
                product = np.einsum("lir,lro->lio", a.reshape(2, -1, 4), b.reshape(2, 4, -1))
                layers[module][name] = np.float32(layers[module][name] + scale * product.reshape(weights[name].shape))
    return {**params, "layers": layers}


@pytest.mark.parametrize(
    "targets, dtype, remat", [("*_proj", "float32", "dots"), ("q_proj, down_*", "bfloat16", "full")]
)
def test_an_adapter_adds_the_product_of_its_two_weights_to_the_layer(tiny, targets, dtype, remat):
    tiny = dataclasses.replace(tiny, dtype=dtype, remat=remat)
    plain, definition = define(tiny), with_adapters(tiny, targets=targets)
    params = numbers(definition)
    adapted, expected = logits(definition, params), logits(plain, merged(params, 24 / 4))
    bound = 2e-5 if dtype == "float32" else 3e-2
    assert np.abs(adapted - expected).max() < bound * np.abs(expected).max()
    without = logits(plain, merged(params, 0.0))
    assert np.abs(without - expected).max() > 4 * bound * np.abs(expected).max()


@pytest.mark.parametrize("targets, number", [("*_proj", 14), ("q_proj,down_*", 4), ("o_proj", 2)])
def test_adapters_are_counted_and_exist_where_they_are_asked_for(tiny, targets, number):
    definition = with_adapters(tiny, targets=targets)
    shapes = partition.split(definition.shapes(), "*lora*")[0]
    assert len(jax.tree.leaves(shapes)) == number
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(definition.shapes())) == definition.config.num_parameters


def test_the_gradient_of_adapters_alone_never_forms_one_of_the_weights(tiny):
    definition = with_adapters(tiny)
    adapters, rest = partition.split(definition.shapes(), "*lora*")

    def loss(adapters, rest):
        return definition.apply(partition.merge(adapters, rest), TOKENS, causal(TOKENS)).astype(jnp.float32).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(adapters, rest))
    whole = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(adapters, rest))
    of_mlp = "f32[32,48] = dot_general"  # A gradient of gate_proj, or W + A B.
    assert of_mlp in whole and of_mlp not in text


def test_decoding_reads_adapters_layer_by_layer(tiny):
    definition = with_adapters(tiny)
    unstacked = define(definition.config, is_stacked=False)
    params = decoding_params(numbers(definition), definition.config)
    expected = {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.leaves_with_path(unstacked.shapes())}
    assert {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.leaves_with_path(params)} == expected


def test_a_config_without_adapters_declares_what_it_did():
    definition = define(ModelConfig.of(tiny_config().model))
    assert not any("lora" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(definition.shapes()))
