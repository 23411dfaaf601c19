"""The clock of a run: what it hides, what it counts, and since when."""

import subprocess
import sys

import pytest

from meap_jax.timing import Clock
from tiny_runs import ROOT


@pytest.fixture
def time():
    """Now, in a list that a test sets on."""
    return [0.0]


@pytest.fixture
def clock(time):
    """The clock of a loop that begins at 0."""
    clock = Clock(now=lambda: time[0])
    clock.start_steps()
    return clock


@pytest.mark.parametrize(("device_is_busy", "data_wait", "goodput"), [(True, 0.0, 1.0), (False, 0.5, 0.5)])
def test_a_wait_for_data_costs_nothing_while_the_device_is_busy(time, clock, device_is_busy, data_wait, goodput):
    with clock.waiting_for_data(lambda: device_is_busy):
        time[0] += 2.0
    time[0] += 2.0
    clock.arrived()
    report = clock.report()
    assert report["step_seconds"] == 4.0
    assert (report["data_wait"], report["goodput"]) == (data_wait, goodput)


def test_percentiles_are_of_the_steps_since_the_last_report(time, clock):
    for step_times in ([100.0], range(11)):
        for seconds in step_times:
            time[0] += seconds
            clock.arrived()
        report = clock.report()
    assert [report[name] for name in ("step_seconds", "step_seconds_p50", "step_seconds_p90")] == [5.0, 5.0, 9.0]
    assert clock.report() == {}


def test_time_set_aside_is_reported_even_if_what_took_it_failed(time, clock):
    with pytest.raises(OSError), clock.aside("saves"):
        time[0] += 3.0
        raise OSError
    time[0] += 1.0
    clock.arrived()
    assert clock.report()["goodput"] == 0.25
    assert clock.summary() == "4.0 s: saves 3.0 s, steps 1.0 s"


def test_a_process_began_before_its_first_line_ran():
    program = """
import time
first_line = time.perf_counter()
from meap_jax.timing import process_began
time.sleep(0.3)
print(first_line - process_began(), time.perf_counter() - process_began())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, check=True)
    before_first_line, age = map(float, done.stdout.split())
    assert -0.01 <= before_first_line < age - 0.3  # Ticks are of 10 ms.
