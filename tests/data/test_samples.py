"""Samples in rows: every arrangement's loss and gradient against a loop over samples, and what packing keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_samples
from meap_jax.data.samples import plan_pieces
from meap_jax.data.store import EncodedDocument, TokenSpan
from meap_jax.errors import ConfigError
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.objective import Objective, make_inputs, named_keys
from meap_jax.train import micro_batches, summed_loss
from tiny_models import numbers
from tiny_runs import tiny_config
from tiny_samples import (
    BOS,
    END,
    MASK,
    answers_of,
    batch_of,
    blocks_of,
    chat_store,
    document,
    masked_losses,
    plan_spec,
    sample_spec,
    samples_alone,
    samples_in_one_sequence,
    static_masks,
)

ARRANGEMENTS = ("separate", "shared_prefix", "concat")


def objective_of(masks="static", **fields):
    c = tiny_config(**{"sft.masks": masks})
    c.objective.update(dict(name="meap", mask_ratio=tiny_samples.RATIO) | fields)
    return Objective.of(c)


def inputs_of(batch, step=0, **fields):
    return make_inputs(batch, objective_of(**fields), named_keys(tiny_config()), jnp.int32(step))


@pytest.fixture(scope="module")
def model():
    c = tiny_config()
    definition = define(ModelConfig.of(c.model, "cpu"))
    return definition, jax.tree.map(lambda p: 0.5 * p, numbers(definition))


@pytest.fixture(scope="module")
def documents():
    """Long and short answers, with one turn and with several, of which some are long."""
    rng = np.random.default_rng(0)
    turns = [[(76, 60)], [(124, 12)], [(84, 52)], [(32, 30), (4, 70)], [(3, 55), (6, 8), (1, 63)], [(85, 51)]]
    return [document(rng, own) for own in turns]  # 137 tokens each.


@pytest.fixture(scope="module")
def store(documents, tmp_path_factory):
    return chat_store(tmp_path_factory.mktemp("store"), documents)


def loss_and_gradient(model, inputs):
    definition, params = model
    return jax.jit(jax.value_and_grad(lambda p: summed_loss(definition, p, inputs)))(params)


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, expected)


# --------------------------------------------------------------------------------------------- against single samples


@pytest.mark.parametrize("loss", ["answers_and_masked", "masked"])
@pytest.mark.parametrize("arrangement", ["separate", "shared_prefix"])
def test_loss_and_gradient_are_those_of_clean_samples_and_of_masked_copies_by_themselves(
    model, store, documents, arrangement, loss
):
    inputs, samples = inputs_of(batch_of(store, plan_spec(arrangement, 420, loss=loss))), samples_alone(documents)

    @jax.jit
    @jax.value_and_grad
    def alone(params):
        clean, *_ = samples.losses(model[0], params, masks=False)
        _, masked, short = samples.losses(model[0], params, masks=True)
        # Without the clean answers of a sample, its short ones are learned in the copy.
        counts = clean if loss == "answers_and_masked" else jnp.where(samples.has_copy, short, clean)
        return counts.sum() + masked.sum()

    assert_close(loss_and_gradient(model, inputs), alone(model[1]))


@pytest.mark.parametrize("loss", ["answers_and_masked", "masked"])
@pytest.mark.parametrize("positions", ["run_on", "restart"])
def test_concat_is_prompt_clean_answer_and_masked_answer_in_one_causal_sequence(model, tmp_path, positions, loss):
    rng = np.random.default_rng(2)
    documents = [document(rng, [(58, 55)]), document(rng, [(22, 55), (10, 8)])]  # 169 tokens with their copies.
    batch = batch_of(chat_store(tmp_path, documents), plan_spec("concat", 420, loss=loss), sample_spec(positions))
    assert (batch.rope_positions is not None) == (positions == "restart")
    samples = samples_in_one_sequence(documents, positions == "restart")

    @jax.jit
    @jax.value_and_grad
    def alone(params):
        clean, masked, short = samples.losses(model[0], params, masks=True)
        return masked.sum() + (short if loss == "masked" else clean).sum()

    assert_close(loss_and_gradient(model, inputs_of(batch)), alone(model[1]))


def test_shared_prefix_gives_the_loss_and_gradient_of_separate_with_fewer_tokens(model, store):
    separate, shared = (batch_of(store, plan_spec(name, 420)) for name in ("separate", "shared_prefix"))
    assert_close(*(loss_and_gradient(model, inputs_of(batch)) for batch in (shared, separate)))
    assert (shared.segment_ids != 0).sum() < (separate.segment_ids != 0).sum()


def test_a_prompt_too_long_to_share_gives_two_pieces_and_the_same_loss(model, tmp_path):
    rng = np.random.default_rng(3)
    documents = [document(rng, [(80, 60)]), document(rng, [(5, 60)])]  # 141 tokens: twice the answer is too much.
    store = chat_store(tmp_path, documents)
    separate, shared = (batch_of(store, plan_spec(name, 150)) for name in ("separate", "shared_prefix"))
    assert_close(*(loss_and_gradient(model, inputs_of(batch)) for batch in (shared, separate)))
    counts = plan_pieces(store, "train", plan_spec("concat", 150)).counts
    assert (counts["samples"], counts["with_copy"]) == (2, 1), "concat has no other place for a copy"


@pytest.mark.parametrize("implementation", ["plain", "xla"])
def test_every_backend_that_takes_branches_gives_the_same(store, implementation, model):
    c = tiny_config(**{"model.attention": implementation})
    definition = define(ModelConfig.of(c.model, "cpu"))
    inputs = inputs_of(batch_of(store, plan_spec("shared_prefix", 420)))
    expected = loss_and_gradient(model, inputs)
    assert_close(loss_and_gradient((definition, model[1]), inputs), expected)


# ----------------------------------------------------------------------------------- three facts of the official code


@pytest.fixture(scope="module")
def long_answer(model):
    own = document(np.random.default_rng(8), [(10, 81)])
    is_masked = static_masks(0, own)
    assert is_masked.sum() == 8
    return own, is_masked


def copy_losses(model, own, is_masked):
    """[N - 1] losses of the masked copy, in its row of its own."""
    return masked_losses(*model, jnp.array(own.ids), is_masked)


def test_the_first_masked_tokens_loss_is_that_of_plain_next_token_prediction(model, long_answer):
    own, is_masked = long_answer
    first = np.flatnonzero(is_masked)[0]
    clean = masked_losses(*model, jnp.array(own.ids), np.zeros_like(is_masked))
    assert float(copy_losses(model, own, is_masked)[first - 1]) == pytest.approx(float(clean[first - 1]), abs=1e-5)


def test_the_last_mask_of_a_copy_influences_no_loss(model, tmp_path, long_answer):
    own, is_masked = long_answer
    inputs = inputs_of(batch_of(chat_store(tmp_path, [own]), plan_spec("separate", 100)))
    definition, params = model
    [copy] = np.flatnonzero(np.asarray(inputs.is_masked).any(axis=1))
    last = np.flatnonzero(np.asarray(inputs.is_masked[copy]))[-1]
    assert not np.asarray(inputs.loss_weights[copy, last:]).any()
    others = inputs._replace(tokens=inputs.tokens.at[copy, last].set(17))
    assert float(summed_loss(definition, params, inputs)) == float(summed_loss(definition, params, others))


def test_positions_before_the_first_mask_contribute_the_same(model, long_answer):
    own, is_masked = long_answer
    first = np.flatnonzero(is_masked)[0]
    clean = masked_losses(*model, jnp.array(own.ids), np.zeros_like(is_masked))
    np.testing.assert_allclose(copy_losses(model, own, is_masked)[:first], clean[:first], atol=1e-5)
    assert np.abs(copy_losses(model, own, is_masked)[first:] - clean[first:]).max() > 1e-3


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_masks_fall_in_copies_of_long_answers_alone_as_many_as_the_official_code_draws(store, documents, arrangement):
    batch = batch_of(store, plan_spec(arrangement, 420), sample_spec(masks="fresh"))
    expected = sum(
        max(1, int(0.1 * (length - 1))) for own in documents for _, length, *_ in own.spans if length - 1 > 50
    )
    draws = []
    for step in (0, 1):
        inputs = inputs_of(batch, step, masks="fresh")
        is_masked = np.asarray(inputs.is_masked)
        draws.append(is_masked)
        assert is_masked.sum() == expected
        assert np.asarray(batch.is_copy[:, :-1])[is_masked].all()
        assert not np.isin(np.asarray(batch.tokens[:, :-1])[is_masked], [BOS, END]).any()
        assert (np.asarray(inputs.tokens)[is_masked] == MASK).all()
        # Of a copy the masked tokens are targets and no others; of the rest, all answers.
        is_target = np.asarray(inputs.loss_weights) > 0
        of_copy = np.asarray(batch.is_copy[:, 1:])
        np.testing.assert_array_equal(is_target & of_copy, np.pad(is_masked, ((0, 0), (0, 1)))[:, 1:])
        assert (is_target & ~of_copy).sum() == sum(answers_of(own).sum() for own in documents)
    assert (draws[0] != draws[1]).any(), "masks are drawn anew in each step"


def test_static_masks_are_the_same_in_every_step(store):
    batch = batch_of(store, plan_spec("separate", 420))
    first, second = (inputs_of(batch, step) for step in (0, 1))
    np.testing.assert_array_equal(first.is_masked, second.is_masked)


def test_a_sweep_over_ratios_needs_fresh_masks(store):
    batch = batch_of(store, plan_spec("separate", 420))
    with pytest.raises(ConfigError, match="sft.masks is 'static', which masks with objective.mask_ratio only"):
        make_inputs(batch, objective_of(), named_keys(tiny_config()), jnp.int32(0), jnp.float32(0.3))


def test_an_answer_of_50_tokens_has_no_copy_and_one_of_51_has_five_masks(tmp_path):
    rng = np.random.default_rng(1)
    for size, copies in ((50, 0), (51, 1)):
        store = chat_store(tmp_path / str(size), [document(rng, [(6, size + 1)])])
        assert plan_pieces(store, "train", plan_spec("separate", 100)).counts["with_copy"] == copies
        inputs = inputs_of(batch_of(store, plan_spec("separate", 100), sample_spec(masks="fresh")), masks="fresh")
        assert inputs.is_masked.sum() == 5 * copies


def test_under_ntp_a_copy_is_a_second_sample(model, store, documents):
    """The control: the data of MEAP without its masks."""
    inputs = inputs_of(batch_of(store, plan_spec("separate", 420)), name="ntp")
    assert not inputs.is_masked.any()
    has_copy = [static_masks(number, own).any() for number, own in enumerate(documents)]
    expected = sum((1 + copied) * answers_of(own).sum() for own, copied in zip(documents, has_copy, strict=True))
    assert inputs.loss_weights.sum() == expected


@pytest.mark.parametrize("masks", ["fresh", "static"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_meap_at_ratio_0_learns_what_ntp_does_without_copies(model, store, arrangement, masks):
    samples = dataclasses.replace(sample_spec(masks=masks), mask_ratio=0.0)
    copies = inputs_of(batch_of(store, plan_spec(arrangement, 420), samples), mask_ratio=0.0, masks=masks)
    plain = inputs_of(batch_of(store, plan_spec("none", 420)), name="ntp")
    assert not copies.is_masked.any() and copies.loss_weights.sum() == plain.loss_weights.sum()
    assert_close(*(loss_and_gradient(model, inputs) for inputs in (copies, plain)))


# ---------------------------------------------------------------------------------------------------------- averaging


@pytest.mark.parametrize("num", [2, 4])
def test_the_size_of_micro_batches_does_not_change_the_gradient(model, store, num):
    batch = batch_of(store, plan_spec("separate", 250))
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * 4)[:4], batch)
    inputs = inputs_of(batch)
    definition, params = model

    def mean_gradient(num):
        micro = micro_batches(inputs, num)
        parts = [jax.tree.map(lambda x, i=i: x[i], micro) for i in range(num)]
        grads = [jax.grad(lambda p, part=part: summed_loss(definition, p, part))(params) for part in parts]
        return jax.tree.map(lambda *g: sum(g) / inputs.loss_weights.sum(), *grads)

    assert_close(mean_gradient(num), mean_gradient(1))


def test_rows_per_mean_averages_means_as_the_official_code_does_over_micro_batches(model, store):
    batch = batch_of(store, plan_spec("separate", 250))
    batch = jax.tree.map(lambda x: x[:4], batch)
    definition, params = model
    plain = inputs_of(batch)
    weighted = make_inputs(
        batch, dataclasses.replace(objective_of(), rows_per_mean=2), named_keys(tiny_config()), jnp.int32(0)
    )

    def mean_of_means(params):
        halves = [jax.tree.map(lambda x, rows=rows: x[rows], plain) for rows in (slice(0, 2), slice(2, 4))]
        return sum(summed_loss(definition, params, half) / half.loss_weights.sum() for half in halves) / 2

    def weighted_mean(params):
        return summed_loss(definition, params, weighted) / weighted.loss_weights.sum()

    assert_close(*(jax.value_and_grad(f)(params) for f in (weighted_mean, mean_of_means)))
    assert abs(float(mean_of_means(params) - summed_loss(definition, params, plain) / plain.loss_weights.sum())) > 1e-4


# ------------------------------------------------------------------------------------------------------------ packing

TURNS = st.lists(st.tuples(st.integers(1, 40), st.integers(2, 90)), min_size=1, max_size=3)


@settings(max_examples=40)
@given(
    st.lists(TURNS, min_size=1, max_size=8),
    st.sampled_from(["none", *ARRANGEMENTS]),
    st.sampled_from([64, 128, 300]),
    st.sampled_from(["answers_and_masked", "masked"]),
)
def test_every_sample_is_in_the_rows_once_whole_or_without_its_beginning(
    tmp_path_factory, conversations, arrangement, block_len, loss
):
    rng = np.random.default_rng(len(conversations))
    documents = [document(rng, turns) for turns in conversations]
    store = chat_store(tmp_path_factory.mktemp("store"), documents)
    blocks = blocks_of(store, plan_spec(arrangement, block_len, loss=loss), sample_spec())
    clean, copies = [], []
    for row in (blocks[i] for i in range(len(blocks))):
        assert row.tokens.shape == (block_len,)
        assert row.loss_weights.any() or row.maskable.any(), "a row without a target"
        is_copy = row.maskable & False if row.is_copy is None else row.is_copy
        for segment in range(1, row.segment_ids.max() + 1):
            is_own = row.segment_ids == segment
            if loss == "masked" and arrangement in ("separate", "shared_prefix"):  # A piece is a sample or its copy.
                is_copy = is_own & row.maskable[is_own].any()
            for found, chosen in ((clean, is_own & ~is_copy), (copies, is_own & is_copy)):
                if chosen.any():
                    found.append(row.tokens[chosen].tolist())

    kept = [[own.ids[0], *own.ids[1:][-(block_len - 1) :]] for own in documents]
    if loss == "answers_and_masked" or arrangement in ("none", "concat"):
        assert sorted(clean) == sorted(kept)
    assert all(ids[-1] == END for ids in clean + copies), "an answer's end is never cut off"
    for copy in copies:
        assert any(ids[-len(copy) :] == copy for ids in kept)


def test_a_row_of_a_sample_longer_than_a_block_keeps_bos_and_the_end_of_its_answer(tmp_path):
    own = document(np.random.default_rng(0), [(300, 20)])
    store = chat_store(tmp_path, [own])
    pieces = plan_pieces(store, "train", plan_spec("none", 65))
    assert pieces.counts == dict(samples=1, with_copy=0, without_room=0, truncated=1, skipped=0)
    [row] = [blocks_of(store, plan_spec("none", 65), sample_spec())[0]]
    assert row.tokens.tolist() == [BOS, *own.ids[-64:]]
    assert row.loss_weights.sum() == 20 and row.loss_weights[-20:].all()


def test_too_long_samples_are_left_out_where_the_config_says_so_and_their_lines_are_known(tmp_path):
    rng = np.random.default_rng(0)
    long, short = document(rng, [(300, 20)]), document(rng, [(5, 20)])
    long = EncodedDocument(long.ids, tuple(TokenSpan(*span[:3], {"line": 17.0}) for span in long.spans))
    pieces = plan_pieces(chat_store(tmp_path, [short, long]), "train", plan_spec("none", 65, too_long="skip"))
    assert pieces.counts == dict(samples=1, with_copy=0, without_room=0, truncated=0, skipped=1)
    assert pieces.skipped_lines.tolist() == [17] and len(pieces.slices) == 1


def test_held_out_rows_have_no_copies_and_say_where_answers_may_be_masked(tmp_path, documents):
    store = chat_store(tmp_path, documents, split=1)
    blocks = blocks_of(store, plan_spec("shared_prefix", 420), sample_spec(), "validation")
    rows = [blocks[i] for i in range(len(blocks))]
    assert all(row.is_copy is None and row.branch_ids is None for row in rows)
    assert sum(row.loss_weights.sum() for row in rows) == sum(answers_of(own).sum() for own in documents)
    assert sum(row.maskable.sum() for row in rows) == 59 + 51 + 69 + 54 + 62


def test_the_order_of_rows_and_their_content_repeat(store):
    first, again = (batch_of(store, plan_spec("separate", 250)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
