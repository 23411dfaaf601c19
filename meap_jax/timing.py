"""Measures where the time of a run goes, and records traces of chosen steps for xprof."""

import contextlib
import os
import pathlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


class Clock:
    """Splits the wall time of one process into steps and everything else.

    Steps are dispatched before the ones before them are done, so that no step can be timed by itself. A step's time is
    instead what passes between the arrivals of two consecutive steps' metrics, less the time that was set aside for
    something else (`aside`): these times add up to the time spent on steps, whatever the bottleneck is.
    """

    def __init__(self, began: float | None = None, now: Callable[[], float] = time.perf_counter):
        """Starts the clock.

        Args:
          began: since when goodput counts, in seconds of `now`; default: now.
          now: a clock that never goes back.
        """
        self._now = now
        self._began = now() if began is None else began
        self._last_arrival = self._began
        self._set_aside = 0.0  # Since the last arrival.
        self._step_times: list[float] = []  # Since the last report.
        self._waited = 0.0  # Of them, for data.
        self._totals: dict[str, float] = defaultdict(float)  # Seconds since `began`, by what they went into.

    def start_steps(self) -> None:
        """The loop begins; what was before counts as "start"."""
        self._last_arrival = self._now()
        self._totals["start"] = self._last_arrival - self._began

    @contextlib.contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Sets the time of this block aside under `name`: it belongs to no step."""
        began = self._now()
        try:
            yield
        finally:
            seconds = self._now() - began
            self._set_aside += seconds
            self._totals[name] += seconds

    @contextlib.contextmanager
    def waiting_for_data(self, device_is_busy: Callable[[], bool]) -> Iterator[None]:
        """Of this block's time, which belongs to the step, counts as waiting what the device could not hide.

        While the device works on an earlier step, a wait costs nothing. Where it has nothing left to do at the end of
        the block, all of the block counts, though it may have run dry only on the way: an upper bound.
        """
        began = self._now()
        yield
        if not device_is_busy():
            self._waited += self._now() - began

    def arrived(self) -> None:
        """The metrics of the next step are here."""
        now = self._now()
        self._step_times.append(now - self._last_arrival - self._set_aside)
        self._last_arrival, self._set_aside = now, 0.0

    def report(self) -> dict[str, float]:
        """Numbers of the steps that arrived since the last report; {} if there were none.

        Returns:
          step_seconds: mean time of a step.
          step_seconds_p50, step_seconds_p90: percentiles.
          data_wait: share of the steps' time spent waiting for data, an upper bound.
          goodput: share of the wall time of this process, from its start, that went into steps, without their waits for
            data. Not in it: start-up with data preparation and restore, compilation, evaluations, stalls of saves,
            traces. Steps that an earlier process lost and this one repeats count as any others.
        """
        if not self._step_times:
            return {}
        seconds = sum(self._step_times)
        self._totals["steps"] += seconds - self._waited
        self._totals["data"] += self._waited
        p50, p90 = np.percentile(self._step_times, (50, 90))
        numbers = {
            "step_seconds": seconds / len(self._step_times),
            "step_seconds_p50": float(p50),
            "step_seconds_p90": float(p90),
            "data_wait": self._waited / max(seconds, 1e-9),
            "goodput": self._totals["steps"] / max(self._now() - self._began, 1e-9),
        }
        self._step_times, self._waited = [], 0.0
        return numbers

    def summary(self) -> str:
        """One line for people: where the seconds of this process went, longest first."""
        longest_first = sorted(self._totals.items(), key=lambda part: -part[1])
        parts = (f"{name} {seconds:.1f} s" for name, seconds in longest_first if seconds >= 0.05)
        return f"{self._now() - self._began:.1f} s: {', '.join(parts)}"


def process_began() -> float:
    """When this process was started, on the clock of `time.perf_counter`; by /proc, to 10 ms."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # The 22nd of all, `starttime` in proc(5).
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    except (OSError, ValueError, IndexError, AttributeError):  # No Linux: leave the interpreter's start out.
        age = 0.0
    return time.perf_counter() - max(age, 0.0)


class Trace:
    """A trace of steps `start` to `start + num_steps - 1`, for xprof or TensorBoard.

    The device is idle when it begins and when it ends, so that it holds whole steps and no others.
    """

    def __init__(self, folder: pathlib.Path, *, start: int, num_steps: int):
        """Traces nothing if `num_steps` is 0.

        Args:
          folder: local; the trace goes to plugins/profile/DATE in it, where xprof and TensorBoard look.
          start: first step, counted from 1.
          num_steps: how many.
        """
        self._folder = folder
        self._steps = range(start, start + num_steps)
        self._is_on = False

    def before(self, step: int, state: Any) -> None:
        """Begins, if `step` is the first of the trace; `state` is the one before it."""
        if self._steps and step == self._steps[0]:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = (
                0  # Every call of a Python function: slows the host, and shows nothing of the device.
            )
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._is_on = True

    def after(self, step: int, state: Any) -> None:
        """Ends, if `step` is the last of the trace; `state` is the one after it."""
        if self._is_on and step == self._steps[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a trace that the run did not get to the end of."""
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
