"""Documents that state facts and ask for them later."""

import hashlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meap_jax.config import ConfigError
from meap_jax.data import retrieval
from meap_jax.data.retrieval import FACT, FILLERS, KEYS, QUESTION, VALUES, RetrievalSpec, document


@st.composite
def specs(draw):
    num_keys, num_values = draw(st.integers(1, len(KEYS))), draw(st.integers(1, len(VALUES)))
    num_facts = draw(st.integers(1, min(num_keys, num_values, 12)))
    num_questions = draw(st.integers(1, num_facts))
    return RetrievalSpec(num_keys, num_values, num_facts, num_questions, draw(st.integers(0, 5)))


def _rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def _pairs(template, text):
    pattern = re.escape(template).replace(r"\{key\}", r"(\w+)") + r" (\w+)\."
    return re.findall(pattern, text)


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(0, 2**32 - 1))
def test_every_answer_is_the_value_that_its_fact_stated(spec, seed):
    made = document(_rng(seed), spec)
    facts = _pairs(FACT, made.text)
    asked = _pairs(QUESTION, made.text)
    assert len(facts) == spec.num_facts and len(asked) == spec.num_questions == len(made.answers)
    assert len(dict(facts)) == len({value for _, value in facts}) == spec.num_facts
    assert len(dict(asked)) == spec.num_questions and set(asked) <= set(facts)
    for answer, (key, value) in zip(made.answers, asked, strict=True):
        assert made.pieces[answer.piece] == made.pieces[answer.fact] == f" {value}"
        assert answer.depth == facts.index((key, value)) / max(spec.num_facts - 1, 1)


def test_equal_seeds_give_equal_documents_for_ever():
    spec = RetrievalSpec(16, 16, 4, 2, 2)
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


def test_depth_and_fillers_can_be_chosen():
    spec = RetrievalSpec(16, 16, 5, 1, 2)
    made = document(_rng(), spec, asked=[4, 0], num_fillers=7)
    assert [answer.depth for answer in made.answers] == [1.0, 0.0]
    assert sum(piece.strip() in FILLERS for piece in made.pieces) == 7
    values = [value for _, value in _pairs(FACT, made.text)]
    assert [made.pieces[answer.piece] for answer in made.answers] == [
        f" {values[4]}",
        f" {values[0]}",
    ]
    for wrong in ([5], [-1], [1, 1]):
        with pytest.raises(ValueError, match="asked"):
            document(_rng(), spec, asked=wrong)


def test_all_depths_and_numbers_of_fillers_turn_up_equally_often():
    spec = RetrievalSpec(16, 16, 4, 1, 2)
    documents = list(retrieval.generate(spec, 0, 1200))
    depths = np.unique([d.answers[0].depth for d in documents], return_counts=True)[1]
    fillers = np.unique([len(d.pieces) for d in documents], return_counts=True)[1]
    assert len(depths) == 4 and np.all(np.abs(depths - 300) < 75)  # five standard deviations
    assert len(fillers) == 3 and np.all(np.abs(fillers - 400) < 82)


def test_keys_values_and_wording_share_no_word():
    assert len(KEYS) == len(set(KEYS)) >= 64 and len(VALUES) == len(set(VALUES)) >= 64
    assert not set(KEYS) & set(VALUES)
    wording = set(re.findall(r"[a-z]+", " ".join([FACT, QUESTION, *FILLERS]).lower()))
    assert not wording & {*KEYS, *VALUES}
    assert all(re.fullmatch("[a-z]+", word) for word in KEYS + VALUES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_keys", 0),
        ("num_keys", 1000),
        ("num_values", 1000),
        ("num_facts", 17),
        ("num_questions", 9),
        ("max_fillers", -1),
    ],
)
def test_an_impossible_count_is_named_with_its_value(field, value):
    good = dict(num_keys=16, num_values=16, num_facts=8, num_questions=8, max_fillers=2)
    with pytest.raises(ConfigError, match=rf"data\.retrieval\.{field} is {value}"):
        RetrievalSpec(**good | {field: value})
