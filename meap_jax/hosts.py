"""Connects the processes of a run, from what their environment says about the cluster."""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax._src.lib import _jax  # type: ignore[attr-defined]  # Not in jax's stubs.

from meap_jax import __version__, peers, rollcall
from meap_jax.coordinator import Coordinator
from meap_jax.errors import ConfigError

_log = logging.getLogger(__name__)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Variables: how long hosts wait for one another at the start, and after how many seconds without a sign of life one
# counts as lost.
START_TIMEOUT = "MEAP_JAX_HOST_START_SECONDS"
TIMEOUT = "MEAP_JAX_HOST_TIMEOUT_SECONDS"
# Of jax, whose own answer to a missing host is an abort with a C++ stack: `peers` is there long before.
_JAX_HEARTBEAT = 120

# What srun sets in each process of a step; `jax.distributed` looks for the same five. A shell that was opened on the
# node some other way has some of them at most.
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# Set in each process by mpirun, and by an indexed Job of Kubernetes.
_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX")
# Notebook services: one host each, whatever the accelerator.
_NOTEBOOKS = ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")


def join_hosts() -> None:
    """Connects the processes of a run, if there are several; call it before anything touches a device.

    It waits until all are there (`rollcall`), which must run the same versions, and from then on watches them
    (`peers`).

    Raises:
      ConfigError: for variables that contradict each other, a cluster that gives no details, hosts that don't come
        or come too late, and hosts with other versions.
    """
    arguments = connection(os.environ)
    if arguments is None:
        return
    timeout = _seconds(os.environ, TIMEOUT, 30)  # A library may hold the interpreter's lock for some of them.
    try:
        place = _place(arguments, os.environ)
        if place is None:
            return
        if place.num_hosts == 1:
            jax.distributed.initialize(**place.arguments())
            return
        _connect(place, timeout)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the hosts of this run can't be connected: {error}") from error
    except (OSError, RuntimeError) as error:  # Of the TPU's metadata server, or of the cluster's name service.
        reason = " ".join(str(error).split("\n")[0].split())
        raise ConfigError(
            f"the hosts of this run can't be connected ({reason}): set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID, or TPU_SKIP_MDS_QUERY=1 if there is this one only."
        ) from error


class _Place(NamedTuple):
    """The place of this process among those of its run."""

    address: str  # host:port of the coordination service, on the host of process 0.
    num_hosts: int
    host: int
    local_device_ids: Sequence[int] | None

    def arguments(self) -> dict[str, Any]:
        """Of `jax.distributed.initialize`, which then asks no cluster."""
        return {
            "coordinator_address": self.address,
            "num_processes": self.num_hosts,
            "process_id": self.host,
            "local_device_ids": self.local_device_ids,
            "cluster_detection_method": "deactivate",
        }


def _place(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> _Place | None:
    """Lets jax find out what the arguments leave open; None if it knows no cluster here, such as without a TPU."""
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    given = [arguments.get(name) for name in names]
    if arguments.get("cluster_detection_method") != "deactivate":
        if environ.get("JAX_LOCAL_DEVICE_IDS") and given[3] is None:
            given[3] = [int(number) for number in environ["JAX_LOCAL_DEVICE_IDS"].split(",")]
        seconds = int(_seconds(environ, START_TIMEOUT, 300))
        given = list(ClusterEnv.auto_detect_unset_distributed_params(*given, None, seconds))  # type: ignore[call-arg, arg-type]
    address, count, index, local_device_ids = given
    if address is None:
        return None
    if count is None or index is None:
        raise ConfigError(
            "the number of processes, or of this one, is not known: set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID."
        )
    return _Place(address, count, index, local_device_ids)  # type: ignore[arg-type]


def _connect(place: _Place, timeout: float) -> None:
    """Waits for all hosts, connects jax, and begins to watch."""
    facts, seconds = versions() | {"JAX_NUM_PROCESSES": str(place.num_hosts)}, _seconds(os.environ, START_TIMEOUT, 300)
    arguments = place.arguments() | dict(
        initialization_timeout=int(seconds), heartbeat_timeout_seconds=_JAX_HEARTBEAT, shutdown_timeout_seconds=60
    )
    if place.host:
        connection_to_first = rollcall.answer(place.address, place.host, facts, seconds, _log.info)
        jax.distributed.initialize(**arguments)
        peers.begin(_client(), place.host, place.num_hosts, {0: connection_to_first}, timeout)
        return

    coordinator = Coordinator()
    try:
        bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or "[::]:" + place.address.rpartition(":")[2]
        connections = rollcall.call(bind, place.address, place.num_hosts, facts, seconds, _log.info)

        def serve(*service_arguments: Any, **options: Any) -> Coordinator:
            """Has the service begin in its own process, and the other hosts connect to it."""
            coordinator.serve(*service_arguments, **options)
            for host in connections.values():
                rollcall.send(host, go=True)
            return coordinator

        with _service_made_by(serve):
            jax.distributed.initialize(**arguments)
    except BaseException:
        coordinator.shutdown()
        raise
    coordinator.outlive(connections.values())
    peers.begin(_client(), 0, place.num_hosts, connections, timeout, coordinator)


@contextlib.contextmanager
def _service_made_by(serve: Callable[..., Any]) -> Iterator[None]:
    """While it is entered, `jax.distributed.initialize` gets its service from `serve`: jax has no option for that."""
    own = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = serve
    try:
        yield
    finally:
        _jax.get_distributed_runtime_service = own


def _client() -> Any:
    return distributed.global_state.client


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that decide a result, and of our own source, as its hash."""
    folder, digest = pathlib.Path(__file__).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(), **found, "meap_jax": __version__,
        "meap_jax_source": digest.hexdigest()[:12],
    }  # fmt: skip


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, str(default))
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not float(text):
        raise ConfigError(f"{name} is {text!r}, but must be a number of seconds above 0.")
    return float(text)


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
