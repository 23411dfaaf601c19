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
    """A function: number of processes -> Reference; each is run once, by one of pytest's workers, on the same data."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "references"
    folder.mkdir(exist_ok=True)

    def get(num_processes: int = 1) -> Reference:
        data, workdir = folder / "data", folder / f"of-{num_processes}"
        seconds = folder / f"of-{num_processes}.seconds"  # Written when the run is over.
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not seconds.exists():
                # The first start compiles what all others take from the cache.
                for attempt in (workdir.with_name(f"{workdir.name}-first"), workdir):
                    began = time.monotonic()
                    group = harness.Group(attempt, num_processes, **harness.setting(data))
                    while not harness.logged(attempt) and not group.is_over():
                        time.sleep(0.01)
                    until_first_step = time.monotonic() - began
                    if attempt != workdir:
                        group.kill()
                assert group.wait(harness.LONGEST_WAIT) == [0] * num_processes, group.said()
                seconds.write_text(str(until_first_step))
        return Reference(workdir, data, float(seconds.read_text()))

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
