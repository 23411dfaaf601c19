"""Disturbs real training runs at chosen moments, starts them again, and compares them with one that nothing disturbed.

A campaign is one run in one workdir, of one process or several on loopback. Each of its faults waits for a moment
(`MOMENTS`), sends signals (`SIGNALS`) to one process or to all, and starts the run again when it has ended. In the end
the records must be those of the reference, bit for bit, each step once; so must the parameters of the last checkpoint.
"""

import dataclasses
import json
import pathlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import tiny_runs

STEPS, SAVE_EVERY, EVAL_EVERY = 200, 10, 20
EXIT_PREEMPTED, EXIT_USER_ERROR = 143, 1
# Seconds: until a moment comes, until a process ends after its signal, and until those end that lost one of theirs.
LONGEST_WAIT, LONGEST_EXIT, LONGEST_ORPHAN = 300.0, 60.0, 150.0
POLL_SECONDS = 0.001
TEMPORARY = ("*tmp*", "*.new")  # Names that nothing has in a workdir when a run is over.


def setting(data: pathlib.Path, **overrides: Any) -> dict[str, Any]:
    """Overrides of a run whose steps depend on all that they may: ramps, draws for each row, roles without masks."""
    drawn = dict(objective__name="mir", objective__ramp_from=0.0, objective__ratio_per_row=True)
    drawn |= dict(objective__where="never:fact,answer", data__retrieval__num_eval_documents=32)
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

    def send(self, number: int, targets: list[int]) -> None:
        """Sends a signal to those that still run."""
        for index in targets:
            self.processes[index].send_signal(number)

    def wait(self, seconds: float) -> list[int]:
        """Waits until all have ended; returns their exit codes (minus a signal's number, if that ended one).

        Raises:
          AssertionError: if one of them is still there after so long; all are killed then.
        """
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.01, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            states = [process.poll() for process in self.processes]
            raise AssertionError(f"not all ended within {seconds} s, but {states}:\n{self.said()[-6000:]}") from None
        finally:
            self.kill()

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


# --------------------------------------------------------------------------------------------------- moments and faults


class Moment(NamedTuple):
    """When a signal is sent: `delay` seconds after `has_come` holds for the first time."""

    has_come: Callable[[], bool]
    delay: float = 0.0


def _at_a_step(group: Group, rng: np.random.Generator, start_seconds: float) -> Moment:
    first = logged(group.workdir) + int(rng.integers(2, 18))
    return Moment(lambda: logged(group.workdir) >= first, rng.uniform(0, 0.02))


def _in_a_save(group: Group, rng: np.random.Generator, start_seconds: float) -> Moment:
    # Of this start: what an earlier one left unfinished is removed before the first step.
    first = logged(group.workdir)
    has_gone_on = lambda: logged(group.workdir) != first or "compil" in group.said()  # noqa: E731
    return Moment(lambda: has_gone_on() and is_saving(group.workdir), rng.uniform(0, 0.01))


def _in_an_evaluation(group: Group, rng: np.random.Generator, start_seconds: float) -> Moment:
    # A step's record is written after its evaluation, and that of the step before while it is dispatched.
    before = logged(group.workdir)
    last = (before // EVAL_EVERY + 1) * EVAL_EVERY - 1 + (EVAL_EVERY if before % EVAL_EVERY == EVAL_EVERY - 1 else 0)
    return Moment(lambda: logged(group.workdir) >= last, rng.uniform(0, 0.03))


def _while_data_are_prepared(group: Group, rng: np.random.Generator, start_seconds: float) -> Moment:
    return Moment(lambda: any(group.workdir.glob("data*")), rng.uniform(0, 0.5))


def _while_data_are_loaded(group: Group, rng: np.random.Generator, start_seconds: float) -> Moment:
    return Moment(lambda: "fingerprint" in group.said(), rng.uniform(0, 0.5))


def _at_start(group: Group, rng: np.random.Generator, start_seconds: float) -> Moment:
    return Moment(lambda: True, rng.uniform(0, start_seconds))


def _at_random(group: Group, rng: np.random.Generator, start_seconds: float) -> Moment:
    return Moment(lambda: True, rng.uniform(0, 1.4 * start_seconds))


MOMENTS: dict[str, Callable[[Group, np.random.Generator, float], Moment]] = {
    "start": _at_start,
    "data preparation": _while_data_are_prepared,
    "data loading": _while_data_are_loaded,
    "step": _at_a_step,
    "save": _in_a_save,
    "evaluation": _in_an_evaluation,
    "any": _at_random,
}


class Fault(NamedTuple):
    """One disturbance."""

    signals: str  # Of SIGNALS.
    moment: str  # Of MOMENTS.
    hosts: str = "all"  # Or "one", drawn.


SIGNALS = {
    "SIGKILL": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGSTOP, SIGKILL": (signal.SIGSTOP, signal.SIGKILL),
    "SIGSTOP, SIGCONT": (signal.SIGSTOP, signal.SIGCONT),
}


@dataclasses.dataclass
class Campaign:
    """One run that is disturbed again and again, and what came of it.

    Attributes:
      outcomes: of each fault, as they go into the table of figures.
    """

    workdir: pathlib.Path
    reference: pathlib.Path
    num_processes: int
    seed: int
    start_seconds: float  # From the start of a process to its first record, about.
    overrides: dict[str, Any]
    outcomes: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def run(self, faults: list[Fault]) -> None:
        """Lets the faults come one after the other, then the run end; checks each, and the whole in the end."""
        rng = np.random.default_rng(self.seed)
        group = None
        try:
            for fault in faults:
                group = group or self._start()
                group = self._disturb(group, fault, rng)
            group = group or self._start()
            assert group.wait(LONGEST_WAIT) == [0] * self.num_processes, group.said()[-6000:]
            self._check_resumed(group)
        finally:
            if group is not None:
                group.kill()
        wrong = num_wrong(self.workdir, self.reference)
        for outcome in self.outcomes:
            outcome["wrong"] = wrong
        assert wrong == 0, f"{wrong} records or parameters differ from those of the run that nothing disturbed"
        assert leftovers(self.workdir) == []
        assert not (self.workdir / "damaged_checkpoints").exists()

    def _start(self) -> Group:
        return Group(self.workdir, self.num_processes, **self.overrides)

    def _disturb(self, group: Group, fault: Fault, rng: np.random.Generator) -> Group | None:
        """Sends the signals at their moment; returns the group if it goes on."""
        moment = MOMENTS[fault.moment](group, rng, self.start_seconds)
        end = time.monotonic() + LONGEST_WAIT
        while not moment.has_come():
            assert not group.is_over(), f"the run was over before {fault}:\n{group.said()[-6000:]}"
            assert time.monotonic() < end, f"{fault} did not come:\n{group.said()[-6000:]}"
            time.sleep(POLL_SECONDS)
        time.sleep(moment.delay)
        targets = list(range(self.num_processes))
        if fault.hosts == "one":
            targets = [int(rng.choice(targets))]
        numbers, sent = SIGNALS[fault.signals], time.monotonic()
        for number in numbers:
            if number != numbers[0]:
                time.sleep(rng.uniform(0.5, 3))
            group.send(number, targets)
        outcome = dict(kind="kill", **fault._asdict(), processes=self.num_processes, seed=self.seed)
        self.outcomes.append(outcome)
        if numbers[-1] == signal.SIGCONT:
            return group

        everybody = len(targets) == self.num_processes or fault.signals == "SIGTERM"
        codes = group.wait(LONGEST_EXIT if everybody else LONGEST_ORPHAN)
        outcome |= dict(seconds=time.monotonic() - sent, exit_codes=codes, targets=targets)
        newest = max(saved(self.workdir), default=0)
        outcome["lost"] = max(0, logged(self.workdir) - newest)
        if fault.signals == "SIGTERM":
            assert outcome["lost"] == 0, f"saved {newest}, but did {logged(self.workdir)} steps:\n{group.said()[-6000:]}"
        self._check_resumed(group)
        self._check_codes(group, fault, targets, codes)
        return None

    def _check_codes(self, group: Group, fault: Fault, targets: list[int], codes: list[int]) -> None:
        """Whether all processes ended as they are to."""
        said = group.said()
        if fault.signals != "SIGTERM":
            assert all(codes[i] == -signal.SIGKILL for i in targets), codes
            assert 0 not in codes, f"a run that lost a process says that it went well: {codes}"
            return
        # Before it can save anything, a process may die of the signal itself; launchers see the same 143.
        early = "step" not in said
        assert all(code == EXIT_PREEMPTED or (early and code == -signal.SIGTERM) for code in codes), (codes, said[-6000:])
        assert "Traceback" not in said, said[-6000:]

    def _check_resumed(self, group: Group) -> None:
        """Whether this start went on from the newest complete checkpoint, if it came so far; counts the steps lost."""
        resumed = {int(step) for step in re.findall(r"resuming from step (\d+)", group.said())}
        if resumed or "step " in group.said():
            assert (resumed or {0}) == {group.found}, f"found the checkpoint of {group.found}, resumed from {resumed}"
