"""Runs that are really killed go on bit for bit; damaged checkpoints are put aside or refused."""

import shutil
import signal
import subprocess
import time

import pytest

from tiny_runs import ROOT, command, environment, losses, records, run

STEPS, SAVE_EVERY = 120, 20


def setting(folder):
    """Of all runs here: they share their data, in `folder`, nothing is evaluated.

    A step depends on all that it may: the mask ratio goes up, each row draws its own, and some roles have no masks.
    """
    sizes = dict(num_steps=STEPS, checkpoint__every=SAVE_EVERY, eval__tasks="")
    drawn = dict(objective__name="mir", objective__ramp_from=0.0, objective__ratio_per_row=True)
    return dict(data__prepared=folder / "data", objective__where="never:fact,answer", **drawn, **sizes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing disturbs, and the data folder that all of them share."""
    folder = tmp_path_factory.mktemp("reference")
    run(folder / "run", **setting(folder))
    return folder


def start(reference, workdir):
    words = command(workdir, **setting(reference))
    return subprocess.Popen(words, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)


def kill_when(process, moment, timeout=200):
    """SIGKILL as soon as `moment()` holds; returns whether it did before the run was over."""
    end = time.monotonic() + timeout
    while not (now := moment()) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.0005)
    process.kill()
    return now and process.wait() == -signal.SIGKILL


def logged(workdir):
    return sum(file.read_text().count("\n") for file in workdir.glob("metrics.jsonl"))


def saved(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def test_a_run_killed_at_three_moments_one_of_them_in_a_save_gives_bit_identical_losses(reference, tmp_path):
    workdir = tmp_path / "run"
    # Before the first checkpoint.
    assert kill_when(start(reference, workdir), lambda: 3 <= logged(workdir))
    assert saved(workdir) == []
    # While a save is being written: orbax's temporary folder is there.
    assert kill_when(start(reference, workdir), lambda: any((workdir / "checkpoints").glob("40*tmp*")))
    assert 40 not in saved(workdir)
    # Between two saves.
    assert kill_when(start(reference, workdir), lambda: 80 in saved(workdir) and logged(workdir) >= 85)

    assert "resuming from step" in run(workdir, **setting(reference))
    assert losses(workdir) == losses(reference / "run")
    assert [r["step"] for r in records(workdir)] == list(range(1, STEPS + 1))


def truncate(folder):
    """Cuts the largest file of a checkpoint's parameters to half its length."""
    largest = max((f for f in (folder / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def test_a_truncated_checkpoint_is_put_aside_and_the_one_before_is_used(reference, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference / "run", workdir)
    assert saved(workdir) == [STEPS - SAVE_EVERY, STEPS]
    truncate(workdir / "checkpoints" / str(STEPS))
    said = run(workdir, **setting(reference))
    assert f"checkpoints/{STEPS} is damaged" in said and f"resuming from step {STEPS - SAVE_EVERY}" in said
    assert (workdir / "damaged_checkpoints" / str(STEPS)).exists()
    assert losses(workdir) == losses(reference / "run")


def test_a_run_of_which_no_checkpoint_can_be_read_stops_and_keeps_them(reference, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference / "run", workdir)
    for step in saved(workdir):
        truncate(workdir / "checkpoints" / str(step))
    said = run(workdir, exit_code=1, **setting(reference))
    assert "none of the checkpoints" in said and "Traceback" not in said
    assert saved(workdir) == [STEPS - SAVE_EVERY, STEPS]
