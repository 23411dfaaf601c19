"""Runs of 1, 2 and 4 processes, killed at every kind of moment, end bit for bit as if nothing had happened."""

import signal
import time

import numpy as np
import pytest

from configs import quickstart
from faults.campaigns import MOMENTS, Campaign, Fault
from faults.harness import EXIT_PREEMPTED, LONGEST_EXIT, POLL_SECONDS, Group, logged, saved, setting
from meap_jax.config import flatten
from tiny_runs import TINY

QUICK = {
    "SIGKILL": (1, [Fault("SIGKILL", "step"), Fault("SIGKILL", "save"), Fault("SIGKILL", "evaluation")]),
    "SIGTERM": (1, [Fault("SIGTERM", "step"), Fault("SIGTERM", "save"), Fault("SIGKILL", "data loading")]),
    "two": (2, [Fault("SIGTERM", "step", "one"), Fault("SIGKILL", "any")]),
}
PAUSES = ("SIGSTOP, SIGKILL", "SIGSTOP, SIGCONT")


def every_moment(signals, hosts="all", moments=tuple(MOMENTS)):
    return [Fault(signals, moment, hosts) for moment in moments]


FULL = {
    "SIGKILL-0": (1, every_moment("SIGKILL")),
    "SIGKILL-1": (1, every_moment("SIGKILL")),
    "SIGTERM-0": (1, every_moment("SIGTERM")),
    "SIGTERM-1": (1, every_moment("SIGTERM")),
    "pauses": (1, [Fault(signals, moment) for signals in PAUSES for moment in ("step", "save", "evaluation")]),
    "two-SIGKILL-all": (2, every_moment("SIGKILL")),
    "two-SIGKILL-one": (2, every_moment("SIGKILL", "one", ("start", "step", "save", "evaluation"))),
    "two-SIGTERM-all": (2, every_moment("SIGTERM", "all", ("step", "save", "evaluation", "any"))),
    "two-SIGTERM-one": (2, every_moment("SIGTERM", "one", ("step", "save", "evaluation"))),
    "two-pauses": (2, [Fault(signals, "step", "one") for signals in (*PAUSES, "SIGSTOP")]),
    "four-SIGKILL": (4, [Fault("SIGKILL", "save"), Fault("SIGKILL", "step", "one"), Fault("SIGKILL", "evaluation")]),
    "four-SIGTERM": (4, [Fault("SIGTERM", "step", "one"), Fault("SIGTERM", "save")]),
}


def check(name, num_processes, faults, workdir, reference_of, record):
    reference, seed = reference_of(num_processes), sum(map(ord, name))
    # Where the preparation of data is disturbed, the run has data of its own, and that comes first.
    own = any(fault.moment == "data preparation" for fault in faults)
    order = np.random.default_rng(seed).permutation(len(faults))
    faults = sorted((faults[i] for i in order), key=lambda fault: fault.moment != "data preparation")
    overrides = setting(workdir / "data" if own else reference.data)
    campaign = Campaign(workdir, reference.workdir, num_processes, seed, reference.start_seconds, overrides)
    try:
        campaign.run(faults)
    finally:
        record(*campaign.outcomes)


@pytest.mark.parametrize("name", QUICK)
def test_a_run_that_is_killed_ends_as_one_that_was_not(name, workdir, reference_of, record):
    check(name, *QUICK[name], workdir, reference_of, record)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_run_that_is_killed_many_times_ends_as_one_that_was_not(name, workdir, reference_of, record):
    check(name, *FULL[name], workdir, reference_of, record)


def test_the_quickstart_is_saved_within_20_seconds_of_a_notice(workdir, record):
    default = flatten(quickstart.get_config())
    overrides = {name.replace(".", "__"): default[name] for name in TINY}
    overrides |= dict(log__every=1, eval__every=1_000, checkpoint__every=1_000)
    overrides |= dict(data__retrieval__num_documents=200, data__retrieval__num_eval_documents=10)
    group = Group(workdir, **overrides)
    try:
        while logged(workdir) < 3:
            assert not group.is_over(), group.said()
            time.sleep(POLL_SECONDS)
        sent = time.monotonic()
        group.send(signal.SIGTERM, [0])
        assert group.wait(LONGEST_EXIT) == [EXIT_PREEMPTED], group.said()
    finally:
        group.kill()
    seconds = time.monotonic() - sent
    record(dict(kind="notice", fault="SIGTERM, the quickstart's model", survived=True, seconds=seconds))
    assert saved(workdir) == [logged(workdir)] and seconds < 20
