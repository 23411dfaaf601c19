"""A run goes on under another Python, and so another jax, than the one that saved it, and back again.

MEAP_JAX_OTHER_PYTHON names an interpreter that has requirements.txt installed; without it there is nothing to test.
"""

import os
import shutil
import subprocess

import pytest

from tiny_runs import ROOT, command, environment, losses, run

OTHER = os.environ.get("MEAP_JAX_OTHER_PYTHON")


@pytest.mark.skipif(OTHER is None, reason="MEAP_JAX_OTHER_PYTHON names no second interpreter")
def test_a_run_goes_from_one_version_of_jax_to_another_and_back(tmp_path):
    setting = dict(data__prepared=tmp_path / "data", checkpoint__every=4, checkpoint__keep=3, eval__tasks="")
    run(tmp_path / "alone", num_steps=12, **setting)
    workdir = tmp_path / "run"
    for python, steps in ((None, 4), (OTHER, 8), (None, 12)):
        words = command(workdir, num_steps=12, **setting)
        words[0] = python or words[0]
        ended = subprocess.run(words, env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        assert steps == 4 or f"resuming from step {steps - 4}" in ended.stderr
        stop_after(workdir, steps)
    run(workdir, num_steps=12, **setting)
    found, expected = losses(workdir), losses(tmp_path / "alone")
    assert list(found) == list(expected)
    for step, (loss, _) in expected.items():  # Another jax sums in another order.
        assert found[step][0] == pytest.approx(loss, rel=1e-4)


def stop_after(workdir, step):
    """As if the run had been killed after the save of a step."""
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
