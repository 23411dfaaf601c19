"""The harness gives our model the numbers that it gives the exported one with its own Hugging Face backend."""

import json
import os
import random

import numpy as np
import pytest
from etils import epath

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # The tasks are local files.
pytest.importorskip("lm_eval")
pytest.importorskip("torch")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hub_folders import NUM_IDS, content_of, write_model  # noqa: E402
from meap_jax import convert, evaluate, models  # noqa: E402
from meap_jax.errors import ConfigError, DataError  # noqa: E402
from meap_jax.evals import Setting  # noqa: E402
from meap_jax.evals.harness_model import HarnessModel  # noqa: E402
from meap_jax.evals.predictions import Predictions  # noqa: E402

WORDS = "the sea salt ship storm sail sand keeps under over while night day wind".split()
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""
ROLLING = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1.0}
"""
WRITING = """
task: local_writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["e s"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
metadata: {version: 1.0}
"""
NAMES = ["local_choice", "local_text", "local_writing"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an imported model, the same exported, and the files of three tasks."""
    folder, rng = tmp_path_factory.mktemp("harness"), random.Random(0)
    write_model(folder / "hub", content_of("llama", rows=NUM_IDS, max_position_embeddings=96), dtype=np.float32)
    convert.import_model(folder / "hub", epath.Path(folder / "ours"))
    convert.export_model(epath.Path(folder / "ours"), epath.Path(folder / "theirs"), dtype="float32")
    (folder / "tasks").mkdir()
    with (folder / "docs.jsonl").open("w") as file:
        for i in range(24):
            # A few are longer than the model's context; some contexts are empty.
            context = " ".join(rng.choices(WORDS, k=0 if i % 8 == 7 else 60 if i % 8 == 6 else rng.randint(1, 14)))
            choices = [f" {' '.join(rng.choices(WORDS, k=rng.randint(1, 5)))}" for _ in range(4)]
            file.write(json.dumps({"context": context, "choices": choices, "label": rng.randrange(4)}) + "\n")
    for name, text in zip(NAMES, (CHOICE, ROLLING, WRITING), strict=True):
        (folder / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(folder / "docs.jsonl")))
    return folder


def ours(place, folder=None, **options):
    opened = models.open_model(epath.Path(place / "ours"))
    evaluate.set_options(opened, {f"eval.commonsense.{name}": str(value) for name, value in options.items()})
    setting = Setting.of_model(opened, "test", pytest.fail, folder, "f")
    return HarnessModel(setting, opened.params, Predictions(folder and folder / "c.jsonl", "commonsense", "f"))


def run(model, place, names):
    manager = TaskManager(include_path=str(place / "tasks"))
    return simple_evaluate(model=model, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=100)


@pytest.mark.parametrize("bos", ["yes", "no"])
def test_choices_texts_and_what_is_written_are_those_of_the_hugging_face_backend(place, bos):
    theirs = HFLM(
        str(place / "theirs"), batch_size=4, device="cpu", dtype="float32", add_bos_token=bos == "yes", max_length=96
    )
    # With a begin of a document in a text, the harness' own backend predicts it behind another one; ours has one.
    names = NAMES if bos == "no" else [NAMES[0], NAMES[2]]
    model = ours(place, bos=bos)
    a, b = run(theirs, place, names), run(model, place, names)
    for name in names:
        for of_a, of_b in zip(a["samples"][name], b["samples"][name], strict=True):
            assert of_a["doc_id"] == of_b["doc_id"]
            if name == "local_writing" and bos == "no" and not of_a["doc"]["context"]:
                continue  # Without any token to continue theirs goes on from padding, ours from a begin.
            if name == "local_writing":
                assert [r.strip() for r in of_b["resps"][0]] == [r.strip() for r in of_a["resps"][0]]
                continue
            values = [[r[0][0] if isinstance(r[0], tuple | list) else r[0] for r in x["resps"]] for x in (of_a, of_b)]
            assert values[1] == pytest.approx(values[0], abs=1e-4, rel=1e-5)
        metrics = [{k: v for k, v in x["results"][name].items() if isinstance(v, float)} for x in (a, b)]
        assert metrics[1] == pytest.approx(metrics[0], abs=1e-4, rel=1e-4) and len(metrics[0]) >= 1
    assert model.counts["truncated"] > 0 == model.counts["skipped"]


def test_no_text_gets_two_begins_of_a_document(place):
    for bos in ("yes", "no", "auto"):
        model = ours(place, bos=bos)
        begin = model.prefix_token_id
        for text in ("the sea", "<s>the sea", "<s>"):
            for asked in (None, True, False):
                assert model.tok_encode(text, add_special_tokens=asked).count(begin) <= 1
        assert model.tok_encode("the sea")[:1] == [begin] or bos == "no"
        assert model.tok_encode("<s>the sea") == [begin, *model.tok_encode("the sea", add_special_tokens=False)]


def test_the_evaluator_gives_the_harness_numbers_and_goes_on_after_a_kill(place, tmp_path):
    def evaluated(out):
        words = [f"--workdir={place / 'ours'}", "--tasks=commonsense", f"--out={out}", "--mesh=data=1,fsdp=8"]
        words += ["--config.eval.commonsense.tasks=local_choice,local_writing", "--config.eval.commonsense.bos=yes"]
        evaluate.command(["evaluate", *words, f"--config.eval.commonsense.include_path={place / 'tasks'}"])
        return json.loads(out.read_text())

    found = evaluated(tmp_path / "a.json")
    expected = run(ours(place, bos="yes"), place, ["local_choice", "local_writing"])["results"]
    for name in ("acc", "acc_norm"):
        metric = found["metrics"][f"commonsense/local_choice/{name}"]
        assert metric["estimate"] == pytest.approx(expected["local_choice"][f"{name},none"])
        assert metric["low"] < metric["estimate"] < metric["high"]
        stderr = found["metrics"][f"commonsense/local_choice/{name}_stderr"]["estimate"]
        assert stderr == pytest.approx(expected["local_choice"][f"{name}_stderr,none"])
    assert found["metrics"]["commonsense/mean/acc"]["estimate"] == pytest.approx(expected["local_choice"]["acc,none"])
    assert found["metrics"]["commonsense/truncated"]["estimate"] > 0
    assert found["metrics"]["commonsense/begins_with_bos"]["estimate"] == 1
    assert len(found["examples"]["commonsense"]) == 48
    assert {record["version"] for record in found["examples"]["commonsense"]} == {"1.0, lm-eval 0.4.13, with bos"}

    file = tmp_path / "a" / "commonsense.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: len(lines) // 2]) + b'{"prompt": "half')
    assert evaluated(tmp_path / "a.json") == found
    prompts = [[json.loads(line)["prompt"] for line in x[1:]] for x in (lines, file.read_bytes().splitlines())]
    assert sorted(prompts[0]) == sorted(prompts[1])  # Each was asked once.


def test_requests_that_are_too_long_are_skipped_where_that_is_asked(place):
    from meap_jax.evals.commonsense import examples_of, metrics_of

    model = ours(place, too_long="skip")
    found = run(model, place, ["local_choice"])
    examples = examples_of(found["samples"], model.skipped, {"local_choice": "1.0"})
    skipped = [record for record in examples if record.get("skipped")]
    assert len(skipped) == 3 and model.counts == {"requests": 96, "truncated": 0, "skipped": 12}
    kept = [record["acc"] for record in examples if "acc" in record]
    assert metrics_of(found["results"], examples)["local_choice/acc"].estimate == pytest.approx(sum(kept) / len(kept))


def test_a_context_of_spaces_is_no_context(place):
    model = ours(place, bos="no")
    spaces, empty = (
        model.loglikelihood([Instance("loglikelihood", {}, pair, 0)]) for pair in (("  ", "a"), ("", "  a"))
    )
    assert spaces == empty


def test_a_text_that_is_written_again_is_the_same_and_one_that_is_drawn_again_is_not(place):
    model, sampled = ours(place), dict(do_sample=True, temperature=1.0, max_gen_toks=12)
    for settings, num in ((dict(max_gen_toks=12), 1), (sampled, 3)):
        asked = [Instance("generate_until", {}, ("the sea", settings), i) for i in range(3)]
        found = model.generate_until(asked)
        assert len(set(found)) == num and model.generate_until(asked) == found


def test_data_that_is_not_there_is_said_in_a_sentence(place, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "gone.yaml").write_text(CHOICE.replace("DATA", "/gone.jsonl").replace("local", "gone"))
    words = [f"--workdir={place / 'ours'}", "--tasks=commonsense", f"--out={tmp_path / 'x.json'}"]
    words += [f"--config.eval.commonsense.include_path={tmp_path / 'tasks'}"]
    for name, reason in (("gone_*", "/gone.jsonl"), ("arc_easy", "allenai/ai2_arc")):
        with pytest.raises(DataError, match=f"data of eval.commonsense.tasks .* can't be read: .*{reason}"):
            evaluate.command(["evaluate", *words, f"--config.eval.commonsense.tasks={name}"])


def test_an_unknown_task_is_named(place, tmp_path):
    words = [f"--workdir={place / 'ours'}", "--tasks=commonsense", f"--out={tmp_path / 'x.json'}"]
    with pytest.raises(ConfigError, match="names local_chioce, which lm-eval 0.4.13 does not know"):
        evaluate.command(["evaluate", *words, "--config.eval.commonsense.tasks=local_chioce"])
    assert not (tmp_path / "x.json").exists()
