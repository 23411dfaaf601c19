"""The same command started twice in one workdir: one run goes on undisturbed, the other ends in a sentence."""

import signal
import time

import pytest

from faults import harness


def start(workdir, reference, num_processes=1):
    return harness.Group(workdir, num_processes, **harness.setting(reference.data))


def wait_until(step, group):
    while harness.logged(group.workdir) < step:
        assert not group.is_over(), group.said()[-4000:]
        time.sleep(harness.POLL_SECONDS)


def assert_told(group, workdir):
    codes, said = group.wait(harness.LONGEST_EXIT), group.said()
    assert set(codes) == {harness.EXIT_USER_ERROR} and "Traceback" not in said, (codes, said[-4000:])
    assert f"error: {workdir} is in use" in said and "since" in said, said[-4000:]


def check(workdir, reference_of, record, num_processes):
    reference = reference_of(num_processes)
    outcome = dict(kind="second start", fault=f"into a run of {num_processes}", survived=False)
    first = start(workdir, reference, num_processes)
    try:
        wait_until(15, first)
        began = time.monotonic()
        assert_told(start(workdir, reference, num_processes), workdir)
        outcome["seconds"] = time.monotonic() - began
        wait_until(35, first)
        # What a killed process leaves behind stands in nobody's way.
        first.send(signal.SIGKILL, range(num_processes))
        first.wait(10)
        again = start(workdir, reference, num_processes)
        assert again.wait(harness.LONGEST_WAIT) == [0] * num_processes, again.said()[-4000:]
        outcome["wrong"] = harness.num_wrong(workdir, reference.workdir)
        assert (outcome["wrong"], harness.leftovers(workdir)) == (0, [])
        outcome["survived"] = True
    finally:
        first.kill()
        record(outcome)


def test_a_second_start_is_told_and_the_first_goes_on(workdir, reference_of, record):
    check(workdir, reference_of, record, 1)


@pytest.mark.slow
def test_all_processes_of_a_second_start_are_told(workdir, reference_of, record):
    check(workdir, reference_of, record, 2)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_of_two_starts_at_once_one_trains(attempt, workdir, reference_of, record):
    reference = reference_of()
    outcome = dict(kind="second start", fault="at the same time", survived=False)
    both = [start(workdir, reference) for _ in range(2)]
    try:
        codes = sorted(group.wait(harness.LONGEST_WAIT)[0] for group in both)
        said = "\n".join(group.said() for group in both)
        assert codes == [0, harness.EXIT_USER_ERROR] and "Traceback" not in said, (codes, said[-6000:])
        assert said.count("error: ") == 1 and f"error: {workdir} is in use" in said
        outcome["wrong"] = harness.num_wrong(workdir, reference.workdir)
        assert (outcome["wrong"], harness.leftovers(workdir)) == (0, [])
        outcome["survived"] = True
    finally:
        for group in both:
            group.kill()
        record(outcome)
