"""One run on several hosts: real processes that meet on the loopback interface."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

import chat_files
import host_processes
import tiny_data
import tiny_runs
from meap_jax.corpus.prepare import prepare


def run_on_hosts(num_hosts, num_devices, workdir, **overrides):
    """Starts training as often, as on machines with so many devices each; returns what each said."""
    return start_on_hosts([tiny_runs.command(workdir, **overrides)] * num_hosts, num_devices)


def start_on_hosts(commands, num_devices):
    """Runs each command on a host of its own with so many devices; returns what each said."""
    with host_processes.Hosts(commands, num_devices) as hosts:
        assert not any(hosts.codes(timeout=600)), hosts.everything()
        return [hosts.said(index) for index in range(len(commands))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of one process on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    tiny_runs.run(workdir, checkpoint__every=4)
    return workdir


def assert_same_records(workdir, alone):
    """To the tolerance of sums in another order; the fields in TIMES may differ."""
    for ours, theirs in zip(tiny_runs.records(workdir), tiny_runs.records(alone), strict=True):
        numbers = {name: value for name, value in theirs.items() if name not in tiny_runs.TIMES}
        assert {name: ours[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    assert "validation_retrieval_answers/accuracy" in tiny_runs.records(workdir)[-1]


@pytest.mark.parametrize("num_hosts, num_devices", [(2, 2), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_hosts_train_evaluate_save_and_resume_as_one_process_does(alone, tmp_path, num_hosts, num_devices):
    # Every parameter and every batch is split over the devices of all hosts.
    setting = dict(data__prepared=alone / "data", checkpoint__every=4, mesh__data=1, mesh__fsdp=-1)
    first, *others = run_on_hosts(num_hosts, num_devices, tmp_path, **setting)
    assert f"'fsdp': {num_hosts * num_devices}" in first
    assert "step 8/8" in first and not any("step 8/8" in other for other in others)
    assert_same_records(tmp_path, alone)

    # As if the hosts had been stopped after step 4: they go on bit for bit.
    before = tiny_runs.losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    said = run_on_hosts(num_hosts, num_devices, tmp_path, **setting)
    assert all("resuming from step 4" in host for host in said)
    assert tiny_runs.losses(tmp_path) == before


def test_four_hosts_share_rows_heads_and_sequences_as_one_process_has_them(alone, tmp_path):
    # Two hosts hold the two parts of each sequence, and two the two heads: all four read the same rows.
    setting = dict(mesh__data=1, mesh__tensor=2, mesh__context=2)
    run_on_hosts(4, 1, tmp_path, data__prepared=alone / "data", checkpoint__every=4, **setting)
    assert_same_records(tmp_path, alone)


def test_a_run_goes_from_four_hosts_to_two_and_back_as_if_nothing_had_happened(alone, tmp_path):
    """Two sources, packed by best fit and as one stream; the run on one host reads no other rows."""
    text = tiny_data.write_jsonl(
        tmp_path / "text.jsonl", [f"Line {i} is about the number {i * i}. " * 5 for i in range(200)]
    )
    setting = dict(
        data__mixture="retrieval=0.5,text=0.5", data__path=text, seq_len=120, data__packing="best_fit",
        data__prepared=tmp_path / "data", checkpoint__every=2, checkpoint__keep=3, eval__tasks="", num_steps=6,
        mesh__data=-1,
    )  # fmt: skip
    tiny_runs.run(tmp_path / "alone", **setting)
    workdir = tmp_path / "elastic"
    for num_hosts, start in ((4, 0), (2, 2), (4, 4)):
        for step in range(start + 2, 8, 2):  # As if the run had been stopped after step `start`.
            shutil.rmtree(workdir / "checkpoints" / str(step), ignore_errors=True)
        said = run_on_hosts(num_hosts, 1, workdir, **setting)
        assert start == 0 or all(f"resuming from step {start}" in host for host in said)
    expected, found = tiny_runs.losses(tmp_path / "alone"), tiny_runs.losses(workdir)
    assert found.keys() == expected.keys() == set(range(1, 7))
    for step, (loss, _) in expected.items():
        assert found[step][0] == pytest.approx(loss, rel=1e-4)


PACKINGS = ("concat", "concat_segments", "best_fit")


def read_on_hosts(num_hosts, scratch, task):
    """{(packing, step, row): hash} of all hosts together, and the states at the end, the same on all of them."""
    file = scratch / "task.pickle"
    file.write_bytes(pickle.dumps(task))
    outs = [scratch / f"out{i}.json" for i in range(num_hosts)]
    program = tiny_runs.ROOT / "tests" / "batch_reader.py"
    start_on_hosts([[sys.executable, str(program), str(file), str(out)] for out in outs], 1)
    hosts = [json.loads(out.read_text()) for out in outs]
    assert all(host["states"] == hosts[0]["states"] for host in hosts)
    rows = {}
    for host in hosts:
        for packing, steps in host["seen"].items():
            for step, seen in steps.items():
                assert len(seen) == task["batch_size"] // num_hosts
                rows |= {(packing, step, row): sha for row, sha in seen.items()}
    return rows, hosts[0]["states"]


def test_no_row_comes_twice_and_none_is_left_out_when_the_number_of_hosts_changes(tmp_path):
    rng, names = np.random.default_rng(0), ("text", "more")
    texts = {
        name: [f"{name} {i}: " + " ".join(rng.choice(list("abcdefgh"), rng.integers(2, 40))) for i in range(150)]
        for name in names
    }
    paths = [tiny_data.write_jsonl(tmp_path / f"{name}.jsonl", texts[name]) for name in names]
    setting = dict(mixture="text,more", seq_len=32)
    specs = {packing: tiny_data.text_spec(*paths, packing=packing, **setting) for packing in PACKINGS}
    task = dict(
        folder=str(tmp_path / "data"), specs=specs, weights={"text": 0.7, "more": 0.3}, seed=3, batch_size=8,
        mesh={"data": -1, "fsdp": 1, "tensor": 1, "context": 1},
    )  # fmt: skip
    for spec in specs.values():
        prepare(tmp_path / "data", spec)
    whole, end = read_on_hosts(1, tmp_path, task | {"states": None, "start": 0, "stop": 12})
    rows, states = {}, None
    for num_hosts, start in ((4, 0), (2, 4), (4, 8)):
        stretch = {"states": states, "start": start, "stop": start + 4}
        seen, states = read_on_hosts(num_hosts, tmp_path, task | stretch)
        rows |= seen
    assert (rows, states) == (whole, end)
    for packing in PACKINGS:
        assert len({sha for key, sha in whole.items() if key[0] == packing}) > 60  # Rows differ.


def test_two_hosts_go_on_from_the_answers_that_the_first_has(alone, tmp_path):
    def evaluated(name, *words):
        asked = [
            "--tasks=kv",
            "--config.eval.seq_len=700",
            "--config.eval.kv.num_keys=2",
            "--config.eval.kv.positions=1,2",
        ]
        asked += ["--config.eval.kv.max_questions=4", f"--workdir={alone}", f"--out={tmp_path / name}.json"]
        return [sys.executable, "-m", "meap_jax.evaluate", *asked, *words]

    subprocess.run(evaluated("one"), env=tiny_runs.environment(), cwd=tiny_runs.ROOT, check=True, capture_output=True)
    expected = json.loads((tmp_path / "one.json").read_text())
    lines = (tmp_path / "one" / "kv.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "kv.jsonl").write_bytes(b"".join(lines[:4]))
    said = start_on_hosts([evaluated("two", "--mesh=data=1,fsdp=-1")] * 2, 2)
    assert all("kv: 3 of 8 answers are there already" in host for host in said)
    found = json.loads((tmp_path / "two.json").read_text())
    assert found["metrics"] == expected["metrics"] and len(found["examples"]["kv"]) == 8
    assert (tmp_path / "two" / "kv.jsonl").read_bytes().count(b"\n") == 9


def test_two_hosts_fine_tune_and_write_what_they_trained_for_transformers(tmp_path):
    path = chat_files.alpaca(tmp_path / "alpaca.json")
    fields = chat_files.CHAT | dict(num_epochs=0, num_steps=2, eval__every=2, checkpoint__every=2, data__path=path)
    fields |= dict(checkpoint__export="merge", mesh__data=1, mesh__fsdp=-1)
    run_on_hosts(2, 2, tmp_path / "two", **fields)
    tiny_runs.run(tmp_path / "one", **fields)
    ours, theirs = (tiny_runs.losses(tmp_path / name) for name in ("two", "one"))
    assert list(ours) == list(theirs) and np.allclose(list(ours.values()), list(theirs.values()), rtol=1e-4)

    # As if they had been stopped between the last checkpoint and its export.
    written = tmp_path / "two" / "export" / "2" / "model.safetensors"
    content = written.read_bytes()
    shutil.rmtree(written.parent)
    run_on_hosts(2, 2, tmp_path / "two", **fields)
    assert written.read_bytes() == content
