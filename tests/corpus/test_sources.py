"""Splits of a source."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_data
import tiny_runs
from meap_jax import main
from meap_jax.corpus import prepare as prepare_module
from meap_jax.corpus import shards, sources
from meap_jax.corpus.documents import Document, Span
from meap_jax.corpus.prepare import prepare
from meap_jax.corpus.retrieval import FACT
from meap_jax.corpus.sources import open_source
from meap_jax.data.spec import StdlibSourceSpec
from meap_jax.data.store import SPLITS
from meap_jax.readers import Part, Skips


def retrieval(**counts):
    sizes = dict(num_documents=300, num_eval_documents=40)
    spec = tiny_data.text_spec(None, mixture="retrieval=1", seed=1, **sizes, **counts)
    return open_source("retrieval", spec.sources["retrieval"])


def text(path, **fields):
    return open_source("text", tiny_data.text_spec(path, **fields).sources["text"])


def by_split(source):
    """{split: documents}, parts in order."""
    found = {split: [] for split in SPLITS}
    for part in source.parts():
        for split, document in source.read(part, Skips(0)):
            found[SPLITS[split]].append(document)
    return found


def num_facts(document):
    return len(re.findall(FACT.replace("{key}", r"\w+"), document.text))


def test_held_out_documents_have_the_same_number_of_facts_and_ask_each_of_them_once():
    documents = by_split(retrieval(min_facts=2, num_facts=4, num_eval_facts=9))
    assert {num_facts(d) for d in documents["train"]} == {2, 3, 4}
    for split in ("validation", "test"):
        assert {num_facts(d) for d in documents[split]} == {9}
        asked = [sorted(s.columns["fact"] for s in d.spans if s.role == "answer") for d in documents[split]]
        assert all(facts == list(range(9)) for facts in asked)


def test_no_document_is_in_two_splits_though_chance_would_have_it():
    few = dict(num_keys=2, num_values=2, min_facts=1, num_facts=2, num_eval_facts=2, questions_per_fact=0.5)
    documents = by_split(retrieval(**few, max_fillers=0))
    texts = {split: {d.text for d in documents[split]} for split in SPLITS}
    assert texts["train"] and texts["test"]
    assert not texts["train"] & texts["test"] and not texts["validation"] & texts["test"]
    assert not texts["train"] & texts["validation"]


def test_a_texts_split_depends_on_the_text_alone_and_takes_the_share_asked_for(tmp_path):
    texts = [f"text {i % 4000}" for i in range(5000)]  # A thousand come twice.
    there = by_split(text(tiny_data.write_jsonl(tmp_path / "a.jsonl", texts)))
    back = by_split(text(tiny_data.write_jsonl(tmp_path / "b.jsonl", texts[::-1])))
    assert sum(map(len, there.values())) == 5000
    for split in SPLITS:
        assert [d.text for d in there[split]] == [d.text for d in back[split]][::-1]
    assert len(there["validation"]) == pytest.approx(500, abs=70) and len(there["test"]) == pytest.approx(500, abs=70)
    kept = {split: {d.text for d in documents} for split, documents in there.items()}
    assert not (kept["train"] & kept["validation"] or kept["train"] & kept["test"] or kept["validation"] & kept["test"])


def test_a_source_with_a_held_out_corpus_of_its_own_trains_on_all_of_the_other(tmp_path):
    train = tiny_data.write_jsonl(tmp_path / "train.jsonl", [f"t {i}" for i in range(50)])
    held = tiny_data.write_jsonl(tmp_path / "held.jsonl", [f"v {i}" for i in range(50)])
    documents = by_split(text(train, validation=str(held)))
    assert [d.text for d in documents["train"]] == [f"t {i}" for i in range(50)]
    held_out = [d.text for split in ("validation", "test") for d in documents[split]]
    assert sorted(held_out) == sorted(f"v {i}" for i in range(50))
    assert 10 < len(documents["test"]) < 40


def test_the_standard_library_holds_some_of_itself_out():
    documents = by_split(open_source("stdlib", StdlibSourceSpec(0.05)))
    assert len(documents["train"]) > 300 and documents["validation"] and documents["test"]


@settings(max_examples=100, deadline=None)
@given(st.text(), st.floats(0.01, 0.4))
def test_a_larger_holdout_takes_more_texts_and_gives_none_back(text, holdout):
    if sources._split(text, holdout) == sources.VALIDATION:
        assert sources._split(text, holdout + 0.05) == sources.VALIDATION
    if sources._split(text, holdout) == sources.TRAIN:
        assert sources._split(text, holdout / 2) == sources.TRAIN


@dataclasses.dataclass(frozen=True)
class Counting:
    """Texts that count, with two spans in every third one."""

    stop: int

    def parts(self):
        return [Part("a", 0, self.stop // 2), Part("b", self.stop // 2, self.stop)]

    def read(self, part, skips):
        for i in range(part.start, part.stop):
            spans = (Span(0, 5, "digit", {"number": i}), Span(3, 9, "loss")) if i % 3 == 0 else ()
            yield i % 10 % 3, Document(f"The number {i}. " * 5, spans)


def test_a_kind_of_source_of_ones_own_trains_and_its_spans_come_along_where_it_is_copied(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "counting", lambda name, spec: Counting(int(spec.path.partition(":")[2])))
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    words = dict(mixture="text=1", path="counting:200", prepared=tmp_path / "data")
    flags = tiny_runs.flags(tmp_path / "run", num_steps=1, **{f"data__{name}": word for name, word in words.items()})
    prepare_module.command(["prepare", *flags])
    main.command(["main", *flags])
    assert [record["step"] for record in tiny_runs.records(tmp_path / "run")] == [1]

    first = prepare(tmp_path / "first", tiny_data.text_spec("counting:200"))
    copied = prepare(tmp_path / "copy", tiny_data.text_spec(f"prepared:{tmp_path / 'first' / 'text'}"))
    assert len(copied.manifest("text")["shards"]) == 2
    assert copied.manifest("text")["fingerprint"] == first.manifest("text")["fingerprint"]
    for role, num_columns in (("digit", 1), ("loss", 0)):
        name = f"text/spans.{role}.npy"
        assert (copied.folder / name).read_bytes() == (first.folder / name).read_bytes()
        assert len(np.load(copied.folder / name)) == 67 and len(np.load(copied.folder / name).dtype) == 3 + num_columns
