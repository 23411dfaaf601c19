"""Documents that state facts and ask for them later."""

import hashlib
import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meap_jax.corpus import retrieval
from meap_jax.corpus.retrieval import FACT, FILLERS, KEYS, QUESTION, VALUES, RetrievalSpec, document


@st.composite
def specs(draw):
    num_keys, num_values = draw(st.integers(1, len(KEYS))), draw(st.integers(1, len(VALUES)))
    num_facts = draw(st.integers(1, min(num_keys, num_values, 12)))
    min_facts = draw(st.none() | st.integers(1, num_facts))
    questions_per_fact, max_fillers = draw(st.none() | st.floats(0.1, 4)), draw(st.integers(0, 5))
    return RetrievalSpec(num_keys, num_values, num_facts, questions_per_fact, max_fillers, min_facts)


def _rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def spans_of(made, role):
    return [span for span in made.spans if span.role == role]


def _pairs(template, text):
    pattern = re.escape(template).replace(r"\{key\}", r"(\w+)") + r" (\w+)\."
    return re.findall(pattern, text)


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(0, 2**32 - 1))
def test_every_answer_is_the_value_that_its_fact_stated_and_counts_once(spec, seed):
    made = document(_rng(seed), spec)
    facts = _pairs(FACT, made.text)
    asked = _pairs(QUESTION, made.text)
    assert (spec.min_facts or spec.num_facts) <= len(facts) <= spec.num_facts
    assert len(dict(facts)) == len({value for _, value in facts}) == len(facts)
    if spec.questions_per_fact is None:
        assert sorted(asked) == sorted(facts)
    else:
        assert len(asked) == max(1, int(spec.questions_per_fact * len(facts))) and set(asked) <= set(facts)
    # Asked again, a fact could be read off the first answer: only that one says what was retrieved.
    first_time = [pair for i, pair in enumerate(asked) if pair not in asked[:i]]
    stated, answers = spans_of(made, "fact"), spans_of(made, "answer")
    assert [fact.columns["fact"] for fact in stated] == list(range(len(facts)))
    assert [made.text[fact.start : fact.end] for fact in stated] == [f" {value}" for _, value in facts]
    for answer, (key, value) in zip(answers, first_time, strict=True):
        assert made.text[answer.start : answer.end] == f" {value}"
        assert made.text[: answer.start].endswith(f" {key}")
        assert facts[answer.columns["fact"]] == (key, value)
    # With the roles key and repeat all that is looked up has one, and nothing has two.
    looked_up, spans = [word for pair in [*facts, *asked] for word in pair], sorted(made.spans)
    assert [made.text[span.start : span.end] for span in spans] == [f" {word}" for word in looked_up]
    sentences = [*["fact"] * len(facts), *("repeat" if p in asked[:i] else "answer" for i, p in enumerate(asked))]
    assert [span.role for span in spans] == [role for its_role in sentences for role in ("key", its_role)]
    assert [facts[span.columns["fact"]][span.role != "key"] for span in spans] == looked_up


def test_short_documents_prevail_as_one_over_the_square_of_their_facts():
    spec = RetrievalSpec(16, 16, 4, 0.1, 0, min_facts=2)
    counts = np.zeros(5)
    for made in retrieval.generate(spec, 0, 3000):
        counts[len(_pairs(FACT, made.text))] += 1
    expected = 3000 * np.array([1 / 4, 1 / 9, 1 / 16]) / (1 / 4 + 1 / 9 + 1 / 16)
    assert np.all(np.abs(counts[2:] - expected) < 5 * np.sqrt(expected)) and counts[:2].sum() == 0


def test_equal_seeds_give_equal_documents_for_ever():
    spec = RetrievalSpec(16, 16, 4, 0.5, 2)
    texts = [made.text for made in retrieval.generate(spec, 7, 20)]
    assert texts == [made.text for made in retrieval.generate(spec, 7, 20)]
    assert texts[:10] == [made.text for made in retrieval.generate(spec, 7, 10)]
    assert texts != [made.text for made in retrieval.generate(spec, 8, 20)]


def test_draws_come_from_the_bare_bit_stream_of_pcg64():
    # NumPy keeps a bit generator's stream for ever, but not what choice() makes of it.
    raw = np.random.PCG64(7).random_raw(16)
    assert hashlib.sha256(raw.astype("<u8").tobytes()).hexdigest()[:16] == "fc2cd42b52c9b05d"
    doubles = [(int(bits) >> 11) / 2**53 for bits in raw]
    expected = sorted(range(16), key=doubles.__getitem__)[:4]
    assert retrieval._choose(_rng(7), 16, 4) == expected


def test_all_depths_and_numbers_of_fillers_turn_up_equally_often():
    spec = RetrievalSpec(16, 16, 4, 0.1, 2)
    documents = list(retrieval.generate(spec, 0, 1200))
    depths = np.unique([spans_of(d, "answer")[0].columns["fact"] for d in documents], return_counts=True)[1]
    fillers = np.unique([sum(map(d.text.count, FILLERS)) for d in documents], return_counts=True)[1]
    assert len(depths) == 4 and np.all(np.abs(depths - 300) < 75)  # five standard deviations
    assert len(fillers) == 3 and np.all(np.abs(fillers - 400) < 82)


def test_keys_values_and_wording_share_no_word():
    assert len(KEYS) == len(set(KEYS)) == len(VALUES) == len(set(VALUES)) == 64  # As fields.WORDS says.
    assert not set(KEYS) & set(VALUES)
    wording = set(re.findall(r"[a-z]+", " ".join([FACT, QUESTION, *FILLERS]).lower()))
    assert not wording & {*KEYS, *VALUES}
    assert all(re.fullmatch("[a-z]+", word) for word in KEYS + VALUES)
