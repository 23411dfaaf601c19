"""What a batch becomes under each objective: what is hidden, what never is, and which key decides it."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meap_jax import sharding
from meap_jax.errors import ConfigError
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.model.visibility import causal
from meap_jax.objective import OBJECTIVES, Objective, clean_inputs, make_inputs, named_keys
from meap_jax.rows import Row
from meap_jax.train import micro_batches, summed_loss
from tiny_models import mesh_of
from tiny_runs import tiny_config

MASK, VOCAB = 3, 64
B, T = 4, 16

# Two documents a row, then padding: one token of it in the first row, three in the last.
SEGMENTS = np.ones((B, T + 1), np.int32)
SEGMENTS[:, 7:] = 2
for row, num_padding in enumerate([1, 0, 2, 3]):
    SEGMENTS[row, T + 1 - num_padding :] = 0
TOKENS = np.where(SEGMENTS, 4 + np.arange(B * (T + 1)).reshape(B, T + 1) % 57, 0).astype(np.int32)
BATCH = Row(jnp.asarray(TOKENS), jnp.asarray(SEGMENTS))


def run_config(name="meap", seeds=None, **fields):
    c = tiny_config(**(seeds or {}))
    c.objective.update(dict(name=name, mask_ratio=0.3) | fields)
    return c


def inputs_of(name="meap", step=0, ratio=None, row=BATCH, **fields):
    c = run_config(name, **fields)
    return make_inputs(row, Objective.of(c), named_keys(c), jnp.int32(step), ratio)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@jax.jit
def loss_and_gradient(inputs):
    """The summed loss of a tiny decoder, and its gradient."""
    definition = define(ModelConfig.of(run_config().model))
    params = jax.tree.map(lambda p: 0.1 + 0.3 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), definition.shapes())
    return jax.value_and_grad(lambda p: summed_loss(definition, p, inputs))(params)


# ------------------------------------------------------------------------------------------------------- the objectives


def test_ntp_leaves_the_inputs_clean_whatever_its_mask_ratio_and_so_does_meap_at_ratio_0():
    clean = clean_inputs(BATCH)
    np.testing.assert_array_equal(clean.tokens, TOKENS[:, :-1])
    assert not clean.is_masked.any() and clean.keep_embedding is None
    for inputs in (inputs_of("ntp"), inputs_of(mask_ratio=0.0), inputs_of(ratio=jnp.float32(0.0))):
        assert_equal(inputs, clean)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_ntp_at_ratio_0(name):
    assert_equal(inputs_of(name, mask_ratio=0.0), clean_inputs(BATCH))
    # Traced, the program has its gaps, but the loss and its gradient are those of NTP.
    traced = jax.jit(lambda ratio: inputs_of(name, ratio=ratio))(jnp.float32(0.0))
    assert not traced.is_masked.any()
    (loss, gradient), (ntp, of_ntp) = loss_and_gradient(traced), loss_and_gradient(clean_inputs(BATCH))
    np.testing.assert_allclose(loss, ntp, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), gradient, of_ntp)
    assert traced.clean_weights.sum() == clean_inputs(BATCH).loss_weights.sum()


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "mir"])
def test_targets_are_the_clean_next_tokens_and_the_loss_covers_all_but_padding(name):
    inputs = inputs_of(name)
    np.testing.assert_array_equal(inputs.targets, TOKENS[:, 1:])
    assert inputs.loss_weights.dtype == jnp.float32
    np.testing.assert_array_equal(inputs.loss_weights, np.where(SEGMENTS[:, 1:] == 0, 0.0, 1.0))
    assert inputs.loss_weights.sum(axis=1).tolist() == [15, 16, 14, 13]


def test_meap_masks_the_exact_count_of_every_document_and_never_its_last_token():
    inputs = inputs_of("meap")
    is_masked = np.asarray(inputs.is_masked)
    # 0.3 of 7, and of the 9, 9, 8 and 7 inputs of the second documents: the last token of a full row is only a target.
    assert is_masked[:, :7].sum(axis=1).tolist() == is_masked[:, 7:].sum(axis=1).tolist() == [2, 2, 2, 2]
    assert not is_masked[:, 6].any() and not is_masked[np.arange(B), [15, 15, 14, 13]].any()
    # Nothing else changes.
    np.testing.assert_array_equal(inputs.tokens, np.where(is_masked, MASK, TOKENS[:, :-1]))
    assert inputs.keep_embedding is None


def test_random_tokens_fill_the_gaps_of_meap():
    meap, noise = inputs_of("meap"), inputs_of("random_tokens")
    np.testing.assert_array_equal(noise.is_masked, meap.is_masked)
    np.testing.assert_array_equal(noise.tokens[~noise.is_masked], TOKENS[:, :-1][~np.asarray(noise.is_masked)])
    draws = [inputs_of("random_tokens", step) for step in range(60)]
    # Every row of the embedding turns up but [MASK]'s.
    assert {int(token) for x in draws for token in x.tokens[x.is_masked]} == set(range(VOCAB)) - {MASK}


def test_token_dropout_drops_the_embeddings_in_the_gaps_of_meap():
    meap, dropout = inputs_of("meap"), inputs_of("token_dropout")
    np.testing.assert_array_equal(dropout.is_masked, meap.is_masked)
    np.testing.assert_array_equal(dropout.keep_embedding, ~np.asarray(meap.is_masked))
    np.testing.assert_array_equal(dropout.tokens, TOKENS[:, :-1])


def test_mir_lets_a_row_be_followed_by_its_masked_copy_of_less_weight():
    mir, meap, clean = inputs_of("mir", masked_weight=0.25), inputs_of("meap"), clean_inputs(BATCH)
    without_mark = jax.tree.map(lambda x: x[0::2], mir)._replace(is_masked_copy=None)
    assert_equal(without_mark, clean)
    copies = jax.tree.map(lambda x: x[1::2], mir)
    assert_equal(copies._replace(is_masked_copy=None, loss_weights=4 * copies.loss_weights), meap)
    assert mir.is_masked_copy[:, 0].tolist() == [False, True] * B
    np.testing.assert_array_equal(mir.clean_weights.sum(), clean.loss_weights.sum())


def test_the_loss_of_mir_is_that_of_clean_inputs_and_weighted_that_of_masked_ones():
    (clean, of_clean), (masked, of_masked), (mir, of_mir) = (
        loss_and_gradient(inputs) for inputs in (clean_inputs(BATCH), inputs_of("meap"), inputs_of("mir"))
    )
    np.testing.assert_allclose(mir, clean + 0.4 * masked, rtol=1e-6)
    expected = jax.tree.map(lambda x, y: x + 0.4 * y, of_clean, of_masked)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), of_mir, expected)


def test_mir_without_a_weight_is_ntp_and_a_copy_without_gaps_has_none():
    assert_equal(inputs_of("mir", masked_weight=0.0), clean_inputs(BATCH))
    some = BATCH._replace(maskable=jnp.broadcast_to(jnp.arange(B)[:, None] > 1, TOKENS.shape))
    weights = inputs_of("mir", row=some).loss_weights.sum(axis=1)
    np.testing.assert_allclose(weights, [15, 0, 16, 0, 14, 5.6, 13, 5.2], rtol=1e-6)


@pytest.mark.parametrize(
    "fields, passes",
    [({}, 2), (dict(masked_weight=0.0), 1), (dict(mask_ratio=0.0), 1), (dict(mask_ratio=0.0, ramp_from=0.5), 2),
     (dict(name="meap"), 1)],
)  # fmt: skip
def test_a_step_of_mir_is_two_passes_where_there_are_copies(fields, passes):
    assert Objective.of(run_config(**dict(name="mir") | fields)).num_passes == passes


def test_under_fcm_no_later_position_sees_the_gaps_and_the_first_token_of_a_document_is_none():
    inputs, clean = inputs_of("fcm", mask_ratio=0.5), clean_inputs(BATCH)
    gaps = np.asarray(inputs.is_masked)
    # Half of the 6 that are not the first, and of the 8, 8, 7 and 6 in the second documents.
    assert gaps[:, :7].sum(axis=1).tolist() == [3] * 4 and gaps[:, 7:].sum(axis=1).tolist() == [4, 4, 3, 3]
    assert not inputs_of("fcm", mask_ratio=1.0).is_masked[:, [0, 7]].any()
    sees = np.asarray(clean.visibility.mask()) & (~gaps[:, None, :] | np.eye(T, dtype=bool))
    np.testing.assert_array_equal(inputs.visibility.mask(), sees)
    assert_equal(inputs._replace(is_masked=clean.is_masked, forgotten=None), clean)


def test_dropout_hides_no_position_and_drops_hidden_states_at_the_ratio_of_the_step():
    inputs = inputs_of("dropout", step=10, ramp_from=0.0, mask_ratio=0.5)
    np.testing.assert_array_equal(inputs.dropout.rates, np.full((B, 1), 0.25))
    assert len(set(inputs.dropout.seeds[:, 0].tolist())) == B
    assert (inputs.dropout.seeds != inputs_of("dropout", step=11).dropout.seeds).all()
    assert_equal(inputs._replace(dropout=None), clean_inputs(BATCH))


@pytest.mark.parametrize("strategy", ["random", "span", "bernoulli", "official"])
@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_padding_is_never_masked(strategy, ratio):
    for step in range(3):
        inputs = inputs_of("meap", step, strategy=strategy, mask_ratio=ratio)
        assert not inputs.is_masked[inputs.segment_ids == 0].any()
        np.testing.assert_array_equal(inputs.segment_ids, SEGMENTS[:, :-1])


def test_spans_have_the_length_of_the_config():
    assert (inputs_of(strategy="span", span_length=1).is_masked != inputs_of(strategy="span").is_masked).any()


def test_a_ratio_given_replaces_that_of_the_config():
    given, configured = inputs_of("meap", ratio=jnp.float32(0.5)), inputs_of("meap", mask_ratio=0.5)
    np.testing.assert_array_equal(given.is_masked, configured.is_masked)
    assert given.is_masked.sum() > inputs_of("meap").is_masked.sum()


def test_the_official_strategy_masks_all_rows_of_a_step_as_the_official_code_does():
    traced = jax.jit(lambda step: inputs_of("meap", step, strategy="official"))
    for step in (0, 1, 50, 51, 152):
        positions = random.Random(50 + step % 51).sample(range(T - 1), 4)  # int(16 * 0.3)
        expected = np.isin(np.arange(T), positions) & (SEGMENTS[:, :-1] != 0)
        np.testing.assert_array_equal(traced(step).is_masked, expected)
        np.testing.assert_array_equal(traced(step).tokens, np.where(expected, MASK, TOKENS[:, :-1]))
    with pytest.raises(ConfigError, match="'official', which masks with objective.mask_ratio only"):
        inputs_of("meap", strategy="official", ratio=jnp.float32(0.5))


# ------------------------------------------------------------------------------------------------------ fields of a row


def test_masks_fall_only_where_the_row_allows_them():
    maskable = np.zeros((B, T + 1), bool)
    maskable[:, 2:12] = True
    inputs = inputs_of(row=BATCH._replace(maskable=jnp.asarray(maskable)), mask_ratio=1.0)
    candidates = maskable[:, :-1].copy()
    candidates[:, [6, 11]] = False  # The last of each document that may be masked.
    np.testing.assert_array_equal(inputs.is_masked, candidates)


def test_loss_weights_of_a_row_are_those_of_its_targets_and_padding_has_none():
    weights = np.random.default_rng(0).random((B, T + 1), np.float32)
    inputs = clean_inputs(BATCH._replace(loss_weights=jnp.asarray(weights)))
    np.testing.assert_array_equal(inputs.loss_weights, np.where(SEGMENTS[:, 1:] == 0, 0, weights[:, 1:]))


def test_positions_and_branches_of_a_row_decide_who_sees_whom():
    """Two continuations of one prompt in a row give the logits that each would give alone."""
    definition = define(ModelConfig.of(run_config().model))
    params, rng = definition.init(jax.random.key(0)), np.random.default_rng(0)
    prompt, left, right = (rng.integers(4, VOCAB, (1, n)).astype(np.int32) for n in (4, 3, 5))
    row = Row(
        tokens=jnp.concatenate([prompt, left, right, np.zeros((1, 1), np.int32)], axis=1),
        positions=jnp.array([[*range(4), *range(4, 7), *range(4, 9), 9]], jnp.int32),
        branch_ids=jnp.array([[0] * 4 + [1] * 3 + [2] * 6], jnp.int32),
    )
    inputs = clean_inputs(row)
    together = definition.apply(params, inputs.tokens, inputs.visibility)
    for branch, place in ((left, slice(4, 7)), (right, slice(7, 12))):
        alone = jnp.concatenate([prompt, branch], axis=1)
        expected = definition.apply(params, alone, causal(alone))[:, 4:]
        np.testing.assert_allclose(together[:, place], expected, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- chance


def test_step_and_seed_change_the_draw_and_the_same_ones_repeat_it():
    first, again = (inputs_of("random_tokens", step=5, seeds={"seed": 1}) for _ in range(2))
    assert_equal(first, again)
    for step, seed in ((6, 1), (5, 2)):
        assert (inputs_of("random_tokens", step, seeds={"seed": seed}).is_masked != first.is_masked).any()
    # The noise too is the step's own: at ratio 1 all but the last of each document is hidden, at any step.
    first, second = (inputs_of("random_tokens", step, mask_ratio=1.0) for step in (0, 1))
    np.testing.assert_array_equal(first.is_masked, second.is_masked)
    assert (first.tokens != second.tokens).any()


def test_every_use_has_a_key_of_its_own_which_its_own_seed_changes_alone():
    def keys(**seeds):
        named = named_keys(tiny_config(**seeds))
        return {name: tuple(jax.random.key_data(key).tolist()) for name, key in named.items()}

    assert list(keys()) == ["init", "data", "mask", "noise"] and len(set(keys().values())) == 4
    for name, key in keys(seed=7).items():
        assert key != keys()[name]
        assert keys(**{f"seeds.{name}": 7}) == keys() | {name: key}


@pytest.mark.parametrize("seed, changes_positions", [("mask", True), ("noise", False)])
def test_the_mask_key_moves_the_gaps_and_the_noise_key_fills_them(seed, changes_positions):
    before, after = (inputs_of("random_tokens", seeds=seeds) for seeds in ({}, {f"seeds.{seed}": 7}))
    assert bool((before.is_masked != after.is_masked).any()) == changes_positions
    assert (before.tokens != after.tokens).any()


# --------------------------------------------------------------------------------------------------------------- ramps


def ramp(step, **fields):
    """Inputs of a step of twenty, masked by a ramp."""
    return inputs_of(step=step, **dict(ramp_from=0.0, ramp_begin=0.25, ramp_end=0.75, mask_ratio=0.6) | fields)


def test_a_ramp_is_ntp_before_it_begins_and_the_constant_ratio_behind_its_end():
    for step in (0, 3, 5):
        assert_equal(ramp(step), clean_inputs(BATCH))
    for step in (15, 19):
        assert_equal(ramp(step), inputs_of(step=step, ratio=jnp.float32(0.6)))


def test_between_its_ends_a_ramp_is_a_straight_line_up_or_down():
    objective = Objective.of(run_config(ramp_from=0.1, ramp_begin=0.25, ramp_end=0.75, mask_ratio=0.5))
    ratios = [float(objective.ratio_at(jnp.int32(step))) for step in range(20)]
    expected = np.interp(np.arange(20), [5, 15], [0.1, 0.5])
    np.testing.assert_allclose(ratios, expected, rtol=1e-6)
    down = Objective.of(run_config(ramp_from=0.5, mask_ratio=0.1))
    assert [round(float(down.ratio_at(jnp.int32(step))), 3) for step in (0, 10, 20)] == [0.5, 0.3, 0.1]


def test_a_ramp_masks_what_the_ratio_of_its_step_would():
    for step in (8, 12):
        objective = Objective.of(run_config(ramp_from=0.0, ramp_begin=0.25, ramp_end=0.75, mask_ratio=0.6))
        ratio = objective.ratio_at(jnp.int32(step))
        assert_equal(ramp(step), inputs_of(step=step, ratio=ratio))
    fractions = [float(ramp(step).is_masked.mean()) for step in (6, 10, 14)]
    assert fractions[0] < fractions[1] < fractions[2]


def test_a_row_draws_its_own_ratio_up_to_that_of_the_step():
    rows = Row(jnp.full((1000, 101), 4, jnp.int32))
    counts = np.asarray(inputs_of(row=rows, ratio_per_row=True, mask_ratio=0.5).is_masked.sum(axis=1))
    # From 1 (any ratio above 0 masks something) to 49, and each as often: 24.5 in the mean, with a spread of 14.4.
    assert counts.min() == 1 and counts.max() == 49
    assert abs(counts.mean() - 24.5) < 4.5 * 14.4 / np.sqrt(1000) and abs(counts.std() - 14.4) < 1
    # Its positions are the first of those that the constant ratio draws, so that nothing else changes.
    whole, own = (inputs_of(ratio_per_row=way, mask_ratio=0.9).is_masked for way in (False, True))
    assert not (own & ~whole).any() and own.sum() < whole.sum()
    rates = inputs_of("dropout", ratio_per_row=True, mask_ratio=0.5).dropout.rates
    assert len(set(rates[:, 0].tolist())) == B and 0 <= rates.min() and rates.max() < 0.5


def test_ratios_of_rows_keep_to_ramps_and_to_the_ratio_0():
    assert_equal(ramp(3, ratio_per_row=True), clean_inputs(BATCH))
    assert_equal(ramp(19, ratio_per_row=True), inputs_of(step=19, mask_ratio=0.6, ratio_per_row=True))
    assert_equal(inputs_of(mask_ratio=0.0, ratio_per_row=True), clean_inputs(BATCH))


def test_ntp_has_no_ramp():
    assert_equal(ramp(19, name="ntp"), clean_inputs(BATCH))


# -------------------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("num", [1, 2, 4])
def test_micro_batches_deal_out_rows_with_the_masks_drawn_for_the_whole_batch(name, num):
    inputs = inputs_of(name)
    micro = micro_batches(inputs, num)
    assert micro.tokens.shape == (num, len(inputs.tokens) // num, T)
    for i in range(num):
        jax.tree.map(lambda m, x, i=i: np.testing.assert_array_equal(m[i], x[i::num]), micro, inputs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_draw_is_the_same_on_8_devices(name):
    mesh = mesh_of(data=4, fsdp=2)
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    both = jax.tree.map(lambda x: jnp.concatenate([x, x]), BATCH)

    def draw(row):
        return inputs_of(name, row=row, ratio_per_row=True, mask_ratio=0.6)

    sharded = jax.jit(draw, in_shardings=rows, out_shardings=everywhere)(jax.device_put(both, rows))
    assert_equal(sharded, jax.jit(draw)(both))
