"""What a config.json says, in either spelling, and what is refused by name."""

import json
import math

import numpy as np
import pytest

from hub_folders import content_of
from meap_jax.errors import ConfigError, DataError
from meap_jax.hf.config import read, write
from meap_jax.model.config import ModelConfig, RopeScaling
from meap_jax.model.rope import scaled_frequencies
from tiny_runs import tiny_config

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    "older, newer",
    [
        (dict(rope_theta=5e5), dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
        (
            dict(rope_theta=1e4, rope_scaling=dict(type="linear", factor=2.0), torch_dtype="bfloat16"),
            dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4), dtype="bfloat16"),
        ),
        (dict(rope_theta=1e6, rope_scaling=YARN), dict(rope_parameters={**YARN, "rope_theta": 1e6})),
        (dict(rope_scaling=None), dict()),
    ],
)
def test_both_spellings_of_rope_say_the_same(older, newer):
    assert read(content_of("llama", **older)) == read(content_of("llama", **newer))


def window(family, **fields):
    model = read(content_of(family, **fields)).model
    return model["window"], model["window_layers"]


def test_windows_count_as_transformers_counts_them():
    assert window("mistral") == (4_096, "all")
    assert window("mistral", sliding_window=None) == (0, "all")
    assert window("qwen2", sliding_window=8) == (0, "all")
    assert window("qwen2", sliding_window=8, use_sliding_window=True) == (0, "all")  # From layer 28 on, of 3.
    assert window("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1) == (8, "1,2")
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert window("qwen2", sliding_window=8, use_sliding_window=True, layer_types=types) == (8, "0,2")
    assert window("qwen2", sliding_window=8, use_sliding_window=False, layer_types=types) == (0, "all")


def test_what_a_file_leaves_out_is_what_transformers_takes_for_it():
    llama = read({"model_type": "llama"})
    assert (llama.seq_len, llama.model["num_kv_heads"], llama.model["head_dim"]) == (2_048, 32, 128)
    assert (llama.model["norm_eps"], llama.model["rope_base"], llama.model["tie_embeddings"]) == (1e-6, 1e4, False)
    assert read({"model_type": "mistral"}).model["num_kv_heads"] == 8
    assert read({"model_type": "qwen2"}).model["vocab_size"] == 151_936


@pytest.mark.parametrize(
    "family, fields, said",
    [
        ("gpt2", {}, "model_type 'gpt2', but this decoder knows llama, mistral, qwen2"),
        ("llama", dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        ("llama", dict(attention_bias=True), "attention_bias True"),
        ("llama", dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        ("llama", dict(quantization_config={"bits": 4}), "quantization_config, which may change"),
        ("llama", dict(sliding_window=8), "sliding_window, which may change"),
        ("qwen2", dict(residual_scale=2.0, logit_cap=30), "logit_cap, residual_scale"),
        ("llama", dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "scales RoPE by 'dynamic'"),
        ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "without low_freq_factor, high_freq_factor"),
        ("llama", dict(rope_scaling={**YARN, "short_factor": [1.0]}), "short_factor for RoPE of the kind 'yarn'"),
        ("llama", dict(rope_scaling=dict(rope_type="linear", factor="2")), "must have numbers"),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        ("llama", dict(num_hidden_layers="3"), "num_hidden_layers '3'"),
        ("llama", dict(hidden_size=0), "hidden_size 0"),
        ("qwen2", dict(use_sliding_window=True, layer_types=["chunked_attention"] * 3), "layer_types"),
    ],
)
def test_what_this_decoder_does_not_compute_is_refused_by_name(family, fields, said):
    with pytest.raises(DataError, match=said):
        read(content_of(family, **fields))


def test_a_field_that_is_known_to_change_nothing_can_be_passed_over():
    assert read(content_of("llama", made_by="us"), ignore=["made_by"]) == read(content_of("llama"))


def model(**fields):
    config = tiny_config()
    config.model.update(fields)
    return ModelConfig.of(config.model, "cpu")


@pytest.mark.parametrize(
    "fields, family",
    [
        ({}, "llama"),
        (dict(window=7), "mistral"),
        (dict(embed_dim=30), "mistral"),  # 4 heads don't divide it, which LlamaConfig refuses.
        (dict(qkv_bias=True), "qwen2"),
        (dict(qkv_bias=True, window=7, window_layers="1"), "qwen2"),
        (dict(tie_embeddings=True, rope_scaling=dict(kind="linear", factor=2.0)), "llama"),
        (dict(rope_scaling=dict(kind="yarn", factor=4.0, beta_fast=16.0, attention_factor=1.5)), "llama"),
        (dict(rope_scaling=dict(kind="llama3", factor=4.0, low_freq_factor=2.0)), "llama"),
    ],
)
def test_what_is_written_is_read_as_it_was(fields, family):
    written = json.loads(json.dumps(write(model(**fields), 96, 64, "float32")))
    found = read(written)
    config = tiny_config()
    config.model.update(found.model)
    assert (found.family, found.seq_len) == (family, 96)
    assert ModelConfig.of(config.model, "cpu") == model(**fields)


def test_what_no_family_has_is_not_written():
    with pytest.raises(ConfigError, match="qwen2 has no q, k and v without biases"):
        write(model(window=7, window_layers="1"), 96, 64, "float32")
    with pytest.raises(ConfigError, match="llama has no window"):
        write(model(window=7), 96, 64, "float32", family="llama")


# -------------------------------------------------------------------------------------------------------- scaled angles


def scaling(**fields):
    defaults = dict(
        kind="none", factor=4.0, original_seq_len=64, low_freq_factor=1.0, high_freq_factor=4.0, beta_slow=1.0,
        beta_fast=32.0, attention_factor=0.0, truncate=True,
    )  # fmt: skip
    return RopeScaling(**defaults | fields)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_fast_pairs_keep_their_angles_and_slow_ones_are_divided_by_the_factor(kind):
    half, base = 16, 10_000.0
    plain, _ = scaled_frequencies(half, base, scaling())
    found, magnitude = scaled_frequencies(half, base, scaling(kind=kind))
    ratio = plain / found
    assert (np.diff(ratio) >= -1e-6).all() and ratio[-1] == pytest.approx(4)
    assert ratio[0] == pytest.approx(4 if kind == "linear" else 1)
    assert magnitude == pytest.approx(0.1 * math.log(4) + 1 if kind == "yarn" else 1)
