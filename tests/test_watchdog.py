"""The watchdog: what hangs is told by the median, stacks are written, the process ends with its own code."""

import subprocess
import sys
import time

import pytest

from meap_jax.errors import EXIT_HUNG
from meap_jax.watchdog import Watchdog
from tiny_runs import environment


@pytest.fixture
def said(monkeypatch):
    """The sentences with which a watchdog would have ended this process."""
    sentences = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, sentence: sentences.append(sentence))
    return sentences


def watching():
    return Watchdog(times_median=5.0, least_seconds=0.2, other_seconds=60.0)


def test_a_step_may_take_so_many_times_the_median_but_never_less_than_the_least():
    clock = [0.0]
    watchdog = Watchdog(times_median=5.0, least_seconds=0.0, other_seconds=60.0, now=lambda: clock[0])
    for step in range(1, 12):
        watchdog.step(step)
        assert watchdog.step_limit() == (60.0 if step < 4 else 10.0)  # Seconds, of steps of two.
        clock[0] += 2.0
    with watchdog.aside("an evaluation"):
        clock[0] += 50.0
    watchdog.step(12)
    assert watchdog.step_limit() == 10.0  # The evaluation was no step.


def test_a_step_that_hangs_is_named_with_its_limit_and_the_median(said):
    watchdog = watching()
    for step in range(1, 8):
        watchdog.step(step)
        time.sleep(0.02)
    deadline = time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        time.sleep(0.05)
    watchdog.close()
    assert said[0].startswith("step 7 hangs: it takes") and "and the median step 0.0" in said[0]


def test_steps_and_long_evaluations_are_left_alone(said):
    watchdog = watching()
    for step in range(1, 15):
        watchdog.step(step)
        time.sleep(0.05)
        if step == 7:
            with watchdog.aside("the evaluation of step 7"):
                time.sleep(1.0)
    watchdog.close()
    assert said == []


HANGS = """
import sys, threading, time
from meap_jax.watchdog import Watchdog

def stuck_in_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

watchdog = Watchdog(times_median=5.0, least_seconds=0.3, other_seconds=1.0)
if sys.argv[1] == "step":
    for step in range(1, 6):
        watchdog.step(step)
        time.sleep(0.05)
    stuck_in_a_lock()
with watchdog.aside("the save of step 5"):
    stuck_in_a_lock()
"""


def test_a_process_that_hangs_writes_the_stacks_of_all_threads_and_ends_with_its_own_code():
    for what, name in (("step", "step 5"), ("save", "the save of step 5")):
        words = [sys.executable, "-c", HANGS, what]
        ended = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60)
        assert ended.returncode == EXIT_HUNG == 142, ended.stderr
        assert "in stuck_in_a_lock" in ended.stderr and ended.stderr.count("Thread 0x") >= 1
        assert ended.stderr.splitlines()[-1].startswith(f"error: {name} hangs: it takes")
