"""The benchmarks run torch's engines, lm-eval's and the package datasets beside ours."""

import json
import math

import pytest

import tiny_runs
from experiments.benchmarks import corpus, generation, lm_eval, train_step


def run(benchmark, tmp_path, monkeypatch, name):
    """The rows of a benchmark's tables, at its quick sizes."""
    for variable in ("XLA_FLAGS", "PYTHONPATH"):  # One device for the processes that the benchmark starts.
        monkeypatch.setenv(variable, tiny_runs.environment()[variable])
    file = tmp_path / "result.json"
    benchmark.command([name, "--quick", f"--json={file}", "--repeats=1"])
    return [table["rows"] for table in json.loads(file.read_text())["tables"]]


def test_quick_train_step_compares_with_torch(tmp_path, monkeypatch):
    (row,) = run(train_step, tmp_path, monkeypatch, "train_step")[0]
    ratios = [row[f"ours / {name}"]["median"] for name in ("torch eager", "torch compiled", "faster torch")]
    assert all(ratio > 0 for ratio in ratios)
    assert ratios[2] == pytest.approx(min(ratios[:2]))  # One round: the faster has the smaller ratio.


def test_quick_generation_gives_the_tokens_of_transformers(tmp_path, monkeypatch):
    (row,) = run(generation, tmp_path, monkeypatch, "generation")[0]
    assert row["tokens that agree"] == 1
    # Decoding is a difference of two times, so that the noise of a busy machine can make it negative at this size.
    assert all(math.isfinite(row[f"{part}, ours / torch"]["median"]) for part in ("prefill", "decode"))


def test_quick_lm_eval_gives_the_log_probabilities_of_its_hugging_face_backend(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    [[row]] = run(lm_eval, tmp_path, monkeypatch, "lm_eval")
    assert row["largest difference, nats"] < 1e-3 < row["ours / hf"]["median"]
    assert row["tokens a request"] > 50


def test_quick_corpus_compares_with_datasets(tmp_path, monkeypatch):
    for rows in run(corpus, tmp_path, monkeypatch, "corpus")[:2]:
        assert all(row["ours / datasets, tokens/s"]["median"] > 0 for row in rows)
