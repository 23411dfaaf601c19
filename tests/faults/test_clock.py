"""A clock that jumps, in a run or between two, changes nothing."""

import os
import signal
import time

import pytest

from faults import harness
from tiny_runs import ROOT

YEAR = 365 * 24 * 3600.0
# Python imports this at its start, from a folder on PYTHONPATH. The monotonic clock stays as it is, as under Linux.
SHIFTED = """
import os, time
_time, _ns, _began = time.time, time.time_ns, time.monotonic()
_shift, _after, _jump = (float(os.environ["CLOCK"].split(",")[i]) for i in range(3))
def _off(): return _shift + (_jump if time.monotonic() - _began > _after else 0.0)
time.time = lambda: _time() + _off()
time.time_ns = lambda: _ns() + int(_off() * 1e9)
"""


def start(workdir, reference, shift=0.0, after=0.0, jump=0.0):
    """Starts the run with a clock that is `shift` seconds off, and `jump` more from `after` seconds on."""
    folder = workdir.parent / "clock"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SHIFTED)
    variables = {"PYTHONPATH": f"{folder}:{ROOT}", "CLOCK": f"{shift},{after},{jump}"}
    return harness.Group(workdir, variables=variables, **harness.setting(reference.data))


def kill_at(step, group):
    while harness.logged(group.workdir) < step:
        assert not group.is_over(), group.said()[-4000:]
        time.sleep(harness.POLL_SECONDS)
    group.send(signal.SIGKILL, [0])
    group.wait(10)


def touch(workdir, seconds):
    """Dates all files so many seconds from now."""
    when = time.time() + seconds
    for path in workdir.rglob("*"):
        os.utime(path, (when, when))


@pytest.mark.slow
@pytest.mark.parametrize("direction", [1, -1], ids=["forward", "back"])
def test_a_clock_that_jumps_changes_nothing(direction, workdir, reference_of, record):
    reference = reference_of()
    outcome = dict(kind="clock", direction="forward" if direction > 0 else "back", survived=False)
    try:
        # An hour in a run, then a year between two, whose files are dated the other way.
        kill_at(57, start(workdir, reference, after=reference.start_seconds, jump=3600.0 * direction))
        touch(workdir, -YEAR * direction)
        kill_at(103, start(workdir, reference, shift=YEAR * direction))
        touch(workdir, YEAR * direction)
        group = start(workdir, reference, shift=-YEAR * direction, after=reference.start_seconds, jump=-7200.0)
        assert group.wait(harness.LONGEST_WAIT) == [0], group.said()[-4000:]
        assert "Traceback" not in group.said()
        outcome["wrong"] = harness.num_wrong(workdir, reference.workdir)
        assert (outcome["wrong"], harness.leftovers(workdir)) == (0, [])
        outcome["survived"] = True
    finally:
        record(outcome)
