"""The cluster of a process: what is connected, what is left alone, and real processes that Slurm brings together."""

import contextlib
import os
import re
import socket
import subprocess
import sys

import pytest

import tiny_runs
from meap_jax.errors import ConfigError
from meap_jax.hosts import connection, join_hosts, versions

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
}

# Environments of processes that connect to nobody, and of those whose cluster jax finds out by itself.
ALONE = [
    {"JAX_PLATFORMS": "cpu"},
    {"JAX_PLATFORMS": "cuda,cpu"},
    {"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "t-0,t-1"},  # Tests on one host of a slice.
    {"COLAB_RELEASE_TAG": "release-colab-external_2026"},
    {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "TPU_PROCESS_ADDRESSES": "local"},
    {"TPU_WORKER_HOSTNAMES": "localhost"},
    {"TPU_WORKER_HOSTNAMES": "", "TPU_WORKER_ID": "0"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # An interactive step of a job of two tasks.
    SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"},
    {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "JAX_PLATFORMS": "cuda"},  # sbatch, no srun.
]
LEFT_TO_JAX = [
    {},  # On a TPU VM; elsewhere jax says at once that it knows no cluster.
    {"TPU_WORKER_HOSTNAMES": "t-0,t-1"},
    {"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
    {"OMPI_COMM_WORLD_SIZE": "2", "JAX_PLATFORMS": "cpu"},
    SLURM | {"SLURM_STEP_NUM_NODES": "1"},  # Two tasks share the GPUs of a node: jax deals them out.
    SLURM | {"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "0,1"},
    SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"},
]
# Slurm tasks with a node or a GPU of their own, which use all they see.
ON_SLURM = [SLURM, SLURM | {"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "0"}]
GIVEN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
AS_GIVEN = {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    "environ, expected",
    [
        *((environ, None) for environ in ALONE),
        *((environ, {}) for environ in LEFT_TO_JAX),
        *((environ, {"local_device_ids": []}) for environ in ON_SLURM),
        (SLURM | GIVEN, AS_GIVEN | {"cluster_detection_method": "deactivate"}),  # Before any cluster.
    ],
)
def test_a_process_connects_as_its_environment_says(environ, expected):
    assert connection(environ) == expected


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (GIVEN | {"JAX_NUM_PROCESSES": "two"}, "must be numbers"),
        (GIVEN | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2, but must be from 0 to"),
        (GIVEN | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "must be host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, "JAX_NUM_PROCESSES"),
    ],
)
def test_contradictions_get_a_sentence(environ, words):
    with pytest.raises(ConfigError, match=words):
        connection(environ)


PROGRAM = """
import time
from meap_jax import hosts
began = time.perf_counter()
hosts.join_hosts()
seconds = time.perf_counter() - began
import jax, numpy as np
from jax.experimental import multihost_utils
total = int(np.sum(multihost_utils.process_allgather(np.int32(jax.process_index() + 1))))
print(jax.process_count(), jax.process_index(), len(jax.local_devices()), len(jax.devices()), total, seconds)
"""


def start(**variables):
    """A process of PROGRAM that inherits nothing about clusters."""
    clusters = ("SLURM_", "JAX_COORDINATOR", "JAX_NUM_", "JAX_PROCESS_ID", "OMPI_", "TPU_", "KUBERNETES_", "JOB_")
    inherited = {name: value for name, value in tiny_runs.environment().items() if not name.startswith(clusters)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=inherited | variables, **pipes)


def job_with_a_free_port():
    """A job's number whose coordinator's port, 61440 + number % 4096, nobody uses."""
    for job in range(os.getpid(), os.getpid() + 4096):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", 61440 + job % 4096))
            return job


def test_two_slurm_tasks_become_one_run():
    step = SLURM | {"SLURM_JOB_ID": str(job_with_a_free_port()), "SLURM_STEP_NODELIST": "localhost"}
    tasks = [start(**step | {"SLURM_PROCID": str(rank)}) for rank in range(2)]
    try:
        said = [task.communicate(timeout=120) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], said
    last_lines = [out.splitlines()[-1].split() for out, _ in said]  # Gloo announces itself before them.
    assert [words[:5] for words in last_lines] == [["2", str(rank), "1", "2", "3"] for rank in range(2)]


# Of a platform that nobody named: whatever accelerator this machine has, jax's own words about it are its own.
@pytest.mark.parametrize("variables", [{}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, {"JAX_PLATFORMS": ""}])
def test_a_single_host_is_ready_at_once_and_says_nothing(variables):
    task = start(**{"JAX_PLATFORMS": "cpu"} | variables)
    out, err = task.communicate(timeout=120)
    assert task.returncode == 0, err
    *counts, seconds = out.split()
    assert counts[:2] == ["1", "0"] and float(seconds) < 1  # No server was asked.
    assert "JAX_PLATFORMS" in variables or (err, counts[2:]) == ("", ["1", "1", "1"])


@pytest.mark.parametrize("name", ["MEAP_JAX_HOST_START_SECONDS", "MEAP_JAX_HOST_TIMEOUT_SECONDS"])
@pytest.mark.parametrize("value", ["soon", "0", "-3", "nan", ""])
def test_times_that_are_none_get_a_sentence(name, value, monkeypatch):
    for key, text in (GIVEN | {"JAX_PROCESS_ID": "0", name: value}).items():
        monkeypatch.setenv(key, text)
    with pytest.raises(ConfigError, match=f"{name} is '{value}', but must be a number of seconds above 0"):
        join_hosts()


def test_versions_name_packages_and_the_source_of_this_one():
    found = versions()
    assert {"python", "jax", "jaxlib", "orbax-checkpoint", "meap_jax"} <= found.keys()
    assert re.fullmatch("[0-9a-f]{12}", found["meap_jax_source"]) and found == versions()
