"""One run on two hosts: real processes that meet on the loopback interface."""

import shutil
import socket
import subprocess

import pytest

import tiny_runs


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_on_hosts(num_hosts, num_devices, workdir, **overrides):
    """Starts the same command as often, as on machines with so many devices each; returns what each said."""
    port = free_port()
    variables = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(num_hosts)}
    hosts = []
    for index in range(num_hosts):
        environment = tiny_runs.environment(JAX_PROCESS_ID=str(index), **variables)
        environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace("device_count=1", f"device_count={num_devices}")
        hosts.append(
            subprocess.Popen(
                tiny_runs.command(workdir, **overrides),
                env=environment,
                cwd=tiny_runs.ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [host.communicate(timeout=240)[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0] * num_hosts, "\n".join(said)
    return said


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of one process on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finished = tiny_runs.run(workdir, checkpoint__every=4)
    assert finished.returncode == 0, finished.stderr
    return workdir


def assert_same_records(workdir, alone):
    """To the tolerance of sums in another order; what tells of time may differ."""
    for ours, theirs in zip(tiny_runs.records(workdir), tiny_runs.records(alone), strict=True):
        numbers = {name: value for name, value in theirs.items() if name not in tiny_runs.TIMES}
        assert {name: ours[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    assert "validation_retrieval_answers/accuracy" in tiny_runs.records(workdir)[-1]


def test_two_hosts_train_evaluate_save_and_resume_as_one_process_does(alone, tmp_path):
    # Every parameter and every batch is split over the devices of both hosts.
    setting = dict(data__prepared=alone / "data", checkpoint__every=4, mesh__data=1, mesh__fsdp=-1)
    first, other = run_on_hosts(2, 2, tmp_path, **setting)
    assert "'fsdp': 4" in first and "step 8/8" in first and "step 8/8" not in other
    assert_same_records(tmp_path, alone)

    # As if the hosts had been stopped after step 4: they go on bit for bit.
    before = tiny_runs.losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    said = run_on_hosts(2, 2, tmp_path, **setting)
    assert all("resuming from step 4" in host for host in said)
    assert tiny_runs.losses(tmp_path) == before


def test_four_hosts_share_rows_heads_and_sequences_as_one_process_has_them(alone, tmp_path):
    # Two hosts hold the two parts of each sequence, and two the two heads: all four read the same rows.
    setting = dict(mesh__data=1, mesh__tensor=2, mesh__context=2)
    run_on_hosts(4, 1, tmp_path, data__prepared=alone / "data", checkpoint__every=4, **setting)
    assert_same_records(tmp_path, alone)
