"""Questions about facts: their documents, their places in rows, and their agreement with greedy decoding."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_settings
from meap_jax.corpus.retrieval import FILLERS
from meap_jax.errors import ConfigError
from meap_jax.evals import facts, make_evaluators
from meap_jax.evals.facts import Kind, cells, make_set
from meap_jax.model.visibility import causal
from tokenizer_kinds import kind


@settings(max_examples=20)
@given(
    kinds=st.lists(st.builds(Kind, st.integers(1, 16), st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_fact_is_asked_once_and_its_answer_is_where_the_record_says(kinds, seed):
    tokenizer = kind("bpe")
    made = make_set(tokenizer, kinds, 16, 16, seed)
    tokens, segments = made.rows.tokens, made.rows.segment_ids
    assert len(tokens) % facts.ROWS_AT_A_TIME == 0
    documents = {
        (row, s): tokens[row][segments[row] == s].tolist() for row in range(len(tokens)) for s in segments[row]
    }
    of_documents = collections.Counter()
    for row, start, length, num_facts, num_fillers, depth, distance in made.answers.tolist():
        segment = int(segments[row, start])
        text = tokenizer.decode(documents[row, segment])
        value = tokenizer.decode(tokens[row, start : start + length].tolist()).strip()
        assert tokens[row, start - distance : start - distance + length].tolist() == (
            tokens[row, start : start + length].tolist()
        )
        assert segments[row, start - distance] == segment
        key = tokenizer.decode(tokens[row, :start].tolist()).split()[-1]
        assert f"of the {key} is {value}." in text and text.count(f"Tell the {key} {value}.") == 1
        assert text.count("The access code of the") == num_facts
        assert sum(text.count(filler) for filler in FILLERS) == num_fillers
        before = text.index(f"The access code of the {key} is {value}.")
        assert round(depth * max(num_facts - 1, 1)) == text[:before].count("The access code of the")
        of_documents[row, segment] += 1
    for (row, segment), asked in of_documents.items():
        assert asked == tokenizer.decode(documents[row, segment]).count("The access code of the")
    assert sum(of_documents.values()) == sum(k.num_facts * k.num_documents for k in kinds)
    assert len(of_documents) == sum(k.num_documents for k in kinds)


def test_documents_of_a_kind_depend_on_no_other_kind_and_fill_rows():
    tokenizer = kind("bpe")
    alone = make_set(tokenizer, [Kind(4, 1, 5)], 16, 16, 7)
    beside = make_set(tokenizer, [Kind(16, 0, 2), Kind(4, 1, 5)], 16, 16, 7)

    def texts(made, num_facts):
        own = {
            (a["row"], made.rows.segment_ids[a["row"], a["start"]]) for a in made.answers if a["num_facts"] == num_facts
        }
        return [tokenizer.decode(made.rows.tokens[r][made.rows.segment_ids[r] == s].tolist()) for r, s in sorted(own)]

    assert texts(alone, 4) == texts(beside, 4) and len(texts(alone, 4)) == 5
    assert (beside.rows.segment_ids.max(axis=1) > 1).any()


@pytest.fixture(scope="module")
def asked():
    """A setting with few documents, and a tiny model's parameters."""
    setting = tiny_settings.setting(facts__counts="2,5", facts__fillers="0,3", facts__documents=3)
    return setting, tiny_settings.params(setting)


def test_matches_are_those_of_greedy_decoding(asked):
    setting, params = asked
    [(name, evaluator)] = make_evaluators(setting, "facts").items()
    definition = setting.model.definition
    params["head"] = params["head"] * 20
    with jax.set_mesh(setting.model.mesh):
        metrics, examples = evaluator.run(params)
    rows, answers = evaluator._set.rows, evaluator._set.answers
    assert name == "facts" and len(examples) == len(answers) == 2 * 3 * (2 + 5)

    logits = jax.jit(lambda t, s: definition.apply(params, t, causal(t, s)))
    tokens = rows.tokens.copy()
    for example, answer in list(zip(examples, answers, strict=True))[::5]:
        row, start, length = (int(answer[key]) for key in ("row", "start", "length"))
        decoded = tokens[row].copy()
        for place in range(start, start + length):
            found = logits(jnp.asarray(decoded[None, :-1]), jnp.asarray(rows.segment_ids[row][None, :-1]))
            decoded[place] = int(found[0, place - 1].argmax())
        assert example["correct"] == int((decoded == tokens[row])[start : start + length].all())
    counts = cells(examples)
    assert {(c["num_facts"], c["num_fillers"]): c["asked"] for c in counts} == {
        (2, 0): 6,
        (2, 3): 6,
        (5, 0): 15,
        (5, 3): 15,
    }
    for count in (2, 5):
        own = [c for c in counts if c["num_facts"] == count]
        share = sum(c["correct"] for c in own) / sum(c["asked"] for c in own)
        assert metrics[f"{count}_facts"].estimate == share and metrics[f"{count}_facts/chance"].estimate == 1 / count
    assert evaluator._set.chance == pytest.approx((12 / 2 + 30 / 5) / 42)


def test_what_is_right_is_counted_at_its_own_place():
    made = make_set(kind("bpe"), [Kind(3, 0, 4)], 16, 16, 0)
    hits = np.ones(made.at.shape, bool)
    assert made.correct(hits).all()
    row, start = (int(made.answers[5][key]) for key in ("row", "start"))
    hits[row, made.at[row].tolist().index(start - 1)] = False
    assert np.flatnonzero(~made.correct(hits)).tolist() == [5]


def test_more_facts_than_keys_are_refused():
    with pytest.raises(ConfigError, match=r"eval.facts.counts is '2,17', but must be numbers up to 16"):
        make_evaluators(tiny_settings.setting(facts__counts="2,17"), "facts")
