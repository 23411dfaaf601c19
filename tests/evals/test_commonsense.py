"""What is made of the harness' answers; the harness itself is in tests/parity."""

import importlib.util

import pytest

from meap_jax.errors import ConfigError
from meap_jax.evals import commonsense
from meap_jax.evals.commonsense import examples_of, metrics_of


def sample(doc_id, acc, acc_norm=None, answers=("a", "b"), **more):
    scores = {"acc": acc} | ({} if acc_norm is None else {"acc_norm": acc_norm})
    arguments = [(f"q{doc_id}", answer) for answer in answers]
    return dict(doc_id=doc_id, arguments=arguments, filter="none", metrics=list(scores), **scores) | more


SAMPLES = {
    "both": [sample(0, 1.0, 0.0), sample(1, 1.0, 1.0), sample(2, 0.0, 1.0), sample(3, 0.0, 1.0)],
    "one": [sample(0, 1.0), sample(1, 0.0)],
}
VERSIONS = {"both": "1.0", "one": "2.0"}
RESULTS = {
    "both": {"alias": "both", "acc,none": 0.5, "acc_stderr,none": 0.25, "acc_norm,none": 0.75,
             "acc_norm_stderr,none": "N/A"},
    "one": {"acc,none": 0.5, "acc_stderr,none": 0.4},
}  # fmt: skip


def test_a_record_says_which_document_and_what_it_scored():
    records = examples_of(SAMPLES, set(), VERSIONS)
    assert records[1] == {"task": "both", "doc_id": 1, "version": "1.0", "acc": 1.0, "acc_norm": 1.0}
    assert records[4] == {"task": "one", "doc_id": 0, "version": "2.0", "acc": 1.0}


def test_metrics_are_shares_of_documents_and_means_of_tasks():
    found = metrics_of(RESULTS, examples_of(SAMPLES, set(), VERSIONS))
    assert found["both/acc"].estimate == 0.5 and found["both/acc_norm"].estimate == 0.75
    assert found["both/acc"].low == pytest.approx(0.15, abs=5e-3)  # Wilson, 2 of 4.
    assert found["both/acc_stderr"].estimate == 0.25 and "both/acc_norm_stderr" not in found
    assert found["mean/acc"].estimate == 0.5
    assert found["mean/acc_norm"].estimate == pytest.approx((0.75 + 0.5) / 2)  # One of the tasks has acc alone.
    variance = (1 / 3) / 4 + (1 / 2) / 2
    assert found["mean/acc"].high - 0.5 == pytest.approx(1.96 * variance**0.5 / 2)


def test_a_document_with_a_skipped_request_counts_nowhere():
    records = examples_of(SAMPLES, {("q2", "b")}, VERSIONS)
    assert records[2] == {"task": "both", "doc_id": 2, "version": "1.0", "skipped": True}
    found = metrics_of(RESULTS, records)
    assert found["both/acc"].estimate == pytest.approx(2 / 3) and found["both/acc_norm"].estimate == pytest.approx(
        2 / 3
    )
    assert "both/acc_stderr" not in found and found["one/acc_stderr"].estimate == 0.4


def test_filters_of_answers_have_metrics_of_their_own():
    samples = {"task": [sample(0, 1.0, filter=name) | {"acc": value} for name, value in (("a", 1.0), ("b", 0.0))]}
    records = examples_of(samples, set(), {"task": "1"})
    found = metrics_of({"task": {"acc,a": 1.0, "acc,b": 0.0}}, records)
    assert [record["filter"] for record in records] == ["a", "b"]
    assert (found["task/acc_a"].estimate, found["task/acc_b"].estimate) == (1.0, 0.0)


def test_other_metrics_have_the_harness_value_and_error():
    results = {"text": {"bits_per_byte,none": 2.0, "bits_per_byte_stderr,none": 0.5, "word_perplexity,none": 9.0}}
    record = {"task": "text", "doc_id": 0, "version": "1"}
    found = metrics_of(results, [record])
    assert found["text/bits_per_byte"] == pytest.approx((2.0, 2.0 - 0.98, 2.0 + 0.98))
    assert found["text/word_perplexity"] == (9.0, None, None)
    assert "mean/acc" not in found


def test_without_lm_eval_the_task_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install -r requirements-lm-eval.txt"):
        commonsense.make(None)
