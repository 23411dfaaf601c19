"""Shards that Apache Beam has made are those that one process makes, whatever happens on the way."""

import concurrent.futures
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

import tiny_data
import tiny_runs
from meap_jax.corpus import beam as beam_module
from meap_jax.corpus import shards as shards_module
from meap_jax.corpus.beam import beam_options, run_on_beam
from meap_jax.corpus.prepare import prepare
from meap_jax.corpus.shards import jobs, make_shard
from meap_jax.corpus.sources import open_source
from meap_jax.errors import ConfigError, DataError

NUM_SHARDS = 6
IN_PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
# Beam's own job server in a thread: pipelines are submitted to it, run beside us and are asked about, as on a cluster.
SUBMITTED = ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"]

is_there = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not is_there, reason="needs apache-beam: make test-data")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 1)  # One a file.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_data.write_sea_stories(tmp_path_factory.mktemp("corpus"), NUM_SHARDS, 60, num_words=100)


@pytest.fixture
def alone(corpus, tmp_path):
    """What one process makes, as {path: content}."""
    return content(prepare(tmp_path / "alone", tiny_data.text_spec(corpus), workers=1))


def content(prepared):
    """All files of a prepared folder."""
    files = (path for path in prepared.folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(prepared.folder)): path.read_bytes() for path in files}


def prepare_on_beam(folder, spec, words=(), worker_folder=None):
    on_beam = functools.partial(run_on_beam, options=beam_options(list(words)), worker_folder=worker_folder)
    return prepare(folder, spec, shard_maker=on_beam)


def run_command(*arguments, module="meap_jax.corpus.beam", **environment):
    command = [sys.executable, "-m", module, "--config=configs/meap_100m.py", *map(str, arguments)]
    environment = tiny_runs.environment() | environment
    return subprocess.run(command, cwd=tiny_runs.ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_one_shard_made_at_once_by_many_with_one_process_id_is_right(corpus, tmp_path):
    spec = tiny_data.text_spec(corpus)
    prepare(tmp_path, spec, workers=1)  # The folder gets the tokenizer.
    (tmp_path / "made").mkdir()
    job = jobs(open_source("text", spec.sources["text"]), tmp_path / "made", tmp_path, 0)[0]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        summaries = list(pool.map(make_shard, [job] * 32))
    assert all(summary == summaries[0] for summary in summaries)
    assert sorted(os.listdir(job.folder)) == ["00000.arrayrecord", "00000.index.npy", "00000.json"]
    made = {path.name: path.read_bytes() for path in job.folder.iterdir()}
    make_shard(job)
    assert {path.name: path.read_bytes() for path in job.folder.iterdir()} == made


def test_without_beam_the_command_says_what_to_install(tmp_path):
    (tmp_path / "apache_beam.py").write_text("raise ImportError('No module named apache_beam')")
    ended = run_command(PYTHONPATH=f"{tmp_path}:{tiny_runs.ROOT}")
    assert ended.returncode == 1
    sentence = "needs Apache Beam (No module named apache_beam): pip install -r requirements-beam.txt"
    assert ended.stderr.strip() == f"error: meap_jax.corpus.beam {sentence}"


def test_beam_is_imported_by_nothing_else():
    program = "import sys, meap_jax.main, meap_jax.corpus.beam; sys.exit('apache_beam' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=tiny_runs.ROOT, env=tiny_runs.environment(), check=True)


@needs_beam
@pytest.mark.parametrize(
    ("words", "worker_folder"),
    [
        ([], None),
        (IN_PROCESSES, None),
        (SUBMITTED, None),
        (["--direct_runner_bundle_repeat=1"], None),
        ([], "file://{}/data/"),  # Workers copy shards to a bucket ...
        (IN_PROCESSES, "file://{}/data/"),
        ([], "{}/seen"),  # ... or see the disk under another name.
    ],
    ids=str,
)
def test_the_folder_is_the_same_byte_for_byte(corpus, alone, tmp_path, words, worker_folder):
    (tmp_path / "seen").symlink_to(tmp_path / "data")
    worker_folder = worker_folder and worker_folder.format(tmp_path)
    made = prepare_on_beam(tmp_path / "data", tiny_data.text_spec(corpus), words, worker_folder)
    assert len(made.manifest("text")["shards"]) == NUM_SHARDS
    assert content(made) == alone


@needs_beam
def test_retrieval_documents_keep_their_answers(tmp_path):
    spec = tiny_data.text_spec(
        None, mixture="retrieval=1", min_facts=4, num_facts=4, num_eval_facts=4, questions_per_fact=0.5, max_fillers=1,
        num_documents=30, num_eval_documents=5,
    )  # fmt: skip
    made = prepare_on_beam(tmp_path / "data", spec, (), f"file://{tmp_path}/data")
    assert len(made.blocks("retrieval", "test").spans("answer"))
    assert content(made) == content(prepare(tmp_path / "alone", spec, workers=1))


@needs_beam
@pytest.mark.parametrize("worker_folder", [None, "file://{}"])
def test_killed_and_started_again_it_goes_on(corpus, alone, tmp_path, worker_folder):
    folder = tmp_path / "data"
    worker_folder = worker_folder and worker_folder.format(folder)
    body = (
        "shards.SHARD_BYTES = 1\n"
        f"maker = functools.partial(beam.run_on_beam, options=beam.beam_options([]), worker_folder={worker_folder!r})\n"
        f"prepare({str(folder)!r}, {tiny_data.text_spec(corpus)!r}, shard_maker=maker)\n"
    )
    process = tiny_data.start_program(tmp_path / "program.py", body)
    tiny_data.wait_for(lambda: len(tiny_data.complete(folder)) >= 2, process)
    process.kill()
    process.communicate()
    done = [path.with_suffix(".arrayrecord") for path in tiny_data.complete(folder)]
    assert 2 <= len(done) < NUM_SHARDS and not (folder / "text").exists()
    records = {path.name: path.stat().st_mtime_ns for path in done}
    made = prepare_on_beam(folder, tiny_data.text_spec(corpus), (), worker_folder)
    assert content(made) == alone
    for name, time in records.items():
        assert (folder / "text" / name).stat().st_mtime_ns == time  # What was complete was not made again.


@pytest.fixture
def spoilt(corpus, tmp_path):
    """The corpus with 3 bad lines in each file, as a spec that allows `max_skipped`."""
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for path in corpus.iterdir():
        (folder / path.name).write_text(path.read_text() + '{"text": \n{"title": "no text"}\n{"text": "  "}\n')
    return lambda max_skipped: tiny_data.text_spec(folder, max_skipped=max_skipped)


@needs_beam
@pytest.mark.parametrize("words", [[], SUBMITTED], ids=str)
@pytest.mark.parametrize("is_bucket", [False, True])
def test_too_many_bad_records_in_one_shard_or_in_all_stop_it_with_file_and_line(spoilt, tmp_path, words, is_bucket):
    worker_folder = f"file://{tmp_path}/data" if is_bucket else None
    place = re.escape(f"{tmp_path}/spoilt/00.jsonl, line 63")
    with pytest.raises(DataError, match=rf"^{place} [\w ]+ \(bad records: 3, allowed: 2\)\.$"):
        prepare_on_beam(tmp_path / "data", spoilt(2), words, worker_folder)
    with pytest.raises(DataError, match=r"records of text can't be used, more than data.max_skipped = 8: 3 x "):
        prepare_on_beam(tmp_path / "data", spoilt(8), words, worker_folder)
    # With a higher limit it goes on from there, and leaves nothing of what failed.
    spec = spoilt(3 * NUM_SHARDS)
    made = prepare_on_beam(tmp_path / "data", spec, words, worker_folder)
    assert content(made) == content(prepare(tmp_path / "again", spec, workers=1))


@needs_beam
def test_documents_tokens_and_skips_are_counted_as_metrics(spoilt, tmp_path, monkeypatch):
    import apache_beam

    results, real = [], apache_beam.Pipeline.run
    monkeypatch.setattr(apache_beam.Pipeline, "run", lambda self: results.append(real(self)) or results[-1])
    made = prepare_on_beam(tmp_path / "data", spoilt(99))
    counters = {counter.key.metric.name: counter.committed for counter in results[0].metrics().query()["counters"]}
    tokens = made.manifest("text")["tokens"]
    assert counters == {"documents": NUM_SHARDS * 60, "tokens": tokens, "skipped": NUM_SHARDS * 3}


@needs_beam
def test_a_worker_folder_that_is_another_one_is_refused_before_any_work(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(beam_module, "_make_element", None)
    other = f"file://{tmp_path}/other"
    with pytest.raises(ConfigError, match=f"--worker_folder is {other}, but must be the folder that is data.prepared"):
        prepare_on_beam(tmp_path / "data", tiny_data.text_spec(corpus), (), other)


@needs_beam
def test_a_disk_that_workers_do_not_see_is_an_error(corpus, tmp_path):
    with pytest.raises(DataError, match="the pipeline failed: /nowhere holds none of tokenizer.json"):
        prepare_on_beam(tmp_path / "data", tiny_data.text_spec(corpus), (), "/nowhere")


@needs_beam
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num_worker=3"], "'--num_worker=3' is neither a flag of ours nor of Beam's"),
        (["--direct_running_mode=fast"], "argument --direct_running_mode: invalid choice: 'fast'"),
        (["--runner=NoRunner"], "Unexpected pipeline runner: NoRunner"),
        (["--config", "configs/quickstart.py"], "'configs/quickstart.py' is neither"),
    ],
)
def test_impossible_options_are_one_sentence(words, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        beam_options(beam_module._divide(words)[2])
    assert "\n" not in str(error.value)


@needs_beam
def test_the_command_prints_what_that_of_prepare_prints(corpus, tmp_path):
    data = (f"--config.data.path={corpus}", "--config.seq_len=64")
    alone = run_command(*data, f"--config.data.prepared={tmp_path}/alone", module="meap_jax.corpus.prepare")
    folder = tmp_path / "data"
    words = (f"--config.data.prepared={folder}", f"--worker_folder=file://{folder}", "--runner=DirectRunner")
    ended = run_command(*data, *words)
    assert ended.returncode == alone.returncode == 0, ended.stderr
    assert ended.stdout == alone.stdout and json.loads(ended.stdout)["source"] == "text"


@needs_beam
def test_the_command_ends_at_bad_records_in_one_sentence_and_without_a_traceback(corpus, tmp_path):
    (tmp_path / "bad.jsonl").write_text("no JSON\n" * 5)
    words = (f"--config.data.path={tmp_path}/bad.jsonl", "--config.data.max_skipped=4")
    ended = run_command(*words, f"--config.data.prepared={tmp_path}/data")
    sentence = f"{tmp_path}/bad.jsonl, line 5, column 1 is not JSON (bad records: 5, allowed: 4)."
    assert ended.returncode == 1 and ended.stderr.strip() == f"error: {sentence}"
