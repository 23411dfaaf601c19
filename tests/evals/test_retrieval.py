"""Exact match, and its equality with greedy decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_data
from meap_jax import sharding
from meap_jax.config import base
from meap_jax.data.store import TokenSpan
from meap_jax.evals.retrieval import QUESTION_DTYPE, Retrieval, exact_matches, questions
from meap_jax.evals.validation import Validation
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.model.visibility import causal

V, T = 32, 24


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    c = base()
    c.model.update(dict(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, embed_dim=16, mlp_dim=24, vocab_size=V))
    c.objective.mask_id, c.global_batch_size, c.seq_len = 3, 4, T
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


def test_teacher_forced_matches_equal_greedy_exact_match(setup):
    c, definition, params, blocks = setup
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:2])
    answers = Retrieval(c, definition, blocks, mesh).answers(params)

    decode = jax.jit(lambda t: definition.apply(params, t, causal(t)))
    expected = []
    for a in blocks.spans("answer"):
        row = blocks[a["row"]]["tokens"]
        truth = row[a["start"] : a["start"] + a["length"]].copy()
        row[a["start"] :] = 0  # Nothing of the answer is given away.
        for position in range(a["start"], a["start"] + a["length"]):
            row[position] = int(decode(jnp.asarray(row[None, :-1]))[0, position - 1].argmax())
        expected.append(np.array_equal(row[a["start"] : a["start"] + a["length"]], truth))
    assert answers.correct.tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_an_answer_is_right_only_if_each_of_its_tokens_is():
    hits = np.zeros((2, 10), bool)
    hits[0, 4:6] = True  # Tokens 5 and 6 of block 0 are predicted.
    answers = np.array(
        [(0, 5, 1, 0, 0), (0, 5, 2, 0, 0), (0, 5, 3, 0, 0), (0, 4, 2, 0, 0), (1, 5, 1, 0, 0)], QUESTION_DTYPE
    )
    assert exact_matches(hits, answers).tolist() == [True, True, False, False, False]


def test_depth_and_distance_are_those_of_the_fact_in_its_document(setup):
    *_, blocks = setup
    found = questions(blocks.spans("fact"), blocks.spans("answer"))
    asked = [(5, 1, 1, 1), (9, 2, 0.5, 7), (14, 3, 0, 13)]
    assert found.tolist() == [(row, *question) for row in range(6) for question in asked]


def test_max_rows_limits_questions_and_rows(setup):
    c, definition, params, blocks = setup
    c = c.copy_and_resolve_references()
    c.eval.max_rows = 2
    answers = Retrieval(c, definition, blocks, sharding.make_mesh(c.mesh, jax.devices()[:1])).answers(params)
    assert len(answers.correct) == 6


def test_validation_loss_is_the_mean_over_targets_and_the_masked_one_differs(setup):
    c, definition, params, blocks = setup
    values = dict(Validation(c, definition, blocks, sharding.make_mesh(c.mesh, jax.devices()[:2])).run(params))
    tokens, segments = blocks.rows(0, len(blocks)).values()
    total, count = 0.0, 0
    logits = definition.apply(
        params, jnp.asarray(tokens[:, :-1]), causal(jnp.asarray(tokens[:, :-1]), jnp.asarray(segments[:, :-1]))
    )
    for row in range(len(tokens)):
        for t in range(T):
            if segments[row, t + 1]:
                x = np.asarray(logits[row, t], np.float64)
                total += np.log(np.exp(x - x.max()).sum()) + x.max() - x[tokens[row, t + 1]]
                count += 1
    assert values["loss"] == pytest.approx(total / count, rel=1e-5)
    assert values["masked_loss"] != pytest.approx(values["loss"], rel=1e-3)
