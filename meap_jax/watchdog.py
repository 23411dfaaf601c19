"""Ends a run that hangs, after it has written where each of its threads stands.

A collective that waits for a host which is gone, a disk that answers no more or a deadlock in a library would keep an
accelerator busy with nothing until a person looks.
"""

import collections
import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator

from meap_jax.errors import EXIT_HUNG

STEPS_OF_MEDIAN = 101
_SECONDS_TO_WRITE = 5.0  # The stacks, also by the other hosts.
_SECONDS_OF_A_STALL = 5.0


class Watchdog:
    """Watches over the steps of a loop from a thread of its own."""

    def __init__(
        self,
        *,
        times_median: float,
        least_seconds: float,
        other_seconds: float,
        write_stacks: Callable[[], None] = faulthandler.dump_traceback,
        stop: Callable[[str, int], None] = lambda reason, code: None,
        now: Callable[[], float] = time.monotonic,
    ):
        """Starts the thread; `close` ends it.

        Args:
          times_median: a step hangs if it takes so many times the median of the last ones, ...
          least_seconds: ... and more than this. 0: nothing is watched.
          other_seconds: compilation, an evaluation or a save hangs if it takes longer.
          write_stacks: writes the stacks of all threads, of all hosts.
          stop: ends the other hosts, with a reason and an exit code.
          now: a clock in seconds.
        """
        self._times_median, self._least, self._other = times_median, least_seconds, other_seconds
        self._write_stacks, self._stop, self._now = write_stacks, stop, now
        self._times: collections.deque[float] = collections.deque(maxlen=STEPS_OF_MEDIAN)
        self._what, self._began, self._limit = "the start", now(), other_seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if least_seconds:
            self._thread.start()

    def step(self, step: int) -> None:
        """A step begins; what was before it, if it was a step too, is over."""
        now = self._now()
        if self._what.startswith("step "):
            self._times.append(now - self._began)
        self._begin(f"step {step}", self.step_limit())

    def step_limit(self) -> float:
        """Seconds that a step may take; the first ones, which compile, as long as anything else."""
        if len(self._times) < 3:
            return self._other
        return max(self._least, self._times_median * statistics.median(self._times))

    @contextlib.contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """In this block something else than a step is watched, such as an evaluation."""
        self._begin(what, self._other)
        try:
            yield
        finally:
            self._begin(f"what comes after {what}", self._other)

    def close(self) -> None:
        """Watches no longer."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _begin(self, what: str, limit: float) -> None:
        self._what, self._limit, self._began = what, limit, self._now()

    def _watch(self) -> None:
        interval = min(1.0, self._least / 4)
        before = self._now()
        while not self._closed.wait(interval):
            now = self._now()
            if now - before > interval + _SECONDS_OF_A_STALL:  # All of this process stood still, as in SIGSTOP.
                self._began += now - before
            before = now
            what, limit, seconds = self._what, self._limit, now - self._began
            if seconds > limit:
                self._end(self._sentence(what, limit, seconds))
                return

    def _sentence(self, what: str, limit: float, seconds: float) -> str:
        median = f", and the median step {statistics.median(self._times):.3g} s" if self._times else ""
        return (
            f"{what} hangs: it takes {seconds:.0f} s so far, where {limit:.0f} s are allowed{median}. The stacks of "
            "all threads are in the log; the last checkpoint is kept, and the same command goes on from it."
        )

    def _end(self, sentence: str) -> None:
        """Writes stacks and ends the process, without clean-ups: they could wait for what hangs."""
        writing = threading.Thread(target=self._write_stacks, daemon=True)  # As could a file.
        writing.start()
        writing.join(_SECONDS_TO_WRITE)
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        self._stop(sentence, EXIT_HUNG)
        os._exit(EXIT_HUNG)
