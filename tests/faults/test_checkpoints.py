"""Whatever happens to the files of a checkpoint, a run never goes on from a state that nobody saved."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import tiny_runs
from faults import harness, restorer

NEWEST, OLDER = harness.STEPS, harness.STEPS - harness.SAVE_EVERY


@pytest.fixture
def finished(workdir, reference_of):
    """A copy of a run that is over, with its two checkpoints."""
    reference = reference_of()
    shutil.copytree(reference.workdir, workdir)
    assert harness.saved(workdir) == [OLDER, NEWEST]
    return reference


def restore_damaged(finished, workdir, damages, record):
    """Lets `restorer` do each of the damages (how, file, seed); returns what came of them, a dict each."""
    task = json.dumps([dict(how=how, file=file, seed=seed) for how, file, seed in damages])
    words = tiny_runs.flags(workdir, **harness.setting(finished.data))
    program = tiny_runs.ROOT / "tests" / "faults" / "restorer.py"
    pipes = dict(capture_output=True, text=True, timeout=1_200)
    found = subprocess.run([sys.executable, str(program), task, *words], env=tiny_runs.environment(), **pipes)
    assert found.returncode == 0, found.stderr[-4000:]
    outcomes = [json.loads(line) for line in found.stdout.splitlines()]
    record(*(dict(kind="checkpoint", **outcome) for outcome in outcomes))
    return outcomes


def bad(outcomes):
    return [outcome for outcome in outcomes if outcome["outcome"] in ("wrong", "traceback")]


def test_a_flipped_bit_of_a_checkpoint_is_found_or_does_not_matter(finished, workdir, record):
    outcomes = restore_damaged(finished, workdir, [("flip", None, seed) for seed in range(12)], record)
    assert len(outcomes) == 12 and bad(outcomes) == []
    assert any(outcome["outcome"] == "older" for outcome in outcomes)


@pytest.mark.slow
def test_flipped_bits_of_every_file_of_a_checkpoint_are_found_or_do_not_matter(finished, workdir, record):
    damages = [("flip", "every", seed) for seed in range(100, 103)] + [("flip", None, seed) for seed in range(40)]
    outcomes = restore_damaged(finished, workdir, damages, record)
    assert len(outcomes) >= 80 and bad(outcomes) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncate", "delete", "zero", "swap"])
def test_a_damaged_file_of_a_checkpoint_is_found_or_does_not_matter(how, finished, workdir, record):
    outcomes = restore_damaged(finished, workdir, [(how, "every", 0)], record)
    assert len(outcomes) >= 5 and bad(outcomes) == []


def go_on(finished, workdir, record, how):
    """Starts the run again, which ends bit for bit as it did."""
    outcome = dict(kind="checkpoint", how=how, file="of a real run", outcome="traceback", said="")
    try:
        group = harness.Group(workdir, **harness.setting(finished.data))
        assert group.wait(harness.LONGEST_WAIT) == [0] and "Traceback" not in group.said(), group.said()[-4000:]
        wrong = harness.num_wrong(workdir, finished.workdir)
        outcome["outcome"] = "wrong" if wrong else "older"
    finally:
        record(outcome)
    assert wrong == 0
    return group.said()


def test_a_run_whose_newest_checkpoint_has_a_flipped_bit_takes_the_one_before(finished, workdir, record):
    # Orbax compresses no array that is as random as this one, and a bit in its middle is a bit of a number.
    folder = workdir / "checkpoints" / str(NEWEST) / "params" / "ocdbt.process_0" / "d"
    largest = max(folder.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    said = go_on(finished, workdir, record, "flip")
    assert f"checkpoints/{NEWEST} is damaged" in said and f"resuming from step {OLDER}" in said
    assert (workdir / "damaged_checkpoints" / str(NEWEST)).exists()


@pytest.mark.slow
def test_a_checkpoint_under_the_name_of_another_step_is_not_taken_for_that_step(finished, workdir, record):
    folder = workdir / "checkpoints"
    shutil.rmtree(folder / str(NEWEST))
    shutil.copytree(folder / str(OLDER), folder / str(NEWEST))
    go_on(finished, workdir, record, "rename")


@pytest.mark.slow
def test_a_run_all_of_whose_checkpoints_are_damaged_stops_in_a_sentence(finished, workdir, record):
    for step in (OLDER, NEWEST):
        for file in (workdir / "checkpoints" / str(step) / "params").rglob("*"):
            if file.is_file():
                restorer.truncate(file, None, np.random.default_rng(0))
    before = sorted((workdir / "checkpoints").rglob("*"))
    group = harness.Group(workdir, **harness.setting(finished.data))
    codes, said = group.wait(harness.LONGEST_WAIT), group.said()
    is_told = codes == [harness.EXIT_USER_ERROR] and "error: none of the checkpoints" in said
    record(dict(kind="checkpoint", how="truncate", file="of all steps", outcome="sentence" if is_told else "traceback"))
    assert is_told and "Traceback" not in said, said[-4000:]
    assert sorted((workdir / "checkpoints").rglob("*")) == before
