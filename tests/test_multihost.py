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


def run_on_two_hosts(workdir, **overrides):
    """Starts the same command twice, as on two machines with two devices each; returns what each said."""
    port = free_port()
    variables = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    hosts = []
    for index in range(2):
        environment = tiny_runs.environment(JAX_PROCESS_ID=str(index), **variables)
        environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace("device_count=1", "device_count=2")
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
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(said)
    return said


def test_two_hosts_train_evaluate_save_and_resume_as_one_process_does(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    finished = tiny_runs.run(alone, checkpoint__every=4)
    assert finished.returncode == 0, finished.stderr

    # Every parameter and every batch is split over the devices of both hosts.
    setting = dict(data__prepared=alone / "data", checkpoint__every=4, mesh__data=1, mesh__fsdp=-1)
    first, other = run_on_two_hosts(together, **setting)
    assert "'fsdp': 4" in first and "step 8/8" in first and "step 8/8" not in other
    for ours, theirs in zip(tiny_runs.records(together), tiny_runs.records(alone), strict=True):
        numbers = {name: value for name, value in theirs.items() if name not in tiny_runs.TIMES}
        assert {name: ours[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    assert "validation_retrieval_answers/accuracy" in tiny_runs.records(together)[-1]

    # As if the hosts had been stopped after step 4: they go on bit for bit.
    before = tiny_runs.losses(together)
    shutil.rmtree(together / "checkpoints" / "8")
    said = run_on_two_hosts(together, **setting)
    assert all("resuming from step 4" in host for host in said)
    assert tiny_runs.losses(together) == before
