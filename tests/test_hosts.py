"""What a process connects to by its environment, and real processes that Slurm's variables connect."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys

import pytest

import tiny_runs
from meap_jax.errors import ConfigError
from meap_jax.hosts import connection

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
}
SET = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


ALONE, LEFT_TO_JAX, ALL_IT_SEES = None, {}, {"local_device_ids": []}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"JAX_PLATFORMS": "cpu"}, ALONE),
        ({"JAX_PLATFORMS": "cuda,cpu"}, ALONE),
        ({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "t-0,t-1"}, ALONE),  # Tests on one host of a slice.
        ({"COLAB_RELEASE_TAG": "release-colab-external_2026"}, ALONE),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "TPU_PROCESS_ADDRESSES": "local"}, ALONE),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ALONE),
        ({"TPU_WORKER_HOSTNAMES": "", "TPU_WORKER_ID": "0"}, ALONE),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ALONE),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # An interactive step of a job of two tasks.
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, ALONE),
        # In sbatch without srun.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "JAX_PLATFORMS": "cuda"}, ALONE),
        ({}, LEFT_TO_JAX),  # On a TPU VM; elsewhere jax finds no cluster at once.
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, LEFT_TO_JAX),
        ({"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"}, LEFT_TO_JAX),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, LEFT_TO_JAX),
        ({"OMPI_COMM_WORLD_SIZE": "2", "JAX_PLATFORMS": "cpu"}, LEFT_TO_JAX),
        (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, LEFT_TO_JAX),  # Two tasks share the GPUs of a node.
        (SLURM | {"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, LEFT_TO_JAX),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, LEFT_TO_JAX),
        (SLURM, ALL_IT_SEES),  # A task with a node of its own, or with a GPU.
        (SLURM | {"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "0"}, ALL_IT_SEES),
    ],
)
def test_the_environment_says_what_a_process_connects_to(environ, expected):
    assert connection(environ) == expected


def test_what_the_user_says_goes_before_any_cluster():
    assert connection(SLURM | SET) == {
        "coordinator_address": "10.0.0.1:1234",
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "must be numbers"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2, but must be from 0 to"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "must be host:port"),
        ({"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers"),
    ],
)
def test_contradictions_get_a_sentence(wrong, words):
    with pytest.raises(ConfigError, match=words):
        connection(SET | wrong)


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
    ours = ("SLURM_", "JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "OMPI_", "TPU_", "KUBERNETES_", "JOB_")
    environment = {name: value for name, value in tiny_runs.environment().items() if not name.startswith(ours)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def job_with_a_free_port():
    """A job's number whose coordinator's port, 61440 + number % 4096, is free."""
    for job in itertools.count(os.getpid()):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 61440 + job % 4096))
            return job


def test_two_slurm_tasks_become_one_run():
    step = SLURM | {"SLURM_JOB_ID": str(job_with_a_free_port()), "SLURM_STEP_NODELIST": "localhost"}
    tasks = [start(**step | {"SLURM_PROCID": str(rank)}) for rank in range(2)]
    try:
        outputs = [task.communicate(timeout=120) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], outputs
    last_lines = [out.splitlines()[-1].split() for out, _ in outputs]  # Gloo announces itself before them.
    assert [words[:5] for words in last_lines] == [["2", str(rank), "1", "2", "3"] for rank in range(2)]


@pytest.mark.parametrize("variables", [{}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, {"JAX_PLATFORMS": ""}])
def test_a_single_host_is_ready_at_once_and_says_nothing(variables):
    task = start(**{"JAX_PLATFORMS": "cpu"} | variables)
    out, err = task.communicate(timeout=120)
    # Where no platform is set, jax may warn of its own.
    assert task.returncode == 0 and (err == "" or variables == {"JAX_PLATFORMS": ""}), err
    *counts, seconds = out.split()
    assert counts[:2] == ["1", "0"]
    assert float(seconds) < 1  # No server was asked.
