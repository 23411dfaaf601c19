"""Splits of a source."""

import re

import pytest

from meap_jax.config import ConfigError, base
from meap_jax.data.retrieval import FACT
from meap_jax.data.sources import open_source


def options(**counts):
    retrieval = base().data.retrieval.to_dict() | dict(num_documents=300, num_eval_documents=40) | counts
    return {"retrieval": retrieval, "seed": 1}


def num_facts(document):
    return len(re.findall(FACT.replace("{key}", r"\w+"), document.text))


def test_held_out_documents_have_the_same_number_of_facts_and_ask_each_of_them_once():
    source = open_source("retrieval", options(min_facts=2, num_facts=4, num_eval_facts=9))
    assert {num_facts(d) for d in source.documents("train")} == {2, 3, 4}
    for split in ("validation", "test"):
        documents = list(source.documents(split))
        assert {num_facts(d) for d in documents} == {9}
        assert all(sorted(a.depth for a in d.answers) == [i / 8 for i in range(9)] for d in documents)


def test_no_document_stands_in_two_splits_though_chance_would_have_it():
    source = open_source(
        "retrieval",
        options(
            num_keys=2, num_values=2, min_facts=1, num_facts=2, num_eval_facts=2, questions_per_fact=0.5, max_fillers=0
        ),
    )
    texts = {split: {d.text for d in source.documents(split)} for split in ("train", "validation", "test")}
    assert texts["train"] and texts["test"]
    assert not texts["train"] & texts["test"] and not texts["validation"] & texts["test"]
    assert not texts["train"] & texts["validation"]


@pytest.mark.parametrize("value", [0, 17])
def test_a_held_out_document_cannot_have_more_facts_than_there_are_keys(value):
    with pytest.raises(ConfigError, match=f"num_eval_facts is {value}, but must be from 1 to 16"):
        open_source("retrieval", options(num_eval_facts=value))
