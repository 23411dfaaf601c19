"""Disturbs real training runs at chosen moments, starts them again, and compares them with one that nothing disturbed.

A campaign is one run in one workdir, of one process or several on loopback. Each of its faults waits for a moment
(`MOMENTS`), sends signals (`SIGNALS`) to one process or to all, and starts the run again when it has ended. In the end
the records must be those of the reference, bit for bit, each step once; so must the parameters of the last checkpoint.
"""

import dataclasses
import pathlib
import re
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from faults.harness import (
    EVAL_EVERY,
    EXIT_PREEMPTED,
    LONGEST_EXIT,
    LONGEST_ORPHAN,
    LONGEST_WAIT,
    POLL_SECONDS,
    STEPS,
    Group,
    is_saving,
    leftovers,
    logged,
    num_wrong,
    saved,
)


class Moment(NamedTuple):
    """When a signal is sent: `delay` seconds after `has_come` holds for the first time."""

    has_come: Callable[[], bool]
    delay: float = 0.0


def _at_a_step(group: Group, rng: np.random.Generator, start_seconds: float) -> Moment:
    first = logged(group.workdir) + int(rng.integers(2, 13))
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
    return _after(group, rng.uniform(0, start_seconds))


def _at_random(group: Group, rng: np.random.Generator, start_seconds: float) -> Moment:
    return _after(group, start_seconds * rng.uniform(0.5, 1.1))


def _after(group: Group, seconds: float) -> Moment:
    """So long after the start, but before the run is over: a start may take less time than that of the reference."""
    end, last = time.monotonic() + seconds, STEPS - EVAL_EVERY
    return Moment(lambda: time.monotonic() >= end or logged(group.workdir) >= last)


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
    "SIGSTOP": (signal.SIGSTOP,),  # For good, of one of several; it is killed when the others have ended.
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
        # One that is killed before it has met the others is waited for, but not longer than this test waits.
        variables = {"MEAP_JAX_HOST_START_SECONDS": "60"}
        return Group(self.workdir, self.num_processes, variables=variables, **self.overrides)

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
        if fault.signals == "SIGSTOP":
            group.wait_for(sorted({*range(self.num_processes)} - {*targets}), LONGEST_ORPHAN)
            group.send(signal.SIGKILL, targets)
        codes = group.wait(LONGEST_EXIT if everybody else LONGEST_ORPHAN)
        outcome |= dict(seconds=time.monotonic() - sent, exit_codes=codes, targets=targets)
        newest = max(saved(self.workdir), default=0)
        outcome["lost"] = max(0, logged(self.workdir) - newest)
        if fault.signals == "SIGTERM":
            assert outcome["lost"] == 0, (
                f"saved {newest}, but did {logged(self.workdir)} steps:\n{group.said()[-6000:]}"
            )
        self._check_resumed(group)
        self._check_codes(group, fault, targets, codes)
        return None

    def _check_codes(self, group: Group, fault: Fault, targets: list[int], codes: list[int]) -> None:
        """Whether all processes ended as they are to."""
        said = group.said()
        if fault.signals != "SIGTERM":
            assert all(codes[i] == -signal.SIGKILL for i in targets), codes
            others = [code for i, code in enumerate(codes) if i not in targets]
            if "step " in said:
                assert all(code == EXIT_PREEMPTED for code in others) and "Traceback" not in said, (codes, said[-6000:])
            assert 0 not in codes, f"a run that lost a process says that it went well: {codes}"
            return
        # Before it can save anything, a process may die of the signal itself; launchers see the same 143.
        early = "step" not in said
        assert all(code == EXIT_PREEMPTED or (early and code == -signal.SIGTERM) for code in codes), (
            codes,
            said[-6000:],
        )
        assert "Traceback" not in said, said[-6000:]

    def _check_resumed(self, group: Group) -> None:
        """Whether this start went on from the newest complete checkpoint, if it came so far; counts the steps lost."""
        resumed = {int(step) for step in re.findall(r"resuming from step (\d+)", group.said())}
        if resumed or "step " in group.said():
            assert (resumed or {0}) == {group.found}, f"found the checkpoint of {group.found}, resumed from {resumed}"
