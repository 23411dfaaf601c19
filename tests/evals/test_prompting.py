"""Predictions: what a model made of each prompt, kept over interruptions, and never mixed between models."""

import json

import jax
import numpy as np
import pytest

import tiny_settings
from meap_jax.errors import DataError
from meap_jax.evals import kv, niah
from meap_jax.evals.predictions import Predictions, prompt_hash, read_records
from meap_jax.evals.prompting import Prompting, Question
from meap_jax.results import Interval

KV = dict(kv__num_keys=3, kv__positions="1,3", kv__max_questions=3, batch_size=4)
NIAH = dict(niah__lengths="200", niah__depths="0,50,100", niah__trials=2)


def test_every_question_gets_a_record_and_the_file_holds_what_scores_are_made_of(tmp_path):
    setting = tiny_settings.setting(tmp_path, **KV)
    metrics, examples = Prompting(setting, kv.KeyValue()).run(tiny_settings.params(setting))
    header, records = read_records(tmp_path / "kv.jsonl")
    assert header == {"task": "kv", "model": "f"} and len(records) == len(examples) == 6
    assert sorted(records, key=str) == sorted(examples, key=str)
    assert metrics["accuracy"].estimate == np.mean([r["scores"]["accuracy"] for r in records])
    assert (
        metrics["too_long"] == Interval(0, None, None)
        and {"accuracy/position_1", "accuracy/position_3"} <= metrics.keys()
    )
    # The file alone gives the scores.
    for record in records:
        question = Question([], tuple(record["golds"]), {})
        assert kv.KeyValue().score(record["output"], question) == record["scores"]


@pytest.mark.parametrize("mesh", [{}, dict(data=2, tensor=2)], ids=str)
def test_sharing_a_beginning_changes_no_output(monkeypatch, tmp_path, mesh):
    setting = tiny_settings.setting(tmp_path, mesh=mesh, **NIAH)
    monkeypatch.setattr(niah.NeedleInAHaystack, "max_new_tokens", 6)
    params = tiny_settings.params(setting)
    task = niah.NeedleInAHaystack()
    shared = Prompting(setting, task).run(params).examples
    questions = task.questions(setting)
    monkeypatch.setattr(task, "questions", lambda _: [q._replace(shares=None) for q in questions])
    alone = Prompting(tiny_settings.setting(mesh=mesh, **NIAH), task).run(params).examples
    assert [r["output"] for r in shared] == [r["output"] for r in alone]
    assert len({r["output"] for r in shared}) > 1


def test_an_interrupted_evaluation_goes_on_where_it_stopped(monkeypatch, tmp_path):
    setting, whole = tiny_settings.setting(tmp_path / "a", **KV), tiny_settings.setting(tmp_path / "b", **KV)
    params = tiny_settings.params(setting)
    expected = Prompting(whole, kv.KeyValue()).run(params)
    Prompting(setting, kv.KeyValue()).run(params)
    file = tmp_path / "a" / "kv.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:25])  # Killed within the fourth record.
    asked = []
    real = Prompting._answers

    def spy(self, generator, questions, numbers):
        asked.extend(numbers)
        return real(self, generator, questions, numbers)

    monkeypatch.setattr(Prompting, "_answers", spy)
    assert Prompting(setting, kv.KeyValue()).run(params) == expected
    assert len(asked) == 3 and file.read_bytes().count(b"\n") == 7
    assert all(json.loads(line) for line in file.read_bytes().splitlines())
    asked.clear()
    assert Prompting(setting, kv.KeyValue()).run(params) == expected and not asked


def test_predictions_of_another_model_are_refused_and_stay(tmp_path):
    setting = tiny_settings.setting(tmp_path, **KV)
    Prompting(setting, kv.KeyValue()).run(tiny_settings.params(setting))
    before = (tmp_path / "kv.jsonl").read_bytes()
    other = tiny_settings.setting(tmp_path, fingerprint="g" * 64, **KV)
    with pytest.raises(DataError, match="kv.jsonl, line 1 says that it holds predictions of model f on kv, but"):
        Prompting(other, kv.KeyValue()).run(tiny_settings.params(other, seed=1))
    assert (tmp_path / "kv.jsonl").read_bytes() == before


def test_other_options_ask_what_is_new_only(monkeypatch, tmp_path):
    params = tiny_settings.params(tiny_settings.setting())
    Prompting(tiny_settings.setting(tmp_path, **KV), kv.KeyValue()).run(params)
    more = tiny_settings.setting(tmp_path, **KV | dict(kv__positions="1,2,3"))
    result = Prompting(more, kv.KeyValue()).run(params)
    assert len(result.examples) == 9 and len(read_records(tmp_path / "kv.jsonl")[1]) == 9


def test_prompts_without_room_are_counted_and_not_asked(tmp_path):
    setting = tiny_settings.setting(tmp_path, seq_len=560, **KV | dict(kv__num_keys=5))
    task = kv.KeyValue()
    lengths = [len(q.tokens) for q in task.questions(setting)]
    room = sorted(set(lengths))[-2]
    setting = tiny_settings.setting(tmp_path, seq_len=room + task.max_new_tokens, **KV | dict(kv__num_keys=5))
    metrics, examples = Prompting(setting, task).run(tiny_settings.params(setting))
    num_long = sum(length > room for length in lengths)
    assert metrics["too_long"].estimate == num_long == sum(r.get("too_long", False) for r in examples) > 0
    assert all(("scores" in r) != r.get("too_long", False) for r in examples) and len(examples) == 6


def test_a_damaged_file_is_named_by_line(tmp_path):
    file = tmp_path / "kv.jsonl"
    for content, line in [
        (b'{"task": "kv", "model": "f"}\nnonsense\n', 2),
        (b"[1]\n", 1),
        (b'{"model": "f"}\n{"a": 1}\n', 1),
    ]:
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"kv.jsonl, line {line} "):
            Predictions(file, "kv", "f")
        assert file.read_bytes() == content


def test_the_hash_of_a_prompt_depends_on_its_tokens_and_settings():
    assert prompt_hash([1, 2], n=3) == prompt_hash(np.array([1, 2]), n=3)
    assert (
        len({prompt_hash([1, 2], n=3), prompt_hash([2, 1], n=3), prompt_hash([1, 2], n=4), prompt_hash([1], n=3)}) == 4
    )


def test_generated_tasks_run_within_the_loops_transfer_guard():
    setting = tiny_settings.setting(**KV)
    params = tiny_settings.params(setting)
    evaluator = Prompting(setting, kv.KeyValue())
    with jax.transfer_guard("disallow"), jax.set_mesh(setting.model.mesh):
        assert evaluator.run(params) == evaluator.run(params)
