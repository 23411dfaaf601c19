"""Undisturbed runs to compare with, one for each number of processes, and where outcomes are written."""

import fcntl
import json
import os
import pathlib
import shutil
import tempfile
import time
from typing import NamedTuple

import pytest

from faults import harness
from tiny_runs import ROOT

OUTCOMES = pathlib.Path(os.environ.get("MEAP_JAX_OUTCOMES", ROOT / "runs" / "faults" / "outcomes.jsonl"))


class Reference(NamedTuple):
    """A run that nothing disturbs."""

    workdir: pathlib.Path
    data: pathlib.Path
    start_seconds: float  # From the start to the first record, with the programs of the cache.


@pytest.fixture(scope="session")
def reference_of(tmp_path_factory):
    """A function: number of processes -> Reference; each is run once, and shares its data with the others."""
    folder, known = tmp_path_factory.mktemp("reference"), {}

    def get(num_processes: int = 1) -> Reference:
        if num_processes not in known:
            data, workdir = folder / "data", folder / f"of-{num_processes}"
            began = time.monotonic()
            group = harness.Group(workdir, num_processes, **harness.setting(data))
            while not harness.logged(workdir) and not group.is_over():
                time.sleep(0.01)
            seconds = time.monotonic() - began
            assert group.wait(harness.LONGEST_WAIT) == [0] * num_processes, group.said()
            known[num_processes] = Reference(workdir, data, seconds)
        return known[num_processes]

    return get


@pytest.fixture
def record():
    """A function that appends outcomes, dicts, to the file that `report` reads."""

    def append(*outcomes: dict) -> None:
        OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
        with OUTCOMES.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # Workers of pytest share it.
            file.writelines(json.dumps(outcome) + "\n" for outcome in outcomes)

    return append


@pytest.fixture
def workdir():
    """A workdir that does not exist yet."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    yield folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
