"""Exact match, and its equality with greedy decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_data
from meap_jax import sharding
from meap_jax.data.prepared import Blocks
from meap_jax.data.store import TokenSpan
from meap_jax.evals import Setting
from meap_jax.evals.retrieval import QUESTION_DTYPE, Retrieval, answer_positions, exact_matches, hits_at, questions
from meap_jax.evals.validation import Validation
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.model.visibility import causal
from meap_jax.models import Model
from meap_jax.objective import clean_inputs
from meap_jax.rows import Row, stacked
from meap_jax.statistics import binomial_interval
from tiny_runs import tiny_config

V, T = 40, 24  # No other dimension of the decoder is 40.


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    c = tiny_config(**{"model.vocab_size": V, "global_batch_size": 4, "seq_len": T})
    definition = define(ModelConfig.of(c.model))
    params = definition.init(jax.random.key(0))
    params["head"] = params["head"] * 20
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, V, (6, T + 1)).astype(np.uint8)
    answers = [(row, start, length) for row in range(6) for start, length in ((5, 1), (9, 2), (14, 3))]
    # Some answers are made right: what greedy decoding gives is written into the block.
    decode = jax.jit(lambda t: definition.apply(params, t, causal(t)))
    for row, start, length in answers[::2]:
        for position in range(start, start + length):
            logits = decode(jnp.asarray(tokens[:, :-1], jnp.int32))
            tokens[row, position] = int(logits[row, position - 1].argmax())
    rows = [ids[:20] if row == 3 else ids for row, ids in enumerate(tokens)]
    facts, asked = [(1, 1, 0), (2, 2, 1), (4, 1, 2)], [(5, 1, 2), (9, 2, 1), (14, 3, 0)]  # Start, length, fact.
    spans = [TokenSpan(s, n, role, {"fact": f}) for role, of in (("fact", facts), ("answer", asked)) for s, n, f in of]
    return c, definition, params, tiny_data.blocks_of(tmp_path_factory.mktemp("blocks"), rows, [spans] * 6, T + 1)


def setting(config, definition, num_devices):
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:num_devices])
    return Setting(Model(config, mesh, definition), "validation", *2 * [lambda: pytest.fail("the blocks are given")])


def test_teacher_forced_matches_equal_greedy_exact_match(setup):
    c, definition, params, blocks = setup
    result = Retrieval(setting(c, definition, 2), blocks).run(params)

    decode = jax.jit(lambda t: definition.apply(params, t, causal(t)))
    expected = []
    for a in blocks.spans("answer"):
        row = blocks[a["row"]].tokens
        truth = row[a["start"] : a["start"] + a["length"]].copy()
        row[a["start"] :] = 0  # Nothing of the answer is given away.
        for position in range(a["start"], a["start"] + a["length"]):
            row[position] = int(decode(jnp.asarray(row[None, :-1]))[0, position - 1].argmax())
        expected.append(np.array_equal(row[a["start"] : a["start"] + a["length"]], truth))
    assert [example["correct"] for example in result.examples] == expected
    assert 0 < sum(expected) < len(expected)
    assert result.metrics["accuracy"] == binomial_interval(sum(expected), len(expected))


def test_logits_of_answers_alone_are_computed(setup):
    _, definition, params, blocks = setup
    batch, at = stacked([blocks[i] for i in range(4)]), answer_positions(blocks.spans("answer"), 6, T)[:4]
    assert at.tolist() == [[4, 8, 9, 13, 14, 15]] * 4
    program = str(jax.make_jaxpr(functools.partial(hits_at, definition))(params, batch, at))
    assert f"f32[{4 * 6},{V}]" in program and f"f32[{4 * T},{V}]" not in program


def test_an_answer_is_right_only_if_each_of_its_tokens_is():
    hits = np.zeros((2, 10), bool)
    hits[0, 4:6] = True  # Tokens 5 and 6 of block 0 are predicted.
    spans = [(0, 5, 1), (0, 5, 2), (0, 5, 3), (0, 4, 2), (1, 5, 1)]
    answers = np.array([(*span, 0, 0, 1) for span in spans], QUESTION_DTYPE)
    assert exact_matches(hits, answers).tolist() == [True, True, False, False, False]
    # Other positions fill up the rows that are asked less, or nothing.
    assert answer_positions(answers, 3, 10).tolist() == [[3, 4, 5, 6], [4, 0, 1, 2], [0, 1, 2, 3]]


def test_depth_and_distance_are_those_of_the_fact_in_its_document(setup):
    *_, blocks = setup
    found = questions(blocks.spans("fact"), blocks.spans("answer"))
    asked = [(5, 1, 1, 1, 3), (9, 2, 0.5, 7, 3), (14, 3, 0, 13, 3)]
    assert found.tolist() == [(row, *question) for row in range(6) for question in asked]


def test_chance_is_the_mean_over_answers_of_one_in_the_facts_of_their_document(setup, tmp_path):
    c, definition, params, _ = setup
    facts = [[(1, 1, 0)], [(1, 1, 0), (2, 2, 1), (4, 1, 2), (6, 1, 3)]]
    asked = [[(9, 1, 0)], [(9, 1, 2), (10, 2, 1), (13, 1, 0)]]  # One answer of 1 fact, three of 4 facts.
    spans = [
        [TokenSpan(s, n, role, {"fact": f}) for role, of in (("fact", own), ("answer", ask)) for s, n, f in of]
        for own, ask in zip(facts, asked, strict=True)
    ]
    blocks = tiny_data.blocks_of(tmp_path, np.full((2, T + 1), 5, np.uint8), spans, T + 1)
    result = Retrieval(setting(c, definition, 1), blocks).run(params)
    assert [example["num_facts"] for example in result.examples] == [1, 4, 4, 4]
    assert result.metrics["chance"] == (pytest.approx((1 + 3 / 4) / 4), None, None)


def test_max_rows_limits_questions_and_rows(setup):
    c, definition, params, blocks = setup
    c = c.copy_and_resolve_references()
    c.eval.max_rows = 2
    result = Retrieval(setting(c, definition, 1), blocks).run(params)
    assert [example["row"] for example in result.examples] == [0, 0, 0, 1, 1, 1]


def test_validation_loss_is_the_mean_over_targets_and_the_masked_one_differs(setup):
    c, definition, params, blocks = setup
    result = Validation(setting(c, definition, 2), blocks).run(params)
    tokens, segments, *_ = stacked([blocks[i] for i in range(len(blocks))])
    inputs = clean_inputs(Row(jnp.asarray(tokens), jnp.asarray(segments)))
    logits = definition.apply(params, inputs.tokens, inputs.visibility)
    log_p = np.asarray(jax.nn.log_softmax(np.asarray(logits, np.float64)))
    losses = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    counts = segments[:, 1:] != 0
    metrics = result.metrics
    assert metrics["loss"].estimate == pytest.approx(losses[counts].mean(), rel=1e-5)
    assert metrics["masked_loss"].estimate != pytest.approx(metrics["loss"].estimate, rel=1e-3)
    assert metrics["loss"].low < metrics["loss"].estimate < metrics["loss"].high
    assert [example["tokens"] for example in result.examples] == counts.sum(axis=1).tolist()
    of_rows = [row[counted].mean() for row, counted in zip(losses, counts, strict=True)]
    assert [example["loss"] for example in result.examples] == pytest.approx(of_rows, rel=1e-5)


def test_the_masked_loss_is_the_same_wherever_training_masks(setup):
    c, definition, params, blocks = setup
    only = tiny_config(**{"model.vocab_size": V, "global_batch_size": 4, "seq_len": T, "objective.where": "only:fact"})
    where = Blocks(
        blocks._store, blocks._plan, blocks.block_len, blocks._pad_id,
        is_one_segment=blocks.is_one_segment, where="only:fact",
    )  # fmt: skip
    everywhere, some = (
        Validation(setting(config, definition, 1), of).run(params).metrics
        for config, of in ((c, blocks), (only, where))
    )
    assert where[0].maskable is not None and not where[0].maskable.all()
    assert some == everywhere
