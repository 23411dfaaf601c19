"""The training command: what it leaves behind, where it starts, and what it says of bad input; and `evaluate`."""

import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from etils import epath

from meap_jax import cli, evaluate, main
from meap_jax.errors import ConfigError
from meap_jax.lease import FILE, held
from meap_jax.restore import sealed
from tiny_runs import ROOT, TIMES, TINY, flags, losses, records, run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared folder that all runs share; made by the first."""
    return tmp_path_factory.mktemp("prepared") / "data"


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(workdir, data__prepared=data)
    return workdir


def train(workdir, **overrides):
    main.command(["main", *flags(workdir, **overrides)])


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs the command in this process with words that it refuses; returns its one sentence."""

    def sentence(*words, joins_hosts=False):
        monkeypatch.setattr(sys, "argv", ["main", *words])
        with pytest.raises(SystemExit) as stop:
            cli.run_command(main.command, joins_hosts=joins_hosts)
        last = capsys.readouterr().err.strip().split("\n")[-1]
        assert stop.value.code == 1 and last.startswith("error: ")
        return last

    return sentence


# ------------------------------------------------------------------------------------------------------ what it does


def test_a_run_leaves_log_tensorboard_config_versions_and_checkpoints(trained, data):
    assert [r["step"] for r in records(trained)] == list(range(1, 9))
    assert all({"step", "loss", "learning_rate", *TIMES} <= r.keys() for r in records(trained))
    assert all("mfu" not in r for r in records(trained))  # Of a CPU, whose peak is not in the table.
    assert all(0 < r["goodput"] < 1 and 0 <= r["data_wait"] < 1 for r in records(trained))
    evaluated = [r["step"] for r in records(trained) if "validation_retrieval_answers/accuracy" in r]
    assert evaluated == [4, 8]
    assert list((trained / "tensorboard").glob("*tfevents*"))
    assert json.loads((trained / "config.json").read_text())["model"]["num_layers"] == TINY["model.num_layers"]
    assert {"python", "jax", "meap_jax"} <= json.loads((trained / "versions.json").read_text()).keys()
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["6", "8"]


def test_a_finished_run_started_again_changes_nothing_and_writes_the_tokenizer_that_earlier_versions_did_not(
    trained, data
):
    before, tokenizer = (trained / "metrics.jsonl").read_text(), sorted((trained / "tokenizer").iterdir())
    shutil.rmtree(trained / "tokenizer")
    train(trained, data__prepared=data)
    assert (trained / "metrics.jsonl").read_text() == before
    assert sorted((trained / "tokenizer").iterdir()) == tokenizer != []


def test_a_trace_holds_the_chosen_steps_and_no_others(data, tmp_path, caplog):
    train(tmp_path, data__prepared=data, num_steps=4, profile__start=2, profile__num_steps=2)
    [file] = (tmp_path / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    trace = jax.profiler.ProfileData.from_file(str(file))
    events = [event for plane in trace.planes for line in plane.lines for event in line.events]
    assert {dict(event.stats)["step_num"] for event in events if event.name == "train"} == {2, 3}
    # They were done when it ended, and nothing of step 1 was left when it began.
    programs = [dict(event.stats) for event in events if "Execute (jit_train_step)" in event.name]
    devices = [stats["global_device_id"] for stats in programs if "global_device_id" in stats]
    assert sorted(devices) == sorted(2 * list(range(8)))

    # It may change when the run goes on, and is said to be missed if its first step is over.
    with caplog.at_level("INFO", logger="meap_jax"):
        train(tmp_path, data__prepared=data, num_steps=4, profile__start=3, profile__num_steps=1)
    assert "no trace: profile.start is 3, and the run goes on after step 4" in caplog.text


def test_init_from_takes_the_parameters_and_starts_at_step_one_with_a_fresh_optimizer(trained, data, tmp_path):
    train(tmp_path / "next", data__prepared=data, init_from=trained, num_steps=2)
    assert [r["step"] for r in records(tmp_path / "next")] == [1, 2]
    first, scratch = records(tmp_path / "next")[0], records(trained)[0]
    assert first["loss"] < scratch["loss"] and first["num_targets"] == scratch["num_targets"]


def test_evaluate_reads_a_run_and_writes_what_it_found(trained, capsys):
    evaluate.command(["evaluate", f"--workdir={trained}"])
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((trained / "evaluation_test.json").read_text())
    metrics, examples = printed["metrics"], written["examples"]
    assert written == {**printed, "examples": examples} and printed["step"] == 8
    chance = metrics.pop("test_retrieval_answers/chance")
    assert {"test_retrieval/loss", "test_retrieval/masked_loss", "test_retrieval_answers/accuracy"} == metrics.keys()
    assert all(metric["low"] <= metric["estimate"] <= metric["high"] for metric in metrics.values())
    assert chance == {"estimate": pytest.approx(1 / TINY["data.retrieval.num_facts"]), "low": None, "high": None}
    answers = examples["test_retrieval_answers"]
    assert len(answers) > 8 and answers[0].keys() == {"row", "correct", "depth", "distance", "num_facts"}
    accuracy = metrics["test_retrieval_answers/accuracy"]["estimate"]
    assert sum(answer["correct"] for answer in answers) / len(answers) == accuracy
    loss, tokens = (np.array([row[key] for row in examples["test_retrieval"]]) for key in ("loss", "tokens"))
    assert np.average(loss, weights=tokens) == pytest.approx(metrics["test_retrieval/loss"]["estimate"])


ASKED = [
    "--config.eval.seq_len=2000", "--config.eval.niah.lengths=300,600", "--config.eval.niah.depths=0,100",
    "--config.eval.niah.trials=2", "--config.eval.ruler.lengths=700", "--config.eval.ruler.trials=1",
    "--config.eval.ruler.tasks=niah_single_1,vt,fwe", "--config.eval.kv.num_keys=3", "--config.eval.kv.positions=1,3",
    "--config.eval.kv.max_questions=2", "--config.eval.mneedle.lengths=900", "--config.eval.mneedle.depths=0",
    "--config.eval.mneedle.counts=2", "--config.eval.mneedle.trials=1", "--config.eval.mneedle.buffer=150",
    "--config.eval.mdqa.num_documents=2", "--config.eval.mdqa.positions=1,2",
]  # fmt: skip


def test_evaluate_asks_a_run_the_questions_of_every_task_and_draws_them(trained, tmp_path, capsys):
    questions = [
        dict(question=f"what is {w}", answers=[w], ctxs=[dict(title=w, text=f"A {w}.", isgold=True)])
        for w in ("cat", "dog")
    ]
    (tmp_path / "oracle.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    words = [f"--workdir={trained}", "--tasks=niah,ruler,mdqa,kv,mneedle,summaries", f"--out={tmp_path / 'found.json'}"]
    words += [*ASKED, f"--config.eval.mdqa.path={tmp_path / 'oracle.jsonl'}"]
    (tmp_path / "news.jsonl").write_text(json.dumps(dict(document="A cat sat on 2 mats.", summary="A cat sat.")))
    words += [
        f"--config.eval.summaries.path=news={tmp_path / 'news.jsonl'}",
        "--config.eval.summaries.max_new_tokens=8",
    ]
    evaluate.command(["evaluate", *words])
    printed = json.loads(capsys.readouterr().out)
    found = {name.partition("/")[0] for name in printed["metrics"]}
    assert found == {"niah", "ruler_niah_single_1", "ruler_vt", "ruler_fwe", "mdqa", "kv", "mneedle", "summaries_news"}
    assert printed["options"]["niah.trials"] == 2 and len(printed["model"]) == 64
    assert {f"{name}.jsonl" for name in found} == {file.name for file in (tmp_path / "found").glob("*.jsonl")}
    assert (tmp_path / "found" / "niah_rouge1_recall.png").exists()
    before = (tmp_path / "found.json").read_text()
    evaluate.command(["evaluate", *words])  # All is there already.
    assert (tmp_path / "found.json").read_text() == before
    with pytest.raises(ConfigError, match="--config.seq_len is not a field that an evaluation can set"):
        evaluate.command(["evaluate", f"--workdir={trained}", "--config.seq_len=9"])
    with pytest.raises(ConfigError, match="--config.eval.kv.num_keys is 'x', but must be a whole number"):
        evaluate.command(["evaluate", f"--workdir={trained}", "--config.eval.kv.num_keys=x"])


def test_questions_are_asked_while_a_run_trains(data, tmp_path):
    asked = dict(eval__tasks="kv", eval__seq_len=600, eval__kv__num_keys=2, eval__kv__positions="1")
    train(tmp_path, data__prepared=data, num_steps=4, eval__kv__max_questions=2, **asked)
    assert [r["step"] for r in records(tmp_path) if "kv/accuracy" in r] == [4]


def test_evaluate_runs_the_named_tasks_on_the_named_step_and_mesh(trained, capsys):
    evaluate.command(["evaluate", f"--workdir={trained}", "--tasks=validation", "--step=6", "--mesh=data=1,fsdp=-1"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["step"] == 6 and set(printed["metrics"]) == {"test_retrieval/loss", "test_retrieval/masked_loss"}
    with pytest.raises(ConfigError, match="eval.tasks is 'nihah', but 'nihah' is not one of validation, retrieval"):
        evaluate.command(["evaluate", f"--workdir={trained}", "--tasks=nihah"])
    with pytest.raises(ConfigError, match="--mesh is 'rows=2', but must be axis=size"):
        evaluate.command(["evaluate", f"--workdir={trained}", "--mesh=rows=2"])


def test_the_paper_config_trains_on_the_users_own_text_at_reduced_size(tmp_path):
    text = tmp_path / "books"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(" ".join(f"Book {i} says that {n} times {i} is {n * i}." for n in range(200)))
    workdir = tmp_path / "run"
    small = {
        "model.num_layers": 2, "model.embed_dim": 16, "model.num_heads": 2, "model.head_dim": 8, "model.mlp_dim": 24,
        "seq_len": 64, "global_batch_size": 16, "grad_accum_steps": 2, "num_steps": 2, "log.every": 1,
        "data.path": text, "data.holdout": 0.1,
    }  # fmt: skip
    words = [f"--config={ROOT / 'configs/meap_1b.py'}", f"--workdir={workdir}"]
    main.command(["main", *words, *(f"--config.{k}={v}" for k, v in small.items())])
    assert [r["step"] for r in records(workdir)] == [1, 2]
    tokenizer = json.loads((workdir / "data" / "manifest.json").read_text())["tokenizer"]
    assert (tokenizer["mask_id"], tokenizer["vocab_size"]) == (32_000, 32_064)


def test_without_a_workdir_it_is_runs_and_the_name_of_the_config():
    _, workdir = cli.parse_config(["main", f"--config={ROOT / 'configs/quickstart.py'}"])
    assert workdir.parts[-2:] == ("runs", "quickstart") and workdir.is_absolute()


# --------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"objective.mask_ratoi": 0.1}, "no field 'objective.mask_ratoi'. Did you mean \"mask_ratio\""),
        ({"data.sources.txt.path": "/a"}, "no field 'data.sources.txt'. Did you mean \"text\""),
        ({"objective.mask_ratio": 1.5}, "objective.mask_ratio is 1.5, but must be in [0, 1]"),
        ({"model.num_heads": 0}, "model.num_heads is 0, but must be at least 1"),
        ({"num_steps": "many"}, "num_steps is 'many', but must be a whole number"),
        ({"global_batch_size": 6}, "global_batch_size is 6, but must be a multiple of 8"),
        ({"mesh.data": 3}, "there are 8 devices"),
        ({"objective.mask_id": 5}, "objective.mask_id is 5, but [MASK] of the tokenizer"),
        ({"data.mixture": "text=1", "data.path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"data.path": "/books"}, "data.path is '/books', but data.mixture is 'retrieval=1', which does not read it"),
        ({"profile.start": 7, "profile.num_steps": 3}, "profile.start is 7, but must be at most 6"),
        ({"profile.num_steps": -1}, "profile.num_steps is -1, but must be 0 or more"),
        ({"eval.tasks": "validation,nihah"}, "'nihah' is not one of validation, retrieval"),
        ({"init_from": "/nowhere/at/all"}, "/nowhere/at/all/checkpoints holds no checkpoint"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_input_gets_one_sentence_and_an_exit_code(overrides, expected, refused, tmp_path):
    assert expected in refused(*flags(tmp_path / "run", **overrides))
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "--config is not set"),
        ("--config=configs/nowhere.py", "configs/nowhere.py"),
        ("--config=configs/quickstart.py --steps=3", "'steps'"),
        ("--config=configs/quickstart.py --workdir=/dev/null/run", "must be a folder that can be made"),
        ("--config=configs/quickstart.py num_steps=3", "'num_steps=3' is not a flag"),
        ("--config=configs/meap_1b.py", "such as --config.data.path=/data/books."),
    ],
)
def test_a_command_that_is_not_one_says_why(words, expected, refused, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert expected in refused(*words.split())


IN_GET_CONFIG = "from meap_jax import config\ndef get_config():\n    c = config.base()\n    {}\n    return c\n"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("get_config = 1 +", "can't be used: SyntaxError"),
        ("import no_such_package", "can't be used: ModuleNotFoundError: No module named 'no_such_package'"),
        ("def get_config():\n  return 1 / 0", "can't be used: ZeroDivisionError"),
        # All config files of a process are loaded as one module.
        ("globals().pop('get_config', None)", "the file of --config has no function get_config()"),
        (IN_GET_CONFIG.format("c.seq_len = {}['k']"), "the file of --config can't be used: KeyError: 'k'"),
        (IN_GET_CONFIG.format("config.add_source(c, 'code', file='x')"), "given file, but sources have epochs, field"),
    ],
)
def test_a_broken_config_file_gets_one_sentence(program, expected, tmp_path, refused):
    (tmp_path / "broken.py").write_text(program)
    assert expected in refused(f"--config={tmp_path / 'broken.py'}")


def test_an_empty_data_folder_is_said_in_a_process_of_its_own_without_a_traceback(tmp_path):
    (tmp_path / "empty").mkdir()
    said = run(tmp_path / "run", exit_code=1, data__mixture="text=1", data__path=tmp_path / "empty")
    assert said.strip().split("\n")[-1].startswith("error: ") and "empty" in said and "Traceback" not in said


def test_a_workdir_of_another_config_is_refused_with_every_change_named(trained, data, refused):
    before = sorted(trained.rglob("*"))
    changes = dict(optimizer__learning_rate=0.5, seeds__mask=7, num_steps=9)
    text = refused(*flags(trained, data__prepared=data, **changes))
    assert "optimizer.learning_rate was 0.0" in text and "seeds.mask was None and is now 7" in text
    assert "num_steps" not in text  # It may change.
    assert sorted(trained.rglob("*")) == before


def test_other_data_is_refused_with_both_fingerprints(tmp_path, refused):
    text, prepared = tmp_path / "book.txt", tmp_path / "data"
    words = flags(tmp_path / "run", data__mixture="text=1", data__path=text, data__prepared=prepared, num_steps=2)
    text.write_text("".join(f"{n} times two is {2 * n}. " for n in range(500)))
    main.command(["main", *words])
    text.write_text("".join(f"{n} and {n} make {2 * n}. " for n in range(500)))
    shutil.rmtree(prepared)  # Somebody prepares the changed text.
    assert len(set(re.findall(r"\b[0-9a-f]{64}\b", refused(*words)))) == 2


def test_init_from_a_run_with_another_tokenizer_is_refused(trained, tmp_path, refused):
    words = flags(tmp_path / "run", init_from=trained, data__prepared=tmp_path / "data", data__retrieval__num_keys=9)
    assert "name a run with the same tokenizer" in refused(*words)


def test_init_from_checkpoints_of_another_layout_is_refused_with_both(trained, data, tmp_path, refused):
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    for meta in old.glob("checkpoints/*/meta/metadata"):
        meta.write_text(json.dumps(sealed(json.loads(meta.read_text()) | {"layout": 1})))
    text = refused(*flags(tmp_path / "run", init_from=old, data__prepared=data))
    assert "has layout 1, this version reads layout" in text


def test_a_coordinator_without_its_numbers_is_refused(monkeypatch, refused):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    assert "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers too" in refused(joins_hosts=True)


def test_a_nan_loss_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(data, tmp_path, refused):
    diverging = dict(optimizer__learning_rate=1e18, optimizer__warmup_fraction=1.0, num_steps=40)
    text = refused(*flags(tmp_path, data__prepared=data, **diverging))
    assert "error: step " in text and "must be finite" in text
    failed = int(text.split("step ")[1].split(":")[0])
    kept = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    assert all(step < failed for step in (*kept, *losses(tmp_path)))


def test_a_second_run_in_one_workdir_is_told_so_and_the_first_loses_nothing(data, tmp_path, refused):
    with held(epath.Path(tmp_path)):
        text = refused(*flags(tmp_path, data__prepared=data))
    assert f"{tmp_path} is in use: a run is going on there since 20" in text
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_fewer_steps_than_were_taken_are_refused_and_nothing_is_written(trained, data, refused):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file() and path.name != FILE}
    text = refused(*flags(trained, data__prepared=data, num_steps=5))
    assert f"num_steps is 5, but {trained} has been trained for 8 steps: set it to that or more" in text
    assert {path: path.read_bytes() for path in before} == before


def test_the_best_checkpoint_needs_a_validation_loss(data, tmp_path, refused):
    text = refused(*flags(tmp_path, data__prepared=data, checkpoint__keep_best=1, eval__tasks="retrieval"))
    assert "checkpoint.keep_best is 1, but eval.tasks is 'retrieval', without validation" in text


def test_a_run_that_would_take_more_passes_than_a_source_may_is_refused_with_the_steps_that_it_may(tmp_path, refused):
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"Line {n} times two is {2 * n}." for n in range(2000)))
    words = flags(
        tmp_path / "run", data__mixture="text=3,retrieval=1", data__path=book, data__prepared=tmp_path / "data",
        data__sources__text__epochs=1.5, num_steps=10_000, seq_len=160,
    )  # fmt: skip
    found = re.search(
        r"data.sources.text.epochs is 1.5, but 10000 steps would take [\d.e+]+ passes over its (\d+) blocks: lower "
        r"num_steps to (\d+)",
        refused(*words),
    )
    blocks, steps = map(int, found.groups())
    assert steps == int(1.5 * blocks / 6)  # Three quarters of 8 rows are its.
    text = refused(*words, "--config.data.sources.text.epochs=0.001")
    assert "lower global_batch_size, or its weight" in text  # Not to 0 steps, which are no run.
    main.command(["main", *words, f"--config.num_steps={steps}"])
    assert records(tmp_path / "run")[-1]["step"] == steps
