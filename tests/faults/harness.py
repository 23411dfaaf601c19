"""Starts real training runs, of one process or several on loopback, and reads what they left in their workdir."""

import json
import pathlib
import socket
import subprocess
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

import tiny_runs

STEPS, SAVE_EVERY, EVAL_EVERY = 160, 10, 20
EXIT_PREEMPTED, EXIT_USER_ERROR = 143, 1
# Seconds: until a moment comes, until a process ends after its signal, and until those end that lost one of theirs.
LONGEST_WAIT, LONGEST_EXIT, LONGEST_ORPHAN = 300.0, 60.0, 150.0
POLL_SECONDS = 0.001
TEMPORARY = ("*tmp*", "*.part", "*.deleted")  # Names that nothing has in a workdir when a run is over.


def setting(data: pathlib.Path, **overrides: Any) -> dict[str, Any]:
    """Overrides of a run whose steps depend on all that they may: ramps, draws for each row, roles without masks."""
    drawn = dict(objective__name="meap", objective__ramp_from=0.0, objective__ratio_per_row=True)
    drawn |= dict(objective__where="never:fact,answer", data__retrieval__num_eval_documents=16)
    sizes = dict(num_steps=STEPS, checkpoint__every=SAVE_EVERY, eval__every=EVAL_EVERY, data__prepared=data)
    return drawn | sizes | overrides


class Group:
    """The processes of one start of a run. What they write to stderr goes to files beside the workdir."""

    def __init__(
        self, workdir: pathlib.Path, num_processes: int = 1, *, prefix: tuple[str, ...] = (), logs: Any = None,
        seen: pathlib.Path | None = None, variables: dict[str, str] | None = None, **overrides: Any,
    ):  # fmt: skip
        """Starts them.

        Args:
          workdir: of the run, as they see it.
          num_processes: of one device each; 1 is a run without a coordinator.
          prefix: words before the command, as of `nsenter`.
          logs: folder of their stderr; default: that of the workdir.
          seen: the workdir as it is seen from here, if that is another path.
          variables: of the environment.
          overrides: fields of the config, `__` for a dot.
        """
        self.workdir, logs = seen or workdir, logs or workdir.parent
        of_all = dict(variables or {})
        if num_processes > 1:
            overrides = dict(mesh__data=1, mesh__fsdp=-1) | overrides
            with socket.create_server(("127.0.0.1", 0)) as probe:  # A port that is free.
                address = "{}:{}".format(*probe.getsockname())
            of_all |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num_processes)}
        self.found = max(saved(self.workdir), default=0)  # The checkpoint that it is to go on from.
        self.logs, self.processes = [], []
        for index in range(num_processes):
            own = {"JAX_PROCESS_ID": str(index)} if num_processes > 1 else {}
            self.logs.append(logs / f"{workdir.name}-{time.monotonic_ns()}-{index}.log")
            words = [*prefix, *tiny_runs.command(workdir, **overrides)]
            environment = tiny_runs.environment(**of_all, **own)
            with self.logs[-1].open("wb") as log:
                self.processes.append(subprocess.Popen(words, env=environment, cwd=tiny_runs.ROOT, stderr=log))

    def said(self) -> str:
        """What all of them wrote so far."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def is_over(self) -> bool:
        """Whether one of them has ended."""
        return any(process.poll() is not None for process in self.processes)

    def send(self, number: int, targets: Iterable[int]) -> None:
        """Sends a signal to those that still run."""
        for index in targets:
            self.processes[index].send_signal(number)

    def wait(self, seconds: float) -> list[int]:
        """Waits until all have ended; returns their exit codes (minus a signal's number, if that ended one).

        Raises:
          AssertionError: if one of them is still there after so long; all are killed then.
        """
        try:
            return self.wait_for(range(len(self.processes)), seconds)
        finally:
            self.kill()

    def wait_for(self, targets: Iterable[int], seconds: float) -> list[int]:
        """The same for some of them, none of which is killed."""
        end = time.monotonic() + seconds
        try:
            return [self.processes[i].wait(max(0.01, end - time.monotonic())) for i in targets]
        except subprocess.TimeoutExpired:
            states = [process.poll() for process in self.processes]
            raise AssertionError(f"not all ended within {seconds} s, but {states}:\n{self.said()[-6000:]}") from None

    def kill(self) -> None:
        """Ends what is left of them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


# ------------------------------------------------------------------------------------------------- what a workdir holds


def logged(workdir: pathlib.Path) -> int:
    """The step of the last whole record; 0 if there is none."""
    file = workdir / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def saved(workdir: pathlib.Path) -> list[int]:
    """Steps whose checkpoints are complete."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def is_saving(workdir: pathlib.Path) -> bool:
    """Whether orbax's temporary folder is there."""
    return any((workdir / "checkpoints").glob("*tmp*"))


def results(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records without what no two runs share: losses, norms, evaluations."""
    return [{k: v for k, v in record.items() if k not in tiny_runs.TIMES} for record in tiny_runs.records(workdir)]


def parameters(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    """The bytes of all parameters in a checkpoint, by name, whatever devices they were saved from."""
    import orbax.checkpoint as ocp
    from flax import traverse_util

    folder = workdir / "checkpoints" / str(step) / "params"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(folder).item_metadata.tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in traverse_util.flatten_dict(tree)}
        read = reader.restore(folder, ocp.args.PyTreeRestore(restore_args=traverse_util.unflatten_dict(as_numpy)))
    return {".".join(name): array.tobytes() for name, array in traverse_util.flatten_dict(read).items()}


def num_wrong(workdir: pathlib.Path, reference: pathlib.Path) -> int:
    """How many records and parameters differ from the reference's: lacking, more, or another bit."""
    ours, theirs = results(workdir), results(reference)
    wrong = sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))
    ours, theirs = (parameters(folder, STEPS) for folder in (workdir, reference))
    return wrong + sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys())


def leftovers(workdir: pathlib.Path) -> list[str]:
    """Temporary files and folders."""
    found = (path for pattern in TEMPORARY for path in workdir.rglob(pattern))
    return sorted(str(path.relative_to(workdir)) for path in found)
