"""Connects the processes of a run, from what their environment says about the cluster."""

import os
from collections.abc import Mapping
from typing import Any

import jax

from meap_jax.errors import ConfigError

# What srun sets in each process of a step; `jax.distributed` looks for the same five. A shell that was opened on the
# node some other way has some of them at most.
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# Set in each process by mpirun, and by an indexed Job of Kubernetes.
_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX")
# Notebook services: one host each, whatever the accelerator.
_NOTEBOOKS = ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")


def join_hosts() -> None:
    """Connects the processes of a run, if there are several; call it before anything touches a device.

    Raises:
      ConfigError: for variables that contradict each other, and a cluster that gives no details. (Hosts that
        wait five minutes for one another in vain are ended by jax, with a message on stderr.)
    """
    arguments = connection(os.environ)
    if arguments is None:
        return
    try:
        jax.distributed.initialize(**arguments)
    except ValueError as error:
        # Its error where it finds no cluster, such as on a machine without TPU: one process.
        if "coordinator_address" not in str(error):
            raise ConfigError(f"the hosts of this run can't be connected: {error}") from error
    except (OSError, RuntimeError) as error:  # Of the TPU's metadata server, or of the cluster's name service.
        reason = " ".join(str(error).split("\n")[0].split())
        raise ConfigError(
            f"the hosts of this run can't be connected ({reason}): set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID, or TPU_SKIP_MDS_QUERY=1 if there is this one only."
        ) from error


def connection(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` for this process; None if it makes up a run on its own.

    In this order: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; Slurm; Open MPI and
    Kubernetes, whose details jax finds out; a TPU slice, which jax detects by variables or, on a Google VM with TPU
    chips and there only, from the metadata server.

    Args:
      environ: the environment's variables.

    Raises:
      ConfigError: for variables that are no numbers, or contradict each other.
    """
    if "JAX_COORDINATOR_ADDRESS" in environ:
        return _from_variables(environ)
    if all(name in environ for name in _SLURM_STEP):
        return _from_slurm(environ)
    if any(name in environ for name in _LAUNCHERS) or _may_be_a_tpu_slice(environ):
        return {}
    return None


def _from_variables(environ: Mapping[str, str]) -> dict[str, Any]:
    address = environ["JAX_COORDINATOR_ADDRESS"]
    try:
        count, own = int(environ["JAX_NUM_PROCESSES"]), int(environ["JAX_PROCESS_ID"])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers too "
            f"({type(error).__name__}: {error})."
        ) from error
    if not 0 <= own < count:
        raise ConfigError(
            f"JAX_PROCESS_ID is {own}, but must be from 0 to JAX_NUM_PROCESSES - 1, which is {count - 1}."
        )
    if not address.rpartition(":")[2].isdecimal():
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS is {address!r}, but must be host:port.")
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": own,
        # Else a cluster around us would still decide which of the host's GPUs are this process's.
        "cluster_detection_method": "deactivate",
    }


def _from_slurm(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Corrects what jax assumes of Slurm: that each task drives the GPU whose number is the task's on its node.

    That leaves GPUs idle where a task has its node for itself, and fails where Slurm narrowed the task's view to its
    own GPU (github.com/jax-ml/jax/issues/16788 and 28194). A step of one task has nothing to connect.
    """
    # In the shell of an interactive step SLURM_NTASKS is the job's, and the shell is the only task of its step.
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"])
    if tasks == 1:
        return None
    has_the_node = tasks == _number(environ, "SLURM_STEP_NUM_NODES", "0")
    visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES", ""))
    sees_its_own = visible != "" and "," not in visible
    if "JAX_LOCAL_DEVICE_IDS" not in environ and (has_the_node or sees_its_own):
        return {"local_device_ids": []}  # Not None: no restriction at all.
    return {}


def _may_be_a_tpu_slice(environ: Mapping[str, str]) -> bool:
    """Whether it is worth asking jax, which on a machine without TPU chips answers at once and asks no server."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms) or any(name in environ for name in _NOTEBOOKS):
        return False
    if _number(environ, "MEGASCALE_NUM_SLICES", "1") > 1 or "TPU_PROCESS_ADDRESSES_PATH" in environ:
        return True
    workers = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if workers is not None:
        return "," in workers
    return "KUBERNETES_SERVICE_HOST" not in environ  # A lone pod: jax would look for the Job that it belongs to.


def _number(environ: Mapping[str, str], name: str, default: str) -> int:
    value = environ.get(name, default)
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r}, but must be a number.")
    return int(value)
