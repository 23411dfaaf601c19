"""Hosts of a training run that are killed, hang, stop, come late or were started with something else."""

import re
import shutil
import signal
import time

import pytest

import host_processes
import tiny_data
import tiny_runs

# Of jax's C++, of Gloo, and of Python: never in what a host says that stops since another is gone.
NOISE = ("Traceback", "Check failure", "coordination_service", "preemption_sync", "terminate called", "Gloo", "XlaRun")
ENDLESS = dict(num_steps=100_000, eval__every=100_000, eval__tasks="", checkpoint__every=5)
FIGURES = []


@pytest.fixture(scope="module", autouse=True)
def figures():
    """Prints seconds until the others stopped, for docs/reliability.md; `pytest -s` shows them."""
    yield
    heading = ["", "| hosts | what happened | others ended after | exit code |", "| --- | --- | --- | --- |"]
    print("\n".join([*heading, *FIGURES]))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The prepared data of tiny runs."""
    workdir = tmp_path_factory.mktemp("data") / "run"
    tiny_runs.run(workdir, num_steps=1, eval__tasks="")
    return workdir / "data"


def assert_one_sentence(group, host, words):
    """That a host ended with one error, a line, and with no other output of its libraries."""
    said = group.said(host)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(words, errors[0]), group.everything()
    assert not any(word in said for word in NOISE), group.everything()


# ------------------------------------------------------------------------------------ started with something else


def test_a_host_with_another_learning_rate_is_told_so_by_all_before_anything_is_written(tmp_path):
    commands = [tiny_runs.command(tmp_path / "run")] * 2
    commands[1] = tiny_runs.command(tmp_path / "run", optimizer__learning_rate=0.1)
    with host_processes.Hosts(commands) as group:
        assert group.codes(120) == [1, 1]
        for host in range(2):
            words = r"host 1 has optimizer.learning_rate=0.1 and host 0 0.002: start all of them with the same command"
            assert_one_sentence(group, host, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_host_with_another_workdir_and_seed_is_told_both(tmp_path):
    commands = [tiny_runs.command(tmp_path / "run"), tiny_runs.command(tmp_path / "other", seed=5)]
    with host_processes.Hosts(commands) as group:
        assert group.codes(120) == [1, 1]
        assert_one_sentence(
            group, 0, r"host 1 has --workdir=\S+/other and host 0 \S+/run; host 1 has seed=5 and host 0"
        )


def test_a_host_with_other_code_is_told_so_by_all(tmp_path):
    for name in ("meap_jax", "configs"):
        shutil.copytree(tiny_runs.ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "tree" / "meap_jax" / "losses.py").open("a") as file:
        file.write("# Changed on this host.\n")
    with host_processes.Hosts([tiny_runs.command(tmp_path / "run"), None]) as group:
        group.start(1, tiny_runs.command(tmp_path / "run"), folder=tmp_path / "tree")
        assert group.codes(120) == [1, 1]
        for host in range(2):
            words = r"host 1 has meap_jax_source=\w{12} and host 0 \w{12}: all hosts must run the same"
            assert_one_sentence(group, host, words)


@pytest.mark.slow
def test_a_host_with_other_devices_is_told_so_by_all(tmp_path):
    with host_processes.Hosts([tiny_runs.command(tmp_path / "run"), None]) as group:
        group.num_devices = 2
        group.start(1, tiny_runs.command(tmp_path / "run"))
        assert group.codes(120) == [1, 1]
        for host in range(2):
            assert_one_sentence(group, host, "host 1 has devices=2 and host 0 1: all hosts must have the same devices")


@pytest.mark.slow
def test_a_host_with_other_data_is_told_so_by_all(tmp_path):
    """Each host prepares its own, in its own folder of the same name, from files that differ in one word."""
    for name in ("zero", "one"):
        (tmp_path / name).mkdir()
        lines = [f"Line {i} is about the number {i * i}. " * 5 for i in range(200)]
        tiny_data.write_jsonl(tmp_path / name / "text.jsonl", [*lines, name])
    command = tiny_runs.command(
        tmp_path / "run", data__mixture="text=1", data__path="text.jsonl", data__prepared="data", eval__tasks=""
    )
    with host_processes.Hosts([None, None]) as group:
        for host, name in enumerate(("zero", "one")):
            group.start(host, command, cwd=tmp_path / name)
        assert group.codes(120) == [1, 1]
        for host in range(2):
            assert_one_sentence(
                group, host, r"host 1 has the data's fingerprint=\w{12} and host 0 \w{12}: prepare data"
            )


def test_all_hosts_say_why_the_first_could_not_prepare_the_data(tmp_path):
    (tmp_path / "text.jsonl").write_text("")
    command = tiny_runs.command(tmp_path / "run", data__mixture="text=1", data__path=tmp_path / "text.jsonl")
    with host_processes.Hosts([command] * 2) as group:
        assert group.codes(120) == [1, 1]
        for host in range(2):
            assert_one_sentence(group, host, "The source text holds no text")


# ------------------------------------------------------------------------------------------------ comes late


def test_a_host_that_never_comes_is_named(tmp_path):
    with host_processes.Hosts([tiny_runs.command(tmp_path / "run"), None], MEAP_JAX_HOST_START_SECONDS="6") as group:
        assert group.codes(120) == [1]
        assert_one_sentence(group, 0, r"host 1 of 2 did not come to 127.0.0.1:\d+ within 6 s: start all of them with")


@pytest.mark.slow
def test_a_host_that_comes_late_is_waited_for_and_one_that_comes_too_late_is_told(tmp_path, data):
    command = tiny_runs.command(tmp_path / "run", data__prepared=data, **ENDLESS)
    late = dict(MEAP_JAX_HOST_START_SECONDS="5")
    with host_processes.Hosts([command, None]) as group:
        time.sleep(10)
        group.start(1, command)
        group.wait_for(0, "step 5/")
        group.start("again", command, JAX_PROCESS_ID="1", **late)
        assert group.processes["again"].wait(120) == 1
        assert_one_sentence(group, "again", r"a run is going on already at \S+, and host 1 comes too late for it")
        assert group.processes[0].poll() is None and group.processes[1].poll() is None
        steps = group.said(0).count("step ")
        time.sleep(2)
        assert group.said(0).count("step ") > steps  # The run went on.

    with host_processes.Hosts([None, command], **late) as group:  # Its run has ended, or never began.
        assert group.codes(120) == [1]
        assert_one_sentence(group, 1, r"host 0 did not answer host 1 at \S+ within 5 s: has it been started")


# ------------------------------------------------------------------------------------------------ dies in the run

KILLS = [
    (2, 1, signal.SIGKILL),
    (2, 0, signal.SIGKILL),
    (2, 1, signal.SIGSTOP),
    pytest.param(2, 0, signal.SIGSTOP, marks=pytest.mark.slow),
    pytest.param(4, 2, signal.SIGKILL, marks=pytest.mark.slow),
    pytest.param(4, 0, signal.SIGKILL, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, data):
    """{number of hosts: losses of a run that nothing happened to}."""
    known = {}

    def of(num_hosts):
        if num_hosts not in known:
            workdir = tmp_path_factory.mktemp("whole") / "run"
            commands = [tiny_runs.command(workdir, data__prepared=data, **SHORT)] * num_hosts
            with host_processes.Hosts(commands) as group:
                assert not any(group.codes(400)), group.everything()
            known[num_hosts] = tiny_runs.losses(workdir)
        return known[num_hosts]

    return of


SHORT = ENDLESS | dict(num_steps=120, checkpoint__every=20)


@pytest.mark.parametrize("num_hosts, who, number", KILLS)
def test_when_a_host_dies_the_others_stop_and_the_run_goes_on_bit_for_bit(
    tmp_path, data, expected, num_hosts, who, number
):
    whole = expected(num_hosts)
    command = tiny_runs.command(tmp_path / "run", data__prepared=data, **SHORT)
    with host_processes.Hosts([command] * num_hosts) as group:
        group.wait_for(0, "step 30/")
        group.send(who, number)
        began = time.monotonic()
        codes = group.codes(60, but=(who,))
        seconds = time.monotonic() - began
        assert codes == [143] * (num_hosts - 1), group.everything()
        words = f"host {who} (ended without a word|gave no sign of life for 1[56] s).*goes on from its last checkpoint"
        for host in set(range(num_hosts)) - {who}:
            assert_one_sentence(group, host, words)
        assert seconds < (30 if number == signal.SIGSTOP else 12)
        FIGURES.append(f"| {num_hosts} | host {who}: {number.name} | {seconds:.1f} s | 143 |")

        # At once, with the same address, as a launcher would.
        group.send(who, signal.SIGKILL)
        group.processes[who].wait()
        for host in range(num_hosts):
            group.start(host, command)
        assert group.codes(300) == [0] * num_hosts, group.everything()
        assert any(f"resuming from step {step}" in group.said(0) for step in (20, 40, 60))
    assert tiny_runs.losses(tmp_path / "run") == whole


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_said_by_all_hosts(tmp_path, data):
    fields = ENDLESS | dict(data__prepared=data, optimizer__learning_rate=1e30, num_steps=50)
    with host_processes.Hosts([tiny_runs.command(tmp_path / "run", **fields)] * 2) as group:
        assert group.codes(200) == [1, 1]
        for host in range(2):
            assert_one_sentence(group, host, "must be finite")


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_notice_to_one_host_ends_all_in_good_order_at_one_step(tmp_path, data, who):
    command = tiny_runs.command(tmp_path / "run", data__prepared=data, **ENDLESS)
    with host_processes.Hosts([command] * 2) as group:
        group.wait_for(0, "step 10/")
        group.send(who, signal.SIGTERM)
        assert group.codes(60) == [143, 143]
        for host in range(2):
            assert "preempted: " in group.said(host) and "error: " not in group.said(host), group.everything()
            assert not any(word in group.said(host) for word in ("Traceback", "Check failure")), group.everything()
