"""What a batch becomes under each objective: what is hidden, what never is, and which key decides it."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meap_jax import config as config_lib
from meap_jax.errors import ConfigError
from meap_jax.fields import OBJECTIVES
from meap_jax.objective import Objective, clean_inputs, make_inputs, named_keys
from meap_jax.train import micro_batches

MASK, VOCAB = 3, 64
B, T = 4, 16

# Two documents a row, then padding: one token of it in the first row, three in the last.
SEGMENTS = np.ones((B, T + 1), np.int32)
SEGMENTS[:, 7:] = 2
for row, num_padding in enumerate([1, 0, 2, 3]):
    SEGMENTS[row, T + 1 - num_padding :] = 0
TOKENS = np.where(SEGMENTS, 4 + np.arange(B * (T + 1)).reshape(B, T + 1) % 57, 0).astype(np.int32)
BATCH = {"tokens": jnp.asarray(TOKENS), "segment_ids": jnp.asarray(SEGMENTS)}


def run_config(name="meap", **fields):
    c = config_lib.base()
    c.model.vocab_size = VOCAB
    c.objective.update(dict(name=name, mask_id=MASK, mask_ratio=0.3) | fields)
    return c


def inputs_of(name="meap", step=0, seed=0, ratio=None, **fields):
    c = run_config(name, **fields)
    c.seed = seed
    return make_inputs(BATCH, Objective.of(c), named_keys(c), jnp.int32(step), ratio)


def key_data(c):
    return {name: jax.random.key_data(key).tolist() for name, key in named_keys(c).items()}


# ------------------------------------------------------------------------------------------------------- the objectives


def test_ntp_leaves_the_inputs_clean_whatever_its_mask_ratio():
    inputs = inputs_of("ntp")
    np.testing.assert_array_equal(inputs.tokens, TOKENS[:, :-1])
    assert not inputs.is_masked.any()
    assert inputs.keep_embedding is None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_targets_are_the_clean_next_tokens(name):
    np.testing.assert_array_equal(inputs_of(name).targets, TOKENS[:, 1:])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_covers_every_target_but_padding(name):
    weights = inputs_of(name).loss_weights
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights, np.where(SEGMENTS[:, 1:] == 0, 0.0, 1.0))
    assert weights.sum(axis=1).tolist() == [15, 16, 14, 13]


def test_meap_puts_the_mask_id_in_the_gaps_and_changes_nothing_else():
    inputs = inputs_of("meap")
    assert inputs.is_masked.any()
    np.testing.assert_array_equal(inputs.tokens, np.where(inputs.is_masked, MASK, TOKENS[:, :-1]))
    assert inputs.keep_embedding is None


def test_meap_masks_the_exact_count_of_every_document_and_never_its_last_token():
    # 0.3 of 7, and of the 9, 9, 8 and 7 inputs of the second documents: the last token of a full row is only a target.
    is_masked = np.asarray(inputs_of("meap").is_masked)
    assert is_masked[:, :7].sum(axis=1).tolist() == [2, 2, 2, 2]
    assert is_masked[:, 7:].sum(axis=1).tolist() == [2, 2, 2, 2]
    assert not is_masked[:, 6].any()
    assert not is_masked[np.arange(B), [15, 15, 14, 13]].any()


def test_random_tokens_stand_in_the_gaps_of_meap():
    meap, noise = inputs_of("meap"), inputs_of("random_tokens")
    np.testing.assert_array_equal(noise.is_masked, meap.is_masked)
    np.testing.assert_array_equal(noise.tokens[~noise.is_masked], TOKENS[:, :-1][~np.asarray(noise.is_masked)])
    many = np.concatenate(
        [np.asarray(x.tokens[x.is_masked]) for x in (inputs_of("random_tokens", s) for s in range(60))]
    )
    # Every row of the embedding turns up but [MASK]'s.
    assert set(many.tolist()) == set(range(VOCAB)) - {run_config().objective.mask_id}


def test_token_dropout_drops_the_embeddings_in_the_gaps_of_meap():
    meap, dropout = inputs_of("meap"), inputs_of("token_dropout")
    np.testing.assert_array_equal(dropout.is_masked, meap.is_masked)
    np.testing.assert_array_equal(dropout.keep_embedding, ~np.asarray(meap.is_masked))
    np.testing.assert_array_equal(dropout.tokens, TOKENS[:, :-1])


@pytest.mark.parametrize("strategy", ["random", "span", "bernoulli", "official"])
@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_padding_is_never_masked(strategy, ratio):
    for step in range(3):
        inputs = inputs_of("meap", step, strategy=strategy, mask_ratio=ratio)
        assert not inputs.is_masked[inputs.segment_ids == 0].any()
        np.testing.assert_array_equal(inputs.segment_ids, SEGMENTS[:, :-1])


def test_clean_inputs_are_those_of_ntp():
    jax.tree.map(np.testing.assert_array_equal, clean_inputs(BATCH), inputs_of("ntp"))


@pytest.mark.parametrize("ratio", [None, 0.0])
def test_meap_at_ratio_0_is_ntp(ratio):
    meap = inputs_of("meap", mask_ratio=0.0) if ratio is None else inputs_of("meap", ratio=jnp.float32(ratio))
    jax.tree.map(np.testing.assert_array_equal, meap, inputs_of("ntp"))


def test_a_ratio_given_replaces_that_of_the_config():
    given, configured = inputs_of("meap", ratio=jnp.float32(0.5)), inputs_of("meap", mask_ratio=0.5)
    np.testing.assert_array_equal(given.is_masked, configured.is_masked)
    assert given.is_masked.sum() > inputs_of("meap").is_masked.sum()


@pytest.mark.parametrize("step", [0, 1, 50, 51, 152])
def test_the_official_strategy_masks_all_rows_of_a_step_as_the_official_code_does(step):
    positions = random.Random(50 + step % 51).sample(range(T - 1), 4)  # int(16 * 0.3)
    expected = np.isin(np.arange(T), positions) & (SEGMENTS[:, :-1] != 0)
    inputs = inputs_of("meap", step, strategy="official")
    np.testing.assert_array_equal(inputs.is_masked, expected)
    np.testing.assert_array_equal(inputs.tokens, np.where(expected, MASK, TOKENS[:, :-1]))


def test_the_official_strategy_works_for_a_traced_step():
    c = run_config(strategy="official")
    masked = jax.jit(lambda step: make_inputs(BATCH, Objective.of(c), named_keys(c), step).is_masked)
    np.testing.assert_array_equal(masked(jnp.int32(52)), inputs_of("meap", 1, strategy="official").is_masked)


def test_the_official_strategy_refuses_another_ratio_than_its_tables():
    with pytest.raises(
        ConfigError, match="objective.strategy is 'official', which masks with objective.mask_ratio only"
    ):
        inputs_of("meap", strategy="official", ratio=jnp.float32(0.5))


# --------------------------------------------------------------------------------------------------------------- chance


def test_step_and_seed_change_the_draw_and_the_same_ones_repeat_it():
    first = inputs_of("random_tokens", step=5, seed=1)
    jax.tree.map(np.testing.assert_array_equal, first, inputs_of("random_tokens", step=5, seed=1))
    for other in (inputs_of("random_tokens", step=6, seed=1), inputs_of("random_tokens", step=5, seed=2)):
        assert (other.is_masked != first.is_masked).any()


def test_the_same_seed_gives_the_same_keys_and_every_use_has_its_own():
    keys = key_data(run_config())
    assert list(keys) == ["init", "data", "mask", "noise"]
    assert keys == key_data(run_config())
    assert len(set(map(tuple, keys.values()))) == 4


@pytest.mark.parametrize("name", ["init", "data", "mask", "noise"])
def test_a_seed_of_its_own_changes_the_key_of_one_use_only(name):
    alone, other_seed = run_config(), run_config()
    alone.seeds[name], other_seed.seed = 7, 7
    keys, keys_alone, keys_7 = key_data(run_config()), key_data(alone), key_data(other_seed)
    assert keys_alone[name] != keys[name]
    assert keys_alone == keys | {name: keys_7[name]}


@pytest.mark.parametrize("seed, changes_positions", [("mask", True), ("noise", False)])
def test_the_mask_key_moves_the_gaps_and_the_noise_key_fills_them(seed, changes_positions):
    c = run_config("random_tokens")
    before = make_inputs(BATCH, Objective.of(c), named_keys(c), jnp.int32(0))
    c.seeds[seed] = 7
    after = make_inputs(BATCH, Objective.of(c), named_keys(c), jnp.int32(0))
    assert bool((before.is_masked != after.is_masked).any()) == changes_positions
    assert (before.tokens != after.tokens).any()


# -------------------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("num", [1, 2, 4])
def test_micro_batches_deal_out_rows_with_the_masks_drawn_for_the_whole_batch(name, num):
    inputs = inputs_of(name)
    micro = micro_batches(inputs, num)
    assert micro.tokens.shape == (num, B // num, T)
    for i in range(num):
        jax.tree.map(lambda m, x, i=i: np.testing.assert_array_equal(m[i], x[i::num]), micro, inputs)
