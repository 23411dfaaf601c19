"""Fine-tuning from its command to its table, at tiny size, and what the experiment writes for its runs to read."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

import tiny_runs
from experiments import fine_tuning, fine_tuning_report, looking_up
from meap_jax import tokenizers
from meap_jax.convert import export_model
from meap_jax.errors import ConfigError
from meap_jax.evals.mdqa import read_questions, shown
from meap_jax.readers.conversations import messages_of
from meap_jax.restore import read_meta
from meap_jax.tokenizers import chat

WORDS = [
    "fine_tuning", "--seeds=1", "--arms=ntp,meap_concat", "--pretrain_steps=4", "--texts=100", "--samples=40",
    "--documents=6,8", "--questions=4",
    *(f"--config.{field}" for field in (
        "num_epochs=2", "model.num_layers=1", "model.embed_dim=16", "model.mlp_dim=24", "model.head_dim=8",
        "seq_len=256", "sft.longer_than=30", "eval.batch_size=4", "checkpoint.every=3", "log.every=1",
    )),
]  # fmt: skip
TEMPLATE = Path("configs/sft_quickstart.jinja")


def test_the_command_goes_from_text_to_table_and_a_second_start_goes_on(one_device, tmp_path, capfd):
    words = [*WORDS, f"--workdir={tmp_path}"]
    fine_tuning.command(words)
    page = (tmp_path / "report.md").read_text()
    assert page in capfd.readouterr().out
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith(("| ntp", "| meap"))]
    assert [row[0] for row in rows] == ["| ntp", "| meap_concat"]
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    for arm in arms.values():
        figures = [arm[name]["mean"]["estimate"] for name in ("accuracy_6", "accuracy_8", "loss")]
        assert all(map(math.isfinite, [*figures, *arm["seconds"], arm["steps"], arm["tokens"]]))
    assert arms["meap_concat"]["steps"] > arms["ntp"]["steps"] > 1  # Copies take room.
    assert all(math.isfinite(end) for end in arms["meap_concat"]["accuracy_8"]["difference"].values())
    masked = [json.loads(line) for line in (tmp_path / "meap_concat-seed0" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["mask_fraction"] > 0 for record in masked)

    # The template that was trained, and where answers end in it, go with the model, and to the hub's form.
    run = epath.Path(tmp_path / "ntp-seed0")
    trained = tokenizers.load(run / "tokenizer")
    assert trained.chat_template == TEMPLATE.read_text()
    assert read_meta(run)[1]["origin"]["stop_ids"] == [trained.eos_id]
    export_model(run, epath.Path(tmp_path / "exported"))
    names = json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())
    settings = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert names["chat_template"] == TEMPLATE.read_text() and settings["eos_token_id"] == trained.eos_id

    # A second start goes on in the middle of an epoch, where a run lost its newest checkpoint, and trains nothing else.
    cut = tmp_path / "meap_concat-seed0"
    losses, steps = tiny_runs.losses(cut), arms["meap_concat"]["steps"]
    shutil.rmtree(cut / "checkpoints" / str(steps))
    [left] = [int(file.name) for file in (cut / "checkpoints").iterdir() if file.name.isdigit()]
    assert left % 3 == 0 and left * 2 not in (steps, 2 * steps)  # Two epochs.
    saved = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("_CHECKPOINT_METADATA")}
    answers = {file: file.read_bytes() for file in tmp_path.glob("*/answers_*/mdqa.jsonl")}
    assert len(saved) >= 4 and len(answers) == 6
    fine_tuning.command(words)
    assert (cut / "checkpoints" / str(steps)).exists() and tiny_runs.losses(cut) == losses
    assert all(file.stat().st_mtime_ns == time for file, time in saved.items())
    assert all(file.read_bytes() == content for file, content in answers.items())
    again = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert [{**arm, "seconds": None} for arm in again.values()] == [{**arm, "seconds": None} for arm in arms.values()]


def test_questions_are_asked_in_the_words_that_were_trained():
    facts = looking_up.sample(np.random.default_rng(0), 6, 8)
    source = TEMPLATE.read_text()
    trained = chat.render(source, messages_of(facts)[:1], {"bos_token": "<s>", "eos_token": "</s>"})
    asked = looking_up.PROMPT.format(search_results=facts["input"], question=facts["instruction"])
    content = {"role": "user", "content": asked}
    assert chat.render(source, [content], {"bos_token": "<s>", "eos_token": "</s>"}) == trained
    assert trained.startswith("<s>Document [1]") and trained.endswith(f"\n\n{facts['instruction']}")


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_begins_with_the_value_and_goes_on_about_all_other_facts(seed):
    made = looking_up.sample(np.random.default_rng(seed), 6, 8)
    value, others = made["output"].removesuffix(".").split(".\n")
    key = made["instruction"].removeprefix("Tell the ")
    stated = [line.partition(") ")[2] for line in made["input"].splitlines()]
    assert f"The access code of the {key} is {value}." in stated and 6 <= len(stated) <= 8
    assert others + "." == " ".join(line for line in stated if f" {key} " not in line)


def test_questions_have_one_answer_at_the_place_that_is_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    records = [looking_up.question(rng, 8, i % 8) for i in range(16)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    for i, asked in enumerate(read_questions(file)):
        context = shown(asked.documents)
        assert [document.is_gold for document in asked.documents].index(True) == i % 8
        assert context.count(f" {asked.answers[0]}.") == 1 and context.count(asked.question.split()[-1]) == 1


def run_of(arm, seed, accuracy):
    metrics = {"mdqa/file_8/best_subspan_em": accuracy, "test_text/loss": 1 - accuracy}
    evaluation = {"metrics": {name: {"estimate": value} for name, value in metrics.items()}, "examples": {}}
    records = [{"step": 2, "step_seconds": 1.0}, {"step": 3, "step_seconds": 2.0}]
    return fine_tuning_report.Run(arm, seed, 3, 600, records, evaluation)


def test_differences_of_several_seeds_are_paired_by_seed():
    runs = [run_of("ntp", seed, 0.5 + seed / 10) for seed in range(3)]
    runs += [run_of("meap_concat", seed, 0.4 + seed / 10) for seed in range(3)]
    arms = fine_tuning_report.summarize(runs, "ntp", [8])
    assert arms["ntp"]["accuracy_8"]["mean"]["estimate"] == pytest.approx(0.6)
    assert arms["meap_concat"]["accuracy_8"]["difference"] == pytest.approx(dict(estimate=-0.1, low=-0.1, high=-0.1))
    assert arms["meap_concat"]["seconds"] == [4.0, 4.0, 4.0]
    setting = {
        "seeds": [0, 1, 2], "versions": {"jax": "0"},
        "sizes": {"pretrain_steps": 1, "samples": 1, "documents": (8,), "questions": 1},
    }  # fmt: skip
    page = fine_tuning_report.markdown(arms, "ntp", {8: 0.25}, setting)
    assert "| -10.0 [-10.0, -10.0] |" in page and "right 25.0% with 8 documents" in page


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--seeds=0", "--seeds is '0', but must be a number from 1 on"),
        ("--arms=meap_concat", "--arms is 'meap_concat', but must begin with ntp"),
        ("--arms=ntp,nothing", "--arms is 'ntp,nothing', but"),
        ("--documents=8,17", "--documents is '8,17', but must be different numbers from 3 to 16"),
        ("--questions=many", "--questions is 'many', but"),
    ],
)
def test_flags_that_cannot_work_are_refused_in_a_sentence(tmp_path, flag, said):
    with pytest.raises(ConfigError, match=said):
        fine_tuning.command(["fine_tuning", f"--workdir={tmp_path}", flag])
    assert not list(tmp_path.iterdir())


def test_other_sizes_never_take_the_place_of_what_was_trained_on(tmp_path):
    sizes = looking_up.Sizes(pretrain_steps=1, texts=4, samples=4, documents=(4, 8), questions=2)
    files = looking_up.write_files(tmp_path, sizes, 0)
    assert looking_up.write_files(tmp_path, sizes._replace(questions=3), 0) == files
    assert len(files.questions[8].read_text().splitlines()) == 3
    with pytest.raises(ConfigError, match="instructions.json was written with other values of --texts, --samples"):
        looking_up.write_files(tmp_path, sizes._replace(samples=5), 0)
