"""Tokenizing on all cores, interrupted and resumed."""

import functools
import json
import os
import pathlib
import re
import resource
import signal
from unittest import mock

import pytest

import tiny_data
from meap_jax.corpus import prepare as prepare_module
from meap_jax.corpus import shards as shards_module
from meap_jax.corpus import workers
from meap_jax.corpus.prepare import prepare
from meap_jax.errors import DataError

NUM_FILES, TEXTS_A_FILE = 12, 150


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of about 130 KB."""
    return tiny_data.write_sea_stories(tmp_path_factory.mktemp("corpus"), NUM_FILES, TEXTS_A_FILE, num_words=200)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Prepared by this process, in one shard."""
    return prepare(tmp_path_factory.mktemp("alone"), tiny_data.text_spec(corpus), workers=1)


def start(folder, corpus):
    """Prepares in a process of its own with two workers, small shards, and workers even for them."""
    spec = tiny_data.text_spec(corpus)
    body = (
        "shards.SHARD_BYTES, shards._ONE_PROCESS = 100_000, 0\n"
        f"if __name__ == '__main__':\n    prepare({str(folder)!r}, {spec!r}, workers=2)\n"
    )
    return tiny_data.start_program(folder.parent / "program.py", body)


def documents_of(prepared):
    store = prepared.blocks("text", "train")._store
    return [(int(split), store[i].tolist()) for i, split in enumerate(store.index["split"])]


def test_killed_and_started_again_it_goes_on_and_loses_and_repeats_no_document(corpus, alone, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    done_first = 0
    for _ in range(3):  # Killed again and again, each time a few shards later.
        process = start(folder, corpus)
        tiny_data.wait_for(lambda: len(tiny_data.complete(folder)) >= done_first + 2, process)  # noqa: B023  Called at once.
        process.kill()
        process.communicate(timeout=20)  # Until the last worker closes stderr: they don't outlive it.
        done_first = len(tiny_data.complete(folder))
    assert not (folder / "text").exists()
    done = {path.stem: path.with_suffix(".arrayrecord").stat().st_mtime_ns for path in tiny_data.complete(folder)}
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(shards_module, "_ONE_PROCESS", 0)
    made = prepare(folder, tiny_data.text_spec(corpus), workers=2)
    assert documents_of(made) == documents_of(alone)
    assert len(documents_of(made)) == NUM_FILES * TEXTS_A_FILE
    assert not list(folder.rglob("*.partial"))
    now = {path.stem: path.stat().st_mtime_ns for path in folder.glob("text/*.arrayrecord")}
    assert len(now) == NUM_FILES
    assert {name: now[name] for name in done} == done  # What was complete was not made again.


def test_an_interrupt_ends_all_workers_and_says_nothing_but_one_line(corpus, tmp_path):
    folder = tmp_path / "data"
    process = start(folder, corpus)
    tiny_data.wait_for(lambda: tiny_data.complete(folder), process)
    os.killpg(process.pid, signal.SIGINT)  # As Ctrl-C in a terminal does.
    stderr = process.communicate(timeout=60)[1]  # Ends when the last worker does.
    assert process.returncode != 0
    assert stderr.count("Traceback") <= 1, stderr  # This program's own; a command prints none.


def test_a_source_that_has_changed_since_is_refused_by_name(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 100_000)
    mine = tmp_path / "corpus"
    mine.mkdir()
    for path in sorted(corpus.iterdir())[:3]:
        (mine / path.name).write_text(path.read_text())
    (mine / "02.jsonl").write_text("no JSON\n" * 20)
    with pytest.raises(DataError, match="20 records of text|02.jsonl"):
        prepare(tmp_path / "data", tiny_data.text_spec(mine))
    (mine / "00.jsonl").write_text("\n" + (mine / "00.jsonl").read_text())
    with pytest.raises(DataError, match="00.jsonl.* the source has changed since. Delete .*text.partial"):
        prepare(tmp_path / "data", tiny_data.text_spec(mine))


def test_bad_records_are_counted_over_all_shards_by_reason_and_place(corpus, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 1)
    mine = tmp_path / "corpus"
    mine.mkdir()
    good = "".join(json.dumps({"text": f"a text {i} " * 20}) + "\n" for i in range(30))
    for i in range(3):
        (mine / f"{i}.jsonl").write_text(good + '{"text": \n{"title": "no text"}\n{"text": "  "}\n')
    made = prepare(tmp_path / "data", tiny_data.text_spec(mine, max_skipped=9))
    assert sum(made.manifest("text")["skipped"].values()) == 9
    assert len(made.manifest("text")["skipped"]) == 3
    assert "9 bad records passed over: 3 x" in caplog.text and "0.jsonl, line 31" in caplog.text
    sentence = re.escape(f"{mine}/0.jsonl, line 33 is blank (bad records: 3, allowed: 2).")
    with pytest.raises(DataError, match=f"^{sentence}$"):
        prepare(tmp_path / "other", tiny_data.text_spec(mine, max_skipped=2))
    for _ in range(2):  # The second time all shards are there.
        with pytest.raises(DataError, match=r"9 records of text .* more than data.max_skipped = 8: 3 x .*0.jsonl"):
            prepare(tmp_path / "other", tiny_data.text_spec(mine, max_skipped=8))
    # With a higher limit it goes on from there.
    assert prepare(tmp_path / "other", tiny_data.text_spec(mine, max_skipped=9)).fingerprint == made.fingerprint


def test_a_source_of_which_a_large_share_is_bad_stops_with_the_counts_and_goes_on_with_a_higher_share(tmp_path):
    path = tmp_path / "text.jsonl"
    good = json.dumps({"text": "one good text " * 50}) + "\n"
    path.write_text(good * 40 + '{"title": "no text"}\n' * 299)
    with pytest.raises(DataError) as error:
        prepare(tmp_path / "data", tiny_data.text_spec(path, max_skipped=1_000))
    assert str(error.value) == (
        "299 of 339 records of text can't be used, more than the share data.max_skipped_share = 0.1: "
        f"299 x has no field `text` (first: {path}, line 41)."
    )
    made = prepare(tmp_path / "data", tiny_data.text_spec(path, max_skipped=1_000, max_skipped_share=0.9))
    assert made.manifest("text")["skipped"] == {"has no field `text`": 299}
    path.write_text(good * 40 + "{\n" * 10)  # Ten are few, whatever their share.
    prepare(tmp_path / "few", tiny_data.text_spec(path, max_skipped=1_000))


def interrupt_before_it_is_finished(folder, spec, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "_finish_store", mock.Mock(side_effect=KeyboardInterrupt))
        prepare(folder, spec)


def test_killed_while_the_store_is_finished_it_goes_on(corpus, tmp_path, monkeypatch):
    folder, spec = tmp_path / "data", tiny_data.text_spec(corpus / "00.jsonl")

    def unless_over(steps, operation):
        def run(*arguments, **options):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return operation(*arguments, **options)

        return run

    interrupt_before_it_is_finished(folder, spec, monkeypatch)
    [summary] = tiny_data.complete(folder)
    summary.write_text("")  # As after a power cut: its shard is made again.
    interrupt_before_it_is_finished(folder, spec, monkeypatch)
    # Before the index, the manifest and the folder have their names, and before the rest is removed.
    for number in range(4):
        assert not (folder / "text").exists()
        steps = iter(range(number))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for name in ("replace", "rename", "unlink"):
                patch.setattr(pathlib.Path, name, unless_over(steps, getattr(pathlib.Path, name)))
            prepare(folder, spec)
    made = prepare(folder, spec)
    assert made.fingerprint == prepare(tmp_path / "expected", spec).fingerprint
    assert len(documents_of(made)) == TEXTS_A_FILE


def test_a_full_disk_leaves_what_goes_on_later(corpus, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 100_000)
    folder, real = tmp_path / "data", shards_module.make_shard

    def make(job):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # Beyond which files can't grow.
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000 if job.shard == 5 else soft, hard))
        try:
            return real(job)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch, pytest.raises(DataError, match="be completed.*File too large.*start again"):
        patch.setattr(shards_module, "make_shard", make)
        prepare(folder, tiny_data.text_spec(corpus), workers=1)
    assert len(tiny_data.complete(folder)) == 5 and not list(folder.rglob("*.partial/*.partial"))
    assert documents_of(prepare(folder, tiny_data.text_spec(corpus), workers=1)) == documents_of(alone)


def test_a_worker_that_is_killed_is_reported_in_a_sentence(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(shards_module, "_ONE_PROCESS", 0)
    monkeypatch.setattr(workers, "_start", functools.partial(os._exit, 1))
    with pytest.raises(DataError, match="a worker was killed"):
        prepare(tmp_path / "data", tiny_data.text_spec(corpus), workers=2)
